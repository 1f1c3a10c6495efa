"""Interventions as data: what to do, where, at which positions, in which rows. Floor 2.

An intervention does nothing by itself; `intervene` and `sweep` carry it out. It is immutable and can be written to a file: `pack` splits
a list into a JSON-able header and named tensors, `unpack` reads them back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from trocar.anatomy import Component, parse
from trocar.core.errors import InterventionError, nearest
from trocar.trace.calls import Columns, Positions, normal_positions
from trocar.trace.points import Point, is_point, parse_point

Value = float | torch.Tensor


@dataclass(frozen=True, eq=False)
class Intervention:
    """Base of the three interventions.

    where: a `Point`, a component (`Head`, `Neuron`, `Attention`, `Mlp`, `Block`) or the name of either. `Attention` and `Mlp` mean the
    points `attn_out` and `mlp_out`; `Block` means what the block adds to the residual stream (its output minus its input).
    value: a number or a tensor in the dtype and on the device of the activations. Its last dimensions are the features there - (width,),
    (heads, head_size) at `heads`, (head_size,) for one head, none for one neuron; any of them may be 1. One dimension before them is the
    row, two are row and position: position k of `positions`, or column k if `positions` is left out.
    positions: None (every position, generated ones included), "last" (each row's last attended position of the prompt), "generated"
    (what comes after the prompt), "last+generated" (the newest position of every step of cached generation), or integers: columns of the
    padded input, negative ones from the row's last attended column; or one list of integers per row.
    rows: the input rows it acts on, all by default. Rows that `generate` makes of one input row (beams) count as that row.
    """

    where: Point | Component | str
    value: Value
    positions: Positions = None
    rows: Sequence[int] | None = None
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if isinstance(self.where, str):
            object.__setattr__(self, "where", parse_point(self.where) if is_point(self.where) else parse(self.where))
        elif not isinstance(self.where, Point | Component):
            raise InterventionError(f"where={self.where!r} is not a point or component.", "Write for example 'L5.H3' or 'L5.resid_post'.")
        if not isinstance(self.value, int | float | torch.Tensor) or isinstance(self.value, bool):
            raise InterventionError(f"The value of {self} is a {type(self.value).__name__}.", "Give a number or a tensor.")
        object.__setattr__(self, "positions", normal_positions(self.positions))
        if self.rows is not None:
            rows = torch.as_tensor(self.rows).tolist()
            if not rows or any(isinstance(row, bool) or not isinstance(row, int) or row < 0 for row in rows) or len(set(rows)) < len(rows):
                raise InterventionError(f"rows={self.rows!r} of {self} are not distinct row numbers.", "Count rows from 0.")
            object.__setattr__(self, "rows", tuple(rows))
        if self.per_row and self.rows is not None and len(self.positions) != len(self.rows):  # type: ignore[arg-type]
            raise InterventionError(f"{self} has {len(self.positions)} lists of positions for {len(self.rows)} rows.")  # type: ignore[arg-type]

    @property
    def per_row(self) -> bool:
        """Whether every row has its own list of positions."""
        return isinstance(self.positions, tuple) and isinstance(self.positions[0], tuple)

    def row_positions(self, number: int) -> str | tuple[int, ...] | None:
        """The positions of the `number`-th of its rows."""
        return self.positions[number] if self.per_row else self.positions  # type: ignore[index,return-value]

    def change(self, current: torch.Tensor, value: Any) -> torch.Tensor:
        """The new activation."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.where})"


@dataclass(frozen=True, eq=False)
class Scale(Intervention):
    """Multiply by a factor: 0 removes, 1 changes nothing."""

    kind: ClassVar[str] = "scale"

    def change(self, current: torch.Tensor, value: Any) -> torch.Tensor:
        return current * value


@dataclass(frozen=True, eq=False)
class Add(Intervention):
    """Add a value."""

    kind: ClassVar[str] = "add"

    def change(self, current: torch.Tensor, value: Any) -> torch.Tensor:
        return current + value


@dataclass(frozen=True, eq=False)
class Replace(Intervention):
    """Put a value in place of what is there."""

    kind: ClassVar[str] = "replace"

    def change(self, current: torch.Tensor, value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.expand_as(current)
        return torch.full_like(current, value)


KINDS: dict[str, type[Intervention]] = {kind.kind: kind for kind in (Scale, Add, Replace)}


def pack(interventions: Sequence[Intervention]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """A JSON-able header and the tensors that it names, ready for one safetensors file."""
    header: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for number, item in enumerate(interventions):
        entry: dict[str, Any] = {"kind": item.kind, "where": str(item.where)}
        if isinstance(item.value, torch.Tensor):
            entry["tensor"] = f"value.{number}"
            tensors[entry["tensor"]] = item.value.detach().contiguous()
        else:
            entry["value"] = float(item.value)
        if item.positions is not None:
            entry["positions"] = item.positions
        if item.rows is not None:
            entry["rows"] = list(item.rows)
        header.append(entry)
    return header, tensors


def unpack(header: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]) -> list[Intervention]:
    """Read back what `pack` wrote. Raises InterventionError on unknown kinds, keys or tensors."""
    result = []
    for entry in header:
        if not isinstance(entry, Mapping):
            raise InterventionError("An intervention's entry is not a mapping.")
        if unknown := set(entry) - {"kind", "where", "value", "tensor", "positions", "rows"}:
            raise InterventionError(f"'{min(unknown)}' is not a key of an intervention.")
        kind = KINDS.get(str(entry.get("kind")))
        if kind is None:
            raise InterventionError(f"'{entry.get('kind')}' is not a kind of intervention.", nearest(str(entry.get("kind")), KINDS))
        if ("value" in entry) == ("tensor" in entry):
            raise InterventionError("An intervention needs a value or a tensor, not both.")
        if "tensor" in entry and entry["tensor"] not in tensors:
            raise InterventionError(f"The tensor '{entry['tensor']}' of an intervention is missing.")
        value = tensors[entry["tensor"]] if "tensor" in entry else entry["value"]
        if not isinstance(entry.get("where"), str):
            raise InterventionError("An intervention does not say where it acts.")
        result.append(kind(entry["where"], value, entry.get("positions"), entry.get("rows")))
    return result


__all__ = ["KINDS", "Add", "Columns", "Intervention", "Replace", "Scale", "Value", "pack", "unpack"]
