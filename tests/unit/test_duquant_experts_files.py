"""Quantised mixtures of experts as patch files and checkpoints: the same bits again, taken back, merged; damaged files refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from outputs import out
from transformers import AutoModelForCausalLM

from trocar.anatomy import TINY_EXPERTS, Anatomy, fingerprint, tiny_inputs, tiny_model
from trocar.compress.duquant import Activations, Chain, DuQuantConfig, Weights, checkpoint, load_quantised, quantise, quantise_checkpoint
from trocar.compress.duquant.folders import export_float, look
from trocar.core.errors import DataError, ExportError, PatchBaseError, PatchFormatError, PatchStateError, TrocarError, UnsupportedModelError
from trocar.patch import Patch, QuantiseExperts, SparseReplace, export, merge_into, read_header, stack
from trocar.patch.stacked import expert_keys

SMALL = Chain(block_size=8, search_steps=2)
SETTINGS = {
    "W4A4": DuQuantConfig(chain=SMALL),
    "W3A8 symmetric": DuQuantConfig(weights=Weights(bits=3, symmetric=True), activations=Activations(bits=8, symmetric=True), chain=SMALL),
    "W8A8 groups": DuQuantConfig(weights=Weights(bits=8, group=16), activations=Activations(bits=8, clip="search"), chain=None),
    "W10A16 per block": DuQuantConfig(
        weights=Weights(bits=10), activations=Activations(bits=16), chain=Chain(block_size=8, search_steps=2, per_block=True)
    ),
    "W16A4": DuQuantConfig(weights=Weights(bits=16), chain=SMALL),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*experts were sent fewer")


def tiny(name: str = "mixtral") -> Any:
    return tiny_model(name, num_hidden_layers=2)


def inputs_of(model: Any, rows: int = 6, length: int = 24) -> dict[str, torch.Tensor]:
    return tiny_inputs(Anatomy.of(model, experts=True), rows=rows, length=length)


@pytest.mark.parametrize(("name", "kind"), [*((name, "W4A4") for name in TINY_EXPERTS), *(("mixtral", kind) for kind in SETTINGS)])
def test_a_patch_gives_the_same_logits_bit_for_bit_and_is_taken_back(name: str, kind: str, tmp_path: Path) -> None:
    model = tiny(name)
    inputs, base = inputs_of(model), fingerprint(model)
    before = out(model, inputs)
    done = quantise(model, inputs, SETTINGS[kind])
    after = out(model, inputs)
    patch = done.patch(bits=kind)
    assert fingerprint(model) == base
    patch.save(tmp_path / "p.safetensors")
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded == patch
    applied = loaded.apply(model)
    assert torch.equal(out(model, inputs), after)
    assert all(effect.changed > 0 for effect in applied.effects)
    applied.revert()
    assert fingerprint(model) == base
    assert torch.equal(out(model, inputs), before)
    rows = [row for row in read_header(tmp_path / "p.safetensors").rows() if row["op"] == "quantise-experts"]
    assert len(rows) == (2 if name != "qwen3_moe" else 1)
    assert rows[0]["shape"].startswith(kind.split()[0])


def test_the_file_is_small_and_a_wrong_base_or_state_is_refused() -> None:
    model = tiny_model("mixtral", num_hidden_layers=1, hidden_size=64, intermediate_size=128)
    patch = quantise(model, inputs_of(model), SETTINGS["W4A4"]).patch()
    row = next(row for row in patch.summary() if row["op"] == "quantise-experts")
    assert row["bytes"] < sum(parameter.numel() for parameter in model.model.layers[0].mlp.experts.parameters())
    with pytest.raises(PatchBaseError):
        patch.apply(tiny())
    applied = patch.apply(model)
    experts = model.model.layers[0].mlp.experts
    model.model.layers[0].mlp.experts = torch.nn.Identity()
    with pytest.raises(PatchStateError, match="an operation put into it is not there"):
        applied.revert()
    model.model.layers[0].mlp.experts = experts
    applied.revert()


def test_other_patches_of_such_models_are_refused_as_before() -> None:
    model = tiny()
    name = "model.layers.0.mlp.gate.weight"
    op = SparseReplace.between(name, model.get_parameter(name), model.get_parameter(name) + 1)
    assert op is not None
    with pytest.raises(UnsupportedModelError, match="holds experts"):
        Patch.of(model, [op])


def test_a_stack_with_a_quantised_mixture_comes_off_again() -> None:
    model = tiny()
    inputs, base = inputs_of(model), fingerprint(model)
    quantised = quantise(model, inputs, SETTINGS["W4A4"]).patch()
    name = "lm_head.weight"
    op = SparseReplace.between(name, model.get_parameter(name), model.get_parameter(name) * 2)
    assert op is not None
    other = Patch.of(Anatomy.of(model, experts=True), [op])
    applied = stack([other, quantised]).apply(model)
    applied.revert()
    assert fingerprint(model) == base


@pytest.mark.parametrize("name", TINY_EXPERTS)
def test_a_plain_checkpoint_holds_the_rounded_experts_in_float(name: str, tmp_path: Path) -> None:
    """From memory and from shards that hold experts one by one: the same folder, which loads without Trocar."""
    model = tiny(name)
    inputs = inputs_of(model)
    done = quantise(model, inputs, DuQuantConfig(activations=Activations(bits=16), chain=SMALL))
    after = out(model, inputs)
    patch = done.patch()
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    export(patch, model, tmp_path / "memory")
    export(patch, tmp_path / "base", tmp_path / "folder")
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("memory", "folder"))
    assert fingerprint(one) == fingerprint(other)
    torch.testing.assert_close(out(one, inputs), after, rtol=1e-3, atol=1e-4)
    with pytest.raises(ExportError, match="no low-rank update"):
        export(patch, model, tmp_path / "adapter", to="peft")


def test_other_experts_than_the_bases_are_not_rewritten(tmp_path: Path) -> None:
    model = tiny()
    patch = quantise(model, inputs_of(model), SETTINGS["W4A4"]).patch()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] += 1
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(PatchBaseError, match=r"not the base's model\.layers\.1\.mlp\.experts\.down_proj"):
        merge_into(patch, tmp_path / "base", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_where_transformers_saves_experts() -> None:
    keys = expert_keys(tiny("qwen2_moe"))
    assert len(keys) == 4
    assert keys["model.layers.1.mlp.experts.gate_up_proj"][2] == [
        f"model.layers.1.mlp.experts.2.{part}_proj.weight" for part in ("gate", "up")
    ]
    assert keys["model.layers.0.mlp.experts.down_proj"][3] == ["model.layers.0.mlp.experts.3.down_proj.weight"]
    assert expert_keys(tiny_model("llama")) == {}


@pytest.mark.parametrize("part", ["in.permutation1", "hidden.rotation0", "gate_up.codes", "down.zero", "down.step", "which"])
def test_contents_that_make_no_sense_are_refused(part: str) -> None:
    model = tiny()
    done = quantise(model, inputs_of(model), DuQuantConfig(weights=Weights(bits=3), chain=SMALL))
    op = next(op for op in done.operations() if isinstance(op, QuantiseExperts))
    done.revert()
    tensors = {name: value.clone() for name, value in op.tensors().items()}
    if part == "which":
        record = op.record().model_dump(mode="json") | {"which": [0, 2, 0, 0]}
        with pytest.raises(ValueError, match="every transform"):
            type(op.record()).model_validate(record | {key: tuple(record[key]) for key in ("which", "steps", "hidden_steps")}, strict=False)
        return
    first = tensors[part].view(-1)
    wrong = {"permutation1": first[1], "rotation0": 3, "codes": 255, "zero": 9, "step": float("nan")}
    first[0] = wrong[part.partition(".")[2]]
    with pytest.raises(TrocarError) as caught:
        Patch.of(model, [QuantiseExperts.build(op.record(), tensors)])
    assert isinstance(caught.value, PatchFormatError) or "NaN" in str(caught.value)


@pytest.mark.parametrize("name", TINY_EXPERTS)
def test_a_checkpoint_shard_by_shard_gives_what_memory_gives(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    errors = quantise_checkpoint(tmp_path / "base", tmp_path / "small", inputs, SETTINGS["W4A4"], seed=3)
    done = quantise(model, inputs, SETTINGS["W4A4"], seed=3)
    assert errors == done.errors
    loaded = load_quantised(tmp_path / "small")
    assert torch.equal(out(loaded, inputs), out(model, inputs))
    told = look(tmp_path / "small")
    assert told.names["model.layers.1.mlp.experts"] == "L1.mlp.experts"
    done.revert()
    counts = {path: sum(part.numel() for part in model.get_submodule(path).parameters()) for path in told.names}
    biases = sum(part.numel() for key, part in model.named_parameters() if key.endswith("_proj.bias"))
    assert told.weights == sum(counts.values()) - biases


def test_a_loaded_mixture_as_a_plain_checkpoint(tmp_path: Path) -> None:
    model = tiny()
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path / "base")
    settings = DuQuantConfig(activations=Activations(bits=16), chain=SMALL)
    quantise_checkpoint(tmp_path / "base", tmp_path / "small", inputs, settings)
    loaded = load_quantised(tmp_path / "small")
    before = out(loaded, inputs)
    export_float(loaded, tmp_path / "float")
    torch.testing.assert_close(out(AutoModelForCausalLM.from_pretrained(tmp_path / "float"), inputs), before, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_tells_of_rare_experts_and_damage_is_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny()
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings(), pytest.warns(UserWarning, match="fewer than 64 calibration tokens"):
        quantise_checkpoint(tmp_path / "base", tmp_path / "small", inputs_of(model, rows=1, length=8), SETTINGS["W4A4"])
    block = tmp_path / "small" / f"{checkpoint._name(1)}.safetensors"
    tensors = load_file(block)
    name = next(key for key in tensors if key.endswith("down.codes"))
    save_file({key: value for key, value in tensors.items() if key != name}, block)
    with pytest.raises(DataError, match="missing"):
        load_quantised(tmp_path / "small")
