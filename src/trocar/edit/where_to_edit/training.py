"""Train a mask hypernetwork on CutMix pairs: labels first, unit by unit, then a regression (arXiv 2411.01948)."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from trocar.anatomy import fingerprint, tensor_fingerprint
from trocar.core.errors import DataError, EditError
from trocar.core.files import atomic_path
from trocar.core.progress import track
from trocar.core.seeds import generator
from trocar.core.workspace import Workspace
from trocar.edit.where_to_edit.config import HypernetworkConfig, LabelConfig
from trocar.edit.where_to_edit.cutmix import cutmix_pairs, patch_size
from trocar.edit.where_to_edit.hypernetwork import CLAMP, Made, MaskHypernetwork, default_heads, made_for, report_text
from trocar.edit.where_to_edit.labels import calibrate, centred_log, check_open_share, first_order_labels, mask_labels
from trocar.edit.where_to_edit.place import Place, guarded
from trocar.edit.where_to_edit.suffix import Rows

CALIBRATION_PAIRS = 32


def train_mask_hypernetwork(
    model: torch.nn.Module,
    images: torch.Tensor,
    config: HypernetworkConfig | None = None,
    work: Workspace | None = None,
    seed: int = 0,
) -> MaskHypernetwork:
    """Learn to predict, from the class token of a picture, which feed-forward entries would have to move to undo a disturbance of it.

    images: (n, channels, height, width), preprocessed, ordinary pictures; no labels and no failures are used. work: a folder of committed
    units; a run that is killed goes on where it was and ends with the same weights. The result knows the model it belongs to, its held-out
    loss beside that of the constant mask (`network.made.report`), and the constant mask itself (`network.mean`).

    Raises EditError when labels collapse or saturate, DataError for fewer than two images or a model without patches.
    """
    config = config or HypernetworkConfig()
    place = Place.of(model, config.first_block, config.blocks, config.tower)
    patch_size(place.model)
    heads = config.heads or default_heads(place.tower.width)
    identity: dict[str, Any] = made_for(place)
    identity["fingerprint"] = fingerprint(place.model)  # hashed anew: stored labels must be of these very weights
    key = {"config": config.model_dump(mode="json"), "seed": seed, "model": identity["fingerprint"], "images": tensor_fingerprint(images)}
    images = images.detach().cpu()
    labels, found = _calibrated(place, images, config, seed, work, key)
    features, targets = make_labels(place, images, config.model_copy(update={"labels": labels}), seed, work, key)
    report: dict[str, Any] = {"kind": labels.kind, "pairs": len(features), "calibration": found}
    if labels.kind == "ref":
        settings = {"alpha": labels.alpha, "sparsity_weight": labels.sparsity_weight}
        report |= settings | {"open": check_open_share(targets, settings)}
    made = Made(depth=config.depth, heads=heads, kind=labels.kind, **identity)
    network = MaskHypernetwork(made, seed).to(place.device)
    report |= fit(network, features.to(place.device), targets.to(place.device), config, seed, work, key)
    network.made = made.model_copy(update={"report": json.loads(json.dumps(report))})
    if not network.learned:
        warnings.warn(report_text(report), stacklevel=2)
    return network.eval()


def _calibrated(
    place: Place, images: torch.Tensor, config: HypernetworkConfig, seed: int, work: Workspace | None, key: Mapping[str, Any]
) -> tuple[LabelConfig, dict[str, Any]]:
    labels = config.labels
    if labels.kind == "fo" or not (isinstance(labels.alpha, str) or isinstance(labels.sparsity_weight, str)):
        return labels, {}

    def compute() -> dict[str, Any]:
        count = range(min(CALIBRATION_PAIRS, config.pairs))
        clean, mixed = cutmix_pairs(images, count, patch_size(place.model), config.cutmix, seed)
        settled, log = calibrate(place, clean.to(place.device), mixed.to(place.device), labels, seed)
        return {"alpha": settled.alpha, "sparsity_weight": settled.sparsity_weight, "log": log}

    found = work.values("calibration", key, compute) if work else json.loads(json.dumps(compute()))
    return labels.model_copy(update={"alpha": found["alpha"], "sparsity_weight": found["sparsity_weight"]}), found["log"]


def make_labels(
    place: Place,
    images: torch.Tensor,
    config: HypernetworkConfig,
    seed: int,
    work: Workspace | None = None,
    key: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(features (pairs, d), labels (pairs, n, h) rounded to half precision), both float32, of the CutMix pairs, committed by chunk."""
    patch, parts = patch_size(place.model), []
    dtype = next(place.model.parameters()).dtype

    def compute(pairs: range) -> dict[str, torch.Tensor]:
        clean, mixed = (part.to(place.device, dtype) for part in cutmix_pairs(images, pairs, patch, config.cutmix, seed))
        if config.labels.kind == "fo":
            target = centred_log(first_order_labels(place, clean, mixed, config.labels.temperature))
        else:
            target, _ = mask_labels(place, clean, mixed, config.labels, seed, pairs)
        with guarded(place.model):
            features, _ = Rows(place, {"pixel_values": mixed}).features()
        return {"features": features.float().cpu(), "labels": target.half().cpu()}

    chunks = [range(start, min(start + config.chunk, config.pairs)) for start in range(0, config.pairs, config.chunk)]
    for number, pairs in enumerate(track(chunks, "mask labels", len(chunks))):
        if work is None:
            parts.append(compute(pairs))
        else:
            unit = {**(key or {}), "labels": config.labels.model_dump(mode="json"), "pairs": [pairs.start, pairs.stop]}
            parts.append(work.room("labels").tensors(f"{number:05d}", unit, lambda pairs=pairs: compute(pairs)))
    return torch.cat([part["features"] for part in parts]), torch.cat([part["labels"] for part in parts]).float()


