"""Shapley values of a game whose players are parts of a model: what each part is worth, averaged over everything the others may be.

phi_i = sum over coalitions S without i of |S|! (L - |S| - 1)! / L! [v(S + i) - v(S)] = integral over p in [0, 1] of c_i(p), where
c_i(p) = E[v(R + i) - v(R)] and every other player is in R with probability p (Owen's multilinear extension, the estimator of CoTo,
arXiv 2506.05713). The values of all players add up to v(all) - v(none). Floor 3, no torch: a game is a function of coalitions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from trocar.core.errors import MetricError, ScoresError, nearest
from trocar.core.seeds import derive
from trocar.locate.scores import How, Scores

Method = Literal["auto", "exact", "multilinear", "permutation"]
METHODS = ("auto", "exact", "multilinear", "permutation")
EVEN = ", an even number"
EXACT = 12  # players up to which every coalition is evaluated


class Game(Protocol):
    """A function of coalitions. players: their names; called with masks (n, players) bool it returns (n,) values, larger is better.

    A game whose values are means over rows may have `rows(masks)` -> (n, rows) too, which is then called instead.
    """

    @property
    def players(self) -> Sequence[str]: ...

    def __call__(self, masks: np.ndarray) -> np.ndarray: ...


class CachedGame:
    """A game that evaluates every coalition once. evaluations: how many have been."""

    def __init__(self, game: Game) -> None:
        self.game, self.players = game, tuple(game.players)
        self._known: dict[bytes, np.ndarray] = {}

    @property
    def evaluations(self) -> int:
        return len(self._known)

    def __call__(self, masks: np.ndarray) -> np.ndarray:
        return self.rows(masks).mean(1)

    def rows(self, masks: np.ndarray) -> np.ndarray:
        """The rows that the values are means of, (n, rows); the values themselves, (n, 1), of a game that does not tell them."""
        masks = np.asarray(masks, dtype=bool)
        keys = [row.tobytes() for row in masks]
        new = list(dict.fromkeys(key for key in keys if key not in self._known))
        if new:
            asked = np.array([np.frombuffer(key, dtype=bool) for key in new])
            by_row = getattr(self.game, "rows", None)
            values = np.asarray(self.game(asked) if by_row is None else by_row(asked), dtype=np.float64)
            if by_row is None and values.shape != (len(asked),):
                raise MetricError(f"The game returned values of shape {values.shape} for {len(asked)} coalitions.", "It must return (n,).")
            if values.ndim == 1:
                values = values[:, None]
            finite = np.isfinite(values).all(1)
            if not finite.all():
                worst = "".join("01"[int(flag)] for flag in asked[~finite][0])
                raise MetricError(f"The value of the coalition {worst} is not finite.", "Choose a bounded one: a mean log-likelihood.")
            self._known.update(zip(new, values, strict=True))
        return np.array([self._known[key] for key in keys])


@dataclass(frozen=True)
class Shapley:
    """Estimated values. values, errors: (players,), errors are standard errors of the draws (0 if exact); total, empty: v(all), v(none);
    evaluations: coalitions that were really evaluated. row_errors: standard errors over the rows that an exact game's values are means
    of, (players,): what another sample of as many rows would change. None where rows are not told, or the values are sampled."""

    players: tuple[str, ...]
    values: np.ndarray
    errors: np.ndarray
    total: float
    empty: float
    evaluations: int
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    row_errors: np.ndarray | None = None

    @property
    def gap(self) -> float:
        """The sum of the values minus v(all) - v(none); 0 up to rounding for exact and permutation estimates."""
        return float(self.values.sum() - (self.total - self.empty))

    @property
    def shares(self) -> np.ndarray | None:
        """Each value divided by their sum, (players,). None where v(all) = v(none) within the errors: there is nothing to share."""
        whole = self.total - self.empty
        doubt = 2 * float(np.sqrt((self.errors**2).sum())) + 1e-12 * max(abs(self.total), abs(self.empty))
        return None if abs(whole) <= doubt else self.values / self.values.sum()

    @property
    def spread(self) -> float:
        """Standard deviation of the shares: 0 if all players are worth the same. NaN without shares."""
        shares = self.shares
        return float("nan") if shares is None else float(shares.std())

    def rows(self) -> list[dict[str, Any]]:
        """One row a player, for tables and figures; `low` and `high` are its value -+ 1.96 `error`."""
        shares = self.shares
        return [
            {"player": name, "value": value, "error": error, "low": value - 1.96 * error, "high": value + 1.96 * error}
            | ({} if shares is None else {"share": shares[place]})
            | ({} if self.row_errors is None else {"row error": float(self.row_errors[place])})
            for place, (name, value, error) in enumerate(zip(self.players, self.values.tolist(), self.errors.tolist(), strict=True))
        ]

    def scores(self, how: How, tower: str = "") -> Scores:
        """As `Scores`, for players that are components of one kind in `tower`. Raises ScoresError for other names."""
        from trocar.anatomy import parse
        from trocar.core.errors import ComponentError

        try:
            found = {parse(name): value for name, value in zip(self.players, self.values.tolist(), strict=True)}
        except ComponentError as error:
            raise ScoresError(f"The players are no components: {error.what}", "Take their values from rows().") from None
        mine = {component: value for component, value in found.items() if component.tower == tower}  # type: ignore[attr-defined]
        kinds = sorted({component.kind for component in mine})
        if len(kinds) != 1:
            raise ScoresError(f"The players in tower '{tower}' are of {len(kinds)} kinds.", "Name a tower whose players are all alike.")
        return Scores(kinds[0], tower, mine, how.then("shapley", method=self.method, **self.settings))


def shapley_values(
    game: Game,
    method: Method = "auto",
    *,
    orders: int = 32,
    nodes: int = 8,
    samples: int = 8,
    antithetic: bool = True,
    most: int = EXACT,
    seed: int = 0,
) -> Shapley:
    """Estimate the Shapley values of a game.

    method: `exact` evaluates all 2^L coalitions; `permutation` (Castro et al. 2009) adds the players in random orders, L evaluations an
    order, and keeps the sum exact order by order; `multilinear` draws coalitions at Gauss-Legendre nodes p and flips every player in
    each, L + 1 evaluations a coalition; `auto`: exact up to `most` players, else permutation.
    orders: of permutation sampling; nodes, samples: Gauss-Legendre nodes, and coalitions at each. antithetic: orders come with their
    reverses, and draws u with 1 - u (the numbers of orders and samples count both). Equal seeds give equal numbers.
    Raises MetricError for more than `most` players asked for exactly, and for numbers that allow no standard error.
    """
    if method not in METHODS:
        raise MetricError(f"'{method}' is no way to estimate Shapley values.", nearest(method, METHODS))
    cached = game if isinstance(game, CachedGame) else CachedGame(game)
    players, row_errors = len(cached.players), None
    if players < 1 or len(set(cached.players)) < players:
        raise MetricError("A game needs at least one player, and different names.", "Group the parts of the model first.")
    if method == "auto":
        method = "exact" if players <= most else "permutation"
    if method == "exact":
        if players > most:
            raise MetricError(
                f"{players} players have {2**players:,} coalitions to evaluate.",
                f"Use method='permutation': {orders} orders need {orders * players:,} evaluations at most; or raise `most`.",
            )
        own = _exact(cached.rows(coalitions(players)))  # of every row
        values, errors, settings = own.mean(1), np.zeros(players), {}
        row_errors = _mean(own.T)[1] if own.shape[1] > 1 else None
    elif method == "permutation":
        values, errors = permutation(cached, orders, antithetic, seed)
        settings = {"orders": orders, "antithetic": antithetic, "seed": seed}
    else:
        values, errors = multilinear(cached, nodes, samples, antithetic, seed)
        settings = {"nodes": nodes, "samples": samples, "antithetic": antithetic, "seed": seed}
    empty, total = cached(np.array([np.zeros(players), np.ones(players)], dtype=bool)).tolist()
    return Shapley(cached.players, values, errors, total, empty, cached.evaluations, method, settings, row_errors)


def coalitions(players: int) -> np.ndarray:
    """All coalitions, (2^players, players) bool; row r holds the binary digits of r, the first player's lowest."""
    return (np.arange(2**players)[:, None] >> np.arange(players)) & 1 == 1


