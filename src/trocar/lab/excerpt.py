"""Write the excerpts that come with shipped lab models.

Of pictures: failing ones, locality sets, unlabelled ones, bytes untouched. Of a translator: sentences to locate, choose and test on.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from trocar.core.errors import ConfigError
from trocar.core.files import atomic_path, write_bytes
from trocar.core.seeds import generator
from trocar.lab.failures import groups, locality, logits, pixel_values
from trocar.lab.models import load
from trocar.lab.rare import split
from trocar.lab.registry import TranslationData, get
from trocar.lab.sources import EXCERPTS
from trocar.lab.translation import corpus

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

    data, shape, _ = get(name).pictures()
    model, _ = load(name)
    parts = split(data, 0)
    column, part = data.label, data.part
    failing: list[tuple[int, str]] = []
    seen: set[str] = set()
    for group in groups(parts, column, part, logits(model, pixel_values(parts, parts.rare_unseen, shape.image))):
        if group.truth not in seen and len(seen) < n_groups:
            seen.add(group.truth)
            order = torch.randperm(len(group.rows), generator=generator(0, "excerpt", group.name))[:per_group]
            failing += [(group.rows[i], group.name) for i in sorted(order.tolist())]
    scores = logits(model, pixel_values(parts, parts.common_test, shape.image))
    near = locality(scores, parts.labels(parts.common_test, column), parts.common_test, 0)
    common = [r for r in parts.train if parts.table.columns[part][r] not in parts.rare.values()]
    drawn = torch.randperm(len(common), generator=generator(0, "excerpt", "unlabelled"))[:unlabelled]
    listed = [(r, "failure", g) for r, g in failing] + [(r, role, "") for role in near for r in near[role]]
    listed += [(common[i], "unlabelled", "") for i in sorted(drawn.tolist())]

    rows = [r for r, _, _ in listed]
    predicted = logits(model, pixel_values(parts, rows, shape.image)).argmax(-1).tolist()
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
    table = table.replace_schema_metadata({"attribution": ATTRIBUTION[data.source], "model": f"lab:{name}"})
    path = out or EXCERPTS / f"{name.removeprefix('vit-')}.parquet"
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
    return path


def write_sentences(name: str, out: Path | None = None, per_split: Mapping[str, int] | None = None) -> Path:
    """Write `excerpts/SOURCE-short.jsonl.gz` for the shipped translator `name`: parallel sentences as its corpus has them.

    Columns: split (`train`, and those the model never saw), and one a language. per_split: how many of each split, taken evenly in the
    corpus's order; default 250 of the training sentences and all others. Where they come from stands in `excerpts/README.md`.
    """
    data, _, _ = get(name).texts()
    if not isinstance(data, TranslationData):
        raise ConfigError(f"Lab model '{name}' has no parallel sentences.")
    rows = []
    for part in (data.train, *data.unseen):
        found = corpus(data, part)
        most = (per_split or {data.train: 250}).get(part, len(found))
        step = max(1, len(found) // most)
        rows += [{"split": part, **row} for row in found[::step][:most]]
    path = out or EXCERPTS / f"{data.source}-short.jsonl.gz"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(path, gzip.compress(lines.encode(), mtime=0))
    return path
