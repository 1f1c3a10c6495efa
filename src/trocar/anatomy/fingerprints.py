"""Fingerprints: whether two models, tensors or checkpoint files hold the same values, without keeping both. Imports torch late.

A tensor's fingerprint is a hash of its dtype, shape and bytes, so it can be had from a checkpoint file without torch, and moving a tensor
between devices does not change it. A model's fingerprint is a hash of the names and fingerprints of all its parameters and persistent
buffers, a tied parameter once. Hashes are BLAKE2b (RFC 7693) with 128 bits.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trocar.core.errors import DataError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 26  # bytes hashed at a time; only this much of an accelerator's tensor is on the CPU at once
_SAFETENSORS_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32",
    "uint16": "U16", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
}  # fmt: skip
_SIZES = {name: 1 if name == "BOOL" else int(name.partition("_")[0].lstrip("BFICU")) // 8 for name in _SAFETENSORS_NAMES.values()}  # bytes


def dtype_name(dtype: torch.dtype) -> str:
    """The name a dtype has in a safetensors file (`BF16`); for dtypes which that format does not know, torch's own name."""
    name = str(dtype).removeprefix("torch.")
    return _SAFETENSORS_NAMES.get(name, name)


def tensor_fingerprint_bytes(dtype: str, shape: tuple[int, ...] | list[int], buffer: Any) -> str:
    """The fingerprint of a tensor from its raw little-endian bytes in row-major order. dtype: its name in safetensors, `F32`."""
    digest = _start(dtype, shape)
    digest.update(buffer)
    return digest.hexdigest()


def tensor_fingerprint(tensor: torch.Tensor) -> str:
    """The fingerprint of a tensor of any dtype, layout in memory and device. A contiguous CPU tensor is not copied.

    Raises UnsupportedModelError for tensors that have no bytes of their own: on the meta device, sparse, sharded over processes.
    """
    import torch

    tensor = tensor.detach()
    if tensor.device.type == "meta" or tensor.layout is not torch.strided or hasattr(tensor, "full_tensor"):
        what = "is on the meta device" if tensor.device.type == "meta" else f"is a {type(tensor).__name__} with layout {tensor.layout}"
        raise UnsupportedModelError(f"A tensor of shape {tuple(tensor.shape)} {what} and has no values to hash.", "Load its values first.")
    digest = _start(dtype_name(tensor.dtype), tuple(tensor.shape))
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    step = max(1, _CHUNK // tensor.element_size())
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].cpu()
        try:
            digest.update(memoryview(part.view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]
        except (RuntimeError, TypeError) as error:
            raise UnsupportedModelError(
                f"The bytes of a {type(tensor).__name__} of dtype {tensor.dtype} cannot be read ({error}).", "Convert it to a plain tensor."
            ) from error
    return digest.hexdigest()


def fingerprint(model: torch.nn.Module) -> str:
    """The fingerprint of a model: names, dtypes, shapes and bytes of its parameters and persistent buffers, tied ones once.

    Equal before and after saving and loading, on any device, inside and outside of DDP and torch.compile. The state of PEFT adapters
    (which are active, their scalings, whether they are switched off or merged) is part of it, because it changes what the model computes.
    """
    model = unwrap_parallel(model)
    tensors = sorted(_named_tensors(model), key=lambda item: item[0])
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:  # hashing releases the interpreter's lock
        digests = list(pool.map(_named_fingerprint, tensors))
    total = hashlib.blake2b(digest_size=16)
    for (name, _), digest in zip(tensors, digests, strict=True):
        total.update(f"{name}\0{digest}\n".encode())
    for line in _adapter_state(model):
        total.update(line.encode())
    return total.hexdigest()


def structure_fingerprint(model: torch.nn.Module) -> str:
    """A hash of the names and shapes of a model's parameters and persistent buffers; works on the meta device."""
    lines = sorted(f"{name}\0{list(tensor.shape)}\n" for name, tensor in _named_tensors(unwrap_parallel(model)))
    return hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()


def unwrap_parallel(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile, which change neither values nor names."""
    while type(model).__name__ in ("DistributedDataParallel", "DataParallel", "OptimizedModule"):
        model = getattr(model, "_orig_mod", None) or model.module  # type: ignore[assignment]
    return model


class FileTensor(NamedTuple):
    """One tensor of a checkpoint: where it lies, and what it holds."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    fingerprint: str


def checkpoint_fingerprints(folder: str | Path) -> Iterator[FileTensor]:
    """Fingerprints of all tensors in a folder's safetensors files (or of one file), read one after the other without torch.

    Raises DataError for a missing or damaged file.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    if not files or not files[0].exists():
        raise DataError(f"There is no safetensors file at {folder}.", "Give a checkpoint's folder or one of its files.")
    for file in files:
        if file.stat().st_size < 8:
            raise DataError(f"{file} is not a safetensors file.", "Fetch it again.")
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
            start = 8 + int.from_bytes(view[:8], "little")
            for name, dtype, shape, low, high in _entries(file, bytes(view[8:start]) if start <= len(view) else b"", len(view) - start):
                with view[start + low : start + high] as part:
                    digest = tensor_fingerprint_bytes(dtype, shape, part)
                yield FileTensor(name, file, dtype, shape, digest)


def _entries(file: Path, header: bytes, size: int) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Name, dtype, shape and place of each tensor, in the order of the file. Raises DataError for anything but a sound header."""
    try:
        found = []
        for name, entry in json.loads(header).items():
            if name == "__metadata__":
                continue
            dtype, shape, (low, high) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, low, high))
            inside = whole and isinstance(dtype, str) and low <= high <= size
            if not inside or (high - low != math.prod(shape) * _SIZES.get(dtype, 0) and dtype in _SIZES):
                raise DataError(f"{file} is damaged at its tensor '{name}'.", "Fetch it again.")
            found.append((name, dtype, shape, low, high))
        return sorted(found, key=lambda item: item[3])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DataError(f"{file} is not a safetensors file.", "Fetch it again.") from None


def _start(dtype: str, shape: tuple[int, ...] | list[int]) -> hashlib.blake2b:
    return hashlib.blake2b(f"{dtype}\0{list(shape)}\0".encode(), digest_size=16)


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()  # each parameter once, under its first name
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _named_fingerprint(item: tuple[str, torch.Tensor]) -> str:
    try:
        return tensor_fingerprint(item[1])
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{item[0]}: {error.what}", error.hint) from None


def _adapter_state(model: torch.nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            state = [
                sorted(map(str, module.active_adapters)),  # type: ignore[union-attr, arg-type]
                bool(getattr(module, "disable_adapters", False)),
                sorted(map(str, getattr(module, "merged_adapters", []) or [])),
                sorted((str(key), float(value)) for key, value in (getattr(module, "scaling", None) or {}).items()),
            ]
            yield f"{name}\0{json.dumps(state)}\n"
