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
TEXTS = 8  # at once: logits of every token of a large vocabulary are the largest thing here
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Verified:
    """What applying the patch did. effect: largest absolute change of an output on the first rows of any role (of texts: after
    each row's last token); parameters: count after."""

    fingerprint: str
    effect: float
    parameters: int


def probes(data: Mapping[str, Examples], given: Mapping[str, Inputs], reads: str) -> dict[str, Inputs]:
    """Model inputs on which a patch is verified: the roles' own, or what a method that reads texts gave (EditError if nothing)."""
    if reads != "texts":
        return {f"data.{role}": examples.take(range(min(ROWS, len(examples)))).inputs for role, examples in data.items()}
    if not given:
        raise EditError("The method made a patch of texts and gave no inputs (Outcome.probes) to verify it on.", "Please report it.")
    return {name: {key: value[:ROWS] for key, value in inputs.items()} for name, inputs in given.items()}


def verify(model: torch.nn.Module, patch: Patch, inputs: Mapping[str, Inputs], base: str) -> Verified:
    """Apply and revert `patch`. inputs: what to run, by a name for messages (see `probes`); base: the model's fingerprint before.

    Raises EditError if the patch has no effect on any example or makes NaN, or if the model is not bit for bit the base again.
    """
    before = {name: _outputs(model, rows) for name, rows in inputs.items()}
    applied = patch.apply(model)
    try:
        state = fingerprint(model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        effects = {name: _distance(before[name], _outputs(model, rows)) for name, rows in inputs.items()}
    finally:
        applied.revert()
    again = fingerprint(model)
    if again != base:
        raise EditError(
            f"Reverting the patch gave {again}, but the base is {base}.", "This is a bug in the method's patch; please report it."
        )
    broken = [name for name, effect in effects.items() if effect != effect]
    if broken:
        raise EditError(f"With the patch the model gives NaN on {broken[0]}.", "The edit diverged; a smaller step may help.")
    effect = max(effects.values(), default=0.0)
    if effect == 0.0:
        raise EditError(
            f"The patch changes no output on any of {', '.join(inputs)}.",
            "The edit did not take; look at the settings of the method, and at the dtype: half precision can round a small change away.",
        )
    return Verified(state, effect, parameters)


def _outputs(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    """The first floating-point output (logits, else hidden states), on the CPU; of texts after each row's last token, that is (n, size)."""
    if "input_ids" not in inputs:
        return _output(model, inputs)
    parts = []
    for start in range(0, len(inputs["input_ids"]), TEXTS):
        rows = {name: value[start : start + TEXTS] for name, value in inputs.items()}
        out = _output(model, rows)
        mask = rows.get("attention_mask", torch.ones_like(rows["input_ids"])).cpu()
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        parts.append(out[torch.arange(len(out)), last] if out.ndim == 3 and out.shape[:2] == mask.shape else out)
    return torch.cat(parts)


def _output(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    with evaluating(model):
        out = model(**place(inputs, model))
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
