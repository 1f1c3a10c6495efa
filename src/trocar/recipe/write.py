"""The files of a result: patch, scores, a CSV per figure and transcript, the pictures. Floor 6. Same outcome, same bytes."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trocar.core.errors import DataError
from trocar.core.files import atomic_path, write_text
from trocar.method import Figure, Gallery, Outcome, Transcript

PATCH = "patch.safetensors"
TRANSCRIPT = ("prompt", "truth", "before", "after", "mark_before", "mark_after", "right_before", "right_after")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0d\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*$")


def write_files(folder: Path, outcome: Outcome) -> dict[str, Any]:
    """Write everything but `result.json`, and return the parts of it that name those files."""
    patch = None
    if outcome.patch is not None:
        outcome.patch.save(folder / PATCH)
        patch = {"file": PATCH, "bytes": (folder / PATCH).stat().st_size, "ops": [dict(row) for row in outcome.patch.summary()]}
    scores = []
    for name, value in outcome.scores.items():
        file = f"scores/{_safe(name)}.safetensors"
        (folder / "scores").mkdir(exist_ok=True)
        value.save(folder / file)
        scores.append({"name": name, "file": file})
    return {
        "patch": patch,
        "scores": scores,
        "figures": [_figure(folder, figure) for figure in outcome.figures],
        "galleries": [_gallery(folder, gallery) for gallery in outcome.galleries],
        "transcripts": [_transcript(folder, transcript) for transcript in outcome.transcripts],
    }


def _figure(folder: Path, figure: Figure) -> dict[str, Any]:
    file = f"figures/{_safe(figure.id)}.csv"
    columns = list(figure.rows[0]) if figure.rows else [name for name in (figure.x, figure.y, figure.value, figure.series) if name]
    _csv(folder / file, columns, figure.rows)
    kept = ("id", "title", "kind", "x", "y", "value", "series", "caption")
    return {**{name: getattr(figure, name) for name in kept}, "csv": file}


def _csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")  # refuses a row with another key
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _transcript(folder: Path, transcript: Transcript) -> dict[str, Any]:
    file = f"texts/{_safe(transcript.id)}.csv"
    marked = transcript.marks_before is not None and transcript.marks_after is not None
    sides = [_judged(transcript, texts, marks) for texts, marks in (
        (transcript.before, transcript.marks_before), (transcript.after, transcript.marks_after),
    )]  # fmt: skip
    rows = [
        {
            "prompt": _printable(prompt), "truth": _printable(truth), "before": _printable(before), "after": _printable(after),
            "mark_before": was[0], "mark_after": now[0], "right_before": was[1], "right_after": now[1],
        }
        for prompt, truth, before, after, was, now in zip(
            transcript.prompts, transcript.truth, transcript.before, transcript.after, *sides, strict=True
        )
    ]  # fmt: skip
    _csv(folder / file, TRANSCRIPT, rows)
    return {"id": transcript.id, "title": transcript.title, "caption": transcript.caption, "csv": file, "marked": marked}


def _judged(transcript: Transcript, texts: Sequence[str], marks: Sequence[str] | None) -> list[tuple[str, str]]:
    """(mark, `yes`, `no` or nothing) of every text: right is what bears no mark, or begins with the truth where nobody marked."""
    if marks is not None:
        return [(_printable(mark), "no" if mark else "yes") for mark in marks]
    wanted = [" ".join(truth.casefold().split()) for truth in transcript.truth]
    said = [" ".join(text.casefold().split()) for text in texts]
    return [("", "" if not want else "yes" if text.startswith(want) else "no") for text, want in zip(said, wanted, strict=True)]


def _printable(text: str) -> str:
    """Without control characters, which models do write and neither CSV nor HTML may hold."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _gallery(folder: Path, gallery: Gallery) -> dict[str, Any]:
    from PIL import Image

    items = []
    for row, (picture, truth, before, after) in enumerate(zip(gallery.pictures, gallery.truth, gallery.before, gallery.after, strict=True)):
        file = f"pictures/{_safe(gallery.id)}/{row}.png"
        with atomic_path(folder / file) as temporary:
            Image.fromarray(picture).save(temporary, format="PNG")
        items.append({"picture": file, "truth": truth, "before": before, "after": after, "fixed": after == truth})
    return {"id": gallery.id, "title": gallery.title, "caption": gallery.caption, "items": items}


def _safe(name: str) -> str:
    """A method's name for a file, which must not lead anywhere else."""
    if not _NAME.match(name):
        raise DataError(f"'{name}' cannot be the name of a file.", "Use letters, digits, '.', '_' and '-'.")
    return name
