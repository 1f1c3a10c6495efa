"""How the conformance questions look into a model: run a tower, read and change what flows through it, compare. Floor 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trocar.anatomy.linear import Slice
from trocar.anatomy.resolve import Anatomy, Tower
from trocar.anatomy.tiny import tower_inputs


class Mismatch(Exception):
    """The model does not do what the family's row says."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Mismatch(what)


def at(tower: Tower, layer: int) -> str:
    return f"{tower.name + '.' if tower.name else ''}L{layer}"


def named(anatomy: Anatomy, component: str) -> list[str]:
    return [part.name for part in anatomy.slices(component)]


def stored_transposed(anatomy: Anatomy) -> bool:
    return any(anatomy.linear(item).transposed for item in anatomy.components("linear"))  # type: ignore[arg-type]


def run(tower: Tower) -> torch.Tensor:
    """The tower's last hidden state on fixed random inputs."""
    out = tower.root(**tower_inputs(tower))  # type: ignore[misc]
    return out[0]


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_of(tower: Tower, module: nn.Module) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with hooks(module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))):
        run(tower)
    return seen[0]


def read(tower: Tower, layer: int, view: Any, change: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The heads at the input of o, (rows, length, heads, size), and the view's output, (rows, length, its heads, size)."""
    seen: list[torch.Tensor] = []

    def output(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        seen.append(out if view.rows is None else out[..., list(view.rows)])
        return out if change is None else change(out, view.rows)

    with hooks(view.module.register_forward_hook(output)):
        z = input_of(tower, tower.module(layer, "o"))
    size = tower.head_size(layer)
    return z.unflatten(-1, (-1, size)), seen[0].reshape(*z.shape[:2], -1, size)


def add_at(out: torch.Tensor, rows: Any, position: int) -> torch.Tensor:
    out = out.clone()
    where = list(rows) if rows is not None else list(range(out.shape[-1]))
    step = torch.linspace(-2, 3, len(where), device=out.device, dtype=out.dtype)
    out[:, position, where] = out[:, position, where] + step
    return out


@contextmanager
def changed(anatomy: Anatomy, slices: list[Slice], factor: float = 0.0) -> Iterator[None]:
    """Multiply entries by `factor` for a while."""
    parameters = dict(anatomy.model.named_parameters())
    kept = [(part, part.take(parameters[part.name]).clone()) for part in slices]
    try:
        for part, old in kept:
            part.put(parameters[part.name], old * factor)
        yield
    finally:
        for part, old in kept:
            part.put(parameters[part.name], old)


def ablate(anatomy: Anatomy, tower: Tower, module: nn.Module, columns: list[Slice], where: slice, what: str) -> None:
    def silence(_: Any, args: Any) -> Any:
        x = args[0].clone()
        x[..., where] = 0
        return (x, *args[1:])

    plain = run(tower)
    with hooks(module.register_forward_pre_hook(silence)):
        wanted = run(tower)
    require(bool(columns), f"{what} has no columns")
    with changed(anatomy, columns):
        got = run(tower)
    close(got, wanted, what)
    require(not torch.equal(plain, wanted), f"{what} does nothing to the output")


def equal(got: Any, wanted: Any, what: str) -> None:
    require(bool(got == wanted), f"{what}: {got}, expected {wanted}")


def close(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """Equal within rounding: 1e-5 of the largest value in float32, 1e-2 in half precision."""
    tolerance = (1e-5 if wanted.dtype in (torch.float32, torch.float64) else 1e-2) * max(float(wanted.abs().max()), 1e-3)
    require(got.shape == wanted.shape, f"{what}: {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    worst = float((got - wanted).abs().max())
    require(worst <= tolerance, f"{what}: differs by {worst:.2e}, allowed {tolerance:.2e}")
