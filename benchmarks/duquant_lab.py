"""DuQuant on the lab's decoder with planted outliers, and on its vision transformer: the relations that the method promises.

Train the decoder first: `trocar lab train outliers`. Three rotation seeds; perplexity of a byte and the mean relative output error of all
layers (calibration text of the training files, perplexity on files left out).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from common import ROOT, arguments, write_result

from trocar import lab
from trocar.anatomy import fingerprint
from trocar.compress.duquant import Activations, DuQuantConfig, Weights, greedy_rotation, preset, quantise, zigzag
from trocar.compress.duquant.diagnostics import block_variance, captured
from trocar.core.workspace import Workspace
from trocar.evaluate import perplexity
from trocar.lab import outliers
from trocar.lab.registry import ByteData, get
from trocar.patch.quantised.transform import rotate

PLACES = {"block_size": 16, "search_steps": 32}
MASSIVE = "model.layers.1.mlp.down_proj"
OFF = {"clip": 1.0, "activation_clip": 1.0}
# name -> (preset, bits, changes)
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "nearest": ("rtn", "W4A4", {}),
    "smooth": ("smooth", "W4A4", {}),
    "smooth + one rotation": ("smooth-rotation", "W4A4", {}),
    "smooth + random rotation": ("smooth-random", "W4A4", {}),
    "smooth + block Hadamard": ("smooth-hadamard", "W4A4", {}),
    "one rotation": ("rotation", "W4A4", {}),
    "no smoothing": ("no-smoothing", "W4A4", {}),
    "no permutation": ("no-permutation", "W4A4", {}),
    "random permutation": ("random-permutation", "W4A4", {}),
    "two permutations": ("two-permutations", "W4A4", {}),
    "full Hadamard": ("quarot", "W4A4", {}),
    "duquant": ("duquant", "W4A4", {}),
    "duquant, clip .9 and .8": ("duquant", "W4A4", {"clip": 0.8, "activation_clip": 0.9}),
    "duquant, clip search": ("duquant", "W4A4", {"clip": "search"}),
    "duquant + gptq": ("duquant-gptq", "W4A4", {}),
    "duquant + learned clip": ("duquant-lwc", "W4A4", {}),
    "nearest W6A6": ("rtn", "W6A6", {}),
    "duquant W6A6": ("duquant", "W6A6", {}),
    "duquant W4A8": ("duquant", "W4A8", {}),
    **{f"duquant, blocks of {size}": ("duquant", "W4A4", {"block_size": size}) for size in (4, 8, 32, 64, 128)},
    **{f"duquant, {steps} steps": ("duquant", "W4A4", {"search_steps": steps}) for steps in (1, 4, 128)},
}


def settings(name: str) -> DuQuantConfig:
    kind, bits, changes = ROWS[name]
    places = PLACES if preset(kind).chain is not None else {}
    return preset(kind, bits, **{**places, **OFF, **changes})


def measured(model: Any, window: int, name: str, seed: int, calibration: torch.Tensor, test: torch.Tensor) -> dict[str, float]:
    done = quantise(model, {"input_ids": calibration}, settings(name), seed)
    try:
        errors = [value for path, value in done.errors.items() if "." in path]
        return {"perplexity": perplexity(model, test, window).value, "error": statistics.mean(errors)}
    finally:
        done.revert()


def weight_errors(model: Any, calibration: torch.Tensor) -> dict[str, float]:
    """||rounded W - W|| / ||W|| of the massive down map, W with the smoothing's scales in it; rotations change neither norm."""

    def weight(config: DuQuantConfig) -> torch.Tensor:
        done = quantise(model, {"input_ids": calibration}, config)
        found = done.layers[MASSIVE].effective_weight().double()
        done.revert()
        return found

    found = {}
    for name in ("nearest", "smooth", "duquant"):
        config = settings(name)
        exact = weight(DuQuantConfig(weights=Weights(bits=16), activations=Activations(bits=16), smoothing=config.smoothing, chain=None))
        found[name] = float((weight(config) - exact).norm() / exact.norm())
    return found


