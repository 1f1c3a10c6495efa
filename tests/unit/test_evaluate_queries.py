"""Measurements over an edit's queries: against the definitions, spelled out in plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.core.errors import MetricError
from trocar.evaluate import QueryScores, contains_answer, query_measurements, relative_change, relative_changes, relative_rows

STATES = "b" * 32, "a" * 32
NAN = float("nan")
SETS = (
    "edited",
    "edited",
    "paraphrase",
    "paraphrase",
    "paraphrase",
    "generalisation",
    "unrelated.hard",
    "unrelated.easy",
    "unrelated.easy",
)
CASES = ("x", "y", "x", "x", "y", "x", "x", "x", "y")
BEFORE = QueryScores(
    SETS, CASES,
    answer=[0.1, 0.2, 0.1, 0.3, 0.5, 0.01, 0.9, 0.8, 0.7],
    wrong=[0.5, 0.1, 0.6, 0.2, 0.1, NAN, NAN, NAN, NAN],
    target=[NAN, NAN, NAN, NAN, NAN, NAN, 0.01, 0.02, 0.0],
    generated=[0, 1, 0, 1, 1, 0, 1, 1, NAN],
    first=[1, 2, 3, 4, 5, 6, 7, 8, -1],
)  # fmt: skip
AFTER = QueryScores(
    SETS, CASES,
    answer=[0.8, 0.1, 0.4, 0.2, 0.5, 0.03, 0.9, 0.4, 0.7],
    wrong=[0.1, 0.3, 0.1, 0.3, 0.2, NAN, NAN, NAN, NAN],
    target=[NAN, NAN, NAN, NAN, NAN, NAN, 0.03, 0.02, 0.1],
    generated=[1, 1, 1, 0, 1, 0, 1, 0, NAN],
    first=[9, 2, 9, 4, 5, 6, 9, 8, -1],
)  # fmt: skip


def named() -> dict[str, Any]:
    return {m.name: m for m in query_measurements(BEFORE, AFTER, STATES)}


def test_names_and_what_they_rest_on() -> None:
    found = named()
    assert list(found) == [
        "correction", "paraphrase", "generalisation", "specificity", "specificity.hard", "specificity.easy", "leakage", "leakage.hard",
        "leakage.easy", "event_rate", "event_rate.paraphrase", "generation", "generation.paraphrase", "generation.generalisation",
        "generation.unrelated", "generation.hard", "generation.easy", "wrong", "wrong.paraphrase", "moved", "moved.hard", "moved.easy",
    ]  # fmt: skip
    assert all((m.state_before, m.state_after) == STATES and m.unit == "prompt" for m in found.values())
    assert found["correction"].groups is None  # one prompt a case
    assert found["paraphrase"].groups == ("x", "x", "y")
    better = {name: m.better for name, m in found.items()}
    assert (better["correction"], better["wrong"], better["specificity"], better["leakage"], better["moved"]) == (
        "higher", "lower", "same", "same", "lower",
    )  # fmt: skip
    assert found["correction"].form == "number"  # a probability of 0.0004 must not read 0.0 %
    assert found["event_rate"].form == "share"


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("correction", 0.15, 0.45),
        ("paraphrase", (0.2 + 0.5) / 2, (0.3 + 0.5) / 2),  # mean of a case's paraphrases, then over cases
        ("generalisation", 0.01, 0.03),
        ("specificity", ((0.9 + 0.8) / 2 + 0.7) / 2, ((0.9 + 0.4) / 2 + 0.7) / 2),
        ("specificity.hard", 0.9, 0.9),
        ("wrong", 0.3, 0.2),
        ("leakage", (0.015 + 0.0) / 2, (0.025 + 0.1) / 2),
        ("event_rate", 0.5, 0.5),
        ("event_rate.paraphrase", (0.5 + 1) / 2, (0.5 + 1) / 2),
        ("generation", 0.5, 1.0),
        ("moved", 0, 0.5),
        ("moved.easy", 0, 0),
    ],
)
def test_values(name: str, before: float, after: float) -> None:
    summary = named()[name].summary()
    assert summary.before == pytest.approx(before)
    assert summary.after == pytest.approx(after)


def test_missing_values_are_left_out_and_counted() -> None:
    assert named()["moved"].summary().left_out == 1
    assert named()["generation.easy"].summary().left_out == 1


def test_relative_changes_follow_the_definition() -> None:
    found = {change.name: change for change in relative_changes(BEFORE, AFTER)}
    assert set(found) == {name for name in named() if name.partition(".")[0] not in ("event_rate", "generation", "moved")}
    assert found["correction"].mean == pytest.approx((7 - 0.5) / 2)
    assert found["correction"].median == pytest.approx((7 - 0.5) / 2)
    assert found["correction"].raised == 0.5
    assert found["paraphrase"].mean == pytest.approx(((3 - 1 / 3) / 2 + 0) / 2)
    assert found["leakage"].mean == pytest.approx(((2 + 0) / 2 + 0) / 2)  # case y began at 0, which counts as no change
    assert found["leakage"].from_zero == 1
    assert found["leakage"].raised == pytest.approx(2 / 3)


def test_a_mean_is_ruled_by_what_began_near_zero_and_the_median_is_not() -> None:
    change = relative_change("correction", [1e-6, 0.1, 0.2, 0.3, 0.4], [0.5, 0.2, 0.4, 0.6, 0.8])
    assert change.mean > 90_000
    assert change.median == pytest.approx(1)
    row = relative_rows([change])[0]
    assert row["mean change"] == "+10,000,060 %"
    assert row["median change"] == "+100 %"
    assert (row["before"], row["after"], row["raised"]) == (0.2, 0.5, "100 %")


probabilities = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(probabilities)
def test_relative_change_in_plain_python(rows: list[tuple[float, float, int]]) -> None:
    per_case: dict[int, list[float]] = {}
    for pre, post, case in rows:
        per_case.setdefault(case, []).append((post - pre) / pre if pre >= 1e-300 else 0.0)
    means = [sum(values) / len(values) for values in per_case.values()]
    found = relative_change("x", [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])
    assert found.mean == pytest.approx(sum(means) / len(means), rel=1e-9, abs=1e-9)
    assert found.median == pytest.approx(float(np.median(means)), rel=1e-9, abs=1e-9)
    assert found.raised == pytest.approx(sum(post > pre for pre, post, _ in rows) / len(rows))


@settings(max_examples=30, deadline=None)
@given(probabilities, st.randoms())
def test_an_unedited_model_changes_nothing_and_order_does_not_matter(rows: list[tuple[float, float, int]], shuffle: Any) -> None:
    def scores(rows: list[tuple[float, float, int]], side: int) -> QueryScores:
        values = [row[side] for row in rows]
        sets = [("edited", "unrelated")[row[2] % 2] for row in rows]
        return QueryScores(sets, [row[2] for row in rows], values, wrong=[row[0] for row in rows], target=values, first=np.zeros(len(rows)))

    for measured in query_measurements(scores(rows, 0), scores(rows, 0), STATES):
        assert measured.summary(resamples=20).difference == 0
    assert all(change.mean == 0 and change.raised == 0 for change in relative_changes(scores(rows, 0), scores(rows, 0)))
    mixed = list(rows)
    shuffle.shuffle(mixed)
    first = {change.name: change for change in relative_changes(scores(rows, 0), scores(rows, 1))}
    for change in relative_changes(scores(mixed, 0), scores(mixed, 1)):
        assert change.mean == pytest.approx(first[change.name].mean, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: QueryScores(["edited"], ["x"], [-3.2]), "outside of 0..1"),
        (lambda: QueryScores(["edited"], ["x"], [0.1, 0.2]), "1 sets but 2 values of `answer`"),
        (lambda: QueryScores(["edit"], ["x"], [0.1]), "Did you mean 'edited'"),
        (lambda: QueryScores(["edited"], ["x"], ["much"]), "not a list of numbers"),
        (lambda: query_measurements(BEFORE, QueryScores(["edited"], ["x"], [0.1]), STATES), "not the same ones"),
        (lambda: relative_change("x", [NAN], [0.1]), "no query has a value"),
        (lambda: relative_change("x", [0.1], [0.1, 0.2]), "1 values before, 2 after"),
    ],
)
def test_bad_scores_are_refused(make: Any, says: str) -> None:
    with pytest.raises(MetricError, match=says):
        make()


def test_sets_that_are_not_there_are_passed_over() -> None:
    lonely = QueryScores(["edited"], ["x"], [0.5])
    assert [m.name for m in query_measurements(lonely, lonely, STATES)] == ["correction"]


@pytest.mark.parametrize(
    ("text", "answers", "holds"),
    [
        (" the  United\tStates of America.\nIt", "united states", True),
        ("France", ["Frankreich", "france"], True),
        ("first line\nFrance", "France", False),
        ("", "France", False),
        ("France", "", False),
        ("法国是一个国家", "法国", True),
    ],
)
def test_contains_answer(text: str, answers: Any, holds: bool) -> None:
    assert contains_answer(text, answers) is holds
