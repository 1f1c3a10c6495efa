"""Quantised models in the compressed-tensors form: what transformers and compressed-tensors compute from the folder is what we compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from outputs import error, out
from safetensors.torch import load_file

from trocar.anatomy import tiny_inputs, tiny_model
from trocar.compress.duquant import export_compressed, preset, quantise
from trocar.compress.duquant.export import words
from trocar.core.errors import ExportError

pytest.importorskip("compressed_tensors")


def made(name: str, kind: str, bits: str, **changes: Any) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    model = tiny_model(name)
    inputs = tiny_inputs(model, rows=4)
    before = out(model, inputs)
    quantise(model, inputs, preset(kind, bits, **changes))
    return model, inputs, before


@pytest.mark.parametrize(
    ("name", "bits", "changes"),
    [
        ("llama", "W4A16", {}),
        ("qwen2", "W3A16", {}),
        ("phi3", "W8A8", {}),
        ("llama", "W4A8", {"keep": {"L1.mlp.down": 8, "L2.mlp.up": 16}}),
    ],
)
def test_folded_folders_load_in_transformers(name: str, bits: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model, inputs, before = made(name, "folded", bits, **changes)
    ours = out(model, inputs)
    export_compressed(model, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    theirs = out(loaded, inputs)
    if bits.endswith("A16"):
        assert error(theirs, ours) < 1e-5
    assert error(theirs, before) < 1.3 * error(ours, before)  # activations have another grid there, of the same fineness


@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_rotations_go_into_the_transform_configuration_and_permutations_into_rows(name: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    model, inputs, before = made(name, "export", "W4A16", block_size=8)
    ours = out(model, inputs)
    with pytest.raises(ExportError, match="has a rotation in front of it"):
        export_compressed(model, tmp_path / "refused")
    settings = export_compressed(model, tmp_path / "out", transforms=True)
    other: Any = tiny_model(name)
    transform = TransformConfig(**settings["transform_config"])
    quantisation = QuantizationConfig(**{key: value for key, value in settings.items() if key != "transform_config"})
    apply_quantization_config(other, quantisation)
    ModelCompressor(quantization_config=quantisation).compress_model(model=other)
    apply_transform_config(other, transform)
    missing, unexpected = other.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    assert not unexpected
    assert all("lm_head" in key for key in missing)
    ModelCompressor(quantization_config=quantisation).decompress_model(model=other)
    theirs = out(other.eval(), inputs)
    assert error(theirs, ours) < 1e-4
    assert error(ours, before) > 0.02


def test_words_are_those_of_compressed_tensors() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    generator = torch.Generator().manual_seed(0)
    for bits in range(2, 9):
        for columns in (1, 31, 32, 45):
            values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns), generator=generator).to(torch.int8)
            found = words(values, bits)
            assert torch.equal(found, pack_to_int32(values, bits))
            assert torch.equal(unpack_from_int32(found, bits, values.shape), values)


@pytest.mark.parametrize(
    ("name", "kind", "bits", "changes", "message"),
    [
        ("llama", "duquant", "W4A4", {"block_size": 8}, "have zero points"),
        ("llama", "duquant", "W4A4", {"block_size": 8, "symmetric": True, "activation_clip": 0.9}, "zero point or a clip"),
        ("llama", "duquant", "W4A16", {"block_size": 8, "symmetric": True}, "A permutation in front of .*q_proj folds into nothing"),
        ("llama", "no-permutation", "W4A16", {"block_size": 8, "symmetric": True}, "more than one rotation"),
        ("llama", "folded", "W16A8", {"clip": None, "rounding": "nearest"}, "weights of 16 bits"),
        ("llama", "folded", "W8A8", {"attention": 8}, "Queries, keys and values are rounded"),
        ("gpt2", "folded", "W4A16", {}, "is a Conv1D"),
        ("llama", "folded", "W4A16", {"symmetric": False}, "have zero points"),
    ],
)
def test_what_the_form_cannot_say_is_refused(name: str, kind: str, bits: str, changes: Any, message: str, tmp_path: Path) -> None:
    model, _, _ = made(name, kind, bits, **changes)
    with pytest.raises(ExportError, match=message):
        export_compressed(model, tmp_path / "out", transforms=True)
    assert not (tmp_path / "out").exists()
