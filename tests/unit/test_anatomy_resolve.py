import json
from dataclasses import replace

import pytest
import torch
import torch.distributed
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from trocar.anatomy import TINY, Anatomy, Channel, Head, Linear, Neuron, Slice, describe, fingerprint, register, tiny_inputs, tiny_model
from trocar.anatomy.families import FAMILIES
from trocar.core.errors import ComponentError, ConfigError, UnknownFamilyError, UnsupportedModelError

torch.set_num_threads(1)


@pytest.mark.parametrize("name", TINY)
def test_every_tiny_model_runs_and_resolves(name):
    model = tiny_model(name)
    model(**tiny_inputs(model))
    for tower in Anatomy.of(model).towers.values():
        assert tower.n_layers == 3
        assert tower.heads(0) == 4


# what belongs to a component


def entries(model, component):
    parameters = dict(model.named_parameters())
    return {part.name: tuple(part.take(parameters[part.name]).shape) for part in Anatomy.of(model).slices(component)}


def test_a_head_of_a_grouped_model_is_its_query_rows_its_output_columns_and_the_shared_rows_it_reads():
    model = tiny_model("qwen2")  # biases on q, k and v; 4 heads of 8 on 2 key/value heads
    slices = Anatomy.of(model).slices("L1.H3")
    attn = "model.layers.1.self_attn"
    assert {(s.name, s.dim, s.index, s.shared) for s in slices} == {
        (f"{attn}.q_proj.weight", 0, range(24, 32), False),
        (f"{attn}.q_proj.bias", 0, range(24, 32), False),
        (f"{attn}.o_proj.weight", 1, range(24, 32), False),
        (f"{attn}.k_proj.weight", 0, range(8, 16), True),
        (f"{attn}.k_proj.bias", 0, range(8, 16), True),
        (f"{attn}.v_proj.weight", 0, range(8, 16), True),
        (f"{attn}.v_proj.bias", 0, range(8, 16), True),
    }


def test_conv1d_and_interleaved_storage():
    attn = "transformer.h.0.attn"
    assert Slice(f"{attn}.c_attn.weight", 1, range(40, 48)) in Anatomy.of(tiny_model("gpt2")).slices("L0.H1")  # k follows 32 rows of q
    assert Slice(f"{attn}.c_proj.weight", 0, range(8, 16)) in Anatomy.of(tiny_model("gpt2")).slices("L0.H1")
    qkv = "gpt_neox.layers.0.attention.query_key_value.weight"
    found = [s.index for s in Anatomy.of(tiny_model("gpt_neox")).slices("L0.H1") if s.name == qkv]
    assert found == [range(24, 32), range(32, 40), range(40, 48)]
    whole = Anatomy.of(tiny_model("gpt_neox")).linear("L0.attn.k").rows
    assert whole is not None
    assert list(whole) == [24 * head + 8 + row for head in range(4) for row in range(8)]


def test_a_neuron_of_a_gated_network_has_three_parts():
    assert entries(tiny_model("llama"), "L0.N5") == {
        "model.layers.0.mlp.up_proj.weight": (1, 32),
        "model.layers.0.mlp.gate_proj.weight": (1, 32),
        "model.layers.0.mlp.down_proj.weight": (32, 1),
    }


def test_attention_and_mlp_leave_the_norms_of_the_stream_alone():
    bert = tiny_model("bert")
    assert not any("LayerNorm" in name for name in entries(bert, "L0.attn") | entries(bert, "L0.mlp"))
    assert sum("LayerNorm" in name for name in entries(bert, "L0")) == 4
    qwen = entries(tiny_model("qwen3"), "L0.attn")
    assert "model.layers.0.self_attn.q_norm.weight" in qwen
    assert not any("layernorm" in name for name in qwen)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "dinov2-swiglu"])
