"""Train LoRA adapters of a picture classifier or a causal language model: plainly, as CopRA, or as one of its baselines.

The loop is the ecosystem's (`transformers.Trainer`, through `trocar.fitting`); what is CopRA about it is one callback.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pydantic
import torch
import transformers

from trocar.adapt.copra.callback import CopraCallback
from trocar.adapt.copra.config import CopraConfig
from trocar.anatomy import Anatomy, fingerprint, tensor_fingerprint
from trocar.core.config import Config
from trocar.core.errors import ConfigError, DataError
from trocar.core.seeds import derive
from trocar.core.workspace import Workspace
from trocar.evaluate import data_digest
from trocar.fitting import IGNORED, Optimiser, Passes, fit_stream
from trocar.method import Examples
from trocar.patch import Adapter, Factors, wrapped
from trocar.trace.adapters import initial_factors
from trocar.trace.queries import answer_tokens, batch_of, prompt_tokens

PLAIN = "plain"
Recipe = CopraConfig | Literal["plain"]


class LoraSettings(Config):
    """The adapters.

    rank, alpha: the scale is alpha / rank, or alpha / sqrt(rank) with `rslora`. targets: roles of the adapted linear maps (`q`, `k`, `v`,
    `o`, `up`, `gate`, `down`, or `all`), in every block of every tower. start: `pissa` begins at the weights' principal components (the
    result is converted to a plain adapter of twice the rank). dropout: of the adapters' inputs.
    """

    rank: int = pydantic.Field(default=8, ge=1)
    alpha: int = pydantic.Field(default=16, ge=1)
    targets: tuple[str, ...] = ("q", "k", "v")
    rslora: bool = False
    start: Literal["default", "pissa"] = "default"
    dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)

    def peft(self, model: Any) -> Any:
        """The `peft.LoraConfig` for a model. Raises ConfigError for roles that it does not have."""
        import peft

        names, transposed = target_modules(model, self.targets)
        return peft.LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, use_rslora=self.rslora, target_modules=names,
            init_lora_weights="pissa" if self.start == "pissa" else True, fan_in_fan_out=transposed,
        )  # type: ignore[arg-type]  # fmt: skip


class TrainSettings(Optimiser):
    """How long and how; the defaults are those that our small experiments began with (the papers use what plain LoRA uses)."""

    steps: int = pydantic.Field(default=400, ge=1)
    batch: int = pydantic.Field(default=32, ge=1)
    lr: float = pydantic.Field(default=3e-3, gt=0)
    warmup: float = pydantic.Field(default=0.0, ge=0, lt=1)
    weight_decay: float = pydantic.Field(default=1e-2, ge=0)


def target_modules(model: Any, roles: Sequence[str]) -> tuple[list[str], bool]:
    """Names of the modules that hold the roles' linear maps, and whether they are stored as (in, out)."""
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    names: dict[str, bool] = {}
    for tower in anatomy.towers.values():
        for layer in range(tower.n_layers):
            there = tower.linears(layer)
            for role in there if "all" in roles else roles:
                if role not in there:
                    raise ConfigError(
                        f"lora.targets: block {layer} of this model has no '{role}'.", f"It has {', '.join(there)}, or say all."
                    )
                own = next(one for one in (role, "qkv", "gate_up") if tower.has(layer, one))
                names[tower.path(layer, own)] = anatomy.linear(f"{tower.name}.L{layer}".lstrip(".") + _room(role)).transposed
    return list(names), any(names.values())


def _room(role: str) -> str:
    return f".attn.{role}" if role in "qkvo" else f".mlp.{role}"


@dataclass(frozen=True)
class Trained:
    """A trained adapter. losses: (k, 2) step and training loss; counts: group -> in how many steps it was on (empty for plain LoRA)."""

    adapter: Adapter
    losses: np.ndarray
    counts: Mapping[str, int]


def train_adapter(
    model: torch.nn.Module,
    data: Examples,
    recipe: Recipe = PLAIN,
    lora: LoraSettings | None = None,
    train: TrainSettings | None = None,
    *,
    seed: int = 0,
    work: Workspace,
    processor: Any = None,
    name: str = "adapter",
    start: Adapter | None = None,
    device: str = "auto",
    stop_after: int | None = None,
) -> Trained:
    """Train one adapter on `data`, a committed unit of `work`; a killed training goes on at its last checkpoint. The model stays as it was.

    data: pictures with labels, or texts with columns `prompt` and `answer` (then `processor` is the tokenizer, and the loss is that of the
    answer and of the end of text after it). recipe: `plain`, or a `CopraConfig`. seed: of the adapter's first values, the order of the data
    and the masks, each from a stream of its own. start: factors to begin with instead of fresh ones (clients that share a start).
    Raises DataError and ConfigError for what cannot be trained on.
    """
    lora, train = lora or LoraSettings(), train or TrainSettings()
    stream = (_Texts if not data.inputs else _Pictures)(model, data, train, seed, processor)
    said = PLAIN if isinstance(recipe, str) else recipe.model_dump(mode="json")
    key = {
        "model": fingerprint(model), "data": data_digest(data), "labels": None if data.labels is None else data.labels.tolist(),
        "recipe": said, "lora": lora.model_dump(mode="json"), "train": train.model_dump(mode="json", exclude={"checkpoint_steps"}),
        "seed": seed, "start": None if start is None else [tensor_fingerprint(part) for part in start.tensors().values()],
    }  # fmt: skip
    found = work.tensors(name, key, lambda: _trained(model, stream, recipe, lora, train, seed, work, name, start, device, stop_after))
    names = sorted({key.rpartition("|")[0] for key in found if key.endswith(("|a", "|b"))})
    factors = {
        one: Factors(found[f"{one}|a"], found[f"{one}|b"], float(found[f"{one}|scale"]), bool(found[f"{one}|transposed"])) for one in names
    }
    counts = {key.removeprefix("counts|"): int(value) for key, value in found.items() if key.startswith("counts|")}
    return Trained(Adapter(factors, dropout=lora.dropout), found["losses"].numpy(), counts)


