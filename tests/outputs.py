"""What a model gives, and how far two outputs are apart: for tests of changes that should hardly show."""

from __future__ import annotations

from typing import Any

import torch


def out(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        found = model(**inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def error(now: torch.Tensor, was: torch.Tensor) -> float:
    """||now - was|| / ||was||."""
    now, was = now.detach().double(), was.detach().double()
    return float((now - was).norm() / was.norm())
