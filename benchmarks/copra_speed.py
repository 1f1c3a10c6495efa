"""What CopRA saves: whole training runs of equal steps, plain LoRA and CopRA in turn on the same machine, by processor time.

A group that is off evaluates neither A nor B, and below the lowest group that is on autograd keeps nothing and computes no gradient. Each
pair of runs starts from the same adapter and sees the same batches; the order within a pair alternates. That p0 = 1 gives plain LoRA bit
for bit is held by a test, so both do the same work where all are on. Runs go through `transformers.Trainer`, as a user's do.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from common import arguments, write_result

from trocar import lab
from trocar.adapt import CopraCallback
from trocar.adapt.copra import TrainSettings
from trocar.adapt.copra.training import target_modules
from trocar.fitting import fit_stream
from trocar.patch import wrapped
from trocar.recipe import load_model

PAIRS, QUICK_PAIRS = 3, 2
# model -> (steps, rows, columns of a text)
RUNS = {"lab ViT": (100, 40, 0), "lab decoder": (100, 32, 12), "SmolLM2-135M": (24, 8, 16)}
KINDS: dict[str, dict[str, Any]] = {"LoRA": {}, "DoRA": {"use_dora": True}}
ROLES = {"q, k, v": ("q", "k", "v"), "all": ("all",)}


class Batches(torch.utils.data.Dataset):
    """Random rows: what is learned does not matter here."""

    def __init__(self, make: Callable[[torch.Generator], dict[str, torch.Tensor]], length: int) -> None:
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, items: list[int]) -> dict[str, torch.Tensor]:
        return self.make(torch.Generator().manual_seed(items[0]))


def maker(model: Any, rows: int, columns: int) -> Callable[[torch.Generator], dict[str, torch.Tensor]]:
    def pictures(draw: torch.Generator) -> dict[str, torch.Tensor]:
        side = model.config.image_size
        labels = torch.randint(0, model.config.num_labels, (rows,), generator=draw)
        return {"pixel_values": torch.randn(rows, 3, side, side, generator=draw), "labels": labels}

    def texts(draw: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, model.config.vocab_size, (rows, columns), generator=draw)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    return texts if columns else pictures


def run(model: Any, config: Any, batches: Batches, steps: int, rows: int, copra: bool) -> float:
    """Seconds of the processor for one whole run."""
    callbacks = [CopraCallback(seed=1)] if copra else []
    settings = TrainSettings(steps=steps, batch=rows, lr=1e-4, checkpoint_steps=10 * steps)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with wrapped(model, config) as outer:
            start = time.process_time()
            fit_stream(outer, batches, settings, steps, Path(folder), 0, "cpu", None, callbacks)
            return time.process_time() - start


def compare(name: str, model: Any, kind: str, roles: str, pairs: int, steps: int, rows: int, columns: int) -> dict[str, Any]:
    names, transposed = target_modules(model, ROLES[roles])
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=names, fan_in_fan_out=transposed, **KINDS[kind])
    batches = Batches(maker(model, rows, columns), steps * rows)
    run(model, config, Batches(batches.make, 2 * rows), 2, rows, True)  # warm-up
    seconds = np.empty((pairs, 2))
    for pair in range(pairs):
        for copra in (False, True) if pair % 2 == 0 else (True, False):
            seconds[pair, int(copra)] = run(model, config, batches, steps, rows, copra)
    ratios = seconds[:, 0] / seconds[:, 1]
    plain, ours = np.median(seconds, axis=0).tolist()
    return {
        "task": f"{name}, {kind} on {roles}, {steps} steps of {rows}", "ours_s": ours, "peer": "plain, same Trainer", "peer_s": plain,
        "ratio": float(np.median(ratios)), "ratio_low": float(ratios.min()), "ratio_high": float(ratios.max()), "repeats": pairs,
    }  # fmt: skip


def main() -> None:
    def extend(parser: Any) -> None:
        parser.add_argument("--models", nargs="+", choices=list(RUNS), help="which models (default: all)")

    options = arguments("copra_speed", __doc__ or "", extend=extend)
    os.environ["TROCAR_PROGRESS"] = "0"
    torch.set_num_threads(1)
    rows, pairs = [], QUICK_PAIRS if options.quick else PAIRS
    for name in options.models or RUNS:
        steps, batch, columns = RUNS[name]
        steps = max(8, steps // 10) if options.quick else steps
        if name == "SmolLM2-135M":
            model: Any = load_model("smollm2-135m-instruct")
        else:
            model, _ = lab.load("vit-cifar-rare" if name == "lab ViT" else "world")
        for kind, roles in (("LoRA", "q, k, v"), ("LoRA", "all"), ("DoRA", "q, k, v"), ("DoRA", "all")):
            if name == "SmolLM2-135M" and (kind, roles) == ("DoRA", "all"):
                continue  # minutes a run, and nothing that the others do not say
            rows.append(compare(name, model, kind, roles, pairs if columns != 16 else min(2, pairs), steps, batch, columns))
            print(rows[-1]["task"], f"CopRA takes {1 / rows[-1]['ratio']:.3f} of plain", flush=True)
    limit = 0.92
    shares = {row["task"]: 1 / row["ratio"] for row in rows}
    relations = [
        {
            "id": "R8 time", "claim": f"a CopRA run takes at most {limit} of the plain run's time, in every row", "values": shares,
            "interval": None, "holds": all(share <= limit for share in shares.values()),
        }
    ]  # fmt: skip
    settings = {"rank": 8, "copra": "p0 .1, rho .75, linear", "clock": "process time of one thread", "limit": limit}
    write_result(options.out, "copra_speed", [0, 1], settings, relations, rows)


if __name__ == "__main__":
    main()
