"""A model's lower part, computed once: hidden states (and keys and values) to start later passes from. Floor 2."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trocar.anatomy import Anatomy, Tower
from trocar.core.errors import ComponentError, DataError, InterventionError
from trocar.trace.calls import ancestors, holders
from trocar.trace.shortcut import Stop, hidden_argument, starting_at

SEQUENCE = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")  # inputs with one entry per position
PICTURES = ("pixel_values", "bool_masked_pos")
CACHES = ("cache", "past_key_values")
FORBIDDEN = (*CACHES, "output_hidden_states", "output_attentions", "head_mask")


@dataclass(frozen=True, eq=False)
class Captured:
    """What one pass through the lower part left behind."""

    anatomy: Anatomy
    tower: Tower
    inputs: Mapping[str, Any]
    batch: int
    length: int
    hidden: Mapping[int, torch.Tensor]  # block -> its input, (batch, length, width)
    keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]] | None
    tuples: bool  # whether blocks return tuples
    stamps: Mapping[int, Sequence[_Stamp]]  # block -> the parameters that its input depends on
    output: Any = None


@dataclass(frozen=True, eq=False)
class Prefix:
    """The state of a model at the input of block `layer`, for fixed inputs. Made by `capture_prefix`."""

    captured: Captured
    layer: int
    position: int = 0

    @property
    def hidden(self) -> torch.Tensor:
        """The block's input, (batch, length, width), detached."""
        return self.captured.hidden[self.layer]

    def __len__(self) -> int:
        return self.captured.batch

    def run(self, rows: torch.Tensor | Sequence[int] | None = None, repeats: int = 1) -> Any:
        """Run the model from block `layer` on (and from `position` on) and return its output.

        rows: indices of input rows, in any order and as often as wanted; all by default. repeats: how often the chosen rows are stacked
        (row i of repeat k is at k * len(rows) + i). Gradients flow through block `layer` and all above it, not below.
        With `position`, the output has that many positions less, and `L5.heads` and the like keep their absolute positions.

        Raises InterventionError if a parameter below `layer` was changed in place or exchanged since the capture.
        """
        self.check()
        captured, index = self.captured, self._index(rows, repeats)
        hidden = self.hidden[:, self.position :]
        inputs = select_rows(captured.anatomy, captured.inputs, captured.tower, captured.batch, index)
        if index is not None:
            hidden = hidden.index_select(0, index.to(hidden.device))
        if self.position:
            inputs = {name: value[:, self.position :] if name in SEQUENCE else value for name, value in inputs.items()}
            inputs[cache_name(captured.anatomy.model)] = self._cache(index, hidden.shape[0])
            inputs["use_cache"] = True
        elif "use_cache" in inputs:
            inputs["use_cache"] = False
        with starting_at(captured.tower, self.layer, hidden, captured.tuples):
            return captured.anatomy.model(**inputs)

    def check(self) -> None:
        """Raise InterventionError if anything below has changed since the capture. Writing through `.data` goes unseen."""
        for stamp in self.captured.stamps[self.layer]:
            if not stamp.holds():
                raise InterventionError(
                    f"The prefix below block {self.layer} is out of date: {stamp.name} has changed since it was captured.",
                    "Capture it again after changing anything below, or start at a lower layer.",
                )

    def _index(self, rows: torch.Tensor | Sequence[int] | None, repeats: int) -> torch.Tensor | None:
        if rows is None and repeats == 1:
            return None
        index = torch.arange(len(self)) if rows is None else torch.as_tensor(rows, dtype=torch.long).cpu()
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= len(self)):
            raise DataError(f"A row of {index.tolist()} is not in the prefix, which has rows 0 to {len(self) - 1}.")
        return index.repeat(repeats)

    def _cache(self, index: torch.Tensor | None, batch: int) -> DynamicCache:
        """Keys and values left of `position`. Blocks below `layer` never read theirs, but the first one's length says how much was seen."""
        assert self.captured.keys_values is not None
        cache: Any = DynamicCache()
        space: dict[Any, torch.Tensor] = {}
        for layer, (keys, values) in enumerate(self.captured.keys_values):
            pair = [part[:, :, : self.position] for part in (keys, values)]
            if layer < self.layer or self.captured.batch == 1:
                pair = [part[:1].expand(batch, -1, -1, -1) for part in pair]
            elif index is not None:
                pair = [part.index_select(0, index.to(part.device)) for part in pair]
            cache.layers.append(_Left(pair[0], pair[1], space))
        return cache


