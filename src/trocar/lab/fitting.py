"""The one training loop of the lab: `transformers.Trainer` over a stream of whole batches, the same bytes whether or not it was killed.

Every batch is a pure function of (seed, position), not of a running random state, so a resumed run sees what an uninterrupted one would
have seen.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trocar.core.seeds import derive
from trocar.lab.registry import Optimiser


@dataclass(frozen=True)
class Made:
    """A trained model and what goes beside it. facts: measured on the stored, rounded weights, for `lab.json`; text: the card from them."""

    model: nn.Module
    processor: Any
    facts: Callable[[nn.Module], dict[str, Any]]
    text: Callable[[dict[str, Any]], str]


def fit_stream(
    model: nn.Module,
    stream: torch.utils.data.Dataset,
    recipe: Optimiser,
    steps: int,
    work: Path,
    seed: int,
    device: str = "auto",
    stop_after: int | None = None,
) -> nn.Module:
    """Train `model` for `steps` batches of `stream`, whose `__getitems__` returns the model's inputs for one batch, resuming from `work`.

    stop_after ends early, after that many steps (tests). Returns the model in evaluation mode.
    """
    import transformers

    arguments = transformers.TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(recipe.warmup * steps)),
        save_steps=recipe.checkpoint_steps,
        save_total_limit=2,
        logging_steps=50,
        seed=derive(seed, "trainer") % 2**31,
        use_cpu=device == "cpu",
        report_to="none",
        disable_tqdm=os.environ.get("TROCAR_PROGRESS") == "0",
        dataloader_pin_memory=False,
        remove_unused_columns=False,  # the stream hands over whole batches
    )
    trainer = _trainer(stop_after, model=model, args=arguments, train_dataset=stream)
    model.train()
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(work))
    return model.eval()


def last_whole_checkpoint(work: Path) -> str | None:
    """The newest checkpoint written to its end: `trainer_state.json` is the Trainer's last file, so a kill leaves it out or cut."""
    for folder in sorted(work.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            return str(folder)
        except (OSError, json.JSONDecodeError):
            shutil.rmtree(folder, ignore_errors=True)
    return None


def _trainer(stop_after: int | None, **arguments: Any) -> Any:
    """A Trainer that takes the stream in its own order; made here because importing the Trainer takes seconds."""
    import transformers

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(arguments["train_dataset"])

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            # The Trainer's own way looks for today's parameter names in what was saved under older ones, and only warns about the rest.
            model = self.model if model is None else model
            saved = type(model).from_pretrained(resume_from_checkpoint, dtype=next(model.parameters()).dtype)
            model.load_state_dict(saved.state_dict(), strict=True)

    class StopAfter(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == stop_after
            return control

    def whole(batch: Any) -> Any:
        return batch

    return InOrder(callbacks=[] if stop_after is None else [StopAfter()], data_collator=whole, **arguments)
