"""Patches and folders: diff, merging shard by shard in bounded memory, export to checkpoints and PEFT adapters."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trocar.anatomy import Anatomy, fingerprint, tiny_inputs, tiny_model
from trocar.core.errors import DataError, ExportError, PatchBaseError, PatchFormatError
from trocar.patch import Adapter, AddVector, Factors, Gate, LowRank, Patch, Remove, ScaleAt, SparseReplace, diff, export, merge_into
from trocar.patch.checkpoint import match, scan, skeleton
from trocar.patch.compare import joint_fingerprint

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
FAMILIES = ["llama", "gemma3_text", "gpt2", "gpt_neox", "vit", "dinov2", "clip", "bert"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(model, inputs):
    with torch.no_grad():
        return {key: value for key, value in model(**inputs).items() if isinstance(value, torch.Tensor)}


def furthest(one, two):
    return max(float((one[key] - two[key]).abs().max()) for key in one)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, its folder of many small shards) by family."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "base"
            model = tiny_model(family)
            model.save_pretrained(folder, max_shard_size="20KB")
            (folder / "tokenizer.json").write_text("{}")
            (folder / "pytorch_model.bin").write_bytes(b"old weights")
            made[family] = (model, folder)
        return made[family]

    return get


def operations(model):
    anatomy = Anatomy.of(model)
    name = list(anatomy.towers)[-1]
    tower, prefix = anatomy.tower(name), f"{name}." if name else ""
    down, o = anatomy.linear(f"{prefix}L1.mlp.down"), anatomy.linear(f"{prefix}L0.attn.o")
    after = down.parameter.detach().clone()
    after[3] += 1
    after[5, 7] = 0
    embedding = next(key for key, value in model.named_parameters() if value is next(tower.embedding.parameters()))
    every = model.get_parameter(embedding)
    return {
        "several": [
            SparseReplace.between(down.name, down.parameter, after),
            LowRank(o.name, normal(2, o.in_features), normal(o.out_features, 2), o.transposed),
            Gate({f"{prefix}L0.H1": 0, f"{prefix}L2.mlp": 0}),
            SparseReplace.between(embedding, every, every.detach() * 2),
        ],
        "blocks": [Remove([f"{prefix}L0"])],
        "blocks and a gate": [Gate({f"{prefix}L2.H1": 0}), Remove([f"{prefix}L1"])],
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["several", "blocks", "blocks and a gate"])
def test_merging_equals_applying_and_saving(saved, tmp_path, family, what):
    model, folder = saved(family)
    before, inputs = fingerprint(model), tiny_inputs(model)
    patch = Patch.of(model, operations(model)[what])
    with patch.applied(model):
        wanted = outputs(model, inputs)
    export(patch, model, tmp_path / "exported")
    report = merge_into(patch, folder, tmp_path / "merged")
    assert fingerprint(model) == before
    exported, merged = (type(model).from_pretrained(tmp_path / name).eval() for name in ("exported", "merged"))
    assert fingerprint(exported) == fingerprint(merged) != before
    assert furthest(outputs(merged, inputs), wanted) < 1e-5
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert not (tmp_path / "merged" / "pytorch_model.bin").exists()
    assert report["bytes"] == sum(
        tensor.nbytes for file in (tmp_path / "merged").glob("*.safetensors") for tensor in load_file(file).values()
    )
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_in_short_dtypes(tmp_path, dtype):
    model = tiny_model("llama").to(dtype)
    model.save_pretrained(tmp_path / "base")
    patch = Patch.of(model, operations(model)["several"])
    merge_into(patch, tmp_path / "base", tmp_path / "merged")
    with patch.applied(model):
        assert fingerprint(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)) == fingerprint(model)


def test_untouched_tensors_are_copied_byte_for_byte(saved, tmp_path):
    model, folder = saved("llama")
    patch = Patch.of(model, operations(model)["several"][:1])
    assert merge_into(patch, folder, tmp_path / "merged")["tensors"] == 1
    changed = []
    for file in sorted(folder.glob("*.safetensors")):
        old, new = load_file(file), load_file(tmp_path / "merged" / file.name)
        assert list(old) == list(new)
        changed += [key for key in old if not torch.equal(old[key], new[key])]
    assert changed == [patch.ops[0].parameter]
    old, new = (json.loads((one / "model.safetensors.index.json").read_text()) for one in (folder, tmp_path / "merged"))
    assert old["weight_map"] == new["weight_map"]


@pytest.mark.parametrize("what", ["heads", "neurons"])
def test_removals_that_a_config_can_say(saved, tmp_path, what):
    model, folder = saved("llama")
    names = [f"L{layer}.{one}" for layer in range(3) for one in (("H0", "H1") if what == "heads" else ("N1", "N5"))]
    patch = Patch.of(model, [Remove(names)])
    merge_into(patch, folder, tmp_path / "merged")
    with patch.applied(model):
        wanted = outputs(model, tiny_inputs(model))
    assert furthest(outputs(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval(), tiny_inputs(model)), wanted) < 1e-5


@pytest.mark.parametrize(
    ("family", "names", "says"),
    [
        ("llama", ["L0.N3"], "by the config it would be"),
        ("llama", ["L1.H0", "L1.H1"], "by the config it would be"),
        ("gpt2", [f"L{layer}.H0" for layer in range(3)], "config is not valid"),
    ],
)
def test_removals_that_no_config_can_say(saved, tmp_path, family, names, says):
    model, folder = saved(family)
    patch = Patch.of(model, [Remove(names)])
    before = fingerprint(model)
    for source in (model, folder):
        with pytest.raises(ExportError, match=rf"{says}.*gate the components"):
            export(patch, source, tmp_path / "out")
    assert fingerprint(model) == before
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "point"),
    [("gpt2", "L1.resid_post"), ("gpt2", "L1.resid_pre"), ("gpt2", "L0.attn_out"), ("gpt2", "L2.mlp_out"), ("bert", "L1.resid_post"),
     ("gpt2", "L1.heads"), ("gpt2", "L1.neurons"), ("vit", "L2.resid_post"), ("gpt_neox", "L1.resid_post"), ("dinov2", "L1.mlp_out")],
)  # fmt: skip
def test_vectors_move_into_biases(saved, tmp_path, family, point):
    model, folder = saved(family)
    inputs = tiny_inputs(model)
    size = 48 if point.endswith("neurons") and family == "gpt2" else 32
    patch = Patch.of(model, [AddVector(point, normal(size))])
    with patch.applied(model):
        wanted = outputs(model, inputs)
    assert furthest(wanted, outputs(model, inputs)) > 1e-3
    export(patch, model, tmp_path / "exported")
    assert furthest(outputs(type(model).from_pretrained(tmp_path / "exported").eval(), inputs), wanted) < 2e-5
    if point.endswith(("heads", "neurons")):
        with pytest.raises(ExportError, match="Load the model"):
            merge_into(patch, folder, tmp_path / "merged")
    else:
        merge_into(patch, folder, tmp_path / "merged")
        assert furthest(outputs(type(model).from_pretrained(tmp_path / "merged").eval(), inputs), wanted) < 2e-5


@pytest.mark.parametrize(
    ("family", "point", "positions", "says"),
    [
        ("llama", "L1.resid_post", None, "has no bias"),
        ("gpt2", "L0.resid_pre", None, "first block"),
        ("gpt2", "L1.resid_post", [-1], "positions"),
        ("gemma3_text", "L1.resid_post", None, "stands between"),
        ("dinov2", "L1.resid_post", None, "stands between"),
    ],
)
def test_vectors_without_a_bias_to_go_to(saved, tmp_path, family, point, positions, says):
    model, folder = saved(family)
    patch = Patch.of(model, [AddVector(point, normal(32), positions)])
    for source in (model, folder):
        with pytest.raises(ExportError, match=rf"{says}.*patch file itself"):
            export(patch, source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_acts_at_positions_is_no_weight(saved, tmp_path):
    model, folder = saved("llama")
    patch = Patch.of(model, [ScaleAt({"L0.H1": 0.0}, "last+generated")])
    for source in (model, folder):
        with pytest.raises(ExportError, match=r"positions last\+generated.*Use Gate"):
            export(patch, source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_wrong_checkpoints_are_refused(saved, tmp_path):
    model, folder = saved("llama")
    patch = Patch.of(model, operations(model)["several"])
    other = tiny_model("llama", seed=5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(PatchBaseError, match="No tensor of the checkpoint"):
        merge_into(patch, tmp_path / "other", tmp_path / "out")
    with pytest.raises(PatchBaseError, match="family"):
        merge_into(patch, saved("gpt2")[1], tmp_path / "out")
    with pytest.raises(DataError, match=r"config\.json"):
        merge_into(patch, tmp_path, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ExportError, match="exists"):
        merge_into(patch, folder, tmp_path / "full")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(DataError, match="no safetensors"):
        merge_into(patch, broken, tmp_path / "out")
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="not a safetensors file"):
        merge_into(patch, broken, tmp_path / "out")
    (broken / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"architectures": ["os.system"]}))
    with pytest.raises(DataError, match="names the class"):
        merge_into(patch, broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_equal_contents_are_told_apart_by_names_or_refused(tmp_path):
    """Norms that are all ones, and biases that are all zeros, are equal tensors under different names."""
    model = tiny_model("vit")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    model.save_pretrained(tmp_path / "base")
    name = "vit.layers.1.attention.q_proj.bias"
    patch = Patch.of(
        model, [SparseReplace(name, (32,), normal(32)), SparseReplace("vit.layers.2.layernorm_after.weight", (32,), normal(32))]
    )
    merge_into(patch, tmp_path / "base", tmp_path / "merged")
    with patch.applied(model):
        assert fingerprint(transformers.ViTForImageClassification.from_pretrained(tmp_path / "merged")) == fingerprint(model)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    save_file({f"odd.{number}": tensor for number, tensor in enumerate(tensors.values())}, tmp_path / "odd" / "model.safetensors")
    with pytest.raises(ExportError, match=r"tensors of the checkpoint could be .*Load the model"):
        merge_into(patch, tmp_path / "odd", tmp_path / "out")


def test_the_fingerprint_of_a_checkpoint_is_that_of_the_model(saved):
    for family in FAMILIES:
        model, folder = saved(family)
        made = skeleton(folder)
        found = match(made, {name: None for name, _ in made.named_parameters()}, scan(folder))
        assert joint_fingerprint({name: tensors[0].fingerprint for name, tensors in found.items()}) == fingerprint(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "gemma3_text"])
def test_diff_of_models_and_of_folders(saved, tmp_path, family):
    model, folder = saved(family)
    edited = copy.deepcopy(model)
    with torch.no_grad():
        with Patch.of(edited, operations(edited)["several"]).applied(edited):
            wanted = {name: parameter.detach().clone() for name, parameter in edited.named_parameters()}
        edited.load_state_dict(wanted, strict=False)
    edited.save_pretrained(tmp_path / "edited")
    patch = diff(model, edited)
    assert patch == diff(folder, tmp_path / "edited")
    assert {op.layout for op in patch.ops} >= {"whole"}
    assert len(patch.ops) < 8
    with patch.applied(model):
        assert fingerprint(model) == fingerprint(edited)
    back = diff(edited, model)
    with back.applied(edited):
        assert fingerprint(edited) == fingerprint(model)
    nothing = diff(model, copy.deepcopy(model))
    assert nothing.ops == ()
    with nothing.applied(model) as applied:
        assert applied.effects == ()


def test_diff_finds_low_rank_changes_when_asked(saved):
    model, _ = saved("gpt2")
    view = Anatomy.of(model).linear("L1.mlp.up")
    change = LowRank(view.name, normal(1, view.in_features), normal(view.out_features, 1), view.transposed)
    edited = copy.deepcopy(model)
    Patch.of(model, [change]).apply(edited)
    exact, small = diff(model, edited), diff(model, edited, low_rank=1e-5)
    assert exact.ops[0].kind == "sparse-replace"
    assert small.ops[0].kind == "low-rank"
    assert small.ops[0].a.shape[0] == 1
    assert small.nbytes < exact.nbytes
    with small.applied(model):
        torch.testing.assert_close(model.get_parameter(view.name), edited.get_parameter(view.name), atol=1e-5, rtol=1e-5)
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        noisy.get_parameter(view.name).add_(normal(*view.parameter.shape))
    assert diff(model, noisy, low_rank=1e-5).ops[0].kind == "sparse-replace"  # a full-rank change stays exact


def test_what_cannot_be_compared(saved, tmp_path):
    model, folder = saved("llama")
    with pytest.raises(PatchBaseError, match="missing"):
        diff(model, tiny_model("llama", num_hidden_layers=2))
    with pytest.raises(PatchBaseError, match="one dtype"):
        diff(model, copy.deepcopy(model).half())
    with pytest.raises(PatchBaseError, match="folder"):
        diff(model, folder)
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "short")
    with pytest.raises(PatchBaseError, match="missing"):
        diff(folder, tmp_path / "short")


LORA = {
    "plain": {"r": 2, "lora_alpha": 3},
    "patterns": {"r": 2, "lora_alpha": 3},  # and what is said for single modules, below
    "rank-stabilised": {"r": 4, "lora_alpha": 3, "use_rslora": True, "lora_dropout": 0.1},
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("setting", LORA)
def test_adapters_from_and_to_peft(saved, tmp_path, family, setting):
    model, folder = saved(family)
    before, inputs = fingerprint(model), tiny_inputs(model)
    modules = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "mlp.c_proj"]
    single = {"rank_pattern": {modules[1]: 4}, "alpha_pattern": {modules[0]: 7}} if setting == "patterns" else {}
    config = peft.LoraConfig(target_modules=modules, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2", **LORA[setting], **single)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(wrapped.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * normal(*parameter.shape, seed=number))
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    wanted = outputs(wrapped, inputs)
    patch = Patch.of(model, [Adapter.of(wrapped)])
    assert Patch.of(model, [Adapter.from_peft(tmp_path / "adapter")]) == patch
    with patch.applied(model):
        assert furthest(outputs(model, inputs), wanted) < 2e-5
        merged = copy.deepcopy(wrapped).merge_and_unload()
        assert all(torch.equal(one, two) for one, two in zip(model.parameters(), merged.parameters(), strict=True))
    assert fingerprint(model) == before
    for number, source in enumerate((model, folder)):
        export(patch, source, tmp_path / f"out{number}", to="peft")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / f"out{number}").eval()
        assert furthest(outputs(loaded, inputs), wanted) < 1e-6
    merge_into(patch, folder, tmp_path / "merged")
    with patch.applied(model):
        assert fingerprint(type(model).from_pretrained(tmp_path / "merged")) == fingerprint(model)


def test_low_rank_updates_of_one_matrix_become_one_adapter(saved, tmp_path):
    model, _ = saved("llama")
    view = Anatomy.of(model).linear("L1.mlp.up")
    updates = [LowRank(view.name, normal(r, view.in_features, seed=r), normal(view.out_features, r, seed=9 + r)) for r in (1, 2)]
    adapter = Adapter({view.name.removesuffix(".weight"): Factors(normal(2, view.in_features), normal(view.out_features, 2), 0.25)})
    patch = Patch.of(model, [*updates, adapter])
    export(patch, model, tmp_path / "out", to="peft")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out").eval()
    inputs = tiny_inputs(model)
    with patch.applied(model):
        assert furthest(outputs(loaded, inputs), outputs(model, inputs)) < 1e-4


def test_what_is_no_adapter(saved, tmp_path):
    model, _ = saved("llama")
    with pytest.raises(ExportError, match="no low-rank update"):
        export(Patch.of(model, [Gate({"L0.H1": 0})]), model, tmp_path / "out", to="peft")
    with pytest.raises(ExportError, match="not a format"):
        export(Patch.of(model, [Gate({"L0.H1": 0})]), model, tmp_path / "out", to="onnx")  # type: ignore[arg-type]
    embedding = LowRank("model.embed_tokens.weight", normal(1, 32), normal(64, 1))
    with pytest.raises(ExportError, match="not a linear map"):
        export(Patch.of(model, [embedding]), model, tmp_path / "out", to="peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "LoRA"),
        ({"lora_alpha": "3"}, "lora_alpha"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "Only names"),
    ],
)
def test_adapter_folders_that_are_refused(saved, tmp_path, change, says):
    model, _ = saved("llama")
    export(
        Patch.of(model, [Adapter({"model.layers.0.self_attn.q_proj": Factors(normal(1, 32), normal(64, 1), 1.0)})]),
        model,
        tmp_path / "a",
        to="peft",
    )
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(PatchFormatError, match=says):
        Adapter.from_peft(tmp_path / "a")


def test_a_peft_model_with_more_than_lora_is_refused(saved):
    model, _ = saved("llama")
    for settings in ({"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], **settings)
        with pytest.raises(PatchFormatError, match="plain LoRA"):
            Adapter.of(peft.get_peft_model(copy.deepcopy(model), config))
    with pytest.raises(PatchFormatError, match="no adapter"):
        Adapter.of(model)


def test_merging_takes_the_memory_of_about_one_tensor(tmp_path):
    """A checkpoint of 8 blocks of 3 x 4 MiB matrices in many shards is merged by a process that gets 32 MiB more than at its start."""
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, vocab_size=64, tie_word_embeddings=True
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base", max_shard_size="16MB")
    total = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert total > 30 * largest
    ops = [Gate({f"L{layer}.N{n}": 0 for layer in range(8) for n in range(100)})]
    ops.append(LowRank("model.layers.7.mlp.up_proj.weight", normal(4, 512), normal(2048, 4)))
    Patch.of(model, ops).save(tmp_path / "p")
    code = """
