"""One metric under many interventions, without computing anything twice. Floor 2.

The inputs are run once. A set of interventions whose first change is in block l at column c needs only the blocks from l on and, in a
causal model, only the columns from c on: hidden states, keys and values of the rest are those of the first run. Sets that share a start
are run together, each in rows of its own. So the effects of all heads at the last token cost one pass and then one token per head in the
blocks above it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trocar.anatomy import Anatomy, Tower
from trocar.core.errors import DataError, InterventionError
from trocar.core.progress import track
from trocar.trace.calls import Frame, row_ends
from trocar.trace.intervene import acting
from trocar.trace.interventions import Intervention
from trocar.trace.points import Site, locate_site
from trocar.trace.prefix import Captured, Prefix, capture, select_rows, why_no_position
from trocar.trace.queries import only_last

Metric = Callable[[Any, torch.Tensor], torch.Tensor]
Sited = tuple[Site, Intervention]
PASS_COST = 16  # what starting a block costs beside its tokens, in tokens: decides whether two sets are worth one pass
COMPLETED = ("logits", "last_hidden_state")


@dataclass(frozen=True)
class SweepReport:
    """What a sweep did. `share`: blocks times positions computed, of what plain passes would have computed."""

    sets: int
    rows: int
    passes: int
    processes: int
    layer_reuse: bool
    position_reuse: bool
    reasons: tuple[str, ...]  # why a kind of reuse was not used
    share: float


def sweep(
    model: Any,
    inputs: Mapping[str, Any],
    interventions: Sequence[Sequence[Intervention] | Intervention],
    metric: Metric,
    *,
    batch_size: int = 32,
    reuse: bool = True,
    read: str = "all",
    numbers: int = 0,
    tell: Callable[[SweepReport], None] | None = None,
) -> torch.Tensor:
    """Evaluate `metric` on `inputs` under each set of interventions; returns (sets, rows), float32 on the CPU.

    model: a transformers model in evaluation mode, or its `Anatomy`. inputs: keyword arguments of its forward pass, tensors with rows
    first. interventions: one set per result row; an empty set gives the unchanged model's metric. Sets may act in different layers, at
    different positions and on different rows, but in one tower. metric(output, rows) gets the model's output for a batch and the input
    rows it belongs to, (batch,) int64 on the CPU, and returns one number per row of the batch, (batch,). numbers: with 2, say, it returns
    two per row, (batch, 2), and the result is (sets, rows, 2).

    batch_size: rows per forward pass. read: "all" gives the metric outputs of every position, as in a plain run; "last" only the last
    position's (length 1; the language model head then runs there only), which is much cheaper for large vocabularies. reuse=False runs
    every set in full. Reuse is exact up to rounding; where it cannot be (no cache, inputs of unknown layout), that kind is not used, and
    the `SweepReport` handed to `tell` says why. (At padding the outputs of a causal model have no meaning and may differ.)

    Under `accelerate launch` (or an initialised process group) the work is split over the processes and every process returns the whole
    result; each must call `sweep` with equal arguments.

    Raises InterventionError as `intervene` does, and DataError if the model is in training mode, or `read="last"` meets right padding or a
    model that does not read from left to right.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    if anatomy.model.training:
        raise DataError("A sweep needs a model in evaluation mode, or dropout would decide the result.", "Call model.eval() first.")
    if read not in ("all", "last"):
        raise DataError(f"read='{read}' has no meaning.", "Use 'all' or 'last'.")
    if batch_size < 1 or numbers < 0:
        raise DataError(f"batch_size={batch_size} and numbers={numbers} cannot be.", "Use 1 or more rows, and 0 or more numbers.")
    sets = [[item] if isinstance(item, Intervention) else list(item) for item in interventions]
    sited = [[(locate_site(anatomy, item.where), item) for item in items] for items in sets]
    engine = _Engine.of(anatomy, inputs, sited, metric, batch_size, reuse, read, numbers)
    with torch.no_grad():
        result = engine.run()
    if tell is not None:
        tell(engine.report())
    return result


