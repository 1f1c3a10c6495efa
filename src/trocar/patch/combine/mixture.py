"""Mixture: the weighted sum of the updates themselves, which is also the mean of the modules' outputs ("ensemble" in the papers' tables).

    update = sum w_i s_i B_i A_i

Exact, at a rank that adds up; `rank` gives the best approximation of that rank (two thin QR decompositions and one small SVD).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trocar.core.errors import ConfigError
from trocar.patch.combine.algebra import Combined, Source, common_modules, core, factors_of, narrowed, report, stacked, weights_for
from trocar.patch.ops.adapter import Adapter, Factors


def mix(parts: Sequence[Factors], weights: Sequence[float], rank: int | None = None) -> tuple[Factors, dict[str, Any]]:
    """One module."""
    b, a = stacked(parts, weights)
    if rank is None:
        return narrowed(a, b, 1.0, parts[0]), {}
    q, middle, p = core(b, a)
    left, sizes, right = torch.linalg.svd(middle)
    kept = min(rank, len(sizes))
    root = sizes[:kept].sqrt()
    a, b = (p @ right[:kept].T * root).T, q @ left[:, :kept] * root
    lost = float(sizes[kept:].norm() / sizes.norm()) if float(sizes.norm()) else 0.0
    if kept < rank:  # every module gets the rank that was asked for
        a = torch.cat([a, a.new_zeros(rank - kept, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], rank - kept)], 1)
    return narrowed(a, b, 1.0, parts[0]), {"lost": lost}


def mixture(
    adapters: Sequence[Source], weights: Sequence[float] | None = None, *, rank: int | None = None, normalise: bool = True
) -> Combined:
    """Average the updates. rank: of the result; None: exact, the ranks add up. weights: as in `fusion`; 1 and 1 with `normalise` off adds.

    `lost` in the rows is the share of the norm that the rank cost. Raises ConfigError for adapters of other targets or shapes.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"A rank of {rank} cannot be.", "Use 1 or more.")
    names, shares = common_modules(adapters, need_rank=False), weights_for(len(adapters), weights, normalise)
    made, rows = {}, []
    for name in names:
        parts = [factors_of(adapter, name) for adapter in adapters]
        made[name], told = mix(parts, shares, rank)
        rows.append(report(name, made[name], parts, **told))
    return Combined(Adapter(made, adapters[0].task, adapters[0].dropout), rows)


ensemble = mixture
