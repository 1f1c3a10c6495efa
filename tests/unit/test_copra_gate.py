"""The gate in a loop of one's own: probabilities, draws, what off means for gradients and optimiser, and what is refused."""

from __future__ import annotations

import gc
import itertools
import math
import warnings
from typing import Any

import numpy as np
import peft
import pytest
import torch
from copra_models import adapted, factors, rows
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trocar.adapt.copra import CopraConfig, copra_gate, keep_probability, schedule
from trocar.adapt.copra.schedule import draw, expected_on, probabilities
from trocar.core.errors import ConfigError, UnsupportedModelError


def batch(number: int) -> dict[str, torch.Tensor]:
    chosen = rows()[4 * (number % 4) : 4 * (number % 4) + 4]
    return {key: torch.tensor([row[key] for row in chosen]) for key in chosen[0]}


def loop(model: Any, steps: int, gate: Any = None, start: int = 0, optimizer: Any = None, micro: int = 1) -> Any:
    """A plain loop; returns its optimizer. Dropout, if any, draws from the global stream."""
    optimizer = optimizer or torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    model.train()
    for number in range(start, steps):
        if gate is None:
            model(**batch(number)).loss.backward()
        else:
            with gate.step():
                for part in range(micro):
                    (model(**batch(number * micro + part)).loss / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_the_keep_probability_has_the_papers_values() -> None:
    paper = CopraConfig(p0=0)
    found = [keep_probability(step, 8, paper) for step in range(8)]
    assert found == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1])
    assert keep_probability(0, 100) == 0.1
    assert keep_probability(3, 8, CopraConfig(schedule="constant", p0=0.5)) == 0.5
    assert keep_probability(100, 8, paper) == 1.0  # a run longer than it was said to be
    halves = [keep_probability(3, 8, CopraConfig(p0=0, schedule=name)) for name in ("exp", "linear", "sine")]
    assert halves == sorted(halves)
    assert halves[0] < halves[1] < halves[2]
    assert keep_probability(3, 8, paper, shape=lambda x: x * x) == 0.25


@given(st.integers(1, 400), st.floats(0, 1), st.floats(0.01, 1), st.sampled_from(["linear", "exp", "sine"]))
def test_the_keep_probability_rises_from_p0_to_one(total: int, p0: float, rho: float, schedule: Any) -> None:
    config = CopraConfig(p0=p0, rho=rho, schedule=schedule)
    values = [keep_probability(step, total, config) for step in range(total + 2)]
    assert values[0] == p0 or math.ceil(rho * total) == 0
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(values))
    assert all(value == 1 for value in values[math.ceil(rho * total) :])


def test_draws_are_independent_but_for_the_rule_that_one_is_on() -> None:
    groups, p, n = 4, 0.3, 6000
    masks = np.array([draw(step, np.full(groups, p), seed=11) for step in range(n)])
    assert masks.any(1).all()
    share = p / (1 - (1 - p) ** groups)
    assert expected_on(np.full(groups, p)) == pytest.approx([share] * groups)
    for group in range(groups):
        on = masks[:, group].sum()
        assert stats.chisquare([on, n - on], [share * n, (1 - share) * n]).pvalue > 1e-4
    patterns = masks @ (2 ** np.arange(groups))
    law = np.array([p ** bin(code).count("1") * (1 - p) ** (groups - bin(code).count("1")) for code in range(1, 2**groups)])
    seen = np.bincount(patterns, minlength=2**groups)[1:]
    assert stats.chisquare(seen, law / law.sum() * n).pvalue > 1e-4  # the joint law: pairs and all
    alone = np.array([draw(step, np.zeros(groups), seed=1) for step in range(400)])
    assert (alone.sum(1) == 1).all()
    assert stats.chisquare(alone.sum(0)).pvalue > 1e-4
    assert np.array_equal(draw(7, np.full(4, 0.5), 3), draw(7, np.full(4, 0.5), 3))


def test_the_same_law_where_almost_every_draw_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw(0, np.full(4, 1e-9), seed=5).sum() == 1  # and does not take for ever
    monkeypatch.setattr(schedule, "REDRAWS", 10)
    keep, n = np.array([1e-9, 3e-9, 0.0, 4e-9]), 600
    masks = np.array([draw(step, keep, seed=5) for step in range(n)])
    assert (masks.sum(1) == 1).all()
    assert not masks[:, 2].any()
    assert stats.chisquare(masks.sum(0)[[0, 1, 3]], np.array([1, 3, 4]) / 8 * n).pvalue > 1e-4
    assert expected_on(keep) == pytest.approx([1 / 8, 3 / 8, 0, 1 / 2])
    assert expected_on(np.full(4, 1e-30)) == pytest.approx([0.25] * 4)
    assert expected_on(np.array([1.0, 0.25])).tolist() == [1, 0.25]


