"""Floor 3: a change to a model as data - apply, revert, stack, diff, save, merge, export.

Names are imported when they are first used, so that `read_header` works without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trocar.patch.format import Header, read_header
    from trocar.patch.ops import KINDS, Op
    from trocar.patch.ops.adapter import Adapter, Factors
    from trocar.patch.ops.gate import Gate
    from trocar.patch.ops.low_rank import LowRank
    from trocar.patch.ops.remove import Remove
    from trocar.patch.ops.sparse import SparseReplace
    from trocar.patch.ops.vector import AddVector
    from trocar.patch.patch import Applied, Patch
    from trocar.patch.record import Base, Effect

_HOMES = {
    "format": ("Header", "read_header"),
    "ops": ("KINDS", "Op"),
    "ops.adapter": ("Adapter", "Factors"),
    "ops.gate": ("Gate",),
    "ops.low_rank": ("LowRank",),
    "ops.remove": ("Remove",),
    "ops.sparse": ("SparseReplace",),
    "ops.vector": ("AddVector",),
    "patch": ("Applied", "Patch"),
    "record": ("Base", "Effect"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [
    "KINDS", "AddVector", "Adapter", "Applied", "Base", "Effect", "Factors", "Gate", "Header", "LowRank", "Op", "Patch", "Remove",
    "SparseReplace", "read_header",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
