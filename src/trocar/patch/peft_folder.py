"""PEFT's adapter folders, read and written one module at a time. Only their JSON and their tensors are read; no code of them is run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trocar.core.errors import ExportError, PatchFormatError
from trocar.core.files import read_json, write_json
from trocar.patch.checkpoint import Entry, Source, entries, new_folder, read_tensor, write_file
from trocar.patch.ops.adapter import Adapter, Factors
from trocar.patch.patch import raw_bytes
from trocar.patch.record import dtype_code
from trocar.trace.adapters import RESIDUAL

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = "Only plain LoRA on linear maps can be a patch: no DoRA, no biases, no modules_to_save, no embeddings."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class Shape(NamedTuple):
    """What is known of a module's factors before they are read or computed."""

    rank: int
    outputs: int
    inputs: int
    scale: float
    transposed: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, factors: Factors) -> Shape:
        a, b, scale, transposed = factors
        return cls(a.shape[0], b.shape[0], a.shape[1], scale, transposed, a.dtype)


@dataclass(frozen=True)
class PeftFolder(Mapping[str, Factors]):
    """A LoRA folder as a mapping from modules' names to their factors, each read when it is asked for. Made by `open_folder`."""

    path: Path
    shapes: Mapping[str, Shape]
    entries: Mapping[str, tuple[Entry, Entry]]
    task: str | None
    dropout: float
    base: str | None

    def __getitem__(self, name: str) -> Factors:
        shape, (a, b) = self.shapes[name], self.entries[name]
        file = self.path / WEIGHTS
        return Factors(read_tensor(file, a), read_tensor(file, b), shape.scale, shape.transposed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def adapter(self) -> Adapter:
        """All of it in memory."""
        return Adapter(dict(self), self.task, self.dropout)


def open_folder(folder: str | os.PathLike[str]) -> PeftFolder:
    """Look into a PEFT folder. Raises PatchFormatError for anything but plain LoRA on linear maps, and for damaged files."""
    folder = Path(folder)
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise PatchFormatError(f"{folder / CONFIG} cannot be read: {error}.", "Give a folder written by save_pretrained.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise PatchFormatError(f"{folder} does not hold a LoRA adapter.", PLAIN)
    refuse(config, str(folder))
    if start := residual(config):
        raise PatchFormatError(
            f"{folder} began as {start}, whose first value was taken out of the base's weights: it belongs to no pretrained model.",
            "Convert it when saving, peft_model.save_pretrained(folder, path_initial_model_for_weight_conversion=...).",
        )
    pairs: dict[str, dict[str, Entry]] = {}
    for key, entry in entries(folder / WEIGHTS).items():
        found = _KEY.fullmatch(key)
        if found is None or len(entry.shape) != 2:
            raise PatchFormatError(f"{folder / WEIGHTS} holds '{key[:100]}', which is not a factor of a linear map.", PLAIN)
        pairs.setdefault(found["module"], {})[found["side"]] = entry
    if not pairs:
        raise PatchFormatError(f"{folder / WEIGHTS} holds no factors.", "Fetch it again.")
    shapes, places, swapped = {}, {}, bool(config.get("fan_in_fan_out"))
    for name, sides in sorted(pairs.items()):
        if set(sides) != {"A", "B"} or sides["A"].shape[0] != sides["B"].shape[1]:
            raise PatchFormatError(f"{folder / WEIGHTS} does not hold two factors of {name} that fit.", "Fetch it again.")
        (rank, inputs), outputs = sides["A"].shape, sides["B"].shape[0]
        alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"), folder)
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        places[name] = sides["A"], sides["B"]
        shapes[name] = Shape(rank, outputs, inputs, scale, swapped, read_dtype(folder, sides["A"]))
    task, base = config.get("task_type"), config.get("base_model_name_or_path")
    return PeftFolder(
        folder, shapes, places, task if isinstance(task, str) else None, float(config.get("lora_dropout") or 0.0),
        base if isinstance(base, str) and base else None,
    )  # fmt: skip


def read_dtype(folder: Path, entry: Entry) -> torch.dtype:
    from trocar.patch.record import DTYPES, torch_dtype

    if entry.dtype not in DTYPES:
        raise PatchFormatError(f"{folder / WEIGHTS} holds factors of dtype {entry.dtype}.", "Save the adapter in a plain dtype.")
    return torch_dtype(entry.dtype)


def residual(config: Mapping[str, Any]) -> str:
    """The name of an initialisation that changes the base, or nothing."""
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower().startswith(RESIDUAL) else ""


def refuse(config: Mapping[str, Any], what: str) -> None:
    """Raise PatchFormatError for what plain factors cannot say."""
    bad = [key for key in ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters") if config.get(key)]
    if config.get("bias", "none") != "none":
        bad.append("bias")
    if bad:
        raise PatchFormatError(f"{what} uses {', '.join(bad)}.", PLAIN)


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


def settings(shapes: Mapping[str, Shape], task: str | None = None, dropout: float = 0.0, base: str | None = None) -> dict[str, Any]:
    """What PEFT's `adapter_config.json` says of an adapter; module names are exact. Raises ExportError if one config cannot say it."""
    ranks = {name: shape.rank for name, shape in shapes.items()}
    alphas = {name: shape.scale * shape.rank for name, shape in shapes.items()}
    common_rank = max(set(ranks.values()), key=list(ranks.values()).count)
    common_alpha = max(set(alphas.values()), key=list(alphas.values()).count)
    transposed = {shape.transposed for shape in shapes.values()}
    if len(transposed) > 1:
        raise ExportError("The adapter changes both Linear and Conv1D modules, which one PEFT config cannot say.", "Export a checkpoint.")
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": common_rank,
        "lora_alpha": _number(common_alpha),
        "lora_dropout": dropout,
        "target_modules": sorted(shapes),
        "rank_pattern": {f"^{name}": rank for name, rank in ranks.items() if rank != common_rank},
        "alpha_pattern": {f"^{name}": _number(alpha) for name, alpha in alphas.items() if alpha != common_alpha},
        "fan_in_fan_out": transposed.pop(),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


def write_folder(adapter: Adapter, target: str | os.PathLike[str], base: str | None = None) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads."""
    shapes = {name: Shape.of(factors) for name, factors in adapter.factors.items()}
    write_modules(target, shapes, adapter.factors.__getitem__, adapter.task, adapter.dropout, base)


def write_modules(
    target: str | os.PathLike[str],
    shapes: Mapping[str, Shape],
    factors: Callable[[str], Factors],
    task: str | None = None,
    dropout: float = 0.0,
    base: str | None = None,
) -> None:
    """As `write_folder`, with every module's factors asked for once, in the order of `shapes`, and forgotten when they are written."""
    config = settings(shapes, task, dropout, base)
    held: dict[str, Factors] = {}

    def writer(name: str, side: str) -> Callable[[Any], None]:
        def write(handle: Any) -> None:
            if name not in held:
                held.clear()
                held[name] = factors(name)
            handle.write(raw_bytes(held[name].a if side == "A" else held[name].b))

        return write

    sources = []
    for name, shape in shapes.items():
        for side, size in (("A", (shape.rank, shape.inputs)), ("B", (shape.outputs, shape.rank))):
            key, nbytes = f"base_model.model.{name}.lora_{side}.weight", size[0] * size[1] * shape.dtype.itemsize
            sources.append(Source(key, str(dtype_code(shape.dtype)), size, nbytes, writer(name, side)))
    with new_folder(target) as folder:
        write_json(folder / CONFIG, config)
        write_file(folder / WEIGHTS, sources, {"format": "pt"})


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
