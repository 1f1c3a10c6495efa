"""Scores as heat maps: which components matter, or which were chosen. Floor 6."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trocar.locate import Scores
from trocar.report.numbers import compact

COLUMNS = 64  # cells in a row of a heat map; more components than that share cells


@dataclass(frozen=True)
class Map:
    """A heat map as rows (`x`, `y`, `value` name the columns), what it shows in words, and a short list of what stands out."""

    rows: list[dict[str, Any]]
    x: str
    y: str
    value: str
    caption: str
    listing: list[tuple[str, str]]
    listed: str


def scores_map(scores: Scores) -> Map:
    """Layers by index (channels: matrix and side by index; linears: layers by role). A mask shows the share chosen in each cell, other
    scores the highest score in each cell, which a mean would bury."""
    matrix = scores.matrix()
    width = matrix.values.shape[1]
    per_cell = -(-width // COLUMNS)
    mask, rows = scores.is_mask, []
    x = "index" if width > 1 else "layer"
    value = ("share chosen" if per_cell > 1 else "chosen") if mask else ("highest score" if per_cell > 1 else "score")
    for line, label in enumerate(matrix.rows):
        for start in range(0, width, per_cell):
            cell = matrix.values[line, start : start + per_cell]
            cell = cell[~np.isnan(cell)]
            if cell.size == 0:
                continue
            names = matrix.columns[start : start + per_cell]
            where = names[0] if len(names) == 1 else f"{names[0]}–{names[-1]}"
            number = float(cell.mean()) if mask else float(cell.max())
            note = (
                f"{int(cell.sum())} of {cell.size}"
                if mask and per_cell > 1
                else f"mean {compact(float(cell.mean()))}"
                if per_cell > 1
                else ""
            )
            rows.append({"index": where, "component": label.rstrip(".").removesuffix(".H").removesuffix(".N"), value: number, "note": note})
    if width == 1:  # one component a layer: layers side by side
        rows = [{"layer": row["component"], "component": scores.kind, value: row[value], "note": row["note"]} for row in rows]
    what = {"attention": "attention modules", "mlp": "MLPs"}.get(scores.kind, f"{scores.kind}s")
    told = f"{scores.count():,} of {len(scores):,} {what} chosen" if mask else f"{len(scores):,} {what} scored"
    caption = f"{told} by {scores.how.method}{f' on {scores.how.data}' if scores.how.data else ''}."
    if per_cell > 1:
        caption += f" Each cell holds {per_cell} {what}."
    if mask:
        chosen = {name: (int((array == 1).sum()), array.size) for name, array in scores.groups.items()}
        listing = [(name, f"{count:,} of {size:,}") for name, (count, size) in chosen.items() if size > 1 or count]
        return Map(rows, x, "component", value, caption, listing[:24], "chosen")
    return Map(rows, x, "component", value, caption, [(name, compact(number)) for name, number in scores.ranked(12)], "highest")
