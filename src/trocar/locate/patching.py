"""Causal patching: which modules' outputs, copied from a run that answers right, repair a run that does not. Floor 3.

Reference: CREME, arXiv:2402.14328 (locating); the windows are those of its reference code. Copied are the outputs of the projections `o`
and `down` and of whole blocks; in families with a norm after them (Gemma 2 and 3) the copy is made before that norm, which acts on each
position alone, so that what reaches the residual stream is the source run's own contribution either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trocar.anatomy import Anatomy, Component, Tower
from trocar.core.errors import DataError
from trocar.locate.cases import (
    POINTS,
    Position,
    Run,
    backs,
    check_kinds,
    check_pairs,
    ends_at,
    interval,
    name_in,
    observe,
    run_inputs,
    score_and_rank,
    told,
    warn_of_sources,
)
from trocar.locate.scores import How, Scores
from trocar.trace import Point, Replace, sweep
from trocar.trace.queries import Asked, Mode, ask, language_tower

MODULES = ("block", "attention", "mlp")


def window_of(layer: int, width: int, layers: int) -> range:
    """The layers of a window around `layer`: max(0, l - floor(w/2)) up to min(L, l + ceil(w/2)), the last one excluded."""
    return range(max(0, layer - width // 2), min(layers, layer + (width + 1) // 2))


@dataclass(frozen=True, eq=False)
class Effects:
    """What copying module outputs did. Arrays are (cases,) or by kind (cases, layers), float64.

    effects: score after the copy minus `clean`; ranks: the answer's rank after the copy minus `clean_rank` (negative: it rose). source,
    source_rank: of the answer in the source run. window: layers copied at once around each layer (blocks: always one).
    """

    effects: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]
    clean: np.ndarray
    clean_rank: np.ndarray
    source: np.ndarray
    source_rank: np.ndarray
    position: Position
    window: int
    mode: Mode
    tower: Tower = field(repr=False)
    how: How = field(repr=False)

    def scores(self, kind: str) -> Scores:
        """The mean effects of a kind as Scores."""
        mean = self.effects[kind].mean(0)
        return Scores(kind, self.tower.name, {name_in(self.tower, layer, kind): float(x) for layer, x in enumerate(mean)}, self.how)

    def rows(self, seed: int = 0) -> list[dict[str, Any]]:
        """One row per kind and layer: mean effect with its bootstrap interval over cases, and the mean change of rank."""
        rows = []
        for kind, values in self.effects.items():
            mean, low, high = interval(values, seed)
            rank = self.ranks[kind].mean(0)
            rows += [
                {"kind": kind, "layer": n, "effect": mean[n], "low": low[n], "high": high[n], "rank": rank[n]} for n in range(len(mean))
            ]
        return rows


@dataclass(frozen=True, eq=False)
class Pairs:
    """Prompts to change, with what their source runs say at the same position. Made by `pair`."""

    anatomy: Anatomy
    tower: Tower
    asked: Asked
    at: tuple[tuple[int, ...], ...]
    source: Run
    batch_size: int

    def copy(self, where: Point | Component) -> Replace:
        """The intervention that puts the source run's output of a point, head or neuron in place of the prompt's own."""
        if isinstance(where, Point):
            value = self.source.states[str(where)]
        else:
            kind, index = where.kind, getattr(where, "index", None)
            value = self.source.states[str(Point(POINTS[kind], where.layer, self.tower.name))]  # type: ignore[attr-defined]
            value = value if index is None else value[:, index]
            where = where if index is not None else Point(POINTS[kind], where.layer, self.tower.name)  # type: ignore[attr-defined]
        return Replace(where, value, positions=self.at)

    def run(self, sets: Sequence[Sequence[Replace]], **options: Any) -> torch.Tensor:
        """Scores and ranks under each set of copies, after those of the unchanged run: (1 + sets, cases, 2) float64."""
        inputs, metric = run_inputs(self.anatomy, self.asked), score_and_rank(self.asked)
        read = self.asked.read
        found = sweep(self.anatomy, inputs, [[], *sets], metric, batch_size=self.batch_size, read=read, numbers=2, **options)
        return found.double()


def pair(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sources: Sequence[str],
    answers: Sequence[str],
    kinds: Sequence[str],
    position: Position = "last",
    subjects: Sequence[str] | None = None,
    mode: Mode = "sequence",
    batch_size: int = 32,
    layers: Sequence[int] | None = None,
) -> Pairs:
    """Run the sources and keep their outputs of `kinds` (POINTS) at the position, in all or some layers; see `module_effects`."""
    anatomy = Anatomy.of(model)
    tower = language_tower(anatomy)
    back = backs(tokenizer, prompts, position, subjects)
    check_pairs(tokenizer, prompts, sources, back)
    points = [Point(POINTS[kind], layer, tower.name) for kind in kinds for layer in (range(tower.n_layers) if layers is None else layers)]
    source = observe(anatomy, tokenizer, sources, answers, points, back, mode, batch_size)
    warn_of_sources(source, sources, answers)
    asked = ask(anatomy, tokenizer, prompts, answers, mode)
    return Pairs(anatomy, tower, asked, ends_at(asked, back), source, batch_size)


def module_effects(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sources: Sequence[str],
    answers: Sequence[str],
    kinds: Sequence[str] = MODULES,
    position: Position = "last",
    *,
    subjects: Sequence[str] | None = None,
    window: int = 1,
    mode: Mode = "sequence",
    batch_size: int = 32,
    fingerprint: str | None = None,
    **options: Any,
) -> Effects:
    """How much of each answer comes back when a layer's module outputs are copied from the source run, for all layers and kinds.

    prompts: the ones to change; sources: for each a prompt after which the model answers right; answers: what is scored, each after its
    prompt. kinds: of `block`, `attention`, `mlp`. position: where the copy is made, `last`, a negative number from the prompt's end, or
    `subject`: the last token of the noun phrase that `subjects` gives for each prompt; source and prompt are aligned from their ends,
    since both share the words after it. window: copy this many layers at once around each (CREME's reference uses 6 for attention and MLP;
    blocks are copied one by one). mode: how answers are scored (`trocar.trace.queries.Asked`). fingerprint: of the model, if known.
    options: of `sweep`.

    Raises DataError for unequal numbers, phrases that are not in their prompt and tails that differ, ComponentError for kinds. Warns where
    prompt and source end in different tokens and where a source run does not rank its answer among the first ten.
    """
    kinds = check_kinds(kinds, MODULES)
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise DataError(f"A window of {window!r} layers cannot be copied.", "Use 1 or more.")
    pairs = pair(model, tokenizer, prompts, sources, answers, kinds, position, subjects, mode, batch_size)
    n_layers, tower = pairs.tower.n_layers, pairs.tower
    sets = [
        [pairs.copy(Point(POINTS[kind], near, tower.name)) for near in window_of(layer, 1 if kind == "block" else window, n_layers)]
        for kind in kinds
        for layer in range(n_layers)
    ]
    found = pairs.run(sets, **options).numpy()
    change = (found[1:] - found[0]).reshape(len(kinds), n_layers, len(prompts), 2).transpose(0, 2, 1, 3)
    how = told(
        *("causal patching", pairs.anatomy.model, fingerprint),
        **{"cases": len(prompts), "position": position, "window": window, "mode": mode},
    )
    return Effects(
        {kind: change[place, :, :, 0] for place, kind in enumerate(kinds)},
        {kind: change[place, :, :, 1] for place, kind in enumerate(kinds)},
        *(found[0, :, 0], found[0, :, 1], pairs.source.score.numpy(), pairs.source.rank.numpy()),
        *(position, window, mode, tower, how),
    )


def component_effects(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sources: Sequence[str],
    answers: Sequence[str],
    components: Sequence[Component | str],
    position: Position = "last",
    *,
    subjects: Sequence[str] | None = None,
    mode: Mode = "sequence",
    batch_size: int = 32,
    **options: Any,
) -> np.ndarray:
    """The effect of copying single components (blocks, attentions, MLPs, heads, neurons), (cases, components); see `module_effects`."""
    anatomy = Anatomy.of(model)
    items: list[Any] = [anatomy.check(component) for component in components]
    if not items:
        raise DataError("There is no component to copy.", "Name at least one.")
    kinds = check_kinds([item.kind for item in items], tuple(POINTS))
    layers = sorted({item.layer for item in items})
    pairs = pair(anatomy, tokenizer, prompts, sources, answers, kinds, position, subjects, mode, batch_size, layers)
    found = pairs.run([[pairs.copy(item)] for item in items], **options)[:, :, 0].numpy()
    return (found[1:] - found[0]).T


def best_window(effects: Effects | Scores | np.ndarray, width: int, kind: str = "attention", skip_first: bool = True) -> tuple[int, ...]:
    """The `width` neighbouring layers with the largest mean effect; ties go to the lower ones.

    effects: of single layers (an array is (layers,) or (cases, layers)): the window's mean is compared; Effects measured with
    `window=width`: the effect of copying that very window at once. skip_first: leave out layer 0, which reads the source's own words from
    its embedding, so that copying it copies the input. Raises DataError where no window fits.
    """
    if isinstance(effects, Effects):
        if effects.window not in (1, width):
            raise DataError(f"Effects of windows of {effects.window} do not choose one of {width}.", "Measure with window=1 or that width.")
        values, whole = effects.effects[kind].mean(0), effects.window == width and kind != "block"
    else:
        flat = effects.flat if isinstance(effects, Scores) else np.asarray(effects, dtype=np.float64)
        values, whole = (flat.mean(0) if flat.ndim == 2 else flat), False
    first = int(skip_first)
    starts = range(first, len(values) - width + 1)
    if width < 1 or not starts:
        raise DataError(f"There is no window of {width} of {len(values) - first} layers.", "Ask for fewer.")
    gains = [values[start + width // 2] if whole else values[start : start + width].mean() for start in starts]
    start = starts[int(np.argmax(gains))]
    return tuple(range(start, start + width))


__all__ = ["MODULES", "Effects", "Pairs", "best_window", "component_effects", "module_effects", "pair", "window_of"]
