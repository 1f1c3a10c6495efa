"""Masked fine-tuning of many edits at once, each on its own copy of its open entries (arXiv 2411.01948, section "how to edit").

Only open rows and columns are leaves: gradients, optimiser state and memory shrink with `keep`, and closed entries cannot change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from trocar.core.seeds import generator
from trocar.edit.where_to_edit.config import EditConfig
from trocar.edit.where_to_edit.labels import kl_to_target
from trocar.edit.where_to_edit.leaves import AnyLeaf, Leaf, LowRankLeaf, WholeLeaf
from trocar.edit.where_to_edit.place import Place
from trocar.edit.where_to_edit.suffix import Rows

EPS = 1e-8  # of RMSProp (code)
WORKING_BYTES = 256 << 20  # leaves, gradients and optimiser state of the edits that run together


def open_leaves(place: Place, masks: torch.Tensor) -> list[AnyLeaf]:
    """Leaves for E edits from their masks (E, n, h), starting at the model's weights, in at least float32.

    Matrices in which nothing is open have none. Above .6 of h open the whole matrix is the leaf and closed entries get no update.
    """
    leaves: list[AnyLeaf] = []
    for matrix in place.matrices:
        opened = masks[:, matrix.row].to(place.device)
        count = int(opened.sum(1).max())
        if count == 0:
            continue
        start = matrix.start()
        start = start.to(torch.promote_types(start.dtype, torch.float32))
        if count > 0.6 * matrix.entries:
            weight = start.expand(len(masks), -1, -1).clone(memory_format=torch.contiguous_format)
            leaves.append(Leaf(matrix, weight, None, None if bool(opened.all()) else opened))
        else:
            index = opened.sort(dim=1, descending=True, stable=True).indices[:, :count].contiguous()
            valid = opened.gather(1, index)
            leaves.append(Leaf(matrix, start[index], index, None if bool(valid.all()) else valid))
    return leaves


def low_rank_leaves(place: Place, names: Sequence[object], rank: int, seed: int) -> list[AnyLeaf]:
    """LoRA on every edited matrix: A (rank, in) uniform as a fresh linear layer's, B (out, rank) zero, scale 1."""
    leaves: list[AnyLeaf] = []
    for number, matrix in enumerate(place.matrices):
        inputs, outputs = (matrix.width, matrix.entries) if matrix.side == "up" else (matrix.entries, matrix.width)
        draws = [torch.rand(rank, inputs, generator=generator(seed, "lora", name, number)) for name in names]
        a = ((2 * torch.stack(draws) - 1) / inputs**0.5).to(place.device)
        b = torch.zeros(len(names), outputs, rank, device=place.device)
        leaves.append(LowRankLeaf(matrix, b, a) if matrix.side == "up" else LowRankLeaf(matrix, a.mT.contiguous(), b.mT.contiguous()))
    return leaves


def parts(leaf: AnyLeaf) -> list[torch.Tensor]:
    """The trainable tensors of a leaf."""
    return [leaf.left, leaf.right] if isinstance(leaf, LowRankLeaf) else [leaf.weight]


@dataclass
class Course:
    """How one edit went. ce, margin: mean cross-entropy and smallest logit margin of the right class over the edit images."""

    status: str = ""
    steps: int = 0
    ce_before: float = float("nan")
    margin_before: float = float("nan")
    right_before: bool = False
    ce: float = float("nan")
    margin: float = float("nan")
    right: bool = False
    shrunk_to: float = 1.0
    leaves: list[AnyLeaf] = field(default_factory=list)  # of this edit alone (E = 1); empty where nothing changed

    def log(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "leaves"}


