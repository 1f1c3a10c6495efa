"""How a weight's codes are chosen: nearest, each row's best clip, GPTQ, GPTQ towards the float model. Floor 5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from trocar.core.errors import EditError
from trocar.patch.quantised import Quantiser, codes, grid
from trocar.patch.quantised.numbers import in_groups, snap

RATIOS = tuple(1 - 0.02 * i for i in range(26))  # 1.0 .. 0.5
RIDGES = (0.01, 0.1, 1.0)
DAMPING = 0.01  # of the mean diagonal (arXiv 2210.17323, section 3.4)

Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # codes (O, C), step and zero (O, groups)


def nearest(weight: torch.Tensor, quantiser: Quantiser, clip: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None) -> Codes:
    """Round to nearest. weight (O, C); clip as in `grid`."""
    step, zero = grid(weight, quantiser, clip)
    return codes(weight, step, zero, quantiser), step, zero


def best_clip(
    weight: torch.Tensor, quantiser: Quantiser, importance: torch.Tensor | None = None, ratios: Sequence[float] = RATIOS
) -> torch.Tensor:
    """The clip ratio of every row (and group) with the least squared rounding error, (O, groups).

    importance: (C,) non-negative weights of the columns' errors, such as the mean square of their inputs; 1 by default.
    """
    wide = in_groups(weight.float(), quantiser)
    weighting = None if importance is None else in_groups(importance.to(wide), quantiser)
    best = torch.full(wide.shape[:-1], float("inf"), device=wide.device)
    chosen = torch.ones_like(best)
    for ratio in ratios:
        step, zero = grid(weight, quantiser, ratio)
        error = ((snap(wide, step, zero, quantiser) - zero[..., None]) * step[..., None] - wide).square_()
        total = (error if weighting is None else error * weighting).sum(-1)
        better = total < best
        best, chosen = torch.where(better, total, best), torch.where(better, ratio, chosen)
    return chosen


class Half(NamedTuple):
    """Sums over half of the calibration rows: x^T x, and (f - x)^T x with f the same row in the float model, both (C, C)."""

    hessian: torch.Tensor
    cross: torch.Tensor


def towards(weight: torch.Tensor, one: Half, other: Half, ridges: Sequence[float] = RIDGES) -> torch.Tensor:
    """The weight whose products with the quantised model's inputs x come nearer to the float layer's products with the float model's f.

    W + a W D (H + r)^-1 with D = sum (f - x)^T x and H = sum x^T x. What then is left of the squared error is what GPTQ minimises: the aim
    of GPTAQ (arXiv 2504.02692), by least squares before the columns are rounded rather than column by column. Most of f - x is noise that
    x does not foretell, and so many columns fit much of it by chance; so the ridge r (of the mean diagonal) and the share a are those with
    which what each half of the rows says helps most on the other half. Weights return unchanged if nothing helps. weight: (O, C).
    """
    wide, best = weight.double(), (0.0, 0.0, ridges[-1])
    aims = [wide @ half.cross.double() for half in (one, other)]
    for ridge in ridges:
        agreed, length = 0.0, 0.0
        for (fitted, aim), (held, held_aim) in (((one, aims[0]), (other, aims[1])), ((other, aims[1]), (one, aims[0]))):
            move = _solved(aim, fitted.hessian, ridge)
            agreed += float((move * held_aim).sum())
            length += float(((move @ held.hessian.double()) * move).sum())
        if length > 0 and agreed > 0 and agreed**2 / length > best[0]:
            best = (agreed**2 / length, min(1.0, agreed / length), ridge)
    if best[0] == 0:
        return weight
    return (wide + best[1] * _solved(aims[0] + aims[1], one.hessian + other.hessian, best[2])).to(weight.dtype)


def _solved(aim: torch.Tensor, hessian: torch.Tensor, ridge: float) -> torch.Tensor:
    return torch.cholesky_solve(aim.T, torch.linalg.cholesky(_damped(hessian, ridge))).T


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    quantiser: Quantiser,
    clip: torch.Tensor | None = None,
    *,
    block: int = 128,
    damping: float = DAMPING,
    order: bool = True,
) -> Codes:
    """Round column by column, correcting the columns still to come for the error made so far (arXiv 2210.17323).

    weight: (O, C); hessian: (C, C), the sum of x x^T over the layer's inputs; clip: as in `grid`. The grid is that of the uncorrected
    weight. order: the columns with the largest inputs first. Raises EditError if the Hessian is not positive however it is damped.
    """
    step, zero = grid(weight, quantiser, clip)
    columns = weight.shape[1]
    group = torch.arange(columns, device=weight.device) // (quantiser.group or columns)
    h = hessian.float().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    left = weight.float().clone()
    permutation = h.diagonal().argsort(descending=True, stable=True) if order else torch.arange(columns, device=weight.device)
    left, h, group = left[:, permutation], h[permutation][:, permutation], group[permutation]
    factor = _inverse_factor(h, damping)
    found = torch.empty_like(left)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros_like(left[:, start:end])
        for column in range(start, end):
            one, s, z = left[:, column], step[:, group[column]].to(left), zero[:, group[column]].to(left)
            code = snap(one[:, None, None], s[:, None], z[:, None], quantiser)[:, 0, 0]
            found[:, column] = code
            error = (one - (code - z) * s) / factor[column, column]
            left[:, column + 1 : end] -= error[:, None] * factor[column, column + 1 : end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    whole = torch.empty_like(found)
    whole[:, permutation] = found
    return whole.to(torch.uint8 if quantiser.bits <= 8 else torch.int32), step, zero


def _inverse_factor(h: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of h, damped until it exists."""
    for attempt in range(6):
        lower, failed = torch.linalg.cholesky_ex(_damped(h, damping * 10**attempt))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
    raise EditError("The Hessian of a layer's inputs is not positive definite.", "Give more calibration text, or rounding: nearest.")


def _damped(h: torch.Tensor, damping: float) -> torch.Tensor:
    """h in float64 with a part of its mean diagonal added to the diagonal; the identity where h is zero."""
    h = h.double()
    mean = h.diagonal().mean()
    return h + torch.eye(h.shape[0], dtype=h.dtype, device=h.device) * (damping * mean if mean > 0 else 1.0)