def spreading(model: Any, calibration: torch.Tensor, seed: int) -> dict[str, float]:
    """What the parts of the chain do to two inputs of the float model: the peak of the massive one, and how uneven the blocks of block 0's
    attention input are (variance over blocks of the mean of their channels' largest magnitudes) in the order that the rotation left, in
    the mean of 20 random orders, and in zigzag."""
    inputs = captured(model, ["model.layers.0.self_attn.q_proj", MASSIVE], {"input_ids": calibration}, rows=len(calibration))
    size, steps = PLACES["block_size"], PLACES["search_steps"]
    stream = torch.Generator().manual_seed(seed)
    found = {}
    for name, x in zip(("attention", "massive"), inputs.values(), strict=True):
        turned = rotate(x, greedy_rotation(x, size, steps, stream).rotation)
        dealt = turned[:, zigzag(turned.abs().amax(0), size)]
        again = rotate(dealt, greedy_rotation(dealt, size, steps, stream).rotation)
        found |= {f"{name}, peak {when}": float(y.abs().max()) for when, y in (("0", x), ("1", turned), ("2", again))}
        orders = [torch.randperm(x.shape[1], generator=stream) for _ in range(20)]
        found |= {
            f"{name}, variance as rotated": block_variance(turned, size),
            f"{name}, variance at random": statistics.mean(block_variance(turned[:, order], size) for order in orders),
            f"{name}, variance in zigzag": block_variance(dealt, size),
        }
    return found


def vision(seed: int) -> list[dict[str, Any]]:
    """The lab's vision transformer: share of pictures that it reads rightly, and as the float model reads them, and the relative error of
    its logits; calibrated on 64 other pictures. It does not go wrong often enough at 4 bits for accuracy alone to tell methods apart."""
    model, _ = lab.load("vit-cifar-rare")
    pictures = lab.load_examples({"source": "lab:cifar-rare"}, model)
    assert pictures.labels is not None
    order = torch.randperm(len(pictures.labels), generator=torch.Generator().manual_seed(7))
    pixels, labels = pictures.inputs["pixel_values"][order], torch.as_tensor(pictures.labels)[order]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(pixel_values=pixels[64:]).logits

    exact, found = logits(), []
    for name in ("float", "nearest", "smooth", "smooth + one rotation", "duquant", "duquant + gptq", "duquant W4A8"):
        done = None if name == "float" else quantise(model, {"pixel_values": pixels[:64]}, settings(name), seed)
        now = logits()
        if done is not None:
            done.revert()
        row = {"method": name, "seed": seed, "right": float((now.argmax(1) == labels[64:]).float().mean())}
        row |= {"as the float model": float((now.argmax(1) == exact.argmax(1)).float().mean())}
        found.append(row | {"error of the logits": float((now - exact).norm() / exact.norm())})
    return found


