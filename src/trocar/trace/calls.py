"""Which rows and positions a forward pass computes: cached generation, left padding and expanded batches. Floor 2.

A position is a column of the (padded) input, counted from 0. The *prompt* is the first forward pass in a context, every later one that
starts without cached tokens, or what `generate` was called with; passes that continue a cache compute later columns and leave the
prompt as it is. A negative position counts back from the row's last attended column of the prompt, so -1 and "last" are the same.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache

from trocar.anatomy import Anatomy, Tower
from trocar.core.errors import InterventionError

Positions = str | int | Sequence[int] | Sequence[Sequence[int]] | None
Columns = tuple[int, ...] | tuple[tuple[int, ...], ...]
NAMED = ("last", "generated", "last+generated")
_BATCHED = ("input_ids", "inputs_embeds", "pixel_values", "hidden_states")


def normal_positions(positions: Any) -> str | Columns | None:
    """Positions in their one hashable form: None (all), a name of NAMED, a tuple of ints, or a tuple of such tuples (one per row)."""
    if positions is None or positions == "all":
        return None
    if isinstance(positions, str):
        if positions not in NAMED:
            raise InterventionError(f"positions='{positions}' has no meaning.", f"Use 'all', {', '.join(map(repr, NAMED))}, or integers.")
        return positions
    if isinstance(positions, torch.Tensor):
        positions = positions.tolist()
    if isinstance(positions, int):
        return (positions,)
    try:
        per_row = [isinstance(item, Sequence) or getattr(item, "ndim", 0) > 0 for item in positions]
        if any(per_row):
            return tuple(tuple(_index(value) for value in row) for row in positions)
        result = tuple(_index(value) for value in positions)
    except TypeError:
        raise InterventionError(f"positions={positions!r} are not integers.", "Give a list of integers, or one list per row.") from None
    if not result:
        raise InterventionError("positions is empty.", "Leave it out to act on every position.")
    return result


def _index(value: Any) -> int:
    return value.__index__() if hasattr(value, "__index__") else int(_fail(value))


def _fail(value: Any) -> Any:
    raise TypeError(value)


@dataclass
class Frame:
    """What one forward pass computes at one tower."""

    offset: int  # column of the first computed position
    length: int
    batch: int
    prompt: int  # columns of the prompt
    repeats: int  # forward rows per input row (beams, returned sequences)
    ends: list[int] | None  # last attended column of each row of the prompt; None: prompt - 1 for all

    @property
    def rows(self) -> int:
        return self.batch // self.repeats

    def end(self, row: int) -> int:
        return self.prompt - 1 if self.ends is None else self.ends[row]

    def column(self, row: int, position: int) -> int | None:
        """Index of `position` among the computed ones, or None if this pass does not compute it."""
        if position < 0:
            position += self.end(row) + 1
            if position < 0:
                return None
        index = position - self.offset
        return index if 0 <= index < self.length else None

    def columns(self, row: int, positions: str | tuple[int, ...]) -> list[tuple[int, int | str, int]]:
        """Computed (index, position as it was written, its number in the list) for one input row."""
        if isinstance(positions, str):
            last = self.column(row, -1) if positions != "generated" else None
            new = range(max(0, self.prompt - self.offset), self.length) if positions != "last" else ()
            return [(index, positions, 0) for index in (*(() if last is None else (last,)), *new)]
        found = ((self.column(row, position), position, number) for number, position in enumerate(positions))
        return [(index, position, number) for index, position, number in found if index is not None]


@dataclass
class Calls:
    """Follows the forward passes of one tower while a context is open. `attach` puts its hooks; `frame` tells what a pass computes."""

    anatomy: Anatomy
    tower: Tower
    offset: int = 0
    batch: int | None = None
    prompt: int | None = None
    input_rows: int | None = None
    mask: torch.Tensor | None = None
    generating: bool = False
    _ends: list[int] | None = None
    _ends_known: bool = False
    _handles: list[Any] = field(default_factory=list)

    def attach(self) -> None:
        for module in ancestors(self.anatomy, self.tower):
            self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))

    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = dict(zip(_parameters(type(module)), args, strict=False)) | kwargs
        cache = next((value for value in bound.values() if isinstance(value, Cache)), None)
        self.offset = int(cache.get_seq_length()) if cache is not None else 0
        first = next((bound[name] for name in _BATCHED if isinstance(bound.get(name), torch.Tensor)), None)
        if first is not None:
            self.batch = first.shape[0]
        if self.generating:
            return
        if self.offset == 0:
            self.prompt, self._ends_known = None, False
        mask = bound.get("attention_mask")
        if "attention_mask" in bound and (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)):
            self.mask = mask  # an inner module that was given a prepared four-dimensional mask says nothing new

    def frame(self, length: int, batch: int) -> Frame:
        """The current pass, seen from a module that computes `length` positions of `batch` rows."""
        if self.prompt is None:
            self.prompt = self.offset + length
            self.input_rows = batch
        if not self._ends_known:
            self._ends, self._ends_known = self._find_ends(), True
        repeats = 1
        if self.generating and self.input_rows:
            repeats = max(1, batch // self.input_rows)
        return Frame(self.offset, length, batch, self.prompt, repeats, self._ends)

    def _find_ends(self) -> list[int] | None:
        if self.generating or self.mask is None or self.prompt is None or self.mask.shape[1] < self.prompt:
            return None
        return row_ends(self.mask, self.prompt)

    def begin_generate(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A call of `generate` starts: its input is the prompt, however often the forward pass is run on it."""
        given = args[0] if args else next((kwargs[name] for name in ("inputs", "input_ids") if kwargs.get(name) is not None), None)
        if kwargs.get("inputs_embeds") is not None:
            given = kwargs["inputs_embeds"]
        self.generating, self._ends, self._ends_known = True, None, True
        self.prompt, self.input_rows = (1, 1) if given is None else (given.shape[1], given.shape[0])

    def end_generate(self) -> None:
        self.generating, self._ends_known, self.prompt = False, False, None


