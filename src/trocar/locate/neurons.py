"""MLP neurons: integrated gradients of an answer's probability over all neurons of all layers at the last position. Floor 3.

    a = the neurons' activations f_l (inputs of the down projections) at the last position of a clean run, all layers
    P(alpha) = probability of the target when f_l := alpha * a_l in every layer at once
    Attr[l, i] = a[l, i] * weighted mean over points alpha_k of dP/df_l[i] at alpha_k * a

After Dai et al. (knowledge neurons, arXiv:2104.08696) in the joint form of arXiv:2410.07054. Over all neurons it sums to P(1) - P(0), told
beside the result. Only the last position changes, so a row's points are a batch of single tokens behind one cached prefix; rows
that are prefixes of each other (positions of one text, a loop grown unit by unit) share it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from trocar.anatomy import Anatomy, Tower, fingerprint
from trocar.core.errors import DataError, ScoresError
from trocar.core.progress import track
from trocar.locate.heads import check_tokens, decoder, prepared, running
from trocar.locate.scores import How, Scores
from trocar.trace import Point, Replace, intervene, record
from trocar.trace.prefix import SEQUENCE, Captured, Prefix, capture, why_no_position
from trocar.trace.queries import batch_of

Grid = Literal["auto", "midpoint", "endpoint", "log", "first-order"]
GRIDS = ("midpoint", "endpoint", "log", "first-order")
LOWEST = 1e-6  # where the grid `log` starts
KEPT = 500  # neurons stored per token (arXiv:2410.07054, reference code)


@dataclass(frozen=True, eq=False)
class NeuronLists:
    """The neurons with the largest attributions of each instance, best first, without their being held all at once.

    places: (instances, k) int32, neurons counted through all layers; values: (instances, k) float32, their attributions;
    sizes: neurons of each layer; tower, how: of the Scores made of it.
    """

    places: np.ndarray
    values: np.ndarray
    sizes: tuple[int, ...]
    tower: str
    how: How

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: Any) -> NeuronLists:
        """The lists of some instances: a slice, a boolean mask or indices."""
        return replace(
            self, places=self.places[rows].reshape(-1, self.places.shape[1]), values=self.values[rows].reshape(-1, self.values.shape[1])
        )

    def scores(self, flat: np.ndarray, how: How) -> Scores:
        """(neurons,) as Scores."""
        return neuron_scores(flat, self.sizes, self.tower, how)


@dataclass(frozen=True, eq=False)
class Attributions:
    """What `neuron_attributions` found.

    scores: the sum over instances (signed). lists: each instance's highest, if asked for. full, none: (instances,) float64, the target's
    probability with all neurons as they are (P(1)) and with all of them at 0 (P(0)); NaN in the form per layer. sums: (instances,) each
    instance's sum over all neurons.
    """

    scores: Scores
    lists: NeuronLists | None
    full: np.ndarray
    none: np.ndarray
    sums: np.ndarray

    @property
    def incompleteness(self) -> np.ndarray:
        """|sum - (P(1) - P(0))| of each instance: what the steps were too coarse for."""
        return np.abs(self.sums - (self.full - self.none))


def neuron_attributions(
    model: Any,
    rows: Sequence[Sequence[int]],
    targets: Sequence[int] | torch.Tensor,
    *,
    steps: int = 20,
    grid: Grid = "auto",
    per_layer: bool = False,
    keep: int | None = None,
    batch_size: int = 64,
    reuse: bool = True,
    how: How | None = None,
) -> Attributions:
    """Attribute the probability of each row's target as next token to the neurons at the row's last position.

    model: a decoder in evaluation mode, or its `Anatomy`; its parameters and their gradients are not touched. rows: token ids;
    targets: one token each. steps (20 in the reference code), grid: the points alpha_k, see `grid_points`; "auto" is `log` where a norm
    follows the MLP (Gemma 2 and 3) and `midpoint` elsewhere. per_layer: scale one layer at a time and leave the others as they are (the
    original knowledge neurons), which does not sum to P(1) - P(0).
    keep: store the so many highest neurons of each instance (500 in the reference code). batch_size: rows of one token per pass; memory
    grows with it and with the length of the rows. reuse=False computes full rows instead (the same numbers, for comparison).
    how: where the scores say they come from; by default method, settings and the fingerprint of the model, which is hashed for it.

    Works under torch.no_grad and inference_mode as well. Raises DataError for rows and targets that do not fit, or a grid without points.
    """
    anatomy = decoder(model)
    tower = anatomy.tower()
    wanted = [int(token) for token in torch.as_tensor(targets).tolist()]
    if len(rows) != len(wanted) or not wanted:
        raise DataError(f"{len(rows)} rows and {len(wanted)} targets cannot be paired.", "Give one target for every row, and at least one.")
    if not all(rows):
        raise DataError("There is an empty row.", "Give at least one token a row.")
    check_tokens(anatomy, wanted)
    normed = any(tower.has(layer, "mlp_post_norm") for layer in range(tower.n_layers))
    if grid == "auto":
        grid = "log" if normed else "midpoint"
    points = grid_points(steps, grid)
    if normed and grid in ("midpoint", "endpoint"):
        warnings.warn(
            f"A norm follows the MLPs of this model and undoes most of the scaling: grid='{grid}' misses it; use 'log'.", stacklevel=2
        )
    sizes = tuple(tower.neurons(layer) for layer in range(tower.n_layers))
    total = np.zeros(sum(sizes))
    if keep is not None:
        keep = _at_most(keep, sum(sizes))
    places = np.zeros((len(rows), keep or 0), np.int32)
    values = np.zeros((len(rows), keep or 0), np.float32)
    full, none, sums = (np.full(len(rows), np.nan) for _ in range(3))
    groups = list(_groups(families(rows), max(1, batch_size // (len(points) + 2))))
    for group in track(groups, "neuron attributions"):
        with running(anatomy, grad=True):
            for instances, found, ends in _attribute(anatomy, tower, group, rows, wanted, points, per_layer, batch_size, reuse):
                total += found.sum(0).cpu().numpy()
                sums[instances] = found.sum(1).cpu().numpy()
                none[instances], full[instances] = ends.cpu().numpy()
                if keep:
                    best, order = best_first(found, keep)
                    places[instances], values[instances] = order.cpu().numpy(), best.cpu().numpy()
    if how is None:
        settings = {"steps": len(points), "grid": grid, "per_layer": per_layer, "instances": len(rows), "position": "last"}
        how = How("integrated gradients of neurons", settings=settings, fingerprint=fingerprint(anatomy.model))
    scores = neuron_scores(total, sizes, tower.name, how)
    lists = NeuronLists(places, values, sizes, tower.name, how.then("lists", keep=keep)) if keep else None
    return Attributions(scores, lists, full, none, sums)


def grid_points(steps: int, grid: Grid) -> tuple[tuple[float, float], ...]:
    """The points alpha_k at which the gradient is taken, and their weights in the mean.

    `midpoint`: (k + 1/2) / steps, whose error falls with the square of the steps; `endpoint`: k / (steps - 1), the reference code's;
    `log`: midpoints of equal steps in log(alpha), for models in which a norm undoes the scaling (Gemma 2 and 3): there P is flat but for
    the smallest alpha, where the other grids have no point; `first-order`: the point 1 alone, gradient times activation, a cheap ranking.
    """
    if grid not in GRIDS:
        raise DataError(f"'{grid}' is not a grid.", f"Use one of auto, {', '.join(GRIDS)}.")
    if grid == "first-order":
        return ((1.0, 1.0),)
    if steps < (2 if grid == "endpoint" else 1):
        raise DataError(f"{steps} steps are too few for the grid '{grid}'.", "Use 20.")
    if grid == "log":
        step = -math.log(LOWEST) / steps
        return tuple((alpha, 2 * math.sinh(step / 2) * alpha) for alpha in (math.exp(-(k + 0.5) * step) for k in range(steps)))
    return tuple(((k + 0.5) / steps if grid == "midpoint" else k / (steps - 1), 1 / steps) for k in range(steps))


def neuron_scores(flat: np.ndarray, sizes: Sequence[int], tower: str, how: How) -> Scores:
    """(neurons of all layers,) as Scores of kind neuron."""
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    prefix = f"{tower}." if tower else ""
    return Scores("neuron", tower, {f"{prefix}L{layer}.N": part for layer, part in enumerate(parts)}, how)


def frequency(
    lists: NeuronLists,
    against: NeuronLists | None = None,
    *,
    contrast: Literal["none", "task", "first"] = "none",
    weight: Literal["list", "attr"] = "list",
) -> Scores:
    """How regularly each neuron is among the highest: the share of lists that contain it, minus its share of the lists `against`.

    For repetition neurons, `lists` are those of a loop's tokens from the second occurrence of the unit on. contrast says what `against`
    is: `task` normal generation, `first` the unit's first occurrence; without one, nothing is subtracted (the default, since the neurons
    that start a loop are already active when the unit is produced for the first time). weight="attr": the mean attribution over the lists
    (0 where a list lacks the neuron) in place of the share. Take the best with `refine.top_masks(..., positive=True)`.
    """
    if contrast not in ("none", "task", "first") or weight not in ("list", "attr"):
        raise ScoresError(f"contrast='{contrast}' with weight='{weight}' is unknown.", "contrast: none, task, first; weight: list, attr.")
    if (contrast == "none") != (against is None):
        raise ScoresError(f"contrast='{contrast}' and the lists to compare with do not go together.", "Give both, or neither.")
    for part in (lists, against):
        if part is not None and not len(part):
            raise ScoresError("There are no lists to count in.", "A setting without cases is left out, not scored.")
    if against is not None and (against.sizes, against.tower, against.how.fingerprint) != (lists.sizes, lists.tower, lists.how.fingerprint):
        raise ScoresError("The lists to compare with come from another model.", "Attribute both on the same model.")
    flat = _shares(lists, weight) - (0 if against is None else _shares(against, weight))
    how = lists.how.then("frequency", contrast=contrast, weight=weight, over=len(lists), against=0 if against is None else len(against))
    return lists.scores(flat, how)


def _shares(lists: NeuronLists, weight: str) -> np.ndarray:
    weights = np.ones(lists.places.size) if weight == "list" else lists.values.astype(np.float64).ravel()
    return np.bincount(lists.places.ravel(), weights, minlength=sum(lists.sizes)) / len(lists)


# -- shared prefixes --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Rows that are prefixes of the longest of them: `longest` its number, `members` (row, its tokens less than the longest)."""

    longest: int
    members: tuple[tuple[int, int], ...]


