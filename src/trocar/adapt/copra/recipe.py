"""CopRA as a recipe's method: adapters of a few seeds, plain LoRA's beside them, and what merging and pruning does to both."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pydantic
import torch

from trocar.adapt.copra.config import CopraConfig
from trocar.adapt.copra.measuring import Measured, orders_of_removal, pruned, removal, worth
from trocar.adapt.copra.training import PLAIN, LoraSettings, Trained, TrainSettings, train_adapter
from trocar.anatomy import Anatomy, fingerprint
from trocar.core.config import Config
from trocar.core.errors import ConfigError, DataError
from trocar.core.seeds import derive, generator
from trocar.evaluate import Curve, Measurement, Task, TaskScores, refuse_overlap, task_accuracy
from trocar.locate import How, Scores, Shapley
from trocar.method import Estimate, Examples, Figure, Gallery, Job, Method, Outcome, Transcript
from trocar.patch import Adapter, Patch, attached
from trocar.patch.combine import fusion, mixture
from trocar.trace.queries import continuations, encode

SHOWN = 16


class RecipeConfig(Config):
    """Which adapters are trained, and how they are measured.

    reads: `pictures` with labels, or `texts` with prompts and answers; form: of a prompt, `{}` stands for the row's (`The opposite of {}
    is`). holdout: share of the training rows that is kept back as the test set where the role `test` is missing. copra: its settings;
    compare: `plain` LoRA trained beside it, on the same rows from the same first values, or nothing. seeds: adapters of each. prune: ways
    of `trocar.patch.combine.prune`. shapley, orders: how each block's adapter is valued (`none`: not), on `probe` training rows. points:
    of the way between two seeds. batch_size: rows of a measuring pass.
    """

    reads: Literal["pictures", "texts"] = "pictures"
    form: str = "{}"
    holdout: float = pydantic.Field(default=0.2, gt=0, lt=1)
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    copra: CopraConfig = CopraConfig()
    compare: tuple[Literal["plain"], ...] = ("plain",)
    seeds: int = pydantic.Field(default=2, ge=1)
    prune: tuple[str, ...] = ("everyother", "otherhalf", "low", "middle", "high")
    shapley: Literal["auto", "exact", "multilinear", "permutation", "none"] = "auto"
    orders: int = pydantic.Field(default=16, ge=4, multiple_of=2)
    probe: int = pydantic.Field(default=200, ge=1)
    points: int = pydantic.Field(default=11, ge=3)
    batch_size: int = pydantic.Field(default=64, ge=1)


@dataclass(frozen=True)
class Side:
    """What was measured of one way of training."""

    name: str
    trained: Sequence[Trained]
    alone: Sequence[TaskScores]
    pruned: Mapping[str, TaskScores]
    curve: Curve | None
    fused: TaskScores | None
    mixed: TaskScores | None
    worth: Shapley | None
    removed: Mapping[str, Sequence[float]]

    @property
    def adapter(self) -> Adapter:
        return self.trained[0].adapter


def run(job: Job) -> Outcome:
    """Train, measure alone, between seeds, pruned and block by block."""
    config: RecipeConfig = job.config
    base = fingerprint(job.model)
    train, test = _rows(job)
    probe = train.take(range(min(config.probe, len(train))))
    measured = Measured(job.model, Task.of(job.model, test, job.processor), job.work.room("measured"), config.batch_size)
    sides = [_side(job, name, train, probe, measured) for name in ("copra", *config.compare)]
    patch = Patch.of(job.model, [sides[0].adapter], "copra", config.model_dump(mode="json", include={"lora", "train", "copra"}))
    unit = measured.task.unit
    made = [one for side in sides for one in _measurements(side, measured.base, unit, base, patch)]
    log = {
        "says": _says(sides),
        "sides": {side.name: _told(side) for side in sides},
        "rows": {"train": len(train), "test": len(test), "probe": len(probe)},
    }
    how = How("copra", f"{len(probe)} training rows", {"value": "mean log-likelihood"}, base)
    scores = {f"shapley-{side.name}": one for side in sides if side.worth is not None for one in _scores(side.worth, how)}
    probes = {} if job.processor is None else {"test": dict(encode(job.model, job.processor, test.column("prompt", "test")[:8]))}
    galleries, transcripts = _shown(job, test, measured.base, sides[0])
    return Outcome(patch, made, scores, _figures(sides), galleries, log, transcripts, probes)


def _rows(job: Job) -> tuple[Examples, Examples]:
    """Training and test rows, prompts in their form, no row in both."""
    config: RecipeConfig = job.config
    train = _formed(job.data["train"], config)
    if "test" in job.data:
        test = _formed(job.data["test"], config)
        refuse_overlap(test, train)
        return train, test
    held = max(1, round(config.holdout * len(train)))
    if held >= len(train):
        raise DataError(f"data.train has {len(train)} rows, too few to keep some back.", "Give a role `test`.")
    order = torch.randperm(len(train), generator=generator(job.seed, "holdout")).tolist()
    return train.take(sorted(order[held:])), train.take(sorted(order[:held]))


def _formed(rows: Examples, config: RecipeConfig) -> Examples:
    if config.reads == "pictures":
        return rows
    if config.form.count("{}") != 1:
        raise ConfigError(f"method.form is '{config.form}'.", "It needs one {} where the row's prompt goes.")
    prompts = [config.form.replace("{}", str(text)) for text in rows.column("prompt", "train")]
    return Examples({}, rows.ids, None, None, {**rows.fields, "prompt": prompts})


def _side(job: Job, name: str, train: Examples, probe: Examples, measured: Measured) -> Side:
    config: RecipeConfig = job.config
    recipe = config.copra if name == "copra" else PLAIN
    device, work = next(job.model.parameters()).device.type, job.work.room("trained")
    trained = [
        train_adapter(
            job.model, train, recipe, config.lora, config.train, seed=derive(job.seed, "adapter", seed) % 2**31,
            work=work, processor=job.processor, name=f"{name}-{seed}", device=device,
        )
        for seed in range(config.seeds)
    ]  # fmt: skip
    adapters = [one.adapter for one in trained]
    alone = [measured(adapter, f"{name}-{seed}") for seed, adapter in enumerate(adapters)]
    by, first = config.copra.groups, adapters[0]
    curve = fused = mixed = found = None
    if len(adapters) > 1:
        curve = measured.curve(adapters[0], adapters[1], f"{name}-fused", config.points)
        fused = measured(fusion(adapters).adapter, f"{name}-fusion")
        mixed = measured(mixture(adapters).adapter, f"{name}-mixture")
    if config.shapley != "none":
        task = Task.of(job.model, probe, job.processor)
        found = worth(
            job.model, first, task, job.work.room("worth"), name,
            by=by, method=config.shapley, orders=config.orders, batch_size=config.batch_size, seed=job.seed,
        )  # fmt: skip
    orders = orders_of_removal(job.model, first, found, by, derive(job.seed, "removal") % 2**32)
    removed = {way: removal(measured, first, order, by, f"{name}-{way.split()[0]}") for way, order in orders.items()}
    cut = pruned(measured, first, config.prune, by, name) if by == "block" else {}
    return Side(name, trained, alone, cut, curve, fused, mixed, found, removed)


def _measurements(side: Side, before: TaskScores, unit: str, base: str, patch: Patch) -> list[Measurement]:
    """`accuracy`, `fusion`, `mixture`, `pruned.WAY`, all against the base; of what is compared with a suffix `.plain`."""
    tail = "" if side.name == "copra" else f".{side.name}"
    state = f"{base[:12]}+{patch.digest[:8] if not tail else side.name}"
    found = [task_accuracy(f"accuracy{tail}", unit, before, side.alone[0], (base, state))]
    score = Measurement(f"score{tail}", unit, before.score, side.alone[0].score, "log-likelihood of the label or answer, nats", base, state)
    found.append(score)
    for name, scores in (("fusion", side.fused), ("mixture", side.mixed)):
        if scores is not None:
            found.append(task_accuracy(f"{name}{tail}", unit, before, scores, (base, f"{state} {name} of {len(side.trained)}")))
    return found + [
        task_accuracy(f"pruned.{way}{tail}", unit, before, scores, (base, f"{state} {way}")) for way, scores in side.pruned.items()
    ]


def _told(side: Side) -> dict[str, Any]:
    """One way of training in numbers, for the log and the table of the report."""
    alone = [scores.accuracy for scores in side.alone]
    told: dict[str, Any] = {"alone": alone, "alone, mean": float(np.mean(alone))}
    if side.curve is not None and side.fused is not None and side.mixed is not None:
        told |= {"fusion": side.fused.accuracy, "barrier": side.curve.barrier, "mixture": side.mixed.accuracy}
    told |= {f"pruned {way}": scores.accuracy for way, scores in side.pruned.items()}
    if side.worth is not None:
        told |= {"spread of Shapley shares": side.worth.spread, "coalitions evaluated": side.worth.evaluations}
    counts = [one.counts for one in side.trained if one.counts]
    if counts:
        told["steps that a group was on"] = {group: [count[group] for count in counts] for group in counts[0]}
    return told


def _says(sides: Sequence[Side]) -> list[str]:
    said = [f"{len(sides[0].trained)} adapters of each way; one run each, so differences between them are not established by it."]
    if len(sides) > 1:
        gap = float(np.mean([one.accuracy for one in sides[0].alone]) - np.mean([one.accuracy for one in sides[1].alone]))
        if gap < 0:
            said.append(f"CopRA's own accuracy is {-gap:.3f} lower: the price of training in turns when the training is short.")
    return said


def _scores(found: Shapley, how: How) -> list[Scores]:
    from trocar.core.errors import ScoresError

    try:
        return [found.scores(how)]
    except ScoresError:  # groups of one's own, or several towers: they stand in the figure
        return []


def _figures(sides: Sequence[Side]) -> list[Figure]:
    told = {side.name: _told(side) for side in sides}
    names = [name for name, value in told["copra"].items() if isinstance(value, float)]
    table = [{"measured": name, **{side: numbers.get(name) for side, numbers in told.items()}} for name in names]
    found = [Figure("summary", "Side by side", "table", "measured", "copra", table)]
    if curves := [row for side in sides if side.curve is not None for row in side.curve.rows(trained=side.name)]:
        found.append(
            Figure("connectivity", "On the straight way between two seeds", "curve", "place", "value", curves, series="trained",
                   caption="Share of right test rows; factors are averaged. 0 and 1 are the two adapters themselves.")
        )  # fmt: skip
    if bars := [{**row, "trained": side.name} for side in sides if side.worth is not None for row in side.worth.rows()]:
        caption = "Mean log-likelihood that each adds, averaged over all coalitions of the others; bars of sampled values show 95 %."
        found.append(
            Figure("worth", "What each part of the adapter is worth", "bars", "player", "value", bars, series="trained", caption=caption)
        )
    removed = [
        {"removed": number, "right": value, "order": f"{side.name}: {way}"}
        for side in sides
        for way, values in side.removed.items()
        for number, value in enumerate(values)
    ]
    found.append(
        Figure("removal", "Parts of the adapter removed one after the other", "curve", "removed", "right", removed, series="order")
    )
    losses = [{"step": step, "loss": loss, "trained": side.name} for side in sides for step, loss in side.trained[0].losses.tolist()]
    if len(losses) > 2:
        found.append(Figure("losses", "Training loss, first seed", "curve", "step", "loss", losses, series="trained"))
    return found


def _shown(job: Job, test: Examples, before: TaskScores, side: Side) -> tuple[list[Gallery], list[Transcript]]:
    """Rows that have changed, as pictures or as texts."""
    after = side.alone[0]
    changed = np.flatnonzero(before.right != after.right)[:SHOWN].tolist()
    rows = changed + [row for row in range(len(test)) if row not in changed][: SHOWN - len(changed)]
    if job.processor is not None:
        prompts = [str(test.column("prompt", "test")[row]) for row in rows]
        said = [one.text for one in continuations(job.model, job.processor, prompts, 12)]
        with attached(job.model, side.adapter) as outer:
            now = [one.text for one in continuations(outer, job.processor, prompts, 12)]
        truth = [str(test.column("answer", "test")[row]) for row in rows]
        return [], [Transcript("answers", "Answers, those that changed first", prompts, said, now, truth)]
    if test.pictures is None or test.labels is None or not changed:
        return [], []
    names, task = job.class_names, Task.of(job.model, test.take(changed))

    def named(numbers: Sequence[int]) -> list[str]:
        return [names[number] if number < len(names) else str(number) for number in numbers]

    said, now = (named(_classes(job.model, task, adapter)) for adapter in (None, side.adapter))
    truth = named([int(number) for number in test.labels[changed]])
    return [Gallery("changed", "Predictions that changed", test.pictures[changed], said, now, truth)], []


def _classes(model: Any, task: Task, adapter: Adapter | None) -> list[int]:
    from trocar.evaluate.forward import evaluating, place

    with evaluating(model):
        if adapter is None:
            return model(**place(dict(task.inputs), model)).logits.argmax(-1).tolist()
        with attached(model, adapter) as outer:
            return outer(**place(dict(task.inputs), model)).logits.argmax(-1).tolist()


def estimate(job: Job) -> Estimate:
    """Time one pass over a measuring batch, and multiply: a training step costs about three passes."""
    config: RecipeConfig = job.config
    train, test = _rows(job)
    small = test.take(range(min(8, len(test))))
    task = Task.of(job.model, small, job.processor)
    task.measure(job.model)
    start = time.perf_counter()
    task.measure(job.model)
    row = (time.perf_counter() - start) / len(small)
    sides, blocks = 1 + len(config.compare), sum(tower.n_layers for tower in Anatomy.of(job.model).towers.values())
    trainings = sides * config.seeds * config.train.steps * config.train.batch * 3
    passes = sides * (config.seeds + config.points + 2 + len(config.prune) + 4 * blocks) * len(test)
    coalitions = 0 if config.shapley == "none" else min(2**blocks, config.orders * blocks) * min(config.probe, len(train)) * sides
    size = sum(parameter.numel() * parameter.element_size() for parameter in job.model.parameters())
    peak = int(size * 0.2 + config.train.batch * sum(tower.width for tower in Anatomy.of(job.model).towers.values()) * blocks * 64 * 4 * 16)
    told = f"a row takes {row:.2g} s here; {trainings} row passes of training, {passes} of measuring, {coalitions} of coalitions"
    return Estimate(peak, (trainings + passes + coalitions / 2) * row, told)


STARTER = """\
# Train a LoRA adapter that merges across seeds and survives pruning, plain LoRA beside it, and see what each block's adapter is worth.
version: 1
seed: 0
model: path/to/model            # a Hugging Face image classifier, or a causal language model with its tokenizer

data:
  train:                        # pictures with labels; or texts with the columns prompt and answer
    source: path/to/train.jsonl
    columns: {prompt: input, answer: output}    # new name: the file's own
  # test: {source: path/to/test.jsonl}          # without it, method.holdout of the training rows is kept back

method:
  name: copra
  reads: texts                  # or pictures
  form: "{}"                    # of a prompt; {} stands for the row's
  lora: {rank: 8, alpha: 16, targets: [q, k, v]}
  train: {steps: 400, batch: 16, lr: 1.0e-3}    # as for your plain LoRA
  copra: {p0: 0.1, rho: 0.75, schedule: linear}
  seeds: 2                      # adapters of each way, to be fused
  shapley: auto                 # exact up to 12 blocks, else sampled by `orders`

checks:
  - {measurement: accuracy, statistic: difference, op: ">", threshold: 0}
  - {measurement: fusion, statistic: difference, op: ">", threshold: 0}
"""

METHOD = Method(
    name="copra",
    title="CopRA",
    paper="arXiv 2410.22911, 2506.05713",
    summary="train LoRA adapters that stay linearly connected: they merge across seeds and tasks, and survive pruning",
    config=RecipeConfig,
    roles={
        "train": "what is learned: pictures with labels, or texts with the columns `prompt` and `answer`",
        "test?": "other rows of the same form, to measure on; without it some of `train` are kept back",
    },
    run=run,
    estimate=estimate,
    starter=STARTER,
    default_checks=({"measurement": "accuracy", "statistic": "difference", "op": ">", "threshold": 0},),
    reads="either",
)

__all__ = ["METHOD", "RecipeConfig", "run"]
