"""`report.html`: one self-contained page from a run folder alone, without torch and without the model. Floor 6.

The page loads nothing from anywhere: style, figures, pictures and tables' data are inside. Equal folders give equal bytes.
To add a section: a function that returns what the template needs, and its part of `page.html.j2`.
"""

from __future__ import annotations

import base64
import csv
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import yaml

from trocar.core.errors import RunError, ScoresError
from trocar.core.files import write_text
from trocar.locate import Scores
from trocar.report import numbers
from trocar.report.figures import Drawing, draw, number
from trocar.report.where import scores_map
from trocar.result import FigureInfo, GalleryInfo, Picture, Result, TableRow, TranscriptInfo, read_result

FILE = "report.html"
COLUMNS = ("op", "where", "shape", "changed", "norm", "bytes")  # of a patch's table, in this order
TEXTS = 24  # rows of a transcript that are shown at once; the rest is folded
ASKED = ("name", "title", "model", "data", "method", "checks", "seed")  # of a recipe


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a finished run, by default `report.html` in its folder, and return its path.

    Raises RunError for a folder that is no run folder, is not finished, is damaged, or names files that lie outside of it.
    """
    folder = Path(folder)
    result = read_result(folder)
    target = folder / FILE if output is None else Path(output)
    there = os.path.relpath(folder.resolve(), target.resolve().parent)
    write_text(target, _page(folder, result, f"{there}/" if there != "." else "./"))
    return target


def _page(folder: Path, result: Result, there: str) -> str:
    """there: the way from the page to the run folder."""
    here = resources.files("trocar.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        {
            "size": numbers.size, "probability": numbers.probability, "compact": numbers.compact, "shown": numbers.shown,
            "change": numbers.change, "interval": numbers.interval, "direction": numbers.direction, "arrow": numbers.arrow,
            "units": numbers.units, "left_out": numbers.left_out, "cell": _cell, "status": _status,
            "link": lambda name: quote(f"{there}{name}"),
        }
    )  # fmt: skip
    told = _told(result)
    asked = {key: result.asked[key] for key in sorted(result.asked, key=_asked_order)}
    template = environment.from_string((here / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        result=result,
        css=(here / "page.css").read_text(encoding="utf-8"),
        asked=yaml.safe_dump(asked, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100),
        recipe="recipe.yaml" if (folder / "recipe.yaml").is_file() else None,
        checks=[_check(result, check) for check in result.checks],
        rows=[(row, _dumbbell(row), None if told else _foreign(result, row)) for row in result.table],
        but=[row.name for row in result.table if told and _foreign(result, row) is None],
        told=told,
        notes=numbers.notes(result),
        where=[_where(folder, info.name, info.file) for info in result.scores],
        patch=_patch(folder, result),
        figures=[_figure(folder, figure) for figure in result.figures],
        galleries=[_gallery(folder, gallery) for gallery in result.galleries],
        transcripts=[_transcript(folder, transcript) for transcript in result.transcripts],
        log=list(_flat({key: value for key, value in result.log.items() if key not in ("says", "notes") or not isinstance(value, list)})),
    )


def _inside(folder: Path, name: str) -> Path:
    """The path of a file that the run folder names; never one outside of it, whatever the name says."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{folder}: result.json names '{name}', which lies outside of the run folder.", "Do not trust this folder.")
    if not path.is_file():
        raise RunError(f"{folder} is damaged: there is no {name}.", "Run `trocar run` on its recipe again.")
    return path


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def _rows(folder: Path, file: str) -> tuple[list[dict[str, str]], str]:
    """The rows of a CSV file of the folder, and the file itself as a link's target."""
    content = _inside(folder, file).read_bytes()
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{folder} is damaged: {file} is not a CSV file ({error}).", "Run `trocar run` on its recipe again.") from None
    if any(None in row or None in row.values() for row in rows):
        raise RunError(f"{folder} is damaged: rows of {file} have too many or too few cells.", "Run `trocar run` on its recipe again.")
    return rows, _data("text/csv", content)


def _figure(folder: Path, figure: FigureInfo) -> dict[str, Any]:
    rows, data = _rows(folder, figure.csv)
    shown: dict[str, Any] = {"drawing": None, "columns": [], "rows": []}
    if figure.kind == "table":
        columns = list(rows[0]) if rows else []
        shown["columns"] = [(column, all(_reads_as_number(row[column]) for row in rows)) for column in columns]
        shown["rows"] = [[_cell_of(row[column]) for column in columns] for row in rows]
    else:
        shown["drawing"] = draw(figure.id, figure.kind, rows, figure.x, figure.y, figure.value, figure.series)
    return {**shown, "title": figure.title, "caption": figure.caption, "file": figure.csv, "data": data}


def _transcript(folder: Path, info: TranscriptInfo) -> dict[str, Any]:
    rows, data = _rows(folder, info.csv)
    missing = [column for column in ("prompt", "truth", "before", "after") if rows and column not in rows[0]]
    if missing:
        raise RunError(f"{folder} is damaged: {info.csv} has no column {missing[0]}.", "Run `trocar run` on its recipe again.")
    items = []
    for row in rows:
        was, now = row.get("right_before", ""), row.get("right_after", "")
        status = {("no", "yes"): "fixed", ("yes", "yes"): "kept", ("yes", "no"): "broken", ("no", "no"): "wrong"}.get(
            (was, now), "unjudged"
        )
        items.append({"mark_before": "", "mark_after": "", **row, "status": status, "same": row["before"] == row["after"]})
    judged = [row for row in rows if row.get("right_before") and row.get("right_after")]
    was, now = (sum(row[side] == "yes" for row in judged) for side in ("right_before", "right_after"))
    return {
        "title": info.title, "caption": info.caption, "marked": info.marked,
        "items": items[:TEXTS], "more": items[TEXTS:], "many": len(items),
        "judged": len(judged), "was": was, "now": now, "truth": any(row["truth"] for row in rows), "file": info.csv, "data": data,
    }  # fmt: skip