def loss_of(kind: str, u: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy of sigmoid(3 u) clamped to [1e-5, 1 - 1e-5] (`ref`), or mean squared error of u (`fo`)."""
    if kind == "ref":
        return F.binary_cross_entropy(torch.sigmoid(MaskHypernetwork.SCALE * u).clamp(CLAMP, 1 - CLAMP), labels)
    return F.mse_loss(u, labels)


def fit(
    network: MaskHypernetwork,
    features: torch.Tensor,
    labels: torch.Tensor,
    config: HypernetworkConfig,
    seed: int,
    work: Workspace | None = None,
    key: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Regress labels on features with early stopping on held-out pairs; sets `network.mean`. Returns the report.

    RMSProp (decay .99, eps 1e-8) with a cosine learning rate over all epochs, `steps_per_batch` steps on each batch. With `work` the state
    is written after every epoch, so that a killed training goes on there.
    """
    kind = network.made.kind
    held = max(1, round(config.held_out * len(features)))
    if len(features) - held < 1:
        raise DataError(f"{len(features)} pairs are too few to hold {held} out.", "Make more pairs.")
    order = torch.randperm(len(features), generator=generator(seed, "held out"))
    train, test = order[held:].to(features.device), order[:held].to(features.device)
    average = labels[train].mean(0)
    network.mean.copy_(torch.logit(average.clamp(CLAMP, 1 - CLAMP)) / network.SCALE if kind == "ref" else average)
    if config.start == "mean":
        with torch.no_grad():
            for row, output in enumerate(network.outputs):
                output.weight.zero_()  # type: ignore[operator]
                output.bias.copy_(network.mean[row])  # type: ignore[operator]
    constant = float(loss_of(kind, network.mean.expand(held, -1, -1), labels[test]))
    optimiser = torch.optim.RMSprop(network.parameters(), lr=config.lr, alpha=0.99, eps=1e-8)
    best = {name: value.clone() for name, value in network.state_dict().items()}
    record: dict[str, Any] = {"epoch": 0, "best_epoch": 0, "held_out": math.inf, "curve": []}
    store = None if work is None else _Checkpoint(work, {**(key or {}), "pairs": len(features)})
    if store is not None and (saved := store.load()) is not None:
        record, tensors = saved
        network.load_state_dict({name.removeprefix("now."): value for name, value in tensors.items() if name.startswith("now.")})
        best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
        for name, parameter in network.named_parameters():
            if f"square.{name}" in tensors:
                state = {"step": torch.tensor(float(record["steps"])), "square_avg": tensors[f"square.{name}"].to(parameter.device)}
                optimiser.state[parameter] = state
    for epoch in track(range(record["epoch"], config.epochs), "hypernetwork", config.epochs - record["epoch"]):
        if epoch - record["best_epoch"] >= config.patience and epoch:
            break
        network.train()
        shuffled = train[torch.randperm(len(train), generator=generator(seed, "epoch", epoch)).to(train.device)]
        batches: Sequence[torch.Tensor] = shuffled.split(config.batch)
        seen = 0.0
        for number, batch in enumerate(batches):
            rate = 0.5 * config.lr * (1 + math.cos(math.pi * (epoch + number / len(batches)) / config.epochs))
            for group in optimiser.param_groups:
                group["lr"] = rate
            for step in range(config.steps_per_batch):
                loss = loss_of(kind, network(features[batch]), labels[batch])
                seen += float(loss.detach()) * len(batch) * (step == 0)
                optimiser.zero_grad(set_to_none=True)
                (config.loss_scale * loss).backward()
                optimiser.step()
                record["steps"] = record.get("steps", 0) + 1
        network.eval()
        with torch.no_grad():
            parts = [loss_of(kind, network(features[part]), labels[part]) * len(part) for part in test.split(256)]
        loss_now = float(torch.stack(parts).sum()) / held
        if not math.isfinite(loss_now):
            raise EditError(f"The hypernetwork diverged in epoch {epoch + 1}.", "Use a smaller lr.")
        record["curve"].append([seen / len(train), loss_now])
        record["epoch"] = epoch + 1
        if loss_now < record["held_out"]:
            record |= {"held_out": loss_now, "best_epoch": epoch + 1}
            best = {name: value.clone() for name, value in network.state_dict().items()}
        if store is not None:
            now = {f"now.{name}": value for name, value in network.state_dict().items()}
            squares = {
                f"square.{name}": optimiser.state[parameter]["square_avg"]
                for name, parameter in network.named_parameters()
                if parameter in optimiser.state
            }
            store.save(record, now | squares | {f"best.{name}": value for name, value in best.items()})
    network.load_state_dict(best)
    return {
        "held_out": record["held_out"],
        "constant": constant,
        "better_than_constant": record["held_out"] < constant,
        "held_out_pairs": held,
        "epochs": record["epoch"],
        "best_epoch": record["best_epoch"],
        "curve": record["curve"],
    }


class _Checkpoint:
    """The state after the last finished epoch: one file, replaced atomically, valid only for its key."""

    def __init__(self, work: Workspace, key: Mapping[str, Any]) -> None:
        self.path = work.folder / "hypernetwork-training.safetensors"
        self.key = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()

    def save(self, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        # one metadata key: with several their order in the file is not fixed, and a resumed run must end with the same bytes
        flat = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        with atomic_path(self.path) as temporary:
            save_file(flat, temporary, metadata={"trocar": json.dumps({"key": self.key, "record": record}, sort_keys=True)})

    def load(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("trocar", "{}"))
                if header.get("key") != self.key:
                    return None
                return header["record"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise DataError(f"{self.path} is damaged: {error}.", "Delete it; the training starts again from the stored labels.") from None