def test_channels_are_rows_and_columns_of_what_get_returns(name):
    model = tiny_model(name)
    anatomy, parameters = Anatomy.of(model), dict(model.named_parameters())
    for item in anatomy.components("linear"):
        view = anatomy.linear(item)
        last_in, last_out = view.in_features - 1, view.out_features - 1
        column = anatomy.slices(Channel(item.layer, item.role, "in", last_in))
        assert len(column) == 1
        assert torch.equal(column[0].take(parameters[column[0].name]).reshape(-1), view.get()[:, last_in])
        row = anatomy.slices(Channel(item.layer, item.role, "out", last_out))
        assert torch.equal(row[0].take(parameters[row[0].name]).reshape(-1), view.get()[last_out])
        assert len(row) == 1 + (view.bias is not None)


@pytest.mark.parametrize(("name", "role"), [("phi3", "mlp.gate"), ("gpt_neox", "attn.v"), ("gpt2", "attn.k")])
def test_writing_an_input_channel_of_a_fused_map_leaves_its_neighbours_alone(name, role):
    model = tiny_model(name)
    anatomy = Anatomy.of(model)
    view = anatomy.linear(f"L1.{role}")
    before, (part,) = view.parameter.detach().clone(), anatomy.slices(f"L1.{role}.in3")
    part.put(view.parameter, 0.0)
    changed = (view.parameter != before).nonzero()
    assert len(changed) == view.out_features
    assert torch.equal(view.get()[:, 3], torch.zeros(view.out_features))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_put_writes_what_take_reads_and_nothing_else(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=2))
    dims = list(range(len(shape)))
    index = {d: data.draw(st.lists(st.integers(0, shape[d] - 1), min_size=1, unique=True).map(tuple)) for d in dims}
    if data.draw(st.booleans()):
        index = {d: range(min(i), max(i) + 1) for d, i in index.items()}
    within = (1, index[1]) if len(dims) == 2 and data.draw(st.booleans()) else None
    part, tensor = Slice("x", 0, index[0], within=within), torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    before, value = tensor.clone(), -1 - torch.rand(part.take(tensor).shape)
    part.put(tensor, value)
    assert torch.equal(part.take(tensor), value)
    part.put(tensor, part.take(before))
    assert torch.equal(tensor, before)


def test_set_refuses_another_shape_and_a_missing_bias():
    view = Anatomy.of(tiny_model("gpt2")).linear("L0.mlp.up")
    with pytest.raises(ComponentError, match=r"\(48, 32\), not \(32, 48\)"):
        view.set(torch.zeros(32, 48))
    with pytest.raises(ComponentError, match=r"c_fc is \(48,\)"):
        view.set_bias(torch.zeros(32))
    with pytest.raises(ComponentError, match="has no bias"):
        Anatomy.of(tiny_model("llama")).linear("L0.mlp.up").set_bias(torch.zeros(48))


# names that this model has, and names that it has not


