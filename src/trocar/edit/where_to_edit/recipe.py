"""Where-to-Edit as a recipe's method."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch

from trocar.anatomy import fingerprint
from trocar.core.errors import ConfigError, DataError
from trocar.edit.where_to_edit.baselines import fine_tune, lora
from trocar.edit.where_to_edit.config import EditConfig, HypernetworkConfig, MaskKind
from trocar.edit.where_to_edit.edit import edit_many
from trocar.edit.where_to_edit.hypernetwork import MaskHypernetwork, report_text
from trocar.edit.where_to_edit.labels import first_order_labels, kl_to_target
from trocar.edit.where_to_edit.leaves import Leaf
from trocar.edit.where_to_edit.place import Place, guarded
from trocar.edit.where_to_edit.results import Edits
from trocar.edit.where_to_edit.suffix import Rows
from trocar.edit.where_to_edit.training import train_mask_hypernetwork
from trocar.evaluate import Measurement, accuracy, locality, outputs, refuse_overlap, success
from trocar.method import Estimate, Examples, Figure, Gallery, Job, Method, Outcome

SHOWN = 24  # pictures per gallery
ORDINARY = 64  # unlabelled images that the optional locality term looks at


class RecipeConfig(EditConfig):
    """Settings of an edit, and where its mask comes from.

    mask: `learned` (the hypernetwork's), `gradient-norm` (label-aware, no training), `constant` (mean label), `magnitude`, `random`,
    `dense`. hypernetwork: file of a trained one, or `train` to train one on the role `unlabelled` (learned and constant masks only).
    training: its settings (first_block, blocks and tower are those of the edit). edit_images: how many images of the role `edit` are
    edited on, together. baseline: another editor instead of masked fine-tuning: `lora` (of rank `rank` on the same matrices), `full`,
    `classifier`, or all of one block (`L7`).
    """

    mask: MaskKind = "learned"
    hypernetwork: str = "train"
    training: HypernetworkConfig = HypernetworkConfig()
    edit_images: int = pydantic.Field(default=1, ge=1)
    baseline: str | None = pydantic.Field(default=None, pattern=r"^(lora|full|classifier|L\d+)$")
    rank: int = pydantic.Field(default=4, ge=1)

    def edit(self) -> EditConfig:
        return EditConfig(**{name: getattr(self, name) for name in EditConfig.model_fields})

    def trained(self) -> HypernetworkConfig:
        """The training's settings at the place of the edit. Raises ConfigError where the two name different places."""
        place = {name: getattr(self, name) for name in ("first_block", "blocks", "tower")}
        for name in self.training.model_fields_set & set(place):
            if getattr(self.training, name) not in (place[name], None) and getattr(self.training, name) != place[name]:
                raise ConfigError(f"training.{name} is {getattr(self.training, name)!r}, but {name} is {place[name]!r}.", "Set it once.")
        return self.training.model_copy(update=place)


def run(job: Job) -> Outcome:
    """Edit on the first images of `edit`; measure on the others, on `similar` and on every `locality` role."""
    config: RecipeConfig = job.config
    edited, others, apart = _roles(job)
    network = _hypernetwork(job)
    edits = _edit(job, edited, network)
    log = edits.logs[0]
    patch = edits.patch(0)
    base = fingerprint(job.model)
    sets = {"edited": edited, **({"others": others} if others is not None else {}), **apart}
    before = {name: outputs(job.model, examples) for name, examples in sets.items()}
    if patch.ops:
        with patch.applied(job.model, verify="structure"):
            states = (base, fingerprint(job.model))
            after = {name: outputs(job.model, examples) for name, examples in sets.items()}
    else:
        states, after = (base, base), before
    measurements = _measurements(sets, before, after, states)
    mask = edits.mask(0)
    return Outcome(
        patch,
        measurements,
        {"mask": mask} if mask is not None else {},
        _figures(log, network),
        _galleries(job.class_names, sets, before, after),
        _log(job, config, log, network, sets, before, after),
    )


def _roles(job: Job) -> tuple[Examples, Examples | None, dict[str, Examples]]:
    """(edited images, other failures of the group or None, locality sets by role). Raises DataError for overlaps and missing labels."""
    config, group = job.config, job.data["edit"]
    if group.labels is None:
        raise DataError("data.edit has no labels.", "Give the right class of every failing image.")
    if config.edit_images > len(group):
        raise DataError(f"edit_images is {config.edit_images}, but data.edit has {len(group)} images.", "Give more, or edit on fewer.")
    edited = group.take(range(config.edit_images))
    rest = [group.take(range(config.edit_images, len(group)))] if len(group) > config.edit_images else []
    similar = job.data.get("similar")
    if similar is not None:
        if similar.labels is None:
            raise DataError("data.similar has no labels.", "Generalisation is measured against the right classes.")
        known = {*edited.ids, *(name for part in rest for name in part.ids)}
        rows = [row for row, name in enumerate(similar.ids) if name not in known]  # leave-one-out: the edited image tells nothing
        rest += [similar.take(rows)] if rows else []
    apart = {role: examples for role, examples in job.data.items() if role.partition(".")[0] == "locality"}
    for role, examples in apart.items():
        for part in (edited, *rest):
            refuse_overlap(examples, part, f"data.{role}")
    return edited, _joined(rest), apart


def _joined(parts: Sequence[Examples]) -> Examples | None:
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    pictures = None if any(part.pictures is None for part in parts) else [part.pictures for part in parts]
    import numpy as np

    return Examples(
        {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs},
        tuple(name for part in parts for name in part.ids),
        torch.cat([part.labels for part in parts if part.labels is not None]),
        None if pictures is None else np.concatenate(pictures),  # type: ignore[arg-type]
    )


def _hypernetwork(job: Job) -> MaskHypernetwork | None:
    config: RecipeConfig = job.config
    if config.baseline is not None or config.mask not in ("learned", "constant"):
        return None
    if config.hypernetwork != "train":
        return MaskHypernetwork.load(Path(config.hypernetwork).expanduser())
    ordinary = job.data.get("unlabelled")
    if ordinary is None:
        raise DataError(
            f"A {config.mask} mask needs a hypernetwork, and there is no data.unlabelled to train it on.",
            "Give ordinary images as data.unlabelled, or a trained hypernetwork, or set mask to gradient-norm.",
        )
    network = train_mask_hypernetwork(job.model, ordinary.inputs["pixel_values"], config.trained(), job.work.room("hypernetwork"), job.seed)
    network.save(job.work.folder / "hypernetwork.safetensors")
    return network


def _edit(job: Job, edited: Examples, network: MaskHypernetwork | None) -> Edits:
    config: RecipeConfig = job.config
    assert edited.labels is not None
    group = [list(range(len(edited)))]
    if config.baseline == "lora":
        return lora(job.model, edited.inputs, edited.labels, config.rank, config.edit(), job.seed, group)
    if config.baseline is not None:
        return fine_tune(job.model, edited.inputs, edited.labels, config.baseline, config.edit(), group)
    ordinary = None
    if config.locality_weight:
        source = job.data.get("unlabelled")
        if source is None:
            raise DataError("locality_weight needs ordinary images.", "Give them as data.unlabelled, or set locality_weight to 0.")
        ordinary = source.take(range(min(ORDINARY, len(source)))).inputs
    return edit_many(
        job.model, edited.inputs, edited.labels, config.mask, config.edit(), job.seed, group, hypernetwork=network, ordinary=ordinary
    )


Logits = Mapping[str, torch.Tensor]


def _measurements(sets: Mapping[str, Examples], before: Logits, after: Logits, states: tuple[str, str]) -> list[Measurement]:
    made = [success(before["edited"], after["edited"], sets["edited"].labels, states, unit="image")]
    for name, examples in sets.items():
        if name == "others":
            made.append(accuracy(before[name], after[name], examples.labels, states, "generalisation"))
        elif name != "edited":
            made.append(locality(before[name], after[name], states, name))
            if examples.labels is not None:
                made.append(accuracy(before[name], after[name], examples.labels, states, f"accuracy.{name}"))
    return made


def _figures(log: Mapping[str, Any], network: MaskHypernetwork | None) -> list[Figure]:
    figures = []
    if "open" in log:
        rows = [{"matrix": name, "entries": count} for name, count in log["open"].items()]
        caption = "Rows (up) and columns (down) that the edit was allowed to change."
        figures.append(Figure("open-entries", "Open entries by matrix", "bars", "matrix", "entries", rows, caption=caption))
    curve = network.made.report.get("curve", []) if network is not None else []
    if curve and network is not None:
        rows = [
            {"epoch": epoch, "loss": pair[side], "pairs": name}
            for side, name in enumerate(("training", "held out"))
            for epoch, pair in enumerate(curve, 1)
        ]
        text = report_text(network.made.report)
        figures.append(Figure("hypernetwork", "Mask hypernetwork", "curve", "epoch", "loss", rows, series="pairs", caption=text))
    return figures


def _galleries(names: Sequence[str], sets: Mapping[str, Examples], before: Logits, after: Logits) -> list[Gallery]:
    def named(numbers: Sequence[int]) -> list[str]:
        return [names[number] if number < len(names) else str(number) for number in numbers]

    found = []
    for name, examples in sets.items():
        first, second = before[name].argmax(1), after[name].argmax(1)
        if name in ("edited", "others"):
            rows = list(range(min(SHOWN, len(examples))))
            title = "Edited images" if name == "edited" else "Similar failures, not edited on"
        else:
            rows = (first != second).nonzero().flatten().tolist()[:SHOWN]
            title = f"{name}: predictions that changed"
        if examples.pictures is None or not rows:
            continue
        truth = first[rows] if examples.labels is None else examples.labels[rows]
        caption = "" if examples.labels is not None else "No labels: the truth shown is the prediction before the edit."
        sides = [named(side.tolist()) for side in (first[rows], second[rows], truth)]
        found.append(Gallery(name, title, examples.pictures[rows], *sides, caption=caption))
    return found


def _log(
    job: Job,
    config: RecipeConfig,
    log: Mapping[str, Any],
    network: MaskHypernetwork | None,
    sets: Mapping[str, Examples],
    before: Logits,
    after: Logits,
) -> dict[str, Any]:
    names = job.class_names
    flips = [
        {"set": name, "id": examples.ids[row], "before": _name(names, first), "after": _name(names, second)}
        for name, examples in sets.items()
        if name.startswith("locality")
        for row, (first, second) in enumerate(zip(before[name].argmax(1).tolist(), after[name].argmax(1).tolist(), strict=True))
        if first != second
    ]
    told: dict[str, Any] = {**log, "edited": list(sets["edited"].ids), "flips": flips[:SHOWN], "flips_total": len(flips)}
    if "others" not in sets:
        told["generalisation"] = "not measured: there is no other failure of the group"
    if network is not None:
        told["hypernetwork"] = {
            **{key: value for key, value in network.made.report.items() if key != "curve"},
            "says": report_text(network.made.report),
        }
        if not network.learned:
            told["recommendation"] = "mask: constant, or mask: gradient-norm"
    return told


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if number < len(names) else str(number)


def estimate(job: Job) -> Estimate:
    """Time one gradient step, and a label and a training step where a hypernetwork is to be trained; multiply by how many there are."""
    config: RecipeConfig = job.config
    place = Place.of(job.model, config.first_block, config.blocks, config.tower)
    edited = job.data["edit"].take(range(min(config.edit_images, len(job.data["edit"]))))
    keep = 1.0 if config.mask == "dense" else config.keep
    matrices = len(place.matrices) * place.entries * place.width * 4
    with guarded(place.model):
        rows = Rows(place, edited.inputs)
        step = _seconds(lambda: _one_step(place, rows))
    said = [f"{config.steps} steps of {step:.3g} s at most"]
    seconds, peak = step * config.steps, int(matrices * keep * 6) + _activations(place, rows) * len(edited)
    ordinary = job.data.get("unlabelled")
    if config.baseline is None and config.mask in ("learned", "constant") and config.hypernetwork == "train" and ordinary is not None:
        training = config.trained()
        pixels = ordinary.inputs["pixel_values"][: min(8, len(ordinary))].to(place.device)
        label = _seconds(lambda: first_order_labels(place, pixels, pixels.flip(0))) / len(pixels)
        passes = 1 if training.labels.kind == "fo" else 4 * (1 + training.labels.outer_steps * training.labels.inner_steps)
        network_size = training.depth * 6 * place.tower.width**2 + place.rows * place.entries * place.tower.width
        updates = training.epochs * training.steps_per_batch * -(-int(training.pairs * (1 - training.held_out)) // training.batch)
        update = 6 * network_size * training.batch / 2e10 + 20 * network_size / 5e9  # 20 GFLOP/s, 5 GB/s: a slow core
        seconds += label * passes * training.pairs + updates * update
        said.append(f"{training.pairs} labels of {label * passes:.3g} s, {updates} hypernetwork updates of about {update:.3g} s at most")
        held = training.pairs * place.rows * place.entries * 6
        chunk = training.chunk * (_activations(place, rows) + (4 * matrices if training.labels.kind == "ref" else 0))
        peak = max(peak, held + network_size * 4 * 5, chunk)
    return Estimate(int(peak), float(seconds), "timed on this machine: " + "; ".join(said))


def _one_step(place: Place, rows: Rows) -> None:
    weights = [matrix.start().float().expand(1, -1, -1).clone().requires_grad_() for matrix in place.matrices]
    logits = rows.logits([Leaf(matrix, weight) for matrix, weight in zip(place.matrices, weights, strict=True)])
    torch.autograd.grad(kl_to_target(torch.zeros_like(logits), logits).sum(), weights)


def _activations(place: Place, rows: Rows) -> int:
    """Bytes that autograd keeps for one image: about 14 vectors of width d and 3 of h per token and block above the edit."""
    hidden = rows.prefix.hidden
    return hidden.shape[1] * (14 * hidden.shape[2] + 3 * place.entries) * 4 * (place.tower.n_layers - place.first)


def _seconds(work: Any) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


STARTER = """\
# Fix a vision transformer on one kind of image it gets wrong, and measure what else changed.
version: 1
seed: 0
model: path/to/model            # a Hugging Face checkpoint with an image classifier, or lab:NAME

data:
  edit:                         # failing images with their right labels; the first edit_images are edited on, the others test it
    source: path/to/failures    # a folder with one sub-folder per class, a .parquet or .jsonl file, ...
    only: wrong                 # keep those that the model gets wrong
  locality.random:              # unrelated images whose predictions must stay
    source: path/to/others
    limit: 200
  unlabelled:                   # ordinary images; labels are not looked at. Needed to train the mask hypernetwork
    source: path/to/ordinary
    limit: 2000

method:
  name: where-to-edit
  mask: learned                 # gradient-norm needs no training and no unlabelled images
  keep: 0.05                    # share of feed-forward rows and columns that may change (or sparsity: 0.95)
  lr: 2.0e-5                    # ViT-B/16; small models trained from scratch need 1e-4 to 1e-3
  stop_ce: 0.01                 # stop when the images are right with at most this loss; .3 for small models
  edit_images: 1

checks:
  - {measurement: success, op: ">=", threshold: 1}
  - {measurement: generalisation, statistic: difference, op: ">", threshold: 0}
  - {measurement: locality.random, op: ">=", threshold: 0.95}
"""

METHOD = Method(
    name="where-to-edit",
    title="Where-to-Edit",
    paper="arXiv 2411.01948",
    summary="fix a vision transformer's failures on a rare group of images from one example each",
    config=RecipeConfig,
    roles={
        "edit": "failing images with their right labels; the first edit_images are edited on, the others measure generalisation",
        "similar?": "further failures of the same group, with labels, to measure generalisation",
        "locality*": "unrelated images whose predictions must stay, for example locality.random and locality.sensitive",
        "unlabelled?": "ordinary images to train the mask hypernetwork on; labels are not used",
    },
    run=run,
    estimate=estimate,
    starter=STARTER,
    default_checks=({"measurement": "success", "op": ">=", "threshold": 1.0},),
)
