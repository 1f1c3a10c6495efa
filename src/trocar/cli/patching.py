"""What `trocar patch ...` does. Floor 7. Imported when one of its commands runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from trocar.cli import show
from trocar.core.errors import ConfigError, PatchBaseError, nearest

if TYPE_CHECKING:
    import torch

    from trocar.patch import Patch
    from trocar.recipe.data import RoleSource
    from trocar.recipe.schema import Recipe


def show_patch(path: Path, as_json: bool) -> None:
    """Print a patch's header; reads (and so verifies) the whole file, but needs no torch."""
    from trocar.patch import read_header

    header = read_header(path)
    facts = {
        "base": header.base.model_dump(mode="json"),
        "method": header.method,
        "settings": dict(header.settings),
        "measurements": [dict(row) for row in header.measurements],
        "bytes": header.nbytes,
        "digest": header.digest,
        "operations": header.rows(),
    }
    if as_json:
        show.line(json.dumps(facts, indent=1))
        return
    base = {f"base {name}": value for name, value in facts["base"].items() if not isinstance(value, dict | list)}
    show.pairs({**base, "method": header.method or None, "file": show.size(header.nbytes)}, str(path))
    show.line()
    show.table([{**row, "bytes": show.size(row["bytes"])} for row in header.rows()], f"{len(header.ops)} operations")
    if header.settings:
        show.line()
        show.pairs(header.settings, "Settings")
    if header.measurements:
        show.line()
        show.table(header.measurements, "Measured when it was made")


def apply_patch(path: Path, model: str, output: Path) -> None:
    """Merge a patch into a checkpoint folder, writing a new one."""
    from trocar.patch import Patch, merge_into

    merge_into(Patch.load(path), checkpoint(model), output)
    show.line(f"checkpoint: {output}")


def stack_patches(paths: Sequence[Path], model: str, on_overlap: str, output: Path | None) -> None:
    """Say where patches overlap, try them together, and write them as one. Raises PatchOverlapError if nobody said which of them wins."""
    if on_overlap not in ("refuse", "order"):
        raise ConfigError(f"--on-overlap {on_overlap} is not known.", nearest(on_overlap, ("refuse", "order")))
    if len(paths) < 2:
        raise ConfigError("A stack needs at least two patches.", "Name them in the order of application.")
    from trocar.anatomy import fingerprint
    from trocar.patch import Patch, stack
    from trocar.recipe.models import load_model

    stacked = stack([Patch.load(path) for path in paths], on_overlap="refuse" if on_overlap == "refuse" else "order")
    loaded = load_model(model)
    rows = [
        {"patch": str(path), "operations": len(one.ops), "bytes": show.size(one.nbytes)}
        for path, one in zip(paths, stacked.patches, strict=True)
    ]
    show.table(rows)
    show.line()
    found = stacked.overlaps(loaded)
    if found:
        rows = [{"first": str(paths[o.first]), "second": str(paths[o.second]), "where": o.where, "entries": o.entries} for o in found]
        show.table(rows, "Overlaps")
    else:
        show.line("No overlaps: the order does not matter.")
    base = fingerprint(loaded)
    with stacked.applied(loaded):
        state = fingerprint(loaded)
    if fingerprint(loaded) != base:
        raise PatchBaseError(f"The stack of {len(paths)} patches does not leave {model} as it was.", "Please report it.")
    show.pairs({"base": base, "all applied": state, "reverted": "bit for bit"}, f"On {model}")
    if output is not None:
        stacked.combined(loaded).save(output)
        show.line(f"patch: {output} ({show.size(output.stat().st_size)})")


def diff_models(base: str, edited: str, output: Path) -> None:
    """Write what changed between two checkpoints as a patch."""
    from trocar.patch import diff

    patch = diff(checkpoint(base), checkpoint(edited))
    patch.save(output)
    show.table([{**row} for row in patch.summary()], f"{len(patch.ops)} operations")
    show.line(f"patch: {output} ({show.size(output.stat().st_size)})")


