"""Detectors and metrics of translation: languages, loops, BLEU and chrF."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.core.errors import MetricError, MissingExtraError
from trocar.evaluate import (
    corpus_score,
    find_loop,
    identify,
    language_code,
    language_mismatch,
    language_name,
    mismatches,
    repetition,
    repetitions,
    sentence_scores,
    translation_quality,
)

STATES = ("a", "b")
TEXTS = {
    "en": ["Two men are cooking in the kitchen.", "A little girl climbs into a wooden playhouse.", "People fix the roof of a house."],
    "de": ["Zwei Männer kochen in der Küche.", "Ein kleines Mädchen klettert in ein Spielhaus aus Holz.", "Leute reparieren ein Hausdach."],
    "fr": ["Deux hommes cuisinent dans la cuisine.", "Une petite fille grimpe dans une maisonnette.", "Des gens réparent le toit."],
}
# a loop is told apart from what stands before it: words of the text before, and units, come from different alphabets
before_words = st.lists(st.text("abcdef", min_size=2, max_size=5), max_size=12, unique=True)
units = st.lists(st.text("uvwxyz", min_size=2, max_size=5), min_size=1, max_size=5)


def shortest(unit: list[str]) -> list[str]:
    """The unit without inner repetition."""
    for period in range(1, len(unit) + 1):
        if len(unit) % period == 0 and unit == unit[:period] * (len(unit) // period):
            return unit[:period]
    return unit


@given(before_words, units, st.integers(3, 8), st.integers(0, 4), st.booleans(), st.text(" \n\t", max_size=3))
@settings(max_examples=150, deadline=None)
def test_a_loop_is_found_where_it_begins(words, unit, times, extra, cut, blanks):
    unit = shortest(unit)
    loop = unit * times + unit[: extra % len(unit)]
    if cut:
        following = unit[len(loop) % len(unit)]
        loop = [*loop, following[:-1]]
    text = " ".join([*words, *loop])
    found = find_loop(text + blanks)
    whole = len(loop) - cut
    enough = 2 * whole >= len(words) + len(loop) or whole >= max(12, 3 * len(unit))
    if enough:
        assert found is not None
        assert (found.start, found.period) == (len(words), len(unit))
        assert text.startswith(found.before + found.unit)
        assert found.unit.split() == unit
        assert not found.characters


@given(st.lists(st.text("abcdefghij", min_size=1, max_size=6), max_size=60, unique=True))
@settings(max_examples=80, deadline=None)
def test_distinct_words_are_no_loop(words):
    if words and len(set(words[-1])) > len(words[-1]) // 2:
        assert find_loop(" ".join(words)) is None


def test_ordinary_sentences_are_no_loops():
    long = "The man who sold the world sold it to the man who had sold the sun to the sea, and the sea gave the sun to the man."
    for text in ["", " ", "word", "no no", "Very, very good.", long, long + " " + long, "two by two by two, they came in one by one"]:
        assert find_loop(text) is None, text
    assert find_loop(" ".join([long] * 3)) is not None


def test_random_text_is_no_loop_but_the_published_rule_flags_much_of_it():
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 10001)
    texts = [" ".join(map(str, rng.choice(10000, 120, p=weights / weights.sum()) + 1000)) for _ in range(60)]
    assert not repetitions(texts, None).any()
    assert repetitions(texts, None, mode="reference").mean() > 0.1


@given(st.text("一二三四五六七八九十", max_size=8), st.text("男女子人大小", min_size=1, max_size=4), st.integers(4, 8))
@settings(max_examples=80, deadline=None)
def test_characters_agree_with_words(before, unit, times):
    before, unit = "".join(dict.fromkeys(before)), "".join(shortest(list(unit)))
    text = before + unit * times
    found, words = find_loop(text, characters=True), find_loop(" ".join(text))
    assert (found is None) == (words is None)
    if found is not None and words is not None:
        assert (found.start, found.period, found.unit) == (words.start, words.period, words.unit.replace(" ", ""))
        assert (found.start, found.period) == (len(before), len(unit))


def test_a_loop_inside_the_last_word():
    found = find_loop("that is it!!!!!!!!!!!!!!!!")
    assert found is not None
    assert (found.characters, found.before, found.unit) == (True, "that is it", "!")
    assert find_loop("that is it!!!") is None
    assert find_loop("0000000000000000") is not None
    assert find_loop("that is bananas") is None


def test_modes_agree_on_plain_loops_and_differ_where_the_published_rule_is_wrong():
    for text in ["a b c d c d c d c d", "ein Haus ist ein Haus ist ein Haus ist ein Ha", "toujours toujours toujours toujours"]:
        assert find_loop(text) == find_loop(text, mode="reference")
    same_first = "the cat the dog the bird the fish the"  # every second word alike, the others not
    assert find_loop(same_first) is None
    only_first = "x a b x b a x a a x b b x a b x"
    assert find_loop(only_first) is None
    assert find_loop(only_first, mode="reference") is not None
    with pytest.raises(MetricError, match="refrence"):
        find_loop("a", mode="refrence")  # type: ignore[arg-type]


def test_the_budget_gates():
    texts = ["no no no no no no no", "fine", "no no no no no no no", ""]
    assert repetitions(texts, [True, True, False, True]).tolist() == [1, 0, 0, 0]
    assert repetitions(texts, None).tolist() == [1, 0, 1, 0]
    zh = "两名男子男子男子男子男子"
    assert repetitions([zh, zh], None, ["zh-CN", "en"]).tolist() == [1, 1]  # in English the last word is searched
    made = repetition(texts, ["fine"] * 4, STATES, ([True, True, False, True], [False] * 4))
    summary = made.summary()
    assert (summary.n, summary.before, summary.after, made.better) == (4, 0.25, 0.0, "lower")
    with pytest.raises(MetricError):
        repetitions(texts, [True])


def test_languages_are_told_apart():
    for code, texts in TEXTS.items():
        assert identify(texts, ["en", "de", "fr", "cs"]) == [code] * 3
    assert identify(["", "Ja", "123 !!"], ["en", "de"]) == ["undetermined"] * 3
    assert identify(["两名男子"], ["zh", "en"]) == ["zh"]
    with pytest.raises(MetricError, match="at least two"):
        identify(["x"], ["en", "English"])


def test_codes_have_one_form():
    for name in ["de", "DE", "deu", "ger", "German", "de_DE", "de-AT", " german "]:
        assert language_code(name) == "de"
    assert [language_code(name) for name in ("zh", "zh-cn", "zho", "Chinese")] == ["zh"] * 4
    assert (language_name("fra"), language_code("eo")) == ("French", "eo")
    with pytest.raises(MetricError, match=r"'Germn'.*german"):
        language_code("Germn")
    with pytest.raises(MetricError, match="tlh"):
        mismatches(["x"], "tlh", ["en", "de"])


def test_mismatch_counts_every_output():
    texts = [*TEXTS["de"], TEXTS["en"][0], "", "Ja"]
    assert mismatches(texts, "German", ["en", "fr"]).tolist() == [0, 0, 0, 1, 1, 0]
    assert mismatches(texts, "de", ["en", "fr"], strict=True).tolist() == [0, 0, 0, 1, 1, 1]
    made = language_mismatch(TEXTS["en"], TEXTS["de"], "de", STATES, ["en", "de"])
    summary = made.summary()
    assert (summary.n, summary.before, summary.after, made.better, made.form) == (3, 1.0, 0.0, "lower", "share")
    per_row = mismatches([TEXTS["de"][0], TEXTS["fr"][0]], ["de", "de"], ["en", "fr"])
    assert per_row.tolist() == [0, 1]
    with pytest.raises(MetricError):
        mismatches(texts, ["de"], ["en"])


@given(st.lists(st.sampled_from([*TEXTS["de"], *TEXTS["en"], "", "x", "!!"]), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_ratios_lie_between_0_and_1_and_strict_is_never_less(texts):
    loose, strict = mismatches(texts, "de", ["en", "de"]), mismatches(texts, "de", ["en", "de"], strict=True)
    assert len(loose) == len(texts)
    assert (loose <= strict).all()
    assert 0 <= loose.mean() <= strict.mean() <= 1


def test_scores_are_sacrebleus():
    import sacrebleu

    references, outputs = TEXTS["de"], ["Zwei Männer kochen in einer Küche.", "Ein Mädchen klettert.", TEXTS["de"][2]]
    ours = corpus_score(outputs, references, references, "bleu", resamples=200)
    assert ours.before == pytest.approx(sacrebleu.corpus_bleu(outputs, [references]).score)
    assert (ours.after, ours.n) == (pytest.approx(100), 3)
    assert ours.low <= ours.difference <= ours.high
    chrf = corpus_score(outputs, outputs, references, "chrf", resamples=50)
    assert chrf.before == pytest.approx(sacrebleu.corpus_chrf(outputs, [references]).score)
    assert (chrf.difference, chrf.low, chrf.high) == (0, 0, 0)
    assert corpus_score(outputs, references, references, "bleu", resamples=200) == ours
    zh = sentence_scores(["两名男子在做饭"], ["两名男子在厨房做饭"], "bleu", "zh")
    assert zh[0] > 20  # as words without the Chinese tokeniser there is no match at all
    with pytest.raises(MetricError, match="chfr"):
        sentence_scores(["a"], ["a"], "chfr")
    with pytest.raises(MetricError):
        corpus_score([], [], [], "bleu")


def test_quality_is_split_into_cases():
    references, before = TEXTS["de"], [TEXTS["de"][0], TEXTS["en"][1], TEXTS["de"][2]]
    after = [TEXTS["de"][0], TEXTS["de"][1], "Leute reparieren."]
    made = {one.name: one.summary() for one in translation_quality(before, after, references, STATES, errors=[0, 1, 0])}
    assert set(made) == {"bleu", "bleu.error_free", "bleu.errors", "chrf", "chrf.error_free", "chrf.errors"}
    assert [made[name].n for name in ("chrf", "chrf.error_free", "chrf.errors")] == [3, 2, 1]
    assert made["chrf.errors"].difference > 50
    assert made["chrf.error_free"].difference < 0
    assert {one.name for one in translation_quality(before, after, references, STATES, errors=[0, 0, 0])} == {
        "bleu", "bleu.error_free", "chrf", "chrf.error_free",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("py3langid", lambda: identify(["x"], ["en", "de"])),
        ("sacrebleu.metrics", lambda: sentence_scores(["a"], ["a"], "bleu")),
    ],
)
def test_missing_packages_are_named(monkeypatch, package, call):
    from trocar.evaluate import translation

    translation._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"trocar\[mt\]"):
        call()
