"""The run folder: who owns it, whether it may be resumed, and its log. Floor 6.

Every file but `log.jsonl` is written whole or not at all (core.files), and holds nothing that differs between two equal runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trocar.core.errors import RunError
from trocar.core.files import read_json, write_json, write_text
from trocar.recipe.strict_yaml import dump_yaml, read_yaml

RECIPE, RESULT, REPORT, LOG, LOCK, IDENTITY = "recipe.yaml", "result.json", "report.html", "log.jsonl", ".lock", "units/identity.json"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own `folder` while the block runs. The kernel drops the lock with its process, so one left by a killed run is simply taken over.

    The file names process id and start time for the message only. Raises RunError if a live process holds it.
    """
    import fcntl

    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"{folder} cannot be made a run folder: {error.strerror}.", "Choose another --output.") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(handle)
            os.close(handle)
            raise RunError(f"{folder} is in use by {owner}.", "Wait for it to end, or choose another --output.") from None
        except OSError as error:
            os.close(handle)
            raise RunError(
                f"{folder} cannot be locked: {error.strerror}.", "Put the run folder on a file system that supports locks."
            ) from None
        if _is_still(path, handle):  # else its owner ended between our open and our lock, and removed the file
            break
        os.close(handle)
    try:
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")})
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _is_still(path: Path, handle: int) -> bool:
    try:
        there, mine = path.stat(), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _owner(handle: int) -> str:
    try:
        stored = json.loads(os.pread(handle, 4096, 0))
        return f"process {stored['pid']} on {stored['host']}, which started at {stored['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def claim(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write the resolved recipe into a new folder, or make sure that the folder belongs to it. Removes what a killed writer left.

    Raises RunError naming the first key that differs, or if the folder holds something that is not a run.
    """
    path = folder / RECIPE
    if not path.exists():
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in (LOCK, LOG) and not entry.name.endswith(".tmp"))
        if foreign:
            raise RunError(
                f"{folder} is not a run folder: it holds {foreign[0]} and no {RECIPE}.", "Choose another --output, or an empty one."
            )
        write_text(path, dump_yaml(recipe))
    stored = read_yaml(path)
    different = first_difference(stored, dict(recipe))
    if different:
        key, theirs, ours = different
        raise RunError(
            f"{folder} belongs to another recipe: {key} is {_shown(theirs)} there and {_shown(ours)} here.",
            "Choose another --output, or remove the folder if its results are not needed.",
        )
    for left in folder.rglob(".*.tmp"):
        left.unlink(missing_ok=True)


def claim_inputs(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Bind the folder to what was loaded (fingerprints of model and data, version). Raises RunError naming what has changed since."""
    path = folder / IDENTITY
    if not path.exists():
        write_json(path, inputs)
    try:
        stored = read_json(path)
    except ValueError:
        raise RunError(f"{path} is damaged.", "Nothing says any more what the units were computed for; choose another --output.") from None
    different = first_difference(stored, dict(inputs))
    if different:
        key, theirs, ours = different
        raise RunError(
            f"{folder} was started with other inputs: {key} was {_shown(theirs)} then and is {_shown(ours)} now.",
            "Restore them to resume this run, or choose another --output.",
        )


_ABSENT = object()


def first_difference(stored: Any, asked: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two plain values differ, as (dotted key, stored, asked)."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in [*asked, *(key for key in stored if key not in asked)]:
            inside = f"{path}.{key}" if path else str(key)
            found = first_difference(stored.get(key, _ABSENT), asked.get(key, _ABSENT), inside)
            if found:
                return found
        return None
    if isinstance(stored, list) and isinstance(asked, list) and len(stored) == len(asked):
        return next(
            (f for f in (first_difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(stored, asked, strict=True))) if f), None
        )
    return None if type(stored) is type(asked) and stored == asked else (path or "everything", stored, asked)


def _shown(value: Any) -> str:
    text = "not set" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Log:
    """Appends one JSON object a line to `log.jsonl`: what happened and when. The only file with times and the machine's name in it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG
        self.start = time.monotonic()

    def __call__(self, event: str, **facts: Any) -> None:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": round(time.monotonic() - self.start, 3), "event": event, **facts}
        with self.path.open("ab") as file:
            # a line that a killed run left half-written ends here
            broken = file.tell() > 0 and not _ends_with_newline(self.path)
            file.write((b"\n" if broken else b"") + json.dumps(line).encode() + b"\n")


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