def test_components_are_in_order_complete_and_admissible():
    anatomy = Anatomy.of(tiny_model("clip"))
    for kind, count in {
        "block": 6,
        "attention": 6,
        "mlp": 6,
        "head": 24,
        "neuron": 288,
        "linear": 36,
        "channel": 2 * 3 * (8 * 32 + 2 * 80),
    }.items():
        found = anatomy.components(kind)
        assert len(found) == len(set(found)) == count
        assert found == sorted(found)
        assert all(anatomy.check(str(item)) == item for item in found)
        assert anatomy.components(kind, "vision") == found[count // 2 :]


@pytest.mark.parametrize(
    ("name", "component", "said"),
    [
        ("llama", "L3", "0 to 2"),
        ("llama", "L0.H4", "0 to 3"),
        ("llama", "L2.N48", "0 to 47"),
        ("llama", "L0.attn.k.out32", "0 to 31"),
        ("llama", "vision.L0", "one tower, without a name"),
        ("clip", "L0", "'text', 'vision'"),
        ("clip", "audio.L0.mlp", "'text', 'vision'"),
        ("vit", "L0.mlp.gate", "up, down"),
        ("vit", "L0.up", "Names look like"),
    ],
)
def test_names_that_this_model_does_not_have(name, component, said):
    with pytest.raises(ComponentError, match=said):
        Anatomy.of(tiny_model(name)).slices(component)


def test_other_refusals():
    anatomy = Anatomy.of(tiny_model("vit"))
    with pytest.raises(ComponentError, match="Did you mean 'head'"):
        anatomy.components("heads")
    with pytest.raises(ComponentError, match="not a linear map"):
        anatomy.linear("L0.mlp")
    with pytest.raises(ComponentError, match="no module for the role 'gate'"):
        anatomy.tower().module(0, "gate")
    with pytest.raises(ComponentError, match="no tower"):
        Anatomy.of(tiny_model("clip")).tower()


# wrappers


def test_distributed_wrapper(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = tiny_model("gpt2")
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert Anatomy.of(wrapped).model is model
        assert fingerprint(wrapped) == fingerprint(model)
        assert Anatomy.of(torch.compile(wrapped)).model is model
    finally:
        torch.distributed.destroy_process_group()


def test_lora_is_seen_through_and_hooks_see_the_adapter():
    plain = tiny_model("llama")
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]))
    anatomy = Anatomy.of(model)
    view = anatomy.linear("L0.attn.q")
    assert view.name == "model.layers.0.self_attn.q_proj.base_layer.weight"
    assert view.parameter is model.get_base_model().get_parameter(view.name)
    assert torch.equal(view.get(), Anatomy.of(plain).linear("L0.attn.q").get())
    assert anatomy.tower().module(0, "q") is not anatomy.tower().blocks[0].self_attn.q_proj.base_layer
    assert not any("lora" in part.name for part in anatomy.slices("L0"))
    assert len(anatomy.slices("L0")) == len(Anatomy.of(plain).slices("L0"))
    assert any("PEFT" in remark for remark in describe(model)["remarks"])
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match=r"merged into model\.layers\.0.*q_proj.*Unmerge"):
        Anatomy.of(model)


def test_prompt_tuning_leaves_the_base_as_it_is():
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert Anatomy.of(model).linear("L0.attn.q").name == "model.layers.0.self_attn.q_proj.weight"


# what is refused


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 64))

    def forward(self, x):
        return x @ self.weight.T


class Wrapped(torch.Tensor):
    pass


def int8_dynamic(model):
    model.model.layers[1].self_attn.o_proj.weight = nn.Parameter(torch.zeros(32, 64, dtype=torch.int8), requires_grad=False)


def subclass(model):
    model.model.layers[1].self_attn.o_proj.weight = nn.Parameter(torch.zeros(32, 64).as_subclass(Wrapped))


def other_module(model):
    model.model.layers[1].self_attn.o_proj = Quantised()


def float8(model):
    layer = model.model.layers[1].self_attn.o_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[1].self_attn.o_proj)


@pytest.mark.parametrize("damage", [int8_dynamic, subclass, other_module, float8, parametrised])
def test_weights_that_are_no_plain_matrices(damage):
    model = tiny_model("llama")
    damage(model)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.self_attn\.o_proj.*Supported: nn\.Linear"):
        Anatomy.of(model)


def test_torch_quantisation_is_refused():
    model = torch.ao.quantization.quantize_dynamic(tiny_model("bert"), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModelError, match=r"bert\.encoder\.layer\.0.*DynamicQuantizedLinear|bert\.encoder\.layer\.0.*Linear"):
        Anatomy.of(model)


@pytest.mark.parametrize("what", ["weight", "module", "block"])
def test_parameters_shared_between_blocks(what):
    model = tiny_model("llama")
    layers = model.model.layers
    if what == "weight":
        layers[2].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    elif what == "module":
        layers[2].mlp = layers[0].mlp
    else:
        layers[2] = layers[0]
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.2\.\S+ shares its weight with model\.layers\.0"):
        Anatomy.of(model)


def test_tied_embeddings_are_no_reason_to_refuse():
    model = tiny_model("gemma2")
    assert Anatomy.of(model).tower().head.weight is Anatomy.of(model).tower().embedding.weight
    assert "the head is tied to the embedding" in describe(model)["remarks"]


