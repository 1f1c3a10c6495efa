"""Every recipe that we hand out can be run: it parses, and its settings, roles, sources and checks are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from trocar.cli.run import DEMO
from trocar.recipe import get_method, load_recipe, parse_recipe
from trocar.recipe.prepare import prepare
from trocar.recipe.registry import METHODS
from trocar.recipe.strict_yaml import parse_yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", [DEMO, *RECIPES], ids=lambda path: path.stem)
def test_recipes_of_the_repository(path: Path) -> None:
    prepared = prepare(load_recipe(path))
    assert prepared.checks
    assert prepare(parse_recipe(prepared.resolved())).resolved() == prepared.resolved()


@pytest.mark.parametrize("name", METHODS)
def test_starters_of_the_methods(name: str) -> None:
    method = get_method(name)
    assert method.name == name
    assert method.summary == METHODS[name].summary  # what `trocar methods` says without importing it
    assert prepare(parse_recipe(parse_yaml(method.starter, name))).method is method
    assert "#" in method.starter
    assert method.roles
    assert method.config.model_config["extra"] == "forbid"