def row_ends(mask: torch.Tensor, length: int) -> list[int] | None:
    """Each row's last attended column, or None where it is the last column of every row (no padding, or padding on the left)."""
    attended = mask[:, :length] != 0
    if bool(attended[:, -1].all()):
        return None
    return (length - 1 - attended.flip(1).int().argmax(1)).tolist()


@contextmanager
def following(anatomy: Anatomy, towers: Sequence[Tower]) -> Iterator[dict[str, Calls]]:
    """Follow the passes of `towers`, and `generate` of the model, until the context closes."""
    calls = {tower.name: Calls(anatomy, tower) for tower in towers}
    model, restore = anatomy.model, lambda: None
    try:
        for call in calls.values():
            call.attach()
        if hasattr(model, "generate"):
            restore = override(model, "generate", functools.partial(_generate, list(calls.values()), model.generate))
        yield calls
    finally:
        restore()
        for call in calls.values():
            call.detach()


def _generate(calls: list[Calls], inner: Any, *args: Any, **kwargs: Any) -> Any:
    for call in calls:
        call.begin_generate(args, kwargs)
    try:
        return inner(*args, **kwargs)
    finally:
        for call in calls:
            call.end_generate()


def override(module: torch.nn.Module, name: str, value: Any) -> Any:
    """Set a method on the instance; returns the function that puts back what was there."""
    had, before = name in module.__dict__, module.__dict__.get(name)
    module.__dict__[name] = value

    def restore() -> None:
        if had:
            module.__dict__[name] = before
        else:
            module.__dict__.pop(name, None)

    return restore


def ancestors(anatomy: Anatomy, tower: Tower) -> list[torch.nn.Module]:
    """The modules that hold the tower's blocks and no other tower's, outermost first."""
    known: dict[str, list[torch.nn.Module]] = anatomy.__dict__.setdefault("_ancestors", {})
    if tower.name not in known:
        shared = {name for other in anatomy.towers.values() if other.name != tower.name for name in holders(other)}
        known[tower.name] = [anatomy.model.get_submodule(name) for name in holders(tower) if name not in shared]
    return known[tower.name]


def holders(tower: Tower) -> list[str]:
    """Names of the modules that hold the tower's blocks, outermost (the model, "") first."""
    parts = tower.path(0, "block").split(".")
    return [".".join(parts[:n]) for n in range(len(parts))]


@functools.lru_cache(maxsize=256)
def _parameters(kind: type[torch.nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]
