"""Weights of an edit as leaves that gradients reach, and the forward passes of the edited modules with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trocar.edit.where_to_edit.place import Matrix
from trocar.trace.calls import override


@dataclass(eq=False)
class Leaf:
    """Open entries of one matrix for each of E edits: `weight` (E, K, d), `index` (E, K) their places, None if all h are there in order.

    Where edits have different numbers of open entries the rest of K is padded with closed ones; `valid` (E, K) tells them apart.
    """

    matrix: Matrix
    weight: torch.Tensor
    index: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    def origin(self) -> torch.Tensor:
        """The unedited values of the same entries, (E, K, d) or broadcastable to it, in the model's dtype."""
        start = self.matrix.start()
        return start[None] if self.index is None else start[self.index]

    def take(self, edits: torch.Tensor) -> Leaf:
        """The same leaf for some of its edits."""
        pick = [None if part is None else part[edits] for part in (self.index, self.valid)]
        return Leaf(self.matrix, self.weight.detach()[edits], *pick)


@dataclass(eq=False)
class LowRankLeaf:
    """A low-rank update of one matrix for each of E edits, entry-major: change = left (E, h, r) @ right (E, r, d)."""

    matrix: Matrix
    left: torch.Tensor
    right: torch.Tensor

    def take(self, edits: torch.Tensor) -> LowRankLeaf:
        return LowRankLeaf(self.matrix, self.left.detach()[edits], self.right.detach()[edits])


@dataclass(eq=False)
class WholeLeaf:
    """A whole parameter of one edit (E = 1), for fine-tuning without a mask."""

    model: torch.nn.Module
    name: str
    weight: torch.Tensor

    def origin(self) -> torch.Tensor:
        return self.model.get_parameter(self.name).detach()

    def take(self, edits: torch.Tensor) -> WholeLeaf:
        return WholeLeaf(self.model, self.name, self.weight.detach())


AnyLeaf = Leaf | LowRankLeaf | WholeLeaf


@contextlib.contextmanager
def swapped(model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let named parameters (in all places, where tied) be other tensors inside; the model's own objects are put back on every exit."""
    wanted = {id(model.get_parameter(name)): value for name, value in values.items()}
    kept: list[tuple[torch.nn.Module, str, torch.nn.Parameter | None]] = []
    try:
        for module in model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None and id(parameter) in wanted:
                    kept.append((module, key, parameter))
                    module._parameters[key] = wanted[id(parameter)]  # type: ignore[assignment]  # a plain tensor, so that gradients reach it
        yield
    finally:
        for module, key, parameter in reversed(kept):
            module._parameters[key] = parameter


@contextlib.contextmanager
def overridden(forwards: Mapping[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Give modules another forward for the time of the context; what was on the instances before is put back on every exit."""
    with contextlib.ExitStack() as stack:
        for module, forward in forwards.items():
            stack.callback(override(module, "forward", forward))
        yield


def with_leaves(leaves: Sequence[AnyLeaf]) -> contextlib.AbstractContextManager[None]:
    """Run the edited modules with the given weights. Rows of the batch belong to edits in order: (E * rows per edit, length, width)."""
    whole = [leaf for leaf in leaves if isinstance(leaf, WholeLeaf)]
    if whole:
        return swapped(whole[0].model, {leaf.name: leaf.weight.to(leaf.origin().dtype) for leaf in whole})
    grouped: dict[torch.nn.Module, list[Leaf | LowRankLeaf]] = {}
    for leaf in leaves:
        assert not isinstance(leaf, WholeLeaf)
        grouped.setdefault(leaf.matrix.module, []).append(leaf)
    return overridden({module: edited_forward(module, group) for module, group in grouped.items()})


def edited_forward(
    module: torch.nn.Module, leaves: Sequence[Leaf | LowRankLeaf], known: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A module's forward pass with leaves in place of some of its weights; `known`: its output with its own weights, if it is known."""
    plain = module.forward
    bias = leaves[0].matrix.view.bias

    def forward(x: torch.Tensor) -> torch.Tensor:
        edits = (leaves[0].weight if isinstance(leaves[0], Leaf) else leaves[0].left).shape[0]
        flat = x.reshape(edits, -1, x.shape[-1])
        parts = []
        y = None
        if not _all_open(leaves):
            y = (plain(x) if known is None else known).reshape(edits, flat.shape[1], -1)
        for leaf in leaves:
            matrix = leaf.matrix
            if isinstance(leaf, LowRankLeaf):
                first, second = (leaf.right.mT, leaf.left.mT) if matrix.side == "up" else (leaf.left, leaf.right)
                change = product(product(flat, first.to(x.dtype)), second.to(x.dtype))
                assert y is not None
                if change.shape[-1] != y.shape[-1]:  # one of the matrices of a fused module
                    change = F.pad(change, (matrix.offset, y.shape[-1] - matrix.offset - matrix.entries))
                y = y + change
            elif matrix.side == "up":
                weight = leaf.weight.to(x.dtype)
                opened = product(flat, weight.mT)
                if bias is not None:
                    here = slice(matrix.offset, matrix.offset + matrix.entries)
                    opened = opened + (bias[here] if leaf.index is None else bias[here][leaf.index][:, None])
                if y is None:
                    parts.append(opened)
                elif leaf.index is None:
                    y = torch.cat([y[..., : matrix.offset], opened, y[..., matrix.offset + matrix.entries :]], -1)
                elif edits == 1:
                    y = y.index_copy(2, leaf.index[0] + matrix.offset, opened)
                else:
                    y = y.scatter(2, (leaf.index + matrix.offset)[:, None].expand(-1, flat.shape[1], -1), opened)
            elif leaf.index is None:
                opened = product(flat, leaf.weight.to(x.dtype))
                y = opened if bias is None else opened + bias
            else:  # the change alone passes through the open columns: the closed ones are never touched nor differentiated
                wide = torch.promote_types(x.dtype, torch.float32)
                change = leaf.weight.to(x.dtype).to(wide) - leaf.origin().to(wide)
                assert y is not None
                y = y + product(columns(flat, leaf.index).to(wide), change).to(x.dtype)
        if parts:
            y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        assert y is not None
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return forward


def _all_open(leaves: Sequence[Leaf | LowRankLeaf]) -> bool:
    """Whether the leaves cover every output of their module, in order, so that its own weight need not be multiplied at all."""
    if not all(isinstance(leaf, Leaf) and leaf.index is None for leaf in leaves):
        return False
    matrix = leaves[0].matrix
    outputs = matrix.view.parameter.shape[matrix.view.out_dim]
    return matrix.side == "down" or sum(leaf.matrix.entries for leaf in leaves) == outputs


def columns(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns index (E, K) of x (E, t, h), each edit its own: (E, t, K)."""
    return x[..., index[0]] if len(index) == 1 else x.gather(2, index[:, None].expand(-1, x.shape[1], -1))


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Batched (E, t, a) @ (E, a, b); for one edit the plain product, which keeps the layer's own order of summation."""
    return F.linear(x, weight[0].mT) if len(weight) == 1 else torch.bmm(x, weight)
