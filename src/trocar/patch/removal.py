"""Carry a removal out on a model: smaller parameters, shorter block lists, renumbered layers, changed settings - and all of it back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trocar.anatomy import Tower, tensor_fingerprint
from trocar.core.errors import UnsupportedModelError
from trocar.patch.actions import Target
from trocar.patch.ops.remove import Surgery
from trocar.patch.record import Effect

# Attributes in which attention modules of transformers keep their sizes -> what they hold.
ATTENTION_SIZES = {
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "n_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_key_value_groups": "group",
    "all_head_size": "size",
    "split_size": "size",
}
NEURON_SETTINGS = ("intermediate_size", "n_inner", "ffn_dim")  # where configs keep the number of neurons
LAYER_LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")  # settings with one entry per block


@dataclass
class Removal:
    """One reversible removal. `undo` puts back the same objects, so that hooks, optimisers and references stay valid."""

    target: Target
    surgery: Surgery
    _back: list[tuple[dict[str, Any], str, Any, bool]] = field(default_factory=list, init=False)
    _new: list[tuple[nn.Module, str, nn.Parameter, str]] = field(default_factory=list, init=False)

    def do(self) -> Effect:
        anatomy = self.target.anatomy
        counts = [parameter.numel() for parameter in anatomy.model.parameters()]
        norm = 0.0
        for name, dims in self.surgery.keep.items():
            norm += self._shrink(name, dims)
        for name in {tower for tower, _ in [*self.surgery.heads, *self.surgery.neurons]}:
            self._resize(anatomy.tower(name))
        for tower in anatomy.towers.values():
            if tower.blocks_path in self.surgery.blocks:
                norm += self._drop_blocks(tower, self.surgery.blocks[tower.blocks_path])
        left = sum(parameter.numel() for parameter in anatomy.model.parameters())
        return Effect(changed=sum(counts) - left, norm=norm**0.5 if norm < float("inf") else None)

    def undo(self) -> None:
        while self._back:
            holder, key, value, had = self._back.pop()
            if had:
                holder[key] = value
            else:
                holder.pop(key, None)
        self._new.clear()

    def intact(self) -> bool:
        """Whether the model still holds the parameters that the removal made, unchanged."""
        return all(
            module._parameters.get(key) is parameter and tensor_fingerprint(parameter) == digest
            for module, key, parameter, digest in self._new
        )

    def _set(self, holder: dict[str, Any], key: str, value: Any) -> None:
        self._back.append((holder, key, holder.get(key), key in holder))
        holder[key] = value

    def _shrink(self, name: str, dims: tuple[tuple[int, tuple[int, ...]], ...]) -> float:
        path, _, leaf = name.rpartition(".")
        module = self.target.model.get_submodule(path)
        old: Any = module._parameters[leaf]
        value = kept(old.detach(), dims)
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        gone = _square(old) - _square(value)
        self._set(module._parameters, leaf, new)  # type: ignore[arg-type]
        self._new.append((module, leaf, new, "" if new.device.type == "meta" else tensor_fingerprint(new)))
        if leaf == "weight":
            transposed = not isinstance(module, nn.Linear)
            rows, columns = new.shape[::-1] if transposed else new.shape
            for key, size in (("out_features", rows), ("in_features", columns), ("nf", rows), ("nx", columns)):
                if key in module.__dict__:
                    self._set(module.__dict__, key, size)
        return max(0.0, gone)

    def _resize(self, tower: Tower) -> None:
        """Bring the sizes that modules and the config remember in line with the new shapes."""
        name = next(key for key, value in self.target.anatomy.towers.items() if value is tower)
        stay = self.surgery.blocks.get(tower.blocks_path, range(tower.n_layers))
        heads, kv_heads, neurons = ({layer: count(layer) for layer in stay} for count in (tower.heads, tower.kv_heads, tower.neurons))
        uniform = len(set(heads.values())) == len(set(kv_heads.values())) == 1
        for layer in (layer for layer in stay if (name, layer) in self.surgery.heads):
            self._resize_attention(tower, layer, heads[layer], kv_heads[layer], uniform)
        if uniform and any(key == name for key, _ in self.surgery.heads):
            self._configure(tower.config, "num_attention_heads", heads[stay[0]])
            self._configure(tower.config, "num_key_value_heads", kv_heads[stay[0]])
            if heads[stay[0]] * tower.head_size(stay[0]) != tower.width and "head_dim" in tower.config.__dict__:
                self._configure(tower.config, "head_dim", tower.head_size(stay[0]))
        for layer in (layer for layer in stay if (name, layer) in self.surgery.neurons and tower.has(layer, "mlp")):
            owner = tower.module(layer, "mlp")
            for key in NEURON_SETTINGS:
                if isinstance(owner.__dict__.get(key), int):
                    self._set(owner.__dict__, key, neurons[layer])
        if len(set(neurons.values())) == 1 and any(key == name for key, _ in self.surgery.neurons):
            for key in NEURON_SETTINGS:
                self._configure(tower.config, key, neurons[stay[0]])

    def _resize_attention(self, tower: Tower, layer: int, heads: int, kv_heads: int, uniform: bool) -> None:
        values = {"heads": heads, "kv_heads": kv_heads, "group": heads // kv_heads, "size": heads * tower.head_size(layer)}
        for owner in attention_owners(tower, layer):
            for key, what in ATTENTION_SIZES.items():
                if isinstance(owner.__dict__.get(key), int):
                    self._set(owner.__dict__, key, values[what])
            reads = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
            asked = set(inspect.unwrap(type(owner).forward).__code__.co_names) - set(owner.__dict__)
            if not uniform and "config" in owner.__dict__ and asked & set(reads):
                own = copy.copy(owner.__dict__["config"])  # this forward asks the config, which blocks with other numbers share
                for key, value in reads.items():
                    own.__dict__[_real(own, key)] = value
                self._set(owner.__dict__, "config", own)

    def _configure(self, config: Any, key: str, value: Any) -> None:
        key = _real(config, key)
        if key in config.__dict__:  # straight into the dictionary: a setter may check one setting against another before both are set
            self._set(config.__dict__, key, value)

    def _drop_blocks(self, tower: Tower, kept_blocks: tuple[int, ...]) -> float:
        blocks: Any = self.target.model.get_submodule(tower.blocks_path)
        norm = 0.0
        for layer, block in enumerate(tower.blocks):
            if layer not in kept_blocks:
                norm += sum(_square(parameter) for parameter in block.parameters())
        self._set(blocks.__dict__, "_modules", {str(new): tower.blocks[old] for new, old in enumerate(kept_blocks)})
        for new, old in enumerate(kept_blocks):
            for module in tower.blocks[old].modules():
                if module.__dict__.get("layer_idx") == old:
                    self._set(module.__dict__, "layer_idx", new)
        config = tower.config
        for key in LAYER_LISTS:
            entries = config.__dict__.get(key)
            if isinstance(entries, list | tuple) and len(entries) == tower.n_layers:
                self._set(config.__dict__, key, type(entries)(entries[old] for old in kept_blocks))
        self._configure(config, "num_hidden_layers", len(kept_blocks))
        if "stage_names" in config.__dict__:  # backbones name their blocks
            names = ["stem", *(f"stage{number + 1}" for number in range(len(kept_blocks)))]
            self._set(config.__dict__, "stage_names", names)
            for key, value in (("_out_features", names[-1:]), ("_out_indices", [len(names) - 1])):
                if key in config.__dict__:
                    self._set(config.__dict__, key, value)
        return norm


def kept(tensor: torch.Tensor, dims: tuple[tuple[int, tuple[int, ...]], ...]) -> torch.Tensor:
    """The entries of a tensor that remain."""
    for dim, entries in dims:
        tensor = tensor.index_select(dim, torch.tensor(entries, device=tensor.device))
    return tensor.clone()


def _square(tensor: torch.Tensor) -> float:
    """The squared norm; 0 for a skeleton's tensor."""
    return 0.0 if tensor.device.type == "meta" else float(torch.linalg.vector_norm(tensor.detach().float(), dtype=torch.float64)) ** 2


