"""Shapley's axioms, quadrature and sampling on random games."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.core.errors import MetricError, ScoresError
from trocar.locate import How
from trocar.locate.shapley import CachedGame, coalitions, exact, quadrature, shapley_values


class Table:
    """A game from the values of all its coalitions, by their binary codes."""

    def __init__(self, values: np.ndarray, names: str = "abcdefghijklmnop") -> None:
        self.values = np.asarray(values, dtype=float)
        self.players = tuple(names[: int(math.log2(len(self.values)))])
        self.calls = 0

    def __call__(self, masks: np.ndarray) -> np.ndarray:
        self.calls += len(masks)
        return self.values[masks @ (2 ** np.arange(len(self.players)))]


class Additive:
    def __init__(self, worth: np.ndarray) -> None:
        self.worth, self.players = worth, tuple(f"L{number}" for number in range(len(worth)))

    def __call__(self, masks: np.ndarray) -> np.ndarray:
        return 3.0 + masks @ self.worth


def random_game(players: int, seed: int) -> Table:
    return Table(np.random.default_rng(seed).normal(size=2**players))


games = st.builds(random_game, st.integers(1, 8), st.integers(0, 10**6))


def by_orders(game: Table) -> np.ndarray:
    """The definition: the mean over all orders of what a player adds."""
    n, found = len(game.players), []
    for order in itertools.permutations(range(n)):
        mask, row = np.zeros((1, n), dtype=bool), np.zeros(n)
        for player in order:
            before = game(mask)[0]
            mask[0, player] = True
            row[player] = game(mask)[0] - before
        found.append(row)
    return np.mean(found, 0)


@settings(max_examples=30, deadline=None)
@given(games)
def test_efficiency(game: Table) -> None:
    found = shapley_values(game, "exact")
    assert abs(found.gap) < 1e-9
    assert found.evaluations == game.calls == 2 ** len(game.players)
    assert (found.errors == 0).all()


@given(st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_it_is_the_mean_over_all_orders(players: int, seed: int) -> None:
    game = random_game(players, seed)
    np.testing.assert_allclose(exact(game), by_orders(game), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(games, st.data())
def test_symmetry_dummy_linearity_and_the_order_of_players(game: Table, data: st.DataObject) -> None:
    n = len(game.players)
    masks, phi = coalitions(n), exact(game)
    order = np.array(data.draw(st.permutations(range(n))))
    moved = np.zeros_like(game.values)
    moved[masks[:, order] @ (2 ** np.arange(n))] = game.values
    np.testing.assert_allclose(exact(Table(moved)), phi[order], atol=1e-12)  # player k of the new game is player order[k] of the old one
    other = random_game(n, 7)
    np.testing.assert_allclose(exact(Table(2 * game.values - 3 * other.values)), 2 * phi - 3 * exact(other), atol=1e-10)
    codes = np.arange(2**n)
    idle = Table(game.values[codes & ~1])  # the first player changes nothing
    assert exact(idle)[0] == 0
    if n > 1:
        swapped = (codes & ~3) | ((codes & 1) << 1) | ((codes >> 1) & 1)
        alike = exact(Table(game.values + game.values[swapped]))
        assert alike[0] == pytest.approx(alike[1], abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(games)
def test_half_as_many_nodes_as_players_are_exact(game: Table) -> None:
    n = len(game.players)
    np.testing.assert_allclose(quadrature(game, math.ceil(n / 2)), exact(game), atol=1e-9)


def test_fewer_nodes_are_not() -> None:
    for n in (3, 4, 5, 6, 7, 8):
        game = random_game(n, n)
        assert np.abs(quadrature(game, math.ceil(n / 2) - 1) - exact(game)).max() > 1e-3


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("method", ["multilinear", "permutation"])
def test_samples_lie_within_their_errors(method: str, antithetic: bool) -> None:
    far = []
    for seed in range(12):
        game = random_game(7, 100 + seed)
        found = shapley_values(game, method, orders=60, samples=24, nodes=5, antithetic=antithetic, seed=seed)  # type: ignore[arg-type]
        far.append(np.abs(found.values - exact(game)) / found.errors)
        again = shapley_values(game, method, orders=60, samples=24, nodes=5, antithetic=antithetic, seed=seed)  # type: ignore[arg-type]
        assert np.array_equal(found.values, again.values)
        if method == "permutation":
            assert abs(found.gap) < 1e-9
        assert found.evaluations <= 128
    scores = np.concatenate(far)
    assert scores.max() < 4
    assert 0.5 < np.sqrt((scores**2).mean()) < 1.5  # and the errors are of the right size


def test_of_an_additive_game_every_estimator_is_right() -> None:
    worth = np.array([0.5, -1.0, 2.0, 0.0, 0.25])
    for method in ("exact", "multilinear", "permutation"):
        found = shapley_values(Additive(worth), method, samples=4, orders=4)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.values, worth, atol=1e-12)
        np.testing.assert_allclose(found.errors, 0, atol=1e-12)
    assert found.shares is not None
    np.testing.assert_allclose(found.shares, worth / worth.sum())
    scores = found.scores(How("test"))
    assert (scores.kind, scores["L2"]) == ("block", pytest.approx(2.0))
    assert scores.how.settings["orders"] == 4
    assert [row["player"] for row in found.rows()] == ["L0", "L1", "L2", "L3", "L4"]
    assert shapley_values(Additive(np.zeros(3))).shares is None
    assert np.isnan(shapley_values(Additive(np.zeros(3))).spread)
    with pytest.raises(ScoresError, match="no components"):
        shapley_values(random_game(3, 0)).scores(How("test"))


def test_every_coalition_is_evaluated_once() -> None:
    game = random_game(6, 1)
    cached = CachedGame(game)
    shapley_values(cached, "permutation", orders=40)
    shapley_values(cached, "multilinear", samples=8)
    assert game.calls == cached.evaluations <= 64


class Rows(Table):
    """A game whose values are means over rows; `own` holds the rows' values of all coalitions, (2^players, rows)."""

    def __init__(self, own: np.ndarray) -> None:
        super().__init__(own.mean(1))
        self.own = own

    def rows(self, masks: np.ndarray) -> np.ndarray:
        self.calls += len(masks)
        return self.own[masks @ (2 ** np.arange(len(self.players)))]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 10**6))
