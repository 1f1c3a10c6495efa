"""Folders of quantised models: what is in them, what a form can hold, and the forms that other readers load. Floor 5."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from trocar.anatomy import Anatomy, Tower
from trocar.compress.duquant.checkpoint import ABOUT, FORMAT, REST, empty_like
from trocar.compress.duquant.config import DuQuantConfig
from trocar.compress.duquant.groups import MEMBERS, groups, put
from trocar.core.errors import DataError, ExportError, MissingExtraError, RunError, UnsupportedModelError
from trocar.core.files import read_json
from trocar.core.workspace import Workspace
from trocar.patch.checkpoint import copy_others, entries, new_folder, skeleton
from trocar.patch.ops.experts import WEIGHTS
from trocar.patch.quantised import QuantisedExperts, QuantisedLinear

USE = "Use the method folded (no rotations; every reader of compressed-tensors), or export with transforms (one rotation; vLLM only)."


def kind_of(folder: str | os.PathLike[str]) -> str:
    """What a model's folder holds: `trocar` (made by `quantise_checkpoint`), `compressed-tensors`, `transforms` (the same with rotations in
    its transform configuration), the name of another quantisation, or `float`. Raises DataError for a folder without config.json."""
    folder = Path(folder)
    try:
        if (folder / ABOUT).is_file() and read_json(folder / ABOUT).get("format") == FORMAT:
            return "trocar"
        config = read_json(folder / "config.json")
        found = config.get("quantization_config")
        if found is None:
            return "float"
        return "transforms" if found.get("transform_config") else str(found.get("quant_method", "quantised"))
    except (OSError, ValueError, AttributeError):
        raise DataError(f"{folder} is not a model: its config.json cannot be read.", "Give the folder of a checkpoint.") from None


def refuse_quantised(folder: str | os.PathLike[str]) -> None:
    """Raise UnsupportedModelError for a folder whose weights are quantised already."""
    if (kind := kind_of(folder)) != "float":
        raise UnsupportedModelError(f"{folder} is quantised already ({kind}).", "Give the float model that it was made from.")


def committed(folder: str | os.PathLike[str], identity: Mapping[str, Any], blocks: int) -> int:
    """How many blocks, counted from the first, lie in `folder` with this `checkpoint.identity`. Raises RunError if there are others: of
    another text, model, seed or other settings."""
    work = Workspace(Path(folder), identity)
    mine = [work.holds(f"block-{layer:05}", {}) for layer in range(blocks)]
    if not all(held for held, file in zip(mine, _block_files(work.folder, blocks), strict=True) if file.exists()):
        raise RunError(
            f"{folder} was begun with another model, text, seed or other settings.",
            "Give the command that began it, choose another target, or remove the folder.",
        )
    return mine.index(False) if False in mine else blocks


def _block_files(folder: Path, blocks: int) -> list[Path]:
    return [folder / f"block-{layer:05}.safetensors" for layer in range(blocks)]


@dataclass(frozen=True)
class Folder:
    """What a folder made by `quantise_checkpoint` holds. errors: relative output error of every layer by path, and of blocks as `L5`;
    names: component of every layer, as `keep` has it; weights: entries of the quantised matrices; layers_bytes: with scales, zero points
    and transforms; elsewhere_bytes: embeddings, norms, heads."""

    settings: Mapping[str, Any]
    seed: int
    blocks: int
    errors: Mapping[str, float]
    names: Mapping[str, str]
    weights: int
    layers_bytes: int
    elsewhere_bytes: int

    @property
    def bits(self) -> float:
        """Stored bits a weight."""
        return 8 * self.layers_bytes / self.weights

    def worst(self, count: int) -> list[tuple[str, str, float]]:
        """(component, path, error) of the layers with the largest errors."""
        layers = sorted(self.names, key=lambda path: -self.errors.get(path, 0.0))[:count]
        return [(self.names[path], path, self.errors[path]) for path in layers]

    @property
    def mean_error(self) -> float:
        return sum(self.errors[path] for path in self.names) / len(self.names)


def look(folder: str | os.PathLike[str]) -> Folder:
    """Read what a folder says of itself, without its weights. Raises DataError for another folder, or a damaged one."""
    folder = Path(folder)
    if kind_of(folder) != "trocar":
        raise DataError(f"{folder} was not made by quantise_checkpoint.", "Give such a folder.")
    about = read_json(folder / ABOUT)
    errors: dict[str, float] = {}
    counted = _Counted()
    for layer, file in enumerate(_block_files(folder, about["blocks"])):
        table = entries(file)
        with safe_open(file, framework="pt") as opened:
            told = json.loads(bytes(opened.get_tensor("about").tolist()))
        errors |= {f"L{layer}" if path == "block" else path: error for path, error in told["errors"].items()}
        counted.add({name: entry.stop - entry.start for name, entry in table.items() if name != "about"}, told["ops"])
    counted.elsewhere += sum(entry.stop - entry.start for entry in entries(folder / REST).values())
    names = component_names(Anatomy.of(skeleton(folder), experts=True).tower())
    names = {path: name for path, name in names.items() if path in errors}
    return Folder(about["settings"], about["seed"], about["blocks"], errors, names, counted.weights, counted.layers, counted.elsewhere)


@dataclass
class _Counted:
    weights: int = 0
    layers: int = 0
    elsewhere: int = 0

    def add(self, sizes: Mapping[str, int], ops: Sequence[Mapping[str, Any]]) -> None:
        numbered = tuple(f"op{number}." for number in range(len(ops)))
        inside = sum(size for name, size in sizes.items() if name.startswith(numbered))
        self.layers += inside
        self.elsewhere += sum(sizes.values()) - inside
        for op in ops:  # of a mixture of experts: gate, up and down of each
            outputs = 3 * op["hidden"] * len(op["which"]) if "which" in op else sum(layer["outputs"] for layer in op["layers"])
            self.weights += op["inputs"] * outputs


def component_names(tower: Tower) -> dict[str, str]:
    """Path of every linear layer of the blocks -> its component (`L5.mlp.down`); of a fused one the first of its parts, of a mixture of
    experts `L5.mlp.experts`."""
    found = {}
    for layer in range(tower.n_layers):
        for group in groups(tower, layer):
            if group.of_experts:
                found[tower.path(layer, group.roles[0])] = group.components[0].rpartition(".")[0]
                continue
            names = iter(group.components)
            for role in group.roles:
                parts = [next(names) for _ in MEMBERS.get(role, (role,))]
                found[tower.path(layer, role)] = parts[0]
    return found


def check_compressed(model: Any, config: DuQuantConfig, transforms: bool) -> None:
    """Raise ExportError if what these settings would make of `model` is nothing that `export_compressed` can write. Needs no values: for
    use before the work."""
    tower = Anatomy.of(model).tower()
    if config.attention is not None:
        raise ExportError("compressed-tensors cannot say that queries, keys and values are rounded.", "Set attention to null.")
    wide = [bits for bits in (config.weights.bits, *config.keep.values()) if bits > 8]
    if config.weights.bits > 8 or any(bits < 16 for bits in wide):
        raise ExportError(f"compressed-tensors holds weights of 2 to 8 bits, not {wide[0]}.", "Ask for 8 (or keep a layer at 16).")
    if not config.weights.symmetric:
        raise ExportError("These settings give weights with zero points, which transformers does not load.", USE)
    chain = config.chain
    if chain is not None and not transforms:
        raise ExportError("These settings turn inputs by rotations, which plain compressed-tensors cannot say.", USE)
    if chain is not None and (chain.per_block or chain.steps not in (("rotate",), ("permute", "rotate"))):
        raise ExportError("A transform configuration holds one rotation in front of each layer; these settings make another chain.", USE)
    if chain is not None and "permute" in chain.steps and not chain.foldable:
        raise ExportError("A transform configuration holds no permutations, and these settings permute where none folds.", USE)
    for layer in range(tower.n_layers):
        for group in groups(tower, layer):
            for role in group.roles:
                path, module = tower.path(layer, role), tower.module(layer, role)
                if not isinstance(module, nn.Linear):
                    raise ExportError(f"{path} is a {type(module).__name__}; compressed-tensors knows nn.Linear only.", "Use another form.")
                given = config.activations
                clipped = given.clip == "search" or given.quantiser(module.in_features).clip != 1
                if given.bits < 16 and (clipped or not given.symmetric):
                    raise ExportError("These settings give activations with zero points or a clip, which engines do not read.", USE)
            if config.smoothing is not None and config.smoothing.online and not group.source:
                raise ExportError(f"The input of {tower.path(layer, group.roles[0])} would be divided as the model runs.", USE)


def export_float(model: Any, target: str | os.PathLike[str], tokenizer_from: str | os.PathLike[str] | None = None) -> None:
    """Write a quantised model (from `load_quantised`) as a plain checkpoint: the rounded weights in float, in the basis of the layers' own
    inputs, in the dtype of the model's other parameters. Activations are not rounded there. The model keeps the float layers.

    tokenizer_from: a folder whose other files are copied along. Raises ExportError where queries, keys and values are rounded.
    """
    if any("_rounded_heads" in module.__dict__ for module in model.modules()):
        raise ExportError("A plain checkpoint cannot say that queries, keys and values are rounded.", "Set attention to null.")
    bare: Any = empty_like(model)
    dtype = next(model.parameters()).dtype
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    mixtures = {path: module for path, module in model.named_modules() if isinstance(module, QuantisedExperts)}
    if not layers:
        raise ExportError("The model has no quantised layers.", "Use save_pretrained.")
    for path, experts in mixtures.items():
        plain = bare.get_submodule(path)
        for number, name in enumerate(WEIGHTS):
            stack = torch.stack([experts.effective(expert, number).to(dtype) for expert in range(experts.count)])
            setattr(plain, name, nn.Parameter(stack, requires_grad=False))
        put(model, path, plain)
    for path, layer in layers.items():
        plain = bare.get_submodule(path)
        weight = layer.effective_weight().to(dtype)
        transposed = not isinstance(plain, nn.Linear)  # Conv1D stores (in, out)
        plain.weight = nn.Parameter((weight.T if transposed else weight).contiguous(), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        put(model, path, plain)
    with new_folder(target) as folder:
        if tokenizer_from is not None:
            copy_others(Path(tokenizer_from), folder)
        model.save_pretrained(folder)


def load_transforms(folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Any:
    """The model in a folder of `export_compressed(..., transforms=True)`, with its rotations, by the library compressed-tensors.

    transformers up to 5.24 leaves the rotations out without a word, so `from_pretrained` must not be used. dtype: None for the
    checkpoint's. Raises MissingExtraError without that library, DataError for tensors that do not belong to the model.
    """
    try:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
        from compressed_tensors.transform import TransformConfig, apply_transform_config
    except ImportError:
        raise MissingExtraError("Reading this folder needs compressed-tensors.", "Install trocar[quant].") from None
    from safetensors.torch import load_file

    folder = Path(folder)
    settings = dict(read_json(folder / "config.json")["quantization_config"])
    transform = TransformConfig(**settings.pop("transform_config"))
    bare = skeleton(folder)
    wanted = dtype or getattr(bare.config, "dtype", None) or torch.float32
    model = type(bare)(bare.config).to(wanted).eval()
    quantisation = QuantizationConfig(**settings)
    apply_quantization_config(model, quantisation)
    compressor = ModelCompressor(quantization_config=quantisation)
    compressor.compress_model(model=model)
    apply_transform_config(model, transform)
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or [name for name in missing if name not in tied]:
        raise DataError(f"{folder} does not fit its configuration ({[*unexpected, *missing][0]}).", "Export it again.")
    compressor.decompress_model(model=model)
    return model
