"""Floor 5: learn without losing. `trocar.adapt.copra` trains LoRA adapters that merge and prune."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trocar.core.lazy import lazy

if TYPE_CHECKING:
    from trocar.adapt.copra import CopraCallback, CopraConfig, copra_gate

_HOMES = {"copra": ("CopraCallback", "CopraConfig", "copra_gate")}
__all__ = ["CopraCallback", "CopraConfig", "copra_gate"]

__getattr__ = lazy(__name__, _HOMES)
