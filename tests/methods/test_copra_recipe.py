"""CopRA as a recipe: pictures and texts, what it measures, what it leaves, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForImageClassification

from trocar import lab
from trocar.adapt.copra.recipe import METHOD, RecipeConfig
from trocar.anatomy import fingerprint
from trocar.core.errors import ConfigError, DataError
from trocar.core.workspace import Workspace
from trocar.lab.tasks import new_forms
from trocar.method import Examples, Job, Outcome
from trocar.patch import export
from trocar.recipe import parse_recipe, run
from trocar.recipe.strict_yaml import parse_yaml

SMALL: dict[str, Any] = {"train": {"steps": 12, "batch": 8, "lr": 5e-3}, "points": 3, "probe": 12, "batch_size": 50}


@pytest.fixture(scope="module")
def pictures() -> tuple[Any, Examples, Examples]:
    model, _ = lab.load("vit-cifar-rare")
    rows = lab.load_examples({"source": "lab:cifar-rare", "where": {"role": "random"}}, model)
    return model, rows.take(range(60)), rows.take(range(60, 100))


def made(folder: Path, model: Any, data: dict[str, Examples], processor: Any = None, **settings: Any) -> Outcome:
    names = [] if processor is not None else [model.config.id2label[number] for number in range(model.config.num_labels)]
    return METHOD.run(Job(model, data, RecipeConfig.parse({**SMALL, **settings}), 0, Workspace(folder), names, processor))


def test_pictures_are_learned_measured_and_shown(tmp_path: Path, pictures: Any) -> None:
    model, train, test = pictures
    before = fingerprint(model)
    found = made(tmp_path, model, {"train": train, "test": test})
    assert fingerprint(model) == before
    names = [one.name for one in found.measurements]
    for side in ("", ".plain"):
        for name in ("accuracy", "score", "fusion", "mixture", "pruned.everyother", "pruned.high"):
            assert f"{name}{side}" in names
    assert {one.state_before for one in found.measurements} == {before}
    assert len({one.state_after for one in found.measurements}) > 4
    assert {figure.id for figure in found.figures} >= {"summary", "connectivity", "worth", "removal"}
    worth = next(figure for figure in found.figures if figure.id == "worth").rows
    assert {row["trained"] for row in worth} == {"copra", "plain"}
    for side in ("copra", "plain"):  # the six values add up to what the adapter is worth on the rows it was valued on
        scores = found.scores[f"shapley-{side}"]
        assert scores.kind == "block"
        assert sum(row["value"] for row in worth if row["trained"] == side) == pytest.approx(float(np.sum(scores.flat)))
    assert set(found.log["sides"]["copra"]["steps that a group was on"]) == {f"L{number}" for number in range(6)}
    assert found.patch is not None
    with found.patch.applied(model):
        state = fingerprint(model)
    assert state != before
    again = made(tmp_path, model, {"train": train, "test": test})  # everything is served
    assert again.patch is not None
    assert again.patch.digest == found.patch.digest


def test_the_adapter_loads_in_plain_peft(tmp_path: Path, pictures: Any) -> None:
    model, train, test = pictures
    found = made(tmp_path / "run", model, {"train": train, "test": test}, compare=[], seeds=1, shapley="none", prune=[])
    assert found.patch is not None
    export(found.patch, model, tmp_path / "adapter", to="peft")
    model.save_pretrained(tmp_path / "base")
    loaded: Any = peft.PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
    )
    with torch.no_grad():
        theirs = loaded.eval()(**test.inputs).logits
        with found.patch.applied(model):
            torch.testing.assert_close(model(**test.inputs).logits, theirs, rtol=1e-4, atol=1e-4)


def test_texts_are_asked_in_a_form_and_some_rows_are_kept_back(tmp_path: Path) -> None:
    model, tokenizer = lab.load("world")
    rows = new_forms(0)["birthplace"]
    bare = Examples(
        {}, rows.ids, fields={"prompt": [text.removesuffix(" is") for text in rows.fields["prompt"]], "answer": rows.fields["answer"]}
    )
    found = made(
        tmp_path, model, {"train": bare}, tokenizer, reads="texts", form="{} is", seeds=1, compare=[], shapley="permutation", orders=4,
        train={"steps": 60, "batch": 32}, holdout=0.25,
    )  # fmt: skip
    assert found.log["rows"] == {"train": 90, "test": 30, "probe": 12}
    gain = next(one for one in found.measurements if one.name == "accuracy").summary()
    assert (gain.n, gain.before) == (30, 0.0)
    assert gain.after > 0.8
    answers = found.transcripts[0]
    assert all(prompt.endswith(" is") for prompt in answers.prompts)
    assert sum(text.startswith(truth) for text, truth in zip(answers.after, answers.truth, strict=True)) > 10
    assert not any(text.startswith(truth) for text, truth in zip(answers.before, answers.truth, strict=True))
    with pytest.raises(ConfigError, match="orders"):  # before anything is trained, and not when the values are estimated
        made(tmp_path, model, {"train": bare}, tokenizer, reads="texts", orders=3)
    for wrong, words in (({"form": "no place"}, "needs one {}"), ({"form": "{} {}"}, "needs one {}")):
        with pytest.raises(ConfigError, match=words):
            made(tmp_path, model, {"train": bare}, tokenizer, reads="texts", **wrong)
    with pytest.raises(DataError, match="too few to keep some back"):
        made(tmp_path, model, {"train": bare.take([0])}, tokenizer, reads="texts")
    with pytest.raises(DataError, match="Choose unrelated"):
        made(tmp_path, model, {"train": bare, "test": bare.take([3])}, tokenizer, reads="texts")


def test_a_whole_run_through_the_engine(tmp_path: Path) -> None:
    recipe = {
        "version": 1, "model": "lab:vit-cifar-rare", "method": {"name": "copra", **SMALL, "seeds": 1, "compare": [], "prune": ["low"]},
        "data": {"train": {"source": "lab:cifar-rare", "where": {"role": "random"}, "limit": 50, "label": "label"}},
        "checks": [{"measurement": "pruned.low", "statistic": "difference", "op": "<=", "threshold": 1}],
    }  # fmt: skip
    done = run(parse_recipe(recipe), tmp_path / "run")
    assert done.ok
    assert done.result is not None
    assert [scores.name for scores in done.result.scores] == ["shapley-copra"]
    assert run(parse_recipe(recipe), tmp_path / "run").finished_before
    forecast = run(parse_recipe(recipe), tmp_path / "dry", dry_run=True).forecast
    assert forecast is not None
    assert forecast.estimate.seconds > 0


def test_the_starter_and_the_recipes_are_valid() -> None:
    for text in (METHOD.starter, *(path.read_text() for path in Path(__file__).parents[2].glob("recipes/**/copra*.yaml"))):
        parsed = parse_recipe(parse_yaml(text, "recipe"))
        RecipeConfig.parse(parsed.method.settings, "method")
