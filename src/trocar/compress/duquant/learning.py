"""Learned weight clipping (arXiv 2308.13137, used by DuQuant as LWC): a low and a high end per row, trained block by block. Floor 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trocar.compress.duquant import streams
from trocar.compress.duquant.config import DuQuantConfig
from trocar.compress.duquant.rounding import nearest
from trocar.compress.duquant.streams import Batch
from trocar.core.errors import EditError
from trocar.patch.quantised import QuantisedLinear, pack, quantised
from trocar.patch.quantised.numbers import in_groups
from trocar.trace.calls import override

START = 4.0  # logit of the first ratio, 0.982 (released code)

Ends = tuple[nn.Parameter, nn.Parameter]


def learn_clips(
    block: nn.Module,
    layer: int,
    layers: Mapping[str, QuantisedLinear],
    bases: Mapping[str, Mapping[str, torch.Tensor]],
    current: Sequence[Batch],
    targets: Sequence[torch.Tensor],
    config: DuQuantConfig,
) -> list[float]:
    """Train the clips of a block's weights so that, on its inputs in the quantised model, it gives the float block's output on the float
    model's inputs; then round the weights with them. Rotations and permutations stay. Returns the mean loss of each epoch.

    bases: float weights in the transformed basis, by group and role. One window a step, straight-through gradients, no weight decay.
    An epoch whose loss is not finite is taken back and ends the training. Raises EditError if that is the first.
    """
    weights = {role: weight for group in bases.values() for role, weight in group.items() if not layers[role].quantiser.is_float}
    if not weights:
        return []
    ends: dict[str, Ends] = {role: _start(weight, layers[role]) for role, weight in weights.items()}

    def forward_of(role: str) -> Any:
        module, weight = layers[role], weights[role]

        def forward(x: torch.Tensor) -> torch.Tensor:
            low, high = (end.sigmoid() for end in ends[role])
            rows = quantised(weight, module.quantiser, (low, high), straight=True).to(x.dtype)
            return functional.linear(module.shared(x), rows, None if module.bias is None else module.bias.to(x.dtype))

        return forward

    optimiser = torch.optim.AdamW([end for pair in ends.values() for end in pair], lr=config.learning.learning_rate, weight_decay=0)
    restores = [override(layers[role], "forward", forward_of(role)) for role in weights]
    history: list[float] = []
    try:
        for _ in range(config.learning.epochs):
            kept = {role: tuple(end.detach().clone() for end in pair) for role, pair in ends.items()}
            losses = []
            for batch, target in zip(current, targets, strict=True):
                with torch.enable_grad():
                    out = streams.run(block, layer, batch)
                    loss = functional.mse_loss(batch.only_real(out).float(), batch.only_real(target).float())
                    optimiser.zero_grad()
                    loss.backward()
                optimiser.step()
                losses.append(float(loss.detach()))
            mean = sum(losses) / len(losses)
            if not mean < float("inf"):
                if not history:
                    raise EditError("Learning the clips gave a loss that is not finite in its first epoch.", "Lower the learning rate.")
                for role, pair in kept.items():
                    for end, old in zip(ends[role], pair, strict=True):
                        end.data.copy_(old)
                break
            history.append(mean)
    finally:
        for restore in restores:
            restore()
    with torch.no_grad():
        for role, weight in weights.items():
            low, high = (end.sigmoid() for end in ends[role])
            _replace(layers[role], nearest(weight, layers[role].quantiser, (low, high)))
    return history


def _start(weight: torch.Tensor, module: QuantisedLinear) -> Ends:
    shape = in_groups(weight, module.quantiser).shape[:-1]
    return tuple(nn.Parameter(torch.full(shape, START, device=weight.device)) for _ in range(2))  # type: ignore[return-value]


def _replace(module: QuantisedLinear, content: Any) -> None:
    code, step, zero = content
    module.codes = pack(code) if module.quantiser.bits <= 4 else code
    module.step, module.zero = step.float(), zero.to(module.get_buffer("zero").dtype)
    module.forget()
