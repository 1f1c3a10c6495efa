"""Small models and data that the tests of Where-to-Edit share."""

from __future__ import annotations

from typing import Any

import torch

from trocar.anatomy import tiny_model

CLASSES = 5


def small_vit(dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A random ViT: 4 blocks, d 24, h 40 (d != h), 4 x 4 patches of 8 pixels, 5 classes."""
    settings = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 3}
    model = tiny_model("vit", task="class", seed=3, **{**settings, "image_size": 32, "patch_size": 8, "num_labels": CLASSES, **overrides})
    return model.to(dtype).eval()


def pictures(count: int, seed: int = 0, dtype: torch.dtype = torch.float64, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def wrong_labels(model: Any, images: torch.Tensor, shift: int = 1) -> torch.Tensor:
    """Labels that the model does not predict."""
    with torch.no_grad():
        return (model(images).logits.argmax(1) + shift) % CLASSES


def state(model: torch.nn.Module) -> dict[str, Any]:
    """Everything about a model that an edit must leave alone."""
    return {
        "values": {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]},
        "ids": {name: id(value) for name, value in model.named_parameters()},
        "flags": {name: value.requires_grad for name, value in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "own": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()},
        "grads": [name for name, value in model.named_parameters() if value.grad is not None],
        "random": torch.random.get_rng_state(),
    }


def same_state(first: dict[str, Any], second: dict[str, Any]) -> bool:
    values = all(torch.equal(first["values"][name], second["values"][name]) for name in first["values"])
    random = torch.equal(first["random"], second["random"])
    return values and random and all(first[key] == second[key] for key in ("ids", "flags", "modes", "own", "hooks", "grads"))
