"""What a method is: the one form all ten share, so that the eleventh is obvious. Floor 4.

A method receives a `Job` (model, examples, settings, a workspace for resumable units) and returns an `Outcome` (patch, scores,
measurements, figures). It knows nothing about recipes, run folders' layout, reports or the command line; those know only these types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trocar.core.config import Config
from trocar.core.errors import DataError
from trocar.core.workspace import Workspace

if TYPE_CHECKING:
    import torch

    from trocar.evaluate import Measurement
    from trocar.locate import Scores
    from trocar.patch import Patch


@dataclass(frozen=True)
class Examples:
    """Rows ready for a model, with what is needed to show and to tell them apart.

    inputs: model keyword arguments, every tensor with rows first (`pixel_values` of shape (n, channels, height, width), or `input_ids`
    and `attention_mask` of shape (n, length)); labels: (n,) int64 class indices or None; ids: n stable names, unique;
    pictures: (n, h, w, 3) uint8 as a person would see them, or None; fields: further columns, each of length n.
    """

    inputs: Mapping[str, torch.Tensor]
    ids: tuple[str, ...]
    labels: torch.Tensor | None = None
    pictures: np.ndarray | None = None
    fields: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str, role: str) -> Sequence[Any]:
        """A column of `fields`. DataError naming the role where there is none of that name."""
        if name not in self.fields:
            raise DataError(f"data.{role} has no column '{name}'.", f"It has {', '.join(self.fields)}; rename one with `columns`.")
        return self.fields[name]

    def take(self, rows: Sequence[int]) -> Examples:
        """The examples at `rows`, in that order."""
        index = list(rows)
        return Examples(
            {name: value[index] for name, value in self.inputs.items()},
            tuple(self.ids[row] for row in index),
            None if self.labels is None else self.labels[index],
            None if self.pictures is None else self.pictures[index],
            {name: [column[row] for row in index] for name, column in self.fields.items()},
        )


@dataclass(frozen=True)
class Figure:
    """A figure as data: the report draws it, its rows are the CSV beside it.

    kind: `heatmap` (x, y, value), `curve` (x, y, series; optional columns low, high), `bars` (x, y; optional series, low, high),
    `points` (x, y, series; optional label), `table` (every column as it is; x and y name two of them). rows: one mapping per row, every
    row with the same keys.
    """

    id: str
    title: str
    kind: str
    x: str
    y: str
    rows: Sequence[Mapping[str, Any]]
    value: str | None = None
    series: str | None = None
    caption: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures with a line of text each, before and after (`the failing pictures themselves`)."""

    id: str
    title: str
    pictures: np.ndarray  # (n, h, w, 3) uint8
    before: Sequence[str]
    after: Sequence[str]
    truth: Sequence[str]
    caption: str = ""


@dataclass(frozen=True)
class Transcript:
    """Texts side by side: what a model answered before and after, with what would have been right.

    marks_before, marks_after: one word per row for what is wrong there (`wrong language`, `loop`), empty where nothing is; None: a row is
    judged by whether its text begins with the truth.
    """

    id: str
    title: str
    prompts: Sequence[str]
    before: Sequence[str]
    after: Sequence[str]
    truth: Sequence[str]
    marks_before: Sequence[str] | None = None
    marks_after: Sequence[str] | None = None
    caption: str = ""


@dataclass(frozen=True)
class Estimate:
    """A prediction made before the work: peak bytes beyond the loaded model, wall seconds on this machine, and how it was made."""

    peak_bytes: int
    seconds: float
    how: str


@dataclass(frozen=True)
class Job:
    """What a method gets. `data` maps the roles that the method declares to examples; `class_names` are the model's labels; `processor`
    is the checkpoint's tokenizer where the method reads texts."""

    model: torch.nn.Module
    data: Mapping[str, Examples]
    config: Any
    seed: int
    work: Workspace
    class_names: Sequence[str] = ()
    processor: Any = None


@dataclass(frozen=True)
class Outcome:
    """What a method gives back. `log` holds settings found on the way (calibrated step, open share, stop reason) for the report.

    probes: model inputs by name on which the patch's effect is verified, from methods that read texts (with pictures, the roles serve).
    """

    patch: Patch | None
    measurements: Sequence[Measurement]
    scores: Mapping[str, Scores] = field(default_factory=dict)
    figures: Sequence[Figure] = ()
    galleries: Sequence[Gallery] = ()
    log: Mapping[str, Any] = field(default_factory=dict)
    transcripts: Sequence[Transcript] = ()
    probes: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One method as a recipe sees it.

    `roles` maps each data role to one sentence; a name ending in `?` is optional, one in `*` may repeat (`locality.random`).
    reads: what the roles' rows are. Rows of texts have no `inputs`; their columns stand in `fields`. `either`: the method's setting
    `reads` says which, `pictures` or `texts`. paths: settings that are lists of paths; relative ones start from the recipe's folder.
    """

    name: str
    title: str
    paper: str
    summary: str
    config: type[Config]
    roles: Mapping[str, str]
    run: Callable[[Job], Outcome]
    estimate: Callable[[Job], Estimate]
    starter: str  # a commented recipe in YAML
    default_checks: Sequence[Mapping[str, Any]] = ()
    reads: Literal["pictures", "texts", "either"] = "pictures"
    paths: Sequence[str] = ()
