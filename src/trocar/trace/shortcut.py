"""Run a model's own forward pass from a given block on: the blocks below return what they are given. Floor 2.

Masks, rotary tables, norms and heads stay the model's; nothing of its code is written again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trocar.anatomy import Tower
from trocar.trace.calls import override

skipped: set[torch.nn.Module] = set()  # blocks that are passed by at the moment; what flows through them has no meaning


class Stop(Exception):
    """Ends a forward pass whose rest nobody needs."""


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def starting_at(tower: Tower, layer: int, hidden: torch.Tensor, tuples: bool = False) -> Iterator[None]:
    """Inside, the blocks below `layer` are passed by and block `layer` receives `hidden` (batch, length, width)."""

    def pass_by(*args: Any, **kwargs: Any) -> Any:
        given = hidden_argument(args, kwargs)
        return (given,) if tuples else given

    def give(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    restores: list[Any] = []
    below = [block for block in tower.blocks[:layer] if block not in skipped]
    try:
        skipped.update(below)
        restores.extend(override(block, "forward", pass_by) for block in below)
        # before any other hook, so that an intervention at the block's input acts on the given states
        handle = tower.blocks[layer].register_forward_pre_hook(give, with_kwargs=True, prepend=True)
        restores.append(handle.remove)
        yield
    finally:
        for restore in reversed(restores):
            restore()
        skipped.difference_update(below)


@contextmanager
def stopping_at(tower: Tower, layer: int) -> Iterator[list[torch.Tensor]]:
    """Inside, a forward pass ends at the input of block `layer`, which is put into the list; the rest of the context is left out."""
    reached: list[torch.Tensor] = []

    def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.append(hidden_argument(args, kwargs).detach())
        raise Stop

    handle = tower.blocks[layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield reached
    except Stop:
        pass
    finally:
        handle.remove()
