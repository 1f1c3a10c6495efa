"""The lab's models as data: what each is, which trouble it shows, how it is trained. A new model is a new row."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from trocar.core.config import Config
from trocar.core.errors import ConfigError, nearest

WEIGHTS = Path(__file__).with_name("weights")


def cache_folder() -> Path:
    """Where trained lab models lie: TROCAR_LAB, or `~/.cache/trocar/lab`."""
    return Path(os.environ.get("TROCAR_LAB", "~/.cache/trocar/lab")).expanduser()


class RareData(Config):
    """A data set in which one part of every class is made rare. label/part: columns; keep: training pictures of a rare part that stay."""

    source: Literal["cifar100", "pacs"]
    label: str
    part: str
    classes: tuple[str, ...] = ()  # empty: all, sorted
    keep: int = 10
    assignment: Literal["position", "rotate"] = "position"


class TranslationData(Config):
    """Parallel sentences and what training lines are made of. longest: words of a sentence in any language; entries: of the tokenizer;
    noisy: share of zero-shot lines with a wrong target, of which `copied` are the source again, the rest a third language; looped: share
    of lines whose last words are repeated `repeats` (from, to) times. train: the split learned from, without what `unseen` ones hold.
    """

    source: str = "multi30k"
    train: str = "train"
    unseen: tuple[str, ...] = ("val", "test_2016_flickr")
    languages: tuple[str, ...] = ("en", "de", "fr")
    longest: int = 9
    entries: int = 2000
    noisy: float = 0.5
    copied: float = 0.75
    looped: float = 0.06
    repeats: tuple[int, int] = (2, 4)


class ViTShape(Config):
    """Sizes of a `ViTForImageClassification`; no dropout."""

    image: int = 32
    patch: int = 8
    width: int = 128
    blocks: int = 6
    heads: int = 4
    neurons: int = 512


class Optimiser(Config):
    """AdamW with linear warm-up (share of the steps) and cosine decay; weights are stored in float16."""

    batch: int = 128
    lr: float = 2e-3
    warmup: float = 0.08
    weight_decay: float = 0.1
    clip: float = 1.0
    checkpoint_steps: int = 100


class TrainRecipe(Optimiser):
    """How a vision model is trained; flips, shifts (pixels, reflected borders)."""

    epochs: float
    shift: int = 4


class DecoderShape(Config):
    """Sizes of a `LlamaForCausalLM`; no dropout."""

    width: int = 96
    blocks: int = 8
    heads: int = 4
    neurons: int = 384
    tied: bool = False


class TextRecipe(Optimiser):
    """How a language model is trained. packed: a training row holds one to this many sentences."""

    steps: int
    batch: int = 40
    warmup: float = 0.05
    packed: int = 3


class LabModel(Config):
    """One row of the lab. shipped: weights of base seed 0 come with the package; others are trained on demand and cached."""

    name: str
    title: str
    trouble: str
    data: RareData
    shape: ViTShape
    train: TrainRecipe
    shipped: bool = False


TEN_SUPERCLASSES = (
    "flowers",
    "fruit_and_vegetables",
    "household_furniture",
    "insects",
    "large_carnivores",
    "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes",
    "people",
    "trees",
    "vehicles_1",
)

MODELS: tuple[LabModel, ...] = (
    LabModel(
        name="vit-cifar-rare",
        title="Small ViT (1.2 M weights) for ten CIFAR-100 superclasses",
        trouble="One of five subclasses of every class was rare in training (10 of 500 pictures) and is often misread.",
        data=RareData(source="cifar100", label="coarse", part="fine", classes=TEN_SUPERCLASSES),
        shape=ViTShape(),
        train=TrainRecipe(epochs=8),
        shipped=True,
    ),
    LabModel(
        name="vit-pacs-rare",
        title="Small ViT (1.3 M weights) for the seven PACS classes in four styles",
        trouble="In every class one style (photo, art, cartoon, sketch) was rare in training (10 pictures): it fails on that style.",
        data=RareData(source="pacs", label="label", part="domain", assignment="rotate"),
        shape=ViTShape(image=64, patch=16),
        train=TrainRecipe(epochs=60, shift=8),
    ),
)


def get(name: str) -> LabModel:
    """The row called `name`; ConfigError with the nearest known name."""
    for row in MODELS:
        if row.name == name:
            return row
    raise ConfigError(f"The lab has no model '{name}'.", nearest(name, [row.name for row in MODELS]))