def attention_owners(tower: Tower, layer: int) -> Iterator[nn.Module]:
    """The modules between a block and its projections, which know the number of heads."""
    seen: set[int] = set()
    for role in ("q", "qkv", "o"):
        if not tower.has(layer, role):
            continue
        parts = tower.path(layer, role).removeprefix(f"{tower.blocks_path}.{layer}.").split(".")
        for depth in range(1, len(parts)):
            module = tower.blocks[layer].get_submodule(".".join(parts[:depth]))
            if id(module) not in seen:
                seen.add(id(module))
                yield module


def _real(config: Any, key: str) -> str:
    """The name under which a config keeps a setting (GPT-2 says n_head for num_attention_heads)."""
    return getattr(config, "attribute_map", {}).get(key, key)


def refuse_inexpressible(model: Any) -> None:
    """Raise UnsupportedModelError if a model made from the config would have other shapes, so that a plain checkpoint would not load."""
    state = torch.random.get_rng_state()
    try:
        with torch.device("meta"):
            made = type(model)(copy.deepcopy(model.config))
    except Exception as error:  # whatever the architecture raises for sizes that do not go together
        raise UnsupportedModelError(f"Its config is not valid any more ({str(error).splitlines()[0][:150]}).") from None
    finally:
        torch.random.set_rng_state(state)
    wanted = {name: tuple(parameter.shape) for name, parameter in made.named_parameters()}
    for name, parameter in model.named_parameters():
        if wanted.get(name) != tuple(parameter.shape):
            raise UnsupportedModelError(
                f"{name} has shape {tuple(parameter.shape)}, by the config it would be {wanted.get(name, 'missing')}."
            )
