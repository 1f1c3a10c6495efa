"""`round-heads`: queries, keys and values of a tower rounded while the model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic

from trocar.patch.actions import Target
from trocar.patch.ops.sparse import checked
from trocar.patch.record import Effect, Record

if TYPE_CHECKING:
    import torch

    from trocar.patch.quantised import RoundedHeads


class HeadsRecord(Record):
    kind: Literal["round-heads"] = "round-heads"
    tower: Annotated[str, pydantic.Field(max_length=16, pattern=r"^([a-z][a-z0-9_]*)?$")]
    bits: Annotated[int, pydantic.Field(ge=2, le=15)]

    def where(self) -> str:
        return f"{self.tower or 'all'} attention"

    def shape_text(self) -> str:
        return f"Q{self.bits}KV{self.bits}"


@dataclass(frozen=True, eq=False)
class RoundHeads:
    """Round queries, keys and values per token and head, queries and keys after a Hadamard rotation, for as long as the patch is applied.

    tower: its name, "" where there is one. Raises PatchFormatError; `apply` raises UnsupportedModelError for attention that cannot be
    reached.
    """

    tower: str
    bits: int

    kind: ClassVar[str] = "round-heads"
    Record: ClassVar[type[Record]] = HeadsRecord

    def __post_init__(self) -> None:
        self.record()

    def record(self) -> HeadsRecord:
        return checked(HeadsRecord, tower=self.tower, bits=self.bits)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    @classmethod
    def build(cls, record: HeadsRecord, tensors: dict[str, torch.Tensor]) -> RoundHeads:
        return cls(record.tower, record.bits)

    def cast(self, target: Target) -> RoundHeads:
        return self

    def parameters(self, target: Target) -> list[str]:
        return []

    def plan(self, target: Target) -> list[Any]:
        from trocar.patch.quantised import RoundedHeads

        return [Rounding(RoundedHeads(target.anatomy.tower(self.tower or None), self.bits))]


@dataclass
class Rounding:
    """The rounding, put in and taken out. No weight changes; what is counted are the attention layers that round."""

    heads: RoundedHeads

    def do(self) -> Effect:
        self.heads.install()
        return Effect(changed=len(self.heads.layers), norm=None)

    def undo(self) -> None:
        self.heads.remove()

    def intact(self) -> bool:
        return self.heads.installed
