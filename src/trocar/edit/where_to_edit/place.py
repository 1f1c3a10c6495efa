"""Where an edit may act: the feed-forward matrices of some blocks in a row, in one form for every family.

One entry of a mask is one vector of length d: row i of fc1 (`up`) or column i of fc2 (`down`) of an edited block, so every matrix is held
entry-major, (h, d), whatever its storage layout. A gated block's first entry is the pair gate row + up row. Entry (k, i) of the
(n, h) mask belongs to matrix k in the order up(l0), down(l0), up(l0 + 1), ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from trocar.anatomy import Anatomy, Linear, LinearView, Tower
from trocar.anatomy.linear import base_layer
from trocar.core.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix that belongs to mask row `row`; `offset` is where its entries start in a fused module's output."""

    row: int
    layer: int
    side: str  # "up" (also the gate) or "down"
    view: LinearView
    entries: int  # h
    width: int  # d

    @property
    def module(self) -> torch.nn.Module:
        return self.view.module

    @property
    def offset(self) -> int:
        return self.view.rows[0] if self.view.rows is not None else 0

    def start(self) -> torch.Tensor:
        """The matrix as it stands in the model, entry-major (h, d)."""
        return self.view.get() if self.side == "up" else self.view.get().T

    @property
    def dim(self) -> int:
        """Dimension of the stored parameter along which entries are counted."""
        return self.view.out_dim if self.side == "up" else 1 - self.view.out_dim


@dataclass(frozen=True, eq=False)
class Place:
    """Where an edit may act: `blocks` feed-forward blocks in a row from `first` in one tower."""

    anatomy: Anatomy
    tower: Tower
    first: int
    blocks: int
    entries: int  # h
    width: int  # d
    matrices: tuple[Matrix, ...]

    @property
    def rows(self) -> int:
        """n, the number of mask rows: two per block."""
        return 2 * self.blocks

    @property
    def model(self) -> torch.nn.Module:
        return self.anatomy.model

    @cached_property
    def device(self) -> torch.device:
        return self.matrices[0].view.parameter.device

    @classmethod
    def of(cls, model: torch.nn.Module, first: int | None = None, blocks: int = 3, tower: str | None = None) -> Place:
        """Find the edited matrices.

        first: 0-based; None takes round(7/12 L), at most L - blocks (the paper's 7 of 12).
        Raises ConfigError for blocks the model does not have, UnsupportedModelError for weights that cannot be edited in place.
        """
        anatomy = Anatomy.of(model)
        found = anatomy.tower(tower)
        last = found.n_layers - blocks
        if last < 0:
            raise ConfigError(
                f"The model has {found.n_layers} blocks, {blocks} were to be edited.", f"Set blocks to 1 to {found.n_layers}."
            )
        chosen = min(round(7 / 12 * found.n_layers), last) if first is None else first
        if not 0 <= chosen <= last:
            raise ConfigError(f"first_block {chosen} is out of range.", f"With {blocks} blocks edited it must be in 0 to {last}.")
        matrices = [
            matrix
            for offset in range(blocks)
            for side in ("up", "down")
            for matrix in _matrices(anatomy, found, chosen + offset, side, 2 * offset + (side == "down"))
        ]
        _refuse_shared(anatomy, matrices)
        shapes = {(matrix.entries, matrix.width) for matrix in matrices}
        if len(shapes) != 1:
            raise UnsupportedModelError(f"The edited blocks have feed-forward matrices of different shapes: {sorted(shapes)}.")
        entries, width = shapes.pop()
        return cls(anatomy, found, chosen, blocks, entries, width, tuple(matrices))


def _matrices(anatomy: Anatomy, tower: Tower, layer: int, side: str, row: int) -> list[Matrix]:
    roles = ["down"] if side == "down" else [role for role in ("gate", "up") if role in tower.linears(layer)]
    found = []
    for role in roles:
        view = anatomy.linear(Linear(layer, role, tower.name))
        if view.module is not base_layer(view.module):
            raise UnsupportedModelError(
                f"{view.path} is wrapped in {type(view.module).__name__}.", "Merge or unload the adapter (merge_and_unload) before editing."
            )
        entries, width = view.out_features, view.in_features
        if side == "down":
            entries, width = width, entries
        found.append(Matrix(row, layer, side, view, entries, width))
    return found


def _refuse_shared(anatomy: Anatomy, matrices: Sequence[Matrix]) -> None:
    owners: dict[int, set[str]] = {}
    for name, parameter in anatomy.model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), set()).add(name)
    for matrix in matrices:
        names = owners[matrix.view.parameter.data_ptr()]
        if len(names) > 1:
            raise UnsupportedModelError(
                f"The weight of {matrix.view.path} is shared: {', '.join(sorted(names))}.",
                "An edit of one would change the other; untie them first.",
            )


@contextlib.contextmanager
def guarded(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients; flags, modes and random state are put back on every exit."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        try:
            model.eval()
            for parameter in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            for module, mode in modes.items():
                module.training = mode
