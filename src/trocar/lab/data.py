"""Pictures for a model: filtered, labelled with the model's classes, and put through the model's own processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch

from trocar.core.config import Config
from trocar.core.errors import DataError, nearest
from trocar.lab.pixels import decode, pixel_hash
from trocar.lab.sources import Table, chosen, read
from trocar.method import Examples

Plain = str | int | float | bool
DEFAULT_LABEL = "label"


class DataConfig(Config):
    """Where examples come from and which of them are wanted.

    source: `cifar100:test`, `pacs:train`, `lab:NAME`, `hub:OWNER/NAME:SPLIT`, a folder with one sub-folder per class, a `.parquet` or a
    `.jsonl` file (`sources.read`). image, label: columns; label None takes the column `label` where there is one. classes: value of the
    label column -> the model's class (name or number), for sets that name classes otherwise. where: column -> wanted value or list of
    values. limit: at most so many, drawn with `seed` (kept in the source's order). processor: folder or hub id of the image processor
    (None: the model's own). allow_outside: let parquet and JSONL point to pictures outside their folder.
    """

    source: str = pydantic.Field(min_length=1)
    image: str = "image"
    label: str | None = None
    classes: dict[Plain, str | int] = pydantic.Field(default_factory=dict)
    where: dict[str, Plain | tuple[Plain, ...]] = pydantic.Field(default_factory=dict)
    limit: int | None = pydantic.Field(None, ge=1)
    seed: int = pydantic.Field(0, ge=0)
    processor: str | None = None
    allow_outside: bool = False


def load_examples(
    data: DataConfig | Mapping[str, Any] | str,
    model: torch.nn.Module | None = None,
    processor: Any = None,
    label2id: Mapping[str, int] | None = None,
    base: Path | None = None,
) -> Examples:
    """Load `data` (a DataConfig, a mapping of its keys, or just a source) as Examples for `model`.

    inputs: `pixel_values` as the processor makes them; labels: class numbers, or None where there is no label column; ids: hashes of the
    pixels as stored, so that the same picture has the same id wherever it comes from; a picture that occurs twice with one label is
    loaded once. pictures: the model's view, undone to 0..255. fields: every other column whose values are plain.
    processor: an image processor, else `data.processor`, else the one beside the model's weights. label2id: else the model's own.
    base: folder of relative paths. Raises DataError naming the file or row for missing, damaged, or contradictory pictures and labels.
    """
    config = _config(data)
    table = chosen(read(config.source, base, config.image, config.allow_outside), config.where, config.limit, config.seed)
    known = label2id if label2id is not None else getattr(getattr(model, "config", None), "label2id", None)
    count = getattr(getattr(model, "config", None), "num_labels", None)
    column = _label_column(table, config)
    labels = (
        None if column is None else [_class(value, table.name(r), config, known, count) for r, value in enumerate(table.column(column))]
    )
    processor = processor if processor is not None else load_processor(config.processor or _home(model))

    rows: dict[str, int] = {}
    pixels, ids = [], []
    for row in range(len(table)):
        picture = decode(table, row)
        name = pixel_hash(picture)
        if name in rows:
            first = rows[name]
            if labels is not None and labels[first] != labels[row]:
                raise DataError(f"{table.name(first)} and {table.name(row)} have the same pixels but two labels.", "Remove the wrong one.")
            continue
        rows[name] = row
        ids.append(name)
        pixels.append(_processed(processor, picture, table.name(row)))
    keep = list(rows.values())
    values = torch.stack(pixels)
    return Examples(
        {"pixel_values": values},
        tuple(ids),
        None if labels is None else torch.tensor([labels[row] for row in keep], dtype=torch.int64),
        view(values, processor),
        {name: [cells[row] for row in keep] for name, cells in table.columns.items() if _plain(cells)},
    )


def load_processor(where: str | None) -> Any:
    """The image processor of a checkpoint, in its Pillow form (no torchvision needed). Raises DataError if there is none."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.10 hides the name at the top without torchvision

    if not where:
        raise DataError("The model does not say where it was loaded from, so its image processor is unknown.", "Set `processor`.")
    try:
        return AutoImageProcessor.from_pretrained(where, backend="pil")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"'{where}' has no usable image processor: {reason}", "Add preprocessor_config.json or set `processor`.") from None


def view(values: torch.Tensor, processor: Any) -> np.ndarray:
    """Undo the processor's normalisation: (n, channels, h, w) -> (n, h, w, 3) uint8, what the model sees."""
    image = values.float()
    if getattr(processor, "do_normalize", False):
        shape = (1, -1, 1, 1)
        image = image * torch.tensor(processor.image_std).view(shape) + torch.tensor(processor.image_mean).view(shape)
    if getattr(processor, "do_rescale", True):
        image = image / (getattr(processor, "rescale_factor", None) or 1 / 255)
    image = image.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return image.expand(*image.shape[:3], 3).contiguous().numpy()


def _config(data: DataConfig | Mapping[str, Any] | str) -> DataConfig:
    if isinstance(data, DataConfig):
        return data
    return DataConfig.parse({"source": data} if isinstance(data, str) else dict(data), "data")


def _label_column(table: Table, config: DataConfig) -> str | None:
    if config.label is not None:
        table.column(config.label)
        return config.label
    return DEFAULT_LABEL if DEFAULT_LABEL in table.columns else None


def _class(value: Any, where: str, config: DataConfig, label2id: Mapping[str, int] | None, count: int | None) -> int:
    """The model's class number for one cell of the label column."""
    wanted = config.classes.get(value, value) if isinstance(value, str | int) else value
    if isinstance(wanted, str):
        if label2id is None:
            raise DataError(f"{where}: label '{wanted}' is a name, but no model says which class that is.", "Give a model or label2id.")
        if wanted not in label2id:
            hint = nearest(wanted, label2id) if len(label2id) <= 1000 else "It has more than 1000 classes."
            raise DataError(f"{where}: the model has no class '{wanted}'.", f"{hint} Map other names with `classes`.")
        return int(label2id[wanted])
    if isinstance(wanted, bool) or not isinstance(wanted, int | np.integer):
        raise DataError(f"{where}: label {wanted!r} is {type(wanted).__name__}, not a class name or number.", "Check the label column.")
    size = count if count is not None else (len(label2id) if label2id else None)
    if wanted < 0 or (size is not None and wanted >= size):
        raise DataError(f"{where}: label {wanted} is not in 0..{(size or 1) - 1}.", "Check the label column or map it with `classes`.")
    return int(wanted)


def _home(model: torch.nn.Module | None) -> str | None:
    if model is None:
        raise DataError("Neither a model nor a processor was given, so pictures cannot be prepared.", "Set `processor`.")
    return getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)


def _processed(processor: Any, picture: Any, where: str) -> torch.Tensor:
    try:
        values = processor(images=picture, return_tensors="pt")["pixel_values"]
    except (ValueError, TypeError, OSError) as error:
        raise DataError(f"{where} cannot be prepared by {type(processor).__name__}: {str(error).splitlines()[0]}") from None
    if values.ndim != 4 or len(values) != 1:
        raise DataError(
            f"{where}: {type(processor).__name__} gives pixel_values of shape {tuple(values.shape)}, not one (channels, h, w) picture."
        )
    return values[0]


def _plain(cells: Sequence[Any]) -> bool:
    return all(cell is None or isinstance(cell, str | int | float | bool) for cell in cells)
