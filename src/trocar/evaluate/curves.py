"""Linear mode connectivity: what a model is worth on the straight way between two adapters, and how deep it falls. Floor 3, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trocar.core.errors import MetricError
from trocar.core.progress import track


@dataclass(frozen=True)
class Curve:
    """Values on the way from one end (0) to the other (1). barrier: how far the curve lies below the chord, at its worst place `at`;
    0 if it never does (arXiv 1912.05671, in the form of CoTo's section on connectivity)."""

    places: np.ndarray
    values: np.ndarray

    @property
    def sag(self) -> np.ndarray:
        """Chord minus curve at every place."""
        return (1 - self.places) * self.values[0] + self.places * self.values[-1] - self.values

    @property
    def barrier(self) -> float:
        return float(self.sag.max())

    @property
    def at(self) -> float:
        return float(self.places[int(self.sag.argmax())])

    def rows(self, **more: object) -> list[dict[str, object]]:
        return [{**more, "place": place, "value": value} for place, value in zip(self.places.tolist(), self.values.tolist(), strict=True)]


def connectivity(value: Callable[[float], float], points: int = 11) -> Curve:
    """Evaluate `value(place)` on an even grid from 0 to 1, ends included. Larger is better. 11 points as in the papers.

    value: of the model with the adapter there, for example of `fusion([first, second], [1 - place, place])`.
    """
    if points < 3:
        raise MetricError(f"{points} points show no barrier.", "Use at least 3.")
    places = np.linspace(0, 1, points)
    values = np.array([float(value(float(place))) for place in track(list(places), "connectivity")])
    if not np.isfinite(values).all():
        raise MetricError("A value on the way between the adapters is not finite.", "Choose a bounded value.")
    return Curve(places, values)


def barrier(values: Sequence[float]) -> float:
    """The barrier of values on an even grid, ends included."""
    found = np.asarray(values, dtype=float)
    return Curve(np.linspace(0, 1, len(found)), found).barrier