def families(rows: Sequence[Sequence[int]]) -> list[Family]:
    """Group rows that are prefixes of each other, so that one pass serves them all."""
    order = sorted(range(len(rows)), key=lambda number: (tuple(rows[number]), number), reverse=True)
    found: list[tuple[int, list[tuple[int, int]]]] = []
    for number in order:  # a row's extensions come right before it
        row = tuple(rows[number])
        if found and tuple(rows[found[-1][0]][: len(row)]) == row:
            found[-1][1].append((number, len(rows[found[-1][0]]) - len(row)))
        else:
            found.append((number, [(number, 0)]))
    return [Family(longest, tuple(members)) for longest, members in found]


def _groups(found: Sequence[Family], size: int) -> Iterator[list[Family]]:
    """Families of like length and offsets together, `size` at a time. Those with several members go alone: they fill passes themselves."""
    single = sorted((family for family in found if len(family.members) == 1), key=lambda family: family.longest)
    for family in found:
        if len(family.members) > 1:
            yield [family]
    for start in range(0, len(single), size):
        yield list(single[start : start + size])


def _cut(captured: Captured, columns: int) -> Captured:
    """What was captured, as if the inputs ended after `columns` columns: left to right, later tokens change nothing before them."""
    if columns == captured.length:
        return captured
    names = (*SEQUENCE, "attention_mask")
    inputs = {name: value[:, :columns] if name in names and value.ndim > 1 else value for name, value in captured.inputs.items()}
    return replace(captured, inputs=inputs, length=columns, hidden={layer: value[:, :columns] for layer, value in captured.hidden.items()})


