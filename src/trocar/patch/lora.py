"""LoRA adapters in a model, as `peft` puts them there: taken out of it, put into it for a while, or joined from a patch's operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from trocar.core.errors import ExportError, PatchBaseError, PatchFormatError
from trocar.patch.actions import Target
from trocar.patch.ops.adapter import Adapter, Factors
from trocar.patch.ops.low_rank import LowRank
from trocar.patch.patch import Patch
from trocar.patch.peft_folder import PLAIN, Shape, refuse, residual, settings


def from_model(model: Any, adapter: str = "default", initial: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None) -> Adapter:
    """The factors of one LoRA adapter of a `PeftModel`. Raises PatchFormatError for anything but plain LoRA on linear maps.

    initial: the fresh factors of an initialisation that took them out of the base's weights (PiSSA, OLoRA; `trace.adapters.
    initial_factors`); they are subtracted, which doubles the rank, so that the result belongs to the original weights.
    """
    config = getattr(model, "peft_config", {}).get(adapter)
    if config is None:
        known = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise PatchFormatError(f"The model has no adapter '{adapter}'.", f"It has: {known}.")
    said = config.to_dict()
    refuse(said, f"The adapter '{adapter}'")
    if initial is None and (start := residual(said)):
        raise PatchFormatError(
            f"The adapter '{adapter}' began as {start}, whose first value was taken out of the base's weights.",
            "Give its fresh factors: Adapter.of(model, initial=trocar.trace.adapters.initial_factors(model)), taken before training.",
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    factors = {}
    for name, module in base.named_modules():
        if adapter in getattr(module, "lora_embedding_A", {}) or adapter in getattr(module, "lora_magnitude_vector", {}):
            raise PatchFormatError(f"The adapter '{adapter}' changes {name} in a way other than B @ A.", PLAIN)
        if adapter not in getattr(module, "lora_A", {}):
            continue
        a, b = module.lora_A[adapter], module.lora_B[adapter]
        if a.weight.dim() != 2 or b.bias is not None:
            raise PatchFormatError(f"The adapter '{adapter}' changes {name} in a way other than B @ A.", PLAIN)
        left, right = a.weight, b.weight
        if initial and name in initial:
            a0, b0 = (part.to(left.device, left.dtype) for part in initial[name])
            left, right = torch.cat([left, a0]), torch.cat([right, -b0], dim=1)
        factors[name] = Factors(left, right, float(module.scaling[adapter]), bool(module.fan_in_fan_out))
    if not factors:
        raise PatchFormatError(f"The adapter '{adapter}' has no LoRA factors.", PLAIN)
    task = getattr(config.task_type, "value", config.task_type)
    return Adapter(factors, task, float(config.lora_dropout or 0.0))


def combined(patch: Patch, target: Target) -> Adapter:
    """All operations of a patch as one adapter. Raises ExportError if one is not a low-rank update of a linear map."""
    found: dict[str, list[Factors]] = {}
    task, dropout = None, 0.0
    for op in patch.ops:
        if isinstance(op, LowRank):
            found.setdefault(op.parameter.removesuffix(".weight"), []).append(Factors(op.a, op.b, 1.0, op.transposed))
        elif isinstance(op, Adapter):
            task, dropout = op.task or task, op.dropout or dropout
            for name, factors in op.factors.items():
                found.setdefault(name, []).append(factors)
        else:
            raise ExportError(f"The operation {op.kind} of {op.record().where()} is no low-rank update.", "Export to a checkpoint instead.")
    if not found:
        raise ExportError("The patch has no operations.", "There is nothing to export.")
    for name in found:
        from transformers.pytorch_utils import Conv1D

        try:
            module = target.model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, torch.nn.Linear | Conv1D):
            raise ExportError(f"{name} is not a linear map.", "Export to a checkpoint instead.")
    return Adapter({name: _joined(parts) for name, parts in found.items()}, task, dropout)


def _joined(parts: list[Factors]) -> Factors:
    """Several updates of one matrix as one, of the summed rank."""
    if len(parts) == 1:
        return parts[0]
    dtype = max((part.a.dtype for part in parts), key=lambda one: one.itemsize)
    a = torch.cat([part.a.to(dtype) for part in parts])
    b = torch.cat([part.b.to(dtype) * part.scale for part in parts], dim=1)
    return Factors(a, b, 1.0, parts[0].transposed)


@contextmanager
def wrapped(model: torch.nn.Module, config: Any, name: str = "default") -> Iterator[Any]:
    """`model` inside a new `peft.PeftModel` of this `LoraConfig`; on leaving, its own modules again, training flags and notes as before.

    Weights that an initialisation wrote into the base (PiSSA, OLoRA) are put back.
    """
    import peft

    flags = [(module, module.training) for module in model.modules()]
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    marked = model.__dict__.get("_hf_peft_config_loaded")  # transformers' note, which unload leaves: saving would look for adapters
    changes = residual(config.to_dict())
    kept = [(parameter, parameter.detach().clone()) for parameter in model.parameters()] if changes else []
    outer = peft.get_peft_model(model, config, name)  # type: ignore[arg-type]
    try:
        yield outer
    finally:
        outer.unload()
        if marked is None:
            model.__dict__.pop("_hf_peft_config_loaded", None)
        else:
            model.__dict__["_hf_peft_config_loaded"] = marked
        for module, training in flags:
            module.training = training
        for parameter, learns in learning:
            parameter.requires_grad_(learns)
        for parameter, value in kept:
            parameter.data.copy_(value)


@contextmanager
def attached(model: torch.nn.Module, adapter: Adapter, name: str = "default") -> Iterator[Any]:
    """`model` inside a `peft.PeftModel` that holds `adapter` under `name`, in evaluation mode and frozen; on leaving, plain again.

    The base's modules and weights stay as they are, so that an adapter can be looked at module by module (which of them matter, what a
    subset does) without rounding into the weights. Inside, `model` itself is adapted too. Raises PatchBaseError for a module that the model
    does not have, or of another shape, before anything is touched.
    """
    import peft

    modules = dict(model.named_modules())
    for module, factors in adapter.factors.items():
        have = getattr(modules.get(module), "weight", None)
        wanted = (factors.b.shape[0], factors.a.shape[1])
        if have is None or tuple(have.shape) != (wanted[::-1] if factors.transposed else wanted):
            found = "no such module" if have is None else f"a weight of shape {tuple(have.shape)} there"
            raise PatchBaseError(f"The adapter changes {module}, of {wanted[0]} outputs and {wanted[1]} inputs; the model has {found}.")
    with wrapped(
        model, peft.LoraConfig(**settings({module: Shape.of(factors) for module, factors in adapter.factors.items()})), name
    ) as outer:
        modules = dict(model.named_modules())
        for module, factors in adapter.factors.items():
            layer: Any = modules[module]
            for side, value in (("lora_A", factors.a), ("lora_B", factors.b)):
                linear = getattr(layer, side)[name]
                linear.weight = torch.nn.Parameter(value.to(linear.weight.device), requires_grad=False)
            layer.scaling[name] = factors.scale
        yield outer.eval()
