"""The run engine on a shipped model, with a small real method: bytes, resumption, ownership, and what it does not believe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from trocar.anatomy import fingerprint
from trocar.core.errors import ConfigError, DataError, EditError, RunError
from trocar.core.workspace import Workspace
from trocar.patch import Patch
from trocar.recipe import Recipe, load_model, load_recipe, parse_recipe, run
from trocar.recipe.registry import METHODS, Entry
from trocar.recipe.verify import probes, verify
from trocar.result import read_result

RECIPE: dict[str, Any] = {
    "version": 1,
    "model": {"source": "lab:vit-cifar-rare"},
    "data": {
        "edit": {"source": "lab:cifar-rare", "where": {"role": "failure"}, "limit": 4, "only": "wrong"},
        "locality.random": {"source": "lab:cifar-rare", "where": {"role": "random"}, "limit": 12},
    },
    "method": {"name": "dense-step", "lr": 0.5, "steps": 4},
}


@pytest.fixture(autouse=True)
def _method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "dense-step", Entry("dense_step:METHOD", "edit", "for tests"))


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({**RECIPE, **changes})


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a run folder that must not depend on when and how often it was killed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "log.jsonl"
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "dense-step", Entry("dense_step:METHOD", "edit", "for tests"))
        run(recipe(), folder)
    return folder


def test_a_run_writes_what_the_contract_says(whole: Path) -> None:
    names = set(files(whole))
    assert {
        "recipe.yaml",
        "result.json",
        "patch.safetensors",
        "scores/head.safetensors",
        "figures/loss.csv",
        "pictures/edited/3.png",
    } <= names
    assert not any(name.endswith(".tmp") or name == ".lock" for name in names)
    result = read_result(whole)
    assert result.verdict == "passed"
    assert result.model.fingerprint_before == fingerprint(load_model("lab:vit-cifar-rare"))
    assert result.model.fingerprint_after != result.model.fingerprint_before
    assert [row.name for row in result.table] == ["success", "locality.random"]
    assert result.table[0].before == 0.0  # `only: wrong`
    assert result.log["effect"] > 0
    assert (whole / "figures" / "loss.csv").read_text().splitlines()[0] == "step,loss"
    events = [json.loads(line)["event"] for line in (whole / "log.jsonl").read_text().splitlines()]
    assert events == ["start", "loaded", "method", "verified", "finished"]


def test_the_patch_gives_the_model_that_was_measured(whole: Path) -> None:
    model = load_model("lab:vit-cifar-rare")
    with Patch.load(whole / "patch.safetensors").applied(model):
        assert fingerprint(model) == read_result(whole).model.fingerprint_after
    assert fingerprint(model) == read_result(whole).model.fingerprint_before


def test_the_resolved_recipe_runs_to_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    run(load_recipe(whole / "recipe.yaml"), tmp_path / "again")
    assert files(tmp_path / "again") == files(whole)


def test_a_finished_run_is_shown_not_repeated(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trocar.recipe.engine.load_model", lambda *_: pytest.fail("a finished run was repeated"))
    done = run(recipe(), whole)
    assert done.finished_before
    assert done.ok


def test_a_lost_result_file_is_made_again_from_the_units(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(whole)
    (whole / "patch.safetensors").unlink()
    (whole / "pictures" / "edited" / "0.png").unlink()
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("a committed unit was computed again"))
    assert not run(recipe(), whole).finished_before
    assert files(whole) == before


def test_damaged_files_are_made_again(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "result.json").write_bytes(b"{")
    (folder / "units" / "step2.safetensors").write_bytes(b"not tensors at all")
    with pytest.warns(UserWarning, match=r"step2\.safetensors is damaged"):
        assert not run(recipe(), folder).finished_before
    assert files(folder) == files(whole)
    (folder / "result.json").unlink()
    (folder / "units" / "identity.json").write_bytes(b"{")
    with pytest.raises(RunError, match=r"identity\.json is damaged"):
        run(recipe(), folder)


class Killed(BaseException):
    """Stands for the signal: nothing may catch it."""


@pytest.mark.parametrize("moment", range(0, 15, 2))
def test_a_run_that_dies_at_any_write_resumes_to_the_same_bytes(
    whole: Path, tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    writes, replace = iter(range(1000)), os.replace

    def dying(source: Any, target: Any) -> None:
        if next(writes) == moment:
            (Path(target).parent / f".{Path(target).name}.left.tmp").write_bytes(b"half")  # a real kill cannot clean up
            raise Killed
        replace(source, target)

    folder = tmp_path / "run"
    with monkeypatch.context() as context:
        context.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            run(recipe(), folder)
    run(recipe(), folder)
    assert files(folder) == files(whole)


def test_a_folder_of_another_run_is_refused(whole: Path) -> None:
    before = files(whole)
    for changes, key in (
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"method": {"name": "dense-step", "lr": 0.25}}, "method.lr is 0.5 there and 0.25 here"),
        ({"model": {"source": "lab:vit-cifar-rare", "dtype": "bfloat16"}}, 'model.dtype is "auto" there and "bfloat16" here'),
    ):
        with pytest.raises(RunError) as error:
            run(recipe(**changes), whole)
        assert key in str(error.value)
    assert files(whole) == before


def test_a_model_that_changed_under_the_same_name_is_refused(tmp_path: Path) -> None:
    model = load_model("lab:vit-cifar-rare")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    from trocar.lab import load_processor

    load_processor(model.config._name_or_path).save_pretrained(folder)
    asked = recipe(model={"source": str(folder)}, method={"name": "dense-step", "steps": 1}, checks=[])
    run(asked, tmp_path / "run")
    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    model.save_pretrained(folder)
    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed before
    with pytest.raises(RunError, match=r"started with other inputs: .*model"):
        run(asked, tmp_path / "run")


def test_units_of_another_model_are_never_served(tmp_path: Path) -> None:
    assert Workspace(tmp_path, {"model": "a"}).values("unit", {"k": 1}, lambda: "of a") == "of a"
    assert Workspace(tmp_path, {"model": "a"}).values("unit", {"k": 1}, lambda: "again") == "of a"
    assert Workspace(tmp_path, {"model": "b"}).values("unit", {"k": 1}, lambda: "of b") == "of b"
    assert Workspace(tmp_path, {"model": "b"}).room("r").values("unit", {"k": 1}, lambda: 1) == 1
    assert Workspace(tmp_path, {"model": "a"}).room("r").values("unit", {"k": 1}, lambda: 2) == 2
    (tmp_path / "unit.json").write_text("[")
    with pytest.warns(UserWarning, match=r"unit\.json is damaged"):
        assert Workspace(tmp_path, {"model": "b"}).values("unit", {"k": 1}, lambda: "again") == "again"


def test_failed_checks_are_a_verdict(tmp_path: Path) -> None:
    done = run(recipe(checks=[{"measurement": "success", "op": ">", "threshold": 1}]), tmp_path)
    assert not done.ok
    assert done.result is not None
    assert done.result.verdict == "failed"
    assert (tmp_path / "patch.safetensors").exists()


def test_no_checks_claim_nothing(tmp_path: Path) -> None:
    done = run(recipe(checks=[], method={"name": "dense-step", "steps": 0}), tmp_path)
    assert done.result is not None
    assert done.result.verdict == "unchecked"
    assert done.result.model.fingerprint_after == done.result.model.fingerprint_before  # nothing to do


@pytest.mark.parametrize(("sabotage", "says"), [("leave changed", "left the model changed"), ("wrong state", "not on the base")])
def test_a_method_is_held_to_its_word(tmp_path: Path, sabotage: str, says: str) -> None:
    with pytest.raises(EditError, match=says):
        run(recipe(method={"name": "dense-step", "sabotage": sabotage}), tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_a_patch_is_held_to_its_word() -> None:
    model = load_model("lab:vit-cifar-rare")
    from trocar.evaluate import BaseOutputs
    from trocar.recipe.data import RoleSource, load_roles

    data = load_roles({"edit": RoleSource(source="lab:cifar-rare", limit=2)}, model, BaseOutputs("unused"), Path())
    base = fingerprint(model)
    inputs = probes(data, {}, "pictures")
    idle: Any = SimpleNamespace(apply=lambda model: SimpleNamespace(revert=lambda: None))
    with pytest.raises(EditError, match="changes no output"):
        verify(model, idle, inputs, base)

    def break_it(model: Any) -> Any:
        with torch.no_grad():
            model.classifier.weight.add_(1)
        return SimpleNamespace(revert=lambda: None)

    def spoil(model: Any) -> Any:
        kept = model.classifier.bias.detach().clone()
        with torch.no_grad():
            model.classifier.bias.fill_(float("nan"))

        def revert() -> None:
            with torch.no_grad():
                model.classifier.bias.copy_(kept)

        return SimpleNamespace(revert=revert)

    with pytest.raises(EditError, match=r"gives NaN on data\.edit"):
        verify(model, cast(Any, SimpleNamespace(apply=spoil)), inputs, base)
    assert fingerprint(model) == base

    one_way: Any = SimpleNamespace(apply=break_it)
    with pytest.raises(EditError, match="Reverting the patch gave"):
        verify(model, one_way, inputs, base)


def test_a_dry_run_predicts_and_writes_nothing(tmp_path: Path) -> None:
    done = run(recipe(), tmp_path / "run", dry_run=True)
    assert done.forecast is not None
    assert done.forecast.estimate.seconds == pytest.approx(0.4)
    assert done.forecast.loads["data.edit"] == "lab:cifar-rare (4 examples)"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"method": {"name": "dense-step", "stepz": 4}}, ConfigError, "method.stepz is not a known setting. Did you mean 'steps'?"),
        (
            {"data": {"edit": {"source": "lab:cifar-rare", "wher": {}}}},
            ConfigError,
            "data.edit.wher is not a known setting. Did you mean 'where'?",
        ),
        ({"data": {"edit": {"source": "lab:cifar-rare", "only": "bad"}}}, ConfigError, "data.edit.only"),
        ({"data": {"locality": {"source": "lab:cifar-rare"}}}, ConfigError, "data.edit is missing: pictures to get right"),
        ({"data": {"edit": {"source": "lab:cifar-rara"}}}, DataError, "data.edit: The package has no excerpt"),
        (
            {"data": {"edit": {"source": "lab:cifar-rare", "where": {"role": "failure"}, "only": "right"}}},
            DataError,
            "data.edit: none of the",
        ),
        ({"data": {"edit": {"source": "lab:cifar-rare", "predicted": "insect"}}}, DataError, "Did you mean 'insects'?"),
        ({"checks": [{"measurement": "success", "op": "=>", "threshold": 1}]}, ConfigError, "checks.0"),
        ({"checks": [{"measurement": "sucess", "op": ">", "threshold": 1}]}, ConfigError, "Did you mean 'success'?"),
        ({"model": {"source": "./nowhere"}}, DataError, "There is no model folder ./nowhere"),
    ],
)
def test_bad_recipes_say_what_and_where(tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error) as raised:
        run(recipe(**changes), tmp_path / "run")
    assert says in str(raised.value)


def test_only_and_predicted_ask_the_base_model(tmp_path: Path) -> None:
    from trocar.evaluate import BaseOutputs, outputs
    from trocar.recipe.data import RoleSource, load_roles

    model = load_model("lab:vit-cifar-rare")
    names = {
        "wrong": {"only": "wrong"},
        "right": {"only": "right"},
        "all": {},
        "few": {"only": "wrong", "limit": 3},
        "one": {"predicted": "trees"},
    }
    sources = {
        name: RoleSource.model_validate({"source": "lab:cifar-rare", "where": {"role": "random"}, **asked}) for name, asked in names.items()
    }
    roles = load_roles(sources, model, BaseOutputs(tmp_path), Path())
    predicted = {name: outputs(model, rows).argmax(1) for name, rows in roles.items()}
    assert bool((predicted["wrong"] != roles["wrong"].labels).all())
    assert bool((predicted["right"] == roles["right"].labels).all())
    assert sorted(roles["wrong"].ids + roles["right"].ids) == sorted(roles["all"].ids)
    assert len(roles["few"]) == 3
    assert set(roles["few"].ids) < set(roles["wrong"].ids)
    assert {model.config.id2label[number] for number in predicted["one"].tolist()} == {"trees"}
