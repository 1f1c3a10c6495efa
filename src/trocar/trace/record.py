"""Record what flows through a model at named points. Floor 2."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from trocar.anatomy import Anatomy, Tower
from trocar.core.errors import InterventionError, nearest
from trocar.trace.calls import Frame, Positions, following, normal_positions
from trocar.trace.points import ATTACHED, Point, check_point, features, parse_point
from trocar.trace.shortcut import hidden_argument, skipped

MAYBE_FLAT = ("neurons", "mlp_out")  # OPT flattens rows and positions into one dimension there


class Recording:
    """What was recorded. `rec["L5.heads"]` is the last forward pass's tensor, `steps` has every pass's (cached generation: one per step).

    Shapes are those of `Point`; with `positions`, the length is the number of positions that the pass computed. It is the context manager
    that `record` returns; a class and not a generator, because opening it must cost little beside a short forward pass.
    """

    def __init__(self, anatomy: Anatomy, points: Sequence[Point], positions: Any, grad: bool) -> None:
        self._anatomy = anatomy
        self._tracks = {point: _Track(point, anatomy.tower(point.tower), positions, grad) for point in points}
        self._stack: ExitStack | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Recording:
        try:
            followed = [track for track in self._tracks.values() if track.positions is not None or track.point.kind in MAYBE_FLAT]
            if followed:
                self._stack = ExitStack()
                towers = {track.tower.name: track.tower for track in followed}
                calls = self._stack.enter_context(following(self._anatomy, list(towers.values())))
                for track in followed:
                    track.calls = calls[track.tower.name]
            for track in self._tracks.values():
                self._handles.append(track.attach())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        while self._handles:
            self._handles.pop().remove()
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple(self._tracks)

    def steps(self, point: Point | str) -> list[torch.Tensor]:
        """One tensor per forward pass, in order. Raises InterventionError if no pass reached the point."""
        track = self._track(point)
        if not track.kept:
            raise InterventionError(
                f"Nothing was recorded at {track.point}: no forward pass inside the context reached it.",
                "Run the model inside the context; a compiled model does not see it, and a prefix skips the blocks below its layer.",
            )
        return [track.read(number) for number in range(len(track.kept))]

    def __getitem__(self, point: Point | str) -> torch.Tensor:
        return self.steps(point)[-1] if not self._track(point).kept else self._track(point).read(-1)

    def joined(self, point: Point | str) -> torch.Tensor:
        """All passes of one cached generation, joined along the length."""
        return torch.cat(self.steps(point), dim=1)

    def grad(self, point: Point | str) -> torch.Tensor:
        """Gradient of what `backward` was called on, in the shape of `rec[point]`; needs `record(..., grad=True)`."""
        track = self._track(point)
        gradient = track.kept[-1].flat.grad if track.kept else None
        if gradient is None:
            raise InterventionError(
                f"There is no gradient at {track.point}.", "Record with grad=True, then call backward on something that depends on it."
            )
        return track.shaped(gradient, track.kept[-1])

    def _track(self, point: Point | str) -> _Track:
        wanted = parse_point(point)
        for have, track in self._tracks.items():
            if have == wanted or (not wanted.tower and (have.layer, have.kind) == (wanted.layer, wanted.kind)):
                return track
        raise InterventionError(f"{wanted} is not recorded.", nearest(str(wanted), map(str, self._tracks)))


def record(
    model: Any,
    points: Point | str | Sequence[Point | str],
    positions: Positions = None,
    grad: bool = False,
) -> Recording:
    """Record the activations at `points` on every forward pass inside the context.

    model: a transformers model or its `Anatomy`. positions: as in `Intervention`; None records all. A recorded tensor is the model's own,
    detached, not a copy; it is an error to read one that the model has since overwritten. Contexts act in the order in which they were
    opened: a `record` inside an `intervene` sees the changed activations, one around it the unchanged.

    grad: keep the tensors in the graph, so that after `backward` their gradients are in `rec.grad(point)`. Where nothing below requires
    a gradient (frozen parameters), the activation becomes a leaf that does.

    Raises ComponentError if the model has no such point; on leaving, all hooks are removed and the recording stays readable.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    asked = [points] if isinstance(points, Point | str) else points
    checked = list(dict.fromkeys(check_point(anatomy, parse_point(point)) for point in asked))
    return Recording(anatomy, checked, normal_positions(positions), grad)


