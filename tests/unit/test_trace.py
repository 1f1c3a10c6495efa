"""Interventions as data, contexts that clean up, errors, beams, prefixes that go out of date, sweeps over processes."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.anatomy import Anatomy, Head, tiny_inputs, tiny_model
from trocar.core.errors import ComponentError, DataError, InterventionError, TrocarError
from trocar.trace import KINDS, Add, Point, Replace, Scale, capture_prefix, intervene, pack, parse_point, record, sweep, unpack

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def inputs(model):
    return tiny_inputs(model, rows=3, length=6)


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) + ("generate" in vars(m)) for m in model.modules()
    )


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


# names and data


@given(st.sampled_from(KINDS), st.integers(0, 999), st.sampled_from(["", "vision", "text"]))
def test_a_point_prints_as_it_parses(kind, layer, tower):
    point = Point(kind, layer, tower)
    assert parse_point(str(point)) == point


@pytest.mark.parametrize("text", ["L1", "L1.head", "1.heads", "L-1.heads", "L1.heads.x", "", "a.b.L1.heads"])
def test_a_wrong_point_is_refused(text):
    with pytest.raises(ComponentError):
        parse_point(text)


def test_a_missing_layer_or_component_names_what_there_is(model):
    with pytest.raises(ComponentError, match="0 to 2"), record(model, "L3.heads"):
        pass
    with pytest.raises(ComponentError, match="0 to 3"), intervene(model, Scale("L1.H4", 0.0)):
        pass
    with pytest.raises(ComponentError, match="cannot act on"), intervene(model, Scale("L1.attn.q", 0.0)):
        pass


POSITIONS = st.one_of(
    st.none(),
    st.sampled_from(["last", "generated", "last+generated"]),
    st.lists(st.integers(-9, 9), min_size=1, max_size=4),
    st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=3), min_size=2, max_size=2),
)


@given(
    st.sampled_from([Scale, Add, Replace]),
    st.sampled_from(["L1.H2", "L0.N3", "vision.L2.mlp", "L4", "L3.resid_pre"]),
    POSITIONS,
    st.booleans(),
)
def test_interventions_survive_being_written_and_read(kind, where, positions, tensor):
    value = torch.randn(3) if tensor else 2.5
    item = kind(where, value, positions, rows=[4, 1])
    header, tensors = pack([item])
    (back,) = unpack(json.loads(json.dumps(header)), tensors)
    assert (type(back), back.where, back.positions, back.rows) == (kind, item.where, item.positions, (4, 1))
    assert torch.equal(torch.as_tensor(back.value), torch.as_tensor(value))
    with pytest.raises(AttributeError):
        back.value = 1.0


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "eval", "where": "L1.H1", "value": 1.0},
        {"kind": "scale", "where": "L1.H1", "value": 1.0, "code": "x"},
        {"kind": "scale", "where": "L1.H1"},
        {"kind": "scale", "where": "L1.H1", "tensor": "absent"},
        {"kind": "scale", "where": "L1.H1", "value": "1"},
        {"kind": "scale", "where": 3, "value": 1.0},
        {"kind": "scale", "where": "L1.H1", "value": 1.0, "positions": "first"},
        {"kind": "scale", "where": "L1.H1", "value": 1.0, "rows": [0, 0]},
        {"kind": "scale", "where": "L1.H1", "value": 1.0, "positions": []},
        {"kind": "scale", "where": "L1.H1", "value": 1.0, "positions": [1.5]},
        {"kind": "scale", "where": "L1.H1", "value": 1.0, "positions": [[1], [2], [3]], "rows": [0, 1]},
        "scale",
    ],
)
def test_damaged_entries_are_refused(entry):
    with pytest.raises(TrocarError):
        unpack([entry], {})


# errors at work, and cleaning up

WRONG = [
    (Add("L1.heads", torch.zeros(3)), "shape"),
    (Add("L1.H1", torch.zeros(2, 8)), "shape"),
    (Add("L1.resid_post", torch.zeros(3, 5, 32)), "shape"),
    (Add("L1.resid_post", torch.zeros(3, 2, 32), positions=[1]), "shape"),
    (Add("L1.N1", torch.zeros(3, 6, 1)), "shape"),
    (Add("L1.resid_post", torch.zeros(32, dtype=torch.float64)), "float64 on cpu, the activations are float32"),
    (Add("L1.resid_post", torch.zeros(32, device="meta")), "meta"),
    (Scale("L1.H1", 0.0, rows=[3]), "3 rows"),
    (Scale("L1.H1", 0.0, positions=[[1], [2]]), "3 rows"),
    (Scale("L1.H1", 0.0, positions=6), "never came into effect"),
    (Scale("L1.H1", 0.0, positions=[2, -7]), "position -7"),
    (Scale("L1.H1", 0.0, positions=[[1], [2], [1, 9]]), "position 9 of its row 2"),
    (Scale("L1.H1", 0.0, positions="generated"), "never came into effect"),
]


@pytest.mark.parametrize(("item", "message"), WRONG, ids=[f"{item}-{message}" for item, message in WRONG])
def test_what_cannot_take_effect_is_an_error(model, inputs, item, message):
    before = run(model, inputs)
    with pytest.raises(InterventionError, match=message), intervene(model, item):
        run(model, inputs)
    assert hooks(model) == 0
    assert torch.equal(run(model, inputs), before)


def test_an_intervention_that_no_pass_reached_is_an_error(model):
    with pytest.raises(InterventionError, match="no forward pass reached it"), intervene(model, Scale("L1.H1", 0.0)):
        pass
    with record(model, "L1.heads") as rec:
        pass
    with pytest.raises(InterventionError, match="Nothing was recorded"):
        rec["L1.heads"]
    with pytest.raises(InterventionError, match="is not recorded"):
        rec["L2.heads"]


def test_two_replacements_of_the_same_entries_contradict_each_other(model, inputs):
    one, two = Replace("L1.heads", 0.0, positions=[1, 5]), Replace("L1.H2", 1.0, positions=-1)
    with pytest.raises(InterventionError, match="another Replace"), intervene(model, [one, two]):
        run(model, inputs)
    with intervene(model, [Replace("L1.H1", 0.0, positions="last"), Replace("L1.H2", 1.0, positions=-1)]):
        run(model, inputs)
    with intervene(model, [one, Add("L1.H2", 1.0, positions=-1), Scale("L1.H2", 2.0)]), record(model, "L1.heads") as rec:
        run(model, inputs)
    assert (rec["L1.heads"][:, -1, 2] == 2).all()
    assert (rec["L1.heads"][:, -1, 1] == 0).all()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_hook_stays_whatever_ends_the_context(model, inputs, error):
    before = run(model, inputs)

    def in_nested_contexts():
        with intervene(model, Scale("L1.H1", 0.0)), record(model, [f"L1.{kind}" for kind in KINDS]):
            with intervene(model, Add("L2", 1.0)), record(model, "L0.heads", grad=True):
                run(model, inputs)
                assert hooks(model) > 0
                raise error

    def fail(*_):
        raise error

    with pytest.raises(error):
        in_nested_contexts()
    assert hooks(model) == 0
    prefix = capture_prefix(model, inputs, 2)
    handle = model.transformer.ln_f.register_forward_hook(fail)
    with pytest.raises(error):
        prefix.run()
    handle.remove()
    assert hooks(model) == 0
    assert torch.equal(run(model, inputs), before)


def test_contexts_act_in_the_order_in_which_they_were_opened(model, inputs):
    with record(model, "L1.heads") as outer, intervene(model, Add("L1.heads", 1.0)):
        with record(model, "L1.heads") as between, intervene(model, Scale("L1.heads", 0.0)), record(model, "L1.heads") as inner:
            run(model, inputs)
    torch.testing.assert_close(outer["L1.heads"] + 1, between["L1.heads"])
    assert (inner["L1.heads"] == 0).all()


def test_several_passes_are_kept_and_the_last_one_is_read(model, inputs):
    with record(model, "L1.heads", positions="last") as rec:
        run(model, inputs)
        run(model, {"input_ids": inputs["input_ids"][:2, :4]})
    assert [tensor.shape[0] for tensor in rec.steps("L1.heads")] == [3, 2]
    assert rec["L1.heads"].shape == (2, 1, 4, 8)
    with record(model, "L1.heads") as whole:
        run(model, inputs)
    assert torch.equal(rec.steps("L1.heads")[0], whole["L1.heads"][:, -1:])


def test_a_recording_that_was_overwritten_is_not_served(model, inputs):
    def write_in_place(module, args):
        args[0].mul_(2)

    handle = model.transformer.h[2].register_forward_pre_hook(write_in_place)
    with record(model, "L1.resid_post") as rec:
        run(model, inputs)
    handle.remove()
    with pytest.raises(InterventionError, match="overwritten"):
        rec["L1.resid_post"]


def test_right_padding_moves_the_last_position(model, inputs):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 1, 0, 0, 0]])
    with record(model, "L1.heads", positions="last") as last, record(model, "L1.heads") as all_:
        run(model, {**inputs, "attention_mask": mask})
    assert torch.equal(last["L1.heads"][:, 0], all_["L1.heads"][torch.arange(3), torch.tensor([3, 5, 2])])
    with intervene(model, Replace("L1.heads", 0.0, positions=-2)), record(model, "L1.heads") as rec:
        run(model, {**inputs, "attention_mask": mask})
    zero = (rec["L1.heads"] == 0).all(-1).all(-1)
    assert zero.nonzero().tolist() == [[0, 2], [1, 4], [2, 1]]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_selection_equals_writing_the_entries_by_hand(model, inputs, data):
    rows = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
    positions = data.draw(st.lists(st.integers(-6, 5), min_size=1, max_size=3, unique_by=lambda p: p % 6))
    point = data.draw(st.sampled_from(["L1.heads", "L0.neurons", "L2.resid_pre"]))
    kind = data.draw(st.sampled_from([Scale, Add, Replace]))
    with record(model, point) as rec:
        run(model, inputs)
    expected, shape = rec[point].clone(), rec[point].shape[2:]
    lead = data.draw(st.sampled_from([(), (len(rows),), (1,), (len(rows), len(positions)), (1, len(positions)), (len(rows), 1)]))
    value = torch.randn(*lead, *shape)
    full = value.reshape(*((1,) * (2 - len(lead)) if len(lead) == 0 else lead), *((1,) if len(lead) == 1 else ()), *shape)
    full = full.expand(len(rows), len(positions), *shape)
    for i, row in enumerate(rows):
        for j, position in enumerate(positions):
            old = expected[row, position].clone()
            expected[row, position] = {Scale: old * full[i, j], Add: old + full[i, j], Replace: full[i, j]}[kind]
    with intervene(model, kind(point, value, positions, rows)), record(model, point) as rec:
        run(model, inputs)
    assert torch.equal(rec[point], expected)


# generation that expands rows


@pytest.mark.parametrize("extra", [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_rows_of_generate_count_as_the_row_they_come_from(model, inputs, extra):
    value = 5 * torch.randn(2, 32)
    with intervene(model, Replace("L2.resid_post", value, positions="last", rows=[2, 0])), record(model, "L2.resid_post") as rec:
        torch.manual_seed(0)
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, **extra)
    first = rec.steps("L2.resid_post")[0]
    copies = first.shape[0] // 3
    assert copies == extra.get("num_beams", 2)
    for row, new in ((2, value[0]), (0, value[1])):
        assert torch.equal(first[row * copies : (row + 1) * copies, -1], new.expand(copies, -1))
    assert not torch.isin(first[copies : 2 * copies, -1], value).any()
    assert hooks(model) == 0


def test_an_uncached_and_a_continued_generation_keep_the_prompt(model, inputs):
    items = [Add("L1.resid_post", torch.randn(32), positions="last"), Add("L0.resid_post", torch.randn(32), positions="generated")]
    with intervene(model, items):
        first = run(model, inputs)
        longer = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :2]], dim=1)
        cached = model(**inputs, use_cache=True)
        cache = cached[next(name for name in ("cache", "past_key_values") if name in cached)]
        by_hand = model(input_ids=longer[:, 6:], past_key_values=cache).logits
    explicit = [
        Add("L1.resid_post", items[0].value, positions=5),
        Add("L0.resid_post", items[1].value, positions=[6, 7]),
    ]
    with intervene(model, explicit), torch.no_grad():
        expected = model(input_ids=longer).logits
    torch.testing.assert_close(first, expected[:, :6], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_hand, expected[:, 6:], atol=1e-5, rtol=1e-5)


def test_the_newest_position_of_every_step(model, inputs):
    """`last+generated` edits each position once, when it is the newest; a loop by hand and the two halves say the same."""
    value = torch.randn(32)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with intervene(model, Add("L1.resid_post", value, positions="last+generated")), torch.no_grad():
        made = model.generate(**inputs, **settings)
    halves = [Add("L1.resid_post", value, positions=name) for name in ("last", "generated")]
    with intervene(model, halves), torch.no_grad():
        assert torch.equal(model.generate(**inputs, **settings), made)
    ids, cache, feed = inputs["input_ids"], None, inputs["input_ids"]
    for _ in range(4):
        with intervene(model, Add("L1.resid_post", value, positions=[ids.shape[1] - 1])), torch.no_grad():
            output = model(input_ids=feed, past_key_values=cache, use_cache=True)
        cache, feed = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, feed], dim=1)
    assert torch.equal(made, ids)


# prefixes


def change_embedding(model):
    with torch.no_grad():
        model.transformer.wte.weight[3].add_(1.0)


def exchange_block_weight(model):
    model.transformer.h[0].mlp.c_proj.weight = torch.nn.Parameter(model.transformer.h[0].mlp.c_proj.weight.detach().clone())


def step_everything(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.1).step()


@pytest.mark.parametrize("change", [change_embedding, exchange_block_weight, step_everything])
def test_a_prefix_refuses_to_run_when_something_below_changed(change, inputs):
    model = tiny_model("gpt2")
    prefix = capture_prefix(model, inputs, 1)
    change(model)
    with pytest.raises(InterventionError, match="out of date: transformer"):
        prefix.run()


def test_a_prefix_stays_valid_when_something_above_changed(inputs):
    model = tiny_model("gpt2")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untie
    prefix = capture_prefix(model, inputs, 1)
    optimiser = torch.optim.SGD([*model.transformer.h[1].parameters(), *model.lm_head.parameters()], lr=0.1)
    for _ in range(2):
        prefix.run().logits.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    torch.testing.assert_close(prefix.run().logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_clip_rows_and_weights_of_one_tower_leave_the_other_alone():
    model = tiny_model("clip")
    inputs = tiny_inputs(model, rows=4, length=6)
    inputs["input_ids"] = inputs["input_ids"][:3]
    prefix = capture_prefix(model, inputs, 1, tower="vision")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        torch.testing.assert_close(prefix.run(rows=[3, 3, 0, 1, 2]).logits_per_image, expected[[3, 3, 0, 1, 2]], atol=1e-5, rtol=1e-5)
        model.logit_scale.add_(0.1)
        model.text_model.get_parameter("encoder.layers.0.mlp.fc1.weight").mul_(2.0)
    prefix.run()
    text = capture_prefix(model, inputs, 1, tower="text")
    with torch.no_grad():
        model.vision_model.get_parameter("encoder.layers.0.mlp.fc1.weight").mul_(2.0)
        torch.testing.assert_close(text.run().logits_per_image, model(**inputs).logits_per_image, atol=1e-5, rtol=1e-5)
    with pytest.raises(InterventionError, match="out of date"):
        prefix.run()


def test_what_a_prefix_skips_can_be_neither_changed_nor_read(model, inputs):
    prefix = capture_prefix(model, inputs, 2)
    for where in ("L0.resid_post", "L1.resid_pre", "L1.resid_post", "L1.H1"):
        with pytest.raises(InterventionError, match="never came into effect"), intervene(model, Scale(where, 0.0)):
            prefix.run()
    with record(model, "L1.resid_post") as rec:
        prefix.run()
    with pytest.raises(InterventionError, match="Nothing was recorded"):
        rec["L1.resid_post"]
    with intervene(model, Scale("L2.resid_pre", 0.0)), torch.no_grad():
        torch.testing.assert_close(prefix.run().logits, model(**inputs).logits)


def test_bad_use_of_a_prefix(model, inputs):
    with pytest.raises(ComponentError, match="0 to 2"):
        capture_prefix(model, inputs, 3)
    with pytest.raises(DataError, match="output_hidden_states"):
        capture_prefix(model, {**inputs, "output_hidden_states": True}, 1)
    with pytest.raises(DataError, match="0 to 2"):
        capture_prefix(model, inputs, 1).run(rows=[3])
    with pytest.raises(DataError, match="no position 6"):
        capture_prefix(model, inputs, 1, position=6)
    vit = tiny_model("vit")
    with pytest.raises(DataError, match="no cache"):
        capture_prefix(vit, tiny_inputs(vit), 1, position=2)


# sweeps


def last_logit(output, rows):
    return output.logits[:, -1, 5]


def test_a_sweep_over_heads_computes_one_position_above_each(model, inputs):
    heads = Anatomy.of(model).components(Head)
    reports = []
    scores = sweep(model, inputs, [Scale(head, 0.0, "last") for head in heads], last_logit, read="last", tell=reports.append)
    for number in (0, 6, 11):
        with intervene(model, Scale(heads[number], 0.0, "last")):
            torch.testing.assert_close(scores[number], run(model, inputs)[:, -1, 5], atol=1e-5, rtol=1e-5)
    base = 3 * 3 * 6  # rows x blocks x positions
    assert reports[0].share * 12 * base <= base + 12 * 3 * 3
    assert reports[0].reasons == ()
    assert hooks(model) == 0


def test_a_sweep_refuses_what_it_cannot_do(model, inputs):
    item = Scale("L1.H1", 0.0)
    with pytest.raises(DataError, match="one number per row"):
        sweep(model, inputs, [item], lambda output, rows: output.logits[:, -1])
    with pytest.raises(InterventionError, match="generates none"):
        sweep(model, inputs, [Scale("L1.H1", 0.0, positions="generated")], last_logit)
    with pytest.raises(InterventionError, match="never came into effect"):
        sweep(model, inputs, [Scale("L1.H1", 0.0, positions=9)], last_logit)
    with pytest.raises(InterventionError, match="row 7"):
        sweep(model, inputs, [Scale("L1.H1", 0.0, rows=[7])], last_logit)
    with pytest.raises(DataError, match="evaluation mode"):
        sweep(tiny_model("gpt2").train(), inputs, [item], last_logit)
    with pytest.raises(DataError, match="left"):
        sweep(model, {**inputs, "attention_mask": torch.tensor([[1] * 5 + [0]] * 3)}, [item], last_logit, read="last")
    with pytest.raises(DataError, match="read='first'"):
        sweep(model, inputs, [item], last_logit, read="first")
    clip = tiny_model("clip")
    with pytest.raises(InterventionError, match="one tower"):
        sweep(clip, tiny_inputs(clip), [Scale("text.L1.H1", 0.0), Scale("vision.L1.H1", 0.0)], last_logit)
    assert hooks(model) == 0


def test_labels_are_no_reason_for_wrong_scores(model, inputs):
    """With labels the loss needs every position, so nothing left of a change may be reused, and the report says so."""
    reports = []
    full = {**inputs, "labels": inputs["input_ids"]}
    scores = sweep(
        model, full, [Scale("L1.H1", 0.0, "last")], lambda output, rows: output.loss.expand(len(rows)), batch_size=3, tell=reports.append
    )
    with intervene(model, Scale("L1.H1", 0.0, "last")), torch.no_grad():
        torch.testing.assert_close(scores[0, 0], model(**full).loss)
    assert not reports[0].position_reuse
    assert "labels" in reports[0].reasons[0]


def test_the_guide_runs_as_it_stands():
    text = (Path(__file__).parents[2] / "docs" / "guide" / "trace.md").read_text()
    space = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, space)
    assert space["effects"].shape == (12, 2)
    assert space["effects"].abs().min() > 0
    assert space["attribution"].shape == (2, 6, 4)
    assert space["tokens"].shape == (2, 10)
    assert space["logits"].shape[:2] == (3, 6)


SPLIT = """
import sys, torch
torch.set_num_threads(1)
from trocar.anatomy import Head, Anatomy, tiny_inputs, tiny_model
from trocar.trace import Scale, sweep
model = tiny_model("gpt2")
inputs = tiny_inputs(model, rows=5, length=6)
sets = [[], *[[Scale(head, 0.0, "last")] for head in Anatomy.of(model).components(Head)]]
reports = []
metric = lambda output, rows: output.logits[:, -1].logsumexp(-1) + rows
scores = [sweep(model, inputs, sets, metric, batch_size=size, tell=reports.append) for size in (2, 8)]
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
torch.save(scores, f"{sys.argv[1]}.{rank}")
assert reports[0].processes == int(sys.argv[2]), reports
"""


def test_two_processes_give_the_scores_of_one(tmp_path, monkeypatch):
    script, out = tmp_path / "split.py", tmp_path / "scores"
    script.write_text(SPLIT)
    source = str(Path(__file__).parents[2] / "src")
    env = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(sys, "argv", [str(script), f"{out}.one", "1"])
    runpy.run_path(str(script))
    # without --multi_gpu, accelerate starts several processes on CPUs through MPI only
    settings = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *settings.split()]
    done = subprocess.run([*launch, str(script), str(out), "2"], env=env, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one = torch.load(f"{out}.one.0", weights_only=True)
    for rank in (0, 1):
        for mine, theirs in zip(one, torch.load(f"{out}.{rank}", weights_only=True), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_adapters_are_no_obstacle(dtype):
    from peft import LoraConfig, get_peft_model

    base = tiny_model("llama").to(dtype)
    inputs = tiny_inputs(base, rows=3, length=6)
    wrapped = get_peft_model(
        base, LoraConfig(target_modules=["o_proj", "down_proj"], init_lora_weights=False), autocast_adapter_dtype=False
    )
    wrapped.eval()
    value = torch.randn(16, dtype=dtype)
    with record(wrapped, "L1.heads") as rec, torch.no_grad():
        before = wrapped(**inputs).logits
        kept = rec["L1.heads"]
        with intervene(wrapped, Replace("L1.H2", value, positions="last")):
            changed = wrapped(**inputs).logits
            tokens = wrapped.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert kept.dtype == dtype
    assert tokens.shape == (3, 9)
    assert torch.equal(changed[:, :-1], before[:, :-1])
    assert not torch.equal(changed[:, -1], before[:, -1])
    prefix = capture_prefix(wrapped, inputs, 1)
    with torch.no_grad():
        torch.testing.assert_close(prefix.run().logits, before)
