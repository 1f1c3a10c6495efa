"""`trocar patch combine` and `prune`: adapters in, an adapter out that loads in plain peft, and one line for what does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

from trocar.anatomy import fingerprint, tiny_inputs, tiny_model
from trocar.cli import main
from trocar.patch import Adapter, Patch, read_header


def adapter(folder: Path, seed: int, rank: int = 2, **settings: object) -> Path:
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": rank, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **settings})  # type: ignore[arg-type]
    model = peft.get_peft_model(tiny_model("llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    path = folder / f"seed{seed}-{rank}"
    model.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("combine")
    tiny_model("llama").save_pretrained(folder / "model")
    for seed, rank in ((0, 2), (1, 2), (2, 3)):
        adapter(folder, seed, rank)
    Patch.of(tiny_model("llama"), [Adapter.from_peft(folder / "seed1-2")]).save(folder / "one.safetensors")
    return folder


def trocar(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trocar", "patch", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120, check=False)


def updates(path: Path) -> dict[str, torch.Tensor]:
    return {name: scale * b.double() @ a.double() for name, (a, b, scale, _) in Adapter.from_peft(path).factors.items()}


def test_a_mixture_loads_in_plain_peft_and_is_the_mean_of_the_updates(place: Path, tmp_path: Path) -> None:
    done = trocar("combine", place / "seed0-2", place / "seed2-3", "--how", "mixture", "--weights", "1,3", "-o", tmp_path / "made")
    assert done.returncode == 0, done.stderr
    assert "6 modules" in done.stdout
    assert f"peft: {tmp_path / 'made'}" in done.stdout
    first, second = updates(place / "seed0-2"), updates(place / "seed2-3")
    base, inputs = tiny_model("llama"), tiny_inputs(tiny_model("llama"))
    with torch.no_grad():
        for name, value in first.items():
            base.get_submodule(name).weight += (0.25 * value + 0.75 * second[name]).float()
        wanted = base(**inputs).logits
        loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "made"))
        torch.testing.assert_close(loaded(**inputs).logits, wanted, rtol=1e-4, atol=1e-5)


def test_adapters_that_do_not_fit_are_one_line(place: Path, tmp_path: Path) -> None:
    for words, says in (
        (("seed0-2", "seed2-3"), "Use a mixture"),
        (("seed0-2", "model"), "adapter_config.json cannot be read"),
    ):
        done = trocar("combine", *(place / word for word in words), "-o", tmp_path / "made")
        assert done.returncode == 2
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "made").exists()


def test_pruning_keeps_named_blocks(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "prune", str(place / "seed0-2"), "--keep", "L1", "-o", str(tmp_path / "half"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["peft"] == str(tmp_path / "half")
    assert {row["module"] for row in told["modules"] if row["kept"]} == set(updates(tmp_path / "half"))
    whole = updates(place / "seed0-2")
    assert all(torch.equal(value, whole[name]) for name, value in updates(tmp_path / "half").items())
    assert set(updates(tmp_path / "half")) == {name for name in whole if ".1." in name}
    assert main(["patch", "prune", str(place / "seed0-2"), "--keep", "v_proj", "--by", "role", "-o", str(tmp_path / "v")]) == 0
    assert all(name.endswith("v_proj") for name in updates(tmp_path / "v"))
    assert main(["patch", "prune", str(place / "seed0-2"), "--keep", "L9", "-o", str(tmp_path / "none")]) == 2
    assert "no group 'L9'" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["fusion", "aligned"])
def test_patches_go_in_and_come_out(place: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [str(place / "seed0-2"), str(place / "one.safetensors")]
    assert main(["patch", "combine", *parts, "--how", how, "-m", str(place / "model"), "-o", str(tmp_path / "made.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "lies off the mean of the updates by" in shown
    assert ("apart after" in shown) == (how == "aligned")
    model = tiny_model("llama")
    assert read_header(tmp_path / "made.safetensors").method == f"combine {how}"
    assert main(["patch", "combine", *parts, "--how", how, "-o", str(tmp_path / "folder")]) == 0
    base = fingerprint(model)
    with Patch.load(tmp_path / "made.safetensors").applied(model):
        patched = {name: model.get_submodule(name).weight.double().clone() for name in updates(tmp_path / "folder")}
    assert fingerprint(model) == base
    for name, value in updates(tmp_path / "folder").items():
        torch.testing.assert_close(patched[name], model.get_submodule(name).weight.double() + value, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_asked(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = str(place / "seed0-2"), str(place / "seed1-2")
    torch.manual_seed(9)
    with torch.no_grad():
        stranger = tiny_model("llama")
        stranger.lm_head.weight += 1
    Patch.of(stranger, [Adapter.from_peft(other)]).save(tmp_path / "stranger.safetensors")
    wrong = str(tmp_path / "stranger.safetensors")
    cases = [
        ([one, "-o", str(tmp_path / "x")], "nothing to combine"),
        ([one, other, "-o", str(tmp_path / "x.safetensors")], "Name it with --model"),
        ([one, other, "-o", str(tmp_path / "x"), "--weights", "a,b"], "not a list of numbers"),
        ([one, other, "-o", str(tmp_path / "x"), "--weights", "1"], "1 weights were given for 2"),
        ([one, other, "-o", str(tmp_path / "x"), "--how", "ties"], "'ties' cannot be done"),
        ([one, other, "-o", str(tmp_path / "x"), "--rank", "2"], "fusion keeps the adapters' rank"),
        ([one, other, "-o", str(tmp_path / "x"), "--how", "lego", "--weights", "1,1"], "weighs no adapter"),
        ([one, other, "-o", str(tmp_path / "x"), "--how", "mixture", "--rank", "0"], "rank of 0"),
        ([str(place / "one.safetensors"), wrong, "-o", str(tmp_path / "x")], "belong to different models"),
        ([one, wrong, "-m", str(place / "model"), "-o", str(tmp_path / "x.safetensors")], "belongs to the model"),
    ]  # fmt: skip
    for words, says in cases:
        assert main(["patch", "combine", *words]) == 2, words
        assert says in capsys.readouterr().err, words
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.safetensors").exists()
