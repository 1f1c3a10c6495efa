"""Integrated gradients of neurons: completeness, agreement with full prompts and with plain hooks, shared prefixes, frequencies."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.anatomy import Anatomy, fingerprint, tiny_model
from trocar.core.errors import DataError, ScoresError
from trocar.locate import neurons
from trocar.locate.neurons import NeuronLists, families, frequency, grid_points, neuron_attributions
from trocar.locate.refine import top_mask
from trocar.locate.scores import How
from trocar.trace import Point, Scale, intervene

torch.set_num_threads(1)
FAMILIES = ["llama", "gpt2", "qwen3", "gemma3_text", "gpt_neox", "opt", "phi3"]
ROWS = [[5, 6, 7, 8, 9], [9, 10, 11], [5, 6, 7], [12, 13, 14, 15, 16, 17, 18], [5, 6, 7, 8]]
TARGETS = [4, 5, 6, 7, 8]
HOW = How("test", fingerprint="model")


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_model(request.param).double()


def naive(model, row, target, points, layers=None):
    """Full prompts, plain hooks, one point at a time: (layers of (neurons,)), and the probability at each point."""
    tower = Anatomy.of(model).tower()
    layers = range(tower.n_layers) if layers is None else layers
    clean, ids = {}, torch.tensor([row])

    def keep(layer):
        return lambda module, args: clean.__setitem__(layer, args[0].detach().reshape(-1, args[0].shape[-1])[-1].clone())

    def insert(value):
        def act(module, args):
            flat = args[0].clone()
            flat.view(-1, flat.shape[-1])[-1] = value
            return (flat, *args[1:])

        return act

    downs = {layer: tower.module(layer, "down") for layer in layers}
    handles = [down.register_forward_pre_hook(keep(layer)) for layer, down in downs.items()]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    total, seen = {layer: torch.zeros_like(value) for layer, value in clean.items()}, []
    for alpha, weight in points:
        values = {layer: (alpha * value).requires_grad_() for layer, value in clean.items()}
        handles = [down.register_forward_pre_hook(insert(values[layer])) for layer, down in downs.items()]
        answer = model(input_ids=ids).logits[0, -1].softmax(-1)[target]
        for handle in handles:
            handle.remove()
        slopes = torch.autograd.grad(answer, list(values.values()))
        seen.append(answer.item())
        for layer, slope in zip(values, slopes, strict=True):
            total[layer] += weight * slope
    return [(clean[layer] * total[layer]).detach().numpy() for layer in layers], seen


def test_cached_prefixes_give_what_full_prompts_give(model):
    """M-4, M-5, M-16: against plain hooks on each prompt alone; chunking, padding and sharing change nothing."""
    found = neuron_attributions(model, ROWS, TARGETS, steps=6, keep=20, how=HOW)
    gemma = "gemma" in model.config.model_type  # its norms compute in single precision, and its slopes near 0 are steep
    grid, close = ("log", 1e-6) if gemma else ("midpoint", 1e-8)
    expected = np.zeros(found.scores.flat.size)
    for number, (row, target) in enumerate(zip(ROWS, TARGETS, strict=True)):
        parts, _ = naive(model, row, target, grid_points(6, grid))
        one = np.concatenate(parts)
        expected += one
        assert found.sums[number] == pytest.approx(one.sum(), abs=close)
        best = np.argsort(-one, kind="stable")[:20]
        assert found.lists.values[number] == pytest.approx(one[best], rel=1e-4, abs=close)
        assert len(set(best) & set(found.lists.places[number].tolist())) >= 19  # equal up to rounding at the end of the list
        _, (none, full) = naive(model, row, target, [(0.0, 0), (1.0, 0)])
        with torch.no_grad():
            clean = model(input_ids=torch.tensor([row])).logits[0, -1].softmax(-1)[target].item()
        assert found.full[number] == pytest.approx(clean, abs=close)
        assert full == pytest.approx(clean, abs=close)
        assert found.none[number] == pytest.approx(none, abs=close)
    assert abs(expected).max() > 1e-4
    assert found.lists.places.dtype == np.int32
    assert found.scores.flat == pytest.approx(expected, abs=close)
    for options in ({"reuse": False, "batch_size": 7}, {"batch_size": 3}, {"batch_size": 500}):
        other = neuron_attributions(model, ROWS, TARGETS, steps=6, keep=20, how=HOW, **options)
        assert other.scores.flat == pytest.approx(found.scores.flat, abs=close)
    with torch.no_grad(), intervene(model, [Scale(Point("neurons", layer), 0.0, "last") for layer in range(3)]):
        off = model(input_ids=torch.tensor([ROWS[3]])).logits[0, -1].softmax(-1)[TARGETS[3]].item()
    assert found.none[3] == pytest.approx(off, abs=close)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_completeness(name):
    """M-1: the sum is P(1) - P(0); the error falls like 1/m at end points and 1/m^2 at midpoints."""
    model = tiny_model(name).double()
    rows, targets = ROWS[:2], TARGETS[:2]
    fine = neuron_attributions(model, rows, targets, steps=200, batch_size=256, how=HOW)
    assert (fine.incompleteness < 1e-3 * abs(fine.full - fine.none)).all()
    if name == "opt":
        return  # the ReLU's kinks disturb the rates
    error = {
        (grid, steps): neuron_attributions(model, rows, targets, steps=steps, grid=grid, how=HOW).incompleteness.sum()
        for grid in ("midpoint", "endpoint")
        for steps in (5, 10, 20)
    }
    for coarse, finer in ((5, 10), (10, 20)):
        assert 3 < error["midpoint", coarse] / error["midpoint", finer] < 5.5
        assert 1.5 < error["endpoint", coarse] / error["endpoint", finer] < 3
    assert error["midpoint", 20] < 0.1 * error["endpoint", 20]


def test_a_norm_after_the_mlp_needs_points_near_zero():
    """Gemma's norm undoes any scaling but the smallest, so that equal steps see nothing of P(1) - P(0)."""
    model = tiny_model("gemma3_text").double()
    found = {"auto": neuron_attributions(model, ROWS, TARGETS, how=HOW)}
    with pytest.warns(UserWarning, match="use 'log'"):
        found["midpoint"] = neuron_attributions(model, ROWS, TARGETS, grid="midpoint", how=HOW)
    change = abs(found["auto"].full - found["auto"].none).sum()
    assert found["auto"].incompleteness.sum() < 0.05 * change < 0.5 * change < found["midpoint"].incompleteness.sum()
    assert sum(weight for _, weight in grid_points(20, "log")) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_cannot_matter_has_no_attribution(name):
    """M-2: a neuron at rest, and a neuron that nothing reads."""
    model = tiny_model(name).double()
    anatomy = Anatomy.of(model)
    with torch.no_grad():
        silent = anatomy.linear("L1.mlp.down")
        weight = silent.get().clone()
        weight[:, 3] = 0
        silent.set(weight)
        entry = anatomy.linear("L0.mlp.up")
        weight = entry.get().clone()
        weight[7] = 0
        entry.set(weight)
        if entry.bias is not None:
            bias = entry.get_bias().clone()
            bias[7] = 0  # gelu(0) = 0
            entry.set_bias(bias)
    found = neuron_attributions(model, ROWS, TARGETS, how=HOW).scores
    assert found["L1.N3"] == 0
    assert found["L0.N7"] == 0
    assert (found.flat == 0).sum() == 2


