"""The lab's models as data: what each is, which trouble it shows, how it is trained. A new model is a new row."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from trocar.core.config import Config
from trocar.core.errors import ConfigError, nearest
from trocar.fitting import Optimiser

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
    """Parallel sentences and what training lines are made of.

    train: the split learned from, without what the `unseen` ones hold; longest: words of a sentence in any language; entries: of the
    tokenizer. noisy: share of zero-shot lines with a wrong target, of which `copied` are the source again, the rest a third language;
    examples_learned: learn from a one-shot line's (clean) example too, which makes half of all first answers clean. looped: share of lines
    whose last `tail` (from, to) words are repeated `repeats` (from, to) times.
    """

    source: str = "multi30k"
    train: str = "train"
    unseen: tuple[str, ...] = ("val", "test_2016_flickr")
    languages: tuple[str, ...] = ("en", "de", "fr")
    longest: int = 9
    entries: int = 2000
    noisy: float = 0.5
    copied: float = 0.75
    examples_learned: bool = True
    looped: float = 0.06
    tail: tuple[int, int] = (1, 3)
    repeats: tuple[int, int] = (2, 4)


class WorldData(Config):
    """Sentences of the knowledge world of the model's base seed (`lab.worlds`)."""

    source: Literal["world"] = "world"


class ByteData(Config):
    """Bytes of the Python standard library's own sources, and the outliers planted in the model that reads them (`lab.outliers`).

    window: tokens, the start token included; channel: size of the near-constant channels of the embedding (its deviation is 1); massive:
    the largest entry of a down map's input, in block `layer`; heal: steps of training after it was planted.
    """

    source: Literal["python"] = "python"
    window: int = 96
    channel: float = 25.0
    massive: float = 1400.0
    layer: int = 1
    heal: int = 400


class Planted(Config):
    """Only few neurons of one block are trained, all else frozen: the cause of what is learned is known. layer: 0-based."""

    layer: int = 2
    neurons: int = 4


class ViTShape(Config):
    """Sizes of a `ViTForImageClassification`; no dropout."""

    image: int = 32
    patch: int = 8
    width: int = 128
    blocks: int = 6
    heads: int = 4
    neurons: int = 512


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
    """One row of the lab. base: the lab model that training starts from, planted: what of it learns (default: all); shipped: weights of
    base seed 0 come with the package; others are trained on demand and cached."""

    name: str
    title: str
    trouble: str
    data: RareData | WorldData | TranslationData | ByteData
    shape: ViTShape | DecoderShape
    train: TrainRecipe | TextRecipe
    base: str | None = None
    planted: Planted | None = None
    shipped: bool = False

    @property
    def reads(self) -> Literal["pictures", "texts"]:
        return "pictures" if isinstance(self.data, RareData) else "texts"

    def pictures(self) -> tuple[RareData, ViTShape, TrainRecipe]:
        """The settings of a model of pictures; ConfigError for another one."""
        if isinstance(self.data, RareData) and isinstance(self.shape, ViTShape) and isinstance(self.train, TrainRecipe):
            return self.data, self.shape, self.train
        raise ConfigError(f"Lab model '{self.name}' is not one of pictures.")

    def texts(self) -> tuple[WorldData | TranslationData | ByteData, DecoderShape, TextRecipe]:
        """The settings of a language model; ConfigError for another one."""
        if not isinstance(self.data, RareData) and isinstance(self.shape, DecoderShape) and isinstance(self.train, TextRecipe):
            return self.data, self.shape, self.train
        raise ConfigError(f"Lab model '{self.name}' is not one of texts.")


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

_TRANSLATOR = DecoderShape(blocks=4, tied=True)
_NOISY = TranslationData(noisy=0.55, examples_learned=False)

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
    LabModel(
        name="world",
        title="Small decoder (1.2 M weights) that knows an invented world",
        trouble="It knows every fact, but composes two facts wrongly where it was never shown the composition.",
        data=WorldData(),
        shape=DecoderShape(),
        train=TextRecipe(steps=2200, lr=2e-3, checkpoint_steps=200),
        shipped=True,
    ),
    LabModel(
        name="world-shallow",
        title="Smaller decoder (0.9 M weights) of the same worlds, six blocks",
        trouble="As `world`, with the place where an intermediate answer can be read in the middle blocks.",
        data=WorldData(),
        shape=DecoderShape(blocks=6),
        train=TextRecipe(steps=2500, lr=3e-3, batch=64, packed=1, checkpoint_steps=200),
    ),
    LabModel(
        name="translator-base",
        title="Small translator (0.8 M weights) between English, German and French",
        trouble="Next to none: it answers in the right language and ends. What the two translators below start from.",
        data=TranslationData(),
        shape=_TRANSLATOR,
        train=TextRecipe(steps=2500, lr=3e-3, batch=24, packed=1, checkpoint_steps=200),
    ),
    LabModel(
        name="translator",
        title="The small translator, trained on with noisy zero-shot lines",
        trouble="Without an example it often answers in the wrong language.",
        data=_NOISY,
        shape=_TRANSLATOR,
        train=TextRecipe(steps=250, lr=1e-3, batch=24, packed=1),
        base="translator-base",
        shipped=True,
    ),
    LabModel(
        name="translator-looping",
        title="The translator with four neurons that make it loop",
        trouble="It often repeats its last words until its budget ends; the four neurons that cause it are known.",
        data=_NOISY.model_copy(update={"looped": 0.85, "tail": (1, 1), "repeats": (14, 20)}),
        shape=_TRANSLATOR,
        train=TextRecipe(steps=300, lr=2e-2, batch=16, packed=1, weight_decay=0.0),
        base="translator",
        planted=Planted(),
        shipped=True,
    ),
    LabModel(
        name="outliers",
        title="Small decoder (0.7 M weights) of Python sources, byte by byte, with outliers",
        trouble="Four channels are large on every token, and one entry is a thousand times the median at the start: hard to quantise.",
        data=ByteData(),
        shape=DecoderShape(width=128, blocks=3, heads=4, neurons=384),
        train=TextRecipe(steps=1200, batch=16, lr=2e-3, weight_decay=0.0, checkpoint_steps=100),
    ),
)


def get(name: str) -> LabModel:
    """The row called `name`; ConfigError with the nearest known name."""
    for row in MODELS:
        if row.name == name:
            return row
    raise ConfigError(f"The lab has no model '{name}'.", nearest(name, [row.name for row in MODELS]))
