"""Adapters on a model for a while: what peft computes, and nothing left behind."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from trocar.anatomy import fingerprint, tiny_inputs, tiny_model
from trocar.core.errors import PatchBaseError, PatchFormatError
from trocar.patch import Adapter, Factors, attached, wrapped
from trocar.trace.adapters import initial_factors

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "vit": ["q_proj", "v_proj"]}


def trained(model: Any, family: str, **settings: Any) -> tuple[Adapter, torch.Tensor, dict[str, torch.Tensor]]:
    """An adapter with some content, the outputs with it, and the inputs."""
    targets, inputs = TARGETS[family], tiny_inputs(model)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=family == "gpt2", **settings)
    with wrapped(model, config) as outer, torch.no_grad():
        for number, (name, parameter) in enumerate(outer.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        return Adapter.of(outer), outer.eval()(**inputs)[0], inputs


@pytest.mark.parametrize("family", sorted(TARGETS))
def test_an_attached_adapter_computes_what_it_was_taken_from_and_leaves_nothing(family: str) -> None:
    model = tiny_model(family)
    before, notes, state = fingerprint(model), set(model.__dict__), [module.training for module in model.modules()]
    adapter, expected, inputs = trained(model, family, use_rslora=True, rank_pattern={TARGETS[family][0]: 2})
    plain = model(**inputs)[0]
    with attached(model, adapter) as outer, torch.no_grad():
        assert torch.equal(outer(**inputs)[0], expected)
        assert not torch.equal(expected, plain)
        assert not any(parameter.requires_grad for name, parameter in outer.named_parameters() if "lora_" in name)
    assert fingerprint(model) == before
    assert set(model.__dict__) == notes  # transformers and peft leave notes of their own
    assert [module.training for module in model.modules()] == state
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(**inputs)[0], plain)


def test_weights_that_an_initialisation_took_out_are_put_back() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    with wrapped(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")) as outer:
        assert fingerprint(model) != before
        assert outer.get_base_model() is model
    assert fingerprint(model) == before


def test_another_models_adapter_is_refused_before_anything_is_touched() -> None:
    model = tiny_model("llama")
    adapter, _, _ = trained(model, "llama")
    name, factors = next(iter(adapter.factors.items()))
    for wrong, words in (
        ({name + "x": factors}, "no such module"),
        ({name: Factors(factors.a[:, 1:], factors.b, 1.0)}, "a weight of shape"),
    ):
        with pytest.raises(PatchBaseError, match=words), attached(model, Adapter(wrong)):
            raise AssertionError("was attached")
    assert not any("lora" in key for key in model.state_dict())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_began_inside_the_base_belongs_to_the_original_weights_or_is_refused(start: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    inputs = tiny_inputs(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=start)
    with wrapped(model, config) as outer, torch.no_grad():
        initial = initial_factors(outer)
        for name, parameter in outer.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
        expected = outer.eval()(**inputs)[0]
        with pytest.raises(PatchFormatError, match=f"began as {start}"):
            Adapter.of(outer)
        adapter = Adapter.of(outer, initial=initial)
        outer.save_pretrained(tmp_path / "raw")
    assert {factors.a.shape[0] for factors in adapter.factors.values()} == {4}
    with attached(model, adapter) as outer, torch.no_grad():
        torch.testing.assert_close(outer(**inputs)[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(PatchFormatError, match="path_initial_model_for_weight_conversion"):
        Adapter.from_peft(tmp_path / "raw")
