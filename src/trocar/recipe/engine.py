"""Run a recipe: resolve, load, fingerprint, let the method work in committed units, verify its patch, check, write. Floor 6.

Everything that took long lives in `units/`, so a killed run repeats only the unit it was in; the files of the result are written from
them at the end, `result.json` last. Equal recipes on equal inputs give equal bytes, killed or not (`log.jsonl` aside).
"""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

import trocar
from trocar.anatomy import Anatomy, fingerprint
from trocar.core.errors import EditError, RunError
from trocar.core.seeds import derive
from trocar.core.workspace import Workspace
from trocar.evaluate import BaseOutputs, data_digest, run_checks
from trocar.method import Estimate, Job, Outcome
from trocar.recipe.data import load_roles, load_text_roles
from trocar.recipe.folder import REPORT, RESULT, Log, claim, claim_inputs, locked
from trocar.recipe.models import describe_source, load_model, load_tokenizer, refuse_speechless, tokenizer_digest
from trocar.recipe.prepare import Prepared, prepare
from trocar.recipe.schema import Recipe, load_recipe
from trocar.recipe.verify import Verified, probes, verify
from trocar.recipe.write import write_files
from trocar.result import MethodInfo, ModelInfo, Result, check_infos, read_result, table_rows, write_result

if TYPE_CHECKING:
    from trocar.method import Examples

Report = Callable[[Path], Any]


@dataclass(frozen=True)
class Forecast:
    """What a dry run says. loads: part -> where it comes from and how much it is; estimate: the method's own prediction."""

    loads: dict[str, str]
    model_bytes: int
    estimate: Estimate
    folder: Path


@dataclass(frozen=True)
class RunResult:
    """A run that ended. finished_before: nothing was computed now. A dry run has only folder and forecast."""

    folder: Path
    result: Result | None = None
    finished_before: bool = False
    forecast: Forecast | None = None

    @property
    def ok(self) -> bool:
        """The checks hold (or there are none, or nothing was run)."""
        return self.result is None or self.result.verdict != "failed"


def run(recipe: Recipe | str | Path, output: str | Path | None = None, dry_run: bool = False, report: Report | None = None) -> RunResult:
    """Run `recipe` into the folder `output`, resuming what is there.

    recipe: a parsed recipe or the path of one; output: the run folder, else the recipe's `output`, else `runs/NAME`; dry_run: only predict;
    report: makes `report.html` from the finished folder (`trocar.report.write_report`; the command line passes it).

    Raises ConfigError and DataError before anything is loaded where possible, RunError if the folder is in use or belongs to another run,
    EditError if the patch did not take or cannot be taken back. Failed checks are no error here: see `RunResult.ok`.
    """
    if dry_run:
        return RunResult(run_folder(recipe, output), forecast=forecast(recipe, output))
    folder = run_folder(recipe, output)
    prepared = prepare(_parsed(recipe))
    asked = prepared.resolved()
    with locked(folder):
        claim(folder, asked)
        result = _finished(folder)
        finished_before = result is not None
        if result is None:
            result = _work(prepared, asked, folder)
        if report and not (finished_before and (folder / REPORT).exists()):
            report(folder)
    return RunResult(folder, result, finished_before)


def forecast(recipe: Recipe | str | Path, output: str | Path | None = None) -> Forecast:
    """Load model and data, and let the method predict its memory and time. Nothing is written."""
    prepared = prepare(_parsed(recipe))
    with tempfile.TemporaryDirectory() as scratch:
        job, _ = _job(prepared, Path(scratch))
        loads = {"model": describe_source(prepared.recipe.model, prepared.recipe.base)}
        loads |= {f"data.{role}": f"{prepared.data[role].source} ({len(examples)} examples)" for role, examples in job.data.items()}
        size = sum(parameter.numel() * parameter.element_size() for parameter in job.model.parameters())
        return Forecast(loads, size, prepared.method.estimate(job), run_folder(recipe, output))


def run_folder(recipe: Recipe | str | Path, output: str | Path | None = None) -> Path:
    """Where a run goes: `output`, else the recipe's own (from the recipe's folder), else `runs/` and the recipe's name."""
    if output is not None:
        return Path(output)
    parsed = _parsed(recipe)
    if parsed.output is not None:
        return parsed.base / parsed.output
    return Path("runs") / (parsed.method.name if isinstance(recipe, Recipe) else Path(recipe).stem)


