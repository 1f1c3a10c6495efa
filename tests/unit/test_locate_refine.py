"""Refinement of located sets: the algebra of intersections, chance, missing settings, empty results."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.core.errors import ScoresError
from trocar.locate.refine import expected_by_chance, refine, top_mask, top_masks
from trocar.locate.scores import How, Scores

HOW = How("test", fingerprint="model")
SIZES = (3, 4)


def scores_of(values, kind="neuron", how=HOW):
    parts = np.split(np.asarray(values, float), [SIZES[0]])
    letter = {"neuron": "N", "head": "H"}[kind]
    return Scores(kind, "", {f"L{layer}.{letter}": part for layer, part in enumerate(parts)}, how)


values = st.lists(st.integers(-3, 3), min_size=sum(SIZES), max_size=sum(SIZES)).map(scores_of)
several = st.dictionaries(st.sampled_from("abcdef"), values, min_size=2, max_size=5)


@settings(max_examples=25, deadline=None)
@given(several, st.integers(1, 7), st.randoms())
def test_the_intersection_is_one(found, k, random):
    """M-11: of any order, any grouping, repeated settings or not; within every operand; growing with k; q of D counts."""
    masks = top_masks(found, k)
    result = refine(masks)
    names = list(masks)
    random.shuffle(names)
    assert refine({name: masks[name] for name in names}).mask == result.mask  # the mapping's order is nothing
    chosen = {name: set(mask.open_names()) for name, mask in masks.items()}
    assert set(result.mask.open_names()) == set.intersection(*chosen.values())
    assert set(result.union.open_names()) == set.union(*chosen.values())
    for needed in range(1, len(masks) + 1):
        expected = {name for name in set.union(*chosen.values()) if sum(name in one for one in chosen.values()) >= needed}
        assert set(refine(masks, min_settings=needed).mask.open_names()) == expected
    twice = masks | {f"{name} again": mask for name, mask in masks.items()}
    assert refine(twice).mask.open_names() == result.mask.open_names()
    first, *rest = masks.values()
    grouped = refine({"rest": refine({str(n): mask for n, mask in enumerate(rest)}, alone=True).mask, "first": first})
    assert grouped.mask.open_names() == result.mask.open_names()
    if k < 7:
        assert set(result.mask.open_names()) <= set(refine(top_masks(found, k + 1)).mask.open_names())
    for name, mask in masks.items():
        assert refine({name: mask}, alone=True).mask.open_names() == mask.open_names()
    sizes = [len(one) for one in chosen.values()]
    assert (np.diag(result.counts) == [len(chosen[name]) for name in sorted(chosen)]).all()
    assert (result.counts == result.counts.T).all()
    assert result.expected == pytest.approx(sum(SIZES) * np.prod([size / sum(SIZES) for size in sizes]))


@settings(max_examples=60, deadline=None)
@given(values, st.integers(1, 7))
def test_top_is_signed_with_ties_by_layer_and_index(found, k):
    """M-12."""
    mask = top_mask(found, k)
    order = sorted(range(found.flat.size), key=lambda place: (-found.flat[place], place))
    assert mask.open_names() == [found.name_at(place) for place in sorted(order[:k])]
    positive = top_mask(found, k, positive=True).open_names()
    assert positive == [found.name_at(place) for place in sorted(order[:k]) if found.flat[place] > 0]


def test_more_than_there_are_gives_all_with_a_warning():
    with pytest.warns(UserWarning, match="9 neurons are wanted in en-de, but only 7"):
        masks = top_masks({"en-de": scores_of(range(7)), "de-en": None}, 9)
    assert masks["en-de"].count() == 7
    assert masks["de-en"] is None


def test_chance():
    assert expected_by_chance([100] * 4, 32 * 11008, 4) == pytest.approx(2e-9, rel=0.2)
    assert expected_by_chance([50] * 4, 1024, 4) == pytest.approx(0.006, rel=0.1)
    for needed in (1, 2, 3):  # against counting all equally likely sets
        sizes, total = (1, 2, 2), 3
        draws = itertools.product(*(itertools.combinations(range(total), size) for size in sizes))
        counts = [sum(sum(place in one for one in draw) >= needed for place in range(total)) for draw in draws]
        assert expected_by_chance(sizes, total, needed) == pytest.approx(np.mean(counts))


def test_keep_takes_the_best_by_mean_rank():
    found = {"a": scores_of([9, 8, 7, 6, 5, 0, 0]), "b": scores_of([5, 9, 6, 8, 7, 0, 0])}
    result = refine(top_masks(found, 5), keep=2, scores=found)
    assert list(result.mean_ranks.items()) == [("L0.N1", 1.5), ("L0.N0", 3.0)]
    assert result.found == 5
    assert result.mask.open_names() == ["L0.N0", "L0.N1"]
    assert len(result.mask) == 7
    assert refine(top_masks(found, 5), keep=20, scores=found).mask.count() == 5
    with pytest.raises(ScoresError, match="rank"):
        refine(top_masks(found, 5), keep=2)
    with pytest.raises(ScoresError, match="no scores of 'b'"):
        refine(top_masks(found, 5), keep=2, scores={"a": found["a"]})
    with pytest.raises(ScoresError, match="keep=0"):
        refine(top_masks(found, 5), keep=0, scores=found)


def test_missing_settings_are_left_out_and_named():
    a, b = scores_of(range(7)), scores_of(range(7, 0, -1))
    masks = top_masks({"en-de": a, "de-en": None, "en-zh": b, "zh-en": None}, 5)
    result = refine(masks)
    assert result.missing == ("de-en", "zh-en")
    assert result.needed == 2
    assert result.mask.count() == 3
    assert "de-en, zh-en" in result.explanation
    assert list(result.single) == ["en-de", "en-zh"]
    assert result.mask.how.settings["missing"] == ["de-en", "zh-en"]
    with pytest.raises(ScoresError, match=re.escape("min_settings=3 is outside 1..2")):
        refine(masks, min_settings=3)
    lonely = {"en-de": masks["en-de"], "de-en": None}
    with pytest.raises(ScoresError, match=r"too few to refine.*de-en.*alone=True"):
        refine(lonely)
    assert refine(lonely, alone=True).mask.open_names() == masks["en-de"].open_names()
    with pytest.raises(ScoresError, match="too few"):
        refine({"en-de": None}, alone=True)


def test_an_empty_result_is_explained():
    found = {"a": scores_of([1, 1, 0, 0, 0, 0, 0]), "b": scores_of([0, 1, 1, 0, 0, 0, 0]), "c": scores_of([1, 0, 1, 0, 0, 0, 0])}
    result = refine(top_masks(found, 2))
    assert result.mask.count() == 0
    assert len(result.mask) == 7
    assert "a 2, b 2, c 2" in result.explanation
    assert "share 1" in result.explanation
    assert "min_settings" in result.explanation
    assert [row["shared"] for row in result.rows()] == [1, 1, 1]
    assert result.rows()[0]["iou"] == pytest.approx(1 / 3)
    nothing = top_masks({"a": scores_of([-1.0] * 7), "b": scores_of([1.0] * 7)}, 3, positive=True)
    assert refine(nothing).mask.count() == 0
    assert "a 0, b 3" in refine(nothing).explanation


def test_what_cannot_be_combined_is_refused():
    a = scores_of(range(7))
    for other in (scores_of(range(7), kind="head"), scores_of(range(7), how=How("test", fingerprint="another model"))):
        with pytest.raises(ScoresError):
            refine({"a": top_mask(a, 2), "b": top_mask(other, 2)})
    with pytest.raises(ScoresError, match="masks"):
        refine({"a": top_mask(a, 2), "b": a})
