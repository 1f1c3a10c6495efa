"""CopRA on SmolLM2-135M-Instruct: three tasks, adapters of three seeds, plain LoRA beside it on the same rows.

Tasks: opposites, the countries of landmarks, past tenses (Todd et al. 2024), asked in one sentence each; the split keeps a pair of words on
one side. Measured on rows that were never trained on: share of answers that greedy decoding gets right as a whole, alone, between seeds,
without every other block's adapter, and three tasks merged into one adapter. The settings are the first that were tried (rate 1e-3,
160 steps of 16 rows), and were not changed after looking at a result. Every kind of adapter (trained, fused, mixed, clustered, pruned) is
written as a PEFT folder and loaded by plain peft.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from common import ROOT, arguments, mean_interval, write_result
from copra_tasks import FORMS, split

from trocar.adapt.copra import CopraConfig, LoraSettings, Trained, TrainSettings, train_adapter
from trocar.adapt.copra.measuring import Measured, pruned, worth
from trocar.anatomy import Anatomy
from trocar.core.workspace import Workspace
from trocar.evaluate import Task
from trocar.patch import Adapter, Patch
from trocar.patch.combine import fusion, lego, mixture, prune
from trocar.patch.peft_folder import write_folder
from trocar.recipe import load_model, load_tokenizer

MODEL = "smollm2-135m-instruct"
RECIPES: dict[str, Any] = {"plain": "plain", "copra": CopraConfig()}
LORA = LoraSettings(rank=8, alpha=16, targets=("q", "k", "v"))
TRAIN = TrainSettings(steps=160, batch=16, lr=1e-3, checkpoint_steps=40)
PRUNING = ("everyother", "otherhalf", "low", "high")
PROBE, ORDERS, POINTS = 24, 4, 11
MERGES: Mapping[str, Any] = {
    "fusion": lambda adapters: fusion(adapters).adapter,
    "mixture": lambda adapters: mixture(adapters).adapter,
    "sum": lambda adapters: mixture(adapters, [1.0] * len(adapters), normalise=False).adapter,
    "lego": lambda adapters: lego(adapters).adapter,
}


class Real:
    """The model, its tasks and everything measured of them, in committed units."""

    def __init__(self, work: Workspace, quick: bool) -> None:
        self.model, self.tokenizer, self.work = load_model(MODEL), load_tokenizer(MODEL), work
        self.train_settings = TRAIN.model_copy(update={"steps": 8}) if quick else TRAIN
        self.rows = {task: split(task) for task in FORMS}
        tests = {task: rows.test.take(range(16)) if quick else rows.test for task, rows in self.rows.items()}
        self.measured = {
            task: Measured(self.model, Task.of(self.model, rows, self.tokenizer), work.room(f"measured-{task}"), 50)
            for task, rows in tests.items()
        }

    def trained(self, task: str, recipe: str, seed: int) -> Trained:
        return train_adapter(
            self.model, self.rows[task].train, RECIPES[recipe], LORA, self.train_settings, seed=seed, work=self.work,
            processor=self.tokenizer, name=f"{task}-{recipe}-{seed}", device="cpu",
        )  # fmt: skip

    def right(self, task: str, adapter: Adapter, label: str) -> float:
        return self.measured[task](adapter, label).accuracy


def alone(real: Real, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One adapter a task: accuracy, pruning, and what fusing its seeds gives."""
    rows = []
    for task in FORMS:
        base = real.measured[task].base
        for recipe in RECIPES:
            made = {seed: real.trained(task, recipe, seed).adapter for seed in seeds}
            scores = {seed: real.measured[task](adapter, f"{recipe}-{seed}") for seed, adapter in made.items()}
            cut = [pruned(real.measured[task], adapter, PRUNING, "block", f"{recipe}-{seed}") for seed, adapter in made.items()]
            row: dict[str, Any] = {
                "task": task, "trained": recipe, "n": len(base.right), "base": base.accuracy, "base, first token": float(base.first.mean()),
                "alone": _spread([one.accuracy for one in scores.values()]),
                "first token": _spread([float(one.first.mean()) for one in scores.values()]),
                **{way: _spread([one[way].accuracy for one in cut]) for way in PRUNING},
            }  # fmt: skip
            pairs = list(itertools.combinations(seeds, 2))
            if pairs:
                fused = [real.right(task, fusion([made[i], made[j]]).adapter, f"{recipe}-{i}{j}-fused") for i, j in pairs]
                mixed = [real.right(task, mixture([made[i], made[j]]).adapter, f"{recipe}-{i}{j}-mixed") for i, j in pairs]
                curve = real.measured[task].curve(made[pairs[0][0]], made[pairs[0][1]], f"{recipe}-01", POINTS)
                row |= {"two seeds fused": _spread(fused), "two seeds mixed": _spread(mixed), "barrier": curve.barrier}
                row["curve"] = curve.values.tolist()
            if len(seeds) > 2:
                row["all fused"] = real.right(task, fusion(list(made.values())).adapter, f"{recipe}-all-fused")
            rows.append(row)
    return rows


