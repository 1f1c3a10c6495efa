"""A quantised model as a patch: saved, loaded, applied, taken back, exported; damaged files refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from trocar.anatomy import fingerprint, tiny_inputs, tiny_model
from trocar.compress.duquant import Activations, Chain, DuQuantConfig, Weights, quantise
from trocar.core.errors import ExportError, PatchBaseError, PatchFormatError, PatchStateError
from trocar.patch import Patch, export, read_header

SMALL = Chain(block_size=8, search_steps=4)
SETTINGS = {
    "W4A4": DuQuantConfig(chain=SMALL),
    "W3A8 symmetric": DuQuantConfig(weights=Weights(bits=3, symmetric=True), activations=Activations(bits=8, symmetric=True), chain=SMALL),
    "W8A8 groups": DuQuantConfig(weights=Weights(bits=8, group=16), activations=Activations(bits=8), chain=None),
    "W10A16 per block": DuQuantConfig(
        weights=Weights(bits=10), activations=Activations(bits=16), chain=Chain(block_size=8, search_steps=2, per_block=True)
    ),
    "W16A4": DuQuantConfig(weights=Weights(bits=16), chain=SMALL),
}


@functools.cache
def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    return tiny_inputs(tiny_model(kind))  # a quantised model has no anatomy to make them from


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(**inputs_of(model.config.model_type))
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt-post-norm", "vit", "gemma2"])
def test_a_patch_gives_the_same_outputs_bit_for_bit_and_is_taken_back(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    before, base = logits(model), fingerprint(model)
    done = quantise(model, tiny_inputs(model), SETTINGS["W4A4"])
    after = logits(model)
    patch = done.patch(bits="W4A4")
    assert fingerprint(model) == base
    patch.save(tmp_path / "p.safetensors")
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded == patch
    applied = loaded.apply(model)
    assert torch.equal(logits(model), after)
    assert all(effect.changed > 0 for effect in applied.effects)
    applied.revert()
    assert fingerprint(model) == base
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_kind_of_grid_survives_the_file(name: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    done = quantise(model, tiny_inputs(model), SETTINGS[name])
    after = logits(model)
    done.patch().save(tmp_path / "p.safetensors")
    with Patch.load(tmp_path / "p.safetensors").applied(tiny_model("llama")) as applied:
        assert torch.equal(logits(applied.target.model), after)
    rows = [row for row in read_header(tmp_path / "p.safetensors").rows() if row["op"] == "quantise"]
    assert len(rows) == 12
    assert rows[0]["shape"].startswith(name.split()[0])


def test_the_file_is_small_and_the_wrong_base_or_state_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=128, intermediate_size=256)
    patch = quantise(model, tiny_inputs(model), DuQuantConfig(chain=Chain(block_size=8, search_steps=1))).patch()
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear)) - model.lm_head.weight.numel()
    assert patch.nbytes < weights  # 4 bits and what belongs to them take less than a byte per weight, a float takes four
    with pytest.raises(PatchBaseError):
        patch.apply(tiny_model("llama"))
    applied = patch.apply(model)
    layer = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(256, 128, bias=False)
    with pytest.raises(PatchStateError, match="an operation put into it is not there"):
        applied.revert()
    model.model.layers[0].mlp.down_proj = layer
    applied.revert()


def test_a_plain_checkpoint_holds_the_rounded_weights_in_float(tmp_path: Path) -> None:
    """The folder loads without Trocar and computes what the quantised model with 16-bit activations does."""
    model = tiny_model("llama")
    settings = DuQuantConfig(activations=Activations(bits=16), chain=SMALL)
    done = quantise(model, tiny_inputs(model), settings)
    after = logits(model)
    patch = done.patch()
    model.save_pretrained(tmp_path / "base")
    export(patch, tmp_path / "base", tmp_path / "rounded")
    export(patch, model, tmp_path / "from-memory")
    for folder in ("rounded", "from-memory"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(plain), after, rtol=1e-3, atol=1e-4)
    with pytest.raises(ExportError, match="no low-rank update"):
        export(patch, model, tmp_path / "adapter", to="peft")


@pytest.mark.parametrize("part", ["permutation1", "rotation0", "0.codes", "0.step"])
def test_contents_that_make_no_sense_are_refused(part: str) -> None:
    from trocar.core.errors import TrocarError
    from trocar.patch import Quantise

    model = tiny_model("llama")
    done = quantise(model, tiny_inputs(model), DuQuantConfig(weights=Weights(bits=3), chain=SMALL))
    op = next(op for op in done.operations() if isinstance(op, Quantise))
    done.revert()
    tensors = {name: value.clone() for name, value in op.tensors().items()}
    tensors[part].view(-1)[0] = {"permutation1": tensors[part].view(-1)[1], "rotation0": 3, "0.codes": 255, "0.step": float("nan")}[part]
    with pytest.raises(TrocarError) as caught:
        Patch.of(model, [Quantise.build(op.record(), tensors)])
    assert isinstance(caught.value, PatchFormatError) or "NaN" in str(caught.value)
