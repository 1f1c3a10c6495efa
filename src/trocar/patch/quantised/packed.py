"""Products of float activations with 4-bit weights that are unpacked inside the kernel: torch's for the CPU and for CUDA. Floor 3."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trocar.core.errors import ConfigError
from trocar.patch.quantised.numbers import unpack

INNER_TILES = 8  # tiles of 16 inputs that the kernel for CUDA takes side by side: inputs are multiples of 128 there


class PackedWeight(NamedTuple):
    """values: as torch's kernel wants them; scales: (groups, O, 2), value = (code - 8) * scales[..., 0] + scales[..., 1]."""

    group: int
    values: torch.Tensor
    scales: torch.Tensor


def kernel_group(size: int) -> int:
    """The largest group of columns the kernels know that divides groups of `size`; 0 if none does."""
    return next((one for one in (256, 128, 64, 32) if size % one == 0), 0)


def packed_weight(packed: torch.Tensor, columns: int, step: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> PackedWeight:
    """Codes as `pack` leaves them, (O, C / 2), with step and zero (O, groups), for activations of `dtype`, to which the steps are rounded.

    Raises ConfigError for other activations than bfloat16 on CUDA.
    """
    group = kernel_group(columns // step.shape[1])
    pairs = torch.stack([step.T, ((8 - zero.float()) * step).T], dim=-1)
    scales = pairs.repeat_interleave(columns // group // step.shape[1], dim=0).to(dtype)
    if packed.device.type == "cpu":
        return PackedWeight(group, torch._convert_weight_to_int4pack_for_cpu(unpack(packed, columns).int(), 1), scales)
    if dtype != torch.bfloat16:
        raise ConfigError(f"Packed products on this device are in bfloat16, not {dtype}.", "Cast the model, or use another mode.")
    swapped = packed << 4 | packed >> 4  # this kernel wants even columns in the high half
    return PackedWeight(group, torch._convert_weight_to_int4pack(swapped, INNER_TILES), scales)


def packed_linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """(T, C) -> (T, O)."""
    if not x.shape[0]:
        return x.new_zeros(0, weight.scales.shape[1])
    product = torch._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else torch._weight_int4pack_mm
    return product(x, weight.values, weight.group, weight.scales)
