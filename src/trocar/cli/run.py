"""`trocar run`, `report` and `demo`: the engine, and what it says on the terminal. Floor 7."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trocar.cli import show
from trocar.core.errors import ChecksFailedError

if TYPE_CHECKING:
    from trocar.recipe import Forecast, RunResult
    from trocar.result import Result

DEMO = Path(__file__).with_name("demo.yaml")


def run_recipe(path: Path, output: Path | None, dry_run: bool, overrides: Sequence[str]) -> None:
    """Run a recipe file and print its result. Raises ChecksFailedError if its checks do not hold."""
    from trocar.recipe.schema import load_recipe

    recipe = load_recipe(path, overrides)  # before torch is imported: a typing error is answered at once
    from trocar.recipe.engine import run, run_folder
    from trocar.report import write_report

    folder = output or (run_folder(recipe) if recipe.output else Path("runs") / path.stem)
    done = run(recipe, folder, dry_run, write_report)
    if done.forecast:
        show_forecast(done.forecast)
    else:
        finish(done)


def run_demo(output: Path) -> None:
    """Run the recipe that comes with the package."""
    show.line(f"Running {DEMO.name}: a small vision transformer, and photographs that it gets wrong.")
    run_recipe(DEMO, output, False, ())


def make_report(folder: Path, output: Path | None) -> None:
    """Render a finished run folder again."""
    from trocar.report import write_report

    show.line(f"report: {write_report(folder, output)}")


def show_forecast(forecast: Forecast) -> None:
    """What would be loaded, and what the method predicts."""
    estimate = forecast.estimate
    show.pairs({**forecast.loads, "run folder": forecast.folder}, "Would load")
    memory = f"{show.size(forecast.model_bytes + estimate.peak_bytes)} ({show.size(forecast.model_bytes)} of it the model)"
    show.pairs({"memory": memory, "time": show.duration(estimate.seconds), "how": estimate.how}, "Prediction")


def finish(done: RunResult) -> None:
    """Print the table, checks and files of a run. Raises ChecksFailedError if its checks do not hold."""
    result = done.result
    assert result is not None  # only a dry run has none
    if done.finished_before:
        show.line(f"{done.folder} was finished before; nothing was computed.")
    show_result(result)
    files = {"report": done.folder / "report.html"} if (done.folder / "report.html").exists() else {}
    if result.patch:
        files["patch"] = f"{done.folder / result.patch.file} ({show.size(result.patch.bytes)})"
    show.pairs({**files, "run folder": done.folder})
    if not done.ok:
        failed = [check for check in result.checks if not check.ok]
        one = failed[0]
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise ChecksFailedError(
            f"{len(failed)} of {len(result.checks)} checks do not hold: "
            f"{one.measurement} {one.statistic} is {show.cell(one.value)}, wanted {one.op} {one.threshold:g}{more}.",
            f"The report in {done.folder} shows what happened; the patch is marked as failed.",
        )


def show_result(result: Result) -> None:
    """The before/after table, and the checks with the verdict."""
    rows = []
    for row in result.table:
        text = _share if row.form == "share" else show.cell
        interval = f"{text(row.low)} .. {text(row.high)}" if row.low is not None and row.high is not None else "-"
        numbers = {"before": text(row.before), "after": text(row.after), "difference": text(row.difference)}
        rows.append({"measured": row.name, "n": row.n, "unit": row.unit, **numbers, "95 % interval": interval, "p": row.p})
    if rows:
        show.table(rows, result.title)
    checks = [
        {"check": f"{c.measurement} {c.statistic} {c.op} {c.threshold:g}", "value": c.value, "holds": c.ok, "note": c.note} for c in result.checks
    ]
    if checks:
        show.table(checks)
    show.line({"passed": "Verdict: passed", "failed": "Verdict: FAILED", "unchecked": "Verdict: none, no checks were asked for"}[result.verdict])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
