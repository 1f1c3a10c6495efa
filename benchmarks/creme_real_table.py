"""What `creme_real.py` measured, case by case, as rows of tables and as claims with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trocar.evaluate import Measurement


def spread(values: Sequence[float], before: Sequence[float] | None = None, groups: Sequence[Any] | None = None) -> dict[str, float]:
    """Mean after and before, and the 95 % interval of their difference (bootstrap over units or groups)."""
    start = [0.0] * len(values) if before is None else list(before)
    row = Measurement(
        "share", "case", np.array(start, float), np.array(values, float), "", "before", "after", groups=groups, form="number"
    ).summary(resamples=2000)
    return {"before": row.before, "after": row.after, "low": row.before + row.low, "high": row.before + row.high}


def condensed(units: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all cases of one setting say together."""
    whole: dict[str, Any] = {"cases": len(units)}
    for name in ("moved", "broken", "leaked"):
        whole[name] = spread([float(np.mean(unit[name])) for unit in units if unit[name]])
    for name in ("correction", "paraphrase", "generalisation", "specificity", "leakage", "guide", "first hop"):
        for kind in ("right", "score", "whole"):
            pairs = [
                (number, unit["before"][kind][row], unit["after"][kind][row])
                for number, unit in enumerate(units)
                for row, label in enumerate(unit["sets"])
                if label == name
            ]
            if pairs:
                groups, before, after = zip(*pairs, strict=True)
                whole[f"{name} {kind}"] = spread(after, before, groups)
    before, after = ([unit[side]["score"][0] for unit in units] for side in ("before", "after"))
    change = (np.array(after) - np.array(before)) / np.maximum(before, 1e-12)
    whole["relative"] = {"mean": float(change.mean()), "median": float(np.median(change))}
    whole["share"] = float(np.mean([unit["share"] for unit in units]))
    whole["seconds"] = float(np.median([unit["seconds"] for unit in units]))
    return whole


def shown(model: str, part: str, setting: str, blocks: Sequence[int], whole: Mapping[str, Any], ppl: str = "") -> dict[str, Any]:
    """One row of the table of real models; shares in percent, with intervals where they matter."""

    def percent(name: str, interval: bool = True) -> str:
        if name not in whole:
            return ""
        row = whole[name]
        ends = f" ({100 * row['low']:.0f} to {100 * row['high']:.0f})" if interval and not np.isnan(row["low"]) else ""
        return f"{100 * row['after']:.1f}{ends}" if name in ("moved", "broken") else f"{100 * row['after']:.0f}{ends}"

    def change(name: str) -> str:
        return f"{100 * whole[name]['before']:.0f} to {100 * whole[name]['after']:.0f}" if name in whole else ""

    return {
        "model": model,
        "part": part,
        "setting": setting,
        "blocks": f"{blocks[0]}-{blocks[-1]}",
        "cases": whole["cases"],
        "repaired %": percent("correction right"),
        "whole answer %": percent("correction whole", False),
        "moved %": percent("moved"),
        "solved ones broken %": percent("broken", False),
        "paraphrases right %": change("paraphrase right"),
        "generalisations right %": change("generalisation right"),
        "unrelated right %": change("specificity right"),
        "guides right %": change("guide right"),
        "perplexity": ppl,
    }


def claims(tag: str, found: Mapping[str, Sequence[Mapping[str, Any]]], ratios: Mapping[str, float], setting: str) -> list[dict[str, Any]]:
    """What is claimed of the chosen setting on the test half, and whether it holds."""
    chosen, published = found[setting], found["identity (published)"]
    whole = condensed(chosen)
    repaired, moved = whole["correction right"], whole["moved"]
    rows: list[dict[str, Any]] = [
        {
            "id": f"{tag}-aim",
            "claim": "at least 75 % of the gap repaired, at most 10 % of the other two-hop questions moved",
            "values": {"repaired": repaired["after"], "moved": moved["after"]},
            "interval": (repaired["low"], repaired["high"]),
            "holds": repaired["after"] >= 0.75 and moved["after"] <= 0.10,
        },
        {
            "id": f"{tag}-perplexity",
            "claim": "perplexity on WikiText-2 within 1 % after two single edits",
            "values": ratios[setting],
            "interval": None,
            "holds": ratios[setting] <= 1.01,
        },
    ]
    gains = {
        name: whole[f"{name} score"] for name in ("correction", "paraphrase", "generalisation", "specificity") if f"{name} score" in whole
    }
    steps = {name: gain["after"] - gain["before"] for name, gain in gains.items()}
    if len(steps) == 4:
        ordered = steps["correction"] > steps["paraphrase"] > steps["generalisation"] > max(0, abs(steps["specificity"]))
        claim = "gain in probability: correction > paraphrase > generalisation > |unrelated|"
        rows.append({"id": f"{tag}-R-5", "claim": claim, "values": steps, "interval": None, "holds": ordered})
    paired = spread(*[[float(np.mean(unit["moved"])) for unit in units] for units in (chosen, published)])
    interval = (paired["low"] - paired["before"], paired["high"] - paired["before"])
    values = {"ours": paired["after"], "published": paired["before"]}
    claim = "with the second moment of ordinary prompts fewer other questions move than with the identity"
    rows.append({"id": f"{tag}-R-11", "claim": claim, "values": values, "interval": interval, "holds": interval[1] < 0})
    return rows


def grouped(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means and ranges over the draws of each size and way."""
    found = []
    for size, how in dict.fromkeys((row["size"], row["how"]) for row in rows):
        same = [row for row in rows if (row["size"], row["how"]) == (size, how)]
        numbers = {name: [row[name] for row in same] for name in same[0] if isinstance(same[0][name], float)}
        found.append(
            {"cases": size, "how": how, "draws": len(same), **{n: [float(np.mean(v)), min(v), max(v)] for n, v in numbers.items()}}
        )
    return found


def brief(whole: Mapping[str, Any]) -> str:
    names = ("correction right", "correction whole", "moved", "broken", "paraphrase right", "generalisation right", "guide right")
    return ", ".join(f"{name} {whole[name]['after']:.3f}" for name in names if name in whole)
