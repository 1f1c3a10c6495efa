"""Texts: every file form gives the same rows, named sets and worlds are read, bad input is named."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar import lab
from trocar.core.errors import ConfigError, DataError
from trocar.lab.sources import Table
from trocar.lab.texts import _ids, load_texts
from trocar.lab.worlds import make_world

ROWS = [{"q": "one", "n": 1}, {"q": "two", "n": 2}, {"q": "one", "n": 1}, {"q": "three", "n": 2}]


@pytest.fixture
def rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    lines = "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "r.jsonl").write_text(lines)
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "r.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "r.parquet")
    return tmp_path


def test_every_file_form_gives_the_same_rows(rows):
    found = [load_texts(name, rows) for name in ("r.jsonl", "r.jsonl.gz", "r.json", "r.parquet")]
    for other in found:
        assert other.fields == {"q": ["one", "two", "one", "three"], "n": [1, 2, 1, 2]}
        assert other.ids == found[0].ids
        assert (other.labels, other.pictures, dict(other.inputs)) == (None, None, {})
    assert len(set(found[0].ids)) == 4  # equal rows have ids of their own
    assert found[0].ids[2] == found[0].ids[0] + "-2"


def test_filters_limit_and_renaming_leave_ids_alone(rows):
    ids = load_texts("r.jsonl", rows).ids
    two = load_texts({"source": "r.jsonl", "where": {"n": 2}, "columns": {"prompt": "q"}}, rows)
    assert two.fields["prompt"] == ["two", "three"]
    assert two.ids == (ids[1], ids[3])
    drawn = load_texts({"source": "r.jsonl", "limit": 2, "seed": 1}, rows)
    assert drawn.ids == load_texts({"source": "r.jsonl", "limit": 2, "seed": 1}, rows).ids
    assert len(drawn) == 2
    assert set(drawn.ids) < set(ids)
    swapped = load_texts({"source": "r.jsonl", "columns": {"q": "n", "n": "q"}}, rows)
    assert swapped.fields["n"][3] == "three"


@given(st.lists(st.dictionaries(st.sampled_from("ab"), st.one_of(st.integers(0, 2), st.text("xy", max_size=2))), min_size=1, max_size=8))
def test_ids_are_unique_and_follow_the_rows(rows):
    columns = {name: [row.get(name) for row in rows] for name in "ab"}
    ids = _ids(Table("t", [], columns))
    assert len(set(ids)) == len(rows)
    assert _ids(Table("t", [], {name: cells[:3] for name, cells in columns.items()})) == ids[:3]


@pytest.mark.parametrize(
    ("unit", "wanted"),
    [("paragraph", ["a b\nc", "d"]), ("line", ["a b", "c", "d"]), ("file", ["a b\nc\n \n\nd"])],
)
def test_plain_text(tmp_path, unit, wanted):
    (tmp_path / "t.txt").write_text("a b\nc\n \n\nd\n")
    assert load_texts({"source": "t.txt", "unit": unit}, tmp_path).fields == {"text": wanted}


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """The named sets' folder, as small as can be."""
    monkeypatch.setenv("TROCAR_DATA", str(tmp_path))

    def put(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))

    put("wikitext2/test.txt.gz", " \n = Title = \n \n One . \n Two = 2 . \n = = Part = = \n Three . \n")
    for code in ("en", "de", "fr", "cs"):
        put(f"multi30k/val.{code}.gz", f"{code} one two\n{code} one two three\n")
    put("multi30k/train.en.gz", "one\n")
    for code in ("de", "fr", "cs"):
        put(f"multi30k/train.{code}.gz", "one\ntwo\n")
    put("function_vectors/abstractive/antonym.json.gz", json.dumps([{"input": "hot", "output": "cold"}]))
    put("gsm8k/test.jsonl.gz", json.dumps({"question": "1+1?", "answer": "#### 2"}))
    put("shakespeare/input.txt.gz", "A:\nWords.\n\nB:\nMore.\n")
    return tmp_path


def test_named_sets(sets):
    assert load_texts("wikitext2:test").fields == {"text": ["One .", "Two = 2 .", "Three ."]}
    assert load_texts("multi30k:val").fields["cs"] == ["cs one two", "cs one two three"]
    assert load_texts("multi30k:val?longest=3").fields["de"] == ["de one two"]
    assert load_texts("function_vectors:antonym").fields == {"input": ["hot"], "output": ["cold"]}
    assert load_texts("gsm8k:test").fields["question"] == ["1+1?"]
    assert load_texts("shakespeare").fields["text"] == ["A:\nWords.", "B:\nMore."]


def test_world_sources_are_the_worlds_of_their_seed():
    world = make_world(3)
    held = load_texts("world:held-out?seed=3")
    assert held.fields["split"] == ["held-out"] * len(held)
    assert list(held.fields["id"]) == [row["id"] for row in world.cases()]
    assert held.ids != load_texts("world:held-out").ids
    assert load_texts({"source": "world:trained?seed=3", "where": {"split": "trained"}, "limit": 5}).fields["split"] == ["trained"] * 5
    assert load_texts("world:text?seed=3").fields["text"] == world.sentences()
    assert load_texts("world:single?seed=3").fields["answer"] == [answer for _, answer in world.single_hops()]


def test_bad_sources_are_named(sets):
    (sets / "a.json").write_text("{}")
    (sets / "b.json").write_text("[1,\n")
    (sets / "c.jsonl").write_text('{"a": 1}\n[2]\n')
    (sets / "d.txt.gz").write_bytes(b"not packed")
    (sets / "e.txt").write_bytes(b"\xff")
    (sets / "f.csv").write_text("a")
    (sets / "g.txt").write_text("\n\n")
    (sets / "h.jsonl").write_text('{"a": 1, "b": 2}')
    for source, message in {
        "a.json": "not a list of objects",
        "b.json": r"is not JSON \(line 2",
        "c.jsonl": "Line 2 .* is list, not an object",
        "d.txt.gz": "cannot be read",
        "e.txt": "not text in UTF-8",
        "f.csv": "unknown ending",
        "g.txt": "holds no rows",
        "gone.txt": "neither a known set nor an existing file",
        "wikitext2:valid": r"valid\.txt\.gz does not exist. Set TROCAR_DATA",
        "wikitext2:train": "no split 'train'",
        "multi30k:train": "different numbers of lines",
        "multi30k:val?short=3": r"'\?short=3' in .* is not understood",
        "multi30k:val?longest=x": "is not understood",
        "gsm8k:test?seed=1": "takes no settings",
        "function_vectors:antonim": "Did you mean 'antonym'",
        "world:all": "no part 'all'",
        "lab:nothing": "no text excerpt",
    }.items():
        with pytest.raises(DataError, match=message):
            load_texts(source, sets)
    for setting, error, message in [
        ({"where": {"c": 1}}, DataError, "no column 'c'"),
        ({"where": {"a": 2}}, DataError, "no row has a = 2"),
        ({"columns": {"c": "x"}}, DataError, "no column 'x'"),
        ({"columns": {"a": "b"}}, DataError, "'b' cannot be renamed 'a'"),
        ({"limits": 1}, ConfigError, "Did you mean 'limit'"),
    ]:
        with pytest.raises(error, match=message):
            lab.load_texts({"source": "h.jsonl", **setting}, sets)
