"""The patch file: one safetensors file, whose header says everything. One strict parser for `show` and for `load`; no torch.

Layout: eight bytes with the header's length, the header (JSON, padded with spaces to eight bytes), the tensors without gaps. The header
lists the tensors as in every safetensors file; its `__metadata__` has one key, `trocar`, which holds the patch's own JSON. A patch has
exactly one valid form: the parser rebuilds the header from what it understood and refuses a file that differs from it by a byte, so that
equal patches are equal files and nothing hides in one. A BLAKE2b digest over the JSON and all tensors finds damage.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import pydantic

from trocar.core.errors import PatchFormatError, nearest
from trocar.core.files import atomic_path
from trocar.patch.ops import KINDS
from trocar.patch.record import DTYPES, Base, Effect, Record, Spec, Strict, Text, explain

FORMAT, VERSION = "trocar-patch", 1
MAX_HEADER = 4 << 20  # bytes; a patch of 5,000 operations needs about 2 MB
MAX_OPS = 8_192
MAX_DEPTH = 32  # of settings and measurements
_CHUNK = 1 << 20
_DAMAGED = "Fetch or make it again; nothing was changed."


class _Meta(Strict):
    """The patch's own JSON, operations aside."""

    format: Literal["trocar-patch"]
    version: Literal[1]
    base: Base
    ops: Annotated[tuple[Any, ...], pydantic.Field(max_length=MAX_OPS)]
    effects: tuple[Effect | None, ...]
    method: Text
    settings: dict[str, Any]
    measurements: tuple[dict[str, Any], ...]
    digest: Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Header:
    """What a patch file says about itself. Made by `read_header`, without torch."""

    base: Base
    ops: tuple[Any, ...]  # records
    effects: tuple[Effect | None, ...]
    method: str
    settings: Mapping[str, Any]
    measurements: tuple[Mapping[str, Any], ...]
    digest: str = ""
    nbytes: int = 0  # of the file
    version: int = VERSION

    def rows(self) -> list[dict[str, Any]]:
        """One row per operation for a table: op, where, shape, changed (entries), norm (of the change), bytes."""
        return [
            {
                "op": record.kind,
                "where": record.where(),
                "shape": record.shape_text(),
                "changed": None if effect is None else effect.changed,
                "norm": None if effect is None else effect.norm,
                "bytes": sum(spec.nbytes for spec in record.specs().values()),
            }
            for record, effect in zip(self.ops, self.effects, strict=True)
        ]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check a patch file, tensors included, without keeping them. Raises PatchFormatError."""
    return read(path, None)


def read(path: str | os.PathLike[str], keep: Callable[[str, Spec], bytearray] | None) -> Header:
    """The one parser. keep: called for every tensor, returns the buffer that receives its bytes; None keeps nothing.

    The bytes that were checked are the bytes that are kept, so a file that changes meanwhile cannot slip through.
    Raises PatchFormatError for whatever is wrong.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _Reader(path, file, os.fstat(file.fileno()).st_size).run(keep)
    except OSError as error:
        raise PatchFormatError(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from None


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def fail(self, what: str, hint: str = _DAMAGED) -> PatchFormatError:
        return PatchFormatError(f"{self.path}: {what}.", hint)

    def run(self, keep: Callable[[str, Spec], bytearray] | None) -> Header:
        raw = self._raw_header()
        outer = self._json(raw, "its header")
        meta = outer.get("__metadata__") if isinstance(outer, dict) else None
        if not isinstance(meta, dict) or not isinstance(meta.get("trocar"), str):
            raise self.fail("it is not a Trocar patch", "Patches are made by trocar.patch; a checkpoint or adapter is not one.")
        inner = self._json(meta["trocar"].encode(), "its description")
        header, text = self._header(inner)
        self._compare(outer, header)
        expected = _encode(header, text)
        if expected != raw:
            raise self.fail("its header is not written as a patch's header is")
        start = 8 + len(raw)
        body = sum(spec.nbytes for _, spec in layout(header.ops))
        if self.size != start + body:
            word = "ends before its last tensor" if self.size < start + body else "has bytes after its last tensor"
            raise self.fail(f"it {word} ({self.size} bytes instead of {start + body})")
        digest = _digest(text)
        for name, spec in layout(header.ops):
            self._tensor(name, spec, digest, None if keep is None else keep(name, spec))
        if digest.hexdigest() != header.digest:
            raise self.fail("its contents do not match their checksum")
        return header

    def _raw_header(self) -> bytes:
        length = int.from_bytes(self.file.read(8), "little")
        if self.size < 10 or length < 2 or length > self.size - 8:
            raise self.fail("it is not a safetensors file, or its end is missing")
        if length > MAX_HEADER:
            raise self.fail(f"its header has {length} bytes, more than the {MAX_HEADER} that a patch may have")
        raw = self.file.read(length)
        if len(raw) != length:
            raise self.fail("its end is missing")
        return raw

    def _json(self, raw: bytes, what: str) -> Any:
        try:
            return strict_json(raw)
        except (ValueError, RecursionError) as error:
            raise self.fail(f"{what} cannot be read ({str(error)[:120]})") from None

    def _header(self, inner: Any) -> tuple[Header, str]:
        """The header that the description says, and the description without its digest as it must be written."""
        if not isinstance(inner, dict) or inner.get("format") != FORMAT:
            raise self.fail("it is not a Trocar patch", "Patches are made by trocar.patch.")
        if inner.get("version") != VERSION:
            raise self.fail(f"it has version {str(inner.get('version'))[:20]} of the format, this Trocar reads {VERSION}", "Update Trocar.")
        if _depth(inner) > MAX_DEPTH:
            raise self.fail(f"its description is nested more than {MAX_DEPTH} levels deep")
        try:
            meta = _Meta.model_validate_json(_dumps(inner))
        except pydantic.ValidationError as error:
            raise self.fail(explain(error)) from None
        records = tuple(self._record(number, entry) for number, entry in enumerate(inner["ops"]))
        if len(meta.effects) != len(records):
            raise self.fail(f"it lists {len(meta.effects)} effects for {len(records)} operations")
        if any(record.removes for record in records[:-1]):
            raise self.fail("something comes after a removal, which must be the last operation")
        header = Header(meta.base, records, meta.effects, meta.method, meta.settings, meta.measurements, meta.digest, self.size)
        return header, describe(header)

    def _record(self, number: int, entry: Any) -> Record:
        kind = entry.get("kind") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or kind not in KINDS:
            hint = f"{nearest(str(kind)[:64], KINDS)} A newer Trocar may know it; nothing was changed."
            raise self.fail(f"operation {number} is of the unknown kind {str(kind)[:64]!r}", hint)
        try:
            return KINDS[kind].Record.model_validate_json(_dumps(entry))
        except pydantic.ValidationError as error:
            raise self.fail(f"operation {number} ({kind}): {explain(error)}") from None

    def _compare(self, outer: dict[str, Any], header: Header) -> None:
        """Compare the table of tensors with what the operations announce, for a message that says what is wrong."""
        offset = 0
        wanted = dict(layout(header.ops))
        extra = next((name for name in outer if name != "__metadata__" and name not in wanted), None)
        if extra is not None:
            raise self.fail(f"it holds a tensor {extra[:64]!r} that no operation uses")
        for name, spec in wanted.items():
            entry = outer.get(name)
            if not isinstance(entry, dict):
                raise self.fail(f"the tensor '{name}' is missing")
            if entry.get("dtype") != spec.dtype or entry.get("shape") != list(spec.shape):
                raise self.fail(f"the tensor '{name}' is not {spec.dtype} of shape {list(spec.shape)}, as its operation says")
            if entry.get("data_offsets") != [offset, offset + spec.nbytes]:
                raise self.fail(f"the tensor '{name}' does not lie at {offset} to {offset + spec.nbytes}")
            offset += spec.nbytes

    def _tensor(self, name: str, spec: Spec, digest: Any, buffer: bytearray | None) -> None:
        """Read one tensor in pieces, hash it, and check what can be checked about its values."""
        scratch = memoryview(buffer if buffer is not None else bytearray(min(_CHUNK, spec.nbytes)))
        last, done = -1, 0
        while done < spec.nbytes:
            part = scratch[done : done + _CHUNK] if buffer is not None else scratch[: spec.nbytes - done]
            if self.file.readinto(part) != len(part):  # type: ignore[attr-defined]
                raise self.fail("its end is missing")
            digest.update(part)
            if spec.extent is not None:
                index = np.frombuffer(part, dtype="<i4" if spec.dtype == "I32" else "<i8")
                if index[0] <= last or index[-1] >= spec.extent or not bool((index[1:] > index[:-1]).all()):
                    raise self.fail(f"the indices '{name}' are not sorted, unique and from 0 to {spec.extent - 1}")
                last = int(index[-1])
            elif spec.dtype == "BOOL" and np.frombuffer(part, dtype=np.uint8).max() > 1:
                raise self.fail(f"the tensor '{name}' holds truth values other than 0 and 1")
            done += len(part)


def write(path: str | os.PathLike[str], header: Header, tensors: Mapping[str, memoryview]) -> None:
    """Write a patch file; `tensors` are the raw bytes by name. Raises PatchFormatError if the header would be too large."""
    raw, chunks = encode(header, tensors)
    if len(raw) > MAX_HEADER or len(header.ops) > MAX_OPS:
        raise PatchFormatError(
            f"The patch's header has {len(raw)} bytes.", f"At most {MAX_HEADER} bytes and {MAX_OPS} operations are read."
        )
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for chunk in chunks:
            file.write(chunk)


def encode(header: Header, tensors: Mapping[str, memoryview]) -> tuple[bytes, list[memoryview]]:
    """The header's bytes with the right digest, and the tensors' bytes in order."""
    text = describe(header)
    chunks = [tensors[name] for name, _ in layout(header.ops)]
    digest = _digest(text)
    for chunk in chunks:
        digest.update(chunk)
    done = Header(header.base, header.ops, header.effects, header.method, header.settings, header.measurements, digest.hexdigest())
    return _encode(done, text), chunks


def layout(ops: Sequence[Any]) -> list[tuple[str, Spec]]:
    """The tensors in the order of the file: wide entries first, so that each lies aligned, then by operation."""
    named = [(f"{number}.{key}", spec) for number, record in enumerate(ops) for key, spec in record.specs().items()]
    return sorted(named, key=lambda item: -DTYPES[item[1].dtype][0])


def describe(header: Header) -> str:
    """The patch's JSON without its digest, in its one form."""
    return _dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "base": header.base.model_dump(mode="json"),
            "ops": [record.model_dump(mode="json") for record in header.ops],
            "effects": [None if effect is None else effect.model_dump(mode="json") for effect in header.effects],
            "method": header.method,
            "settings": header.settings,
            "measurements": list(header.measurements),
        }
    )


