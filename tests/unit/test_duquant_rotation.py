"""Rotations, permutations and chains of DuQuant: what must hold for every input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.compress.duquant import Chain, base_matrix, build_chain, greedy_rotation, hadamard, random_orthogonal, smoothing_scale, zigzag
from trocar.compress.duquant.chains import block_size
from trocar.compress.duquant.diagnostics import block_variance, outlier_figures, outlier_map, stages
from trocar.core.errors import ConfigError, DataError
from trocar.patch.quantised import Transform


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spiky(tokens: int = 96, channels: int = 64, seed: int = 0, massive: float = 0.0) -> torch.Tensor:
    x = torch.randn(tokens, channels, generator=rng(seed))
    x[:, ::17] *= 20
    x[0, 5] += massive
    return x


def orthogonal(matrix: torch.Tensor) -> float:
    return float((matrix @ matrix.mT - torch.eye(matrix.shape[-1], dtype=matrix.dtype)).abs().max())


@pytest.mark.parametrize("size", [2, 3, 5, 16, 48, 127, 128])
def test_the_base_matrix_is_orthogonal_with_a_flat_first_row(size: int) -> None:
    base = base_matrix(size)
    assert orthogonal(base) < 1e-12
    torch.testing.assert_close(base[0], torch.full((size,), size**-0.5, dtype=torch.float64), rtol=0, atol=1e-15)


def test_the_base_matrix_is_the_product_of_plane_rotations_after_the_exchange() -> None:
    """Size 3 by hand: Helmert's rows with the flat one first, columns 0 and 2 exchanged."""
    a, b, c = 3**-0.5, 6**-0.5, 2**-0.5
    expected = torch.tensor([[a, a, a], [-2 * b, b, b], [0, -c, c]], dtype=torch.float64)
    torch.testing.assert_close(base_matrix(3), expected)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 64, 80, 96, 192, 576])
def test_hadamard_matrices(size: int) -> None:
    matrix = hadamard(size)
    assert orthogonal(matrix) < 1e-12
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))


@pytest.mark.parametrize("size", [3, 6, 52, 90])
def test_sizes_without_a_hadamard_matrix_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"No Hadamard matrix of size {size}"):
        hadamard(size)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.sampled_from([2, 4, 8, 16]), st.integers(0, 8), st.sampled_from(["each", "once"]), st.floats(0, 1000))
def test_greedy_lowers_the_peak_and_pruning_changes_nothing(seed: int, block: int, steps: int, draw: str, massive: float) -> None:
    x = spiky(24, 48, seed, massive)
    found = greedy_rotation(x, block, steps, rng(seed), draw=draw)  # type: ignore[arg-type]
    plain = greedy_rotation(x, block, steps, rng(seed), draw=draw, prune=False)  # type: ignore[arg-type]
    assert torch.equal(found.rotation, plain.rotation)
    assert found.step == plain.step
    assert orthogonal(found.rotation) < 1e-10
    turned = (x.double().reshape(-1, block) @ found.rotation).abs().max()
    assert turned <= x.abs().max() * (1 + 1e-6)
    assert float(turned) == pytest.approx(min(found.peaks), rel=1e-5)
    assert len(found.peaks) == steps + 1


def test_more_steps_of_the_same_stream_are_never_worse() -> None:
    x = spiky(massive=500)
    best = [min(greedy_rotation(x, 16, steps, rng(3)).peaks) for steps in range(12)]
    assert best == sorted(best, reverse=True)
    assert best[-1] < best[0]


def test_no_steps_zeros_and_blocks_of_one_give_the_identity() -> None:
    eye = torch.eye(16, dtype=torch.float64)
    assert torch.equal(greedy_rotation(spiky(), 16, 0, rng()).rotation, eye)
    assert torch.equal(greedy_rotation(torch.zeros(5, 32), 16, 8, rng()).rotation, eye)
    assert torch.equal(greedy_rotation(spiky(), 1, 8, rng()).rotation, eye[:1, :1])


def test_the_identity_is_kept_where_every_step_would_raise_the_peak() -> None:
    """Rows of ones with a slightly larger first entry: a rotation can only make them worse."""
    x = torch.ones(4, 16)
    x[:, 0] = 1.01
    found = greedy_rotation(x, 16, 8, rng())
    assert found.step == 0
    assert min(found.peaks[1:]) > 1.3


def test_a_lone_spike_is_spread() -> None:
    x = torch.zeros(8, 128)
    x[3, 40] = 1000
    first = greedy_rotation(x, 128, 1, rng())
    turned = (x.double() @ first.rotation)[3]
    assert float(turned[40]) == pytest.approx(1000 / 128**0.5, rel=1e-6)
    assert min(first.peaks) < 450


