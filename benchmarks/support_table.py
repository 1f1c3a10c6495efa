"""Which families work, measured: all conformance questions on a tiny random model of every family, and on real models if present.

python benchmarks/support_table.py [--quick] [--out FILE] [--page FILE]

Run it once with each version of transformers: rows of other versions are kept. Writes benchmarks/results/support.json and, from it alone,
docs/families.md. --quick leaves the real models out (and keeps what was measured on them before).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import ROOT, arguments, commit, write_result

from trocar.core.files import read_json, write_json, write_text
from trocar.core.progress import track

REAL = {"smollm2-135m-instruct": "AutoModelForCausalLM", "gemma3-270m": "AutoModelForCausalLM", "minilm-l6": "AutoModel"}
WORDS = {"holds": "yes", "absent": "-", "fails": "**no**"}
PAGE = """# Families

Written by `benchmarks/support_table.py` from `benchmarks/results/support.json`; do not edit. Each cell is the answer to a question that was
asked by running the model, on transformers {versions}: *yes* means that it held on all of them, *-* that the model has no such thing.
A model whose type is not in the table is refused with [UnknownFamilyError](errors/unknown-family.md); quantised weights, experts, and
attention or MLP weights shared between blocks are refused with [UnsupportedModelError](errors/unsupported-model.md).
"""


def measure(real: bool) -> list[dict[str, Any]]:
    """One row per model, this version of transformers: its sizes, and the state of every question."""
    import torch
    import transformers

    from trocar.anatomy import TINY, tiny_model

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = [_row(name, "random", tiny_model(name), thorough=True) for name in track(list(TINY), "families")]
    root = Path(os.environ.get("TROCAR_MODELS", "~/.cache/trocar/models")).expanduser()
    for name, kind in track([(n, k) for n, k in REAL.items() if real and (root / n).is_dir()], "real models"):
        model = getattr(transformers, kind).from_pretrained(root / name, dtype=torch.float32).eval()
        rows.append(_row(name, "pretrained", model, thorough=False))
    return rows


def _row(name: str, weights: str, model: Any, thorough: bool) -> dict[str, Any]:
    import transformers

    from trocar.anatomy import Anatomy
    from trocar.anatomy.conformance import check

    anatomy = Anatomy.of(model)
    states: dict[str, str] = {}
    details: dict[str, str] = {}
    for result in check(model, thorough=thorough):
        states[result.name] = max(states.get(result.name, "absent"), result.state, key=["absent", "holds", "fails"].index)
        if result.detail and result.state == states[result.name]:
            details[result.name] = f"{result.tower}: {result.detail}" if result.tower else result.detail
    return {
        "model": name,
        "weights": weights,
        "family": anatomy.family.name,
        "model_type": model.config.model_type,
        "class": type(model).__name__,
        "towers": [
            f"{tower.n_layers} blocks, width {tower.width}, {tower.heads(0)} heads of {tower.head_size(0)} on {tower.kv_heads(0)}, "
            f"{tower.neurons(0)} {'gated ' if 'gate' in tower.linears(0) else ''}neurons"
            for tower in anatomy.towers.values()
        ],
        "transformers": transformers.__version__,
        "states": states,
        "details": details,
    }


def relations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One relation per question: it held on every model that has such a thing."""
    found = []
    for name, claim in questions().items():
        asked = [row for row in rows if row["states"].get(name, "absent") != "absent"]
        failed = [f"{row['model']} ({row['transformers']})" for row in asked if row["states"][name] == "fails"]
        values = {"models": len(asked), "failed": failed} if failed else {"models": len(asked), "failed": 0}
        found.append({"id": f"anatomy: {name}", "claim": claim, "values": values, "interval": None, "holds": bool(asked) and not failed})
    return found


