"""Modules that stand in for linear layers: low-bit weights, activations rounded on the way in, a change of basis in front. Floor 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trocar.core.errors import ConfigError
from trocar.patch.quantised.numbers import (
    IntegerRows,
    Quantiser,
    codes,
    dequantise,
    grid,
    integer_linear,
    integer_rows,
    pack,
    quantised,
    unpack,
)
from trocar.patch.quantised.transform import Transform

MODES = ("simulated", "integer", "packed")


class FullPrecision(nn.Module):
    """A module whose floating buffers are moved but never cast: a step or a rotation in half precision is another one."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = {name: part for name, part in self._buffers.items() if part is not None and part.is_floating_point()}
        super()._apply(fn, recurse)
        self._buffers.update({name: part.to(self._buffers[name].device) for name, part in kept.items()})  # type: ignore[union-attr]
        return self


class GroupInput(FullPrecision):
    """What happens to the input that several linear layers read: transform, then quantisation per token. The work is done once per
    tensor: siblings that are called with the very same object get the result of the first of them.

    readers: how many layers read it; after the last one nothing is kept.
    """

    def __init__(self, transform: Transform, quantiser: Quantiser, readers: int = 1) -> None:
        super().__init__()
        self.channels, self.quantiser, self.readers = transform.channels, quantiser, readers
        self.kinds = tuple(name for name, _ in transform.parts())
        for name, part in transform.parts():
            self.register_buffer(name, part.float() if part.is_floating_point() else part)
        self._last: tuple[torch.Tensor, int, Any, int] | None = None

    @property
    def transform(self) -> Transform:
        named = {name: self.get_buffer(name) for name in self.kinds}
        return Transform(self.channels, named.pop("scale", None), tuple(named.values()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._once(x, self.values)

    def integers(self, x: torch.Tensor) -> IntegerRows:
        """The transformed input as integer rows, leading axes flattened; found once for all readers, as `forward` is."""
        return self._once(x, self._integers)

    def _integers(self, x: torch.Tensor) -> IntegerRows:
        turned = self.transform.online(x.flatten(0, -2))
        step, zero = grid(turned, self.quantiser)
        return integer_rows(codes(turned, step, zero, self.quantiser), step, zero)

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """The transformed and rounded input, computed anew."""
        turned = self.transform.online(x)
        return quantised(turned, self.quantiser, straight=torch.is_grad_enabled() and turned.requires_grad)

    def _once(self, x: torch.Tensor, compute: Any) -> Any:
        if self.readers == 1 or torch.is_grad_enabled():
            return compute(x)
        last = self._last
        if last is None or last[0] is not x or last[1] != x._version:
            last = (x, x._version, {}, 0)
        if compute.__name__ not in last[2]:
            last[2][compute.__name__] = compute(x)
        found, seen = last[2][compute.__name__], last[3] + 1
        self._last = None if seen >= self.readers else (last[0], last[1], last[2], seen)
        return found

    def extra_repr(self) -> str:
        return f"{self.channels} channels, {' '.join(self.kinds) or 'no transform'}, {self.quantiser.bits} bits, {self.readers} readers"


class QuantisedLinear(FullPrecision):
    """y = quantised(x G) (quantised(W G^-T))^T + b.

    weight: codes (O, C), step and zero (O, groups), or a float matrix with `quantiser.bits` 16. The codes are kept, two to a byte up to 4
    bits. mode: how the product is computed (`MODES`, set by `execute`); what a mode needs is made at the first call and kept beside the
    codes: a float matrix (`simulated`, the reference), int8 (`integer`), half a byte a weight (`packed`).
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        shared: GroupInput,
        quantiser: Quantiser,
        weight: torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        bias: torch.Tensor | None,
        owner: bool = True,
    ) -> None:
        super().__init__()
        self.quantiser, self.mode = quantiser, "simulated"
        self._shared = [shared]  # in a list, so that of the siblings only the owner counts it among its modules
        if owner:
            self.input = shared
        if isinstance(weight, torch.Tensor):
            self.out_features, self.in_features = weight.shape[0], weight.shape[1]
            self.register_buffer("values", weight)
        else:
            code, step, zero = weight
            self.out_features, self.in_features = code.shape[0], code.shape[1]
            self.register_buffer("codes", pack(code) if quantiser.bits <= 4 else code)
            self.register_buffer("step", step.float())
            self.register_buffer("zero", zero.to(torch.uint8 if quantiser.bits <= 8 else torch.int32))
        self.register_buffer("bias", bias)
        self._ready: tuple[Any, Any] | None = None

    @property
    def shared(self) -> GroupInput:
        return self._shared[0]

    def code(self) -> torch.Tensor:
        """Codes of the weight, (O, C)."""
        stored = self.get_buffer("codes")
        return unpack(stored, self.in_features) if self.quantiser.bits <= 4 else stored

    def transformed_weight(self) -> torch.Tensor:
        """The rounded weight in the transformed basis, (O, C) float32."""
        if self.quantiser.is_float:
            return self.get_buffer("values").float()
        return dequantise(self.code(), self.get_buffer("step"), self.get_buffer("zero"))

    def effective_weight(self) -> torch.Tensor:
        """The weight in the basis of the layer's own input, (O, C) float32: what a float layer would hold in its place."""
        return unturned(self.transformed_weight(), self.shared.transform)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        key = (self.mode, x.dtype, x.device)
        if self._ready is None or self._ready[0] != key:
            self._ready = (key, getattr(self, f"_{self.mode}_weight")(x))
        ready = self._ready[1]
        if self.mode == "simulated":
            return functional.linear(self.shared(x), ready, bias)
        if self.mode == "integer":
            out = integer_linear(self.shared.integers(x), ready).to(x.dtype)
        else:
            size, packed, scales = ready
            out = torch._weight_int4pack_mm_for_cpu(self.shared(x).flatten(0, -2), packed, size, scales)
        out = out.unflatten(0, x.shape[:-1])
        return out if bias is None else out + bias

    def _simulated_weight(self, x: torch.Tensor) -> torch.Tensor:
        return self.transformed_weight().to(x)

    def _integer_weight(self, x: torch.Tensor) -> IntegerRows:
        return integer_rows(self.code(), self.get_buffer("step"), self.get_buffer("zero"))

    def _packed_weight(self, x: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
        size = self._kernel_group()
        step, zero = self.get_buffer("step"), self.get_buffer("zero").float()
        repeat = self.in_features // size // step.shape[1]
        scales = torch.stack([step, (8 - zero) * step], dim=-1).repeat_interleave(repeat, dim=1)  # the kernel's value: (q - 8) scale + zero
        packed = torch._convert_weight_to_int4pack_for_cpu(self.code().int(), 1)
        return size, packed, scales.transpose(0, 1).contiguous().to(x.dtype)

    def _kernel_group(self) -> int:
        size = self.quantiser.group or self.in_features
        return next((one for one in (256, 128, 64, 32) if size % one == 0), 0)

    def can(self, mode: str) -> str:
        """Why this layer cannot run in `mode`; empty if it can."""
        if mode == "integer":
            if self.quantiser.bits > 8 or self.shared.quantiser.bits > 8:
                return "integer products need at most 8 bits on both sides"
            return "" if self.quantiser.group in (None, self.in_features) else "integer products need one grid a row"
        if mode == "packed":
            if self.quantiser.bits > 4 or self.out_features % 16 or not self._kernel_group():
                return "packed products need at most 4 bits, a multiple of 16 outputs, and grids over multiples of 32 inputs"
            return "" if self.get_buffer("codes").device.type == "cpu" else "packed products run on the CPU"
        return ""

    def forget(self) -> None:
        """To be called when the stored weight was changed."""
        self._ready = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.quantiser.bits} bits, {self.mode}"


def unturned(weight: torch.Tensor, transform: Transform) -> torch.Tensor:
    """A weight (O, C) in the transformed basis, back in that of its own input, float32."""
    rotated = Transform(transform.channels, None, transform.steps).inverse(weight.double())
    return (rotated if transform.scale is None else rotated / transform.scale.to(rotated)).float()


def execute(model: nn.Module, mode: str = "auto") -> dict[str, int]:
    """Choose how the quantised layers of a model compute; returns how many run in each mode.

    simulated: float products of rounded values, the reference. integer: int8 times int8 into int32, up to 8 bits on both sides; the same
    numbers up to float rounding. packed: 4-bit weights unpacked inside the product, activations as they are rounded (or not); fast for few
    rows in bfloat16. auto: integer where it can be, else packed for bfloat16 layers with float activations, else simulated. Raises
    ConfigError for a mode that one of the layers cannot run in, with the reason.
    """
    from trocar.patch.quantised.experts import QuantisedExperts

    kinds = (QuantisedLinear, QuantisedExperts)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
    if mode not in (*MODES, "auto"):
        raise ConfigError(f"There is no mode '{mode}'.", f"Use {', '.join(MODES)} or auto.")
    half = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    for path, layer in layers.items():
        if mode == "auto":
            front = layer.shared if isinstance(layer, QuantisedLinear) else layer.input
            packed = half and front.quantiser.is_float and not layer.can("packed")
            wanted = "integer" if not layer.can("integer") else "packed" if packed else "simulated"
        elif reason := layer.can(mode):
            raise ConfigError(f"{path} cannot run in mode '{mode}': {reason}.", "Use auto.")
        else:
            wanted = mode
        layer.mode = wanted
        layer.forget()
    found = [layer.mode for layer in layers.values()]
    return {one: found.count(one) for one in MODES if one in found}