import resource, sys, torch
torch.set_num_threads(1)
from trocar.patch import Patch, merge_into
from trocar.patch.checkpoint import skeleton
patch = Patch.load(sys.argv[1]); skeleton(sys.argv[2])
def data():
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData")))
resource.setrlimit(resource.RLIMIT_DATA, (data() + int(sys.argv[4]), resource.RLIM_INFINITY))
merge_into(patch, sys.argv[2], sys.argv[3])
"""
    budget = 8 * largest
    arguments = [sys.executable, "-c", code, str(tmp_path / "p"), str(tmp_path / "base"), str(tmp_path / "merged"), str(budget)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    patch = Patch.load(tmp_path / "p")
    patch.apply(model)
    assert fingerprint(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")) == fingerprint(model)


def test_merging_is_all_or_nothing(saved, tmp_path, monkeypatch):
    model, folder = saved("llama")
    patch = Patch.of(model, operations(model)["several"])
    from trocar.patch import merge

    written = []

    def failing(path, sources, metadata):
        written.append(path)
        if len(written) == 2:
            raise OSError("disk full")
        real(path, sources, metadata)

    real = merge.write_file
    monkeypatch.setattr(merge, "write_file", failing)
    with pytest.raises(OSError, match="disk full"):
        merge_into(patch, folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_only_whole_names_are_taken_from_an_index(saved, tmp_path):
    _, folder = saved("llama")
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "evil" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    model, _ = saved("llama")
    with pytest.raises(DataError, match="not there"):
        merge_into(Patch.of(model, [Gate({"L0.H1": 0})]), tmp_path / "evil", Path(tmp_path / "out"))