def test_errors_over_rows_are_those_of_the_rows_own_values(players: int, rows: int, seed: int) -> None:
    game = Rows(np.random.default_rng(seed).normal(size=(2**players, rows)))
    found = shapley_values(game)
    each = np.array([exact(Table(column)) for column in game.own.T])
    np.testing.assert_allclose(found.values, each.mean(0), atol=1e-12)
    assert found.row_errors is not None
    np.testing.assert_allclose(found.row_errors, each.std(0, ddof=1) / np.sqrt(rows), atol=1e-12)
    assert [row["row error"] for row in found.rows()] == found.row_errors.tolist()
    assert game.calls == found.evaluations == 2**players
    assert shapley_values(game, "permutation", orders=4).row_errors is None
    assert shapley_values(Table(game.values)).row_errors is None


def test_errors_over_rows_say_what_other_rows_would_give() -> None:
    random = np.random.default_rng(5)
    worth = random.normal(size=4)  # of a row, one player adds its worth and noise that is the row's own
    far = []
    for _ in range(60):
        own = 1.0 + coalitions(4) @ (worth[:, None] + random.normal(size=(4, 30)))
        found = shapley_values(Rows(own))
        assert found.row_errors is not None
        far.append((found.values - worth) / found.row_errors)
    assert 0.85 < np.sqrt(np.square(far).mean()) < 1.25  # 1 of Student's t with 29 degrees of freedom is 1.04


def test_many_players_are_sampled_and_what_cannot_be_is_refused() -> None:
    big = Additive(np.arange(20.0))
    assert shapley_values(big).method == "permutation"
    with pytest.raises(MetricError, match=r"1,048,576 coalitions.*640 evaluations"):
        shapley_values(big, "exact")
    for method, wrong in (
        ("permutation", {"orders": 3}),
        ("multilinear", {"samples": 2}),
        ("permutation", {"orders": 1, "antithetic": False}),
    ):
        with pytest.raises(MetricError, match="no standard error"):
            shapley_values(big, method, **wrong)  # type: ignore[arg-type]
    with pytest.raises(MetricError, match="Did you mean 'permutation'"):
        shapley_values(big, "permutations")  # type: ignore[arg-type]

    class Odd(Additive):
        broken: Callable[[np.ndarray], np.ndarray]

        def __call__(self, masks: np.ndarray) -> np.ndarray:
            return self.broken(masks)

    odd = Odd(np.ones(2))
    odd.broken = lambda masks: np.full(len(masks), np.nan)
    with pytest.raises(MetricError, match="coalition 00 is not finite"):
        shapley_values(odd)
    odd.broken = lambda masks: np.ones((len(masks), 2))  # rows where values should be
    with pytest.raises(MetricError, match="must return"):
        shapley_values(odd)
