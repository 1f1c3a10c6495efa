"""Many coalitions of switched parts on the same inputs, walking the blocks once. Floor 2.

What enters a block depends only on what was on below it. So coalitions that agree on everything below share their hidden states, and part
where they first differ: all 2^L coalitions of L blocks need 2^(L + 1) passes through a block instead of L 2^L. The walk goes
depth first in whole batches, so it holds no more than one batch of hidden states per block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trocar.anatomy import Anatomy, Tower
from trocar.core.errors import ComponentError, DataError
from trocar.core.progress import track
from trocar.trace.prefix import capture, select_rows
from trocar.trace.shortcut import starting_at, stopping_at
from trocar.trace.sweep import Metric, processes

Switch = Callable[[torch.Tensor, range], AbstractContextManager[Any]]


def coalition_sweep(
    model: Any,
    inputs: Mapping[str, Any],
    masks: np.ndarray,
    layers: Sequence[Sequence[int]],
    switch: Switch,
    metric: Metric,
    *,
    tower: str | None = None,
    batch_size: int = 64,
    numbers: int = 0,
) -> torch.Tensor:
    """Evaluate `metric` on every input row under every coalition; returns (coalitions, rows) float64, or (coalitions, rows, numbers).

    model: a transformers model (or a `PeftModel` around one, or its `Anatomy`) in evaluation mode; inputs: keyword arguments of its forward
    pass, rows first. masks: (coalitions, players) bool, equal ones are evaluated once. layers: for every player the blocks of `tower` in
    which it acts. switch: called with (batch, players) bool and the blocks that are about to run, returns a context in which
    row r of the batch has its own players on.
    metric: as in `sweep`. batch_size: rows of a forward pass. Exact up to rounding, whatever the batch size and the order of the masks.

    Under `accelerate launch` the coalitions are split over the processes, and every process returns the whole result.
    Raises DataError for a model in training mode or masks that do not fit, ComponentError for blocks that do not exist.
    """
    anatomy = Anatomy.of(model)
    chosen = anatomy.tower(tower)
    if anatomy.model.training:
        raise DataError("A sweep needs a model in evaluation mode, or dropout would decide the result.", "Call model.eval() first.")
    masks = np.asarray(masks, dtype=bool)
    if masks.ndim != 2 or masks.shape[1] != len(layers) or not len(masks):
        raise DataError(f"Masks of shape {masks.shape} do not fit {len(layers)} players.", "Give (coalitions, players), at least one.")
    if wrong := [layer for own in layers for layer in own if not 0 <= layer < chosen.n_layers]:
        raise ComponentError(f"There is no block {wrong[0]}: the tower has blocks 0 to {chosen.n_layers - 1}.")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} cannot be.", "Use 1 or more rows.")
    different, place = np.unique(masks, axis=0, return_inverse=True)
    acting = [np.flatnonzero([layer in own for own in layers]) for layer in range(chosen.n_layers)]
    # coalitions that share much lie together, so that a process that takes some of them shares most
    order = np.lexsort([different[:, player] for players in reversed(acting) for player in reversed(players)] or [different[:, 0]])
    rank, world, device = processes(next(anatomy.model.parameters()).device)
    mine = np.array_split(order, world)[rank]
    first = next((layer for layer, players in enumerate(acting) if len(players)), chosen.n_layers - 1)
    with torch.no_grad():
        rows = capture(anatomy, inputs, [0], chosen.name).batch
        found = torch.zeros(len(different), rows, *((numbers,) if numbers else ()), dtype=torch.float64)
        for part in track(list(torch.arange(rows).split(batch_size)), "coalitions"):
            if len(mine):
                root = capture(anatomy, select_rows(anatomy, inputs, chosen, rows, part), [first], chosen.name)
                walk = _Walk(anatomy, chosen, root, part, different, acting, switch, metric, max(1, batch_size // len(part)), found)
                walk.go(first, root.hidden[first], [mine])
    if world > 1:
        moved = found.to(device)
        torch.distributed.all_reduce(moved)
        found = moved.cpu()
    return found[torch.from_numpy(place.reshape(-1))]


@dataclass(frozen=True, eq=False)
class _Walk:
    """One chunk of input rows. A node is a set of coalitions that agree on everything below a block."""

    anatomy: Anatomy
    tower: Tower
    root: Any
    rows: torch.Tensor
    masks: np.ndarray
    acting: Sequence[np.ndarray]
    switch: Switch
    metric: Metric
    width: int  # nodes of a forward pass
    found: torch.Tensor

    def go(self, layer: int, hidden: torch.Tensor, nodes: Sequence[np.ndarray]) -> None:
        """Go on from the nodes' inputs of block `layer`, (nodes * rows, length, width)."""
        parts = [(number, part) for number, node in enumerate(nodes) for part in self._parted(node, layer)]
        for start in range(0, len(parts), self.width):
            batch = parts[start : start + self.width]
            until = layer + 1
            while until < self.tower.n_layers and all(len(self._parted(part, until)) == 1 for _, part in batch):
                until += 1
            index = torch.cat([torch.arange(len(self.rows)) + number * len(self.rows) for number, _ in batch])
            plain = [number for number, _ in batch] == list(range(len(nodes)))
            given = hidden if plain else hidden[index.to(hidden.device)]
            result = self._run(layer, until, given, [part[0] for _, part in batch])
            if until < self.tower.n_layers:
                self.go(until, result, [part for _, part in batch])
                continue
            scores = self.metric(result, self.rows.repeat(len(batch)))
            for (_, part), score in zip(batch, scores.double().cpu().split(len(self.rows)), strict=True):
                self.found[torch.from_numpy(part)[:, None], self.rows] = score

    def _parted(self, node: np.ndarray, layer: int) -> list[np.ndarray]:
        """A node's coalitions by what they choose in block `layer`."""
        players = self.acting[layer]
        if not len(players) or len(node) == 1:
            return [node]
        kinds, which = np.unique(self.masks[np.ix_(node, players)], axis=0, return_inverse=True)
        return [node[which.reshape(-1) == kind] for kind in range(len(kinds))]

    def _run(self, layer: int, until: int, hidden: torch.Tensor, coalitions: Sequence[int]) -> Any:
        """From block `layer` to the input of block `until`, or to the model's output."""
        masks = torch.from_numpy(self.masks[list(coalitions)]).repeat_interleave(len(self.rows), 0).to(hidden.device)
        index = torch.arange(len(self.rows)).repeat(len(coalitions))
        inputs = select_rows(self.anatomy, self.root.inputs, self.tower, self.root.batch, index)
        with self.switch(masks, range(layer, until)), starting_at(self.tower, layer, hidden, self.root.tuples):
            if until == self.tower.n_layers:
                return self.anatomy.model(**inputs)
            with stopping_at(self.tower, until) as reached:
                self.anatomy.model(**inputs)
            return reached[0]
