"""`quantise-experts`: a mixture of experts exchanged for one with low-bit weights, rounded activations and changes of basis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic

from trocar.core.errors import PatchBaseError, PatchFormatError
from trocar.patch.actions import Place, Target, Write, total
from trocar.patch.ops.quantise import (
    Exchange,
    GridRecord,
    StepRecord,
    check_codes,
    check_step,
    compared,
    fitting,
    step_records,
    step_specs,
    weight_specs,
)
from trocar.patch.ops.sparse import checked, own
from trocar.patch.record import Effect, Name, Record, Size, Spec

if TYPE_CHECKING:
    import torch

    from trocar.patch.quantised import QuantisedExperts

Steps = Annotated[tuple[StepRecord, ...], pydantic.Field(max_length=16)]
Number = Annotated[int, pydantic.Field(ge=0, lt=2**16)]
WEIGHTS = ("gate_up_proj", "down_proj")


class ExpertsRecord(Record):
    """inputs: channels of the experts' input; hidden: of that of a down map; which: the transform in front of each expert's down map."""

    kind: Literal["quantise-experts"] = "quantise-experts"
    name: Name
    inputs: Size
    hidden: Size
    steps: Steps
    hidden_steps: Steps
    which: Annotated[tuple[Number, ...], pydantic.Field(min_length=1, max_length=2**16)]
    activations: GridRecord
    hidden_activations: GridRecord
    weights: GridRecord
    hidden_weights: GridRecord

    acts_on_experts: ClassVar[bool] = True

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> ExpertsRecord:
        if set(self.which) != set(range(self.sets)):
            raise ValueError("which must use every transform from 0 up")
        fitting(self.inputs, self.steps, (self.activations, self.weights))
        fitting(self.hidden, self.hidden_steps, (self.hidden_activations, self.hidden_weights))
        return self

    @property
    def sets(self) -> int:
        """How many transforms there are in front of down maps."""
        return max(self.which) + 1

    def specs(self) -> dict[str, Spec]:
        count = (len(self.which),)
        parts = {
            "in": step_specs(self.steps, self.inputs),
            "hidden": step_specs(self.hidden_steps, self.hidden, (self.sets,)),
            "gate_up": weight_specs(self.weights, 2 * self.hidden, self.inputs, count),
            "down": weight_specs(self.hidden_weights, self.inputs, self.hidden, count),
        }
        return {f"{place}.{name}": spec for place, specs in parts.items() for name, spec in specs.items()}

    def where(self) -> str:
        return self.name

    def shape_text(self) -> str:
        return f"W{self.weights.bits}A{self.activations.bits} {len(self.which)} experts of {self.hidden}, {self.inputs} inputs"


@dataclass(frozen=True, eq=False)
class QuantiseExperts:
    """Exchange a mixture of experts for a quantised one, with everything that it needs to run; the router stays outside of it.

    name: of the module, as the model calls it; experts: what comes in its place. The gate's function is that of the module replaced.
    `revert` puts the very module back. Raises PatchFormatError for experts that no record can describe; `apply` raises PatchBaseError (no
    such module, another shape) and UnsupportedModelError (experts in an unknown form).
    """

    name: str
    experts: QuantisedExperts
    _record: Any = field(default=None, init=False, repr=False)

    kind: ClassVar[str] = "quantise-experts"
    Record: ClassVar[type[Record]] = ExpertsRecord

    def __post_init__(self) -> None:
        experts = self.experts
        fronts: list[Any] = list(experts.hidden)
        steps = [step_records(front.transform) for front in fronts]
        scaled = any(front.transform.scale is not None for front in (experts.input, *fronts))
        if scaled or any(one != steps[0] for one in steps) or any(front.quantiser != fronts[0].quantiser for front in fronts):
            raise PatchFormatError("quantise-experts: the experts' inputs are divided, or differ in kind.", "Make them with quantise.")
        grids = {
            "activations": experts.input.quantiser,
            "hidden_activations": fronts[0].quantiser,
            "weights": experts.gate_up.quantiser,
            "hidden_weights": experts.down.quantiser,
        }
        record = checked(
            ExpertsRecord,
            name=self.name,
            inputs=experts.gate_up.in_features,
            hidden=experts.down.in_features,
            steps=step_records(experts.input.transform),
            hidden_steps=steps[0],
            which=experts.which,
            **{name: GridRecord(**grid.model_dump()) for name, grid in grids.items()},
        )
        own(self, "_record", record)

    def record(self) -> ExpertsRecord:
        return self._record

    def tensors(self) -> dict[str, torch.Tensor]:
        import torch

        experts = self.experts
        fronts: list[Any] = list(experts.hidden)
        found = {f"in.{name}": part for name, part in experts.input.named_buffers()}
        found |= {f"hidden.{kind}": torch.stack([front.get_buffer(kind) for front in fronts]) for kind in fronts[0].kinds}
        for name, matrices in (("gate_up", experts.gate_up), ("down", experts.down)):
            found |= {f"{name}.{key}": part for key, part in matrices.named_buffers()}
        return {name: found[name].detach().cpu().contiguous() for name in self._record.specs()}

    @classmethod
    def build(cls, record: ExpertsRecord, tensors: dict[str, torch.Tensor]) -> QuantiseExperts:
        from trocar.patch.quantised import GroupInput, Matrices, QuantisedExperts, Quantiser, Transform

        def front(place: str, channels: int, grid: GridRecord, number: int | None) -> GroupInput:
            prefix = f"{place}."
            parts = [part if number is None else part[number] for name, part in tensors.items() if name.startswith(prefix)]
            for part in parts:
                check_step(part, channels, f"quantise-experts: a transform of {record.name}")
            return GroupInput(Transform(channels, None, tuple(parts)), Quantiser(**grid.model_dump()))

        def matrices(place: str, grid: GridRecord, columns: int) -> Matrices:
            quantiser, content = Quantiser(**grid.model_dump()), tensors.get(f"{place}.values")
            if content is not None:
                return Matrices(quantiser, content, columns)
            code, step, zero = (tensors[f"{place}.{part}"] for part in ("codes", "step", "zero"))
            check_codes(code, zero, quantiser, columns, f"quantise-experts: {record.name}")
            return Matrices(quantiser, (code, step, zero), columns)

        tensors = {name: tensors[name] for name in record.specs()}  # in the order of the steps
        hidden = [front("hidden", record.hidden, record.hidden_activations, number) for number in range(record.sets)]
        experts = QuantisedExperts(
            front("in", record.inputs, record.activations, None),
            hidden,
            record.which,
            matrices("gate_up", record.weights, record.inputs),
            matrices("down", record.hidden_weights, record.hidden),
            None,
        )
        return cls(record.name, experts)

    def cast(self, target: Target) -> QuantiseExperts:
        return self

    def parameters(self, target: Target) -> list[str]:
        return [f"{self.name}.{part}" for part in WEIGHTS if target.find(f"{self.name}.{part}") is not None]

    def plan(self, target: Target) -> list[Any]:
        gate_up, activation = self._old(target)
        fresh = QuantiseExperts.build(self._record, {name: part.clone() for name, part in self.tensors().items()})
        for name, part in fresh.tensors().items():
            if part.is_floating_point():
                target.finite(part, f"{name} of {self.name}")
        fresh.experts.act_fn = activation
        return [ExchangeExperts(target, self.name, fresh.experts.to(gate_up.device), False)]

    def writes(self, target: Target) -> list[Write]:
        """Steps that write the rounded weights, in the bases of the experts' own inputs, into the float experts. Activations are not
        rounded there."""
        self._old(target)
        return [Write(target, Place(f"{self.name}.{part}"), self._filled(number)) for number, part in enumerate(WEIGHTS)]

    def _filled(self, number: int) -> Any:
        def fill(old: torch.Tensor) -> torch.Tensor:
            new = old.clone()
            for expert in range(self.experts.count):
                new[expert] = self.experts.effective(expert, number).to(new)
            return new

        return fill

    def _old(self, target: Target) -> tuple[torch.Tensor, Any]:
        """The float experts' gate_up and their gate's function. Raises PatchBaseError and UnsupportedModelError."""
        from trocar.anatomy.experts import check_experts

        target.tensor(f"{self.name}.{WEIGHTS[0]}")
        gate_up, down, activation = check_experts(target.model.get_submodule(self.name), self.name)
        record, count = self._record, len(self._record.which)
        wanted = ((count, 2 * record.hidden, record.inputs), (count, record.inputs, record.hidden))
        if (tuple(gate_up.shape), tuple(down.shape)) != wanted:
            raise PatchBaseError(f"{self.name} has weights {tuple(gate_up.shape)}, the patch was made for {wanted[0]}.")
        return gate_up, activation


@dataclass
class ExchangeExperts(Exchange):
    """One mixture of experts in the place of another."""

    def do(self) -> Effect:
        module: Any = self.target.model.get_submodule(self.name)
        if any(name not in module._parameters for name in WEIGHTS):
            raise PatchBaseError(f"{self.name} was exchanged by another operation.", "Make one operation for each mixture.")
        parts = []
        for expert in range(self.new.count):
            for number, name in enumerate(WEIGHTS):
                old = module.get_parameter(name)[expert].detach()
                parts.append(compared(old, self.new.effective(expert, number).to(old.device, old.dtype)))
        self.old = module
        self.new.train(module.training)
        self._put(self.new)
        return total(parts)
