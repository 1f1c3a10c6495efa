"""CREME on the small model that comes with the package: baselines, automatic layers, questions behind a prefix, and the whole recipe."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from trocar import lab
from trocar.anatomy import Anatomy, fingerprint
from trocar.core.errors import ConfigError, DataError, EditError
from trocar.edit.creme import Case, CremeConfig, answered, creme_edit, second_moment
from trocar.edit.creme.asking import Questions, queries_of, scores_of, wrong_answers
from trocar.edit.creme.baselines import RomeConfig, chain_of_thought, memory_injection, patchscopes, random_direction, rome
from trocar.edit.creme.layers import choose_layers, window_size
from trocar.edit.creme.ordinary import GROUPS, ordinary_prompts
from trocar.edit.creme.recipe import METHOD, RecipeConfig
from trocar.lab.texts import load_texts
from trocar.lab.worlds import make_world
from trocar.patch import Patch
from trocar.recipe import parse_recipe, run
from trocar.trace.queries import answer_scores, next_tokens

CONFIG = CremeConfig(layers=(3, 4, 5), contexts="identity", mode="first")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*norm|.*begin with the same token")
        yield


@pytest.fixture(scope="module")
def world() -> tuple[Any, Any]:
    return lab.load("world")


@pytest.fixture(scope="module")
def gap(world: tuple[Any, Any]) -> list[Case]:
    """Held-out questions that the model fails although it knows both hops."""
    model, words = world
    cases = [Case.parse(row) for row in make_world(0).cases()[:60]]
    right = answered(model, words, [case.prompt for case in cases], [case.target for case in cases], 64)
    guided = answered(model, words, [case.guide for case in cases], [case.target for case in cases], 64)
    return [case for case, known, source in zip(cases, right, guided, strict=True) if source and not known]


def score(model: Any, words: Any, case: Case) -> float:
    return float(answer_scores(model, words, [case.prompt], [case.target])[0])


def test_an_edit_repairs_and_a_random_one_does_not(world: tuple[Any, Any], gap: list[Case]) -> None:
    model, words = world
    rises = []
    for case in gap[:6]:
        edit = creme_edit(model, words, case, CONFIG)
        control = random_direction(model, edit.patch, 0)
        norms = [[row["norm"] for row in patch.summary()] for patch in (edit.patch, control)]
        assert np.allclose(*norms, rtol=1e-3)
        before = score(model, words, case)
        sides = []
        for patch in (edit.patch, control):
            with patch.applied(model):
                sides.append(score(model, words, case) - before)
        assert np.isclose(edit.scores[0]["after"]["target"] - edit.scores[0]["before"]["target"], sides[0], atol=1e-6)
        rises.append(sides)
    mean = np.mean(rises, axis=0)
    assert mean[0] > 0.15
    assert mean[1] < 0.1 * mean[0]


def test_a_second_moment_costs_less(world: tuple[Any, Any], gap: list[Case]) -> None:
    """R-11: the same correction, less change of unrelated answers."""
    model, words = world
    moments = second_moment(model, words, [text.removesuffix(" .") for text in make_world(0).sentences()[::10]], (3, 4, 5), batch_size=64)
    damage = {}
    for name in ("none", "text"):
        config = CONFIG.model_copy(update={"second_moment": name})
        lost, gained = [], []
        for case in gap[:6]:
            questions, askings = Questions(model, words, [p for q in queries_of(case) for p in q.pairs()], 3, "first"), queries_of(case)
            before = scores_of(questions, askings)
            with creme_edit(model, words, case, config, moments if name == "text" else None, checked=False).patch.applied(model):
                after = scores_of(questions, askings)
            hard = np.array([kind == "unrelated.hard" for kind in before.sets])
            lost.append((before.answer - after.answer)[hard].mean())
            gained.append(after.answer[0] - before.answer[0])
        damage[name] = np.mean(lost), np.mean(gained)
    assert damage["text"][0] < 0.7 * damage["none"][0]
    assert damage["text"][1] > 0.7 * damage["none"][1]


def test_questions_behind_a_prefix_are_the_plain_ones(world: tuple[Any, Any], gap: list[Case]) -> None:
    model, words = world
    case = gap[0]
    pairs = [pair for asking in queries_of(case) for pair in asking.pairs()]
    for mode in ("first", "sequence"):
        questions = Questions(model, words, pairs, 3, mode, batch_size=7)  # type: ignore[arg-type]
        with creme_edit(model, words, case, CONFIG, checked=False).patch.applied(model):
            said = questions.say(pairs)
            plain = answer_scores(model, words, [p for p, _ in pairs], [a for _, a in pairs], mode).numpy()  # type: ignore[arg-type]
            assert np.allclose(said.score, plain, atol=1e-5)
            assert said.first.tolist() == next_tokens(model, words, [p for p, _ in pairs]).tolist()
            assert said.right.tolist() == answered(model, words, [p for p, _ in pairs], [a for _, a in pairs])


def test_layers_are_chosen_within_a_budget(world: tuple[Any, Any], gap: list[Case]) -> None:
    model, words = world
    auto = CremeConfig(contexts="identity", mode="first")
    chosen = choose_layers(model, words, gap[:4], auto)
    assert len(chosen.layers) == window_size(8, None) == 3
    assert chosen.gain == pytest.approx(chosen.effects.effects["attention"].mean(0)[1:7].max())
    assert creme_edit(model, words, gap[0], auto).patch.ops
    assert (window_size(30, None), window_size(32, None), window_size(2, None)) == (6, 6, 1)
    with pytest.raises(EditError, match="No window of 3 blocks") as refused:
        choose_layers(model, words, gap[:1], auto.model_copy(update={"budget": 1e-6}))
    least = float(refused.value.what.rpartition("was ")[2].rstrip(").")) + 0.001
    frugal = choose_layers(model, words, gap[:1], auto.model_copy(update={"budget": least}))
    assert all(share > least for _, share in frugal.passed_over)
    assert frugal.gain <= chosen.effects.effects["attention"][0].max()
    fixed = auto.model_copy(update={"layers": frugal.layers, "force": True})
    assert max(row["share"] for row in creme_edit(model, words, gap[0], fixed).layers) <= least


def test_baselines(world: tuple[Any, Any], gap: list[Case]) -> None:
    model, words = world
    case, base = gap[0], fingerprint(model)
    before = score(model, words, case)
    patch = rome(model, words, case, RomeConfig(layer=1, steps=60, clamp=16.0, contexts=("{}",)))
    assert [row["op"] for row in patch.summary()] == ["low-rank"]
    with patch.applied(model):
        assert score(model, words, case) > before + 0.2
    injected = memory_injection(model, case, words, 4, 3.0)
    with injected.applied(model):
        assert abs(score(model, words, case) - before) > 1e-6
    asked = chain_of_thought(model, words, gap[:4], 2)  # it knows both hops, so that in words it gets there
    assert [(bridge, answer.split()[0]) for bridge, answer in asked] == [(case.bridge, case.target) for case in gap[:4]]
    found = patchscopes(model, words, case, [(2, 2), (4, 3)], placeholder=next(iter(make_world(0).second["capital"])), mode="first")
    assert len(found) == 2
    assert all(0 <= value <= 1 for value in found)
    assert fingerprint(model) == base


def test_ordinary_prompts_ask_nothing_that_is_measured() -> None:
    cases = Case.rows(load_texts("lab:two-hop").fields)
    prompts = ordinary_prompts(cases)
    assert len(prompts) == len(set(prompts)) > 800
    asked = {query.prompt for case in cases for query in queries_of(case)} | {case.guide for case in cases}
    assert not asked & set(prompts)
    subjects = {subject for group, _, _ in GROUPS for subject in group}
    assert not subjects & {text for case in cases for text in (case.subject, case.bridge, case.target)}
    own = Case(id="own", template="The colour of {} is", subject="a", bridge="b", target="c")
    assert "The colour of my friend is" in ordinary_prompts([own])


def test_wrong_answers_are_filled_in(world: tuple[Any, Any], gap: list[Case]) -> None:
    model, words = world
    first = next_tokens(model, words, [case.prompt for case in gap[:3]])
    filled = wrong_answers(words, [*gap[:2], gap[2].model_copy(update={"wrong": "kept"})], first.tolist())
    assert [case.wrong for case in filled[:2]] == [words.decode([int(token)]) for token in first[:2]]
    assert filled[2].wrong == "kept"


# ------------------------------------------------------------------------------------- the recipe


def recipe(**method: Any) -> Any:
    data = {"cases": {"source": "world:held-out", "limit": 24}, "text": {"source": "world:text", "limit": 300},
            "perplexity": {"source": "world:text", "limit": 20}}  # fmt: skip
    settings = {"name": "creme", "cases": 3, "contexts": "identity", "mode": "first", "locate": 3, "others": 6, "windows": 2,
                "window_tokens": 32, "max_new_tokens": 3, **method}  # fmt: skip
    return parse_recipe({"version": 1, "model": "lab:world", "data": data, "method": settings})


def test_the_recipe_from_end_to_end(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(recipe(layers=[3, 4, 5]), tmp_path / "run")
    assert done.ok
    assert done.result is not None
    log, table = done.result.log, {row.name: row for row in done.result.table}
    assert log["gap"] >= log["edited"] == 3
    assert table["correction"].difference > 0.1
    for name in ("paraphrase", "specificity.hard", "leakage", "event_rate", "moved.two-hop", "guide", "first_hop", "perplexity"):
        assert name in table
    assert {figure.id for figure in done.result.figures} >= {"lens-failed", "effects", "relative"}
    patch = Patch.load(tmp_path / "run" / "patch.safetensors")
    assert {parameter.split(".")[2] for parameter in patch.touched()} == {"3", "4", "5"}
    model, words = lab.load("world")
    shipped = next(case for case in Case.rows(load_texts("world:held-out").fields) if case.id == log["shipped"][0])
    before = score(model, words, shipped)
    with patch.applied(model):
        assert score(model, words, shipped) > before
    import trocar.edit.creme.recipe as module

    (tmp_path / "run" / "result.json").unlink()  # killed before the end: every edit is read back, none is made or asked again
    monkeypatch.setattr(module, "case_unit", None)
    again = run(recipe(layers=[3, 4, 5]), tmp_path / "run")
    assert again.result == done.result


@pytest.mark.parametrize("edit", ["batch", "sequential"])
def test_one_patch_for_all(edit: str, tmp_path: Any) -> None:
    done = run(recipe(layers="auto", edit=edit, second_moment="text"), tmp_path / "run")
    assert done.result is not None
    assert len(done.result.log["shipped"]) == 3
    assert "layers chosen" in done.result.log
    patch = Patch.load(tmp_path / "run" / "patch.safetensors")
    assert [op.a.shape[0] for op in patch.ops] == [3, 3, 3]  # type: ignore[union-attr]
    assert done.result.model.fingerprint_after == {row.name: row for row in done.result.table}["correction"].state_after


def test_what_a_recipe_refuses(tmp_path: Any) -> None:
    solved, bare = recipe(layers=[3]).model_dump(), recipe(layers=[3], second_moment="text").model_dump()
    solved["data"]["cases"] = {"source": "world:trained", "limit": 6}
    del bare["data"]["text"]
    with pytest.raises(DataError, match="is a compositional gap"):
        run(parse_recipe(solved), tmp_path / "a")
    with pytest.raises(DataError, match=r"needs data\.text"):
        run(parse_recipe(bare), tmp_path / "b")
    with pytest.raises(DataError, match="'nobody' was not edited"):
        run(recipe(layers=[3], ship="nobody", cases=1), tmp_path / "c")
    with pytest.raises(ConfigError, match="Did you mean 'contexts'"):
        run(recipe(context="identity"), tmp_path / "d")
    assert METHOD.reads == "texts"
    assert RecipeConfig(edit="batch").edit_config([1]).many == "batch"
    assert Anatomy.of(lab.load_model("world")).tower().n_layers == 8
    torch.manual_seed(0)
