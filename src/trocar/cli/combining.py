"""What `trocar patch combine` and `prune` do. Floor 7. Imported when one of them runs."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trocar.cli import show
from trocar.core.errors import ConfigError, PatchBaseError

if TYPE_CHECKING:
    from trocar.patch import Adapter

MANY = 24  # modules; more are told by their last names
Rows = Sequence[Mapping[str, Any]]


def combine_adapters(
    paths: Sequence[Path], output: Path, how: str, weights: str | None, rank: int | None, model: str | None, seed: int, as_json: bool
) -> None:
    """Combine adapters into a folder or a patch. Raises ConfigError, PatchFormatError and PatchBaseError for those that do not fit."""
    shares = None if weights is None else _numbers(weights)
    _target(output, model)
    if len(paths) < 2:
        raise ConfigError("One adapter is nothing to combine.", "Name two or more.")
    from trocar.patch import Adapter
    from trocar.patch.combine import combine_folders

    settings = {"weights": shares, "rank": rank, "seed": seed}
    if output.suffix != ".safetensors":
        rows = combine_folders(paths, output, how, base=model, **settings)
        _tell(rows, output, "peft", as_json)
        return
    with tempfile.TemporaryDirectory() as scratch:
        rows = combine_folders(paths, Path(scratch) / "made", how, **settings)
        made = Adapter.from_peft(Path(scratch) / "made")
    _save(made, output, str(model), paths, f"combine {how}", {name: value for name, value in settings.items() if value is not None})
    _tell(rows, output, "patch", as_json)


def prune_adapter(path: Path, keep: str, output: Path, by: str, model: str | None, as_json: bool) -> None:
    """Write an adapter with only some of its groups. Raises ConfigError for groups that it does not have."""
    _target(output, model)
    from trocar.patch.combine import prune
    from trocar.patch.combine.folders import open_adapter
    from trocar.patch.combine.prune import WAYS
    from trocar.patch.peft_folder import write_folder

    source, base, _ = open_adapter(path)
    made = prune(source, keep if keep in WAYS else [one.strip() for one in keep.split(",") if one.strip()], by=by)
    if output.suffix == ".safetensors":
        _save(made.adapter, output, str(model), [path], "prune", {"keep": keep, "by": by})
    else:
        write_folder(made.adapter, output, base or model)
    _tell(made.rows, output, "patch" if output.suffix == ".safetensors" else "peft", as_json)


def _numbers(weights: str) -> list[float]:
    try:
        return [float(one) for one in weights.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {weights} is not a list of numbers.", "For example --weights .5,.5.") from None


def _target(output: Path, model: str | None) -> None:
    if output.suffix == ".safetensors" and model is None:
        raise ConfigError(f"{output} is a patch, and a patch belongs to a model.", "Name it with --model, or give a folder to write.")


def _save(adapter: Adapter, output: Path, model: str, paths: Sequence[Path], method: str, settings: Mapping[str, Any]) -> None:
    """The adapter as a patch of `model`. Raises PatchBaseError if one of the parts is a patch of another one."""
    from trocar.anatomy import fingerprint
    from trocar.patch import Patch, read_header
    from trocar.recipe.models import load_model

    loaded = load_model(model)
    base = fingerprint(loaded)
    for path in paths:
        if path.is_file() and (wanted := read_header(path).base.fingerprint) != base:
            raise PatchBaseError(f"{path} belongs to the model {wanted}; {model} is {base}.", "Give the model that it was made for.")
    Patch.of(loaded, [adapter], method, settings).save(output)


def _tell(rows: Rows, output: Path, form: str, as_json: bool) -> None:
    if as_json:
        show.line(
            json.dumps({form: str(output), "modules": [{name: _plain(value) for name, value in row.items()} for row in rows]}, indent=1)
        )
        return
    show.table(list(map(dict, rows)) if len(rows) <= MANY else _short(rows), f"{len(rows)} modules")
    if parts := [(row["mismatch"], row["norm"]) for row in rows if "mismatch" in row]:
        apart, whole = (sum(value**2 for value in column) ** 0.5 for column in zip(*parts, strict=True))
        show.line()
        share = f"{apart / whole:.3g} times its own norm" if whole else "while it is zero itself"
        show.line(f"The fused update lies off the mean of the updates by {share}; a mixture is that mean.")
    show.line(f"{form}: {output}")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(rows: Rows) -> list[dict[str, Any]]:
    """Means over the modules of one name (q_proj, ...)."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["module"].rpartition(".")[2], []).append(row)
    told = []
    for kind, members in kinds.items():
        numbers = [name for name, value in members[0].items() if isinstance(value, int | float)]
        means = {name: sum(float(row[name]) for row in members) / len(members) for name in numbers}
        notes = len([row for row in members if row.get("note")])
        told.append({"mean over": kind, "modules": len(members), **means, **({"with a note": notes} if "note" in members[0] else {})})
    return told
