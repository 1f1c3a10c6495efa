"""Screening: verified values are exact, the recall is what counting gives, the sample's estimate is right on average."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.core.errors import ScoresError
from trocar.locate import How, Scores
from trocar.locate.screening import rank_correlation, screen

HOW = How("test", fingerprint="x")


def heads(values: np.ndarray) -> Scores:
    return Scores("head", "", {f"L{layer}.H": row for layer, row in enumerate(values)}, HOW)


def test_rank_correlation_is_spearmans_over_what_both_score() -> None:
    a = heads(np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert rank_correlation(a, heads(np.array([[1.0, 8.0], [27.0, 64.0]]))) == 1
    assert rank_correlation(a, heads(-np.array([[1.0, 8.0], [27.0, 64.0]]))) == -1
    part = Scores("head", "", {"L0.H0": 5.0, "L1.H0": 1.0, "L1.H1": 9.0}, HOW)  # L0.H1 is not scored: 1, 3, 4 against 5, 1, 9
    assert rank_correlation(a, part) == pytest.approx(0.5)
    assert np.isnan(rank_correlation(a, heads(np.ones((2, 2)))))
    with pytest.raises(ScoresError):
        rank_correlation(a, a.with_how(How("test", fingerprint="y")))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_recall_is_counted_and_a_full_sample_knows_it(seed: int, k: int, wanted: int, absolute: bool) -> None:
    rng = np.random.default_rng(seed)
    exact = heads(rng.normal(size=(3, 4)))
    estimate = heads(exact.flat.reshape(3, 4) + rng.normal(size=(3, 4)))
    asked: list[str] = []

    def evaluate(components: list) -> list[float]:
        asked.extend(map(str, components))
        return [exact[component] for component in components]

    def best(scores: Scores, n: int) -> set[str]:
        sized = sorted(scores.ranked(), key=lambda item: -abs(item[1]) if absolute else -item[1])
        return {name for name, _ in sized[:n]}

    found = screen(estimate, evaluate, k, wanted=wanted, known=exact, absolute=absolute)
    assert set(asked) == best(estimate, k) == {str(c) for c in found.verified.components()}
    assert all(found.verified[name] == exact[name] for name in asked)
    assert found.recall == len(best(estimate, k) & best(exact, wanted)) / wanted
    assert found.correlation == pytest.approx(rank_correlation(estimate, exact))
    sampled = screen(estimate, evaluate, k, wanted=wanted, sample=12, absolute=absolute)
    assert sampled.recall == pytest.approx(found.recall)
    assert sampled.correlation == pytest.approx(found.correlation)
    assert screen(estimate, evaluate, 12).recall == 1
    if k < 12:
        assert screen(estimate, evaluate, k).recall is None


def test_a_sample_estimates_the_recall() -> None:
    rng = np.random.default_rng(0)
    exact = heads(rng.normal(size=(20, 50)))
    estimate = heads(exact.flat.reshape(20, 50) + 0.7 * rng.normal(size=(20, 50)))

    def evaluate(components: list) -> list[float]:
        return [exact[component] for component in components]

    true = screen(estimate, evaluate, 100, known=exact).recall
    guesses = [screen(estimate, evaluate, 100, sample=300, seed=seed).recall for seed in range(20)]
    assert true == pytest.approx(np.mean(guesses), abs=0.05)
    assert np.ptp(guesses) > 0


def test_bad_screenings_are_refused() -> None:
    scores = heads(np.arange(4.0).reshape(2, 2))
    for k, wanted, sample in ((0, 1, 0), (5, 1, 0), (1, 5, 0), (1, 1, -1)):
        with pytest.raises(ScoresError, match="Cannot verify"):
            screen(scores, lambda c: [0.0] * len(c), k, wanted=wanted, sample=sample)
    for bad in ([1.0], [1.0, float("nan")]):
        with pytest.raises(ScoresError, match="exact evaluation"):
            screen(scores, lambda c, bad=bad: bad, 2)
