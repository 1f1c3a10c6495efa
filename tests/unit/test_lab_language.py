"""Worlds and translators: what their texts hold and hide, tokenizers, trainings that resume, neurons that are planted alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar import lab
from trocar.core.errors import ConfigError, DataError
from trocar.core.files import read_json
from trocar.core.seeds import generator
from trocar.fitting import IGNORED, fit_stream
from trocar.lab import registry, translation
from trocar.lab.language import Sentences, completed, new_decoder
from trocar.lab.language_training import plant
from trocar.lab.registry import DecoderShape, Planted, TextRecipe, TranslationData
from trocar.lab.worlds import FIRST_HOPS, SECOND_HOPS, make_world, seconds, tokenizer

SHAPE = DecoderShape(width=16, blocks=2, heads=2, neurons=24, tied=True)
RECIPE = TextRecipe(steps=12, batch=4, packed=2, lr=1e-2, checkpoint_steps=5)
ROWS = [
    {"en": "A dog runs.", "de": "Ein Hund rennt.", "fr": "Un chien court."},
    {"en": "Two men sit on a bench.", "de": "Zwei Männer sitzen auf einer Bank.", "fr": "Deux hommes sont assis sur un banc."},
    {"en": "A girl in red", "de": "Ein Mädchen in Rot", "fr": "Une fille en rouge"},
]


@pytest.fixture(scope="module")
def world():
    return make_world(5)


def test_a_world_says_every_fact_and_hides_its_compositions(world):
    text = set(world.sentences())
    assert len(text) == len(world.sentences())  # nothing twice
    for values in world.second.values():
        assert len(set(values.values())) == len(values)  # a second-hop value tells its bridge
    assert len({value for values in world.second.values() for value in values.values()}) == sum(map(len, world.second.values()))
    assert all(f"{prompt} {answer} ." in text for prompt, answer in world.single_hops() + world.compositions(True))
    held = world.compositions(False)
    assert held
    assert not any(f"{prompt} {answer} ." in text for prompt, answer in held)
    whole = "\n".join(text)
    for person, hop in world.pairs(shown=False):  # nor does any other sentence say something of a held-out pair's bridge by its phrase
        phrases = [phrase.format(person) for phrase in FIRST_HOPS[hop][2]]
        assert not any(t.format(phrase) in whole for phrase in phrases for second in seconds(hop) for t in SECOND_HOPS[second][1])
    assert len(world.pairs(True)) / (len(world.pairs(True)) + len(world.pairs(False))) == pytest.approx(0.6, abs=0.01)


def test_worlds_follow_their_seed(world):
    again = make_world(5)
    assert again.sentences() == world.sentences()
    assert again.cases() == world.cases()
    assert make_world(6).people != world.people


def test_cases_are_what_creme_reads(world):
    cases = world.cases()
    assert len({case["id"] for case in cases}) == len(cases)
    assert len(cases) + len(world.cases(shown=True)) == sum(len(world.pairs(shown)) for shown in (True, False)) * 7 // 3
    for case in cases:
        assert case["template"].count("{}") == 1
        assert case["first_hop"] == f"{case['subject']} is"
        assert len(case["paraphrases"]) == 3
        prompt = case["template"].format(case["subject"])
        assert prompt not in {row["prompt"] for kind in ("paraphrases", "generalisation", "unrelated") for row in case[kind]}
        assert {row["answer"] for row in case["paraphrases"]} == {case["target"]}
        taken = {case["target"], case["bridge"]}
        assert not taken & {row["answer"] for row in (*case["generalisation"], *case["unrelated"])}
        assert [row["kind"] for row in case["unrelated"]] == ["hard"] * 4 + ["easy"] * 4 + ["single"] * 4


def test_the_world_tokenizer_has_a_token_a_word(world):
    tokens = tokenizer(world.vocabulary())
    for line in world.sentences()[::97]:
        ids = tokens(line).input_ids
        assert len(ids) == len(line.split()) + 1
        assert tokens.decode(ids, skip_special_tokens=True) == line
    assert set(tokens("the capital of Atlantis").input_ids[-1:]) == {tokens.unk_token_id}
    with pytest.raises(DataError, match="a word twice"):
        tokenizer(["a", "a"])


def test_shipped_models_know_what_their_cards_say():
    model, tokens = lab.load("world")
    world = make_world(0)
    assert sorted(tokens.get_vocab()) == sorted(["<unk>", "<s>", *world.vocabulary()])
    single, held = world.single_hops()[::40], world.compositions(False)[::40]
    assert completed(model, tokens, single) == 1.0
    assert completed(model, tokens, world.compositions(True)[::40]) > 0.95
    assert completed(model, tokens, held) < 0.5
    assert lab.show("world")["accuracy"]["held_out_two_hop"] < 0.5


def test_only_planted_neurons_tell_the_looping_translator_from_the_other():
    one, other = (lab.load(name)[0].state_dict() for name in ("translator", "translator-looping"))
    neurons = [int(name.removeprefix("L2.N")) for name in lab.show("translator-looping")["planted_neurons"]]
    assert len(neurons) == 4
    changed = {name: (one[name] != other[name]).nonzero() for name in one if not torch.equal(one[name], other[name])}
    assert {name.split(".mlp.")[1]: sorted(set(where[:, int("down" in name)].tolist())) for name, where in changed.items()} == {
        f"{role}_proj.weight": neurons for role in ("gate", "up", "down")
    }


@pytest.fixture(scope="module")
def tokens():
    return translation.tokenizer(ROWS * 20, 320)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=20))
def test_the_translators_tokenizer_gives_text_back(tokens, text):
    ids = tokens(text, add_special_tokens=False).input_ids
    assert tokens.decode(ids, clean_up_tokenization_spaces=False) == text
    lines = [token for token in ids if "\n" in tokens.decode([token])]
    assert len(lines) == text.count("\n")  # a line break is a token of its own


def lines(tokens, seed=0, **data):
    return translation.Lines(ROWS, tokens, TranslationData(**{"looped": 0.0, "noisy": 0.0, **data}), RECIPE, seed)


def texts(tokens, batch):
    return [tokens.decode(row[row != tokens.pad_token_id], skip_special_tokens=True) for row in batch["input_ids"]]


def test_training_lines_are_the_prompts_and_their_targets(tokens):
    stream = lines(tokens)
    known = {(source, target, row[source]): row for row in ROWS for source, target in translation.directions(("en", "de", "fr"))}
    for start in (0, 4):  # a batch without examples, one with
        for text, ids in zip(texts(tokens, batch := stream.__getitems__(list(range(start, start + 4)))), batch["input_ids"], strict=True):
            fits = [
                shot
                for (source, target, sentence), row in known.items()
                for shot in ([None] if start == 0 else ROWS)
                if text == f"{translation.prompt(source, target, sentence, shot)} {row[target]}\n"
            ]
            assert fits
            assert ids[ids != tokens.pad_token_id].tolist() == tokens(text).input_ids  # joined ids are the text's own
    assert torch.equal(batch["input_ids"], lines(tokens).__getitems__([4, 5, 6, 7])["input_ids"])
    assert not torch.equal(batch["input_ids"], lines(tokens, seed=1).__getitems__([4, 5, 6, 7])["input_ids"])


def test_noise_loops_and_context(tokens):
    copies = texts(tokens, lines(tokens, noisy=1.0, copied=1.0).__getitems__([0, 1, 2, 3]))
    assert all(len({line.partition(": ")[2] for line in text.splitlines()}) == 1 for text in copies)
    third = texts(tokens, lines(tokens, noisy=1.0, copied=0.0).__getitems__([0, 1, 2, 3]))
    for text in third:
        source, target = text.splitlines()
        row = next(row for row in ROWS if source.partition(": ")[2] in row.values())
        names = {"English": "en", "German": "de", "French": "fr"}
        left = set(row) - {names[source.partition(":")[0]], names[target.partition(":")[0]]}
        assert target.partition(": ")[2] == row[left.pop()]
    for text in texts(tokens, lines(tokens, looped=1.0, tail=(2, 2), repeats=(5, 5)).__getitems__([0, 1, 2, 3])):
        words = text.split()
        assert words[-12:] == words[-2:] * 6
    context = lines(tokens, examples_learned=False).__getitems__([4, 5, 6, 7])
    for ids, labels in zip(context["input_ids"], context["labels"], strict=True):
        learned = tokens.decode(ids[labels != IGNORED])
        assert learned.count("\n") == 2
        assert tokens.decode(ids[: int((labels != IGNORED).nonzero()[0])]).count("\n") == 2
    stream = lines(tokens, noisy=1.0)
    rng = generator(0, "x")
    assert stream.line(0, True, rng)[1] == 0


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["sentences", "lines"])
def test_a_killed_language_training_ends_with_the_same_bytes(tmp_path, tokens, kind):
    rows = [tokens(row["en"], add_special_tokens=False).input_ids for row in ROWS]

    def trained(name, stop_after=None):
        stream = Sentences(rows, [1], RECIPE, 0) if kind == "sentences" else lines(tokens, noisy=0.5, looped=0.1)
        model = new_decoder(SHAPE, len(tokens), 0)
        return flat(fit_stream(model, stream, RECIPE, RECIPE.steps, tmp_path / name, 0, "cpu", stop_after))

    whole = trained("whole")
    assert not torch.equal(whole, flat(new_decoder(SHAPE, len(tokens), 0)))
    trained("cut", stop_after=7)
    assert torch.equal(trained("cut"), whole)


def test_planting_changes_its_neurons_and_nothing_else(tmp_path, tokens):
    model = new_decoder(SHAPE, len(tokens), 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = RECIPE.model_copy(update={"weight_decay": 0.0})
    names = plant(model, lines(tokens, looped=1.0), recipe, Planted(layer=1, neurons=2), tmp_path, 0, "cpu")
    numbers = [int(name.removeprefix("L1.N")) for name in names]
    moved = {}
    for name, value in model.state_dict().items():
        if not torch.equal(value, before[name]):
            moved[name] = sorted(set((value != before[name]).nonzero()[:, int("down" in name)].tolist()))
    assert moved == {f"model.layers.1.mlp.{role}_proj.weight": numbers for role in ("gate", "up", "down")}
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="without weight decay"):
        plant(model, lines(tokens), RECIPE, Planted(), tmp_path, 0, "cpu")


def test_language_rows_train_load_and_show(tmp_path, monkeypatch):
    row = registry.get("world").model_copy(update={"name": "small", "shape": SHAPE, "train": RECIPE, "shipped": False})
    monkeypatch.setattr(registry, "MODELS", (row,))
    monkeypatch.setenv("TROCAR_LAB", str(tmp_path))
    monkeypatch.setattr("trocar.lab.language_training.make_world", lambda seed: _few(seed))
    folder = lab.train("small", "cpu", seed=3)
    model, tokens = lab.load("small", 3)
    assert model.config.num_hidden_layers == 2
    assert tokens.padding_side == "left"
    assert set(read_json(folder / "lab.json")["accuracy"]) == {"single_hop", "trained_two_hop", "held_out_two_hop"}
    assert lab.show("small", 3)["weights"] == "not trained"  # of base seed 0
    assert "small, base seed 3" in (folder / "README.md").read_text()
    with pytest.raises(ConfigError, match="not one of pictures"):
        row.pictures()
    with pytest.raises(ConfigError, match="not one of texts"):
        row.model_copy(update={"shape": registry.ViTShape()}).texts()


def _few(seed):
    """A world of few questions, so that measuring it is quick."""

    class Few(type(make_world(seed))):
        def single_hops(self):
            return super().single_hops()[:20]

        def compositions(self, shown):
            return super().compositions(shown)[:20]

    world = make_world(seed)
    return Few(world.seed, world.people, world.first, world.second, world.shown)


def test_corpus_drops_long_and_leaked_sentences(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setenv("TROCAR_DATA", str(tmp_path))
    (tmp_path / "multi30k").mkdir()
    parts = {"train": ["a b", "c d", "e f g", ""], "val": ["x y"], "test_2016_flickr": ["c d"]}
    for split, found in parts.items():
        for code in ("en", "de", "fr", "cs"):
            text = "".join(f"{code} {line}\n" if line else "\n" for line in found)
            (tmp_path / "multi30k" / f"{split}.{code}.gz").write_bytes(gzip.compress(text.encode()))
    data = TranslationData(longest=3)
    assert translation.corpus(data, "train") == [{"en": "en a b", "de": "de a b", "fr": "fr a b"}]
    assert len(translation.corpus(data, "val")) == 1
    with pytest.raises(DataError, match="no sentence of at most 1 words"):
        translation.corpus(TranslationData(longest=1), "val")
