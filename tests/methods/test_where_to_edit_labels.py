"""Mask labels: the bi-level search and its first-order limit, invariants 5 to 11 and 14 of the method."""

import pytest
import torch
import torch.nn.functional as F
from edit_models import pictures, small_vit
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.core.errors import EditError
from trocar.core.workspace import Workspace
from trocar.edit.where_to_edit import HypernetworkConfig, LabelConfig, Place, Rows, calibrate, centred_log, first_order_labels, mask_labels
from trocar.edit.where_to_edit.config import CutMixConfig
from trocar.edit.where_to_edit.cutmix import cutmix_pairs
from trocar.edit.where_to_edit.hypernetwork import Made, MaskHypernetwork, made_for
from trocar.edit.where_to_edit.labels import InnerProblem, check_open_share, kl_to_target, row_norms
from trocar.edit.where_to_edit.leaves import Leaf
from trocar.edit.where_to_edit.masks import top_k
from trocar.edit.where_to_edit.place import guarded
from trocar.edit.where_to_edit.training import fit, loss_of

REFERENCE = LabelConfig(kind="ref", alpha=0.05, sparsity_weight=0.3)


@pytest.fixture(scope="module")
def place() -> Place:
    return Place.of(small_vit())


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    return cutmix_pairs(pictures(6), range(4), (8, 8), CutMixConfig(), 0)


def random_mask(place: Place, count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, place.rows, place.entries, generator=torch.Generator().manual_seed(seed)).double()


def expanded(place: Place, mask: torch.Tensor) -> list[torch.Tensor]:
    """The mask of one sample as full matrices in the storage layout: rows of fc1, columns of fc2."""
    return [
        (mask[matrix.row][:, None] if matrix.side == "up" else mask[matrix.row][None]).expand(matrix.view.parameter.shape)
        for matrix in place.matrices
    ]


@pytest.mark.parametrize("width", [24, 40])  # d == h too, where a swap of rows and columns would go unnoticed by shapes
def test_structured_product_equals_explicit_expansion(width: int) -> None:
    place = Place.of(small_vit(hidden_size=width, num_attention_heads=2))
    x = pictures(1)
    mask = random_mask(place, 1)
    change = [torch.randn(1, m.entries, m.width, dtype=torch.float64) * 0.1 for m in place.matrices]
    with guarded(place.model), torch.no_grad():
        problem = InnerProblem(place, x, x, 5.0)
        ours = problem.mixed.logits([Leaf(m, w) for m, w in zip(place.matrices, problem.gated(mask, change), strict=True)])
        stored = [part[0] if matrix.side == "up" else part[0].T for matrix, part in zip(place.matrices, change, strict=True)]
        before = [matrix.view.parameter.clone() for matrix in place.matrices]
        for matrix, gate, part in zip(place.matrices, expanded(place, mask[0]), stored, strict=True):
            matrix.view.parameter.add_(gate * part)
        theirs = place.model(x).logits
        for matrix, value in zip(place.matrices, before, strict=True):
            matrix.view.parameter.copy_(value)
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert [matrix.side for matrix in place.matrices] == ["up", "down"] * 3


