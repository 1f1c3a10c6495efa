"""A measurement: what a number was before and after, unit by unit, and how sure its difference is. Floor 3, no torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from trocar.core.errors import MetricError, nearest
from trocar.core.seeds import derive

Average = Literal["mean", "median", "exp_mean"]
RESAMPLES = 2000


@dataclass(frozen=True)
class Summary:
    """What a measurement says. Numbers that the data do not allow are NaN (an interval of one unit, a p-value without pairs).

    n: units used; n_groups: groups used (0 without groups); left_out, left_out_groups: units and groups without a value (NaN on a
    side); before, after: averages; difference: after - before, with its 95 % interval low..high; ratio: after / before;
    p: two-sided, exact McNemar if all values are 0 or 1 and there are no groups, else a paired permutation test; test: which of them;
    interval: `bootstrap`, or `exact` where all units of a 0/1 measurement changed alike and a bootstrap could only repeat them.
    """

    n: int
    n_groups: int
    left_out: int
    left_out_groups: int
    before: float
    after: float
    difference: float
    low: float
    high: float
    ratio: float
    p: float
    test: str
    interval: str

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Measurement:
    """One quantity on the same units before and after a change.

    name: what is measured (`success`, `locality.random`); unit: what one value belongs to (`image`, `prompt`, `edit`, `window`);
    before, after: (n,) values in the same order, NaN where a unit has none; scorer: how a value is made, in words; state_before,
    state_after: fingerprints of the two models; better: which way is good (`same`: it should not move); groups: (n,) labels - values
    are averaged inside a group, then over groups, and whole groups are resampled; average: `mean`, `median` (latencies) or `exp_mean`
    (perplexity from nats per token); weights: (n,) e.g. tokens per window; form: `share` is shown in percent, `number` as it is.
    Raises MetricError when lengths differ, there are no units, or values are infinite.
    """

    name: str
    unit: str
    before: np.ndarray
    after: np.ndarray
    scorer: str
    state_before: str
    state_after: str
    better: Literal["higher", "lower", "same"] = "higher"
    groups: Sequence[Hashable] | None = None
    average: Average = "mean"
    weights: np.ndarray | None = None
    form: Literal["share", "number"] | None = None

    def __post_init__(self) -> None:
        for side in ("before", "after", "weights"):
            if getattr(self, side) is not None:
                object.__setattr__(self, side, column_of(self.name, side, getattr(self, side)))
        for field, known in (("better", ("higher", "lower", "same")), ("average", ("mean", "median", "exp_mean"))):
            if getattr(self, field) not in known:
                raise MetricError(
                    f"Measurement '{self.name}': {field} is '{getattr(self, field)}'.", nearest(str(getattr(self, field)), known)
                )
        n = len(self.before)
        lengths = {"after": self.after, "groups": self.groups, "weights": self.weights}
        for side, column in lengths.items():
            if column is not None and len(column) != n:
                raise MetricError(f"Measurement '{self.name}': {n} values before, but {len(column)} in {side}.", "Pair them unit by unit.")
        if n == 0:
            raise MetricError(f"Measurement '{self.name}' has no {self.unit}s.", "Measure at least one.")
        if self.weights is not None and not (self.weights > 0).all():
            raise MetricError(f"Measurement '{self.name}' has weights that are not positive.", "Leave out units that do not count.")
        if self.weights is not None and self.average == "median":
            raise MetricError(f"Measurement '{self.name}': a median takes no weights.", "Use the mean, or no weights.")
        if self.groups is not None:
            object.__setattr__(self, "groups", tuple(self.groups))
        if self.form is None:
            object.__setattr__(self, "form", "share" if self.binary else "number")

    @property
    def binary(self) -> bool:
        """All values are 0, 1 or NaN."""
        return bool(np.isin(self.before[~np.isnan(self.before)], (0, 1)).all() and np.isin(self.after[~np.isnan(self.after)], (0, 1)).all())

    def summary(self, seed: int = 0, resamples: int = RESAMPLES) -> Summary:
        """Averages, difference with its 95 % interval and p-value. Equal seeds give equal numbers.

        Interval: paired percentile bootstrap over units, or over groups. p: exact McNemar for 0/1 without groups; else a permutation
        test that swaps the two sides of pairs (a bootstrap's own p-value is far too small for a handful of units).
        A unit with NaN on either side is left out of both; a group without units left is left out; both are counted.
        Raises MetricError when no unit is left.
        """
        keep = ~(np.isnan(self.before) | np.isnan(self.after))
        if not keep.any():
            raise MetricError(f"Measurement '{self.name}': none of its {keep.size} {self.unit}s has a value on both sides.", "Add units.")
        pairs = np.stack([self.before, self.after], axis=1)[keep]
        weights = np.ones(len(pairs)) if self.weights is None else self.weights[keep]
        lost_groups = n_groups = 0
        if self.groups is not None:
            labels = [label for label, kept in zip(self.groups, keep.tolist(), strict=True) if kept]
            pairs, n_groups = _group_averages(pairs, weights, labels, self.average), len(set(labels))
            weights, lost_groups = np.ones(n_groups), len(set(self.groups)) - n_groups
        before, after = _average(pairs[None], weights[None], self.average)[0].tolist()
        difference = after - before
        draws = _bootstrap(pairs, weights, self.average, derive(seed, "bootstrap", self.name), resamples) if len(pairs) > 1 else None
        low, high = (float("nan"),) * 2 if draws is None else np.quantile(draws, (0.025, 0.975)).tolist()
        exact = self.binary and self.groups is None
        interval = "bootstrap"
        if exact and len(pairs) > 1 and low == high:
            low, high, interval = *_alike(len(pairs), before, after), "exact"
        if exact:
            p, test = _mcnemar(pairs), "McNemar, exact"
        else:
            p = _permutation_p(pairs, weights, self.average, difference, derive(seed, "permutation", self.name), resamples)
            test = "permutation of groups" if self.groups is not None else "permutation"
        ratio = after / before if before else float("nan")
        lost = int((~keep).sum())
        return Summary(int(keep.sum()), n_groups, lost, lost_groups, before, after, difference, low, high, ratio, p, test, interval)


def column_of(name: str, side: str, values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    try:
        column = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise MetricError(f"Measurement '{name}': {side} is not a list of numbers.", "Give one number a unit.") from None
    if column.ndim != 1:
        raise MetricError(f"Measurement '{name}': {side} has shape {column.shape}.", "Give one number a unit.")
    if np.isinf(column).any():
        raise MetricError(f"Measurement '{name}': {int(np.isinf(column).sum())} values {side} are infinite.", "Find where they arise.")
    column.setflags(write=False)
    return column


def _average(pairs: np.ndarray, weights: np.ndarray, average: Average) -> np.ndarray:
    """(r, n, 2) values and (r, n) weights -> (r, 2) averages."""
    if average == "median":
        return np.median(pairs, axis=1)
    means = (pairs * weights[..., None]).sum(1) / weights.sum(1)[:, None]
    return np.exp(means) if average == "exp_mean" else means


def _group_averages(pairs: np.ndarray, weights: np.ndarray, labels: Sequence[Hashable], average: Average) -> np.ndarray:
    """One row a group, in order of first appearance (so that the draw does not depend on how labels hash). Perplexities stay in nats."""
    rows: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    inner: Average = "mean" if average == "exp_mean" else average
    return np.stack([_average(pairs[None, index], weights[None, index], inner)[0] for index in rows.values()])


def _bootstrap(pairs: np.ndarray, weights: np.ndarray, average: Average, seed: int, resamples: int) -> np.ndarray:
    """(resamples,) differences of averages over units drawn with replacement, both sides of a pair together."""
    generator, n, draws = np.random.default_rng(seed), len(pairs), []
    step = max(1, 2_000_000 // n)  # bounded memory for many units
    for start in range(0, resamples, step):
        index = generator.integers(0, n, (min(step, resamples - start), n))
        averages = _average(pairs[index], weights[index], average)
        draws.append(averages[:, 1] - averages[:, 0])
    return np.concatenate(draws)


def _permutation_p(pairs: np.ndarray, weights: np.ndarray, average: Average, observed: float, seed: int, resamples: int) -> float:
    """Two-sided p under "before and after are exchangeable": all 2^n swaps of pairs up to 12 pairs, else `resamples` random ones."""
    n = len(pairs)
    if n < 2:
        return float("nan")
    exact = n <= 12
    generator, extreme = np.random.default_rng(seed), 0
    total = 2**n if exact else resamples
    step = max(1, 2_000_000 // n)
    for start in range(0, total, step):
        rows = np.arange(start, min(start + step, total))
        swap = (rows[:, None] >> np.arange(n)) & 1 if exact else generator.integers(0, 2, (rows.size, n))
        averages = _average(np.where(swap[..., None] == 1, pairs[:, ::-1], pairs), np.broadcast_to(weights, (rows.size, n)), average)
        extreme += int((np.abs(averages[:, 1] - averages[:, 0]) >= abs(observed) * (1 - 1e-9) - 1e-12).sum())
    return extreme / total if exact else (extreme + 1) / (total + 1)


def _mcnemar(pairs: np.ndarray) -> float:
    """Exact McNemar: are gains (0 -> 1) and losses (1 -> 0) equally likely? (McNemar 1947; binomial on the discordant pairs.)"""
    from scipy.stats import binomtest

    gained, lost = int((pairs[:, 1] > pairs[:, 0]).sum()), int((pairs[:, 1] < pairs[:, 0]).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _alike(n: int, before: float, after: float) -> tuple[float, float]:
    """Interval of the difference when all n units of a 0/1 measurement changed alike, from the exact (Clopper-Pearson) bound on the share
    of units that change otherwise. 200 of 200 unchanged does not prove 0: at most 1.8 % of all units may change."""
    bound = 1 - 0.025 ** (1 / n)
    if before == after:
        return -min(bound, before), min(bound, 1 - before)
    return (1 - bound, 1.0) if after > before else (-1.0, bound - 1)
