"""A checkpoint larger than memory: one block at a time from its shards, each quantised block committed as it is done. Floor 5.

The result is a folder of its own kind: configuration and tokenizer as they were, `rest.safetensors` with everything outside the blocks,
and one file per block that holds its quantised layers together with their transforms, so that neither can be had without the other.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from trocar.anatomy import Anatomy, Tower, tensor_fingerprint
from trocar.anatomy.experts import check_experts
from trocar.compress.duquant import streams
from trocar.compress.duquant.blocks import BlockResult, quantise_block
from trocar.compress.duquant.config import DuQuantConfig
from trocar.compress.duquant.experts import check_settings, told
from trocar.compress.duquant.groups import check_keep, groups, put
from trocar.compress.duquant.streams import Batch
from trocar.core.errors import DataError, ExportError, RunError
from trocar.core.files import atomic_path, read_json, write_json
from trocar.core.progress import track
from trocar.core.workspace import Workspace
from trocar.patch.checkpoint import copy_others, entries, read_tensor, saved_names, shards, skeleton, spellings
from trocar.patch.ops.experts import ExpertsRecord, QuantiseExperts
from trocar.patch.ops.quantise import Quantise, QuantiseRecord, one_per_input
from trocar.patch.quantised import QuantisedExperts, RoundedHeads
from trocar.patch.record import dtype_code
from trocar.patch.stacked import expert_keys, read_stack, spelt

ABOUT, REST, GENERATION = "quantised.json", "rest.safetensors", "generation_config.json"
FORMAT, VERSION = "trocar-quantised", 1
RECORDS = {"quantise": QuantiseRecord, "quantise-experts": ExpertsRecord}


class Shelf:
    """The tensors of a checkpoint by the names that a model has for them, read when they are wanted."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.found = {key: (file, entry) for file in shards(folder) for key, entry in entries(file).items()}
        saved = saved_names(model)
        self.keys: dict[str, str] = {}
        for name, _ in model.named_parameters(remove_duplicate=False):
            said = [spelt for one in (name, saved.get(name, name)) for spelt in spellings(model, one)]
            key = next((one for one in said if one in self.found), None)
            if key is not None:
                self.keys[name] = key
        stacks = {name: spelt(model, keys, self.found) for name, keys in expert_keys(model).items() if name not in self.keys}
        self.stacks = {name: keys for name, keys in stacks.items() if keys is not None}  # weights of experts, kept one by one

    def tensor(self, name: str) -> torch.Tensor:
        if name in self.stacks:
            return read_stack(self.stacks[name], self.found)
        if name not in self.keys:
            raise DataError(f"The checkpoint has no tensor for {name}.", "Load the model and quantise it in memory.")
        return read_tensor(*self.found[self.keys[name]])


def empty_model(folder: Path) -> Any:
    """The checkpoint's model with parameters on the meta device, but with real buffers (rotary tables)."""
    return empty_like(skeleton(folder))


def empty_like(bare: Any) -> Any:
    """A model of the same class and configuration as `bare`, as `empty_model` makes it."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = type(bare)(bare.config)
    model.tie_weights()
    return model.eval()


def fill(model: nn.Module, prefix: str, shelf: Shelf, dtype: torch.dtype | None, device: Any) -> None:
    """Give the parameters under `prefix` their values."""
    for name, parameter in list(model.get_submodule(prefix).named_parameters(prefix=prefix)):
        if parameter.device.type == "meta":
            _set(model, name, shelf.tensor(name).to(device, dtype))


def drop(model: nn.Module, prefix: str) -> None:
    """Take the values of the parameters under `prefix` out of memory again."""
    for name, parameter in list(model.get_submodule(prefix).named_parameters(prefix=prefix)):
        _set(model, name, torch.empty_like(parameter, device="meta"))


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def quantise_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    inputs: Mapping[str, torch.Tensor],
    config: DuQuantConfig | None = None,
    seed: int = 0,
    *,
    dtype: torch.dtype | None = None,
    device: Any = "cpu",
    tell: Callable[[int, Mapping[str, float]], None] | None = None,
) -> dict[str, float]:
    """Quantise the checkpoint in folder `source` into the folder `target`, in the memory of one block and the hidden states.

    inputs: calibration windows, as for `quantise`. dtype: to compute in; the checkpoint's by default. Every block is committed to
    `target.partial` as it is done; a call that was killed goes on there when it is made again with the same arguments, and gives the same
    bytes. `target` appears when it is complete. tell: called with a block's number and its errors. Returns the errors of all layers.

    Raises what `quantise` raises, ExportError if `target` exists, DataError for a checkpoint that cannot be read.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise ExportError(f"{target} exists.", "Choose another folder, or remove it first.")
    config = config or DuQuantConfig()
    model = empty_model(source)
    shelf = Shelf(source, model)
    anatomy = Anatomy.of(model, experts=True)
    tower = anatomy.tower()
    check_settings(tower, config)
    check_keep(list(config.keep), [group for layer in range(tower.n_layers) for group in groups(tower, layer)])
    inside = f"{tower.blocks_path}."
    for name, _ in list(model.named_parameters()):
        if not name.startswith(inside) and name in shelf.keys:
            _set(model, name, shelf.tensor(name).to(device, dtype))
    model.tie_weights()
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    work = Workspace(Path(f"{target}.partial"), identity(source, inputs, config, seed, dtype))
    driver = _Driver(anatomy, shelf, work, inputs, config, seed, dtype, device)
    errors: dict[str, float] = {}
    sent: dict[str, list[int]] = {}
    with torch.no_grad():
        for layer in track(range(tower.n_layers), "quantise", tower.n_layers):
            tensors = work.tensors(_name(layer), {}, lambda layer=layer: driver.block(layer))
            about = json.loads(bytes(tensors["about"].tolist()))
            found = about["errors"]
            sent |= about["tokens"]
            driver.sweep(layer)
            errors |= {f"L{layer}" if path == "block" else path: error for path, error in found.items()}
            if tell is not None:
                tell(layer, found)
    _finish(source, work.folder, target, model, tower, config, seed)
    if note := told(sent):
        warnings.warn(note, stacklevel=2)
    return errors