@pytest.mark.parametrize("options", [{"objective": "range"}, {"outlier": "row"}, {"draw": "once"}])
def test_parity_options_give_rotations_of_their_own(options: dict[str, str]) -> None:
    x = spiky(massive=30, seed=4)
    other = greedy_rotation(x, 16, 8, rng(), **options)  # type: ignore[arg-type]
    assert orthogonal(other.rotation) < 1e-10
    assert not torch.equal(other.rotation, greedy_rotation(x, 16, 8, rng()).rotation)
    if options == {"objective": "range"}:
        assert other.peaks[0] == pytest.approx(float(x.max() - x.min()))


def test_row_slip_counts_rows_of_the_whole_input_when_pruned() -> None:
    x = spiky(massive=900)
    pruned, plain = (greedy_rotation(x, 16, 8, rng(), outlier="row", prune=prune) for prune in (True, False))
    assert torch.equal(pruned.rotation, plain.rotation)


def test_bad_input_is_refused() -> None:
    x = spiky()
    x[4, 4] = float("nan")
    with pytest.raises(DataError, match="1 entries of a layer's input are not finite"):
        greedy_rotation(x, 16, 4, rng())
    with pytest.raises(ConfigError, match="Blocks of 24 do not divide 64"):
        greedy_rotation(spiky(), 24, 4, rng())
    with pytest.raises(ConfigError, match=r"Blocks of 24 do not divide the 64 channels of down. Use 8, 16, 32"):
        block_size(64, 24, "down")


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda blocks: st.tuples(
            st.just(blocks),
            st.sampled_from([1, 2, 4, 6, 8]).flatmap(
                lambda size: st.tuples(
                    st.just(size), st.lists(st.floats(0, 1e4, allow_subnormal=False), min_size=size * blocks, max_size=size * blocks)
                )
            ),
        )
    )
)
def test_zigzag_balances_blocks(case: tuple[int, tuple[int, list[float]]]) -> None:
    blocks, (size, values) = case
    order = torch.tensor(values, dtype=torch.float64)
    p = zigzag(order, size)
    assert torch.equal(p.sort().values, torch.arange(len(order)))
    dealt = order[p].reshape(blocks, size)
    assert (dealt.diff(dim=1) <= 0).all()
    if blocks == 1:
        assert torch.equal(p, order.argsort(descending=True, stable=True))
    if size % 2 == 0:
        means = dealt.mean(1)
        gap = float(order.sort().values.diff().max()) if len(order) > 1 else 0.0
        spread = float(order.max() - order.min())
        slack = 1e-9 * (1 + float(order.max()))
        assert float(means.max() - means.min()) <= min((blocks - 1) / 2 * gap, spread / size) + slack
        assert float(means.var(correction=0)) <= spread**2 / (4 * size**2) + slack


def test_zigzag_does_not_depend_on_scale_and_keeps_ties_in_order() -> None:
    order = torch.rand(48, generator=rng()).double()
    assert torch.equal(zigzag(order, 8), zigzag(order * 4096, 8))
    assert zigzag(torch.ones(8), 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


def test_zigzag_beats_random_permutations_which_beat_none() -> None:
    x = torch.randn(200, 128, generator=rng())
    x[:, :24] *= torch.linspace(8, 12, 24)
    none = block_variance(x, 16)
    random = sum(block_variance(x[:, torch.randperm(128, generator=rng(i))], 16) for i in range(20)) / 20
    ours = block_variance(x[:, zigzag(x.abs().amax(0), 16)], 16)
    assert ours < random / 5
    assert random < none


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.booleans(), st.booleans())
def test_a_chain_leaves_the_product_alone_and_is_undone(seed: int, scaled: bool, per_block: bool) -> None:
    x, weight = spiky(20, 48, seed, 300), torch.randn(12, 48, generator=rng(seed))
    chain = Chain(block_size=8, search_steps=4, per_block=per_block)
    transform = build_chain(x, chain, rng(seed))
    scale = smoothing_scale(x.abs().amax(0), weight.abs().amax(0), 0.6) if scaled else None
    transform = Transform(48, scale, transform.steps)
    kept = x.clone()
    right = x.double() @ weight.double().T
    product = transform.online(x.double()) @ transform.weight(weight.double()).T
    assert float((product - right).norm() / right.norm()) < 1e-12
    single = transform.to(torch.float32)
    product = single.online(x) @ single.weight(weight).T
    assert float((product - right).norm() / right.norm()) < 1e-5
    half = single.online(x.bfloat16()) @ single.weight(weight).bfloat16().T
    assert half.dtype == torch.bfloat16
    assert float((half.double() - right).norm() / right.norm()) < 2e-2
    torch.testing.assert_close(single.inverse(single.online(x)), x, rtol=1e-4, atol=1e-3)
    assert torch.equal(x, kept)


def test_the_steps_of_a_chain_lower_the_peak() -> None:
    x = spiky(128, 128, massive=300)
    transform = build_chain(x, Chain(block_size=16), rng())
    raw, first, permuted, second = (float(part.abs().max()) for part in stages(x, transform).values())
    assert raw > first == permuted > second