class _Left(DynamicLayer):
    """A layer's keys and values left of a position; new ones are joined to them for the one pass that is to come.

    Without gradients all layers join in the same memory (`space`), since each is read before the next one is written: taking fresh memory
    for every layer costs as much as the copying.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, space: dict[Any, torch.Tensor]) -> None:
        super().__init__()
        self.keys, self.values, self.space, self.left = keys, values, space, (keys, values)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._join("keys", self.left[0], key_states), self._join("values", self.left[1], value_states)

    def _join(self, name: str, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return torch.cat([past, new], dim=-2)
        length, shape = past.shape[2], (*past.shape[:2], past.shape[2] + new.shape[2], past.shape[3])
        key = (name, shape, new.dtype, new.device)
        if key not in self.space:
            self.space[key] = new.new_empty(shape)
        full = self.space[key]
        full[:, :, :length], full[:, :, length:] = past, new
        return full


def capture_prefix(model: Any, inputs: Mapping[str, Any], layer: int, tower: str | None = None, position: int = 0) -> Prefix:
    """Run `model` on `inputs` up to the input of block `layer`, without gradient, and keep what is needed to go on from there.

    model: a transformers model or its `Anatomy`; inputs: keyword arguments of its forward pass, tensors with rows first; tower: which one,
    for models with several (the others run in full each time, on all their rows). `Prefix.run` calls the model's own forward pass, so
    masks, norms and heads are the model's, for every family, and its output is what the model returns (without a cache). The model's mode
    is kept: in training mode the dropout below `layer` is drawn once.

    position: a causal model's runs start at this column too, with the keys and values left of it from the capture. Only for changes at
    columns from `position` on; the output has only those columns.

    Raises ComponentError for a layer that does not exist, and DataError for inputs that ask for what a shortened pass cannot give.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    if position and (reason := why_no_position(anatomy, anatomy.tower(tower), inputs)):
        raise DataError(f"A prefix cannot start at position {position}: {reason}.", "Leave out position.")
    prefix = Prefix(capture(anatomy, inputs, [layer], tower, cached=position > 0, to_end=position > 0), layer, position)
    if not 0 <= position < prefix.captured.length:
        raise DataError(f"There is no position {position}: the inputs have {prefix.captured.length} columns.")
    return replace(prefix, captured=replace(prefix.captured, output=None))


def why_no_position(anatomy: Any, tower: Tower, inputs: Mapping[str, Any]) -> str:
    """Why passes cannot start in the middle of these inputs; empty if they can."""
    accepts = inspect.signature(type(anatomy.model).forward).parameters
    if not tower.causal or not any(name in accepts for name in CACHES):
        return f"{type(anatomy.model).__name__} has no cache of keys and values"
    given = [name for name, value in inputs.items() if value is not None]
    odd = [name for name in given if name not in (*SEQUENCE, *CACHES, "attention_mask", "use_cache", "logits_to_keep", "return_dict")]
    if odd:
        return f"the input '{odd[0]}' is not known to have one entry per position"
    if anatomy.model.base_model is not anatomy.model and anatomy.model.get_output_embeddings() is None:
        return f"the output of {type(anatomy.model).__name__} is not one vector per position"
    if inputs.get("return_dict") is False or not getattr(anatomy.model.config, "return_dict", True):
        return "its output is a plain tuple"
    if isinstance(inputs.get("logits_to_keep"), torch.Tensor):
        return "logits_to_keep names single positions"
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim != 2:
        return f"an attention mask of {mask.ndim} dimensions cannot be cut"
    return ""


