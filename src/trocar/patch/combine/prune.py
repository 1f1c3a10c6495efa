"""Pruning adapters without retraining: whole modules by where they are, or single entries by their size (as in CoTo's tables)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trocar.anatomy import module_groups
from trocar.anatomy.grouping import By
from trocar.core.errors import ConfigError, nearest
from trocar.patch.combine.algebra import WORK, Combined, Source, factors_of, report, shapes_of
from trocar.patch.ops.adapter import Adapter, Factors

WAYS = ("everyother", "otherhalf", "low", "middle", "high")


def prune(adapter: Source, keep: str | Sequence[str], *, by: By = "block", anatomy: Any = None) -> Combined:
    """Keep some groups of an adapter's modules and remove the others, which are then what they were before the adapter.

    keep: `everyother` (blocks 0, 2, 4, ... of each tower), `otherhalf` (1, 3, 5, ...: the papers do not say which half they keep, and it
    matters), `low`, `middle` or `high` (a third of the blocks), or names of groups. by: the groups, see `trocar.anatomy.module_groups`;
    anatomy: of the model, for components' names (without it blocks are counted from the modules' names). Rows say which module was kept,
    and its norm. Raises ConfigError for unknown groups, or if nothing is left.
    """
    groups = module_groups(shapes_of(adapter), by, anatomy)
    kept = _named(list(groups), keep) if isinstance(keep, str) else list(keep)
    if unknown := [name for name in kept if name not in groups]:
        raise ConfigError(f"The adapter has no group '{unknown[0]}'.", nearest(unknown[0], groups))
    names = {name: group in kept for group, members in groups.items() for name in members}
    if not any(names.values()):
        raise ConfigError("Nothing of the adapter is left.", "Without any of it the model is its base.")
    made = {name: factors_of(adapter, name) for name, stays in sorted(names.items()) if stays}
    rows = []
    for name, stays in sorted(names.items()):
        parts = [factors_of(adapter, name)]
        rows.append(report(name, parts[0], parts, kept=stays))
    return Combined(Adapter(made, adapter.task, adapter.dropout), rows)


def _named(groups: Sequence[str], keep: str) -> list[str]:
    if keep not in WAYS:
        raise ConfigError(f"'{keep}' is no way to prune.", f"{nearest(keep, WAYS)} Or give a list of groups.")
    towers: dict[str, list[str]] = {}
    for name in groups:
        towers.setdefault(name.rpartition(".")[0], []).append(name)
    if keep in ("everyother", "otherhalf"):
        return [name for members in towers.values() for name in members[keep == "otherhalf" :: 2]]
    return [name for members in towers.values() for name in np.array_split(members, 3)[("low", "middle", "high").index(keep)]]


def magnitude(adapter: Source, share: float) -> Combined:
    """Set the smallest `share` of the entries of each A and each B to zero (unstructured pruning). Raises ConfigError outside of [0, 1)."""
    if not 0 <= share < 1:
        raise ConfigError(f"A share of {share} cannot be removed.", "Use 0 or more, and less than 1.")
    made, rows = {}, []
    for name in sorted(shapes_of(adapter)):
        factors = factors_of(adapter, name)
        made[name] = Factors(_thinned(factors.a, share), _thinned(factors.b, share), factors.scale, factors.transposed)
        rows.append(report(name, made[name], [factors], zeros=float((made[name].a == 0).double().mean())))
    return Combined(Adapter(made, adapter.task, adapter.dropout), rows)


def _thinned(part: torch.Tensor, share: float) -> torch.Tensor:
    order = part.abs().to(WORK).flatten().argsort(stable=True)
    thinned = part.clone().flatten()
    thinned[order[: round(share * len(order))]] = 0
    return thinned.reshape(part.shape)
