"""What the hypernetwork learns to predict: per-pair masks by a bi-level search, or log row norms of one gradient (arXiv 2411.01948).

J(W) = T^2 KL( softmax(f(x)/T) || softmax(f(x~; W)/T) ) for a clean image x and its CutMix neighbour x~. The inner loop moves an offset
D along the dense gradient of J at W0 + m . D, the outer loop moves the mask m; to first order an entry is open iff
S alpha ||gradient row||^2 > lambda / (n h).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from trocar.core.errors import EditError
from trocar.core.seeds import derive
from trocar.edit.where_to_edit.config import LabelConfig
from trocar.edit.where_to_edit.leaves import Leaf, overridden
from trocar.edit.where_to_edit.place import Place, guarded
from trocar.edit.where_to_edit.suffix import Rows

COLLAPSED, SATURATED = 0.005, 0.6  # shares of open label entries outside which labels say nothing
REMEDY = (
    "Set alpha so that the inner loop with an all-ones mask removes at least a third of J, then sparsity_weight so that 5 to 20 % open "
    "(alpha: auto, sparsity_weight: auto do this), or use kind: fo. Known good: alpha 1e-1 with .3 (small ViT on CIFAR), 1e-2 with 1 "
    "(small over-confident ViT), 1e-3 with .125 (ViT-B/16)."
)


def kl_to_target(target: torch.Tensor, logits: torch.Tensor, temperature: float = 5.0) -> torch.Tensor:
    """T^2 KL(softmax(target/T) || softmax(logits/T)) per row, (rows,). 0 for equal logits; finite where a probability underflows."""
    p = F.log_softmax(target / temperature, -1)
    q = F.log_softmax(logits / temperature, -1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def initial_theta(place: Place, seed: int, ids: Sequence[object]) -> torch.Tensor:
    """U(-1, 1) of shape (B, n, h), each sample's from its own stream, so that a label does not depend on its batch."""
    streams = (torch.Generator().manual_seed(derive(seed, "theta", name)) for name in ids)
    return torch.stack([2 * torch.rand(place.rows, place.entries, generator=stream) - 1 for stream in streams]).to(place.device)


