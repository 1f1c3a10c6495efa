"""The mask hypernetwork: from the class token of a failing image to one logit per mask entry (arXiv 2411.01948)."""

from __future__ import annotations

import json
import os
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import pydantic
import torch
from torch import nn

from trocar.anatomy import fingerprint, structure_fingerprint
from trocar.core.config import Config
from trocar.core.errors import DataError, EditError
from trocar.core.files import atomic_path
from trocar.core.seeds import derive
from trocar.edit.where_to_edit.place import Place

FORMAT, VERSION = "trocar-mask-hypernetwork", 1
CLAMP = 1e-5
MAX_HEADER = 1 << 20


class Made(Config):
    """What a hypernetwork belongs to and how it was made; stored in its file."""

    rows: int = pydantic.Field(ge=1)
    entries: int = pydantic.Field(ge=1)
    width: int = pydantic.Field(ge=1)
    depth: int = pydantic.Field(ge=1)
    heads: int = pydantic.Field(ge=1)
    kind: str = "fo"
    first_block: int = pydantic.Field(ge=0)
    tower: str = ""
    modules: list[str]
    structure: str
    fingerprint: str
    report: dict[str, Any] = pydantic.Field(default_factory=dict)


class _Block(nn.Module):
    """Pre-norm transformer block: attention with an output map, then d -> d -> d with GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, length, width)
        x = x + self.out(mixed)
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class MaskHypernetwork(nn.Module):
    """n learned tokens (zero at the start) and the feature as one more token, no positions; `depth` blocks of width d; token k has its own
    map d -> h. The tokens start equal, so only the n separate output maps break the symmetry.

    `mean` (n, h) is the mean training label in the same scale as the output: the constant mask. Random state is not touched: initial
    weights come from `seed`. Parameters: 3 x 3.55 M + 6 x 2.36 M = 24.8 M for ViT-B/16.
    """

    SCALE = 3.0  # a: mask probability = sigmoid(a u)

    def __init__(self, made: Made, seed: int = 0) -> None:
        super().__init__()
        if made.width % made.heads:
            raise EditError(f"{made.heads} heads do not divide the hypernetwork's width {made.width}.", "Set heads to a divisor of it.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "hypernetwork"))
            self.tokens = nn.Parameter(torch.zeros(made.rows, made.width))
            self.blocks = nn.ModuleList([_Block(made.width, made.heads) for _ in range(made.depth)])
            self.outputs = nn.ModuleList([nn.Linear(made.width, made.entries) for _ in range(made.rows)])
        self.register_buffer("mean", torch.zeros(made.rows, made.entries))
        self.mean: torch.Tensor
        self.made = made

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features (B, d) -> u (B, n, h), unbounded: rank these, not the clamped probabilities."""
        x = torch.cat([self.tokens.expand(len(features), -1, -1), features[:, None].to(self.tokens.dtype)], 1)
        for block in self.blocks:
            x = block(x)
        return torch.stack([output(x[:, row]) for row, output in enumerate(self.outputs)], 1)

    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """sigmoid(3 u) clamped to [1e-5, 1 - 1e-5], as published; meaningful for labels of kind `ref`."""
        return torch.sigmoid(self.SCALE * self(features)).clamp(CLAMP, 1 - CLAMP)

    @property
    def learned(self) -> bool:
        """Whether it beat the constant mask on held-out pairs; otherwise its masks should not be called learned."""
        return bool(self.made.report.get("better_than_constant", False))

    def fit_to(self, place: Place) -> None:
        """Refuse a model of other shapes or module names; warn if only the weights differ (edited or tuned since).

        Raises EditError naming what differs.
        """
        made, here = self.made, made_for(place)
        for name in ("first_block", "tower", "rows", "entries", "width", "modules", "structure"):
            if getattr(made, name) != here[name]:
                raise EditError(
                    f"The hypernetwork is of another model or place: {name} was {getattr(made, name)!r} and is {here[name]!r} here.",
                    "Train one for this model, or set first_block and blocks as in its training.",
                )
        if made.fingerprint != here["fingerprint"]:
            warnings.warn(
                "The hypernetwork was trained on other weights of the same architecture; the model was edited or tuned since.", stacklevel=3
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with a JSON header, atomically."""
        from safetensors.torch import save_file

        header = json.dumps({"format": FORMAT, "version": VERSION, "made": self.made.model_dump()}, sort_keys=True)
        with atomic_path(path) as temporary:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, temporary, metadata={"trocar": header})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskHypernetwork:
        """Read what `save` wrote; executes nothing. Raises DataError for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("trocar", "null")
                header = json.loads(text) if len(text) <= MAX_HEADER else None
                if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
                    raise DataError(
                        f"{path} is not a mask hypernetwork of version {VERSION}.", "Name a file written by MaskHypernetwork.save."
                    )
                made = Made.parse(header.get("made"), "header")
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
                stored = made.depth * (4 * made.width**2 + made.width) + made.rows * made.entries * made.width
                if stored > 4 * sum(torch.Size(shape).numel() for shape in shapes.values()):
                    raise DataError(f"{path} announces more weights than it holds.", "The file is damaged.")
                network = cls(made)
                expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
                if shapes != expected:
                    raise DataError(f"{path} does not hold the tensors that its header announces.", "The file is damaged.")
                network.load_state_dict({name: file.get_tensor(name) for name in shapes})
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as a mask hypernetwork: {error}.", "Check the path, or train it again.") from None
        return network.eval()


def made_for(place: Place) -> dict[str, Any]:
    """The identity of a model and place: shapes, module names and weights."""
    return {
        "first_block": place.first,
        "tower": place.tower.name,
        "rows": place.rows,
        "entries": place.entries,
        "width": place.tower.width,
        "modules": [matrix.view.name for matrix in place.matrices],
        "structure": structure_fingerprint(place.model),
        "fingerprint": model_fingerprint(place.model),
    }


_FINGERPRINTS: weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], str]] = weakref.WeakKeyDictionary()


def model_fingerprint(model: nn.Module) -> str:
    """The model's fingerprint, computed anew only if a tensor was exchanged or written to in place since the last time.

    Writing through `.data` goes unseen.
    """
    tensors = [*model.parameters(), *model.buffers()]
    stamps = [(tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version) for tensor in tensors]
    known = _FINGERPRINTS.get(model)
    if known is None or known[0] != stamps or any(version < 0 for _, version in stamps):
        known = _FINGERPRINTS[model] = (stamps, fingerprint(model))
    return known[1]


def default_heads(width: int, wanted: int = 6) -> int:
    """The largest divisor of the width up to 6: 6 for 768 and 384, 4 for 128."""
    return next(heads for heads in range(wanted, 0, -1) if width % heads == 0)


def predict(network: MaskHypernetwork, features: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Mask scores (E, n, h) for E edits of m images each. One image: its logits u. Several: for `ref` the mean of sigmoid(3 u) (code),
    for `fo` the mean of u."""
    network.eval()
    with torch.no_grad():
        u = network(features[groups.flatten().to(features.device)].to(network.tokens.device)).view(*groups.shape, *network.mean.shape)
        if groups.shape[1] > 1 and network.made.kind == "ref":
            return torch.sigmoid(network.SCALE * u).mean(1)
        return u.mean(1)


def report_text(report: Mapping[str, Any]) -> str:
    """One sentence on how good the hypernetwork is."""
    against = f"held-out loss {report['held_out']:.4g}, constant mask {report['constant']:.4g}"
    if report["better_than_constant"]:
        return f"Better than the constant mask: {against}."
    return f"No better than the constant mask ({against}): use mask constant or gradient-norm, or train on more pairs."
