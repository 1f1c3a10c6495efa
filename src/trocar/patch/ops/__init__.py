"""The operations that a patch may hold: a closed table.

To add one, write a module like `gate.py` - a `Record` (what the header says, strict), a frozen dataclass with `record`, `tensors`, `build`,
`parameters`, `plan` and `cast` - and add its row here. `plan` checks everything and returns reversible steps (`trocar.patch.actions`).
"""

from __future__ import annotations

from typing import Any

from trocar.patch.ops.adapter import Adapter
from trocar.patch.ops.experts import QuantiseExperts
from trocar.patch.ops.gate import Gate
from trocar.patch.ops.heads import RoundHeads
from trocar.patch.ops.low_rank import LowRank
from trocar.patch.ops.quantise import Quantise
from trocar.patch.ops.remove import Remove
from trocar.patch.ops.scale import ScaleAt
from trocar.patch.ops.sparse import SparseReplace
from trocar.patch.ops.vector import AddVector

Op = SparseReplace | LowRank | Gate | ScaleAt | AddVector | Remove | Adapter | Quantise | QuantiseExperts | RoundHeads

KINDS: dict[str, Any] = {
    op.kind: op for op in (SparseReplace, LowRank, Gate, ScaleAt, AddVector, Remove, Adapter, Quantise, QuantiseExperts, RoundHeads)
}
