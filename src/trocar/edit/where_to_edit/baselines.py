"""The editors that Where-to-Edit is compared with: LoRA, full, per-block and classifier fine-tuning, dense fine-tuning with a penalty.

They share the stop rule, optimiser and result of masked edits, so that only the place of the change differs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trocar.core.errors import ConfigError
from trocar.edit.where_to_edit.config import EditConfig
from trocar.edit.where_to_edit.edit import Inputs, check_labels, check_range, describe, edit_many, grouped, prepared
from trocar.edit.where_to_edit.editing import run_edits
from trocar.edit.where_to_edit.leaves import AnyLeaf, WholeLeaf, with_leaves
from trocar.edit.where_to_edit.place import Place, guarded
from trocar.edit.where_to_edit.results import Edits, changes_of
from trocar.edit.where_to_edit.suffix import Rows

PENALTY_WEIGHTS = (0.0, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1)  # of the published code


def dense_with_penalty(
    model: torch.nn.Module,
    inputs: Inputs,
    labels: torch.Tensor | Sequence[int],
    weight: float,
    penalty: str = "l1",
    config: EditConfig | None = None,
    seed: int = 0,
    groups: Sequence[Sequence[int]] | None = None,
    published_first_step: bool = True,
) -> Edits:
    """Fine-tuning of the same matrices without a mask, loss ce + c ||W - W0||_1 (`l1`) or c/2 ||.||_2^2 (`l2`); the paper's "FT".

    published_first_step: the first step is plain gradient descent with rate 2e-5, RMSProp from the second on, as in the published code.
    """
    changed = {"penalty": penalty, "penalty_weight": weight, "first_step": "sgd" if published_first_step else "same"}
    config = EditConfig.parse({**(config or EditConfig()).model_dump(), **changed})
    return edit_many(model, inputs, labels, "dense", config, seed, groups)


def lora(
    model: torch.nn.Module,
    inputs: Inputs,
    labels: torch.Tensor | Sequence[int],
    rank: int = 4,
    config: EditConfig | None = None,
    seed: int = 0,
    groups: Sequence[Sequence[int]] | None = None,
) -> Edits:
    """LoRA of `rank` on the same matrices, scale 1."""
    return edit_many(model, inputs, labels, config=config, seed=seed, groups=groups, low_rank=rank)


def fine_tune(
    model: torch.nn.Module,
    inputs: Inputs,
    labels: torch.Tensor | Sequence[int],
    what: str,
    config: EditConfig | None = None,
    groups: Sequence[Sequence[int]] | None = None,
) -> Edits:
    """Fine-tune all parameters of a part: `full`, `classifier`, or a block by name (`L7`). Edits run one by one, each from the clean model.

    Raises ConfigError for a part that the model does not have.
    """
    config = config or EditConfig()
    place = Place.of(model, config.first_block, config.blocks, config.tower)
    names = _names(place, what)
    found = prepared(place, inputs)
    chosen, labels = grouped(groups, len(next(iter(found.values())))), torch.as_tensor(labels)
    notes = check_labels(found, labels, chosen)
    courses = []
    with guarded(place.model):
        rows = _From(place, found, names)
        check_range(labels, rows.classes)
        for group in chosen:
            wide = [place.model.get_parameter(name).detach() for name in names]
            leaves: list[AnyLeaf] = [
                WholeLeaf(place.model, name, value.to(torch.promote_types(value.dtype, torch.float32), copy=True))
                for name, value in zip(names, wide, strict=True)
            ]
            courses += run_edits(rows, group[None], labels[group][None], leaves, config)
    made = [changes_of(course.leaves) for course in courses]
    logs = [describe(place, course, norm, lost, None, what, config, notes) for course, (_, norm, lost) in zip(courses, made, strict=True)]
    settings = {"what": what}
    return Edits(place, config, f"fine-tuning of {what}", None, [change for change, _, _ in made], logs, settings)


class _From(Rows):
    """Rows run from the lowest changed block on, or from the inputs where something below the blocks changes."""

    def __init__(self, place: Place, inputs: dict[str, torch.Tensor], names: Sequence[str]) -> None:
        tower = place.tower
        layers = [
            next((layer for layer in range(tower.n_layers) if name.startswith(f"{tower.path(layer, 'block')}.")), None) for name in names
        ]
        above = tuple(f"{path}." for path in (tower.final_norm_path, tower.pooler_path, tower.head_path) if path)
        self.from_inputs = any(layer is None and not name.startswith(above) for layer, name in zip(layers, names, strict=True))
        super().__init__(place, inputs, min((layer for layer in layers if layer is not None), default=tower.n_layers - 1))
        with torch.no_grad():
            self.classes = self.logits(rows=[0]).shape[1]

    def logits(self, leaves: Sequence[AnyLeaf] = (), rows: Sequence[int] | torch.Tensor | None = None) -> torch.Tensor:
        if not self.from_inputs:
            return super().logits(leaves, rows)
        with with_leaves(leaves):
            return self.whole(None if rows is None else torch.as_tensor(rows).tolist())


def _names(place: Place, what: str) -> list[str]:
    names = [name for name, _ in place.model.named_parameters()]
    tower = place.tower
    blocks = {f"L{layer}": tower.path(layer, "block") for layer in range(tower.n_layers)}
    if what == "full":
        return names
    if what == "classifier":
        if tower.head_path is None:
            raise ConfigError(f"{type(place.model).__name__} has no classifier.", "Load it with a classification head.")
        return [name for name in names if name.startswith(f"{tower.head_path}.")]
    if what not in blocks:
        raise ConfigError(f"'{what}' is not a part that can be fine-tuned.", f"Say full, classifier or L0 to L{tower.n_layers - 1}.")
    return [name for name in names if name.startswith(f"{blocks[what]}.")]
