"""A role's examples: the lab's loaders; of pictures then the base model's own opinion. Floor 6."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trocar.core.errors import DataError, nearest
from trocar.core.seeds import generator
from trocar.evaluate import BaseOutputs
from trocar.lab.data import DataConfig, load_examples
from trocar.lab.texts import TextConfig, load_texts

if TYPE_CHECKING:
    import torch

    from trocar.method import Examples


class RoleSource(DataConfig):
    """`trocar.lab.data.DataConfig`, and which of its rows are wanted by what the unedited model says of them.

    only: `wrong` or `right` (by the label), `all`; predicted: the class that the model predicts, by name or number. `limit` counts the
    rows that are left.
    """

    only: Literal["wrong", "right", "all"] = "all"
    predicted: str | int | None = None


def load_roles(sources: Mapping[str, RoleSource], model: torch.nn.Module, outputs: BaseOutputs, base: Path) -> dict[str, Examples]:
    """Load every role. `outputs` keeps the base model's logits, so that they are computed once. Raises DataError naming the role."""
    roles = {}
    for role, source in sources.items():
        try:
            roles[role] = _load(source, model, outputs, base)
        except DataError as error:
            raise DataError(f"data.{role}: {error.what}", error.hint) from error
    return roles


def load_text_roles(sources: Mapping[str, TextConfig], base: Path) -> dict[str, Examples]:
    """Load every role of a method that reads texts: columns of words, without a model. Raises DataError naming the role."""
    roles = {}
    for role, source in sources.items():
        try:
            roles[role] = load_texts(source, base)
        except DataError as error:
            raise DataError(f"data.{role}: {error.what}", error.hint) from error
    return roles


def _load(source: RoleSource, model: torch.nn.Module, outputs: BaseOutputs, base: Path) -> Examples:
    import torch

    chosen = source.only != "all" or source.predicted is not None
    plain = {name: value for name, value in source if name not in ("only", "predicted")}
    examples = load_examples(DataConfig(**{**plain, "limit": None if chosen else source.limit}), model, base=base)
    if not chosen:
        return examples
    predicted = outputs.logits(model, examples).argmax(-1)
    keep = torch.ones(len(examples), dtype=torch.bool)
    if source.only != "all":
        if examples.labels is None:
            raise DataError(f"only: {source.only} needs labels, and {source.source} has none.", "Name the label column with `label`.")
        keep &= (predicted == examples.labels) == (source.only == "right")
    if source.predicted is not None:
        keep &= predicted == _class_number(source.predicted, model)
    rows = keep.nonzero().flatten().tolist()
    if not rows:
        wanted = [
            text
            for text in (
                source.only if source.only != "all" else "",
                f"predicted {source.predicted}" if source.predicted is not None else "",
            )
            if text
        ]
        raise DataError(
            f"none of the {len(examples)} examples of {source.source} is {' and '.join(wanted)}.", "The model may already be right."
        )
    if source.limit is not None and source.limit < len(rows):
        order = torch.randperm(len(rows), generator=generator(source.seed, "limit"))[: source.limit]
        rows = [rows[place] for place in sorted(order.tolist())]
    return examples.take(rows)


def _class_number(wanted: str | int, model: torch.nn.Module) -> int:
    known: Mapping[str, int] = getattr(model.config, "label2id", None) or {}
    if isinstance(wanted, int):
        return wanted
    if wanted not in known:
        raise DataError(f"the model has no class '{wanted}'.", nearest(wanted, known) if known else "")
    return int(known[wanted])
