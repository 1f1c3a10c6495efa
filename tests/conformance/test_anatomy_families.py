"""The family table against what the models compute: the same questions for every family, and rows that lie are found out."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trocar.anatomy import TINY, Anatomy, tiny_model
from trocar.anatomy.conformance import MODEL_QUESTIONS, TOWER_QUESTIONS, check
from trocar.anatomy.families import FAMILIES

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
REAL = ("smollm2-135m-instruct", "gemma3-270m", "minilm-l6")


def failures(results):
    return {result.name: result.detail for result in results if result.state == "fails"}


@pytest.mark.parametrize("name", TINY)
def test_every_question_holds(name):
    model = tiny_model(name)
    results = check(model)
    assert failures(results) == {}
    towers = list(Anatomy.of(model).towers)
    asked = {(result.name, result.tower) for result in results}
    assert asked == {(q, t) for q in TOWER_QUESTIONS for t in towers} | {(q, "") for q in (*MODEL_QUESTIONS, "restored")}
    absent = {result.name for result in results if result.state == "absent"}
    assert absent <= {"fused", "grouped queries", "files"}
    assert ("files" in absent) <= (name == "dinov2-swiglu")
    if name in ("phi3", "gpt2", "gpt_neox"):
        assert "fused" not in absent
    if name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"):
        assert "grouped queries" not in absent


@pytest.mark.parametrize("name", [name for name in TINY if len(TINY[name][1]) > 1])
def test_names_hold_on_all_task_heads(name):
    from trocar.anatomy.conformance import names

    for task in ("lm", "class", "base"):
        if task in TINY[name][1]:
            anatomy = Anatomy.of(tiny_model(name, task))
            names(anatomy)
            if task != "base":
                assert any(tower.head is not None for tower in anatomy.towers.values())
            elif not name.startswith(("clip", "siglip")):
                assert anatomy.tower(next(iter(anatomy.towers))).head is None


def roles(**changes):
    return lambda row: replace(row, roles={**row.roles, **changes})


LIES = {
    "q and k swapped": ("vit", roles(q="attention.k_proj", k="attention.q_proj"), "attention"),
    "k and v swapped": ("opt", roles(k="self_attn.v_proj", v="self_attn.k_proj"), "attention"),
    "q and o swapped": ("bert", roles(q="attention.output.dense", o="attention.self.query"), "attention"),
    "up and gate swapped": ("llama", roles(up="mlp.gate_proj", gate="mlp.up_proj"), "neurons"),
    "gate forgotten": ("qwen3", lambda row: replace(row, roles={k: v for k, v in row.roles.items() if k != "gate"}), "coverage"),
    "fused rows in another order": ("gpt2", lambda row: replace(row, layouts={"qkv": "k,q,v"}), "attention"),
    "heads interleaved that are not": ("gpt2", lambda row: replace(row, layouts={"qkv": "head:q,k,v"}), "attention"),
    "heads not interleaved that are": ("gpt_neox", lambda row: replace(row, layouts={"qkv": "q,k,v"}), "attention"),
    "fused up before gate": ("phi3", lambda row: replace(row, layouts={"qkv": "q,k,v", "gate_up": "up,gate"}), "neurons"),
    "causal that is not": ("vit", lambda row: replace(row, causal=True), "attention"),
    "not causal that is": ("gpt2", lambda row: replace(row, causal=False), "attention"),
    "another head": ("gpt2", lambda row: replace(row, head="transformer.wte"), "names"),
    "another embedding": ("gpt2", lambda row: replace(row, embedding="wpe"), "names"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_row_that_lies_is_found_out(lie, monkeypatch):
    name, change, question = LIES[lie]
    monkeypatch.setitem(FAMILIES, name, replace(FAMILIES[name], towers=(change(FAMILIES[name].towers[0]),)))
    task = "lm" if "lm" in TINY[name][1] else "class"
    assert question in failures(check(tiny_model(name, task), thorough=False))


def test_a_map_that_computes_more_than_its_weights_say_is_found_out():
    model = tiny_model("llama")
    module = Anatomy.of(model).tower().module(0, "up")
    forward = module.forward
    module.forward = lambda x: forward(x) + 1
    results = check(model, thorough=False)
    assert "L0 up" in failures(results)["linear maps"]
    assert not all(result.ok for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    results = check(tiny_model("gpt2").to(dtype), thorough=False)
    assert failures(results) == {}


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_real_models(name):
    folder = Path(os.environ.get("TROCAR_MODELS", "~/.cache/trocar/models")).expanduser() / name
    if not folder.exists():
        pytest.skip(f"{name} is not there")
    kind = transformers.AutoModel if name == "minilm-l6" else transformers.AutoModelForCausalLM
    model: Any = kind.from_pretrained(folder, dtype=torch.float32).eval()
    assert failures(check(model, thorough=False, layers=(model.config.num_hidden_layers // 2,))) == {}
