"""What is done to the located parts, as operations of a patch.

Heads get their mean activation added, at the newest position of every step (`last+generated`: the last prompt token, then every generated
one), where the published interventions act. Neurons are scaled: `Gate` in the weights, for good and at all positions, or `ScaleAt` while
the model runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from trocar.anatomy import Anatomy, Head, Linear, Neuron
from trocar.core.errors import DataError, EditError, nearest
from trocar.core.seeds import derive
from trocar.locate import Scores
from trocar.patch import AddVector, Gate, Op, ScaleAt

Where = Literal["last", "generated", "last+generated", "all"]
PLACES = ("last", "generated", "last+generated", "all")
LARGE = 0.05  # share of a layer above which damage is to be expected
DEPTH = 11 / 32  # of the function vector: after block 11 of 32 (reference code)

Chosen = Scores | Iterable[Any]
Means = torch.Tensor | Sequence[torch.Tensor]


def members(model: Any, chosen: Chosen, kind: type) -> list[Any]:
    """The chosen heads or neurons as components, checked against the model, sorted, without duplicates.

    chosen: a mask, or components or their names. Raises ComponentError naming the valid range, EditError for another kind.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    if isinstance(chosen, Scores):
        names: list[Any] = list(chosen.open_names())  # ScoresError unless it is a mask
    else:
        names = list(chosen)
    found: list[Any] = sorted({anatomy.check(name) for name in names})
    for component in found:
        if not isinstance(component, kind):
            raise EditError(f"{component} is not a {kind.__name__.lower()}.", f"Name {kind.__name__.lower()}s here.")
    return found


def place(positions: str) -> str | None:
    """Positions as the patch room writes them. Raises EditError for another word."""
    if positions not in PLACES:
        raise EditError(f"positions='{positions}' has no meaning here.", nearest(positions, PLACES))
    return None if positions == "all" else positions


def heads_add(model: Any, heads: Chosen, means: Means, strength: float = 1.0, positions: str = "last+generated") -> list[Op]:
    """Add `strength` times their mean activation to heads: one AddVector a layer, none if there are no heads or the strength is 0.

    means: (layers, heads, head_size), of the direction that is translated. Raises ComponentError, EditError, DataError.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    where, found = place(positions), members(anatomy, heads, Head)
    _warn(anatomy, found, "heads")
    if not strength:
        return []
    ops: list[Op] = []
    for layer in dict.fromkeys(head.layer for head in found):
        mean = _mean(anatomy, means, layer)
        vector = torch.zeros_like(mean)
        for head in found:
            if head.layer == layer:
                vector[head.index] = strength * mean[head.index]
        if bool(vector.any()):
            ops.append(AddVector(f"L{layer}.heads", vector.flatten(), where))
    return ops


def heads_replace(model: Any, heads: Chosen, means: Means, strength: float = 1.0, positions: str = "last+generated") -> list[Op]:
    """Move heads towards their mean activation, (1 - strength) z + strength zbar: at 1 they are replaced by it, the change by which heads
    are located. None if there are no heads or the strength is 0. Arguments and errors as for `heads_add`."""
    found, adds = members(model, heads, Head), heads_add(model, heads, means, strength, positions)
    return [ScaleAt(dict.fromkeys(map(str, found), 1.0 - strength), place(positions)), *adds] if found and strength else []


def function_vector(model: Any, heads: Chosen, means: Means) -> torch.Tensor:
    """MT-FV: what the heads' mean activations add to the residual stream, summed, (width,): W_O of each head times its mean."""
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    total = torch.zeros(anatomy.tower().width, dtype=torch.float64)
    for head in members(anatomy, heads, Head):
        size = anatomy.tower().head_size(head.layer)
        weight = anatomy.linear(Linear(head.layer, "o")).get()[:, head.index * size : (head.index + 1) * size]
        total += weight.detach().cpu().double() @ _mean(anatomy, means, head.layer)[head.index].double()
    return total.float()


def vector_add(
    model: Any, heads: Chosen, means: Means, strength: float = 1.0, layer: int | None = None, positions: str = "last+generated"
) -> list[Op]:
    """The direct use of function vectors: MT-FV added after one block (`layer`, 0-based; default depth 11/32, as published)."""
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    where, n_layers = place(positions), anatomy.tower().n_layers
    layer = int(DEPTH * n_layers) if layer is None else layer
    if not 0 <= layer < n_layers:
        raise EditError(f"There is no block {layer} to add the vector after.", f"Blocks run from 0 to {n_layers - 1}.")
    vector = strength * function_vector(anatomy, heads, means)
    return [AddVector(f"L{layer}.resid_post", vector, where)] if bool(vector.any()) else []


