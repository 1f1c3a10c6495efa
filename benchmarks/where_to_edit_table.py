"""Measured rows of `where_to_edit.py` as arrays, and editors compared at equal locality.

Editors trade generalisation for locality by their step size and stop rule, so an editor's gain is its generalisation rate minus that of the
dense fine-tuning curve where that disturbs equally many predictions. Yardstick 2, the curve used unless said otherwise, is dense
fine-tuning with small steps and the stop threshold as the knob; yardstick 1 has the step size as the knob. Intervals are 95 %, from
resampling failure groups within each base model; means are over base models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trocar.core.seeds import derive
from trocar.evaluate.fronts import at_equal

RESAMPLES = 1000
SETS = {"lrs": "sensitive", "lrr": "random"}
Values = Callable[[str, str], float]  # (row's name, metric) -> mean over groups
Yard = Sequence[str]


def small_steps(tau: float = 0.3) -> str:
    return f"dense lr 0.0001 tau {tau:g}"


YARD_2 = [*(small_steps(tau) for tau in (3.0, 0.9, 0.3, 0.1, 0.03, 0.01)), "dense lr 0.0002 tau 0.01", "dense lr 0.0002 tau 0.001"]
YARD_1 = [f"dense lr {lr} tau 0.3" for lr in ("3e-05", "0.0001", "0.0003", "0.001")]


def masked(method: str, keep: float = 0.05, lr: str = "0.001", tau: float = 0.3, seed: int = 0) -> str:
    return f"{method} keep {keep:g} lr {lr} tau {tau:g}" + (f" seed {seed}" if method == "random" else "")


def by_group(row: Mapping[str, Any], metric: str, count: int) -> np.ndarray:
    """(groups,) mean over a group's edits, in percent."""
    group, values = np.array(row["group"]), np.array([np.nan if v is None else v for v in row[metric]], float)
    return np.array([100 * np.nanmean(values[group == g]) for g in range(count)])


class Table:
    """All rows of the base models of one data set as (groups,) arrays."""

    def __init__(self, bases: Sequence[Any], rows: Sequence[Any]) -> None:
        self.bases = [base.name for base in bases]
        self.rows = {row.name: row for row in rows if all(base.has(row) for base in bases)}
        self.data = {
            base.name: {
                name: {m: by_group(base.measure(row), m, len(base.groups)) for m in ("sr", "gr", "lrs", "lrr", "accuracy", "steps")}
                for name, row in self.rows.items()
            }
            for base in bases
        }
        self.counts = {base.name: len(base.groups) for base in bases}
        self._index: dict[str, np.ndarray] = {}
        self._means: dict[tuple[str, str, str], np.ndarray] = {}

    def means(self, base: str, row: str, metric: str) -> np.ndarray:
        """(1 + resamples,) means over groups: all groups first, then every resample; the same resamples for all rows."""
        key = (base, row, metric)
        if key not in self._means:
            if base not in self._index:
                n = self.counts[base]
                drawn = np.random.default_rng(derive(0, "groups", base)).integers(0, n, (RESAMPLES, n))
                self._index[base] = np.concatenate([np.arange(n)[None], drawn])
            self._means[key] = np.nanmean(self.data[base][row][metric][self._index[base]], axis=1)
        return self._means[key]

    def estimate(self, statistic: Callable[[Values], float]) -> dict[str, Any]:
        """Mean over bases of a statistic of group means, with its interval and each base's value; NaN where a curve does not reach."""

        each = {base: statistic(lambda row, metric, b=base: float(self.means(b, row, metric)[0])) for base in self.bases}
        draws = np.array(
            [
                [statistic(lambda row, metric, b=base, i=i: float(self.means(b, row, metric)[i])) for base in self.bases]
                for i in range(1, RESAMPLES + 1)
            ]
        )
        usable = [base for base in self.bases if np.isfinite(each[base])]
        columns = [self.bases.index(base) for base in usable]
        if not usable:
            return {"mean": None, "low": None, "high": None, "per_base": {b: _short(v) for b, v in each.items()}}
        whole = np.isfinite(draws[:, columns]).all(axis=1)  # resamples in which every such curve reached; the others say nothing
        reached = draws[whole][:, columns]
        low, high = np.quantile(reached.mean(axis=1), (0.025, 0.975)) if whole.mean() > 0.5 else (float("nan"),) * 2
        return {
            "mean": _short(float(np.mean([each[base] for base in usable]))),
            "low": _short(float(low)),
            "high": _short(float(high)),
            "reached": _short(float(whole.mean())),
            "per_base": {b: _short(v) for b, v in each.items()},
        }


def _short(value: float) -> float | None:
    return round(value, 3) if np.isfinite(value) else None


def gain(v: Values, row: str, yard: Yard, x: str) -> float:
    """Generalisation of `row` minus the yardstick's at the same locality `x`."""
    return v(row, "gr") - at_equal([v(name, x) for name in yard], [v(name, "gr") for name in yard], v(row, x))


def difference(table: Table, one: Sequence[str], other: Sequence[str], x: str, yard: Yard = YARD_2) -> dict[str, Any]:
    """Gain of `one` minus gain of `other`, each at its own locality (rows of a list are averaged: seeds)."""

    def statistic(v: Values) -> float:
        sides = [float(np.mean([gain(v, row, yard, x) for row in rows])) for rows in (one, other)]
        return sides[0] - sides[1]

    return table.estimate(statistic)


def weakest(estimates: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The estimate with the lowest lower end: the one that decides whether all of them are above zero."""
    return min(estimates.values(), key=lambda e: float("-inf") if e["low"] is None else e["low"])
