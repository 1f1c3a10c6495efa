"""Pseudo-failures without labels: CutMix pairs on the patch grid (arXiv 2411.01948)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from trocar.core.errors import DataError
from trocar.core.seeds import derive, generator
from trocar.edit.where_to_edit.config import CutMixConfig


def patch_size(model: torch.nn.Module) -> tuple[int, int]:
    """(height, width) in pixels of one patch, from the model's configuration. Raises DataError for models that do not see patches."""
    config = getattr(model, "config", None)
    for holder in (config, getattr(config, "vision_config", None)):
        size = getattr(holder, "patch_size", None)
        if size is not None:
            return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    raise DataError(
        f"{type(model).__name__} has no patch_size, so no CutMix pairs can be made for it.",
        "A mask hypernetwork is trained on images; for other models use a gradient-norm, magnitude, constant or random mask.",
    )


def sides(grid: int, low: float, high: float) -> tuple[int, int]:
    """Smallest and largest rectangle side in patches: fractions of the grid, at least 1, at most grid - 1. 14 patches give 3 and 8."""
    if grid < 2:
        raise DataError(f"The patch grid has {grid} patch on a side; CutMix needs at least 2.", "Use larger images or smaller patches.")
    smallest = min(max(1, round(low * grid)), grid - 1)
    return smallest, min(max(smallest, round(high * grid)), grid - 1)


def rectangle(grid: tuple[int, int], config: CutMixConfig, stream: torch.Generator) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) in patches: sides uniform and independent, then the corner uniform over every place that fits.

    (The published code never uses the last row and column of places; we include them.)
    """
    drawn = []
    for size in grid:
        smallest, largest = sides(size, config.low, config.high)
        side = int(torch.randint(smallest, largest + 1, (), generator=stream))
        drawn.append((int(torch.randint(0, size - side + 1, (), generator=stream)), side))
    (top, height), (left, width) = drawn
    return top, left, height, width


def cutmix_pairs(
    images: torch.Tensor, pairs: range, patch: tuple[int, int], config: CutMixConfig, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (clean, mixed), both (len(pairs), channels, height, width), for the pairs numbered `pairs`.

    images: (n, channels, height, width), preprocessed as the model wants them. Pair j depends on `seed` and j alone, so any split into
    chunks gives the same pairs; every image is the clean one once per n pairs. The donor is another image than the clean one.
    """
    if images.ndim != 4 or len(images) < 2:
        raise DataError(f"CutMix needs at least two images as a tensor (n, channels, height, width), not {tuple(images.shape)}.")
    height, width = images.shape[-2:]
    grid = (height // patch[0], width // patch[1])
    orders: dict[int, torch.Tensor] = {}
    clean, mixed = [], []
    for pair in pairs:
        turn, place = divmod(pair, len(images))
        if turn not in orders:
            orders[turn] = torch.randperm(len(images), generator=generator(seed, "cutmix order", turn))
        stream = torch.Generator().manual_seed(derive(seed, "cutmix", pair))
        first = int(orders[turn][place])
        second = int(torch.randint(len(images) - 1, (), generator=stream))
        second += second >= first
        picture = random_resized_crop(images[first], config.crop, stream)
        donor = random_resized_crop(images[second], config.crop, stream)
        top, left, rows, columns = rectangle(grid, config, stream)
        where = (
            slice(None),
            slice(top * patch[0], (top + rows) * patch[0]),
            slice(left * patch[1], (left + columns) * patch[1]),
        )
        changed = picture.clone()
        changed[where] = donor[where]
        clean.append(picture)
        mixed.append(changed)
    return torch.stack(clean), torch.stack(mixed)


def random_resized_crop(image: torch.Tensor, smallest: float, stream: torch.Generator) -> torch.Tensor:
    """Crop a random share (area in [smallest, 1], aspect in [3/4, 4/3]) of a (channels, height, width) image and resize it back."""
    if smallest == 1:
        return image
    height, width = image.shape[-2:]
    for _ in range(10):  # as torchvision: try ten shapes, then take the whole image
        area = height * width * (smallest + (1 - smallest) * float(torch.rand((), generator=stream)))
        aspect = math.exp(math.log(4 / 3) * (2 * float(torch.rand((), generator=stream)) - 1))
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            top = int(torch.randint(0, height - rows + 1, (), generator=stream))
            left = int(torch.randint(0, width - columns + 1, (), generator=stream))
            part = image[None, :, top : top + rows, left : left + columns]
            return F.interpolate(part.float(), size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0].to(
                image.dtype
            )
    return image
