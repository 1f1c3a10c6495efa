"""Write the excerpt that comes with a shipped lab model: failing pictures, locality sets, unlabelled pictures, bytes untouched."""

from __future__ import annotations

from pathlib import Path

import torch

from trocar.core.files import atomic_path
from trocar.core.seeds import generator
from trocar.lab.failures import groups, locality, logits, pixel_values
from trocar.lab.models import load
from trocar.lab.rare import split
from trocar.lab.registry import get
from trocar.lab.sources import EXCERPTS

ATTRIBUTION = {
    "cifar100": "CIFAR-100 (A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009), free for research; "
    "re-encoded as WebP, quality 85",
}


def write_excerpt(name: str, out: Path | None = None, n_groups: int = 3, per_group: int = 60, unlabelled: int = 512) -> Path:
    """Write `excerpts/NAME.parquet` for the shipped model `name` (base seed 0).

    Columns: image (bytes), label (class), part (sub-class), role (`failure`, `sensitive`, `random`, `unlabelled`), group (of a failure),
    predicted (by the shipped weights). The `n_groups` largest groups with different true classes, up to `per_group` pictures each;
    unlabelled pictures are training pictures of common parts, for a mask hypernetwork.
    """
    import pyarrow
    import pyarrow.parquet

    row = get(name)
    model, _ = load(name)
    parts = split(row.data, 0)
    column, part = row.data.label, row.data.part
    failing: list[tuple[int, str]] = []
    seen: set[str] = set()
    for group in groups(parts, column, part, logits(model, pixel_values(parts, parts.rare_unseen, row.shape.image))):
        if group.truth not in seen and len(seen) < n_groups:
            seen.add(group.truth)
            order = torch.randperm(len(group.rows), generator=generator(0, "excerpt", group.name))[:per_group]
            failing += [(group.rows[i], group.name) for i in sorted(order.tolist())]
    scores = logits(model, pixel_values(parts, parts.common_test, row.shape.image))
    near = locality(scores, parts.labels(parts.common_test, column), parts.common_test, 0)
    common = [r for r in parts.train if parts.table.columns[part][r] not in parts.rare.values()]
    drawn = torch.randperm(len(common), generator=generator(0, "excerpt", "unlabelled"))[:unlabelled]
    listed = [(r, "failure", g) for r, g in failing] + [(r, role, "") for role in near for r in near[role]]
    listed += [(common[i], "unlabelled", "") for i in sorted(drawn.tolist())]

    rows = [r for r, _, _ in listed]
    predicted = logits(model, pixel_values(parts, rows, row.shape.image)).argmax(-1).tolist()
    table = pyarrow.table(
        {
            "image": [{"bytes": parts.table.images[r], "path": None} for r in rows],
            "label": [parts.table.columns[column][r] for r in rows],
            "part": [parts.table.columns[part][r] for r in rows],
            "role": [role for _, role, _ in listed],
            "group": [group for _, _, group in listed],
            "predicted": [parts.classes[number] for number in predicted],
        }
    )
    table = table.replace_schema_metadata({"attribution": ATTRIBUTION[row.data.source], "model": f"lab:{name}"})
    path = out or EXCERPTS / f"{name.removeprefix('vit-')}.parquet"
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
    return path