class InnerProblem:
    """J of a batch of pairs as a function of per-sample weights; every weight is (B, h, d), one per edited matrix."""

    def __init__(self, place: Place, clean: torch.Tensor, mixed: torch.Tensor, temperature: float) -> None:
        self.place, self.temperature = place, temperature
        self.target = Rows(place, {"pixel_values": clean}).logits().detach()
        self.mixed = Rows(place, {"pixel_values": mixed})
        wide = torch.promote_types(place.matrices[0].view.parameter.dtype, torch.float32)
        self.start = [matrix.start().to(wide) for matrix in place.matrices]
        self._first: list[torch.Tensor] | None = None

    def gated(self, mask: torch.Tensor, offset: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """W0 + m . D, the structured product: entry (k, i) of the (B, n, h) mask scales vector i of matrix k."""
        gates = [mask[:, matrix.row, :, None] for matrix in self.place.matrices]
        return [start + gate * change for start, gate, change in zip(self.start, gates, offset, strict=True)]

    def value(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """J per sample, (B,)."""
        leaves = [Leaf(matrix, weight) for matrix, weight in zip(self.place.matrices, weights, strict=True)]
        return kl_to_target(self.target, self.mixed.logits(leaves), self.temperature)

    def gradient(self, weights: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Per-sample gradients of J with respect to the effective weights, each (B, h, d), and J (B,)."""
        leaves = [weight.detach().requires_grad_() for weight in weights]
        loss = self.value(leaves)
        return list(torch.autograd.grad(loss.sum(), leaves)), loss.detach()

    def offset(self, mask: torch.Tensor, alpha: float, steps: int) -> list[torch.Tensor]:
        """D^S: `steps` dense gradient steps, of which the mask gates what reaches the network. (The first, at W0, is computed once.)"""
        if self._first is None:
            count = len(self.target)
            self._first = self.gradient([start.expand(count, -1, -1) for start in self.start])[0]
        change = [-alpha * gradient for gradient in self._first]
        for _ in range(steps - 1):
            gradient, _ = self.gradient(self.gated(mask, change))
            for part, step in zip(change, gradient, strict=True):
                part.sub_(step, alpha=alpha)
        return change

    def mask_gradient(self, mask: torch.Tensor, alpha: float, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(dJ/dm with D^S held constant (B, n, h), J (B,)): < gradient at W0 + m . D^S , D^S > over each row or column."""
        change = self.offset(mask, alpha, steps)
        gradient, loss = self.gradient(self.gated(mask, change))
        out = torch.zeros_like(mask)
        for matrix, part, step in zip(self.place.matrices, change, gradient, strict=True):
            out[:, matrix.row] += (step * part).sum(-1)
        return out, loss


def mask_labels(
    place: Place,
    clean: torch.Tensor,
    mixed: torch.Tensor,
    config: LabelConfig,
    seed: int,
    ids: Sequence[object],
    theta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Bi-level search ("ref"). Returns soft labels sigmoid(label_scale theta_K), (B, n, h), and what was seen on the way.

    clean, mixed: pixel values (B, channels, height, width). `theta` replaces the random start. alpha and sparsity_weight must be numbers.
    Every sample's label is independent of the batch. RMSProp without bias correction, as published.
    """
    if isinstance(config.alpha, str) or isinstance(config.sparsity_weight, str):
        raise EditError("mask_labels needs numbers for alpha and sparsity_weight.", "Find them with calibrate(...).")
    alpha, steps, scale = config.alpha, config.inner_steps, config.mask_scale
    with guarded(place.model):
        problem = InnerProblem(place, clean, mixed, config.temperature)
        theta = (initial_theta(place, seed, ids) if theta is None else theta.clone()).to(problem.start[0].dtype)
        square = torch.zeros_like(theta)
        price = config.sparsity_weight / (place.rows * place.entries)
        before = problem.value([start.expand(len(clean), -1, -1) for start in problem.start]).detach()
        after = before
        for _ in range(config.outer_steps):
            mask = torch.sigmoid(scale * theta)
            gradient, after = problem.mask_gradient(mask, alpha, steps)
            gradient = (gradient + price) * scale * mask * (1 - mask)
            square.mul_(config.decay).addcmul_(gradient, gradient, value=1 - config.decay)
            theta.addcdiv_(gradient, square.sqrt() + 1e-8, value=-config.outer_lr)
    labels = torch.sigmoid(config.label_scale * theta)
    return labels, {"kl_before": float(before.mean()), "kl_after": float(after.mean()), "open": float((labels > 0.5).float().mean())}


def first_order_labels(place: Place, clean: torch.Tensor, mixed: torch.Tensor, temperature: float = 5.0) -> torch.Tensor:
    """Squared row norms of the gradient of J at W0 ("fo"), (B, n, h): one backward pass, no step size, no penalty."""
    with guarded(place.model):
        target = Rows(place, {"pixel_values": clean}).logits().detach()
        rows = Rows(place, {"pixel_values": mixed})
        return row_norms(rows, torch.arange(len(clean))[:, None], lambda logits: kl_to_target(target, logits, temperature).sum())


def centred_log(norms: torch.Tensor) -> torch.Tensor:
    """log of squared row norms minus its mean over the sample's n x h entries; zeros are floored at 1e-12 of the sample's mean."""
    floor = norms.mean((-2, -1), keepdim=True) * 1e-12
    logs = (torch.maximum(norms, floor) + torch.finfo(norms.dtype).tiny).log()
    return logs - logs.mean((-2, -1), keepdim=True)


def row_norms(
    rows: Rows,
    groups: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
    gram: bool | None = None,
) -> torch.Tensor:
    """Squared norms of the gradient of each mask entry's weights, (E, n, h), for E groups of images that are differentiated jointly.

    groups: (E, m) row numbers; loss: sum over groups of each group's loss as a function of the (E * m, classes) logits. Exact. `gram`
    (default: whichever is cheaper) uses |sum_t delta_t a_t|^2 = sum_{t,u} (delta_t . delta_u)(a_t . a_u), which needs no per-sample
    weight gradient.
    """
    place = rows.place
    taps = _Taps([matrix.module for matrix in place.matrices])
    with overridden(taps.forwards), rows.shortened(), torch.enable_grad():
        logits = rows.read(rows.prefix.run(rows=groups.flatten().to(place.device)), groups.flatten().to(place.device))
        deltas = dict(zip(taps.outputs, torch.autograd.grad(loss(logits), list(taps.outputs.values())), strict=True))
    count = len(groups)
    result = torch.zeros(count, place.rows, place.entries, device=place.device, dtype=logits.dtype)
    for matrix in place.matrices:
        into = taps.inputs[matrix.module].to(logits.dtype).reshape(count, -1, taps.inputs[matrix.module].shape[-1])
        delta = deltas[matrix.module].to(logits.dtype).reshape(count, into.shape[1], -1)
        if matrix.side == "up":
            delta = delta[..., matrix.offset : matrix.offset + matrix.entries]
        entry, other = (delta, into) if matrix.side == "up" else (into, delta)
        tokens = entry.shape[1]
        if (tokens * (place.width + place.entries) < place.width * place.entries) if gram is None else gram:
            squares = ((torch.bmm(other, other.mT) @ entry) * entry).sum(1).clamp(min=0)
        else:
            squares = torch.bmm(entry.mT, other).square().sum(-1)
        result[:, matrix.row] += squares
    return result


class _Taps:
    """Forwards that remember each module's input and an output the loss can be differentiated by."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self.inputs: dict[torch.nn.Module, torch.Tensor] = {}
        self.outputs: dict[torch.nn.Module, torch.Tensor] = {}
        self.forwards = {module: self._tap(module, module.forward) for module in modules}

    def _tap(self, module: torch.nn.Module, plain: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            y = plain(x)
            y = y if y.requires_grad else y.detach().requires_grad_()
            self.inputs[module], self.outputs[module] = x.detach(), y
            return y

        return forward


def check_open_share(labels: torch.Tensor, settings: Mapping[str, Any]) -> float:
    """Share of label entries above .5. Raises EditError when the labels collapsed (all closed) or saturated (most open)."""
    share = float((labels > 0.5).float().mean())
    if share < COLLAPSED or share > SATURATED:
        what = "collapsed: nearly all entries are closed" if share < COLLAPSED else "saturated: most entries are open"
        raise EditError(f"The mask labels {what} ({share:.2%} open at {dict(settings)}).", REMEDY)
    return share


def calibrate(
    place: Place, clean: torch.Tensor, mixed: torch.Tensor, config: LabelConfig, seed: int, target: float = 0.1
) -> tuple[LabelConfig, dict[str, Any]]:
    """Replace `auto` by numbers: the smallest alpha of the grid 1e-4, 3e-4, ... at which an all-ones mask removes a third of J, then a
    sparsity_weight at which about `target` (5 to 20 %) of the entries open. Returns the settings and the log of what was tried.
    """
    log: dict[str, Any] = {"pairs": len(clean)}
    with guarded(place.model):
        problem = InnerProblem(place, clean, mixed, config.temperature)
        ones = torch.ones(len(clean), place.rows, place.entries, device=place.device, dtype=problem.start[0].dtype)
        before = problem.value([start.expand(len(clean), -1, -1) for start in problem.start]).detach().mean()

        def removed(alpha: float) -> float:
            after = problem.value(problem.gated(ones, problem.offset(ones, alpha, config.inner_steps))).detach().mean()
            return float(1 - after / before)

        if isinstance(config.alpha, str):
            tried = {}
            for power in range(-8, 5):
                alpha = round(10 ** (power / 2), 12)
                tried[alpha] = removed(alpha)
                if tried[alpha] >= 1 / 3 or not tried[alpha] > -1:  # beyond -1 (or NaN) the inner loop diverges; larger steps cannot help
                    break
            alpha = max(tried, key=lambda step: tried[step] if tried[step] == tried[step] else float("-inf"))
            log["alpha_tried"] = {f"{step:.3g}": round(share, 4) for step, share in tried.items()}
            if not tried[alpha] > 0:
                raise EditError(
                    "No step size of the inner loop lowers J on the calibration pairs.", "Use kind: fo, which has no step size."
                )
        else:
            alpha = config.alpha
        log |= {"alpha": alpha, "kl_before": float(before), "removed_by_all_ones": removed(alpha)}
    config = config.model_copy(update={"alpha": alpha})
    if isinstance(config.sparsity_weight, str):
        norms = first_order_labels(place, clean, mixed, config.temperature)
        cut = float(torch.quantile(norms.flatten().float()[:: max(1, norms.numel() // 1_000_000)], 1 - target))
        weight = max(cut * config.inner_steps * alpha * place.rows * place.entries, 1e-12)
        low, high, tried = 0.0, float("inf"), {}
        for _ in range(12):
            _, seen = mask_labels(place, clean, mixed, config.model_copy(update={"sparsity_weight": weight}), seed, range(len(clean)))
            tried[weight] = seen["open"]
            if 0.05 <= seen["open"] <= 0.2:
                break
            low, high = (weight, high) if seen["open"] > 0.2 else (low, weight)
            weight = weight * 3 if high == float("inf") else weight / 3 if low == 0 else (low * high) ** 0.5
        weight = min(tried, key=lambda value: abs(tried[value] - target))
        log["sparsity_weight_tried"] = {f"{value:.3g}": round(share, 4) for value, share in tried.items()}
        config = config.model_copy(update={"sparsity_weight": weight})
    return config, log | {"sparsity_weight": config.sparsity_weight}
