"""What a recipe may say: frozen, checked once, unknown keys answered with the nearest known one. Floor 6."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from trocar.core.config import Config
from trocar.core.errors import ConfigError, nearest
from trocar.recipe.registry import entry
from trocar.recipe.strict_yaml import parse_yaml, read_yaml

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
SHORT = {"model": "source", "method": "name"}  # `model: NAME` stands for `model: {source: NAME}`


class ModelSource(Config):
    """The model to operate on.

    source: a folder with a Hugging Face checkpoint, a name under TROCAR_MODELS, `lab:NAME`, or a hub id; dtype: `auto` keeps the
    checkpoint's own; device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` (the first accelerator, else the CPU); attn_implementation: `eager`,
    `sdpa`, ... (None: the library's default); revision: branch, tag or commit of a hub id; trust_remote_code: run code that the hub
    repository brings along (off).
    """

    source: str = pydantic.Field(min_length=1)
    dtype: Dtype = "auto"
    device: str = pydantic.Field(default="cpu", pattern=r"^(auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?)$")
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"source": data} if isinstance(data, str) else data


class MethodChoice(Config):
    """The method's name, and its settings as they stand in the recipe; `registry.entry(name)` knows what they may be."""

    model_config = pydantic.ConfigDict(frozen=True, extra="allow")

    name: str

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Recipe(Config):
    """A whole job: model, data per role, method with its settings, checks, where to write.

    `data` and `checks` are validated by the rooms that read them (`lab` and `evaluate`) before anything is loaded; `checks` left out means
    the method's own. A key that starts with `x-` at the top is ignored: a place for anchors. `base` is the folder that relative paths of
    models and data start from; it is not a key of the file: a recipe's own folder, else the current one.
    """

    version: Literal[1]
    seed: int = pydantic.Field(default=0, ge=0, lt=2**63)
    model: ModelSource
    data: dict[str, dict[str, Any]]
    method: MethodChoice
    checks: tuple[dict[str, Any], ...] | None = None
    output: str | None = None
    base: Path = pydantic.Field(default_factory=Path, exclude=True)


def parse_recipe(data: Any, where: str = "recipe", base: Path | None = None) -> Recipe:
    """Validate a plain mapping. Raises ConfigError naming the key, and for an unknown one the nearest."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a mapping with version, model, data and method, not {type(data).__name__}.")
    if "base" in data:
        raise ConfigError(f"{where}.base is not a known setting.", nearest("base", Recipe.model_fields.keys() - {"base"}))
    keys = {key: value for key, value in data.items() if not str(key).startswith("x-")}
    recipe = Recipe.parse({**keys, "base": (base or Path()).resolve()}, where)
    entry(recipe.method.name)
    return recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe. `overrides` are `key.path=value`, the value in YAML (`method.keep=0.1`, `checks.0.threshold=1`).

    Raises ConfigError for anything that is not a valid recipe: unreadable or ambiguous YAML, unknown keys, wrong types, unknown methods.
    """
    data = read_yaml(path)
    for change in overrides:
        data = override(data, change)
    return parse_recipe(data, str(path), Path(path).parent)


def override(data: Any, change: str) -> Any:
    """`data` with one `key.path=value` of it changed, the value in YAML. Raises ConfigError for what is none, or leads nowhere."""
    key, equals, text = change.partition("=")
    steps = key.split(".")
    if not equals or not all(steps):
        raise ConfigError(f"--set {change!r} is not of the form key=value.", "For example --set method.keep=0.1.")
    value = parse_yaml(text, f"--set {key}") if text else None
    data = copy.deepcopy(data)  # anchors make parts of a recipe one object
    place = data
    if isinstance(data, dict) and len(steps) > 1 and steps[0] in SHORT and isinstance(data.get(steps[0]), str):
        data[steps[0]] = {SHORT[steps[0]]: data[steps[0]]}
    depth = 0
    while depth < len(steps):
        step = _longest_key(place, steps[depth:])
        here = ".".join(steps[:depth]) or "the recipe"
        depth += step.count(".") + 1
        last = depth == len(steps)
        if isinstance(place, list):
            if not step.isdigit() or int(step) >= len(place):
                raise ConfigError(f"--set {key}: {here} has no entry {step!r}.", f"It has {len(place)}, counted from 0.")
            place[int(step)] = value if last else copy.deepcopy(place[int(step)])
            place = place[int(step)]
        elif isinstance(place, dict):
            place[step] = value if last else copy.deepcopy(place.get(step, {}))
            place = place[step]
        else:
            raise ConfigError(f"--set {key}: {here} holds no keys.")
    return data


def _longest_key(place: Any, steps: Sequence[str]) -> str:
    """Keys may hold dots themselves (`locality.random`): the longest one that is there, else the first step."""
    known = place if isinstance(place, dict) else {}
    return next((".".join(steps[:n]) for n in range(len(steps), 1, -1) if ".".join(steps[:n]) in known), steps[0])
