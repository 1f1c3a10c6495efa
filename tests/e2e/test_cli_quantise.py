"""`trocar quantise` and `quantise-check`: every form loads and computes what it should, a killed run goes on, bad input is one line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from outputs import error

from trocar.anatomy import tiny_model
from trocar.cli import complete, main
from trocar.compress.duquant import PRESETS, load_quantised
from trocar.compress.duquant.folders import load_transforms, look
from trocar.lab.worlds import tokenizer

WORDS = [f"word{number}" for number in range(60)]
SMALL = ["--windows", "4", "--window-tokens", "32", "--block-size", "8", "--search-steps", "2"]
IDS = torch.arange(2, 26)[None]
BLOCKS = 12  # of the model that is killed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantise")
    words = tokenizer(WORDS)
    shapes: dict[str, tuple[str, dict[str, Any]]] = {"model": ("llama", {}), "conv": ("gpt2", {})}
    shapes["deep"] = ("llama", {"num_hidden_layers": BLOCKS})
    for name, (family, shape) in shapes.items():
        tiny_model(family, vocab_size=len(words), **shape).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    draw = random.Random(0)
    for name, count in (("text", 12), ("other", 12), ("short", 1)):
        (folder / f"{name}.txt").write_text("\n\n".join(" ".join(draw.choices(WORDS, k=24)) for _ in range(count)))
    (folder / "rows.jsonl").write_text(json.dumps({"said": " ".join(WORDS * 3), "n": 1}))
    return folder


def command(place: Path, target: Path, *words: str, model: str = "model", text: str = "text.txt") -> list[str]:
    return ["quantise", str(place / model), str(target), "--calibration", str(place / text), *SMALL, *words]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


@pytest.fixture(scope="module")
def made(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("made") / "small"
    assert main(command(place, target, "--bits", "W4A8", "--keep", "L1.mlp.down=8")) == 0
    return target


def test_the_method_names_are_those_of_the_presets() -> None:
    assert set(complete.QUANTISERS) == set(PRESETS)
    assert len(complete.QUANTISERS) == len(PRESETS)


# -- forms -------------------------------------------------------------------------------------------------------------------------


def test_the_own_form_says_what_was_done(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "small"
    assert main(command(place, target, "--bits", "W4A8", "--keep", "L1.mlp.down=8", "--set", "smoothing.alpha=0.5")) == 0
    shown = capsys.readouterr().out
    found = look(target)
    assert found.settings["smoothing"]["alpha"] == 0.5
    assert found.settings["keep"] == {"L1.mlp.down": 8}
    assert found.settings["chain"]["block_size"] == 8
    assert (found.blocks, len(found.names)) == (3, 21)
    worst = found.worst(1)[0]
    assert worst[2] == max(found.errors[path] for path in found.names)
    assert shown.index("layer ") < shown.index(worst[0]) < shown.index(f"{worst[2]:.4g}") < shown.index("mean output error")
    assert f"{found.bits:.3g}, with scales and transforms" in shown
    assert f"trocar quantise-check {target}" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    assert 0 < error(logits(load_quantised(target)), logits(base)) < 0.5
    kept = load_quantised(target).get_submodule("model.layers.1.mlp.down_proj")
    assert kept.quantiser.bits == 8


def test_bits_a_weight_are_counted_from_what_lies_there(made: Path) -> None:
    found, model = look(made), load_quantised(made)
    layers = [module for module in model.modules() if type(module).__name__ == "QuantisedLinear"]
    stored = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())  # an input is among its owner's
    assert found.weights == sum(layer.in_features * layer.out_features for layer in layers)
    assert found.layers_bytes == stored
    assert found.elsewhere_bytes == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("model", ["model", "conv"])
def test_the_float_form_is_a_plain_checkpoint_of_the_rounded_weights(
    model: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ("--bits", "W4A16", "--method", "duquant-gptq")
    assert main(command(place, tmp_path / "own", *same, model=model)) == 0
    assert main(command(place, tmp_path / "float", *same, "--form", "float", model=model)) == 0
    assert "activations are not rounded" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"own", "float"}
    base = logits(transformers.AutoModelForCausalLM.from_pretrained(place / model))
    plain = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float"))
    assert error(plain, logits(load_quantised(tmp_path / "own"))) < 1e-4
    assert error(plain, base) > 0.01
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "float")("word3")["input_ids"] == [1, 5]


def test_the_compressed_form_loads_in_transformers(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("compressed_tensors")
    words = ["--windows", "4", "--window-tokens", "32", "--bits", "W4A16"]
    start = ["quantise", str(place / "model")]
    text = ["--calibration", str(place / "text.txt")]
    assert main([*start, str(tmp_path / "own"), *text, *words, "--method", "folded"]) == 0
    capsys.readouterr()
    assert main([*start, str(tmp_path / "out"), *text, *words, "--form", "compressed-tensors"]) == 0
    shown = capsys.readouterr().out
    assert "by folded (the default for this form)" in shown
    assert "no rotation and no permutation" in shown
    theirs = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert error(theirs, logits(load_quantised(tmp_path / "own"))) < 1e-4
    assert not (tmp_path / "out" / "quantised.json").exists()


def test_rotations_go_with_transforms_and_the_check_applies_them(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("compressed_tensors")
    assert main(command(place, tmp_path / "own", "--bits", "W4A16", "--method", "export")) == 0
    assert main(command(place, tmp_path / "out", "--bits", "W4A16", "--form", "compressed-tensors", "--transforms")) == 0
    shown = capsys.readouterr().out
    assert "up to 5.24 it leaves transform_config out without a word" in shown
    ours = logits(load_quantised(tmp_path / "own"))
    assert error(logits(load_transforms(tmp_path / "out")), ours) < 1e-4
    silently = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert error(logits(silently), ours) > 0.1  # what the warning is about; when this fails, transformers has learnt it
    assert main(check(place, tmp_path / "out", "--json")) == 0
    theirs = json.loads(capsys.readouterr().out)["quantised"]
    assert main(check(place, tmp_path / "own", "--json")) == 0
    assert theirs["perplexity"] == pytest.approx(json.loads(capsys.readouterr().out)["quantised"]["perplexity"], rel=1e-4)


# -- a process that is killed ------------------------------------------------------------------------------------------------------


def test_killed_between_blocks_it_goes_on_to_the_same_bytes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(place, tmp_path / "killed", model="deep")
    process = subprocess.Popen([sys.executable, "-m", "trocar", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ)
    partial, deadline = tmp_path / "killed.partial" / "blocks.partial", time.monotonic() + 60
    while not (partial / "block-00001.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = len(list(partial.glob("block-*.safetensors")))
    assert 2 <= left < BLOCKS
    assert not (tmp_path / "killed").exists()

    assert main(command(place, tmp_path / "killed", "--seed", "1", model="deep")) == 2  # other settings do not eat the work
    assert "was begun with another model, text, seed or other settings" in capsys.readouterr().err
    (partial / ".block-00004.safetensors.half.tmp").touch()  # what a kill in the middle of writing leaves
    again = [sys.executable, "-m", "trocar", *words]
    done = subprocess.run(again, capture_output=True, text=True, env=os.environ, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Going on where an earlier run stopped, in {tmp_path / 'killed.partial'}: block {left} of {BLOCKS - 1} is next." in done.stdout
    assert f"without the {left} blocks of earlier runs" in done.stdout
    assert main(command(place, tmp_path / "whole", model="deep")) == 0
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "killed").iterdir()} == files
    for name in files:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}


def test_a_run_that_died_while_it_wrote_another_form_keeps_its_blocks(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(place, tmp_path / "float", "--form", "float")
    with monkeypatch.context() as patch:
        patch.setattr("trocar.compress.duquant.folders.export_float", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words) == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    monkeypatch.setattr("trocar.compress.duquant.quantise_checkpoint", lambda *_, **__: pytest.fail("quantised again"))
    assert main(words) == 0
    assert "all blocks are done" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


# -- bad input ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "dukuant"], "--method dukuant is not known. Did you mean 'duquant'?"),
        (["--method", "x"], "two-permutations"),
        (["--bits", "4"], "Write W4A4"),
        (["--bits", "W1A4"], "greater than or equal to 2"),
        (["--keep", "L1.mlp.down"], "For example --keep L11.mlp.down=8"),
        (["--keep", "L1.mlp.down=17"], "is not a layer and its bits"),
        (["--keep", "L1.mlp.dwn=8"], "Did you mean 'L1.mlp.down'?"),
        (["--keep", "L9.mlp.down=8"], "none of the quantised layers"),
        (["--block-size", "7"], "Blocks of 7 do not divide"),
        (["--block-size", "many"], "is not a number of channels"),
        (["--method", "rtn"], "--block-size says how rotations are found, and rtn has none"),
        (["--set", "smoothing.alfa=1"], "Did you mean 'alpha'?"),
        (["--set", "smoothing"], "not of the form key=value"),
        (["--form", "gguf"], "--form gguf is not known"),
        (["--transforms"], "a variant of compressed-tensors"),
        (["--form", "float", "--attention", "4"], "Leave --attention out"),
        (["--form", "compressed-tensors", "--transforms", "--attention", "4"], "queries, keys and values are rounded"),
        (["--form", "compressed-tensors", "--method", "duquant-gptq"], "zero points"),
        (["--form", "compressed-tensors", "--method", "export"], "Use the method folded"),
        (["--form", "compressed-tensors", "--method", "no-permutation", "--transforms", "--set", "weights.symmetric=true"], "one rotation"),
        (["--form", "compressed-tensors", "--method", "export", "--transforms", "--set", "chain.foldable=false"], "permutations"),
        (["--form", "compressed-tensors", "--transforms", "--set", "activations.clip=0.9"], "a clip"),
        (["--form", "compressed-tensors", "--transforms", "--keep", "L1.mlp.down=12"], "2 to 8 bits, not 12"),
        (["--column", "said"], "has no column 'said'. It has text"),
        (["--window-tokens", "100000"], "more than the"),
        (["--device", "cuda:7"], "which this machine does not have"),
        (["--dtype", "int8"], "model.dtype"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    words: list[str], says: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(place, tmp_path / "out", *words)) == 2
    captured = capsys.readouterr()
    assert says in " ".join(captured.err.split())
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_layer_far_above_the_others_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] *= 300  # one hidden channel drowns the others in 4 bits, and means nothing
        model.model.layers[1].mlp.down_proj.weight[:, 3] /= 300
    model.save_pretrained(tmp_path / "planted")
    tokenizer(WORDS).save_pretrained(tmp_path / "planted")
    rest = ["--calibration", str(place / "text.txt"), "--windows", "4", "--window-tokens", "32", "--method", "rtn", "--bits", "W8A4"]
    assert main(["quantise", str(tmp_path / "planted"), str(tmp_path / "out"), *rest]) == 0
    assert "the same with --keep L1.mlp.down=8" in capsys.readouterr().out


def test_texts_and_folders_that_do_not_serve(place: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(words: list[str]) -> str:
        assert main(words) == 2
        assert list(tmp_path.iterdir()) == []
        return capsys.readouterr().err

    assert "has 24 tokens, fewer than one window of 32" in refused(command(place, tmp_path / "out", text="short.txt"))
    assert "It has said, n; name one with --column" in refused(command(place, tmp_path / "out", text="rows.jsonl"))
    assert "neither a known set nor an existing file" in refused(command(place, tmp_path / "out", text="nowhere.txt"))
    assert "There is no model folder" in refused(command(place, tmp_path / "out", model="nowhere"))
    assert f"{made} exists." in refused(command(place, made))
    already = ["quantise", str(made), str(tmp_path / "out"), "--calibration", str(place / "text.txt"), *SMALL]
    assert "is quantised already (trocar)" in refused(already)
    conv = command(place, tmp_path / "out", "--form", "compressed-tensors", "--transforms", model="conv")
    assert "is a Conv1D; compressed-tensors knows nn.Linear only" in refused(conv)


def test_fewer_windows_than_asked_are_said_and_columns_are_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(place, tmp_path / "out", "--column", "said", text="rows.jsonl"), "--windows", "40"]) == 0
    assert "on 5 windows of 32 tokens (40 were asked for; the text ends there)" in capsys.readouterr().out


# -- the check ---------------------------------------------------------------------------------------------------------------------


def check(place: Path, folder: Path, *words: str, model: str = "model") -> list[str]:
    start = ["quantise-check", str(folder), str(place / model), "--text", str(place / "other.txt")]
    return [*start, "--windows", "4", "--window-tokens", "32", "--max-new-tokens", "4", *words]


def test_the_check_shows_both_models(place: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(check(place, made, "--prompt", "word1 word2 word3", "--prompt", "word9")) == 0
    shown = capsys.readouterr().out
    assert "21 layers integer" in shown
    assert "times the float model's (difference" in shown
    assert shown.count("quantised  word") == 2
    results = {}
    for mode in ("simulated", "integer"):
        assert main(check(place, made, "--execute", mode, "--json")) == 0
        results[mode] = json.loads(capsys.readouterr().out)
    first, second = results["simulated"], results["integer"]
    assert first["quantised"]["computes"] == "21 layers simulated"
    assert first["quantised"]["perplexity"] == pytest.approx(second["quantised"]["perplexity"], rel=1e-3)
    assert first["quantised"]["perplexity"] != first["float"]["perplexity"]
    assert all(side["tokens/s read"] > 0 < side["tokens/s written"] for side in (first["float"], first["quantised"]))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--execute", "fast"], "--execute fast is not known"),
        (["--execute", "packed"], "cannot run in mode 'packed'"),
        (["--column", "said"], "has no column 'said'"),
    ],
)
def test_a_check_that_cannot_be(words: list[str], says: str, place: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(check(place, made, *words)) == 2
    assert says in capsys.readouterr().err


def test_a_check_of_other_folders(place: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(check(place, made, model="deep")) == 2
    assert "Name the model it was made from" in capsys.readouterr().err
    assert main(check(place, tmp_path)) == 2
    assert "its config.json cannot be read" in capsys.readouterr().err
    assert main(check(place, place / "model", "--execute", "integer")) == 2
    assert "is float" in capsys.readouterr().err
