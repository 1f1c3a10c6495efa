"""How fast one Where-to-Edit edit is, and how much memory it takes, beside the published code's own loop.

Both predict the mask with the same hypernetwork and take the same number of masked RMSProp steps; the final weights are checked equal
first. The published loop is re-timed as it is written: full forward pass, full backward pass with gradients of every parameter, the mask
multiplied onto the gradients of the six dense matrices, RMSProp over the six dense matrices. Models have random weights of two sizes:
ViT-B/16 (224 px, the paper's) and the small ViT of the lab. Peak memory is that of a process of its own, beyond the loaded model and
hypernetwork.
It also runs the paper's configuration once at full size: labels of a few pairs, one training step of the hypernetwork, one edit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import ROOT, arguments, paired_seconds, seconds_of, write_result
from transformers import ViTConfig, ViTForImageClassification

from trocar.edit.where_to_edit import EditConfig, Edits, MaskHypernetwork, Place, Rows, edit_many, first_order_labels, mask_labels, top_k
from trocar.edit.where_to_edit.config import LabelConfig
from trocar.edit.where_to_edit.cutmix import CutMixConfig, cutmix_pairs
from trocar.edit.where_to_edit.hypernetwork import Made, default_heads, made_for, predict
from trocar.edit.where_to_edit.place import guarded
from trocar.edit.where_to_edit.training import loss_of

MODELS: dict[str, dict[str, Any]] = {
    "vit-b-16": {"num_labels": 1000},
    "lab-vit": {
        **{"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4},
        **{"image_size": 32, "patch_size": 8, "num_labels": 10},
    },
}
STEPS = {"vit-b-16": 10, "lab-vit": 10}
LR = 2e-5
MANY = 32  # edits side by side


def build(name: str, seed: int) -> tuple[ViTForImageClassification, MaskHypernetwork, torch.Tensor, torch.Tensor]:
    """A random model, a random hypernetwork for it, one image and a wrong answer as its label."""
    torch.manual_seed(seed)
    model = ViTForImageClassification(ViTConfig(**MODELS[name])).eval()
    place = Place.of(model)
    network = MaskHypernetwork(
        Made(depth=3, heads=default_heads(place.tower.width), report={"better_than_constant": True}, **made_for(place)), seed
    )
    side = int(model.config.image_size)  # type: ignore[arg-type]
    image = torch.randn(1, 3, side, side)
    with torch.no_grad():
        label = model(image).logits.argsort(1)[:, 0]  # the least likely class, so that no step count ends the edit early
    return model, network.eval(), image, label


def ours(model: Any, network: MaskHypernetwork, image: torch.Tensor, label: torch.Tensor, steps: int, keep: float) -> Edits:
    return edit_many(model, image, label, network, EditConfig(keep=keep, lr=LR, steps=steps, stop_ce=0.0))


def published(model: Any, network: MaskHypernetwork, image: torch.Tensor, label: torch.Tensor, steps: int, keep: float) -> None:
    """The published loop; edits the model itself, as the published code does."""
    place = Place.of(model)
    with torch.no_grad():
        features = model.vit(image).last_hidden_state[:, 0]
        mask = top_k(predict(network, features, torch.tensor([[0]])), keep)[0]
    weights = [matrix.view.parameter for matrix in place.matrices]
    dense = [
        (mask[matrix.row][:, None] if matrix.dim == 0 else mask[matrix.row][None]).float().expand(parameter.shape).contiguous()
        for matrix, parameter in zip(place.matrices, weights, strict=True)
    ]
    optimiser = torch.optim.RMSprop(weights, lr=LR, alpha=0.99, eps=1e-8)
    for step in range(steps + 1):
        logits = model(image).logits
        loss = F.cross_entropy(logits, label)
        if step == steps or (int(logits.argmax()) == int(label) and float(loss) <= 0.0):
            break
        model.zero_grad()
        loss.backward()
        for parameter, multiplier in zip(weights, dense, strict=True):
            assert parameter.grad is not None
            parameter.grad.mul_(multiplier)
        optimiser.step()


def keeping(model: Any, work: Any) -> None:
    """Run the published loop and put the six matrices back."""
    weights = [matrix.view.parameter for matrix in Place.of(model).matrices]
    before = [weight.detach().clone() for weight in weights]
    work()
    model.zero_grad()
    with torch.no_grad():
        for weight, value in zip(weights, before, strict=True):
            weight.copy_(value)


def largest_difference(name: str, keep: float, seed: int) -> tuple[float, float]:
    """(largest difference between the final weights of the two ways, largest change that the edit made)."""
    model, network, image, label = build(name, seed)
    edits = ours(model, network, image, label, STEPS[name], keep)
    mine = edits.parameters(0)
    start = {key: value.detach().clone() for key, value in model.named_parameters() if key in mine}
    published(model, network, image, label, STEPS[name], keep)
    theirs = dict(model.named_parameters())
    assert edits.logs[0]["steps"] == STEPS[name], edits.logs[0]
    gap = max(float((mine[key] - theirs[key].detach()).abs().max()) for key in mine)
    return gap, max(float((mine[key] - start[key]).abs().max()) for key in mine)


def peak(way: str, name: str, keep: float, seed: int) -> int:
    """Bytes that one edit needs beyond the loaded model and hypernetwork, from a process of its own."""
    words = [sys.executable, __file__, "--memory-of", way, "--model", name, "--keep", str(keep), "--seed", str(seed)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    found = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return int(json.loads(found.stdout.strip().splitlines()[-1])["bytes"])


def memory_of(way: str, name: str, keep: float, seed: int) -> None:
    """Runs in the process of its own: one step is enough, every buffer exists after it."""
    model, network, image, label = build(name, seed)
    with torch.no_grad():
        model(image)  # what the libraries allocate once is not the edit's
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak counter, so that building the model does not count
    before = _peak_rss()
    (ours if way == "ours" else published)(model, network, image, label, 2, keep)
    print(json.dumps({"bytes": _peak_rss() - before}))


def _peak_rss() -> int:
    status = Path("/proc/self/status").read_text()
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
    return int(line.split()[1]) * 1024 if line else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def paper_size(seed: int) -> list[dict[str, Any]]:
    """The paper's configuration on a random ViT-B/16: what each stage costs on this machine."""
    model, network, image, label = build("vit-b-16", seed)
    place = Place.of(model)
    images = torch.randn(4, 3, 224, 224)
    clean, mixed = cutmix_pairs(images, range(2), (16, 16), CutMixConfig(), seed)
    reference = LabelConfig(kind="ref", alpha=1e-3, sparsity_weight=0.125, outer_steps=1)
    held: dict[str, Any] = {}

    def step() -> None:
        network.train()
        optimiser = torch.optim.RMSprop(network.parameters(), lr=1e-4)
        (0.1 * loss_of("ref", network(held["features"]), held["labels"])).backward()
        optimiser.step()
        network.eval()

    def features() -> None:
        with guarded(model):
            held["features"] = Rows(place, {"pixel_values": mixed}).features()[0]

    def labels() -> None:
        held["labels"] = mask_labels(place, clean, mixed, reference, seed, range(2))[0]

    def edit() -> None:
        held["edits"] = edit_many(model, image, label, network, EditConfig(keep=0.05, lr=LR, steps=10, stop_ce=0.0))

    stages = {
        "labels, first-order, 2 pairs": lambda: first_order_labels(place, clean, mixed),
        "labels, reference, 2 pairs, 1 of 10 outer steps": labels,
        "features of 2 images": features,
        "hypernetwork, forward, backward and step, 2 pairs": step,
        "edit, keep .05, 10 steps": edit,
    }
    rows = [{"model": "vit-b-16 (random weights)", "stage": stage, "seconds": round(seconds_of(work), 3)} for stage, work in stages.items()]
    assert held["labels"].shape == (2, 6, 3072)
    assert held["features"].shape == (2, 768)
    edits = held["edits"]
    assert sum(edits.logs[0]["open"].values()) == 922, edits.logs[0]["open"]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = Path(folder) / "edit.safetensors"
        edits.patch(0).save(path)
        rows.append({"model": rows[0]["model"], "stage": "patch made and saved", "seconds": round(time.perf_counter() - start, 3)})
        size = path.stat().st_size
    sizes = {"hypernetwork parameters": sum(value.numel() for value in network.parameters()), "patch bytes, 922 entries": size}
    return [row | {"value": None} for row in rows] + [
        {"model": rows[0]["model"], "stage": stage, "seconds": None, "value": value} for stage, value in sizes.items()
    ]


