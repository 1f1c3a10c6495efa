"""MT editing end to end on a tiny random translator: locating, refining, the recipe's run and its resumption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from trocar.anatomy import fingerprint, tiny_model
from trocar.core.errors import ConfigError, DataError
from trocar.core.workspace import Workspace
from trocar.edit.neurons import (
    Corpus,
    Direction,
    RecipeConfig,
    Rules,
    Sentences,
    choose,
    locate,
    operations,
    refined,
    set_size,
)
from trocar.edit.neurons.recipe import METHOD
from trocar.edit.neurons.translations import Translations
from trocar.lab.translation import tokenizer
from trocar.method import Examples, Job
from trocar.patch import AddVector, Gate, Patch, ScaleAt
from trocar.recipe import parse_recipe, run
from trocar.report import write_report
from trocar.result import read_result

NOUNS = [("man", "Mann", "homme"), ("dog", "Hund", "chien"), ("boy", "Junge", "garçon"), ("girl", "Mädchen", "fille")]
VERBS = [("sleeps", "schläft", "dort"), ("runs", "läuft", "court"), ("eats", "isst", "mange")]
VERBS += [("sings", "singt", "chante"), ("waits", "wartet", "attend")]
PLACES = [
    ("in the house", "im Haus", "dans la maison"),
    ("on the street", "auf der Straße", "dans la rue"),
    ("today", "heute", "aujourd'hui"),
]
ROWS = [
    {"en": f"The {n[0]} {v[0]} {p[0]}.", "de": f"Der {n[1]} {v[1]} {p[1]}.", "fr": f"Le {n[2]} {v[2]} {p[2]}."}
    for n in NOUNS for v in VERBS for p in PLACES
]  # fmt: skip
DIRECTIONS = ("en-de", "de-en", "en-fr")
CONFIG = RecipeConfig(
    directions=DIRECTIONS, head_shots=2, mean_prompts=4, corrupted_prompts=3, cases=6, instances=6, loop_budget=12, unit_tokens=2, steps=4,
    k_heads=6, k_neurons=30, min_directions=2, strength=(0.5, 1.0), validation=3, test_limit=4, max_new_tokens=16, batch_size=8, window=32,
)  # fmt: skip
RULES = Rules(CONFIG.max_new_tokens, batch_size=8)


@pytest.fixture(scope="module")
def words():
    return tokenizer(ROWS, 400)


@pytest.fixture(scope="module")
def model(words):
    """Random, with the embedding as its head: prone to say again what it just said, so that some outputs loop and some do not."""
    made = tiny_model("llama", vocab_size=len(words), bos_token_id=1, eos_token_id=0, pad_token_id=0)
    with torch.no_grad():
        made.lm_head.weight.copy_(made.model.embed_tokens.weight)
    return made


@pytest.fixture(scope="module")
def corpus():
    return Corpus({code: [row[code] for row in ROWS[:48]] for code in ("en", "de", "fr")})


def examples(rows):
    return Examples({}, tuple(str(number) for number in range(len(rows))), fields={code: [row[code] for row in rows] for code in rows[0]})


@pytest.fixture(scope="module")
def located(model, words, corpus):
    before, gradients = fingerprint(model), [parameter.requires_grad for parameter in model.parameters()]
    found = locate(model, words, corpus, CONFIG.locating(), RULES)
    assert fingerprint(model) == before  # M-17: locating never changes parameters
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert all(parameter.grad is None for parameter in model.parameters())
    return found


def test_every_direction_is_located(located, model):
    assert [str(direction) for direction in located] == list(DIRECTIONS)
    for one in located.values():
        assert one.means.shape == (3, 4, 16)
        assert (one.heads.kind, len(one.heads)) == ("head", 12)
        assert one.told["cases"] == 6
        if one.loops is not None:
            assert one.loops.flat.min() >= 0
            assert one.loops.flat.max() <= 1
            assert one.told["loop tokens"] <= 12
        assert one.heads.how.fingerprint == fingerprint(model)
        assert one.task is None or len(one.task) == 144
    assert sum(one.loops is not None for one in located.values()) >= 2
    assert any(one.task is not None for one in located.values())


def test_the_same_seed_gives_the_same_sets_and_outputs_and_stored_units_are_used(located, model, words, corpus, tmp_path, monkeypatch):
    """M-17, and a killed run that goes on."""
    first = locate(model, words, corpus, CONFIG.locating(), RULES, ("heads", "loops"), 0, Workspace(tmp_path))
    for direction, one in first.items():
        assert one.heads == located[direction].heads
        assert torch.equal(one.means, located[direction].means)
        assert (one.loops is None) == (located[direction].loops is None)
        assert one.loops is None or one.loops == located[direction].loops
    from trocar.edit.neurons import locating as room

    for name in ("mean_heads", "head_effects", "neuron_attributions", "translate"):
        monkeypatch.setattr(room, name, None)
    other = CONFIG.locating().model_copy(update={"k_heads": 2})
    again = locate(model, words, corpus, other, RULES, ("heads", "loops"), 0, Workspace(tmp_path))
    assert all(again[direction].heads == one.heads for direction, one in first.items())
    with pytest.raises(TypeError):  # another seed is another computation
        locate(model, words, corpus, CONFIG.locating(), RULES, ("heads",), 1, Workspace(tmp_path))


def test_refining_names_what_is_left_out(located, model):
    found = refined(model, located, "heads", CONFIG)
    assert found.mask.count() == sum(
        sum(mask[f"L{layer}.H{head}"] for mask in found.single.values()) >= 2 for layer in range(3) for head in range(4)
    )
    from dataclasses import replace

    silent = {direction: replace(one, loops=None) for direction, one in located.items()}
    with pytest.raises(DataError, match="nothing was found in de-en, en-de, en-fr"):
        refined(model, silent, "loops", CONFIG)
    one = dict([next(iter(located.items()))])
    assert refined(model, one, "heads", CONFIG.model_copy(update={"min_directions": None})).mask.count() > 0


def test_default_sizes_are_those_of_the_method(model):
    assert set_size(model, "heads", None) == 1  # 5 % of 12, at least one
    assert set_size(model, "neurons", None) == 100  # 0.1 % of 144, at least 100
    assert set_size(model, "neurons", 7) == 7


def test_operations_follow_the_settings(located, model):
    sets, direction = {"heads": ["L0.H1"], "loops": ["L1.N3"]}, Direction("en", "de")
    kinds = [type(op) for op in operations(model, located, sets, direction, CONFIG, 1.0, 0.0)]
    assert kinds == [AddVector, ScaleAt]
    vector = CONFIG.model_copy(update={"form": "vector", "permanent": True})
    ops = operations(model, located, sets, direction, vector, 1.0, 0.0)
    assert [type(op) for op in ops] == [AddVector, Gate]
    assert ops[0].point == "L1.resid_post"  # 11/32 of 3 blocks
    assert operations(model, located, sets, direction, CONFIG, 0.0, 1.0) == []
    both = {"loops": ["L1.N3"], "task": ["L1.N4"]}
    assert operations(model, located, both, direction, CONFIG, 0.0, 0.5)[0].factors == {"L1.N3": 0.5, "L1.N4": 2.0}
    for refine in ("union", "single", "random"):
        from trocar.edit.neurons import chosen_set

        found = refined(model, located, "heads", CONFIG)
        chosen = chosen_set(model, found, CONFIG.model_copy(update={"refine": refine}), direction, "heads", 0)
        assert chosen.is_mask
        if refine == "random":
            assert chosen.count() == found.mask.count()
            assert not (chosen & found.mask).count()


def made(wrong, loops):
    from trocar.trace.queries import Continuation

    outputs = tuple(Continuation("Der Hund schläft.", (1,), True) for _ in wrong)
    return {0: Translations(Direction("en", "de"), outputs, np.array(wrong, float), np.array(loops, float))}


def test_the_strength_is_chosen_by_errors_within_the_tolerance():
    pairs = [("The dog sleeps.", "Der Hund schläft.")] * 4
    sentences = Sentences(Direction("en", "de"), tuple(pairs), {0: ("",) * 4})
    base = made([1, 1, 0, 0], [0, 0, 0, 0])
    errors = {0.5: [1, 0, 0, 0], 1.0: [0, 0, 0, 0], 2.0: [0, 0, 0, 0]}
    strength, scale, trials = choose(sentences, base, lambda c, s: made(errors[c], [0] * 4), (0.5, 1.0, 2.0), (0.0,), ("heads",), 1.0)
    assert (strength, scale) == (1.0, 1.0)  # the weaker of equals; the part that was not asked for is left alone
    assert [trial.errors for trial in trials] == [0.5, 0.25, 0.0, 0.0]
    useless = choose(sentences, base, lambda c, s: made([1, 1, 0, 0], [0] * 4), (0.5, 1.0), (0.0,), ("heads",), 1.0)
    assert useless[:2] == (0.0, 1.0)  # harmless, but no output is right that was not
    assert all(trial.allowed for trial in useless[2])

    def damaging(c, s):
        found = made([0] * 4, [0] * 4)[0]
        return {0: Translations(found.direction, tuple(type(one)("x", one.tokens, True) for one in found.made), found.mismatch, found.loop)}

    assert choose(sentences, base, damaging, (0.5, 1.0), (0.0, 0.5), ("heads", "loops"), 1.0)[:2] == (0.0, 1.0)
    assert choose(sentences, base, damaging, (0.5,), (0.0,), ("heads", "loops"), 1.0)[:2] == (0.5, 0.0)  # single values are taken


@pytest.fixture(scope="module")
def place(model, words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mt")
    model.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    for name, rows in (("examples", ROWS[:48]), ("test", ROWS[48:]), ("plain", [{"text": row["en"]} for row in ROWS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(place: Path, **settings):
    method = {"name": "mt-editing"} | CONFIG.model_dump(mode="json", exclude_none=True) | settings
    roles = {"examples": {"source": "examples.jsonl"}, "test": {"source": "test.jsonl"}, "perplexity": {"source": "plain.jsonl"}}
    checks = [{"measurement": "mismatch.zero", "op": "<=", "threshold": 1.0}]
    return parse_recipe({"version": 1, "model": "model", "data": roles, "method": method, "checks": checks}, base=place)


def test_a_recipe_runs_and_reports(place, tmp_path):
    done = run(recipe(place, what="both", others=True), tmp_path / "run", report=write_report)
    result = read_result(tmp_path / "run")
    names = {row.name for row in result.table}
    assert {"mismatch.zero", "repetition.one", "errors.zero", "chrf.zero", "bleu.one", "perplexity", "mismatch.zero.en-fr"} <= names
    rows = {row.name: row for row in result.table}
    assert rows["mismatch.zero"].n == 4  # every output counts
    assert done.result.patch is not None
    assert {"heads-en-de.safetensors", "heads-refined.safetensors"} <= {path.name for path in (tmp_path / "run" / "scores").iterdir()}
    assert {"overlap-heads", "layers-heads", "sweep-heads"} <= {figure.id for figure in result.figures}
    assert result.log["located"]["en-de"]["cases"] == 6
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Translations en-de, zero-shot prompts" in page
    assert run(recipe(place, what="both", others=True), tmp_path / "run").finished_before


def test_a_run_of_neurons_for_good_and_what_a_recipe_refuses(place, model, words, tmp_path):
    done = run(recipe(place, what="loops", permanent=True, shots=(0,), scale=(0.0,)), tmp_path / "run")
    assert done.result.patch is not None
    patch = Patch.load(tmp_path / "run" / done.result.patch.file)
    assert {type(op) for op in patch.ops} == {Gate}
    with pytest.raises(ConfigError, match="not among method"):
        run(recipe(place, repair="fr-en"), tmp_path / "other")
    data = {"examples": examples(ROWS[:48]), "test": examples(ROWS[40:])}
    with pytest.raises(DataError, match="8 sentences of data"):
        METHOD.run(Job(model, data, CONFIG, 0, Workspace(tmp_path / "w"), processor=words))
    with pytest.raises(DataError, match="tokenizer"):
        METHOD.run(Job(model, data, CONFIG, 0, Workspace(tmp_path / "w")))
    fine = Job(model, data | {"test": examples(ROWS[48:])}, CONFIG, 0, Workspace(tmp_path / "w"), processor=words)
    told = METHOD.estimate(fine)
    assert told.seconds > 0
    assert told.peak_bytes > 0
