"""Every error class has a page and every page a class; the pages show messages in the form that users see."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from trocar.core import errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "errors"
CLASSES = {value.slug(): value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.TrocarError)}


def test_classes_and_pages_match() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} - {"index"} == set(CLASSES)


def test_the_index_links_every_page_once() -> None:
    text = (PAGES / "index.md").read_text()
    assert {slug: text.count(f"]({slug}.md)") for slug in CLASSES} == dict.fromkeys(CLASSES, 1)


def messages(slug: str) -> list[str]:
    lines = (PAGES / f"{slug}.md").read_text().splitlines()
    start = lines.index("```text")
    return lines[start + 1 : lines.index("```", start)]


@pytest.mark.parametrize("slug", sorted(CLASSES))
def test_page_says_what_it_means_shows_a_message_and_what_to_do(slug: str) -> None:
    lines = (PAGES / f"{slug}.md").read_text().splitlines()
    name = CLASSES[slug].__name__
    assert lines[0] == f"# {name}"
    assert [line for line in lines if line.startswith("## ")][:2] == ["## Typical message", "## What to do"]
    assert messages(slug)
    for message in messages(slug):
        assert message.endswith(f" [{name}: docs/errors/{slug}.md]")
    assert len([line for line in lines if line.startswith("- ")]) >= 2


def pattern(argument: ast.expr) -> str:
    """What the source can print for one argument of an error, as a regular expression."""
    if isinstance(argument, ast.Constant):
        return re.escape(str(argument.value))
    if isinstance(argument, ast.JoinedStr):
        return "".join(pattern(part) if isinstance(part, ast.Constant) else ".+" for part in argument.values)
    if isinstance(argument, ast.BinOp) and isinstance(argument.op, ast.Add):
        return pattern(argument.left) + pattern(argument.right)
    if isinstance(argument, ast.IfExp):
        return f"(?:{pattern(argument.body)}|{pattern(argument.orelse)})"
    return ".*"


def raised() -> dict[str, list[str]]:
    """Regular expressions of every message in the source, by class; messages without a word of their own are left out."""
    found: dict[str, list[str]] = {}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                name, parts = node.func.id, node.args
            elif (
                isinstance(node, ast.Return)
                and isinstance(node.value, ast.Tuple)
                and path.name == "config.py"
                and path.parent.name == "core"
            ):
                name, parts = "ConfigError", node.value.elts  # what was wrong and the hint, raised by the caller
            else:
                continue
            whole = " ?".join(pattern(part) for part in parts)
            if len(re.sub(r"\.[*+]|\\", "", whole)) > 12:
                found.setdefault(name, []).append(whole)
    return found


@pytest.mark.parametrize("slug", sorted(set(CLASSES) - {"trocar"}))
def test_messages_on_the_pages_are_messages_of_the_source(slug: str) -> None:
    name = CLASSES[slug].__name__
    known = raised().get(name, [])
    assert known, f"nothing raises {name}"
    for message in messages(slug):
        text = message.removesuffix(f" [{name}: docs/errors/{slug}.md]")
        assert any(re.fullmatch(expression, text) for expression in known), text
