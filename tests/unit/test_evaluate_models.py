"""Running models: outputs, their cache, KL, perplexity, costs."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from trocar.anatomy import fingerprint
from trocar.core.errors import DataError, MetricError
from trocar.evaluate import (
    BaseOutputs,
    counts,
    data_digest,
    kl,
    kl_to_base,
    latency,
    outputs,
    perplexity,
    perplexity_measurement,
    refuse_overlap,
)
from trocar.method import Examples


@pytest.fixture
def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4, num_labels=5,
        hidden_dropout_prob=0.5,
    )  # fmt: skip
    return ViTForImageClassification(config).train()


def images(n, seed=0, start=0):
    generator = torch.Generator().manual_seed(seed)
    return Examples({"pixel_values": torch.randn(n, 3, 8, 8, generator=generator)}, tuple(f"i{row + start}" for row in range(n)))


# -- outputs --------------------------------------------------------------------------------------------------------------------------


def test_outputs_do_not_depend_on_the_batch_and_restore_training_flags(vit):
    next(iter(vit.children())).eval()
    flags = [module.training for module in vit.modules()]
    assert True in flags
    assert False in flags
    one, all_ = outputs(vit, images(5), 1), outputs(vit, images(5), 64)
    assert torch.allclose(one, all_, atol=1e-6)
    assert one.shape == (5, 5)
    assert one.dtype == torch.float32
    assert not one.requires_grad
    assert [module.training for module in vit.modules()] == flags  # and dropout was off, or the two would differ


def test_flags_are_restored_after_an_error(vit):
    with pytest.raises(AttributeError):
        outputs(vit, Examples({"no_such_input": torch.zeros(1, 2)}, ("a",)))
    assert vit.training


def test_half_precision_models_get_inputs_of_their_dtype(vit):
    assert outputs(vit.to(torch.bfloat16), images(2)).dtype == torch.float32


def test_outputs_refuse_what_is_no_classifier_and_nan(vit):
    with pytest.raises(MetricError, match="no logits"):
        outputs(vit.vit, images(1))
    with pytest.raises(MetricError, match="no examples"):
        outputs(vit, images(3).take([]))
    with torch.no_grad():
        vit.classifier.bias[0] = float("nan")
    with pytest.raises(MetricError, match="NaN for 2 of 2 examples, the first being 'i0'"):
        outputs(vit, images(2))


# -- the cache ------------------------------------------------------------------------------------------------------------------------


def test_base_outputs_are_computed_once_and_never_served_to_another_state(vit, tmp_path):
    cache, calls = BaseOutputs(tmp_path), []

    def compute(value):
        calls.append(value)
        return torch.full((2, 3), float(value))

    assert cache.get("state-a", "data", lambda: compute(1)).eq(1).all()
    assert cache.get("state-a", "data", lambda: compute(2)).eq(1).all()
    assert cache.get("state-b", "data", lambda: compute(3)).eq(3).all()
    assert cache.get("state-a", "other", lambda: compute(4)).eq(4).all()
    assert calls == [1, 3, 4]
    for empty in (("", "data"), ("state", "")):
        with pytest.raises(MetricError):
            cache.get(*empty, lambda: compute(5))


def test_a_file_of_another_state_under_the_right_name_is_not_served(tmp_path):
    cache = BaseOutputs(tmp_path)
    cache.get("state-a", "data", lambda: torch.zeros(1))
    cache.path("state-a", "data").rename(cache.path("state-b", "data"))
    with pytest.warns(UserWarning, match="computed again"):
        assert cache.get("state-b", "data", lambda: torch.ones(1)).item() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get("state-b", "data", lambda: torch.zeros(1)).item() == 1  # mended


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_is_never_served(tmp_path_factory, where, flip):
    cache = BaseOutputs(tmp_path_factory.mktemp("cache"))
    truth = torch.arange(6.0)
    cache.get("state-a", "data", lambda: truth)
    path = cache.path("state-a", "data")
    content = bytearray(path.read_bytes())
    content[where % len(content)] ^= flip
    path.write_bytes(bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(cache.get("state-a", "data", lambda: truth), truth)


def test_logits_follow_the_models_weights(vit, tmp_path):
    cache, data = BaseOutputs(tmp_path), images(3)
    before = cache.logits(vit, data)
    with torch.no_grad():
        vit.classifier.bias += 1
    after = cache.logits(vit, data)
    assert torch.allclose(after, before + 1, atol=1e-5)
    with torch.no_grad():
        vit.classifier.bias -= 1
    assert torch.allclose(cache.logits(vit, data), before, atol=1e-5)
    assert not torch.equal(cache.logits(vit, images(3, seed=1)), before)


def test_outputs_under_an_intervention_are_not_cached(vit, tmp_path):
    from trocar.trace import Scale, intervene

    cache = BaseOutputs(tmp_path)
    with intervene(vit, [Scale("L0.mlp", 0.0)]):
        with pytest.raises(MetricError, match="intervention"):
            cache.logits(vit, images(1))
        outputs(vit, images(1))
    assert cache.logits(vit, images(1)).shape == (1, 5)


def test_data_digest_sees_values_shapes_and_names():
    base = images(2)
    assert data_digest(base) == data_digest(images(2))
    others = [images(3), images(2, seed=1), base.take([1, 0]), Examples({"x": base.inputs["pixel_values"]}, base.ids)]
    assert len({data_digest(examples) for examples in [base, *others]}) == 5


def test_locality_set_must_not_hold_edited_examples():
    edited, other = images(3), images(3, seed=1, start=10)
    refuse_overlap(other, edited)
    with pytest.raises(DataError, match="the first being 'i1'"):
        refuse_overlap(images(3, seed=1, start=1), edited)
    renamed = Examples({"pixel_values": edited.inputs["pixel_values"][1:2]}, ("copy",))
    with pytest.raises(DataError, match="'copy', whose content equals the edited 'i1'"):
        refuse_overlap(renamed, edited)
    pictures = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    with pytest.raises(DataError, match="content equals"):
        refuse_overlap(
            Examples(images(1).inputs, ("a",), pictures=pictures[:1]), Examples(images(2, seed=3).inputs, ("b", "c"), pictures=pictures)
        )


# -- KL -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kl_of_equal_predictions_is_zero_at_every_temperature(temperature, dtype):
    logits = (100 * torch.randn(7, 11, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert kl(logits, logits.clone(), temperature).eq(0).all()


def test_kl_agrees_with_torch_and_chunks_do_not_matter(monkeypatch):
    p, q = torch.randn(2, 9, 13, generator=torch.Generator().manual_seed(0))
    truth = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert torch.allclose(kl(p, q), truth, atol=1e-6)
    monkeypatch.setattr("trocar.evaluate.language.CHUNK", 30)
    assert torch.allclose(kl(p.reshape(3, 3, 13), q.reshape(3, 3, 13)), truth.reshape(3, 3), atol=1e-6)


def test_kl_is_finite_when_a_probability_underflows():
    p = torch.tensor([[0.0, -2000.0, -1e30], [0.0, float("-inf"), 1.0]])
    q = torch.tensor([[-2000.0, 0.0, 0.0], [0.0, float("-inf"), 1.0]])
    values = kl(p, q)
    assert values.isfinite().all()
    assert values[0] > 1000
    assert values[1] == 0


def test_kl_measurement_and_bad_shapes():
    m = kl_to_base(torch.zeros(3, 4), torch.eye(4)[:3], ("a", "b"))
    assert m.before.tolist() == [0, 0, 0]
    assert (m.after > 0).all()
    assert m.better == "lower"
    with pytest.raises(MetricError):
        kl(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(MetricError):
        kl(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0)


# -- perplexity -----------------------------------------------------------------------------------------------------------------------


def language_model(kind="gpt2"):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=64)).train()
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=31)
    ).train()


def naive_nats(model, stream, window, stride):
    """Every token's negative log-likelihood in the first window that can score it, one plain forward pass each."""
    scored = {}
    model.eval()
    with torch.no_grad():
        for start in range(0, len(stream), stride):
            logits = model(input_ids=stream[None, start : start + window]).logits[0].log_softmax(-1)
            for place in range(1, len(stream[start : start + window])):
                scored.setdefault(start + place, -logits[place - 1, stream[start + place]].item())
    return scored


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("n", "window", "stride"), [(50, 10, None), (50, 10, 3), (47, 10, 10), (47, 16, 5), (8, 20, None), (21, 20, 20), (22, 20, 20)]
)
def test_perplexity_equals_the_naive_one(kind, n, window, stride):
    model = language_model(kind)
    stream = torch.randint(0, 31, (n,), generator=torch.Generator().manual_seed(1))
    result = perplexity(model, stream, window, stride)
    assert model.training
    truth = naive_nats(model, stream, window, stride or window)
    assert result.tokens.sum() == len(truth)
    assert result.value == pytest.approx(math.exp(np.mean(list(truth.values()))), rel=1e-4)


