import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.core.errors import ConfigError, DataError, EditError, ScoresError
from trocar.edit.where_to_edit.config import EditConfig, HypernetworkConfig, LabelConfig
from trocar.edit.where_to_edit.hypernetwork import Made, MaskHypernetwork, default_heads, predict
from trocar.edit.where_to_edit.masks import top_k

SHAPE = {"rows": 4, "entries": 10, "width": 12, "depth": 2, "heads": 3}
MADE = Made(**SHAPE, first_block=1, modules=["a"], structure="s", fingerprint="f", kind="ref")


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0, -1.0, 1e-5, float("inf"), 3.0]), min_size=24, max_size=24),
    keeps=st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)),
)
def test_top_k_is_exact_and_nested(values: list[float], keeps: tuple[float, float]) -> None:
    scores = torch.tensor(values).view(4, 6)
    small, large = (top_k(scores, keep) for keep in sorted(keeps))
    for mask, keep in ((small, min(keeps)), (large, max(keeps))):
        assert int(mask.sum()) == max(1, round(keep * 24))
        assert mask.all() or scores[mask].min() >= scores[~mask].max()
    assert not (small & ~large).any()


def test_top_k_breaks_ties_by_lower_index_across_matrices() -> None:
    assert top_k(torch.ones(2, 4), 0.5).flatten().tolist() == [True] * 4 + [False] * 4
    saturated = torch.full((3, 2, 4), 1 - 1e-5)  # the published "strictly greater" rule would open nothing
    assert top_k(saturated, 0.25).sum((1, 2)).tolist() == [2, 2, 2]


def test_top_k_refuses_nan_and_shares_outside_the_range() -> None:
    with pytest.raises(ScoresError, match="NaN"):
        top_k(torch.tensor([[1.0, float("nan")]]), 0.5)
    for keep in (0, -0.1, 1.5):
        with pytest.raises(ConfigError, match=r"must be in \(0, 1\]"):
            top_k(torch.ones(1, 2), keep)


def test_keep_and_sparsity_are_two_spellings() -> None:
    assert EditConfig.parse({"sparsity": 0.95}).keep == 0.05
    assert EditConfig.parse({"sparsity": 0.0}).keep == 1
    with pytest.raises(ConfigError, match="not both"):
        EditConfig.parse({"sparsity": 0.95, "keep": 0.05})
    for bad in ({"sparsity": 1.0}, {"sparsity": -0.1}, {"sparsity": "high"}, {"keep": 0}, {"keep": 1.01}, {"keep": -1}):
        with pytest.raises(ConfigError):
            EditConfig.parse(bad)
    with pytest.raises(ConfigError, match="Did you mean 'keep'"):
        EditConfig.parse({"kep": 0.5})
    assert EditConfig.parse(json.loads(EditConfig(keep=0.3).model_dump_json())) == EditConfig(keep=0.3)


def test_label_settings() -> None:
    assert LabelConfig.parse({"alpha": 1e-3}).alpha == 1e-3
    for bad in ({"alpha": -1}, {"sparsity_weight": float("inf")}, {"kind": "both"}, {"inner_steps": 0}):
        with pytest.raises(ConfigError):
            LabelConfig.parse(bad)
    with pytest.raises(ConfigError):
        HypernetworkConfig.parse({"held_out": 1})


def test_hypernetwork_shape_batch_equivariance_and_determinism() -> None:
    network = MaskHypernetwork(MADE, seed=1).eval()
    features = torch.randn(5, 12)
    u = network(features)
    assert u.shape == (5, 4, 10)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(network(features[order]), u[order], atol=1e-6)
    assert torch.allclose(network(features[:1]), u[:1], atol=1e-6)
    assert torch.equal(network(features), u)
    assert torch.equal(MaskHypernetwork(MADE, seed=1)(features), u)
    assert not torch.equal(MaskHypernetwork(MADE, seed=2)(features), u)
    probability = network.probabilities(1000 * features)
    assert probability.min() >= 1e-5
    assert probability.max() <= 1 - 1e-5


def test_only_the_output_maps_break_the_symmetry_of_the_tokens() -> None:
    network = MaskHypernetwork(MADE).eval()
    for output in network.outputs[1:]:
        output.load_state_dict(network.outputs[0].state_dict())
    u = network(torch.randn(3, 12))
    assert torch.allclose(u, u[:, :1].expand_as(u), atol=1e-6)
    with torch.no_grad():
        network.tokens[1] += 1
    assert not torch.allclose(network(torch.randn(3, 12))[:, 1], network(torch.randn(3, 12))[:, 0], atol=1e-3)


def test_hypernetwork_does_not_touch_the_random_state() -> None:
    before = torch.random.get_rng_state()
    MaskHypernetwork(MADE)
    assert torch.equal(before, torch.random.get_rng_state())


def test_several_images_average_probabilities_or_logits() -> None:
    features, groups = torch.randn(4, 12), torch.tensor([[0, 1], [2, 3]])
    reference = MaskHypernetwork(MADE).eval()
    mean = torch.sigmoid(3 * reference(features)).view(2, 2, 4, 10).mean(1)
    assert torch.allclose(predict(reference, features, groups), mean, atol=1e-6)
    first_order = MaskHypernetwork(MADE.model_copy(update={"kind": "fo"})).eval()
    assert torch.allclose(predict(first_order, features, groups), first_order(features).view(2, 2, 4, 10).mean(1), atol=1e-6)


def test_hypernetwork_file_round_trip_and_refusals(tmp_path) -> None:  # type: ignore[no-untyped-def]
    network = MaskHypernetwork(MADE.model_copy(update={"report": {"better_than_constant": True, "held_out": 0.25}}), seed=4)
    network.mean.normal_()
    network.save(tmp_path / "h.safetensors")
    loaded = MaskHypernetwork.load(tmp_path / "h.safetensors")
    assert loaded.made == network.made
    assert loaded.learned
    assert not loaded.training
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in network.state_dict().items())
    first = (tmp_path / "h.safetensors").read_bytes()
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == first

    (tmp_path / "cut.safetensors").write_bytes(first[: len(first) // 2])
    (tmp_path / "text.safetensors").write_text("not a file of tensors")
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    header = {"format": "trocar-mask-hypernetwork", "version": 1, "made": {**MADE.model_dump(), "entries": 10**6, "depth": 10**6}}
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "huge.safetensors", metadata={"trocar": json.dumps(header)})
    header["made"] = {**MADE.model_dump(), "unknown": 1}
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "unknown.safetensors", metadata={"trocar": json.dumps(header)})
    for name in ("cut", "text", "other", "huge", "missing"):
        with pytest.raises(DataError):
            MaskHypernetwork.load(tmp_path / f"{name}.safetensors")
    with pytest.raises((DataError, ConfigError)):
        MaskHypernetwork.load(tmp_path / "unknown.safetensors")


def test_heads() -> None:
    assert [default_heads(width) for width in (768, 384, 128, 24, 7)] == [6, 6, 4, 6, 1]
    with pytest.raises(EditError, match="do not divide"):
        MaskHypernetwork(MADE.model_copy(update={"heads": 5}))
