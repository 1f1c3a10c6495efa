"""The command line: exit codes, messages, and what reaches the terminal. In process, but for what only a process can show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trocar.cli import main
from trocar.recipe.registry import METHODS, Entry
from trocar.recipe.strict_yaml import dump_yaml

RECIPE: dict[str, Any] = {
    "version": 1,
    "model": {"source": "lab:vit-cifar-rare"},
    "data": {
        "edit": {"source": "lab:cifar-rare", "where": {"role": "failure"}, "limit": 4, "only": "wrong"},
        "locality.random": {"source": "lab:cifar-rare", "where": {"role": "random"}, "limit": 12},
    },
    "method": {"name": "dense-step"},
}
COMMANDS = ["inspect", "methods", "new", "run", "report", "quantise", "quantise-check", "doctor", "demo"]
GROUPS = {"patch": ["show", "apply", "stack", "diff", "check", "export", "combine", "prune"], "lab": ["list", "train", "show"]}


@pytest.fixture(autouse=True)
def _method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "dense-step", Entry("dense_step:METHOD", "edit", "for tests"))


def write(folder: Path, **changes: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml({**RECIPE, **changes}))
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "dense-step", Entry("dense_step:METHOD", "edit", "for tests"))
        assert main(["run", write(folder), "-o", str(folder / "run")]) == 0
    return folder / "run"


# -- in a process of its own -------------------------------------------------------------------------------------------------------


def trocar(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trocar", *words], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_help_answers_in_half_a_second_and_needs_no_torch() -> None:
    times = []
    for _ in range(3):
        start = os.times()
        done = trocar("--help")
        end = os.times()
        # processor time: what the answer costs, whoever else is using the machine
        times.append(end.children_user - start.children_user + end.children_system - start.children_system)
        assert done.returncode == 0
    assert all(command in done.stdout for command in [*COMMANDS, *GROUPS])
    assert min(times) < 0.5
    probe = (
        "import sys; from trocar.cli import main; main(['--help']); print(sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert loaded.stdout.splitlines()[-1] == "[]"


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = trocar("run", write(tmp_path, sed=3))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert "Did you mean 'seed'?" in done.stderr
    assert "docs/errors/config.md" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    debug = trocar("run", write(tmp_path, sed=3), "--debug")
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "ConfigError" in debug.stderr


def test_completion_offers_methods_and_models() -> None:
    done = trocar(_TROCAR_COMPLETE="complete_bash", COMP_WORDS="trocar new wh", COMP_CWORD="2")
    assert "where-to-edit" in done.stdout
    done = trocar(_TROCAR_COMPLETE="complete_bash", COMP_WORDS="trocar inspect lab:vit-c", COMP_CWORD="2")
    assert "vit-cifar-rare" in done.stdout


# -- in this process ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[c] for c in COMMANDS] + [[g, c] for g, commands in GROUPS.items() for c in commands], ids=" ".join)
def test_every_command_has_help_with_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Example: trocar {' '.join(words)}" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from trocar import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trocar {__version__}\n"


@pytest.mark.parametrize("words", [["nonsense"], ["run"], ["run", "x", "--nonsense"], ["patch", "shw"], ["inspect"]])
def test_usage_errors_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["new", "where-to-edt"], "Did you mean 'where-to-edit'?"),
        (["run", "nowhere.yaml"], "no such file"),
        (["report", "nowhere"], "There is no run folder nowhere"),
        (["inspect", "./nowhere"], "There is no model folder ./nowhere"),
        (["inspect", "nobody/nothing"], "HF_HUB_OFFLINE"),
        (["inspect", "lab:vit-cifar-rara"], "Did you mean 'vit-cifar-rare'?"),
        (["inspect", "lab:vit-cifar-rare", "--dtype", "float12"], "model.dtype"),
        (["lab", "show", "vit"], "no model 'vit'"),
        (["patch", "show", "nowhere.safetensors"], "cannot be read"),
        (["patch", "apply", "nowhere.safetensors", "lab:vit-cifar-rare", "out"], "cannot be read"),
        (["patch", "stack", "one.safetensors", "--model", "lab:vit-cifar-rare"], "at least two"),
        (["patch", "stack", "a", "b", "--model", "lab:vit-cifar-rare", "--on-overlap", "ordre"], "Did you mean 'order'?"),
        (["patch", "export", "a", "lab:vit-cifar-rare", "out", "--to", "pefd"], "Did you mean 'peft'?"),
    ],
)
def test_bad_words_are_answered(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trocar.recipe.engine.load_model", interrupt)
    assert main(["run", write(tmp_path), "-o", str(tmp_path / "run")]) == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    assert not (tmp_path / "run" / ".lock").exists()


def test_methods_and_lab_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    assert "where-to-edit" in capsys.readouterr().out
    assert main(["lab", "list"]) == 0
    assert "vit-cifar-rare" in capsys.readouterr().out
    assert main(["lab", "show", "vit-cifar-rare"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "lab:vit-cifar-rare"]) == 0
    shown = capsys.readouterr().out
    assert "vit.layers" in shown or "vit.encoder.layer" in shown
    assert main(["inspect", "lab:vit-cifar-rare", "--json", "--dtype", "float16"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["towers"][0]["blocks"] == 6
    assert facts["towers"][0]["neurons"] == 512
    assert facts["dtypes"] == ["float16"]
    assert len(facts["fingerprint"]) == 32


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    import torch

    assert facts["versions"]["torch"] == torch.__version__
    assert facts["machine"]["threads"] == torch.get_num_threads()
    assert facts["data"]["lab:cifar-rare"] == "in the package"
    assert {row["method"] for row in facts["support"]} == set(METHODS) - {"dense-step"}
    assert main(["doctor"]) == 0
    assert "TROCAR_MODELS" in capsys.readouterr().out


def test_a_run_shows_table_verdict_and_files(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(finished / "recipe.yaml"), "-o", str(finished)]) == 0
    shown = capsys.readouterr().out
    assert "finished before" in shown
    assert "PASSED" in shown
    assert "success" in shown
    assert str(finished / "report.html") in shown
    assert (finished / "report.html").stat().st_size > 10_000


def test_failed_checks_exit_with_1_and_still_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [{"measurement": "success", "op": ">", "threshold": 1}]
    assert main(["run", write(tmp_path, checks=checks), "-o", str(tmp_path / "run")]) == 1
    captured = capsys.readouterr()
    assert "1 of 1 checks does not hold: success after is 1, wanted > 1." in captured.err
    assert "FAILED" in captured.out
    assert (tmp_path / "run" / "report.html").exists()
    assert main(["run", write(tmp_path, checks=checks), "-o", str(tmp_path / "run")]) == 1  # a finished failure stays one


def test_set_changes_one_key_and_the_folder_notices(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(finished / "recipe.yaml"), "-o", str(finished), "--set", "method.lr=0.25"]) == 2
    assert "method.lr is 0.5 there and 0.25 here" in capsys.readouterr().err
    assert main(["run", write(tmp_path), "-o", str(tmp_path / "run"), "--set", "method.lr=-1e-1", "--set", "checks=[]"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["asked"]["method"]["lr"] == -0.1


def test_a_dry_run_predicts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", write(tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "lab:cifar-rare (4 examples)" in shown
    assert "0.4 s" in shown
    assert "memory" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_report_is_made_again_from_the_folder(finished: Path) -> None:
    before = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_bytes() == before


# -- patches -----------------------------------------------------------------------------------------------------------------------


def test_patch_show(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "show", str(finished / "patch.safetensors")]) == 0
    assert "classifier.weight" in capsys.readouterr().out
    assert main(["patch", "show", str(finished / "patch.safetensors"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["method"] == "dense-step"
    assert facts["base"]["fingerprint"] == json.loads((finished / "result.json").read_text())["model"]["fingerprint_before"]


def test_a_damaged_patch_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((finished / "patch.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(content)
    for words in (["show"], ["check", "lab:vit-cifar-rare"]):
        assert main(["patch", words[0], str(tmp_path / "bad.safetensors"), *words[1:]]) == 2
        assert "PatchFormatError" in capsys.readouterr().err


def test_patch_check(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch = str(finished / "patch.safetensors")
    assert main(["patch", "check", patch, "lab:vit-cifar-rare"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    good = [{"measurement": "edit", "op": ">=", "threshold": 1}, {"measurement": "success", "op": ">=", "threshold": 1}]
    assert main(["patch", "check", patch, "lab:vit-cifar-rare", "--recipe", write(tmp_path, checks=good)]) == 0
    assert "only the method measures it: success" in capsys.readouterr().out
    bad = [{"measurement": "locality.random", "op": ">", "threshold": 1}]
    assert main(["patch", "check", patch, "lab:vit-cifar-rare", "--recipe", write(tmp_path, checks=bad)]) == 1


def test_a_patch_on_a_foreign_model_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from trocar.recipe import load_model

    model = load_model("lab:vit-cifar-rare")
    with torch.no_grad():
        model.classifier.weight.add_(0.5)
    model.save_pretrained(tmp_path / "other")
    assert main(["patch", "check", str(finished / "patch.safetensors"), str(tmp_path / "other")]) == 2
    assert "PatchBaseError" in capsys.readouterr().err


def test_apply_diff_stack_and_export(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from trocar.anatomy import fingerprint
    from trocar.patch import Patch
    from trocar.recipe import load_model

    model = load_model("lab:vit-cifar-rare")
    model.save_pretrained(tmp_path / "base")
    base, patch, fixed = str(tmp_path / "base"), str(finished / "patch.safetensors"), str(tmp_path / "fixed")
    after = json.loads((finished / "result.json").read_text())["model"]["fingerprint_after"]

    assert main(["patch", "apply", patch, base, fixed]) == 0
    assert fingerprint(load_model(fixed)) == after
    assert fingerprint(load_model(base)) == fingerprint(model)

    assert main(["patch", "diff", base, fixed, "-o", str(tmp_path / "diff.safetensors")]) == 0
    with Patch.load(tmp_path / "diff.safetensors").applied(model):
        assert fingerprint(model) == after

    capsys.readouterr()
    with torch.no_grad():
        model.classifier.bias.add_(1)
        model.classifier.weight[0, :3].add_(1)
    model.save_pretrained(tmp_path / "second")
    second, both = str(tmp_path / "second.safetensors"), tmp_path / "both.safetensors"
    assert main(["patch", "diff", base, str(tmp_path / "second"), "-o", second]) == 0
    capsys.readouterr()
    assert main(["patch", "stack", patch, second, "-m", base]) == 2
    captured = capsys.readouterr()
    assert "classifier.weight" in captured.out
    assert "PatchOverlapError" in captured.err
    assert main(["patch", "stack", patch, second, "-m", base, "--on-overlap", "order", "-o", str(both)]) == 0
    assert fingerprint(Patch.load(both).apply(load_model(base)).target.model) in capsys.readouterr().out

    assert main(["patch", "export", patch, base, str(tmp_path / "exported")]) == 0
    assert fingerprint(load_model(str(tmp_path / "exported"))) == after
    assert main(["patch", "export", patch, base, str(tmp_path / "adapter"), "--to", "peft"]) == 2
    assert "ExportError" in capsys.readouterr().err
