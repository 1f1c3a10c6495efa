"""Sweeps with reuse against plain runs, on every family, with both attention kernels, padding and batches."""

import pytest
import torch
from causal import CAUSAL

from trocar.anatomy import TINY, Anatomy, Attention, Block, Head, Mlp, Neuron, tiny_inputs, tiny_model
from trocar.trace import Add, Point, Replace, Scale, capture_prefix, intervene, sweep

torch.set_num_threads(1)
KERNELS = {"gemma2": ("eager",)}  # its soft caps have no sdpa


def cases():
    for name in TINY:
        for tower in ("text", "vision") if name in ("clip", "siglip", "gemma3") else ("",):
            for attention in KERNELS.get(name, ("sdpa", "eager")):
                yield pytest.param((name, tower, attention), id="-".join(part for part in (name, tower, attention) if part))


def sets_for(tower):
    name, width, size = tower.name, tower.width, tower.head_size(1)
    torch.manual_seed(0)
    return [
        [],
        [Scale(Head(0, 1, name), 0.0)],
        [Replace(Head(2, 3, name), torch.randn(3, size), positions="last")],
        [Add(Point("resid_post", 1, name), torch.randn(2, width), positions=[-1, 2], rows=[0, 2])],
        [Scale(Mlp(2, name), 0.5, positions=[3]), Scale(Neuron(1, 7, name), -2.0, positions=-2)],
        [Replace(Point("resid_pre", 2, name), torch.randn(3, 2, width), positions=[[-1, -2], [-2, -1], [3, -1]])],
        [Scale(Attention(1, name), -1.0, rows=[1])],
        [Scale(Block(2, name), 0.0, positions="last")],
        [Scale(Point("heads", 1, name), torch.rand(tower.heads(1), 1), positions=[-3])],
    ]


def flat(output, tower):
    """All that a metric can see of a row, at attended positions."""
    if "logits_per_image" in output:
        return output.logits_per_image if tower.modality == "vision" else output.logits_per_text
    return output.logits if "logits" in output else output.last_hidden_state


def plain(model, inputs, tower, items):
    with torch.no_grad():
        if not items:
            return flat(model(**inputs), tower)
        with intervene(model, items):
            return flat(model(**inputs), tower)


@pytest.mark.parametrize("case", cases())
def test_reuse_is_exact_on_every_family(case):
    name, tower_name, attention = case
    model = tiny_model(name, attn_implementation=attention)
    tower = Anatomy.of(model).tower(tower_name or None)
    inputs = tiny_inputs(model, rows=3, length=6)
    text = "input_ids" in inputs and name != "gemma3"
    if text:
        keep = (
            [[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]]
            if tower.causal and tower_name != "text"
            else [[1] * 4 + [0, 0], [1] * 6, [1] * 6]
        )
        inputs["attention_mask"] = torch.tensor(keep)
    sets = sets_for(tower)
    mask = inputs.get("attention_mask")
    seen = {}

    def metric(output, rows):
        values = flat(output, tower)
        if mask is not None and values.ndim == 3 and tower.modality == "text":
            values = values * mask[rows][:, :, None]
        for place, row in enumerate(rows.tolist()):
            seen.setdefault(row, []).append(values[place])
        return values.flatten(1).square().sum(1)

    reports = []
    for batch_size in (1, 2, 12):
        seen.clear()
        scores = sweep(model, inputs, sets, metric, batch_size=batch_size, tell=reports.append)
        plainly = sweep(model, inputs, sets, metric, batch_size=batch_size, reuse=False)
        torch.testing.assert_close(scores, plainly, atol=1e-5, rtol=1e-5)
        for number, items in enumerate(sets):
            expected = plain(model, inputs, tower, items)
            if mask is not None and expected.ndim == 3 and tower.modality == "text":
                expected = expected * mask[:, :, None]
            torch.testing.assert_close(scores[number], expected.flatten(1).square().sum(1), atol=1e-5, rtol=2e-5)
            for row in range(3):
                assert min((value - expected[row]).abs().max() for value in seen[row]) < 1e-5
        assert len({f"{value:.4g}" for value in scores[:, 1].tolist()}) > 2  # the sets do differ; CLIP pools one position
    assert all(report.layer_reuse for report in reports)
    assert all(report.position_reuse == (name in CAUSAL) for report in reports)
    assert all(bool(report.reasons) != report.position_reuse for report in reports)
    assert all(report.share < 1 for report in reports)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_windows_shorter_than_the_sequence_are_exact_too(name, attention):
    if attention not in KERNELS.get(name, ("sdpa", "eager")):
        pytest.skip("its soft caps have no sdpa")
    model = tiny_model(name, attn_implementation=attention, sliding_window=3)
    tower = Anatomy.of(model).tower()
    inputs = tiny_inputs(model, rows=3, length=9)
    wide = tiny_model(name, attn_implementation=attention, sliding_window=32)
    with torch.no_grad():
        assert (model(**inputs).logits - wide(**inputs).logits).abs().max() > 1e-3
    reports = []
    sets = sets_for(tower)
    scores = sweep(model, inputs, sets, lambda output, rows: output.logits.flatten(1).square().sum(1), batch_size=6, tell=reports.append)
    for number, items in enumerate(sets):
        torch.testing.assert_close(scores[number], plain(model, inputs, tower, items).flatten(1).square().sum(1), atol=1e-5, rtol=2e-5)
    assert reports[0].position_reuse


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prefix_may_start_in_the_middle_and_lets_gradients_through(name):
    model = tiny_model(name)
    tower = Anatomy.of(model).tower()
    inputs = tiny_inputs(model, rows=3, length=6)
    inputs["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    value = torch.randn(tower.heads(1), tower.head_size(1), requires_grad=True)
    item = Replace("L1.heads", value, positions=4)
    with intervene(model, item):
        expected = model(**inputs).logits
    (wanted,) = torch.autograd.grad(expected[:, 4:].square().sum(), value)
    prefix = capture_prefix(model, inputs, 1, position=4)
    with intervene(model, item):
        found = prefix.run(rows=[2, 1, 0]).logits
    torch.testing.assert_close(found, expected[[2, 1, 0], 4:], atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.square().sum(), value)
    torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma3-270m"])
def test_reuse_is_exact_on_real_models(name):
    import os
    from pathlib import Path

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(os.environ.get("TROCAR_MODELS", "~/.cache/trocar/models")).expanduser() / name
    if not folder.exists():
        pytest.skip(f"{name} is not there")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    inputs = dict(tokenizer(["The capital of Austria, where Mozart was born, is", "Two and two are"], return_tensors="pt", padding=True))
    inputs.pop("token_type_ids", None)
    last = Anatomy.of(model).tower().n_layers - 1
    items = [Scale("L5.H1", 0.0, "last"), Scale(f"L{last}.mlp", 0.0, "last"), Scale("L3.H2", 2.0, positions=[-3]), Scale("L1.attn", 0.0)]

    def metric(output, rows):
        return output.logits[:, -1].log_softmax(-1)[:, 260]

    reports = []
    scores = sweep(model, inputs, [[], *items], metric, read="last", tell=reports.append)
    plainly = sweep(model, inputs, [[], *items], metric, reuse=False)
    torch.testing.assert_close(scores, plainly, atol=1e-5, rtol=1e-5)
    assert reports[0].position_reuse
    assert (scores[1:] != scores[0]).all()