def merged(real: Real, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The three tasks' adapters of one seed as one adapter."""
    rows = []
    for recipe in RECIPES:
        for name, merge in MERGES.items():
            found: dict[str, list[float]] = {task: [] for task in FORMS}
            for seed in seeds:
                adapter = merge([real.trained(task, recipe, seed).adapter for task in FORMS])
                for task in FORMS:
                    found[task].append(real.right(task, adapter, f"{recipe}-{seed}-{name}"))
            means = np.mean(list(found.values()), 0).tolist()
            row = {"three tasks by": name, "trained": recipe, "mean": _spread(means)}
            rows.append(row | {task: _spread(values) for task, values in found.items()})
    return rows


def valued(real: Real, task: str, recipe: str) -> dict[str, Any]:
    """How evenly the blocks of one adapter share its worth."""
    rows = real.rows[task].train.take(range(PROBE))
    found = worth(
        real.model, real.trained(task, recipe, 0).adapter, Task.of(real.model, rows, real.tokenizer), real.work, f"{task}-{recipe}",
        by="block", method="permutation", orders=ORDERS, batch_size=48, seed=0,
    )  # fmt: skip
    shares = found.shares
    top = float("nan") if shares is None else float(np.sort(shares)[::-1][:10].sum())
    return {"task": task, "trained": recipe, "spread of shares": found.spread, "share of the best ten of 30 blocks": top,
            "value": found.total - found.empty, "evaluations": found.evaluations}  # fmt: skip


def kinds(real: Real, seed: int) -> dict[str, Adapter]:
    """One adapter of every kind that is measured: trained in each way, merged in each way, pruned."""
    trained = {recipe: [real.trained(task, recipe, seed).adapter for task in FORMS] for recipe in RECIPES}
    return {
        **{f"trained, {recipe}": made[0] for recipe, made in trained.items()},
        **{name: merge(trained["copra"]) for name, merge in MERGES.items()},
        "everyother": prune(trained["copra"][0], "everyother", anatomy=Anatomy.of(real.model)).adapter,
    }


def loads_in_peft(real: Real, adapter: Adapter) -> dict[str, float]:
    """Plain peft with the written folder against the model with the adapter's updates added to its weights: the largest difference of the
    two's logits, and, as the size of what is compared, of the adapted and the bare model's."""
    inputs: Any = real.tokenizer([form.format("hot") for form in FORMS.values()], return_tensors="pt", padding=True)
    with torch.no_grad():
        bare = real.model(**inputs).logits
        with Patch.of(real.model, [adapter]).applied(real.model):
            ours = real.model(**inputs).logits
        with tempfile.TemporaryDirectory() as folder:
            write_folder(adapter, Path(folder) / "adapter", MODEL)
            theirs: Any = peft.PeftModel.from_pretrained(load_model(MODEL), str(Path(folder) / "adapter")).eval()
            found = theirs(**inputs).logits
    kept = inputs["attention_mask"].bool()
    return {"difference": float((found - ours)[kept].abs().max()), "what the adapter changes": float((ours - bare)[kept].abs().max())}


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def relations(real: Real, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """CopRA minus plain LoRA, paired by task and seed, or by task and pair of seeds; the mean over tasks is one value a seed or pair.

    An interval needs two values; pairs of three seeds share seeds, so theirs is a little too narrow.
    """
    made = []

    def add(name: str, claim: str, value: Any, floor: float = 0.0, over: Sequence[Any] = seeds) -> None:
        each = [float(np.mean([value(task, "copra", one) - value(task, "plain", one) for task in FORMS])) for one in over]
        mean, low, high = mean_interval(each) if len(each) > 1 else (each[0], None, None)
        values = {"mean": mean} | {f"{'seed' if over is seeds else 'seeds'} {one}": gain for one, gain in zip(over, each, strict=True)}
        holds = all(one > floor for one in each)
        made.append({"id": name, "claim": claim, "values": values, "interval": None if low is None else (low, high), "holds": holds})

    def of(task: str, recipe: str, seed: int) -> Adapter:
        return real.trained(task, recipe, seed).adapter

    def cut(way: str) -> Any:
        def value(task: str, recipe: str, seed: int) -> float:
            return pruned(real.measured[task], of(task, recipe, seed), [way], "block", f"{recipe}-{seed}")[way].accuracy

        return value

    def fused(task: str, recipe: str, pair: tuple[int, int]) -> float:
        i, j = pair
        return real.right(task, fusion([of(task, recipe, i), of(task, recipe, j)]).adapter, f"{recipe}-{i}{j}-fused")

    if pairs := list(itertools.combinations(seeds, 2)):
        add("R1", "two seeds fused at .5: CopRA is right more often (mean of three tasks, paired)", fused, over=pairs)
    for way in PRUNING:
        add(f"R2 {way}", f"pruned ({way}): CopRA is right more often", cut(way))
    claim = "single-task accuracy about equal or better (at most .01 lower)"
    add("R4", claim, lambda task, recipe, seed: real.right(task, of(task, recipe, seed), f"{recipe}-{seed}"), -0.01)
    for name, merge in MERGES.items():

        def value(task: str, recipe: str, seed: int, name: str = name, merge: Any = merge) -> float:
            adapter = merge([of(one, recipe, seed) for one in FORMS])
            return real.right(task, adapter, f"{recipe}-{seed}-{name}")

        add(f"tasks {name}", f"three tasks merged by {name}: CopRA is right more often", value)
    return made


def main() -> None:
    def extend(parser: Any) -> None:
        parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; with --quick 0 1")
        parser.add_argument("--work", type=Path, default=ROOT / "build" / "copra_real", help="where units are kept")

    options = arguments("copra_real", __doc__ or "", extend=extend)
    os.environ.setdefault("TROCAR_PROGRESS", "0")
    torch.set_num_threads(1)
    seeds = options.seeds or ([0, 1] if options.quick else [0, 1, 2])
    real = Real(Workspace(options.work / "quick" if options.quick else options.work), options.quick)
    singles = alone(real, seeds)
    curves = {f"{row['task']}, {row['trained']}": row.pop("curve") for row in singles if "curve" in row}
    loaded = [{"adapter": kind, **loads_in_peft(real, adapter)} for kind, adapter in kinds(real, seeds[0]).items()]
    made = relations(real, seeds)
    claim = "plain peft gives with the folders what adding the updates to the weights gives (at most .01 of what the adapter changes)"
    near = all(row["difference"] <= 0.01 * row["what the adapter changes"] for row in loaded)
    values = {row["adapter"]: row["difference"] for row in loaded}
    made.append({"id": "peft", "claim": claim, "values": values, "interval": None, "holds": near})
    settings = {
        "model": MODEL, "forms": FORMS, "lora": LORA.model_dump(mode="json"), "train": real.train_settings.model_dump(mode="json"),
        "train rows": {task: len(rows.train) for task, rows in real.rows.items()}, "orders": ORDERS, "probe": PROBE, "curves": curves,
    }  # fmt: skip
    tables = {
        "three tasks of SmolLM2 in one adapter": merged(real, seeds),
        "blocks of the first task's adapter by Shapley value": [valued(real, task, way) for task in list(FORMS)[:1] for way in RECIPES],
        "adapters in plain peft": loaded,
    }
    write_result(options.out, "copra_real", seeds, settings, made, (), singles, tables)


if __name__ == "__main__":
    main()
