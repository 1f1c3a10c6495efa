"""The files of a result: patch, scores, a CSV per figure, the pictures. Floor 6. Same outcome, same bytes."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

from trocar.core.errors import DataError
from trocar.core.files import atomic_path, write_text
from trocar.method import Figure, Gallery, Outcome

PATCH = "patch.safetensors"
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
    }


def _figure(folder: Path, figure: Figure) -> dict[str, Any]:
    file = f"figures/{_safe(figure.id)}.csv"
    columns = list(figure.rows[0]) if figure.rows else [name for name in (figure.x, figure.y, figure.value, figure.series) if name]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")  # refuses a row with another key
    writer.writeheader()
    writer.writerows(figure.rows)
    write_text(folder / file, text.getvalue())
    kept = ("id", "title", "kind", "x", "y", "value", "series", "caption")
    return {**{name: getattr(figure, name) for name in kept}, "csv": file}


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
