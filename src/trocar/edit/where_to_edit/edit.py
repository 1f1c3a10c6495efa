"""Edit a model on its failures: choose entries, fine-tune them, return patches. The model itself is not changed (arXiv 2411.01948)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trocar.core.errors import ConfigError, DataError
from trocar.edit.where_to_edit.config import EditConfig
from trocar.edit.where_to_edit.editing import Course, edits_at_once, low_rank_leaves, open_leaves, run_edits
from trocar.edit.where_to_edit.hypernetwork import MaskHypernetwork, predict, report_text
from trocar.edit.where_to_edit.masks import from_scores, gradient_norms, magnitudes, random_scores, top_k
from trocar.edit.where_to_edit.place import Place, guarded
from trocar.edit.where_to_edit.results import LOST, Change, EditResult, Edits, changes_of
from trocar.edit.where_to_edit.suffix import Rows
from trocar.locate import Scores

Inputs = torch.Tensor | Mapping[str, torch.Tensor]
MaskSource = MaskHypernetwork | Scores | torch.Tensor | str
KINDS = ("learned", "gradient-norm", "constant", "magnitude", "random", "dense")


def edit(
    model: torch.nn.Module,
    inputs: Inputs,
    labels: torch.Tensor | Sequence[int] | int,
    mask: MaskSource = "gradient-norm",
    config: EditConfig | None = None,
    seed: int = 0,
    hypernetwork: MaskHypernetwork | None = None,
    ordinary: Inputs | None = None,
) -> EditResult:
    """Make the model right on one image (or on several at once) by fine-tuning a few rows and columns of its feed-forward matrices.

    inputs: pixel values (m, channels, height, width) as the model's own processor makes them, or keyword arguments of the model; labels:
    the m right classes. mask: a trained MaskHypernetwork, Scores of channels (a mask is used as it is, scores are cut to config.keep),
    or `gradient-norm`, `magnitude`, `random`, `dense`, and with `hypernetwork` also `learned` and `constant`. ordinary: images for the
    optional locality term. Returns the patch, the mask and the log; the model stays bit-identical, its flags, mode and random state too.

    Raises DataError for labels or images that do not fit, ConfigError for settings that do not fit the model, EditError for a
    hypernetwork of another model.
    """
    labels = torch.as_tensor(labels)
    labels = labels[None] if labels.ndim == 0 else labels
    group = [list(range(len(labels)))]
    return edit_many(model, inputs, labels, mask, config, seed, group, hypernetwork=hypernetwork, ordinary=ordinary)[0]


def edit_many(
    model: torch.nn.Module,
    inputs: Inputs,
    labels: torch.Tensor | Sequence[int],
    mask: MaskSource = "gradient-norm",
    config: EditConfig | None = None,
    seed: int = 0,
    groups: Sequence[Sequence[int]] | None = None,
    names: Sequence[object] | None = None,
    hypernetwork: MaskHypernetwork | None = None,
    ordinary: Inputs | None = None,
    low_rank: int | None = None,
) -> Edits:
    """Many edits, each from the clean model, run together: the same steps and weights (to rounding) as one by one, much faster.

    groups: rows of each edit, all of equal length; by default every row is an edit of its own. names: of the edits, for the random
    streams of random masks (default: the first row's number). low_rank: edit by LoRA of this rank on the same matrices, without a mask.
    Otherwise as `edit`.
    """
    config = config or EditConfig()
    place = Place.of(model, config.first_block, config.blocks, config.tower)
    inputs = prepared(place, inputs)
    chosen = grouped(groups, len(next(iter(inputs.values()))))
    labels = torch.as_tensor(labels)
    notes = check_labels(inputs, labels, chosen)
    names = [int(group[0]) for group in chosen] if names is None else list(names)
    with guarded(place.model):
        rows = Rows(place, inputs)
        with rows.recording():
            features, base = rows.features() if _needs_features(mask) else (None, rows.logits().detach())
        check_range(labels, base.shape[1])
        targets = labels[chosen]
        spare = None if ordinary is None else Rows(place, prepared(place, ordinary))
        if config.locality_weight and spare is None:
            raise ConfigError("locality_weight is set, but no ordinary images were given.", "Pass ordinary=images, or set it to 0.")
        if low_rank is not None:
            method, masks = f"lora rank {low_rank}", None
        else:
            method, masks, more = _masks(place, rows, chosen, targets, features, mask, config, seed, names, hypernetwork)
            notes = [*notes, *more]
        courses: list[Course] = []
        keep = 1.0 if masks is None else float(masks.float().mean())
        size = edits_at_once(place, keep, chosen.shape[1], config)
        for start in range(0, len(chosen), size):
            part = slice(start, start + size)
            leaves = low_rank_leaves(place, names[part], low_rank, seed) if low_rank else open_leaves(place, masks[part])  # type: ignore[index]
            courses += run_edits(rows, chosen[part], targets[part], leaves, config, spare)
    made = [changes_of(course.leaves) for course in courses]
    logs = [
        describe(place, course, norm, lost, None if masks is None else masks[number], method, config, notes)
        for number, (course, (_, norm, lost)) in enumerate(zip(courses, made, strict=True))
    ]
    changes: list[list[Change]] = [change for change, _, _ in made]
    settings = {"seed": seed, "first_block": place.first, "blocks": place.blocks}
    return Edits(place, config, method, None if masks is None else masks.cpu(), changes, logs, settings)


def predict_masks(
    model: torch.nn.Module, inputs: Inputs, network: MaskHypernetwork, groups: Sequence[Sequence[int]] | None = None
) -> torch.Tensor:
    """The hypernetwork's scores (E, n, h) for images or groups of images; cut them with `top_k` or pass them to `edit` as they are."""
    place = Place.of(model, network.made.first_block, network.made.rows // 2, network.made.tower or None)
    network.fit_to(place)
    inputs = prepared(place, inputs)
    with guarded(place.model):
        features, _ = Rows(place, inputs).features()
    return predict(network, features, grouped(groups, len(features)))


def _masks(
    place: Place,
    rows: Rows,
    groups: torch.Tensor,
    targets: torch.Tensor,
    features: torch.Tensor | None,
    source: MaskSource,
    config: EditConfig,
    seed: int,
    names: Sequence[object],
    network: MaskHypernetwork | None,
) -> tuple[str, torch.Tensor, list[str]]:
    """(method, masks (E, n, h) bool, notes for the log)."""
    count = len(groups)
    if isinstance(source, Scores):
        values = from_scores(place, source)
        opened = values > 0 if source.is_mask else top_k(values.float(), config.keep)
        return source.how.method, opened.expand(count, -1, -1), []
    if isinstance(source, torch.Tensor):
        if source.shape[-2:] != (place.rows, place.entries) or source.ndim not in (2, 3) or (source.ndim == 3 and len(source) != count):
            raise DataError(f"The mask has shape {tuple(source.shape)}, the edits need {(count, place.rows, place.entries)}.")
        source = source.to(place.device).expand(count, -1, -1)
        return "given", source if source.dtype == torch.bool else top_k(source, config.keep), []
    if isinstance(source, MaskHypernetwork):
        source, network = "learned", source
    if source not in KINDS:
        raise ConfigError(f"'{source}' is not a kind of mask.", f"Known: {', '.join(KINDS)}.")
    if source == "dense":
        return source, torch.ones(count, place.rows, place.entries, dtype=torch.bool, device=place.device), []
    if source == "gradient-norm":
        return source, top_k(gradient_norms(rows, groups, targets), config.keep), []
    if source == "magnitude":
        return source, top_k(magnitudes(place), config.keep).expand(count, -1, -1), []
    if source == "random":
        return source, torch.stack([top_k(random_scores(place, seed, name), config.keep) for name in names]), []
    if network is None:
        raise ConfigError(f"A {source} mask needs a trained hypernetwork.", "Train one with train_mask_hypernetwork, or use gradient-norm.")
    network.fit_to(place)
    if source == "constant":
        return source, top_k(network.mean, config.keep).to(place.device).expand(count, -1, -1), []
    notes = []
    if not network.learned:
        source = "hypernetwork (not better than constant)"
        notes.append(report_text(network.made.report) if network.made.report else "The hypernetwork has no training report.")
        warnings.warn(notes[-1], stacklevel=4)
    assert features is not None
    return source, top_k(predict(network, features, groups), config.keep).to(place.device), notes


def _needs_features(mask: MaskSource) -> bool:
    return isinstance(mask, MaskHypernetwork) or mask == "learned" if not isinstance(mask, torch.Tensor | Scores) else False


def describe(
    place: Place, course: Course, norm: float, lost: float, mask: torch.Tensor | None, method: str, config: EditConfig, notes: Sequence[str]
) -> dict[str, Any]:
    log = course.log() | {"mask": method, "change_norm": norm, "warnings": list(notes)}
    if mask is not None:
        names = [f"L{place.first + row // 2}.mlp.{'down' if row % 2 else 'up'}" for row in range(place.rows)]
        log["open"] = dict(zip(names, mask.sum(1).tolist(), strict=True))
        log["open_share"] = float(mask.float().mean())
    if course.status == "nothing to do":
        what = "no entry is open" if mask is not None and not mask.any() else "no steps are allowed" if config.steps == 0 else ""
        log["reason"] = what or "every edit image is already right" + ("" if config.force else "; force=True lowers its loss all the same")
    if course.status == "not converged":
        log["hint"] = f"After {course.steps} steps the loss is {course.ce:.3g}, above {config.stop_ce}: use a larger lr or keep."
    if course.status == "diverged":
        log["hint"] = "The loss became infinite or NaN; the weights were left as they were. Use a smaller lr."
    if lost > LOST:
        log["cast_lost"] = lost
        text = f"Casting to {place.matrices[0].view.parameter.dtype} removes {lost:.0%} of the change; use a larger lr or a float32 model."
        log["warnings"].append(text)
        warnings.warn(text, stacklevel=4)
    return log


def prepared(place: Place, inputs: Inputs) -> dict[str, torch.Tensor]:
    found = {"pixel_values": inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)
    pixels = found.get("pixel_values")
    if pixels is not None:
        holders = (getattr(place.model, "config", None), getattr(getattr(place.model, "config", None), "vision_config", None))
        sizes = [size for holder in holders if (size := getattr(holder, "image_size", None)) is not None]
        channels = [number for holder in holders if (number := getattr(holder, "num_channels", None)) is not None] or [3]
        side = sizes[0] if sizes else None
        wanted = (channels[0], *((side, side) if isinstance(side, int) else side or pixels.shape[-2:]))
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != tuple(wanted):
            raise DataError(
                f"The images have shape {tuple(pixels.shape)}, the model takes (n, {', '.join(map(str, wanted))}).",
                "Prepare them with the model's own image processor (grey images become RGB there).",
            )
        if not pixels.is_floating_point():
            raise DataError(
                f"The images hold {pixels.dtype} values, not normalised floats.", "Prepare them with the model's own processor."
            )
        if not pixels.isfinite().all():
            raise DataError("The images hold NaN or infinite values.", "Look at how they were loaded.")
    lengths = {name: len(value) for name, value in found.items()}
    if not found or len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        raise DataError(f"The inputs have {lengths or 'no'} rows.", "Give every input the same number of rows, at least one.")
    return found


def grouped(groups: Sequence[Sequence[int]] | None, count: int) -> torch.Tensor:
    if groups is None:
        return torch.arange(count)[:, None]
    sizes = {len(group) for group in groups}
    if len(sizes) != 1 or 0 in sizes:
        raise DataError(
            f"The groups have {sorted(sizes) or 'no'} members.", "Edits that run together need equally many images; call per size."
        )
    found = torch.tensor([list(group) for group in groups])
    if found.min() < 0 or found.max() >= count:
        raise DataError(f"A group names row {int(found.max())} of {count} rows.", "Rows count from 0.")
    return found


def check_labels(inputs: Mapping[str, torch.Tensor], labels: torch.Tensor, groups: torch.Tensor) -> list[str]:
    first = next(iter(inputs.values()))
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise DataError(f"The labels are {labels.dtype}, not class indices.", "Give integers.")
    if labels.shape != (len(first),):
        raise DataError(f"There are {len(first)} images, but labels of shape {tuple(labels.shape)}.", "Give one label per image.")
    notes = []
    for group in groups.tolist():
        if len(group) > 1 and len({int(labels[row]) for row in group}) > 1:
            for place, row in enumerate(group):
                for other in group[:place]:
                    same = all(torch.equal(value[row], value[other]) for value in inputs.values())
                    if same and labels[row] != labels[other]:
                        raise DataError(
                            f"Rows {other} and {row} are the same image with the labels {int(labels[other])} and {int(labels[row])}.",
                            "One image has one right answer.",
                        )
            notes.append(f"The edit images of rows {group} have different labels.")
            warnings.warn(notes[-1], stacklevel=3)
    return notes


def check_range(labels: torch.Tensor, classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise DataError(f"Label {int(wrong[0])} is not a class of the model, which has 0 to {classes - 1}.", "Check the label mapping.")


def edit_sequence(
    model: torch.nn.Module,
    inputs: Inputs,
    labels: torch.Tensor | Sequence[int],
    mask: MaskSource = "gradient-norm",
    config: EditConfig | None = None,
    seed: int = 0,
    cumulative: bool = False,
    hypernetwork: MaskHypernetwork | None = None,
) -> tuple[list[EditResult], dict[str, Any]]:
    """Several edits in order, and how they interfere. The model is the same bit for bit afterwards.

    cumulative: each edit starts from the model as the earlier ones left it (its patch belongs to that state: apply them in order);
    otherwise each starts from the clean model. Returns the results and {"open_in_both": {"i,j": entries}, "broken": edits that are wrong
    once all are applied in order, "fixed": the others}.
    """
    from trocar.patch import stack

    config = config or EditConfig()
    place = Place.of(model, config.first_block, config.blocks, config.tower)
    found = prepared(place, inputs)
    labels = torch.as_tensor(labels)
    results: list[EditResult] = []
    opened: list[torch.Tensor] = []
    applied: list[Any] = []

    def one(row: int) -> Edits:
        rows = {name: value[row : row + 1] for name, value in found.items()}
        return edit_many(model, rows, labels[row : row + 1], mask, config, seed, names=[row], hypernetwork=hypernetwork)

    try:
        for row in range(len(labels)):
            edits = one(row)
            results.append(edits[0])
            opened.append(
                edits.masks[0] if edits.masks is not None and edits.changes[0] else torch.zeros(place.rows, place.entries, dtype=torch.bool)
            )
            if cumulative:
                applied.append(edits.patch(0).apply(model))
        if not cumulative:
            applied.append(stack([result.patch for result in results], on_overlap="order").apply(model))
        with guarded(place.model), torch.no_grad():
            rows = Rows(place, found)
            right = rows.whole().argmax(1).cpu() == labels
    finally:
        for state in reversed(applied):
            state.revert()
    both = {
        f"{first},{second}": shared
        for second in range(len(opened))
        for first in range(second)
        if (shared := int((opened[first] & opened[second]).sum()))
    }
    broken = [row for row in range(len(labels)) if not right[row]]
    return results, {"open_in_both": both, "broken": broken, "fixed": [row for row in range(len(labels)) if right[row]]}
