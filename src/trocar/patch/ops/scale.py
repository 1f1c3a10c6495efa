"""`scale-at`: heads and neurons scaled while the model runs, at some positions only, through `trocar.trace`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pydantic

from trocar.core.errors import EditError
from trocar.patch.actions import Target
from trocar.patch.ops.gate import FactorsRecord, named
from trocar.patch.ops.sparse import checked, own
from trocar.patch.ops.vector import Attach, Positions, feature_shape, own_positions, valid_positions
from trocar.patch.record import Record

if TYPE_CHECKING:
    import torch


class ScaleRecord(FactorsRecord):
    kind: Literal["scale-at"] = "scale-at"
    positions: Positions

    @pydantic.field_validator("positions")
    @classmethod
    def _sorted(cls, value: Any) -> Any:
        return valid_positions(value)

    def shape_text(self) -> str:
        return super().shape_text() + ("" if self.positions is None else f" at {self.positions}")


@dataclass(frozen=True, eq=False)
class ScaleAt:
    """Multiply what heads or neurons put out, in every forward pass and in generation, for as long as the patch is applied.

    factors: head or neuron (as an object or by name) -> factor: 0 switches off, 1 changes nothing. positions: None (all), "last",
    "generated", "last+generated" or integers, as in `trocar.trace.Scale`. At all positions this is `Gate` without writing weights.
    Raises PatchFormatError for names that are no components; `apply` raises ComponentError, and EditError for another kind of component.
    """

    factors: Mapping[Any, float]
    positions: str | Sequence[int] | None = None

    kind: ClassVar[str] = "scale-at"
    Record: ClassVar[type[Record]] = ScaleRecord

    def __post_init__(self) -> None:
        own(self, "factors", named(self.factors))
        own_positions(self)
        self.record()

    def record(self) -> ScaleRecord:
        return checked(ScaleRecord, factors=self.factors, positions=self.positions)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    @classmethod
    def build(cls, record: ScaleRecord, tensors: dict[str, torch.Tensor]) -> ScaleAt:
        return cls(record.factors, record.positions)

    def cast(self, target: Target) -> ScaleAt:
        return self

    def parameters(self, target: Target) -> list[str]:
        return []

    def plan(self, target: Target) -> list[Attach]:
        import torch

        from trocar.anatomy import Head, Neuron
        from trocar.trace import Point, Scale

        wanted: dict[Any, dict[int, tuple[str, float]]] = {}
        for name, factor in self.factors.items():
            component: Any = target.anatomy.check(name)
            if not isinstance(component, Head | Neuron):
                raise EditError(f"{name} cannot be scaled at positions.", "Name heads or neurons; Gate scales attention, mlp and blocks.")
            tower = target.anatomy.tower(component.tower)
            point = Point("heads" if isinstance(component, Head) else "neurons", component.layer, tower.name)
            wanted.setdefault(point, {})[component.index] = (name, factor)
        steps = []
        for point, members in sorted(wanted.items(), key=lambda item: str(item[0])):
            tower = target.anatomy.tower(point.tower)
            like = next(tower.blocks[point.layer].parameters())
            value = torch.ones(feature_shape(tower, point)[0], dtype=like.dtype, device=like.device)
            for index, (_, factor) in members.items():
                value[index] = factor
            target.finite(value, f"the factors at {point}, rounded to {like.dtype},")
            value = value[:, None] if point.kind == "heads" else value
            names = tuple(name for name, _ in members.values())
            steps.append(Attach(target, Scale(point, value, positions=self.positions), value, names))
        return steps
