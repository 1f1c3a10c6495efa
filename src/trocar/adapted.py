"""A model with one adapter or another, measured on a task: what methods that make or merge adapters share. Floor 4."""

from __future__ import annotations

from typing import Any

import torch

from trocar.anatomy import fingerprint, tensor_fingerprint
from trocar.core.workspace import Workspace
from trocar.evaluate import Curve, Task, TaskScores, connectivity
from trocar.patch import Adapter, attached
from trocar.patch.combine import fusion


def digest(adapter: Adapter | None) -> list[str]:
    """What tells an adapter from others, as part of a unit's key."""
    return [] if adapter is None else [f"{name}:{tensor_fingerprint(part)}" for name, part in sorted(adapter.tensors().items())]


class Measured:
    """Measures adapters of one model on the rows of one task. base: the scores without any."""

    def __init__(self, model: Any, task: Task, work: Workspace, batch_size: int = 64, name: str = "test") -> None:
        self.model, self.task, self.work, self.batch_size, self.name = model, task, work, batch_size, name
        self.key = {"model": fingerprint(model), "task": task.digest()}
        self.base = self(None, "base")

    def __call__(self, adapter: Adapter | None, label: str) -> TaskScores:
        """The scores of the model with an adapter (None: of the base)."""

        def compute() -> dict[str, torch.Tensor]:
            if adapter is None:
                found = self.task.measure(self.model, self.batch_size)
            else:
                with attached(self.model, adapter) as outer:
                    found = self.task.measure(outer, self.batch_size)
            return {column: torch.from_numpy(getattr(found, column)) for column in ("right", "score", "first")}

        unit = self.work.tensors(f"{self.name}-{label}", {**self.key, "adapter": digest(adapter)}, compute)
        return TaskScores(**{column: value.numpy() for column, value in unit.items()})

    def curve(self, first: Adapter, second: Adapter, label: str, points: int) -> Curve:
        """Share of right rows on the way from one adapter to another, in the space of factors."""

        def value(place: float) -> float:
            return self(fusion([first, second], [1 - place, place]).adapter, f"{label}-{place:.3f}").accuracy

        return connectivity(value, points)
