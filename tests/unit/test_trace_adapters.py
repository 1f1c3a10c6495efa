"""Adapters that are switched: off is the base bit for bit, rows of a batch are what each would be alone, and nothing stays behind."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

from trocar.anatomy import TINY, Anatomy, module_groups, tiny_inputs, tiny_model
from trocar.core.errors import ConfigError, InterventionError, UnsupportedModelError
from trocar.trace.adapters import AdapterSwitches, adapter_groups, adapter_layers, initial_factors


def adapted(family: str = "llama", targets: Any = "all-linear", task: str = "base", **settings: Any) -> Any:
    """A tiny model with LoRA that does something, in training mode without dropout."""
    model = tiny_model(family, task=task)  # type: ignore[arg-type]
    outer = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in outer.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return outer


def first(output: Any) -> torch.Tensor:
    return next(value for value in output.values() if torch.is_tensor(value) and value.is_floating_point() and value.ndim)


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_off_is_the_pretrained_model_and_gives_no_gradients(variant: str) -> None:
    inputs = tiny_inputs(tiny_model("llama"))
    plain = first(tiny_model("llama")(**inputs))
    torch.manual_seed(0)
    model = tiny_model("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **VARIANTS[variant]))
    initial = initial_factors(model)
    assert bool(initial) == (variant in ("pissa", "olora"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    model.train()
    groups = adapter_groups(model)
    on = first(model.eval()(**inputs))
    model.train()
    with AdapterSwitches(groups, initial=initial) as switches:
        switches.set([False] * len(groups))
        output = first(model(**inputs))
        if variant in ("pissa", "olora"):  # the residual and what was taken out of it, added again: equal up to rounding
            torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(output, plain)
        switches.set([True, *[False] * (len(groups) - 1)])
        first(model(**inputs)).square().mean().backward()
        got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert got
        assert all(".layers.0." in name for name in got)
        switches.set(None)
        assert torch.equal(first(model.eval()(**inputs)), on)
    assert torch.equal(first(model(**inputs)), on)
    assert not any("forward" in module.__dict__ for members in groups.values() for module in members.values())
    assert not any(module.lora_B["default"]._forward_hooks for members in groups.values() for module in members.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "opt", "gpt_neox", "bert"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_each_row_of_a_batch_has_its_own_coalition(family: str, variant: str) -> None:
    targets = ["c_attn", "c_proj", "c_fc"] if family == "gpt2" else "all-linear"
    model = adapted(family, targets, "class" if family in ("vit", "bert") else "lm", **VARIANTS[variant]).double().eval()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in tiny_inputs(model, rows=4).items()}
    groups = adapter_groups(model, "module")
    masks = torch.rand(4, len(groups), generator=torch.Generator().manual_seed(2)) < 0.5
    masks[0], masks[1] = True, False
    with torch.no_grad(), AdapterSwitches(groups) as switches:
        switches.set_rows(masks)
        together = first(model(**inputs))
        switches.set_rows(masks.double())
        assert torch.equal(first(model(**inputs)), together)
        for row, mask in enumerate(masks):
            switches.set(mask.tolist())
            torch.testing.assert_close(together[row], first(model(**inputs))[row], rtol=1e-9, atol=1e-11)
        switches.set_rows(masks)
        with pytest.raises(InterventionError, match="4 rows of factors"):
            model(**{name: value[:3] for name, value in inputs.items()})


@pytest.mark.parametrize("family", sorted(TINY))
def test_groups_are_named_as_the_components_are_and_need_no_anatomy_for_blocks(family: str) -> None:
    model = tiny_model(family)
    anatomy = Anatomy.of(model)
    linears = {
        tower.path(layer, role): (tower.name, layer, role)
        for tower in anatomy.towers.values()
        for layer in range(tower.n_layers)
        for role in tower.roles(layer)
        if isinstance(tower.module(layer, role), torch.nn.Linear) or type(tower.module(layer, role)).__name__ == "Conv1D"
    }
    found = module_groups(linears, "block", anatomy)
    assert list(found) == [str(block) for block in anatomy.components("block")]
    assert sorted(name for members in found.values() for name in members) == sorted(linears)
    for group, members in found.items():
        assert {f"{tower}.L{layer}" if tower else f"L{layer}" for tower, layer, _ in map(linears.__getitem__, members)} == {group}
    alone = module_groups(linears, "module", anatomy)
    assert all(len(members) == 1 for members in alone.values())
    assert len(alone) == len(linears)
    guessed = module_groups(linears)
    assert list(guessed.values()) == list(found.values()) or sorted(map(sorted, guessed.values())) == sorted(map(sorted, found.values()))


def test_groups_by_role_tower_and_patterns() -> None:
    names = ["m.layers.0.self_attn.q_proj", "m.layers.0.self_attn.v_proj", "m.layers.1.self_attn.q_proj", "lm_head"]
    assert module_groups(names) == {"L0": names[:2], "L1": [names[2]], "lm_head": ["lm_head"]}
    assert module_groups(names, "role") == {"q_proj": [names[0], names[2]], "v_proj": [names[1]], "lm_head": ["lm_head"]}
    clip = ["text_model.encoder.layers.0.q", "vision_model.encoder.layers.0.q", "vision_model.encoder.layers.1.q"]
    assert list(module_groups(clip)) == ["text.L0", "vision.L0", "vision.L1"]
    assert module_groups(clip, "tower") == {"text": clip[:1], "vision": clip[1:]}
    assert module_groups(names, {"low": "*.0.*", "rest": ["*.1.*", "lm_head"]}) == {"low": names[:2], "rest": names[2:]}
    for by, words in (
        ({"low": "*.0.*"}, "m.layers.1.self_attn.q_proj and 1 more modules are in no group"),
        ({"a": "*.0.*", "b": "*", "c": "*"}, "is in the groups 'a' and 'b'"),
        ({"a": "*.7.*", "b": "*"}, "The group 'a' .* matches no module"),
        ("blocks", "Did you mean 'block'"),
    ):
        with pytest.raises(ConfigError, match=words):
            module_groups(names, by)  # type: ignore[arg-type]


def test_what_cannot_be_switched_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no modules with an adapter 'default'"):
        adapter_layers(tiny_model("llama"))
    model = adapted(targets=["q_proj"])
    with pytest.raises(UnsupportedModelError, match=r"adapter 'other' \(adapters: default\)"):
        adapter_layers(model, "other")
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="unmerge"):
        adapter_layers(model)
    model.unmerge_adapter()
    model.disable_adapter_layers()
    with pytest.raises(UnsupportedModelError, match="disabled"):
        adapter_layers(model)
    model.enable_adapter_layers()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    with pytest.raises(UnsupportedModelError, match="not 'default' alone is active, but second"):
        adapter_layers(model)
    groups = adapter_groups(model, adapter="second")
    with AdapterSwitches(groups, "second") as switches:
        with pytest.raises(InterventionError, match="1 flags cannot switch 3 groups"):
            switches.set([True])
        with pytest.raises(InterventionError, match="Give \\(batch, groups\\)"):
            switches.set_rows(torch.ones(3, 1))
    dora = adapted(targets=["q_proj"], use_dora=True)
    with pytest.raises(UnsupportedModelError, match="not plain LoRA"):
        AdapterSwitches(adapter_groups(dora), tensor=True)


def test_the_tensor_mode_computes_the_same_without_branches() -> None:
    model = adapted(targets=["q_proj", "up_proj"]).eval()
    inputs = tiny_inputs(model)
    groups = adapter_groups(model)
    mask = [index % 2 == 0 for index in range(len(groups))]
    with AdapterSwitches(groups) as switches:
        switches.set(mask)
        expected = first(model(**inputs))
    with AdapterSwitches(groups, tensor=True) as switches:
        switches.set(mask)
        torch.testing.assert_close(first(model(**inputs)), expected, rtol=1e-5, atol=1e-6)
        first(model(**inputs)).mean().backward()
        off = [module for group, flag in zip(groups.values(), mask, strict=True) if not flag for module in group.values()]
        assert off
        assert all(module.lora_B["default"].weight.grad.abs().max() == 0 for module in off)


def test_experts_are_switched_by_their_outermost_wrapper() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (torch.nn.Parameter(torch.randn(2, 4, 4)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,eij,ejk->bk", x, self.one, self.two)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"experts": Experts()}) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer["experts"](x)  # type: ignore[index]
            return x

    torch.manual_seed(0)
    plain, x = Model(), torch.randn(3, 4)
    expected = plain(x)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.one", "experts.two"], init_lora_weights=False)
    model = peft.get_peft_model(plain, config)  # type: ignore[arg-type]
    groups = adapter_groups(model)
    assert list(groups) == ["L0", "L1"]
    assert all(len(members) == 1 for members in groups.values())
    on = model(x)
    assert not torch.allclose(on, expected)
    with AdapterSwitches(groups) as switches:
        switches.set([False, False])
        assert torch.equal(model(x), expected)
        switches.set_rows(torch.tensor([[True, True], [False, False], [True, True]]))
        found = model(x)
    torch.testing.assert_close(found[0], on[0])
    torch.testing.assert_close(found[1], expected[1])
