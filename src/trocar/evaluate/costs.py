"""What a model costs: parameters, bytes, time. Floor 3."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from trocar.core.errors import MetricError
from trocar.evaluate.measurement import Measurement


def counts(model: torch.nn.Module) -> dict[str, int]:
    """`parameters` and `bytes` of a model. A tied tensor counts once; bytes are those of parameters and persistent buffers."""
    tensors: dict[int, torch.Tensor] = {id(parameter): parameter for parameter in model.parameters()}
    total = sum(parameter.numel() for parameter in tensors.values())
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                tensors[id(buffer)] = buffer
    return {"parameters": total, "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())}


def latency(
    before: Callable[[], Any],
    after: Callable[[], Any],
    states: tuple[str, str],
    repetitions: int = 20,
    warmup: int = 3,
    name: str = "latency",
) -> Measurement:
    """Wall seconds of two callables, interleaved repetition by repetition (in turn first, so that a drifting or busy machine hits both
    alike) after `warmup` runs of each; medians, and their ratio in the summary. An accelerator is waited for.

    Times differ from run to run: keep them out of files that must have the same bytes. Raises MetricError below 2 repetitions.
    """
    if repetitions < 2 or warmup < 0:
        raise MetricError(f"{repetitions} repetitions after {warmup} give no median.", "Say repetitions >= 2 and warmup >= 0.")
    sides, seconds = (before, after), np.zeros((2, repetitions))
    for _ in range(warmup):
        before()
        after()
    for repetition in range(repetitions):
        for side in (0, 1) if repetition % 2 == 0 else (1, 0):
            _wait()
            start = time.perf_counter()
            sides[side]()
            _wait()
            seconds[side, repetition] = time.perf_counter() - start
    scorer = f"wall seconds, median of {repetitions} interleaved repetitions"
    return Measurement(name, "repetition", seconds[0], seconds[1], scorer, states[0], states[1], "lower", average="median", form="number")


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
