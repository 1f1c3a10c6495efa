"""A change of basis in front of a linear map: x -> x G online, W -> W G^-T once, and the product stays what it was. Floor 3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from trocar.core.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Transform:
    """A diagonal, then rotations of blocks and permutations of channels, in this order, on the last axis.

    channels: C; scale: (C,) positive, by which activations are divided and weights multiplied, or None; steps: floating tensors are
    rotations, (b, b) for every block of b channels or (C / b, b, b) with one each; int64 tensors (C,) are permutations as gather indices,
    x[..., p]. Rotations are orthogonal, so activations and weights are rotated by the same matrix and no inverse is formed.
    Raises ConfigError for steps that do not fit C.
    """

    channels: int
    scale: torch.Tensor | None = None
    steps: tuple[torch.Tensor, ...] = ()

    def __post_init__(self) -> None:
        for step in self.steps:
            if step.is_floating_point():
                size = step.shape[-1]
                shapes = [(size, size), (self.channels // size, size, size)]
                good = self.channels % size == 0 and tuple(step.shape) in shapes
            else:
                good = step.dtype == torch.int64 and tuple(step.shape) == (self.channels,)
            if not good:
                raise ConfigError(f"A step of shape {tuple(step.shape)} and {step.dtype} does not act on {self.channels} channels.")
        if self.scale is not None and tuple(self.scale.shape) != (self.channels,):
            raise ConfigError(f"A scale of shape {tuple(self.scale.shape)} does not fit {self.channels} channels.")

    def online(self, x: torch.Tensor) -> torch.Tensor:
        """x G for activations (..., C), in x's dtype; x is not changed."""
        if self.scale is not None:
            x = x / self.scale.to(x)
        return self._forward(x)

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W G^-T for a weight (O, C): computed in float64, returned in weight's dtype."""
        wide = weight.double()
        if self.scale is not None:
            wide = wide * self.scale.to(wide)
        return self._forward(wide).to(weight.dtype)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Activations before `online`, (..., C)."""
        for step in reversed(self.steps):
            x = rotate(x, step.mT) if step.is_floating_point() else x[..., step.argsort().to(x.device)]
        return x if self.scale is None else x * self.scale.to(x)

    def to(self, dtype: torch.dtype) -> Transform:
        """The same with scale and rotations stored in `dtype`."""
        scale = None if self.scale is None else self.scale.to(dtype)
        return replace(self, scale=scale, steps=tuple(step.to(dtype) if step.is_floating_point() else step for step in self.steps))

    def then(self, *steps: torch.Tensor) -> Transform:
        """This transform and further steps after it."""
        return replace(self, steps=(*self.steps, *steps))

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = rotate(x, step) if step.is_floating_point() else x[..., step.to(x.device)]
        return x

    def parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Named tensors, from which `of_parts` builds the transform again."""
        if self.scale is not None:
            yield "scale", self.scale
        for number, step in enumerate(self.steps):
            yield f"{'rotation' if step.is_floating_point() else 'permutation'}{number}", step


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Multiply blocks of the last axis by an orthogonal matrix: (b, b) for all blocks, or (C / b, b, b) with one each."""
    rotation = rotation.to(x)
    blocks = x.unflatten(-1, (-1, rotation.shape[-1]))
    if rotation.ndim == 2:
        return (blocks @ rotation).flatten(-2)
    return (blocks.unsqueeze(-2) @ rotation).squeeze(-2).flatten(-2)