@dataclass(frozen=True)
class _Job:
    """A set of interventions on one chunk of rows, and where it starts to change anything."""

    number: int
    items: list[Sited]
    layer: int
    position: int


@dataclass(eq=False)
class _Engine:
    anatomy: Anatomy
    tower: Tower
    inputs: dict[str, Any]
    sets: list[list[Sited]]
    metric: Metric
    batch_size: int
    read: str
    layer_reuse: bool
    position_reuse: bool
    reasons: list[str]
    rows: int
    length: int
    ends: list[int] | None
    rank: int
    world: int
    device: torch.device
    numbers: int = 0
    passes: int = 0
    work: int = 0

    @classmethod
    def of(
        cls,
        anatomy: Anatomy,
        inputs: Mapping[str, Any],
        sets: list[list[Sited]],
        metric: Metric,
        batch_size: int,
        reuse: bool,
        read: str,
        numbers: int,
    ) -> _Engine:
        names = list(dict.fromkeys(site.point.tower for items in sets for site, _ in items))
        if len(names) > 1:
            raise InterventionError(f"The sets act in the towers {' and '.join(names)}.", "Sweep one tower at a time.")
        tower = anatomy.tower(names[0] if names else next(iter(anatomy.towers)))
        if read == "last" and not tower.causal:
            raise DataError(f"read='last' has no meaning for {type(anatomy.model).__name__}, which reads all positions at once.")
        full = dict(inputs)
        if read == "last":
            full = {**only_last(anatomy.model, 1), **full}
        shape = capture(anatomy, full, [0], tower.name)  # the embedding only: how many rows and columns there are
        mask = inputs.get("attention_mask") if tower.modality == "text" else None
        ends = row_ends(mask, shape.length) if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        if read == "last" and ends is not None:
            raise DataError("read='last' needs the last column of every row to be a token.", "Pad on the left, or use read='all'.")
        reasons = [] if reuse else ["reuse=False"]
        reason = why_no_position(anatomy, tower, full)
        if reuse and reason:
            reasons.append(f"nothing left of the first changed position is reused: {reason}")
        rank, world, device = processes(next(anatomy.model.parameters()).device)
        return cls(
            *(anatomy, tower, dict(shape.inputs), sets, metric, batch_size, read, reuse, reuse and not reason, reasons),
            *(shape.batch, shape.length, ends, rank, world, device, numbers),
        )

    def run(self) -> torch.Tensor:
        result = torch.zeros(len(self.sets), self.rows, *self._wide, dtype=torch.float32)
        # few rows at a time, if the sets alone fill a pass: they start as late as each row allows, and one row's keys need no copying
        size = max(1, self.batch_size // max(1, len(self.sets)))
        chunks = torch.arange(self.rows).split(size)
        by_chunk = len(chunks) >= self.world > 1  # whole chunks per process, so that no chunk's first run is made twice
        for number, rows in enumerate(track(list(chunks), "sweep")):
            if not by_chunk or number % self.world == self.rank:
                self._chunk(rows, result, by_chunk)
        self.passes, self.work = self._gather(torch.tensor([self.passes, self.work])).tolist()
        return self._gather(result)

    def report(self) -> SweepReport:
        plain = len(self.sets) * self.rows * self.tower.n_layers * self.length
        return SweepReport(
            *(len(self.sets), self.rows, self.passes, self.world, self.layer_reuse, self.position_reuse, tuple(self.reasons)),
            share=self.work / plain if plain else 0.0,
        )

    def _chunk(self, rows: torch.Tensor, result: torch.Tensor, whole: bool) -> None:
        """All sets on some rows."""
        inputs = select_rows(self.anatomy, self.inputs, self.tower, self.rows, rows)
        jobs = [self._job(number, items, rows.tolist()) for number, items in enumerate(self.sets)]
        changing = sorted((job for job in jobs if job.items), key=lambda job: (job.position, job.layer, job.number))
        batches = list(self._batches(changing, len(rows)))
        mine = batches if whole else batches[self.rank :: self.world]
        idle = [job.number for job in jobs if not job.items] if whole or self.rank == 0 else []
        if not mine and not idle:
            return
        base = self._base(inputs, mine, bool(idle))
        if idle:
            result[idle, rows[0] : rows[-1] + 1] = self._score(self._complete(base.output, None, None), rows)
        for batch in mine:
            start = min(job.layer for job in batch), min(job.position for job in batch)
            scores = self._score(self._pass(base, start, batch, len(rows)), rows.repeat(len(batch)))
            for job, score in zip(batch, scores.split(len(rows)), strict=True):
                result[job.number, rows[0] : rows[-1] + 1] = score

    def _job(self, number: int, items: list[Sited], rows: list[int]) -> _Job:
        """The set as it acts on these rows: interventions on other rows only are left out, row numbers and values are theirs."""
        found = [(site, local) for site, item in items if (local := _restrict(item, rows, self.rows, site)) is not None]
        layer = min((site.point.layer for site, _ in found), default=self.tower.n_layers) if self.layer_reuse else 0
        ends = None if self.ends is None else [self.ends[row] for row in rows]
        frame = Frame(0, self.length, len(rows), self.length, 1, ends)
        position = min((_first_column(item, frame) for _, item in found), default=self.length) if self.position_reuse else 0
        return _Job(number, found, layer, position)

    def _batches(self, jobs: Sequence[_Job], rows: int) -> Iterator[list[_Job]]:
        """Group sorted jobs into passes of at most `batch_size` rows, together where that costs less than apart."""
        batch: list[_Job] = []
        for job in jobs:
            if batch and (
                (len(batch) + 1) * rows > self.batch_size
                or self._cost([*batch, job], rows) > self._cost(batch, rows) + self._cost([job], rows)
            ):
                yield batch
                batch = []
            batch.append(job)
        if batch:
            yield batch

    def _cost(self, jobs: Sequence[_Job], rows: int) -> int:
        layers = self.tower.n_layers - min(job.layer for job in jobs) + 1
        return layers * ((self.length - min(job.position for job in jobs)) * len(jobs) * rows + PASS_COST)

    def _base(self, inputs: Mapping[str, Any], batches: Sequence[Sequence[_Job]], output: bool) -> Captured:
        """The first run: as far up as it is needed, with keys and values if a pass starts in the middle."""
        layers = sorted({min(job.layer for job in batch) for batch in batches} | {0})
        cached = any(min(job.position for job in batch) > 0 for batch in batches)
        self.passes += 1
        base = capture(self.anatomy, inputs, layers, self.tower.name, cached=cached, to_end=output or cached)
        self.work += base.batch * self.length * (self.tower.n_layers if output or cached else layers[-1])
        return base

    def _pass(self, base: Captured, start: tuple[int, int], batch: Sequence[_Job], rows: int) -> Any:
        layer, position = start
        items = [(site, _move(item, place * rows, rows)) for place, job in enumerate(batch) for site, item in job.items]
        index = torch.arange(rows).repeat(len(batch))
        self.passes += 1
        self.work += len(index) * (self.tower.n_layers - layer) * (self.length - position)
        with acting(self.anatomy, items):
            if self.layer_reuse:
                output = Prefix(base, layer, position).run(index)
            else:
                output = self.anatomy.model(**select_rows(self.anatomy, base.inputs, self.tower, base.batch, index))
        return self._complete(output, base.output if position else None, index)

    def _complete(self, output: Any, base: Any, index: torch.Tensor | None) -> Any:
        """Put the first run's outputs left of the first changed position, or cut to the last position."""
        for name in COMPLETED:
            new = output.get(name) if hasattr(output, "get") else None
            if not isinstance(new, torch.Tensor) or new.ndim != 3:
                continue
            if self.read == "last" and self.tower.causal:
                output[name] = new[:, -1:]
            elif base is not None and base[name].shape[1] > new.shape[1] and index is not None:
                missing = base[name].shape[1] - new.shape[1]
                output[name] = torch.cat([base[name][:, :missing].index_select(0, index.to(new.device)), new], dim=1)
        return output

    def _score(self, output: Any, rows: torch.Tensor) -> torch.Tensor:
        scores = self.metric(output, rows)
        if not isinstance(scores, torch.Tensor) or scores.shape != (len(rows), *self._wide):
            got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            shape = "one number per row, shaped (rows,)" if not self.numbers else f"a tensor shaped (rows, {self.numbers})"
            raise DataError(f"The metric returned {got} for {len(rows)} rows.", f"It must return {shape}.")
        return scores.to("cpu", torch.float32)

    @property
    def _wide(self) -> tuple[int, ...]:
        return (self.numbers,) if self.numbers else ()

    def _gather(self, part: torch.Tensor) -> torch.Tensor:
        """Sum over processes; every entry is nonzero in one of them."""
        if self.world == 1:
            return part
        moved = part.to(self.device)
        torch.distributed.all_reduce(moved)
        return moved.cpu()


def _restrict(item: Intervention, rows: list[int], total: int, site: Site) -> Intervention | None:
    """The intervention on a chunk of the rows, with local row numbers; None if it acts on none of them."""
    acted = range(total) if item.rows is None else item.rows
    if max(acted) >= total:
        raise InterventionError(f"{item} acts on row {max(acted)}, but the inputs have {total} rows.", "Rows count from 0.")
    if item.per_row and len(item.positions) != len(acted):  # type: ignore[arg-type]
        raise InterventionError(f"{item} has {len(item.positions)} lists of positions for {len(acted)} rows.")  # type: ignore[arg-type]
    local = {row: place for place, row in enumerate(rows)}
    kept = [(number, local[row]) for number, row in enumerate(acted) if row in local]
    if not kept:
        return None
    numbers = [number for number, _ in kept]
    positions: Any = tuple(item.row_positions(number) for number in numbers) if item.per_row else item.positions
    value = item.value
    if isinstance(value, torch.Tensor) and value.ndim > _features(site) and value.shape[0] == len(acted):
        value = value[torch.tensor(numbers, device=value.device)]
    return replace(item, value=value, positions=positions, rows=[place for _, place in kept])


def _features(site: Site) -> int:
    """How many dimensions one position has there."""
    return (2 if site.point.kind == "heads" else 1) - (site.index is not None)


def _move(item: Intervention, by: int, rows: int) -> Intervention:
    """The intervention on the rows of its own copy within a batch."""
    assert item.rows is not None
    return replace(item, rows=[row + by for row in item.rows])


def _first_column(item: Intervention, frame: Frame) -> int:
    if item.positions is None:
        return 0
    if item.positions == "generated":
        raise InterventionError(f"{item} acts on generated positions, and a sweep generates none.", "Use intervene around generate.")
    columns = [
        column
        for number, row in enumerate(item.rows or ())
        for column, _, _ in frame.columns(row, item.row_positions(number))  # type: ignore[arg-type]
    ]
    return min(columns, default=0)  # none at all: the pass will say that it never came into effect


def processes(model: torch.device) -> tuple[int, int, torch.device]:
    """Rank, number of processes, and the device on which they exchange results."""
    distributed = torch.distributed
    if not distributed.is_available():
        return 0, 1, torch.device("cpu")
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return 0, 1, torch.device("cpu")
        from accelerate import PartialState

        PartialState(cpu=model.type == "cpu")  # joins the process group that `accelerate launch` described
    if not distributed.is_initialized():
        return 0, 1, torch.device("cpu")
    device = torch.device("cpu") if distributed.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())
    return distributed.get_rank(), distributed.get_world_size(), device
