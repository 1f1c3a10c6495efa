"""Where-to-Edit on real failing photographs: the relations of its page, on CIFAR-100 and PACS, three base models each.

A base model is a small ViT with one rare part in every class (`trocar lab show vit-cifar-rare`). Its failures on unseen pictures of a rare
part, grouped by the wrong class they are taken for, are edited from one picture each, always from the clean model. Every row of the table
is one editor with one setting; editors are compared at equal locality (`where_to_edit_table.py`). Nothing is tuned on the failures:
step sizes, thresholds and label settings are those written down for models of this size before these runs.

Every stage is a committed unit in the work folder, so that the script can be killed and started again, and several processes may each
measure some `--bases`; each run writes the result from whatever is there. Needs TROCAR_DATA; bases other than `cifar:0` are trained on
demand (four to twelve minutes each).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import arguments
from where_to_edit_labels import label_facts
from where_to_edit_relations import report

from trocar import lab
from trocar.anatomy import fingerprint
from trocar.core.seeds import generator
from trocar.core.workspace import Workspace
from trocar.edit.where_to_edit import (
    CutMixConfig,
    EditConfig,
    Edits,
    HypernetworkConfig,
    LabelConfig,
    MaskHypernetwork,
    Place,
    Rows,
    edit_many,
    gradient_norms,
    predict_masks,
    top_k,
    train_mask_hypernetwork,
)
from trocar.edit.where_to_edit.baselines import dense_with_penalty, fine_tune, lora
from trocar.edit.where_to_edit.suffix import guarded
from trocar.lab import failures, registry
from trocar.lab.rare import split

NAMES = {"cifar": "vit-cifar-rare", "pacs": "vit-pacs-rare"}
KEEPS = (0.02, 0.05, 0.1, 0.25)
FIRST, TAU, LR = 3, 0.3, 1e-3
SENSITIVE, RANDOM, OTHERS, IOU_IMAGES = 100, 200, 25, 6
# reference labels: the step size and penalty found for a small ViT on CIFAR; PACS finds its own on its training pictures
REF = {"cifar": {"alpha": 0.1, "sparsity_weight": 0.3}, "pacs": {"alpha": "auto", "sparsity_weight": "auto"}}


@dataclasses.dataclass(frozen=True)
class Row:
    """One editor with one setting. method: a kind of mask (`fo` and `ref` are hypernetworks), or `dense`, `lora`, `penalty`, `part`."""

    method: str
    keep: float = 1.0
    lr: float = LR
    tau: float = TAU
    first: int = FIRST
    images: int = 1
    seed: int = 0
    more: str = ""  # rank of lora, kind and weight of penalty, part of fine-tuning

    @property
    def name(self) -> str:
        parts = [self.method, self.more, f"keep {self.keep:g}" if self.keep < 1 else "", f"lr {self.lr:g}", f"tau {self.tau:g}"]
        parts += [
            f"blocks {self.first}-{self.first + 2}" if self.first != FIRST else "",
            f"images {self.images}" if self.images > 1 else "",
        ]
        parts += [f"seed {self.seed}" if self.method == "random" else ""]
        return " ".join(part for part in parts if part)


def yardstick() -> list[Row]:
    """Dense fine-tuning with small steps, the stop threshold as the knob: what editors are compared with."""
    slow = [Row("dense", lr=1e-4, tau=tau) for tau in (0.3, 0.1, 0.03, 0.9, 0.01, 3.0)]
    return [*slow, *(Row("dense", lr=2e-4, tau=tau) for tau in (0.01, 0.001))]  # slower ones hit the step limit


def table(quick: bool) -> list[Row]:
    """All rows, most important first."""
    if quick:
        rows = [Row(method, 0.05) for method in ("fo", "gradient-norm", "constant", "random")] + yardstick()
        rows += [Row("fo", keep) for keep in (0.25, 0.02, 0.1)] + [Row("random", 0.25)]
        return rows + [Row("fo", 0.05, lr=3e-4, tau=tau) for tau in (0.3, 0.1)] + [Row("fo", 0.05, images=2)]
    rows = [Row(method, 0.05) for method in ("fo", "ref", "gradient-norm", "constant")]
    rows += [Row("random", 0.05, seed=seed) for seed in (0, 1)]
    rows += yardstick()
    rows += [Row("dense", lr=lr) for lr in (1e-3, 3e-4, 3e-5)]
    rows += [Row("fo", keep) for keep in (0.25, 0.02, 0.1)] + [Row("random", 0.25, seed=seed) for seed in (0, 1)]
    rows += [Row("fo", 0.05, lr=3e-4, tau=tau) for tau in (0.3, 0.1)]
    rows += [Row("fo", 0.05, images=images) for images in (2, 3)]
    rows += [Row("dense", lr=lr, first=first) for first in (0, 2, 1) for lr in (1e-4, 3e-4, 1e-3)]
    rows += [Row("magnitude", 0.05), Row("part", more="classifier"), Row("lora", more="1"), Row("lora", lr=3e-4, more="4")]
    rows += [Row("penalty", more="l2 1"), Row("penalty", more="l1 0.01")]
    rows += [Row("gradient-norm", 0.05, lr=3e-4, tau=tau) for tau in (0.3, 0.1)]
    rows += [Row(method, keep) for keep in (0.25, 0.02, 0.1) for method in ("gradient-norm", "constant", "ref")]
    rows += [Row("random", keep) for keep in (0.1, 0.02)]
    rows += [Row("part", lr=3e-4, more=f"L{layer}") for layer in (5, 4, 3)] + [Row("part", lr=1e-4, more="full")]
    return rows


class Base:
    """One base model with its failures, locality sets and hypernetworks; every result of it is a unit of `work`."""

    def __init__(self, name: str, work: Workspace, quick: bool) -> None:
        self.name, self.quick, self.work = name, quick, work.room(name.replace(":", "-") + ("-quick" if quick else ""))
        self.kind, self.seed = name.split(":")[0], int(name.split(":")[1])
        row = registry.get(NAMES[self.kind])
        if lab.show(row.name, self.seed)["folder"] is None:
            lab.train(row.name, seed=self.seed)
        self.model, _ = lab.load(row.name, self.seed)
        self.fingerprint = fingerprint(self.model)
        data, shape, _ = row.pictures()
        self.parts, size = split(data, self.seed), shape.image
        self.pixels = lambda rows: failures.pixel_values(self.parts, rows, size)
        common = failures.logits(self.model, self.pixels(self.parts.common_test))
        labels = self.parts.labels(self.parts.common_test, data.label)
        unseen = failures.logits(self.model, self.pixels(self.parts.rare_unseen))
        truth = self.parts.labels(self.parts.rare_unseen, data.label)
        found = failures.groups(self.parts, data.label, data.part, unseen)
        self.groups = found[: 12 if quick else 30]
        near = failures.locality(common, labels, self.parts.common_test, self.seed, SENSITIVE, RANDOM)
        self.facts = {
            "base": name,
            "accuracy_common": float((common.argmax(1) == labels).float().mean()),
            "accuracy_rare": float((unseen.argmax(1) == truth).float().mean()),
            "failures": int((unseen.argmax(1) != truth).sum()),
            "groups_of_20": len(found),
            "groups_used": len(self.groups),
            "largest_group": len(found[0].rows),
            "sensitive": len(near["sensitive"]),
            "random": len(near["random"]),
        }
        # every failure that is used once, in one tensor: the pictures of group g are rows starts[g] .. starts[g + 1]
        per = 3 + OTHERS
        self.members = [self._drawn(group, per) for group in self.groups]
        self.starts = [sum(len(rows) for rows in self.members[:g]) for g in range(len(self.members) + 1)]
        rows = [r for members in self.members for r in members]
        self.failing, self.truth = self.pixels(rows), self.parts.labels(rows, data.label)
        self.near = [*near["sensitive"], *near["random"]]
        self.n_sensitive, self.near_pixels = len(near["sensitive"]), self.pixels(self.near)
        self.near_truth = self.parts.labels(self.near, data.label)
        self._cache: dict[int, tuple[Place, Rows, Rows, torch.Tensor, torch.Tensor]] = {}
        self._networks: dict[str, MaskHypernetwork] = {}
        self._training_images: torch.Tensor | None = None

    def _drawn(self, group: failures.Group, count: int) -> list[int]:
        order = torch.randperm(len(group.rows), generator=generator(self.seed, "edit pictures", group.name))[:count]
        return [group.rows[i] for i in order.tolist()]

    def key(self, **more: Any) -> dict[str, Any]:
        return {"model": self.fingerprint, "groups": [group.name for group in self.groups], "quick": self.quick, **more}

    def training_images(self) -> torch.Tensor:
        """4,096 training pictures of common parts: what labels are made from."""
        if self._training_images is None:
            column = self.parts.table.columns[registry.get(NAMES[self.kind]).pictures()[0].part]
            rare = set(self.parts.rare.values()) if self.kind == "cifar" else set()
            common = [r for r in self.parts.train if column[r] not in rare]
            order = torch.randperm(len(common), generator=generator(self.seed, "label pictures"))[:4096]
            self._training_images = self.pixels([common[i] for i in order.tolist()])
        return self._training_images

    def network(self, kind: str) -> MaskHypernetwork:
        """The hypernetwork on first-order (`fo`) or reference (`ref`) labels, trained or read."""
        if kind not in self._networks:
            path = self.work.folder / f"{kind}.safetensors"
            if not path.exists():
                labels = LabelConfig.parse({"kind": kind, "outer_steps": 4, **(REF[self.kind] if kind == "ref" else {})})
                pairs = 1024 if kind == "ref" else 1536 if self.quick else 6144
                shape = {"depth": 2, "lr": 3e-4, "batch": 64, "steps_per_batch": 1, "epochs": 25, "patience": 5}
                config = HypernetworkConfig(first_block=FIRST, pairs=pairs, labels=labels, cutmix=CutMixConfig(), **shape)
                start = time.process_time()
                network = train_mask_hypernetwork(self.model, self.training_images(), config, self.work.room(kind), self.seed)
                network.save(path)
                self.work.values(f"{kind}-time", self.key(), lambda: {"cpu_s": time.process_time() - start, "pairs": pairs})
            self._networks[kind] = MaskHypernetwork.load(path)
        return self._networks[kind]

    def ready(self, first: int) -> tuple[Place, Rows, Rows, torch.Tensor, torch.Tensor]:
        """(place, rows of failures, rows of locality pictures, their clean predictions) for edits from block `first`; computed once."""
        if first not in self._cache:
            place = Place.of(self.model, first, 3)
            with guarded(self.model), torch.no_grad():
                fails, near = Rows(place, {"pixel_values": self.failing}), Rows(place, {"pixel_values": self.near_pixels})
                self._cache[first] = (place, fails, near, fails.logits().argmax(1), near.logits().argmax(1))
        return self._cache[first]

    def edits(self, row: Row) -> tuple[Edits, list[list[int]]]:
        """The edits of one row of the table and the failure rows that each was made from."""
        if row.images == 1:  # two edits per group, each from one picture
            chosen = [[start + i] for start in self.starts[:-1] for i in range(1 if self.quick else 2)]
        else:
            chosen = [[start + i for i in range(row.images)] for start in self.starts[:-1]]
        config = EditConfig(keep=row.keep, first_block=row.first, lr=row.lr, stop_ce=row.tau)
        common = (self.model, self.failing, self.truth)
        if row.method == "part":
            return fine_tune(*common, row.more, config, chosen), chosen
        if row.method == "lora":
            return lora(*common, int(row.more), config, self.seed, chosen), chosen
        if row.method == "penalty":
            kind, weight = row.more.split()
            return dense_with_penalty(*common, float(weight), kind, config, self.seed, chosen), chosen
        if row.method in ("fo", "ref"):
            return edit_many(*common, self.network(row.method), config, self.seed, chosen), chosen
        network = self.network("fo") if row.method == "constant" else None
        return edit_many(*common, row.method, config, 1000 * self.seed + row.seed, chosen, hypernetwork=network), chosen

    def measure(self, row: Row) -> dict[str, Any]:
        """Per edit: its group, success, generalisation to the group's other failures, agreement on both locality sets, accuracy, steps."""
        return self.work.room("rows").values(row.name.replace(" ", "_"), self.key(row=dataclasses.asdict(row)), lambda: self._measure(row))

    def has(self, row: Row) -> bool:
        """Whether the row has been measured."""
        return (self.work.room("rows").folder / f"{row.name.replace(' ', '_')}.json").exists()

    def trained(self, kind: str = "fo") -> bool:
        """Whether the hypernetwork is there and what was measured of labels and masks with it."""
        return all((self.work.folder / name).exists() for name in (f"{kind}.safetensors", "labels.json", "overlaps.json"))

    def _measure(self, row: Row) -> dict[str, Any]:
        _, fails, near, _, clean = self.ready(row.first)
        start = time.process_time()
        edits, chosen = self.edits(row)
        edited = time.process_time() - start
        which = [self._group_of(rows[0]) for rows in chosen]
        spans = [list(range(self.starts[g], self.starts[g + 1])) for g in which]
        out: dict[str, Any] = {name: [] for name in ("sr", "gr", "lrs", "lrr", "accuracy")}
        for rows, span, logits, far in zip(chosen, spans, edits.logits(fails, spans), edits.logits(near), strict=True):
            right = logits.argmax(1) == self.truth[span]
            own = torch.tensor([r in rows for r in span])
            same = far.argmax(1) == clean
            out["sr"].append(float(right[own].float().mean()))
            out["gr"].append(float(right[~own].float().mean()))
            out["lrs"].append(float(same[: self.n_sensitive].float().mean()))
            out["lrr"].append(float(same[self.n_sensitive :].float().mean()))
            out["accuracy"].append(float((far.argmax(1) == self.near_truth)[self.n_sensitive :].float().mean()))
        out |= {"group": which, "steps": [log["steps"] for log in edits.logs], "status": [log["status"] for log in edits.logs]}
        out |= {"edit_cpu_s": edited, "cpu_s": time.process_time() - start}
        return out

    def _group_of(self, row: int) -> int:
        return max(g for g, start in enumerate(self.starts[:-1]) if start <= row)

    def overlaps(self) -> dict[str, Any]:
        """Mean IoU of keep .05 masks of failing pictures, for every pair of groups: learned masks and gradient-norm masks."""

        def compute() -> dict[str, Any]:
            picked = [
                [start + i for i in range(min(IOU_IMAGES, end - start))] for start, end in zip(self.starts, self.starts[1:], strict=False)
            ]
            rows = [r for group in picked for r in group]
            owner = torch.tensor([g for g, group in enumerate(picked) for _ in group])
            fails = self.ready(FIRST)[1]
            scores = {
                kind: predict_masks(self.model, self.failing[rows], self.network(kind))
                for kind in (["fo"] if self.quick else ["fo", "ref"])
            }
            with guarded(self.model):
                scores["gradient-norm"] = gradient_norms(fails, torch.tensor(rows)[:, None], self.truth[rows][:, None])
            result = {}
            for kind, values in scores.items():
                masks = top_k(values, 0.05).flatten(1).float().cpu()
                both = masks @ masks.T
                iou = both / (masks.sum(1)[:, None] + masks.sum(1)[None] - both)
                iou.fill_diagonal_(torch.nan)
                result[kind] = [[float(iou[owner == a][:, owner == b].nanmean()) for b in range(len(picked))] for a in range(len(picked))]
            return result

        return self.work.values("overlaps", self.key(images=IOU_IMAGES), compute)

    def labels(self) -> dict[str, Any]:
        """Exact properties of the labels (relation 2)."""
        images = self.training_images()
        found = REF[self.kind]
        if found["alpha"] == "auto":
            made = self.network("ref").made.report
            found = {"alpha": made["alpha"], "sparsity_weight": made["sparsity_weight"]}
        return self.work.values(
            "labels", self.key(found=found, limit="float64"), lambda: label_facts(self.model, images, found, FIRST, self.seed)
        )