def questions() -> dict[str, str]:
    """Every question and what a yes means: the first sentence of the function that asks it."""
    from trocar.anatomy.conformance import MODEL_QUESTIONS, TOWER_QUESTIONS

    texts = {name: " ".join((question.__doc__ or "").split()) for name, question in {**TOWER_QUESTIONS, **MODEL_QUESTIONS}.items()}
    return {**texts, "restored": "After all questions the model is bit for bit what it was before."}


def render(rows: list[Mapping[str, Any]]) -> str:
    """The page. Cells join all versions; a version that differs is named."""
    versions = sorted({row["transformers"] for row in rows}, key=lambda text: [int(part) for part in text.split(".") if part.isdigit()])
    names = list(questions())
    parts = [PAGE.format(versions=" and ".join(versions))]
    for weights, title in (("random", "## Tiny random models of every family"), ("pretrained", "## Pretrained models")):
        models = list(dict.fromkeys(row["model"] for row in rows if row["weights"] == weights))
        if not models:
            continue
        shown = [name for name in names if any(name in row["states"] for row in rows if row["weights"] == weights)]
        parts += [title, "", "| " + " | ".join(["model", "model type", "what it is", *shown]) + " |", "|" + " --- |" * (len(shown) + 3)]
        for model in models:
            same = [row for row in rows if row["model"] == model]
            sizes = "; ".join(same[0]["towers"])
            cells = [_cell([(row["transformers"], row["states"].get(name, "absent")) for row in same]) for name in shown]
            parts.append("| " + " | ".join([f"`{model}`", f"`{same[0]['model_type']}`", sizes, *cells]) + " |")
        parts.append("")
    remarks = [
        f"- `{row['model']}`, transformers {row['transformers']}, {name}: {text}"
        for row in rows
        for name, text in row["details"].items()
        if row["states"][name] == "fails" or name == "files"
    ]
    parts += ["## Remarks", "", *remarks, ""] if remarks else []
    parts += ["## The questions", "", *[f"- **{name}**: {text}" for name, text in questions().items()], ""]
    parts += [
        "To support another family, add a row to `src/trocar/anatomy/families.py` (or call `trocar.anatomy.register`) and ask the same"
    ]
    parts += ["questions: `trocar.anatomy.conformance.check(model)`.", ""]
    return "\n".join(parts)


def _cell(states: list[tuple[str, str]]) -> str:
    if len({state for _, state in states}) == 1:
        return WORDS[states[0][1]]
    return ", ".join(f"{version}: {WORDS[state]}" for version, state in states)


def main(argv: list[str] | None = None) -> int:
    asked = arguments(
        "support_table",
        __doc__ or "",
        argv,
        lambda parser: parser.add_argument("--page", type=Path, default=ROOT / "docs" / "families.md"),
    )
    path = asked.out if asked.out.name != "support_table.json" else asked.out.with_name("support.json")
    measured = measure(real=not asked.quick)
    fresh = {(row["model"], row["transformers"]) for row in measured}
    kept = [row for row in (read_json(path)["support"] if path.exists() else []) if (row["model"], row["transformers"]) not in fresh]
    order = {row["model"]: place for place, row in enumerate(measured)}
    rows = sorted(kept + measured, key=lambda row: (order.get(row["model"], len(order)), row["transformers"]))
    for row in measured:
        row["commit"] = commit()  # rows of other versions may be older
    versions = sorted({row["transformers"] for row in rows})
    real = [
        {"model": row["model"], "transformers": row["transformers"], "class": row["class"], "sizes": "; ".join(row["towers"]),
         "holds": sum(state == "holds" for state in row["states"].values()), "fails": sum(s == "fails" for s in row["states"].values())}
        for row in rows if row["weights"] == "pretrained"
    ]  # fmt: skip
    result = write_result(path, "support", [0], {"transformers": versions}, relations(rows), real=real)
    write_json(path, {**result, "support": rows})
    write_text(asked.page, render(rows))
    failed = [f"{row['model']}: {name}" for row in measured for name, state in row["states"].items() if state == "fails"]
    print(f"{len(measured)} models, {sum(len(row['states']) for row in measured)} questions, {len(failed)} failed", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
