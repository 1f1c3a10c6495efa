"""LoRA adapters as `peft` keeps them: read from a model or a folder, written to a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trocar.core.errors import ExportError, PatchBaseError, PatchFormatError
from trocar.core.files import read_json, write_json
from trocar.patch.actions import Target
from trocar.patch.checkpoint import Source, entries, new_folder, read_tensor, write_file
from trocar.patch.ops.adapter import Adapter, Factors
from trocar.patch.ops.low_rank import LowRank
from trocar.patch.patch import Patch, raw_bytes
from trocar.patch.record import dtype_code
from trocar.trace.adapters import RESIDUAL

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_PLAIN = "Only plain LoRA on linear maps can be a patch: no DoRA, no biases, no modules_to_save, no embeddings."


def from_model(model: Any, adapter: str = "default", initial: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None) -> Adapter:
    """The factors of one LoRA adapter of a `PeftModel`. Raises PatchFormatError for anything but plain LoRA on linear maps.

    initial: the fresh factors of an initialisation that took them out of the base's weights (PiSSA, OLoRA; `trace.adapters.
    initial_factors`); they are subtracted, which doubles the rank, so that the result belongs to the original weights.
    """
    config = getattr(model, "peft_config", {}).get(adapter)
    if config is None:
        known = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise PatchFormatError(f"The model has no adapter '{adapter}'.", f"It has: {known}.")
    settings = config.to_dict()
    _refuse(settings, f"The adapter '{adapter}'")
    if initial is None and (start := _residual(settings)):
        raise PatchFormatError(
            f"The adapter '{adapter}' began as {start}, whose first value was taken out of the base's weights.",
            "Give its fresh factors: Adapter.of(model, initial=trocar.trace.adapters.initial_factors(model)), taken before training.",
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    factors = {}
    for name, module in base.named_modules():
        if adapter in getattr(module, "lora_embedding_A", {}) or adapter in getattr(module, "lora_magnitude_vector", {}):
            raise PatchFormatError(f"The adapter '{adapter}' changes {name} in a way other than B @ A.", _PLAIN)
        if adapter not in getattr(module, "lora_A", {}):
            continue
        a, b = module.lora_A[adapter], module.lora_B[adapter]
        if a.weight.dim() != 2 or b.bias is not None:
            raise PatchFormatError(f"The adapter '{adapter}' changes {name} in a way other than B @ A.", _PLAIN)
        left, right = a.weight, b.weight
        if initial and name in initial:
            a0, b0 = (part.to(left.device, left.dtype) for part in initial[name])
            left, right = torch.cat([left, a0]), torch.cat([right, -b0], dim=1)
        factors[name] = Factors(left, right, float(module.scaling[adapter]), bool(module.fan_in_fan_out))
    if not factors:
        raise PatchFormatError(f"The adapter '{adapter}' has no LoRA factors.", _PLAIN)
    task = getattr(config.task_type, "value", config.task_type)
    return Adapter(factors, task, float(config.lora_dropout or 0.0))


def from_folder(folder: str | os.PathLike[str]) -> Adapter:
    """Read a PEFT folder. Only its JSON and its tensors are read. Raises PatchFormatError."""
    folder = Path(folder)
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise PatchFormatError(f"{folder / CONFIG} cannot be read: {error}.", "Give a folder written by save_pretrained.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise PatchFormatError(f"{folder} does not hold a LoRA adapter.", _PLAIN)
    _refuse(config, str(folder))
    if start := _residual(config):
        raise PatchFormatError(
            f"{folder} began as {start}, whose first value was taken out of the base's weights: it belongs to no pretrained model.",
            "Convert it when saving, peft_model.save_pretrained(folder, path_initial_model_for_weight_conversion=...).",
        )
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, entry in entries(folder / WEIGHTS).items():
        found = _KEY.fullmatch(key)
        if found is None or len(entry.shape) != 2:
            raise PatchFormatError(f"{folder / WEIGHTS} holds '{key[:100]}', which is not a factor of a linear map.", _PLAIN)
        pairs.setdefault(found["module"], {})[found["side"]] = read_tensor(folder / WEIGHTS, entry)
    factors = {}
    for name, sides in sorted(pairs.items()):
        if set(sides) != {"A", "B"}:
            raise PatchFormatError(f"{folder / WEIGHTS} holds only one of the two factors of {name}.", "Fetch it again.")
        rank = sides["A"].shape[0]
        alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"), folder)
        scale = float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
        factors[name] = Factors(sides["A"], sides["B"], scale, bool(config.get("fan_in_fan_out")))
    if not factors:
        raise PatchFormatError(f"{folder / WEIGHTS} holds no factors.", "Fetch it again.")
    task, dropout = config.get("task_type"), config.get("lora_dropout") or 0.0
    return Adapter(factors, task if isinstance(task, str) else None, float(dropout))


def _pattern(patterns: Any, name: str, default: Any, folder: Path) -> float:
    """PEFT's alpha_pattern for a module. Names only: a regular expression from a file is not run."""
    for key, value in (patterns or {}).items():
        plain = key.removeprefix("^").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise PatchFormatError(f"{folder / CONFIG} has the pattern '{key[:60]}'.", "Only names of modules are read as patterns.")
        if name == plain or (not key.startswith("^") and name.endswith(f".{plain}")):
            default = value
            break
    if isinstance(default, bool) or not isinstance(default, int | float):
        raise PatchFormatError(f"{folder / CONFIG} has no number as lora_alpha for {name}.", "Fetch it again.")
    return float(default)


def _residual(config: Mapping[str, Any]) -> str:
    """The name of an initialisation that changes the base, or nothing."""
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower().startswith(RESIDUAL) else ""


def _refuse(config: dict[str, Any], what: str) -> None:
    bad = [key for key in ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters") if config.get(key)]
    if config.get("bias", "none") != "none":
        bad.append("bias")
    if bad:
        raise PatchFormatError(f"{what} uses {', '.join(bad)}.", _PLAIN)


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


def peft_settings(adapter: Adapter, base: str | None = None) -> dict[str, Any]:
    """What PEFT's `adapter_config.json` says of an adapter; module names are exact. Raises ExportError if one config cannot say it."""
    ranks = {name: int(a.shape[0]) for name, (a, *_) in adapter.factors.items()}
    alphas = {name: scale * ranks[name] for name, (_, _, scale, _) in adapter.factors.items()}
    common_rank = max(set(ranks.values()), key=list(ranks.values()).count)
    common_alpha = max(set(alphas.values()), key=list(alphas.values()).count)
    transposed = {factors.transposed for factors in adapter.factors.values()}
    if len(transposed) > 1:
        raise ExportError("The adapter changes both Linear and Conv1D modules, which one PEFT config cannot say.", "Export a checkpoint.")
    return {
        "peft_type": "LORA",
        "task_type": adapter.task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": common_rank,
        "lora_alpha": _number(common_alpha),
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(adapter.factors),
        "rank_pattern": {f"^{name}": rank for name, rank in ranks.items() if rank != common_rank},
        "alpha_pattern": {f"^{name}": _number(alpha) for name, alpha in alphas.items() if alpha != common_alpha},
        "fan_in_fan_out": transposed.pop(),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


@contextmanager
def wrapped(model: torch.nn.Module, config: Any, name: str = "default") -> Iterator[Any]:
    """`model` inside a new `peft.PeftModel` of this `LoraConfig`; on leaving, its own modules again, training flags and notes as before.

    Weights that an initialisation wrote into the base (PiSSA, OLoRA) are put back.
    """
    import peft

    flags = [(module, module.training) for module in model.modules()]
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    marked = model.__dict__.get("_hf_peft_config_loaded")  # transformers' note, which unload leaves: saving would look for adapters
    changes = _residual(config.to_dict())
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
    with wrapped(model, peft.LoraConfig(**peft_settings(adapter)), name) as outer:
        modules = dict(model.named_modules())
        for module, factors in adapter.factors.items():
            layer: Any = modules[module]
            for side, value in (("lora_A", factors.a), ("lora_B", factors.b)):
                linear = getattr(layer, side)[name]
                linear.weight = torch.nn.Parameter(value.to(linear.weight.device), requires_grad=False)
            layer.scaling[name] = factors.scale
        yield outer.eval()


def write_folder(adapter: Adapter, target: str | os.PathLike[str], base: str | None) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads."""
    config = peft_settings(adapter, base)
    sources = []
    for name, (a, b, *_) in adapter.factors.items():
        for side, tensor in (("A", a), ("B", b)):
            raw = raw_bytes(tensor)
            key, code = f"base_model.model.{name}.lora_{side}.weight", dtype_code(tensor.dtype)
            sources.append(Source(key, str(code), tuple(tensor.shape), len(raw), lambda handle, raw=raw: handle.write(raw)))
    with new_folder(target) as folder:
        write_json(folder / CONFIG, config)
        write_file(folder / WEIGHTS, sources, {"format": "pt"})


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