def main() -> None:
    def extend(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--bases", default="", help="comma-separated, e.g. cifar:0,pacs:2 (default: all; with --quick cifar:0)")
        parser.add_argument("--work", type=Path, default=registry.cache_folder().parent / "bench" / "where_to_edit", help="the work folder")
        parser.add_argument("--report", action="store_true", help="only write the result from what the work folder holds")

        parser.add_argument("--ship", action="store_true", help="put the first-order hypernetwork of cifar:0 into the package, in float16")

    options = arguments("where_to_edit", (__doc__ or "").splitlines()[0], extend=extend)
    torch.set_num_threads(1)
    work = Workspace(options.work)
    everything = ["cifar:0"] if options.quick else [f"{kind}:{seed}" for seed in range(3) for kind in NAMES]
    rows = table(options.quick)
    asked = options.bases.split(",") if options.bases else everything
    bases = {name: Base(name, work, options.quick) for name in (everything if options.report else asked)}
    if options.ship:
        network = bases["cifar:0"].network("fo")
        network.half().save(registry.WEIGHTS / NAMES["cifar"] / "mask.safetensors")
        return
    if not options.report:
        for stage in [lambda base: base.network("fo"), *([] if options.quick else [lambda base: base.network("ref")])]:
            for base in bases.values():
                stage(base)
        for base in bases.values():
            base.labels()
            base.overlaps()
        for row in rows:
            for base in bases.values():
                measured = base.measure(row)
                print(
                    f"{base.name} {row.name}: "
                    + " ".join(f"{key} {100 * sum(measured[key]) / len(measured[key]):.1f}" for key in ("sr", "gr", "lrs", "lrr")),
                    flush=True,
                )
        if set(bases) != set(everything):
            return
    settings = {
        "lr": LR,
        "tau": TAU,
        "blocks": [FIRST, FIRST + 2],
        "locality": [SENSITIVE, RANDOM],
        "others": OTHERS,
        "reference_labels": REF,
    }
    report(options.out, list(bases.values()), rows, options.quick, settings)


if __name__ == "__main__":
    warnings.simplefilter("once")
    main()
