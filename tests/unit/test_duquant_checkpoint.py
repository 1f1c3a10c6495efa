"""A checkpoint through DuQuant shard by shard: what memory would give, killed and resumed, damaged and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trocar.anatomy import tiny_inputs, tiny_model
from trocar.compress.duquant import Chain, DuQuantConfig, checkpoint, load_quantised, quantise, quantise_checkpoint
from trocar.core.errors import DataError, ExportError

SETTINGS = DuQuantConfig(chain=Chain(block_size=8, search_steps=2), batch_size=2)


def saved(family: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    model = tiny_model(family)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model, tiny_inputs(model, rows=3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "vit"])
def test_shard_by_shard_gives_what_memory_gives(family: str, tmp_path: Path) -> None:
    model, inputs = saved(family, tmp_path / "base")
    errors = quantise_checkpoint(tmp_path / "base", tmp_path / "small", inputs, SETTINGS, seed=3)
    done = quantise(model, inputs, SETTINGS, seed=3)
    assert errors == done.errors
    loaded = load_quantised(tmp_path / "small")
    with torch.no_grad():
        ours, theirs = (one(**inputs) for one in (loaded, model))
    assert torch.equal(ours.logits, theirs.logits)
    assert not (tmp_path / "small.partial").exists()
    assert (tmp_path / "small" / "config.json").exists()
    with pytest.raises(ExportError, match="exists"):
        quantise_checkpoint(tmp_path / "base", tmp_path / "small", inputs, SETTINGS)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, inputs = saved("llama", tmp_path / "base")
    quantise_checkpoint(tmp_path / "base", tmp_path / "whole", inputs, SETTINGS)
    made: list[int] = []
    inner = checkpoint.quantise_block

    def counting(anatomy: Any, tower: Any, layer: int, *rest: Any) -> Any:
        if layer == 2 and not (tmp_path / "go on").exists():
            raise KeyboardInterrupt
        made.append(layer)
        return inner(anatomy, tower, layer, *rest)

    monkeypatch.setattr(checkpoint, "quantise_block", counting)
    with pytest.raises(KeyboardInterrupt):
        quantise_checkpoint(tmp_path / "base", tmp_path / "killed", inputs, SETTINGS)
    assert not (tmp_path / "killed").exists()
    assert made == [0, 1]
    (tmp_path / "go on").touch()
    quantise_checkpoint(tmp_path / "base", tmp_path / "killed", inputs, SETTINGS)
    assert made == [0, 1, 2]
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes(), file.name
    assert {file.name for file in (tmp_path / "killed").iterdir()} == {file.name for file in (tmp_path / "whole").iterdir()}


def test_other_settings_are_never_served_old_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, inputs = saved("llama", tmp_path / "base")
    inner = checkpoint._finish
    monkeypatch.setattr(checkpoint, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantise_checkpoint(tmp_path / "base", tmp_path / "small", inputs, SETTINGS, seed=1)
    monkeypatch.setattr(checkpoint, "_finish", inner)
    errors = quantise_checkpoint(tmp_path / "base", tmp_path / "small", inputs, SETTINGS, seed=2)
    assert errors == quantise(tiny_model("llama"), inputs, SETTINGS, seed=2).errors


@pytest.mark.parametrize("harm", ["missing block", "cut block", "no transform", "not ours", "another layer"])
def test_damaged_folders_are_refused(harm: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, inputs = saved("llama", tmp_path / "base")
    quantise_checkpoint(tmp_path / "base", tmp_path / "small", inputs, SETTINGS)
    block = tmp_path / "small" / "block-00001.safetensors"
    if harm == "missing block":
        block.unlink()
    elif harm == "cut block":
        block.write_bytes(block.read_bytes()[:-10])
    elif harm == "no transform":
        tensors = load_file(block)
        del tensors["op0.rotation0"]
        save_file(tensors, block)
    elif harm == "another layer":
        (tmp_path / "small" / "block-00000.safetensors").replace(block)
    else:
        (tmp_path / "small" / "quantised.json").unlink()
    with pytest.raises(DataError):
        load_quantised(tmp_path / "small")
