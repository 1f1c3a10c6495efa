"""DuQuant as a recipe: from a folder and two texts to a believed patch, figures and texts side by side."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from trocar.anatomy import tiny_model
from trocar.compress.duquant import PRESETS, preset
from trocar.compress.duquant.recipe import METHOD, RecipeConfig
from trocar.core.errors import ConfigError, DataError
from trocar.lab.worlds import tokenizer
from trocar.patch import Patch
from trocar.recipe import load_model, parse_recipe, run
from trocar.recipe.strict_yaml import parse_yaml

WORDS = [f"word{number}" for number in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("duquant")
    words = tokenizer(WORDS)
    tiny_model("llama", vocab_size=len(words)).save_pretrained(place / "model")
    words.save_pretrained(place / "model")
    draw = random.Random(0)
    for name in ("calibration", "held_out"):
        texts = [{"text": " ".join(draw.choices(WORDS, k=24))} for _ in range(12)]
        (place / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in texts))
    (place / "prompts.jsonl").write_text(json.dumps({"prompt": "word1 word2 word3"}))
    return place


def recipe(folder: Path, **method: object) -> dict[str, object]:
    data = {name: {"source": str(folder / f"{name}.jsonl")} for name in ("calibration", "held_out", "prompts")}
    chain = {"block_size": 8, "search_steps": 2}
    settings = {"name": "duquant", "windows": 4, "window_tokens": 32, "test_windows": 3, "max_new_tokens": 4, "chain": chain, **method}
    checks = [{"measurement": "perplexity", "statistic": "ratio", "op": "<", "threshold": 3.0}]
    return {"version": 1, "seed": 0, "model": str(folder / "model"), "data": data, "method": settings, "checks": checks}


def test_a_recipe_from_folder_to_patch(folder: Path, tmp_path: Path) -> None:
    done = run(parse_recipe(recipe(folder, weights={"clip": "search", "rounding": "gptq"})), tmp_path / "run")
    assert done.ok
    assert done.result.log["bits"] == "W4A4"
    assert {figure.id for figure in done.result.figures} == {
        "layer_errors", "block_errors", "outliers_float", "outliers_received", "outliers_turned", "outliers",
    }  # fmt: skip
    assert [transcript.id for transcript in done.result.transcripts] == ["continuations"]
    model = load_model(parse_recipe(recipe(folder)).model)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        before = model(ids).logits
        with Patch.load(tmp_path / "run" / "patch.safetensors").applied(model):
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)


def test_a_dry_run_forecasts_and_too_little_text_is_refused(folder: Path, tmp_path: Path) -> None:
    forecast = run(parse_recipe(recipe(folder)), tmp_path / "dry", dry_run=True).forecast
    assert forecast is not None
    assert forecast.estimate.seconds > 0
    with pytest.raises(DataError, match="fewer than one window of 4096"):
        run(parse_recipe(recipe(folder, window_tokens=4096)), tmp_path / "short")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings(name: str) -> None:
    config = preset(name, "W3A8", block_size=32)
    assert (config.weights.bits, config.activations.bits) == (3, 8)
    assert config.chain is None or config.chain.block_size == 32


def test_presets_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'duquant'"):
        preset("dukuant")
    with pytest.raises(ConfigError, match="Write W4A4"):
        preset("duquant", "four")
    with pytest.raises(ConfigError, match="learned clip needs rounding to nearest"):
        preset("duquant-lwc", rounding="gptq")


def test_the_starter_and_the_recipes_are_valid() -> None:
    for text in (METHOD.starter, *(path.read_text() for path in Path(__file__).parents[2].glob("recipes/**/duquant*.yaml"))):
        RecipeConfig.parse(parse_recipe(parse_yaml(text, "recipe")).method.settings, "method")