def _parsed(recipe: Recipe | str | Path) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _finished(folder: Path) -> Result | None:
    """The result of a run that ended, if every file that it names is there."""
    if not (folder / RESULT).exists():
        return None
    try:
        result = read_result(folder)
    except RunError:  # damaged: it is made again from the units
        return None
    files = [figure.csv for figure in result.figures] + [scores.file for scores in result.scores]
    files += [item.picture for gallery in result.galleries for item in gallery.items] + ([result.patch.file] if result.patch else [])
    files += [transcript.csv for transcript in result.transcripts]
    return result if all((folder / file).is_file() for file in files) else None


def _job(prepared: Prepared, folder: Path) -> tuple[Job, str]:
    """Model, data and workspace for the method, and the base's fingerprint."""
    torch.manual_seed(derive(prepared.recipe.seed, "run"))  # for libraries that draw from the global stream; ours do not
    model = load_model(prepared.recipe.model, prepared.recipe.base)
    base = fingerprint(model)
    if prepared.reads == "texts":
        refuse_speechless(model, prepared.recipe.model.source)
        processor = load_tokenizer(prepared.recipe.model, prepared.recipe.base)
        data = load_text_roles(cast(Any, prepared.data), prepared.recipe.base)
    else:
        processor = None
        data = load_roles(cast(Any, prepared.data), model, BaseOutputs(folder / "units" / "base"), prepared.recipe.base)
    names = getattr(model.config, "id2label", None) or {}
    classes = [str(names[number]) for number in sorted(names)]
    work = Workspace(folder / "units", {"model": base, "seed": prepared.recipe.seed, "trocar": trocar.__version__})
    return Job(model, data, prepared.settings, prepared.recipe.seed, work, classes, processor), base


def _inputs(base: str, data: Mapping[str, Examples], processor: Any) -> dict[str, Any]:
    labels = {role: None if examples.labels is None else examples.labels.tolist() for role, examples in data.items()}
    digests = {role: {"inputs": data_digest(examples), "labels": labels[role]} for role, examples in data.items()}
    words = {} if processor is None else {"tokenizer": tokenizer_digest(processor)}
    return {"trocar": trocar.__version__, "model": base, **words, "data": digests}


def _work(prepared: Prepared, asked: dict[str, Any], folder: Path) -> Result:
    log = Log(folder)
    log("start", threads=torch.get_num_threads(), torch=torch.__version__, trocar=trocar.__version__, device=prepared.recipe.model.device)
    job, base = _job(prepared, folder)
    claim_inputs(folder, _inputs(base, job.data, job.processor))
    log("loaded", model=base, examples={role: len(examples) for role, examples in job.data.items()})
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    outcome = prepared.method.run(job)
    log("method", method=prepared.method.name)
    verified = _believe(prepared, job, outcome, base)
    log("verified", **({"fingerprint": verified.fingerprint, "effect": verified.effect} if verified else {"patch": None}))
    verdict = run_checks(prepared.checks, outcome.measurements, prepared.recipe.seed)
    files = write_files(folder, outcome)
    result = Result.parse(
        {
            "title": f"{prepared.method.title} on {prepared.recipe.model.source}",
            "asked": asked,
            "model": ModelInfo(
                source=asked["model"]["source"],
                family=Anatomy.of(job.model).family.name,
                fingerprint_before=base,
                fingerprint_after=verified.fingerprint if verified else base,
                parameters=parameters,
                parameters_after=verified.parameters if verified else None,
            ),
            "method": MethodInfo(**{name: getattr(prepared.method, name) for name in ("name", "title", "paper", "summary")}),
            "verdict": verdict.outcome,
            "checks": check_infos(verdict),
            "table": table_rows(outcome.measurements, prepared.recipe.seed),
            "log": {**outcome.log, "effect": verified.effect if verified else 0.0},
            **files,
        },
        "result",
    )
    write_result(folder, result)
    log("finished", verdict=verdict.outcome, peak_memory_bytes=_peak())
    return result


def _believe(prepared: Prepared, job: Job, outcome: Outcome, base: str) -> Verified | None:
    """Hold the method to its word: the model as it was, every number of this model, a patch that takes and can be taken back."""
    now = fingerprint(job.model)
    if now != base:
        raise EditError(f"The method left the model changed: its fingerprint is {now}, the base's is {base}.", "Please report it.")
    for measurement in outcome.measurements:
        if measurement.state_before != base:
            raise EditError(
                f"'{measurement.name}' was measured on {measurement.state_before} before, not on the base {base}.", "Please report it."
            )
    if outcome.patch is None or not outcome.patch.ops:
        return None
    return verify(job.model, outcome.patch, probes(job.data, outcome.probes, prepared.reads), base)


def _peak() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
