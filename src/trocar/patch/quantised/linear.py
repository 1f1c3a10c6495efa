"""Modules that stand in for linear layers: low-bit weights, activations rounded on the way in, a change of basis in front. Floor 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trocar.patch.quantised.numbers import Quantiser, codes, dequantise, grid, integer_linear, pack, quantised, unpack
from trocar.patch.quantised.transform import Transform


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
        return self._once(x, self._values)

    def codes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, step and zero of the transformed input, rows flattened."""
        turned = self.transform.online(x.flatten(0, -2))
        step, zero = grid(turned, self.quantiser)
        return codes(turned, step, zero, self.quantiser), step, zero

    def _values(self, x: torch.Tensor) -> torch.Tensor:
        turned = self.transform.online(x)
        return quantised(turned, self.quantiser, straight=torch.is_grad_enabled() and turned.requires_grad)

    def _once(self, x: torch.Tensor, compute: Any) -> Any:
        if self.readers == 1 or torch.is_grad_enabled():
            return compute(x)
        last = self._last
        if last is None or last[0] is not x or last[1] != x._version:
            last = (x, x._version, compute(x), 0)
        seen = last[3] + 1
        self._last = None if seen >= self.readers else (last[0], last[1], last[2], seen)
        return last[2]

    def extra_repr(self) -> str:
        return f"{self.channels} channels, {' '.join(self.kinds) or 'no transform'}, {self.quantiser.bits} bits, {self.readers} readers"


class QuantisedLinear(FullPrecision):
    """y = quantised(x G) (quantised(W G^-T))^T + b.

    weight: codes (O, C), step and zero (O, groups), or a float matrix with `quantiser.bits` 16. The codes are kept, two to a byte up to 4
    bits; `mode` says how the product is computed: `simulated` (float product of the rounded values, the reference) or `integer`
    (int8 codes into int32, up to 8 bits on both sides and one group per row).
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
        self._float: torch.Tensor | None = None

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
        transform = self.shared.transform
        rotated = Transform(transform.channels, None, transform.steps).inverse(self.transformed_weight().double())
        return (rotated if transform.scale is None else rotated / transform.scale.to(rotated)).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.mode == "integer":
            weight = (self.code(), self.get_buffer("step"), self.get_buffer("zero"))
            out = integer_linear(self.shared.codes(x), weight).to(x.dtype).unflatten(0, x.shape[:-1])
            return out if bias is None else out + bias
        if self._float is None or self._float.dtype != x.dtype or self._float.device != x.device:
            self._float = self.transformed_weight().to(x)
        return functional.linear(self.shared(x), self._float, bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._float = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.quantiser.bits} bits, {self.mode}"
