"""Games of blocks: all coalitions in one walk against one plain pass a coalition, and what the estimators cost and err.

Adapters of the lab's ViT (6 blocks: 64 coalitions, 200 pictures) and of a random decoder of 10 blocks (1,024 coalitions, 4 rows). Values
are compared first; both sides run the same rows. Estimators: root mean square error against the exact values, as a share of the exact
values' spread, at about equal numbers of coalitions, over 20 seeds.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import peft
import torch
from common import arguments, paired_seconds, write_result
from transformers import LlamaConfig, LlamaForCausalLM

from trocar import lab
from trocar.adapt.copra.training import target_modules
from trocar.evaluate import Task
from trocar.locate.games import adapter_game
from trocar.locate.shapley import coalitions, exact, shapley_values
from trocar.trace.adapters import AdapterSwitches, adapter_groups

BATCH, SEEDS = 256, 20


def adapted(model: Any) -> Any:
    """LoRA with random content on every block."""
    names, _ = target_modules(model, ("q", "k", "v"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False)).eval()


def vit(rows: int) -> tuple[Any, dict[str, Any], Any]:
    model, _ = lab.load("vit-cifar-rare")
    pictures = lab.load_examples({"source": "lab:cifar-rare", "where": {"role": "random"}, "limit": rows}, model)
    task = Task.of(model, pictures)
    return adapted(model), dict(task.inputs), task.scored


def decoder(blocks: int, rows: int) -> tuple[Any, dict[str, Any], Any]:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=blocks, num_attention_heads=4, vocab_size=256)
    inputs = {"input_ids": torch.randint(3, 256, (rows, 12), generator=torch.Generator().manual_seed(1))}

    def scored(output: Any, index: torch.Tensor) -> torch.Tensor:
        return output.logits[:, -1].log_softmax(-1)[:, 7]

    return adapted(LlamaForCausalLM(config)), inputs, scored


def one_by_one(model: Any, inputs: dict[str, Any], metric: Any, masks: np.ndarray) -> np.ndarray:
    """A plain pass over all rows for every coalition."""
    rows = torch.arange(len(next(iter(inputs.values()))))
    found = []
    with torch.no_grad(), AdapterSwitches(adapter_groups(model)) as switches:
        for mask in masks:
            switches.set(mask.tolist())
            found.append(float(metric(model(**inputs), rows).double().mean()))
    return np.array(found)


def compare(name: str, model: Any, inputs: dict[str, Any], metric: Any, repeats: int) -> dict[str, Any]:
    game = adapter_game(model, inputs, metric, batch_size=BATCH)
    masks = coalitions(len(game.players))
    ours, peer = game(masks), one_by_one(model, inputs, metric, masks)
    np.testing.assert_allclose(ours, peer, rtol=1e-4, atol=1e-5)
    timed = paired_seconds(lambda: game(masks), lambda: one_by_one(model, inputs, metric, masks), repeats)
    return {"task": f"{name}, {len(masks)} coalitions", "peer": "one pass a coalition", **timed}


def errors(name: str, model: Any, inputs: dict[str, Any], metric: Any) -> list[dict[str, Any]]:
    """Both estimators at about equal cost."""
    game = adapter_game(model, inputs, metric, batch_size=BATCH)
    players = len(game.players)
    table = game(coalitions(players))

    class Known:
        players = game.players

        def __call__(self, masks: np.ndarray) -> np.ndarray:
            return table[masks @ (2 ** np.arange(players))]

    truth, rows = exact(Known()), []
    for orders in (4, 8, 16):
        ways: dict[str, Any] = {
            "permutation": {"orders": orders},
            "permutation, not antithetic": {"orders": orders, "antithetic": False},
            "multilinear": {"nodes": max(1, orders // 4), "samples": 4},
        }
        for way, settings in ways.items():
            found = [shapley_values(Known(), way.split(",")[0], seed=seed, **settings) for seed in range(SEEDS)]  # type: ignore[arg-type]
            error = [float(np.sqrt(((one.values - truth) ** 2).mean()) / truth.std()) for one in found]
            rows.append(
                {"game": name, "estimator": way, "asked": orders * players, "evaluated": round(np.mean([one.evaluations for one in found])),
                 "error": float(np.mean(error)), "worst of the seeds": max(error)}
            )  # fmt: skip
    return rows


def main() -> None:
    options = arguments("shapley", __doc__ or "")
    os.environ.setdefault("TROCAR_PROGRESS", "0")
    torch.set_num_threads(1)
    repeats, blocks = (2, 8) if options.quick else (3, 10)
    games = {"lab ViT, 200 pictures": vit(200), f"decoder of {blocks} blocks, 4 rows": decoder(blocks, 4)}
    timings = [compare(name, *parts, repeats) for name, parts in games.items()]
    real = [row for name, parts in games.items() for row in errors(name, *parts)]
    write_result(options.out, "shapley", list(range(SEEDS)), {"batch": BATCH}, (), timings, real)


if __name__ == "__main__":
    main()
