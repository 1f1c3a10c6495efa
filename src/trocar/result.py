"""`result.json`: everything a report shows, as data. Floor 4: the recipe room writes it, the report room reads it.

Numbers that do not exist (an interval of one unit) are null. Files are named relative to the run folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from trocar.core.config import Config
from trocar.core.errors import ConfigError, RunError
from trocar.core.files import write_json
from trocar.evaluate import Measurement, Verdict

FILE = "result.json"


class ModelInfo(Config):
    """The model before and after. source: a folder or hub name; fingerprints: state ids; parameters: how many before (and after)."""

    source: str
    family: str
    fingerprint_before: str
    fingerprint_after: str
    parameters: int
    parameters_after: int | None = None


class MethodInfo(Config):
    name: str
    title: str
    paper: str
    summary: str = ""


class CheckInfo(Config):
    """One check and its result; value: null if the statistic has none."""

    measurement: str
    statistic: str
    op: str
    threshold: float
    value: float | None
    ok: bool
    note: str = ""


class TableRow(Config):
    """One measurement's summary (`trocar.evaluate.Summary` says what the numbers mean)."""

    name: str
    unit: str
    form: Literal["share", "number"]
    better: Literal["higher", "lower", "same"]
    scorer: str
    n: int
    n_groups: int
    left_out: int
    left_out_groups: int
    before: float
    after: float
    difference: float
    low: float | None
    high: float | None
    ratio: float | None
    p: float | None
    test: str
    interval: str
    state_before: str
    state_after: str


class FigureInfo(Config):
    """`trocar.method.Figure` without its rows, which stand in `csv`."""

    id: str
    title: str
    kind: Literal["heatmap", "curve", "bars", "points", "table"]
    x: str
    y: str
    value: str | None = None
    series: str | None = None
    caption: str = ""
    csv: str


class Picture(Config):
    """One picture of a gallery: its PNG file, the true class, the class predicted before and after, and whether it is right now."""

    picture: str
    truth: str
    before: str
    after: str
    fixed: bool


class GalleryInfo(Config):
    id: str
    title: str
    caption: str = ""
    items: tuple[Picture, ...]


class TranscriptInfo(Config):
    """`trocar.method.Transcript`. csv: one row a prompt: prompt, truth, before, after, mark_before, mark_after, and right_before,
    right_after (`yes`, `no`, or empty where nothing says what is right). marked: right means only that the method marked no error."""

    id: str
    title: str
    caption: str = ""
    csv: str
    marked: bool = False


class PatchInfo(Config):
    """file: the patch; bytes: its size; ops: the rows of `Patch.summary()`."""

    file: str
    bytes: int
    ops: tuple[dict[str, Any], ...] = ()


class ScoresInfo(Config):
    name: str
    file: str


class Result(Config):
    """A finished run. asked: the resolved recipe; log: settings found on the way; the rest in the order the report shows it."""

    format: Literal[1] = 1
    title: str
    asked: dict[str, Any]
    model: ModelInfo
    method: MethodInfo
    verdict: Literal["passed", "failed", "unchecked"]
    checks: tuple[CheckInfo, ...] = ()
    table: tuple[TableRow, ...] = ()
    log: dict[str, Any] = pydantic.Field(default_factory=dict)
    figures: tuple[FigureInfo, ...] = ()
    galleries: tuple[GalleryInfo, ...] = ()
    transcripts: tuple[TranscriptInfo, ...] = ()
    patch: PatchInfo | None = None
    scores: tuple[ScoresInfo, ...] = ()


def table_rows(measurements: Sequence[Measurement], seed: int) -> tuple[TableRow, ...]:
    """The before/after table."""
    rows = []
    for m in measurements:
        numbers = {key: _or_none(value) for key, value in m.summary(seed).asdict().items()}
        about = {"name": m.name, "unit": m.unit, "form": m.form, "better": m.better, "scorer": m.scorer}
        rows.append(TableRow.parse({**about, **numbers, "state_before": m.state_before, "state_after": m.state_after}, "table"))
    return tuple(rows)


def check_infos(verdict: Verdict) -> tuple[CheckInfo, ...]:
    """The rows of a verdict as data."""
    return tuple(
        CheckInfo.parse({**row.check.model_dump(), "value": _or_none(row.value), "ok": row.ok, "note": row.note}, "checks")
        for row in verdict.rows
    )


def write_result(folder: str | Path, result: Result) -> None:
    """Write `result.json`, atomically, the same bytes for the same result. Without texts it is what every reader of format 1 knows."""
    write_json(Path(folder) / FILE, result.model_dump(mode="json", exclude=None if result.transcripts else {"transcripts"}))


def read_result(folder: str | Path) -> Result:
    """Read `result.json`. Raises RunError for a folder without one (not a run, or not finished) and for a damaged one."""
    path = Path(folder) / FILE
    if not Path(folder).is_dir():
        raise RunError(f"There is no run folder {folder}.", "Check the path.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format") not in (None, 1):
            raise RunError(f"{path} is of format {content['format']!r}; this Trocar reads 1.", "Use the Trocar that made the run.")
        return Result.parse(content, FILE)
    except FileNotFoundError:
        raise RunError(
            f"{folder} has no {FILE}: it is not a run folder, or its run has not finished.", "Run `trocar run` on its recipe."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}.", "Run `trocar run` on its recipe again.") from None
    except ConfigError as error:
        raise RunError(f"{path} is damaged: {error.what}", "Run `trocar run` on its recipe again.") from None


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
