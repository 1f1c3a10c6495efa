"""Queries, keys and values rounded per token and head while a model runs, the former two turned by a Hadamard matrix first. Floor 3.

The rotation comes after the rotary embedding, with which it does not commute; (q H)(k H)^T = q k^T. What a cache would hold are rounded
keys and values; here the cache keeps them as they are, and they are rounded whenever they are used, which gives the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trocar.anatomy import Tower
from trocar.core.errors import UnsupportedModelError
from trocar.patch.quantised.hadamard import largest_hadamard
from trocar.patch.quantised.numbers import Quantiser, quantised
from trocar.patch.quantised.transform import rotate

_MARK, _PREFIX = "_rounded_heads", "rounded-"


class RoundedHeads:
    """Rounds the heads of one tower from `install` to `remove`, while `on`.

    bits: of queries, keys and values, asymmetric, a grid for every token and head. Works through transformers' table of attention
    functions, on top of the one the model has. layers: the attention modules; calls: how often one of them was rounded. Raises
    UnsupportedModelError for attention that does not ask the table.
    """

    def __init__(self, tower: Tower, bits: int, on: bool = True) -> None:
        self.quantiser, self.on, self.calls = Quantiser(bits=bits), on, 0
        self.layers: list[Any] = []
        self._configs: dict[int, tuple[Any, Any]] = {}
        for layer in range(tower.n_layers):
            found = [module for module in tower.module(layer, "attn").modules() if hasattr(module, "config")]
            if not found:
                path = tower.path(layer, "attn")
                raise UnsupportedModelError(f"{path} does not look its attention function up.", "Leave queries, keys and values in float.")
            self.layers += found

    def install(self) -> None:
        """Idempotent."""
        if self._configs:
            return
        if any(_MARK in module.__dict__ for module in self.layers):
            raise UnsupportedModelError("Queries, keys and values of this model are rounded already.", "Take that back first.")
        for module in self.layers:
            module.__dict__[_MARK] = self
            config = module.config
            if id(config) not in self._configs:
                inner = config._attn_implementation_internal
                if not str(inner).startswith(_PREFIX):
                    config._attn_implementation_internal = _registered(inner or "eager")
                self._configs[id(config)] = (config, inner)

    def remove(self) -> None:
        """The model as it came. Idempotent."""
        for module in self.layers:
            module.__dict__.pop(_MARK, None)
        for config, inner in self._configs.values():
            config._attn_implementation_internal = inner
        self._configs = {}

    @property
    def installed(self) -> bool:
        return bool(self._configs) and all(module.__dict__.get(_MARK) is self for module in self.layers)

    def switch_on(self) -> None:
        """Raises UnsupportedModelError if the model ran and nothing was rounded."""
        if not self.calls:
            raise UnsupportedModelError(
                "The model's attention never passed through the table of attention functions.", "Set attention to null."
            )
        self.on = True

    @contextmanager
    def running(self) -> Iterator[None]:
        """On inside, as before afterwards."""
        before, self.on = self.on, True
        try:
            yield
        finally:
            self.on = before

    def rounded(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, heads, positions, head size) each -> the same, rounded; query and key in the turned basis."""
        self.calls += 1
        straight = torch.is_grad_enabled()
        turn = largest_hadamard(query.shape[-1])
        query, key = (quantised(rotate(x, turn), self.quantiser, straight=straight) for x in (query, key))
        return query, key, quantised(value, self.quantiser, straight=straight)


def _registered(inner: str) -> str:
    """The name under which transformers finds the attention function `inner` with rounding in front, and the mask it needs."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        state = module.__dict__.get(_MARK)
        if state is not None and state.on:
            query, key, value = state.rounded(query, key, value)
        plain = sys.modules[type(module).__module__].eager_attention_forward if inner == "eager" else ALL_ATTENTION_FUNCTIONS[inner]
        return plain(module, query, key, value, *args, **kwargs)

    name = f"{_PREFIX}{inner}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    return name
