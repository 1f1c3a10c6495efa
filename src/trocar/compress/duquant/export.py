"""A quantised model as a checkpoint in the compressed-tensors form, which transformers and vLLM read. Floor 5.

That form knows scales, codes and, in its transform configuration, one rotation of blocks in front of a layer. It knows no permutation and
no second rotation. A permutation of what enters a down map is folded into the rows of the layers before it; all else is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trocar.anatomy import Anatomy, Tower
from trocar.compress.duquant.checkpoint import empty_like
from trocar.compress.duquant.groups import Group, groups
from trocar.core.errors import ExportError
from trocar.core.files import read_json, write_json
from trocar.patch.checkpoint import copy_others, new_folder, saved_names
from trocar.patch.quantised import QuantisedExperts, QuantisedLinear, Quantiser

MAKE = "Quantise with preset('folded', ...) or, with transforms=True, preset('export', ...)."


@dataclass
class Plan:
    """rows: path -> order in which a layer's rows are written; rotations: path -> the rotation in front of it."""

    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    rotations: dict[str, torch.Tensor] = field(default_factory=dict)


def export_compressed(
    model: Any, target: str | os.PathLike[str], *, transforms: bool = False, tokenizer_from: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Write a quantised model (as `quantise` left it, or from `load_quantised`) into the folder `target`; returns its settings there.

    transforms: allow one rotation in front of a layer, in the transform configuration, which vLLM applies. Transformers up to 5.24 reads
    such a folder without a word and leaves the rotation out, so that what it computes is wrong: load it with vLLM, or with
    compressed-tensors' `apply_transform_config`. Without `transforms` the folder needs nothing online and loads everywhere. Activations
    are rounded by the reader, on its own grid (from -2^(bits-1); here it is symmetric around zero), which differs by a part in 2^bits.

    Raises ExportError for what the form cannot say: two rotations, permutations that fold into nothing, divisions as the model runs,
    activations with a zero point, rounded queries, keys and values, layers that are not nn.Linear.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    if not layers:
        raise ExportError("The model has no quantised layers.", "Quantise it first, or use save_pretrained.")
    experts = [path for path, module in model.named_modules() if isinstance(module, QuantisedExperts)]
    if experts:
        raise ExportError(f"{experts[0]} holds experts, which this writer has no form for.", "Use a patch file.")
    if any("_rounded_heads" in module.__dict__ for module in model.modules()):
        raise ExportError("Queries, keys and values are rounded as the model runs, which this form cannot say.", "Set attention to null.")
    bare = empty_like(model)
    _check(layers, bare)
    plan = Plan()
    for tower in Anatomy.of(bare).towers.values():
        for layer in range(tower.n_layers):
            for group in groups(tower, layer):
                _plan(plan, tower, group, layers, transforms)
    settings = _settings(layers, bare, plan)
    tensors = _tensors(model, layers, plan)
    renamed = saved_names(bare)
    with new_folder(target) as folder:
        if tokenizer_from is not None:
            copy_others(Path(tokenizer_from), folder)
        model.config.save_pretrained(folder)
        write_json(folder / "config.json", read_json(folder / "config.json") | {"quantization_config": settings})
        from safetensors.torch import save_file

        save_file({renamed.get(name, name): part for name, part in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return settings


def _check(layers: Mapping[str, QuantisedLinear], bare: nn.Module) -> None:
    for path, layer in layers.items():
        if _plain(layer):
            continue
        if not isinstance(bare.get_submodule(path), nn.Linear):
            raise ExportError(f"{path} is a {type(bare.get_submodule(path)).__name__}; the form knows nn.Linear only.", "Use a patch file.")
        activations = layer.shared.quantiser
        if layer.quantiser.is_float or layer.quantiser.bits > 8:
            raise ExportError(f"{path} has weights of {layer.quantiser.bits} bits.", "Use 2 to 8.")
        if not layer.quantiser.symmetric:  # compressed-tensors 0.20 packs them, but lays the model that it loads them into out unpacked
            raise ExportError(f"The weights of {path} have zero points, which transformers does not load.", MAKE)
        if not activations.is_float and (not activations.symmetric or activations.clip != 1):
            raise ExportError(f"The activations in front of {path} have a zero point or a clip, which engines do not read.", MAKE)


def _plain(layer: QuantisedLinear) -> bool:
    """Left alone by the settings."""
    return layer.quantiser.is_float and layer.shared.quantiser.is_float and not layer.shared.kinds


def _plan(plan: Plan, tower: Tower, group: Group, layers: Mapping[str, QuantisedLinear], transforms: bool) -> None:
    paths = [path for role in group.roles if (path := tower.path(group.layer, role)) in layers]
    if not paths:
        return
    transform = layers[paths[0]].shared.transform
    steps = list(transform.steps)
    if transform.scale is not None:
        raise ExportError(f"{paths[0]} divides its input as the model runs.", "Set smoothing.online to false.")
    if group.name == "mlp_hidden" and steps and not steps[0].is_floating_point():
        order = steps.pop(0)
        for role in ("up", "gate", "gate_up"):
            if tower.has(group.layer, role):
                both = role == "gate_up"
                plan.rows[tower.path(group.layer, role)] = torch.cat([order, order + len(order)]) if both else order
    if any(not step.is_floating_point() for step in steps):
        raise ExportError(f"A permutation in front of {paths[0]} folds into nothing.", MAKE)
    if len(steps) > 1 or any(step.ndim > 2 for step in steps):
        raise ExportError(f"{paths[0]} has more than one rotation of blocks in front of it.", MAKE)
    if steps and not transforms:
        raise ExportError(f"{paths[0]} has a rotation in front of it.", f"{MAKE} Read first what transforms=True needs.")
    plan.rotations |= {path: step for path in paths for step in steps}


def _settings(layers: Mapping[str, QuantisedLinear], bare: nn.Module, plan: Plan) -> dict[str, Any]:
    kinds: dict[tuple[Quantiser, Quantiser], list[str]] = {}
    for path, layer in layers.items():
        if _plain(layer):
            continue
        kinds.setdefault((layer.quantiser, layer.shared.quantiser.model_copy(update={"clip": 1.0})), []).append(path)
    merged: dict[str, dict[str, Any]] = {}
    for (weights, activations), paths in kinds.items():
        scheme = {
            "targets": [],
            "weights": _arguments(weights) | {"dynamic": False},
            "input_activations": None if activations.is_float else _arguments(activations) | {"strategy": "token", "dynamic": True},
            "output_activations": None,
            "format": "int-quantized" if weights.bits == 8 else "pack-quantized",
        }
        known = next((one for one in merged.values() if {**one, "targets": []} == scheme), None)
        if known is None:
            known = merged.setdefault(f"group_{len(merged)}", scheme)
        known["targets"] = [*known["targets"], *paths]
    formats = {scheme["format"] for scheme in merged.values()}
    found = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": merged,
        "ignore": [
            path for path, module in bare.named_modules() if isinstance(module, nn.Linear) and (path not in layers or _plain(layers[path]))
        ],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    schemes = {
        f"rotation_{number}": {
            "type": "random-hadamard",  # the type under which readers take the matrix from the file and divide by the root of its size
            "apply": [{"targets": paths, "location": "input", "inverse": False, "ignore": []}],
            "randomize": False,
            "requires_grad": False,
            "head_dim": size,
            "precision": "torch.float32",
        }
        for number, (size, paths) in enumerate(_shared(layers, plan))
    }
    return found | ({"transform_config": {"config_groups": schemes}} if schemes else {})


def _shared(layers: Mapping[str, QuantisedLinear], plan: Plan) -> list[tuple[int, list[str]]]:
    """(size, paths) of every rotation; layers that read one input have one."""
    found: dict[int, tuple[int, list[str]]] = {}
    for path, rotation in plan.rotations.items():
        found.setdefault(id(layers[path].shared), (rotation.shape[-1], []))[1].append(path)
    return list(found.values())


def _arguments(quantiser: Quantiser) -> dict[str, Any]:
    return {
        "num_bits": quantiser.bits,
        "type": "int",
        "symmetric": quantiser.symmetric,
        "strategy": "channel" if quantiser.group is None else "group",
        "group_size": quantiser.group,
    }


def _tensors(model: nn.Module, layers: Mapping[str, QuantisedLinear], plan: Plan) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    inside = tuple(f"{path}." for path in layers)
    for name, parameter in model.named_parameters():  # of tied ones the first
        if not name.startswith(inside):
            order = plan.rows.get(name.rpartition(".")[0])
            found[name] = (parameter if order is None else parameter[order.to(parameter.device)]).detach().cpu().contiguous()
    for number, (size, paths) in enumerate(_shared(layers, plan)):
        for path in paths:
            found[f"{path}.rotation_{number}_input.weight"] = plan.rotations[path].cpu().float() * size**0.5
    for path, layer in layers.items():
        found |= {f"{path}.{name}": part for name, part in _written(layer, plan.rows.get(path)).items()}
    return found


def _written(layer: QuantisedLinear, order: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """One layer's tensors: values shifted to the signed range, packed below 8 bits."""
    rows = slice(None) if order is None else order.cpu()
    bias = {} if layer.bias is None else {"bias": layer.bias.cpu()[rows].contiguous()}
    if _plain(layer):
        return {"weight": layer.get_buffer("values").cpu()[rows].contiguous(), **bias}
    bits = layer.quantiser.bits
    signed = (layer.code().cpu()[rows].to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)  # a symmetric grid has its zero there
    found = {"weight_scale": layer.get_buffer("step").cpu()[rows].contiguous()}
    if bits == 8:
        found["weight"] = signed.contiguous()
    else:
        found |= {"weight_packed": words(signed, bits), "weight_shape": torch.tensor(signed.shape)}
    return found | bias


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed values (rows, C) -> int32 (rows, ceil(C bits / 32)): offset to be unsigned, then bit after bit, lowest first, words across."""
    unsigned = values.to(torch.int64) + 2 ** (bits - 1)
    stream = (unsigned[..., None] >> torch.arange(bits)) & 1
    stream = nn.functional.pad(stream.flatten(1), (0, -values.shape[1] * bits % 32))
    whole = (stream.unflatten(1, (-1, 32)) << torch.arange(32)).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)