def test_planted_spikes_are_flattened_as_far_as_was_measured() -> None:
    """512 x 1024 Gaussian, 8 channels times 20, one entry of 1000: largest entry and error of 4-bit tokens after each rotation."""
    from trocar.patch.quantised import Quantiser
    from trocar.patch.quantised import quantised as rounded

    x = torch.randn(512, 1024, generator=rng(1))
    x[:, torch.randperm(1024, generator=rng(2))[:8]] *= 20
    x[100, 500] = 1000

    def error(y: torch.Tensor) -> float:
        return float((rounded(y, Quantiser()) - y).square().mean())

    transform = build_chain(x, Chain(block_size=128, search_steps=64), rng(3))
    raw, first, _, second = (float(part.abs().max()) for part in stages(x, transform).values())
    assert raw == 1000
    assert 150 < first < 260
    assert 78 < second < 100
    once = Transform(1024, None, transform.steps[:1])
    errors = [error(y) for y in (x, once.online(x), transform.online(x))]
    assert errors[0] > 4 * errors[1] > 6 * errors[2]
    assert 0.075 < errors[2] < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_smoothing_alone_ruins_the_weight_behind_a_massive_outlier_and_the_chain_heals_it(seed: int) -> None:
    """The argument of the paper: relative error of 4-bit weights, and how many of them become zero."""
    from trocar.patch.quantised import Quantiser
    from trocar.patch.quantised import quantised as rounded

    x, weight = torch.randn(512, 1024, generator=rng(seed)), torch.randn(128, 1024, generator=rng(seed + 9)) / 32
    x[0, 7] = 3000
    smooth = Transform(1024, smoothing_scale(x.abs().amax(0), weight.abs().amax(0), 0.6))

    def measure(steps: tuple[str, ...]) -> tuple[float, float]:
        turned = Transform(1024, smooth.scale, build_chain(smooth.online(x), Chain(steps=steps), rng(seed)).steps).weight(weight)  # type: ignore[arg-type]
        close = rounded(turned, Quantiser())
        return float((close - turned).norm() / turned.norm()), float((close == 0).float().mean())

    plain = float((rounded(weight, Quantiser()) - weight).norm() / weight.norm())
    (alone, zeros), (once, _), (whole, _) = measure(()), measure(("rotate",)), measure(("rotate", "permute", "rotate"))
    assert alone > 2 * plain
    assert alone > 2 * whole
    assert alone > once > whole
    assert zeros > 0.6


def test_smoothing_scales_have_floors_and_leave_dead_channels() -> None:
    a, w = torch.tensor([0.0, 4.0, 1.0, 1e-9]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    torch.testing.assert_close(smoothing_scale(a, w, 0.5), torch.tensor([1.0, 2.0, 1.0, 0.01]))


def test_random_rotations_are_orthogonal_and_drawn_from_the_generator() -> None:
    one, two, other = random_orthogonal(24, rng(1)), random_orthogonal(24, rng(1)), random_orthogonal(24, rng(2))
    assert orthogonal(one) < 1e-12
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("rotation", ["greedy", "hadamard", "full-hadamard", "random"])
@pytest.mark.parametrize("permutation", ["zigzag", "random"])
def test_every_kind_of_chain_is_orthogonal(rotation: str, permutation: str) -> None:
    chain = Chain(rotation=rotation, permutation=permutation, block_size=16, search_steps=3)  # type: ignore[arg-type]
    eye = build_chain(spiky(30, 48), chain, rng()).online(torch.eye(48, dtype=torch.float64))
    assert orthogonal(eye) < 1e-10


def test_a_map_of_outliers_shows_the_largest_entry_of_each_cell_in_powers_of_ten() -> None:
    x = torch.ones(90, 100)
    x[50, 77] = -1000
    figure = outlier_map(x, "one", "One", "")
    cells = {(row["token"], row["channel"]): row["powers of ten"] for row in figure.rows}
    assert len(cells) == 30 * 34  # three rows and three columns to a cell
    assert {place for place, value in cells.items() if value > 0} == {("48–50", "75–77")}
    assert cells["48–50", "75–77"] == pytest.approx(3)
    assert cells["87–89", "99"] == 0


def test_figures_of_outliers_are_of_the_worst_input() -> None:
    x = {name: torch.randn(32, 16, generator=rng(seed)) for seed, name in enumerate(("calm", "wild"))}
    x["wild"][0, 3] = 500
    transform = build_chain(x["wild"], Chain(block_size=4, search_steps=8), rng())
    figures = outlier_figures(x, x, {"calm": transform, "wild": transform})
    assert [figure.id for figure in figures] == ["outliers_float", "outliers_received", "outliers_turned", "outliers"]
    assert "wild" in figures[0].title
    assert [row["input of"] for row in figures[-1].rows] == ["wild", "calm"]
    before, after = (float(figures[-1].rows[0][when]) for when in ("in the float model", "after all steps"))
    assert before > 400
    assert after < before / 1.5
