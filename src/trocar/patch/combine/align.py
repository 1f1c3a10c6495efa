"""LoRA align (LA, after CopRA, arXiv 2410.22911): before fusion, rewrite one adapter's factors so that they lie near another's.

For every invertible P the update (B P)(P^-1 A) is the same. We look for the P (rank x rank, a module) that makes the mismatch of a fusion,
||(B1 - B2 P)(A1 - P^-1 A2)||, small. The papers give the idea and a bound; the search is ours: from the identity, the orthogonal
Procrustes solution, and the least-squares solutions of either factor alone, each refined by quasi-Newton steps; ill-conditioned P
(above 1e4) are rejected and the best is kept, so that the mismatch never grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from trocar.patch.combine.algebra import WORK, Combined, Source, common_modules, factors_of, narrowed
from trocar.patch.combine.fusion import fusion
from trocar.patch.ops.adapter import Adapter, Factors

CONDITION = 1e4
STEPS = 200


def aligned(reference: Source, other: Source) -> Combined:
    """`other` with its factors rewritten towards those of `reference`; its updates stay what they are, up to rounding.

    Rows: `mismatch before` and `after`, relative to the product of the norms, and `note` for modules that were left alone (a factor without
    full rank, as in an untrained adapter). Raises ConfigError as `fusion` does.
    """
    made, rows = {}, []
    for name in common_modules([reference, other], need_rank=True):
        first, second = factors_of(reference, name), factors_of(other, name)
        made[name], row = align(first, second)
        rows.append({"module": name, "rank": second.a.shape[0], **row})
    return Combined(Adapter(made, other.task, other.dropout), rows)


def aligned_fusion(adapters: Sequence[Source], weights: Sequence[float] | None = None) -> Combined:
    """Align all adapters to the first, then fuse."""
    return fusion([adapters[0], *(aligned(adapters[0], other).adapter for other in adapters[1:])], weights)


def align(first: Factors, second: Factors) -> tuple[Factors, dict[str, Any]]:
    """One module: `second`'s factors near those of `first`."""
    # scales go into B, so that the factors of both mean the same
    b1, a1 = first.b.to(WORK) * first.scale, first.a.to(WORK)
    b2, a2 = second.b.to(WORK) * second.scale, second.a.to(WORK)
    if any(int(torch.linalg.matrix_rank(part)) < part.shape[0] for part in (b1.T, a1, b2.T, a2)):
        return second, {"mismatch before": float("nan"), "mismatch after": float("nan"), "note": "a factor has not full rank; left alone"}
    whole = float(b1.norm() * a1.norm() + b2.norm() * a2.norm())
    grams = _Grams(b1, a1, b2, a2, whole)
    identity = torch.eye(len(a1), dtype=WORK)
    left, _, right = torch.linalg.svd(b2.T @ b1 + a2 @ a1.T)
    starts = [identity, left @ right, torch.linalg.lstsq(b2, b1).solution, torch.linalg.lstsq(a1.T, a2.T).solution.T]
    starts = [start for start in starts if float(torch.linalg.cond(start)) <= CONDITION]
    found = [one for start in starts for one in (start, grams.refined(start)) if float(torch.linalg.cond(one)) <= CONDITION]
    best = min(found, key=grams.value)
    before, after = grams.value(identity) ** 0.5, grams.value(best) ** 0.5
    if not after < before:
        return second, {"mismatch before": before, "mismatch after": before, "note": "nothing better was found"}
    a = torch.linalg.solve(best, a2)
    made = narrowed(a, second.b.to(WORK) @ best, second.scale, second)
    return made, {"mismatch before": before, "mismatch after": after, "note": ""}


class _Grams:
    """The squared mismatch as a function of P, from rank x rank products only."""

    def __init__(self, b1: torch.Tensor, a1: torch.Tensor, b2: torch.Tensor, a2: torch.Tensor, whole: float) -> None:
        self.b11, self.b12, self.b22 = b1.T @ b1, b1.T @ b2, b2.T @ b2
        self.a11, self.a12, self.a22 = a1 @ a1.T, a1 @ a2.T, a2 @ a2.T
        self.whole = whole**2

    def of(self, p: torch.Tensor) -> torch.Tensor:
        inverse = torch.linalg.inv(p)
        left = self.b11 - self.b12 @ p - p.T @ self.b12.T + p.T @ self.b22 @ p
        right = self.a11 - self.a12 @ inverse.T - inverse @ self.a12.T + inverse @ self.a22 @ inverse.T
        return (left * right).sum().clamp(min=0) / self.whole

    def value(self, p: torch.Tensor) -> float:
        return float(self.of(p))

    def refined(self, start: torch.Tensor) -> torch.Tensor:
        shape = start.shape

        def both(flat: np.ndarray) -> tuple[float, np.ndarray]:
            p = torch.from_numpy(flat.reshape(shape).copy()).requires_grad_()
            try:
                value = self.of(p)
                (slope,) = torch.autograd.grad(value, p)
            except torch.linalg.LinAlgError:  # a singular P on the way
                return float("inf"), np.zeros_like(flat)
            return float(value.detach()), slope.numpy().reshape(-1)

        with torch.enable_grad():
            found = minimize(both, start.numpy().reshape(-1), jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
        return torch.from_numpy(found.x.reshape(shape).copy())
