"""What is measured of CopRA on one small base model: adapters of several seeds and ways of training, merged, pruned and valued.

Everything is a committed unit of the work folder (trainings, scores, games), so a run that is killed goes on, and bases can be measured
in processes of their own and put together afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trocar import lab
from trocar.adapt.copra import CopraConfig, LoraSettings, Trained, TrainSettings, train_adapter
from trocar.adapt.copra.measuring import Measured, orders_of_removal, pruned, removal, worth
from trocar.anatomy import Anatomy
from trocar.core.workspace import Workspace
from trocar.evaluate import Task
from trocar.lab.tasks import new_forms, shards, shifted
from trocar.method import Examples
from trocar.patch import Adapter
from trocar.patch.combine import aligned_fusion, federated, fusion, lego, magnitude, mixture, prune

LORA = LoraSettings(rank=4, alpha=8, targets=("q", "k", "v"))
WAYS: dict[str, Any] = {
    "plain": "plain",
    "copra": CopraConfig(),
    "copra p0=0": CopraConfig(p0=0.0),
    "constant": CopraConfig(p0=0.5, schedule="constant"),
    "dropout": "plain",  # LoRA's own dropout of the adapters' inputs, .25
    "progressive dropout": CopraConfig(strategy="progressive-dropout"),
    "stochastic depth": CopraConfig(strategy="stochastic-depth"),
}
MAIN = ("plain", "copra")
SHORTER = (*MAIN, "copra p0=0", "constant", "dropout", "progressive dropout", "stochastic depth")
TASK, OTHERS = "recoloured", ("turned", "inverted")
STEPS, SHORT, BATCH = 800, 400, 40  # main comparison; strategies, tasks, clients (half of it) and rates
PRUNING = ("everyother", "otherhalf", "low", "middle", "high")
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
RATES = (1e-2, 3e-2)
CLIENTS = 3


@dataclass(frozen=True)
class Sizes:
    """How much is measured: the full form, or the quick one (one base, fewer seeds and steps)."""

    seeds: int = 4
    fewer: int = 2
    steps: int = STEPS
    short: int = SHORT
    train: int = 6000
    test: int = 1000
    probe: int = 300
    points: int = 11


QUICK = Sizes(seeds=2, fewer=1, steps=60, short=30, train=1000, test=300, probe=60, points=5)


class Bench:
    """One base model, its rows, and the units that were measured of it."""

    def __init__(self, kind: str, seed: int, work: Workspace, sizes: Sizes) -> None:
        self.kind, self.seed, self.sizes = kind, seed, sizes
        self.name, self.work = f"{kind}:{seed}", work.room(f"{kind}-{seed}")
        self.tokenizer: Any = None
        if kind == "world":
            self.model, self.tokenizer = lab.load("world", seed)
            self.rows = {task: (rows.take(range(80)), rows.take(range(80, len(rows)))) for task, rows in new_forms(seed).items()}
        else:
            self.model, _ = lab.load(f"vit-{kind}-rare", seed)
            self.rows = _pictures(kind, self.model, sizes)
        self.model.eval()
        self.measured = {task: self._measured(task) for task in self.rows}

    def _measured(self, task: str) -> Measured:
        return Measured(self.model, Task.of(self.model, self.rows[task][1], self.tokenizer), self.work.room(task), 250)

    def train(
        self, task: str, way: str, seed: int, steps: int | None = None, lr: float = 3e-3, rows: Examples | None = None, label: str = "",
        start: Adapter | None = None,
    ) -> Trained:  # fmt: skip
        """An adapter of this base. Seeds of one way differ in first values, order of rows and masks; ways of one seed in the masks only."""
        steps = steps or self.sizes.steps
        lora = LORA.model_copy(update={"dropout": 0.25}) if way == "dropout" else LORA
        batch = 32 if self.kind == "world" else BATCH
        settings = TrainSettings(steps=steps, batch=batch, lr=lr, checkpoint_steps=200)
        name = f"{way}-{seed}-{steps}-{lr:g}{label}".replace(" ", "-")
        data = self.rows[task][0] if rows is None else rows
        return train_adapter(
            self.model, data, WAYS[way], lora, settings, seed=1000 * self.seed + seed, work=self.work.room(f"{task}-trained"),
            processor=self.tokenizer, name=name, start=start, device="cpu",
        )  # fmt: skip

    def right(self, task: str, adapter: Adapter | None, label: str) -> float:
        return self.measured[task](adapter, label.replace(" ", "-")).accuracy

    def worth(self, task: str, adapter: Adapter, label: str) -> Any:
        rows = self.rows[task][0]
        probe = Task.of(self.model, rows.take(range(min(self.sizes.probe, len(rows)))), self.tokenizer)
        return worth(
            self.model, adapter, probe, self.work.room(task), label.replace(" ", "-"), by="block", method="exact", orders=2, batch_size=300,
            seed=0,
        )  # fmt: skip


def _pictures(kind: str, model: Any, sizes: Sizes) -> dict[str, tuple[Examples, Examples]]:
    """Training and test pictures of the base's classes under each shift; PACS has one task only."""
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    source, label = ("cifar100", "coarse") if kind == "cifar" else ("pacs", "label")
    sides = []
    for part, limit in (("train", sizes.train), ("test", sizes.test)):
        rows = {"source": f"{source}:{part}", "label": label, "where": {label: names}, "limit": limit, "seed": 5}
        sides.append(lab.load_examples(rows, model))
    shifts = (TASK, *OTHERS) if kind == "cifar" else (TASK,)
    return {shift: (shifted(sides[0], shift), shifted(sides[1], shift)) for shift in shifts}