class _Kept:
    __slots__ = ("batch", "flat", "frame", "version")

    def __init__(self, flat: torch.Tensor, batch: int, frame: Frame | None) -> None:
        self.flat, self.batch, self.frame = flat, batch, frame
        self.version = flat._version


class _Track:
    """One recorded point."""

    def __init__(self, point: Point, tower: Tower, positions: Any, grad: bool) -> None:
        self.point, self.tower, self.positions, self.grad = point, tower, positions, grad
        self.calls: Any = None  # a `Calls` while the context is open and something has to be known about each pass
        self.kept: list[_Kept] = []

    def attach(self) -> Any:
        role, side = ATTACHED[self.point.kind]
        module = self.tower.module(self.point.layer, role)
        if side == "in":
            return module.register_forward_pre_hook(self._on_input, with_kwargs=True)
        return module.register_forward_hook(self._on_output)

    def _on_input(self, owner: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if owner in skipped:
            return None
        flat = hidden_argument(args, kwargs)
        kept = self._keep(flat)
        if kept is flat:
            return None
        return ((kept, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": kept})

    def _on_output(self, owner: torch.nn.Module, args: Any, output: Any) -> Any:
        if owner in skipped:
            return None
        flat = output[0] if isinstance(output, tuple) else output
        kept = self._keep(flat)
        if kept is flat:
            return None
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    def _keep(self, flat: torch.Tensor) -> torch.Tensor:
        """Store the activation; the return value is what flows on (another tensor only where it has to become a leaf)."""
        batch = flat.shape[0] if flat.ndim == 3 else (self.calls.batch or 1)
        frame = None if self.positions is None else self.calls.frame(flat.numel() // flat.shape[-1] // batch, batch)
        if self.grad and torch.is_grad_enabled():
            if not flat.requires_grad:
                flat = flat.detach().requires_grad_(True)
            flat.retain_grad()
            self.kept.append(_Kept(flat, batch, frame))
            return flat
        stored = flat.clone() if flat.is_inference() else flat.detach()
        if frame is None:
            self.kept.append(_Kept(stored, batch, None))
        elif (picked := self._pick(self._view(stored, batch), frame)) is not None:
            self.kept.append(_Kept(picked, batch, None))
        return flat

    def _view(self, flat: torch.Tensor, batch: int) -> torch.Tensor:
        length = flat.numel() // flat.shape[-1] // batch
        return flat.reshape(batch, length, *features(self.tower, self.point, flat.shape[-1]))

    def _pick(self, full: torch.Tensor, frame: Frame) -> torch.Tensor | None:
        """The wanted positions of one pass, (batch, found, features), or None if it computed none of them."""
        per_row = isinstance(self.positions, tuple) and isinstance(self.positions[0], tuple)
        if per_row and len(self.positions) != frame.rows:
            raise InterventionError(f"There are {len(self.positions)} lists of positions for {frame.rows} rows.")
        found = []
        for row in range(frame.rows):
            wanted = self.positions[row] if per_row else self.positions
            found += [[column for column, _, _ in frame.columns(row, wanted)]] * frame.repeats
        if len({len(columns) for columns in found}) > 1:
            raise InterventionError(f"The rows have different numbers of the positions {self.positions} at {self.point}.")
        if not found[0]:
            return None
        columns = torch.tensor(found, device=full.device)
        return full[torch.arange(len(found), device=full.device)[:, None], columns]

    def shaped(self, flat: torch.Tensor, kept: _Kept) -> torch.Tensor:
        if self.positions is not None and kept.frame is None:
            return flat  # was picked when it was stored
        full = self._view(flat, kept.batch)
        if kept.frame is None:
            return full
        picked = self._pick(full, kept.frame)
        if picked is None:
            raise InterventionError(f"The pass did not compute any of the positions {self.positions} at {self.point}.")
        return picked

    def read(self, number: int) -> torch.Tensor:
        kept = self.kept[number]
        if kept.flat._version != kept.version:
            raise InterventionError(
                f"What was recorded at {self.point} has been overwritten in place since.",
                "Copy it inside the context, or do not write to it.",
            )
        return self.shaped(kept.flat, kept)
