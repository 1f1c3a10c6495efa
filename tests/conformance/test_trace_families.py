"""Recording, intervening and prefixes on a tiny random model of every family, against what the weights and the model's own outputs say."""

import pytest
import torch
from causal import CAUSAL

from trocar.anatomy import TINY, Anatomy, Block, Head, Linear, Neuron, tiny_inputs, tiny_model
from trocar.trace import KINDS, Add, Point, Replace, Scale, capture_prefix, intervene, record

torch.set_num_threads(1)


def main_output(output, tower):
    """What the model is for: logits, or for a base model its last hidden state; of two meeting towers, with this tower's rows first."""
    if "logits_per_image" in output:
        return output.logits_per_image if tower.modality == "vision" else output.logits_per_text
    return output.logits if "logits" in output else output.last_hidden_state


def cases():
    for name in TINY:
        for tower in ("text", "vision") if name in ("clip", "siglip", "gemma3") else ("",):
            yield pytest.param((name, tower), id=f"{name}-{tower}" if tower else name)


@pytest.fixture(params=cases())
def case(request):
    name, tower = request.param
    model = tiny_model(name)
    anatomy = Anatomy.of(model)
    inputs = tiny_inputs(model, rows=3, length=6)
    with torch.no_grad():
        base = main_output(model(**inputs), anatomy.tower(tower or None))
    return model, anatomy.tower(tower or None), inputs, base


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) + ("generate" in vars(m)) for m in model.modules()
    )


def test_points_agree_with_the_modules_between_them(case):
    anatomy = Anatomy.of(case[0])
    model, tower, inputs, base = case
    points = [Point(kind, layer, tower.name) for kind in KINDS for layer in range(3)]
    with record(model, points) as rec, torch.no_grad():
        assert torch.equal(main_output(model(**inputs), tower), base)
    assert hooks(model) == 0
    for layer in range(3):
        get = {kind: rec[Point(kind, layer, tower.name)] for kind in KINDS}
        rows, length, width = get["resid_pre"].shape
        assert get["resid_post"].shape == get["attn_out"].shape == get["mlp_out"].shape == (rows, length, width) == (3, length, tower.width)
        assert get["heads"].shape == (rows, length, tower.heads(layer), tower.head_size(layer))
        assert get["neurons"].shape == (rows, length, tower.neurons(layer))
        for before, after, role in (("heads", "attn_out", "o"), ("neurons", "mlp_out", "down")):
            view = anatomy.linear(Linear(layer, role, tower.name))
            made = torch.nn.functional.linear(get[before].reshape(rows, length, -1), view.get(), view.bias)
            torch.testing.assert_close(made, get[after], atol=1e-5, rtol=1e-5)
        if layer:
            assert torch.equal(get["resid_pre"], rec[Point("resid_post", layer - 1, tower.name)])


def test_zeroing_a_component_equals_zeroing_its_weights(case):
    anatomy = Anatomy.of(case[0])
    model, tower, inputs, base = case
    head, neuron = Head(1, 2, tower.name), Neuron(0, 5, tower.name)
    with intervene(model, [Scale(head, 0.0), Scale(str(neuron), 0.0)]), torch.no_grad():
        changed = main_output(model(**inputs), tower)
    size = tower.head_size(1)
    for layer, role, columns in ((1, "o", slice(2 * size, 3 * size)), (0, "down", slice(5, 6))):
        view = anatomy.linear(Linear(layer, role, tower.name))
        weight = view.get().clone()
        weight[:, columns] = 0
        view.set(weight)
    with torch.no_grad():
        expected = main_output(model(**inputs), tower)
    torch.testing.assert_close(changed, expected, atol=1e-5, rtol=1e-5)
    assert (changed - base).abs().max() > 1e-4


def test_a_block_scaled_to_nothing_passes_its_input_on(case):
    model, tower, inputs, base = case
    points = [f"{tower.name + '.' if tower.name else ''}L1.{kind}" for kind in ("resid_pre", "resid_post")]
    with intervene(model, Scale(Block(1, tower.name), 0.0)), record(model, points) as rec, torch.no_grad():
        model(**inputs)
    assert torch.equal(rec[points[0]], rec[points[1]])
    with intervene(model, Scale(Block(1, tower.name), 1.0)), torch.no_grad():
        assert torch.equal(main_output(model(**inputs), tower), base)


