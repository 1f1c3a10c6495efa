"""Queries, keys and values rounded per token and head: exact where nothing is rounded, in every family, gone without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from outputs import error, out

from trocar.anatomy import TINY, Anatomy, tiny_inputs, tiny_model
from trocar.anatomy.tiny import tower_inputs
from trocar.compress.duquant import Activations, Chain, DuQuantConfig, Weights, load_quantised, quantise, quantise_checkpoint
from trocar.core.errors import ExportError, UnsupportedModelError
from trocar.patch import Patch, RoundHeads, merge_into
from trocar.patch.quantised import RoundedHeads, hadamard, largest_hadamard, quantised

SMALL = Chain(block_size=8, search_steps=4)


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("gemma3", "clip", "siglip")])
def test_many_bits_change_next_to_nothing_and_few_do_in_every_family(name: str) -> None:
    anatomy = Anatomy.of(tiny_model(name))
    inputs = tiny_inputs(anatomy.model, rows=2)
    before, config = out(anatomy.model, inputs), anatomy.tower().config._attn_implementation
    errors = {}
    for bits in (2, 8, 15):
        heads = RoundedHeads(anatomy.tower(), bits)
        heads.install()
        errors[bits] = error(out(anatomy.model, inputs), before)
        assert heads.calls == anatomy.tower().n_layers
        heads.remove()
    assert errors[15] < 1e-3 * max(errors[2], 1e-3) or errors[15] < 2e-4
    assert errors[15] < errors[8] < errors[2]
    assert torch.equal(out(anatomy.model, inputs), before)
    assert anatomy.tower().config._attn_implementation == config


@pytest.mark.parametrize(("name", "tower"), [("gemma3", "text"), ("gemma3", "vision"), ("clip", "text"), ("siglip", "vision")])
def test_one_tower_of_two(name: str, tower: str) -> None:
    anatomy = Anatomy.of(tiny_model(name))
    one = anatomy.tower(tower)
    inputs = tower_inputs(one, 2)
    before = out(one.root, inputs)
    heads = RoundedHeads(one, 3)
    heads.install()
    assert error(out(one.root, inputs), before) > 0
    assert heads.calls == one.n_layers
    heads.remove()
    assert torch.equal(out(one.root, inputs), before)


def test_grids_belong_to_one_token_and_head() -> None:
    heads = RoundedHeads(Anatomy.of(tiny_model("llama")).tower(), 4)
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    query, key, value = heads.rounded(x, x, x)
    torch.testing.assert_close(query, quantised((x.double() @ hadamard(16)).float(), heads.quantiser), rtol=1e-4, atol=1e-4)
    assert torch.equal(query, key)
    assert torch.equal(value, quantised(x, heads.quantiser))
    louder = x.clone()
    louder[1, 2, 3] *= 1000
    other = heads.rounded(louder, x, louder)
    changed = (other[2] != value).any(-1).nonzero().tolist()
    assert changed == [[1, 2, 3]]


@pytest.mark.parametrize(("size", "found"), [(64, 64), (80, 80), (96, 96), (18, 2), (7, 1)])
def test_heads_of_any_size_have_a_rotation(size: int, found: int) -> None:
    turn = largest_hadamard(size)
    assert turn.shape == (found, found)
    torch.testing.assert_close(turn @ turn.T, torch.eye(found, dtype=torch.float64))


def test_a_cache_and_single_tokens_give_what_whole_windows_give() -> None:
    model = tiny_model("llama")
    heads = RoundedHeads(Anatomy.of(model).tower(), 4)
    heads.install()
    ids = tiny_inputs(model, rows=2)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        state, steps = None, []
        for column in range(ids.shape[1]):
            found = model(input_ids=ids[:, column : column + 1], past_key_values=state, use_cache=True)
            state = found.past_key_values
            steps.append(found.logits)
    assert error(torch.cat(steps, dim=1), whole) < 0.02


def test_quantising_with_heads_is_a_patch_and_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    inputs, anatomy = tiny_inputs(model, rows=4), Anatomy.of(model)
    before = out(model, inputs)
    config = DuQuantConfig(weights=Weights(bits=8), activations=Activations(bits=8), chain=SMALL, attention=4)
    done = quantise(model, inputs, config)
    after = out(model, inputs)
    without = quantise(tiny_model("qwen3"), inputs, config.model_copy(update={"attention": None}))
    assert done.errors["L2"] > 1.5 * without.errors["L2"]  # the rounding of heads is part of what the blocks see
    patch = done.patch()
    assert torch.equal(out(model, inputs), before)
    assert isinstance(patch.ops[-1], RoundHeads)
    patch.save(tmp_path / "one.trocar")
    loaded = Patch.load(tmp_path / "one.trocar")
    with loaded.applied(model):
        assert torch.equal(out(model, inputs), after)
        with pytest.raises(UnsupportedModelError, match="rounded already"):
            RoundedHeads(anatomy.tower(), 4).install()
    assert torch.equal(out(model, inputs), before)
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ExportError, match="rounded to 4 bits while the model runs"):
        merge_into(loaded, tmp_path / "float", tmp_path / "merged")
    quantise_checkpoint(tmp_path / "float", tmp_path / "small", inputs, config)
    assert torch.equal(out(load_quantised(tmp_path / "small"), inputs), after)
