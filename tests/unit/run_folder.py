"""A run folder as a method and the recipe room would leave it, with made-up but plausible numbers, for the tests of the report."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from trocar.evaluate import Measurement, cost, run_checks
from trocar.locate import How, Scores
from trocar.result import (
    FigureInfo,
    GalleryInfo,
    MethodInfo,
    ModelInfo,
    PatchInfo,
    Picture,
    Result,
    ScoresInfo,
    check_infos,
    table_rows,
    write_result,
)

BEFORE, AFTER = "5f0c9d1e7a3b48c2a90d6e15b7f42c88", "c41ab7730e9f4d2d8b56a1f0e3d97b24"
LABELS = ["flowers", "trees", "insects", "people", "vehicles", "furniture"]


def make(folder: Path, locality: float = 0.975, checks: bool = True, pictures: np.ndarray | None = None, seed: int = 0) -> Path:
    """Write a finished run; `locality`: the share of unrelated pictures whose prediction stays (its check asks for .95)."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("scores", "figures", "pictures/failures"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    asked = {
        "model": "lab/vit-cifar",
        "method": {"name": "where-to-edit", "keep": 0.05, "lr": 0.001, "tau": 0.3, "blocks": [3, 4, 5]},
        "data": {"edit": "cifar100:tulip", "locality.random": {"set": "cifar100:test", "rows": 200}},
        "seed": 7,
    }
    (folder / "recipe.yaml").write_text("model: lab/vit-cifar\n")
    groups = {
        f"L{layer}.mlp.{side}": generator.gamma(0.6 if side == "down.in" else 1, 1 / (layer - 2), 512)
        for layer in (3, 4, 5)
        for side in ("up.out", "down.in")
    }
    scores = Scores("channel", "", groups, How("hypernetwork", "1 image", {"blocks": [3, 4, 5]}, BEFORE))
    scores.save(folder / "scores/channels.safetensors")
    scores.top(0.05).save(folder / "scores/mask.safetensors")
    Scores(
        "head", "", {f"L{layer}.H": generator.normal(size=4) for layer in range(6)}, How("causal effect", "40 prompts", {}, BEFORE)
    ).save(folder / "scores/heads.safetensors")

    states = (BEFORE, AFTER)
    kept = (generator.permutation(200) >= round(200 * (1 - locality))).astype(float)
    members = generator.integers(1, 24, 82)
    rate = np.where(members > 1, np.clip(generator.normal(0.71, 0.2, 82), 0, 1), np.nan)
    right = (generator.random(200) < 0.655).astype(float)
    still = np.where(generator.random(200) < 0.04, 1 - right, right)
    measurements = [
        Measurement("success", "edit", np.zeros(82), np.ones(82), "predicted class is the label", *states, form="share"),
        Measurement(
            "generalisation", "edit", np.where(members > 1, 0.0, np.nan), rate, "share of the others right", *states,
            groups=[f"group {row // 2}" for row in range(82)], form="share",
        ),
        Measurement("locality.random", "image", np.ones(200), kept, "predicted class equals the one before", *states),
        Measurement("accuracy", "image", right, still, "predicted class is the label", *states),
        Measurement("kl", "image", np.zeros(200), generator.gamma(0.3, 0.05, 200), "KL(base || after), nats", *states, better="lower"),
        cost("parameters", "model", 1_221_130, 1_221_130, states),
    ]  # fmt: skip
    asked_checks = [
        {"measurement": "success", "op": ">=", "threshold": 1.0},
        {"measurement": "generalisation", "statistic": "low", "op": ">", "threshold": 0.3},
        {"measurement": "locality.random", "op": ">=", "threshold": 0.95},
    ]
    verdict = run_checks(asked_checks if checks else [], measurements, seed=7)

    curve = []
    for name, lift in (("learned mask", 0.06), ("gradient-norm mask", 0.05), ("random mask", -0.08), ("dense fine-tuning", 0.0)):
        for keep in (0.02, 0.05, 0.1, 0.25):
            middle = 0.55 + 0.9 * keep + lift + float(generator.normal(0, 0.01))
            curve.append(
                {
                    "keep": keep,
                    "generalisation": round(middle, 4),
                    "method": name,
                    "low": round(middle - 0.035, 4),
                    "high": round(middle + 0.035, 4),
                }
            )
    points = [
        {"locality": round(0.92 - 0.5 * keep, 3), "generalisation": round(0.5 + keep + lift, 3), "method": name, "label": f"keep {keep}"}
        for name, lift in (("learned mask", 0.05), ("random mask", -0.06))
        for keep in (0.02, 0.05, 0.1, 0.25)
    ]
    bars = [
        {"group": group, "generalisation": round(value, 3), "low": round(value - 0.08, 3), "high": round(min(1, value + 0.08), 3)}
        for group, value in zip(
            ["tulip as insects", "wardrobe as people", "willow as flowers", "train as vehicles"], (0.81, 0.64, 0.77, 0.58), strict=True
        )
    ]
    steps = [{"step": step, "loss": round(2.3 * 0.62**step, 4), "side": side} for side in ("before", "after") for step in range(6)]
    overlap = [
        {"edit": f"e{a}", "other edit": f"e{b}", "iou": round(float(np.exp(-abs(a - b) / 2)), 3)} for a in range(6) for b in range(6)
    ]
    figures: list[FigureInfo] = []
    columns = {"y": "generalisation", "series": "method"}
    for id_, title, kind, rows, axes, caption in (
        ("front", "Generalisation and locality", "points", points, {"x": "locality", **columns}, "Up and right is better."),
        ("keep", "How many pieces to open", "curve", curve, {"x": "keep", **columns}, "Bands are 95 % intervals over groups."),
        ("groups", "Failure groups", "bars", bars, {"x": "group", "y": "generalisation"}, "Whiskers are 95 % intervals."),
        ("loss", "Loss of the edit", "bars", steps, {"x": "step", "y": "loss", "series": "side"}, ""),
        ("overlap", "Overlap of masks", "heatmap", overlap, {"x": "edit", "y": "other edit", "value": "iou"}, "Intersection over union."),
    ):  # fmt: skip
        with (folder / f"figures/{id_}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        figures.append(FigureInfo(id=id_, title=title, kind=kind, caption=caption, csv=f"figures/{id_}.csv", **axes))

    if pictures is None:
        pictures = generator.integers(0, 255, (10, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    items = []
    for row, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"pictures/failures/{row}.png")
        truth, wrong = LABELS[row % 6], LABELS[(row + 2) % 6]
        after = wrong if row % 5 == 4 else truth
        items.append(
            Picture(
                picture=f"pictures/failures/{row}.png", truth=truth, before=truth if row == 9 else wrong, after=after, fixed=after == truth
            )
        )
    (folder / "patch.safetensors").write_bytes(b"\0" * 191_488)
    ops = [
        {
            "op": "sparse_replace",
            "where": f"vit.layers.{layer}.{name}",
            "shape": shape,
            "changed": 128 * rows,
            "norm": 0.1 * layer,
            "bytes": 31_914,
        }
        for layer, rows in ((3, 93), (4, 18), (5, 5))
        for name, shape in (("fc1.weight", "512 x 128"), ("fc2.weight", "128 x 512"))
    ]
    result = Result(
        title="Tulips taken for insects",
        asked=asked,
        model=ModelInfo(source="lab/vit-cifar", family="vit", fingerprint_before=BEFORE, fingerprint_after=AFTER, parameters=1_221_130),
        method=MethodInfo(
            name="where-to-edit",
            title="Where-to-Edit",
            paper="arXiv 2411.01948",
            summary="Fixes one failure by training the few MLP rows that matter.",
        ),
        verdict=verdict.outcome,
        checks=check_infos(verdict),
        table=table_rows(measurements, 7),
        log={"calibration": {"alpha": 0.1, "open share": 0.0912}, "steps": 4, "stop reason": "loss below tau", "lr found": 0.001},
        figures=tuple(figures),
        galleries=(GalleryInfo(id="failures", title="Failures of the group", caption="The edited image comes first.", items=tuple(items)),),
        patch=PatchInfo(file="patch.safetensors", bytes=191_488, ops=tuple(ops)),
        scores=tuple(ScoresInfo(name=name, file=f"scores/{name}.safetensors") for name in ("channels", "mask", "heads")),
    )
    write_result(folder, result)
    return folder
