"""CopRA's relations on small models, plain LoRA beside it: seeds, clients and tasks merged, adapters pruned, blocks valued.

Pictures: the lab's ViTs (three base seeds each for CIFAR-100 superclasses and PACS, real photographs) learn to see recoloured, turned and
inverted pictures, with the head frozen. Texts: the lab's knowledge-world decoders (three worlds, synthetic text) learn three new forms of
question. Settings were chosen on training pictures; tests are used for measuring only. Everything is paired: the same base, rows, first
values and order of rows for every way of training. The bases must have been trained (`trocar lab train`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, arguments, mean_interval, write_result
from copra_small import (
    CLIENTS,
    LORA,
    MAIN,
    OTHERS,
    PRUNING,
    QUICK,
    RATES,
    SHARES,
    SHORTER,
    TASK,
    Bench,
    Sizes,
    clients,
    merged_tasks,
    same_task,
    single,
)

from trocar.core.workspace import Workspace

BASES = [f"{kind}:{seed}" for kind in ("cifar", "pacs", "world") for seed in range(3)]
WORLD_STEPS = 100
NAMES = {
    "alone": "one seed alone", "fusion": "two seeds fused at .5", "triples": "three seeds fused", "mixture": "two seeds mixed",
    "aligned": "two seeds aligned, fused", "spread": "spread of Shapley shares", "active": "mean activation",
    "mismatch": "mismatch of the fusion, of its norm", **{way: f"pruned: {way}" for way in PRUNING},
}  # fmt: skip


def collect(base: str, work: Workspace, sizes: Sizes) -> dict[str, Any]:
    """Everything that is measured on one base."""
    kind, seed = base.split(":")
    bench = Bench(kind, int(seed), work, sizes)
    seeds = max(2, sizes.fewer)
    if kind == "world":
        steps = min(WORLD_STEPS, sizes.short)
        return {"tasks": merged_tasks(bench, steps), "same": same_task(bench, "birthplace", MAIN, seeds, steps)}
    if kind == "pacs":
        return {"same": same_task(bench, TASK, MAIN, seeds, sizes.short)}
    return {
        "same": same_task(bench, TASK, MAIN, sizes.seeds, sizes.steps, deep=True),
        "shorter": same_task(bench, TASK, SHORTER, seeds, sizes.short),
        "tasks": merged_tasks(bench, sizes.short),
        "clients": clients(bench, TASK),
        "rates": {f"{rate:g}": single(bench, TASK, sizes.short, rate) for rate in RATES},
    }


def relation(name: str, claim: str, per_base: dict[str, float], want: Callable[[float], bool] = lambda value: value > 0) -> dict[str, Any]:
    """holds: on every base. interval: of the mean over bases (Student's t)."""
    values = list(per_base.values())
    interval = None
    mean = float(np.mean(values))
    if len(values) > 1:
        mean, low, high = mean_interval(values)
        interval = (low, high)
    return {
        "id": name,
        "claim": claim,
        "values": {"mean": mean, **per_base},
        "interval": interval,
        "holds": all(want(value) for value in values),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def relations(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Paired differences CopRA minus plain LoRA, base by base."""
    made = []
    for kind in ("cifar", "pacs", "world"):
        bases = {base: data for base, data in found.items() if base.startswith(kind)}
        if not bases:
            continue

        def gain(key: str, bases: dict[str, Any] = bases) -> dict[str, float]:
            return {base: _mean(data["same"]["copra"][key]) - _mean(data["same"]["plain"][key]) for base, data in bases.items()}

        made.append(relation(f"R1 {kind}", "two seeds fused at .5: CopRA is right more often", gain("fusion")))
        for way in PRUNING:
            made.append(relation(f"R2 {kind} {way}", f"pruned ({way}): CopRA is right more often", gain(way)))
        made.append(
            relation(f"R3 {kind}", "Shapley shares are more level with CopRA (difference of their spread)", gain("spread"), lambda v: v < 0)
        )
        made.append(
            relation(f"R4 {kind}", "single-task accuracy about equal or better (at most .01 lower)", gain("alone"), lambda v: v > -0.01)
        )
        active = {base: _mean(data["same"]["copra"]["active"]) for base, data in bases.items()}
        groups = {base: len(data["same"]["copra"]["shares"][0]) for base, data in bases.items()}
        wanted = {base: _expected(groups[base]) for base in bases}
        gap = {base: active[base] - wanted[base] for base in bases}
        claim = f"mean activation is that of the redraw rule, {_mean(list(wanted.values())):.3f} (difference)"
        made.append(relation(f"R8 {kind}", claim, gap, lambda v: abs(v) < 0.03))
    cifar = {base: data for base, data in found.items() if base.startswith("cifar")}
    if cifar:
        made += _cifar(cifar)
    for kind in ("cifar", "world"):
        bases = {base: data["tasks"] for base, data in found.items() if base.startswith(kind) and "tasks" in data}
        for way in ("fusion", "mixture", "lego"):
            if bases:
                gains = {
                    base: _mean(list(data["copra"][way].values())) - _mean(list(data["plain"][way].values()))
                    for base, data in bases.items()
                }
                made.append(relation(f"tasks {kind} {way}", f"three tasks merged by {way}: CopRA is right more often", gains))
    return made


def _expected(groups: int) -> float:
    p = np.minimum(1, 0.1 + 0.9 * (np.arange(4000) + 0.5) / 3000)
    return float(np.mean(p / (1 - (1 - p) ** groups)))


def _cifar(bases: dict[str, Any]) -> list[dict[str, Any]]:
    def of(path: Callable[[Any], float]) -> dict[str, float]:
        return {base: path(data) for base, data in bases.items()}

    def same(way: str, key: str) -> Callable[[Any], float]:
        return lambda data: _mean(data["same"][way][key])

    def shorter(key: str, way: str = "copra", other: str = "plain") -> Callable[[Any], float]:
        return lambda data: _mean(data["shorter"][way][key]) - _mean(data["shorter"][other][key])

    made = [
        relation("R1 barrier", "the barrier between two seeds is smaller with CopRA (difference)",
                 of(lambda d: same("copra", "barrier")(d) - same("plain", "barrier")(d)), lambda v: v < 0),
        relation("R1 triples", "three seeds fused 1:1:1: CopRA is right more often",
                 of(lambda d: same("copra", "triples")(d) - same("plain", "triples")(d))),
        relation("R1 short", "at half the length two seeds fused at .5: CopRA is right more often", of(shorter("fusion"))),
        *(relation(f"R2 short {way}", f"at half the length, pruned ({way}): CopRA is right more often", of(shorter(way)))
          for way in PRUNING),
        relation("R3 short", "at half the length Shapley shares are more level with CopRA (difference of their spread)",
                 of(shorter("spread")), lambda v: v < 0),
        relation("R4 short", "at half the length single-task accuracy is about equal or better (at most .01 lower)",
                 of(shorter("alone")), lambda v: v > -0.01),
    ]  # fmt: skip
    for way in MAIN:
        gap = of(lambda d, way=way: same(way, "mixture")(d) - same(way, "alone")(d))
        made.append(
            relation(
                f"R5 {way}", f"the mixture of two seeds loses nothing against one of them ({way}; at most .01)", gap, lambda v: v > -0.01
            )
        )
    for way in ("everyother", "otherhalf"):  # with the first block and without it
        drop = of(shorter(way, "dropout", "copra"))
        claim = f"element dropout does not give what CopRA gives to pruning ({way}, difference)"
        made.append(relation(f"R6 {way}", claim, drop, lambda v: v < 0))
        claim = f"constant p without a full phase prunes better than plain LoRA ({way})"
        made.append(relation(f"R7 pruning {way}", claim, of(shorter(way, "constant"))))
    made.append(relation("R6 fusion", "element dropout does not give what CopRA gives to the fusion of two seeds (difference)",
                         of(shorter("fusion", "dropout", "copra")), lambda v: v < 0))  # fmt: skip
    made.append(relation("R7 fusion", "constant p without a full phase: two seeds fuse better than plain LoRA's",
                         of(shorter("fusion", "constant"))))  # fmt: skip
    whole = of(shorter("alone", "constant", "copra"))
    made.append(relation("R7 alone", "and its whole model is worse than CopRA's (difference)", whole, lambda v: v < 0))
    for rate in RATES:
        fall = of(lambda d, rate=rate: d["rates"][f"{rate:g}"]["copra"] - d["rates"][f"{rate:g}"]["plain"])
        made.append(relation(f"R9 {rate:g}", f"at a learning rate of {rate:g} CopRA does better than plain LoRA", fall))
    for start in ("own", "shared"):
        server = of(lambda d, s=start: d["clients"][f"copra, {s} start"]["server"] - d["clients"][f"plain, {s} start"]["server"])
        made.append(
            relation(f"federated {start}", f"server's average of uneven clients, {start} first values: CopRA is right more often", server)
        )
    guided = "removal, lowest Shapley value first"
    for way in MAIN:
        for other in ("smallest update first", "last blocks first", "at random"):
            gap = of(lambda d, w=way, o=other: _area(d["same"][w][guided]) - _area(d["same"][w][f"removal, {o}"]))
            claim = f"removal by lowest Shapley value keeps more than {other} ({way}, mean over all numbers of removed blocks)"
            made.append(relation(f"guided {way} {other}", claim, gap))
    return made


def _area(curves: Sequence[Sequence[float]]) -> float:
    return float(np.mean([np.mean(curve) for curve in curves]))


def tables(found: dict[str, dict[str, Any]], sizes: Sizes) -> dict[str, list[dict[str, Any]]]:
    """Means over the bases of a kind, with the smallest and largest base."""
    made: dict[str, list[dict[str, Any]]] = {}
    keys = ["alone", "fusion", "triples", "barrier", "mixture", "aligned", *PRUNING]
    keys += [*(f"keep {role}" for role in LORA.targets), *(f"zeros {share}" for share in SHARES), "spread", "active", "mismatch"]
    steps = {"same": {"cifar": sizes.steps, "pacs": sizes.short, "world": min(WORLD_STEPS, sizes.short)}, "shorter": {"cifar": sizes.short}}
    for kind in ("cifar", "pacs", "world"):
        bases = [data for base, data in found.items() if base.startswith(kind)]
        for part in ("same", "shorter"):
            if not bases or part not in bases[0]:
                continue
            ways = [way for way in bases[0][part] if way != "base"]
            rows = []
            for key in keys:
                row = {way: _over([_mean(data[part][way][key]) for data in bases if data[part][way].get(key)]) for way in ways}
                if any(row.values()):
                    rows.append({"measured": NAMES.get(key, key), **row})
            base = _over([data[part]["base"] for data in bases])
            made[f"{kind}, {steps[part][kind]} steps; the base alone is right on {base}"] = rows
        if bases and "tasks" in bases[0]:
            made[f"{kind}: three tasks in one adapter"] = [
                {"merged by": how, **{way: _over([_merged(data["tasks"][way][how]) for data in bases]) for way in MAIN}}
                for how in ("own", "fusion", "mixture", "sum", "lego")
            ]
        if bases and "clients" in bases[0]:
            made[f"{kind}: {CLIENTS} clients with uneven classes"] = [
                {
                    "trained": name,
                    "a client alone": _over([_mean(data["clients"][name]["clients"]) for data in bases]),
                    "server's average": _over([data["clients"][name]["server"] for data in bases]),
                }
                for name in bases[0]["clients"]
                if name != "rows"
            ]
            made[f"{kind}: learning rates, {sizes.short} steps"] = [
                {"rate": rate, **{way: _over([data["rates"][rate][way] for data in bases]) for way in MAIN}} for rate in bases[0]["rates"]
            ]
    return made


def _merged(by_task: dict[str, float]) -> float:
    return _mean(list(by_task.values()))


def _over(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""


def main() -> None:
    def extend(parser: Any) -> None:
        parser.add_argument("--bases", nargs="+", help=f"which bases (default: {' '.join(BASES)}; with --quick cifar:0 world:0)")
        parser.add_argument("--work", type=Path, default=ROOT / "build" / "copra", help="where finished units are kept")

    options = arguments("copra", __doc__ or "", extend=extend)
    os.environ.setdefault("TROCAR_PROGRESS", "0")
    torch.set_num_threads(1)
    sizes = QUICK if options.quick else Sizes()
    bases = options.bases or (["cifar:0", "world:0"] if options.quick else BASES)
    work = Workspace(options.work / ("quick" if options.quick else "full"))
    found = {}
    for base in bases:
        found[base] = collect(base, work, sizes)
        print(base, "measured", flush=True)
    settings = {
        "sizes": vars(sizes), "lora": LORA.model_dump(mode="json"), "task": TASK, "other tasks": list(OTHERS), "world steps": WORLD_STEPS,
        "data": "real photographs (CIFAR-100, PACS) under documented shifts; synthetic text for the worlds",
        "details": found,
    }  # fmt: skip
    write_result(
        options.out, "copra", sorted({int(base.split(":")[1]) for base in bases}), settings, relations(found), tables=tables(found, sizes)
    )


if __name__ == "__main__":
    main()
