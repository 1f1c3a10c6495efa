"""CopRA in anybody's Trainer: one more entry in `callbacks`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from trocar.adapt.copra.config import CopraConfig
from trocar.adapt.copra.gate import CopraGate, chosen
from trocar.adapt.copra.schedule import Shape
from trocar.core.errors import ConfigError
from trocar.trace.adapters import initial_factors


class CopraCallback(TrainerCallback):
    """Progressive training of adapters (CopRA / CoTo, arXiv 2410.22911, 2506.05713) as a callback of any `transformers.Trainer`.

        model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
        trainer = Trainer(model, args, train_dataset=data, callbacks=[CopraCallback()])      # or trl.SFTTrainer(..., callbacks=[...])
        trainer.train()

    Settings are those of `CopraConfig`, given whole or one by one. Learning rate, epochs and all else stay those of the plain run. The mask
    is drawn once per optimiser step, also under gradient accumulation, and in evaluation all adapters are on. It is a function of the
    seed and the step: a resumed run goes on exactly, and the processes of a distributed run agree. `gate` is there from the start of
    training on; the Trainer's logs get `copra_p` and `copra_active` (the share of groups that is on).

    With gradient checkpointing in its reentrant form inputs must require gradients, so the graph reaches below the lowest adapter that is
    on, and less time is saved; `gradient_checkpointing_kwargs={"use_reentrant": False}` avoids that.
    Raises ConfigError where a distributed setting cannot work, and whatever `copra_gate` raises.
    """

    def __init__(self, config: CopraConfig | None = None, *, adapter: str = "default", shape: Shape | None = None, **settings: Any) -> None:
        self.config, self.adapter, self.shape = chosen(config, settings), adapter, shape
        self.gate: CopraGate | None = None
        self._initial: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._logged: dict[str, float] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if model is not None:  # before a checkpoint is loaded into it: PiSSA's fresh factors are part of its base
            self._initial = initial_factors(model, self.adapter)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.gate is not None:
            self.gate.detach()
        _check_distributed(args, model)
        if self._initial is None:
            self._initial = initial_factors(model, self.adapter)
            if self._initial and state.global_step:
                raise ConfigError(
                    "The run is resumed, and the fresh factors of this initialisation are not known any more.",
                    "Give the callback to the Trainer when it is made, not later.",
                )
        seed = args.seed if self.config.seed is None else self.config.seed
        config = self.config.model_copy(update={"seed": seed})
        self.gate = CopraGate(model, state.max_steps, config, self.adapter, self.shape, self._initial)
        self.gate.t = state.global_step
        self.gate.counts += self.gate.history().sum(0)
        self.gate.attach()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.gate is not None:
            mask = self.gate.begin(state.global_step)
            self._logged = {"copra_p": self.gate.p(state.global_step), "copra_active": float(mask.mean())}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.gate is not None:
            self.gate.clear_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.gate is not None:
            self.gate.end()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            logs.update(self._logged)
            if state.log_history:
                state.log_history[-1].update(self._logged)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.gate is None:
            return
        self.gate.detach()
        ramps = self.config.schedule != "constant" and self.config.strategy == "copra"
        if ramps and state.global_step < self.gate.ramp:
            warnings.warn(
                f"Training ended at step {state.global_step}, before step {self.gate.ramp}, from which on all adapters are on: "
                "the whole network has hardly been trained, and its score will suffer.",
                stacklevel=2,
            )


def _check_distributed(args: Any, model: Any) -> None:
    """Off groups have no gradients; say what does not go with that."""
    if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        warnings.warn(
            "FSDP and DeepSpeed keep parameters in flat pieces and fill missing gradients with zeros: the moments of adapters that are off "
            "decay, and weight decay acts on them.",
            stacklevel=3,
        )
    elif getattr(args, "world_size", 1) > 1:
        find = args.ddp_find_unused_parameters
        if find is None and isinstance(model, PreTrainedModel):
            find = not model.is_gradient_checkpointing  # what the Trainer decides
        if find is False:
            raise ConfigError(
                "Adapters that are off have no gradients, and DDP would wait for them.", "Set ddp_find_unused_parameters=True."
            )
    elif getattr(args, "n_gpu", 1) > 1 and not any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
        # the Trainer would wrap the model in DataParallel
        raise ConfigError(
            "DataParallel copies the model for every GPU, and the copies cannot be switched.",
            "Start with torchrun or accelerate launch, or show the process one GPU (CUDA_VISIBLE_DEVICES=0).",
        )
