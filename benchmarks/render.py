"""Render docs/benchmarks.md from benchmarks/results/*.json: what held, with intervals, and what took how long, each with its command.

python benchmarks/render.py [--results FOLDER] [--out FILE]
"""

from __future__ import annotations

import argparse
import numbers
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RELATION, RESULTS, ROOT, TIMING

from trocar.core.files import read_json, write_text

INTRODUCTION = """# Benchmarks

Written by `benchmarks/render.py` from the files in `benchmarks/results/`; do not edit. Every number was measured by the command above it,
on the machine and commit beside it. A relation is a claim of the method's paper (or of this project) that can fail: *holds* says whether it
did. Intervals are 95 %. A ratio is the peer's seconds over ours, measured in turn: above 1, Trocar is faster.
"""


FIRST = (
    "adapter",
    "method",
    "layer",
    "tokens",
    "measured",
    "merged by",
    "model",
    "task",
    "game",
    "three tasks by",
    "trained",
    "way",
    "estimator",
    "rate",
)


def render(results: Sequence[Mapping[str, Any]]) -> str:
    """The page for the given results, in the order given."""
    parts = [INTRODUCTION]
    if not results:
        parts.append("No results yet: `make bench` writes them.\n")
    else:
        parts.append(_overview(results))
    parts += [_section(result) for result in results]
    return "\n".join(parts)


def _overview(results: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for result in results:
        held = sum(bool(row["holds"]) for row in result["relations"])
        ratios = [row["ratio"] for row in result["timings"] if row["ratio"] is not None]
        rows.append(
            {
                "benchmark": f"[{result['method']}](#{_anchor(result['method'])})",
                "relations held": f"{held} of {len(result['relations'])}" if result["relations"] else "-",
                "speed-up over peers": _span(ratios),
                "seeds": len(result["seeds"]),
            }
        )
    return _table(rows)


def _span(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    low, high = f"{min(ratios):.2f}x", f"{max(ratios):.2f}x"
    return low if low == high else f"{low} to {high}"


def _section(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    gpus = f", {', '.join(machine['gpus'])}" if machine.get("gpus") else ""
    parts = [
        f"## {result['method']}\n",
        f"```console\n$ {result['command']}\n```\n" if result.get("command") else "",
        f"Commit `{result['commit']}`{', ' + result['date'] if result.get('date') else ''}, "
        f"seeds {', '.join(map(str, result['seeds'])) or '-'}; "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpus}, {machine['threads']} thread(s), "
        f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}.\n",
    ]
    if result["relations"]:
        parts.append("### Relations\n")
        parts.append(
            _table(
                [
                    {
                        "id": row["id"],
                        "claim": row["claim"],
                        "measured": _values(row["values"]),
                        "95 % interval": _interval(row["interval"]),
                        "holds": "yes" if row["holds"] else "**no**",
                        **_rest(row, RELATION),
                    }
                    for row in result["relations"]
                ]
            )
        )
    if result["timings"]:
        parts.append("### Timings\n")
        parts.append(
            _table(
                [
                    {
                        "task": row["task"],
                        "ours": _seconds(row["ours_s"]),
                        "peer": row["peer"],
                        "peer's": _seconds(row["peer_s"]),
                        "ratio": _number(row["ratio"]),
                        "95 % interval": _interval((row["ratio_low"], row["ratio_high"]) if row.get("ratio_low") is not None else None),
                        **_rest(row, TIMING | {"ratio_low", "ratio_high"}),
                    }
                    for row in result["timings"]
                ]
            )
        )
    if result["real"]:
        parts.append("### On real models\n")
        parts.append(_table(result["real"], subject=True))
    for title, rows in result.get("tables", {}).items():
        parts.append(f"### {title}\n")
        parts.append(_table(rows, subject=True))
    if result["settings"]:
        parts.append("<details><summary>Settings</summary>\n")
        parts.append(_table([{"setting": key, "value": _values(value)} for key, value in result["settings"].items()]))
        parts.append("</details>\n")
    return "\n".join(part for part in parts if part)


def _rest(row: Mapping[str, Any], shown: set[str]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in shown}


def _table(rows: Sequence[Mapping[str, Any]], subject: bool = False) -> str:
    """A Markdown table; the columns are the union of the rows' keys in order of appearance.

    subject: those of FIRST before the others, since files have sorted keys.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if subject:
        columns.sort(key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else _values(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _values(value: Any) -> str:
    """Numbers with four digits, mappings as `name value`, lists in brackets; more than twelve entries are cut and counted."""
    if isinstance(value, Mapping):
        return _cut([f"{key} {_values(item)}" for key, item in value.items()], ", ")
    if isinstance(value, list | tuple):
        return f"[{_cut([_values(item) for item in value], ', ')}]"
    return _number(value)


def _cut(parts: Sequence[str], between: str) -> str:
    return between.join(parts[:12]) + (f"{between}... ({len(parts)} in all)" if len(parts) > 12 else "")


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(pair: Sequence[float] | None) -> str:
    return "-" if pair is None else f"{_number(pair[0])} to {_number(pair[1])}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1 or unit == "µs":
            return f"{value * scale:.3g} {unit}"
    raise AssertionError


def _anchor(name: str) -> str:
    return "".join(letter for letter in name.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


def load(folder: Path) -> list[dict[str, Any]]:
    """Every result in `folder`, by name. Raises ValueError naming a file that is not a result."""
    found = []
    for path in sorted(folder.glob("*.json")):
        result = read_json(path)
        missing = {"method", "commit", "seeds", "machine", "settings", "relations", "timings", "real"} - set(result)
        if missing:
            raise ValueError(f"{path.name} is not a benchmark's result: it lacks {', '.join(sorted(missing))}.")
        found.append(result)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/render.py", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    asked = parser.parse_args(argv)
    results = load(asked.results)
    write_text(asked.out, render(results))
    print(f"{asked.out.name}: {len(results)} benchmarks, {sum(len(result['relations']) for result in results)} relations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
