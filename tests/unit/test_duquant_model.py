"""Whole models through DuQuant: nothing changes but by rounding, in every family; everything comes back; bad input is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from outputs import error, out

from trocar.anatomy import TINY, Anatomy, tiny_inputs, tiny_model
from trocar.anatomy.tiny import tower_inputs
from trocar.compress.duquant import Activations, Chain, DuQuantConfig, Learning, Smoothing, Weights, groups, quantise
from trocar.compress.duquant.moments import activation_clip, row_weights
from trocar.core.errors import ConfigError, DataError, UnsupportedModelError
from trocar.patch.quantised import Quantiser, quantised

SMALL = Chain(block_size=8, search_steps=4)
FLOAT = DuQuantConfig(weights=Weights(bits=16), activations=Activations(bits=16), chain=SMALL)


def towers() -> list[tuple[str, str]]:
    two = {"gemma3": ("text", "vision"), "clip": ("text", "vision"), "siglip": ("text", "vision")}
    return [(name, tower) for name in TINY for tower in two.get(name, ("",))]


@pytest.mark.parametrize(("name", "tower"), towers())
def test_without_rounding_every_family_computes_what_it_did_and_comes_back(name: str, tower: str) -> None:
    anatomy = Anatomy.of(tiny_model(name))
    one = anatomy.tower(tower)
    model = one.root if tower else anatomy.model
    inputs = tower_inputs(one, 3) if tower else tiny_inputs(model, rows=3)
    before, modules = out(model, inputs), dict(anatomy.model.named_modules())
    values = {key: value.clone() for key, value in anatomy.model.state_dict().items()}
    done = quantise(anatomy, inputs, FLOAT, tower=tower or None)
    assert len(done.layers) == sum(len(group.roles) for layer in range(one.n_layers) for group in groups(one, layer))
    assert error(out(model, inputs), before) < 1e-5
    assert max(done.errors.values()) < 1e-5
    expected = one.n_layers * 2 if one.residual != "post" else 0
    assert sum(len(block.norms) for block in done.blocks) == expected
    done.revert()
    assert torch.equal(out(model, inputs), before)
    assert {key: id(module) for key, module in anatomy.model.named_modules()} == {key: id(module) for key, module in modules.items()}
    assert all(torch.equal(value, values[key]) for key, value in anatomy.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "divided"),
    [("llama", set()), ("opt", set()), ("gpt2", {"mlp.c_proj"}), ("vit", {"mlp.fc2"}), ("opt-post-norm", {"self_attn.q_proj", "fc1"})],
)
def test_scales_fold_wherever_that_is_exact(name: str, divided: set[str]) -> None:
    model = tiny_model(name)
    done = quantise(model, tiny_inputs(model, rows=3), FLOAT)
    kinds = {path: layer.shared.kinds for path, layer in done.layers.items()}
    online = {path for path, kind in kinds.items() if "scale" in kind}
    assert all(any(part in path for path in online) for part in divided)
    first = [group for group in groups(Anatomy.of(tiny_model(name)).tower(), 0) if group.name in ("attn_in", "mlp_in", "mlp_hidden")]
    assert first[0].name == "attn_in"
    assert len(online) == {"llama": 0, "opt": 0, "gpt2": 3, "vit": 3, "opt-post-norm": 12}[name]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3"])
def test_caches_padding_and_single_tokens_change_nothing(name: str) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(model, rows=4)
    with torch.no_grad():
        done = quantise(model, inputs, DuQuantConfig(weights=Weights(bits=4), activations=Activations(bits=8), chain=SMALL))
        ids = inputs["input_ids"]
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :4], use_cache=True)
        steps = [first.logits]
        for column in range(4, ids.shape[1]):
            first = model(input_ids=ids[:, column : column + 1], past_key_values=first.past_key_values, use_cache=True)
            steps.append(first.logits)
        assert error(torch.cat(steps, dim=1), whole) < 0.02  # a token's grid may take another step where sums are ordered otherwise
        padded = torch.cat([torch.zeros(4, 3, dtype=torch.long), ids], dim=1)
        mask = torch.cat([torch.zeros(4, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        left = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        assert error(left, whole) < 0.02
    done.revert()


def test_padding_has_no_say_in_the_calibration() -> None:
    ids = tiny_inputs(tiny_model("llama"), rows=3, length=6)["input_ids"]
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[:, :3] = 0
    found = []
    for filler in (5, 40):
        padded = torch.cat([torch.full((3, 3), filler), ids], dim=1)
        done = quantise(tiny_model("llama"), {"input_ids": padded, "attention_mask": mask}, DuQuantConfig(chain=SMALL))
        found.append(done.layers)
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        assert torch.equal(one.code(), other.code())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    inputs = tiny_inputs(model, rows=3)
    before = out(model, inputs)
    done = quantise(model, inputs, FLOAT)
    after = out(model, inputs)
    assert after.dtype == dtype
    assert error(after, before) < {torch.float64: 1e-6}.get(dtype, 3e-2)
    done.revert()
    assert torch.equal(out(model, inputs), before)


def planted(seed: int = 0, factor: float = 25.0) -> Any:
    """A llama whose norms write four large channels, which a plain quantiser of tokens cannot bear."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, seed=seed)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[[3, 17, 40, 61]] *= factor
                for reader in readers:
                    reader.weight[:, [3, 17, 40, 61]] /= 5
    return model


