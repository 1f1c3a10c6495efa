"""Mixtures of experts through DuQuant: nothing but rounding changes what they compute, and the router nothing at all."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from outputs import error, out

from trocar.anatomy import TINY_EXPERTS, Anatomy, fingerprint, tiny_inputs, tiny_model
from trocar.compress.duquant import (
    Activations,
    Chain,
    DuQuantConfig,
    QuantisedModel,
    Smoothing,
    Weights,
    export_compressed,
    groups,
    quantise,
)
from trocar.compress.duquant.experts import FEWEST, counts, hidden_sizes, routes
from trocar.compress.duquant.rounding import best_clip, nearest
from trocar.compress.duquant.streams import enter
from trocar.core.errors import ConfigError, DataError, ExportError, UnsupportedModelError
from trocar.patch.quantised import QuantisedExperts, execute, float_experts, memory

SMALL = Chain(block_size=8, search_steps=4)
FLOAT = DuQuantConfig(weights=Weights(bits=16), activations=Activations(bits=16), chain=SMALL)


def tiny(name: str, **settings: Any) -> Any:
    if name == "qwen3_moe":
        settings = {"mlp_only_layers": [0], **settings}
    return tiny_model(name, **{"num_hidden_layers": 2, **settings})


def inputs_of(model: Any, rows: int = 16, length: int = 24) -> dict[str, torch.Tensor]:
    return tiny_inputs(Anatomy.of(model, experts=True), rows=rows, length=length)


def lonely(top: int = 1) -> Any:
    """A mixtral whose last expert is never chosen: its logit is the mean of the others'."""
    model = tiny("mixtral", num_experts_per_tok=top)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = layer.mlp.gate.weight[:3].mean(0)
    return model


@pytest.mark.parametrize("name", TINY_EXPERTS)
def test_without_rounding_a_mixture_computes_what_it_did_and_comes_back(name: str) -> None:
    model = tiny(name)
    inputs, base = inputs_of(model), fingerprint(model)
    before, modules = out(model, inputs), {path: id(module) for path, module in model.named_modules()}
    done = quantise(model, inputs, FLOAT)
    assert error(out(model, inputs), before) < 1e-5
    assert max(done.errors.values()) < 1e-5
    assert set(done.experts) == {f"model.layers.{layer}.mlp.experts" for layer in ((1,) if name == "qwen3_moe" else (0, 1))}
    kinds = [experts.input.kinds for experts in done.experts.values()]
    assert kinds[0] == ("rotation0", "permutation1", "rotation2")
    done.revert()
    assert torch.equal(out(model, inputs), before)
    assert {path: id(module) for path, module in model.named_modules()} == modules
    assert fingerprint(model) == base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_the_fold_reaches_every_reader_of_the_norm_and_the_router_computes_the_same_bits(name: str, dtype: torch.dtype) -> None:
    """Router logits, choices and the shared expert's switch on the same hidden states; the scale is not 1."""
    model = tiny(name).to(dtype)
    before = copy.deepcopy(model.model.layers)
    quantise(model, inputs_of(model), FLOAT)
    hidden = torch.randn(40, 32).to(dtype)
    for was, now in zip(before, model.model.layers, strict=True):
        scale = was.post_attention_layernorm.weight / now.post_attention_layernorm.weight
        assert bool((scale != 1).any())
        assert torch.equal(scale.log2().round(), scale.log2())
        old, new = was.post_attention_layernorm(hidden), now.post_attention_layernorm(hidden)
        assert not torch.equal(old, new)
        for one, other in zip(was.mlp.gate(old), now.mlp.gate(new), strict=True):
            assert torch.equal(one, other)
        if name == "qwen2_moe":
            assert torch.equal(was.mlp.shared_expert_gate(old), now.mlp.shared_expert_gate(new))
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            assert error(now.mlp.shared_expert(new), was.mlp.shared_expert(old)) < tolerance


def test_router_logits_of_the_whole_model_stay() -> None:
    model = tiny("qwen2_moe")
    inputs = inputs_of(model, rows=4)
    with torch.no_grad():
        before = model(**inputs, output_router_logits=True).router_logits
        quantise(model, inputs_of(model), FLOAT)
        after = model(**inputs, output_router_logits=True).router_logits
    assert max(error(now, was) for now, was in zip(after, before, strict=True)) < 1e-5


@pytest.mark.parametrize("name", TINY_EXPERTS)
def test_eight_bits_are_near_the_float_model(name: str) -> None:
    """Router choices that are nearly ties flip under any change, so most tokens are asked, not the worst."""
    model = tiny(name)
    inputs = inputs_of(model)
    before = out(model, inputs)
    done = quantise(model, inputs, DuQuantConfig(weights=Weights(bits=8), activations=Activations(bits=8), chain=SMALL))
    after = out(model, inputs)
    each = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert float(each.median()) < 0.03
    assert max(value for path, value in done.errors.items() if path.endswith("experts")) < 0.02


