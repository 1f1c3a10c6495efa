"""Train a lab model and write it with its card; the pictures' stream and card (those of texts: `language_training`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trocar.core.errors import DataError
from trocar.core.files import write_json, write_text
from trocar.core.seeds import derive, generator
from trocar.fitting import Passes, fit_stream
from trocar.lab.pixels import decode_all, processor_for
from trocar.lab.rare import RareSplit, split
from trocar.lab.registry import LabModel, RareData, TrainRecipe, ViTShape, cache_folder, get


@dataclass(frozen=True)
class Made:
    """A trained model and what goes beside it. facts: measured on the stored, rounded weights, for `lab.json`; text: the card from them."""

    model: nn.Module
    processor: Any
    facts: Callable[[nn.Module], dict[str, Any]]
    text: Callable[[dict[str, Any]], str]


def train(name: str, device: str = "auto", out: str | Path | None = None, seed: int = 0) -> Path:
    """Train the lab model `name` from base seed `seed`, or return it if it is there already.

    Returns the folder: a Hugging Face checkpoint (float16 weights) with `lab.json` (recipe and measured accuracy). A killed training
    goes on at its last whole checkpoint. device: `auto` (a GPU if there is one), `cpu`, or `cuda`. out: default
    `<TROCAR_LAB>/NAME/seedSEED`. Raises DataError if the data set's files are missing.
    """
    row = get(name)
    folder = Path(out) if out else cache_folder() / name / f"seed{seed}"
    if (folder / "lab.json").exists():
        return folder
    work = folder.with_name(folder.name + ".training")
    if row.reads == "texts":
        from trocar.lab.language_training import make
    else:
        make = _make
    made = make(row, seed, work, device)
    half: Any = made.model.to("cpu", torch.float16)
    half.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    facts = {"model": json.loads(row.model_dump_json()), "seed": seed, **made.facts(half.float().eval()), "torch": torch.__version__}
    write_text(folder / "README.md", made.text(facts))
    write_json(folder / "lab.json", facts)  # last: its presence means "complete"
    shutil.rmtree(work, ignore_errors=True)
    return folder


def _make(row: LabModel, seed: int, work: Path, device: str) -> Made:
    data, shape, recipe = row.pictures()
    parts = split(data, seed)
    pixels = decode_all(parts.table, parts.train, shape.image)
    model = fit(new_vit(shape, parts.classes, seed), pixels, parts.labels(parts.train, data.label), recipe, work, seed, device)
    return Made(model, processor_for(shape.image), lambda half: _facts(parts, measure(half, data, shape, parts)), card_text)


def fit(
    model: nn.Module,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    recipe: TrainRecipe,
    work: Path,
    seed: int,
    device: str = "auto",
    stop_after: int | None = None,
) -> nn.Module:
    """Train `model` on `pixels` (n, 3, h, w) uint8 and `labels` (n,), resuming from `work`.

    stop_after ends early, after that many steps (tests).
    """
    steps = max(1, round(recipe.epochs * len(labels) / recipe.batch))
    return fit_stream(model, _Stream(pixels, labels, recipe, steps, seed), recipe, steps, work, seed, device, stop_after)


def new_vit(shape: ViTShape, classes: tuple[str, ...], seed: int) -> nn.Module:
    """A fresh `ViTForImageClassification`, linear maps Xavier-initialised from `seed`; the global random state is untouched."""
    import transformers

    config = transformers.ViTConfig(
        image_size=shape.image,
        patch_size=shape.patch,
        hidden_size=shape.width,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        intermediate_size=shape.neurons,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        model = transformers.ViTForImageClassification(config)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, batch: int = 500) -> float:
    """Share of right predictions on `pixels` (n, 3, h, w) uint8."""
    hits = [
        (model(pixel_values=_normal(pixels[i : i + batch])).logits.argmax(-1) == labels[i : i + batch]).sum()
        for i in range(0, len(labels), batch)
    ]
    return float(torch.stack(hits).sum()) / len(labels)


def measure(model: nn.Module, data: RareData, shape: ViTShape, parts: RareSplit) -> dict[str, float]:
    """Accuracy on test pictures of common parts and on unseen pictures of rare parts."""
    result = {}
    for name, rows in (("common_test", parts.common_test), ("rare_unseen", parts.rare_unseen)):
        result[name] = accuracy(model, decode_all(parts.table, rows, shape.image), parts.labels(rows, data.label))
    return result


def _facts(parts: RareSplit, measured: dict[str, float]) -> dict[str, Any]:
    return {
        "rare": dict(parts.rare),
        "train_pictures": len(parts.train),
        "common_test_pictures": len(parts.common_test),
        "rare_unseen_pictures": len(parts.rare_unseen),
        "accuracy": measured,
    }


def card_text(facts: dict[str, Any]) -> str:
    """The model card, from the facts in `lab.json`."""
    row, accuracy = facts["model"], facts["accuracy"]
    shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
    recipe = ", ".join(f"{name} {value}" for name, value in row["train"].items())
    rare = "\n".join(f"| {name} | {part} |" for name, part in facts["rare"].items())
    return f"""# {row["name"]}, base seed {facts["seed"]}

{row["title"]}. {row["trouble"]} Made to be repaired: a small model for demonstrations and tests, not for use.

- architecture: `ViTForImageClassification`, {shape}; no dropout; weights stored in float16, meant to be loaded in float32
- training: {facts["train_pictures"]:,} pictures of {row["data"]["source"]} (labels: `{row["data"]["label"]}`); {recipe}
- made by `trocar lab train {row["name"]} --seed {facts["seed"]}`
- accuracy of the stored weights: {accuracy["common_test"]:.3f} on {facts["common_test_pictures"]:,} test pictures of common parts, \
{accuracy["rare_unseen"]:.3f} on {facts["rare_unseen_pictures"]:,} unseen pictures of rare parts

| class | rare part ({row["data"]["keep"]} training pictures kept) |
|---|---|
{rare}
"""


def _normal(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1  # the processor's rescale and normalise with mean = std = .5


class _Stream(torch.utils.data.Dataset):
    """A training run's batches in order: item i is picture perm(epoch)[i mod n], flipped and shifted from its batch's own stream."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor, recipe: TrainRecipe, steps: int, seed: int) -> None:
        if len(pixels) != len(labels) or len(labels) == 0:
            raise DataError(f"Training needs as many pictures as labels and at least one ({len(pixels)} and {len(labels)} given).")
        self.pixels, self.labels, self.recipe, self.seed = pixels, labels, recipe, seed
        self.length = steps * recipe.batch
        self.order = Passes(len(labels), seed)

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, items: list[int]) -> dict[str, torch.Tensor]:
        rows = [self.order[item] for item in items]
        rng = generator(self.seed, "augment", items[0])
        pixels, s = self.pixels[rows].float() / 127.5 - 1, self.recipe.shift
        flip = torch.rand(len(rows), generator=rng) < 0.5
        pixels[flip] = pixels[flip].flip(-1)
        if s:
            size = pixels.shape[-1]
            padded = nn.functional.pad(pixels, (s, s, s, s), mode="reflect")
            moves = torch.randint(0, 2 * s + 1, (len(rows), 2), generator=rng)
            pixels = torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, moves.tolist(), strict=True)])
        return {"pixel_values": pixels, "labels": self.labels[rows]}