def test_behind_the_first_group_that_is_on_the_direct_draw_is_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "REDRAWS", 0)
    keep, n = np.array([0.2, 0.6, 0.4]), 4000
    masks = np.array([draw(step, keep, seed=5) for step in range(n)])
    codes = list(itertools.product((False, True), repeat=3))[1:]
    law = np.array([np.where(code, keep, 1 - keep).prod() for code in codes])
    seen = [int((masks == code).all(1).sum()) for code in codes]
    assert stats.chisquare(seen, law / law.sum() * n).pvalue > 1e-4


def test_mean_activation_is_what_the_redraw_rule_gives() -> None:
    for groups, p0, wanted in ((6, 0.0, 0.650), (6, 0.1, 0.679), (12, 0.1, 0.666), (24, 0.0, 0.627)):
        config = CopraConfig(p0=p0)
        mean = np.mean([expected_on(probabilities(step, 4000, groups, config)).mean() for step in range(4000)])
        assert mean == pytest.approx(wanted, abs=0.001)


@pytest.mark.parametrize("gate_settings", [{"p0": 1.0}, {"p0": 1.0, "schedule": "constant"}, {"p0": 1.0, "tilt": "high", "groups": "role"}])
@pytest.mark.parametrize("dropout", [False, True])
def test_with_everything_on_it_is_plain_training_bit_for_bit(gate_settings: dict[str, Any], dropout: bool) -> None:
    runs = []
    for gated in (False, True):
        model = adapted(lora_dropout=0.2 if dropout else 0.0)
        torch.manual_seed(9)
        if gated:
            with copra_gate(model, 6, **gate_settings) as gate:
                optimizer = loop(model, 6, gate)
        else:
            optimizer = loop(model, 6)
        runs.append((factors(model), optimizer.state_dict()["state"]))
    (plain, moments), (same, same_moments) = runs
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert all(torch.equal(moments[key][part], same_moments[key][part]) for key in moments for part in moments[key])


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_what_is_off_gets_no_gradient_and_no_update(kind: dict[str, bool]) -> None:
    model = adapted(**kind)
    with copra_gate(model, 4, p0=1.0) as gate:
        optimizer = loop(model, 2, gate)  # moments that could move
    before = factors(model)
    state = {
        name: {key: value.clone() for key, value in optimizer.state[p].items()} for name, p in model.named_parameters() if "lora_" in name
    }
    with copra_gate(model, 4, p0=0.5, schedule="constant", seed=2) as gate:
        mask = gate.drawn(0)
        assert 0 < mask.sum() < len(mask)
        with gate.step():
            model(**batch(0)).loss.backward()
            missing = {name for name, parameter in model.named_parameters() if "lora_" in name and parameter.grad is None}
        optimizer.step()
    off = [group for group, on in zip(gate.names, mask, strict=True) if not on]
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        is_off = f"L{name.split('.layers.')[1].split('.')[0]}" in off
        assert (name in missing) == is_off
        assert torch.equal(parameter, before[name]) == is_off
        assert all(torch.equal(optimizer.state[parameter][key], state[name][key]) for key in state[name]) == is_off
    assert gate.counts.tolist() == mask.tolist()


def test_zeros_that_a_framework_put_in_are_taken_out() -> None:
    model = adapted()
    with copra_gate(model, 4, p0=0.5, schedule="constant", seed=2) as gate, gate.step() as mask:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gate.clear_gradients()
        for members, on in zip(gate.groups.values(), mask, strict=True):
            grads = [module.lora_A["default"].weight.grad for module in members.values()]
            assert all((grad is not None) == on for grad in grads)


