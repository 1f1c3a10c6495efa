"""From measured rows to relations: gains at equal locality, intervals over groups, and what cannot be compared is not claimed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import where_to_edit_relations as relations
import where_to_edit_table


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(where_to_edit_table, "RESAMPLES", 40)


class Base:
    """A base model whose rows are given: name -> (generalisation, locality) per group, two edits each."""

    def __init__(self, name, rows, groups=6):
        self.name, self.kind, self.seed, self.groups = name, "cifar", 0, list(range(groups))
        self.rows, self.noise = rows, np.random.default_rng(0).normal(0, 0.01, groups)

    def has(self, row):
        return row.name in self.rows

    def measure(self, row):
        gr, locality = self.rows[row.name]
        group = [g for g in self.groups for _ in range(2)]
        same = [locality] * len(group)
        return {
            **{"group": group, "sr": [1.0] * len(group), "gr": [gr + self.noise[g] for g in group], "lrs": same, "lrr": same},
            **{"accuracy": same, "steps": [3] * len(group), "status": ["converged"] * len(group)},
        }


YARD = {name: (0.3 + 0.05 * i, 0.9 - 0.05 * i) for i, name in enumerate(relations.YARD_2)}  # GR falls by 1 where locality rises by 1


def table(*more):
    bases = [Base(f"cifar:{i}", {**YARD, **rows}) for i, rows in enumerate(more)]
    names = {name for base in bases for name in base.rows}
    return relations.Table(bases, [SimpleNamespace(name=name, method="x", more="", keep=1, lr=1, tau=1) for name in names]), bases


def test_gain_is_measured_at_the_editors_own_locality():
    found, _ = table({"a": (0.75, 0.7), "b": (0.6, 0.8)})
    mean = found.estimate(lambda v: relations.gain(v, "a", relations.YARD_2, "lrs"))
    assert mean["mean"] == pytest.approx(25, abs=1e-6)  # the yardstick has .5 at locality .7
    assert relations.difference(found, ["a"], ["b"], "lrr")["mean"] == pytest.approx(5, abs=1e-6)  # .25 against .2
    assert mean["low"] <= mean["mean"] <= mean["high"]


def test_what_the_yardstick_does_not_reach_is_not_claimed():
    found, _ = table({"fo": (0.9, 0.2)}, {"fo": (0.9, 0.7)})
    estimate = found.estimate(lambda v: relations.gain(v, "fo", relations.YARD_2, "lrs"))
    assert estimate["per_base"] == {"cifar:0": None, "cifar:1": pytest.approx(40)}
    assert estimate["mean"] == pytest.approx(40)
    unreached, _ = table({"fo": (0.9, 0.2)})
    assert unreached.estimate(lambda v: relations.gain(v, "fo", relations.YARD_2, "lrs"))["low"] is None


def test_relations_hold_or_fail():
    fo, random = relations.masked("fo"), relations.masked("random")
    good, bases = table({fo: (0.75, 0.7), random: (0.6, 0.7)}, {fo: (0.7, 0.7), random: (0.6, 0.7)})
    for base in bases:
        base.trained = lambda kind="fo": False
    found = {row["id"]: row for row in relations.relations(good, "cifar", bases)}
    assert found["R5/cifar"]["holds"]
    assert found["R5/cifar"]["values"]["sensitive"]["mean"] == pytest.approx(12.5)
    assert found["R6/cifar"]["holds"]
    assert found["R1/cifar"]["holds"]
    bad, bases = table({fo: (0.45, 0.7), random: (0.6, 0.7)}, {fo: (0.5, 0.7), random: (0.6, 0.7)})
    for base in bases:
        base.trained = lambda kind="fo": False
    assert not {row["id"]: row for row in relations.relations(bad, "cifar", bases)}["R6/cifar"]["holds"]
