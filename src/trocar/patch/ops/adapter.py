"""`adapter`: the LoRA factors of many modules, as `peft` trains them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import pydantic

from trocar.core.errors import PatchFormatError
from trocar.patch.actions import Target, Write
from trocar.patch.ops.gate import listed
from trocar.patch.ops.low_rank import plan_update
from trocar.patch.ops.sparse import checked, own
from trocar.patch.record import Finite, Float, Name, Record, Size, Spec, Strict, Text, dtype_code

if TYPE_CHECKING:
    import torch


class ModuleRecord(Strict):
    name: Name
    outputs: Size
    inputs: Size
    rank: Size
    scale: Finite
    transposed: bool


class AdapterRecord(Record):
    kind: Literal["adapter"] = "adapter"
    dtype: Float
    task: Text | None
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)]
    modules: tuple[ModuleRecord, ...]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> AdapterRecord:
        names = [module.name for module in self.modules]
        if not names or any(not a < b for a, b in itertools.pairwise(names)):
            raise ValueError("modules must be at least one, sorted and unique")
        return self

    def specs(self) -> dict[str, Spec]:
        found = {}
        for number, module in enumerate(self.modules):
            found[f"{number}.a"] = Spec(self.dtype, (module.rank, module.inputs))
            found[f"{number}.b"] = Spec(self.dtype, (module.outputs, module.rank))
        return found

    def where(self) -> str:
        return listed([module.name for module in self.modules], 3)

    def shape_text(self) -> str:
        ranks = sorted({module.rank for module in self.modules})
        return f"{len(self.modules)} modules of rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}"


class Factors(NamedTuple):
    """One module's update: scale * b @ a, a (rank, in), b (out, rank); transposed: the module stores (in, out)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA factors of several modules: W += scale * B @ A.

    factors: module name in the model -> `Factors`, all of one dtype. task: PEFT's task type; dropout: that of the training; both only
    travel to the exported folder. Made from a trained `PeftModel` by `Adapter.of`, from a folder by `Adapter.from_peft`. The sum is taken
    in float32 and rounded once to the weight's dtype. Raises PatchFormatError when factors do not fit together.
    """

    factors: Mapping[str, Factors]
    task: str | None = None
    dropout: float = 0.0
    _dtype: str = field(default="", init=False, repr=False)

    kind: ClassVar[str] = "adapter"
    Record: ClassVar[type[Record]] = AdapterRecord

    def __post_init__(self) -> None:
        cleaned = {}
        for name, (a, b, scale, transposed) in sorted(self.factors.items()):
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
                raise PatchFormatError(f"adapter of {name}: factors of shape {shapes} are not (rank, in) and (out, rank).")
            a, b = (part.detach().cpu().clone().contiguous() for part in (a, b))
            cleaned[name] = Factors(a, b, float(scale), bool(transposed))
        own(self, "factors", cleaned)
        dtypes = {part.dtype for factors in cleaned.values() for part in factors[:2]}
        if len(dtypes) != 1:
            raise PatchFormatError(f"adapter: its factors have {len(dtypes)} dtypes.", "All must have the same.")
        own(self, "_dtype", dtype_code(dtypes.pop()))
        self.record()

    @classmethod
    def of(cls, model: Any, adapter: str = "default", initial: Any = None) -> Adapter:
        """The factors of a `PeftModel`'s LoRA adapter. Raises PatchFormatError for anything that is not plain LoRA on linear maps.

        initial: of PiSSA and its like, `trocar.trace.adapters.initial_factors(model)` from before training; subtracted.
        """
        from trocar.patch.lora import from_model

        return from_model(model, adapter, initial)

    @classmethod
    def from_peft(cls, folder: Any) -> Adapter:
        """Read a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`); no code of it is run. Raises PatchFormatError."""
        from trocar.patch.peft_folder import open_folder

        return open_folder(folder).adapter()

    def record(self) -> AdapterRecord:
        modules = tuple(
            checked_module(name, int(b.shape[0]), int(a.shape[1]), int(a.shape[0]), scale, transposed)
            for name, (a, b, scale, transposed) in self.factors.items()
        )
        return checked(AdapterRecord, dtype=self._dtype, task=self.task, dropout=float(self.dropout), modules=modules)

    def tensors(self) -> dict[str, torch.Tensor]:
        pairs = enumerate(self.factors.values())
        return {f"{number}.{key}": part for number, (a, b, *_) in pairs for key, part in (("a", a), ("b", b))}

    @classmethod
    def build(cls, record: AdapterRecord, tensors: dict[str, torch.Tensor]) -> Adapter:
        factors = {
            module.name: Factors(tensors[f"{number}.a"], tensors[f"{number}.b"], module.scale, module.transposed)
            for number, module in enumerate(record.modules)
        }
        return cls(factors, record.task, record.dropout)

    def cast(self, target: Target) -> Adapter:
        return self

    def parameters(self, target: Target) -> list[str]:
        return [f"{name}.weight" for name in self.factors]

    def plan(self, target: Target) -> list[Write]:
        return [plan_update(target, f"{name}.weight", a, b, scale, swap) for name, (a, b, scale, swap) in self.factors.items()]


def checked_module(name: str, outputs: int, inputs: int, rank: int, scale: float, transposed: bool) -> ModuleRecord:
    try:
        return ModuleRecord(name=name, outputs=outputs, inputs=inputs, rank=rank, scale=scale, transposed=transposed)
    except pydantic.ValidationError as error:
        from trocar.patch.record import explain

        raise PatchFormatError(f"adapter: {explain(error)}.") from None