def test_mask_gradient_equals_autograd_and_finite_differences(place: Place, pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, mixed = (side[:2] for side in pairs)
    with guarded(place.model):
        problem = InnerProblem(place, clean, mixed, 5.0)
        mask = random_mask(place, 2)
        ours, _ = problem.mask_gradient(mask, 0.1, 3)
        offset = problem.offset(mask, 0.1, 3)
        leaf = mask.clone().requires_grad_()
        theirs = torch.autograd.grad(problem.value(problem.gated(leaf, offset)).sum(), leaf)[0]
        assert ours.abs().max() > 1e-4
        assert torch.allclose(ours, theirs, atol=1e-12)
        for entry in ((0, 0, 3), (1, 3, 7), (0, 5, 39)):
            step = torch.zeros_like(mask)
            step[entry] = 1e-5
            high, low = (problem.value(problem.gated(mask + sign * step, offset))[entry[0]] for sign in (1, -1))
            assert float((high - low) / 2e-5) == pytest.approx(float(ours[entry]), rel=1e-4, abs=1e-9)


def test_offset_follows_the_dense_gradient_of_the_effective_weights(place: Place, pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Closed entries move too (they could never open otherwise), and a plain inner loop gives the same offset."""
    clean, mixed = (side[:2] for side in pairs)
    with guarded(place.model):
        problem = InnerProblem(place, clean, mixed, 5.0)
        mask = (random_mask(place, 2) > 0.5).double()
        ours = problem.offset(mask, 0.1, 3)
        change = [torch.zeros(2, *start.shape, dtype=torch.float64) for start in problem.start]
        for _ in range(3):
            gradient, _ = problem.gradient(problem.gated(mask, change))
            change = [part - 0.1 * step for part, step in zip(change, gradient, strict=True)]
    for matrix, mine, theirs in zip(place.matrices, ours, change, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-14)
        assert mine[mask[:, matrix.row] == 0].abs().max() > 0


def test_small_alpha_limit_is_linear(place: Place, pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, mixed = pairs
    norms = first_order_labels(place, clean, mixed)
    with guarded(place.model):
        problem = InnerProblem(place, clean, mixed, 5.0)
        mask = random_mask(place, 4)
        gaps = []
        for alpha in (1e-2, 1e-3, 1e-4):
            limit = -5 * alpha * norms
            gradient, _ = problem.mask_gradient(mask, alpha, 5)
            gaps.append(float((gradient - limit).norm() / limit.norm()))
    assert gaps[0] < 1
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.3)
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.1)


def test_row_norms_by_gram_matrix_equal_direct_ones(place: Place, pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, mixed = pairs

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, torch.arange(4), reduction="sum")

    with guarded(place.model):
        rows = Rows(place, {"pixel_values": mixed})
        for groups in (torch.arange(4)[:, None], torch.tensor([[0, 1], [2, 3]])):
            found = [row_norms(rows, groups, loss, gram=gram) for gram in (True, False)]
            weights = [matrix.start().expand(len(groups), -1, -1).clone().requires_grad_() for matrix in place.matrices]
            logits = rows.logits([Leaf(m, w) for m, w in zip(place.matrices, weights, strict=True)], groups.flatten())
            gradients = torch.autograd.grad(loss(logits), weights)
            direct = torch.stack([gradient.square().sum(-1) for gradient in gradients], 1)
            assert direct.max() > 1e-4
            assert all(torch.allclose(norms, direct, rtol=1e-9, atol=1e-16) for norms in found)


def test_neuron_permutation_permutes_labels(pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, mixed = pairs
    model, other = small_vit(), small_vit()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    places = Place.of(model), Place.of(other)
    with torch.no_grad():
        for layer in range(1, 4):
            mlp = other.vit.layers[layer].mlp if hasattr(other.vit, "layers") else None
            assert mlp is not None
            mlp.fc1.weight.copy_(mlp.fc1.weight[order])
            mlp.fc1.bias.copy_(mlp.fc1.bias[order])
            mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])
    theta = 2 * torch.rand(4, 6, 40, generator=torch.Generator().manual_seed(1)).double() - 1
    first, _ = mask_labels(places[0], clean, mixed, REFERENCE, 0, range(4), theta)
    second, _ = mask_labels(places[1], clean, mixed, REFERENCE, 0, range(4), theta[:, :, order])
    assert ((first[:, :, order] > 0.5) == (second > 0.5)).all()
    assert (first[:, :, order] - second).abs().mean() < 1e-7
    assert torch.allclose(
        first_order_labels(places[0], clean, mixed)[:, :, order], first_order_labels(places[1], clean, mixed), rtol=1e-9, atol=1e-18
    )


def test_no_op_pair_closes_everything(place: Place, pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, _ = pairs
    labels, seen = mask_labels(place, clean, clean, REFERENCE, 0, range(4))
    assert seen["kl_before"] == pytest.approx(0, abs=1e-12)
    assert (labels < 0.5).all()
    assert labels.mean() < 0.06
    assert first_order_labels(place, clean, clean).abs().max() < 1e-25
    assert torch.equal(centred_log(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))


def test_penalty_closes_entries(place: Place, pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, mixed = pairs
    shares = [
        mask_labels(place, clean, mixed, REFERENCE.model_copy(update={"sparsity_weight": weight}), 0, range(4))[1]["open"]
        for weight in (0.0, 0.03, 0.3, 3.0, 30.0)
    ]
    assert shares[0] > 0.7
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0] / 2


def test_labels_do_not_depend_on_the_batch(place: Place, pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, mixed = pairs
    together, _ = mask_labels(place, clean, mixed, REFERENCE, 7, [10, 11, 12, 13])
    for row in range(4):
        alone, _ = mask_labels(place, clean[row : row + 1], mixed[row : row + 1], REFERENCE, 7, [10 + row])
        assert torch.allclose(alone[0], together[row], atol=1e-9)
    order = torch.tensor([2, 0])
    swapped, _ = mask_labels(place, clean[order], mixed[order], REFERENCE, 7, [12, 10])
    assert torch.allclose(swapped, together[order], atol=1e-9)
    other, _ = mask_labels(place, clean, mixed, REFERENCE, 8, [10, 11, 12, 13])
    assert not torch.allclose(other, together, atol=1e-3)


def test_two_starts_agree_more_than_two_samples(place: Place) -> None:
    clean, mixed = cutmix_pairs(pictures(12), range(12), (8, 8), CutMixConfig(), 1)
    settings_, _ = calibrate(place, clean, mixed, LabelConfig(kind="ref"), 0)
    first, second = (mask_labels(place, clean, mixed, settings_, seed, range(12))[0] > 0.5 for seed in (0, 1))

    def iou(a: torch.Tensor, b: torch.Tensor) -> float:
        union = (a | b).sum()
        return float((a & b).sum() / union) if union else 1.0

    starts = sum(iou(first[row], second[row]) for row in range(12)) / 12
    samples = sum(iou(first[row], first[(row + 1) % 12]) for row in range(12)) / 12
    assert starts > samples + 0.15


@settings(deadline=None, max_examples=50)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5),
    other=st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5),
    temperature=st.floats(0.1, 20),
)
def test_kl_is_zero_for_equal_finite_always_and_never_negative(logits: list[float], other: list[float], temperature: float) -> None:
    first, second = torch.tensor([logits]), torch.tensor([other])
    assert torch.equal(kl_to_target(first, first, temperature), torch.zeros(1))
    value = kl_to_target(first, second, temperature)
    assert value.isfinite().all()
    assert value >= -1e-3
    gradient = torch.autograd.grad(kl_to_target(first, second.requires_grad_(), temperature).sum(), second)[0]
    assert gradient.isfinite().all()


def test_calibration_finds_a_step_and_a_penalty(place: Place) -> None:
    clean, mixed = cutmix_pairs(pictures(16), range(12), (8, 8), CutMixConfig(), 1)
    found, log = calibrate(place, clean, mixed, LabelConfig(kind="ref", outer_steps=4), 0)
    assert isinstance(found.alpha, float)
    assert isinstance(found.sparsity_weight, float)
    assert log["removed_by_all_ones"] >= 1 / 3
    assert log["alpha"] == found.alpha
    _, seen = mask_labels(place, clean, mixed, found, 0, range(12))
    assert 0.05 <= seen["open"] <= 0.2
    with pytest.raises(EditError, match="needs numbers"):
        mask_labels(place, clean, mixed, LabelConfig(kind="ref"), 0, range(12))


def test_collapsed_and_saturated_labels_are_refused() -> None:
    with pytest.raises(EditError, match=r"collapsed.*alpha"):
        check_open_share(torch.zeros(2, 6, 40), {"alpha": 1e-3})
    with pytest.raises(EditError, match=r"saturated.*alpha"):
        check_open_share(torch.ones(2, 6, 40), {"alpha": 1e-3})
    half = torch.zeros(2, 6, 40)
    half[0] = 1
    assert check_open_share(half, {}) == 0.5


def test_hypernetwork_overfits_eight_pairs(place: Place) -> None:
    clean, mixed = cutmix_pairs(pictures(12), range(8), (8, 8), CutMixConfig(), 1)
    found, _ = calibrate(place, clean, mixed, LabelConfig(kind="ref", outer_steps=4), 0)
    labels = mask_labels(place, clean, mixed, found, 0, range(8))[0].float()
    with guarded(place.model):
        features = Rows(place, {"pixel_values": mixed}).features()[0].float()
    network = MaskHypernetwork(Made(depth=2, heads=4, kind="ref", **made_for(place)))
    config = HypernetworkConfig(pairs=16, epochs=120, patience=120, lr=1e-3, batch=14, steps_per_batch=2)
    report = fit(network, features.repeat(2, 1), labels.repeat(2, 1, 1), config, 0)  # held-out pairs are copies of training pairs
    constant = labels.mean(0, keepdim=True)
    chance = float(F.binary_cross_entropy(constant.clamp(1e-5, 1 - 1e-5).expand_as(labels), labels))
    with torch.no_grad():
        u = network.eval()(features)
    assert float(loss_of("ref", u, labels)) < 0.75 * chance
    assert report["best_epoch"] <= report["epochs"] <= 120
    assert report["better_than_constant"]
    masks = top_k(u, 0.05)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 8


def test_labels_resume_where_they_were(place: Place, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from trocar.edit.where_to_edit import make_labels, training

    images = pictures(8)
    config = HypernetworkConfig(pairs=12, chunk=4)
    whole = make_labels(place, images, config, 0)
    real, calls = training.first_order_labels, []

    def dies_at_the_second(*words: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "first_order_labels", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make_labels(place, images, config, 0, Workspace(tmp_path))
    again = make_labels(place, images, config, 0, Workspace(tmp_path))
    assert len(calls) == 1 + 1 + 2  # the first chunk was not computed again
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