def test_perplexity_in_chunks_and_paired(monkeypatch):
    model = language_model()
    stream = torch.randint(0, 31, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    whole = perplexity(model, stream, 10)
    monkeypatch.setattr("trocar.evaluate.language.CHUNK", 70)
    assert perplexity(model, stream, 10).value == pytest.approx(whole.value, rel=1e-6)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    after = perplexity(model, stream, 10)
    summary = perplexity_measurement(whole, after, ("a", "b")).summary()
    assert (summary.before, summary.after) == (pytest.approx(whole.value), pytest.approx(after.value))
    assert summary.n == 4
    with pytest.raises(MetricError, match="different windows"):
        perplexity_measurement(whole, perplexity(model, stream, 20), ("a", "b"))


@pytest.mark.parametrize(
    ("stream", "window", "stride"),
    [([1], 4, None), ([1, 2, 31], 4, None), ([1, -1], 4, None), ([1, 2], 1, None), ([1, 2], 4, 5), ([1, 2], 4, 0)],
)
def test_perplexity_refuses(stream, window, stride):
    with pytest.raises(MetricError):
        perplexity(language_model(), stream, window, stride)


# -- costs ----------------------------------------------------------------------------------------------------------------------------


def test_counts_see_tied_tensors_once_and_dtypes():
    model = language_model()
    assert model.lm_head.weight is model.transformer.wte.weight
    plain = sum(parameter.numel() for parameter in model.parameters())
    assert counts(model)["parameters"] == plain
    assert counts(model)["bytes"] >= 4 * plain
    assert counts(model.to(torch.bfloat16))["bytes"] < 4 * plain


def test_latency_interleaves_and_finds_the_slower():
    order = []

    def work(name, size):
        order.append(name)
        torch.ones(size, size) @ torch.ones(size, size)

    m = latency(lambda: work("a", 8), lambda: work("b", 700), ("x", "y"), repetitions=6, warmup=1)
    assert "".join(order) == "ab" + "abba" * 3
    summary = m.summary()
    assert summary.ratio > 1.5
    assert summary.n == 6
    assert m.better == "lower"
    with pytest.raises(MetricError):
        latency(lambda: 0, lambda: 0, ("x", "y"), repetitions=1)


def test_fingerprint_is_the_state_id(vit):
    """The state ids in measurements are anatomy's fingerprints: other weights, other id."""
    first = fingerprint(vit)
    with torch.no_grad():
        vit.classifier.bias += 1
    assert fingerprint(vit) != first
