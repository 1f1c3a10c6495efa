"""Training adapters: the loop is exact when it is killed, the model stays as it was, and only answers are learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trocar.adapt.copra import CopraConfig, LoraSettings, TrainSettings, train_adapter
from trocar.adapt.copra.training import _Texts, target_modules
from trocar.anatomy import Anatomy, fingerprint, tiny_inputs, tiny_model
from trocar.core.errors import ConfigError, DataError
from trocar.core.workspace import Workspace
from trocar.evaluate import Task
from trocar.fitting import IGNORED
from trocar.method import Examples
from trocar.patch import attached

WORDS = [*"abcdefghijklmnopqrstuvwxyz"]
TRAIN = TrainSettings(steps=12, batch=8, lr=2e-2, checkpoint_steps=4)
LORA = LoraSettings(rank=2, alpha=4, targets=("q", "v", "up"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["[UNK]", "</s>", *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="</s>")


def pictures(rows: int = 24) -> tuple[Any, Examples]:
    model = tiny_model("vit", task="class").eval()
    inputs = tiny_inputs(model, rows)
    labels = (inputs["pixel_values"].mean((1, 2, 3)) > 0).long()
    return model, Examples(inputs, tuple(map(str, range(rows))), labels)


def texts() -> tuple[Any, Examples]:
    prompts = [f"{a} {b} {c}" for a in "abc" for b in "def" for c in "ghi"]
    return tiny_model("llama").eval(), Examples({}, tuple(prompts), fields={"prompt": prompts, "answer": [f"{p[0]} z" for p in prompts]})


@pytest.mark.parametrize("recipe", ["plain", CopraConfig(p0=0.0), CopraConfig(strategy="stochastic-depth")])
def test_a_classifier_learns_and_stays_as_it_was(tmp_path: Path, recipe: Any) -> None:
    model, data = pictures()
    before, task = fingerprint(model), Task.of(model, data)
    loss = -task.measure(model).score.mean()
    made = train_adapter(model, data, recipe, LORA, TRAIN, seed=1, work=Workspace(tmp_path))
    assert fingerprint(model) == before
    assert not model.training
    assert not list(tmp_path.glob("*.training"))
    with attached(model, made.adapter) as outer:
        assert -task.measure(outer).score.mean() < loss
    blocks = {f"L{name.split('layers.')[1].split('.')[0]}" for name in made.adapter.factors}
    assert set(made.counts) == (set() if recipe == "plain" else blocks)
    again = train_adapter(model, data, recipe, LORA, TRAIN, seed=1, work=Workspace(tmp_path), stop_after=1)  # served, not trained
    other = train_adapter(model, data, recipe, LORA, TRAIN, seed=2, work=Workspace(tmp_path / "other"))
    name = next(iter(made.adapter.factors))
    assert torch.equal(again.adapter.factors[name].a, made.adapter.factors[name].a)
    assert not torch.equal(other.adapter.factors[name].a, made.adapter.factors[name].a)


@pytest.mark.parametrize("start", ["default", "pissa"])
def test_a_training_that_is_killed_goes_on_exactly(tmp_path: Path, tokenizer: Any, start: Any) -> None:
    model, data = texts()
    lora = LORA.model_copy(update={"start": start, "dropout": 0.1})
    whole = train_adapter(model, data, CopraConfig(), lora, TRAIN, work=Workspace(tmp_path / "whole"), processor=tokenizer)

    work, steps, plain = Workspace(tmp_path / "killed"), 0, torch.optim.AdamW.step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 7:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train_adapter(model, data, CopraConfig(), lora, TRAIN, work=work, processor=tokenizer)
    assert (work.folder / "adapter.training" / "checkpoint-4").is_dir()
    resumed = train_adapter(model, data, CopraConfig(), lora, TRAIN, work=work, processor=tokenizer)
    assert resumed.counts == whole.counts
    for name, factors in whole.adapter.factors.items():
        assert torch.equal(factors.a, resumed.adapter.factors[name].a)
        assert torch.equal(factors.b, resumed.adapter.factors[name].b)
    assert np.array_equal(whole.losses, resumed.losses)
    assert {factors.a.shape[0] for factors in whole.adapter.factors.values()} == {4 if start == "pissa" else 2}


def test_only_the_answer_and_the_end_are_learned(tmp_path: Path, tokenizer: Any) -> None:
    model, data = texts()
    batch = _Texts(model, data, TRAIN, 0, tokenizer).__getitems__([0, 1, 2])
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        words = tokenizer.convert_ids_to_tokens(ids[mask == 1].tolist())
        learned = tokenizer.convert_ids_to_tokens(ids[labels != IGNORED].tolist())
        assert words[-3:] == learned == [words[0], "z", "</s>"]
    made = train_adapter(model, data, "plain", LORA, TRAIN, work=Workspace(tmp_path), processor=tokenizer)
    task = Task.of(model, data, tokenizer)
    before = task.measure(model).score.mean()
    with attached(model, made.adapter) as outer:
        assert task.measure(outer).score.mean() > before + 0.5


def test_clients_can_share_a_start(tmp_path: Path) -> None:
    model, data = pictures()
    first = train_adapter(model, data, "plain", LORA, TRAIN, work=Workspace(tmp_path / "first"))
    none = TRAIN.model_copy(update={"steps": 1, "lr": 1e-12})
    same = train_adapter(model, data, "plain", LORA, none, seed=5, start=first.adapter, work=Workspace(tmp_path / "same"))
    for name, factors in first.adapter.factors.items():
        torch.testing.assert_close(factors.a, same.adapter.factors[name].a)
    odd = LORA.model_copy(update={"alpha": 8})
    with pytest.raises(ConfigError, match="does not fit"):
        train_adapter(model, data, "plain", odd, none, start=first.adapter, work=Workspace(tmp_path / "odd"))


def test_targets_are_roles_of_any_family() -> None:
    for family, transposed in (("gpt2", True), ("gpt_neox", False), ("phi3", False), ("clip", False)):
        model = tiny_model(family)
        names, stored = target_modules(model, ("q", "down"))
        assert stored == transposed
        assert len(names) == 2 * sum(tower.n_layers for tower in Anatomy.of(model).towers.values())
        assert len(target_modules(model, ("all",))[0]) >= len(names)
    with pytest.raises(ConfigError, match="has no 'gate'"):
        target_modules(tiny_model("gpt2"), ("gate",))


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    model, data = texts()
    with pytest.raises(DataError, match="tokenizer"):
        train_adapter(model, data, work=Workspace(tmp_path))
    vit, rows = pictures()
    with pytest.raises(DataError, match="with labels"):
        train_adapter(vit, Examples(rows.inputs, rows.ids), work=Workspace(tmp_path))
