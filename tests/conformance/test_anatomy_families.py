"""The same properties for a tiny model of every family and for the real models where they are present."""

import os
from pathlib import Path

import pytest
import torch

from trocar.anatomy import TINY, Anatomy, fingerprint, tiny_model
from trocar.anatomy.conformance import check

torch.set_num_threads(1)
MODELS = Path(os.environ.get("TROCAR_MODELS", "~/.cache/trocar/models")).expanduser()
REAL = {"smollm2-135m-instruct": "AutoModelForCausalLM", "gemma3-270m": "AutoModelForCausalLM", "minilm-l6": "AutoModel"}


@pytest.mark.parametrize("name", TINY)
def test_every_family(name):
    failed = [result for result in check(tiny_model(name)) if not result.ok]
    assert not failed


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "clip", "bert"])
def test_saved_and_loaded_has_the_same_fingerprint(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == fingerprint(model)


def test_a_wrong_row_is_found():
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    module = anatomy.tower().module(0, "up")
    forward = module.forward
    module.forward = lambda x: forward(x) + 1  # as if a part of the map had been overlooked
    assert [result.name for result in check(model) if not result.ok] == ["L0 up as a matrix gives what the module gives"]


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_real_models(name):
    if not (MODELS / name / "config.json").exists():
        pytest.skip(f"{name} is not under TROCAR_MODELS")
    import transformers

    model = getattr(transformers, REAL[name]).from_pretrained(MODELS / name, dtype=torch.float32).eval()
    assert not [result for result in check(model, layers=(1,)) if not result.ok]