def strict_json(raw: bytes) -> Any:
    """JSON without repeated keys, NaN, infinities, numbers of absurd length or halves of characters. Raises ValueError, RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    def refuse(text: str) -> Any:
        raise ValueError(f"{text[:20]} is not a number that can be kept")

    def whole(text: str) -> int:
        return int(text) if len(text) <= 20 else refuse(text)

    def real(text: str) -> float:
        value = float(text) if len(text) <= 40 else refuse(text)
        return value if abs(value) != float("inf") else refuse(text)

    value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_int=whole, parse_float=real)
    if rb"\ud" in raw.lower():
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be encoded
    return value


def plain(value: Any, what: str) -> Any:
    """A deep copy of JSON-able data. Raises PatchFormatError for anything that JSON cannot say, such as NaN."""
    try:
        copied = strict_json(_dumps(value).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise PatchFormatError(
            f"The patch's {what} cannot be written as JSON: {error}.", "Use numbers, texts, lists and mappings; no NaN."
        ) from None
    if _depth(copied) > MAX_DEPTH - 2:
        raise PatchFormatError(f"The patch's {what} are nested more than {MAX_DEPTH - 2} levels deep.", "Flatten them.")
    return copied


def _encode(header: Header, text: str) -> bytes:
    return _outer(json.dumps(json.loads(text) | {"digest": header.digest}, **_STYLE), header.ops)


def _outer(described: str, ops: Sequence[Any]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"trocar": described}}
    offset = 0
    for name, spec in layout(ops):
        table[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=True).encode()
    return raw + b" " * (-len(raw) % 8)


_STYLE: dict[str, Any] = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": True, "allow_nan": False}


def _dumps(value: Any) -> str:
    return json.dumps(value, **_STYLE)


def _digest(text: str) -> Any:
    digest = hashlib.blake2b(digest_size=32)
    digest.update(text.encode() + b"\0")
    return digest


def _depth(value: Any) -> int:
    """How deep lists and mappings are nested, without recursion."""
    level, depth = [value], 0
    while level:
        depth += 1
        level = [item for one in level if isinstance(one, dict | list) for item in (one.values() if isinstance(one, dict) else one)]
    return depth
