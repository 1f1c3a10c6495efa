"""Which blocks to edit: the window whose attention outputs, copied from the guide's run at the last token, help the answer most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trocar.anatomy import Anatomy
from trocar.core.errors import DataError, EditError
from trocar.edit.creme.case import Case
from trocar.edit.creme.config import CremeConfig
from trocar.edit.creme.edit import solve
from trocar.edit.creme.moments import Moments
from trocar.locate.patching import Effects, module_effects
from trocar.trace.queries import language_tower

LOOKED_AT = 12  # windows whose edit is tried before a budget is called too small


@dataclass(frozen=True)
class Chosen:
    """layers: the window; effects: of every window, as they were measured; gain: the chosen one's mean effect; passed_over: better windows
    whose edit was above the budget, with the largest share of a matrix's norm that it moved."""

    layers: tuple[int, ...]
    effects: Effects
    gain: float
    passed_over: tuple[tuple[tuple[int, ...], float], ...] = ()


def window_size(layers: int, asked: int | None) -> int:
    """A fifth of the blocks, at least 3 (published: 9 of 32; 7 in the reference code's default), never all."""
    return min(max(1, layers - 1), asked if asked is not None else max(3, round(layers / 5)))


def choose_layers(
    model: Any,
    tokenizer: Any,
    cases: Sequence[Case],
    config: CremeConfig,
    moments: Moments | None = None,
    batch_size: int = 32,
) -> Chosen:
    """Copy every window of blocks from guide to question on `cases` and take the best one that `config.budget` allows.

    Block 0 is left out: it reads the guide's own words, so that copying it copies the input. With a budget, the edit of each window is
    found (for every case alone) in order of gain, and the first is taken that moves no matrix by more than that share of its norm.
    Raises EditError if none of the best dozen does, DataError where no window fits.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    depth = language_tower(anatomy).n_layers
    width = window_size(depth, config.window)
    kind = "attention" if config.module == "attention" else "mlp"
    prompts, guides, targets = ([getattr(case, name) for case in cases] for name in ("prompt", "guide", "target"))
    options = {"window": width, "mode": config.mode, "batch_size": batch_size, "fingerprint": ""}
    effects = module_effects(anatomy, tokenizer, prompts, guides, targets, [kind], **options)
    starts = range(1, depth - width + 1)
    if not starts:
        raise DataError(f"There is no window of {width} of {depth - 1} blocks.", "Ask for fewer, or name the layers.")
    gains = effects.effects[kind].mean(0)[[start + width // 2 for start in starts]]
    passed: list[tuple[tuple[int, ...], float]] = []
    for place in np.argsort(-gains, kind="stable").tolist()[:LOOKED_AT]:
        layers = tuple(range(starts[place], starts[place] + width))
        if config.budget is None:
            return Chosen(layers, effects, float(gains[place]))
        fixed = config.model_copy(update={"layers": layers})
        share = max(row["share"] for case in cases for row in solve(anatomy, tokenizer, [case], fixed, layers, moments)[0])
        if share <= config.budget:
            return Chosen(layers, effects, float(gains[place]), tuple(passed))
        passed.append((layers, share))
    least = min(share for _, share in passed)
    raise EditError(
        f"No window of {width} blocks can be edited within a budget of {config.budget} (the least was {least:.3f}).",
        "Raise the budget, or ask for a narrower window.",
    )
