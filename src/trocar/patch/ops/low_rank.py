"""`low-rank`: W += B @ A for one weight matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import pydantic

from trocar.core.errors import PatchBaseError, PatchFormatError
from trocar.patch.actions import Place, Target, Write
from trocar.patch.ops.sparse import checked, own
from trocar.patch.record import Float, Name, Record, Size, Spec, dtype_code

if TYPE_CHECKING:
    import torch


class LowRankRecord(Record):
    kind: Literal["low-rank"] = "low-rank"
    parameter: Name
    outputs: Size
    inputs: Size
    rank: Size
    dtype: Float
    transposed: bool

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> LowRankRecord:
        if self.rank > min(self.outputs, self.inputs):
            raise ValueError(f"rank {self.rank} is above {min(self.outputs, self.inputs)}")
        return self

    def specs(self) -> dict[str, Spec]:
        return {"a": Spec(self.dtype, (self.rank, self.inputs)), "b": Spec(self.dtype, (self.outputs, self.rank))}

    def where(self) -> str:
        return self.parameter

    def shape_text(self) -> str:
        return f"rank {self.rank} in {self.outputs}x{self.inputs}"


@dataclass(frozen=True, eq=False)
class LowRank:
    """W += B @ A, with W in (out, in) orientation.

    parameter: the weight's name. a: (rank, in). b: (out, rank), of a's dtype, which need not be the weight's. transposed: the weight is
    stored as (in, out), as a Conv1D does. The product is taken and added in float32 (float64 if factors or weight are float64) and
    rounded once to the weight's dtype. Raises PatchFormatError when factors and rank do not fit together.
    """

    parameter: str
    a: torch.Tensor
    b: torch.Tensor
    transposed: bool = False

    kind: ClassVar[str] = "low-rank"
    Record: ClassVar[type[Record]] = LowRankRecord

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1] or self.a.dtype != self.b.dtype:
            shapes = f"a {tuple(self.a.shape)} {self.a.dtype} and b {tuple(self.b.shape)} {self.b.dtype}"
            raise PatchFormatError(f"low-rank update of {self.parameter}: {shapes} are not (rank, in) and (out, rank) of one dtype.")
        for name in ("a", "b"):
            own(self, name, getattr(self, name).detach().cpu().clone().contiguous())
        self.record()

    def record(self) -> LowRankRecord:
        return checked(
            LowRankRecord,
            parameter=self.parameter,
            outputs=int(self.b.shape[0]),
            inputs=int(self.a.shape[1]),
            rank=int(self.a.shape[0]),
            dtype=dtype_code(self.a.dtype),
            transposed=self.transposed,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"a": self.a, "b": self.b}

    @classmethod
    def build(cls, record: LowRankRecord, tensors: dict[str, torch.Tensor]) -> LowRank:
        return cls(record.parameter, tensors["a"], tensors["b"], record.transposed)

    def plan(self, target: Target) -> list[Write]:
        return [plan_update(target, self.parameter, self.a, self.b, 1.0, self.transposed)]

    def parameters(self, target: Target) -> list[str]:
        return [self.parameter]

    def cast(self, target: Target) -> LowRank:
        return self  # factors have their own precision; the weight's dtype is met when the update is added


def plan_update(target: Target, parameter: str, a: torch.Tensor, b: torch.Tensor, scale: float, transposed: bool) -> Write:
    """The step W += scale * b @ a."""
    from transformers.pytorch_utils import Conv1D

    shape = (b.shape[0], a.shape[1])
    target.expect(parameter, shape[::-1] if transposed else shape)
    stored = isinstance(target.model.get_submodule(parameter.rpartition(".")[0]), Conv1D)
    if stored != transposed:  # found here, because a square matrix has the same shape either way
        raise PatchBaseError(
            f"{parameter} is stored as {'(in, out)' if stored else '(out, in)'}, the update says otherwise.", f"Use transposed={stored}."
        )
    target.finite(a, f"the factors for {parameter}")
    target.finite(b, f"the factors for {parameter}")
    return Write(target, Place(parameter), lambda old: updated(old, a, b, scale, transposed))


def updated(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, transposed: bool) -> torch.Tensor:
    """weight + scale * b @ a, in at least float32, rounded once to the weight's dtype."""
    import torch

    wide = torch.float64 if torch.float64 in (weight.dtype, a.dtype) else torch.float32
    delta = b.to(weight.device, wide) @ a.to(weight.device, wide)
    delta = delta.T if transposed else delta
    return delta.mul_(scale).add_(weight).to(weight.dtype)  # in place: at a time, one matrix beside the weight
