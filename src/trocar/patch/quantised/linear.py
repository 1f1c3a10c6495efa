"""Modules that stand in for linear layers: low-bit weights, activations rounded on the way in, a change of basis in front. Floor 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trocar.core.errors import ConfigError
from trocar.patch.quantised.float8 import CAPABILITY, Float8Rows, float8_linear, float8_rows, float8_weight
from trocar.patch.quantised.numbers import (
    IntegerRows,
    Quantiser,
    dequantise,
    integer_linear,
    integer_rows,
    integer_weight,
    pack,
    quantised,
    unpack,
)
from trocar.patch.quantised.packed import INNER_TILES, PackedWeight, kernel_group, packed_linear, packed_weight
from trocar.patch.quantised.transform import Transform

MODES = ("simulated", "integer", "packed", "float8")


class FullPrecision(nn.Module):
    """A module whose floating buffers are moved but never cast: a step or a rotation in half precision is another one."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = {name: part for name, part in self._buffers.items() if part is not None and part.is_floating_point()}
        super()._apply(fn, recurse)
        self._buffers.update({name: part.to(self._buffers[name].device) for name, part in kept.items()})  # type: ignore[union-attr]
        return self


class NoWayBack(torch.autograd.Function):
    """The second argument, as a function of the first whose gradient nobody knows: asking for it is an error, and NaN inside
    `torch.compile`, where none can be raised."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        ctx.shape = x.shape
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling():
            return grads[0].new_full(ctx.shape, float("nan")), None
        raise ConfigError("Layers in integers, packed weights or float8 have no gradients.", "Use execute(model, 'simulated').")


class GroupInput(FullPrecision):
    """What happens to the input that several linear layers read: transform, then quantisation per token. The work is done once per
    tensor: siblings that are called with the very same object get the result of the first of them (not inside `torch.compile`, which finds
    what is computed twice by itself, nor with gradients or in inference mode).

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

    def floats8(self, x: torch.Tensor) -> Float8Rows:
        """The transformed input in e4m3, leading axes flattened; found once. The quantiser has no say in it."""
        return self._once(x, self._floats8)

    def _integers(self, x: torch.Tensor) -> IntegerRows:
        return integer_rows(self.transform.online(x.reshape(-1, self.channels)), self.quantiser)

    def _floats8(self, x: torch.Tensor) -> Float8Rows:
        return float8_rows(self.transform.online(x.reshape(-1, self.channels)))

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """The transformed and rounded input, computed anew."""
        turned = self.transform.online(x)
        return quantised(turned, self.quantiser, straight=torch.is_grad_enabled() and turned.requires_grad)

    def _once(self, x: torch.Tensor, compute: Any) -> Any:
        if self.readers == 1 or torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_inference():
            return compute(x)  # tensors of inference mode do not tell whether they were written to
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
    bits. mode: how the product is computed (`MODES`, set by `execute`). What a mode needs is made at the first call and, if `keep`, kept
    beside the codes (else made again at every call): a float matrix (`simulated`, the reference), a byte a weight (`integer`, `float8`),
    half a byte (`packed`). Only `simulated` has gradients.
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
        self.quantiser, self.mode, self.keep = quantiser, "simulated", True
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
        ready = self._made(x)
        if self.mode == "simulated":
            return functional.linear(self.shared(x), ready, bias)
        if torch.is_grad_enabled() and x.requires_grad:
            return self._no_way_back(x)
        if self.mode == "integer":
            out = integer_linear(self.shared.integers(x), ready)
        elif self.mode == "float8":
            out = float8_linear(self.shared.floats8(x), ready)
        else:
            out = packed_linear(self.shared(x).reshape(-1, self.in_features), ready)
        out = out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return out if bias is None else out + bias

    def _no_way_back(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out = self.forward(x)
        return NoWayBack.apply(x, out)  # type: ignore[return-value]

    def _made(self, x: torch.Tensor) -> Any:
        """What the mode needs of the weight."""
        key = (self.mode, x.dtype, x.device)
        if self._ready is not None and self._ready[0] == key:
            return self._ready[1]
        with torch.inference_mode(False):  # what is kept must serve outside of it too
            made = getattr(self, f"_{self.mode}_weight")(x)
        if self.keep:
            self._ready = (key, made)
        return made

    def _simulated_weight(self, x: torch.Tensor) -> torch.Tensor:
        return self.transformed_weight().to(x)

    def _integer_weight(self, x: torch.Tensor) -> IntegerRows:
        return integer_weight(self.code(), self.get_buffer("step"), self.get_buffer("zero"), self.quantiser)

    def _float8_weight(self, x: torch.Tensor) -> Float8Rows:
        return float8_weight(self.code(), self.get_buffer("step"), self.get_buffer("zero"))

    def _packed_weight(self, x: torch.Tensor) -> PackedWeight:
        return packed_weight(self.get_buffer("codes"), self.in_features, self.get_buffer("step"), self.get_buffer("zero"), x.dtype)

    def _kernel_group(self) -> int:
        return kernel_group(self.quantiser.group or self.in_features)

    def can(self, mode: str) -> str:
        """Why this layer cannot run in `mode`; empty if it can."""
        device = next(self.buffers()).device
        if mode == "integer":
            if self.quantiser.bits > 8 or self.shared.quantiser.bits > 8:
                return "integer products need at most 8 bits on both sides"
            groups = (self.quantiser.group, self.shared.quantiser.group)
            return "" if all(group in (None, self.in_features) for group in groups) else "integer products need one grid a row"
        if mode == "packed":
            if self.quantiser.bits > 4 or self.out_features % 16 or not self._kernel_group():
                return "packed products need at most 4 bits, a multiple of 16 outputs, and grids over multiples of 32 inputs"
            if device.type == "cuda" and self.in_features % (16 * INNER_TILES):
                return f"packed products on CUDA need a multiple of {16 * INNER_TILES} inputs"
            return "" if device.type in ("cpu", "cuda") else "packed products run on the CPU and on CUDA"
        if mode == "float8":
            if self.quantiser.bits - self.quantiser.symmetric > 4:
                return "float8 products need weights of 4 bits: code - zero of more bits is not exact in e4m3"
            if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
                return "float8 products need a device of compute capability 8.9 or higher"
            return "" if device.type in ("cpu", "cuda") else "float8 products run on CUDA (and, slowly, on the CPU)"
        return ""

    @property
    def float_entries(self) -> int:
        """Entries of the float layer that it stands for."""
        return (self.in_features + (self.bias is not None)) * self.out_features

    def bytes_kept(self, mode: str, dtype: torch.dtype = torch.float32) -> int:
        """What `mode` keeps beside the codes for inputs of `dtype`."""
        weights, rows = self.out_features * self.in_features, self.out_features
        groups = 0 if self.quantiser.is_float else self.get_buffer("step").shape[1]
        if mode == "simulated":
            return 0 if self.quantiser.is_float and self.get_buffer("values").dtype == dtype else weights * dtype.itemsize
        if mode == "integer":
            return weights + rows * 4 * (2 if self.quantiser.centred else 3)
        if mode == "packed":
            return weights // 2 + 2 * (self.in_features // self._kernel_group()) * rows * dtype.itemsize
        return weights + 4 * groups * rows

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
