"""DuQuant, its ablations and the methods it is compared with, as settings of one harness. Floor 5."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from trocar.compress.duquant.config import Activations, Chain, DuQuantConfig, Smoothing, Weights
from trocar.core.errors import ConfigError, nearest

_SMOOTHQUANT = Smoothing(alpha=0.5)  # arXiv 2211.10438, section 4

_EVEN = Smoothing(alpha=0.5, measure="rms")

_FOR_ENGINES: dict[str, Any] = {"symmetric": True, "clip": "search", "rounding": "gptq", "activation_clip": 1.0}

PRESETS: dict[str, dict[str, Any]] = {
    "rtn": {"smoothing": None, "chain": None},
    "gptq": {"smoothing": None, "chain": None, "rounding": "gptq"},
    "smoothquant": {"smoothing": _SMOOTHQUANT, "chain": None},
    "smooth": {"smoothing": Smoothing(), "chain": None},
    "random": {"smoothing": None, "chain": Chain(steps=("rotate",), rotation="random")},
    "hadamard": {"smoothing": None, "chain": Chain(steps=("rotate",), rotation="hadamard")},
    "quarot": {"smoothing": None, "chain": Chain(steps=("rotate",), rotation="full-hadamard")},
    "quarot-gptq": {"smoothing": None, "chain": Chain(steps=("rotate",), rotation="full-hadamard"), "rounding": "gptq"},
    "smooth-random": {"chain": Chain(steps=("rotate",), rotation="random")},
    "smooth-hadamard": {"chain": Chain(steps=("rotate",), rotation="hadamard")},
    "rotation": {"smoothing": None, "chain": Chain(steps=("rotate",))},
    "smooth-rotation": {"chain": Chain(steps=("rotate",))},
    "no-permutation": {"chain": Chain(steps=("rotate", "rotate"))},
    "random-permutation": {"chain": Chain(permutation="random")},
    "no-smoothing": {"smoothing": None},
    "two-permutations": {"chain": Chain(steps=("rotate", "permute", "rotate", "permute", "rotate"))},
    "permute-first": {"chain": Chain(steps=("permute", "rotate"))},
    "per-block": {"chain": Chain(per_block=True)},
    "hadamard-zigzag": {"chain": Chain(rotation="hadamard")},
    "duquant": {},
    "duquant-clip": {"clip": "search"},
    "duquant-gptq": {"clip": "search", "rounding": "gptq"},
    "duquant-gptaq": {"smoothing": _EVEN, "clip": "search", "rounding": "gptaq", "activation_clip": "search"},
    "folded": {"smoothing": Smoothing(online=False), "chain": None, **_FOR_ENGINES},
    "export": {
        "smoothing": Smoothing(online=False),
        "chain": Chain(steps=("permute", "rotate"), foldable=True),
        **_FOR_ENGINES,
    },
    "duquant-lwc": {"smoothing": Smoothing(alpha=0.5), "clip": "learned"},
}


def preset(name: str, bits: str = "W4A4", **changes: Any) -> DuQuantConfig:
    """The settings of a method at some bits (`W4A4`, `W4A16`, ...). changes: further settings, and `block_size`, `search_steps`, `clip`
    (weights), `rounding`, `reach`, `activation_clip` and `symmetric` where they belong.

    "quarot" is one Hadamard rotation over all channels in front of every layer, without folding it through the residual stream: the same
    arithmetic in front of the quantisers, not the same speed. Raises ConfigError for a name or bits that do not exist.
    """
    if name not in PRESETS:
        raise ConfigError(f"There is no method '{name}'.", nearest(name, PRESETS))
    found = re.fullmatch(r"W(\d+)A(\d+)", bits)
    if found is None:
        raise ConfigError(f"'{bits}' are no bits.", "Write W4A4, W4A8, W6A6, W8A8, W4A16, ...")
    settings = {**PRESETS[name], **changes}
    take: Callable[..., Any] = settings.pop
    symmetric = take("symmetric", False)
    shaping = {"clip": take("clip", None), "rounding": take("rounding", "nearest"), "reach": take("reach", None)}
    weights = Weights.parse({"bits": int(found[1]), "symmetric": symmetric, **shaping}, "weights")
    clip = take("activation_clip", None)
    activations = Activations.parse({"bits": int(found[2]), "symmetric": symmetric, "clip": clip}, "activations")
    chain = settings.pop("chain", Chain())
    places = {key: settings.pop(key) for key in ("block_size", "search_steps") if key in settings}
    if chain is not None:
        chain = Chain.parse({**chain.model_dump(), **places}, "chain")
    return DuQuantConfig.parse({"weights": weights, "activations": activations, "chain": chain, **settings}, name)
