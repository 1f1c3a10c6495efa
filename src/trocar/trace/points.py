"""Points: named places in a model where something flows that can be read or changed. Floor 2."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch

from trocar.anatomy import Anatomy, Attention, Block, Component, Head, Mlp, Neuron, Tower
from trocar.core.errors import ComponentError, nearest

KINDS = ("resid_pre", "attn_out", "heads", "neurons", "mlp_out", "resid_post")
_NAME = re.compile(rf"(?:(?P<tower>[A-Za-z_]\w*)\.)?L(?P<layer>\d+)\.(?P<kind>{'|'.join(KINDS)})")

# point kind -> (role of the module it is attached to, "in" or "out" of that module)
ATTACHED = {
    "resid_pre": ("block", "in"),
    "resid_post": ("block", "out"),
    "attn_out": ("o", "out"),
    "mlp_out": ("down", "out"),
    "heads": ("o", "in"),
    "neurons": ("down", "in"),
}


@dataclass(frozen=True, order=True)
class Point:
    """A place in the computation of one block, written `L5.heads` or `vision.L2.resid_post`.

    kind, with the shape of what flows there:
    - `resid_pre`, `resid_post`: the residual stream before and after the block, (batch, length, width);
    - `heads`: the heads' outputs, concatenated, before the output projection, (batch, length, heads, head_size);
    - `neurons`: the MLP's activations before its down projection, (batch, length, neurons);
    - `attn_out`, `mlp_out`: what the attention's output projection and the MLP's down projection return, (batch, length, width), biases
      included. A norm or layer scale after them (Gemma 2 and 3, BERT, DINOv2), dropout and the residual addition come later. In
      GPT-NeoX's parallel blocks both are added to the same `resid_pre`.
    """

    kind: str
    layer: int
    tower: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ComponentError(f"'{self.kind}' is not a kind of point.", nearest(str(self.kind), KINDS))

    def __str__(self) -> str:
        return f"{self.tower + '.' if self.tower else ''}L{self.layer}.{self.kind}"


@functools.lru_cache(maxsize=4096)
def parse_point(text: str | Point) -> Point:
    """Read `L5.heads` or `vision.L2.resid_post`. Raises ComponentError."""
    if isinstance(text, Point):
        return text
    match = _NAME.fullmatch(text)
    if match is None:
        raise ComponentError(f"'{text}' is not a point.", f"Write L<layer>.<kind>, for example L5.heads; kinds are {', '.join(KINDS)}.")
    return Point(match["kind"], int(match["layer"]), match["tower"] or "")


def is_point(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class Site:
    """Where something acts: a point, and for a head or a neuron its index there. `delta`: what a block adds to the stream."""

    point: Point
    index: int | None = None
    delta: bool = False

    def module(self, anatomy: Anatomy) -> torch.nn.Module:
        return anatomy.tower(self.point.tower).module(self.point.layer, ATTACHED[self.point.kind][0])


def locate_site(anatomy: Anatomy, where: Point | Component | str) -> Site:
    """The site of a point or component, checked against the model. Raises ComponentError naming the admissible range."""
    if isinstance(where, Point) or (isinstance(where, str) and is_point(where)):
        return Site(check_point(anatomy, parse_point(where)))
    component: Any = anatomy.check(where)
    kind, index, delta = _site_kind(component)
    return Site(Point(kind, component.layer, anatomy.tower(component.tower or None).name), index, delta)


def _site_kind(component: Component) -> tuple[str, int | None, bool]:
    if isinstance(component, Head):
        return "heads", component.index, False
    if isinstance(component, Neuron):
        return "neurons", component.index, False
    if isinstance(component, Attention):
        return "attn_out", None, False
    if isinstance(component, Mlp):
        return "mlp_out", None, False
    if isinstance(component, Block):
        return "resid_post", None, True
    raise ComponentError(f"An intervention cannot act on {component}.", "Use a head, neuron, attention, mlp or block, or a point.")


def check_point(anatomy: Anatomy, point: Point) -> Point:
    """The point with its tower's name filled in; ComponentError if the model has no such layer."""
    tower = anatomy.tower(point.tower or None)
    if point.layer >= tower.n_layers:
        raise ComponentError(f"{point} does not exist: the model has layers 0 to {tower.n_layers - 1}.", "Choose a layer in that range.")
    return point if point.tower == tower.name else Point(point.kind, point.layer, tower.name)


def features(tower: Tower, point: Point, flat: int) -> tuple[int, ...]:
    """The shape of one position at `point`, given the size of the last dimension there."""
    if point.kind == "heads":
        return (tower.heads(point.layer), tower.head_size(point.layer))
    return (flat,)
