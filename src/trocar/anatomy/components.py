"""Addressable parts of a transformer, and their names. Imports no torch, so that a patch can be shown without it.

A component prints as it parses: `L5` (block), `L5.attn`, `L5.mlp`, `L5.H3` (query head), `L5.N17` (neuron), `L5.attn.q`,
`L5.mlp.down` (linear), `L5.mlp.up.out17`, `L5.attn.o.in3` (channel of a linear); a tower is a prefix: `vision.L2.mlp`.
Components are immutable, hashable and ordered by tower, layer, kind, index, so that sorting a mixture reads from the input up.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from trocar.core.errors import ComponentError

ATTENTION_LINEARS = ("q", "k", "v", "o")
MLP_LINEARS = ("up", "gate", "down")
LINEARS = ATTENTION_LINEARS + MLP_LINEARS
SIDES = ("in", "out")


@functools.total_ordering
@dataclass(frozen=True, eq=True)
class Component:
    """Base of all components. `kind` is the name that `Anatomy.components` and Scores use."""

    layer: int
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name in ("layer", "index"):
            number = getattr(self, name, 0)
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ComponentError(f"A component's {name} must be a whole number from 0, not {number!r}.")
        tower = self.tower  # type: ignore[attr-defined]
        if tower and not _TOWER.fullmatch(tower):
            raise ComponentError(f"{tower!r} is not a tower's name.", "A tower is named with lower-case letters, for instance 'vision'.")

    def _tail(self) -> str:
        return ""

    def __str__(self) -> str:
        tower = self.tower  # type: ignore[attr-defined]
        return f"{tower + '.' if tower else ''}L{self.layer}{self._tail()}"

    def _key(self) -> tuple[Any, ...]:
        role, side = getattr(self, "role", ""), getattr(self, "side", "")
        rank = LINEARS.index(role) if role else -1
        return (self.tower, self.layer, list(KINDS).index(self.kind), rank, side, getattr(self, "index", 0))  # type: ignore[attr-defined]

    def __lt__(self, other: object) -> bool:
        return self._key() < other._key() if isinstance(other, Component) else NotImplemented


@dataclass(frozen=True)
class Block(Component):
    """A transformer block, `L5`."""

    tower: str = ""
    kind: ClassVar[str] = "block"


@dataclass(frozen=True)
class Attention(Component):
    """The attention of a block, `L5.attn`: its projections and what lies between them, not the norm before it."""

    tower: str = ""
    kind: ClassVar[str] = "attention"

    def _tail(self) -> str:
        return ".attn"


@dataclass(frozen=True)
class Mlp(Component):
    """The feed-forward network of a block, `L5.mlp`, without the norm before it."""

    tower: str = ""
    kind: ClassVar[str] = "mlp"

    def _tail(self) -> str:
        return ".mlp"


@dataclass(frozen=True)
class Head(Component):
    """A query head, `L5.H3`. With grouped queries several heads share one key/value head."""

    index: int
    tower: str = ""
    kind: ClassVar[str] = "head"

    def _tail(self) -> str:
        return f".H{self.index}"


@dataclass(frozen=True)
class Neuron(Component):
    """A neuron of the feed-forward network, `L5.N17`: one entry of the input of its down projection."""

    index: int
    tower: str = ""
    kind: ClassVar[str] = "neuron"

    def _tail(self) -> str:
        return f".N{self.index}"


@dataclass(frozen=True)
class Linear(Component):
    """A linear map, `L5.attn.q`. role: q, k, v, o, up, gate or down (fc1 is up, fc2 is down)."""

    role: str
    tower: str = ""
    kind: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_role(self.role)

    def _tail(self) -> str:
        return f".{_room(self.role)}.{self.role}"


@dataclass(frozen=True)
class Channel(Component):
    """An input or output channel of a linear map, `L5.mlp.up.out17`. side: `in` (a column) or `out` (a row and its bias)."""

    role: str
    side: str
    index: int
    tower: str = ""
    kind: ClassVar[str] = "channel"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_role(self.role)
        if self.side not in SIDES:
            raise ComponentError(f"{self.side!r} is not a side of a linear map.", "Use 'in' or 'out'.")

    def _tail(self) -> str:
        return f".{_room(self.role)}.{self.role}.{self.side}{self.index}"


KINDS: dict[str, type[Component]] = {kind.kind: kind for kind in (Block, Attention, Head, Mlp, Neuron, Linear, Channel)}
_TOWER = re.compile(r"[a-z][a-z0-9_]*")
_NUMBER = r"(0|[1-9][0-9]*)"
_NAME = re.compile(
    rf"(?:(?P<tower>{_TOWER.pattern})\.)?L(?P<layer>{_NUMBER})"
    rf"(?:\.(?:H(?P<head>{_NUMBER})|N(?P<neuron>{_NUMBER})"
    rf"|(?P<room>attn|mlp)(?:\.(?P<role>{'|'.join(LINEARS)})(?:\.(?P<side>in|out)(?P<channel>{_NUMBER}))?)?))?"
)
FORMS = "L5, L5.attn, L5.mlp, L5.H3, L5.N17, L5.attn.q, L5.mlp.up, L5.mlp.down.in17, vision.L2.mlp"


def parse(text: Component | str) -> Component:
    """The component called `text`; a component is returned as it is. Raises ComponentError with the forms that exist."""
    if isinstance(text, Component):
        return text
    match = _NAME.fullmatch(text) if isinstance(text, str) else None
    if match is None or (match["role"] and _room(match["role"]) != match["room"]):
        raise ComponentError(f"{text!r} is not a component's name.", f"Names look like: {FORMS}.")
    layer, tower = int(match["layer"]), match["tower"] or ""
    if match["head"]:
        return Head(layer, int(match["head"]), tower)
    if match["neuron"]:
        return Neuron(layer, int(match["neuron"]), tower)
    if match["channel"]:
        return Channel(layer, match["role"], match["side"], int(match["channel"]), tower)
    if match["role"]:
        return Linear(layer, match["role"], tower)
    return {None: Block, "attn": Attention, "mlp": Mlp}[match["room"]](layer, tower)


def _room(role: str) -> str:
    return "attn" if role in ATTENTION_LINEARS else "mlp"


def _check_role(role: str) -> None:
    if role not in LINEARS:
        raise ComponentError(f"{role!r} is not a linear map of a block.", f"Known: {', '.join(LINEARS)}.")
