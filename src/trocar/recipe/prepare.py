"""Everything that can be known to be wrong before a model is loaded. Floor 6."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trocar.core.errors import ConfigError, nearest
from trocar.recipe.registry import get_method
from trocar.recipe.schema import Recipe

if TYPE_CHECKING:
    from trocar.core.config import Config
    from trocar.evaluate import Check
    from trocar.lab.texts import TextConfig
    from trocar.method import Method
    from trocar.recipe.data import RoleSource


@dataclass(frozen=True)
class Prepared:
    """A recipe whose every part has been validated by the room that will read it."""

    recipe: Recipe
    method: Method
    settings: Config
    data: Mapping[str, RoleSource | TextConfig]
    checks: Sequence[Check]

    @property
    def reads(self) -> str:
        """`pictures` or `texts`: what the roles hold; a method that reads either says so in its settings."""
        return reads(self.method, self.settings)

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain data; equal recipes give equal text."""
        base = self.recipe.base
        model = self.recipe.model.model_dump(mode="json") | {"source": absolute(self.recipe.model.source, base)}
        whole = {
            "version": self.recipe.version,
            "seed": self.recipe.seed,
            "model": model,
            "data": {
                role: source.model_dump(mode="json") | {"source": absolute(source.source, base)} for role, source in self.data.items()
            },
            "method": {"name": self.method.name, **self.settings.model_dump(mode="json")},
            "checks": [check.model_dump(mode="json") for check in self.checks],
        }
        return json.loads(json.dumps(whole))


def absolute(source: str, base: Path) -> str:
    """A relative path that leads somewhere from the recipe's folder, made absolute; names of models and sets stay as they are."""
    path = base / Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def prepare(recipe: Recipe) -> Prepared:
    """Import the method and validate settings, roles, data sources and checks. Raises ConfigError with the key's path."""
    from trocar.evaluate import parse_checks
    from trocar.lab.texts import TextConfig
    from trocar.recipe.data import RoleSource

    method = get_method(recipe.method.name)
    settings = method.config.parse(recipe.method.settings, "method")
    found = {name: tuple(absolute(path, recipe.base) for path in getattr(settings, name)) for name in method.paths}
    settings = settings.model_copy(update=found)
    check_roles(method.roles, recipe.data)
    kind = TextConfig if reads(method, settings) == "texts" else RoleSource
    data = {role: kind.parse(source, f"data.{role}") for role, source in recipe.data.items()}
    checks = parse_checks(method.default_checks if recipe.checks is None else recipe.checks)
    return Prepared(recipe, method, settings, data, checks)


def reads(method: Method, settings: Config) -> str:
    """What the rows of a method's roles are, `pictures` or `texts`; of a method that reads either, what its setting `reads` says."""
    return getattr(settings, "reads") if method.reads == "either" else method.reads  # noqa: B009 - a setting that such a method has


def check_roles(declared: Mapping[str, str], given: Mapping[str, Any]) -> None:
    """Compare a recipe's data roles with a method's. `name?` may be missing; `name*` may be missing or repeat as `name.anything`."""
    plain = {role.rstrip("?*"): role for role in declared}
    for role in given:
        stem = role if role in plain else role.partition(".")[0]
        if stem not in plain or (stem != role and "*" not in plain[stem]):
            raise ConfigError(f"data.{role} is not a role of this method.", nearest(role, plain))
    for stem, role in plain.items():
        if role == stem and stem not in given:
            raise ConfigError(
                f"data.{stem} is missing: {declared[role]}",
                f"Add it under data; `trocar new` shows how. Given: {', '.join(given) or 'nothing'}.",
            )