def identity(
    source: Path, inputs: Mapping[str, torch.Tensor], config: DuQuantConfig, seed: int, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Everything that a block depends on: the common part of every unit's key."""
    return {
        "config": config.model_dump(mode="json"),
        "seed": seed,
        "source": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in shards(source)],
        "inputs": {name: tensor_fingerprint(value) for name, value in sorted(inputs.items())},
        "dtype": str(dtype),
    }


class _Driver:
    """Carries the hidden states from block to block, in memory while it runs and on disk for the next run."""

    def __init__(
        self,
        anatomy: Anatomy,
        shelf: Shelf,
        work: Workspace,
        inputs: Mapping[str, torch.Tensor],
        config: DuQuantConfig,
        seed: int,
        dtype: torch.dtype | None,
        device: Any,
    ) -> None:
        self.model, self.shelf, self.work, self.config, self.seed = anatomy.model, shelf, work, config, seed
        self.dtype, self.device = dtype, device
        tower = anatomy.tower()
        self.path = tower.blocks_path
        inputs = {name: value.to(device) for name, value in inputs.items()}
        self.reference, self.current = streams.both(anatomy, tower, inputs, config)
        if config.attention is not None:
            heads = RoundedHeads(tower, config.attention, on=False)
            heads.install()
            self.current = [replace(batch, heads=heads) for batch in self.current]
        self.at = 0

    def block(self, layer: int) -> dict[str, torch.Tensor]:
        """Quantise block `layer` and leave the states at the next one on disk before the block itself is committed."""
        if self.at != layer:
            self._load(layer)
        fill(self.model, f"{self.path}.{layer}", self.shelf, self.dtype, self.device)
        anatomy = Anatomy.of(self.model, experts=True)  # its names and views belong to the parameters that are there now
        result, self.reference, self.current = quantise_block(
            anatomy, anatomy.tower(), layer, self.reference, self.current, self.config, self.seed
        )
        self.at = layer + 1
        tensors = _tensors(self.model, f"{self.path}.{layer}", result)
        for path, module in reversed(result.taken):
            put(self.model, path, module)
        drop(self.model, f"{self.path}.{layer}")
        states = {f"reference{i}": batch.hidden for i, batch in enumerate(self.reference)}
        states |= {f"current{i}": batch.hidden for i, batch in enumerate(self.current)}
        self.work.tensors(_states(layer + 1), {}, lambda: states)
        return tensors

    def sweep(self, layer: int) -> None:
        """Remove states that no later run needs, once block `layer` is committed."""
        (self.work.folder / f"{_states(layer)}.safetensors").unlink(missing_ok=True)

    def _load(self, layer: int) -> None:
        def lost() -> dict[str, torch.Tensor]:
            raise RunError(
                f"{self.work.folder} has blocks up to {layer - 1} but not the states to go on from.", "Remove the folder and start again."
            )

        states = self.work.tensors(_states(layer), {}, lost)

        def entering(batches: list[Batch], name: str) -> list[Batch]:
            return [batch.entering(states[f"{name}{i}"].to(self.device)) for i, batch in enumerate(batches)]

        self.reference, self.current, self.at = entering(self.reference, "reference"), entering(self.current, "current"), layer


def _name(layer: int) -> str:
    return f"block-{layer:05}"


def _states(layer: int) -> str:
    return f"states-{layer:05}"


