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

    @property
    def centred(self) -> bool:
        """Whether code - zero always fits into int8: so it does up to 7 bits, and in 8 bits where zero is in the middle."""
        return self.bits <= 7 or (self.bits == 8 and self.symmetric)


def wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def in_groups(x: torch.Tensor, quantiser: Quantiser) -> torch.Tensor:
    """(..., C) -> (..., groups, columns of a group). Raises ConfigError if the group size does not divide C."""
    size = quantiser.group
    if size is None:
        return x.unsqueeze(-2)
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
    return step_and_zero(*_ends(in_groups(wide(x), quantiser), quantiser, clip), quantiser)


def _ends(
    grouped: torch.Tensor, quantiser: Quantiser, clip: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range that a row's grid covers. (On the CPU torch 2.13 takes eight times as long for `aminmax` as for these two.)"""
    clip = quantiser.clip if clip is None else clip
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if isinstance(clip, float) and clip == 1:
        return low, high
    below, above = clip if isinstance(clip, tuple) else (clip, clip)
    return low * below, high * above


def step_and_zero(
    low: torch.Tensor, high: torch.Tensor, quantiser: Quantiser, floor: Callable[[torch.Tensor], torch.Tensor] = torch.floor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid that covers [low, high], low <= 0 <= high. floor: how zero points are made whole (a straight-through one, to learn)."""
    if quantiser.symmetric:
        step = (torch.maximum(-low, high) / (2 ** (quantiser.bits - 1) - 1)).clamp(min=SMALLEST_STEP)
        return step, torch.full_like(step, 2 ** (quantiser.bits - 1))
    step = ((high - low) / quantiser.top).clamp(min=SMALLEST_STEP)
    return step, floor(0.5 - low / step)


def snap(
    x: torch.Tensor,
    step: torch.Tensor,
    zero: torch.Tensor,
    quantiser: Quantiser,
    rounding: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.round_,
) -> torch.Tensor:
    """Grouped values (..., groups, size) -> their codes as floats. The zero point is added before rounding, so that both ends of a row
    land on both ends of the grid (else quantising twice would differ from once where a row's end lies half-way)."""
    return rounding((x / step[..., None]).add_(zero[..., None])).clamp_(quantiser.bottom, quantiser.top)


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
    rounding, floor = (_through(torch.round), _through(torch.floor)) if straight else (torch.Tensor.round_, torch.floor)
    grouped = in_groups(wide(x), quantiser)
    step, zero = step_and_zero(*_ends(grouped, quantiser, clip), quantiser, floor)
    whole = snap(grouped, step, zero, quantiser, rounding)
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
    both = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).narrow(-1, 0, columns)
    return ((both ^ 8).view(torch.int8) - 8) if signed else both


class IntegerRows(NamedTuple):
    """Quantised rows as integer products need them: value = (values - zero) * step.

    values: (rows, C) int8; step: (rows, 1); zero: (rows, 1) int32, or None where it is 0 in every row; sums: of values - zero over each
    row, (rows, 1) int32, where the rows are a weight's.
    """

    values: torch.Tensor
    step: torch.Tensor
    zero: torch.Tensor | None
    sums: torch.Tensor | None = None


def integer_rows(x: torch.Tensor, quantiser: Quantiser) -> IntegerRows:
    """Activations (rows, C), rounded to their grids."""
    step, zero = grid(x, quantiser)
    code = snap(in_groups(wide(x), quantiser), step, zero, quantiser).squeeze(-2)
    if quantiser.centred:
        return IntegerRows(code.sub_(zero).to(torch.int8), step, None)
    return IntegerRows(code.sub_(128).to(torch.int8), step, zero.to(torch.int32) - 128)


def integer_weight(code: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, quantiser: Quantiser) -> IntegerRows:
    """The codes of a weight (rows, C) uint8 with one step and zero point a row."""
    sums = code.sum(1, dtype=torch.int32)[:, None] - code.shape[1] * zero.to(torch.int32)
    if quantiser.centred:
        return IntegerRows((code - zero.to(torch.uint8)).view(torch.int8), step, None, sums)  # wraps as int8 does
    return IntegerRows((code ^ 128).view(torch.int8), step, zero.to(torch.int32) - 128, sums)


def integer_linear(x: IntegerRows, weight: IntegerRows) -> torch.Tensor:
    """The product of two quantised matrices in integers, (T, O) in the dtype of the steps. x: T rows; weight: O rows; at most 8 bits.

    int8 is multiplied into int32, where sums over up to C = 2^15 columns are exact; the zero points come in through the row sums.
    """
    assert weight.sums is not None
    whole = int_mm(x.values, weight.values.T)
    if weight.zero is not None:
        whole.addcmul_(x.values.sum(1, dtype=torch.int32)[:, None], weight.zero.T, value=-1)
    if x.zero is not None:
        whole.addcmul_(x.zero, weight.sums.T, value=-1)
    return whole.to(x.step.dtype).mul_(x.step).mul_(weight.step.T)


def int_mm(a: torch.Tensor, b: torch.Tensor, demanding: bool | None = None) -> torch.Tensor:
    """int8 (M, K) times int8 (K, N) -> int32 (M, N), with the processor's integer instructions.

    demanding: fill up with zeros, and cut, to what torch asks for on CUDA (more than 16 rows; multiples of 8 inside and outside); default:
    where `a` lies on such a device. Other devices than that and the CPU multiply in float64, where every sum is exact.
    """
    kind = a.device.type
    if kind not in ("cpu", "cuda"):
        return (a.double() @ b.double()).to(torch.int32)
    if kind == "cuda" if demanding is None else demanding:
        rows, columns = a.shape[0], b.shape[1]
        a = filled(a, max(rows, 17), up(a.shape[1], 8))
        return torch._int_mm(a, filled(b.T, up(columns, 8), a.shape[1]).T).narrow(0, 0, rows).narrow(1, 0, columns)
    if a.shape[1] == 1:  # torch 2.13 returns garbage for a single column
        return a.to(torch.int32) * b.to(torch.int32)
    return torch._int_mm(a, b)


def up(number: int, multiple: int) -> int:
    """The next multiple, at least one."""
    return max(-(-number // multiple), 1) * multiple


def filled(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A matrix with zeros behind it up to (rows, columns)."""
    if tuple(x.shape) == (rows, columns):
        return x
    return torch.nn.functional.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0]))
