"""How the quantised layers of a model compute, and what that takes of memory. Floor 3."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from trocar.core.errors import ConfigError
from trocar.patch.quantised.experts import QuantisedExperts
from trocar.patch.quantised.linear import MODES, QuantisedLinear

Layer = QuantisedLinear | QuantisedExperts


def execute(model: nn.Module, mode: str = "auto", otherwise: str | None = None, keep: bool = True) -> dict[str, int]:
    """Choose how the quantised layers of a model compute; returns how many run in each mode.

    simulated: float products of rounded values, the reference. integer: int8 times int8 into int32, up to 8 bits on both sides; the same
    numbers up to float rounding. packed: 4-bit weights unpacked inside the product, activations as they are rounded (or not); fast for few
    rows in bfloat16, to which the steps are rounded then. float8: 4-bit weights, exact, times activations in e4m3, for CUDA from compute
    capability 8.9, where products come in bfloat16; activations are rounded to e4m3 instead of their grid (coarser than 8 bits, finer than
    4), so that this is another model than the one quantised and measured: it must be named.

    auto: integer where it can be, else packed for bfloat16 layers with float activations on the CPU, else simulated. otherwise: the mode
    (or auto) of layers that cannot run in `mode`. keep: keep what a mode needs of the weights, or make it at every call: slower, and memory
    for the codes alone. Raises ConfigError for a mode that one of the layers cannot run in, with the reason.
    """
    for one in (mode, otherwise or "auto"):
        if one not in (*MODES, "auto"):
            raise ConfigError(f"There is no mode '{one}'.", f"Use {', '.join(MODES)} or auto.")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Layer)}
    half = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    chosen = {path: _chosen(path, layer, mode, otherwise, half) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.mode, layer.keep = chosen[path], keep
        layer.forget()
    found = list(chosen.values())
    return {one: found.count(one) for one in MODES if one in found}


def _chosen(path: str, layer: Layer, mode: str, otherwise: str | None, half: bool) -> str:
    if mode != "auto":
        reason = layer.can(mode)
        if not reason:
            return mode
        if otherwise is None:
            raise ConfigError(f"{path} cannot run in mode '{mode}': {reason}.", "Use auto, or name a mode for such layers (otherwise).")
        return _chosen(path, layer, otherwise, None, half)
    if not layer.can("integer"):
        return "integer"
    local = layer.shared.quantiser.is_float and next(layer.buffers()).device.type == "cpu"
    return "packed" if half and local and not layer.can("packed") else "simulated"


def memory(layers: nn.Module | Iterable[Layer], dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Bytes of the quantised layers of a model (or of these): `float`, the layers they stand for in `dtype`; `stored`: codes, grids,
    biases, transforms; and for every mode that all of them can run in, what it keeps beside that once they have run."""
    found = layers.modules() if isinstance(layers, nn.Module) else layers
    chosen = [one for one in found if isinstance(one, Layer)]
    tensors = {id(part): part for layer in chosen for module in (layer, layer.shared) for part in module.buffers()}
    sizes = {
        "float": dtype.itemsize * sum(layer.float_entries for layer in chosen),
        "stored": sum(part.nbytes for part in tensors.values()),
    }
    modes = [mode for mode in MODES if not any(layer.can(mode) for layer in chosen)]
    return sizes | {mode: sum(layer.bytes_kept(mode, dtype) for layer in chosen) for mode in modes}
