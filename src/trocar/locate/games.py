"""Games whose players are parts of a model, for `shapley_values`: adapters that are off or on, components that are removed. Floor 3.

The value of a coalition is the mean over rows of a metric (larger is better: a log-likelihood, a share of right answers), on a fixed set
of rows and in evaluation mode. Adapters and components of one tower are evaluated many coalitions at once (`trace.coalitions`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from trocar.anatomy import Anatomy, Block, Component, parse
from trocar.anatomy.grouping import By
from trocar.core.errors import ComponentError, DataError, MetricError
from trocar.trace import Scale
from trocar.trace.adapters import AdapterSwitches, adapter_groups
from trocar.trace.coalitions import Switch, coalition_sweep
from trocar.trace.intervene import intervene
from trocar.trace.sweep import Metric

Initial = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


class PartsGame:
    """A game of parts that are switched inside one tower; made by `adapter_game` and `component_game`."""

    def __init__(
        self,
        anatomy: Anatomy,
        inputs: Mapping[str, Any],
        metric: Metric,
        players: Sequence[str],
        layers: Sequence[Sequence[int]],
        switch: Switch,
        tower: str,
        batch_size: int,
        around: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.around = around or nullcontext()
        self.anatomy, self.inputs, self.metric, self.players = anatomy, inputs, metric, tuple(players)
        self.layers, self.switch, self.tower, self.batch_size = layers, switch, tower, batch_size

    def __call__(self, masks: np.ndarray) -> np.ndarray:
        return self.rows(masks).mean(1)

    def rows(self, masks: np.ndarray) -> np.ndarray:
        """The metric row by row, (coalitions, rows)."""
        with self.around:
            swept = coalition_sweep(
                self.anatomy, self.inputs, masks, self.layers, self.switch, self.metric, tower=self.tower, batch_size=self.batch_size
            )
        return swept.numpy()


def adapter_game(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    metric: Metric,
    *,
    by: By = "block",
    adapter: str = "default",
    initial: Initial | None = None,
    batch_size: int = 64,
) -> PartsGame:
    """What groups of an adapter's modules are worth: in a coalition they are on, all others are the base layers that they were.

    model: a `PeftModel` in evaluation mode; inputs: its keyword arguments, rows first; metric(output, rows) -> (rows,), as in `sweep`
    (`trocar.evaluate.Task.scored`); by: the players, see `trocar.anatomy.module_groups`; initial: of PiSSA and its like. What was trained
    besides the adapters (`modules_to_save`, biases) is there in all coalitions.
    Raises MetricError for adapters outside of one tower's blocks, which `value_game` can play.
    """
    groups = adapter_groups(model, by, adapter)
    anatomy = Anatomy.of(model)
    _refuse_training(anatomy.model)
    towers = {tower.name: tower for tower in anatomy.towers.values()}
    layers, seen = [], set()
    for members in groups.values():
        where = [_block_of(name, towers) for name in members]
        seen |= {tower for tower, _ in where}
        layers.append(sorted({layer for _, layer in where}))
    if len(seen) > 1:
        raise MetricError(f"The adapters lie in the towers {' and '.join(sorted(seen))}.", "Use value_game, which plays whole models.")

    switches = AdapterSwitches(groups, adapter, initial)

    def switch(masks: torch.Tensor, blocks: range) -> AbstractContextManager[None]:
        switches.set_rows(masks)
        return nullcontext()

    return PartsGame(anatomy, inputs, metric, tuple(groups), layers, switch, seen.pop(), batch_size, switches)


def _block_of(name: str, towers: Mapping[str, Any]) -> tuple[str, int]:
    for tower in towers.values():
        rest = name.removeprefix(f"{tower.blocks_path}.")
        if rest != name:
            return tower.name, int(rest.split(".")[0])
    raise MetricError(f"The adapter of {name} lies outside of the blocks.", "Use value_game, which plays whole models.")


def component_game(
    model: Any,
    inputs: Mapping[str, Any],
    metric: Metric,
    components: Sequence[Component | str] | None = None,
    *,
    tower: str | None = None,
    batch_size: int = 64,
) -> PartsGame:
    """What components of a model are worth: outside of a coalition they contribute nothing (a block passes its input on).

    components: blocks, attentions, MLPs, heads or neurons of one tower; None: its blocks. Inputs and metric as in `adapter_game`.
    """
    anatomy = Anatomy.of(model)
    _refuse_training(anatomy.model)
    chosen = anatomy.tower(tower)
    given = [Block(layer, chosen.name) for layer in range(chosen.n_layers)] if components is None else components
    parts: list[Any] = [parse(part) if isinstance(part, str) else part for part in given]
    for part in parts:
        anatomy.check(part)
        if part.tower != chosen.name:
            raise ComponentError(f"{part} is not in the tower '{chosen.name}'.", "Play one tower at a time.")

    def switch(masks: torch.Tensor, blocks: range) -> AbstractContextManager[None]:
        off = [(part, torch.nonzero(~masks[:, number]).flatten().tolist()) for number, part in enumerate(parts) if part.layer in blocks]
        return intervene(anatomy, [Scale(part, 0.0, rows=rows) for part, rows in off if rows])

    players, layers = [str(part) for part in parts], [[part.layer] for part in parts]
    return PartsGame(anatomy, inputs, metric, players, layers, switch, chosen.name, batch_size)


class ValueGame:
    """A game of adapters whose value is any number that the model gives, one coalition after the other; made by `value_game`."""

    def __init__(
        self, model: torch.nn.Module, value: Callable[[Any], float], groups: Mapping[str, Any], adapter: str, initial: Any
    ) -> None:
        self.model, self.value, self.groups, self.players = model, value, groups, tuple(groups)
        self.adapter, self.initial = adapter, initial

    def __call__(self, masks: np.ndarray) -> np.ndarray:
        _refuse_training(self.model)
        found = []
        with torch.no_grad(), AdapterSwitches(self.groups, self.adapter, self.initial) as switches:
            for mask in np.asarray(masks, dtype=bool):
                switches.set(mask.tolist())
                found.append(float(self.value(self.model)))
        return np.array(found)


def value_game(
    model: torch.nn.Module, value: Callable[[Any], float], *, by: By = "block", adapter: str = "default", initial: Initial | None = None
) -> ValueGame:
    """A game of adapters with any value(model), larger is better: retrieval over both towers, generation, a whole benchmark.

    The value must be a function of the model alone: fixed rows, no sampling.
    """
    _refuse_training(model)
    return ValueGame(model, value, adapter_groups(model, by, adapter), adapter, initial)


def _refuse_training(model: torch.nn.Module) -> None:
    if model.training:
        raise DataError("A game needs a model in evaluation mode, or dropout would decide its values.", "Call model.eval() first.")