class Optimiser:
    """RMSProp without bias correction as published (first update 10 lr per entry), or SGD with momentum, or AdamW; state per edit."""

    def __init__(self, config: EditConfig, leaves: Sequence[AnyLeaf]) -> None:
        self.config, self.step_number = config, 0
        slots = {"rmsprop": 1, "sgd": 1 if config.momentum else 0, "adamw": 2}[config.optimiser]
        self.state = [[torch.zeros_like(part) for _ in range(slots)] for leaf in leaves for part in parts(leaf)]

    def take(self, edits: torch.Tensor) -> None:
        self.state = [[slot[edits] for slot in slots] for slots in self.state]

    def step(self, leaves: Sequence[AnyLeaf], gradients: Sequence[torch.Tensor]) -> None:
        """Update the leaves in place. Padding and closed entries have zero gradient, state and decay, so they keep their bits."""
        config = self.config
        self.step_number += 1
        flat = [(leaf, part) for leaf in leaves for part in parts(leaf)]
        for (leaf, weight), gradient, state in zip(flat, gradients, self.state, strict=True):
            valid = leaf.valid if isinstance(leaf, Leaf) else None
            if config.penalty and config.penalty_weight and not isinstance(leaf, LowRankLeaf):
                change = weight - leaf.origin()
                gradient = gradient + config.penalty_weight * (change.sign() if config.penalty == "l1" else change)
            if valid is not None:
                gradient = gradient * valid[..., None]
            if self.step_number == 1 and config.first_step == "sgd":
                weight.sub_(gradient, alpha=config.first_step_lr)
            elif config.optimiser == "rmsprop":
                state[0].mul_(config.decay).addcmul_(gradient, gradient, value=1 - config.decay)
                weight.addcdiv_(gradient, state[0].sqrt().add_(EPS), value=-config.lr)
            elif config.optimiser == "sgd":
                if config.momentum:
                    gradient = state[0].mul_(config.momentum).add_(gradient)
                weight.sub_(gradient, alpha=config.lr)
            else:
                if config.weight_decay:
                    weight.sub_(weight if valid is None else weight * valid[..., None], alpha=config.lr * config.weight_decay)
                state[0].lerp_(gradient, 0.1)
                state[1].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                unbiased = (state[1] / (1 - 0.999**self.step_number)).sqrt_().add_(EPS)
                weight.addcdiv_(state[0], unbiased, value=-config.lr / (1 - 0.9**self.step_number))


@dataclass
class Judged:
    """The edit images of each active edit: loss (A,), margin (A,), right (A,), satisfied (A,)."""

    loss: torch.Tensor
    margin: torch.Tensor
    right: torch.Tensor
    satisfied: torch.Tensor


def judge(logits: torch.Tensor, labels: torch.Tensor, config: EditConfig) -> Judged:
    """logits (A * m, classes), labels (A, m)."""
    flat = labels.flatten()
    loss = F.cross_entropy(logits, flat, reduction="none").view(labels.shape).mean(1)
    seen = logits.detach()
    own = seen.gather(1, flat[:, None])
    others = seen.scatter(1, flat[:, None], float("-inf"))
    margin = (own[:, 0] - others.amax(1)).view(labels.shape).amin(1)
    right = (seen.argmax(1) == flat).view(labels.shape).all(1)
    enough = loss.detach() <= config.stop_ce if config.stop_margin is None else margin >= config.stop_margin
    return Judged(loss, margin, right, right & enough)


