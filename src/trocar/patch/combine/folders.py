"""Combining PEFT folders into a PEFT folder, module by module: what is in memory is one module, whatever the size of the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trocar.core.errors import ConfigError
from trocar.core.progress import track
from trocar.core.seeds import derive
from trocar.patch.combine.algebra import common_modules, report, weights_for
from trocar.patch.combine.fusion import fuse
from trocar.patch.combine.lego import build
from trocar.patch.combine.mixture import mix
from trocar.patch.ops.adapter import Factors
from trocar.patch.peft_folder import open_folder, write_modules

WAYS = ("fusion", "mixture", "lego")


def combine_folders(
    folders: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    how: str = "fusion",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> list[Mapping[str, Any]]:
    """Combine LoRA folders of one base into the folder `target`, which loads in plain PEFT; returns the report's rows.

    how: `fusion`, `mixture` or `lego`, with the settings of the functions of those names. Raises ConfigError as they do, and for adapters
    that name different base models.
    """
    sources = [open_folder(folder) for folder in folders]
    bases = {source.base for source in sources if source.base}
    if len(bases) > 1:
        raise ConfigError(f"The adapters name different base models: {', '.join(sorted(bases))}.", "Combine adapters of one base.")
    names = common_modules(sources, need_rank=how == "fusion")
    shares = weights_for(len(sources), weights)
    tables = [source.shapes for source in sources]
    ways: dict[str, Callable[[str, list[Factors]], tuple[Factors, dict[str, Any]]]] = {
        "fusion": lambda name, parts: fuse(parts, shares),
        "mixture": lambda name, parts: mix(parts, shares, rank),
        "lego": lambda name, parts: build(parts, rank or parts[0].a.shape[0], derive(seed, "lego", name) % 2**32),
    }
    if how not in ways:
        raise ConfigError(f"'{how}' cannot be done folder by folder.", f"Use {', '.join(WAYS)}.")
    shapes = {}
    for name in names:
        here = [table[name] for table in tables]
        if how == "fusion":
            same = len({shape.scale for shape in here}) == 1
            shapes[name] = here[0] if same else here[0]._replace(scale=1.0)
        elif how == "mixture":
            used = [shape.rank for shape, share in zip(here, shares, strict=True) if share]
            shapes[name] = here[0]._replace(rank=rank or sum(used), scale=1.0)
        else:
            size = rank or here[0].rank
            mean = sum(shape.rank for shape in here) / len(here)
            shapes[name] = here[0]._replace(rank=size, scale=(mean / size) ** 0.5)
    rows: list[Mapping[str, Any]] = []
    steps = iter(track(names, "combine"))

    def factors(name: str) -> Factors:
        next(steps, None)
        parts = [source[name] for source in sources]
        made, told = ways[how](name, parts)
        rows.append(report(name, made, parts, **told))
        return made

    write_modules(target, shapes, factors, sources[0].task, sources[0].dropout, next(iter(bases), None))
    return rows
