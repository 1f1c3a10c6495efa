"""Products of 4-bit weights with activations in 8-bit floating point (e4m3), for processors that multiply such numbers. Floor 3.

Weights stay what they are: whole numbers up to 16 in size are exact in e4m3, and code - zero is at most 15 for codes of 4 bits.
Activations are rounded in another way than by a `Quantiser`: to 3 bits behind the leading one, each entry by its own size, after every
token was scaled to the largest e4m3 number. An entry is off by at most 1/16 of itself (a grid of 8 bits: 1/510 of the row's range).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from trocar.patch.quantised.numbers import SMALLEST_STEP, filled, up, wide

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
CAPABILITY = (8, 9)  # of the first CUDA devices that multiply e4m3


class Float8Rows(NamedTuple):
    """Rows in e4m3 by groups of columns: value = values * step.

    values: (groups, rows, columns of a group), step: (groups, rows, 1) float32; of activations there is one group.
    """

    values: torch.Tensor
    step: torch.Tensor


def float8_rows(x: torch.Tensor) -> Float8Rows:
    """Activations (rows, C), each row scaled so that its largest magnitude is 448. Rows of zeros stay zeros."""
    x = wide(x).float()
    step = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=SMALLEST_STEP)
    return Float8Rows((x / step).to(E4M3)[None], step[None])


def float8_weight(code: torch.Tensor, step: torch.Tensor, zero: torch.Tensor) -> Float8Rows:
    """Codes (rows, C) with step and zero (rows, groups), |code - zero| <= 16: exact."""
    centred = code.unflatten(1, (step.shape[1], -1)).to(torch.int16) - zero.to(torch.int16)[..., None]
    return Float8Rows(centred.transpose(0, 1).to(E4M3).contiguous(), step.float().T[..., None].contiguous())


def float8_linear(x: Float8Rows, weight: Float8Rows) -> torch.Tensor:
    """(T, O) float32: the sum over the weight's groups of the products of their columns."""
    groups, _, size = weight.values.shape
    parts = x.values[0].unflatten(1, (groups, size)).transpose(0, 1)
    found = [scaled_mm(part, other, x.step[0], step) for part, other, step in zip(parts, weight.values, weight.step, strict=True)]
    return found[0] if groups == 1 else torch.stack(found).sum(0)


def scaled_mm(a: torch.Tensor, b: torch.Tensor, left: torch.Tensor, right: torch.Tensor, kernel: bool | None = None) -> torch.Tensor:
    """(a left) (b right)^T for e4m3 matrices (M, K) and (N, K) with factors of their rows (M, 1) and (N, 1): (M, N) float32.

    kernel: whether torch's product of such matrices is used, with zeros filled in up to the multiples of 16 it asks for; default: on CUDA,
    where it returns bfloat16. On the CPU torch 2.13 has it too, but slower than the same sum in float32, which is taken there.
    """
    if not (a.device.type == "cuda" if kernel is None else kernel) or not a.shape[0]:
        return (a.float() @ b.float().T) * left * right.T
    rows, columns, inner = a.shape[0], b.shape[0], up(a.shape[1], 16)
    outer = up(columns, 16)
    dtype = torch.bfloat16 if a.device.type == "cuda" else torch.float32
    a, b, right = filled(a.contiguous(), rows, inner), filled(b, outer, inner), filled(right, outer, 1)
    return torch._scaled_mm(a, b.T, scale_a=left, scale_b=right.T, out_dtype=dtype).narrow(1, 0, columns).float()
