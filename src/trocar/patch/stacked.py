"""Weights of experts, which a model holds stacked and a checkpoint one by one: found, put together, changed, cut up again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trocar.core.errors import PatchBaseError
from trocar.patch.checkpoint import Entry, is_stacked, read_tensor, spellings

Places = Mapping[str, tuple[Path, Entry]]
KEPT = 2  # stacks that are held at once: gate_up and down of one block, whose parts lie side by side in a file


def expert_keys(model: Any) -> dict[str, list[list[str]]]:
    """Stacked parameter -> for each expert the names under which transformers saves its parts, whose rows follow one another.

    Empty if that cannot be found out. Transformers' own conversion is run on small stacks of numbers, which then say where they went.
    """
    stacks = {name: parameter.shape[0] for name, parameter in model.named_parameters() if is_stacked(name, parameter)}
    if not stacks:
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion

        marks, start = {}, 0
        for name, count in stacks.items():
            marks[name] = torch.arange(start, start + 2 * count, dtype=torch.float64).reshape(count, 2, 1)
            start += 2 * count
        owner = {float(number): (name, index) for name, mark in marks.items() for index, number in enumerate(mark.flatten().tolist())}
        renamed = revert_weight_conversion(model, {name: mark.clone() for name, mark in marks.items()})
        found: dict[str, dict[int, str]] = {}
        for key, mark in renamed.items():
            name, index = owner[float(mark.flatten()[0])]
            found.setdefault(name, {})[index] = key
    except Exception:  # an inner function of transformers: without it stacks are looked for under their own names only
        return {}
    return {
        name: [[key for index, key in sorted(found[name].items()) if index // 2 == expert] for expert in range(count)]
        for name, count in stacks.items()
        if len(found.get(name, {})) >= count > 1
    }


def spelt(model: Any, keys: Sequence[Sequence[str]], known: Mapping[str, Any]) -> list[list[str]] | None:
    """The names as a checkpoint spells them, None if it lacks one."""
    found = [[next((one for one in spellings(model, key) if one in known), "") for key in parts] for parts in keys]
    return found if all(key for parts in found for key in parts) and all(found) else None


def read_stack(keys: Sequence[Sequence[str]], places: Places) -> torch.Tensor:
    """A stacked parameter from its parts."""
    return torch.stack([torch.cat([read_tensor(*places[key]) for key in parts]) for parts in keys])


class Stacks:
    """Stacked parameters of a checkpoint as they are after a patch. keys: parameter -> names of its parts; change: what the patch does to a
    parameter in place."""

    def __init__(self, keys: Mapping[str, list[list[str]]], places: Places, change: Callable[[str, torch.Tensor], None]) -> None:
        self.keys, self.places, self.change = keys, places, change
        self.owner = {
            key: (name, expert, number)
            for name, parts_of in keys.items()
            for expert, parts in enumerate(parts_of)
            for number, key in enumerate(parts)
        }
        self._held: dict[str, torch.Tensor] = {}

    def check(self, name: str, digest: str | None) -> None:
        """Raise PatchBaseError unless the parameter is the base's."""
        from trocar.anatomy import tensor_fingerprint

        if digest is not None and tensor_fingerprint(read_stack(self.keys[name], self.places)) != digest:
            raise PatchBaseError(f"The checkpoint's experts are not the base's {name}.", "Give the checkpoint that the patch was made for.")

    def part(self, key: str) -> torch.Tensor:
        """The new values of one of the checkpoint's tensors."""
        name, expert, number = self.owner[key]
        if name not in self._held:
            while len(self._held) >= KEPT:
                self._held.pop(next(iter(self._held)))
            stack = read_stack(self.keys[name], self.places)
            self.change(name, stack)
            self._held[name] = stack
        sizes = [self.places[one][1].shape[0] for one in self.keys[name][expert]]
        return self._held[name][expert].split(sizes)[number].contiguous()
