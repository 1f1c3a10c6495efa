"""`gate`: components switched off or scaled, realised on the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pydantic

from trocar.core.errors import EditError
from trocar.patch.actions import Place, Target, Write
from trocar.patch.ops.sparse import checked, own
from trocar.patch.record import ComponentName, Finite, Record

if TYPE_CHECKING:
    import torch


class FactorsRecord(Record):
    """Components and what they are multiplied by; shared with `scale-at`."""

    factors: dict[ComponentName, Finite]

    @pydantic.field_validator("factors")
    @classmethod
    def _some(cls, value: dict[str, float]) -> dict[str, float]:
        if not value:
            raise ValueError("no component is named")
        return value

    def where(self) -> str:
        return listed(list(self.factors))

    def shape_text(self) -> str:
        off = sum(factor == 0 for factor in self.factors.values())
        return f"{off} off" + (f", {len(self.factors) - off} scaled" if off < len(self.factors) else "")


class GateRecord(FactorsRecord):
    kind: Literal["gate"] = "gate"


def named(factors: Mapping[Any, float]) -> dict[str, float]:
    """Factors by component name, sorted."""
    return {str(name): float(factor) for name, factor in sorted(factors.items(), key=lambda item: str(item[0]))}


@dataclass(frozen=True, eq=False)
class Gate:
    """Multiply what components add to the residual stream: 0 switches them off.

    factors: component (head, neuron, attention, mlp or block, as an object or by name) -> factor. Realised on the columns of `o` and `down`
    (for attention and mlp on all of `o` or `down`, bias included), rounded once to the weight's dtype; 0 gives exact zeros. Where a norm
    follows the projection, attention and mlp can only be switched off; a block's factor is 0, except in parallel blocks, and a
    post-norm block cannot be gated. Raises PatchFormatError for names that are no components; `apply` raises ComponentError, EditError.
    """

    factors: Mapping[Any, float]

    kind: ClassVar[str] = "gate"
    Record: ClassVar[type[Record]] = GateRecord

    def __post_init__(self) -> None:
        own(self, "factors", named(self.factors))
        self.record()

    def record(self) -> GateRecord:
        return checked(GateRecord, factors=self.factors)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    @classmethod
    def build(cls, record: GateRecord, tensors: dict[str, torch.Tensor]) -> Gate:
        return cls(record.factors)

    def cast(self, target: Target) -> Gate:
        return self

    def parameters(self, target: Target) -> list[str]:
        return sorted({step.place.name for step in self.plan(target)})

    def plan(self, target: Target) -> list[Write]:
        wanted: dict[tuple[str, int | None], dict[int, float]] = {}  # (parameter, dim) -> entry along it -> factor
        for name, factor in self.factors.items():
            for parameter, dim, index in _places(target, name, factor):
                entries = wanted.setdefault((parameter, dim), {})
                for entry in index:
                    entries[entry] = entries.get(entry, 1.0) * factor
        return [_scaled(target, parameter, dim, entries) for (parameter, dim), entries in sorted(wanted.items(), key=str)]


def _places(target: Target, name: str, factor: float) -> list[tuple[str, int | None, tuple[int, ...]]]:
    """(parameter, dim, entries) that the factor multiplies; dim None is the whole parameter."""
    from trocar.anatomy import Attention, Block, Head, Linear, Neuron

    anatomy = target.anatomy
    component: Any = anatomy.check(name)
    tower, layer = anatomy.tower(component.tower), component.layer
    if isinstance(component, Head | Neuron):
        size = tower.head_size(layer) if isinstance(component, Head) else 1
        view = anatomy.linear(Linear(layer, "o" if isinstance(component, Head) else "down", component.tower))
        (part,) = view.column(range(component.index * size, (component.index + 1) * size))
        return [(part.name, part.dim, tuple(part.index))]
    roles = ("o", "down") if isinstance(component, Block) else ("o",) if isinstance(component, Attention) else ("down",)
    if isinstance(component, Block):
        if tower.residual == "post":
            raise EditError(
                f"{name} cannot be gated: its norms stand behind the addition, so no weights make it pass its input on.", REMOVE
            )
        if tower.residual == "pre" and factor not in (0.0, 1.0):
            raise EditError(
                f"{name} cannot be scaled by {factor}: its MLP reads what its attention wrote, so only 0 is exact.",
                "Gate its attention, mlp, heads or neurons instead.",
            )
    found: list[tuple[str, int | None, tuple[int, ...]]] = []
    for role in roles:
        norm_role = "attn_post_norm" if role == "o" else "mlp_post_norm"
        if tower.has(layer, norm_role):
            norm: Any = tower.module(layer, norm_role)
            if factor not in (0.0, 1.0) or getattr(norm, "bias", None) is not None:
                raise EditError(
                    f"{name} cannot be scaled by {factor}: {tower.path(layer, norm_role)} normalises what it puts out.",
                    "Switch it off (0), or gate its heads or neurons.",
                )
        view = anatomy.linear(Linear(layer, role, component.tower))
        found += [(parameter, None, (0,)) for parameter in (view.name, view.bias_name) if parameter]
    return found


REMOVE = "Remove it (trocar.patch.Remove), or gate its attention and mlp."


def _scaled(target: Target, parameter: str, dim: int | None, entries: Mapping[int, float]) -> Write:
    import torch

    index = sorted(entries)
    factors = torch.tensor([entries[entry] for entry in index], dtype=torch.float64)

    def compute(old: torch.Tensor) -> torch.Tensor:
        wide = torch.float64 if old.dtype == torch.float64 else torch.float32
        shape = [1] * old.dim()
        if dim is not None:
            shape[dim] = len(index)
        factor = factors.to(old.device, wide).reshape(shape)
        return torch.where(factor == 0, torch.zeros((), dtype=old.dtype, device=old.device), (old.to(wide) * factor).to(old.dtype))

    place = Place(parameter) if dim is None else Place(parameter, dim, torch.tensor(index))
    return Write(target, place, compute)


def listed(names: list[str], most: int = 6) -> str:
    """A few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
