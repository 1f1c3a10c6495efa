"""MT editing: prompts, instances and the plan of interventions."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.anatomy import Head, Linear, Neuron, fingerprint, tiny_inputs, tiny_model
from trocar.core.errors import ComponentError, ConfigError, DataError, EditError
from trocar.edit.neurons import instances, plan
from trocar.edit.neurons.prompts import (
    Corpus,
    Direction,
    clean_prompts,
    corrupt,
    corrupted_prompts,
    draw_shots,
    prompt,
    split,
)
from trocar.locate import How, Scores
from trocar.method import Examples
from trocar.patch import AddVector, Gate, Patch, ScaleAt
from trocar.trace import Add, Point, Replace, Scale, intervene, record
from trocar.trace.queries import Continuation, batch_of

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt", "phi3"]
DE = Direction("en", "de")


MOST = [f"L{layer}.N{neuron}" for layer in range(3) for neuron in range(30)]


# prompts


def test_prompts_have_the_published_form():
    assert prompt(DE, "A man\nsleeps. ") == "English: A man sleeps.\nGerman:"
    shot = prompt(DE, "A dog.", [("A cat.", "Eine Katze.")])
    assert shot == "English: A cat.\nGerman: Eine Katze.\nEnglish: A dog.\nGerman:"


def test_directions_are_read_in_any_code():
    assert {Direction.parse(text) for text in ("en-de", "English-German", "eng-deu", DE)} == {DE}
    assert str(DE) == "en-de"
    for text in ("en", "en-de-fr", "-de", "en-en", "en-English"):
        with pytest.raises(ConfigError):
            Direction.parse(text)


def test_columns_are_found_by_code_or_name():
    rows = Examples({}, ("a", "b", "c"), fields={"English": ["x", "y", "z"], "de": ["u", "", " w "], "id": [1, 2, 3]})
    corpus = Corpus.of(rows, "data.examples")
    assert corpus.pairs(DE) == [("x", "u"), ("z", "w")]
    assert corpus.pairs(Direction("de", "en"), [2]) == [("w", "z")]
    with pytest.raises(DataError, match=r"data\.examples.*'fr'"):
        corpus.pairs(Direction("en", "fr"))
    with pytest.raises(DataError, match="two columns"):
        Corpus.of(Examples({}, ("a",), fields={"English": ["x"], "en": ["y"]}))


@given(st.integers(12, 200), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_the_split_leaves_nothing_out_and_shares_nothing(n, seed):
    parts = split(n, seed)
    rows = [*parts.examples, *parts.validation, *parts.queries]
    assert sorted(rows) == list(range(n))
    assert min(map(len, (parts.examples, parts.validation, parts.queries))) > 0
    assert parts == split(n, seed)


PAIRS = [(f"source {n}", f"Ziel {n}") for n in range(30)]


@given(st.integers(2, 10), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_permuted_examples_keep_their_targets_and_lose_their_meaning(shots, seed):
    rng = np.random.default_rng(seed)
    right = draw_shots(PAIRS, shots, rng, "source 3")
    assert len(set(right)) == shots
    assert ("source 3", "Ziel 3") not in right
    wrong = corrupt(right, "permuted", rng)
    assert [pair[0] for pair in wrong] == [pair[0] for pair in right]
    assert sorted(pair[1] for pair in wrong) == sorted(pair[1] for pair in right)
    assert not set(wrong) & set(right)


def test_corruption_with_another_language_and_what_cannot_be_corrupted():
    rng = np.random.default_rng(0)
    wrong = corrupt(PAIRS[:3], "language", rng, [["un", "deux"], []])
    assert {pair[1] for pair in wrong} <= {"un", "deux"}
    assert corrupt(PAIRS[:3], "absent", rng) == []
    with pytest.raises(ConfigError, match="single example"):
        corrupt(PAIRS[:1], "permuted", rng)
    with pytest.raises(DataError, match="third language"):
        corrupt(PAIRS[:1], "language", rng, [])
    with pytest.raises(DataError, match="31 examples"):
        draw_shots(PAIRS, 31, rng)


def test_prompts_for_heads_are_the_same_for_the_same_seed():
    assert clean_prompts(DE, PAIRS, 5, 3, 1) == clean_prompts(DE, PAIRS, 5, 3, 1) != clean_prompts(DE, PAIRS, 5, 3, 2)
    assert len(clean_prompts(DE, PAIRS, 50, 3, 1)) == 50
    prompts, answers = corrupted_prompts(DE, PAIRS[5:], PAIRS[:5], 25, 3, 0)
    assert len(prompts) == len(answers) == len(set(answers)) == 5  # never beyond what there is
    for text, answer in zip(prompts, answers, strict=True):
        assert text.endswith(f"English: source {answer.split()[1]}\nGerman:")
        assert f"{answer}\n" not in text


# instances


def going_on(*tokens: int, stopped: bool = True) -> Continuation:
    return Continuation("", tokens, stopped)


def test_task_instances_are_joined_from_ids():
    prompts, made = [(1, 2), (3,), (4,)], [going_on(10, 11, 12), going_on(20), going_on()]
    found = instances.task_instances(prompts, made, [True, True, True], 100, 0)
    assert len(found) == 3 + 1  # min(6, tokens) a case
    for one in found:
        tokens = made[one.case].tokens
        place = len(one.ids) - len(prompts[one.case])
        assert one.ids == (*prompts[one.case], *tokens[:place])
        assert one.token == tokens[place]
    assert len(instances.task_instances(prompts, made, [True, True, True], 2, 0)) == 2
    assert {one.case for one in instances.task_instances(prompts, made, [False, True, True], 9, 0)} == {1}
    long = [going_on(*range(100))]
    assert all(len(one.ids) <= 1 + 19 for seed in range(20) for one in instances.task_instances([(5,)], long, [True], 9, seed))


def test_loop_instances_grow_the_loop_unit_by_unit():
    prompts, made = [(1, 2), (3,), (4,)], [going_on(9, *[7, 8] * 5, 7), going_on(5, 6), going_on(*range(30))]
    found = instances.loop_instances(prompts, made, [True, False, True])
    assert (found.cases, found.dropped) == (1, 1)  # the third is no loop of tokens
    assert [(one.occurrence, one.token) for one in found.instances] == [(n, token) for n in range(5) for token in (7, 8)]
    for one in found.instances:
        assert one.ids[:3] == (1, 2, 9)
        assert one.ids[3:] == tuple([7, 8] * one.occurrence + ([7] if one.token == 8 else []))
    shorter = instances.loop_instances(prompts, made, [True, False, False], longest=8)
    assert max(len(one.ids) for one in shorter.instances) < 8
    first = instances.loop_instances(prompts, made, [True, False, False], unit_tokens=1)
    assert {one.token for one in first.instances} == {7}


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(4, 12)), min_size=1, max_size=6), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_the_budget_of_loops_holds(loops, budget):
    made = [going_on(*(list(range(100 * n, 100 * n + period)) * times)) for n, (period, times) in enumerate(loops)]
    found = instances.loop_instances([(1,)] * len(made), made, [True] * len(made), budget)
    later = [one for one in found.instances if one.occurrence > 0]
    assert len(later) <= budget
    total = sum(period * (times - 1) for period, times in loops)
    assert len(later) == total or len(later) > budget - 4 * len(loops)
    assert max((one.occurrence for one in found.instances), default=0) <= found.occurrences


# plan


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def means_of(model, seed=0):
    from trocar.anatomy import Anatomy

    tower = Anatomy.of(model).tower()
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tower.heads(n), tower.head_size(n), generator=generator) for n in range(tower.n_layers)]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def generated(model, inputs, n=4):
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("generate" in vars(m)) for m in model.modules())


def test_an_empty_plan_does_nothing(model):
    inputs, before = tiny_inputs(model), fingerprint(model)
    means = means_of(model)
    none = Scores("head", "", {"L0.H": np.zeros(4)}, How("none"))
    ops = plan.heads_add(model, none, means) + plan.heads_add(model, ["L0.H1"], means, 0.0) + plan.neurons_scale(model, {"L1.N3": 1.0})
    assert ops == plan.vector_add(model, [], means) == plan.neurons_scale(model, {}) == []
    patch = Patch.of(model, ops)
    base, made = logits(model, inputs), generated(model, inputs)
    with patch.applied(model):
        assert torch.equal(logits(model, inputs), base)
        assert torch.equal(generated(model, inputs), made)
    zeros = AddVector("L1.heads", torch.zeros(64))
    with intervene(model, Add(zeros.point, torch.zeros(4, 16))), intervene(model, Scale("L1.N3", 1.0)):
        assert torch.equal(logits(model, inputs), base)
    with pytest.raises(RuntimeError), Patch.of(model, plan.heads_add(model, ["L0.H1"], means)).applied(model):
        raise RuntimeError
    assert (hooks(model), fingerprint(model)) == (0, before)


@pytest.mark.parametrize("family", DECODERS)
def test_the_plan_on_every_family(family):
    """M-8 and M-9: scaling neurons everywhere is scaling columns; adding to a head is adding W_O times it; MT-FV is added to a block."""
    from trocar.anatomy import Anatomy

    model = tiny_model(family)
    inputs, anatomy, means = tiny_inputs(model), Anatomy.of(model), means_of(model)
    base, before = logits(model, inputs), fingerprint(model)
    size = anatomy.tower().head_size(1)
    # neurons: at all positions the weights' form equals the inference form
    factors = {"L1.N3": 0.0, "L0.N5": 2.0, "L2.N7": 0.5}
    weights = Patch.of(model, plan.neurons_scale(model, factors, permanent=True))
    hooked = Patch.of(model, plan.neurons_scale(model, factors, "all"))
    assert isinstance(weights.ops[0], Gate)
    assert isinstance(hooked.ops[0], ScaleAt)
    with weights.applied(model):
        scaled = logits(model, inputs)
        assert bool((anatomy.linear(Linear(1, "down")).get()[:, 3] == 0).all())
    assert fingerprint(model) == before
    with hooked.applied(model):
        torch.testing.assert_close(logits(model, inputs), scaled, atol=1e-6, rtol=1e-5)
    assert not torch.equal(scaled, base)
    # heads: what the output projection adds is W_O[:, h] zbar, at the last position only
    with record(model, "L1.attn_out") as rec:
        logits(model, inputs)
    clean = rec["L1.attn_out"]
    with Patch.of(model, plan.heads_add(model, ["L1.H2"], means, 0.5)).applied(model), record(model, "L1.attn_out") as rec:
        logits(model, inputs)
    change = rec["L1.attn_out"] - clean
    expected = anatomy.linear(Linear(1, "o")).get()[:, 2 * size : 3 * size] @ (0.5 * means[1][2])
    torch.testing.assert_close(change[:, -1], expected.expand(len(change), -1), atol=1e-5, rtol=1e-4)
    assert not change[:, :-1].any()
    # the function vector of one head, after a block
    vector = plan.function_vector(model, ["L1.H2"], means)
    torch.testing.assert_close(vector, 2 * expected, atol=1e-5, rtol=1e-4)
    op = plan.vector_add(model, ["L1.H2"], means, layer=2)[0]
    with intervene(model, Add("L2.resid_post", vector, positions="last")):
        wanted = logits(model, inputs)
    with Patch.of(model, [op]).applied(model):
        assert torch.equal(logits(model, inputs), wanted)
    # switching off all heads of a layer at the last position leaves the projection's bias
    off = ScaleAt(dict.fromkeys([str(Head(1, n)) for n in range(anatomy.tower().heads(1))], 0.0), "last")
    with Patch.of(model, [off]).applied(model), record(model, "L1.attn_out") as rec:
        logits(model, inputs)
    bias = anatomy.linear(Linear(1, "o")).get_bias()
    left = rec["L1.attn_out"][:, -1]
    torch.testing.assert_close(left, torch.zeros_like(left) if bias is None else bias.expand_as(left), atol=1e-6, rtol=1e-5)
    assert (fingerprint(model), hooks(model)) == (before, 0)


def test_replacing_heads_is_what_they_were_located_by(model):
    inputs, means = tiny_inputs(model), means_of(model)
    items = [Replace(head, means[head.layer][head.index], "last") for head in (Head(0, 1), Head(2, 3))]
    with intervene(model, items):
        wanted = logits(model, inputs)
    with Patch.of(model, plan.heads_replace(model, ["L2.H3", "L0.H1"], means, 1.0, "last")).applied(model):
        torch.testing.assert_close(logits(model, inputs), wanted, atol=1e-6, rtol=1e-5)
    with record(model, "L1.heads") as rec:
        logits(model, inputs)
    clean = rec["L1.heads"][:, -1, 2]
    with Patch.of(model, plan.heads_replace(model, ["L1.H2"], means, 0.25)).applied(model), record(model, "L1.attn_out") as rec:
        logits(model, inputs)
    with intervene(model, Replace("L1.H2", torch.lerp(clean, means[1][2].expand_as(clean), 0.25), "last")):
        with record(model, "L1.attn_out") as expected:
            logits(model, inputs)
    torch.testing.assert_close(rec["L1.attn_out"], expected["L1.attn_out"], atol=1e-6, rtol=1e-5)
    assert plan.heads_replace(model, ["L1.H2"], means, 0.0) == plan.heads_replace(model, [], means) == []


@pytest.mark.parametrize("positions", ["last+generated", "all", "generated", "last"])
def test_cached_generation_edits_each_position_once(model, positions):
    """M-15: a manual loop that edits positions when they are the newest gives the same ids."""
    inputs, means = {"input_ids": tiny_inputs(model)["input_ids"]}, means_of(model)
    neurons = {"L1.N3": 0.0, "L1.N4": 9.0}
    heads = plan.heads_add(model, ["L0.H1", "L2.H3"], means, 3.0, positions)
    with Patch.of(model, heads + plan.neurons_scale(model, neurons, positions)).applied(model):
        made = generated(model, inputs, 5)
    ids, cache, feed = inputs["input_ids"], None, inputs["input_ids"]
    adds = {layer: torch.zeros(4, 16) for layer in (0, 2)}
    adds[0][1], adds[2][3] = 3 * means[0][1], 3 * means[2][3]
    for step in range(5):
        newest, columns = [ids.shape[1] - 1], list(range(ids.shape[1]))
        active = {
            "last+generated": newest,
            "generated": newest * (step > 0),
            "last": newest * (step == 0),
            "all": columns[-feed.shape[1] :],
        }
        where = active[positions]
        items = [Add(Point("heads", layer), value, where) for layer, value in adds.items()] if where else []
        items += [Scale(name, factor, where) for name, factor in neurons.items()] if where else []
        with intervene(model, items), torch.no_grad():
            output = model(input_ids=feed, past_key_values=cache, use_cache=True)
        cache, feed = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, feed], dim=1)
    assert torch.equal(made, ids)


def test_a_row_of_a_batch_is_the_prompt_alone(model):
    """M-16, under a plan that acts at the newest position."""
    rows = [[5, 6, 7, 8, 9], [3, 4], [11, 12, 13]]
    patch = Patch.of(model, plan.heads_add(model, ["L0.H1", "L2.H3"], means_of(model), 2.0) + plan.neurons_scale(model, {"L1.N4": 5.0}))
    with patch.applied(model):
        batch = batch_of(model, rows)
        batch.pop("position_ids", None)
        together = generated(model, batch)[:, 5:]
        alone = [generated(model, {"input_ids": torch.tensor([row])})[0, len(row) :] for row in rows]
    for got, wanted in zip(together, alone, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        (lambda m, z: plan.heads_add(m, ["L9.H0"], z), ComponentError, "L9"),
        (lambda m, z: plan.heads_add(m, ["L0.H99"], z), ComponentError, "0 to 3"),
        (lambda m, z: plan.heads_add(m, ["L0.N1"], z), EditError, "not a head"),
        (lambda m, z: plan.heads_add(m, ["L0.H1"], z[:1]), DataError, "1 layers"),
        (lambda m, z: plan.heads_add(m, ["L0.H1"], z, positions="sometimes"), EditError, "sometimes"),
        (lambda m, z: plan.neurons_scale(m, {"L0.N999": 0}), ComponentError, "N999"),
        (lambda m, z: plan.neurons_scale(m, {"L0.H1": 0}), EditError, "not a neuron"),
        (lambda m, z: plan.neurons_scale(m, {"L0.N1": 0}, "last", permanent=True), EditError, "all positions"),
        (lambda m, z: plan.factors(m, ["L0.N1", "L0.N2"], ["L0.N2"]), EditError, r"L0\.N2 is to be suppressed and enhanced"),
        (lambda m, z: plan.vector_add(m, ["L0.H1"], z, layer=3), EditError, "0 to 2"),
        (
            lambda m, z: plan.random_like(m, [f"L{x}.N{n}" for x in range(3) for n in range(30)], Neuron, 0),
            DataError,
            "0 neurons left to draw 36",
        ),
    ],
)
def test_what_no_plan_can_do(model, what, error, says):
    with pytest.raises(error, match=says):
        what(model, means_of(model))


def test_large_sets_are_warned_of(model):
    with pytest.warns(UserWarning, match="3 of the 48 neurons of layer 1"):
        plan.neurons_scale(model, {f"L1.N{n}": 0 for n in range(3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan.neurons_scale(model, {"L1.N0": 0, "L2.N0": 0})
        plan.heads_add(model, ["L1.H0", "L2.H0"], means_of(model))


def test_random_controls_have_the_same_number_and_layers_and_are_others(model):
    chosen = Scores("neuron", "", {"L0.N": np.eye(48)[3], "L1.N": np.eye(48)[7] + np.eye(48)[9]}, How("test"))
    drawn = plan.random_like(model, chosen, Neuron, 0)
    assert [one.layer for one in drawn] == [0, 1, 1]
    assert not set(map(str, drawn)) & set(chosen.open_names())
    assert drawn == plan.random_like(model, chosen, Neuron, 0) != plan.random_like(model, chosen, Neuron, 1)
    assert plan.factors(model, chosen) == dict.fromkeys([Neuron(0, 3), Neuron(1, 7), Neuron(1, 9)], 0.0)
