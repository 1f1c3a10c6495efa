"""Rates over units before and after: success, accuracy, generalisation, locality. Floor 3.

Logits are (n, classes) tensors or arrays of the same rows before and after. States are the fingerprints of the two models.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from trocar.core.errors import MetricError
from trocar.evaluate.measurement import Measurement

States = tuple[str, str]  # fingerprints before and after
Groups = Sequence[Hashable] | None


def predictions(logits: Any) -> np.ndarray:
    """(n, classes) logits -> (n,) class with the highest logit, ties by lower index. Raises MetricError for NaN logits."""
    if hasattr(logits, "detach"):
        logits = logits.detach().float().cpu().numpy()
    logits = np.asarray(logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise MetricError(f"Logits must be of shape (n, classes), not {logits.shape}.", "Give one row per unit.")
    if np.isnan(logits).any():
        raise MetricError(f"{int(np.isnan(logits).any(1).sum())} of {len(logits)} rows of logits hold NaN.", "The model has diverged.")
    return logits.argmax(1)


def accuracy(
    before: Any,
    after: Any,
    labels: Any,
    states: States,
    name: str = "accuracy",
    groups: Groups = None,
    unit: str = "image",
) -> Measurement:
    """Share of units whose predicted class is the label."""
    truth, pair = _labels(labels), (predictions(before), predictions(after))
    if any(len(side) != len(truth) for side in pair):
        raise MetricError(f"'{name}': {len(truth)} labels for {len(pair[0])} and {len(pair[1])} predictions.", "Pair them unit by unit.")
    right = [(side == truth).astype(float) for side in pair]
    return Measurement(
        name,
        unit,
        right[0],
        right[1],
        "predicted class is the label",
        state_before=states[0],
        state_after=states[1],
        groups=groups,
        form="share",
    )


def success(
    before: Any,
    after: Any,
    labels: Any,
    states: States,
    name: str = "success",
    groups: Groups = None,
    unit: str = "edit",
) -> Measurement:
    """Success rate (SR): share of edited units that are right afterwards."""
    return accuracy(before, after, labels, states, name, groups, unit)


def locality(before: Any, after: Any, states: States, name: str = "locality", groups: Groups = None, unit: str = "image") -> Measurement:
    """Locality rate (LR): share of unrelated units predicted as before (agreement, not accuracy); an unedited model has exactly 1."""
    pair = predictions(before), predictions(after)
    if len(pair[0]) != len(pair[1]):
        raise MetricError(f"'{name}': {len(pair[0])} predictions before and {len(pair[1])} after.", "Pair them unit by unit.")
    same = (pair[0] == pair[1]).astype(float)
    scorer = "predicted class equals the one before"
    return Measurement(
        name,
        unit,
        np.ones(len(same)),
        same,
        scorer,
        state_before=states[0],
        state_after=states[1],
        better="higher",
        groups=groups,
        form="share",
    )


def generalisation_rate(right: Any, edited: Sequence[int]) -> float:
    """Leave-one-out generalisation (GR): share of a group's members that are right, the edited ones left out. NaN if none is left."""
    right = np.asarray(_labels(right), dtype=float)
    others = np.ones(len(right), bool)
    if any(not 0 <= row < len(right) for row in edited):
        raise MetricError(f"Edited rows {list(edited)} are not all members of a group of {len(right)}.", "Give rows of the group.")
    others[list(edited)] = False
    return float(right[others].mean()) if others.any() else float("nan")


def generalisation(
    before: Sequence[Any],
    after: Sequence[Any],
    edited: Sequence[Sequence[int]],
    states: States,
    groups: Groups = None,
    name: str = "generalisation",
) -> Measurement:
    """GR over several edits: `before[i]`, `after[i]` say for every member of edit i's group whether it is right, `edited[i]` which members
    were edited. An edit in a group of one has no rate: it is NaN, left out of averages, and counted."""
    rates = [[generalisation_rate(right, rows) for right, rows in zip(side, edited, strict=True)] for side in (before, after)]
    scorer = "share of the group's other members predicted right"
    return Measurement(
        name,
        "edit",
        np.array(rates[0]),
        np.array(rates[1]),
        scorer,
        state_before=states[0],
        state_after=states[1],
        groups=groups,
        form="share",
    )


def cost(name: str, unit: str, before: float, after: float, states: States, scorer: str = "counted") -> Measurement:
    """A quantity that is counted and not sampled (parameters, bytes): one unit, no interval."""
    return Measurement(
        name,
        unit,
        np.array([before]),
        np.array([after]),
        scorer,
        state_before=states[0],
        state_after=states[1],
        better="lower",
        form="number",
    )


def _labels(labels: Any) -> np.ndarray:
    return labels.detach().cpu().numpy() if hasattr(labels, "detach") else np.asarray(labels)
