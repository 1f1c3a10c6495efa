"""One forward pass in which a model is edited as it runs, without its weights being touched.

An edit of block l changes what every later block sees, so a plain loop runs the whole model again for every layer. Here the pass stops
at each edited projection: its input gives the keys, its output the values, the update is found, and the pass goes on with what the
edited projection would have returned. One pass, up to the last edited block, makes the whole edit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trocar.anatomy import Anatomy, Linear
from trocar.anatomy.linear import LinearView, base_layer
from trocar.core.errors import UnsupportedModelError
from trocar.patch.ops.low_rank import updated
from trocar.trace.queries import encode, language_tower
from trocar.trace.shortcut import Stop, hidden_argument


@dataclass(frozen=True)
class Here:
    """An edited projection as the pass reaches it. keys: (rows, inputs), values: (rows, outputs) at each row's last token, in the
    activations' dtype; weight: the current (outputs, inputs) matrix in at least float32; plain: no adapter is wrapped around it."""

    layer: int
    view: LinearView
    keys: torch.Tensor
    values: torch.Tensor
    weight: torch.Tensor
    plain: bool


Factors = tuple[torch.Tensor, torch.Tensor]  # left (outputs, r), right (r, inputs)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def view_of(anatomy: Anatomy, layer: int, role: str) -> LinearView:
    """The projection `role` (`o` or `down`) of a block of the text tower. Raises UnsupportedModelError where its weights are not there."""
    tower = language_tower(anatomy)
    view = anatomy.linear(Linear(layer, "o" if role == "o" else "down", tower.name))
    if view.parameter.device.type == "meta":
        raise UnsupportedModelError(f"{view.path} is on the meta device: its weights are offloaded or not loaded.", "Load the model whole.")
    return view


def edited_pass(
    anatomy: Anatomy,
    tokenizer: Any,
    prompts: Sequence[str],
    role: str,
    weights: Mapping[int, torch.Tensor],
    layers: Sequence[int],
    edit: Callable[[Here], Factors | None],
    original: Sequence[int] = (),
) -> dict[int, torch.Tensor]:
    """Run `prompts` once through the blocks up to the last of `layers`; `edit` is called at each and gives the update's factors.

    weights: parameters of `layers` as earlier edits left them (in their own storage and dtype), by block; original: rows that go through
    the unedited model. Returns the edited parameters, by block. The model is not written to; hooks are removed on every way out.
    """
    tower = language_tower(anatomy)
    rows, last = len(prompts), max(layers)
    inputs = encode(anatomy, tokenizer, prompts)
    edited = torch.ones(rows, 1, 1, dtype=torch.bool)
    edited[list(original)] = False
    result = dict(weights)

    def hook(layer: int) -> Any:
        view = view_of(anatomy, layer, role)
        base = view.parameter.detach()

        def reached(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            flat_in = hidden_argument(args, kwargs)
            flat_out = output[0] if isinstance(output, tuple) else output
            given = flat_in.reshape(rows, -1, flat_in.shape[-1])
            made = flat_out.reshape(rows, -1, flat_out.shape[-1])
            kind = wide(base.dtype)
            now = result.get(layer, base)
            if layer in result:
                made = _moved(made, given, now, base, view, edited)
            matrix = (now.T if view.transposed else now).to(kind)
            factors = edit(Here(layer, view, given[:, -1], made[:, -1], matrix, base_layer(view.module) is view.module))
            if factors is not None:
                new = updated(now, factors[1].to(kind), factors[0].to(kind), 1.0, view.transposed)
                made = _moved(made, given, new, now, view, edited)
                result[layer] = new
            if layer == last:
                raise Stop
            made = made.reshape(flat_out.shape)
            return (made, *output[1:]) if isinstance(output, tuple) else made

        return tower.module(layer, role).register_forward_hook(reached, with_kwargs=True)

    handles: list[Any] = []
    try:
        handles.extend(hook(layer) for layer in layers)
        with torch.no_grad():
            anatomy.model(**inputs, use_cache=False)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return result


def _moved(
    made: torch.Tensor, given: torch.Tensor, new: torch.Tensor, old: torch.Tensor, view: LinearView, edited: torch.Tensor
) -> torch.Tensor:
    """The projection's output with the weight `new` in place of `old`, in the edited rows."""
    kind = wide(old.dtype)
    delta = new.to(kind) - old.to(kind)
    moved = made.to(kind) + torch.nn.functional.linear(given.to(kind), delta.T if view.transposed else delta)
    return torch.where(edited.to(made.device), moved.to(made.dtype), made)
