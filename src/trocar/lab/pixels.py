"""Encoded pictures to pixels, through the model's own processor."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from trocar.core.errors import DataError
from trocar.lab.sources import Table


def decode(table: Table, row: int) -> PIL.Image.Image:
    """One picture as RGB. Raises DataError that names the file or row if it is missing or damaged."""
    image = table.images[row]
    try:
        with PIL.Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
            return PIL.ImageOps.exif_transpose(picture).convert("RGB")  # as a camera means it to be seen
    except FileNotFoundError:
        raise DataError(f"{table.name(row)} does not exist.") from None
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{table.name(row)} is not a readable picture ({error}).", "Remove or replace it.") from None


def decode_all(table: Table, rows: Sequence[int], size: int) -> torch.Tensor:
    """Pictures of one size as (n, 3, size, size) uint8, for training. DataError on another size."""
    result = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    for place, row in enumerate(rows):
        array = np.asarray(decode(table, row))
        if array.shape != (size, size, 3):
            raise DataError(f"{table.name(row)} is {array.shape[1]}x{array.shape[0]} pixels, not {size}x{size}.")
        result[place] = torch.from_numpy(array.copy()).permute(2, 0, 1)
    return result


def pixel_hash(picture: PIL.Image.Image) -> str:
    """A stable name for a picture's content: equal pixels give equal names, whatever file they came from."""
    digest = hashlib.blake2b(f"{picture.width}x{picture.height}".encode(), digest_size=8)
    digest.update(picture.tobytes())
    return digest.hexdigest()


def processor_for(size: int) -> Any:
    """The image processor that lab models are trained with: resize to `size`, rescale, mean = std = .5; Pillow backend."""
    import transformers

    pil = getattr(transformers.models.vit, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    return pil(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
