"""`trocar inspect`. Floor 7."""

from __future__ import annotations

import json
from typing import Any

from trocar.cli import show


def inspect_model(source: str, dtype: str, as_json: bool) -> None:
    """Load a model and print what anatomy knows about it."""
    from trocar.recipe.schema import ModelSource

    asked = ModelSource.parse({"source": source, "dtype": dtype}, "model")
    from trocar.anatomy import describe
    from trocar.recipe.models import load_model

    facts = describe(load_model(asked))
    if as_json:
        show.line(json.dumps(facts, indent=1))
        return
    towers = facts.pop("towers")
    remarks = facts.pop("remarks")
    show.pairs({**facts, "bytes": show.size(facts["bytes"])}, source)
    show.line()
    show.table([_row(tower) for tower in towers], "Towers" if len(towers) > 1 else "Tower")
    show.line()
    for tower in towers:
        show.pairs(
            {name: tower[name] for name in ("block_path", "embedding", "final_norm", "head", "linears")}, f"Paths {tower['name']}".rstrip()
        )
    if remarks:
        show.line()
        show.line("Remarks: " + "; ".join(remarks) + ".")


def _row(tower: dict[str, Any]) -> dict[str, Any]:
    kept = ("modality", "blocks", "width", "heads", "kv_heads", "head_size", "neurons", "causal", "parameters")
    return {"tower": tower["name"] or "(one)", **{name: tower[name] for name in kept}}