def same_task(bench: Bench, task: str, ways: Sequence[str], seeds: int, steps: int, deep: bool = False) -> dict[str, Any]:
    """Seeds of one task: alone, fused, mixed, pruned, valued. deep: everything; else what the comparison of strategies needs."""
    mark = "" if steps == bench.sizes.steps else f"-{steps}"
    found: dict[str, Any] = {"base": bench.right(task, None, "base")}
    for way in ways:
        made = [bench.train(task, way, seed, steps) for seed in range(seeds)]
        adapters = [one.adapter for one in made]
        tag = [f"{way}-{seed}{mark}" for seed in range(seeds)]
        pairs = list(itertools.combinations(range(seeds), 2))
        cut = [
            pruned(bench.measured[task], adapter, PRUNING, "block", name.replace(" ", "-"))
            for adapter, name in zip(adapters, tag, strict=True)
        ]
        games = [bench.worth(task, adapter, name) for adapter, name in zip(adapters, tag, strict=True)]
        row: dict[str, Any] = {
            "alone": [bench.right(task, adapter, name) for adapter, name in zip(adapters, tag, strict=True)],
            "fusion": [bench.right(task, fusion([adapters[i], adapters[j]]).adapter, f"{way}-{i}{j}{mark}-fused") for i, j in pairs],
            "spread": [game.spread for game in games],
            "shares": [game.shares.tolist() for game in games if game.shares is not None],
            "active": [float(np.mean(list(one.counts.values()))) / steps for one in made if one.counts],
            **{way_cut: [scores[way_cut].accuracy for scores in cut] for way_cut in PRUNING},
        }
        if deep:
            row |= _deep(bench, task, way, adapters, games, pairs)
        found[way] = row
    return found