def test_all_micro_batches_of_a_step_have_one_mask_and_evaluation_sees_everything() -> None:
    model = adapted()
    optimizer = loop(model, 2)
    del optimizer
    with torch.no_grad():
        model.eval()
        whole = model(**batch(0)).logits
    seen = []
    with copra_gate(model, 20, p0=0.2, schedule="constant", seed=1) as gate:
        for _ in range(6):
            with gate.step() as mask:
                for _ in range(3):
                    model.train()
                    model(**batch(0)).loss.backward()
                    with torch.no_grad():
                        model.eval()
                        assert torch.equal(model(**batch(0)).logits, whole)
                seen.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
                layers = {int(name.split(".layers.")[1].split(".")[0]) for name in seen[-1]}
                assert layers == set(np.flatnonzero(mask).tolist())
            model.zero_grad()
    assert len({frozenset(names) for names in seen}) > 1
    with copra_gate(model, 20, p0=0.2, schedule="constant", seed=1, partial_evaluation=True) as gate, gate.step() as mask, torch.no_grad():
        assert not mask.all()
        assert not torch.equal(model(**batch(0)).logits, whole)


def test_gradient_checkpointing_runs_the_same_mask_again() -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with copra_gate(model, 6, seed=4) as gate:
            loop(model, 6, gate)
        found.append(factors(model))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-7)


def test_no_graph_is_built_below_the_lowest_adapter_that_is_on() -> None:
    model = adapted()
    blocks, needs = model.get_base_model().model.layers, []
    handles = [block.register_forward_hook(lambda _, __, output: needs.append(output.requires_grad)) for block in blocks]
    with copra_gate(model, 9, p0=0.5, schedule="constant", seed=2) as gate:
        for _ in range(8):
            needs.clear()
            with gate.step() as mask:
                model.train()(**batch(0)).loss.backward()
            lowest = int(np.flatnonzero(mask)[0])
            assert needs == [layer >= lowest for layer in range(len(blocks))]
    for handle in handles:
        handle.remove()


def test_a_run_that_is_resumed_is_the_run_that_was_not() -> None:
    whole = adapted()
    with copra_gate(whole, 8, seed=7) as gate:
        loop(whole, 8, gate, micro=2)
        history = gate.history()
        counts = gate.counts
    parts = adapted()
    with copra_gate(parts, 8, seed=7) as gate:
        optimizer = loop(parts, 3, gate, micro=2)
        state = gate.state_dict()
    with copra_gate(parts, 8, seed=7) as gate:
        gate.load_state_dict(state)
        loop(parts, 8, gate, start=3, optimizer=optimizer, micro=2)
        assert np.array_equal(gate.history(), history)
        assert np.array_equal(gate.counts, counts)
    assert all(torch.equal(value, factors(parts)[name]) for name, value in factors(whole).items())
    assert history.sum(0).tolist() == counts.tolist()
    assert gate.expected(8).sum() == pytest.approx(sum(expected_on(probabilities(t, 8, 3, gate.config)).sum() for t in range(8)))
    with copra_gate(parts, 9, seed=7) as other, pytest.raises(ConfigError, match="total_steps 8, this one 9"):
        other.load_state_dict(state)


def test_baselines_under_the_same_control() -> None:
    model = adapted()
    with copra_gate(model, 40, strategy="stochastic-depth", depth_rate=0.6) as gate:
        assert probabilities(0, 40, 3, gate.config).tolist() == pytest.approx([1, 0.7, 0.4])
        loop(model, 40, gate)
        assert gate.counts[0] == 40
        assert gate.counts[2] < 30
        with torch.no_grad(), gate.step() as mask:  # what is on weighs 1 / survival, so that the whole network is the mean one
            assert gate._switches.levels == pytest.approx([flag / keep for flag, keep in zip(mask, (1, 0.7, 0.4), strict=True)])
    model = adapted(lora_dropout=0.1)
    layer = next(module for name, module in model.named_modules() if name.endswith("0.self_attn.q_proj"))
    with copra_gate(model, 8, strategy="progressive-dropout") as gate:
        with gate.step() as mask:
            assert mask.all()
            assert layer.lora_dropout["default"].p == pytest.approx(0.9)
        with gate.step(7):
            assert layer.lora_dropout["default"].p == 0
        assert gate.expected().tolist() == [8, 8, 8]  # elements are dropped, never a group
    assert layer.lora_dropout["default"].p == 0.1
    tilted = [probabilities(10, 40, 3, CopraConfig(tilt=tilt)) for tilt in ("high", "low")]  # type: ignore[arg-type]
    assert tilted[0][0] > tilted[0][1] > tilted[0][2]
    assert tilted[1].tolist() == pytest.approx(tilted[0][::-1].tolist())
    assert probabilities(30, 40, 3, CopraConfig(tilt="high")).tolist() == [1, 1, 1]


