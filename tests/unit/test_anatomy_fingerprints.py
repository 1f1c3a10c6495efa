import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from trocar.anatomy import (
    checkpoint_fingerprints,
    dtype_name,
    fingerprint,
    structure_fingerprint,
    tensor_fingerprint,
    tensor_fingerprint_bytes,
    tiny_model,
)
from trocar.anatomy import fingerprints as module
from trocar.core.errors import DataError, UnsupportedModelError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def some(dtype, shape, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values > 0 if dtype == torch.bool else (values * 40).to(dtype)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 3))
def test_a_file_gives_what_the_tensor_gives(dtype, shape, seed):
    tensor = some(dtype, shape, seed)
    raw = bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
    assert tensor_fingerprint_bytes(dtype_name(dtype), tuple(shape), raw) == tensor_fingerprint(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_layout_does_not_matter_but_values_shape_and_dtype_do(dtype):
    tensor = some(dtype, (4, 6))
    own = tensor_fingerprint(tensor)
    assert own == tensor_fingerprint(tensor.T.contiguous().T)
    assert own == tensor_fingerprint(torch.stack([tensor, tensor], dim=-1)[..., 0])
    assert own == tensor_fingerprint(nn.Parameter(tensor, requires_grad=False))
    assert own != tensor_fingerprint(tensor.reshape(6, 4))
    assert own != tensor_fingerprint(tensor.view(torch.uint8)) or dtype == torch.uint8
    changed = tensor.clone()
    changed[-1, -1] = not changed[-1, -1] if dtype == torch.bool else 7
    assert own != tensor_fingerprint(changed)
    assert tensor_fingerprint(torch.tensor([0.0])) != tensor_fingerprint(torch.tensor([-0.0]))


def test_hashing_in_pieces_gives_the_same(monkeypatch):
    tensor = some(torch.float32, (37, 5))
    whole = tensor_fingerprint(tensor)
    monkeypatch.setattr(module, "_CHUNK", 12)
    assert tensor_fingerprint(tensor) == whole


def test_a_contiguous_cpu_tensor_is_not_copied():
    tensor = torch.zeros(32 << 20, dtype=torch.uint8)
    with torch.profiler.profile(profile_memory=True) as profile:
        tensor_fingerprint(tensor)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()) < 1 << 20


def test_tensors_without_bytes_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="meta device"):
        tensor_fingerprint(torch.zeros(2, device="meta"))
    with pytest.raises(UnsupportedModelError, match="sparse"):
        tensor_fingerprint(torch.eye(2).to_sparse())
    model = tiny_model("gpt2")
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(UnsupportedModelError, match=r"transformer\.\w+.*meta device"):
        fingerprint(empty)
    assert structure_fingerprint(empty) == structure_fingerprint(model)


def test_tied_parameters_count_once_and_the_order_of_creation_does_not_matter():
    one, other = nn.Module(), nn.Module()
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
    for target, order in ((one, "ab"), (other, "ba")):
        for name in order:
            target.register_parameter(name, {"a": a, "b": b}[name])
    assert fingerprint(one) == fingerprint(other)
    one.register_parameter("c", a)
    assert fingerprint(one) == fingerprint(other)


def test_persistent_buffers_belong_to_the_model_and_others_do_not():
    model = nn.Module()
    model.register_buffer("kept", torch.zeros(2))
    before = fingerprint(model)
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    assert fingerprint(model) == before
    model.kept += 1
    assert fingerprint(model) != before


def test_structure_is_names_and_shapes():
    small, half, wide = tiny_model("llama"), tiny_model("llama", seed=1).half(), tiny_model("llama", intermediate_size=56)
    assert structure_fingerprint(small) == structure_fingerprint(half)
    assert structure_fingerprint(small) != structure_fingerprint(wide)
    assert fingerprint(small) != fingerprint(half)
    assert fingerprint(small) == fingerprint(tiny_model("llama"))


def test_switching_an_adapter_off_is_another_state():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    on = fingerprint(model)
    with model.disable_adapter():
        assert fingerprint(model) != on
    assert fingerprint(model) == on
    model.merge_adapter()
    merged = fingerprint(model)
    assert merged != on


def test_files_of_a_folder(tmp_path):
    first, second = {"x": some(torch.bfloat16, (3, 2)), "s": torch.tensor(1.5)}, {"e": torch.zeros(0, 4), "y": some(torch.int8, (5,))}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    found = {tensor.name: tensor for tensor in checkpoint_fingerprints(tmp_path)}
    assert {name: tensor.fingerprint for name, tensor in found.items()} == {k: tensor_fingerprint(v) for k, v in (first | second).items()}
    assert (found["x"].dtype, found["x"].shape, found["x"].file.name) == ("BF16", (3, 2), "model-00001-of-00002.safetensors")
    assert [tensor.name for tensor in checkpoint_fingerprints(tmp_path / "model-00002-of-00002.safetensors")] == ["e", "y"]


def header(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"\xff" * 32,
        struct.pack("<Q", 10) + b"{",
        header([1, 2]),
        header({"x": 3}),
        header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
        header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}) + b"\0" * 8,
        header({"x": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}) + b"\0" * 8,
        header({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}) + b"\0" * 8,
        header({"x": {"dtype": "NEW", "shape": [2], "data_offsets": [0, 9]}}) + b"\0" * 8,
        header({"x": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}) + b"\0" * 8,
        header({"x": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}) + b"\0" * 8,
        header({"x": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}}) + b"\0" * 8,
        header({"x": {"shape": [2], "data_offsets": [0, 8]}}) + b"\0" * 8,
    ],
)
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        list(checkpoint_fingerprints(tmp_path))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no safetensors file"):
        list(checkpoint_fingerprints(tmp_path))
