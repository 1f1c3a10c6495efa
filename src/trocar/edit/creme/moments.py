"""The second moment of a projection's inputs over ordinary text: what "the least change" is measured with."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trocar.anatomy import Anatomy, fingerprint
from trocar.core.errors import DataError
from trocar.core.progress import track
from trocar.core.workspace import Workspace
from trocar.edit.creme.passing import view_of
from trocar.trace.queries import batch_of, language_tower, prompt_tokens
from trocar.trace.shortcut import Stop, hidden_argument

RIDGE = 0.01  # of the mean diagonal, where there were fewer tokens than inputs and no ridge was asked for


@dataclass(frozen=True, eq=False)
class Moments:
    """sums: block -> sum of k k^T over tokens, (inputs, inputs) float64 on the CPU; tokens: how many; role: `o` or `down`."""

    sums: Mapping[int, torch.Tensor]
    tokens: int
    role: str

    def __add__(self, other: Moments) -> Moments:
        """Of both texts together. Raises DataError if they belong to different places."""
        if self.role != other.role or self.sums.keys() != other.sums.keys():
            raise DataError("Second moments of different blocks or modules cannot be added.", "Take both over the same ones.")
        return Moments({layer: self.sums[layer] + other.sums[layer] for layer in self.sums}, self.tokens + other.tokens, self.role)

    def metric(self, layer: int, ridge: float = RIDGE) -> torch.Tensor:
        """C = mean of k k^T, plus `ridge` times its mean diagonal. Raises DataError for a block that was not measured.

        With fewer tokens than inputs C has no inverse: a ridge of zero is then replaced by 0.01, with a warning.
        """
        if layer not in self.sums:
            raise DataError(f"The second moment of block {layer} was not taken.", f"Taken were {sorted(self.sums)}.")
        moment = self.sums[layer] / self.tokens
        size = len(moment)
        if self.tokens < size and ridge < RIDGE:
            warnings.warn(
                f"block {layer}: {self.tokens} tokens cannot fix a second moment of {size} inputs; ridge {RIDGE} is used.", stacklevel=2
            )
            ridge = RIDGE
        return moment + ridge * moment.diagonal().mean() * torch.eye(size, dtype=moment.dtype)


def second_moment(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    layers: Sequence[int],
    module: Literal["attention", "mlp"] = "attention",
    positions: Literal["all", "last"] = "all",
    length: int = 256,
    batch_size: int = 8,
    folder: str | Path | Workspace | None = None,
) -> Moments:
    """Run `texts` through the model and accumulate the uncentred second moment of the keys of `layers`, over real tokens only.

    positions: `all` tokens of texts, cut into pieces of `length`, or the `last` one of prompts, which are not cut.
    folder: where to keep the result, under the model's fingerprint, the blocks, the texts and the settings; it is read back when all of
    these are equal. Raises DataError for texts without tokens.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    role, layers = "o" if module == "attention" else "down", sorted(set(layers))
    length = length if positions == "all" else sys.maxsize
    pieces = [piece for text in texts if text.strip() for piece in _pieces(tokenizer, text, length)]
    if not pieces:
        raise DataError("There is no text to take a second moment of.", "Give some ordinary text.")
    if folder is None:
        return _measure(anatomy, pieces, layers, role, positions, batch_size)
    work = folder if isinstance(folder, Workspace) else Workspace(folder)
    digest = hashlib.blake2b(repr(pieces).encode(), digest_size=16).hexdigest()
    dtype = str(next(anatomy.model.parameters()).dtype)
    key = {
        "model": fingerprint(anatomy.model),
        "layers": list(layers),
        "texts": digest,
        "role": role,
        "dtype": dtype,
        "positions": positions,
    }

    def compute() -> dict[str, torch.Tensor]:
        found = _measure(anatomy, pieces, layers, role, positions, batch_size)
        return {**{f"L{layer}": value for layer, value in found.sums.items()}, "tokens": torch.tensor(found.tokens)}

    kept = work.tensors(f"second-moment-{module}-{positions}", key, compute)
    return Moments({layer: kept[f"L{layer}"] for layer in layers}, int(kept["tokens"]), role)


def _pieces(tokenizer: Any, text: str, length: int) -> list[tuple[int, ...]]:
    ids = prompt_tokens(tokenizer, text)
    return [ids[start : start + length] for start in range(0, len(ids), length)]


def _measure(
    anatomy: Anatomy, pieces: Sequence[tuple[int, ...]], layers: Sequence[int], role: str, positions: str, batch_size: int
) -> Moments:
    tower, last = language_tower(anatomy), max(layers)
    sums: dict[int, torch.Tensor] = {}
    real: list[torch.Tensor] = []

    def hook(layer: int) -> Any:
        view_of(anatomy, layer, role)

        def reached(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = hidden_argument(args, kwargs)
            keys = given.reshape(-1, given.shape[-1])[real[0].to(given.device)]
            keys = keys if keys.dtype == torch.float64 else keys.float()
            part = (keys.T @ keys).double().cpu()
            sums[layer] = sums[layer] + part if layer in sums else part
            if layer == last:
                raise Stop

        return tower.module(layer, role).register_forward_hook(reached, with_kwargs=True)

    order = sorted(pieces, key=len)  # like lengths together: less padding
    handles: list[Any] = []
    training = anatomy.model.training
    try:
        anatomy.model.eval()
        handles.extend(hook(layer) for layer in layers)
        for start in track(range(0, len(order), batch_size), "second moment", -(-len(order) // batch_size)):
            inputs = batch_of(anatomy, order[start : start + batch_size])
            real[:] = [_wanted(inputs["attention_mask"], positions)]
            try:
                with torch.no_grad():
                    anatomy.model(**inputs, use_cache=False)
            except Stop:
                pass
    finally:
        for handle in handles:
            handle.remove()
        anatomy.model.train(training)
    return Moments({layer: sums[layer] for layer in layers}, len(pieces) if positions == "last" else sum(map(len, pieces)), role)


def _wanted(mask: torch.Tensor, positions: str) -> torch.Tensor:
    """Which of the flattened tokens count. Rows are padded on the left."""
    real = mask.bool()
    if positions == "last":
        real = torch.zeros_like(real)
        real[:, -1] = True
    return real.flatten()
