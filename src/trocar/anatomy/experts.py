"""A block's mixture of experts as a whole: its stacked weights, its router, and who else reads its input. Floor 1.

Experts have no single row of neurons, so no component names a part of them; what works on them asks for `Anatomy.of(model, experts=True)`
and takes them as matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trocar.core.errors import UnsupportedModelError

EXPERTS = "experts"
SHARED = ("shared_up", "shared_gate", "shared_down")  # an expert that every token passes, beside those that are chosen
BESIDE = ("router", "shared_switch")  # read the experts' input with a matrix of their own, and stay as they are

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_FORM = "Supported are stacked weights, gate_up_proj (experts, 2 hidden, width) and down_proj (experts, width, hidden), without biases."


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of one block; expert e maps x to down[e] (act(gate) * up), with gate and up the halves of gate_up[e] x.

    path: of the module that holds them and is called with (rows, chosen experts, their weights); gate_up: (E, 2 F, C), rows of gate first;
    down: (E, C, F); activation: the function of the gate; beside: role -> path of the other modules whose weight (O, C) multiplies the same
    input and stays in float - the router, the switch of a shared expert; shared: role -> path of the shared expert's linear maps.
    """

    path: str
    module: nn.Module
    gate_up: nn.Parameter
    down: nn.Parameter
    activation: Any
    beside: Mapping[str, str]
    shared: Mapping[str, str]

    @property
    def count(self) -> int:
        return self.gate_up.shape[0]

    @property
    def width(self) -> int:
        """C, the channels of the experts' input."""
        return self.gate_up.shape[2]

    @property
    def hidden(self) -> int:
        """F, the channels between up and down of one expert."""
        return self.down.shape[2]


def check_experts(module: nn.Module, path: str) -> tuple[nn.Parameter, nn.Parameter, Any]:
    """(gate_up, down, activation) of a module of experts. Raises UnsupportedModelError for weights of another form."""
    gate_up, down = (module._parameters.get(name) for name in (GATE_UP, DOWN))
    activation = getattr(module, "act_fn", None)
    told = {"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True, "has_post_expert_norm": False}
    other = [name for name, usual in told.items() if getattr(module, name, usual) is not usual]
    plain = gate_up is not None and down is not None and all(_is_plain(one) for one in (gate_up, down))
    if not plain or other or activation is None or len(list(module.parameters())) > 2:
        raise UnsupportedModelError(f"{path} ({type(module).__name__}) holds its experts in another form.", _FORM)
    assert gate_up is not None and down is not None  # noqa: PT018 - for the type checker
    count, both, width = gate_up.shape
    if tuple(down.shape) != (count, width, both // 2) or both % 2:
        raise UnsupportedModelError(f"{path} has weights {tuple(gate_up.shape)} and {tuple(down.shape)}.", _FORM)
    return gate_up, down, activation


def _is_plain(weight: nn.Parameter) -> bool:
    kind = type(weight) is nn.Parameter and type(weight.data) is torch.Tensor
    return kind and weight.ndim == 3 and weight.is_floating_point() and weight.element_size() >= 2
