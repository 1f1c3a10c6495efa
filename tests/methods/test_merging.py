"""The method `merge`: tasks measured without, with each adapter, and merged; the patch is the merged one; what does not fit is said."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from trocar.anatomy import Anatomy, fingerprint, tiny_model
from trocar.core.errors import ConfigError, DataError, PatchBaseError
from trocar.lab.worlds import tokenizer
from trocar.patch import Adapter, Patch
from trocar.patch.combine import mixture
from trocar.patch.peft_folder import write_folder
from trocar.recipe import Recipe, load_model, parse_recipe, run
from trocar.report import write_report
from trocar.result import read_result
from trocar.trace.queries import ask

WORDS = ["the", "capital", "colour", "of", "is", "a", "b", "c", "d", "Paris", "Rome", "red", "blue"]
TASKS = {
    "capital": dict(zip("abcd", ("Paris", "Rome", "Paris", "Rome"), strict=True)),
    "colour": dict(zip("abcd", ("red", "red", "blue", "blue"), strict=True)),
}


def rows(task: str) -> list[dict[str, str]]:
    return [{"prompt": f"the {task} of {name} is", "answer": answer} for name, answer in TASKS[task].items()]


def trained(words: Any, task: str, seed: int, rank: int = 2) -> Adapter:
    """An adapter that learnt the four rows of a task by heart."""
    torch.manual_seed(seed)
    model = base(words)
    outer = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
    asked = ask(model, words, [row["prompt"] for row in rows(task)], [row["answer"] for row in rows(task)])
    wanted = torch.tensor([tokens[0] for tokens in asked.tokens])
    optimiser = torch.optim.AdamW([one for one in outer.parameters() if one.requires_grad], lr=3e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(outer(**asked.inputs).logits[:, -1], wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return Adapter.of(outer)


def base(words: Any) -> Any:
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=len(words), bos_token_id=1, eos_token_id=1)
    torch.random.set_rng_state(state)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    words = tokenizer(WORDS)
    base(words).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    for task in TASKS:
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(task)))
        write_folder(trained(words, task, 1), folder / f"for-{task}")
    write_folder(trained(words, "capital", 2, rank=3), folder / "wide")
    return folder


def recipe(folder: Path, **method: Any) -> Recipe:
    settings = {"name": "merge", "reads": "texts", "adapters": ["for-capital", "for-colour"], "how": "mixture", "points": 3, **method}
    data = {f"task.{task}": {"source": f"{task}.jsonl"} for task in TASKS}
    return parse_recipe({"version": 1, "model": {"source": "model"}, "data": data, "method": settings}, base=folder)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(recipe(place, compare=["fusion", "aligned", "lego"]), folder, report=write_report)
    return folder


def right(model: Any, words: Any, task: str) -> float:
    asked = ask(model, words, [row["prompt"] for row in rows(task)], [row["answer"] for row in rows(task)])
    with torch.no_grad():
        said = model(**asked.inputs).logits[:, -1].argmax(-1).tolist()
    return sum(said[number] == tokens[0] for number, tokens in enumerate(asked.tokens)) / len(said)


def test_every_number_is_that_of_a_model_with_the_update_in_its_weights(whole: Path, place: Path) -> None:
    words = tokenizer(WORDS)
    adapters = {name: Adapter.from_peft(place / name) for name in ("for-capital", "for-colour")}
    one = {**adapters, "mixture": mixture(list(adapters.values())).adapter}
    told = read_result(whole).log["accuracy"]
    for task in TASKS:
        assert told[task]["base"] == right(base(words), words, task)
        assert set(told[task]) == {"base", *adapters, "mixture", "fusion", "aligned", "lego"}
        for label, adapter in one.items():
            model = base(words)
            with torch.no_grad():
                for name, (a, b, scale, _) in adapter.factors.items():
                    model.get_submodule(name).weight += scale * b @ a
            assert told[task][label] == right(model, words, task), (task, label)
    assert told["capital"]["for-capital"] == told["colour"]["for-colour"] == 1.0  # the adapters do what they were trained for


def test_a_run_holds_table_curve_patch_and_texts(whole: Path, place: Path) -> None:
    result = read_result(whole)
    assert [row.name for row in result.table if row.name.startswith("capital")] == ["capital", "capital.for-capital", "capital.for-colour"]
    with (whole / "figures/connectivity.csv").open(newline="") as file:
        curve = [(row["task"], float(row["place"]), float(row["value"])) for row in csv.DictReader(file)]
    told = result.log["accuracy"]
    for task in TASKS:
        values = [value for name, _, value in curve if name == task]
        assert (values[0], values[-1]) == (told[task]["for-capital"], told[task]["for-colour"])
        assert values[1] == told[task]["fusion"]
        assert result.log["barrier"][task] == max(0.0, (values[0] + values[2]) / 2 - values[1])
    assert {"tasks", "connectivity", "modules"} <= {figure.id for figure in result.figures}
    assert {one.id for one in result.transcripts} == {"answers-capital", "answers-colour"}
    assert (whole / "report.html").exists()
    model = load_model(str(place / "model"))
    patch = Patch.load(whole / "patch.safetensors")
    assert patch.method == "merge"
    with patch.applied(model):
        assert fingerprint(model) == result.model.fingerprint_after
    for said in result.log["says"]:
        assert said.startswith(("capital:", "colour:"))


def test_patches_ranks_and_forms(whole: Path, place: Path, tmp_path: Path) -> None:
    """A patch stands for a folder; unlike ranks have no straight way; a task's prompts have a form."""
    import shutil

    shutil.copytree(place, tmp_path / "place")
    short = [{"prompt": name, "answer": answer} for name, answer in TASKS["capital"].items()]
    (tmp_path / "place/short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    asked = recipe(
        tmp_path / "place", adapters=["wide", str(whole / "patch.safetensors")], rank=2, forms={"capital": "the capital of {} is"}
    )
    data = {"task.capital": {"source": "short.jsonl"}}
    done = run(asked.model_copy(update={"data": data}), tmp_path / "run").result
    assert done is not None
    assert set(done.log["accuracy"]["capital"]) == {"base", "wide", "run", "mixture"}
    assert done.log["accuracy"]["capital"]["wide"] == 1.0
    assert any("no straight way" in said for said in done.log["says"])
    assert "connectivity" not in {figure.id for figure in done.figures}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"adapters": ["for-capital", "nowhere"]}, ConfigError, "nowhere is not there"),
        ({"adapters": ["for-capital"]}, ConfigError, "method.adapters"),
        ({"adapters": ["for-capital", "wide"], "how": "fusion"}, ConfigError, "Use a mixture"),
        ({"how": "fusion", "rank": 2}, ConfigError, "method.rank"),
        ({"how": "lego", "weights": [1, 1]}, ConfigError, "weighs no adapter"),
        ({"weights": [1, 1, 1]}, ConfigError, "3 weights were given for 2"),
        ({"forms": {"capitals": "{}"}}, ConfigError, "no task of texts has that name"),
        ({"forms": {"capital": "x"}}, ConfigError, "It needs one {}"),
    ],
)
def test_bad_recipes_say_what_and_where(place: Path, tmp_path: Path, changes: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as raised:
        run(recipe(place, **changes), tmp_path / "run")
    assert says in str(raised.value)


def test_no_task_and_other_bases_are_refused(place: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task to measure"):
        run(recipe(place).model_copy(update={"data": {}}), tmp_path / "run")
    words = tokenizer(WORDS)
    other = base(words)
    with torch.no_grad():
        other.lm_head.weight += 1
    Patch.of(other, [Adapter.from_peft(place / "for-colour")]).save(tmp_path / "other.safetensors")
    with pytest.raises(PatchBaseError, match="belongs to the model"):
        run(recipe(place, adapters=["for-capital", str(tmp_path / "other.safetensors")]), tmp_path / "run2")


def test_a_dry_run_and_pictures(tmp_path: Path, place: Path) -> None:
    forecast = run(recipe(place), tmp_path / "dry", dry_run=True).forecast
    assert forecast is not None
    assert "passes over 8 rows" in forecast.estimate.how
    model = load_model("lab:vit-cifar-rare")
    tower = Anatomy.of(model).tower()
    for seed in (0, 1):
        torch.manual_seed(seed)
        targets = [tower.path(layer, role) for layer in range(tower.n_layers) for role in ("q", "v")]
        outer = peft.get_peft_model(load_model("lab:vit-cifar-rare"), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        outer.save_pretrained(str(tmp_path / f"a{seed}"))
    asked = {
        "version": 1,
        "model": {"source": "lab:vit-cifar-rare"},
        "data": {"task": {"source": "lab:cifar-rare", "limit": 24}},
        "method": {"name": "merge", "adapters": ["a0", "a1"], "weights": [1, 3], "points": 3},
    }
    done = run(parse_recipe(asked, base=tmp_path), tmp_path / "run").result
    assert done is not None
    assert [row.name for row in done.table] == ["task", "score.task", "task.a0", "task.a1"]
    assert done.table[0].n == 24
    assert done.model.fingerprint_after != done.model.fingerprint_before