# -- integration ------------------------------------------------------------------------------------------------------------------------


def _attribute(
    anatomy: Anatomy, tower: Tower, group: Sequence[Family], rows: Sequence[Sequence[int]], targets: Sequence[int],
    points: Sequence[tuple[float, float]], per_layer: bool, batch_size: int, reuse: bool,
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:  # fmt: skip
    """For instances that end in one column: their numbers, attributions (instances, neurons) float64, and (P(0), P(1)) (2, instances)."""
    inputs = prepared(anatomy, batch_of(anatomy, [rows[family.longest] for family in group]), "last")
    offsets = sorted({offset for family in group for _, offset in family.members})
    names = [Point("neurons", layer, tower.name) for layer in range(tower.n_layers)]
    cached = not why_no_position(anatomy, tower, inputs)
    with record(anatomy, names, [-1 - offset for offset in offsets]) as seen:
        captured = capture(anatomy, inputs, range(tower.n_layers), tower.name, cached=cached, to_end=True)
    for number, offset in enumerate(offsets):
        here = [(place, row) for place, family in enumerate(group) for row, back in family.members if back == offset]
        source = torch.tensor([place for place, _ in here])
        clean = [seen[name][:, number].detach().index_select(0, source.to(seen[name].device)) for name in names]
        columns = captured.length - offset
        end = _cut(captured, columns), columns - 1 if cached and reuse else 0
        wanted = torch.tensor([targets[row] for _, row in here], device=clean[0].device)
        together = [[layer] for layer in range(tower.n_layers)] if per_layer else [list(range(tower.n_layers))]
        sums = [torch.zeros_like(layer, dtype=_sum_dtype(layer)) for layer in clean]
        ends = torch.full((2, len(here)), torch.nan, dtype=torch.float64)
        for layers in together:
            found = _integrate(*end, clean, layers, [names[layer] for layer in layers], source, wanted, points, batch_size, sums)
            ends = ends if per_layer else found
        flat = torch.cat([layer * part for layer, part in zip(clean, sums, strict=True)], dim=1)
        yield [row for _, row in here], flat.cpu().double(), ends


def _integrate(
    captured: Captured, position: int, clean: Sequence[torch.Tensor], layers: Sequence[int], names: Sequence[Point],
    source: torch.Tensor, targets: torch.Tensor, points: Sequence[tuple[float, float]], batch_size: int, sums: Sequence[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Add the weighted gradients of all points at `layers` to `sums`; returns P(0) and P(1), (2, instances)."""
    number, device = len(source), clean[0].device
    prefix = Prefix(captured, layers[0], position)
    inner = torch.tensor(points, dtype=_sum_dtype(clean[0]), device=device)
    scales, weights = inner.repeat_interleave(number, dim=0).unbind(1)  # one row a point and instance
    which = torch.arange(number).repeat(len(points))
    for chunk in torch.arange(len(scales)).split(batch_size):
        picked = which[chunk].to(device)
        inserted = [(clean[n].index_select(0, picked) * scales[chunk, None]).to(clean[n].dtype).requires_grad_() for n in layers]
        answers = _answers(prefix, names, inserted, source[which[chunk]], targets[picked])
        slopes = torch.autograd.grad((answers * weights[chunk]).sum(), inserted)
        for layer, slope in zip(layers, slopes, strict=True):
            sums[layer].index_add_(0, picked, slope.to(sums[layer].dtype))
    ends = []
    with torch.no_grad():
        for scale in (0, 1):
            parts = [_answers(prefix, names, [clean[n][part] * scale for n in layers], source[part], targets[part])
                     for part in torch.arange(number).split(batch_size)]  # fmt: skip
            ends.append(torch.cat(parts).double().cpu())
    return torch.stack(ends)


def _answers(
    prefix: Prefix, names: Sequence[Point], inserted: Sequence[torch.Tensor], rows: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The targets' probabilities with `inserted` as the last position's neurons, one row for each of `rows` of the prefix."""
    with intervene(prefix.captured.anatomy, [Replace(name, value, "last") for name, value in zip(names, inserted, strict=True)]):
        logits = prefix.run(rows).logits[:, -1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.softmax(-1).gather(1, targets[:, None])[:, 0]


def best_first(values: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `keep` highest of each row and their places, ties by lower place."""
    best, places = torch.sort(values, dim=1, descending=True, stable=True)
    return best[:, :keep].float(), places[:, :keep].int()


def _at_most(keep: int, total: int) -> int:
    if keep < 1:
        raise DataError(f"keep={keep} is not a number of neurons.", "Use 1 or more.")
    if keep > total:
        warnings.warn(f"keep={keep}, but there are only {total} neurons; all are listed.", stacklevel=3)
    return min(keep, total)


def _sum_dtype(like: torch.Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


__all__ = ["Attributions", "NeuronLists", "families", "frequency", "grid_points", "neuron_attributions", "neuron_scores"]