def test_outliers_in_front_of_the_experts_are_spread() -> None:
    """Rounding to nearest > smoothing > DuQuant, in the error of the experts' output; three seeds."""

    def mean(smoothing: Smoothing | None, chain: Chain | None) -> float:
        errors = []
        for seed in range(3):
            model = tiny("mixtral", hidden_size=64, seed=seed)
            with torch.no_grad():
                for layer in model.model.layers:
                    layer.post_attention_layernorm.weight[[3, 17, 40, 61]] *= 25
                    layer.mlp.gate.weight[:, [3, 17, 40, 61]] /= 25
                    layer.mlp.experts.gate_up_proj[:, :, [3, 17, 40, 61]] /= 5
            done = quantise(model, inputs_of(model), DuQuantConfig(smoothing=smoothing, chain=chain), seed)
            errors += [value for path, value in done.errors.items() if path.endswith("experts")]
        return sum(errors) / len(errors)

    rtn, smooth, duquant = mean(None, None), mean(Smoothing(), None), mean(Smoothing(), Chain(block_size=16))
    assert rtn > 1.3 * smooth
    assert smooth > 1.05 * duquant


def test_gptq_uses_each_experts_own_tokens() -> None:
    def experts_error(rounding: Any) -> float:
        model = tiny("mixtral")
        settings = DuQuantConfig(weights=Weights(bits=3, rounding=rounding), activations=Activations(bits=16), chain=SMALL)
        done = quantise(model, inputs_of(model, rows=32), settings)
        return sum(value for path, value in done.errors.items() if path.endswith("experts"))

    assert experts_error("gptq") < 0.9 * experts_error("nearest")


def test_an_expert_that_saw_no_token_is_quantised_and_that_is_told() -> None:
    model = lonely()
    inputs = inputs_of(model)
    originals = [copy.deepcopy(layer.mlp.experts) for layer in model.model.layers]
    before = out(model, inputs)
    with pytest.warns(UserWarning, match=r"of 8 experts were sent fewer than 64 calibration tokens, most of them in model\.layers\.\d"):
        done = quantise(model, inputs, FLOAT)
    assert error(out(model, inputs), before) < 1e-5
    x, chosen, weights = torch.randn(9, 32), torch.full((9, 1), 3), torch.ones(9, 1)
    for number, (path, experts) in enumerate(done.experts.items()):
        assert done.tokens[path][3] == 0
        assert sum(done.tokens[path]) == inputs["input_ids"].numel()
        assert experts.which[3] == len(experts.hidden) - 1
        scale = done.blocks[number].taken
        norm = dict(scale)[f"model.layers.{number}.post_attention_layernorm"]
        divided = norm.weight / model.model.layers[number].post_attention_layernorm.weight
        with torch.no_grad():  # asked all the same, it answers as the float expert does
            assert error(experts(x / divided, chosen, weights), originals[number](x, chosen, weights)) < 1e-5


def test_rare_experts_share_a_transform_and_are_rounded_to_nearest_with_the_best_clip() -> None:
    model = lonely()
    settings = DuQuantConfig(weights=Weights(rounding="gptq"), chain=SMALL)
    with pytest.warns(UserWarning, match="fewer than 64"):
        done = quantise(model, inputs_of(model), settings)
    for path, experts in done.experts.items():
        seen = done.tokens[path]
        rare = {expert for expert, count in enumerate(seen) if count < FEWEST}
        assert 3 in rare
        assert len(rare) < 4
        assert {experts.which[expert] for expert in rare} == {4 - len(rare)}
        assert len({experts.which[expert] for expert in range(4)} - {4 - len(rare)}) == 4 - len(rare)
    layer = done.experts["model.layers.0.mlp.experts"]
    original = dict(done.blocks[0].taken)["model.layers.0.mlp.experts"]
    transform = layer.in_front_of(3).transform  # no smoothing reached this expert's down map
    weight = transform.weight(original.down_proj[3].detach())
    code, step, zero = nearest(weight, layer.down.quantiser, best_clip(weight, layer.down.quantiser))
    assert torch.equal(layer.down.code(3), code)
    assert torch.equal(layer.down.get_buffer("step")[3], step)
    assert torch.equal(layer.down.get_buffer("zero")[3], zero.to(torch.uint8))


