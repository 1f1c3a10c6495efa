"""Comparisons at equal locality: what one method gains over another where both disturb the rest equally. Floor 3, no torch.

A single pair of (locality, generalisation) says nothing, since every method trades one for the other by its step size; so a method is
compared with the point of another's curve that lies at the same x. Reference: the evaluation of arXiv 2411.01948 in curves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trocar.core.errors import MetricError
from trocar.core.seeds import derive


def at_equal(x_points: Any, y_points: Any, x: float) -> float:
    """y at `x` on the curve through the points, by linear interpolation between neighbours in x; equal x are averaged first.

    x_points, y_points: (k,). NaN where the curve does not reach: outside its range nothing is claimed. Raises MetricError for NaN points.
    """
    xs, ys = np.asarray(x_points, float), np.asarray(y_points, float)
    if xs.ndim != 1 or xs.shape != ys.shape or xs.size == 0:
        raise MetricError(f"A curve needs as many x as y, at least one; it has {xs.shape} and {ys.shape}.", "Give both for every setting.")
    if not (np.isfinite(xs).all() and np.isfinite(ys).all()):
        raise MetricError("A curve has points that are NaN or infinite.", "Leave such settings out.")
    places, inverse = np.unique(xs, return_inverse=True)
    means = np.bincount(inverse, weights=ys) / np.bincount(inverse)
    if not places[0] <= x <= places[-1]:
        return float("nan")
    return float(np.interp(x, places, means))


@dataclass(frozen=True)
class Difference:
    """y of one method minus y of another at equal x. `x`: where; low..high: 95 % interval over groups; n: groups used; left_out: groups
    with a NaN; outside: share of resamples in which a curve did not reach x (these say nothing and are left out of the interval)."""

    x: float
    difference: float
    low: float
    high: float
    n: int
    left_out: int
    outside: float


def group_bootstrap_difference(
    x_ours: Any, y_ours: Any, x_other: Any, y_other: Any, x: float | None = None, seed: int = 0, resamples: int = 2000
) -> Difference:
    """y of `ours` minus y on the curve of `other` at equal x, with a bootstrap over groups that resamples both sides together.

    x_ours, y_ours: (groups,) for one setting or (settings, groups) for a curve; x_other, y_other: (settings, groups) with the same groups
    in the same order. x: where to compare; by default our own mean x, which needs one setting and is taken anew in every resample. Groups
    with a NaN anywhere are left out of everything and counted. If a curve does not reach x, the difference is NaN. If more than
    half of the resamples are outside, so is the interval. Raises MetricError for shapes that do not fit or fewer than two groups.
    """
    parts = [np.atleast_2d(np.asarray(part, float)) for part in (x_ours, y_ours, x_other, y_other)]
    shapes = [part.shape for part in parts]
    if shapes[0] != shapes[1] or shapes[2] != shapes[3] or shapes[0][-1] != shapes[2][-1]:
        raise MetricError(f"Curves of shapes {shapes} cannot be paired by group.", "Give (settings, groups), with equal groups.")
    ours, other = np.stack(parts[:2]), np.stack(parts[2:])  # (2, settings, groups)
    if x is None and ours.shape[1] != 1:
        raise MetricError(f"Our curve has {ours.shape[1]} settings, so x is not given by itself.", "Say at which x to compare.")
    keep = ~(np.isnan(ours).any((0, 1)) | np.isnan(other).any((0, 1)))
    ours, other, n = ours[..., keep], other[..., keep], int(keep.sum())
    if n < 2:
        raise MetricError(f"Only {n} of {keep.size} groups have values everywhere.", "A bootstrap over groups needs at least two.")

    def compare(rows: np.ndarray) -> tuple[float, float]:
        (own_x, own_y), (other_x, other_y) = ours[..., rows].mean(-1), other[..., rows].mean(-1)
        where = float(own_x[0]) if x is None else x
        own = float(own_y[0]) if x is None else at_equal(own_x, own_y, where)
        return where, own - at_equal(other_x, other_y, where)

    where, difference = compare(np.arange(n))
    generator = np.random.default_rng(derive(seed, "fronts"))
    draws = np.array([compare(generator.integers(0, n, n))[1] for _ in range(resamples)])
    outside = float(np.isnan(draws).mean())
    low, high = (float("nan"),) * 2 if outside > 0.5 or np.isnan(difference) else np.nanquantile(draws, (0.025, 0.975)).tolist()
    return Difference(where, difference, low, high, n, int(keep.size - n), outside)
