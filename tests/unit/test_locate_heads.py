"""Mean head activations and causal effects of heads, against plain hooks in plain transformers."""

import pytest
import torch

from trocar.anatomy import Anatomy, Head, fingerprint, tiny_model
from trocar.core.errors import ComponentError, DataError
from trocar.locate.heads import head_effects, head_estimates, last_heads, mean_heads
from trocar.locate.scores import How
from trocar.trace.queries import Asked, batch_of

torch.set_num_threads(1)
FAMILIES = ["llama", "gpt2", "qwen3", "gemma3_text", "gpt_neox", "opt"]
ROWS = [[5, 6, 7, 8, 9], [9, 10, 11], [12, 13, 14, 15, 16, 17, 18], [3]]
TOKENS = [4, 5, 6, 7]
HOW = How("test")


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_model(request.param).double()


def plain(model, row, token, layer=None, change=None, back=1):
    """The probability of `token` after `row`, and all head activations there; `change` gets the concatenated heads of `layer`."""
    tower, seen, handles = Anatomy.of(model).tower(), [], []

    def hook(number):
        def act(module, args):
            flat = args[0].clone()
            if number == layer:
                flat[0, -back] = change(flat[0, -back].view(tower.heads(number), -1)).reshape(-1)
            seen.append(flat[0, -back].view(tower.heads(number), -1))
            return (flat, *args[1:])

        return act

    for number in range(tower.n_layers):
        handles.append(tower.module(number, "o").register_forward_pre_hook(hook(number)))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits
    for handle in handles:
        handle.remove()
    return logits[0, -1].softmax(-1)[token].item(), torch.stack(seen)


def put(head, value):
    def change(heads):
        heads = heads.clone()
        heads[head] = value
        return heads

    return change


def naive(model, values_of, rows=ROWS, tokens=TOKENS):
    tower = Anatomy.of(model).tower()
    effects = torch.zeros(len(rows), tower.n_layers, tower.heads(0), dtype=torch.float64)
    for number, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        before, _ = plain(model, row, token)
        for layer in range(tower.n_layers):
            for head in range(tower.heads(layer)):
                after, _ = plain(model, row, token, layer, put(head, values_of(number, layer, head)))
                effects[number, layer, head] = after - before
    return effects.reshape(len(rows), -1).numpy()


def test_means_and_effects_are_those_of_one_hook_and_pass_a_head(model):
    """M-10, M-16: the batch under left padding equals each prompt alone, and all heads together equal one at a time."""
    alone = torch.stack([plain(model, row, 0)[1] for row in ROWS], dim=1)
    torch.testing.assert_close(last_heads(model, ROWS), alone, atol=1e-12, rtol=1e-9)
    means = mean_heads(model, ROWS, batch_size=3)
    torch.testing.assert_close(means, alone.mean(1), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(mean_heads(model, batch_of(model, ROWS), batch_size=2), means, atol=1e-12, rtol=1e-9)

    found = head_effects(model, ROWS, TOKENS, means, batch_size=13, how=HOW)
    expected = naive(model, lambda row, layer, head: means[layer][head])
    assert abs(expected).max() > 1e-4
    assert abs(found.values - expected).max() < 1e-7  # a sweep's result is single precision
    assert found.scores.kind == "head"
    assert found.scores["L1.H2"] == pytest.approx(expected.mean(0)[6], abs=1e-7)
    assert found.before == pytest.approx([plain(model, row, token)[0] for row, token in zip(ROWS, TOKENS, strict=True)], abs=1e-7)


def test_a_heads_own_activation_changes_nothing(model):
    """M-10."""
    own = last_heads(model, ROWS)
    assert abs(head_effects(model, ROWS, TOKENS, own, how=HOW).values).max() < 1e-7


def test_other_runs_activations_and_switched_off_heads(model):
    source = last_heads(model, ROWS[::-1])
    expected = naive(model, lambda row, layer, head: source[layer][row, head])
    assert abs(head_effects(model, ROWS, TOKENS, source, how=HOW).values - expected).max() < 1e-7
    off = head_effects(model, ROWS, TOKENS, 0.0, operation="scale", how=HOW).values
    assert abs(off - naive(model, lambda row, layer, head: 0.0)).max() < 1e-7
    assert abs(off - head_effects(model, ROWS, TOKENS, 0.0, how=HOW).values).max() < 1e-7
    some = head_effects(model, ROWS, TOKENS, 0.0, heads=["L2.H1", "L0.H3"], how=HOW)
    assert [str(head) for head in some.heads] == ["L2.H1", "L0.H3"]
    assert len(some.scores) == 2
    assert abs(some.values - off[:, [9, 3]]).max() < 1e-7


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_answers_of_several_tokens_are_patched_at_the_prompts_end(name):
    model = tiny_model(name).double()
    prompts, answers = [[5, 6, 7, 8], [9, 10]], [(4, 5, 6), (7,)]
    rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    asked = Asked(batch_of(model, rows), tuple(answers), "sequence")
    found = head_effects(model, asked, None, 0.0, how=HOW)
    estimated = head_estimates(model, asked, None, 0.0, how=HOW)

    def probability(row, answer, layer=None, change=None):
        tower = Anatomy.of(model).tower()

        def act(module, args):
            flat = args[0].clone()
            at = len(row) - 1
            flat[0, at] = change(flat[0, at].view(tower.heads(layer), -1)).reshape(-1)
            return (flat, *args[1:])

        handle = None if layer is None else tower.module(layer, "o").register_forward_pre_hook(act)
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([[*row, *answer[:-1]]])).logits[0].log_softmax(-1)
        if handle:
            handle.remove()
        return sum(logs[len(row) - 1 + n, token].item() for n, token in enumerate(answer))

    from math import exp

    for number, (row, answer) in enumerate(zip(prompts, answers, strict=True)):
        before = exp(probability(row, answer))
        assert found.before[number] == pytest.approx(before, abs=1e-9)
        assert estimated.before[number] == pytest.approx(before, abs=1e-9)
        for layer, head in ((0, 1), (2, 3)):
            after = exp(probability(row, answer, layer, put(head, 0.0)))
            assert found.values[number, 4 * layer + head] == pytest.approx(after - before, abs=1e-8)
            less, more = (
                exp(probability(row, answer, layer, lambda heads, head=head, by=by: put(head, heads[head] * by)(heads)))
                for by in (0.99, 1.01)
            )
            assert estimated.values[number, 4 * layer + head] == pytest.approx((less - more) / 0.02, rel=0.02, abs=1e-3 * before)