def run_edits(
    rows: Rows, groups: torch.Tensor, labels: torch.Tensor, leaves: Sequence[AnyLeaf], config: EditConfig, ordinary: Rows | None = None
) -> list[Course]:
    """Edit E groups of m images, (E, m) row numbers and labels, until each satisfies the stop rule; finished ones leave the batch.

    The stop rule (published): every image of the edit is right and its mean cross-entropy at most stop_ce, checked before every step and
    after the last. A loss that is not finite ends the edit with the model's own weights. Call inside `guarded(model)`.
    """
    courses = [Course() for _ in groups]
    active = torch.arange(len(groups))
    labels = labels.to(rows.place.device)
    weights = [part.requires_grad_() for leaf in leaves for part in parts(leaf)]
    optimiser = Optimiser(config, leaves)
    base = ordinary.logits().detach() if ordinary is not None and config.locality_weight else None
    for step in range(config.steps + 1):
        logits = rows.logits(leaves, groups[active].flatten())
        judged = judge(logits, labels[active.to(labels.device)], config)
        loss = judged.loss.detach()
        going = []
        for place, number in enumerate(active.tolist()):
            course = courses[number]
            course.steps, course.ce, course.margin = step, float(loss[place]), float(judged.margin[place])
            course.right = bool(judged.right[place])
            if step == 0:
                course.ce_before, course.margin_before, course.right_before = course.ce, course.margin, course.right
                idle = course.right and (not config.force or bool(judged.satisfied[place]))
                course.status = "nothing to do" if idle or config.steps == 0 or not leaves else ""
            elif judged.satisfied[place]:
                course.status = "converged"
            elif step == config.steps:
                course.status = "not converged"
            if not loss[place].isfinite():
                course.status = "diverged"
            if not course.status:
                going.append(place)
            elif course.status in ("converged", "not converged"):
                course.leaves = [leaf.take(torch.tensor([place], device=rows.place.device)) for leaf in leaves]
        if not going:
            break
        total = judged.loss.sum()
        if base is not None and ordinary is not None:
            total = total + config.locality_weight * _drift(ordinary, base, leaves, len(active), config.locality_temperature)
        gradients = torch.autograd.grad(total, weights)
        with torch.no_grad():
            if len(going) < len(active):
                chosen = torch.tensor(going, device=rows.place.device)
                active = active[going]
                leaves = [leaf.take(chosen) for leaf in leaves]
                gradients = [gradient[chosen] for gradient in gradients]
                optimiser.take(chosen)
                weights = [part for leaf in leaves for part in parts(leaf)]
            for weight in weights:
                weight.requires_grad_(False)
            optimiser.step(leaves, gradients)
            for weight in weights:
                weight.requires_grad_()
    if config.shrink:
        for course, group, label in zip(courses, groups, labels, strict=True):
            if course.status == "converged":
                shrink(rows, group, label, course, config)
    return courses


def _drift(ordinary: Rows, base: torch.Tensor, leaves: Sequence[AnyLeaf], edits: int, temperature: float) -> torch.Tensor:
    """Sum over edits of the mean KL to the base model on ordinary rows."""
    now = ordinary.logits(leaves, torch.arange(ordinary.count).repeat(edits))
    return kl_to_target(base.repeat(edits, 1), now, temperature).sum() / ordinary.count


def shrink(rows: Rows, group: torch.Tensor, labels: torch.Tensor, course: Course, config: EditConfig) -> None:
    """Bisect s in W0 + s (W - W0) to the smallest s that still satisfies the stop rule; the course keeps the shrunk weights."""

    def at(share: float) -> list[AnyLeaf]:
        moved: list[AnyLeaf] = []
        for leaf in course.leaves:
            if isinstance(leaf, Leaf):
                origin = leaf.origin()
                moved.append(Leaf(leaf.matrix, origin + share * (leaf.weight - origin), leaf.index, leaf.valid))
            elif isinstance(leaf, WholeLeaf):
                moved.append(WholeLeaf(leaf.model, leaf.name, leaf.origin() + share * (leaf.weight - leaf.origin())))
            else:
                moved.append(LowRankLeaf(leaf.matrix, leaf.left, share * leaf.right))
        return moved

    with torch.no_grad():
        low, high = 0.0, 1.0
        for _ in range(config.shrink_steps):
            middle = (low + high) / 2
            good = bool(judge(rows.logits(at(middle), group), labels[None], config).satisfied)
            low, high = (low, middle) if good else (middle, high)
        course.shrunk_to = high
        if high < 1:
            course.leaves = at(high)
            judged = judge(rows.logits(course.leaves, group), labels[None], config)
            course.ce, course.margin = float(judged.loss), float(judged.margin)


def edits_at_once(place: Place, keep: float, images: int, config: EditConfig) -> int:
    """How many edits to run together so that weights, gradients and state stay within the working memory."""
    if config.batch is not None:
        return config.batch
    per_edit = len(place.matrices) * keep * place.entries * place.width * 4 * 5 * (2 if keep < 0.6 else 1)
    return max(1, min(32, int(WORKING_BYTES // max(per_edit, 1))))
