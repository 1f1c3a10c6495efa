"""How a weight's codes are chosen: nearest, each row's best clip, GPTQ, GPTQ towards the float model. Floor 5."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trocar.core.errors import EditError
from trocar.patch.quantised import Quantiser, codes, grid
from trocar.patch.quantised.numbers import in_groups, snap

RATIOS = tuple(1 - 0.02 * i for i in range(26))  # 1.0 .. 0.5
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


def towards(weight: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """The weight whose products with the quantised model's inputs x come nearest to the float layer's products with the float model's f.

    W + W (sum (f - x)^T x) H^-1 with H = sum x^T x, damped as in GPTQ so that nothing moves where there are no inputs. What is left of the
    squared error is (W' - rounded) H (W' - rounded)^T, which GPTQ then minimises: the aim of GPTAQ (arXiv 2504.02692), reached by least
    squares before the columns are rounded, rather than column by column. weight (O, C); hessian, cross (C, C).
    """
    lower = torch.linalg.cholesky(_damped(hessian, damping))
    moved = torch.cholesky_solve((weight.double() @ cross.double()).T, lower).T
    return (weight.double() + moved).to(weight.dtype)


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
