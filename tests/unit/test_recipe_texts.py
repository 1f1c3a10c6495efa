"""The run engine with a method that reads texts: roles without pictures, the checkpoint's tokenizer, probes, transcripts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trocar.anatomy import fingerprint, tiny_model
from trocar.core.errors import ConfigError, DataError, EditError, RunError, UnsupportedModelError
from trocar.evaluate import data_digest, refuse_overlap
from trocar.lab.worlds import tokenizer
from trocar.method import Examples, Figure, Outcome, Transcript
from trocar.patch import Patch
from trocar.recipe import Recipe, load_model, load_tokenizer, parse_recipe, run
from trocar.recipe.models import tokenizer_digest
from trocar.recipe.registry import METHODS, Entry
from trocar.recipe.write import write_files
from trocar.report import write_report
from trocar.result import read_result

WORDS = ["the", "capital", "of", "is", "a", "b", "c", "d", "Paris", "Rome", "Oslo", "river", "town", "here"]
EDIT = [{"prompt": f"the capital of {name} is", "answer": answer} for name, answer in zip("abc", ("Paris", "Rome", "Oslo"), strict=True)]
KEEP = [{"prompt": "the river of d is", "answer": "here"}, {"prompt": "a town is", "answer": "here"}]


@pytest.fixture(autouse=True)
def _method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "tiny-texts", Entry("tiny_texts:METHOD", "edit", "for tests"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer, and two files of texts; recipes start from it."""
    folder = tmp_path_factory.mktemp("texts")
    words = tokenizer(WORDS)
    torch.manual_seed(0)
    tiny_model("llama", vocab_size=len(words), bos_token_id=1, eos_token_id=1).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    for name, rows in (("edit", EDIT), ("keep", KEEP)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(base: Path, **changes: Any) -> Recipe:
    whole = {
        "version": 1,
        "model": {"source": "model"},
        "data": {"edit": {"source": "edit.jsonl"}, "keep": {"source": "keep.jsonl", "limit": 1}},
        "method": {"name": "tiny-texts"},
    }
    return parse_recipe({**whole, **changes}, base=base)


def files(folder: Path) -> dict[str, bytes]:
    names = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "tiny-texts", Entry("tiny_texts:METHOD", "edit", "for tests"))
        run(recipe(place), folder, report=write_report)
    return folder


