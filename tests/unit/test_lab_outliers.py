"""The decoder with planted outliers: what is planted is there and stays while it is healed; the tokenizer takes every byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trocar.anatomy import tiny_model
from trocar.core.errors import DataError
from trocar.lab import outliers
from trocar.lab.language import new_decoder
from trocar.lab.registry import ByteData, DecoderShape, TextRecipe, get

SHAPE = DecoderShape(width=32, blocks=3, heads=2, neurons=48)


def decoder(seed: int = 0) -> Any:
    return new_decoder(SHAPE, outliers.VOCABULARY, seed)


def test_the_tokenizer_takes_every_byte() -> None:
    tokens = outliers.tokenizer()
    text = "def f(x):\n\treturn 'ä–☃' + x  # \r"
    ids = tokens(text).input_ids
    assert ids == [outliers.START, *(outliers.BYTES + byte for byte in text.encode())]
    assert tokens.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_train_and_test_are_different_files(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"m{number:02}.py").write_text(f"# {number:02}" * 20)
    data = ByteData(window=16)
    train, test = (bytes((outliers.corpus(data, split, tmp_path) - outliers.BYTES).tolist()).decode() for split in ("train", "test"))
    assert {"# 19", "# 39"} == {test[i : i + 4] for i in range(0, len(test), 4)}
    assert "# 19" not in train
    with pytest.raises(DataError, match="bytes of Python sources"):
        outliers.corpus(data, "test", tmp_path / "nothing")


def test_planted_channels_are_large_on_every_token_and_survive_the_norms() -> None:
    model = decoder()
    channels = outliers.plant_channels(model, 25.0, seed=0)
    weight = model.get_input_embeddings().weight.detach()
    sizes = weight.abs().amin(0)
    assert sorted(sizes.argsort(descending=True)[:4].tolist()) == sorted(channels)
    assert float(sizes[channels].min()) > 8
    others = [channel for channel in range(32) if channel not in channels]
    assert 0.5 < float(weight[:, others].std()) < 2


def test_a_massive_entry_answers_the_start_token_only() -> None:
    model = decoder()
    ids = torch.randint(2, 200, (64, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = outliers.START
    neuron = outliers.plant_massive(model, ids, 1, 1400.0, seed=0)
    seen: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=ids)
    hidden = seen[0].abs()
    assert float(hidden[:, 0, neuron].min()) == pytest.approx(1400, rel=0.01)
    assert float(hidden[:, 1:].max()) < 0.8 * 1400
    assert bool((model.model.layers[1].mlp.down_proj.weight[:, neuron] != 0).all())  # a dense column


def test_making_it_plants_both_and_healing_moves_neither(tmp_path: Path) -> None:
    model = decoder()
    recipe = TextRecipe(steps=4, batch=4, lr=2e-3, weight_decay=0.0)
    data = ByteData(window=24, heal=4)
    planted = outliers.make_outliers(model, data, recipe, tmp_path, seed=1, device="cpu")
    again = decoder()
    outliers.plant_channels(again, data.channel, seed=1)
    channels = planted["channels"]
    assert torch.equal(model.get_input_embeddings().weight[:, channels], again.get_input_embeddings().weight[:, channels])
    assert planted["neuron"].startswith("L1.N")
    ids = outliers.test_stream(data, 6).reshape(6, 24)
    assert bool((ids[:, 0] == outliers.START).all())
    seen: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=ids)
    assert float(seen[0].abs().amax()) == pytest.approx(1400, rel=0.02)
    assert float(seen[0].abs().amax() / seen[0].abs().median()) > 1000


def test_held_entries_that_move_are_noticed() -> None:
    model = tiny_model("llama")
    masks = {"model.embed_tokens.weight": torch.zeros_like(model.model.embed_tokens.weight)}
    with pytest.raises(AssertionError, match="were held"), outliers._held(model, masks), torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1


def test_its_row_is_one_of_texts() -> None:
    data, shape, recipe = get("outliers").texts()
    assert isinstance(data, ByteData)
    assert recipe.weight_decay == 0
    assert shape.blocks > data.layer