def exact(game: Game) -> np.ndarray:
    """The values from all coalitions, (players,)."""
    return _exact(game(coalitions(len(game.players))))


def _exact(values: np.ndarray) -> np.ndarray:
    """(2^players, ...) values of all coalitions -> (players, ...)."""
    players = (len(values) - 1).bit_length()
    weight = np.array([1 / (players * math.comb(players - 1, size)) for size in range(players)])
    return np.array([np.tensordot(weight[sizes], gains, 1) for gains, sizes in _gains(values, players)])


def _gains(values: np.ndarray, players: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For every player v(S + i) - v(S) of all S without it, (2^(players - 1), ...), and |S|."""
    codes, sizes = np.arange(2**players), coalitions(players).sum(1)
    for player in range(players):
        without = codes[(codes >> player) & 1 == 0]
        yield values[without | (1 << player)] - values[without], sizes[without]


def quadrature(game: Game, nodes: int) -> np.ndarray:
    """The values by Gauss-Legendre quadrature of c_i(p), itself from all coalitions: exact with at least L / 2 nodes, (players,)."""
    players = len(game.players)
    places, weights = _gauss(nodes)
    found = []
    for gains, sizes in _gains(game(coalitions(players)), players):
        at = places[:, None]
        found.append(weights @ (at**sizes * (1 - at) ** (players - 1 - sizes) @ gains))
    return np.array(found)


def permutation(game: Game, orders: int, antithetic: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and standard errors from random orders: what each player adds when it joins those before it."""
    players, step = len(game.players), 2 if antithetic else 1
    if orders < 2 * step or orders % step:
        raise MetricError(f"{orders} orders give no standard error.", f"Use at least {2 * step}{EVEN if antithetic else ''}.")
    random = np.random.default_rng(derive(seed, "shapley", "orders"))
    drawn = [random.permutation(players) for _ in range(orders // step)]
    drawn = [one for order in drawn for one in ((order, order[::-1]) if antithetic else (order,))]
    masks = np.zeros((orders, players + 1, players), dtype=bool)
    for row, order in enumerate(drawn):
        for place, player in enumerate(order):
            masks[row, place + 1 :, player] = True
    values = game(masks.reshape(-1, players)).reshape(orders, players + 1)
    gains = np.zeros((orders, players))
    for row, order in enumerate(drawn):
        gains[row, order] = np.diff(values[row])
    return _mean(gains.reshape(-1, step, players).mean(1))


def multilinear(game: Game, nodes: int, samples: int, antithetic: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and standard errors from coalitions drawn at Gauss-Legendre nodes, each of which serves all players."""
    players, step = len(game.players), 2 if antithetic else 1
    if nodes < 1 or samples < 2 * step or samples % step:
        raise MetricError(
            f"{samples} coalitions at each of {nodes} nodes give no standard error.",
            f"Use at least {2 * step}{EVEN if antithetic else ''}.",
        )
    random = np.random.default_rng(derive(seed, "shapley", "coalitions"))
    places, weights = _gauss(nodes)
    drawn = random.random((nodes, samples // step, 1, players))
    drawn = np.concatenate([drawn, 1 - drawn], 2) if antithetic else drawn
    masks = (drawn < places[:, None, None, None]).reshape(-1, players)
    flips = np.repeat(masks[:, None, :], players + 1, 1)  # as drawn, then with each player flipped
    flips[:, np.arange(players) + 1, np.arange(players)] ^= True
    values = game(flips.reshape(-1, players)).reshape(-1, players + 1)
    gains = np.where(masks, values[:, :1] - values[:, 1:], values[:, 1:] - values[:, :1])
    pairs = gains.reshape(nodes, samples // step, step, players).mean(2)
    means, errors = zip(*(_mean(node) for node in pairs), strict=True)
    return weights @ np.array(means), np.sqrt(weights**2 @ np.array(errors) ** 2)


def _gauss(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return (places + 1) / 2, weights / 2


def _mean(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over rows."""
    return rows.mean(0), rows.std(0, ddof=1) / math.sqrt(len(rows))
