"""Attention heads: what they carry on average, and what each of them does to an answer. Floor 3.

The causal indirect effect of a head is the change of an answer's probability when the head's activation at the prompt's last token (its
part of the input of the attention's output projection) is replaced, one head at a time: by its mean over other prompts (function vectors,
arXiv:2310.15213; translation heads, arXiv:2410.07054), by its own activation in another run (activation patching), or by nothing. Only the
last position changes, so all heads of all layers are rows of a few short passes that start from one cached prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from trocar.anatomy import Anatomy, Component, Head, fingerprint
from trocar.core.errors import DataError, nearest
from trocar.locate.scores import How, Scores
from trocar.trace import Add, Intervention, Point, Replace, Scale, SweepReport, intervene, record, sweep
from trocar.trace.prefix import Prefix, capture, select_rows, why_no_position
from trocar.trace.queries import Asked, batch_of, only_last

Prompts = Asked | Mapping[str, Any] | Sequence[Sequence[int]]
HeadValues = torch.Tensor | Sequence[torch.Tensor]
Operation = Literal["replace", "add", "scale"]
OPERATIONS: dict[str, type[Intervention]] = {"replace": Replace, "add": Add, "scale": Scale}


@dataclass(frozen=True, eq=False)
class HeadEffects:
    """What each head does to each prompt's answer: probability with the head changed, minus the probability without.

    heads: the columns; values: (prompts, heads) float64; before: (prompts,) the unchanged probabilities; scores: the mean over prompts.
    """

    heads: tuple[Head, ...]
    values: np.ndarray
    before: np.ndarray
    how: How

    @cached_property
    def scores(self) -> Scores:
        found = dict(zip(self.heads, self.values.mean(0).tolist(), strict=True))
        return Scores("head", self.heads[0].tower, found, self.how, partial=True)


def last_heads(model: Any, prompts: Prompts, batch_size: int = 32) -> HeadValues:
    """Every prompt's head activations at its last token: (layers, prompts, heads, head_size) on the model's device and in its dtype.

    model: a decoder or its `Anatomy`. prompts: an `Asked`, left-padded inputs, or rows of token ids. If layers differ in their number of
    heads, a list of one tensor a layer; `[layer]` means the same in both. As `values` of `head_effects` on equally many prompts they patch
    every prompt's heads with those of another run.
    """
    anatomy = decoder(model)
    kept: list[torch.Tensor | None] = [None] * anatomy.tower().n_layers
    total = _number(prompts)
    for rows, layers in _recorded(anatomy, prompts, batch_size):
        for layer, found in enumerate(layers):
            if kept[layer] is None:
                kept[layer] = found.new_empty(total, *found.shape[1:])
            kept[layer][rows.to(found.device)] = found  # type: ignore[index]
    return _stacked([layer for layer in kept if layer is not None])


def mean_heads(model: Any, prompts: Prompts, batch_size: int = 32) -> HeadValues:
    """The mean over prompts of every head's activation at the last token: (layers, heads, head_size), summed in double precision.

    Arguments, device and dtype as for `last_heads`; nothing is kept but the sums. The published number of prompts is 1000 of 10 examples
    each (arXiv:2410.07054, reference code).
    """
    sums: list[torch.Tensor] = []
    dtype = torch.float32
    for _, layers in _recorded(decoder(model), prompts, batch_size):
        part = [found.to("cpu", torch.float64).sum(0) for found in layers]  # not every accelerator has double precision
        sums = part if not sums else [a + b for a, b in zip(sums, part, strict=True)]
        dtype, device = layers[0].dtype, layers[0].device
    return _stacked([(layer / _number(prompts)).to(device, dtype) for layer in sums])


def head_effects(
    model: Any,
    prompts: Prompts,
    tokens: Sequence[int] | torch.Tensor | None,
    values: HeadValues | float,
    *,
    operation: Operation = "replace",
    heads: Sequence[Head | str | Component] | None = None,
    batch_size: int = 64,
    how: How | None = None,
    tell: Callable[[SweepReport], None] | None = None,
) -> HeadEffects:
    """Change one head at a time at each prompt's last token, and see what becomes of the probability of its answer.

    model: a decoder in evaluation mode, or its `Anatomy`; its parameters are not touched. prompts: an `Asked` (its answers and its mode
    count, `tokens` is None then), left-padded inputs, or rows of token ids. tokens: the answers' first tokens, (prompts,).
    values: what the heads become (`replace`), get added (`add`) or are multiplied by (`scale`): one number, `mean_heads` (the same for
    all prompts), or `last_heads` of equally many prompts (row r for prompt r). operation="scale" with 0 switches heads off.
    heads: which ones, all by default. batch_size: rows per pass. tell: gets the sweep's report. how: where the scores say they come from;
    by default method, settings and the fingerprint of the model, which is hashed for it.

    Raises DataError for prompts, tokens or values that do not fit, and ComponentError for a head that the model does not have.
    """
    anatomy = decoder(model)
    asked = asked_of(anatomy, prompts, tokens)
    chosen = _chosen(anatomy, heads)
    layers = _fitting(anatomy, values, len(asked))
    where: Any = "last" if asked.read == "last" else asked.end()
    change = _operation(operation)
    sets: list[list[Intervention]] = [[]]  # the unchanged model comes first
    sets += [[change(head, _of_head(layers, head), where)] for head in chosen]
    with running(anatomy, grad=False):
        scores = sweep(anatomy, asked.inputs, sets, asked.metric, batch_size=batch_size, read=asked.read, tell=tell)
    found = scores.double().numpy()
    how = _how(anatomy, "head effects", operation, asked) if how is None else how
    return HeadEffects(chosen, (found[1:] - found[0]).T, found[0], how)


def head_estimates(
    model: Any,
    prompts: Prompts,
    tokens: Sequence[int] | torch.Tensor | None,
    values: HeadValues | float,
    *,
    operation: Operation = "replace",
    heads: Sequence[Head | str | Component] | None = None,
    batch_size: int = 32,
    how: How | None = None,
) -> HeadEffects:
    """`head_effects` to first order (attribution patching): change of the activation times gradient, one backward pass for all heads.

    Arguments as for `head_effects`. Good for ranking many heads before the best are evaluated exactly; not exact where a change is large.
    """
    anatomy = decoder(model)
    asked = asked_of(anatomy, prompts, tokens)
    chosen = _chosen(anatomy, heads)
    layers = _fitting(anatomy, values, len(asked))
    _operation(operation)
    tower = anatomy.tower()
    points = [Point("heads", layer, tower.name) for layer in range(tower.n_layers)]
    effects, before = np.zeros((len(asked), len(chosen))), np.zeros(len(asked))
    for rows in torch.arange(len(asked)).split(batch_size):
        with running(anatomy, grad=True):
            inputs = select_rows(anatomy, prepared(anatomy, asked.inputs, asked.read), tower, len(asked), rows)
            ends = [asked.end()[row] for row in rows.tolist()]
            first = 0 if why_no_position(anatomy, tower, inputs) else inputs["input_ids"].shape[1] + min(end for (end,) in ends)
            captured = capture(anatomy, inputs, [0], tower.name, cached=first > 0, to_end=first > 0)
            like = captured.hidden[0]
            shifts = [like.new_zeros(len(rows), tower.heads(n), tower.head_size(n)).requires_grad_() for n in range(tower.n_layers)]
            adds = [Add(point, shift, ends) for point, shift in zip(points, shifts, strict=True)]
            with intervene(anatomy, adds), record(anatomy, points, ends) as seen:
                answers = asked.metric(Prefix(captured, 0, first).run(), rows)
            slopes = torch.autograd.grad(answers.sum(), shifts)
        before[rows.numpy()] = answers.detach().double().cpu().numpy()
        for place, head in enumerate(chosen):
            now = seen[points[head.layer]][:, 0, head.index].detach()
            value = _of_head(layers, head)
            value = value[rows.to(value.device)] if isinstance(value, torch.Tensor) and value.ndim == 2 else value
            change = {"replace": value - now, "add": value + torch.zeros_like(now), "scale": (value - 1) * now}[operation]
            effects[rows.numpy(), place] = (change * slopes[head.layer][:, head.index]).double().sum(-1).cpu().numpy()
    how = _how(anatomy, "head effects to first order", operation, asked) if how is None else how
    return HeadEffects(chosen, effects, before, how)


# -- shared with neurons ----------------------------------------------------------------------------------------------------------------


def asked_of(anatomy: Anatomy, prompts: Prompts, tokens: Sequence[int] | torch.Tensor | None) -> Asked:
    """Prompts with their answers in one form. Raises DataError for both or neither of two sources of answers, and unequal numbers."""
    if isinstance(prompts, Asked):
        if tokens is not None:
            raise DataError("The prompts bring their answers along, and tokens name others.", "Leave out one of them.")
        return prompts
    if tokens is None:
        raise DataError("There are no answers.", "Give each prompt's answer token, or an Asked made by trocar.trace.queries.ask.")
    inputs = dict(prompts) if isinstance(prompts, Mapping) else batch_of(anatomy, prompts)
    answers = [int(token) for token in torch.as_tensor(tokens).tolist()]
    if len(answers) != len(inputs["input_ids"]):
        raise DataError(f"{len(inputs['input_ids'])} prompts and {len(answers)} answers cannot be paired.", "Give one answer a prompt.")
    check_tokens(anatomy, answers)
    return Asked(inputs, tuple((token,) for token in answers), "first")


def check_tokens(anatomy: Anatomy, tokens: Sequence[int]) -> None:
    size = anatomy.model.get_output_embeddings().weight.shape[0]
    wrong = [token for token in tokens if not 0 <= token < size]
    if wrong:
        raise DataError(f"Token {wrong[0]} is not one of the model's {size}.", f"Token ids lie in 0..{size - 1}.")


def prepared(anatomy: Anatomy, inputs: Mapping[str, Any], read: str) -> dict[str, Any]:
    """Inputs for a pass of which only some logits count. Copies, since tensors made under inference_mode cannot be differentiated past."""
    full = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    mask = full.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        raise DataError("The prompts are padded on the right.", "Pad on the left.")
    return full | (only_last(anatomy.model, 1) if read == "last" else {})


@contextmanager
def running(anatomy: Anatomy, grad: bool) -> Iterator[None]:
    """Inside, gradients are computed or not as said here, whatever the caller has switched off, and the model is known to allow it."""
    if anatomy.model.training:
        raise DataError("The model is in training mode, and dropout would decide the result.", "Call model.eval() first.")
    if grad and any(parameter.is_inference() for parameter in anatomy.model.parameters()):
        raise DataError("The model was made under torch.inference_mode and has no gradients.", "Load it outside of that context.")
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


# -- parts ------------------------------------------------------------------------------------------------------------------------------


def decoder(model: Any) -> Anatomy:
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    if not anatomy.tower().causal or anatomy.model.get_output_embeddings() is None:
        raise DataError(f"{type(anatomy.model).__name__} does not predict next tokens.", "Use a causal language model.")
    return anatomy


def _number(prompts: Prompts) -> int:
    return len(prompts["input_ids"]) if isinstance(prompts, Mapping) else len(prompts)


def _recorded(anatomy: Anatomy, prompts: Prompts, batch_size: int) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """(rows, one (rows, heads, head_size) a layer) for batches of prompts; rows of ids of like length come together."""
    tower = anatomy.tower()
    points = [Point("heads", layer, tower.name) for layer in range(tower.n_layers)]
    if not _number(prompts):
        raise DataError("There are no prompts.", "Give at least one.")
    order = torch.arange(_number(prompts))
    listed = not isinstance(prompts, Asked | Mapping)
    if listed:
        order = torch.tensor(sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row)))
    for rows in order.split(batch_size):
        if listed:
            inputs, where = batch_of(anatomy, [prompts[row] for row in rows.tolist()]), "last"  # type: ignore[index]
        else:
            whole: Any = prompts.inputs if isinstance(prompts, Asked) else prompts
            inputs = select_rows(anatomy, whole, tower, len(order), rows)
            where = [prompts.end()[row] for row in rows.tolist()] if isinstance(prompts, Asked) else "last"
        with running(anatomy, grad=False), record(anatomy, points, where) as seen:
            anatomy.model(**prepared(anatomy, inputs, "last"), use_cache=False)
        yield rows, [seen[point][:, 0] for point in points]


def _stacked(layers: list[torch.Tensor]) -> HeadValues:
    return torch.stack(layers) if len({layer.shape for layer in layers}) == 1 else layers


def _chosen(anatomy: Anatomy, heads: Sequence[Head | str | Component] | None) -> tuple[Head, ...]:
    found = anatomy.components(Head) if heads is None else [anatomy.check(head) for head in heads]
    if not found or not all(isinstance(head, Head) for head in found):
        raise DataError(f"{heads!r} are not heads.", "Name heads of this model, for example ['L5.H3'].")
    return tuple(dict.fromkeys(found))  # type: ignore[arg-type]


def _operation(name: str) -> type[Intervention]:
    if name not in OPERATIONS:
        raise DataError(f"'{name}' is not something to do to a head.", nearest(name, OPERATIONS))
    return OPERATIONS[name]


def _fitting(anatomy: Anatomy, values: HeadValues | float, rows: int) -> list[torch.Tensor] | float:
    """One tensor a layer, (heads, head_size) or (rows, heads, head_size), in the model's dtype and on its device."""
    if isinstance(values, int | float):
        return float(values)
    tower = anatomy.tower()
    shapes = [(tower.heads(layer), tower.head_size(layer)) for layer in range(tower.n_layers)]
    given = [tuple(layer.shape) for layer in values]
    if len(given) != len(shapes) or any(have not in (want, (rows, *want)) for have, want in zip(given, shapes, strict=True)):
        raise DataError(
            f"The head values have {len(given)} layers, the first of shape {given[0] if given else ()}; the model has {len(shapes)} of "
            f"{shapes[0]}, and there are {rows} prompts.",
            "Make them with mean_heads, or with last_heads on equally many prompts.",
        )
    like = next(parameter for parameter in anatomy.model.parameters() if parameter.is_floating_point())
    return [layer.detach().to(like.device, like.dtype) for layer in values]


def _of_head(layers: list[torch.Tensor] | float, head: Head) -> torch.Tensor | float:
    """(head_size,), (rows, head_size), or the number."""
    return layers[head.layer][..., head.index, :] if isinstance(layers, list) else layers


def _how(anatomy: Anatomy, method: str, operation: str, asked: Asked) -> How:
    settings = {"operation": operation, "prompts": len(asked), "answer": asked.mode, "position": "last"}
    return How(method, settings=settings, fingerprint=fingerprint(anatomy.model))


__all__ = ["HeadEffects", "HeadValues", "Prompts", "head_effects", "head_estimates", "last_heads", "mean_heads"]
