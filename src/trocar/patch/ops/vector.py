"""`add-vector`: a vector added at a point of the computation, through `trocar.trace`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic

from trocar.core.errors import PatchBaseError, PatchFormatError
from trocar.patch.actions import Target
from trocar.patch.ops.sparse import checked, own
from trocar.patch.record import Effect, Float, PointName, Record, Size, Spec, dtype_code, sorted_unique

if TYPE_CHECKING:
    import torch

Position = Annotated[int, pydantic.Field(ge=-(2**31), le=2**31)]
Positions = Literal["last", "generated", "last+generated"] | tuple[Position, ...] | None


def valid_positions(value: Any) -> Any:
    """Pydantic helper: positions are a name, None, or sorted and unique."""
    if isinstance(value, tuple):
        if not value:
            raise ValueError("positions are empty")
        return sorted_unique(value, "positions")
    return value


def own_positions(op: Any) -> None:
    """An operation's positions, sorted and as a tuple."""
    if op.positions is not None and not isinstance(op.positions, str):
        own(op, "positions", tuple(sorted({int(position) for position in op.positions})))


class VectorRecord(Record):
    kind: Literal["add-vector"] = "add-vector"
    point: PointName
    size: Size
    dtype: Float
    positions: Positions

    @pydantic.field_validator("positions")
    @classmethod
    def _sorted(cls, value: Any) -> Any:
        return valid_positions(value)

    def specs(self) -> dict[str, Spec]:
        return {"vector": Spec(self.dtype, (self.size,))}

    def where(self) -> str:
        return self.point

    def shape_text(self) -> str:
        return f"{self.size}" + ("" if self.positions is None else f" at {self.positions}")


@dataclass(frozen=True, eq=False)
class AddVector:
    """Add a vector to what flows through a point, in every forward pass and in generation, for as long as the patch is applied.

    point: a `trocar.trace.Point` or its name, `L5.resid_post`. vector: (features,) there: the width, or heads x head size at `heads`
    (flattened), or neurons at `neurons`; rounded to the model's dtype when it is applied. positions: None (all), "last", "generated",
    "last+generated" or integers, as in `trocar.trace.Add`. Raises PatchFormatError; `apply` raises ComponentError, PatchBaseError.
    """

    point: Any
    vector: torch.Tensor
    positions: str | Sequence[int] | None = None

    kind: ClassVar[str] = "add-vector"
    Record: ClassVar[type[Record]] = VectorRecord

    def __post_init__(self) -> None:
        own(self, "point", str(self.point))
        own(self, "vector", self.vector.detach().cpu().clone().contiguous())
        own_positions(self)
        if self.vector.dim() != 1:
            raise PatchFormatError(f"add-vector at {self.point}: a vector has one dimension, not {tuple(self.vector.shape)}.")
        self.record()

    def record(self) -> VectorRecord:
        size, dtype = int(self.vector.numel()), dtype_code(self.vector.dtype)
        return checked(VectorRecord, point=self.point, size=size, dtype=dtype, positions=self.positions)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"vector": self.vector}

    @classmethod
    def build(cls, record: VectorRecord, tensors: dict[str, torch.Tensor]) -> AddVector:
        return cls(record.point, tensors["vector"], record.positions)

    def cast(self, target: Target) -> AddVector:
        return self

    def parameters(self, target: Target) -> list[str]:
        return []

    def plan(self, target: Target) -> list[Attach]:
        from trocar.trace import Add

        tower, point = resolve(target, self.point)
        shape = feature_shape(tower, point)
        size = shape[0] * (shape[1] if len(shape) > 1 else 1)
        if self.vector.numel() != size:
            raise PatchBaseError(f"The vector for {self.point} has {self.vector.numel()} entries, the model has {size} there.")
        target.finite(self.vector, f"the entries of the vector at {self.point}")
        like = next(tower.blocks[point.layer].parameters())
        value = self.vector.to(like.device, like.dtype).reshape(shape)
        target.finite(value, f"the entries of the vector at {self.point}, rounded to {like.dtype},")
        return [Attach(target, Add(point, value, positions=self.positions), value)]


def resolve(target: Target, name: str) -> tuple[Any, Any]:
    """(tower, point). Raises ComponentError if the model has no such point."""
    from trocar.core.errors import ComponentError
    from trocar.trace import parse_point

    point = parse_point(name)
    tower = target.anatomy.tower(point.tower or None)
    if point.layer >= tower.n_layers:
        raise ComponentError(f"{name} does not exist.", f"Layers run from 0 to {tower.n_layers - 1}.")
    return tower, point


def feature_shape(tower: Any, point: Any) -> tuple[int, ...]:
    """The shape of one position at a point."""
    if point.kind == "heads":
        return (tower.heads(point.layer), tower.head_size(point.layer))
    return (tower.neurons(point.layer),) if point.kind == "neurons" else (tower.width,)


class _Detach(Exception):
    """Leaves a tracing context early, so that it does not ask whether its intervention fired."""


@dataclass
class Attach:
    """Keep an intervention attached until `undo`."""

    target: Target
    intervention: Any
    value: torch.Tensor
    reach: tuple[str, ...] = ()  # the components it acts on, where that is less than the point
    context: Any = field(default=None, init=False)

    def do(self) -> Effect:
        import torch

        from trocar.trace import Scale, intervene

        self.context = intervene(self.target.anatomy, [self.intervention])
        self.context.__enter__()
        change = self.value - 1 if isinstance(self.intervention, Scale) else self.value
        norm = float(torch.linalg.vector_norm(change.float(), dtype=torch.float64))
        return Effect(changed=int((change != 0).sum()), norm=norm if norm < float("inf") else None)

    def undo(self) -> None:
        if self.context is None:
            return
        error = _Detach()
        with contextlib.suppress(_Detach):
            self.context.__exit__(_Detach, error, None)
        self.context = None
