"""Modules by the part of the model that they belong to: block, module, role, tower, or groups of one's own. Floor 1.

What is switched, removed or valued together is a group of modules. Where the family is known the groups have components' names (`L3`,
`vision.L0`, `L3.attn.q`); for other models the first number in a module's dotted name is its block.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trocar.anatomy.components import LINEARS, Linear
from trocar.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from trocar.anatomy.resolve import Anatomy, Tower

By = str | Mapping[str, str | Sequence[str]]
WAYS = ("block", "module", "role", "tower")


def module_groups(names: Iterable[str], by: By = "block", anatomy: Anatomy | None = None) -> dict[str, list[str]]:
    """Group modules by their dotted names. Every module is in exactly one group; groups are in the order of the blocks.

    by: `block` (all modules of a block together), `module` (each alone), `role` (all q of all blocks), `tower`, or a mapping from a group's
    name to one or more patterns of module names (`*.3.self_attn.*`). anatomy: of the model, if its family is known. A module outside the
    blocks (an output layer) is a group of its own.
    Raises ConfigError for another `by`, for patterns that match nothing or a module twice, and for modules that no pattern matches.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise ConfigError("There are no modules to group.", "Put adapters on the model first.")
    if not isinstance(by, str):
        return _by_patterns(names, by)
    if by not in WAYS:
        raise ConfigError(f"'{by}' is no way to group modules.", f"{nearest(by, WAYS)} Or give patterns, group by group.")
    places = _known(names, anatomy) if anatomy is not None else _guessed(names)
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda one: (*places[one].order, names.index(one))):
        found.setdefault(places[name].label(by, name), []).append(name)
    return found


@dataclass(frozen=True)
class _Place:
    """Where a module is. layer: None outside of the blocks; role: its own name where the family has none for it."""

    tower: str
    layer: int | None
    role: str
    order: tuple[int, int, int]

    def label(self, by: str, name: str) -> str:
        if by == "tower":
            return self.tower or "model"
        if by == "role":
            return self.role
        if self.layer is None:
            return name
        if by == "block":
            return f"{self.tower}.L{self.layer}" if self.tower else f"L{self.layer}"
        return str(Linear(self.layer, self.role, self.tower)) if self.role in LINEARS else name


def _known(names: Sequence[str], anatomy: Anatomy) -> dict[str, _Place]:
    towers = list(anatomy.towers.values())
    roles = {
        tower.path(layer, role): role
        for tower in towers
        for layer in range(tower.n_layers)
        for role in tower.roles(layer)
        if role != "block"
    }
    return {name: _place(name, towers, roles) for name in names}


def _place(name: str, towers: Sequence[Tower], roles: Mapping[str, str]) -> _Place:
    role = roles.get(name, name.rpartition(".")[2])
    rank = LINEARS.index(role) if role in LINEARS else len(LINEARS)
    for number, tower in enumerate(towers):
        rest = name.removeprefix(f"{tower.blocks_path}.")
        if rest != name and rest.split(".")[0].isdigit():
            layer = int(rest.split(".")[0])
            return _Place(tower.name, layer, role, (number, layer, rank))
    owner = next((tower.name for tower in towers if tower.name and name.startswith(tower.root_path)), "")
    return _Place(owner, None, role, (len(towers), 0, rank))


def _guessed(names: Sequence[str]) -> dict[str, _Place]:
    """Without a family: the first number in a name is the block; several lists of blocks are towers named after their first part."""
    cut = {}
    for name in names:
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        cut[name] = None if number is None else (".".join(parts[:number]), int(parts[number]))
    lists = list(dict.fromkeys(found[0] for found in cut.values() if found))
    short = {path: path.split(".")[0].removesuffix("_model") for path in lists}
    if len(set(short.values())) < len(lists):
        short = {path: f"tower{number}" for number, path in enumerate(lists)}
    places = {}
    for name, found in cut.items():
        role = name.rpartition(".")[2]
        if found is None:
            places[name] = _Place("", None, role, (len(lists), 0, 0))
        else:
            places[name] = _Place(short[found[0]] if len(lists) > 1 else "", found[1], role, (lists.index(found[0]), found[1], 0))
    return places


def _by_patterns(names: Sequence[str], by: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for group, patterns in by.items():
        wanted = [patterns] if isinstance(patterns, str) else list(patterns)
        mine = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)]
        if not mine:
            raise ConfigError(f"The group '{group}' ({', '.join(wanted)}) matches no module.", _shown(names))
        for name in mine:
            if name in owner:
                raise ConfigError(f"{name} is in the groups '{owner[name]}' and '{group}'.", "Make the patterns exclusive.")
            owner[name] = group
        found[group] = mine
    if left := [name for name in names if name not in owner]:
        raise ConfigError(f"{left[0]} and {len(left) - 1} more modules are in no group.", _shown(names))
    return found


def _shown(names: Sequence[str]) -> str:
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    blocks = next(iter(_guessed(names).values()))
    pattern = f"*.{blocks.layer}.*" if blocks.layer is not None else "*"
    return f"The modules are {listed}; a pattern is for example '{pattern}'."
