"""CopRA inside a real Trainer: accumulation, evaluation, logs, resuming, initialisations that change the base, and several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from copra_models import StopAfter, adapted, factors, trainer

from trocar.adapt import CopraCallback, CopraConfig
from trocar.core.errors import ConfigError


def gate_of(callback: CopraCallback) -> Any:
    assert callback.gate is not None
    return callback.gate


class Watch(transformers.TrainerCallback):
    """Which blocks got gradients in every optimiser step."""

    def __init__(self) -> None:
        self.seen: list[set[int]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        self.seen.append({int(name.split(".layers.")[1].split(".")[0]) for name in with_gradient})


def test_masks_hold_for_a_whole_optimiser_step_and_are_logged(tmp_path: Path) -> None:
    callback, watch = CopraCallback(p0=0.0), Watch()
    model = adapted()
    run = trainer(
        model,
        tmp_path,
        [callback, watch],
        steps=8,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        eval_steps=2,
        eval_strategy="steps",
    )
    run.train()
    gate = gate_of(callback)
    masks = gate.history()
    assert masks.shape == (8, 3)
    assert [set(np.flatnonzero(mask).tolist()) for mask in masks] == watch.seen
    assert gate.counts.tolist() == masks.sum(0).tolist()
    logged = [row for row in run.state.log_history if "loss" in row]
    assert [row["copra_p"] for row in logged] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1])
    assert [row["copra_active"] for row in logged] == pytest.approx(masks.mean(1).tolist())
    assert gate.seed == 5  # the Trainer's
    assert not any("forward" in module.__dict__ for module in model.modules() if "lora" in type(module).__module__)
    plain = adapted()
    plain.load_state_dict(model.state_dict())
    assert run.evaluate()["eval_loss"] == pytest.approx(trainer(plain, tmp_path).evaluate()["eval_loss"])


def test_all_on_from_the_start_is_the_plain_trainer_bit_for_bit(tmp_path: Path) -> None:
    models = [adapted(lora_dropout=0.1) for _ in range(2)]
    for model, callbacks in zip(models, ([], [CopraCallback(p0=1.0)]), strict=True):
        trainer(model, tmp_path, callbacks, steps=5).train()
    same = factors(models[1])
    assert all(torch.equal(value, same[name]) for name, value in factors(models[0]).items())


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(tmp_path: Path, kind: dict[str, Any]) -> None:
    whole, callback = adapted(**kind), CopraCallback(seed=3)
    trainer(whole, tmp_path / "whole", [callback]).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stopped before the ramp's end
        trainer(adapted(**kind), tmp_path / "parts", [CopraCallback(seed=3), StopAfter(3)]).train()
    resumed, again = adapted(**kind), CopraCallback(seed=3)
    trainer(resumed, tmp_path / "parts", [again]).train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert np.array_equal(gate_of(callback).history(), gate_of(again).history())
    assert np.array_equal(gate_of(callback).counts, gate_of(again).counts)
    expected = factors(whole)
    assert all(torch.equal(value, expected[name]) for name, value in factors(resumed).items())
    if "init_lora_weights" in kind:
        late = trainer(adapted(**kind), tmp_path / "parts")
        late.add_callback(CopraCallback(seed=3))
        with pytest.raises(ConfigError, match="when it is made"):
            late.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))


def test_other_optimisers_and_kinds_of_adapters_train(tmp_path: Path) -> None:
    model = adapted()
    run = trainer(model, tmp_path, [CopraCallback()], steps=4)
    from peft.optimizers import create_loraplus_optimizer

    run.optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8)
    before = factors(model)
    run.train()
    assert any(not torch.equal(value, before[name]) for name, value in factors(model).items())
    loha = peft.get_peft_model(adapted().unload(), peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]))
    callback = CopraCallback(p0=0.0, seed=1)
    watch = Watch()
    trainer(loha, tmp_path, [callback, watch], steps=6).train()
    assert [set(np.flatnonzero(mask).tolist()) for mask in gate_of(callback).history()] == watch.seen


def test_mixed_precision_is_the_trainers(tmp_path: Path) -> None:
    model, callback, watch = adapted(), CopraCallback(p0=0.0, seed=1), Watch()
    before = factors(model)
    trainer(model, tmp_path, [callback, watch], steps=6, bf16=True).train()
    assert [set(np.flatnonzero(mask).tolist()) for mask in gate_of(callback).history()] == watch.seen
    assert {value.dtype for value in factors(model).values()} == {torch.float32}
    assert any(not torch.equal(value, before[name]) for name, value in factors(model).items())


def test_a_run_that_ends_before_all_are_on_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ended at step 2, before step 6"):
        trainer(adapted(), tmp_path, [CopraCallback(), StopAfter(2)]).train()
    with pytest.raises(ConfigError, match="not both"):
        CopraCallback(CopraConfig(), p0=0.3)


def test_settings_of_distributed_runs() -> None:
    from trocar.adapt.copra.callback import _check_distributed

    model = adapted()
    alone = SimpleNamespace(fsdp=[], deepspeed=None, world_size=1, ddp_find_unused_parameters=False)
    _check_distributed(alone, model)
    two = SimpleNamespace(**{**vars(alone), "world_size": 2})
    with pytest.raises(ConfigError, match="ddp_find_unused_parameters=True"):
        _check_distributed(two, model)
    _check_distributed(SimpleNamespace(**{**vars(two), "ddp_find_unused_parameters": None}), model)
    with pytest.warns(UserWarning, match="flat pieces"):
        _check_distributed(SimpleNamespace(**{**vars(two), "fsdp": ["full_shard"]}), model)
    with pytest.raises(ConfigError, match="torchrun"):  # two GPUs in one process: DataParallel
        _check_distributed(SimpleNamespace(**{**vars(alone), "n_gpu": 2}), model)
    _check_distributed(SimpleNamespace(**{**vars(alone), "n_gpu": 2}), SimpleNamespace(is_loaded_in_4bit=True))


def test_two_processes_draw_the_same_masks_and_end_with_equal_weights(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import hashlib, json, os, sys
            import torch
            from copra_models import adapted, factors, trainer
            from trocar.adapt import CopraCallback

            callback = CopraCallback(p0=0.0)
            model = adapted()
            trainer(model, sys.argv[1], [callback], steps=6, per_device_train_batch_size=2, ddp_backend="gloo").train()
            digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in factors(model).values())).hexdigest()
            rank = int(os.environ["RANK"])
            with open(f"{sys.argv[1]}/rank{rank}.json", "w") as file:
                json.dump({"masks": callback.gate.history().tolist(), "weights": digest, "world": torch.distributed.get_world_size()}, file)
            """
        )
    )
    import json
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        processes.append(subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["world"] == 2
    assert first == second
    assert np.array(first["masks"]).any(1).all()
