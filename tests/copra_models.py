"""A tiny decoder with LoRA and a few rows to train it on, for CopRA's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from trocar.anatomy import tiny_model

ROWS = 16


def adapted(seed: int = 0, **settings: Any) -> Any:
    model = tiny_model("llama")
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj", "up_proj"], **settings}))


def rows() -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 60, (ROWS, 6), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row.tolist(), "labels": row.tolist(), "attention_mask": [1] * 6} for row in ids]


def trainer(model: Any, folder: Path, callbacks: Any = (), steps: int = 8, **settings: Any) -> transformers.Trainer:
    arguments = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1,
        "logging_steps": 1, "save_steps": 100, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 5,
        "dataloader_pin_memory": False, **settings,
    }  # fmt: skip
    collator = transformers.default_data_collator
    return transformers.Trainer(
        model, transformers.TrainingArguments(**arguments), train_dataset=rows(), eval_dataset=rows(), data_collator=collator,
        callbacks=list(callbacks),
    )  # fmt: skip


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


class StopAfter(transformers.TrainerCallback):
    """Ends a run early and saves, as a kill between two checkpoints would have left it."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = control.should_save = state.global_step == self.steps
        return control
