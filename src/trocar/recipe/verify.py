"""A patch is believed when it has been applied and taken back on the model at hand. Floor 6."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trocar.anatomy import fingerprint
from trocar.core.errors import EditError
from trocar.evaluate.forward import evaluating, place

if TYPE_CHECKING:
    from trocar.method import Examples
    from trocar.patch import Patch

ROWS = 64  # of each role; enough to see whether anything moved, cheap beside any edit


@dataclass(frozen=True)
class Verified:
    """What applying the patch did. effect: largest absolute change of an output on the first rows of any role; parameters: count after."""

    fingerprint: str
    effect: float
    parameters: int


def verify(model: torch.nn.Module, patch: Patch, data: Mapping[str, Examples], base: str) -> Verified:
    """Apply and revert `patch`. `base`: the model's fingerprint before.

    Raises EditError if the patch has no effect on any example or makes NaN, or if the model is not bit for bit the base again.
    """
    before = {role: _outputs(model, examples) for role, examples in data.items()}
    applied = patch.apply(model)
    try:
        state = fingerprint(model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        effects = {role: _distance(before[role], _outputs(model, examples)) for role, examples in data.items()}
    finally:
        applied.revert()
    again = fingerprint(model)
    if again != base:
        raise EditError(
            f"Reverting the patch gave {again}, but the base is {base}.", "This is a bug in the method's patch; please report it."
        )
    broken = [role for role, effect in effects.items() if effect != effect]
    if broken:
        raise EditError(f"With the patch the model gives NaN on data.{broken[0]}.", "The edit diverged; a smaller step may help.")
    effect = max(effects.values(), default=0.0)
    if effect == 0.0:
        raise EditError(
            f"The patch changes no output on any of the {len(data)} data roles ({', '.join(data)}).",
            "The edit did not take; look at the settings of the method, and at the dtype: half precision can round a small change away.",
        )
    return Verified(state, effect, parameters)


def _outputs(model: torch.nn.Module, examples: Examples) -> torch.Tensor:
    """The first floating-point output (logits, else hidden states) on the first rows, on the CPU."""
    rows = examples.take(range(min(ROWS, len(examples))))
    with evaluating(model):
        out = model(**place(rows.inputs, model))
    value = next(
        item
        for item in (out.values() if hasattr(out, "values") else out)
        if torch.is_tensor(item) and item.is_floating_point() and item.ndim
    )
    return value.detach().cpu()


def _distance(before: torch.Tensor, after: torch.Tensor) -> float:
    if before.shape != after.shape:
        return float("inf")
    return float((before.double() - after.double()).abs().max())
