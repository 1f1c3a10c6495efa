"""What calibration says of a group's input: its rows, the second moments that GPTQ needs, the best clip of its activations. Floor 5."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from trocar.compress.duquant import streams
from trocar.compress.duquant.config import DuQuantConfig
from trocar.compress.duquant.groups import Group, Staged
from trocar.compress.duquant.rounding import Codes, Half, best_clip, gptq, nearest
from trocar.compress.duquant.streams import Batch
from trocar.patch.quantised import GroupInput, Quantiser, quantised

CLIP_ROWS = 2048  # about how many rows the search for a clip of activations looks at
KEPT = 1 << 30  # bytes of a group's input that are held at once
RATIOS = tuple(1 - 0.025 * i for i in range(17))  # 1.0 .. 0.6


class Moments(NamedTuple):
    """Sums over the rows x of a group's transformed and rounded input. hessian: x^T x, (C, C); halves: the same for every other batch and
    for the remaining ones, each with (f - x)^T x where f is the row in the float model; None if nobody asked."""

    hessian: torch.Tensor
    halves: tuple[Half, Half] | None


def group_inputs(staged: Staged, group: Group, batches: Sequence[Batch], limit: int, stream: torch.Generator) -> list[torch.Tensor]:
    """The group's input, by batch; of more than fits into KEPT bytes a sample of each batch that together are about `limit` rows."""
    columns = staged.layers[group.roles[0]].in_features
    total = sum(batch.positions for batch in batches)

    def kept(rows: torch.Tensor) -> torch.Tensor:
        share = len(rows) if 4 * total * columns <= KEPT else max(2, -(-limit * len(rows) // total))
        return streams.sample([rows], share, stream)

    return [kept(_input(staged, group, batch)) for batch in batches]


def _input(staged: Staged, group: Group, batch: Batch) -> torch.Tensor:
    found: list[torch.Tensor] = []
    head = {group.name: staged.layers[group.roles[0]]}
    streams.watch(staged.tower.blocks[staged.layer], staged.layer, batch, head, lambda name, rows: found.append(rows), stop=True)
    return found[0]


@contextmanager
def in_float(staged: Staged) -> Iterator[None]:
    """The block with its smoothed float layers in place of those that were quantised already."""
    now = dict(staged.layers)
    try:
        for role, layer in staged.floats.items():
            staged.place(role, layer)
        yield
    finally:
        for role, layer in now.items():
            staged.place(role, layer)


def moments(
    staged: Staged,
    group: Group,
    current: Sequence[Batch],
    shared: GroupInput,
    parts: Sequence[torch.Tensor],
    reference: Sequence[Batch] | None,
    reach: float | None,
) -> Moments:
    """Second moments of what the group's layers will multiply by.

    parts: rows from `group_inputs`, used where they are all there are. reference: inputs of the block in the float model, for `halves`.
    reach: rows longer than this many times the median length of their batch are counted as if they had that length, in both sums: one token
    a thousand times as long as the others would be all that the sums see, and the others' directions would drown in the damping.
    """
    whole = sum(len(part) for part in parts) == sum(batch.positions for batch in current)
    device = next(iter(shared.buffers()), parts[0]).device
    sums = [torch.zeros(shared.channels, shared.channels, device=device) for _ in range(1 if reference is None else 4)]
    with torch.no_grad():
        for number, batch in enumerate(current):
            rows = parts[number] if whole else _input(staged, group, batch)
            x = shared.values(rows).float()
            weights = row_weights(x, reach)
            half = 0 if reference is None else 2 * (number % 2)
            sums[half].addmm_((x * weights).T, x)
            if reference is not None:
                with in_float(staged):
                    wanted = shared.transform.online(_input(staged, group, reference[number]).float())
                sums[half + 1].addmm_((wanted - x).T, x * weights)
    if reference is None:
        return Moments(sums[0], None)
    return Moments(sums[0] + sums[2], (Half(sums[0], sums[1]), Half(sums[2], sums[3])))


def row_weights(x: torch.Tensor, reach: float | None) -> torch.Tensor | float:
    if reach is None:
        return 1.0
    lengths = x.norm(dim=1, keepdim=True)
    return (reach * lengths.median() / lengths.clamp(min=1e-30)).clamp(max=1).square()


def rounded(weight: torch.Tensor, quantiser: Quantiser, config: DuQuantConfig, hessian: torch.Tensor | None) -> Codes:
    """Codes of a weight as the settings ask for it; without a Hessian to nearest."""
    clip = None
    if config.weights.clip == "search":
        clip = best_clip(weight, quantiser, None if hessian is None else hessian.diagonal())
    return nearest(weight, quantiser, clip) if hessian is None else gptq(weight, hessian, quantiser, clip)


def activation_clip(turned: torch.Tensor, quantiser: Quantiser, ratios: Sequence[float] = RATIOS) -> float:
    """The one clip ratio for all rows (T, C) with the least mean relative squared error; every row counts alike, long or short."""
    lengths = turned.square().sum(1).clamp(min=1e-30)
    errors = [float(((quantised(turned, quantiser, ratio) - turned).square().sum(1) / lengths).mean()) for ratio in ratios]
    return ratios[errors.index(min(errors))]
