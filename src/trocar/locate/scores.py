"""Scores: one number for every component of a kind, and how it was obtained. Floor 3; imports neither torch nor a model.

Values lie in one array per group of components that differ only in their last number, keyed by the name without that number:
`L3.mlp.up.out` holds `L3.mlp.up.out0`, `L3.mlp.up.out1`, ... So 350,000 neurons are a few dozen arrays. NaN means "not scored".
A mask is Scores whose values are all 0 or 1; masks combine as sets (`&`, `|`, `-`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trocar.core.config import Config
from trocar.core.errors import ConfigError, ScoresError, nearest
from trocar.core.files import atomic_path
from trocar.locate.names import INDEXED, KINDS, gather, place_of, rank_of, rest_of, split_name

if TYPE_CHECKING:
    from rich.table import Table

    from trocar.anatomy import Component

FORMAT, VERSION = "trocar-scores", 1


@dataclass(frozen=True)
class How:
    """Where scores come from: method, data (in words or a digest), settings (JSON), fingerprint of the model they describe."""

    method: str
    data: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "settings", json.loads(json.dumps(dict(self.settings), sort_keys=True)))
        except (TypeError, ValueError) as error:
            raise ScoresError(f"The settings of scores by '{self.method}' are not JSON: {error}.", "Use plain values.") from None

    def then(self, step: str, **settings: Any) -> How:
        """How a result derived from these scores was obtained."""
        return replace(self, method=f"{self.method} > {step}", settings={**self.settings, **settings})


class Matrix(NamedTuple):
    """Scores as a picture: row labels (`L3`, `L3.mlp.up.out`), column labels (indices or roles), values with NaN where there is nothing."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray  # (rows, columns) float64


