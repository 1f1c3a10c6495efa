"""Screen components by a cheap estimate, verify the best exactly, and say what the screening missed. Floor 3; imports no torch.

Works for components of every kind: the estimate is any Scores, the exact value of some components comes from any function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trocar.core.errors import ScoresError
from trocar.core.seeds import derive
from trocar.locate.scores import Scores, aligned

if TYPE_CHECKING:
    from trocar.anatomy import Component

Exact = Callable[[list["Component"]], Any]


def rank_correlation(a: Scores, b: Scores) -> float:
    """Spearman's rank correlation over the components that both score; NaN if one side is constant or fewer than 3 are shared.

    Raises ScoresError for other kinds, towers or models.
    """
    from scipy.stats import spearmanr

    mine, theirs = aligned(a, b, "rank correlation")
    left, right = (np.concatenate([np.asarray(side[name], dtype=np.float64) for name in mine]) for side in (mine, theirs))
    shared = ~np.isnan(left + right)
    if shared.sum() < 3 or np.ptp(left[shared]) == 0 or np.ptp(right[shared]) == 0:
        return float("nan")
    result: Any = spearmanr(left[shared], right[shared])
    return float(result.statistic)


@dataclass(frozen=True, eq=False)
class Screening:
    """What a screening found.

    verified: exact values of the `k` components with the highest estimates (partial Scores). sampled: exact values of components drawn at
    random from the rest, None without. recall: how much of the exact top `wanted` is among the verified - exact if all exact values are
    known, else estimated from the sample, None without either. correlation: Spearman's between estimate and exact values, over all known
    exact values, else over the sample together with the verified.
    """

    estimate: Scores
    verified: Scores
    sampled: Scores | None
    wanted: int
    recall: float | None
    correlation: float

    def top(self, k: int | None = None) -> Scores:
        """The mask of the `k` (default: `wanted`) highest exact values among the verified."""
        return self.verified.top(self.wanted if k is None else k)

    def row(self) -> dict[str, Any]:
        """One row for a table."""
        return {
            "components": len(self.estimate),
            "verified": len(self.verified),
            "sampled": 0 if self.sampled is None else len(self.sampled),
            "wanted": self.wanted,
            "recall": self.recall,
            "rank correlation": self.correlation,
        }


def screen(
    estimate: Scores,
    exact: Exact,
    k: int,
    *,
    wanted: int | None = None,
    known: Scores | None = None,
    sample: int = 0,
    absolute: bool = False,
    seed: int = 0,
) -> Screening:
    """Evaluate exactly only the `k` components whose estimate is highest.

    exact(components) returns one number per component, in order; it is called once, with the verified and the sampled together.
    wanted: the size of the exact top whose recall is told (default `k`); verify more than is wanted where the estimate is coarse.
    known: exact Scores of all components, if they are known anyway (a study of the screening itself): the recall is then exact.
    sample: how many of the other components are also evaluated, drawn from `seed`; each stands for its share of them in the recall.
    absolute: both sides rank by size, whatever the sign.

    Raises ScoresError for a `k` or `wanted` outside 1..number of estimates, and for an exact value that is not a number.
    """
    total = len(estimate)
    wanted = k if wanted is None else wanted
    if not 1 <= k <= total or not 1 <= wanted <= total or sample < 0:
        raise ScoresError(
            f"Cannot verify {k}, sample {sample} and want {wanted} of {total} estimates.", f"Use numbers in 1..{total} (sample from 0)."
        )
    order = [component for component, _ in (_sized(estimate) if absolute else estimate).sorted()]
    chosen, rest = order[:k], order[k:]
    drawn = np.random.default_rng(derive(seed, "screen")).permutation(len(rest))[:sample]
    others = [rest[place] for place in sorted(drawn.tolist())]
    values = _numbers(exact([*chosen, *others]), len(chosen) + len(others))
    how = estimate.how.then("screen", verified=k, sampled=len(others))

    def scored(components: Sequence[Component], found: np.ndarray) -> Scores:
        return Scores(estimate.kind, estimate.tower, dict(zip(components, found.tolist(), strict=True)), how, partial=True)

    verified = scored(chosen, values[:k])
    sampled = scored(others, values[k:]) if others else None
    seen = scored([*chosen, *others], values) if known is None else known.with_how(estimate.how)
    return Screening(
        *(estimate, verified, sampled, wanted, _recall(chosen, rest, others, values, known, wanted, absolute)),
        rank_correlation(estimate.with_how(seen.how), seen),
    )


def _recall(
    chosen: Sequence[Component],
    rest: Sequence[Component],
    others: Sequence[Component],
    values: np.ndarray,
    known: Scores | None,
    wanted: int,
    absolute: bool,
) -> float | None:
    """The share of the exact top `wanted` that was verified. A sampled component counts for as many as it stands for."""
    if known is not None:
        top = {name for name, _ in (_sized(known) if absolute else known).ranked(wanted)}
        return len(top & {str(component) for component in chosen}) / wanted
    if rest and not others:
        return None
    weights = np.concatenate([np.ones(len(chosen)), np.full(len(others), len(rest) / max(1, len(others)))])
    order = np.argsort(-(np.abs(values) if absolute else values), kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    taken = np.clip(wanted - before, 0, weights[order])  # the weighted top: what does not fit counts in part
    return float(taken[order < len(chosen)].sum() / wanted)


def _sized(scores: Scores) -> Scores:
    groups = {name: np.abs(array) for name, array in scores.groups.items()}
    return Scores(scores.kind, scores.tower, groups, scores.how, partial=True)


def _numbers(values: Any, count: int) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (count,) or np.isnan(array).any():
        raise ScoresError(f"The exact evaluation gave {array.shape} values for {count} components, or NaN.", "Return one number for each.")
    return array


__all__ = ["Exact", "Screening", "rank_correlation", "screen"]
