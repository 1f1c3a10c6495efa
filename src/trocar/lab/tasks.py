"""Tasks for adapters, made from a base model's own data: pictures seen differently, and clients that hold uneven shares of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from trocar.core.errors import DataError, nearest
from trocar.core.seeds import derive
from trocar.lab.worlds import FIRST_HOPS, make_world
from trocar.method import Examples

Change = Callable[[torch.Tensor], torch.Tensor]

# what happens to pixels in [0, 1], (n, 3, height, width)
SHIFTS: Mapping[str, Change] = {
    "brighter": lambda x: 0.8 * x + 0.3,
    "inverted": lambda x: 1 - x,
    "turned": lambda x: x.rot90(1, (2, 3)),
    "recoloured": lambda x: x[:, [2, 0, 1]],  # red, green and blue change places
    "grey": lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1),
    "blurred": lambda x: torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1),
}


def shifted(examples: Examples, kind: str, mean: float = 0.5, std: float = 0.5) -> Examples:
    """The same pictures under a shift of `SHIFTS`, which the base model has never seen; labels stay.

    mean, std: with which the processor normalised (those of the lab's models). Raises DataError for an unknown shift, or rows without
    pixels.
    """
    if kind not in SHIFTS:
        raise DataError(f"There is no shift '{kind}'.", nearest(kind, SHIFTS))
    if "pixel_values" not in examples.inputs:
        raise DataError("Only pictures can be shifted, and these rows have no pixel_values.")
    pixels = SHIFTS[kind](examples.inputs["pixel_values"] * std + mean)
    return replace(examples, inputs={**examples.inputs, "pixel_values": ((pixels - mean) / std).contiguous()}, pictures=None)


def shards(examples: Examples, clients: int, alpha: float = 0.5, seed: int = 0) -> list[Examples]:
    """Split labelled rows over clients with uneven classes: each class is dealt by shares from a symmetric Dirichlet(alpha).

    The smaller alpha, the more uneven; every row goes to one client. Raises DataError without labels, or if a client would get nothing.
    """
    if examples.labels is None:
        raise DataError("Rows are dealt to clients by their labels, and these have none.")
    random = np.random.default_rng(derive(seed, "shards"))
    hands: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(set(examples.labels.tolist())):
        rows = random.permutation(np.flatnonzero(examples.labels.numpy() == label))
        cuts = np.cumsum(random.dirichlet([alpha] * clients))[:-1] * len(rows)
        for hand, part in zip(hands, np.split(rows, np.round(cuts).astype(int)), strict=True):
            hand.extend(part.tolist())
    if not all(hands):
        raise DataError(f"{len(examples)} rows leave one of {clients} clients without any.", "Use fewer clients, or a larger alpha.")
    return [examples.take(sorted(hand)) for hand in hands]


def new_forms(seed: int = 0) -> dict[str, Examples]:
    """Questions about a knowledge world (`trocar.lab.worlds`) in a form that its text does not have: `Ada Lark country is`.

    One task for every first relation, one row for every person, columns `prompt` and `answer`: the model has the knowledge and has to learn
    the form.
    """
    world = make_world(seed)
    found = {}
    for hop, (kind, _, _) in FIRST_HOPS.items():
        people = list(world.people)
        fields = {"prompt": [f"{person} {kind} is" for person in people], "answer": [world.first[hop][person] for person in people]}
        found[hop] = Examples({}, tuple(f"{hop} {person}" for person in people), None, None, fields)
    return found
