"""`sparse-replace`: new values for some entries of one parameter (or buffer)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pydantic

from trocar.core.errors import PatchFormatError
from trocar.patch.actions import Place, Target, Write, bits
from trocar.patch.record import DTYPES, Dtype, Name, Record, Shape, Size, Spec, dtype_code, index_dtype, torch_dtype

if TYPE_CHECKING:
    import torch

Layout = Literal["whole", "rows", "cols", "flat"]


class SparseRecord(Record):
    kind: Literal["sparse-replace"] = "sparse-replace"
    parameter: Name
    shape: Shape
    dtype: Dtype
    layout: Layout
    count: Size

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> SparseRecord:
        need = {"whole": 0, "rows": 1, "cols": 2, "flat": 0}[self.layout]
        if len(self.shape) < need:
            raise ValueError(f"layout '{self.layout}' needs a tensor of at least {need} dimensions")
        if self.count > self.extent() or (self.layout == "whole" and self.count != self.extent()):
            raise ValueError(f"{self.count} entries do not fit layout '{self.layout}' of shape {list(self.shape)}")
        return self

    def extent(self) -> int:
        """What the indices count: rows, columns or entries."""
        return {"rows": self.shape[:1], "cols": self.shape[1:2]}.get(self.layout, (math.prod(self.shape),))[0]

    def specs(self) -> dict[str, Spec]:
        values = {
            "whole": self.shape,
            "rows": (self.count, *self.shape[1:]),
            "cols": (*self.shape[:1], self.count, *self.shape[2:]),
            "flat": (self.count,),
        }[self.layout]
        index = Spec(index_dtype(self.extent()), (self.count,), self.extent())
        return ({} if self.layout == "whole" else {"index": index}) | {"values": Spec(self.dtype, values)}

    def where(self) -> str:
        return self.parameter

    def shape_text(self) -> str:
        full = "x".join(map(str, self.shape)) or "scalar"
        return full if self.layout == "whole" else f"{self.count} of {self.extent()} {self.layout.replace('flat', 'entries')} in {full}"


@dataclass(frozen=True, eq=False)
class SparseReplace:
    """New values for some entries of one parameter or persistent buffer, in its own dtype.

    parameter: its name in the model. shape: the parameter's full shape. values: the new values; with layout `whole` of that shape, with
    `rows` (k, *shape[1:]), with `cols` (shape[0], k, *shape[2:]), with `flat` (k,) in row-major order. index: the k rows, columns
    or flat positions, sorted and unique. Rows and columns are those of the tensor as stored (for a Conv1D, rows are inputs).
    Raises PatchFormatError when they do not fit together.
    """

    parameter: str
    shape: tuple[int, ...]
    values: torch.Tensor
    index: torch.Tensor | None = None
    layout: Layout = "whole"

    kind: ClassVar[str] = "sparse-replace"
    Record: ClassVar[type[Record]] = SparseRecord

    def __post_init__(self) -> None:
        import torch

        own(self, "shape", tuple(int(size) for size in self.shape))
        own(self, "values", self.values.detach().cpu().clone(memory_format=torch.contiguous_format))
        if (self.index is None) != (self.layout == "whole"):
            raise PatchFormatError(f"sparse-replace of {self.parameter}: layout '{self.layout}' and its index do not go together.")
        record = self.record()  # validates names, sizes, layout
        if tuple(self.values.shape) != record.specs()["values"].shape:
            shape = tuple(self.values.shape)
            raise PatchFormatError(f"sparse-replace of {self.parameter}: values have shape {shape}, not {record.specs()['values'].shape}.")
        if self.index is not None:
            spec = record.specs()["index"]
            own(self, "index", self.index.detach().cpu().to(torch_dtype(spec.dtype)).clone())
            check_index(self.index, record.extent(), f"sparse-replace of {self.parameter}")

    @staticmethod
    def between(parameter: str, before: torch.Tensor, after: torch.Tensor, layout: Layout | None = None) -> SparseReplace | None:
        """The smallest replacement that turns `before` into `after`, bit for bit; None if they are equal.

        layout: forces one of the layouts instead of the smallest. Raises PatchFormatError if shapes or dtypes differ.
        """

        if before.shape != after.shape or before.dtype != after.dtype:
            raise PatchFormatError(f"{parameter}: {tuple(before.shape)} {before.dtype} cannot become {tuple(after.shape)} {after.dtype}.")
        before, after = before.detach().contiguous(), after.detach().to(before.device).contiguous()
        changed = bits(before) != bits(after)
        if not bool(changed.any()):
            return None
        size = after.element_size()
        entries: dict[str, torch.Tensor] = {"flat": changed.flatten().nonzero().flatten()}
        costs = {"whole": after.numel() * size, "flat": len(entries["flat"]) * (size + DTYPES[index_dtype(after.numel())][0])}
        for name, dim in (("rows", 0), ("cols", 1)):
            if after.dim() > dim:
                entries[name] = (
                    changed.movedim(dim, 0).flatten(1).any(1).nonzero().flatten() if after.dim() > 1 else changed.nonzero().flatten()
                )
                costs[name] = len(entries[name]) * (after.numel() // after.shape[dim] * size + 4)
        best = layout or min(("whole", "rows", "cols", "flat"), key=lambda name: costs.get(name, math.inf))
        if best == "whole":
            return SparseReplace(parameter, tuple(after.shape), after)
        index = entries[best]
        values = after.flatten()[index] if best == "flat" else after.index_select(0 if best == "rows" else 1, index)
        return SparseReplace(parameter, tuple(after.shape), values, index, best)  # type: ignore[arg-type]

    def record(self) -> SparseRecord:
        count = math.prod(self.shape) if self.index is None else int(self.index.numel())
        code = dtype_code(self.values.dtype)
        return checked(SparseRecord, parameter=self.parameter, shape=self.shape, dtype=code, layout=self.layout, count=count)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"values": self.values} if self.index is None else {"index": self.index, "values": self.values}

    @classmethod
    def build(cls, record: SparseRecord, tensors: dict[str, torch.Tensor]) -> SparseReplace:
        return cls(record.parameter, record.shape, tensors["values"], tensors.get("index"), record.layout)

    def place(self) -> Place:
        import torch

        dim = {"rows": 0, "cols": 1}.get(self.layout)
        return Place(self.parameter, dim, None if self.index is None else self.index.to(torch.int64))

    def plan(self, target: Target) -> list[Write]:
        target.expect(self.parameter, self.shape, self.values.dtype)
        target.finite(self.values, f"the new values of {self.parameter}")
        return [Write(target, self.place(), lambda old: self.values.to(old.device).reshape(old.shape))]

    def parameters(self, target: Target) -> list[str]:
        return [self.parameter]

    def cast(self, target: Target) -> SparseReplace:
        """The same values in the dtype that the parameter has in `target`."""
        values = self.values.to(target.expect(self.parameter, self.shape).dtype)
        return SparseReplace(self.parameter, self.shape, values, self.index, self.layout)


def own(instance: Any, name: str, value: Any) -> None:
    """Set a field of a frozen dataclass while it is being made."""
    object.__setattr__(instance, name, value)


def checked(record: type[Any], **fields: Any) -> Any:
    """Make a record from an operation's own fields. Raises PatchFormatError with the first complaint."""
    from trocar.patch.record import explain

    try:
        return record(**fields)
    except pydantic.ValidationError as error:
        raise PatchFormatError(f"{record.model_fields['kind'].default}: {explain(error)}.") from None


def check_index(index: torch.Tensor, extent: int, what: str) -> None:
    """Raises PatchFormatError unless `index` (k,) is sorted, unique and within [0, extent)."""
    if index.dim() != 1 or index.numel() == 0:
        raise PatchFormatError(f"{what}: the index must be a list of at least one position.")
    if int(index[0]) < 0 or int(index[-1]) >= extent or not bool((index[1:] > index[:-1]).all()):
        raise PatchFormatError(f"{what}: indices must be sorted, unique and from 0 to {extent - 1}.")
