"""Games of parts of a model: a coalition's value is that of one plain pass with only those parts on, however many are evaluated at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.adapt.copra.training import target_modules
from trocar.anatomy import Anatomy, tiny_inputs, tiny_model
from trocar.core.errors import ComponentError, DataError, MetricError
from trocar.locate.games import adapter_game, component_game, value_game
from trocar.locate.shapley import coalitions, shapley_values
from trocar.trace import Scale, intervene
from trocar.trace.adapters import AdapterSwitches, adapter_groups, initial_factors
from trocar.trace.coalitions import coalition_sweep
from trocar.trace.shortcut import skipped

TASKS = {"llama": "lm", "gpt2": "lm", "vit": "class", "bert": "class", "opt": "lm", "gemma2": "lm"}


def adapted(family: str, **kind: Any) -> Any:
    model = tiny_model(family, task=TASKS.get(family, "base")).double()  # type: ignore[arg-type]
    targets: Any = ["c_attn", "c_fc"] if family == "gpt2" else target_modules(model, ("all",))[0]
    if kind.get("init_lora_weights") == "pissa":
        model, targets = model.float(), ["q_proj", "down_proj"]
    outer = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, **kind))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in outer.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return outer.eval()


def inputs_of(model: Any, rows: int = 5) -> dict[str, torch.Tensor]:
    dtype = next(model.parameters()).dtype
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tiny_inputs(model, rows).items()}


def score(output: Any, rows: torch.Tensor) -> torch.Tensor:
    """A number a row that depends on the row's own number too."""
    return output.logits.flatten(1).log_softmax(-1)[:, 1] + rows.to(output.logits.device)


@pytest.mark.parametrize("family", sorted(TASKS))
def test_adapters_that_are_off_are_not_there(family: str) -> None:
    model = adapted(family)
    inputs = inputs_of(model)
    game = adapter_game(model, inputs, score, batch_size=7)
    masks = coalitions(len(game.players))
    found = game.rows(masks)
    with torch.no_grad(), AdapterSwitches(adapter_groups(model)) as switches:
        for mask, row in zip(masks, found, strict=True):
            switches.set(mask.tolist())
            np.testing.assert_allclose(row, score(model(**inputs), torch.arange(5)).numpy(), rtol=1e-8, atol=1e-10)
        switches.set(None)
        whole = score(model(**inputs), torch.arange(5)).numpy()
    np.testing.assert_allclose(found[-1], whole, rtol=1e-8)
    with torch.no_grad():
        np.testing.assert_allclose(found[0], score(model.unload()(**inputs), torch.arange(5)).numpy(), rtol=1e-8)
    assert list(game.players) == [str(block) for block in Anatomy.of(model).components("block")]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(0, 511), min_size=1, max_size=40))
def test_neither_batch_size_nor_order_nor_repeats_matter(batch_size: int, codes: list[int]) -> None:
    model = adapted("llama")
    inputs = inputs_of(model, 3)
    game = adapter_game(model, inputs, score, by=game_groups(), batch_size=batch_size)
    masks = (np.array(codes)[:, None] >> np.arange(10)) & 1 == 1
    reference = adapter_game(model, inputs, score, by=game_groups(), batch_size=1)
    np.testing.assert_allclose(game.rows(masks), reference.rows(masks), rtol=1e-8, atol=1e-10)


