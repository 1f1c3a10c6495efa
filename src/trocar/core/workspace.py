"""Resumable units of work: each is committed as it ends, and a killed run goes on with the next one. Floor 0."""

from __future__ import annotations

import hashlib
import json
import warnings
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

    def __init__(self, folder: str | Path, common: Mapping[str, Any] | None = None) -> None:
        """common: what belongs to the key of every unit in here (a run adds its model's fingerprint)."""
        self.folder = Path(folder)
        self.common = dict(common or {})

    def values(self, name: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """Return the JSON-able result of the unit, computing and committing it if it is not there."""
        path, digest = self.folder / f"{name}.json", self._digest(key)
        if path.exists():
            try:
                stored = read_json(path)
                if stored["key"] == digest:
                    return stored["value"]
            except (ValueError, KeyError, TypeError):
                _damaged(path)
        write_json(path, {"key": digest, "value": compute()})
        return read_json(path)["value"]  # what a resumed run will read: tuples are lists, NaN is None

    def tensors(self, name: str, key: Mapping[str, Any], compute: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the unit's tensors, computing and committing them (safetensors) if they are not there."""
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file

        path, digest = self.folder / f"{name}.safetensors", self._digest(key)
        if path.exists():
            try:
                with safe_open(path, framework="pt") as file:
                    if (file.metadata() or {}).get("key") == digest:
                        return {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118 - not a dict
            except SafetensorError:
                _damaged(path)
        result = {tensor: value.detach().cpu().contiguous() for tensor, value in compute().items()}
        with atomic_path(path) as temporary:
            save_file(result, temporary, metadata={"key": digest})
        return result

    def holds(self, name: str, key: Mapping[str, Any]) -> bool:
        """Whether the tensors of a unit are committed under this key. Reads the file's header only."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / f"{name}.safetensors", framework="pt") as file:
                return (file.metadata() or {}).get("key") == self._digest(key)
        except (OSError, SafetensorError):
            return False

    def room(self, name: str) -> Workspace:
        """A workspace in a sub-folder."""
        return Workspace(self.folder / name, self.common)

    def _digest(self, key: Mapping[str, Any]) -> str:
        whole = [self.common, key] if self.common else key
        return hashlib.blake2b(json.dumps(whole, sort_keys=True).encode(), digest_size=16).hexdigest()


def _damaged(path: Path) -> None:
    """A unit is never half-written by us; a disk or a hand did that, and the user should know."""
    warnings.warn(f"{path} is damaged; this unit is computed again.", stacklevel=3)