def pooled(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of rows of one method, and their number."""
    names = dict.fromkeys(row["method"] for row in rows)
    keys = [key for key in rows[0] if key not in ("method", "seed")]
    same = {name: [row for row in rows if row["method"] == name] for name in names}
    return [
        {"method": name, "seeds": len(some)} | {key: statistics.mean(row[key] for row in some) for key in keys}
        for name, some in same.items()
    ]


def relations(
    rows: dict[str, dict[str, Any]], plain: float, weights: dict[str, float], spread: list[dict[str, float]]
) -> list[dict[str, Any]]:
    def row(identity: str, claim: str, values: dict[str, float], holds: bool) -> dict[str, Any]:
        return {"id": identity, "claim": claim, "values": values, "interval": None, "holds": holds}

    def value(name: str, what: str = "perplexity") -> float:
        return rows[name][what]

    gap = {"nearest": value("nearest") - plain, "duquant": value("duquant") - plain}
    steps = {name: value(name, "error") for name in ("smooth", "smooth + one rotation", "duquant")}
    falls = [1 - b / a for a, b in itertools.pairwise(steps.values())]
    fine = value("duquant W6A6") - plain
    return [
        row("gap", "rounding to nearest costs more than 5 times what DuQuant costs", gap, gap["nearest"] > 5 * gap["duquant"]),
        row(
            "smoothing",
            "smoothing alone is worse than DuQuant by more than 0.05",
            {name: value(name) for name in ("smooth", "duquant")},
            value("smooth") - value("duquant") > 0.05,
        ),
        row("fine", "DuQuant at W6A6 costs less than 0.02", {"cost": fine}, fine < 0.02),
        row("error", "the layers' error falls by 5 % with each step: smoothing, one rotation, DuQuant", steps, min(falls) > 0.05),
        row(
            "weight",
            "on the massive down map smoothing more than doubles the weight's error, and DuQuant more than halves it again",
            weights,
            weights["smooth"] > 2 * weights["nearest"] and weights["smooth"] > 2 * weights["duquant"],
        ),
        row(
            "peaks",
            "the largest magnitude of the attention's and of the massive input falls with each rotation, for every seed",
            {name: statistics.mean(one[name] for one in spread) for name in spread[0] if "peak" in name},
            all(
                one[f"{name}, peak 0"] > one[f"{name}, peak 1"] > one[f"{name}, peak 2"]
                for one in spread
                for name in ("attention", "massive")
            ),
        ),
        row(
            "balance",
            "zigzag leaves a tenth of the variance over blocks that random orders leave of the attention's input, for every seed",
            {name: statistics.mean(one[name] for one in spread) for name in spread[0] if "variance" in name},
            all(10 * one["attention, variance in zigzag"] < one["attention, variance at random"] for one in spread),
        ),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("duquant_lab", __doc__ or "", argv)
    torch.set_num_threads(1)
    row = get("outliers")
    data, _, _ = row.texts()
    assert isinstance(data, ByteData)
    model = lab.load_model("outliers")
    ids = outliers.corpus(data, "train")
    places = torch.randint(len(ids) - data.window, (32,), generator=torch.Generator().manual_seed(7))
    calibration, test = outliers.windows(ids, places, data.window), outliers.test_stream(data, 64 if options.quick else 320)
    seeds = range(1 if options.quick else 3)
    work = Workspace(ROOT / "build" / "duquant_lab")
    base = {"model": fingerprint(model), "test": len(test)}
    plain = work.values("float", base, lambda: {"perplexity": perplexity(model, test, data.window).value})["perplexity"]
    rows: dict[str, dict[str, Any]] = {
        "float": {"method": "float", "perplexity": plain, "lowest": plain, "highest": plain, "seeds": 1, "error": 0.0}
    }
    for name in ROWS:
        chain = settings(name).chain
        drawn = chain is not None and (chain.rotation in ("greedy", "random") or chain.permutation == "random")
        found = []
        for seed in seeds if drawn else list(seeds)[:1]:

            def compute(name: str = name, seed: int = seed) -> dict[str, float]:
                return measured(model, data.window, name, seed, calibration, test)

            key = {**base, "config": settings(name).model_dump(mode="json"), "seed": seed}
            found.append(work.values(f"{name.replace(' ', '-').replace(',', '')}-{seed}", key, compute))
        spread = [one["perplexity"] for one in found]
        rows[name] = {
            "method": name,
            "perplexity": statistics.mean(spread),
            "lowest": min(spread),
            "highest": max(spread),
            "seeds": len(spread),
            "error": statistics.mean(one["error"] for one in found),
        }
        print(name, rows[name], flush=True)
    weights = work.values("weights", base, lambda: weight_errors(model, calibration))
    spread = [
        work.values(f"spread-{seed}", {**base, "seed": seed}, lambda seed=seed: spreading(model, calibration, seed)) for seed in seeds
    ]
    told = {"float": plain, "weight errors": weights}
    pictures = pooled([row for seed in seeds for row in vision(seed)])
    for row in pictures:
        print(row, flush=True)
    tables = {"Planted decoder": list(rows.values()), "Small vision transformer": pictures}
    write_result(options.out, "duquant_lab", list(seeds), told, relations(rows, plain, weights, spread), tables=tables)


if __name__ == "__main__":
    main()
