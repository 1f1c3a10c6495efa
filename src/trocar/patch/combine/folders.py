"""Combining PEFT folders into a PEFT folder, module by module: what is in memory is one module, whatever the size of the model.

A patch file that holds one adapter may stand for a folder; it is read whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trocar.core.errors import ConfigError, ExportError
from trocar.core.progress import track
from trocar.core.seeds import derive
from trocar.patch.combine.algebra import Source, common_modules, factors_of, report, shapes_of, weights_for
from trocar.patch.combine.align import align
from trocar.patch.combine.fusion import fuse
from trocar.patch.combine.lego import build
from trocar.patch.combine.mixture import mix
from trocar.patch.ops.adapter import Adapter, Factors
from trocar.patch.patch import Patch
from trocar.patch.peft_folder import open_folder, write_modules

WAYS = ("fusion", "mixture", "aligned", "lego")


def open_adapter(path: str | os.PathLike[str]) -> tuple[Source, str | None, str | None]:
    """A PEFT folder or a patch file, with the name of its base and the fingerprint of its base, as far as it says them.

    Raises PatchFormatError as `open_folder` and `Patch.load` do, ExportError for a patch that is not one adapter.
    """
    if not Path(path).is_file():
        folder = open_folder(path)
        return folder, folder.base, None
    patch = Patch.load(path)
    if len(patch.ops) != 1 or not isinstance(patch.ops[0], Adapter):
        raise ExportError(
            f"{path} is not one adapter: it holds {', '.join(op.kind for op in patch.ops) or 'nothing'}.",
            "If its changes are low-rank, write it as a folder first: trocar patch export PATCH MODEL FOLDER --to peft.",
        )
    return patch.ops[0], None, patch.base.fingerprint


def combine_folders(
    folders: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    how: str = "fusion",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    seed: int = 0,
    base: str | None = None,
) -> list[Mapping[str, Any]]:
    """Combine LoRA folders of one base into the folder `target`, which loads in plain PEFT; returns the report's rows.

    folders: PEFT folders or patch files. how: one of `WAYS`, with the settings of the functions of those names. base: the model's name for
    the new folder, where the adapters say none. Raises ConfigError as those functions do, for adapters that name different base models and
    patches of different ones, and for a setting that the way does not have.
    """
    if how not in WAYS:
        raise ConfigError(f"'{how}' cannot be done folder by folder.", f"Use {', '.join(WAYS)}.")
    if how == "lego" and weights is not None:
        raise ConfigError("LoRA-LEGO clusters units and weighs no adapter.", "Leave out the weights, or use a mixture.")
    if how in ("fusion", "aligned") and rank is not None:
        raise ConfigError(f"{how} keeps the adapters' rank, so {rank} cannot be had from it.", "Leave out the rank, or use a mixture.")
    if rank is not None and rank < 1:
        raise ConfigError(f"A rank of {rank} cannot be.", "Use 1 or more.")
    opened = [open_adapter(folder) for folder in folders]
    sources = [source for source, _, _ in opened]
    bases = {base for _, base, _ in opened if base}
    if len(bases) > 1:
        raise ConfigError(f"The adapters name different base models: {', '.join(sorted(bases))}.", "Combine adapters of one base.")
    if len(states := {state for *_, state in opened if state}) > 1:
        raise ConfigError(f"The patches belong to different models: {', '.join(sorted(states))}.", "Combine patches of one base.")
    names = common_modules(sources, need_rank=how in ("fusion", "aligned"))
    shares = weights_for(len(sources), weights)
    tables = [shapes_of(source) for source in sources]
    ways: dict[str, Callable[[str, list[Factors]], tuple[Factors, dict[str, Any]]]] = {
        "fusion": lambda name, parts: fuse(parts, shares),
        "aligned": lambda name, parts: _aligned(parts, shares),
        "mixture": lambda name, parts: mix(parts, shares, rank),
        "lego": lambda name, parts: build(parts, rank or parts[0].a.shape[0], derive(seed, "lego", name) % 2**32),
    }
    shapes = {}
    for name in names:
        here = [table[name] for table in tables]
        if how in ("fusion", "aligned"):
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
        parts = [factors_of(source, name) for source in sources]
        made, told = ways[how](name, parts)
        rows.append(report(name, made, parts, **told))
        return made

    write_modules(target, shapes, factors, sources[0].task, sources[0].dropout, base or next(iter(bases), None))
    return rows


def _aligned(parts: list[Factors], shares: Sequence[float]) -> tuple[Factors, dict[str, Any]]:
    """One module: every other adapter's factors moved towards the first's, then fused. The worst alignment is told."""
    found = [align(parts[0], part) for part in parts[1:]]
    made, told = fuse([parts[0], *(part for part, _ in found)], shares)
    notes = "; ".join(dict.fromkeys(str(row["note"]) for _, row in found if row["note"]))
    before, after = (max((float(row[f"mismatch {when}"]) for _, row in found), default=0.0) for when in ("before", "after"))
    return made, {**told, "apart before": before, "apart after": after, "note": notes}