def neurons_scale(model: Any, factors: Mapping[Any, float], positions: str = "last+generated", permanent: bool = False) -> list[Op]:
    """Scale neurons: `Gate` (weights, all positions) if permanent, else `ScaleAt`. Factors of 1 are left out; nothing left is no operation.

    factors: neuron -> 0 (suppress), 2 (enhance), or anything between. Raises ComponentError, EditError.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    where = place(positions)
    found = {anatomy.check(name): float(factor) for name, factor in factors.items()}
    members(anatomy, found, Neuron)
    _warn(anatomy, sorted(found), "neurons")
    left = {str(neuron): factor for neuron, factor in found.items() if factor != 1.0}
    if not left:
        return []
    if permanent and where is not None and positions != "last+generated":
        raise EditError(f"Weights act at all positions, not at '{positions}'.", "Leave positions out, or permanent off.")
    return [Gate(left)] if permanent else [ScaleAt(left, where)]


def factors(model: Any, suppress: Chosen = (), enhance: Chosen = (), off: float = 0.0, on: float = 2.0) -> dict[Any, float]:
    """Neuron -> factor from a set to suppress and one to enhance. Raises EditError for a neuron that is in both."""
    down, up = members(model, suppress, Neuron), members(model, enhance, Neuron)
    if both := sorted(set(down) & set(up)):
        more = f" (and {len(both) - 1} more)" if len(both) > 1 else ""
        raise EditError(f"{both[0]}{more} is to be suppressed and enhanced.", "Take it out of one of the sets.")
    return dict.fromkeys(down, off) | dict.fromkeys(up, on)


def random_like(model: Any, chosen: Chosen, kind: type, seed: int, without: Chosen = ()) -> list[Any]:
    """As many components in the same layers, drawn from those that are not chosen (and not in `without`): the control of every claim.

    Where a layer has too few left, the missing ones are drawn from the other layers. Raises DataError if the model has too few.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    found = members(anatomy, chosen, kind)
    taken, rng = {*found, *members(anatomy, without, kind)}, np.random.default_rng(derive(seed, "random", kind.__name__))
    drawn: list[Any] = []
    for layer in dict.fromkeys(one.layer for one in found):
        able = [one for one in anatomy.components(kind) if one.layer == layer and one not in taken]
        wanted = sum(one.layer == layer for one in found)
        drawn += [able[row] for row in rng.choice(len(able), min(wanted, len(able)), replace=False).tolist()]
    able = [one for one in anatomy.components(kind) if one not in taken and one not in drawn]
    missing = len(found) - len(drawn)
    if missing > len(able):
        raise DataError(f"The model has only {len(able)} {kind.__name__.lower()}s left to draw {missing} from.", "Locate fewer.")
    drawn += [able[row] for row in rng.choice(len(able), missing, replace=False).tolist()] if missing else []
    return sorted(drawn)


def _mean(anatomy: Anatomy, means: Means, layer: int) -> torch.Tensor:
    """One layer's means, (heads, head_size), float32 on the CPU. Raises DataError for another shape."""
    tower = anatomy.tower()
    wanted = (tower.heads(layer), tower.head_size(layer))
    if len(means) != tower.n_layers or tuple(means[layer].shape) != wanted:
        raise DataError(
            f"The means hold {len(means)} layers of {tuple(means[min(layer, len(means) - 1)].shape)}.",
            f"Layer {layer} of {tower.n_layers} needs {wanted}.",
        )
    return means[layer].detach().cpu().float()


def _warn(anatomy: Anatomy, found: Sequence[Any], what: str) -> None:
    """Say so where a set is a large part of a layer. Of heads, one is always allowed."""
    tower = anatomy.tower()
    for layer in dict.fromkeys(one.layer for one in found):
        count = sum(one.layer == layer for one in found)
        size = tower.heads(layer) if what == "heads" else tower.neurons(layer)
        if count > max(1, LARGE * size) and (what != "heads" or count > size / 2):
            warnings.warn(f"{count} of the {size} {what} of layer {layer} are changed; expect damage.", stacklevel=3)
