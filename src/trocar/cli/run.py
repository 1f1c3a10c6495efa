"""`trocar run`, `report` and `demo`: the engine, and what it says on the terminal. Floor 7."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trocar.cli import show
from trocar.core.errors import ChecksFailedError

if TYPE_CHECKING:
    from trocar.recipe import Forecast, RunResult
    from trocar.result import CheckInfo

DEMO = Path(__file__).with_name("demo.yaml")


def run_recipe(path: Path, output: Path | None, dry_run: bool, overrides: Sequence[str]) -> None:
    """Run a recipe file and print its result. Raises ChecksFailedError if its checks do not hold."""
    from trocar.recipe.schema import load_recipe

    recipe = load_recipe(path, overrides)  # before torch is imported: a typing error is answered at once
    from trocar.recipe.engine import run, run_folder
    from trocar.report import write_report

    folder = output or (run_folder(recipe) if recipe.output else Path("runs") / path.stem)
    with show.interruptible():
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
    from trocar.report import terminal_table

    show.console().print(terminal_table(result))
    files: dict[str, object] = {"report": done.folder / "report.html"} if (done.folder / "report.html").exists() else {}
    if result.patch:
        files["patch"] = f"{done.folder / result.patch.file} ({show.size(result.patch.bytes)})"
    show.pairs({**files, "run folder": done.folder})
    judge(result.checks, f"The report in {done.folder} shows what happened.")


def judge(checks: Sequence[CheckInfo], hint: str) -> None:
    """Raise ChecksFailedError naming the first check that does not hold, if one does not."""
    failed = [check for check in checks if not check.ok]
    if failed:
        one = failed[0]
        more = f" ({len(failed) - 1} more)" if len(failed) > 1 else ""
        raise ChecksFailedError(
            f"{len(failed)} of {len(checks)} checks do{'es' if len(failed) == 1 else ''} not hold: "
            f"{one.measurement} {one.statistic} is {show.cell(one.value)}, wanted {one.op} {one.threshold:g}{more}.",
            hint,
        )