@pytest.mark.parametrize("kind", KINDS)
def test_replacing_some_rows_and_positions_changes_those_only(case, kind):
    model, tower, inputs, base = case
    point = Point(kind, 1, tower.name)
    with record(model, point) as rec, torch.no_grad():
        model(**inputs)
    before = rec[point]
    value = torch.randn(2, *before.shape[2:])
    with intervene(model, Replace(point, value, positions=[1, -1], rows=[2, 0])), record(model, point) as rec, torch.no_grad():
        changed = main_output(model(**inputs), tower)
    expected = before.clone()
    for row, new in ((2, value[0]), (0, value[1])):
        expected[row, 1], expected[row, -1] = new, new
    assert torch.equal(rec[point], expected)
    assert (changed - base)[[0, 2]].abs().amax() > 1e-5
    torch.testing.assert_close(changed[1], base[1], atol=1e-6, rtol=1e-6)


def test_every_prefix_equals_the_plain_run_and_sends_gradients_up_only(case):
    model, tower, inputs, base = case
    for layer in range(3):
        prefix = capture_prefix(model, inputs, layer, tower.name or None)
        with torch.no_grad():
            torch.testing.assert_close(main_output(prefix.run(), tower), base, atol=1e-6, rtol=1e-6)
            some = main_output(prefix.run(rows=torch.tensor([2, 0]), repeats=2), tower)
        torch.testing.assert_close(some, base[[2, 0, 2, 0]], atol=1e-5, rtol=1e-5)
        assert hooks(model) == 0
    model.zero_grad()
    main_output(capture_prefix(model, inputs, 1, tower.name or None).run(), tower).square().sum().backward()
    assert all(p.grad is None for p in tower.blocks[0].parameters())
    assert all(p.grad is not None for p in tower.blocks[1].parameters() if p.requires_grad and p.numel())


def test_gradients_of_activations_are_those_of_finite_differences(case):
    model, tower, inputs, _ = case
    model.requires_grad_(False).double()  # though RMS norms compute in single precision
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    point = Point("heads", 1, tower.name)
    with record(model, point, grad=True) as rec:
        main_output(model(**inputs), tower).square().sum().backward()
    gradient = rec.grad(point)
    direction = torch.randn(gradient.shape[2:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (gradient[:, 1] * direction).sum()
    ends = []
    for step in (1e-3, -1e-3):
        with intervene(model, Add(point, step * direction, positions=1)), torch.no_grad():
            ends.append(main_output(model(**inputs), tower).square().sum())
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-3, expected, atol=1e-4, rtol=1e-2)


ATTENTION = [(name, kind) for name in CAUSAL for kind in ("sdpa", "eager") if (name, kind) != ("gemma2", "sdpa")]  # softcaps have no sdpa


@pytest.mark.parametrize(("name", "attention"), ATTENTION)
def test_cached_generation_equals_uncached_generation_under_interventions(name, attention):
    model = tiny_model(name, attn_implementation=attention)
    inputs = tiny_inputs(model, rows=3, length=6)
    inputs["attention_mask"] = torch.tensor([[1] * 6, [0, 0] + [1] * 4, [0] + [1] * 5])
    anatomy = Anatomy.of(model)
    width, size = anatomy.tower().width, anatomy.tower().head_size(1)
    items = [
        Replace("L1.H1", 3 * torch.randn(size), positions="last"),
        Add("L0.resid_post", 3 * torch.randn(3, width), positions=[-2, 7], rows=[0, 1, 2]),
        Scale("L2.mlp", -1.0, positions="generated", rows=[1]),
        Scale("L0.N3", 4.0),
    ]
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "min_new_tokens": 5}
    runs = []
    for cached in (True, False):
        with intervene(model, items), record(model, "L1.heads") as rec:
            runs.append(model.generate(**inputs, **settings, use_cache=cached))
        if cached:
            assert [tensor.shape[1] for tensor in rec.steps("L1.heads")] == [6, 1, 1, 1, 1]
            assert rec.joined("L1.heads").shape[1] == 10
            assert torch.equal(rec.steps("L1.heads")[0][:, -1, 1], items[0].value.expand(3, -1))
    plain = model.generate(**inputs, **settings)
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    torch.testing.assert_close(torch.stack(runs[0].logits), torch.stack(runs[1].logits), atol=1e-4, rtol=1e-4)
    assert (torch.stack(runs[0].logits) - torch.stack(plain.logits)).abs().max() > 1e-2
    assert hooks(model) == 0
