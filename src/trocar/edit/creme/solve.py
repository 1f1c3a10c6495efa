"""The least change of a matrix that sends given keys to given values: closed form, float64. No model is needed here.

    min_D  tr(D M D^T)   subject to   D k_i = r_i,  D p_j = 0
    D = R (K^T U)^-1 U^T,   U = M^-1 K - M^-1 P (P^T M^-1 P)^+ P^T M^-1 K

K: keys that are moved, R: by how much their outputs move, P: keys whose outputs stay, M: the second moment of ordinary keys, or the
identity (the published form has one key, M = identity and no P: D = r k^T / |k|^2; arXiv:2402.14328).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trocar.core.errors import EditError

TINY = 1e-12  # a key whose squared length in the metric is below this share of its plain one is no key
FREE = 1e-6  # the least share of a key that has to be left beside the preserved ones
SINGULAR = 1e12  # condition of the keys' Gram matrix above which they cannot be told apart


@dataclass(frozen=True)
class Update:
    """D = left @ right. left: (outputs, m), right: (m, inputs), float64 on the CPU. free: the least share of a key that the preserved ones
    leave; condition: of the keys' Gram matrix."""

    left: torch.Tensor
    right: torch.Tensor
    free: float
    condition: float

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return float(((self.left.T @ self.left) * (self.right @ self.right.T)).sum().clamp_min(0).sqrt())


def least_change(
    keys: torch.Tensor,
    residuals: torch.Tensor,
    moment: torch.Tensor | None = None,
    preserved: torch.Tensor | None = None,
    columns: Sequence[int] | None = None,
    ridge: float = 0.0,
    where: str = "the update",
) -> Update:
    """The least change D with D keys = residuals, D preserved = 0.

    keys: (inputs, m); residuals: (outputs, m); moment: (inputs, inputs), positive definite, None for the identity; preserved: (inputs, p);
    columns: the only inputs whose column may change; ridge: weakens D keys = residuals, added to the Gram matrix of the keys times its
    mean diagonal. Raises EditError naming `where`: a key of length zero, not finite, within the span of the preserved ones, two keys alike.
    """
    size = keys.shape[0]
    keys, residuals = keys.double().cpu(), residuals.double().cpu()
    free_keys, moved = keys, moment
    kept = None if preserved is None or not preserved.numel() else preserved.double().cpu()
    index = None if columns is None else torch.tensor(list(columns))
    if index is not None:
        free_keys = keys[index]
        kept = None if kept is None else kept[index]
        moved = None if moment is None else moment[index][:, index]
    if not (keys.isfinite().all() and residuals.isfinite().all()):
        raise EditError(f"{where}: keys or values are not finite.", "The model overflows there; load it in another dtype.")
    inverse = _inverse(moved, where)
    through = inverse(free_keys)  # M^-1 K
    scale = 1.0 if moved is None else float(moved.diagonal().mean())
    lengths, plain = (free_keys * through).sum(0), (free_keys**2).sum(0)
    if bool((plain == 0).any()) or not bool((lengths * scale > TINY * plain).all()):
        raise EditError(f"{where}: a key has no length (k C^-1 k = {float(lengths.min()):.3g}).", "Use a larger moment_ridge.")
    free = 1.0
    if kept is not None:
        across = inverse(kept)
        through = through - across @ (torch.linalg.pinv(kept.T @ across, rtol=1e-10, hermitian=True) @ (kept.T @ through))
        free = float(((free_keys * through).sum(0) / lengths).min())
        if free < FREE:
            raise EditError(
                f"{where}: the preserved prompts' keys span the edited one (only {max(free, 0):.1e} of it is free).",
                "Preserve fewer prompts, or give preserve_weight so that they are preserved softly.",
            )
    gram = free_keys.T @ through
    gram = (gram + gram.T) / 2
    condition = float(torch.linalg.cond(gram / gram.diagonal().mean()))
    if ridge:
        gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    elif not condition < SINGULAR:
        raise EditError(f"{where}: the keys of {len(gram)} cases cannot be told apart.", "Leave out doubles, or set ridge (say 0.01).")
    right = torch.linalg.solve(gram, through.T)
    if index is not None:
        full = right.new_zeros(right.shape[0], size)
        full[:, index] = right
        right = full
    if not right.isfinite().all():
        raise EditError(f"{where}: the update is not finite.", "Use a larger moment_ridge.")
    return Update(residuals, right, free, condition)


def mixed(moment: torch.Tensor | None, keys: torch.Tensor, weight: float) -> torch.Tensor:
    """A metric in which `keys` (inputs, p) count `weight` times as much as ordinary ones: both moments scaled to a mean diagonal of 1."""
    keys = keys.double().cpu()
    own = keys @ keys.T
    own = own / own.diagonal().mean()
    base = torch.eye(len(own), dtype=own.dtype) if moment is None else moment.double().cpu() / moment.diagonal().mean()
    return base + weight * own


def _inverse(moment: torch.Tensor | None, where: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Multiplication by the inverse of `moment`."""
    if moment is None:
        return lambda matrix: matrix
    factor, info = torch.linalg.cholesky_ex(moment.double().cpu())
    if int(info) or not factor.isfinite().all():
        raise EditError(f"{where}: the second moment is not positive definite.", "Use a larger moment_ridge, or more text.")
    return lambda matrix: torch.cholesky_solve(matrix, factor)
