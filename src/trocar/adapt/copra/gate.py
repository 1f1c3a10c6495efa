"""The gate: which adapters take part in a step of training. Works in any loop; `CopraCallback` is the same in a Trainer."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from trocar.adapt.copra.config import CopraConfig
from trocar.adapt.copra.schedule import Shape, check_shape, draw, expected_on, keep_probability, probabilities
from trocar.core.errors import ConfigError, UnsupportedModelError
from trocar.trace.adapters import AdapterSwitches, adapter_groups, initial_factors


def copra_gate(
    model: torch.nn.Module,
    total_steps: int,
    config: CopraConfig | None = None,
    *,
    adapter: str = "default",
    shape: Shape | None = None,
    initial: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    **settings: Any,
) -> CopraGate:
    """A gate for a loop of one's own; `settings` are those of `CopraConfig`.

        with copra_gate(model, total_steps=T) as gate:
            for batch in batches:                      # T optimiser steps
                with gate.step():                      # one mask for all micro-batches of the step
                    model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    model: a `PeftModel` (LoRA, rsLoRA, DoRA, PiSSA, ...; its base may be quantised). total_steps: optimiser steps T. shape: growth of the
    keep-probability of one's own, see `keep_probability`. initial: the fresh factors of PiSSA and its like, if training has begun already.
    Raises ConfigError for settings, and UnsupportedModelError for adapters that are merged, disabled or frozen.
    """
    return CopraGate(model, total_steps, chosen(config, settings), adapter, shape, initial)


def chosen(config: CopraConfig | None, settings: Mapping[str, Any]) -> CopraConfig:
    """A config given whole or as settings."""
    if config is not None and settings:
        raise ConfigError("Give either a CopraConfig or single settings, not both.", "config.model_copy(update={...}) joins them.")
    return config or CopraConfig.parse(dict(settings), "copra")


class CopraGate:
    """Draws a mask for every optimiser step and switches groups of adapters by it; made by `copra_gate` and `CopraCallback`.

    Groups that are off compute nothing, get no gradient and no update (no moments, no weight decay). Outside of a step all are on.
    names: of the groups; t: the next step; counts: (groups,) how often each was on.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        total_steps: int,
        config: CopraConfig,
        adapter: str = "default",
        shape: Shape | None = None,
        initial: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ConfigError(
                f"total_steps is {total_steps!r}: the keep-probability needs the number of optimiser steps.",
                "It is steps_per_epoch * epochs / gradient_accumulation_steps.",
            )
        check_shape(shape)
        self.config, self.total_steps, self.shape, self.adapter = config, total_steps, shape, adapter
        self.seed = config.seed or 0
        self.groups = adapter_groups(model, config.groups, adapter)
        self.names = tuple(self.groups)
        self.t = 0
        self.counts = np.zeros(len(self.names), dtype=np.int64)
        self.mask: np.ndarray | None = None  # of the step at work
        _refuse_frozen(self.groups, adapter)
        if len(self.names) == 1:
            warnings.warn("All adapters are one group, which is always on: this is plain LoRA. Choose other groups.", stacklevel=3)
        bias = getattr(getattr(model, "peft_config", {}).get(adapter), "bias", "none")
        if bias != "none":
            warnings.warn(f"The adapter trains biases of the base (bias='{bias}'), which no switch turns off.", stacklevel=3)
        start = initial_factors(model, adapter) if initial is None else initial
        self._switches = AdapterSwitches(self.groups, adapter, start, not config.partial_evaluation, config.tensor)
        self._dropouts: list[tuple[Any, Any]] = []
        self._parameters: list[list[torch.nn.Parameter]] = []  # of each group, found once and not in every step
        self._end = None

    def __enter__(self) -> CopraGate:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the switches on the model. They come off with `detach`, and at the latest when the gate is forgotten."""
        if self._end is None:
            self._switches.__enter__()
            self._parameters = [
                [one for module in members.values() for one in _own(module, self.adapter)] for members in self.groups.values()
            ]
            self._end = weakref.finalize(self, self._switches.__exit__)
            if self.config.strategy == "progressive-dropout":
                for module in self._modules():
                    self._dropouts.append((module.lora_dropout, module.lora_dropout[self.adapter]))
                    module.lora_dropout[self.adapter] = torch.nn.Dropout(0.0)

    def detach(self) -> None:
        """Take the switches off; the model is a plain adapted one again."""
        self.mask = None
        for owner, before in self._dropouts:
            owner[self.adapter] = before
        self._dropouts.clear()
        self._parameters.clear()
        if self._end is not None:
            self._end()
            self._end = None

    def p(self, step: int) -> float:
        """The keep-probability of a step, before the rule that at least one group is on."""
        return keep_probability(step, self.total_steps, self.config, self.shape)

    def drawn(self, step: int) -> np.ndarray:
        """The mask of any step, past or to come, (groups,) bool."""
        return draw(step, probabilities(step, self.total_steps, len(self.names), self.config, self.shape), self.seed)

    @contextmanager
    def step(self, step: int | None = None) -> Iterator[np.ndarray]:
        """One optimiser step: forward and backward passes of all its micro-batches belong inside. step: its number, by default the next.

        A step that ends in an error is not counted, and can be done again with the same mask.
        """
        try:
            yield self.begin(self.t if step is None else step)
            self.end()
        finally:
            self._all_on()

    def begin(self, step: int) -> np.ndarray:
        """Draw and set the mask of a step; the second half of `step` is `end`."""
        if self._end is None:
            raise ConfigError("The gate is not on the model.", "Use it as a context: with copra_gate(...) as gate.")
        self._all_on()  # whatever a step that failed has left
        self.t, self.mask = step, self.drawn(step)
        if self.config.strategy == "progressive-dropout":
            for module in self._modules():
                module.lora_dropout[self.adapter].p = 1 - self.p(step)
        elif not self.mask.all() or self.config.strategy == "stochastic-depth":
            self._switches.set(self._levels(step, self.mask))
        return self.mask

    def end(self) -> None:
        """Clear the gradients of what was off, switch all on, count."""
        if self.mask is None:
            return
        self.clear_gradients()
        self.counts += self.mask
        self.t += 1
        self._all_on()

    def _all_on(self) -> None:
        self._switches.set(None)
        self.mask = None

    def clear_gradients(self) -> None:
        """Set the gradients of groups that are off to None: a framework may have filled them with zeros, by which an optimiser would
        still move its moments and decay the weights."""
        if self.mask is not None and not self.config.tensor:
            for parameters, on in zip(self._parameters, self.mask, strict=True):
                if not on:
                    for parameter in parameters:
                        parameter.grad = None

    def expected(self, steps: int | None = None) -> np.ndarray:
        """How often each group is on in the first `steps` steps (default: all), in expectation; (groups,)."""
        found = np.zeros(len(self.names))
        for step in range(self.total_steps if steps is None else steps):
            found += expected_on(probabilities(step, self.total_steps, len(self.names), self.config, self.shape))
        return found

    def history(self, steps: int | None = None) -> np.ndarray:
        """The masks of the first `steps` steps (default: those done), (steps, groups), drawn again from the seed."""
        return np.array([self.drawn(step) for step in range(self.t if steps is None else steps)], dtype=bool).reshape(-1, len(self.names))

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the masks, and how far the run is; JSON-able."""
        return {
            "t": self.t, "total_steps": self.total_steps, "seed": self.seed, "config": self.config.model_dump(mode="json"),
            "groups": list(self.names), "counts": self.counts.tolist(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another gate of the same settings stopped. Raises ConfigError naming what differs."""
        mine = self.state_dict()
        for key in ("total_steps", "seed", "config", "groups"):
            if state.get(key) != mine[key]:
                raise ConfigError(f"The stored gate has {key} {state.get(key)!r}, this one {mine[key]!r}.", "Resume with equal settings.")
        self.t, self.counts = int(state["t"]), np.array(state["counts"], dtype=np.int64)

    @property
    def ramp(self) -> int:
        """The step from which on all groups are on."""
        return math.ceil(self.config.rho * self.total_steps)

    def _levels(self, step: int, mask: np.ndarray) -> list[float]:
        if self.config.strategy != "stochastic-depth":
            return mask.astype(float).tolist()
        return (mask / probabilities(step, self.total_steps, len(mask), self.config)).tolist()

    def _modules(self) -> Iterator[Any]:
        for members in self.groups.values():
            yield from members.values()


def _own(module: Any, adapter: str) -> Iterator[torch.nn.Parameter]:
    """The adapter's parameters in a layer, nested layers (experts, packed attention) included."""
    for name, parameter in module.named_parameters():
        if f".{adapter}." in f".{name}." and any(part in name.split(".") for part in module.adapter_layer_names):
            yield parameter


def _refuse_frozen(groups: Mapping[str, Mapping[str, Any]], adapter: str) -> None:
    for members in groups.values():
        for name, module in members.items():
            if not any(parameter.requires_grad for parameter in _own(module, adapter)):
                raise UnsupportedModelError(
                    f"The adapter '{adapter}' of {name} is frozen.", "Load it with is_trainable=True, or set requires_grad on it."
                )
