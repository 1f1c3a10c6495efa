"""Floor 3: a change to a model as data - apply, revert, stack, diff, save, merge, export.

Names are imported when they are first used, so that `read_header` works without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trocar.core.lazy import lazy

if TYPE_CHECKING:
    from trocar.patch.compare import diff
    from trocar.patch.exporting import export
    from trocar.patch.format import Header, read_header
    from trocar.patch.lora import attached, wrapped
    from trocar.patch.merge import merge_into
    from trocar.patch.ops import KINDS, Op
    from trocar.patch.ops.adapter import Adapter, Factors
    from trocar.patch.ops.experts import QuantiseExperts
    from trocar.patch.ops.gate import Gate
    from trocar.patch.ops.heads import RoundHeads
    from trocar.patch.ops.low_rank import LowRank
    from trocar.patch.ops.quantise import Quantise
    from trocar.patch.ops.remove import Remove
    from trocar.patch.ops.scale import ScaleAt
    from trocar.patch.ops.sparse import SparseReplace
    from trocar.patch.ops.vector import AddVector
    from trocar.patch.patch import Applied, Patch
    from trocar.patch.record import Base, Effect
    from trocar.patch.stacking import AppliedStack, Overlap, Stack, stack

_HOMES = {
    "compare": ("diff",),
    "exporting": ("export",),
    "format": ("Header", "read_header"),
    "lora": ("attached", "wrapped"),
    "merge": ("merge_into",),
    "ops": ("KINDS", "Op"),
    "ops.adapter": ("Adapter", "Factors"),
    "ops.experts": ("QuantiseExperts",),
    "ops.gate": ("Gate",),
    "ops.heads": ("RoundHeads",),
    "ops.low_rank": ("LowRank",),
    "ops.quantise": ("Quantise",),
    "ops.remove": ("Remove",),
    "ops.scale": ("ScaleAt",),
    "ops.sparse": ("SparseReplace",),
    "ops.vector": ("AddVector",),
    "patch": ("Applied", "Patch"),
    "record": ("Base", "Effect"),
    "stacking": ("AppliedStack", "Overlap", "Stack", "stack"),
}
__all__ = [
    "KINDS", "Adapter", "AddVector", "Applied", "AppliedStack", "Base", "Effect", "Factors", "Gate", "Header", "LowRank", "Op",
    "Overlap", "Patch", "Quantise", "QuantiseExperts", "Remove", "RoundHeads", "ScaleAt", "SparseReplace", "Stack", "attached",
    "diff", "export", "merge_into", "read_header", "stack", "wrapped",
]  # fmt: skip

__getattr__ = lazy(__name__, _HOMES)