def game_groups() -> dict[str, list[str]]:
    single = {f"L{n}{r}": [f"*.{n}.*.{r}"] for n in range(3) for r in ("q_proj", "v_proj", "down_proj")}
    return single | {"rest": ["*.k_proj", "*.o_proj", "*.up_proj", "*.gate_proj"]}


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_kinds_of_adapters(kind: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = tiny_model("llama", task="lm")
    outer = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **kind))
    initial = initial_factors(outer)
    with torch.no_grad():
        for name, parameter in outer.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    model = outer.eval()
    inputs = tiny_inputs(model)

    def score32(output: Any, rows: torch.Tensor) -> torch.Tensor:
        return output.logits.flatten(1).square().mean(1)

    game = adapter_game(model, inputs, score32, initial=initial)
    values = game(coalitions(3))
    with torch.no_grad():
        np.testing.assert_allclose(
            values[0], score32(tiny_model("llama", task="lm")(**inputs), torch.arange(2)).mean(), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(values[-1], score32(model(**inputs), torch.arange(2)).mean(), rtol=1e-5, atol=1e-6)


def test_an_adapter_without_content_is_worth_nothing() -> None:
    model = adapted("llama")
    groups = adapter_groups(model)
    for module in groups["L1"].values():
        torch.nn.init.zeros_(module.lora_B["default"].weight)
    found = shapley_values(adapter_game(model, inputs_of(model), score))
    assert found.values[1] == pytest.approx(0, abs=1e-12)
    assert abs(found.values[[0, 2]]).min() > 1e-6
    assert found.row_errors is not None
    assert found.row_errors[1] == pytest.approx(0, abs=1e-12)
    assert (found.row_errors[[0, 2]] > 1e-6).all()
    assert abs(found.gap) < 1e-9


@pytest.mark.parametrize("family", ["llama", "vit", "gpt_neox", "bert"])
def test_components_that_are_out_contribute_nothing(family: str) -> None:
    model = tiny_model(family, task="lm" if family in ("llama", "gpt_neox") else "class").double().eval()  # type: ignore[arg-type]
    inputs = inputs_of(model)
    for parts in (None, ["L0.mlp", "L1.attn", "L2.H0", "L2.N3", "L2.N4"]):
        if parts and family == "bert":
            continue  # its attention module holds the residual
        game = component_game(model, inputs, score, parts, batch_size=12)
        masks = coalitions(len(game.players))[:: 1 if parts is None else 3]
        found = game.rows(masks)
        for mask, row in zip(masks, found, strict=True):
            off = [Scale(player, 0.0) for player, on in zip(game.players, mask, strict=True) if not on]
            with torch.no_grad(), intervene(model, off):
                np.testing.assert_allclose(row, score(model(**inputs), torch.arange(5)).numpy(), rtol=1e-7, atol=1e-9)


def test_two_towers_are_played_as_whole_models() -> None:
    model = adapted("clip")
    inputs = inputs_of(model)

    @torch.no_grad()
    def retrieval(whole: Any) -> float:
        return float(whole(**inputs).logits_per_image.log_softmax(-1).diagonal().mean())

    game = value_game(model, retrieval)
    assert {name.split(".")[0] for name in game.players} == {"text", "vision"}
    found = shapley_values(game, "permutation", orders=8)
    assert abs(found.gap) < 1e-9
    assert found.total == pytest.approx(retrieval(model))
    with pytest.raises(MetricError, match="towers text and vision"):
        adapter_game(model, inputs, score)


def test_what_else_was_trained_is_in_every_coalition() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    outer = peft.get_peft_model(tiny_model("llama", task="lm"), config)
    with torch.no_grad():
        outer.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    model, inputs = outer.eval(), tiny_inputs(outer)

    def last(output: Any, rows: torch.Tensor) -> torch.Tensor:
        return output.logits[:, -1, 0]

    found = adapter_game(model, inputs, last)(np.zeros((1, 3), dtype=bool))
    with torch.no_grad():
        base = last(tiny_model("llama", task="lm")(**inputs), torch.arange(2)).mean()
    assert found[0] == pytest.approx(2 * float(base), rel=1e-5)  # the adapters (B = 0) are off, the head that was trained is not


def test_blocks_that_coalitions_share_run_once() -> None:
    model = adapted("llama")
    blocks, rows = model.get_base_model().model.layers, []
    handles = [block.register_forward_hook(lambda module, args, output: module in skipped or rows.append(len(args[0]))) for block in blocks]
    game = adapter_game(model, inputs_of(model, 2), score, batch_size=1000)
    game(coalitions(3))
    # the first capture, then 2, 4 and 8 different prefixes of two rows
    assert [count for count in rows if count > 2] == [4, 8, 16]
    for handle in handles:
        handle.remove()


def test_what_cannot_be_played_is_refused() -> None:
    model = adapted("llama")
    inputs = inputs_of(model)
    with pytest.raises(DataError, match=r"model\.eval"):
        adapter_game(model.train(), inputs, score)
    with pytest.raises(DataError, match=r"model\.eval"):
        value_game(model, lambda whole: 0.0)
    model.eval()
    with pytest.raises(ComponentError):
        component_game(model, inputs, score, ["L9"])
    with pytest.raises(DataError, match="Masks of shape"):
        coalition_sweep(model, inputs, np.ones((2, 2), dtype=bool), [[0]], lambda masks, blocks: None, score)  # type: ignore[arg-type]
    with pytest.raises(ComponentError, match="no block 7"):
        coalition_sweep(model, inputs, np.ones((2, 1), dtype=bool), [[7]], lambda masks, blocks: None, score)  # type: ignore[arg-type]
    head = tiny_model("llama", task="lm").double()
    with_head = peft.get_peft_model(head, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])).eval()
    with pytest.raises(MetricError, match="lm_head lies outside"):
        adapter_game(with_head, inputs, score)
