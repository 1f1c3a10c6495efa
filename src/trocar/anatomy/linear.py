"""Linear maps as (out, in) matrices whatever the storage, and slices of parameters. Floor 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trocar.core.errors import ComponentError, UnsupportedModelError

Index = range | tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """Part of a named parameter: the entries `index` along dimension `dim`, of all others everything.

    within: a second restriction (dimension, index), needed only for an input channel of one member of a fused projection.
    shared: the entries serve other components of the same kind too (key and value rows of a group of query heads).
    """

    name: str
    dim: int
    index: Index
    shared: bool = False
    within: tuple[int, Index] | None = None

    def take(self, parameter: torch.Tensor) -> torch.Tensor:
        """The slice of `parameter`, detached; shares memory with it where the index is a range."""
        part = _select(parameter.detach(), self.dim, self.index)
        return part if self.within is None else _select(part, *self.within)

    def put(self, parameter: torch.Tensor, value: torch.Tensor | float) -> None:
        """Write `value` (broadcast to the slice's shape, converted to the parameter's dtype) in place."""
        target = parameter.detach()
        outer = target if self.within is None else _select(target, *self.within)
        part = _select(outer, self.dim, self.index)
        filled = torch.as_tensor(value, dtype=part.dtype, device=part.device).expand(part.shape)
        _write(outer, self.dim, self.index, filled)
        if self.within is not None and not isinstance(self.within[1], range):
            _write(target, *self.within, outer)  # the outer selection was a copy


@dataclass(frozen=True)
class LinearView:
    """A linear map y = W x + b of a model, wherever and however its weight is stored.

    name, bias_name: the parameters' names in the model; rows: the map's rows in a fused projection, None if it has the weight to
    itself; transposed: stored (in, out) (`Conv1D`); module: the module that is called (a LoRA layer where there is one);
    parameter, bias: the base's own parameters.
    """

    name: str
    bias_name: str | None
    path: str
    module: nn.Module
    parameter: nn.Parameter
    bias: nn.Parameter | None
    rows: Index | None
    transposed: bool

    @property
    def out_features(self) -> int:
        return len(self.rows) if self.rows is not None else self.parameter.shape[1 if self.transposed else 0]

    @property
    def in_features(self) -> int:
        return self.parameter.shape[0 if self.transposed else 1]

    @property
    def out_dim(self) -> int:
        """The dimension of the parameter along which outputs lie."""
        return 1 if self.transposed else 0

    def get(self) -> torch.Tensor:
        """The weight, (out, in), detached. It may share memory with the parameter: clone it to keep it."""
        weight = self.parameter.detach()
        weight = weight.T if self.transposed else weight
        return weight if self.rows is None else _select(weight, 0, self.rows)

    def set(self, value: torch.Tensor) -> None:
        """Write the weight in place, value (out, in), converted to the parameter's dtype and device."""
        self._fits(value, (self.out_features, self.in_features), "weight")
        weight = self.parameter.detach()
        _write(weight.T if self.transposed else weight, 0, self.rows, value)

    def get_bias(self) -> torch.Tensor | None:
        """The bias, (out,), detached, or None. It may share memory with the parameter."""
        if self.bias is None:
            return None
        return self.bias.detach() if self.rows is None else _select(self.bias.detach(), 0, self.rows)

    def set_bias(self, value: torch.Tensor) -> None:
        """Write the bias in place, value (out,). Raises ComponentError if there is none."""
        if self.bias is None:
            raise ComponentError(f"{self.path} has no bias.", "Only maps with a bias can have it set.")
        self._fits(value, (self.out_features,), "bias")
        _write(self.bias.detach(), 0, self.rows, value)

    def row(self, index: Sequence[int], shared: bool = False) -> list[Slice]:
        """The slices of some outputs: rows of the weight, and the entries of the bias."""
        where = self._absolute(index)
        found = [Slice(self.name, self.out_dim, where, shared)]
        return found + ([Slice(self.bias_name, 0, where, shared)] if self.bias_name else [])

    def column(self, index: Sequence[int], shared: bool = False) -> list[Slice]:
        """The slice of some inputs: columns of the weight."""
        within = None if self.rows is None else (self.out_dim, self.rows)
        return [Slice(self.name, 1 - self.out_dim, _tidy(index), shared, within)]

    def whole(self) -> list[Slice]:
        return self.row(range(self.out_features))

    def _absolute(self, index: Sequence[int]) -> Index:
        return _tidy(index if self.rows is None else [self.rows[i] for i in index])

    def _fits(self, value: torch.Tensor, shape: tuple[int, ...], what: str) -> None:
        if tuple(value.shape) != shape:
            raise ComponentError(
                f"The {what} of {self.path} is {shape}, not {tuple(value.shape)}.", "Weights are (out, in) whatever the storage."
            )
        if self.parameter.device.type == "meta":
            raise UnsupportedModelError(f"{self.path} is on the meta device and has no values.", "Load the weights before changing them.")


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside PEFT layers (LoRA and its kin), which keep it as `base_layer`; any other module is returned as it is."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def check_linear(module: nn.Module, path: str) -> bool:
    """Whether a linear layer stores (in, out). Raises UnsupportedModelError for layers whose weight is not a plain matrix.

    Layers are known by what they compute (`nn.Linear`'s or `Conv1D`'s own forward), never by their weight's shape.
    """
    from transformers.pytorch_utils import Conv1D

    base, hint = (
        base_layer(module),
        "Supported: nn.Linear and transformers' Conv1D with plain floating-point weights, LoRA layers around them.",
    )
    if getattr(module, "merged", False):
        raise UnsupportedModelError(
            f"An adapter is merged into {path}, so its base weight is not there.", "Unmerge it (unmerge_adapter) first."
        )
    forward = type(base).forward
    if forward not in (nn.Linear.forward, Conv1D.forward):
        raise UnsupportedModelError(f"{path} is a {type(base).__name__}, whose weight is not a plain matrix (quantised or fused).", hint)
    weight = base.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        raise UnsupportedModelError(
            f"{path}.weight is a {type(weight).__name__} over {type(weight.data).__name__}, not a plain parameter.", hint
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise UnsupportedModelError(f"{path}.weight has dtype {weight.dtype}, a quantised format.", hint)
    return forward is Conv1D.forward


def _tidy(index: Sequence[int]) -> Index:
    """A range where the indices are consecutive, else a tuple."""
    index = tuple(index)
    return range(index[0], index[-1] + 1) if index and index == tuple(range(index[0], index[-1] + 1)) else index


def _select(tensor: torch.Tensor, dim: int, index: Index) -> torch.Tensor:
    if isinstance(index, range) and index.step == 1:
        return tensor.narrow(dim, index.start, len(index))
    return tensor.index_select(dim, torch.tensor(list(index), dtype=torch.long, device=tensor.device))


def _write(tensor: torch.Tensor, dim: int, index: Index | None, value: torch.Tensor) -> None:
    with torch.no_grad():
        if index is None:
            tensor.copy_(value)
        elif isinstance(index, range) and index.step == 1:
            tensor.narrow(dim, index.start, len(index)).copy_(value)
        else:
            where = torch.tensor(list(index), dtype=torch.long, device=tensor.device)
            tensor.index_copy_(dim, where, value.to(tensor.device, tensor.dtype))
