"""Settings of DuQuant (arXiv 2406.01721) and of the methods it is compared with. Floor 5."""

from __future__ import annotations

from typing import Literal

import pydantic

from trocar.core.config import Config
from trocar.patch.quantised.numbers import Quantiser

WIDE_ROW = 2048  # rows from which on the paper's clip ratios help; on shorter ones they hurt


class Weights(Config):
    """Weights: bits, 16 = float; clip: part of each row's range that is covered, `search` for each row's own by least squared error,
    `learned` for a low and a high end per row, trained block by block; None: 0.8 (paper, section 5) at 4 bits on rows of 2048 columns or
    more, else 1. rounding: `nearest`; `gptq`, which corrects the columns still to come for the error of those that were rounded; `gptaq`,
    which also aims at the outputs of the float model, so that it makes good what went wrong before the layer and in its input. reach: for
    both, input rows count as if they were at most this many times as long as the median row; None: as long as they are."""

    bits: int = pydantic.Field(default=4, ge=2, le=16)
    symmetric: bool = False
    group: int | None = pydantic.Field(default=None, ge=1)
    clip: float | Literal["search", "learned"] | None = None
    rounding: Literal["nearest", "gptq", "gptaq"] = "nearest"
    reach: float | None = pydantic.Field(default=None, ge=1)

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Weights:
        if self.bits == 16 and (self.clip in ("search", "learned") or self.rounding != "nearest"):
            raise ValueError("weights of 16 bits stay as they are: no clip, no gptq, no gptaq")
        if isinstance(self.clip, float) and not 0 < self.clip <= 1:
            raise ValueError("a clip ratio lies above 0 and at most at 1")
        if self.clip == "learned" and self.rounding != "nearest":
            raise ValueError(f"a learned clip needs rounding to nearest; use clip: search with {self.rounding}")
        return self

    def quantiser(self, columns: int) -> Quantiser:
        return Quantiser(bits=self.bits, symmetric=self.symmetric, group=self.group, clip=_ratio(self.clip, self.bits, columns, 0.8))


class Activations(Config):
    """Activations, per token, found as they come. clip: part of each token's range that is covered; `search` for one ratio for each
    group, the best on calibration; None: 0.9 (paper, section 5) at 4 bits on 2048 channels or more, else 1."""

    bits: int = pydantic.Field(default=4, ge=2, le=16)
    symmetric: bool = False
    clip: float | Literal["search"] | None = None

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Activations:
        if isinstance(self.clip, float) and not 0 < self.clip <= 1:
            raise ValueError("a clip ratio lies above 0 and at most at 1")
        return self

    def quantiser(self, channels: int) -> Quantiser:
        return Quantiser(bits=self.bits, symmetric=self.symmetric, clip=_ratio(self.clip, self.bits, channels, 0.9))


class Chain(Config):
    """The transforms in front of a group of layers.

    steps: rotations and permutations in order (paper: rotate, permute, rotate; `permute, rotate` is the form that folds into a checkpoint).
    rotation: `greedy` (paper), `hadamard` in blocks, `full-hadamard` over all channels (in blocks of the largest size for which a
    Hadamard matrix is known), `random`. permutation: `zigzag` (paper) or `random`. block_size: 128 (paper); `auto`: the largest divisor of
    the channels up to 128. search_steps: of each greedy search; paper 256, measured by its authors to be no better than 16.
    foldable: leave permutations out where they do not fold into the layers before, which they do in front of the down map only.
    per_block: a rotation for every block of its own. objective, outlier, draw: parity with the released code (`greedy_rotation`).
    """

    steps: tuple[Literal["rotate", "permute"], ...] = ("rotate", "permute", "rotate")
    rotation: Literal["greedy", "hadamard", "full-hadamard", "random"] = "greedy"
    permutation: Literal["zigzag", "random"] = "zigzag"
    block_size: int | Literal["auto"] = "auto"
    search_steps: int = pydantic.Field(default=16, ge=0)
    foldable: bool = False
    per_block: bool = False
    objective: Literal["peak", "range"] = "peak"
    outlier: Literal["column", "row"] = "column"
    draw: Literal["each", "once"] = "each"


class Smoothing(Config):
    """s = a^alpha / w^(1 - alpha) per channel, a and w the size of activation and weight. measure: of size, `peak`, the largest magnitude
    (paper), or `rms`, the root mean square (of tokens scaled to one length): once rotations have spread what sticks out, it is mean squares
    that rounding costs, and with alpha 0.5 their product over activations and weights is least. alpha: paper 0.6, 0.5 with a learned clip.
    weights: the maximum over `all` layers of the group, or only the `first` one (q of q, k, v; up of gate, up: the released
    code). online: whether layers whose scale folds into nothing divide as they run, or are left unsmoothed."""

    alpha: float = pydantic.Field(default=0.6, ge=0, le=1)
    measure: Literal["peak", "rms"] = "peak"
    weights: Literal["all", "first"] = "all"
    online: bool = True


class Learning(Config):
    """Learned clip (LWC): AdamW on a low and a high end per row, to keep the block's output (paper: 20 epochs, 5e-3)."""

    epochs: int = pydantic.Field(default=20, ge=1)
    learning_rate: float = pydantic.Field(default=5e-3, gt=0)


class DuQuantConfig(Config):
    """Everything that decides what a quantised model computes.

    smoothing, chain: None leaves them out (both None: round to nearest). attention: bits of queries, keys and values (after the rotary
    embedding; queries and keys turned by a Hadamard matrix of the head), None: float. keep: roles of groups by component,
    `L1.mlp.down: 8`, whose weights and activations get these bits (16 = left alone). rows: most tokens of the calibration input that a
    group looks at; of a longer input half are those with the largest entries. calibration: real `rows`, or the position-wise `mean` over
    windows (paper). batch_size: windows that run together.
    """

    weights: Weights = Weights()
    activations: Activations = Activations()
    smoothing: Smoothing | None = Smoothing()
    chain: Chain | None = Chain()
    attention: int | None = pydantic.Field(default=None, ge=2, le=15)
    learning: Learning = Learning()
    keep: dict[str, int] = pydantic.Field(default_factory=dict)
    rows: int = pydantic.Field(default=4096, ge=1)
    calibration: Literal["rows", "mean"] = "rows"
    batch_size: int = pydantic.Field(default=4, ge=1)

    @pydantic.model_validator(mode="after")
    def _possible(self) -> DuQuantConfig:
        if self.calibration == "mean" and self.weights.rounding == "gptaq":
            raise ValueError("gptaq compares real rows of both models; use calibration: rows")
        return self


def _ratio(clip: object, bits: int, columns: int, papers: float) -> float:
    if isinstance(clip, float | int):
        return float(clip)
    return papers if clip is None and bits <= 4 and columns >= WIDE_ROW else 1.0
