"""From the measured rows of `where_to_edit.py` to the relations of its page, held or not, and the result file.

A relation's interval is that of the weakest comparison that it needs; every comparison stands in its values.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import write_result
from where_to_edit_table import RESAMPLES, SETS, YARD_1, YARD_2, Table, Values, difference, gain, masked, weakest

from trocar.core.files import write_text
from trocar.core.seeds import derive

TITLES = {"cifar": "CIFAR-100", "pacs": "PACS"}


def relations(table: Table, kind: str, bases: Sequence[Any]) -> list[dict[str, Any]]:
    """Every relation that the measured rows allow, for one data set."""
    found: list[dict[str, Any]] = []

    def add(number: str, claim: str, values: Mapping[str, Any], holds: bool, main: Mapping[str, Any] | None = None) -> None:
        interval = None if main is None or main["low"] is None else (main["low"], main["high"])
        found.append(
            {"id": f"{number}/{kind}", "claim": f"{TITLES[kind]}: {claim}", "values": values, "interval": interval, "holds": bool(holds)}
        )

    def above(estimates: Mapping[str, Mapping[str, Any]]) -> bool:
        """Every interval is above zero, and at least two base models say so."""
        return all(
            e["low"] is not None and e["low"] > 0 and sum(v is not None for v in e["per_base"].values()) >= min(2, len(bases))
            for e in estimates.values()
        )

    def have(*names: str) -> bool:
        return all(name in table.rows for name in names)

    _success(bases, table, add)
    _labels(bases, add)
    _overlaps(bases, kind, add)

    fo, seeds = masked("fo"), [masked("random", seed=s) for s in (0, 1) if have(masked("random", seed=s))]
    if have(fo, *YARD_2) and seeds:
        gaps = {SETS[x]: difference(table, [fo], seeds, x) for x in SETS}
        more = {}
        for keep in (0.02, 0.1, 0.25):
            rivals = [masked("random", keep, seed=s) for s in (0, 1) if have(masked("random", keep, seed=s))]
            if have(masked("fo", keep)) and rivals:
                more |= {f"keep {keep:g}, {SETS[x]}": difference(table, [masked("fo", keep)], rivals, x) for x in SETS}
        add(
            "R5",
            "learned masks generalise more than random masks of equal size at equal locality, on both sets (keep .05, points of GR)",
            gaps | more,
            above(gaps),
            weakest(gaps),
        )
        wide = [masked("random", 0.25, seed=s) for s in (0, 1) if have(masked("random", 0.25, seed=s))]
        if have(masked("fo", 0.25)) and wide:

            def shrinks(v: Values, x: str = "lrs") -> float:
                mean = lambda rows: float(np.mean([gain(v, row, YARD_2, x) for row in rows]))  # noqa: E731
                return gain(v, fo, YARD_2, x) - mean(seeds) - gain(v, masked("fo", 0.25), YARD_2, x) + mean(wide)

            trend = {SETS[x]: table.estimate(lambda v, x=x: shrinks(v, x)) for x in SETS}
            add("R5b", "the gap between learned and random masks is larger at keep .05 than at .25", trend, above(trend), weakest(trend))
    if have(fo, *YARD_2):
        dense = {f"small steps, {SETS[x]}": table.estimate(lambda v, x=x: gain(v, fo, YARD_2, x)) for x in SETS}
        if have(*YARD_1):
            dense |= {f"large steps, {SETS[x]}": table.estimate(lambda v, x=x: gain(v, fo, YARD_1, x)) for x in SETS}
        for row in (masked("fo", lr="0.0003"), masked("fo", lr="0.0003", tau=0.1), masked("ref")):
            if have(row):
                dense |= {f"{row}, {SETS[x]}": table.estimate(lambda v, x=x, row=row: gain(v, row, YARD_2, x)) for x in SETS}
        strict = {name: dense[name] for name in ("small steps, sensitive", "small steps, random")}
        add(
            "R6",
            "learned masks generalise more than dense fine-tuning with small steps at equal locality, on both locality sets (keep .05)",
            dense,
            above(strict),
            weakest(strict),
        )
    for number, method, text in (
        ("R7", "constant", "the constant mask"),
        ("R8", "gradient-norm", "gradient-norm masks, which need the label"),
    ):
        if have(fo, masked(method), *YARD_2):
            gaps = {SETS[x]: difference(table, [fo], [masked(method)], x) for x in SETS}
            more = {}
            for keep in (0.02, 0.1, 0.25):
                if have(masked("fo", keep), masked(method, keep)):
                    more |= {f"keep {keep:g}, {SETS[x]}": difference(table, [masked("fo", keep)], [masked(method, keep)], x) for x in SETS}
            add(
                number,
                f"learned masks generalise more than {text} at equal locality, on both locality sets (keep .05)",
                gaps | more,
                above(gaps),
                weakest(gaps),
            )
    if have(masked("fo", 0.02), masked("fo", 0.25)):
        falls = {SETS[x]: table.estimate(lambda v, x=x: v(masked("fo", 0.02), x) - v(masked("fo", 0.25), x)) for x in SETS}
        add(
            "R9",
            "locality falls as more entries are opened (agreement at keep .02 minus at .25, points)",
            falls,
            above(falls),
            weakest(falls),
        )
    two, three = f"{fo} images 2", f"{fo} images 3"
    if have(fo, two):
        many = {}
        for count, row in ((2, two), (3, three)):
            if have(row):
                many[f"{count} images, GR up"] = table.estimate(lambda v, row=row: v(row, "gr") - v(fo, "gr"))
                many[f"{count} images, LRs down"] = table.estimate(lambda v, row=row: v(fo, "lrs") - v(row, "lrs"))
                many[f"{count} images, LRr down"] = table.estimate(lambda v, row=row: v(fo, "lrr") - v(row, "lrr"))
        add(
            "R10",
            "two or three edit pictures: generalisation up, locality down (points, against one)",
            many,
            above(many),
            weakest(many),
        )
    _places(table, have, above, add)
    _knobs(table, have, above, add)
    return found


def _success(bases: Sequence[Any], table: Table, add: Any) -> None:
    wrong, stuck, edits, least = 0, 0, 0, 1.0
    for base in bases:
        for row in table.rows.values():
            data = base.measure(row)
            edits += len(data["sr"])
            least = min(least, float(np.mean(data["sr"])))
            for right, status in zip(data["sr"], data["status"], strict=True):
                stuck += status != "converged"
                wrong += right < 1 and status == "converged"
    values = {"edits": edits, "not converged": stuck, "wrong although converged": wrong, "lowest SR of a row": 100 * least}
    add("R1", "every edit is right afterwards unless it hit the step limit", values, wrong == 0)


def _labels(bases: Sequence[Any], add: Any) -> None:
    bases = [base for base in bases if base.trained()]
    facts = {base.name: base.labels() for base in bases}
    if facts:

        def fine(f: Mapping[str, Any]) -> bool:
            near, nearer = (f["limit_deviation"][key] for key in ("0.001", "0.0001"))
            exact = f["permutation"]["agreement"] > 0.999 and f["no_op_open"] == 0 and nearer < min(0.05, near / 5)
            return exact and f["iou_two_starts"] > 3 * f["iou_other_samples"]

        text = "labels: a no-op pair closes everything, small steps give squared row norms, neuron order does not matter, "
        text += "two random starts agree far more than two samples"
        add("R2", text, facts, all(fine(f) for f in facts.values()))
    losses: dict[str, Any] = {}
    for base in bases:
        for kind in ("fo", "ref"):
            if base.trained(kind):
                made = base.network(kind).made.report
                losses[f"{base.name} {kind}"] = {"held_out": made["held_out"], "constant": made["constant"], "pairs": made["pairs"]}
    if losses:
        add(
            "R3",
            "the hypernetwork beats the constant mask on held-out pairs",
            losses,
            all(x["held_out"] < x["constant"] for x in losses.values()),
        )


def _overlaps(bases: Sequence[Any], kind: str, add: Any) -> None:
    bases = [base for base in bases if base.trained()]
    if not bases:
        return
    values: dict[str, Any] = {}
    for method in ("fo", "ref", "gradient-norm"):
        tables = [np.array(base.overlaps()[method], float) for base in bases if method in base.overlaps()]
        if not tables:
            continue

        def statistic(matrix: np.ndarray, index: np.ndarray) -> tuple[float, float]:
            part = matrix[np.ix_(index, index)]
            return float(np.nanmean(matrix[index, index])), float(np.nanmean(part[index[:, None] != index[None]]))

        rng = np.random.default_rng(derive(0, "iou", method))
        within, between = np.array([statistic(m, np.arange(len(m))) for m in tables]).mean(0).tolist()
        draws = [np.mean([np.subtract(*statistic(m, rng.integers(0, len(m), len(m)))) for m in tables]) for _ in range(RESAMPLES)]
        low, high = np.quantile(draws, (0.025, 0.975)).tolist()
        values[method] = {"within": within, "between": between, "mean": within - between, "low": low, "high": high}
    learned = {name: value for name, value in values.items() if name != "gradient-norm"}
    add(
        "R4",
        "masks (keep .05) of one failure group overlap more than masks of different groups (IoU within minus between)",
        values,
        all(v["low"] > 0 for v in learned.values()),
        weakest(learned),
    )


def _places(table: Table, have: Any, above: Any, add: Any) -> None:
    rates = ("0.0001", "0.0003", "0.001")
    first = [f"dense lr {lr} tau 0.3 blocks 0-2" for lr in rates]
    if not have(*first, *YARD_1):
        return

    def over_first(v: Values, rows: Sequence[str], x: str) -> float:
        gains = [gain(v, row, first, x) for row in rows]
        reached = [value for value in gains if np.isfinite(value)]
        return float(np.mean(reached)) if reached else float("nan")

    values = {}
    for name in ("", " blocks 2-4", " blocks 1-3"):
        rows = [f"dense lr {lr} tau 0.3{name}" for lr in rates]
        if have(*rows):
            label = name.strip() or "blocks 3-5"
            values |= {f"{label}, {SETS[x]}": table.estimate(lambda v, r=rows, x=x: over_first(v, r, x)) for x in SETS}
    late = {name: value for name, value in values.items() if name.startswith("blocks 3-5")}
    add(
        "R11",
        "editing the middle or late three blocks generalises more than the first three at equal locality (dense, mean over step sizes)",
        values,
        above(late),
        weakest(late),
    )


def _knobs(table: Table, have: Any, above: Any, add: Any) -> None:
    keeps = [masked("fo", keep) for keep in (0.02, 0.05, 0.1, 0.25)]
    rules = [masked("fo"), masked("fo", lr="0.0003"), masked("fo", lr="0.0003", tau=0.1)]
    if not have(*keeps, *rules):
        return

    def spans(v: Values, metric: str) -> tuple[float, float]:
        wide = [[v(row, metric) for row in rows] for rows in (keeps, rules)]
        return max(wide[0]) - min(wide[0]), max(wide[1]) - min(wide[1])

    values = {}
    for metric in ("gr", "lrs", "lrr"):
        values[metric] = table.estimate(lambda v, m=metric: spans(v, m)[1] - spans(v, m)[0])
        values[metric]["span_of_keep"] = table.estimate(lambda v, m=metric: spans(v, m)[0])["mean"]
        values[metric]["span_of_step_and_threshold"] = table.estimate(lambda v, m=metric: spans(v, m)[1])["mean"]
    add(
        "R12",
        "step size and threshold (lr 3e-4..1e-3, tau .1..3) move the result more than keep (.02 to .25): spans' difference, points",
        values,
        above(values),
        weakest(values),
    )


def summary(table: Table, kind: str) -> list[dict[str, Any]]:
    """One row per editor: means over bases and groups, standard errors over groups, gain over yardstick 2 with its interval."""
    result = []
    for name, row in table.rows.items():
        line: dict[str, Any] = {
            "data": TITLES[kind],
            "editor": name,
            "method": f"{row.method} {row.more}".strip(),
            "keep": row.keep,
            "lr": row.lr,
            "tau": row.tau,
        }
        for metric in ("sr", "gr", "lrs", "lrr", "accuracy", "steps"):
            groups = np.concatenate([self[name][metric] for self in table.data.values()])
            scale = 100 if metric == "steps" else 1
            line[metric] = round(float(np.nanmean(groups)) / scale, 2)
            if metric in ("gr", "lrs", "lrr"):
                line[f"{metric}_se"] = round(float(np.nanstd(groups, ddof=1) / np.sqrt(np.isfinite(groups).sum())), 2)
        for x, where in SETS.items():
            gained: dict[str, Any] = dict.fromkeys(("mean", "low", "high"))
            if name not in YARD_2 and all(other in table.rows for other in YARD_2):
                gained = table.estimate(lambda v, x=x, name=name: gain(v, name, YARD_2, x))
            line |= {f"gain_{where}": gained["mean"], f"gain_{where}_low": gained["low"], f"gain_{where}_high": gained["high"]}
        result.append(line)
    return result


def report(out: Path, bases: Sequence[Any], rows: Sequence[Any], quick: bool, settings: Mapping[str, Any]) -> None:
    """Write the result file and, beside it, the points of all fronts as CSV."""
    found: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for kind in TITLES:
        own = [base for base in bases if base.kind == kind]
        if own:
            table = Table(own, rows)
            found += relations(table, kind, own)
            lines += summary(table, kind)
    facts = [base.facts for base in bases]
    write_result(
        out, "where_to_edit", sorted({base.seed for base in bases}), {"quick": quick, "bases": facts, **settings}, found, [], lines
    )
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)
        write_text(out.with_name(f"{out.stem}_fronts.csv"), text.getvalue())
    for row in found:
        print("holds " if row["holds"] else "FAILS ", row["id"], row["claim"], row["interval"] or "")
