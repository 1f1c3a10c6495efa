"""CopRA on SmolLM2-135M-Instruct: three tasks, plain LoRA against CopRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import ROOT, arguments
from copra_tasks import FORMS, split

from trocar.adapt.copra import CopraConfig, LoraSettings, Trained, TrainSettings, train_adapter
from trocar.core.workspace import Workspace
from trocar.recipe import load_model, load_tokenizer

MODEL = "smollm2-135m-instruct"
RECIPES: dict[str, Any] = {"plain": "plain", "copra": CopraConfig()}
LORA = LoraSettings(rank=8, alpha=16, targets=("q", "k", "v"))
TRAIN = TrainSettings(steps=160, batch=16, lr=1e-3, checkpoint_steps=40)


def trained(model: Any, tokenizer: Any, task: str, recipe: str, seed: int, work: Workspace, train: TrainSettings = TRAIN) -> Trained:
    """The adapter of a task, a committed unit."""
    rows = split(task).train
    return train_adapter(
        model, rows, RECIPES[recipe], LORA, train, seed=seed, work=work, processor=tokenizer, name=f"{task}-{recipe}-{seed}"
    )


def main() -> None:
    options = arguments(
        "copra_real",
        __doc__ or "",
        extend=lambda parser: (
            parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2]),
            parser.add_argument("--work", type=Path, default=ROOT / "build" / "copra_real", help="where units are kept"),
            parser.add_argument("--train-only", action="store_true", help="only train the adapters"),
        ),
    )
    torch.set_num_threads(1)
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    work = Workspace(options.work)
    for seed in options.seeds:
        for task in FORMS:
            for recipe in RECIPES:
                made = trained(model, tokenizer, task, recipe, seed, work)
                print(seed, task, recipe, made.losses[-1].tolist(), flush=True)


if __name__ == "__main__":
    main()
