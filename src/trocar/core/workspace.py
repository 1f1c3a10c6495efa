"""Resumable units of work: each is committed as it ends, and a killed run goes on with the next one. Floor 0."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trocar.core.files import atomic_path, read_json, write_json

if TYPE_CHECKING:
    import torch


class Workspace:
    """A folder of committed units. A unit is a named computation with a key (everything its result depends on, as JSON).

    A result is reused only if its stored key is equal, so a changed setting or another model can never be served an old answer.
    Computations must draw randomness from `trocar.core.seeds`, so that a resumed run gives the same bytes as an uninterrupted one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def values(self, name: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """Return the JSON-able result of the unit, computing and committing it if it is not there."""
        path = self.folder / f"{name}.json"
        if path.exists():
            stored = read_json(path)
            if stored["key"] == _digest(key):
                return stored["value"]
        write_json(path, {"key": _digest(key), "value": compute()})
        return read_json(path)["value"]  # what a resumed run will read: tuples are lists, NaN is None

    def tensors(self, name: str, key: Mapping[str, Any], compute: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the unit's tensors, computing and committing them (safetensors) if they are not there."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        path = self.folder / f"{name}.safetensors"
        if path.exists():
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") == _digest(key):
                    return {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118 - not a dict
        result = {tensor: value.detach().cpu().contiguous() for tensor, value in compute().items()}
        with atomic_path(path) as temporary:
            save_file(result, temporary, metadata={"key": _digest(key)})
        return result

    def room(self, name: str) -> Workspace:
        """A workspace in a sub-folder."""
        return Workspace(self.folder / name)


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
