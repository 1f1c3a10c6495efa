"""Carry out interventions while a model runs. Floor 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from trocar.anatomy import Anatomy
from trocar.core.errors import InterventionError
from trocar.trace.calls import Calls, Frame, following
from trocar.trace.interventions import Add, Intervention, Replace, Scale
from trocar.trace.points import ATTACHED, Point, Site, features, locate_site
from trocar.trace.shortcut import skipped


@contextmanager
def intervene(model: Any, interventions: Intervention | Sequence[Intervention]) -> Iterator[None]:
    """Let the interventions act on every forward pass (and `generate`) of `model` inside the context.

    model: a transformers model or its `Anatomy`. Several interventions at one point act in the order given; contexts may be nested, the
    inner one acts after the outer one. Every hook is removed on every way out.

    Raises ComponentError if the model has no such place, and InterventionError for a value of the wrong shape, dtype or device, for two
    `Replace` of the same entries, and on leaving the context if an intervention (or one of its integer positions) never came into effect.
    """
    items = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    with acting(anatomy, [(locate_site(anatomy, item.where), item) for item in items]):
        yield


@contextmanager
def acting(anatomy: Anatomy, items: Sequence[tuple[Site, Intervention]]) -> Iterator[None]:
    """`intervene` for interventions whose sites are known."""
    actions = [_Action(site, item) for site, item in items]
    towers = [anatomy.tower(name) for name in dict.fromkeys(site.point.tower for site, _ in items)]
    with ExitStack() as stack:
        calls = stack.enter_context(following(anatomy, towers))
        for point in dict.fromkeys(action.site.point for action in actions):
            here = [action for action in actions if action.site.point == point]
            stack.callback(_attach(anatomy, point, _Group(anatomy, point, here, calls[point.tower])).remove)
        yield
    for action in actions:
        action.check_fired()


@dataclass(eq=False)
class _Action:
    """An intervention at work, and which of its positions came into effect."""

    site: Site
    item: Intervention
    fired: set[Any] = field(default_factory=set)
    reach: int = 0  # columns seen

    def check_fired(self) -> None:
        positions = self.item.positions
        if not self.fired:
            seen = f"the passes inside the context reached {self.reach} positions." if self.reach else "no forward pass reached it."
            raise InterventionError(f"{self.item} never came into effect: {seen}", _hint(self))
        if not isinstance(positions, tuple):
            return
        rows = positions if self.item.per_row else (positions,)
        for number, row in enumerate(rows):
            for position in row:  # type: ignore[union-attr]
                if (number, position) not in self.fired:
                    which = f"position {position}" + (f" of its row {number}" if self.item.per_row else "")
                    raise InterventionError(
                        f"{self.item} never came into effect at {which}; {self.reach} positions were reached.", _hint(self)
                    )


def _hint(action: _Action) -> str:
    if not action.reach:
        return "Run the model inside the context; a compiled model does not see it, and a prefix skips the blocks below its layer."
    return "Positions count columns of the padded input; 'generated' ones need a call of generate inside the context."


@dataclass(eq=False)
class _Group:
    """All actions at one point, as the hook of one module."""

    anatomy: Anatomy
    point: Point
    actions: list[_Action]
    calls: Calls

    def __call__(self, flat: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """`flat`: what flows here, (batch, length, size), or (batch * length, size) in blocks that flatten; `before`: a block's input."""
        tower = self.anatomy.tower(self.point.tower)
        batch = flat.shape[0] if flat.ndim == 3 else (self.calls.batch or 1)
        shape = (batch, flat.shape[1] if flat.ndim == 3 else flat.shape[0] // batch, *features(tower, self.point, flat.shape[-1]))
        current, old = flat.reshape(shape), None if before is None else before.reshape(shape)
        frame = self.calls.frame(shape[1], batch)
        written: torch.Tensor | None = None
        changed = owned = False  # owned: `current` is our own copy, which may be written in place
        for action in self.actions:
            action.reach = max(action.reach, frame.offset + frame.length)
            chosen = _choose(action, frame)
            if chosen is None:
                continue
            rows, columns, value_rows, value_columns = chosen
            value = _value(action, current, frame, value_rows, value_columns, rows is None)
            key: tuple[Any, ...] = () if rows is None else (_tensor(rows, flat), *(() if columns is None else (_tensor(columns, flat),)))
            if action.site.index is not None:
                key = (*(key or (slice(None), slice(None))), *((slice(None),) if len(key) == 1 else ()), action.site.index)
            if sum(isinstance(other.item, Replace) for other in self.actions) > 1 and isinstance(action.item, Replace):
                written = _claim(action, written, current, key)
            if not key:
                current, changed, owned = _apply(action, current, old, value), True, False
                continue
            if not owned:
                current, changed, owned = current.clone(), True, True
            part = current[key]
            if rows is None:
                part = part.clone()  # a view, whose values autograd may need after the write below
            current[key] = _apply(action, part, None if old is None else old[key], value)
        return current.reshape(flat.shape) if changed else flat


def _apply(action: _Action, current: torch.Tensor, old: torch.Tensor | None, value: Any) -> torch.Tensor:
    item = action.item
    if not action.site.delta or isinstance(item, Add):
        return item.change(current, value)
    assert old is not None
    if isinstance(item, Scale):
        # exact at both ends: a factor of 0 gives the block's input, a factor of 1 its output
        weight = value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=current.dtype, device=current.device)
        return torch.lerp(old, current, weight.expand_as(current))
    return old + value