def many_at_once(keep: float, seed: int, repeats: int) -> dict[str, Any]:
    """Edits of many images, side by side against one published loop after the other."""
    model, network, _, _ = build("lab-vit", seed)
    images = torch.randn(MANY, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        labels = model(images).logits.argsort(1)[:, 0]
    steps = STEPS["lab-vit"]

    def peer() -> None:
        for row in range(MANY):
            keeping(model, lambda row=row: published(model, network, images[row : row + 1], labels[row : row + 1], steps, keep))

    row = paired_seconds(lambda: ours(model, network, images, labels, steps, keep), peer, repeats, seed)
    return {
        "task": f"{MANY} edits, lab-vit, keep {keep:g}, {steps} steps each",
        "peer": "published loop (own re-timing), one by one",
        **row,
    }


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory-of", choices=["ours", "published"], help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=list(MODELS), help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=float, default=0.05, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help="of the random models")


def main() -> None:
    torch.set_num_threads(1)
    chosen = arguments("edit_speed", __doc__ or "", extend=extend)
    if chosen.memory_of:
        memory_of(chosen.memory_of, chosen.model, chosen.keep, chosen.seed)
        return
    timings, real = [], []
    for name in MODELS:
        gap, change = largest_difference(name, chosen.keep, chosen.seed)
        if gap > 1e-5:
            raise SystemExit(f"{name}: the two ways end with different weights (largest difference {gap:.2g}).")
        model, network, image, label = build(name, chosen.seed)
        repeats = {"vit-b-16": 3, "lab-vit": 15}[name] * (1 if chosen.quick else 2)
        work = (model, network, image, label, STEPS[name], chosen.keep)
        row = paired_seconds(
            lambda work=work: ours(*work), lambda work=work: keeping(work[0], lambda: published(*work)), repeats, chosen.seed
        )
        task = f"one edit, {name}, keep {chosen.keep:g}, {STEPS[name]} steps"
        memory = {way: peak(way, name, chosen.keep, chosen.seed) for way in ("ours", "published")}
        timings.append(
            {"task": task, "peer": "published loop (own re-timing)", **row}
            | {"ours_bytes": memory["ours"], "peer_bytes": memory["published"], "weights_differ_by": gap, "weights_changed_by": change}
        )
        print(timings[-1])
    timings.append(many_at_once(chosen.keep, chosen.seed, 3 if chosen.quick else 6))
    print(timings[-1])
    real = paper_size(chosen.seed)
    settings = {"keep": chosen.keep, "lr": LR, "steps": STEPS, "threads": 1, "dtype": "float32"}
    write_result(chosen.out, "edit_speed", [chosen.seed], settings, timings=timings, real=real)


if __name__ == "__main__":
    main()
