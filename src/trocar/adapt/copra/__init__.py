"""CopRA / CoTo: LoRA that merges and prunes, by switching adapters off at random while training (arXiv 2410.22911, 2506.05713). Floor 5."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trocar.core.lazy import lazy

if TYPE_CHECKING:
    from trocar.adapt.copra.callback import CopraCallback
    from trocar.adapt.copra.config import CopraConfig
    from trocar.adapt.copra.gate import CopraGate, copra_gate
    from trocar.adapt.copra.schedule import keep_probability
    from trocar.adapt.copra.training import LoraSettings, Trained, TrainSettings, train_adapter

_HOMES = {
    "callback": ("CopraCallback",),
    "config": ("CopraConfig",),
    "gate": ("CopraGate", "copra_gate"),
    "schedule": ("keep_probability",),
    "training": ("LoraSettings", "TrainSettings", "Trained", "train_adapter"),
}
__all__ = [
    "CopraCallback", "CopraConfig", "CopraGate", "LoraSettings", "TrainSettings", "Trained", "copra_gate", "keep_probability",
    "train_adapter",
]  # fmt: skip

__getattr__ = lazy(__name__, _HOMES)