def _choose(action: _Action, frame: Frame) -> tuple[list[int] | None, list[int] | None, list[int], list[int] | None] | None:
    """Which entries of this pass an action changes: (rows, columns, value rows, value columns); rows None means all, and None nothing."""
    item = action.item
    rows = range(frame.rows) if item.rows is None else item.rows
    if item.rows is not None and max(item.rows) >= frame.rows:
        raise InterventionError(f"{item} acts on row {max(item.rows)}, but the pass has {frame.rows} rows.", "Rows count from 0.")
    if item.per_row and len(item.positions) != len(rows):  # type: ignore[arg-type]
        raise InterventionError(f"{item} has {len(item.positions)} lists of positions for {len(rows)} rows.")  # type: ignore[arg-type]
    copies = range(frame.repeats)
    if item.positions is None:
        action.fired.add(None)
        if item.rows is None:
            return None, None, [number for number in range(frame.rows) for _ in copies], None
        return ([row * frame.repeats + copy for row in rows for copy in copies], None, [n for n in range(len(rows)) for _ in copies], None)
    chosen: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
    for number, row in enumerate(rows):
        positions = item.row_positions(number)
        for column, position, place in frame.columns(row, positions):  # type: ignore[arg-type]
            action.fired.add((number if item.per_row else 0, position))
            for copy in copies:
                for values, entry in zip(chosen, (row * frame.repeats + copy, column, number, place), strict=True):
                    values.append(entry)
    return chosen if chosen[0] else None


def _value(action: _Action, current: torch.Tensor, frame: Frame, rows: list[int], columns: list[int] | None, everything: bool) -> Any:
    """The value, shaped to fit the chosen entries: (rows, length, features) without columns, (entries, features) with."""
    item, value = action.item, action.item.value
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype != current.dtype or value.device != current.device:
        here = f"{current.dtype} on {current.device}".replace("torch.", "")
        raise InterventionError(
            f"The value of {item} is {value.dtype} on {value.device}, the activations are {here}.".replace("torch.", ""),
            "Convert it with .to(dtype=..., device=...).",
        )
    shape = tuple(current.shape[2:]) if action.site.index is None else tuple(current.shape[3:])
    lead = value.ndim - len(shape)
    n_rows = frame.rows if item.rows is None else len(item.rows)
    fits = 0 <= lead <= 2 and all(have in (1, want) for have, want in zip(value.shape[lead:], shape, strict=False))
    fits = fits and (lead < 1 or value.shape[0] in (1, n_rows))
    n_columns = _n_positions(item, frame)
    fits = fits and (lead < 2 or value.shape[1] in (1, n_columns) or (item.positions is None and value.shape[1] >= n_columns))
    if not fits:
        wanted = f"({', '.join(map(str, shape))})"
        raise InterventionError(
            f"The value of {item} has shape {tuple(value.shape)}, but one position there has shape {wanted}.",
            f"Give {wanted}, optionally with the {n_rows} rows before it, and the {n_columns} positions between them.",
        )
    if lead == 0:
        return value
    picked = value if everything and frame.repeats == 1 else value[_tensor([0] * len(rows) if value.shape[0] == 1 else rows, value)]
    if lead == 1:
        return picked.unsqueeze(1) if columns is None else picked
    if value.shape[1] == 1:
        return picked if columns is None else picked[:, 0]
    if columns is None:
        return picked[:, frame.offset : frame.offset + frame.length]
    return picked[torch.arange(len(rows), device=value.device), _tensor(columns, value)]


def _n_positions(item: Intervention, frame: Frame) -> int:
    if item.positions is None:
        return frame.offset + frame.length
    if isinstance(item.positions, str):
        return 1
    return max(len(row) for row in item.positions) if item.per_row else len(item.positions)  # type: ignore[arg-type]


def _claim(action: _Action, written: torch.Tensor | None, current: torch.Tensor, key: tuple[Any, ...]) -> torch.Tensor:
    """Note which entries a `Replace` writes; two that write the same contradict each other."""
    if written is None:
        written = torch.zeros(current.shape[:3] if current.ndim == 4 else current.shape, dtype=torch.bool, device=current.device)
    if bool(written[key].any()):
        raise InterventionError(f"{action.item} replaces what another Replace has put there.", "Keep one of them, or use Add.")
    written[key] = True
    return written


def _tensor(indices: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.long, device=like.device)


def _attach(anatomy: Anatomy, point: Point, group: Any) -> Any:
    """Put `group(activations, block input)` on the point's module; it may return other activations."""
    role, side = ATTACHED[point.kind]
    module = Site(point).module(anatomy)

    def on_input(owner: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if owner in skipped:
            return None
        if args:
            return (group(args[0], None), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, kwargs | {name: group(kwargs[name], None)}

    def on_output(owner: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if owner in skipped:
            return None
        before = None if role != "block" else args[0] if args else kwargs["hidden_states"]
        if isinstance(output, tuple):
            return (group(output[0], before), *output[1:])
        return group(output, before)

    if side == "in":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output, with_kwargs=True)