def _where(folder: Path, name: str, file: str) -> dict[str, Any]:
    try:
        scores = Scores.load(_inside(folder, file))
    except ScoresError as error:
        raise RunError(f"{folder} is damaged: {error.what}", "Run `trocar run` on its recipe again.") from None
    map_ = scores_map(scores)
    drawing: Drawing = draw(f"scores-{name}", "heatmap", map_.rows, map_.x, map_.y, map_.value)
    return {
        "title": name, "caption": map_.caption, "drawing": drawing, "file": file, "data": _data("text/csv", _csv(map_.rows)),
        "download": f"{name}.csv", "listing": map_.listing, "listed": map_.listed, "state": scores.how.fingerprint,
    }  # fmt: skip


def _patch(folder: Path, result: Result) -> dict[str, Any] | None:
    if result.patch is None:
        return None
    _inside(folder, result.patch.file)
    known = {key: None for op in result.patch.ops for key in op}
    columns = sorted(known, key=lambda key: COLUMNS.index(key) if key in COLUMNS else len(COLUMNS))
    numeric = [all(_is_number(op.get(column)) for op in result.patch.ops) for column in columns]
    rows = [[op.get(column) for column in columns] for op in result.patch.ops]
    return {"file": result.patch.file, "bytes": result.patch.bytes, "columns": list(zip(columns, numeric, strict=True)), "rows": rows}


def _gallery(folder: Path, gallery: GalleryInfo) -> dict[str, Any]:
    items = []
    for item in gallery.items:
        content = _inside(folder, item.picture).read_bytes()
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise RunError(f"{folder} is damaged: {item.picture} is not a PNG picture.", "Run `trocar run` on its recipe again.")
        items.append((item, _data("image/png", content)))
    right = sum(item.after == item.truth for item in gallery.items)
    was = sum(item.before == item.truth for item in gallery.items)
    return {"title": gallery.title, "caption": gallery.caption, "items": items, "right": right, "was": was}


def _asked_order(key: str) -> int:
    return ASKED.index(key) if key in ASKED else len(ASKED)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _reads_as_number(text: str) -> bool:
    """Whether a cell belongs on the right: a number, or one with sign and percent."""
    return not text or not math.isnan(number(text)) or re.fullmatch(r"[+−±]?[\d,.]+(e[+-]?\d+)?( %)?", text) is not None


def _cell_of(text: str) -> str:
    return numbers.compact(number(text)) if text and not math.isnan(number(text)) else text


def _status(item: Picture) -> str:
    """`fixed` (wrong before, right now), `kept` (right both times), `broken` (right before, wrong now), `wrong` (both times)."""
    if item.fixed or item.after == item.truth:
        return "kept" if item.before == item.truth else "fixed"
    return "broken" if item.before == item.truth else "wrong"


def _check(result: Result, check: Any) -> dict[str, Any]:
    """A check in words, with threshold and value as the table shows that measurement."""
    row = next((row for row in result.table if row.name == check.measurement), None)
    signs = {">=": "≥", "<=": "≤", "==": "="}

    def text(value: float | None) -> str:
        if row is None or check.statistic in ("p", "n", "ratio") or (value == 0 and check.statistic not in ("before", "after")):
            return numbers.compact(value)
        return numbers.shown(row, value) if check.statistic in ("before", "after") else numbers.change(row, value)

    says = {
        "low": "difference, lower end of the interval", "high": "difference, upper end of the interval", "p": "p-value", "n": "units",
        "ratio": "ratio after / before",
    }.get(check.statistic, check.statistic)  # fmt: skip
    return {
        "name": check.measurement, "says": says, "op": signs.get(check.op, check.op), "threshold": text(check.threshold),
        "value": text(check.value), "ok": check.ok, "note": check.note,
    }  # fmt: skip


def _foreign(result: Result, row: TableRow) -> dict[str, Any] | None:
    """What to say of a measurement that was made on other states than the model's before and after: in the method's words where it gave
    words for the state after (`each of 6 edits`), else as something that should not be."""
    known = result.model.fingerprint_before, result.model.fingerprint_after
    if (row.state_before, row.state_after) == known:
        return None
    told = row.state_before == known[0] and not re.fullmatch(r"[0-9a-f]{32}", row.state_after)
    return {"note": f"after {row.state_after}" if told else "on other states than below", "told": told}


def _told(result: Result) -> str:
    """What most numbers after are of, where that is not the patch in the folder and the method said so in the same words: told once."""
    words = [note["note"] if note["told"] else "" for row in result.table if (note := _foreign(result, row))]
    same = len(set(words)) == 1 and 2 * len(words) > len(result.table)
    return words[0].removeprefix("after ") if same else ""


def _dumbbell(row: TableRow) -> dict[str, float] | None:
    """Places (0..100) of a share or a probability before and after on a line from 0 to 100 %."""
    if row.form != "share" and not row.scorer.startswith("probability"):
        return None
    before, after = (100 * min(max(value, 0.0), 1.0) for value in (row.before, row.after))
    return {
        "before": round(before, 2),
        "after": round(after, 2),
        "left": round(min(before, after), 2),
        "width": round(abs(after - before), 2),
    }


def _cell(value: Any) -> str:
    """A value of a patch's summary or of the log."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return numbers.compact(value)
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(item)}" for name, item in value.items())
    return str(value)


def _flat(content: Mapping[str, Any], path: str = "") -> Any:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key} · ")
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            for number_, item in enumerate(value):
                yield f"{path}{key} · {number_}", item
        else:
            yield f"{path}{key}", value