def test_a_run_on_texts_writes_what_the_contract_says(whole: Path, place: Path) -> None:
    result = read_result(whole)
    assert {"patch.safetensors", "texts/answers.csv", "figures/relative.csv", "report.html"} <= set(files(whole))
    assert result.verdict == "passed"
    assert [row.name for row in result.table] == ["correction", "specificity", "moved"]
    assert result.table[0].n == 3
    assert result.table[1].n == 1  # `limit`
    assert result.log["words"] == len(WORDS) + 2
    assert result.log["effect"] > 0
    assert result.transcripts[0].csv == "texts/answers.csv"
    with (whole / "texts/answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows[:3]] == [row["prompt"] for row in EDIT]
    assert all(row["right_after"] == ("yes" if row["after"].startswith(row["truth"]) else "no") for row in rows)
    assert any(row["before"] != row["after"] for row in rows)
    identity = json.loads((whole / "units/identity.json").read_text())
    assert identity["tokenizer"] == tokenizer_digest(load_tokenizer(str(place / "model")))
    assert set(identity["data"]) == {"edit", "keep"}


def test_the_patch_gives_the_model_that_was_measured(whole: Path, place: Path) -> None:
    model = load_model(str(place / "model"))
    with Patch.load(whole / "patch.safetensors").applied(model):
        assert fingerprint(model) == read_result(whole).model.fingerprint_after


def test_equal_recipes_give_equal_bytes(whole: Path, place: Path, tmp_path: Path) -> None:
    run(recipe(place), tmp_path, report=write_report)
    assert files(tmp_path) == files(whole)
    assert run(recipe(place), tmp_path).finished_before
    (tmp_path / "texts/answers.csv").unlink()
    assert not run(recipe(place), tmp_path, report=write_report).finished_before
    assert files(tmp_path) == files(whole)


class Killed(BaseException):
    """Stands for the signal: nothing may catch it."""


@pytest.mark.parametrize("moment", range(0, 12, 2))
def test_a_run_that_dies_at_any_write_resumes_to_the_same_bytes(
    whole: Path, place: Path, tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    writes, replace = iter(range(1000)), os.replace

    def dying(source: Any, target: Any) -> None:
        if next(writes) == moment:
            (Path(target).parent / f".{Path(target).name}.left.tmp").write_bytes(b"half")
            raise Killed
        replace(source, target)

    with monkeypatch.context() as context:
        context.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            run(recipe(place), tmp_path / "run")
    run(recipe(place), tmp_path / "run", report=write_report)
    assert files(tmp_path / "run") == files(whole)


def test_texts_and_tokenizer_are_inputs_that_must_not_change(place: Path, tmp_path: Path) -> None:
    import shutil

    base = Path(shutil.copytree(place, tmp_path / "place"))
    run(recipe(base), tmp_path / "run")
    (tmp_path / "run/result.json").unlink()  # as if it had been killed before
    other = [{**EDIT[0], "answer": "Oslo"}, *EDIT[1:]]
    (base / "edit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    with pytest.raises(RunError, match=r"started with other inputs: data\.edit\.inputs"):
        run(recipe(base), tmp_path / "run")
    shutil.copy(place / "edit.jsonl", base)
    tokenizer(WORDS[::-1]).save_pretrained(base / "model")
    with pytest.raises(RunError, match="started with other inputs: tokenizer"):
        run(recipe(base), tmp_path / "run")


def test_a_dry_run_predicts_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    done = run(recipe(place), tmp_path / "run", dry_run=True)
    assert done.forecast is not None
    assert done.forecast.loads["data.edit"] == "edit.jsonl (3 examples)"
    assert done.forecast.estimate.seconds == pytest.approx(0.04)
    assert list(tmp_path.iterdir()) == []


def test_a_patch_of_texts_needs_probes(place: Path, tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"gave no inputs \(Outcome.probes\)"):
        run(recipe(place, method={"name": "tiny-texts", "sabotage": "no probes"}), tmp_path)
    nothing = run(recipe(place, checks=[], method={"name": "tiny-texts", "sabotage": "no probes", "strength": 0}), tmp_path / "none")
    assert nothing.result is not None  # no operation, nothing to verify
    assert nothing.result.model.fingerprint_after == nothing.result.model.fingerprint_before


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"data": {"edit": {"source": "edit.jsonl", "only": "wrong"}}}, ConfigError, "data.edit.only is not a known setting"),
        ({"data": {"edit": {"source": "edit.jsonl", "columns": {"promt": "prompts"}}}}, DataError, "data.edit: "),
        ({"data": {"edit": {"source": "edit.jsonl", "where": {"prompt": "none"}}}}, DataError, "data.edit: "),
        ({"data": {"edit": {"source": "nowhere.jsonl"}}}, DataError, "data.edit: "),
        ({"data": {"keep": {"source": "edit.jsonl"}}}, ConfigError, "data.edit is missing"),
    ],
)
def test_bad_recipes_say_what_and_where(place: Path, tmp_path: Path, changes: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as raised:
        run(recipe(place, **changes), tmp_path / "run")
    assert says in str(raised.value)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])  # transformers makes up an empty one for the last two
def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path, family: str) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(("family", "task"), [("bert", "base"), ("llama", "base"), ("vit", "class"), ("llama", "class")])
def test_a_model_that_says_nothing_is_refused(place: Path, tmp_path: Path, family: str, task: Any) -> None:
    tiny_model(family, task=task).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="predicts no next token"):
        run(recipe(place, model={"source": str(tmp_path / "model")}), tmp_path / "run")