def _deep(
    bench: Bench, task: str, way: str, adapters: Sequence[Adapter], games: Sequence[Any], pairs: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    anatomy, seeds, few = Anatomy.of(bench.model), len(adapters), adapters[: bench.sizes.fewer]
    curves = [(0, 1), (2, 3)] if seeds >= 4 else [(0, 1)]

    def curve(i: int, j: int) -> float:
        name = f"{way}-{i}{j}".replace(" ", "-")
        return bench.measured[task].curve(adapters[i], adapters[j], name, bench.sizes.points).barrier

    row: dict[str, Any] = {
        "mixture": [bench.right(task, mixture([adapters[i], adapters[j]]).adapter, f"{way}-{i}{j}-mixed") for i, j in pairs],
        "barrier": [curve(i, j) for i, j in curves],
        "aligned": [bench.right(task, aligned_fusion([adapters[i], adapters[j]]).adapter, f"{way}-{i}{j}-aligned") for i, j in curves],
        "triples": [
            bench.right(task, fusion([adapters[i] for i in three]).adapter, f"{way}-{''.join(map(str, three))}-fused")
            for three in itertools.combinations(range(seeds), 3)
        ],
        "mismatch": [float(np.mean([one["mismatch"] / one["norm"] for one in fusion([adapters[i], adapters[j]]).rows])) for i, j in pairs],
    }  # fmt: skip
    for role in LORA.targets:
        row[f"keep {role}"] = [
            bench.right(task, prune(adapter, [role], by="role", anatomy=anatomy).adapter, f"{way}-{seed}-keep-{role}")
            for seed, adapter in enumerate(few)
        ]
    for share in SHARES:
        row[f"zeros {share}"] = [
            bench.right(task, magnitude(adapter, share).adapter, f"{way}-{seed}-zeros-{share}") for seed, adapter in enumerate(few)
        ]
    for seed, (adapter, game) in enumerate(zip(few, games, strict=False)):
        for order, groups in orders_of_removal(bench.model, adapter, game, "block", seed).items():
            values = removal(bench.measured[task], adapter, groups, "block", f"{way}-{seed}-{order.split()[0]}".replace(" ", "-"))
            row.setdefault(f"removal, {order}", []).append(values)
    return row


def single(bench: Bench, task: str, steps: int, lr: float) -> dict[str, float]:
    """Single-task accuracy at another learning rate."""
    found = {}
    for way in MAIN:
        adapter = bench.train(task, way, 0, steps, lr).adapter
        found[way] = bench.right(task, adapter, f"{way}-{steps}-{lr:g}")
    return found


def clients(bench: Bench, task: str) -> dict[str, Any]:
    """Federated averaging over clients with uneven classes, from independent and from shared first values."""
    hands = shards(bench.rows[task][0], CLIENTS, 0.5, bench.seed)
    found: dict[str, Any] = {"rows": [len(hand) for hand in hands]}
    for way in MAIN:
        first = bench.train(task, way, 0, 1, 1e-12, label="-start").adapter
        for shared in (False, True):
            made = [
                bench.train(
                    task,
                    way,
                    20 + number,
                    bench.sizes.short // 2,
                    rows=hand,
                    label="-shared" if shared else "-own",
                    start=first if shared else None,
                ).adapter
                for number, hand in enumerate(hands)
            ]
            tag = f"{way}-{'shared' if shared else 'own'}"
            alone = [bench.right(task, adapter, f"{tag}-client-{number}") for number, adapter in enumerate(made)]
            average = bench.right(task, federated(made, [len(hand) for hand in hands]).adapter, f"{tag}-server")
            found[f"{way}, {'shared' if shared else 'own'} start"] = {"clients": alone, "server": average}
    return found


def merged_tasks(bench: Bench, steps: int) -> dict[str, Any]:
    """One adapter a task, merged into one: share right on every task, for each way of merging."""
    found: dict[str, Any] = {"base": {task: bench.right(task, None, "base") for task in bench.rows}}
    for way in MAIN:
        made = {task: bench.train(task, way, 0, steps).adapter for task in bench.rows}
        adapters = list(made.values())
        merges = {
            "fusion": fusion(adapters).adapter,
            "mixture": mixture(adapters).adapter,
            "sum": mixture(adapters, [1.0] * len(adapters), normalise=False).adapter,
            "lego": lego(adapters, seed=bench.seed).adapter,
        }
        found[way] = {"own": {task: bench.right(task, adapter, f"{way}-{steps}-own") for task, adapter in made.items()}}
        for name, adapter in merges.items():
            found[way][name] = {task: bench.right(task, adapter, f"{way}-{steps}-{name}") for task in bench.rows}
    return found
