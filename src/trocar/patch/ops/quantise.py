"""`quantise`: linear layers that read one input, exchanged for layers with low-bit weights, rounded activations and a change of basis."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic

from trocar.core.errors import PatchBaseError, PatchFormatError, UnsupportedModelError
from trocar.patch.actions import Place, Target, Write, bits, total
from trocar.patch.ops.gate import listed
from trocar.patch.ops.sparse import checked, own
from trocar.patch.record import Effect, Name, Record, Size, Spec, Strict

if TYPE_CHECKING:
    import torch

    from trocar.patch.quantised import QuantisedLinear


class GridRecord(Strict):
    bits: Annotated[int, pydantic.Field(ge=2, le=16)]
    symmetric: bool
    group: Size | None
    clip: Annotated[float, pydantic.Field(gt=0, le=1)]


class StepRecord(Strict):
    """A rotation of blocks of `size` channels, the same for all or one for each; or a permutation of all channels."""

    kind: Literal["rotation", "permutation"]
    size: Size | None = None
    each: bool = False


class LayerRecord(Strict):
    name: Name
    outputs: Size
    bias: bool


def fitting(channels: int, steps: Sequence[StepRecord], grids: Sequence[GridRecord]) -> None:
    """Raise ValueError for steps or grids that do not act on rows of `channels`."""
    for step in steps:
        if (step.kind == "rotation") != (step.size is not None) or (step.size and channels % step.size):
            raise ValueError(f"a {step.kind} of size {step.size} does not act on {channels} channels")
    for grid in grids:
        if grid.group is not None and channels % grid.group:
            raise ValueError(f"groups of {grid.group} do not divide {channels} columns")


def step_specs(steps: Sequence[StepRecord], channels: int, lead: tuple[int, ...] = ()) -> dict[str, Spec]:
    """The tensors of a transform's steps; lead: leading axes."""
    found = {}
    for number, step in enumerate(steps):
        if step.size is None:
            found[f"permutation{number}"] = Spec("I64", (*lead, channels))
        else:
            found[f"rotation{number}"] = Spec("F32", lead + ((channels // step.size,) if step.each else ()) + (step.size, step.size))
    return found


def weight_specs(grid: GridRecord, outputs: int, inputs: int, lead: tuple[int, ...] = ()) -> dict[str, Spec]:
    """The tensors of a weight (outputs, inputs); lead: leading axes."""
    if grid.bits == 16:
        return {"values": Spec("F32", (*lead, outputs, inputs))}
    whole, groups = "U8" if grid.bits <= 8 else "I32", inputs // (grid.group or inputs)
    columns = -(-inputs // 2) if grid.bits <= 4 else inputs
    return {
        "codes": Spec(whole, (*lead, outputs, columns)),
        "step": Spec("F32", (*lead, outputs, groups)),
        "zero": Spec(whole, (*lead, outputs, groups)),
    }


class QuantiseRecord(Record):
    kind: Literal["quantise"] = "quantise"
    inputs: Size
    scale: bool
    steps: Annotated[tuple[StepRecord, ...], pydantic.Field(max_length=16)]
    activations: GridRecord
    weights: GridRecord
    layers: Annotated[tuple[LayerRecord, ...], pydantic.Field(min_length=1, max_length=64)]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> QuantiseRecord:
        if len({layer.name for layer in self.layers}) < len(self.layers):
            raise ValueError("layers must be unique")
        fitting(self.inputs, self.steps, (self.activations, self.weights))
        return self

    def specs(self) -> dict[str, Spec]:
        found = {"scale": Spec("F32", (self.inputs,))} if self.scale else {}
        found |= step_specs(self.steps, self.inputs)
        for number, layer in enumerate(self.layers):
            found |= {f"{number}.{name}": spec for name, spec in weight_specs(self.weights, layer.outputs, self.inputs).items()}
            if layer.bias:
                found[f"{number}.bias"] = Spec("F32", (layer.outputs,))
        return found

    def where(self) -> str:
        return listed([layer.name for layer in self.layers], 3)

    def shape_text(self) -> str:
        turned = " ".join(["scale"] * self.scale + [f"{step.kind}{f' {step.size}' if step.size else ''}" for step in self.steps])
        return f"W{self.weights.bits}A{self.activations.bits} {self.inputs} inputs{', ' + turned if turned else ''}"


@dataclass(frozen=True, eq=False)
class Quantise:
    """Exchange linear layers that read the same tensor for quantised ones, with everything they need to run.

    names: of the modules, as the model calls them; layers: what comes in their place, sharing one input (`trocar.patch.quantised`). A patch
    may hold one such operation for each input. `revert` puts the very modules back that were there. Raises PatchFormatError for layers
    that do not belong together; `apply` raises PatchBaseError (no such layer, another shape) and UnsupportedModelError (adapters).
    """

    names: Sequence[str]
    layers: Sequence[QuantisedLinear]
    _record: Any = field(default=None, init=False, repr=False)

    kind: ClassVar[str] = "quantise"
    Record: ClassVar[type[Record]] = QuantiseRecord

    def __post_init__(self) -> None:
        own(self, "names", tuple(self.names))
        own(self, "layers", tuple(self.layers))
        first = self.layers[0]
        if any(layer.shared is not first.shared or layer.quantiser != first.quantiser for layer in self.layers):
            raise PatchFormatError("quantise: its layers do not share one input and one kind of weights.", "Make one for each input.")
        transform = first.shared.transform
        layers = tuple(
            LayerRecord(name=name, outputs=layer.out_features, bias=layer.bias is not None)
            for name, layer in zip(self.names, self.layers, strict=True)
        )
        own(
            self,
            "_record",
            checked(
                QuantiseRecord,
                inputs=transform.channels,
                scale=transform.scale is not None,
                steps=step_records(transform),
                activations=GridRecord(**first.shared.quantiser.model_dump()),
                weights=GridRecord(**first.quantiser.model_dump()),
                layers=layers,
            ),
        )

    def record(self) -> QuantiseRecord:
        return self._record

    def tensors(self) -> dict[str, torch.Tensor]:
        found = dict(self.layers[0].shared.named_buffers())
        for number, layer in enumerate(self.layers):
            found |= {f"{number}.{name}": part for name, part in layer.named_buffers(recurse=False)}
        return {name: found[name].detach().cpu().contiguous() for name in self._record.specs()}

    @classmethod
    def build(cls, record: QuantiseRecord, tensors: dict[str, torch.Tensor]) -> Quantise:
        from trocar.patch.quantised import GroupInput, QuantisedLinear, Quantiser, Transform, unpack

        kinds = [f"{step.kind}{number}" for number, step in enumerate(record.steps)]
        transform = Transform(record.inputs, tensors.get("scale"), tuple(tensors[kind] for kind in kinds))
        for kind in kinds:
            check_step(tensors[kind], record.inputs, f"quantise: {kind} of {record.layers[0].name}")
        weights, activations = (Quantiser(**grid.model_dump()) for grid in (record.weights, record.activations))
        shared = GroupInput(transform, activations, len(record.layers))
        layers = []
        for number, layer in enumerate(record.layers):
            content: Any = tensors.get(f"{number}.values")
            if content is None:
                code, step, zero = (tensors[f"{number}.{part}"] for part in ("codes", "step", "zero"))
                check_codes(code, zero, weights, record.inputs, f"quantise: {layer.name}")
                code = unpack(code, record.inputs) if weights.bits <= 4 else code
                content = (code, step, zero)
            layers.append(QuantisedLinear(shared, weights, content, tensors.get(f"{number}.bias"), owner=number == 0))
        return cls([layer.name for layer in record.layers], layers)

    def cast(self, target: Target) -> Quantise:
        return self

    def parameters(self, target: Target) -> list[str]:
        return [f"{name}.{part}" for name in self.names for part in ("weight", "bias") if target.find(f"{name}.{part}") is not None]

    def plan(self, target: Target) -> list[Any]:
        fresh = Quantise.build(self._record, {name: part.clone() for name, part in self.tensors().items()})
        shared = fresh.layers[0].shared
        for name, part in fresh.tensors().items():
            if part.is_floating_point():
                target.finite(part, f"{name} of {self.names[0]}")
        steps = []
        for name, layer in zip(self.names, fresh.layers, strict=True):
            weight, transposed = _old(target, name, layer)
            layer.to(weight.device)
            steps.append(Exchange(target, name, layer, transposed))
        shared.to(target.tensor(f"{self.names[0]}.weight").device)
        return steps

    def writes(self, target: Target) -> list[Write]:
        """Steps that write the rounded weights, in the basis of the layers' own inputs, into the float layers: what a plain checkpoint can
        hold. Activations are not rounded there."""
        found = []
        for name, layer in zip(self.names, self.layers, strict=True):
            _, transposed = _old(target, name, layer)
            found.append(Write(target, Place(f"{name}.weight"), _filled(lambda layer=layer: layer.effective_weight(), transposed)))
            if layer.bias is not None:
                found.append(Write(target, Place(f"{name}.bias"), _filled(lambda layer=layer: layer.bias, False)))
        return found


def step_records(transform: Any) -> tuple[StepRecord, ...]:
    """A Transform's steps as a header says them."""
    return tuple(
        StepRecord(kind="rotation", size=step.shape[-1], each=step.ndim == 3)
        if step.is_floating_point()
        else StepRecord(kind="permutation")
        for step in transform.steps
    )


def check_step(part: torch.Tensor, channels: int, what: str) -> None:
    """Raise PatchFormatError unless a stored step is a rotation or a permutation."""
    import torch

    if not part.is_floating_point():
        good = torch.equal(part.sort().values, torch.arange(channels))
    else:
        good = bool((part @ part.mT - torch.eye(part.shape[-1])).abs().max() < 1e-3)
    if not good:
        raise PatchFormatError(f"{what} is not one of its {channels} channels.")


def check_codes(code: torch.Tensor, zero: torch.Tensor, quantiser: Any, columns: int, what: str) -> None:
    """Raise PatchFormatError for codes, as they are stored, or zero points that the quantiser cannot have made."""
    from trocar.patch.quantised import unpack

    highest, lowest = 0, quantiser.top
    for part in code.flatten(0, -2).split(4096):  # the whole unpacked would take twice the memory
        rows = unpack(part, columns) if quantiser.bits <= 4 else part
        highest, lowest = max(highest, int(rows.max())), min(lowest, int(rows.min()))
    if highest > quantiser.top or lowest < quantiser.bottom or int(zero.max()) > quantiser.top or int(zero.min()) < 0:
        raise PatchFormatError(f"{what} has codes that {quantiser.bits} bits cannot hold.")


def _filled(compute: Any, transposed: bool) -> Any:
    def fill(old: torch.Tensor) -> torch.Tensor:
        value = compute()
        return (value.T if transposed else value).to(old.device, old.dtype).contiguous()

    return fill


def _old(target: Target, name: str, layer: QuantisedLinear) -> tuple[torch.Tensor, bool]:
    """The float layer's weight and whether it is stored (in, out). Raises PatchBaseError and UnsupportedModelError."""
    from trocar.anatomy.linear import base_layer, check_linear

    weight = target.tensor(f"{name}.weight")
    module = target.model.get_submodule(name)
    if base_layer(module) is not module:
        raise UnsupportedModelError(f"{name} carries an adapter.", "Merge it before quantising.")
    transposed = check_linear(module, name)
    shape = tuple(weight.shape)[::-1] if transposed else tuple(weight.shape)
    if shape != (layer.out_features, layer.in_features):
        raise PatchBaseError(f"{name} is {shape}, the patch was made for {(layer.out_features, layer.in_features)}.")
    if (target.find(f"{name}.bias") is None) != (layer.bias is None):
        raise PatchBaseError(f"{name} has a bias in only one of the model and the patch.")
    return weight, transposed


@dataclass
class Exchange:
    """One module in the place of another. `undo` puts back the very object."""

    target: Target
    name: str
    new: Any
    transposed: bool
    old: Any = field(default=None, init=False)

    def do(self) -> Effect:
        module = self.target.model.get_submodule(self.name)
        if getattr(module, "weight", None) is None:
            raise PatchBaseError(f"{self.name} was exchanged by another operation.", "Make one operation for each layer.")
        old = module.weight.detach()
        new = self.new.effective_weight()
        seen = compared(old, (new.T if self.transposed else new).to(old.device, old.dtype))
        self.old = module
        self.new.train(module.training)
        self._put(self.new)
        return seen

    def undo(self) -> None:
        if self.old is not None:
            self._put(self.old)
            self.old = None

    def intact(self) -> bool:
        """Whether the module is still there."""
        return self.target.model.get_submodule(self.name) is self.new

    def _put(self, module: Any) -> None:
        owner, _, leaf = self.name.rpartition(".")
        setattr(self.target.model.get_submodule(owner), leaf, module)


def compared(old: torch.Tensor, new: torch.Tensor) -> Effect:
    """Entries whose bits differ and the norm of the difference, a slab of rows at a time."""
    import torch

    parts = []
    for one, other in zip(old.split(1024), new.split(1024), strict=True):
        norm = float(torch.linalg.vector_norm(other.double() - one.double()))
        parts.append(Effect(changed=int((bits(one) != bits(other)).sum()), norm=norm if norm < float("inf") else None))
    return total(parts)


def one_per_input(layers: dict[str, Any]) -> list[Quantise]:
    """Operations for many layers, one for each shared input, in the order of the layers."""
    groups = [list(items) for _, items in itertools.groupby(layers.items(), key=lambda item: id(item[1].shared))]
    return [Quantise([name for name, _ in items], [layer for _, layer in items]) for items in groups]