def capture(
    anatomy: Anatomy, inputs: Mapping[str, Any], layers: Sequence[int], tower: str | None = None, cached: bool = False, to_end: bool = False
) -> Captured:
    """Capture the inputs of several blocks in one pass. cached: keep all keys and values; to_end: run to the end and keep the output."""
    chosen = anatomy.tower(tower)
    for layer in layers:
        if not 0 <= layer < chosen.n_layers:
            raise ComponentError(f"There is no block {layer}: the model has blocks 0 to {chosen.n_layers - 1}.")
    for name in FORBIDDEN:
        if inputs.get(name) is not None and inputs[name] is not False:
            raise DataError(f"'{name}' cannot be given to a pass that skips blocks.", "Leave it out; use record to see inside.")
    clean = {name: value for name, value in inputs.items() if value is not None and name not in FORBIDDEN}
    accepts = inspect.signature(type(anatomy.model).forward).parameters
    clean.pop("use_cache", None)
    if chosen.causal and "use_cache" in accepts:
        clean["use_cache"] = cached
    cache: Any = DynamicCache() if cached else None
    hidden: dict[int, torch.Tensor] = {}
    tuples = [False]
    last = max(layers, default=chosen.n_layers)
    called: dict[int, list[torch.nn.Module]] = {}

    def keep(layer: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden[layer] = hidden_argument(args, kwargs).detach()
            called[layer] = list(seen)
            if layer == last and not to_end:
                raise Stop

        return hook

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        tuples[0] = isinstance(output, tuple)

    handles = [chosen.blocks[0].register_forward_hook(note)]
    handles += [chosen.blocks[layer].register_forward_pre_hook(keep(layer), with_kwargs=True) for layer in layers]
    output = None
    try:
        with torch.no_grad(), _modules_called(anatomy, chosen) as seen:
            output = anatomy.model(**clean, **({cache_name(anatomy.model): cache} if cached else {}))
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    first = next(iter(hidden.values()), None)
    batch, length = (first.shape[0], first.shape[1]) if first is not None else (0, 0)
    stamps = {layer: _stamps(anatomy, chosen, layer, modules) for layer, modules in called.items()}
    keys_values = None if cache is None else [(item.keys, item.values) for item in cache.layers]
    return Captured(anatomy, chosen, clean, batch, length, hidden, keys_values, tuples[0], stamps, output)


def cache_name(model: torch.nn.Module) -> str:
    """What the model's forward pass calls its cache; transformers renamed it."""
    accepts = inspect.signature(type(model).forward).parameters
    return next((name for name in CACHES if name in accepts), CACHES[-1])


def independent(anatomy: Anatomy) -> bool:
    """Whether towers do not feed each other (CLIP, SigLIP) but meet at the end; in other models with two towers one reads the other."""
    return len(anatomy.towers) > 1 and hasattr(anatomy.model, "logit_scale")


def select_rows(anatomy: Anatomy, inputs: Mapping[str, Any], tower: Tower, batch: int, index: torch.Tensor | None) -> dict[str, Any]:
    """The inputs of some rows. With independent towers only this tower's inputs are its rows; the others' stay whole."""
    if index is None:
        return dict(inputs)
    chosen = dict(inputs)
    for name, value in inputs.items():
        foreign = independent(anatomy) and (name in PICTURES) != (tower.modality == "vision")
        if isinstance(value, torch.Tensor) and value.ndim and not foreign:
            if value.shape[0] == batch:
                chosen[name] = value.index_select(0, index.to(value.device))
            elif value.shape[0] != 1 or value.ndim > 2:
                raise DataError(
                    f"'{name}' has {value.shape[0]} rows, but the other inputs have {batch}.", "Give every input one entry per row."
                )
    return chosen


@dataclass(frozen=True, eq=False)
class _Stamp:
    """A parameter or buffer as it was: exchanging it, or writing to it in place, changes the stamp."""

    module: torch.nn.Module
    key: str
    name: str
    address: int
    version: int

    def holds(self) -> bool:
        now = self.module._parameters.get(self.key)
        now = self.module._buffers.get(self.key) if now is None else now
        return now is not None and now.data_ptr() == self.address and _version(now) == self.version


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def _modules_called(anatomy: Anatomy, tower: Tower) -> Iterator[list[torch.nn.Module]]:
    """Collect the modules that run, without those of independent towers and those that hold the blocks: their own parameters (CLIP's
    temperature) act above the blocks."""
    others = [other for other in anatomy.towers.values() if other.name != tower.name and independent(anatomy)]
    foreign = {module for other in others for module in ancestors(anatomy, other)[0].modules()}
    foreign |= {anatomy.model.get_submodule(name) for name in holders(tower)}
    seen: list[torch.nn.Module] = []

    def note(module: torch.nn.Module, args: Any) -> None:
        seen.append(module)

    handles = [module.register_forward_pre_hook(note) for module in anatomy.model.modules() if module not in foreign]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _stamps(anatomy: Anatomy, tower: Tower, layer: int, called: Sequence[torch.nn.Module]) -> list[_Stamp]:
    """Stamps of everything that ran before block `layer`, and of all that lies in the blocks below it."""
    below = [module for block in tower.blocks[:layer] for module in block.modules()]
    start = [module for module in called if module is not tower.blocks[layer]]
    names = {module: name for name, module in anatomy.model.named_modules()}
    stamps = []
    for module in dict.fromkeys([*start, *below]):
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                name = f"{names.get(module, type(module).__name__)}.{key}"
                stamps.append(_Stamp(module, key, name, tensor.data_ptr(), _version(tensor)))
    return stamps
