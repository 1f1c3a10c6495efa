"""Every error class has a page and every page a class; the pages show messages in the form that users see."""

from __future__ import annotations

from pathlib import Path

import pytest

from trocar.core import errors

PAGES = Path(__file__).resolve().parents[2] / "docs" / "errors"
CLASSES = {value.slug(): value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.TrocarError)}


def test_classes_and_pages_match() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} - {"index"} == set(CLASSES)


def test_the_index_links_every_page_once() -> None:
    text = (PAGES / "index.md").read_text()
    assert {slug: text.count(f"]({slug}.md)") for slug in CLASSES} == dict.fromkeys(CLASSES, 1)


@pytest.mark.parametrize("slug", sorted(CLASSES))
def test_page_says_what_it_means_shows_a_message_and_what_to_do(slug: str) -> None:
    lines = (PAGES / f"{slug}.md").read_text().splitlines()
    name = CLASSES[slug].__name__
    assert lines[0] == f"# {name}"
    assert [line for line in lines if line.startswith("## ")][:2] == ["## Typical message", "## What to do"]
    start = lines.index("```text")
    messages = lines[start + 1 : lines.index("```", start)]
    assert messages
    for message in messages:
        assert message.endswith(f" [{name}: docs/errors/{slug}.md]")
    assert len([line for line in lines if line.startswith("- ")]) >= 2
