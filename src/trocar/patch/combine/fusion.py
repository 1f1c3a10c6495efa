"""Fusion: the weighted means of the factors, in the space in which adapters were trained. Rank stays; cross terms arise.

    A = sum w_i A_i,  B = sum w_i B_i,  update = s B A

What the papers on linear mode connectivity of LoRA do, and what federated averaging does (arXiv 2506.05713). It differs from the
weighted sum of the updates by 1/2 sum_ij w_i w_j s (B_i - B_j)(A_i - A_j), the mismatch that the report gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trocar.patch.combine.algebra import WORK, Combined, Source, common_modules, factors_of, folded, mismatch, narrowed, report, weights_for
from trocar.patch.ops.adapter import Adapter, Factors


def fuse(parts: Sequence[Factors], weights: Sequence[float]) -> tuple[Factors, dict[str, Any]]:
    """One module."""
    wide, scale = folded(parts)
    a = sum((weight * part.a for weight, part in zip(weights, wide, strict=True)), torch.zeros((), dtype=WORK))
    b = sum((weight * part.b for weight, part in zip(weights, wide, strict=True)), torch.zeros((), dtype=WORK))
    made = narrowed(a, b, scale, parts[0])
    return made, {"mismatch": mismatch(parts, weights, made)}


def fusion(adapters: Sequence[Source], weights: Sequence[float] | None = None, *, normalise: bool = True) -> Combined:
    """Average the factors. weights: one for each adapter, equal by default, divided by their sum unless `normalise` is off.

    Raises ConfigError for adapters of other targets, shapes or ranks. Different scales are folded into B first.
    """
    names, shares = common_modules(adapters, need_rank=True), weights_for(len(adapters), weights, normalise)
    made, rows = {}, []
    for name in names:
        parts = [factors_of(adapter, name) for adapter in adapters]
        made[name], told = fuse(parts, shares)
        rows.append(report(name, made[name], parts, **told))
    return Combined(Adapter(made, adapters[0].task, adapters[0].dropout), rows)


def federated(adapters: Sequence[Source], sizes: Sequence[int]) -> Combined:
    """The server's average of its clients' adapters (FedAvg on factors, arXiv 1602.05629): fusion weighted by the clients' rows."""
    return fusion(adapters, [float(size) for size in sizes])
