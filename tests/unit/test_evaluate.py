"""Measurements, rates, checks and comparisons at equal locality: numbers known by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.core.errors import ConfigError, MetricError
from trocar.evaluate import (
    Check,
    Measurement,
    accuracy,
    at_equal,
    cost,
    generalisation,
    generalisation_rate,
    group_bootstrap_difference,
    locality,
    parse_checks,
    run_checks,
    success,
)

STATES = ("state-a", "state-b")


def measure(before, after, **more):
    return Measurement("m", "image", before, after, "by hand", *STATES, **more)


def one_hot(classes, n=4):
    return torch.eye(n)[list(classes)]


# -- measurement ----------------------------------------------------------------------------------------------------------------------


def test_mcnemar_is_exact():
    summary = measure([0] * 9 + [1] + [1] * 5, [1] * 9 + [0] + [1] * 5).summary()  # 9 gained, 1 lost
    assert summary.test == "McNemar, exact"
    assert summary.p == pytest.approx(2 * (1 + 10) / 2**10)
    assert summary.n == 15
    assert summary.difference == pytest.approx(8 / 15)
    assert measure([1, 0, 1], [1, 0, 1]).summary().p == 1.0


def test_permutation_test_is_exact_for_few_pairs():
    summary = measure([0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.6, 0.8]).summary()
    assert summary.p == 2 / 16
    assert summary.test == "permutation"
    assert measure([0.5, 0.5], [0.5, 0.5]).summary().p == 1.0


def test_interval_covers_the_truth_about_95_percent_of_the_time():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        before = generator.normal(size=40)
        after = before + 0.5 + generator.normal(size=40)
        summary = measure(before, after).summary(seed=1, resamples=400)
        hits += summary.low <= 0.5 <= summary.high
    assert 180 <= hits <= 199


def test_seed_decides_the_interval():
    generator = np.random.default_rng(0)
    m = measure(generator.random(30), generator.random(30))
    assert m.summary(3) == m.summary(3)
    assert (m.summary(3).low, m.summary(3).high) != (m.summary(4).low, m.summary(4).high)
    assert m.summary(3).difference == m.summary(4).difference


def test_pairing_matters():
    """A constant gain on very different units: unpaired noise would hide it, pairing does not."""
    before = np.arange(20.0) * 100
    summary = measure(before, before + 1 + 0.1 * np.sin(np.arange(20))).summary()
    assert 0.9 < summary.low < summary.high < 1.1
    assert summary.p < 0.01


def test_nothing_changed_does_not_prove_zero():
    summary = measure([1] * 200, [1] * 200).summary()
    assert summary.interval == "exact"
    assert summary.high == 0.0
    assert summary.low == pytest.approx(-(1 - 0.025 ** (1 / 200)))
    fixed = measure([0] * 4, [1] * 4).summary()
    assert (fixed.low, fixed.high) == (pytest.approx(0.025 ** (1 / 4)), 1.0)
    assert fixed.p == 0.125


def test_one_unit_has_no_interval():
    summary = cost("parameters", "model", 100, 50, STATES).summary()
    assert math.isnan(summary.low)
    assert math.isnan(summary.high)
    assert math.isnan(summary.p)
    assert (summary.before, summary.after, summary.ratio) == (100, 50, 0.5)


def test_groups_count_equally_and_lost_ones_are_counted():
    nan = float("nan")
    m = measure([0, 0, 0, 0, nan], [1, 1, 1, 0, 1], groups=["a", "a", "a", "b", "c"])
    summary = m.summary()
    assert summary.after == 0.5  # group a: 1, group b: 0; the plain mean would be .75
    assert (summary.n, summary.n_groups, summary.left_out, summary.left_out_groups) == (4, 2, 1, 1)
    assert summary.test == "permutation of groups"
    assert summary.p >= 0.5


def test_group_interval_is_wider_than_the_naive_one():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), 20)
    after = (generator.normal(size=10)[groups] + 0.1 * generator.normal(size=200)).tolist()
    naive, grouped = measure([0.0] * 200, after).summary(), measure([0.0] * 200, after, groups=groups.tolist()).summary()
    assert grouped.high - grouped.low > 2 * (naive.high - naive.low)


def test_averages():
    m = measure([1.0, 2.0, 30.0], [2.0, 3.0, 3.0], average="median")
    assert (m.summary().before, m.summary().after) == (2.0, 3.0)
    weighted = measure([1.0, 3.0], [2.0, 2.0], average="exp_mean", weights=[3, 1]).summary()
    assert (weighted.before, weighted.after) == (pytest.approx(math.exp(1.5)), pytest.approx(math.exp(2)))
    grouped = measure([1.0, 3.0], [2.0, 2.0], average="exp_mean", groups=["a", "b"]).summary()
    assert grouped.before == pytest.approx(math.exp(2))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (([], []), "no images"),
        (([1], [1, 0]), "1 values before, but 2 in after"),
        (([1, 2], [1, float("inf")]), "infinite"),
        (([[1]], [[1]]), "shape"),
        ((["a"], ["b"]), "not a list of numbers"),
        (([float("nan")], [1]), "none of its 1 images"),
    ],
)
def test_bad_measurements(arguments, what):
    with pytest.raises(MetricError, match=what):
        measure(*arguments).summary()


@pytest.mark.parametrize("more", [{"better": "hihger"}, {"average": "mode"}, {"groups": ["a"]}, {"weights": [1, 0]}])
def test_bad_measurement_settings(more):
    with pytest.raises(MetricError):
        measure([1.0, 2.0], [1.0, 2.0], **more)


# -- rates ----------------------------------------------------------------------------------------------------------------------------


def test_success_and_accuracy():
    m = success(one_hot([0, 1, 2]), one_hot([3, 1, 2]), torch.tensor([3, 1, 0]), STATES)
    assert m.before.tolist() == [0, 1, 0]
    assert m.after.tolist() == [1, 1, 0]
    assert m.unit == "edit"
    assert m.form == "share"
    assert accuracy(one_hot([0]), one_hot([0]), [0], STATES).summary().after == 1.0
    with pytest.raises(MetricError, match="2 labels"):
        accuracy(one_hot([0]), one_hot([0]), [0, 1], STATES)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_locality_of_the_unedited_model_is_exactly_one(classes):
    logits = one_hot(classes)
    summary = locality(logits, logits.clone(), STATES).summary()
    assert summary.before == summary.after == 1.0
    assert summary.difference == 0.0


def test_locality_is_agreement_not_accuracy():
    m = locality(one_hot([0, 1, 2]), one_hot([0, 2, 2]), STATES)
    assert m.after.tolist() == [1, 0, 1]
    with pytest.raises(MetricError, match="NaN"):
        locality(one_hot([0]), one_hot([0]) * float("nan"), STATES)


def test_generalisation_is_leave_one_out():
    assert generalisation_rate([1, 1], [0]) == 1.0
    assert generalisation_rate([0, 1], [0]) == 1.0  # the edited one itself does not count
    assert math.isnan(generalisation_rate([1], [0]))
    assert generalisation_rate([1, 0, 1, 0], [0, 1]) == 0.5
    with pytest.raises(MetricError, match="group of 2"):
        generalisation_rate([1, 0], [2])


def test_a_group_of_one_is_left_out_and_counted():
    m = generalisation([[0, 0], [0], [0, 0]], [[1, 1], [1], [1, 0]], [[0], [0], [0]], STATES, groups=["a", "b", "c"])
    summary = m.summary()
    assert np.isnan(m.after[1])
    assert (summary.n, summary.left_out, summary.left_out_groups) == (2, 1, 1)
    assert (summary.before, summary.after) == (0.0, 0.5)


# -- checks ---------------------------------------------------------------------------------------------------------------------------


def test_verdict():
    m = locality(one_hot([0] * 10), one_hot([0] * 9 + [1]), STATES)
    passed = run_checks([{"measurement": "locality", "op": ">=", "threshold": 0.9}], [m])
    assert passed.ok
    assert passed.outcome == "passed"
    assert passed.rows[0].value == 0.9
    failed = run_checks([{"measurement": "locality", "op": ">=", "threshold": 0.95}, passed.rows[0].check], [m])
    assert not failed.ok
    assert [row.ok for row in failed.rows] == [False, True]
    assert failed.outcome == "failed"
    assert run_checks([], [m]).outcome == "unchecked"
    low = run_checks([{"measurement": "locality", "statistic": "low", "op": ">", "threshold": -0.05}], [m])
    assert not low.ok  # the interval knows that ten images cannot show this


@pytest.mark.parametrize("op", [">=", "<=", ">", "<", "=="])
def test_operators(op):
    m = measure([0.0, 0.0], [0.5, 0.5])
    ok = run_checks([Check(measurement="m", op=op, threshold=0.5)], [m]).ok
    assert ok == {">=": True, "<=": True, ">": False, "<": False, "==": True}[op]


@pytest.mark.parametrize("op", [">=", "<="])
def test_a_value_that_does_not_exist_fails(op):
    verdict = run_checks(
        [{"measurement": "parameters", "statistic": "p", "op": op, "threshold": 0.05}], [cost("parameters", "model", 2, 1, STATES)]
    )
    assert not verdict.ok
    assert "no value" in verdict.rows[0].note


@pytest.mark.parametrize(
    ("checks", "what"),
    [
        ([{"measurment": "m", "op": ">=", "threshold": 1}], "Did you mean 'measurement'"),
        ([{"measurement": "m", "op": "=>", "threshold": 1}], r"checks\.0\.op"),
        ([{"measurement": "m", "op": ">=", "threshold": "high"}], r"checks\.0\.threshold"),
        ([{"measurement": "m", "op": ">="}], r"checks\.0\.threshold"),
        ([{"measurement": "m", "statistic": "mean", "op": ">=", "threshold": 1}], r"checks\.0\.statistic"),
        ([{"measurement": "m", "op": ">=", "threshold": float("nan")}], "cannot be checked"),
        ({"measurement": "m"}, "list of checks"),
        (["m > 1"], r"checks\.0 must be a mapping"),
    ],
)
def test_bad_checks(checks, what):
    with pytest.raises(ConfigError, match=what):
        parse_checks(checks)


def test_a_check_of_what_was_not_measured():
    with pytest.raises(ConfigError, match="Did you mean 'locality'"):
        run_checks([{"measurement": "localty", "op": ">=", "threshold": 1}], [locality(one_hot([0]), one_hot([0]), STATES)])
    with pytest.raises(ConfigError, match="Two measurements"):
        run_checks([], [measure([1.0], [1.0])] * 2)


# -- fronts ---------------------------------------------------------------------------------------------------------------------------


def test_at_equal_interpolates_between_neighbours():
    assert at_equal([0.9, 0.5, 0.7], [10, 50, 40], 0.8) == pytest.approx(25)
    assert at_equal([0.5, 0.5, 0.7], [10, 20, 40], 0.5) == 15
    assert math.isnan(at_equal([0.5, 0.7], [1, 2], 0.71))
    assert math.isnan(at_equal([0.5, 0.7], [1, 2], 0.49))
    with pytest.raises(MetricError):
        at_equal([0.5, float("nan")], [1, 2], 0.5)


def curve(generator, n, lift=0.0):
    """Three settings trading x for y on n groups with group noise."""
    noise = generator.normal(0, 0.05, n)
    x = np.stack([0.9 - step * 0.2 + 0.1 * noise for step in range(3)])
    y = np.stack([0.2 + step * 0.3 + noise + lift for step in range(3)])
    return x, y


def test_difference_at_equal_x_sees_a_lift_and_ignores_movement_along_the_curve():
    x, y = curve(np.random.default_rng(0), 30)
    same = group_bootstrap_difference(x[1], y[1], x, y, seed=1)
    assert abs(same.difference) < 1e-9
    assert same.n == 30
    assert same.outside == 0
    lifted = group_bootstrap_difference(x[1], y[1] + 0.1, x, y, seed=1)
    assert lifted.difference == pytest.approx(0.1)
    assert lifted.low > 0.05
    assert lifted.high < 0.15
    between = group_bootstrap_difference((x[0] + x[1]) / 2, (y[0] + y[1]) / 2, x, y)
    assert abs(between.difference) < 1e-9  # a mixture of two settings lies on the curve
    whole = group_bootstrap_difference(x, y + 0.1, x, y, x=0.75)
    assert whole.difference == pytest.approx(0.1)
    assert whole.x == 0.75


def test_difference_outside_the_curve_is_not_claimed():
    x, y = curve(np.random.default_rng(0), 10)
    beyond = group_bootstrap_difference(x[0] + 0.5, y[0], x, y)
    assert math.isnan(beyond.difference)
    assert math.isnan(beyond.low)
    assert beyond.outside == 1.0
    edge = group_bootstrap_difference(x[0], y[0], x[:2], y[:2])
    assert edge.outside < 0.6
    assert edge.difference == pytest.approx(0)


def test_groups_with_nan_are_left_out_on_both_sides():
    x, y = curve(np.random.default_rng(0), 10)
    own = y[1].copy()
    own[3] = float("nan")
    result = group_bootstrap_difference(x[1], own, x, y)
    assert (result.n, result.left_out) == (9, 1)
    assert abs(result.difference) < 1e-9
    with pytest.raises(MetricError, match="Only 1 of 10"):
        group_bootstrap_difference(x[1], np.where(np.arange(10) < 1, y[1], np.nan), x, y)
    with pytest.raises(MetricError, match="cannot be paired"):
        group_bootstrap_difference(x[1][:4], y[1][:4], x, y)
    with pytest.raises(MetricError, match="3 settings"):
        group_bootstrap_difference(x, y, x, y)