def test_broken_tokenizers_and_unknown_places(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="has no usable tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="There is no model folder"):
        load_tokenizer("./nowhere")
    with pytest.raises(ConfigError, match="The lab has no model 'vit-cifar-rarer'"):
        load_tokenizer("lab:vit-cifar-rarer")
    with pytest.raises(DataError, match="lab:vit-cifar-rare has no tokenizer"):
        load_tokenizer("lab:vit-cifar-rare")


def test_names_under_trocar_models_and_the_digest(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROCAR_MODELS", str(place))
    words = load_tokenizer("model")
    assert words("the capital of a")["input_ids"] == [1, 2, 3, 4, 6]
    assert tokenizer_digest(words) == tokenizer_digest(tokenizer(WORDS)) != tokenizer_digest(tokenizer(WORDS[::-1]))


def texts(fields: dict[str, list[Any]], ids: tuple[str, ...] = ("1", "2")) -> Examples:
    return Examples({}, ids, None, None, fields)


def test_texts_are_told_apart() -> None:
    rows = texts({"prompt": ["a", "b"], "more": [{"k": 1}, None]})
    assert data_digest(rows) == data_digest(texts({"more": [{"k": 1}, None], "prompt": ["a", "b"]}))
    assert len({data_digest(rows), data_digest(texts({"prompt": ["a", "c"]})), data_digest(rows.take([1, 0]))}) == 3
    refuse_overlap(texts({"prompt": ["c", "d"]}, ("3", "4")), texts({"prompt": ["a", "b"]}))
    with pytest.raises(DataError, match="content equals"):
        refuse_overlap(texts({"prompt": ["c", "a"]}, ("3", "4")), texts({"prompt": ["a", "b"]}))


def test_marks_control_characters_and_unjudged_rows(tmp_path: Path) -> None:
    marked = Transcript("m", "M", ["p", "q"], ["x", "y"], ["x", "y"], ["x", "z"], ["", "loop"], ["wrong language", ""])
    wild = Transcript("w", "W", ["a\x00b\r\nc", "d"], ["\x07bell", "Paris, of course"], ["<b>\u2028", "paris"], ["", "Paris"])
    written = write_files(tmp_path, Outcome(None, (), transcripts=(marked, wild)))
    assert [info["marked"] for info in written["transcripts"]] == [True, False]
    with (tmp_path / "texts/m.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["right_before"], row["right_after"], row["mark_after"]) for row in rows] == [
        ("yes", "no", "wrong language"), ("no", "yes", ""),
    ]  # fmt: skip
    with (tmp_path / "texts/w.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[0]["prompt"], rows[0]["before"], rows[0]["right_after"]) == ("a\ufffdb\ufffd\nc", "\ufffdbell", "")
    assert (rows[1]["right_before"], rows[1]["right_after"]) == ("yes", "yes")


def test_a_result_without_texts_is_what_it_was(whole: Path, tmp_path: Path) -> None:
    """Older readers of format 1 refuse keys that they do not know; runs on pictures do not have the new one."""
    from trocar.result import write_result

    write_result(tmp_path, read_result(whole).model_copy(update={"transcripts": ()}))
    assert "transcripts" not in json.loads((tmp_path / "result.json").read_text())
    assert read_result(tmp_path).transcripts == ()


def test_a_figure_of_kind_table_keeps_its_columns(tmp_path: Path) -> None:
    figure = Figure("t", "T", "table", "a", "b", [{"a": "x", "b": 0.5, "c": "+1 %"}])
    write_files(tmp_path, Outcome(None, (), figures=(figure,)))
    assert (tmp_path / "figures/t.csv").read_text() == "a,b,c\nx,0.5,+1 %\n"


def test_the_command_line_runs_and_judges_texts(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trocar.cli import main
    from trocar.recipe.strict_yaml import dump_yaml

    path = place / "recipe.yaml"
    path.write_text(dump_yaml({**recipe(place).model_dump(mode="json"), "method": {"name": "tiny-texts"}, "checks": None}))
    assert main(["run", str(path), "--dry-run"]) == 0
    assert "edit.jsonl (3 examples)" in capsys.readouterr().out
    assert main(["run", str(path), "-o", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "correction" in shown
    assert "the check holds" in shown
    assert main(["patch", "check", str(tmp_path / "run/patch.safetensors"), str(place / "model")]) == 0
    capsys.readouterr()
    assert main(["patch", "check", str(tmp_path / "run/patch.safetensors"), str(place / "model"), "--recipe", str(path)]) == 2
    assert "reads texts, and only the method itself measures those" in capsys.readouterr().err
    assert main(["run", str(path), "-o", str(tmp_path / "idle"), "--set", "method.strength=0"]) == 1
    told = capsys.readouterr()
    assert "note: Nothing was changed" in told.out
    assert "1 of 1 checks does not hold" in told.err
