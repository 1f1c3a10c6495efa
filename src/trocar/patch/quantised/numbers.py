"""Uniform quantisation of rows: the grid of a row, its codes, packed bytes, and products of codes in integers. Floor 3.

A *row* is the last axis: a token of an activation, an output channel of a weight. Codes are unsigned, 0 .. 2^bits - 1, whether the grid is
symmetric or not: value = (code - zero) * step. Half-precision input is computed on in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pydantic
import torch

from trocar.core.config import Config
from trocar.core.errors import ConfigError

FLOAT_BITS = 16  # from here on nothing is quantised
SMALLEST_STEP = 1e-10  # rows of zeros get this step; any positive number does


class Quantiser(Config):
    """A uniform grid per row. bits: 2..15, or 16 for "leave it in float"; symmetric: zero in the middle, levels -(2^(bits-1) - 1) up to its
    opposite; group: consecutive columns that share a grid, None: the whole row; clip: part of the row's range that the grid covers."""

    bits: int = pydantic.Field(default=4, ge=2, le=FLOAT_BITS)
    symmetric: bool = False
    group: int | None = pydantic.Field(default=None, ge=1)
    clip: float = pydantic.Field(default=1.0, gt=0, le=1)

    @property
    def is_float(self) -> bool:
        return self.bits >= FLOAT_BITS

    @property
    def top(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    @property
    def bottom(self) -> int:
        """The lowest code: symmetric grids have no partner for the lowest level and leave it out."""
        return 1 if self.symmetric else 0


def wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def in_groups(x: torch.Tensor, quantiser: Quantiser) -> torch.Tensor:
    """(..., C) -> (..., groups, columns of a group). Raises ConfigError if the group size does not divide C."""
    size = quantiser.group or x.shape[-1]
    if x.shape[-1] % size:
        raise ConfigError(f"Groups of {size} columns do not divide rows of {x.shape[-1]}.", "Choose a divisor as the group size.")
    return x.unflatten(-1, (-1, size))


def grid(
    x: torch.Tensor, quantiser: Quantiser, clip: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and zero point of every row, both (..., groups) in the computing dtype; zero points are whole numbers in [0, 2^bits - 1].

    clip: instead of the quantiser's own: one number, (..., groups) ratios, or a pair of them for the low and the high end.
    The grid always holds 0, so that the zero point can be stored; for rows that have both signs this changes nothing.
    """
    low, high = in_groups(wide(x), quantiser).aminmax(dim=-1)
    return step_and_zero(*_clipped(low, high, quantiser, clip), quantiser)


def _clipped(
    low: torch.Tensor, high: torch.Tensor, quantiser: Quantiser, clip: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    clip = quantiser.clip if clip is None else clip
    below, above = clip if isinstance(clip, tuple) else (clip, clip)
    return low.clamp(max=0) * below, high.clamp(min=0) * above


def step_and_zero(
    low: torch.Tensor, high: torch.Tensor, quantiser: Quantiser, floor: Callable[[torch.Tensor], torch.Tensor] = torch.floor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid that covers [low, high], low <= 0 <= high. floor: how zero points are made whole (a straight-through one, to learn)."""
    if quantiser.symmetric:
        step = (torch.maximum(-low, high) / (2 ** (quantiser.bits - 1) - 1)).clamp(min=SMALLEST_STEP)
        return step, torch.full_like(step, 2 ** (quantiser.bits - 1))
    step = ((high - low) / quantiser.top).clamp(min=SMALLEST_STEP)
    return step, floor(-low / step + 0.5)


def snap(
    x: torch.Tensor,
    step: torch.Tensor,
    zero: torch.Tensor,
    quantiser: Quantiser,
    rounding: Callable[[torch.Tensor], torch.Tensor] = torch.round,
) -> torch.Tensor:
    """Grouped values (..., groups, size) -> their codes as floats. The zero point is added before rounding, so that both ends of a row
    land on both ends of the grid (else quantising twice would differ from once where a row's end lies half-way)."""
    return rounding(x / step[..., None] + zero[..., None]).clamp(quantiser.bottom, quantiser.top)


def codes(x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, quantiser: Quantiser) -> torch.Tensor:
    """(..., C) -> codes, uint8 up to 8 bits, else int32."""
    found = snap(in_groups(wide(x), quantiser), step, zero, quantiser).flatten(-2)
    return found.to(torch.uint8 if quantiser.bits <= 8 else torch.int32)


def dequantise(code: torch.Tensor, step: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Codes (..., C) with step and zero (..., groups) -> values (..., C) in the dtype of step."""
    grouped = code.unflatten(-1, (step.shape[-1], -1)).to(step.dtype)
    return ((grouped - zero.to(step.dtype)[..., None]) * step[..., None]).flatten(-2)


def quantised(
    x: torch.Tensor,
    quantiser: Quantiser,
    clip: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | float | None = None,
    straight: bool = False,
) -> torch.Tensor:
    """Round every row to its own grid and return the values, in x's dtype. 16 bits: x itself.

    straight: gradients pass through the rounding as if it were not there (and through the clip only inside it).
    """
    if quantiser.is_float:
        return x
    rounding, floor = (_through(torch.round), _through(torch.floor)) if straight else (torch.round, torch.floor)
    low, high = in_groups(wide(x), quantiser).aminmax(dim=-1)
    step, zero = step_and_zero(*_clipped(low, high, quantiser, clip), quantiser, floor)
    whole = snap(in_groups(wide(x), quantiser), step, zero, quantiser, rounding)
    return ((whole - zero[..., None]) * step[..., None]).flatten(-2).to(x.dtype)


def _through(rounding: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x + (rounding(x) - x).detach()


def pack(code: torch.Tensor) -> torch.Tensor:
    """Codes of at most 4 bits, (..., C) uint8 in 0..15 or int8 in -8..7 -> (..., ceil(C / 2)) uint8; even columns in the low half."""
    bits = code.view(torch.uint8) & 15 if code.dtype == torch.int8 else code
    if bits.shape[-1] % 2:
        bits = torch.nn.functional.pad(bits, (0, 1))
    return bits[..., 0::2] | (bits[..., 1::2] << 4)


def unpack(packed: torch.Tensor, columns: int, signed: bool = False) -> torch.Tensor:
    """The codes that `pack` was given, (..., columns): uint8, or int8 in -8..7 if signed."""
    both = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :columns]
    return ((both ^ 8).view(torch.int8) - 8) if signed else both


class IntegerRows(NamedTuple):
    """Quantised rows as integer products need them. values: codes - 128, (rows, C) int8; step: (rows, 1); zero: zero point - 128, and sums:
    of the values of each row, both (rows, 1) int32."""

    values: torch.Tensor
    step: torch.Tensor
    zero: torch.Tensor
    sums: torch.Tensor


def integer_rows(code: torch.Tensor, step: torch.Tensor, zero: torch.Tensor) -> IntegerRows:
    """Codes (rows, C) uint8 with one step and zero point a row, ready for `integer_linear`."""
    values = (code ^ 128).view(torch.int8)  # flipping the highest bit subtracts 128
    return IntegerRows(values, step, zero.to(torch.int32) - 128, values.sum(1, dtype=torch.int32)[:, None])


def integer_linear(x: IntegerRows, weight: IntegerRows) -> torch.Tensor:
    """The product of two quantised matrices in integers, (T, O) in the dtype of the steps. x: T rows; weight: O rows; at most 8 bits.

    int8 is multiplied into int32, where sums over up to C = 2^15 columns are exact; the zero points come in through the row sums.
    """
    columns = x.values.shape[1]
    whole = int_mm(x.values, weight.values.T)
    whole -= x.sums * weight.zero.T
    whole -= x.zero * (weight.sums - columns * weight.zero).T
    return whole.to(x.step.dtype).mul_(x.step).mul_(weight.step.T)


def int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int8 (M, K) times int8 (K, N) -> int32 (M, N), with the processor's integer instructions where torch has them."""
    if a.shape[1] == 1:  # torch 2.13 returns garbage for a single column
        return a.to(torch.int32) * b.to(torch.int32)
    try:
        return torch._int_mm(a, b)
    except (RuntimeError, NotImplementedError):  # shapes or devices that this torch has no kernel for
        return (a.double() @ b.double()).to(torch.int32)  # exact: every partial sum is below 2^53
