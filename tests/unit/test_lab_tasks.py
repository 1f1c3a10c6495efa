"""Shifts change what is seen and nothing else; clients share all rows between them."""

import pytest
import torch

from trocar.core.errors import DataError
from trocar.lab.tasks import SHIFTS, new_forms, shards, shifted
from trocar.lab.worlds import make_world
from trocar.method import Examples


def pictures(rows: int = 40) -> Examples:
    pixels = torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Examples({"pixel_values": pixels}, tuple(map(str, range(rows))), torch.arange(rows) % 4)


@pytest.mark.parametrize("kind", sorted(SHIFTS))
def test_a_shift_is_of_the_pixels_before_they_were_normalised(kind: str) -> None:
    rows = pictures()
    found = shifted(rows, kind)
    assert found.ids == rows.ids
    assert found.labels is rows.labels
    assert found.inputs["pixel_values"].shape == rows.inputs["pixel_values"].shape
    assert not torch.equal(found.inputs["pixel_values"], rows.inputs["pixel_values"])
    plain = (rows.inputs["pixel_values"] + 1) / 2
    torch.testing.assert_close((found.inputs["pixel_values"] + 1) / 2, SHIFTS[kind](plain).contiguous())


def test_shifts_that_are_their_own_way_back() -> None:
    rows = pictures()
    torch.testing.assert_close(shifted(shifted(rows, "inverted"), "inverted").inputs["pixel_values"], rows.inputs["pixel_values"])
    with pytest.raises(DataError, match="Did you mean 'turned'"):
        shifted(rows, "turn")
    with pytest.raises(DataError, match="no pixel_values"):
        shifted(Examples({}, ("a",)), "turned")


def test_every_row_goes_to_one_client_and_classes_are_uneven() -> None:
    rows = pictures(400)
    hands = shards(rows, 4, alpha=0.3, seed=1)
    assert sorted(one for hand in hands for one in hand.ids) == sorted(rows.ids)
    assert hands[0].ids == shards(rows, 4, alpha=0.3, seed=1)[0].ids
    share = torch.stack([torch.bincount(hand.labels, minlength=4) / len(hand) for hand in hands])  # type: ignore[arg-type]
    assert float(share.max()) > 0.5
    even = shards(rows, 4, alpha=1000, seed=1)
    assert max(len(hand) for hand in even) < 130
    with pytest.raises(DataError, match="without any"):
        shards(pictures(3), 4)
    with pytest.raises(DataError, match="have none"):
        shards(Examples({}, ("a",)), 2)


def test_new_forms_ask_for_what_the_world_says_in_words_it_has() -> None:
    world = make_world(1)
    known, lines = set(world.vocabulary()), set(world.sentences())
    tasks = new_forms(1)
    assert sorted(tasks) == sorted(world.first)
    for hop, rows in tasks.items():
        assert len(rows) == len(world.people)
        for prompt, answer, person in zip(rows.fields["prompt"], rows.fields["answer"], world.people, strict=True):
            assert set(prompt.split()) | {answer} <= known
            assert answer == world.first[hop][person]
            assert not any(line.startswith(prompt) for line in lines)
