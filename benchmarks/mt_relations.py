"""The relations of MT editing, judged from what `mt_editing.py` measured on every seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Runs = Mapping[int, Any]
Interval = Callable[[Sequence[float]], tuple[float, float, float]]


def relations(natural: Runs, planted: Runs, interval: Interval) -> list[dict[str, Any]]:
    """Rows for `write_result`. `n` runs hold a claim only if their mean does and, where an interval is given, the interval does."""
    rows: list[dict[str, Any]] = []

    def add(name: str, claim: str, values: Mapping[str, Any], holds: bool, differences: Sequence[float] = ()) -> None:
        between = interval(differences)[1:] if len(differences) > 1 else None
        rows.append({"id": name, "claim": claim, "values": dict(values), "interval": between, "holds": bool(holds)})

    if natural:
        _heads(natural, add)
    if planted:
        _loops(planted, add)
    if natural and planted:
        _both(natural, planted, add)
    return sorted(rows, key=lambda row: row["id"])


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def _random(run: Any, key: str, starts: str) -> float:
    """Mean over the draws of random controls."""
    return float(np.mean([row[key] for label, row in run["rows"].items() if label.startswith(starts)]))


def _heads(natural: Runs, add: Any) -> None:
    runs = list(natural.values())
    zero, one = [run["zero-shot"]["mismatch"] for run in runs], [run["one-shot"]["mismatch"] for run in runs]
    values = {"zero-shot": zero, "one-shot": one}
    holds = all(a > b for a, b in zip(zero, one, strict=True))
    claim = "zero-shot outputs are in the wrong language more often than one-shot outputs (natural errors)"
    add("R-1a", claim, values, holds, [a - b for a, b in zip(zero, one, strict=True)])
    for form, letter, words in (
        ("published", "a", "means added, as published"),
        ("ours", "b", "replaced by their means, located on zero-shot"),
    ):
        _form([run[form] for run in runs], [run["zero-shot"] for run in runs], letter, f"heads {words}", add)
    task = [run["rows"]["one-shot, task neurons off"]["chrf"] - run["one-shot"]["chrf"] for run in runs]
    rest = [_random(run, "chrf", "one-shot, random") - run["one-shot"]["chrf"] for run in runs]
    values = {"chrF, task neurons off": task, "chrF, random off": rest, "neurons": [len(run["task neurons"]) for run in runs]}
    claim = "switching refined task neurons off hurts translation, more than random neurons do (natural)"
    add("R-5b", claim, values, np.mean(task) < min(0.0, float(np.mean(rest))), [a - b for a, b in zip(task, rest, strict=True)])


def _form(forms: Sequence[Any], bases: Sequence[Any], letter: str, what: str, add: Any) -> None:
    """The relations of one form of heads. forms, bases: one a seed."""
    zero, free = [base["mismatch"] for base in bases], [base["chrf_free"] for base in bases]
    chosen = [form["rows"][f"refined, c={form['chosen']}"] for form in forms]
    own = [form["rows"]["own set"] for form in forms]
    fall, own_fall = ([row["mismatch"] - base for row, base in zip(side, zero, strict=True)] for side in (chosen, own))
    kept, own_kept = ([row["chrf_free"] - base for row, base in zip(side, free, strict=True)] for side in (chosen, own))
    control = [_random(form, "mismatch", "random") - base for form, base in zip(forms, zero, strict=True)]
    values = {"change of mismatch": own_fall, "chrF, error-free": own_kept}
    claim = f"{what}: one direction's own set has little effect (less than half of the errors gone) or costs error-free outputs chrF"
    add(f"R-2{letter}", claim, values, np.mean(own_fall) > -0.5 * np.mean(zero) or np.mean(own_kept) < -1, own_kept)
    gain = [a - b for a, b in zip(kept, own_kept, strict=True)]
    values = {"refined: chrF, error-free": kept, "own: chrF, error-free": own_kept, "refined: change of mismatch": fall}
    claim = f"{what}: refined sets cost error-free outputs less chrF than own sets at equal strength, and mismatch still falls"
    add(f"R-3{letter}", claim, values, np.mean(gain) > 0 and np.mean(fall) < 0, gain)
    values = {
        "before": zero,
        "refined": [row["mismatch"] for row in chosen],
        "random": [_random(form, "mismatch", "random") for form in forms],
        "strength": [form["chosen"] for form in forms],
        "heads": [form["heads"] for form in forms],
    }
    holds = all(a < 0 and a < b for a, b in zip(fall, control, strict=True)) and np.mean(control) > 0.5 * np.mean(fall)
    claim = f"{what}: refined heads lower zero-shot mismatch, random heads of the same number and layers do not"
    add(f"R-4{letter}", claim, values, holds, [a - b for a, b in zip(fall, control, strict=True)])
    sizes = [[row["shared"] for row in form["growth"]] for form in forms]
    four = [form["growth"][3] for form in forms if len(form["growth"]) > 3]
    values = {"shared by 1, 2, ... directions": sizes, "chance for 4": [row["chance"] for row in four]}
    holds = np.mean([row["shared"] for row in four]) > np.mean([row["chance"] for row in four]) and all(_falls(one) for one in sizes)
    add(f"R-6{letter}", f"{what}: the intersection is larger than chance and shrinks as directions are added", values, holds)
    told = [form["perplexity"] for form in forms]
    values = {"ratio": [one["ratio"] for one in told], "interval of the change": [[one["low"], one["high"]] for one in told]}
    holds = all(one["low"] <= 0 <= one["high"] for one in told)
    add(f"R-8{letter}", f"{what}: perplexity of right translations changes by less than its sampling error", values, holds)
    curves = [_curve(form, "refined, c=", "mismatch", base) for form, base in zip(forms, bases, strict=True)]
    quality = [_curve(form, "refined, c=", "chrf_free", base) for form, base in zip(forms, bases, strict=True)]
    mean, kept_mean = (np.mean([[value for _, value in one] for one in side], axis=0) for side in (curves, quality))
    best = int(np.argmin(mean))
    values = {"c": [c for c, _ in curves[0]], "mismatch": mean.round(3).tolist(), "chrF, error-free": kept_mean.round(2).tolist()}
    holds = best > 0 and bool((np.diff(mean[: best + 1]) <= 0.01).all())
    add(f"R-9{letter}", f"{what}: mismatch falls monotonically with strength up to a point", values, holds)


def _loops(planted: Runs, add: Any) -> None:
    runs = list(planted.values())
    base = [run["base"]["loops"] for run in runs]
    loops, rest = [run["base"]["chrf_loops"] or np.nan for run in runs], [run["base"]["chrf_free"] for run in runs]
    add(
        "R-1b",
        "looping outputs have far lower chrF than the rest (planted)",
        {"loops": _mean(loops), "error-free": _mean(rest)},
        np.nanmean(loops) < 0.7 * np.mean(rest),
        [a - b for a, b in zip(loops, rest, strict=True)],
    )
    row = {name: [run["rows"][name] for run in runs] for name in ("refined, s=0.0", "own set", "union", "oracle: planted off")}
    change = {name: [one["loops"] - b for one, b in zip(found, base, strict=True)] for name, found in row.items()}
    kept = {name: [one["chrf_free"] - b for one, b in zip(found, rest, strict=True)] for name, found in row.items()}
    add(
        "R-2c",
        "loop neurons of one direction alone: little effect on loops, or error-free outputs lose chrF (planted)",
        {"change of loops": _mean(change["own set"]), "chrF, error-free": _mean(kept["own set"])},
        np.mean(change["own set"]) > -0.5 * np.mean(base) or np.mean(kept["own set"]) < -1,
        kept["own set"],
    )
    ours, theirs = kept["refined, s=0.0"], kept["own set"]
    add(
        "R-3c",
        "refined loop neurons cost error-free outputs less chrF than a direction's own, and loops still fall (planted)",
        {
            "refined: chrF, error-free": _mean(ours),
            "own: chrF, error-free": _mean(theirs),
            "refined: change of loops": _mean(change["refined, s=0.0"]),
        },
        np.mean(ours) > np.mean(theirs) and np.mean(change["refined, s=0.0"]) < 0,
        [a - b for a, b in zip(ours, theirs, strict=True)],
    )
    control = [_random(run, "loops", "random") - b for run, b in zip(runs, base, strict=True)]
    fall = change["refined, s=0.0"]
    found = [run["quality"]["refined"] for run in runs]
    add(
        "R-5a",
        "switching refined loop neurons off lowers loops; random neurons of the same number and layers do not (planted)",
        {
            "before": _mean(base),
            "refined off": _mean([one["loops"] for one in row["refined, s=0.0"]]),
            "change by random": _mean(control),
            "planted four off": _mean([one["loops"] for one in row["oracle: planted off"]]),
            "found": [one["size"] for one in found],
            "of them planted": [one["planted"] for one in found],
            "recall": _mean([one["recall"] for one in found]),
        },
        np.mean(fall) < -0.5 * np.mean(base) and np.mean(control) > 0.2 * np.mean(fall),
        [a - b for a, b in zip(fall, control, strict=True)],
    )
    sizes = [[one["shared"] for one in run["growth"]] for run in runs]
    shared, chance = [run["growth"][-1]["shared"] for run in runs], [run["growth"][-1]["chance"] for run in runs]
    add(
        "R-6c",
        "loop neurons: the intersection is larger than chance and shrinks as directions are added (planted)",
        {"shared by 1, 2, ... directions": sizes, "chance for all": float(np.mean(chance))},
        np.mean(shared) > 10 * np.mean(chance) and all(_falls(one) for one in sizes),
    )
    add(
        "R-8c",
        "loop neurons: perplexity of right translations changes by less than its sampling error (planted)",
        {
            "ratio": [round(run["perplexity"]["ratio"], 4) for run in runs],
            "interval by seed": [[run["perplexity"]["low"], run["perplexity"]["high"]] for run in runs],
        },
        all(run["perplexity"]["low"] <= 0 <= run["perplexity"]["high"] for run in runs),
    )
    curves = [_curve(run, "refined, s=", "loops", run["base"], 1.0) for run in runs]
    mean = np.mean([[value for _, value in one] for one in curves], axis=0)
    add(
        "R-9c",
        "factor of loop neurons from 1 to 0: loops fall monotonically (planted)",
        {"s": [s for s, _ in curves[0]], "loops": mean.round(3).tolist()},
        bool((np.diff(mean) <= 0.01).all()) and mean[-1] < mean[0],
    )
    contrasts = {name: [run["quality"][name] for run in runs] for name in ("contrast task", "contrast first")}
    first = [run["rows"]["refined, contrast first"]["loops"] - b for run, b in zip(runs, base, strict=True)]
    add(
        "X-1",
        "contrasting with the first occurrence of the unit loses the planted neurons (planted)",
        {
            "planted found": [one["planted"] for one in contrasts["contrast first"]],
            "without contrast": [one["planted"] for one in found],
            "contrast task": [one["planted"] for one in contrasts["contrast task"]],
            "change of loops": _mean(first),
        },
        sum(one["planted"] for one in contrasts["contrast first"]) < sum(one["planted"] for one in found),
    )


def _both(natural: Runs, planted: Runs, add: Any) -> None:
    changes: dict[str, dict[str, list[float]]] = {}
    for form in ("published", "ours"):
        rows = [(run[form]["rows"][f"refined, c={run[form]['chosen']}"], run["zero-shot"]) for run in natural.values()]
        changes[f"heads, {form}"] = {key: [after[key] - base[key] for after, base in rows] for key in ("mismatch", "loops")}
    rows = [(run["rows"]["refined, s=0.0"], run["base"]) for run in planted.values()]
    changes["loop neurons"] = {key: [after[key] - base[key] for after, base in rows] for key in ("mismatch", "loops")}
    heads = all(np.mean(one["mismatch"]) < np.mean(one["loops"]) for name, one in changes.items() if name.startswith("heads"))
    neurons = np.mean(changes["loop neurons"]["loops"]) < np.mean(changes["loop neurons"]["mismatch"])
    claim = "heads act on the wrong language more than on loops, loop neurons the other way round (heads natural, neurons planted)"
    add("R-7", claim, changes, heads and neurons)


def _falls(values: Sequence[float]) -> bool:
    return all(b <= a for a, b in itertools.pairwise(values)) and values[-1] < values[0]


def _curve(run: Any, starts: str, key: str, base: Mapping[str, Any], none: float = 0.0) -> list[tuple[float, float]]:
    """(strength, value) from no change to the strongest."""
    found = [(float(label.removeprefix(starts)), row[key]) for label, row in run["rows"].items() if label.startswith(starts)]
    return [(none, base[key]), *sorted(found, key=lambda pair: abs(pair[0] - none))]
