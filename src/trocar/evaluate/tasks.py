"""How well a model does a task: pictures with labels, or prompts with answers. Floor 3.

One form for everything that adapts a model to tasks: the same rows are measured as a share of right ones, and serve as the value of a
game (`trocar.locate.shapley`) or of a path between two adapters, where the log-likelihood says more than a few hundred right or wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trocar.anatomy import Anatomy, tensor_fingerprint
from trocar.core.errors import DataError, MetricError
from trocar.core.progress import track
from trocar.evaluate.forward import evaluating, place
from trocar.evaluate.measurement import Measurement
from trocar.evaluate.rates import States
from trocar.trace.queries import Asked, ask, only_last

if TYPE_CHECKING:
    from trocar.method import Examples

COLUMNS = ("right", "score", "first")


@dataclass(frozen=True, eq=False)
class TaskScores:
    """What a model did with n rows, each (n,) float64.

    right: the label is the most probable class, or every token of the answer is the most probable one after those before it (what greedy
    decoding would say); score: log-likelihood of label or answer, nats; first: the answer's first token is right (of pictures: as `right`).
    """

    right: np.ndarray
    score: np.ndarray
    first: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


@dataclass(frozen=True, eq=False)
class Task:
    """Rows ready to be run and judged. inputs: the model's keyword arguments, rows first (left-padded texts hold the answers but their last
    tokens); wanted: class indices (n,), or the prompts with their answers."""

    inputs: Mapping[str, torch.Tensor]
    wanted: torch.Tensor | Asked
    unit: str

    @classmethod
    def of(cls, model: Any, examples: Examples, processor: Any = None, prompt: str = "prompt", answer: str = "answer") -> Task:
        """Examples as a task for `model`: pictures by their labels, texts (rows without inputs) by their columns `prompt` and `answer`.

        Raises DataError for pictures without labels, missing columns, or texts without a tokenizer.
        """
        if examples.inputs:
            if examples.labels is None:
                raise DataError("A task of pictures needs labels, and these have none.", "Name the label column with `label`.")
            return cls(dict(examples.inputs), examples.labels, "picture")
        if processor is None:
            raise DataError("A task of prompts and answers needs the model's tokenizer.", "Save it into the model's folder.")
        prompts, answers = ([str(cell) for cell in examples.column(name, "task")] for name in (prompt, answer))
        asked = ask(model, processor, prompts, answers)
        anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
        longest = max(len(row) for row in asked.tokens)
        return cls({**asked.inputs, **only_last(anatomy.model, longest)}, asked, "prompt")  # type: ignore[dict-item]

    def __len__(self) -> int:
        return len(self.wanted)

    def digest(self) -> str:
        """Of the rows and of what is wanted of them: part of the key of whatever is kept of a task."""
        wanted = self.wanted.tolist() if isinstance(self.wanted, torch.Tensor) else [list(row) for row in self.wanted.tokens]
        inputs = [f"{name}:{tensor_fingerprint(value)}" for name, value in sorted(self.inputs.items()) if isinstance(value, torch.Tensor)]
        return hashlib.blake2b(json.dumps([inputs, wanted]).encode(), digest_size=16).hexdigest()

    def metric(self, output: Any, rows: torch.Tensor) -> torch.Tensor:
        """right, score and first of the rows of an output, (len(rows), 3): the metric of a `sweep` with `numbers=3`."""
        logits = output.logits if output.logits.dtype == torch.float64 else output.logits.float()
        if isinstance(self.wanted, torch.Tensor):
            labels = self.wanted[rows.cpu()].to(logits.device)
            right = (logits.argmax(-1) == labels).to(logits.dtype)
            return torch.stack([right, logits.log_softmax(-1).gather(1, labels[:, None])[:, 0], right], 1)
        made = []
        for row, number in zip(logits, rows.tolist(), strict=True):
            tokens = torch.tensor(self.wanted.tokens[number], device=logits.device)
            here = row[-len(tokens) :]
            hit = (here.argmax(-1) == tokens).to(logits.dtype)
            made.append(torch.stack([hit.min(), here.log_softmax(-1).gather(1, tokens[:, None]).sum(), hit[0]]))
        return torch.stack(made)

    def scored(self, output: Any, rows: torch.Tensor) -> torch.Tensor:
        """The log-likelihood alone, (len(rows),): the value of a game, larger is better."""
        return self.metric(output, rows)[:, 1]

    def measure(self, model: Any, batch_size: int = 64) -> TaskScores:
        """Run `model` (patched or not, in a `PeftModel` or not) on all rows, in evaluation mode and without gradient.

        Raises MetricError if it gives NaN.
        """
        bare = model.model if isinstance(model, Anatomy) else model
        host = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in self.inputs.items()}
        parts = []
        with evaluating(bare):
            for start in track(range(0, len(self), batch_size), "task", -(-len(self) // batch_size)):
                rows = torch.arange(start, min(start + batch_size, len(self)))
                moved = place({name: value[rows] for name, value in host.items() if isinstance(value, torch.Tensor)}, bare)
                parts.append(self.metric(bare(**{**host, **moved}), rows).double().cpu())
        columns = torch.cat(parts).numpy()
        if np.isnan(columns).any():
            raise MetricError(f"The model gives NaN on {int(np.isnan(columns).any(1).sum())} of {len(self)} rows.")
        return TaskScores(*columns.T)


def task_accuracy(name: str, unit: str, before: TaskScores, after: TaskScores, states: States) -> Measurement:
    """Share of right rows before and after, paired."""
    words = "the label is the most probable class" if unit == "picture" else "every token of the answer is the most probable one"
    return Measurement(name, unit, before.right, after.right, words, *states, form="share")


__all__ = ["COLUMNS", "Task", "TaskScores", "task_accuracy"]
