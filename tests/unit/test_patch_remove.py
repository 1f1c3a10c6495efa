"""Physical removal: equal to switching off, consistent sizes and settings, cached generation, and the same modules after revert."""

from __future__ import annotations

import pytest
import torch

from trocar.anatomy import Anatomy, fingerprint, tiny_inputs, tiny_model
from trocar.core.errors import EditError
from trocar.patch import Gate, Patch, Remove

FAMILIES = ["llama", "qwen2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "vit", "deit", "dinov2-swiglu", "clip", "siglip", "bert"]


def outputs(model, inputs):
    with torch.no_grad():
        return {key: value for key, value in model(**inputs).items() if isinstance(value, torch.Tensor)}


def furthest(one, two):
    return max(float((one[key] - two[key]).abs().max()) for key in one)


def chosen(anatomy: Anatomy, what: str) -> list[str]:
    names = []
    for name, tower in anatomy.towers.items():
        prefix = f"{name}." if name else ""
        group, heads, layers = tower.group(0), tower.heads(0), range(tower.n_layers)
        if what == "the last group of heads everywhere":
            names += [f"{prefix}L{layer}.H{head}" for layer in layers for head in range(heads - group, heads)]
        elif what == "heads of one block":
            names += [f"{prefix}L1.H{head}" for head in range(group)]
        elif what == "a head of every group" and group > 1:
            names += [f"{prefix}L1.H{head}" for head in range(0, heads, group)]
        elif what == "neurons":
            names += [f"{prefix}L{layer}.N{neuron}" for layer in (0, 2) for neuron in (3, 7, 11)]
        elif what == "a block and neurons":
            names += [f"{prefix}L1", f"{prefix}L2.N3"]
    return names


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "what", ["the last group of heads everywhere", "heads of one block", "a head of every group", "neurons", "a block and neurons"]
)
def test_removed_equals_switched_off(family, what):
    model = tiny_model(family)
    anatomy, inputs, before = Anatomy.of(model), tiny_inputs(model), fingerprint(model)
    names = chosen(anatomy, what)
    if not names:
        return
    plain, modules = outputs(model, inputs), [id(module) for module in model.modules()]
    patch = Patch.of(model, [Remove(names)])
    with patch.applied(model):
        removed = outputs(model, inputs)
        smaller = Anatomy.of(model)
        for name, tower in anatomy.towers.items():
            expected = tower.n_layers - sum(one.endswith("L1") for one in names) // len(anatomy.towers)
            assert smaller.tower(name or None).n_layers == expected == smaller.tower(name or None).config.num_hidden_layers
        if getattr(model, "can_generate", lambda: False)() and "pixel_values" not in inputs:
            runs = [model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False)]
            assert torch.equal(*runs)
    assert fingerprint(model) == before
    assert [id(module) for module in model.modules()] == modules
    assert furthest(outputs(model, inputs), plain) == 0
    assert furthest(removed, plain) > 1e-3
    if family == "bert" and what.startswith("a block"):
        with pytest.raises(EditError):
            Patch.of(model, [Gate(dict.fromkeys(names, 0.0))])
        return
    with Patch.of(model, [Gate(dict.fromkeys(names, 0.0))]).applied(model):
        assert furthest(removed, outputs(model, inputs)) < 1e-5


def test_the_model_is_smaller_and_its_settings_agree():
    model = tiny_model("gemma3_text")
    before = sum(parameter.numel() for parameter in model.parameters())
    types = list(model.config.layer_types)
    patch = Patch.of(model, [Remove(["L0", *(f"L{layer}.N{n}" for layer in (1, 2) for n in range(8))])])
    with patch.applied(model):
        assert sum(parameter.numel() for parameter in model.parameters()) == before - patch.effects[0].changed
        assert model.config.num_hidden_layers == 2
        assert model.config.layer_types == types[1:]
        assert model.config.intermediate_size == 40
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
        assert model.model.layers[0].mlp.up_proj.out_features == 40
    assert model.config.layer_types == types
    assert model.config.num_hidden_layers == 3


def test_uneven_groups_are_explained():
    model = tiny_model("llama")  # 4 query heads on 2 key/value heads
    with pytest.raises(EditError, match=r"2 query heads on each key/value head.*leave 1, 2 of them.*equally many"):
        Patch.of(model, [Remove(["L1.H0"])])
    Patch.of(model, [Remove(["L1.H0", "L1.H2"])])  # one of each group
    Patch.of(model, [Remove(["L1.H0", "L1.H1"])])  # a whole group


def test_gradients_reach_the_smaller_parameters():
    model = tiny_model("llama")
    inputs = tiny_inputs(model)
    with Patch.of(model, [Remove(["L1.N3", "L0.H2", "L0.H3"])]).applied(model):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert model.model.layers[1].mlp.down_proj.weight.grad.shape == (32, 47)
        assert model.model.layers[0].self_attn.k_proj.weight.grad.shape == (16, 32)