def test_experts_are_refused_by_name():
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=2,
    )
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.experts"):
        Anatomy.of(transformers.MixtralForCausalLM(config))


def test_unknown_families_say_what_was_looked_for():
    config = transformers.GPTJConfig(n_embd=32, n_layer=1, n_head=4, n_inner=48, vocab_size=64, rotary_dim=4)
    with pytest.raises(UnknownFamilyError, match=r"GPTJForCausalLM has model type 'gptj'.*add a row to trocar\.anatomy\.families"):
        Anatomy.of(transformers.GPTJForCausalLM(config))
    with pytest.raises(UnknownFamilyError, match=r"Linear has no config\.model_type"):
        Anatomy.of(nn.Linear(2, 2))
    model = tiny_model("llama")
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(UnknownFamilyError, match=r"model\.layers\.1 .*no model\.layers\.1\.mlp\.up_proj"):
        Anatomy.of(model)
    model.model.layers = None
    with pytest.raises(UnknownFamilyError, match=r"none of the block lists .* model\.layers, transformer\.layers, layers"):
        Anatomy.of(model)


def test_attention_that_does_not_consist_of_equal_heads():
    model = tiny_model("llama")
    model.model.layers[0].self_attn.o_proj = nn.Linear(60, 32)
    with pytest.raises(UnsupportedModelError, match="do not fit together"):
        Anatomy.of(model)


def test_a_family_of_ones_own():
    row = FAMILIES["llama"].towers[0]
    with pytest.raises(ConfigError, match="already served"):
        register(replace(FAMILIES["llama"], name="mine"))
    try:
        register(replace(FAMILIES["llama"], name="helium", model_types=("helium",), towers=(row,)))
        config = transformers.HeliumConfig(**{**TINY["llama"][2], "head_dim": 8})
        from trocar.anatomy.conformance import check

        results = check(transformers.HeliumForCausalLM(config).eval(), thorough=False)
        assert {result.name for result in results if result.state == "fails"} == set()
    finally:
        FAMILIES.pop("helium", None)


# sizes after surgery, and the summary


def test_sizes_follow_the_modules_not_the_config():
    model = tiny_model("vit")
    layer = model.vit.layers[1]
    attention, mlp = layer.attention, layer.mlp
    attention.q_proj, attention.k_proj, attention.v_proj = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 16)
    attention.o_proj, mlp.fc1, mlp.fc2 = nn.Linear(16, 32), nn.Linear(32, 20), nn.Linear(20, 32)
    del model.vit.layers[2]
    tower = Anatomy.of(model).tower()
    assert [tower.heads(0), tower.heads(1), tower.neurons(0), tower.neurons(1), tower.n_layers, tower.width] == [4, 2, 48, 20, 2, 32]
    with pytest.raises(ComponentError, match="0 to 1"):
        Anatomy.of(model).check("L1.H2")
    assert describe(model)["towers"][0]["heads"] == [4, 2]


def test_describe_is_json_and_true():
    model = tiny_model("phi3")
    summary = json.loads(json.dumps(describe(model)))
    tower = summary["towers"][0]
    assert (tower["blocks"], tower["heads"], tower["kv_heads"], tower["head_size"], tower["neurons"]) == (3, 4, 2, 16, 48)
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["bytes"] == 4 * summary["parameters"]
    assert summary["fingerprint"] == fingerprint(model)
    assert any("fused in model.layers.0.self_attn.qkv_proj" in remark for remark in summary["remarks"])
    assert describe(model, values=False)["fingerprint"] is None
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert describe(empty)["fingerprint"] is None
    assert describe(empty)["structure"] == summary["structure"]


def test_views_are_of_this_kind():
    anatomy = Anatomy.of(tiny_model("gpt2"))
    assert Anatomy.of(anatomy) is anatomy
    view = anatomy.linear(Linear(0, "k"))
    assert (view.transposed, view.rows, view.name) == (True, range(32, 64), "transformer.h.0.attn.c_attn.weight")
    assert [type(c) for c in (anatomy.check("L0.H0"), anatomy.check("L0.N0"))] == [Head, Neuron]
