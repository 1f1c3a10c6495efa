"""From a layer's input to the transform in front of it: smoothing scales, rotations and permutations in turn. Floor 5."""

from __future__ import annotations

import torch

from trocar.compress.duquant.config import Chain
from trocar.compress.duquant.rotation import greedy_rotation, random_orthogonal, zigzag
from trocar.core.errors import ConfigError
from trocar.patch.quantised import Transform, hadamard, largest_hadamard
from trocar.patch.quantised.transform import rotate

LARGEST_BLOCK = 128  # paper, section 5
FLOOR, SCALE_FLOOR = 1e-5, 1e-2  # of the maxima and of the scale: released code


def smoothing_scale(
    activation: torch.Tensor, weight: torch.Tensor, alpha: float, floor: float = FLOOR, scale_floor: float = SCALE_FLOOR
) -> torch.Tensor:
    """s = a^alpha / w^(1 - alpha), (C,), by which activations are divided and weights multiplied. activation, weight: (C,) largest
    magnitudes. Channels that are dead on either side get 1."""
    scale = activation.clamp(min=floor) ** alpha / weight.clamp(min=floor) ** (1 - alpha)
    return torch.where((activation > 0) & (weight > 0), scale.clamp(min=scale_floor), torch.ones_like(scale))


def block_size(channels: int, wanted: int | str, name: str = "") -> int:
    """The size of rotated blocks. Raises ConfigError naming the nearest divisors if `wanted` is none."""
    divisors = [size for size in range(1, channels + 1) if channels % size == 0]
    if wanted == "auto":
        return max(size for size in divisors if size <= LARGEST_BLOCK)
    if wanted not in divisors:
        near = sorted(divisors, key=lambda size: abs(size - int(wanted)))[:3]
        here = f" of {name}" if name else ""
        raise ConfigError(
            f"Blocks of {wanted} do not divide the {channels} channels{here}.",
            f"Use {', '.join(map(str, sorted(near)))}, or block_size: auto.",
        )
    return int(wanted)


def build_chain(x: torch.Tensor, chain: Chain | None, generator: torch.Generator, name: str = "") -> Transform:
    """The transform for input `x` (T, C), rotations in float64. Each step is found on the input as the steps before have left it.

    name: of the layer, for errors. Raises ConfigError for blocks that do not divide C, DataError for input that is not finite.
    """
    transform = Transform(x.shape[-1])
    if chain is None:
        return transform
    size = block_size(x.shape[-1], chain.block_size, name)
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    for kind in chain.steps:
        if kind == "rotate":
            step = _rotation(x, chain, size, generator)
            x = rotate(x, step)
        else:
            step = _permutation(x, chain, size, generator)
            x = x[:, step.to(x.device)]
        transform = transform.then(step)
    return transform


def _rotation(x: torch.Tensor, chain: Chain, size: int, generator: torch.Generator) -> torch.Tensor:
    if chain.rotation == "greedy":
        parts = x.split(size, dim=1) if chain.per_block else [x]
        found = [
            greedy_rotation(
                part, size, chain.search_steps, generator, objective=chain.objective, outlier=chain.outlier, draw=chain.draw
            ).rotation
            for part in parts
        ]
        return torch.stack(found) if chain.per_block else found[0]
    if chain.rotation == "random":
        return random_orthogonal(size, generator)
    return hadamard(size) if chain.rotation == "hadamard" else largest_hadamard(x.shape[-1])


def _permutation(x: torch.Tensor, chain: Chain, size: int, generator: torch.Generator) -> torch.Tensor:
    if chain.permutation == "random":
        return torch.randperm(x.shape[-1], generator=generator)
    return zigzag(x.abs().amax(0), size).cpu()


def sizes_of(rows: torch.Tensor, measure: str) -> torch.Tensor:
    """How large each channel of rows (n, C) is, (C,): its largest magnitude (`peak`), or its root mean square (`rms`)."""
    return rows.abs().amax(0) if measure == "peak" else rows.square().mean(0).sqrt()


class Sizes:
    """`sizes_of` over the rows of several parts, without putting them together."""

    def __init__(self, measure: str) -> None:
        self.measure, self.rows = measure, 0
        self.value: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        now = rows.abs().amax(0) if self.measure == "peak" else rows.square().sum(0)
        if self.value is not None:
            now = torch.maximum(self.value, now) if self.measure == "peak" else self.value + now
        self.value, self.rows = now, self.rows + len(rows)

    def add_tokens(self, rows: torch.Tensor) -> None:
        """Activations (n, C). In root mean squares all tokens count alike, however long: each is rounded on a grid of its own."""
        wide = rows.float()
        self.add(wide if self.measure == "peak" else wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-30))

    def result(self) -> torch.Tensor:
        assert self.value is not None
        return self.value if self.measure == "peak" else (self.value / self.rows).sqrt()