def _trained(
    model: Any, stream: Any, recipe: Recipe, lora: LoraSettings, train: TrainSettings, seed: int, work: Workspace, name: str,
    start: Adapter | None, device: str, stop_after: int | None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    folder = work.folder / f"{name}.training"
    history, callbacks = _History(), []
    if not isinstance(recipe, str):
        chosen = recipe if recipe.seed is not None else recipe.model_copy(update={"seed": derive(seed, "masks") % 2**31})
        callbacks.append(CopraCallback(chosen))
    place = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "adapter"))
        with wrapped(model, lora.peft(model)) as outer:
            initial = initial_factors(outer)
            if start is not None:
                _begin(outer, start)
            fit_stream(outer, stream, train, train.steps, folder, seed, device, stop_after, [*callbacks, history])
            adapter = Adapter.of(outer, initial=initial or None)
    model.to(place)
    shutil.rmtree(folder, ignore_errors=True)
    found = {"losses": torch.tensor(history.losses, dtype=torch.float64).reshape(-1, 2)}
    for module, (a, b, scale, transposed) in adapter.factors.items():
        found |= {f"{module}|a": a, f"{module}|b": b, f"{module}|scale": torch.tensor(scale, dtype=torch.float64)}
        found[f"{module}|transposed"] = torch.tensor(int(transposed))
    gate = callbacks[0].gate if callbacks else None
    if gate is not None:
        found |= {f"counts|{group}": torch.tensor(int(count)) for group, count in zip(gate.names, gate.counts, strict=True)}
    return found


def _begin(outer: Any, start: Adapter) -> None:
    """Put an adapter's factors into the fresh ones of a wrapped model."""
    modules = dict(outer.get_base_model().named_modules())
    with torch.no_grad():
        for name, factors in start.factors.items():
            layer = modules[name]
            if "default" not in getattr(layer, "lora_A", {}) or layer.scaling["default"] != factors.scale:
                raise ConfigError(f"The adapter to begin with does not fit the new one at {name}.", "Use equal targets, rank and alpha.")
            layer.lora_A["default"].weight.copy_(factors.a)
            layer.lora_B["default"].weight.copy_(factors.b)


class _History(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[tuple[float, float]] = []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses = [(row["step"], row["loss"]) for row in state.log_history if "loss" in row]


class _Pictures(torch.utils.data.Dataset):
    """Batches of inputs and labels in the order of `Passes`."""

    def __init__(self, model: Any, data: Examples, train: TrainSettings, seed: int, processor: Any) -> None:
        if data.labels is None or not len(data):
            raise DataError("Adapters of a classifier are trained on pictures with labels.", "Name the label column with `label`.")
        self.data, self.length = data, train.steps * train.batch
        self.order = Passes(len(data), derive(seed, "order"))

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, items: list[int]) -> dict[str, torch.Tensor]:
        rows = [self.order[item] for item in items]
        assert self.data.labels is not None
        return {**{name: value[rows] for name, value in self.data.inputs.items()}, "labels": self.data.labels[rows]}


class _Texts(torch.utils.data.Dataset):
    """Batches of prompts with their answers, padded on the left; learned from: the answer and the end of text after it, if there is one."""

    def __init__(self, model: Any, data: Examples, train: TrainSettings, seed: int, processor: Any) -> None:
        if processor is None or not len(data):
            raise DataError("Adapters of a language model are trained on prompts and answers.", "Give rows, and the model's tokenizer.")
        end = processor.eos_token_id
        self.rows = []
        for prompt, answer in zip(data.column("prompt", "train"), data.column("answer", "train"), strict=True):
            asked = prompt_tokens(processor, str(prompt))
            said = (*answer_tokens(processor, str(answer), str(prompt)), *(() if end is None else (end,)))
            self.rows.append(((*asked, *said), len(asked)))
        self.anatomy, self.length = Anatomy.of(model), train.steps * train.batch
        self.order = Passes(len(self.rows), derive(seed, "order"))

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, items: list[int]) -> dict[str, torch.Tensor]:
        chosen = [self.rows[self.order[item]] for item in items]
        batch = {name: value.cpu() for name, value in batch_of(self.anatomy, [row for row, _ in chosen]).items()}
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        for line, (row, asked) in zip(labels, chosen, strict=True):
            line[: len(line) - len(row) + asked] = IGNORED
        return {**batch, "labels": labels}