def test_nothing_stays_on_the_model() -> None:
    model = adapted()
    modules = list(model.modules())
    with pytest.raises(ZeroDivisionError), copra_gate(model, 4) as gate, gate.step():
        raise ZeroDivisionError
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in modules)
    forgotten = copra_gate(model, 4)
    forgotten.attach()
    assert any("forward" in module.__dict__ for module in modules)
    del forgotten, gate
    gc.collect()
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in modules)


def test_a_step_that_fails_leaves_nothing_to_the_next() -> None:
    model = adapted()
    with copra_gate(model, 8, p0=0.5, seed=2) as gate:
        first = gate.drawn(0)
        assert not first.all()
        with pytest.raises(ZeroDivisionError), gate.step():
            raise ZeroDivisionError
        assert gate._switches.levels is None
        assert (gate.t, gate.counts.sum()) == (0, 0)
        with gate.step() as again:
            assert (again == first).all()
        gate.begin(1)  # a step that never ends, as a Trainer's that was interrupted
        with gate.step(7) as mask:
            assert mask.all()
            assert gate._switches.levels is None


def test_what_the_gate_refuses_and_warns_of() -> None:
    model = adapted()
    for total in (0, None, 2.5):
        with pytest.raises(ConfigError, match="steps_per_epoch"):
            copra_gate(model, total)  # type: ignore[arg-type]
    for wrong in ({"p0": 1.5}, {"rho": 0.0}, {"schedule": "cosine"}, {"p_0": 0.1}):
        with pytest.raises(ConfigError, match=r"copra\."):
            copra_gate(model, 4, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not both"):
        copra_gate(model, 4, CopraConfig(), p0=0.2)
    with pytest.raises(ConfigError, match="falls somewhere"):
        copra_gate(model, 4, shape=lambda x: 1 - x)
    with pytest.raises(ConfigError, match="not on the model"):
        copra_gate(model, 4).begin(0)
    with pytest.warns(UserWarning, match="plain LoRA"):
        copra_gate(model, 4, groups={"all": ("*",)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copra_gate(model, 4, groups="role")
    with pytest.warns(UserWarning, match="no switch turns off"):
        copra_gate(adapted(bias="lora_only"), 4)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="is_trainable"):
        copra_gate(model, 4)
    with pytest.raises(UnsupportedModelError, match="Wrap it first"):
        copra_gate(model.unload(), 4)


def test_a_base_whose_weights_are_no_float_matrix_is_gated_too() -> None:
    """A quantised base in small: weights as int8 and scales, and a forward pass of its own."""

    class Int8Linear(torch.nn.Linear):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__(linear.in_features, linear.out_features, bias=False)
            scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
            self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
            self.register_buffer("scale", scale)
            self.weight.requires_grad_(False).zero_()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.codes * self.scale)  # type: ignore[operator]

    from trocar.anatomy import tiny_model

    base = tiny_model("llama").eval()
    for block in base.model.layers:
        block.self_attn.q_proj = Int8Linear(block.self_attn.q_proj)
    quantised = base(**batch(0)).logits
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).train()
    with copra_gate(model, 4, p0=0.3, schedule="constant", seed=3) as gate:
        gate._switches.set([False] * len(gate.names))
        assert torch.equal(model(**batch(0)).logits, quantised)
        optimizer = loop(model, 4, gate)
    assert optimizer.state


def test_the_tensor_mode_is_compiled_once_for_all_masks() -> None:
    """With flags every mask would be a graph of its own; with tensors one graph serves them all. Without the code generator, for speed."""
    counts = {}
    for tensor in (True, False):
        torch._dynamo.reset()
        graphs: list[int] = []

        def backend(graph: Any, example: Any, graphs: list[int] = graphs) -> Any:
            graphs.append(1)
            return graph.forward

        model = adapted()
        layer = model.get_base_model().model.layers[1].self_attn.q_proj
        x = torch.randn(2, 5, layer.in_features)
        found = []
        with copra_gate(model, 12, p0=0.5, schedule="constant", seed=2, groups="module", tensor=tensor) as gate:
            compiled = torch.compile(lambda given, layer=layer: layer(given), backend=backend)
            for step in range(6):
                with gate.step() as mask:
                    found.append(compiled(x).detach())
                    del mask
                del step
        counts[tensor] = len(graphs)
        assert len({tuple(value.flatten()[:3].tolist()) for value in found}) == 1  # B is 0: on and off agree, but not their graphs
    torch._dynamo.reset()
    assert counts[True] == 1
    assert counts[False] > 1