def test_no_warning_where_all_experts_saw_enough() -> None:
    model = tiny("mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantise(model, inputs_of(model), FLOAT)


def test_tokens_are_counted_where_they_are_sent() -> None:
    model = tiny("mixtral")
    anatomy = Anatomy.of(model, experts=True)
    inputs = inputs_of(model, rows=4)
    batches = enter(anatomy, anatomy.tower(), inputs, 3)
    block = model.model.layers[0]
    sent = routes(block, 0, block.mlp.experts, batches)
    with torch.no_grad():
        logits = model(**inputs, output_router_logits=True).router_logits[0]
    expected = torch.bincount(logits.topk(2, dim=-1).indices.flatten(), minlength=4).tolist()
    assert counts(sent, 4) == expected
    stand_in = float_experts(block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj, block.mlp.experts.act_fn)
    high = hidden_sizes(stand_in, sent, "peak")
    assert set(high) == {expert for expert, count in enumerate(expected) if count >= FEWEST} != set()
    x, chosen, weights = (torch.cat([getattr(route, part) for route in sent]) for part in ("x", "chosen", "weights"))
    with torch.no_grad():
        torch.testing.assert_close(stand_in(x, chosen, weights), block.mlp.experts(x, chosen, weights))


def test_padding_is_sent_to_no_expert() -> None:
    ids = inputs_of(tiny("mixtral"), rows=6, length=20)["input_ids"]
    mask = torch.ones(6, 24, dtype=torch.long)
    mask[:, :4] = 0
    found: list[QuantisedModel] = []
    for filler in (5, 40):
        padded = torch.cat([torch.full((6, 4), filler), ids], dim=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(quantise(tiny("mixtral"), {"input_ids": padded, "attention_mask": mask}, DuQuantConfig(chain=SMALL)))
    assert found[0].tokens == found[1].tokens
    assert sum(found[0].tokens["model.layers.0.mlp.experts"]) == 2 * ids.numel()
    for one, other in zip(found[0].experts.values(), found[1].experts.values(), strict=True):
        assert torch.equal(one.gate_up.get_buffer("codes"), other.gate_up.get_buffer("codes"))
        assert torch.equal(one.down.get_buffer("codes"), other.down.get_buffer("codes"))


def test_integer_products_give_the_same_numbers_and_a_cache_too() -> None:
    model = tiny("qwen2_moe")
    inputs = inputs_of(model, rows=4, length=10)
    quantise(model, inputs_of(model), DuQuantConfig(activations=Activations(bits=8), chain=SMALL))
    simulated = out(model, inputs)
    assert execute(model, "integer") == {"integer": 2 * (4 + 3 + 1)}
    simulated_in_integers = out(model, inputs)
    each = (simulated_in_integers - simulated).norm(dim=-1) / simulated.norm(dim=-1)
    assert float(each.median()) < 1e-5
    assert execute(model, "auto", keep=False) == {"integer": 16}
    assert torch.equal(out(model, inputs), simulated_in_integers)
    found = memory(model)
    assert found["float"] > found["integer"] > found["stored"]
    execute(model, "simulated")
    with pytest.raises(ConfigError, match="experts have no packed products"):
        execute(next(module for module in model.modules() if isinstance(module, QuantisedExperts)), "packed")
    with torch.no_grad():
        first = model(input_ids=inputs["input_ids"][:, :9], use_cache=True)
        last = model(input_ids=inputs["input_ids"][:, 9:], past_key_values=first.past_key_values).logits[:, -1]
    each = (last - simulated[:, -1]).norm(dim=-1) / simulated[:, -1].norm(dim=-1)
    assert float(each.median()) < 0.02


def test_the_same_seed_gives_the_same_codes_and_kept_experts_their_bits() -> None:
    def made(seed: int, **settings: Any) -> QuantisedExperts:
        model = tiny("olmoe")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return quantise(model, inputs_of(model, rows=8), DuQuantConfig(chain=SMALL, **settings), seed).experts[
                "model.layers.1.mlp.experts"
            ]

    one, two, other = made(1), made(1), made(2)
    assert torch.equal(one.down.get_buffer("codes"), two.down.get_buffer("codes"))
    assert not torch.equal(one.down.get_buffer("codes"), other.down.get_buffer("codes"))
    kept = made(1, keep={"L1.mlp.experts.down": 8, "L1.mlp.experts.up": 16})
    assert (kept.down.quantiser.bits, kept.in_front_of(0).quantiser.bits) == (8, 8)
    assert (kept.gate_up.quantiser.bits, kept.input.quantiser.bits) == (16, 16)


def test_every_experts_hidden_input_has_its_own_scale() -> None:
    """A channel that is large behind one expert's up, and only there, is made small there."""
    model = tiny("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[1, 48 + 5] *= 30
        model.model.layers[0].mlp.experts.down_proj[1, :, 5] /= 30
    settings = DuQuantConfig(weights=Weights(bits=16), activations=Activations(bits=16), chain=None)
    inputs, original = inputs_of(model), copy.deepcopy(model.model.layers[0].mlp.experts)
    norm = model.model.layers[0].post_attention_layernorm.weight.detach().clone()
    done = quantise(model, inputs, settings)
    experts, scale = done.experts["model.layers.0.mlp.experts"], norm / model.model.layers[0].post_attention_layernorm.weight
    rows = experts.gate_up.get_buffer("values")[:, 48:] / scale
    divided = (original.gate_up_proj[:, 48:] / rows).median(dim=2).values
    assert bool(divided[1, 5] > 5 * divided[0, 5])
    torch.testing.assert_close(experts.down.get_buffer("values") / divided[:, None], original.down_proj.detach(), rtol=1e-4, atol=1e-6)


def test_smoothing_by_root_mean_squares() -> None:
    model = tiny("qwen2_moe")
    inputs = inputs_of(model)
    before = out(model, inputs)
    quantise(model, inputs, FLOAT.model_copy(update={"smoothing": Smoothing(measure="rms", alpha=0.5)}))
    assert error(out(model, inputs), before) < 1e-5


def test_groups_of_a_block_with_experts() -> None:
    tower = Anatomy.of(tiny("qwen2_moe"), experts=True).tower()
    found = groups(tower, 1)
    assert [group.name for group in found] == ["attn_in", "attn_out", "shared_in", "shared_hidden", "experts_in", "experts_hidden"]
    assert found[2].components == ("L1.mlp.shared.up", "L1.mlp.shared.gate")
    assert found[4].components == ("L1.mlp.experts.up", "L1.mlp.experts.gate")
    assert [group.source for group in found] == ["attn_norm", "v", "mlp_norm", "shared_up", "mlp_norm", ""]


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"weights": {"rounding": "gptaq"}}, ConfigError, "an expert is not sent the same tokens in both"),
        ({"weights": {"clip": "learned"}}, ConfigError, "not made for mixtures of experts"),
        ({"keep": {"L0.mlp.down": 8}}, ConfigError, r"keep names 'L0\.mlp\.down'"),
        ({"chain": {"block_size": 7}}, ConfigError, "Blocks of 7 do not divide"),
        ({"chain": {"block_size": 32}}, ConfigError, r"Blocks of 32 do not divide the 48 channels of model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_the_model_alone(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = tiny("mixtral")
    inputs, base = inputs_of(model, rows=4), fingerprint(model)
    with pytest.raises(kind, match=message):
        quantise(model, inputs, DuQuantConfig.parse(settings))
    assert fingerprint(model) == base


def test_experts_that_compute_something_else_or_not_finite_numbers_are_found() -> None:
    model = tiny("mixtral")
    inputs = inputs_of(model, rows=4)
    inner = model.model.layers[1].mlp.experts.forward
    model.model.layers[1].mlp.experts.forward = lambda *args: inner(*args) * 1.5
    for smoothing, message in ((None, "experts of model.layers.1 compute something else"), (Smoothing(), "Smoothing would change")):
        with pytest.raises(UnsupportedModelError, match=message):
            quantise(model, inputs, DuQuantConfig(chain=SMALL, smoothing=smoothing))
    broken = tiny("mixtral")
    with torch.no_grad():
        broken.model.layers[0].mlp.experts.gate_up_proj[:, 60] = float("inf")
    with pytest.raises(DataError, match="not finite"):
        quantise(broken, inputs, DuQuantConfig(chain=SMALL))


def test_a_router_that_the_fold_does_not_reach_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from trocar.compress.duquant import experts

    model = tiny("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[[3, 17]] *= 25
    monkeypatch.setattr(experts, "BESIDE", ())
    base = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=r"Smoothing would change what model\.layers\.0 computes"):
        quantise(model, inputs_of(model), DuQuantConfig(chain=SMALL))
    assert fingerprint(model) == base


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_half_precision(name: str) -> None:
    model = tiny(name).to(torch.bfloat16)
    inputs = inputs_of(model)
    before = out(model, inputs)
    done = quantise(model, inputs, DuQuantConfig(weights=Weights(bits=8), activations=Activations(bits=8), chain=SMALL))
    after = out(model, inputs)
    assert after.dtype == torch.bfloat16
    assert float(((after - before).norm(dim=-1) / before.norm(dim=-1)).median()) < 0.05
    done.revert()
    assert torch.equal(out(model, inputs), before)


def test_quantised_experts_are_not_quantised_again_nor_written_for_engines(tmp_path: Any) -> None:
    from trocar.compress.duquant import preset

    model = tiny("mixtral")
    inputs = inputs_of(model)
    quantise(model, inputs, preset("folded", "W8A8", rounding="nearest"))
    with pytest.raises(UnsupportedModelError, match="quantised"):
        quantise(model, inputs, DuQuantConfig(chain=SMALL))
    with pytest.raises(ExportError, match=r"model\.layers\.0\.mlp\.experts holds experts"):
        export_compressed(model, tmp_path / "engine")
