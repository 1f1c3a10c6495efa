"""What an operation does to a model, as steps that can be measured and taken back. Torch is imported when a model is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from trocar.core.errors import EditError, PatchBaseError, nearest
from trocar.patch.record import Effect

if TYPE_CHECKING:
    import torch

    from trocar.anatomy import Anatomy


class Place(NamedTuple):
    """Entries of one parameter: all of them (index None), slices `index` along `dim`, or with dim None flat row-major positions."""

    name: str
    dim: int | None = None
    index: torch.Tensor | None = None

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the entries."""
        if self.index is None:
            return tensor.detach().clone()
        index = self.index.to(tensor.device)
        if self.dim is not None:
            return tensor.detach().index_select(self.dim, index)
        return tensor.detach().flatten()[index] if tensor.is_contiguous() else tensor.detach()[_unravel(index, tensor.shape)]

    def write(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Put `values` (as `read` returns them) into the entries, in place."""
        import torch

        values = values.to(tensor.device)
        with torch.no_grad():
            if self.index is None:
                tensor.copy_(values)
            elif self.dim is not None:
                tensor.index_copy_(self.dim, self.index.to(tensor.device), values)
            else:
                tensor[_unravel(self.index.to(tensor.device), tensor.shape)] = values


def _unravel(index: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
    import torch

    return torch.unravel_index(index, tuple(shape))


class Action(Protocol):
    """One reversible step. `do` measures what it changed; `undo` restores the former state bit for bit."""

    def do(self) -> Effect: ...

    def undo(self) -> None: ...


class Target:
    """A model about to be changed. Everything that can be wrong is found through it, before anything is touched."""

    def __init__(self, anatomy: Anatomy, allow_nonfinite: bool = False) -> None:
        self.anatomy, self.model, self.allow_nonfinite = anatomy, anatomy.model, allow_nonfinite
        self._names: dict[int, str] | None = None

    @classmethod
    def of(cls, model: Any, ops: Sequence[Any], allow_nonfinite: bool = False) -> Target:
        """A model, or its Anatomy, for these operations; one with experts only if one of them is made for experts."""
        from trocar.anatomy import Anatomy

        return cls(Anatomy.of(model, experts=any(op.Record.acts_on_experts for op in ops)), allow_nonfinite)

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter or buffer called `name`. Raises PatchBaseError naming the nearest one."""
        found = self.find(name)
        if found is None:
            known = [key for key, _ in self.model.named_parameters()]
            raise PatchBaseError(f"The model has no parameter '{name}'.", nearest(name, known) if len(known) < 10_000 else "")
        return found

    def find(self, name: str) -> torch.Tensor | None:
        owner, _, leaf = name.rpartition(".")
        try:
            module = self.model.get_submodule(owner)
        except AttributeError:
            return None
        return module._parameters.get(leaf, module._buffers.get(leaf))

    def first_name(self, name: str) -> str:
        """A parameter's first name in the model; tied parameters have several."""
        if self._names is None:
            self._names = {id(tensor): first for first, tensor in [*self.model.named_buffers(), *self.model.named_parameters()]}
        return self._names[id(self.tensor(name))]

    def expect(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor called `name`, or PatchBaseError if its shape, dtype or device is not one that the operation can write to."""
        tensor = self.tensor(name)
        if tuple(tensor.shape) != tuple(shape):
            raise PatchBaseError(f"Parameter '{name}' has shape {tuple(tensor.shape)}, the patch was made for {tuple(shape)}.")
        if dtype is not None and tensor.dtype != dtype:
            raise PatchBaseError(
                f"Parameter '{name}' is {tensor.dtype} but the patch holds {dtype}.",
                f"Load the model with dtype={dtype}, or make a patch for this model with patch.rebase(model).",
            )
        return tensor

    def finite(self, values: torch.Tensor, what: str) -> None:
        """Raises EditError if `values` hold NaN or infinities and those were not allowed."""
        if self.allow_nonfinite or values.device.type == "meta":
            return
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise EditError(f"{what[0].upper()}{what[1:]} hold NaN or infinite entries.", "Pass allow_nonfinite=True if that is meant.")


@dataclass
class Write:
    """Replace entries of one parameter by `compute(old entries)`; keeps the old entries."""

    target: Target
    place: Place
    compute: Callable[[torch.Tensor], torch.Tensor]
    tensor: Any = field(default=None, init=False)  # the object written to, which a later removal may take out of the model
    old: Any = field(default=None, init=False)

    def do(self) -> Effect:
        self.tensor = self.target.tensor(self.place.name)
        old = self.place.read(self.tensor)
        new = self._new(old)
        self.old = old
        self.place.write(self.tensor, new)
        return effect(old, self.place.read(self.tensor))

    def change(self, tensor: torch.Tensor) -> None:
        """The same for a tensor that is not in the model, in place, without a way back."""
        self.place.write(tensor, self._new(tensor if self.place.index is None else self.place.read(tensor)))

    def _new(self, old: torch.Tensor) -> torch.Tensor:
        new = self.compute(old)
        self.target.finite(new, f"the result in {self.place.name}")
        return new

    def undo(self) -> None:
        if self.old is not None:
            self.place.write(self.tensor, self.old)
            self.old = None


def effect(old: torch.Tensor, new: torch.Tensor) -> Effect:
    """Entries whose bits differ, and the Euclidean norm of the difference."""
    import torch

    wide = torch.float64 if old.dtype in (torch.float64, torch.int64) else torch.float32
    norm = float(torch.linalg.vector_norm(new.to(wide) - old.to(wide), dtype=torch.float64))
    return Effect(changed=int((bits(old) != bits(new)).sum()), norm=norm if norm < float("inf") else None)


def total(effects: Sequence[Effect]) -> Effect:
    """The effect of several steps at different places."""
    norms = [one.norm for one in effects]
    norm = None if None in norms else sum(value**2 for value in norms if value is not None) ** 0.5
    return Effect(changed=sum(one.changed for one in effects), norm=norm)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that equality means equal bits (-0.0 is not 0.0, NaN equals itself)."""
    import torch

    if not tensor.is_floating_point():
        return tensor
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
