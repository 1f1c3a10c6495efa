"""Run the conformance suite for every family on the installed transformers and write docs/families.md.

python benchmarks/support_table.py [--quick]     (the same work either way; about ten seconds)

Results of each transformers version are kept in benchmarks/support.json: run it on the oldest and on the newest one.
"""

from __future__ import annotations

import argparse

import transformers
from common import ROOT

from trocar.anatomy import TINY, Anatomy, tiny_model
from trocar.anatomy.conformance import check
from trocar.core.files import read_json, write_json, write_text

STORE, PAGE = ROOT / "benchmarks" / "support.json", ROOT / "docs" / "families.md"


def measure() -> dict[str, dict[str, object]]:
    """Family -> what the suite said of its tiny random model."""
    found = {}
    for name in TINY:
        model = tiny_model(name)
        results = check(model)
        towers = Anatomy.of(model).towers.values()
        found[name] = {
            "checks": len(results),
            "failed": [result.name for result in results if not result.ok],
            "grouped": any(t.kv_heads(0) < t.heads(0) for t in towers),
            "fused": any(t.has(0, role) for t in towers for role in ("qkv", "gate_up")),
            "gated": any(t.has(0, role) for t in towers for role in ("gate", "gate_up")),
            "free": any(t.heads(0) * t.head_size(0) != t.width for t in towers),
        }
    return found


def page(stored: dict[str, dict[str, dict]]) -> str:
    versions = sorted(stored, key=lambda version: [int(part) for part in version.split(".")[:3]])
    lines = [
        "# Families",
        "",
        "Written by `benchmarks/support_table.py` from the conformance suite (`trocar.anatomy.conformance.check`); do not edit.",
        "A cell counts the properties that hold for a tiny random model of the family on that transformers version. The other columns say",
        "what the tested model had: grouped queries, fused projections, a gated feed-forward, heads x head size other than the width.",
        "",
        "| family | " + " | ".join(f"transformers {v}" for v in versions) + " | grouped | fused | gated | free head size |",
        "|---" * (len(versions) + 5) + "|",
    ]
    newest = stored[versions[-1]]
    for name, row in newest.items():
        cells = []
        for version in versions:
            cell = stored[version].get(name)
            cells.append("not run" if cell is None else f"{cell['checks'] - len(cell['failed'])} of {cell['checks']}")
        marks = ["yes" if row[key] else "" for key in ("grouped", "fused", "gated", "free")]
        lines.append("| " + " | ".join([f"`{name}`", *cells, *marks]) + " |")
    lines += ["", "A new family is a row of `src/trocar/anatomy/families.py` and a tiny model in `src/trocar/anatomy/tiny.py`.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="accepted for uniformity; the work is short anyway")
    parser.parse_args()
    stored = read_json(STORE) if STORE.exists() else {}
    stored[transformers.__version__] = measure()
    write_json(STORE, stored)
    write_text(PAGE, page(read_json(STORE)))
    print(f"{PAGE.relative_to(ROOT)}: {len(stored[transformers.__version__])} families on transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
