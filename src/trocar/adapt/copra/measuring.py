"""What adapters of one task are measured by: alone, between seeds, pruned, block by block. Every number is a committed unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trocar.adapted import Measured, digest
from trocar.anatomy import Anatomy, fingerprint
from trocar.anatomy.grouping import By, module_groups
from trocar.core.workspace import Workspace
from trocar.evaluate import Task, TaskScores
from trocar.locate import Shapley, shapley_values
from trocar.locate.games import adapter_game
from trocar.patch import Adapter, attached
from trocar.patch.combine import prune
from trocar.patch.combine.algebra import norm


def worth(
    model: Any, adapter: Adapter, probe: Task, work: Workspace, label: str, *, by: By, method: Any, orders: int, batch_size: int, seed: int
) -> Shapley:
    """The Shapley values of an adapter's groups; the value of a coalition is the mean log-likelihood of the probe's rows."""

    def compute() -> dict[str, Any]:
        with attached(model, adapter) as outer:
            game = adapter_game(outer, probe.inputs, probe.scored, by=by, batch_size=batch_size)
            found = shapley_values(game, method, orders=orders, seed=seed)
        return {
            "players": list(found.players), "values": found.values.tolist(), "errors": found.errors.tolist(), "total": found.total,
            "empty": found.empty, "evaluations": found.evaluations, "method": found.method, "settings": dict(found.settings),
            "row_errors": None if found.row_errors is None else found.row_errors.tolist(),
        }  # fmt: skip

    key = {
        "model": fingerprint(model),
        "adapter": digest(adapter),
        "task": probe.digest(),
        "by": by,
        "method": method,
        "orders": orders,
        "seed": seed,
    }
    unit = work.values(f"shapley-{label}", key, compute)
    return Shapley(
        tuple(unit["players"]), np.array(unit["values"]), np.array(unit["errors"]), unit["total"], unit["empty"], unit["evaluations"],
        unit["method"], unit["settings"], None if unit.get("row_errors") is None else np.array(unit["row_errors"]),
    )  # fmt: skip


def orders_of_removal(model: Any, adapter: Adapter, found: Shapley | None, by: By, seed: int) -> dict[str, list[str]]:
    """In which order an adapter's groups are removed: lowest Shapley value first, smallest update first, last blocks first, at random."""
    groups = module_groups(adapter.factors, by, Anatomy.of(model))
    sizes = {
        group: float(np.sqrt(sum((f.scale * norm(f.b, f.a)) ** 2 for f in map(adapter.factors.__getitem__, names))))
        for group, names in groups.items()
    }
    ways = {
        "smallest update first": sorted(groups, key=sizes.__getitem__),
        "last blocks first": list(groups)[::-1],
        "at random": [list(groups)[place] for place in np.random.default_rng(seed).permutation(len(groups))],
    }
    if found is None:
        return ways
    values = dict(zip(found.players, found.values.tolist(), strict=True))
    return {"lowest Shapley value first": sorted(groups, key=values.__getitem__), **ways}


def removal(measured: Measured, adapter: Adapter, order: Sequence[str], by: By, label: str) -> list[float]:
    """Share of right rows with the first 0, 1, ..., all groups of `order` removed, (groups + 1,)."""
    anatomy, found = Anatomy.of(measured.model), []
    for removed in range(len(order) + 1):
        kept = list(order[removed:])
        left = prune(adapter, kept, by=by, anatomy=anatomy).adapter if kept else None
        found.append(measured(left, f"{label}-{removed}" if kept else "base").accuracy)
    return found


def pruned(measured: Measured, adapter: Adapter, ways: Sequence[str], by: By, label: str) -> Mapping[str, TaskScores]:
    """Scores after each way of pruning by place, see `trocar.patch.combine.prune`."""
    anatomy = Anatomy.of(measured.model)
    return {way: measured(prune(adapter, way, by=by, anatomy=anatomy).adapter, f"{label}-{way}") for way in ways}
