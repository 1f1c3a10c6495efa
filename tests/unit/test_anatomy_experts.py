"""Mixtures of experts: refused as before unless asked for, and then attention, norms and a view of the experts, but no neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trocar.anatomy import TINY_EXPERTS, Anatomy, Tower, fingerprint, structure_fingerprint, tiny_inputs, tiny_model
from trocar.core.errors import UnsupportedModelError
from trocar.trace import record

REFUSED = r"model\.layers\.{}\.mlp\.experts \(\w+\) holds experts, which have no single row of neurons"


@pytest.mark.parametrize("name", TINY_EXPERTS)
def test_without_being_asked_for_experts_are_refused_as_ever(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED.format(1 if name == "qwen3_moe" else 0)):
        Anatomy.of(tiny_model(name))


@pytest.mark.parametrize("name", TINY_EXPERTS)
def test_experts_as_a_whole_with_attention_and_norms(name: str) -> None:
    model = tiny_model(name)
    anatomy = Anatomy.of(model, experts=True)
    tower = anatomy.tower()
    assert Anatomy.of(anatomy) is anatomy
    experts = tower.experts(2)
    assert experts is not None
    hidden = 24 if name in ("qwen2_moe", "qwen3_moe") else 48
    assert (experts.count, experts.width, experts.hidden) == (4, 32, hidden)
    assert experts.gate_up is model.model.layers[2].mlp.experts.gate_up_proj
    assert experts.path == "model.layers.2.mlp.experts"
    assert set(tower.roles(2)) >= {"q", "k", "v", "o", "attn_norm", "mlp_norm", "experts", "router"}
    assert tower.linears(2) == ("q", "k", "v", "o")
    shared = {"shared_up", "shared_gate", "shared_down"} if name == "qwen2_moe" else set()
    assert set(experts.shared) == shared
    assert set(experts.beside) == ({"router", "shared_switch"} if shared else {"router"})
    x = torch.randn(5, 32)  # what the view says is what the module computes
    chosen, weights = torch.tensor([[2]] * 5), torch.full((5, 1), 0.5)
    gate, up = (x @ experts.gate_up[2].T).chunk(2, dim=-1)
    torch.testing.assert_close(experts.module(x, chosen, weights), 0.5 * (experts.activation(gate) * up) @ experts.down[2].T)


ASKS: dict[str, Callable[[Anatomy, Tower], Any]] = {
    "neurons": lambda anatomy, tower: tower.neurons(1),
    "up": lambda anatomy, tower: tower.module(1, "up"),
    "components": lambda anatomy, tower: anatomy.components("neuron"),
    "linear": lambda anatomy, tower: anatomy.linear("L1.mlp.down"),
    "check": lambda anatomy, tower: anatomy.check("L1.N0"),
    "channel": lambda anatomy, tower: anatomy.check("L1.mlp.up.out0"),
    "slices": lambda anatomy, tower: anatomy.slices("L1.N3"),
    "trace": lambda anatomy, tower: record(anatomy, ["L1.mlp_out"]).__enter__(),
}


@pytest.mark.parametrize("ask", ASKS)
def test_whoever_asks_for_neurons_is_refused(ask: str) -> None:
    anatomy = Anatomy.of(tiny_model("mixtral"), experts=True)
    with pytest.raises(UnsupportedModelError, match=REFUSED.format("[01]")):
        ASKS[ask](anatomy, anatomy.tower())


def test_dense_blocks_and_dense_models_are_what_they_were() -> None:
    tower = Anatomy.of(tiny_model("qwen3_moe"), experts=True).tower()
    assert tower.experts(0) is None
    assert tower.neurons(0) == 48
    assert tower.linears(0) == ("q", "k", "v", "o", "up", "gate", "down")
    model = tiny_model("llama")
    one, other = Anatomy.of(model), Anatomy.of(model, experts=True)
    assert [one.tower().roles(layer) for layer in range(3)] == [other.tower().roles(layer) for layer in range(3)]
    assert one.family is other.family


def test_attention_heads_can_be_had() -> None:
    anatomy = Anatomy.of(tiny_model("mixtral"), experts=True)
    assert len(anatomy.components("head")) == 12
    with record(anatomy, ["L1.heads", "L2.resid_post"]) as seen, torch.no_grad():
        anatomy.model(**tiny_inputs(anatomy))
    assert seen["L1.heads"].shape == (2, 7, 4, 16)


@pytest.mark.parametrize("harm", ["bias", "transposed", "shape", "shared"])
def test_experts_in_another_form_are_refused(harm: str) -> None:
    model = tiny_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    if harm == "bias":
        experts.gate_up_proj_bias = torch.nn.Parameter(torch.zeros(4, 96))
    elif harm == "transposed":
        experts.is_transposed = True
    elif harm == "shape":
        experts.down_proj = torch.nn.Parameter(torch.zeros(4, 32, 40))
    else:
        experts.down_proj = model.model.layers[0].mlp.experts.down_proj
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts"):
        Anatomy.of(model, experts=True).tower().experts(1)


def test_tiny_models_of_one_seed_are_equal_and_their_experts_as_large_as_other_matrices() -> None:
    one, other = tiny_model("olmoe"), tiny_model("olmoe")
    assert fingerprint(one) == fingerprint(other)
    assert structure_fingerprint(one) == structure_fingerprint(other)
    assert abs(float(one.model.layers[0].mlp.experts.gate_up_proj.detach().std()) - 32**-0.5) < 0.01