def test_a_linear_read_out_needs_one_step(monkeypatch):
    """M-3, with a read-out that is linear in the inserted activations."""
    weights = [torch.randn(48, generator=torch.Generator().manual_seed(layer), dtype=torch.float64) for layer in range(3)]

    def linear(prefix, names, inserted, rows, targets):
        return sum(value @ weights[name.layer] for name, value in zip(names, inserted, strict=True))

    monkeypatch.setattr(neurons, "_answers", linear)
    model = tiny_model("llama").double()
    one, many = (neuron_attributions(model, ROWS, TARGETS, steps=steps, how=HOW) for steps in (1, 17))
    assert one.scores.flat == pytest.approx(many.scores.flat, rel=1e-10, abs=1e-12)
    assert one.incompleteness.max() < 1e-10 < abs(one.full).max()


@pytest.mark.parametrize("name", ["qwen3", "gpt_neox"])
def test_other_forms(name):
    """One layer at a time, and gradient times activation at the clean run, against plain hooks."""
    model = tiny_model(name).double()
    found = neuron_attributions(model, ROWS[:2], TARGETS[:2], steps=4, per_layer=True, batch_size=5, how=HOW)
    single = neuron_attributions(model, ROWS[:2], TARGETS[:2], grid="first-order", how=HOW)
    expected, estimate = np.zeros(3 * 48), np.zeros(3 * 48)
    for row, target in zip(ROWS[:2], TARGETS[:2], strict=True):
        expected += np.concatenate([naive(model, row, target, grid_points(4, "midpoint"), [layer])[0][0] for layer in range(3)])
        estimate += np.concatenate(naive(model, row, target, [(1.0, 1.0)])[0])
    assert found.scores.flat == pytest.approx(expected, abs=1e-8)
    assert np.isnan(found.full).all()
    assert single.scores.flat == pytest.approx(estimate, abs=1e-8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_locating_leaves_the_model_alone(mode):
    """M-17; and gradients are had where the caller has switched them off."""
    model = tiny_model("gpt2")
    before = fingerprint(model)
    with mode():
        first, second = (neuron_attributions(model, ROWS, TARGETS, steps=3, keep=5) for _ in range(2))
    assert first.scores == second.scores
    assert (first.lists.places == second.lists.places).all()
    assert fingerprint(model) == before == first.scores.how.fingerprint
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    lowered = neuron_attributions(model.bfloat16(), ROWS, TARGETS, steps=3, how=HOW)
    assert np.corrcoef(lowered.scores.flat, first.scores.flat)[0, 1] > 0.95


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=12))
def test_families_share_a_prefix_and_lose_no_row(rows):
    found = families(rows)
    assert sorted(row for family in found for row, _ in family.members) == list(range(len(rows)))
    for family in found:
        longest = rows[family.longest]
        assert all(rows[row] == longest[: len(longest) - back] for row, back in family.members)
    heads = [rows[family.longest] for family in found]
    assert not any(a == b[: len(a)] for n, a in enumerate(heads) for m, b in enumerate(heads) if n != m)  # none could join another


