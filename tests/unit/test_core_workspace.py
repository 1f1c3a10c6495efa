"""Resumable units and named random streams: a resumed run gives what an uninterrupted one would have given."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trocar.core.seeds import derive, generator
from trocar.core.workspace import Workspace


class Counted:
    """A computation that counts how often it ran."""

    def __init__(self, result: object) -> None:
        self.result, self.runs = result, 0

    def __call__(self):  # type: ignore[no-untyped-def]
        self.runs += 1
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_values_are_computed_once_per_key(tmp_path: Path) -> None:
    work, unit = Workspace(tmp_path), Counted({"a": (1, 2.5)})
    first = work.values("unit", {"model": "f00", "steps": 3}, unit)
    again = Workspace(tmp_path).values("unit", {"steps": 3, "model": "f00"}, unit)
    assert first == again == {"a": [1, 2.5]}, "the first answer has the form that a stored one has"
    assert unit.runs == 1


@pytest.mark.parametrize("key", [{"model": "f00", "steps": 4}, {"model": "bad", "steps": 3}, {"model": "f00"}, {}])
def test_another_key_is_never_served_the_old_answer(tmp_path: Path, key: dict) -> None:
    work = Workspace(tmp_path)
    work.values("unit", {"model": "f00", "steps": 3}, Counted("old"))
    work.tensors("unit", {"model": "f00", "steps": 3}, Counted({"x": torch.zeros(2)}))
    assert work.values("unit", key, Counted("new")) == "new"
    assert work.tensors("unit", key, Counted({"x": torch.ones(2)}))["x"].tolist() == [1, 1]
    assert work.values("unit", key, Counted("newer")) == "new"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_come_back_bit_for_bit_in_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    value = (torch.randn(3, 5, generator=generator(0)) * 3).to(dtype).T
    unit = Counted({"x": value})
    work = Workspace(tmp_path)
    first = work.tensors("unit", {"k": 1}, unit)
    again = work.tensors("unit", {"k": 1}, unit)
    assert unit.runs == 1
    for result in (first, again):
        assert result["x"].dtype == dtype
        assert torch.equal(result["x"], value)


def test_a_failed_unit_is_not_committed_and_runs_again(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    with pytest.raises(RuntimeError):
        work.values("unit", {}, Counted(RuntimeError("killed")))
    with pytest.raises(RuntimeError):
        work.tensors("unit", {}, Counted(RuntimeError("killed")))
    assert list(tmp_path.iterdir()) == []
    assert work.values("unit", {}, Counted(7)) == 7


def test_first_and_resumed_answers_are_equal_even_for_numbers_json_has_not(tmp_path: Path) -> None:
    work, unit = Workspace(tmp_path), Counted([float("nan"), float("inf"), 1.0])
    assert work.values("unit", {}, unit) == work.values("unit", {}, unit) == [None, None, 1.0]


def test_rooms_keep_units_of_the_same_name_apart(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    assert work.room("a").values("unit", {}, Counted(1)) == 1
    assert work.room("b").values("unit", {}, Counted(2)) == 2
    assert work.room("a").values("unit", {}, Counted(3)) == 1


@given(st.integers(0, 2**40), st.lists(st.text(max_size=5) | st.integers(), max_size=3))
def test_streams_depend_on_seed_and_name_alone(seed: int, names: list) -> None:
    expected = derive(seed, *names)
    random.random()
    torch.rand(1)
    assert derive(seed, *names) == expected
    assert 0 <= expected < 2**63
    assert derive(seed + 1, *names) != expected
    assert derive(seed, *names, "more") != expected


def test_streams_are_the_same_on_every_machine_and_do_not_touch_the_global_one() -> None:
    assert derive(0, "episodes", 3) == 38271946104888300
    state = torch.get_rng_state()
    drawn = torch.rand(4, generator=generator(0, "episodes", 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn, torch.rand(4, generator=generator(0, "episodes", 3)))
    assert not torch.equal(drawn, torch.rand(4, generator=generator(0, "episodes", 4)))
