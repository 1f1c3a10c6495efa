"""A model in numbers, for `trocar inspect`. Floor 1."""

from __future__ import annotations

from typing import Any

from torch import nn

from trocar.anatomy.fingerprints import fingerprint, structure_fingerprint
from trocar.anatomy.resolve import Anatomy, Tower
from trocar.core.errors import UnsupportedModelError


def describe(model: nn.Module | Anatomy, values: bool = True) -> dict[str, Any]:
    """Family, towers (blocks, heads, sizes, neurons, paths), parameters, bytes, dtypes, fingerprints and remarks, ready for JSON.

    values: also hash the values (about a second per gigabyte and core); None as fingerprint otherwise and on the meta device.
    """
    anatomy = Anatomy.of(model)
    parameters = list(anatomy.model.parameters())  # tied ones once
    try:
        hashed = fingerprint(anatomy.model) if values else None
    except UnsupportedModelError:
        hashed = None
    return {
        "class": type(anatomy.model).__name__,
        "model_type": anatomy.model.config.model_type,  # type: ignore[union-attr]
        "family": anatomy.family.name,
        "towers": [_tower(tower) for tower in anatomy.towers.values()],
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in parameters}),
        "devices": sorted({str(p.device) for p in parameters}),
        "fingerprint": hashed,
        "structure": structure_fingerprint(anatomy.model),
        "remarks": [remark for tower in anatomy.towers.values() for remark in _remarks(anatomy, tower)],
    }


def _tower(tower: Tower) -> dict[str, Any]:
    layers = range(tower.n_layers)

    def one(values: list[int]) -> int | list[int]:
        return values[0] if len(set(values)) == 1 else values

    return {
        "name": tower.name,
        "modality": tower.modality,
        "blocks": tower.n_layers,
        "width": tower.width,
        "heads": one([tower.heads(layer) for layer in layers]),
        "kv_heads": one([tower.kv_heads(layer) for layer in layers]),
        "head_size": one([tower.head_size(layer) for layer in layers]),
        "neurons": one([tower.neurons(layer) for layer in layers]),
        "linears": list(tower.linears(0)) if tower.n_layers else [],
        "causal": tower.causal,
        "residual": tower.residual,
        "parameters": sum(p.numel() for p in tower.root.parameters()),  # type: ignore[union-attr]
        "block_path": tower.blocks_path,
        "embedding": tower.embedding_path,
        "final_norm": tower.final_norm_path,
        "head": tower.head_path,
    }


def _remarks(anatomy: Anatomy, tower: Tower) -> list[str]:
    if not tower.n_layers:
        return []
    prefix, found = f"{tower.name}: " if tower.name else "", []
    if tower.group(0) > 1:
        found.append(f"grouped queries: {tower.group(0)} query heads share one key/value head")
    if tower.heads(0) * tower.head_size(0) != tower.width:
        found.append(f"heads x head size ({tower.heads(0) * tower.head_size(0)}) differs from the width ({tower.width})")
    found += [f"{role} is fused in {tower.path(0, role)}" for role in ("qkv", "gate_up") if tower.has(0, role)]
    if any(tower._transposed.values()):
        found.append("weights are stored (in, out)")
    if tower.residual != "pre":
        found.append({"post": "norms follow the residual additions", "parallel": "attention and MLP read the same input"}[tower.residual])
    if tower.has(0, "attn_post_norm"):
        found.append("attention and MLP outputs pass a norm before they are added")
    if tower.has(0, "attn_scale"):
        found.append("attention and MLP outputs are scaled per channel before they are added")
    if tower.has(0, "q_norm"):
        found.append("queries and keys are normalised per head")
    weight = getattr(tower.head, "weight", None)
    if weight is not None and weight is getattr(tower.embedding, "weight", None):
        found.append("the head is tied to the embedding")
    if any(hasattr(module, "base_layer") for module in anatomy.model.modules()):
        found.append("PEFT adapters are attached; linear maps are those of the base")
    return [prefix + text for text in found]
