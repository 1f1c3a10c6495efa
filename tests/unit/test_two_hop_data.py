"""The two-hop prompts that come with the package: every row is a usable case, and what is held out is disjoint."""

import json
from collections import Counter
from pathlib import Path

import pytest

import trocar

PATH = Path(trocar.__file__).parent / "edit" / "creme" / "data" / "two_hop.jsonl"
FIELDS = {"id", "template", "subject", "bridge", "target", "first_hop", "paraphrases", "generalisation", "unrelated", "split"}


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> str:
    return " " + " ".join("".join(mark if mark.isalnum() else " " for mark in text.casefold()).split()) + " "


def test_every_row_is_a_case(rows):
    assert len(rows) >= 120
    assert len({row["id"] for row in rows}) == len(rows) == len({(row["template"], row["subject"]) for row in rows})
    for row in rows:
        assert set(row) == FIELDS, row["id"]
        assert row["template"].count("{}") == row["template"].count("{") == 1, row["id"]
        texts = [row[name] for name in ("id", "template", "subject", "bridge", "target", "first_hop")]
        queries = [query for name in ("paraphrases", "generalisation", "unrelated") for query in row[name]]
        assert all(set(query) - {"kind"} == {"prompt", "answer"} for query in queries), row["id"]
        texts += [text for query in queries for text in query.values()]
        assert all(text and text == text.strip() and "  " not in text for text in texts), row["id"]
        assert len(row["paraphrases"]) >= 2, row["id"]
        assert {query["kind"] for query in row["unrelated"]} <= {"hard", "easy", "single"}, row["id"]
        assert len(row["unrelated"]) >= 2, row["id"]


def test_no_answer_is_given_away_or_shared(rows):
    for row in rows:
        target, bridge, subject = (words(row[name]) for name in ("target", "bridge", "subject"))
        assert target != bridge, row["id"]
        assert bridge not in subject, row["id"]
        assert target not in subject, row["id"]
        assert subject in words(row["first_hop"]), row["id"]
        case = row["template"].format(row["subject"])
        everything = [query["prompt"] for name in ("paraphrases", "generalisation", "unrelated") for query in row[name]]
        assert len({case, *everything}) == len(everything) + 1, row["id"]
        for query in row["paraphrases"]:
            assert query["answer"] == row["target"], row["id"]
        for query in row["generalisation"]:
            assert subject in words(query["prompt"]), row["id"]
            assert words(query["answer"]) not in (target, bridge), row["id"]
            assert words(query["answer"]) not in words(query["prompt"]), row["id"]
        for query in row["unrelated"]:
            assert words(query["answer"]) not in (target, bridge), row["id"]
            assert subject not in words(query["prompt"]), row["id"]
            assert bridge not in words(query["prompt"]), row["id"]


def test_development_and_test_are_disjoint_and_about_equal(rows):
    size = Counter(row["split"] for row in rows)
    assert set(size) == {"dev", "test"}
    assert min(size.values()) > 0.4 * len(rows)
    for name in ("bridge", "subject"):
        dev, test = ({row[name] for row in rows if row["split"] == split} for split in ("dev", "test"))
        assert not dev & test, name
    prompts = {split: {query["prompt"] for row in rows if row["split"] == split for query in row["unrelated"]} for split in size}
    assert not prompts["dev"] & prompts["test"]


def test_the_same_question_has_the_same_answer(rows):
    answers: dict[str, set[str]] = {}
    for row in rows:
        asked = [{"prompt": row["template"].format(row["subject"]), "answer": row["target"]}]
        for query in [*asked, *row["paraphrases"], *row["generalisation"], *row["unrelated"]]:
            answers.setdefault(query["prompt"], set()).add(query["answer"])
        answers.setdefault(row["template"].format(row["bridge"]), set()).add(row["target"])
    assert not {prompt: found for prompt, found in answers.items() if len(found) > 1}


def test_recipes_find_the_set_by_name():
    from trocar.lab.texts import load_texts

    rows = load_texts({"source": "lab:two-hop", "where": {"split": "test"}})
    assert set(rows.fields["split"]) == {"test"}
    assert len(rows) == sum(json.loads(line)["split"] == "test" for line in PATH.read_text().splitlines())