def test_order_of_the_methods_on_planted_outliers() -> None:
    """Mean output error of all layers, three seeds: rounding > smoothing > smoothing and one rotation > DuQuant."""
    chains: dict[str, tuple[Smoothing | None, Chain | None]] = {
        "rtn": (None, None),
        "smooth": (Smoothing(), None),
        "duquant": (Smoothing(), Chain(block_size=16)),
    }
    means = {}
    for name, (smoothing, chain) in chains.items():
        errors: list[float] = []
        for seed in range(3):
            model = planted(seed)
            done = quantise(model, tiny_inputs(model, rows=8, length=24), DuQuantConfig(smoothing=smoothing, chain=chain), seed=seed)
            errors += [value for path, value in done.errors.items() if "." in path]
        means[name] = sum(errors) / len(errors)
    assert means["rtn"] > 1.3 * means["smooth"]
    assert means["smooth"] > 1.05 * means["duquant"]


def test_a_gauge_of_the_model_does_not_reach_the_smoothed_weights() -> None:
    """Norm times c and columns divided by c: the same model, so the same smoothed weights."""
    settings = DuQuantConfig(weights=Weights(bits=16), activations=Activations(bits=16), chain=None)
    found = []
    for factor in (1.0, 7.0):
        model = tiny_model("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.input_layernorm.weight[::3] *= factor
                for name in ("q_proj", "k_proj", "v_proj"):
                    layer.self_attn.get_submodule(name).weight[:, ::3] /= factor
        found.append(quantise(model, tiny_inputs(model, rows=3), settings).layers)
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(one.transformed_weight(), other.transformed_weight(), rtol=2e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_codes_and_another_other_ones() -> None:
    def codes_of(seed: int) -> list[torch.Tensor]:
        model = tiny_model("qwen2")
        return [layer.code() for layer in quantise(model, tiny_inputs(model), DuQuantConfig(chain=SMALL), seed).layers.values()]

    one, two, other = codes_of(1), codes_of(1), codes_of(2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "gptaq"])
@pytest.mark.parametrize("clip", [None, "search"])
def test_gptq_and_clip_search_lower_the_error_of_blocks(rounding: Any, clip: Any) -> None:
    def block_error(**weights: Any) -> float:
        model = planted()
        settings = DuQuantConfig(weights=Weights(bits=3, **weights), activations=Activations(bits=16), chain=SMALL)
        errors = quantise(model, tiny_inputs(model, rows=16, length=24), settings).errors
        return sum(value for path, value in errors.items() if "." not in path)

    if rounding == "nearest" and clip is None:
        return
    assert block_error(rounding=rounding, clip=clip) < 0.98 * block_error()


def test_learned_clips_lower_the_error_of_blocks_and_touch_no_rotation() -> None:
    def run(clip: Any) -> Any:
        model = planted()
        settings = DuQuantConfig(
            weights=Weights(bits=3, clip=clip),
            activations=Activations(bits=6),
            chain=SMALL,
            learning=Learning(epochs=6, learning_rate=0.05),
            batch_size=2,
        )
        return quantise(model, tiny_inputs(model, rows=12, length=24), settings)

    plain, learned = run(None), run("learned")
    assert learned.errors["L0"] < 0.97 * plain.errors["L0"]
    one, other = (next(iter(done.layers.values())) for done in (plain, learned))
    assert torch.equal(one.shared.get_buffer("rotation0"), other.shared.get_buffer("rotation0"))
    assert not torch.equal(one.code(), other.code())


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "gptaq"])
def test_inputs_that_do_not_fit_are_sampled_and_the_hessian_still_sees_all(rounding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for all rows a small `KEPT` changes nothing but memory; with fewer rows the error stays close."""
    from trocar.compress.duquant import moments

    def errors(**settings: Any) -> list[float]:
        model = planted()
        config = DuQuantConfig(weights=Weights(rounding=rounding), chain=SMALL, **settings)
        return list(quantise(model, tiny_inputs(model, rows=12, length=24), config).errors.values())

    kept = errors()
    monkeypatch.setattr(moments, "KEPT", 0)
    torch.testing.assert_close(errors(), kept, rtol=1e-3, atol=1e-4)
    few = errors(rows=32)
    assert few != kept
    assert sum(few) < 1.2 * sum(kept)


def test_aiming_at_the_float_model_makes_good_what_activations_lose() -> None:
    """Errors of whole blocks, the float model's beside the quantised one's, with activations of few bits."""

    def last(rounding: Any) -> float:
        model = planted()
        config = DuQuantConfig(weights=Weights(rounding=rounding), activations=Activations(bits=3, clip="search"), chain=SMALL)
        return quantise(model, tiny_inputs(model, rows=32, length=24), config).errors["L2"]

    assert last("gptaq") < 0.97 * last("gptq")


def test_activations_get_the_clip_that_is_best_on_calibration() -> None:
    model = planted()
    done = quantise(
        model, tiny_inputs(model, rows=8, length=24), DuQuantConfig(activations=Activations(bits=3, clip="search"), chain=SMALL)
    )
    ratios = {layer.shared.quantiser.clip for layer in done.layers.values()}
    assert len(ratios) > 1
    assert min(ratios) < 1


def test_the_best_clip_of_activations_counts_every_row_alike() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    quantiser = Quantiser(bits=4)
    chosen = activation_clip(x, quantiser)
    long = torch.cat([x, 1e6 * torch.eye(256)[:1]])  # a lone spike is exact without a clip, and by its size alone it would decide
    assert chosen < 1
    assert activation_clip(long, quantiser) < 1

    def error(ratio: float) -> float:
        return float((quantised(x, quantiser, ratio) - x).square().sum())

    assert error(chosen) < min(error(chosen - 0.1), error(min(1.0, chosen + 0.1)))


def test_long_rows_count_no_more_than_they_are_allowed_to() -> None:
    x = torch.ones(9, 4)
    x[0] = 1000
    weights = row_weights(x, 4.0)
    torch.testing.assert_close((x * weights**0.5).norm(dim=1), torch.tensor([8.0] + [2.0] * 8))
    assert row_weights(x, None) == 1.0


def test_kept_layers_get_their_bits() -> None:
    model = tiny_model("llama")
    done = quantise(model, tiny_inputs(model), DuQuantConfig(chain=SMALL, keep={"L1.mlp.down": 8, "L2.attn.q": 16}))
    bits = {path: (layer.quantiser.bits, layer.shared.quantiser.bits) for path, layer in done.layers.items()}
    assert bits["model.layers.1.mlp.down_proj"] == (8, 8)
    assert bits["model.layers.2.self_attn.q_proj"] == bits["model.layers.2.self_attn.k_proj"] == (16, 16)
    assert bits["model.layers.0.mlp.down_proj"] == (4, 4)


def test_the_position_wise_mean_of_the_paper_works_too() -> None:
    model = planted()
    inputs = tiny_inputs(model, rows=6, length=24)
    mean = quantise(model, inputs, DuQuantConfig(calibration="mean", chain=SMALL))
    assert max(value for path, value in mean.errors.items() if "." in path) < 0.5
    mean.revert()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :2] = 0
    with pytest.raises(DataError, match="padding cannot be averaged"):
        quantise(model, {**inputs, "attention_mask": mask}, DuQuantConfig(calibration="mean", chain=SMALL))


def test_what_cannot_be_done_is_refused_and_leaves_the_model_alone() -> None:
    model = tiny_model("llama")
    inputs = tiny_inputs(model)
    before = out(model, inputs)
    with pytest.raises(ConfigError, match=r"Blocks of 7 do not divide the 32 channels of model.layers.0.self_attn.q_proj. Use 2, 4, 8"):
        quantise(model, inputs, DuQuantConfig(chain=Chain(block_size=7)))
    with pytest.raises(ConfigError, match=r"Blocks of 32 do not divide the 48 channels"):  # fails in the middle of a block
        quantise(model, inputs, DuQuantConfig(chain=Chain(block_size=32)))
    with pytest.raises(ConfigError, match=r"keep names 'L9.mlp.down'"):
        quantise(model, inputs, DuQuantConfig(keep={"L9.mlp.down": 8}))
    with pytest.raises(DataError, match="empty or differ"):
        quantise(model, {"input_ids": inputs["input_ids"][:0]})
    assert torch.equal(out(model, inputs), before)
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3] = float("inf")
    with pytest.raises(DataError, match=r"model.layers.1, input of mlp_hidden: \d+ entries are not finite"):
        quantise(broken, inputs, DuQuantConfig(chain=SMALL))
    quantise(model, inputs, DuQuantConfig(chain=SMALL))
    with pytest.raises(UnsupportedModelError, match="quantised"):
        quantise(model, inputs)


def test_an_adapter_is_refused() -> None:
    import peft

    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match=r"v_proj carries an adapter. Merge it"):
        quantise(model, tiny_inputs(model))


def test_a_reader_of_the_norm_that_nobody_knew_of_is_found() -> None:
    """A block that uses its norm's output elsewhere too: folding a scale would change it."""
    model = tiny_model("llama")
    block = model.model.layers[1]
    inner = block.self_attn.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        attended, *rest = inner(hidden_states, *args, **kwargs)
        return attended + hidden_states, *rest

    block.self_attn.forward = forward
    before = out(model, tiny_inputs(model))
    with pytest.raises(UnsupportedModelError, match=r"Smoothing would change what model.layers.1 computes"):
        quantise(model, tiny_inputs(model), DuQuantConfig(chain=SMALL))
    assert torch.equal(out(model, tiny_inputs(model)), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"bits": 16, "clip": "learned"}}, "16 bits stay as they are"),
        ({"weights": {"bits": 16, "rounding": "gptq"}}, "16 bits stay as they are"),
        ({"weights": {"clip": 1.5}}, "clip ratio"),
        ({"weights": {"clip": "learned", "rounding": "gptq"}}, "learned clip needs rounding to nearest"),
        ({"weights": {"rounding": "gptaq"}, "calibration": "mean"}, "real rows of both models"),
        ({"activations": {"clip": 0.0}}, "clip ratio"),
        ({"chain": {"block_sise": 8}}, "block_size"),
        ({"activations": {"bits": 1}}, "activations.bits"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DuQuantConfig.parse(settings)
