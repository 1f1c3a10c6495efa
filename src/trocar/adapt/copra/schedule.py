"""The keep-probability and the masks: pure functions of the step and the seed, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from trocar.adapt.copra.config import CopraConfig
from trocar.core.errors import ConfigError
from trocar.core.seeds import derive

Shape = Callable[[float], float]
REDRAWS = 1000  # whole masks drawn before the rule's law is sampled directly
SHAPES: dict[str, Shape] = {
    "linear": lambda x: x,
    "exp": lambda x: math.expm1(x) / math.expm1(1),
    "sine": lambda x: math.sin(math.pi * x / 2),
}


def keep_probability(step: int, total: int, config: CopraConfig | None = None, shape: Shape | None = None) -> float:
    """p(t) of optimiser step `step` = 0, 1, ...: p0 + (1 - p0) * growth(t / ceil(rho T)), and 1 from step ceil(rho T) on.

    shape: growth of one's own from 0 at 0 to 1 at 1, instead of the schedule's. The first step has p0, and the step after k finished ones
    p(k), as in the authors' callback.
    """
    config = config or CopraConfig()
    if config.schedule == "constant" and shape is None:
        return config.p0
    ramp = math.ceil(config.rho * total)
    if step >= ramp:
        return 1.0
    grown = (shape or SHAPES[config.schedule])(step / ramp)
    return min(1.0, config.p0 + (1 - config.p0) * grown)


def check_shape(shape: Shape | None) -> None:
    """Raise ConfigError for a growth that leaves [0, 1] or falls."""
    if shape is None:
        return
    values = [shape(place / 100) for place in range(101)]
    if min(values) < 0 or max(values) > 1 or any(later < earlier for earlier, later in itertools.pairwise(values)):
        raise ConfigError("The growth given as `shape` leaves [0, 1] or falls somewhere.", "It must rise from 0 at 0 to 1 at 1.")


def probabilities(step: int, total: int, groups: int, config: CopraConfig, shape: Shape | None = None) -> np.ndarray:
    """The probability of each group, before the rule that at least one is on; (groups,)."""
    if config.strategy == "progressive-dropout":  # elements drop, groups never
        return np.ones(groups)
    depth = np.linspace(0, 1, groups) if groups > 1 else np.full(1, 0.5)
    if config.strategy == "stochastic-depth":
        return 1 - config.depth_rate * depth
    p = keep_probability(step, total, config, shape)
    if config.tilt == "none":
        return np.full(groups, p)
    return p ** (0.5 + (depth if config.tilt == "high" else 1 - depth))


def draw(step: int, keep: np.ndarray, seed: int) -> np.ndarray:
    """Which groups are on at this step, (groups,) bool: independent, drawn anew as a whole until one is on; a stream of its own per step.

    With tiny probabilities that would take for ever: after `REDRAWS` empty masks the same law is drawn directly, first which group is the
    first to be on, then the groups behind it. With all probabilities 0 one group is on, each as likely (what the rule tends to).
    """
    random = np.random.default_rng(derive(seed, "copra", step))
    if not keep.any():
        return np.arange(len(keep)) == random.integers(len(keep))
    for _ in range(REDRAWS):
        mask = random.random(len(keep)) < keep
        if mask.any():
            return mask
    first = keep * np.cumprod(np.concatenate([[1.0], 1 - keep[:-1]]))
    start = random.choice(len(keep), p=first / first.sum())
    place = np.arange(len(keep))
    return (place == start) | ((place > start) & (random.random(len(keep)) < keep))


def expected_on(keep: np.ndarray) -> np.ndarray:
    """The probability that each group is on, with the rule that at least one is: p / (1 - product of (1 - p)); (groups,)."""
    if not keep.any():
        return np.full(len(keep), 1 / len(keep))
    with np.errstate(divide="ignore"):  # log of 0 where a group is always on
        some = -np.expm1(np.log1p(-keep).sum())  # exact also for tiny probabilities
    return keep / some