def test_estimates_are_the_derivative(model):
    """A change of a hundredth of the way to and fro, told by plain hooks, is that part of the estimate."""
    means = mean_heads(model, ROWS)
    found = head_estimates(model, ROWS, TOKENS, means, batch_size=3, how=HOW)
    clean, step = last_heads(model, ROWS), 0.01  # norms compute in single precision
    ahead, back = (
        naive(model, lambda row, layer, head, by=by: torch.lerp(clean[layer][row, head], means[layer][head], by)) for by in (step, -step)
    )
    off = abs(found.values - (ahead - back) / (2 * step)) / abs(found.values).max()
    assert (off < 1e-3).mean() > 0.8
    assert off.max() < 0.05
    off = head_estimates(model, ROWS, TOKENS, 0.0, operation="scale", how=HOW).values
    assert abs(off - head_estimates(model, ROWS, TOKENS, 0.0, how=HOW).values).max() < 1e-12
    added = head_estimates(model, ROWS, TOKENS, means, operation="add", how=HOW).values
    assert abs(added + off - found.values).max() < 1e-12  # replacing by the mean is taking away what is there and adding the mean


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_locating_leaves_the_model_alone(grad):
    """M-17: same scores each time, the same parameters, no gradients, no hooks left; also where gradients are switched off."""
    model = tiny_model("llama")
    before = fingerprint(model)
    with grad():
        means = mean_heads(model, ROWS)
        runs = [(head_effects(model, ROWS, TOKENS, means), head_estimates(model, ROWS, TOKENS, means)) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert first.scores == second.scores
        assert first.scores.how.fingerprint == before
    assert fingerprint(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_may_have_different_numbers_of_heads():
    from trocar.patch import Patch, Remove

    model = tiny_model("gpt2").double()
    Patch.of(model, [Remove(["L1.H0"])]).apply(model)
    means = mean_heads(model, ROWS)
    assert [tuple(layer.shape) for layer in means] == [(4, 8), (3, 8), (4, 8)]
    found = head_effects(model, ROWS, TOKENS, means, how=HOW)
    assert len(found.heads) == 11
    assert abs(head_effects(model, ROWS, TOKENS, last_heads(model, ROWS), how=HOW).values).max() < 1e-7


def test_bad_inputs_are_refused():
    model = tiny_model("gpt2")
    means = mean_heads(model, ROWS)
    right = {"input_ids": torch.tensor([[3, 4, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    cases = [
        (lambda: head_effects(model, right, [3], 0.0), "left"),
        (lambda: head_estimates(model, right, [3], 0.0), "left"),
        (lambda: mean_heads(model, right), "left"),
        (lambda: head_effects(model, ROWS, TOKENS[:2], means), "4 prompts and 2 answers"),
        (lambda: head_effects(model, ROWS, None, means), "no answers"),
        (lambda: head_effects(model, ROWS, [64, 1, 2, 3], means), "Token 64"),
        (lambda: head_effects(model, ROWS, TOKENS, means[:2]), "layers"),
        (lambda: head_effects(model, ROWS, TOKENS, last_heads(model, ROWS[:2])), "4 prompts"),
        (lambda: head_effects(model, ROWS, TOKENS, means, operation="multiply"), "multiply"),
        (lambda: head_effects(model, ROWS, TOKENS, means, heads=["L0.N1"]), "not heads"),
        (lambda: mean_heads(model, []), "no prompts"),
        (lambda: mean_heads(tiny_model("bert"), ROWS), "next tokens"),
        (lambda: head_estimates(model.train(), ROWS, TOKENS, means), "training mode"),
        (lambda: mean_heads(model, ROWS), "training mode"),
    ]
    for work, words in cases:
        with pytest.raises(DataError, match=words):
            work()
    model.eval()
    for head in (Head(0, 4), "L3.H0"):
        with pytest.raises(ComponentError):
            head_effects(model, ROWS, TOKENS, means, heads=[head])
