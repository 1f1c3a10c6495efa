"""The one training loop of the house: `transformers.Trainer` over a stream of whole batches, the same bytes whether or not it was killed.

Every batch is a pure function of (seed, position), not of a running random state, so a resumed run sees what an uninterrupted one would
have seen. Floor 4; torch and transformers are imported when something is trained.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from trocar.core.config import Config
from trocar.core.seeds import derive, generator

if TYPE_CHECKING:
    import torch

IGNORED = -100  # label of a position that is not learned from


class Optimiser(Config):
    """AdamW with linear warm-up (share of the steps) and cosine decay.

    batch: rows; clip: largest norm of the gradient; checkpoint_steps: how often the state is written, for runs that are killed.
    """

    batch: int = pydantic.Field(default=128, ge=1)
    lr: float = pydantic.Field(default=2e-3, gt=0)
    warmup: float = pydantic.Field(default=0.08, ge=0, lt=1)
    weight_decay: float = pydantic.Field(default=0.1, ge=0)
    clip: float = pydantic.Field(default=1.0, gt=0)
    checkpoint_steps: int = pydantic.Field(default=100, ge=1)


class Passes:
    """Row numbers in the order of training: each pass over `rows` of them is a permutation of its own, drawn from the seed."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._order: dict[int, torch.Tensor] = {}

    def __getitem__(self, item: int) -> int:
        import torch

        epoch, place = divmod(item, self.rows)
        if epoch not in self._order:
            self._order = {epoch: torch.randperm(self.rows, generator=generator(self.seed, "epoch", epoch))}
        return int(self._order[epoch][place])


def fit_stream(
    model: Any,
    stream: Any,
    recipe: Optimiser,
    steps: int,
    work: Path,
    seed: int,
    device: str = "auto",
    stop_after: int | None = None,
    callbacks: Sequence[Any] = (),
) -> Any:
    """Train `model` for `steps` batches of `stream`, whose `__getitems__` returns the model's inputs for one batch, resuming from `work`.

    stream: a dataset whose length is the steps times the batch. callbacks: of the Trainer. stop_after ends early, after that many steps
    (tests). Returns the model in evaluation mode.
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
        warmup_steps=max(1, round(recipe.warmup * steps)) if recipe.warmup else 0,
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
    trainer = _trainer(stop_after, callbacks, model=model, args=arguments, train_dataset=stream)
    trainer.remove_callback(transformers.PrinterCallback)  # without a bar the Trainer prints its logs
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


def _trainer(stop_after: int | None, callbacks: Sequence[Any], **arguments: Any) -> Any:
    """A Trainer that takes the stream in its own order; made here because importing the Trainer takes seconds."""
    import torch
    import transformers

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(arguments["train_dataset"])

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            # The Trainer's own way looks for today's parameter names in what was saved under older ones, and only warns about the rest.
            model = self.model if model is None else model
            if hasattr(model, "peft_config"):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            saved = type(model).from_pretrained(resume_from_checkpoint, dtype=next(model.parameters()).dtype)
            model.load_state_dict(saved.state_dict(), strict=True)

    class StopAfter(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == stop_after
            return control

    def whole(batch: Any) -> Any:
        return batch

    return InOrder(callbacks=[*callbacks, *([] if stop_after is None else [StopAfter()])], data_collator=whole, **arguments)
