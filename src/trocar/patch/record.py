"""What the header of a patch file may say: types, limits and the tensors that a record announces. No torch.

Every operation has one `Record` (a strict, frozen pydantic model) whose fields determine completely which tensors belong to it. Parsing,
writing and `show` all go through it, so there is one place that says what is valid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import pydantic

if TYPE_CHECKING:
    import torch

# safetensors code -> (bytes per entry, name in torch). A closed table: nothing else can be stored or read.
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (8, "float64"),
    "I64": (8, "int64"),
    "F32": (4, "float32"),
    "I32": (4, "int32"),
    "BF16": (2, "bfloat16"),
    "F16": (2, "float16"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
FLOATS = ("F64", "F32", "BF16", "F16")

MAX_NAME = 512  # characters of a parameter's or setting's name
MAX_DIMS = 8
MAX_SIZE = 2**48  # entries along one dimension; far above any model, far below overflow

Name = Annotated[str, pydantic.Field(min_length=1, max_length=MAX_NAME, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")]
Text = Annotated[str, pydantic.Field(max_length=MAX_NAME)]
Size = Annotated[int, pydantic.Field(ge=1, le=MAX_SIZE)]
Shape = Annotated[tuple[Size, ...], pydantic.Field(max_length=MAX_DIMS)]
Dtype = Literal["F64", "I64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL"]
Float = Literal["F64", "F32", "BF16", "F16"]
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
ComponentName = Annotated[
    str, pydantic.Field(max_length=64, pattern=r"^([a-z][a-z0-9_]{0,15}\.)?L(0|[1-9]\d{0,5})(\.(attn|mlp|[HN](0|[1-9]\d{0,7})))?$")
]
PointName = Annotated[
    str,
    pydantic.Field(
        max_length=64, pattern=r"^([a-z][a-z0-9_]{0,15}\.)?L(0|[1-9]\d{0,5})\.(resid_pre|resid_post|attn_out|mlp_out|heads|neurons)$"
    ),
]


class Spec(NamedTuple):
    """One tensor that a record announces. `extent` marks a tensor of indices: sorted, unique, within [0, extent)."""

    dtype: str
    shape: tuple[int, ...]
    extent: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]


def index_dtype(extent: int) -> str:
    """Indices below 2^31 are stored in four bytes, others in eight."""
    return "I32" if extent <= 2**31 else "I64"


class Strict(pydantic.BaseModel):
    """Frozen, no unknown keys, no conversions: a header says exactly what it means or is refused."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class Record(Strict):
    """Base of the operations' records."""

    kind: str

    removes: ClassVar[bool] = False  # changes the architecture, so nothing may come after it
    acts_on_experts: ClassVar[bool] = False  # so that a patch with it is for a mixture of experts

    def specs(self) -> dict[str, Spec]:
        """Field name -> tensor, in the order in which they are stored."""
        return {}

    def where(self) -> str:
        """The place, for a table."""
        raise NotImplementedError

    def shape_text(self) -> str:
        """The size of what is changed, for a table."""
        return ""


class Effect(Strict):
    """What an operation did when it was applied: entries whose bits changed, and the Euclidean norm of the change (null if not finite)."""

    changed: Annotated[int, pydantic.Field(ge=0, le=2**62)]
    norm: Finite | None


class Base(Strict):
    """The model that a patch belongs to, in fingerprints (`trocar.anatomy.fingerprint` and its kin).

    fingerprint: of all values; structure: of all names and shapes; dtype: of most entries; tensors: of the parameters that the
    patch touches.
    """

    fingerprint: Name
    structure: Name
    family: Text
    dtype: Dtype
    tensors: dict[Name, Name]

    @classmethod
    def of(cls, model: Any, ops: Sequence[Any] = ()) -> Base:
        """The base record of `model` as it is now, with the fingerprints of what `ops` touch.

        Raises UnknownFamilyError, UnsupportedModelError, and PatchBaseError if an operation names something the model does not have.
        """
        from trocar.anatomy import fingerprint, structure_fingerprint, tensor_fingerprint
        from trocar.patch.actions import Target

        target = Target.of(model, ops)
        names = sorted({name for op in ops for name in op.parameters(target)})
        counts: dict[str, int] = {}
        for parameter in target.model.parameters():
            code = dtype_code(parameter.dtype) or "U8"
            counts[code] = counts.get(code, 0) + parameter.numel()
        return cls(
            fingerprint=fingerprint(target.model),
            structure=structure_fingerprint(target.model),
            family=target.anatomy.family.name,
            dtype=max(sorted(counts), key=lambda code: counts[code]),  # type: ignore[arg-type]
            tensors={name: tensor_fingerprint(target.tensor(name)) for name in names},
        )


def torch_dtype(code: str) -> torch.dtype:
    import torch

    return getattr(torch, DTYPES[code][1])


def dtype_code(dtype: torch.dtype) -> str | None:
    """The code of a torch dtype, or None if patches cannot hold it."""
    name = str(dtype).removeprefix("torch.")
    return next((code for code, (_, known) in DTYPES.items() if known == name), None)


def explain(error: pydantic.ValidationError) -> str:
    """The first complaint of pydantic in one clause."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(part)[:64] for part in first['loc']) or 'header'}: {first['msg'][0].lower()}{first['msg'][1:200]}"


def sorted_unique(values: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """Pydantic helper: refuse a list that is not strictly increasing."""
    if any(not a < b for a, b in itertools.pairwise(values)):
        raise ValueError(f"{what} must be sorted and unique")
    return values
