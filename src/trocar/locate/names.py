"""Names of scored components as groups and places: which group a name belongs to, which order the groups have. Floor 3."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from trocar.core.errors import ScoresError

# kind -> what follows `L<layer>` in a component's name; the kinds of INDEXED end in a number, which is the place in the group's array
KINDS: dict[str, str] = {
    "block": r"",
    "attention": r"\.attn",
    "mlp": r"\.mlp",
    "head": r"\.H",
    "neuron": r"\.N",
    "linear": r"\.(?:attn\.(?:q|k|v|o)|mlp\.(?:up|gate|down))",
    "channel": r"\.(?:attn\.(?:q|k|v|o)|mlp\.(?:up|gate|down))\.(?:out|in)",
}
INDEXED = frozenset({"head", "neuron", "channel"})
ORDER = ("", "attn", "attn.q", "attn.k", "attn.v", "attn.o", "H", "mlp", "mlp.up", "mlp.gate", "mlp.down", "N")
_NAME = re.compile(r"(?:(?P<tower>[A-Za-z_]\w*)\.)?L(?P<layer>\d+)(?P<rest>(?:\.(?:[a-z]+|H|N))*)(?P<index>\d*)")


def split_name(kind: str, tower: str, name: str) -> tuple[str, int]:
    """A component's name as group and place in it."""
    index = re.search(r"\d+$", name) if kind in INDEXED else None
    if kind in INDEXED and index is None:
        raise ScoresError(f"'{name}' has no number at its end, which every {kind} has.", "Name one component.")
    group = name[: index.start()] if index else name
    check_group(kind, tower, group)
    if index and len(index.group()) > 7:
        raise ScoresError(f"'{name}' has an index beyond every model.", "Check where it comes from.")
    return group, int(index.group()) if index else 0


def check_group(kind: str, tower: str, group: str) -> None:
    prefix = re.escape(f"{tower}.") if tower else ""
    if not re.fullmatch(rf"{prefix}L\d{{1,6}}{KINDS[kind]}", group):
        where = f" of tower '{tower}'" if tower else ""
        raise ScoresError(f"'{group}' does not name {kind}s{where}.", f"Scores of one kind look like {_example(kind, tower)}.")


def _example(kind: str, tower: str) -> str:
    shown = {"block": "", "attention": ".attn", "mlp": ".mlp", "head": ".H0", "neuron": ".N17", "linear": ".mlp.up"}
    name = "L3" + shown.get(kind, ".mlp.up.out17")
    return f"'{tower}.{name}'" if tower else f"'{name}'"


def rest_of(group: str) -> str:
    found = _NAME.fullmatch(group)
    return found["rest"].lstrip(".") if found else ""


def rank_of(rest: str) -> tuple[int, str]:
    base = re.sub(r"\.?(out|in)$", "", rest)
    return (ORDER.index(base) if base in ORDER else len(ORDER), "" if rest.endswith("out") else rest)  # outputs before inputs


def layer_of(group: str) -> int:
    found = _NAME.fullmatch(group)
    return int(found["layer"]) if found else 0


def place_of(group: str) -> tuple[int, tuple[int, str]]:
    return (layer_of(group), rank_of(rest_of(group)))


def gather(kind: str, tower: str, values: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    groups: dict[str, np.ndarray] = {}
    single: dict[str, dict[int, float]] = {}
    for key, value in values.items():
        name = str(key)
        if kind in INDEXED and not name[-1:].isdigit():
            check_group(kind, tower, name)
            groups[name] = _array(name, value)
            continue
        group, index = split_name(kind, tower, name)
        number = _array(name, value if np.ndim(value) else [value if isinstance(value, bool) else float(value)])
        if number.size != 1 or (number.dtype != bool and math.isnan(number[0]) and kind in INDEXED):
            raise ScoresError(f"The score of {name} must be one number, not {value!r}.", "Give a float.")
        if kind in INDEXED:
            single.setdefault(group, {})[index] = float(number[0])
        else:
            groups[group] = number
    for group, entries in single.items():
        if group in groups:
            raise ScoresError(f"{group} is given both as an array and one by one.", "Give it once.")
        array = np.full(max(entries) + 1, np.nan)
        array[list(entries)] = list(entries.values())
        groups[group] = array
    if len({array.dtype == bool for array in groups.values()}) > 1:  # one dtype family, so that `flat` says what was given
        groups = {name: array.astype(np.float64) for name, array in groups.items()}
    return groups


def _array(name: str, value: Any) -> np.ndarray:
    """A one-dimensional bool, float32 or float64 array of our own; tensors of any device and dtype are accepted."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy()
    array = np.array(value)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "biuf":
        raise ScoresError(
            f"The scores of {name} must be a list of numbers, not {array.dtype} of shape {array.shape}.", "Give one number a component."
        )
    return array if array.dtype in (bool, np.float32, np.float64) else array.astype(np.float64)