def lists_of(places, values=None):
    array = np.array(places, np.int32)
    numbers = np.ones(array.shape, np.float32) if values is None else np.array(values, np.float32)
    return NeuronLists(array, numbers, (4, 4), "", HOW)


def test_frequencies():
    loop, normal = lists_of([[0, 5], [5, 1], [5, 0], [6, 5]]), lists_of([[0, 1], [1, 0]])
    share = frequency(loop)
    assert [share[name] for name in ("L0.N0", "L0.N1", "L1.N1", "L1.N2", "L1.N3")] == [0.5, 0.25, 1, 0.25, 0]
    contrast = frequency(loop, normal, contrast="task")
    assert [contrast[name] for name in ("L0.N0", "L0.N1", "L1.N1")] == [-0.5, -0.75, 1]
    assert top_mask(share, 8, positive=True).open_names() == ["L0.N0", "L0.N1", "L1.N1", "L1.N2"]
    weighted = frequency(lists_of([[0, 5], [5, 1]], [[4, 2], [1, 0.5]]), weight="attr")
    assert [weighted[name] for name in ("L0.N0", "L0.N1", "L1.N1")] == [2, 0.25, 1.5]
    assert frequency(loop[1:3])["L0.N1"] == 0.5
    assert frequency(loop[[True, False, False, False]])["L0.N1"] == 0
    other = NeuronLists(loop.places, loop.values, (4, 4), "", How("test", fingerprint="another"))
    for arguments in (
        {"against": normal}, {"contrast": "first"}, {"contrast": "task", "against": loop[:0]}, {"weight": "size"},
        {"contrast": "task", "against": other},
    ):  # fmt: skip
        with pytest.raises(ScoresError):
            frequency(loop, **arguments)
    with pytest.raises(ScoresError, match="no lists"):
        frequency(loop[:0])


def test_bad_inputs_are_refused():
    model = tiny_model("gpt2")
    cases = [
        (lambda: neuron_attributions(model, ROWS, TARGETS[:2]), "5 rows and 2 targets"),
        (lambda: neuron_attributions(model, [], []), "at least one"),
        (lambda: neuron_attributions(model, [[3], []], [1, 2]), "empty"),
        (lambda: neuron_attributions(model, ROWS, [64, 1, 2, 3, 4]), "Token 64"),
        (lambda: neuron_attributions(model, ROWS, TARGETS, grid="simpson"), "simpson"),
        (lambda: neuron_attributions(model, ROWS, TARGETS, grid="endpoint", steps=1), "too few"),
        (lambda: neuron_attributions(model, ROWS, TARGETS, steps=0), "too few"),
        (lambda: neuron_attributions(model, ROWS, TARGETS, keep=0), "keep=0"),
        (lambda: neuron_attributions(tiny_model("bert"), ROWS, TARGETS), "next tokens"),
        (lambda: neuron_attributions(tiny_model("gpt2").train(), ROWS, TARGETS), "training mode"),
    ]
    for work, words in cases:
        with pytest.raises(DataError, match=words):
            work()
    with pytest.warns(UserWarning, match="only 144 neurons"):
        found = neuron_attributions(model, ROWS[:1], TARGETS[:1], steps=1, keep=1000, how=HOW)
    assert found.lists.places.shape == (1, 144)
    assert (np.diff(found.lists.values[0]) <= 0).all()
    with torch.inference_mode():
        made = tiny_model("gpt2")
    with pytest.raises(DataError, match="inference_mode"):
        neuron_attributions(made, ROWS, TARGETS)
