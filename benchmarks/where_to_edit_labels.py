"""Relation 2 of Where-to-Edit: exact properties of the per-pair mask labels, measured on one base model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from trocar.core.seeds import generator
from trocar.edit.where_to_edit import CutMixConfig, LabelConfig, Place, cutmix_pairs, first_order_labels, mask_labels
from trocar.edit.where_to_edit.cutmix import patch_size
from trocar.edit.where_to_edit.labels import InnerProblem, initial_theta
from trocar.edit.where_to_edit.suffix import guarded


def label_facts(
    model: torch.nn.Module, images: torch.Tensor, found: Mapping[str, float], first: int, seed: int, pairs: int = 32
) -> dict[str, Any]:
    """No-op pairs, small-step limit, neuron permutation, and IoU of two random starts against other samples; `found`: alpha and penalty."""
    place = Place.of(model, first, 3)
    clean, mixed = cutmix_pairs(images, range(pairs), patch_size(model), CutMixConfig(), seed)
    config, names = LabelConfig.parse({"kind": "ref", **found}), list(range(pairs))
    one, seen = mask_labels(place, clean, mixed, config, seed, names)
    two, _ = mask_labels(place, clean, mixed, config, seed + 1, names)
    nothing, _ = mask_labels(place, clean[:8], clean[:8], config, seed, names[:8])
    return {
        "open": seen["open"],
        "kl_before": seen["kl_before"],
        "kl_after": seen["kl_after"],
        "no_op_open": float((nothing > 0.5).float().mean()),
        "no_op_mean": float(nothing.mean()),
        "iou_two_starts": float(_iou(one, two).diagonal().mean()),
        "iou_other_samples": float(_iou(one, one).fill_diagonal_(torch.nan).nanmean()),
        "iou_first_order": float(_iou(one, _as_open(one, first_order_labels(place, clean, mixed))).diagonal().mean()),
        "limit_deviation": _limit(model, place, clean[:8].double(), mixed[:8].double()),
        "permutation": _permutation(model, place, clean[:8], mixed[:8], config, seed),
    }


def _iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x, y = (a > 0.5).flatten(1).float(), (b > 0.5).flatten(1).float()
    both = x @ y.T
    return both / (x.sum(1)[:, None] + y.sum(1)[None] - both).clamp(min=1)


def _as_open(labels: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """First-order labels cut so that each sample opens as many entries as its reference label does."""
    counts = (labels > 0.5).flatten(1).sum(1)
    ranks = norms.flatten(1).argsort(1, descending=True).argsort(1)
    return (ranks < counts[:, None]).float().view_as(labels)


def _limit(model: torch.nn.Module, where: Place, clean: torch.Tensor, mixed: torch.Tensor, steps: int = 5) -> dict[str, float]:
    """|dJ/dm + S alpha ||g||^2| relative to S alpha ||g||^2, for falling alpha, with every entry open; in float64: changes are tiny."""
    place = Place.of(copy.deepcopy(model).double(), where.first, where.blocks)
    squares = first_order_labels(place, clean, mixed)
    with guarded(place.model):
        problem = InnerProblem(place, clean, mixed, 5.0)
        mask = torch.ones_like(squares)
        return {
            f"{alpha:g}": float(
                (problem.mask_gradient(mask, alpha, steps)[0] + steps * alpha * squares).norm() / (steps * alpha * squares).norm()
            )
            for alpha in (0.1, 0.01, 0.001, 0.0001)
        }


def _permutation(
    model: torch.nn.Module, place: Place, clean: torch.Tensor, mixed: torch.Tensor, config: LabelConfig, seed: int
) -> dict[str, float]:
    """Labels of a model whose neurons are permuted (with the random start), put back in order, against those of the model itself."""
    names = list(range(len(clean)))
    order = torch.randperm(place.entries, generator=generator(seed, "permutation"))
    other = copy.deepcopy(model)
    moved = Place.of(other, place.first, place.blocks)
    with torch.no_grad():
        for matrix in moved.matrices:
            module: Any = matrix.module
            weight = module.weight
            if matrix.side == "up":
                weight.copy_(weight[order])
                module.bias.copy_(module.bias[order])
            else:
                weight.copy_(weight[:, order])
    theta = initial_theta(place, seed, names)
    own, _ = mask_labels(place, clean, mixed, config, seed, names, theta)
    back, _ = mask_labels(moved, clean, mixed, config, seed, names, theta[..., order])
    back = back[..., order.argsort()]
    return {"agreement": float(((own > 0.5) == (back > 0.5)).float().mean()), "mean_difference": float((own - back).abs().mean())}
