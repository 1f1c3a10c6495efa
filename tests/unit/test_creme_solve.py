"""The closed form of CREME: invariants 2, 3, 5, 6, 7 and 19, preserved keys, columns, and steps without a solution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.core.errors import EditError
from trocar.core.seeds import generator
from trocar.edit.creme.solve import Update, least_change, mixed

SIZE, OUT = 12, 9
seeds = st.integers(0, 10_000)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed, "creme", *shape), dtype=torch.float64)


def moment_of(seed: int) -> torch.Tensor:
    rows = draw(seed + 1, 3 * SIZE, SIZE)
    return rows.T @ rows / len(rows)


def change(update: Update) -> torch.Tensor:
    return update.left @ update.right


@settings(max_examples=25, deadline=None)
@given(seed=seeds, count=st.integers(1, 4), kept=st.integers(0, 4), metric=st.booleans())
def test_what_is_asked_is_done_and_nothing_is_cheaper(seed: int, count: int, kept: int, metric: bool) -> None:
    keys, residuals, preserved = draw(seed, SIZE, count), draw(seed, OUT, count), draw(seed + 7, SIZE, kept)
    moment = moment_of(seed) if metric else None
    update = least_change(keys, residuals, moment, preserved)
    delta = change(update)
    size = residuals.norm() + 1
    assert (delta @ keys - residuals).norm() < 1e-9 * size * update.condition  # I-1, I-7: what is asked is met
    if kept:
        assert (delta @ preserved).norm() < 1e-8 * size * update.condition / update.free
    assert torch.linalg.matrix_rank(delta, rtol=1e-9) <= count  # I-2
    assert abs(update.norm - float(delta.norm())) < 1e-9 * (1 + float(delta.norm()))
    taken = torch.cat([keys, preserved], 1)
    other = draw(seed + 3, OUT, SIZE)
    other = other - other @ taken @ torch.linalg.pinv(taken)  # another change that does not touch the constraints
    weight = torch.eye(SIZE, dtype=torch.float64) if moment is None else moment
    cost = [float(((delta + step * other) @ weight @ (delta + step * other).T).trace()) for step in (0.0, 0.1, -0.1)]
    assert cost[0] <= min(cost[1:])  # I-6


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_keys_orthogonal_in_the_metric_are_not_touched(seed: int) -> None:
    key, residual, moment = draw(seed, SIZE, 1), draw(seed, OUT, 1), moment_of(seed)
    for metric in (None, moment):
        delta = change(least_change(key, residual, metric))
        direction = key if metric is None else torch.linalg.solve(metric, key)
        other = draw(seed + 2, SIZE, 1)
        other = other - direction * (direction * other).sum() / (direction**2).sum()
        assert (delta @ other).norm() < 1e-10 * residual.norm()  # I-3


@settings(max_examples=15, deadline=None)
@given(seed=seeds, scale=st.floats(1e-6, 1e6))
def test_only_the_shape_of_the_second_moment_counts(seed: int, scale: float) -> None:
    keys, residuals, moment = draw(seed, SIZE, 2), draw(seed, OUT, 2), moment_of(seed)
    delta = change(least_change(keys, residuals, moment))
    assert (change(least_change(keys, residuals, scale * moment)) - delta).norm() < 1e-9 * delta.norm()  # I-5
    identity = change(least_change(keys, residuals, torch.eye(SIZE, dtype=torch.float64)))
    assert (identity - change(least_change(keys, residuals))).norm() < 1e-10 * identity.norm()


def test_one_key_is_the_published_formula() -> None:
    key, residual, moment = draw(0, SIZE, 1), draw(0, OUT, 1), moment_of(0)
    solved = torch.linalg.solve(moment, key)
    assert torch.allclose(change(least_change(key, residual, moment)), residual @ solved.T / (key * solved).sum(), atol=1e-12)
    assert torch.allclose(change(least_change(key, residual)), residual @ key.T / (key**2).sum(), atol=1e-14)


def test_a_batch_of_orthogonal_keys_is_the_sum_of_single_edits() -> None:
    """I-19: with M-orthogonal keys the batch is the sum; a ridge shrinks the step and never lengthens it."""
    moment, residuals = moment_of(3), draw(3, OUT, 3)
    keys = torch.linalg.cholesky(moment) @ torch.linalg.qr(draw(4, SIZE, 3)).Q  # K^T M^-1 K = 1
    alone = sum(change(least_change(keys[:, [i]], residuals[:, [i]], moment)) for i in range(3))
    assert torch.allclose(change(least_change(keys, residuals, moment)), torch.as_tensor(alone), atol=1e-10)
    norms = [least_change(keys, residuals, moment, ridge=ridge).norm for ridge in (0.0, 0.1, 1.0)]
    assert norms[0] > norms[1] > norms[2] > 0


def test_only_the_chosen_columns_change() -> None:
    keys, residuals, preserved, columns = draw(5, SIZE, 2), draw(5, OUT, 2), draw(6, SIZE, 2), [1, 2, 3, 7, 8, 10]
    for moment in (None, moment_of(5)):
        delta = change(least_change(keys, residuals, moment, preserved, columns))
        others = [column for column in range(SIZE) if column not in columns]
        assert not delta[:, others].any()
        assert torch.allclose(delta @ keys, residuals, atol=1e-9)
        assert torch.allclose(delta @ preserved, torch.zeros(OUT, 2, dtype=torch.float64), atol=1e-9)


def test_soft_preservation_approaches_the_projection() -> None:
    key, residual, preserved = draw(8, SIZE, 1), draw(8, OUT, 1), draw(9, SIZE, 3)
    hard = change(least_change(key, residual, preserved=preserved))
    moved = [float((change(least_change(key, residual, mixed(None, preserved, weight))) @ preserved).norm()) for weight in (1e-3, 1, 1e3)]
    assert moved[0] > moved[1] > moved[2] > 0
    assert torch.allclose(change(least_change(key, residual, mixed(None, preserved, 1e9))), hard, atol=1e-6)


def test_steps_without_a_solution_are_refused() -> None:
    key, residual = draw(1, SIZE, 1), draw(1, OUT, 1)
    with pytest.raises(EditError, match=r"block 3: a key has no length"):
        least_change(key * 0, residual, where="block 3")
    with pytest.raises(EditError, match="span the edited one"):
        least_change(key, residual, preserved=torch.cat([key, draw(2, SIZE, 1)], 1))
    with pytest.raises(EditError, match="cannot be told apart"):
        least_change(torch.cat([key, key], 1), torch.cat([residual, residual], 1))
    with pytest.raises(EditError, match="not positive definite"):
        least_change(key, residual, -torch.eye(SIZE, dtype=torch.float64))
    with pytest.raises(EditError, match="not finite"):
        least_change(key * float("nan"), residual)
    alike = least_change(torch.cat([key, key], 1), torch.cat([residual, residual], 1), ridge=1e-6)  # a ridge makes it possible
    assert torch.allclose(change(alike) @ key, residual, atol=1e-4)
