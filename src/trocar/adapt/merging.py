"""Merging LoRA adapters as a recipe's method: every task measured without, with each adapter alone, and with the one made of all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic

from trocar.adapted import Measured
from trocar.anatomy import fingerprint
from trocar.core.config import Config
from trocar.core.errors import ConfigError, DataError, PatchBaseError
from trocar.evaluate import Curve, Measurement, Task, TaskScores, task_accuracy
from trocar.method import Estimate, Examples, Figure, Job, Method, Outcome, Transcript
from trocar.patch import Adapter, Patch, attached
from trocar.patch.combine import Combined, aligned, aligned_fusion, fusion, lego, mixture
from trocar.patch.combine.folders import open_adapter
from trocar.patch.peft_folder import PeftFolder
from trocar.trace.queries import continuations, encode

SHOWN = 8
How = Literal["fusion", "mixture", "aligned", "lego"]


class MergeConfig(Config):
    """Which adapters become one, and how.

    reads: `pictures` with labels, or `texts` with prompts and answers. adapters: PEFT folders or patches that hold an adapter, from the
    recipe's folder. how: `trocar.patch.combine`'s ways; weights: one for each adapter, made to add up to 1 (default: equal; LoRA-LEGO has
    none); rank: of the result, for `mixture` and `lego`. compare: other ways, measured too. forms: of a task's prompts, by the task's
    name; `{}` stands for the row's. points: of the way between two adapters. batch_size: rows of a measuring pass.
    """

    reads: Literal["pictures", "texts"] = "pictures"
    adapters: tuple[str, ...] = pydantic.Field(min_length=2)
    how: How = "fusion"
    weights: tuple[float, ...] | None = None
    rank: int | None = pydantic.Field(default=None, ge=1)
    compare: tuple[How, ...] = ()
    forms: dict[str, str] = pydantic.Field(default_factory=dict)
    points: int = pydantic.Field(default=11, ge=3)
    batch_size: int = pydantic.Field(default=64, ge=1)


@dataclass(frozen=True)
class Measures:
    """One task: the scores by what was on the model (`base`, the adapters' names, the ways), and the way between two adapters."""

    unit: str
    scores: Mapping[str, TaskScores]
    curve: Curve | None


def run(job: Job) -> Outcome:
    """Combine, and measure."""
    config: MergeConfig = job.config
    base = fingerprint(job.model)
    tasks = _tasks(job)
    adapters = _adapters(config, base)
    ways = list(dict.fromkeys((config.how, *config.compare)))
    made = {how: combined(list(adapters.values()), how, config, job.seed) for how in ways}
    ends, why = _ends(list(adapters.values()), config.how)
    found = {}
    for name, rows in tasks.items():
        measured = Measured(job.model, Task.of(job.model, rows, job.processor), job.work.room("measured"), config.batch_size, name)
        scores = {"base": measured.base, **{label: measured(one, f"with-{label}") for label, one in adapters.items()}}
        scores |= {how: measured(one.adapter, how) for how, one in made.items()}
        found[name] = Measures(measured.task.unit, scores, measured.curve(*ends, "between", config.points) if ends else None)
    kept = config.model_dump(mode="json", include={"how", "weights", "rank"})
    patch = Patch.of(job.model, [made[config.how].adapter], "merge", {**kept, "adapters": list(adapters)})
    measurements = [one for name, task in found.items() for one in _measurements(name, task, config.how, list(adapters), base, patch)]
    log = {
        "says": [*_says(found, config.how, list(adapters)), *why],
        "accuracy": {name: {label: scores.accuracy for label, scores in task.scores.items()} for name, task in found.items()},
        "barrier": {name: task.curve.barrier for name, task in found.items() if task.curve is not None},
        "rows": {name: len(rows) for name, rows in tasks.items()},
    }
    texts = {} if job.processor is None else tasks
    probes = {name: dict(encode(job.model, job.processor, rows.column("prompt", name)[:SHOWN])) for name, rows in texts.items()}
    transcripts = [_transcript(job, name, rows, made[config.how].adapter) for name, rows in texts.items()]
    return Outcome(patch, measurements, figures=_figures(found, made[config.how]), log=log, transcripts=transcripts, probes=probes)


def combined(adapters: Sequence[Adapter], how: How, config: MergeConfig, seed: int) -> Combined:
    """The adapters as one. Raises ConfigError for what does not fit together, and for settings that the way does not have."""
    if how == config.how:
        if config.rank is not None and how in ("fusion", "aligned"):
            raise ConfigError(f"method.rank: {how} keeps the adapters' rank.", "Leave it out, or use a mixture.")
        if config.weights is not None and how == "lego":
            raise ConfigError("method.weights: LoRA-LEGO weighs no adapter.", "Leave them out, or use a mixture.")
    if how == "fusion":
        return fusion(adapters, config.weights)
    if how == "aligned":
        return aligned_fusion(adapters, config.weights)
    return mixture(adapters, config.weights, rank=config.rank) if how == "mixture" else lego(adapters, rank=config.rank, seed=seed)


def _tasks(job: Job) -> dict[str, Examples]:
    """Rows by the tasks' names, prompts in their form."""
    config: MergeConfig = job.config
    if not job.data:
        raise DataError("There is no task to measure.", "Add data.task.NAME: pictures with labels, or texts with prompt and answer.")
    tasks = {role.partition(".")[2] or role: rows for role, rows in job.data.items()}
    for name, form in config.forms.items():
        if name not in tasks or config.reads == "pictures":
            raise ConfigError(f"method.forms has '{name}', and no task of texts has that name.", f"There is {', '.join(tasks)}.")
        if form.count("{}") != 1:
            raise ConfigError(f"method.forms.{name} is '{form}'.", "It needs one {} where the row's prompt goes.")
        rows = tasks[name]
        prompts = [form.replace("{}", str(text)) for text in rows.column("prompt", f"task.{name}")]
        tasks[name] = Examples({}, rows.ids, None, None, {**rows.fields, "prompt": prompts})
    return tasks


def _adapters(config: MergeConfig, base: str) -> dict[str, Adapter]:
    """The adapters by short names. Raises PatchBaseError for a patch of another model."""
    found = {}
    for path in config.adapters:
        if not Path(path).exists():
            raise ConfigError(f"method.adapters: {path} is not there.", "Give PEFT folders or patches, from the recipe's folder.")
        source, _, state = open_adapter(path)
        if state not in (None, base):
            raise PatchBaseError(f"{path} belongs to the model {state}; this one is {base}.", "Merge adapters of one base.")
        place = Path(path)
        name = place.parent.name if place.name == "patch.safetensors" else place.stem if place.is_file() else place.name
        name = name if name and name not in (*found, "base", "fusion", "mixture", "aligned", "lego") else f"{name}-{len(found) + 1}"
        found[name] = source.adapter() if isinstance(source, PeftFolder) else source
    return found


def _ends(adapters: Sequence[Adapter], how: How) -> tuple[tuple[Adapter, Adapter] | None, list[str]]:
    """The ends of the straight way between two adapters, where there is one."""
    if len(adapters) != 2:
        return None, []
    first, second = adapters
    try:
        fusion([first, second])
    except ConfigError as error:
        return None, [f"There is no straight way between the adapters: {error.what}"]
    return (first, aligned(first, second).adapter if how == "aligned" else second), []


def _measurements(name: str, task: Measures, how: str, adapters: Sequence[str], base: str, patch: Patch) -> list[Measurement]:
    """`NAME` and `score.NAME` of the merged adapter, `NAME.ADAPTER` of each alone, all against the base."""
    before, after, state = task.scores["base"], task.scores[how], f"{base[:12]}+{patch.digest[:8]}"
    found = [task_accuracy(name, task.unit, before, after, (base, state))]
    score = "log-likelihood of the label or answer, nats"
    found.append(Measurement(f"score.{name}", task.unit, before.score, after.score, score, base, state))
    return found + [task_accuracy(f"{name}.{one}", task.unit, before, task.scores[one], (base, f"{base[:12]}+{one}")) for one in adapters]


def _says(found: Mapping[str, Measures], how: str, adapters: Sequence[str]) -> list[str]:
    said = []
    for name, task in found.items():
        best = max(adapters, key=lambda one: task.scores[one].accuracy)
        alone, merged = task.scores[best].accuracy, task.scores[how].accuracy
        if merged < alone:
            said.append(f"{name}: {merged:.3f} merged, {alone:.3f} with {best} alone.")
        for other, scores in task.scores.items():
            if other not in ("base", how, *adapters) and scores.accuracy > merged:
                said.append(f"{name}: {other} reaches {scores.accuracy:.3f}, {how} {merged:.3f}.")
    return said


def _figures(found: Mapping[str, Measures], made: Combined) -> list[Figure]:
    labels = list(next(iter(found.values())).scores)
    rows = [{"with": label, **{name: task.scores[label].accuracy for name, task in found.items()}} for label in labels]
    figures = [Figure("tasks", "Share of right rows", "table", "with", next(iter(found)), rows)]
    if curves := [row for name, task in found.items() if task.curve is not None for row in task.curve.rows(task=name)]:
        caption = "Share of right rows. Factors are averaged; 0 is the first adapter, 1 the second."
        figures.append(
            Figure(
                "connectivity",
                "On the straight way between the adapters",
                "curve",
                "place",
                "value",
                curves,
                series="task",
                caption=caption,
            )
        )
    caption = "norm: of the update; cosine: between two adapters' updates; mismatch: of the fused update to the mean of the updates."
    return [*figures, Figure("modules", "What was done to each module", "table", "module", "norm", list(made.rows), caption=caption)]


def _transcript(job: Job, name: str, rows: Examples, adapter: Adapter) -> Transcript:
    prompts = [str(text) for text in rows.column("prompt", name)[:SHOWN]]
    said = [one.text for one in continuations(job.model, job.processor, prompts, 12)]
    with attached(job.model, adapter) as outer:
        now = [one.text for one in continuations(outer, job.processor, prompts, 12)]
    return Transcript(
        f"answers-{name}", f"Answers: {name}", prompts, said, now, [str(text) for text in rows.column("answer", name)[:SHOWN]]
    )


def estimate(job: Job) -> Estimate:
    """Time one pass over a few rows, and multiply by the passes."""
    config: MergeConfig = job.config
    tasks = _tasks(job)
    small = next(iter(tasks.values())).take(range(min(8, len(next(iter(tasks.values()))))))
    task = Task.of(job.model, small, job.processor)
    task.measure(job.model)
    start = time.perf_counter()
    task.measure(job.model)
    row = (time.perf_counter() - start) / len(small)
    passes = 2 + len(config.adapters) + len(config.compare) + (config.points if len(config.adapters) == 2 else 0)
    rows = sum(map(len, tasks.values()))
    size = sum(parameter.numel() * parameter.element_size() for parameter in job.model.parameters())
    return Estimate(int(size * 0.2), passes * rows * row, f"a row takes {row:.2g} s here; {passes} passes over {rows} rows")


STARTER = """\
# Make one LoRA adapter of several, and measure each task without any, with each alone, and with all in one.
version: 1
seed: 0
model: path/to/model            # a Hugging Face image classifier, or a causal language model with its tokenizer

data:
  task.first:                   # one role a task: pictures with labels, or texts with the columns prompt and answer
    source: path/to/first.jsonl
    columns: {prompt: input, answer: output}    # new name: the file's own
  task.second: {source: path/to/second.jsonl}

method:
  name: merge
  reads: texts                  # or pictures
  adapters: [path/to/adapter-one, path/to/adapter-two]    # PEFT folders, or patches that hold an adapter
  how: mixture                  # mean of the updates; fusion: of the factors; aligned: fused after alignment; lego: LoRA-LEGO
  # weights: [1, 1]             # equal by default
  # rank: 8                     # of the result; without it a mixture's ranks add up
  compare: [fusion, lego]       # other ways, measured too

checks:
  - {measurement: first, statistic: difference, op: ">", threshold: 0}
  - {measurement: second, statistic: difference, op: ">", threshold: 0}
"""

METHOD = Method(
    name="merge",
    title="Merging adapters",
    paper="arXiv 2410.22911, 2506.05713, 2409.16167",
    summary="make one LoRA adapter of several, and measure every task without, with each alone, and merged",
    config=MergeConfig,
    roles={"task*": "rows of a task, to measure on: pictures with labels, or texts with the columns `prompt` and `answer`"},
    run=run,
    estimate=estimate,
    starter=STARTER,
    reads="either",
    paths=("adapters",),
)

__all__ = ["METHOD", "MergeConfig", "run"]
