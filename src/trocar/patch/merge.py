"""Write a patch into a checkpoint folder, shard by shard, without loading the model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trocar.anatomy import Anatomy, FileTensor
from trocar.core.errors import ExportError, UnsupportedModelError
from trocar.core.files import read_json, write_json
from trocar.patch.actions import Target, Write
from trocar.patch.checkpoint import (
    INDEX,
    Entry,
    Source,
    copier,
    copy_others,
    entries,
    match,
    metadata_of,
    new_folder,
    read_tensor,
    scan,
    write_file,
)
from trocar.patch.checkpoint import shards as shards_of
from trocar.patch.checkpoint import skeleton as skeleton_of
from trocar.patch.ops.experts import QuantiseExperts
from trocar.patch.ops.heads import RoundHeads
from trocar.patch.ops.quantise import Quantise
from trocar.patch.ops.remove import Remove, Surgery
from trocar.patch.ops.scale import ScaleAt
from trocar.patch.ops.vector import AddVector
from trocar.patch.patch import Patch, check_structure, raw_bytes
from trocar.patch.record import DTYPES, torch_dtype
from trocar.patch.removal import Removal, kept, refuse_inexpressible
from trocar.patch.stacked import Places, Stacks, expert_keys, spelt


def merge_into(
    patch: Patch, source: str | os.PathLike[str], target: str | os.PathLike[str], allow_nonfinite: bool = False
) -> dict[str, Any]:
    """Make the checkpoint `target` from `source` with the patch built in, in the memory of about one tensor.

    Files are rewritten one after the other (of a mixture of experts a block's experts are held together); tensors that the patch does not
    touch are copied byte for byte, and so are configuration and tokenizer; `target` appears when it is complete. The
    result equals apply and save_pretrained. Contents of touched tensors are compared with the base's fingerprints first.

    Returns {"tensors": changed, "removed": ..., "bytes": ..., "files": ...}.
    Raises PatchBaseError (another base), ExportError (a vector without a bias to go to, a removal that no config can say, `target` exists,
    names that cannot be matched), DataError (not a safetensors checkpoint).
    """
    source, target = Path(source), Path(target)
    model = skeleton_of(source)
    plan_target = Target.of(model, patch.ops, allow_nonfinite)
    anatomy = plan_target.anatomy
    check_structure(patch, plan_target)
    tensors = scan(source)
    surgery = next((op.surgery(plan_target) for op in patch.ops if isinstance(op, Remove)), None)
    wanted = wanted_fingerprints(patch, plan_target)
    writes: dict[str, list[Write]] = {}
    stored = {key: (file, entry) for file in shards_of(source) for key, entry in entries(file).items()}
    stacks = _stacks(plan_target, wanted, stored, writes)
    places = match(model, {name: digest for name, digest in wanted.items() if name not in stacks.keys}, tensors)
    for name, keys in stacks.keys.items():
        parameter = plan_target.tensor(name)
        parameter.data = parameter.data.to(torch_dtype(stacks.places[keys[0][0]][1].dtype))
    for name, (first, *_) in places.items():  # the skeleton's dtypes become the checkpoint's, so that operations can compare theirs
        parameter = plan_target.tensor(name)
        parameter.data = parameter.data.to(torch_dtype(first.dtype))
    writes |= planned_writes(patch, plan_target)
    config = _shortened_config(plan_target, surgery) if surgery else None
    by_key = {(t.file, t.name): name for name, found in places.items() for t in found}
    report = {"tensors": 0, "removed": 0, "bytes": 0, "files": 0}
    with new_folder(target) as folder:
        copy_others(source, folder)
        if config is not None:
            config.save_pretrained(folder)
        weight_map: dict[str, str] = {}
        layers = _layers(anatomy, surgery, tensors)
        for file in shards_of(source):
            sources = []
            for key, entry in entries(file).items():
                if key in stacks.owner:
                    report["tensors"] += 1
                    sources.append(Source(key, entry.dtype, entry.shape, entry.stop - entry.start, _writer(stacks, key)))
                    continue
                name = by_key.get((file, key))
                new_key = key if surgery is None else _renamed(key, layers)
                if new_key is None:
                    report["removed"] += 1
                    continue
                steps = writes.get(name, []) if name else []
                dims = surgery.keep.get(name, ()) if surgery and name else ()
                report["tensors"] += bool(steps or dims)
                sources.append(_source(file, new_key, entry, steps, dims))
            if not sources:
                continue
            write_file(folder / file.name, sources, metadata_of(file))
            weight_map.update({one.name: file.name for one in sources})
            report["bytes"] += sum(one.nbytes for one in sources)
            report["files"] += 1
        if (source / INDEX).exists():
            index = read_json(source / INDEX)
            index.setdefault("metadata", {})["total_size"] = report["bytes"]
            write_json(folder / INDEX, index | {"weight_map": weight_map})
    return report


def _stacks(target: Target, wanted: dict[str, str | None], places: Places, writes: dict[str, list[Write]]) -> Stacks:
    """The wanted parameters that hold all experts of a block and that the checkpoint keeps one by one. Raises PatchBaseError."""
    keys = {name: spelt(target.model, parts, places) for name, parts in expert_keys(target.model).items() if name in wanted}

    def change(name: str, stack: torch.Tensor) -> None:
        for step in writes.get(name, []):
            step.change(stack)

    stacks = Stacks({name: parts for name, parts in keys.items() if parts is not None}, places, change)
    for name in stacks.keys:
        stacks.check(name, wanted[name])
    return stacks


def _writer(stacks: Stacks, key: str) -> Callable[[Any], None]:
    return lambda handle: handle.write(raw_bytes(stacks.part(key)))


def wanted_fingerprints(patch: Patch, target: Target) -> dict[str, str | None]:
    """The touched parameters and their fingerprints in the base. Raises ExportError if the patch does not know them."""
    names = {name for op in patch.ops for name in op.parameters(target)}
    names |= {bias_of(op, target)[0] for op in patch.ops if isinstance(op, AddVector)}
    return {name: patch.base.tensors.get(name) for name in sorted(names)}


def planned_writes(patch: Patch, target: Target) -> dict[str, list[Write]]:
    """Parameter -> the steps that change its values, in order."""
    found: dict[str, list[Write]] = {}
    for op in patch.ops:
        if isinstance(op, Remove):
            continue
        for step in written(op, target):
            found.setdefault(target.first_name(step.place.name), []).append(step)
    return found


def written(op: Any, target: Target) -> Any:
    """The steps by which an operation becomes weights. Raises ExportError for one that acts only while the model runs.

    Quantised layers leave their rounded weights in float; the rounding of activations is lost.
    """
    if isinstance(op, ScaleAt):
        raise ExportError(
            f"{op.record().where()} are scaled at positions {op.positions or 'all'} while the model runs.",
            "Use Gate to scale them everywhere, in the weights, or ship the patch file itself.",
        )
    if isinstance(op, RoundHeads):
        raise ExportError(
            f"{op.record().where()} is rounded to {op.bits} bits while the model runs.", "Quantise with attention: null, or ship the patch."
        )
    if isinstance(op, AddVector):
        return [bias_step(op, target)]
    return op.writes(target) if isinstance(op, Quantise | QuantiseExperts) else op.plan(target)


def bias_of(op: AddVector, target: Target) -> tuple[str, str | None]:
    """(the bias that can hold an added vector, the weight that the vector must pass first or None). Raises ExportError if there is none."""
    from trocar.anatomy import Linear
    from trocar.patch.ops.vector import resolve

    tower, point = resolve(target, op.point)
    hint = "Ship the patch file itself: it is applied to the model after loading."
    if op.positions is not None:
        raise ExportError(f"The vector at {op.point} is added at positions {op.positions} only, a bias acts on all.", hint)
    kind, layer = point.kind, point.layer
    if kind == "resid_pre":
        if layer == 0:
            raise ExportError(f"No bias writes {op.point}, the input of the first block.", hint)
        kind, layer = "resid_post", layer - 1
    if kind == "resid_post" and tower.residual == "post":
        norm: Any = tower.module(layer, "mlp_norm")
        name = f"{tower.path(layer, 'mlp_norm')}.bias"
        if getattr(norm, "bias", None) is None:
            raise ExportError(f"{name} does not exist, so the vector at {op.point} has no place in the weights.", hint)
        return name, None
    role = "o" if kind in ("attn_out", "heads") else "down"
    if kind == "resid_post" and (between := [one for one in ("mlp_post_norm", "mlp_scale") if tower.has(layer, one)]):
        raise ExportError(f"{tower.path(layer, between[0])} stands between the MLP and {op.point}, so no bias acts like the vector.", hint)
    view = target.anatomy.linear(Linear(layer, role, point.tower or tower.name))
    if view.bias_name is None:
        raise ExportError(f"{view.path} has no bias that could hold the vector at {op.point}.", hint)
    return view.bias_name, view.name if kind in ("heads", "neurons") else None


def bias_step(op: AddVector, target: Target) -> Write:
    """The step that adds the vector to a bias instead."""
    from trocar.anatomy import Linear
    from trocar.patch.actions import Place
    from trocar.patch.ops.vector import resolve

    op.plan(target)  # checks sizes and values
    bias, through = bias_of(op, target)

    def add(old: torch.Tensor) -> torch.Tensor:
        wide = torch.float64 if old.dtype == torch.float64 else torch.float32
        vector = op.vector.to(old.device, wide)
        if through is not None:
            tower, point = resolve(target, op.point)
            view = target.anatomy.linear(Linear(point.layer, "o" if point.kind == "heads" else "down", point.tower or tower.name))
            if view.parameter.device.type == "meta":
                raise ExportError(f"The vector at {op.point} must pass {through} first.", "Load the model and export that.")
            vector = view.get().to(wide) @ vector
        return (old.to(wide) + vector).to(old.dtype)

    return Write(target, Place(bias), add)


def _source(file: Path, key: str, entry: Entry, steps: list[Write], dims: tuple[tuple[int, tuple[int, ...]], ...]) -> Source:
    shape = list(entry.shape)
    for dim, left in dims:
        shape[dim] = len(left)
    nbytes = DTYPES[entry.dtype][0] if (steps or dims) else 0
    for size in shape:
        nbytes *= size
    if not steps and not dims:
        return Source(key, entry.dtype, entry.shape, entry.stop - entry.start, copier(file, entry))

    def write(handle: Any) -> None:
        tensor = read_tensor(file, entry)
        for step in steps:
            step.change(tensor)
        handle.write(raw_bytes(kept(tensor, dims) if dims else tensor))

    return Source(key, entry.dtype, tuple(shape), nbytes, write)


def _shortened_config(target: Target, surgery: Surgery) -> Any:
    """The config of the model after the removal, found by carrying it out on the skeleton."""
    removal = Removal(target, surgery)
    removal.do()
    try:
        refuse_inexpressible(target.model)
        config = target.model.config
        return type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    except UnsupportedModelError as error:
        raise ExportError(f"The removal cannot be said in a plain checkpoint: {error.what}", GATE_INSTEAD) from None
    finally:
        removal.undo()


GATE_INSTEAD = "Remove equally many in every block, gate the components to 0 instead, or ship the patch file and apply it after loading."


def _layers(anatomy: Anatomy, surgery: Surgery | None, tensors: list[FileTensor]) -> list[tuple[re.Pattern[str], tuple[int, ...]]]:
    """Patterns that find the number of a block in a checkpoint's key, with the blocks that stay."""
    found = []
    for path, kept_blocks in (surgery.blocks if surgery else {}).items():
        tower = next(tower for tower in anatomy.towers.values() if tower.blocks_path == path)
        pattern = _block_pattern(anatomy, tower, tensors)
        found.append((pattern, kept_blocks))
    return found


def _block_pattern(anatomy: Anatomy, tower: Any, tensors: list[FileTensor]) -> re.Pattern[str]:
    """How the checkpoint writes a tower's block list: the names of all its blocks' parameters, found by what they would be saved as."""
    from trocar.patch.checkpoint import saved_names, spellings

    saved, keys = saved_names(anatomy.model), {tensor.name for tensor in tensors}
    prefixes = set()
    for name, _ in tower.blocks[0].named_parameters(prefix=f"{tower.blocks_path}.0"):
        spelt = [one for key in (name, str(saved.get(name, name))) for one in spellings(anatomy.model, key)]
        found = [re.fullmatch(r"(.*?\.|)0\..+", one) for one in spelt if one in keys]
        prefixes.update(one[1] for one in found if one)
    if len(prefixes) != 1:
        raise ExportError(
            f"The blocks of {tower.blocks_path} cannot be found among the checkpoint's names.", "Load the model and export that."
        )
    return re.compile(rf"({re.escape(prefixes.pop())})(\d+)(\..+)")


def _renamed(key: str, layers: list[tuple[re.Pattern[str], tuple[int, ...]]]) -> str | None:
    for pattern, kept_blocks in layers:
        found = pattern.fullmatch(key)
        if found:
            number = int(found[2])
            return f"{found[1]}{kept_blocks.index(number)}{found[3]}" if number in kept_blocks else None
    return key
