"""Checkpoint folders (safetensors, one file or several), read and written one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trocar.anatomy import FileTensor, checkpoint_fingerprints
from trocar.core.errors import DataError, ExportError, PatchBaseError
from trocar.core.files import read_json
from trocar.patch.record import DTYPES, torch_dtype

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".safetensors", ".index.json")
_CHUNK = 1 << 22


class Entry(NamedTuple):
    """Where a tensor lies in a file, in bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def shards(folder: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files that make up a checkpoint. Raises DataError when there are none."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        bad = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if not names or bad:
            raise DataError(f"{folder / INDEX} names {bad[0] if bad else 'no files'}, which is not there.", "Fetch the checkpoint again.")
        return [folder / name for name in names]
    found = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        what = "several safetensors files but no index" if found else "no safetensors file"
        raise DataError(f"{folder} has {what}.", "Save the model with save_pretrained(folder), which writes safetensors.")
    return found


def entries(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, in the order in which they lie. Raises DataError if it is damaged."""
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            length = int.from_bytes(handle.read(8), "little")
            if length > min(size - 8, 100 << 20):
                raise ValueError
            table = json.loads(handle.read(length))
        start = 8 + length
        found = {
            name: Entry(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0], start + entry["data_offsets"][1])
            for name, entry in table.items()
            if name != "__metadata__"
        }
        if any(not start <= entry.start <= entry.stop <= size for entry in found.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{file} is not a safetensors file, or damaged.", "Fetch it again.") from None
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def read_tensor(file: Path, entry: Entry) -> torch.Tensor:
    """One tensor, in memory of its own. Raises DataError for a dtype that no patch can hold."""
    if entry.dtype not in DTYPES:
        raise DataError(f"{file} holds a tensor of dtype {entry.dtype}.", "Only plain checkpoints can be changed, not quantised ones.")
    buffer = bytearray(entry.stop - entry.start)
    with file.open("rb") as handle:
        handle.seek(entry.start)
        if handle.readinto(buffer) != len(buffer):
            raise DataError(f"{file} ends too early.", "Fetch it again.")
    if not buffer:
        return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
    return torch.frombuffer(buffer, dtype=torch_dtype(entry.dtype)).reshape(entry.shape)


class Source(NamedTuple):
    """A tensor for a new file: its name, dtype and shape, and a function that writes its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    write: Callable[[Any], None]


def write_file(path: Path, sources: Iterable[Source], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, one tensor at a time."""
    sources = list(sources)
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for source in sources:
        table[source.name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": [offset, offset + source.nbytes]}
        offset += source.nbytes
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as handle:
        handle.write(len(raw).to_bytes(8, "little") + raw)
        for source in sources:
            before = handle.tell()
            source.write(handle)
            assert handle.tell() - before == source.nbytes, source.name
        handle.flush()
        os.fsync(handle.fileno())


def copier(file: Path, entry: Entry) -> Callable[[Any], None]:
    """Copies a tensor's bytes in pieces."""

    def write(handle: Any) -> None:
        with file.open("rb") as source:
            source.seek(entry.start)
            left = entry.stop - entry.start
            while left:
                piece = source.read(min(_CHUNK, left))
                if not piece:
                    raise DataError(f"{file} ends too early.", "Fetch it again.")
                handle.write(piece)
                left -= len(piece)

    return write


def metadata_of(file: Path) -> dict[str, str]:
    with file.open("rb") as handle:
        return json.loads(handle.read(int.from_bytes(handle.read(8), "little"))).get("__metadata__", {"format": "pt"})


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when all went well. Raises ExportError if `path` exists and is not empty."""
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} exists.", "Choose another folder, or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_others(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and the like: every file at the folder's top that holds no weights."""
    for item in sorted(source.iterdir()):
        if item.is_file() and not item.name.endswith(OTHER_WEIGHTS) and not item.name.startswith("."):
            shutil.copyfile(item, target / item.name)


def skeleton(folder: str | os.PathLike[str]) -> Any:
    """The checkpoint's model without values (on the meta device), of the class that its config names.

    Raises DataError if the config names no class of transformers; code that comes with a checkpoint is never run.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder} has no readable config.json: {str(error).splitlines()[0][:150]}", "Give a checkpoint's folder."
        ) from None
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if len(names) == 1 and re.fullmatch(r"[A-Za-z0-9_]+", names[0]) else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise DataError(
            f"The config in {folder} names the class {names}, which transformers does not have.", "Load the model and use that."
        )
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        model = kind(config)
    torch.random.set_rng_state(state)
    return model.eval()


def scan(folder: str | os.PathLike[str]) -> list[FileTensor]:
    """All tensors of a checkpoint with their fingerprints, read one after the other."""
    return [tensor for file in shards(folder) for tensor in checkpoint_fingerprints(file)]


def match(model: Any, wanted: Mapping[str, str | None], tensors: Iterable[FileTensor]) -> dict[str, list[FileTensor]]:
    """Which tensors of a checkpoint hold which parameters of `model`.

    wanted: parameter name -> fingerprint of its values, or None if not known. Names in checkpoints differ from those in models (renamed
    when saved, with or without a prefix), so the contents decide where they are known; among equal contents the same name, then the name
    under which this transformers would save the parameter, then the longest common end of the names. A tied parameter may be stored
    under each of its names. Raises PatchBaseError if none holds the contents, ExportError if several do and no name decides.
    """
    tensors = list(tensors)
    by_name = {tensor.name: tensor for tensor in tensors}
    names: dict[int, list[str]] = {}
    for name, parameter in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        names.setdefault(id(parameter), []).append(name)
    parameters = {aliases[0]: aliases for aliases in names.values()}
    shapes = {name: tuple(parameter.shape) for name, parameter in [*model.named_parameters(), *model.named_buffers()]}
    saved = saved_names(model)
    found = {}
    for name, digest in wanted.items():
        aliases = parameters[name]
        fits = [t for t in tensors if (t.fingerprint == digest if digest is not None else t.shape == shapes[name])]
        if not fits:
            raise PatchBaseError(f"No tensor of the checkpoint is the base's {name}.", "Give the checkpoint that the patch was made for.")
        said = [spelt for alias in aliases for key in (alias, saved.get(alias, alias)) for spelt in spellings(model, key)]
        chosen = [by_name[key] for key in dict.fromkeys(said) if key in by_name and by_name[key] in fits]
        if not chosen and (digest is not None):
            chosen = [fits[0]] if len(fits) == 1 else closest(name, fits)
        if not chosen:
            raise ExportError(
                f"{len(fits)} tensors of the checkpoint could be {name}: {', '.join(t.name for t in fits[:3])}.",
                "Load the model and use it instead of its folder.",
            )
        found[name] = chosen
    return found


def spellings(model: Any, name: str) -> list[str]:
    """A name with and without the prefix that separates a model with a head from its base."""
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    if not prefix:
        return [name]
    return [name, name.removeprefix(prefix), f"{prefix}{name}"]


def closest(name: str, tensors: list[FileTensor]) -> list[FileTensor]:
    """The one tensor whose name has the longest end in common with `name` and the same numbers; none if that is not one."""
    tensors = [tensor for tensor in tensors if re.findall(r"\d+", tensor.name) == re.findall(r"\d+", name)]

    def common(tensor: FileTensor) -> int:
        pairs = zip(reversed(name.split(".")), reversed(tensor.name.split(".")), strict=False)
        return next((number for number, (a, b) in enumerate(pairs) if a != b), 99)

    ranked = sorted(tensors, key=common, reverse=True)
    return ranked[:1] if len(ranked) == 1 or (ranked and common(ranked[0]) > common(ranked[1])) else []


def is_stacked(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter holds the weights of all experts of a block."""
    return parameter.ndim == 3 and "experts" in name.split(".")


def saved_names(model: Any) -> dict[str, str]:
    """Parameter name -> the name under which transformers would save it, where it is only renamed. Empty if that cannot be found out."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        single = [name for name, value in model.state_dict().items() if not is_stacked(name, value)]
        marks = {name: torch.full((1,), float(number)) for number, name in enumerate(single)}
        back = {float(mark): name for name, mark in marks.items() for mark in [mark[0]]}
        renamed = revert_weight_conversion(model, dict(marks))
        return {back[float(mark[0])]: name for name, mark in renamed.items() if mark.numel() == 1 and float(mark[0]) in back}
    except Exception:  # an inner function of transformers: without it only names that are equal, or contents, decide
        return {}