def check_patch(path: Path, model: str, recipe_path: Path | None) -> None:
    """Apply and revert on the model; with a recipe, measure its data before and after, and judge by its checks."""
    from trocar.recipe.schema import ModelSource, load_recipe

    asked = ModelSource.parse({"source": model}, "model")
    recipe = load_recipe(recipe_path) if recipe_path else None
    from trocar.anatomy import fingerprint
    from trocar.patch import Patch
    from trocar.recipe.models import load_model

    patch = Patch.load(path)
    loaded = load_model(recipe.model.model_copy(update={"source": model}) if recipe else asked)
    base = fingerprint(loaded)
    applied = patch.apply(loaded)
    state = fingerprint(loaded)
    applied.revert()
    if fingerprint(loaded) != base:
        raise PatchBaseError(
            f"{path} does not leave {model} as it was when it is taken back.", "Do not use it on this model, and report it."
        )
    hooks = " (by hooks: no weight changes)" if state == base else ""
    show.pairs({"base": f"right ({base})", "applied": f"{state}{hooks}", "reverted": f"bit for bit ({base})"}, f"{path} on {model}")
    if recipe is not None:
        _measure(patch, loaded, recipe)


def export_patch(path: Path, model: str, output: Path, to: str) -> None:
    """Write a patch in an ecosystem's format."""
    if to not in ("checkpoint", "peft"):
        raise ConfigError(f"--to {to} is not known.", nearest(to, ("checkpoint", "peft")))
    from trocar.patch import Patch, export

    export(Patch.load(path), checkpoint(model), output, to=to)
    show.line(f"{to}: {output}")


def checkpoint(model: str) -> Path:
    """The folder of a model, for what works on files. Raises ConfigError for a hub id that is not on this machine as a folder."""
    from trocar.recipe.models import find_model

    place = find_model(model)
    if place.kind == "lab":
        from trocar.lab.models import find

        folder = find(place.where)
        if folder is not None:
            return folder
    if place.kind != "folder":
        raise ConfigError(f"{model} is not on this machine as a folder.", "Download or train it first, and give its folder.")
    return Path(place.where)


def _measure(patch: Patch, model: torch.nn.Module, recipe: Recipe) -> None:
    """Every role of the recipe before and after: accuracy where there are labels, agreement with the base for locality roles.

    A measurement has its role's name; the recipe's checks that name a role are judged. Raises ChecksFailedError.
    """
    import tempfile

    from trocar.anatomy import fingerprint
    from trocar.cli.run import judge
    from trocar.evaluate import BaseOutputs, accuracy, locality, outputs, run_checks
    from trocar.recipe.data import load_roles
    from trocar.recipe.prepare import prepare
    from trocar.result import check_infos, table_rows

    asked = prepare(recipe)
    if asked.reads == "texts":
        raise ConfigError(
            f"The recipe's method, {asked.method.name}, reads texts, and only the method itself measures those.",
            "Leave out --recipe to try the patch, or use `trocar run` to measure it.",
        )
    with tempfile.TemporaryDirectory() as scratch:
        cache = BaseOutputs(scratch)
        data = load_roles(cast("Mapping[str, RoleSource]", asked.data), model, cache, recipe.base)
        before = {role: cache.logits(model, rows) for role, rows in data.items()}
    state = fingerprint(model)
    with patch.applied(model):
        states = (state, fingerprint(model))
        after = {role: outputs(model, rows) for role, rows in data.items()}
    measurements = []
    for role, rows in data.items():
        if rows.labels is None or role.startswith("locality"):
            measurements.append(locality(before[role], after[role], states, role))
        else:
            measurements.append(accuracy(before[role], after[role], rows.labels, states, role))
    mine = [check for check in asked.checks if check.measurement in data]
    verdict = run_checks(mine, measurements, recipe.seed)
    show.line()
    rows = table_rows(measurements, recipe.seed)
    show.table([{"measured": r.name, "n": r.n, "before": r.before, "after": r.after, "low": r.low, "high": r.high, "p": r.p} for r in rows])
    show.table({"check": str(row.check), "value": row.value, "holds": row.ok} for row in verdict.rows)
    left = [check for check in asked.checks if check not in mine]
    if left:
        show.line(f"Not judged, because only the method measures it: {', '.join(dict.fromkeys(check.measurement for check in left))}.")
    judge(check_infos(verdict), "The patch was taken back; nothing was changed.")
