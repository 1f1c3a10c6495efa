"""First-order estimates of patching effects (attribution patching): all modules, heads and neurons from two forward and one backward pass.

effect of copying x from the source run ~ (x_source - x_clean) . d score / d x. Reference: Nanda, "Attribution patching" (2023). It ranks
well where effects are small and poorly where the score saturates, so `trocar.locate.screening.screen` verifies the best exactly. Floor 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trocar.anatomy import Anatomy, Tower
from trocar.locate.cases import (
    POINTS,
    Position,
    backs,
    batches,
    check_kinds,
    check_pairs,
    ends_at,
    name_in,
    observe,
    run_inputs,
    told,
    warn_of_sources,
)
from trocar.locate.scores import How, Scores
from trocar.trace import Point, record
from trocar.trace.queries import Mode, ask, language_tower


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient (activations do), so that a backward pass leaves nothing behind in the model."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@dataclass(frozen=True, eq=False)
class FirstOrder:
    """Estimated effects: kind -> (cases, layers), for heads and neurons (cases, layers, components); float64. clean: scores, (cases,)."""

    values: dict[str, np.ndarray]
    clean: np.ndarray
    tower: Tower = field(repr=False)
    how: How = field(repr=False)

    def scores(self, kind: str) -> Scores:
        """The mean estimates of a kind as Scores."""
        mean = self.values[kind].mean(0)
        named = {name_in(self.tower, layer, kind): row if np.ndim(row) else float(row) for layer, row in enumerate(mean)}
        return Scores(kind, self.tower.name, named, self.how)


def first_order_effects(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sources: Sequence[str],
    answers: Sequence[str],
    kinds: Sequence[str] = ("block", "attention", "mlp", "head"),
    position: Position = "last",
    *,
    subjects: Sequence[str] | None = None,
    mode: Mode = "sequence",
    batch_size: int = 32,
    fingerprint: str | None = None,
) -> FirstOrder:
    """Estimate for every component what `module_effects` and `component_effects` measure; arguments as there.

    kinds: of `block`, `attention`, `mlp`, `head`, `neuron` (towers of equal blocks for the last two). The model's parameters keep their own
    gradients.
    """
    kinds = check_kinds(kinds, tuple(POINTS))
    anatomy = Anatomy.of(model)
    tower = language_tower(anatomy)
    back = backs(tokenizer, prompts, position, subjects)
    check_pairs(tokenizer, prompts, sources, back)
    points = [Point(POINTS[kind], layer, tower.name) for kind in kinds for layer in range(tower.n_layers)]
    source = observe(anatomy, tokenizer, sources, answers, points, back, mode, batch_size)
    warn_of_sources(source, sources, answers)
    clean: list[torch.Tensor] = []
    parts: dict[Point, list[torch.Tensor]] = {point: [] for point in points}
    for rows in batches(len(prompts), batch_size):
        asked = ask(anatomy, tokenizer, prompts[rows], answers[rows], mode)
        with frozen(anatomy.model), torch.enable_grad(), record(anatomy, points, positions=ends_at(asked, back[rows]), grad=True) as seen:
            scores = asked.metric(anatomy.model(**run_inputs(anatomy, asked), use_cache=False), torch.arange(len(asked)))
            scores.sum().backward()
        clean.append(scores.detach().double().cpu())
        for point in points:
            moved = source.states[str(point)][rows].double() - seen[point][:, 0].detach().double()
            parts[point].append((moved * seen.grad(point)[:, 0].double()).cpu())
    values = {}
    for kind in kinds:
        layers = [torch.cat(parts[Point(POINTS[kind], layer, tower.name)]) for layer in range(tower.n_layers)]
        values[kind] = torch.stack([layer if kind == "neuron" else layer.sum(-1) for layer in layers], 1).numpy()
    how = told(*("first order", anatomy.model, fingerprint), **{"cases": len(prompts), "position": position, "mode": mode})
    return FirstOrder(values, torch.cat(clean).numpy(), tower, how)


__all__ = ["FirstOrder", "first_order_effects", "frozen"]