def _tensors(model: nn.Module, prefix: str, result: BlockResult) -> dict[str, torch.Tensor]:
    """A quantised block as tensors: its operations, its other parameters under their own names, and what they mean (JSON, as bytes)."""
    ops: list[Any] = [*one_per_input(result.layers), *(QuantiseExperts(path, experts) for path, experts in result.experts.items())]
    tensors = {f"op{number}.{name}": part for number, op in enumerate(ops) for name, part in op.tensors().items()}
    for name, parameter in model.get_submodule(prefix).named_parameters(prefix=prefix):
        tensors[name] = parameter.detach()
    about = {"ops": [op.record().model_dump(mode="json") for op in ops], "errors": result.errors, "tokens": result.tokens}
    tensors["about"] = torch.tensor(list(json.dumps(about, sort_keys=True).encode()), dtype=torch.uint8)
    return tensors


def _finish(source: Path, folder: Path, target: Path, model: nn.Module, tower: Tower, config: DuQuantConfig, seed: int) -> None:
    from safetensors.torch import save_file

    inside = f"{tower.blocks_path}."
    rest = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if not name.startswith(inside) and parameter.device.type != "meta"
    }
    with atomic_path(folder / REST) as temporary:
        save_file(rest, temporary)
    copy_others(source, folder)
    about = {"format": FORMAT, "version": VERSION, "settings": config.model_dump(mode="json"), "seed": seed, "blocks": tower.n_layers}
    write_json(folder / ABOUT, about | {"blocks_path": tower.blocks_path})
    for left in (*folder.glob("states-*.safetensors"), *folder.glob(".*.tmp")):  # the latter of runs killed as they wrote
        left.unlink()
    os.replace(folder, target)


def load_quantised(folder: str | os.PathLike[str], device: Any = "cpu") -> Any:
    """The model in a folder made by `quantise_checkpoint`. Nothing in it is executed. Raises DataError for a folder of another kind, a
    missing or damaged file."""
    folder = Path(folder)
    try:
        about = read_json(folder / ABOUT)
        good = about["format"] == FORMAT and about["version"] == VERSION
        blocks, path, attention = int(about["blocks"]), str(about["blocks_path"]), about["settings"]["attention"]
        good = good and (attention is None or attention in range(2, 16))
    except (OSError, ValueError, KeyError, TypeError):
        good, blocks, path, attention = False, 0, "", None
    if not good:
        raise DataError(f"{folder} is not a quantised checkpoint of version {VERSION}.", "Make one with quantise_checkpoint.")
    model = empty_model(folder)
    tower = Anatomy.of(model, experts=True).tower()
    for name, value in _read(folder / REST).items():
        _set(model, name, value)
    model.tie_weights()
    for layer in range(blocks):
        file = folder / f"{_name(layer)}.safetensors"
        tensors = _read(file)
        try:
            listed = json.loads(bytes(tensors.pop("about").tolist()))["ops"]
            records = [RECORDS[one["kind"]].model_validate_json(json.dumps(one)) for one in listed]
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{file} does not say what it holds ({str(error).splitlines()[0][:100]}).", "Make it again.") from None
        for number, record in enumerate(records):
            parts = {}
            for name, spec in record.specs().items():
                part = tensors.pop(f"op{number}.{name}", None)
                if part is None or tuple(part.shape) != spec.shape or dtype_code(part.dtype) != spec.dtype:
                    raise DataError(f"{file}: op{number}.{name} is missing or not {spec.dtype} {list(spec.shape)}.", "Make it again.")
                parts[name] = part
            for name, quantised in _modules(record, parts):
                if not name.startswith(f"{path}.{layer}."):
                    raise DataError(f"{file} holds the layer {name}, which is not of block {layer}.", "Make it again.")
                if isinstance(quantised, QuantisedExperts):
                    quantised.act_fn = check_experts(model.get_submodule(name), name)[2]
                put(model, name, quantised.eval())
        for name, value in tensors.items():
            _set(model, name, value)
    left = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if left:
        raise DataError(f"{folder} has no values for {left[0]} ({len(left)} parameters).", "Make it again.")
    if attention is not None:
        RoundedHeads(tower, attention).install()
    if (folder / GENERATION).is_file() and getattr(model, "generation_config", None) is not None:
        model.generation_config = type(model.generation_config).from_pretrained(str(folder))  # where texts end, among others
    return model.to(device).eval()


def _modules(record: Any, parts: dict[str, torch.Tensor]) -> list[tuple[str, nn.Module]]:
    """What an operation puts into the model, by path."""
    if isinstance(record, ExpertsRecord):
        return [(record.name, QuantiseExperts.build(record, parts).experts)]
    op = Quantise.build(record, parts)
    return list(zip(op.names, op.layers, strict=True))


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # safetensors raises its own class, the system OSError
        raise DataError(f"{file} cannot be read ({str(error).splitlines()[0][:100]}).", "Make it again.") from None