class Scores:
    """One number per component of `kind` in `tower` (see the module's text). Immutable.

    values: either a mapping of components (or their names) to numbers, or group names (`L3.mlp.up.out`, `L5.H`, `L7`) to one-dimensional
    arrays or tensors (for kinds without a number at the end, single numbers). A NaN among given values is an error; components
    that are absent from a mapping are "not scored". partial: NaN in given arrays means "not scored" instead.
    Raises ScoresError for names that are not of the kind or tower, and for NaN.
    """

    def __init__(self, kind: str, tower: str, values: Mapping[Any, Any], how: How, partial: bool = False) -> None:
        if kind not in KINDS:
            raise ScoresError(f"'{kind}' is not a kind of component.", nearest(kind, KINDS))
        self.kind, self.tower, self.how = kind, tower, how
        groups, given = gather(kind, tower, values), {str(key) for key in values}
        for name, array in groups.items():
            if not partial and name in given and np.isnan(array).any():
                raise ScoresError(
                    f"{int(np.isnan(array).sum())} of {array.size} scores of {name} are NaN.", "Find out why the method made them."
                )
            array.setflags(write=False)
        self.groups: Mapping[str, np.ndarray] = {name: groups[name] for name in sorted(groups, key=place_of)}
        if not self.groups:
            raise ScoresError(f"There are no {kind} scores.", "Score at least one component.")

    # -- reading ------------------------------------------------------------------------------------------------------------------

    @cached_property
    def flat(self) -> np.ndarray:
        """All values in canonical order: by layer, then q, k, v, o, up, gate, down, then index. NaN where not scored."""
        flat = np.concatenate([np.asarray(array) for array in self.groups.values()])
        flat.setflags(write=False)
        return flat

    @cached_property
    def is_mask(self) -> bool:
        """All values are 0 or 1."""
        return self.flat.dtype == bool or bool(np.isin(self.flat, (0, 1)).all())

    def __len__(self) -> int:
        """How many components are scored."""
        return self.flat.size if self.flat.dtype == bool else int((~np.isnan(self.flat)).sum())

    def __getitem__(self, component: Component | str) -> float:
        name = str(component)
        group, index = split_name(self.kind, self.tower, name)
        array = self.groups.get(group)
        if array is None or index >= array.size or math.isnan(array[index]):
            raise ScoresError(
                f"There is no score of {name}.", f"Scored: {len(self)} of kind {self.kind}, in {', '.join(list(self.groups)[:4])} ..."
            )
        return float(array[index])

    def name_at(self, place: int) -> str:
        """The name of the component at a place of `flat`."""
        row = int(np.searchsorted(self._ends, place, side="right"))
        group = list(self.groups)[row]
        return f"{group}{place - (self._ends[row - 1] if row else 0)}" if self.kind in INDEXED else group

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([array.size for array in self.groups.values()])

    @cached_property
    def _ranked(self) -> np.ndarray:
        """Places of the scored components, highest first, ties by lower place."""
        values = self.flat.astype(np.float64)
        order = np.argsort(-values, kind="stable")  # NaN sorts last
        return order[: len(self)]

    def ranked(self, limit: int | None = None) -> list[tuple[str, float]]:
        """Names and values, highest first, ties by lower index."""
        return [(self.name_at(place), float(self.flat[place])) for place in self._ranked[:limit].tolist()]

    def sorted(self, limit: int | None = None) -> list[tuple[Component, float]]:
        """Components and values, highest first, ties by lower index."""
        from trocar.anatomy import parse

        return [(parse(name), value) for name, value in self.ranked(limit)]

    def open_names(self) -> list[str]:
        """The names of a mask's chosen components, in canonical order."""
        self.need_mask("open_names")
        return [self.name_at(place) for place in np.flatnonzero(self.flat == 1).tolist()]

    def components(self) -> list[Component]:
        """A mask's chosen components; of other scores, all that are scored. Canonical order."""
        from trocar.anatomy import parse

        places = np.flatnonzero(self.flat == 1) if self.is_mask else np.flatnonzero(~np.isnan(self.flat))
        return [parse(self.name_at(place)) for place in places.tolist()]

    def count(self) -> int:
        """How many components a mask chooses."""
        self.need_mask("count")
        return int((self.flat == 1).sum())

    def matrix(self) -> Matrix:
        """Layers (for channels: layer, matrix and side) by index (for linears: by role), for a heat map."""
        if self.kind in INDEXED:
            width = max(array.size for array in self.groups.values())
            values = np.full((len(self.groups), width), np.nan)
            for row, array in enumerate(self.groups.values()):
                values[row, : array.size] = array
            return Matrix(tuple(self.groups), tuple(str(index) for index in range(width)), values)
        cells = {(name.removesuffix(f".{rest_of(name)}"), rest_of(name)): float(array[0]) for name, array in self.groups.items()}
        rows = tuple(dict.fromkeys(row for row, _ in cells))
        columns = tuple(sorted({column for _, column in cells}, key=rank_of))
        return Matrix(rows, columns, np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows]))

    def rows(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Rows for a CSV: component, score and rank (1 = highest), highest first."""
        return [{"component": name, "score": value, "rank": rank} for rank, (name, value) in enumerate(self.ranked(limit), 1)]

    def table(self, limit: int = 20) -> Table:
        """The highest scores as a table for the terminal (rich)."""
        from rich.table import Table

        table = Table(title=f"{self.how.method}: {len(self):,} {self.kind} scores" + (f", {self.count():,} chosen" if self.is_mask else ""))
        for column, side in (("rank", "right"), ("component", "left"), ("score", "right")):
            table.add_column(column, justify=side)  # type: ignore[arg-type]
        for row in self.rows(limit):
            table.add_row(str(row["rank"]), row["component"], f"{row['score']:.4g}")
        return table

    # -- deriving -----------------------------------------------------------------------------------------------------------------

    def top(self, k: int | float) -> Scores:
        """The mask of the highest: an int asks for exactly that many, a float in (0, 1] for max(1, round(k * scored)). Ties by lower index.

        Masks of one set of scores are nested: a smaller k chooses a subset. Raises ScoresError outside the range.
        """
        n = len(self)
        if isinstance(k, bool) or not isinstance(k, int | float | np.integer | np.floating):
            raise ScoresError(f"top() takes a number of components or a fraction, not {k!r}.", "Say 32 or 0.05.")
        count = int(k) if isinstance(k, int | np.integer) else max(1, round(float(k) * n)) if 0 < k <= 1 else 0
        if not 1 <= count <= n:
            raise ScoresError(f"top({k}) is outside the range of {n} scores.", f"Say a whole number in 1..{n} or a fraction in (0, 1].")
        chosen = np.zeros(self.flat.size, bool)
        chosen[self._ranked[:count]] = True
        return self._like(chosen, self.how.then("top", k=k if isinstance(k, int | float) else k.item()))

    def threshold(self, x: float) -> Scores:
        """The mask of components whose score is at least `x`."""
        return self._like(np.nan_to_num(self.flat.astype(np.float64), nan=-np.inf) >= x, self.how.then("threshold", x=float(x)))

    def __and__(self, other: Scores) -> Scores:
        return self._sets(other, np.logical_and, "&")

    def __or__(self, other: Scores) -> Scores:
        return self._sets(other, np.logical_or, "|")

    def __sub__(self, other: Scores) -> Scores:
        """Of two masks the set difference, of two scores the difference of values."""
        if isinstance(other, Scores) and self.is_mask and other.is_mask:
            return self._sets(other, lambda a, b: a & ~b, "-")
        mine, theirs = aligned(self, other, "-")
        return self._with({name: mine[name].astype(np.float64) - theirs[name] for name in mine}, _joint(self.how, other.how, "-"))

    def _sets(self, other: Scores, operation: Callable[[np.ndarray, np.ndarray], np.ndarray], sign: str) -> Scores:
        mine, theirs = aligned(self, other, sign)
        self.need_mask(sign)
        other.need_mask(sign)
        return self._with({name: operation(mine[name] == 1, theirs[name] == 1) for name in mine}, _joint(self.how, other.how, sign))

    def with_how(self, how: How) -> Scores:
        """The same values, said to be obtained otherwise (for example to compare the same components of two models on purpose)."""
        return self._with(dict(self.groups), how)

    def need_mask(self, what: str) -> None:
        if not self.is_mask:
            raise ScoresError(
                f"'{what}' needs masks, and these {self.kind} scores are not 0 or 1.", "Make a mask first: top(0.05) or threshold(x)."
            )

    def _like(self, flat: np.ndarray, how: How) -> Scores:
        return self._with(dict(zip(self.groups, np.split(flat, self._ends[:-1]), strict=True)), how)

    def _with(self, groups: dict[str, np.ndarray], how: How) -> Scores:
        return Scores(self.kind, self.tower, groups, how, partial=True)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Scores)
            and (self.kind, self.tower, self.how, list(self.groups)) == (other.kind, other.tower, other.how, list(other.groups))
            and all(
                np.array_equal(a, b, equal_nan=a.dtype != bool) for a, b in zip(self.groups.values(), other.groups.values(), strict=True)
            )
        )

    __hash__ = None  # type: ignore[assignment]  # equal by value, and values are arrays

    def __repr__(self) -> str:
        where = f" of {self.tower}" if self.tower else ""
        chosen = f", {self.count()} chosen" if self.is_mask else ""
        return f"<Scores: {len(self)} {self.kind}{where} in {len(self.groups)} groups{chosen}, by {self.how.method}>"

    # -- files --------------------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file (arrays by group, a JSON header), atomically; equal scores give equal bytes."""
        from safetensors.numpy import save

        partial = self.flat.dtype != bool and bool(np.isnan(self.flat).any())
        how = {"method": self.how.method, "data": self.how.data, "settings": self.how.settings, "fingerprint": self.how.fingerprint}
        header = {"format": FORMAT, "version": VERSION, "kind": self.kind, "tower": self.tower, "partial": partial, "how": how}
        content = save(
            {name: np.ascontiguousarray(array) for name, array in self.groups.items()}, {"trocar": json.dumps(header, sort_keys=True)}
        )
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote. Never executes anything; whatever is not a scores file raises ScoresError."""
        from safetensors import SafetensorError, safe_open

        again = "Make the scores again."
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("trocar", "null"))
                if not isinstance(header, dict) or header.get("format") != FORMAT:
                    raise ScoresError(f"{path} is a safetensors file, but not of scores.", "Name a file written by Scores.save.")
                if header.get("version") != VERSION:
                    raise ScoresError(
                        f"{path} is of scores format {header.get('version')!r}; this Trocar reads {VERSION}.", "Update Trocar."
                    )
                arrays = {}
                for name in file.keys():  # noqa: SIM118 - not a dict
                    part = file.get_slice(name)
                    if part.get_dtype() not in ("F32", "F64", "BOOL") or len(part.get_shape()) != 1:
                        raise ScoresError(f"{path}: '{name}' is {part.get_dtype()} of shape {part.get_shape()}, no list of scores.", again)
                    arrays[name] = file.get_tensor(name)
        except FileNotFoundError:
            raise ScoresError(f"There is no file {path}.", "Check the path.") from None
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise ScoresError(f"{path} is not a readable scores file: {error}.", again) from None
        try:
            told = _Header.parse(header, "header")
            return cls(told.kind, told.tower, arrays, How(**told.how.model_dump()), partial=told.partial)
        except (ScoresError, ConfigError) as error:
            raise ScoresError(f"{path} does not hold valid scores: {error.what}", again) from None


class _HeaderHow(Config):
    method: str
    data: str
    settings: dict[str, Any]
    fingerprint: str


class _Header(Config):
    format: str
    version: int
    kind: str
    tower: str
    partial: bool
    how: _HeaderHow


def iou(a: Scores, b: Scores, across_models: bool = False) -> float:
    """Intersection over union of two masks; 1 if both are empty. across_models: the same components of two models may be compared."""
    if across_models:
        b = b.with_how(replace(b.how, fingerprint=a.how.fingerprint))
    union = (a | b).count()
    return (a & b).count() / union if union else 1.0


def mean(scores: Sequence[Scores]) -> Scores:
    """The mean of several scores of the same components (for example over images). A component that one of them lacks is not scored."""
    if not scores:
        raise ScoresError("There is no mean of no scores.", "Give at least one.")
    first, total = scores[0], {name: array.astype(np.float64) for name, array in scores[0].groups.items()}
    for other in scores[1:]:
        mine, theirs = aligned(first._with(total, first.how), other, "mean")
        total = {name: mine[name] + theirs[name] for name in mine}
    return first._with({name: array / len(scores) for name, array in total.items()}, first.how.then("mean", over=len(scores)))


def _joint(a: How, b: How, sign: str) -> How:
    """How a combination was obtained; both sources are told in full."""
    parts = [{"method": how.method, "data": how.data, "settings": how.settings} for how in (a, b)]
    return How(f"({a.method}) {sign} ({b.method})", a.data if a.data == b.data else "", {"of": parts}, a.fingerprint)


def aligned(a: Scores, b: Any, sign: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The groups of both over the union of their components; refuses other kinds, towers and models."""
    if not isinstance(b, Scores):
        raise ScoresError(f"'{sign}' combines scores with scores, not with {type(b).__name__}.", "Make Scores of it first.")
    if (a.kind, a.tower) != (b.kind, b.tower):
        raise ScoresError(f"'{sign}': one side scores {_what(a)}, the other {_what(b)}.", "Combine scores of one kind and tower.")
    if a.how.fingerprint != b.how.fingerprint:
        raise ScoresError(
            f"'{sign}': the two sides describe different models ({a.how.fingerprint or 'unknown'}, {b.how.fingerprint or 'unknown'}).",
            "Score the same model, or say with_how(...) to compare across models on purpose.",
        )
    sizes = {name: max(s.groups[name].size for s in (a, b) if name in s.groups) for name in (*a.groups, *b.groups)}
    return _padded(a, sizes), _padded(b, sizes)


def _padded(scores: Scores, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    absent: Any = False if scores.flat.dtype == bool else np.nan
    result = {}
    for name, size in sizes.items():
        array = scores.groups.get(name, np.empty(0, scores.flat.dtype))
        result[name] = np.concatenate([array, np.full(size - array.size, absent, array.dtype)]) if array.size < size else array
    return result


def _what(scores: Scores) -> str:
    return f"{scores.kind}s" + (f" of '{scores.tower}'" if scores.tower else "")
