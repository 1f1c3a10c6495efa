"""Interventions on an implicit answer: does the bridge that a layer holds cause the final answer? Floor 3.

Reference: CREME, arXiv:2402.14328. At the output of a block, at the last token, the logits that the unembedding reads of the bridge's
tokens are suppressed or enhanced, and the forward pass goes on; a control does the same to random tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from trocar.anatomy import Anatomy, Tower
from trocar.anatomy.linear import base_layer
from trocar.core.errors import DataError, UnsupportedModelError
from trocar.core.seeds import generator
from trocar.locate.cases import ends_at, interval, name_in, observe, run_inputs, told
from trocar.locate.scores import How, Scores
from trocar.trace import Add, Point, sweep
from trocar.trace.queries import Mode, answer_tokens, ask, language_tower

ROWS = 8192  # rows of the unembedding that are looked at together
COMPENSATION = 10.0  # CREME's reference code


def unembedding(model: Any) -> torch.Tensor:
    """The model's unembedding W_U, (V, width), detached, not a copy. Raises UnsupportedModelError where it does not read the stream."""
    anatomy = Anatomy.of(model)
    tower = language_tower(anatomy)
    weight = getattr(base_layer(tower.head), "weight", None) if tower.head is not None else None
    if weight is None or weight.ndim != 2 or weight.shape[1] != tower.width or not weight.is_floating_point():
        has = "none" if weight is None else f"one of shape {tuple(weight.shape)}, {weight.dtype}"
        raise UnsupportedModelError(
            f"Acting on token logits needs an unembedding of (vocabulary, {tower.width}); {type(anatomy.model).__name__} has {has}.",
            "Use a language model whose head reads the residual stream, with plain weights.",
        )
    return weight.detach()


def exact_shift(weight: torch.Tensor, tokens: Sequence[int], request: torch.Tensor) -> torch.Tensor:
    """The shortest change of the residual state that changes the tokens' logits exactly as asked, (..., width) float64.

    weight: W_U (V, width); request: (..., len(tokens)). With S the tokens, it is W_S^T (W_S W_S^T)^-1 request, from a QR factorisation of
    W_S^T; nothing of the size of the vocabulary is made. Raises DataError if the tokens' rows are linearly dependent.
    """
    if not tokens:
        return weight.new_zeros(*request.shape[:-1], weight.shape[1], dtype=torch.float64)
    rows, wanted = weight[list(tokens)].double(), request.to(weight.device, torch.float64)
    q, r = torch.linalg.qr(rows.T)
    size = r.diagonal().abs()
    if len(tokens) > rows.shape[1] or float(size.min()) <= 1e-9 * float(size.max()):
        raise DataError(f"The unembedding rows of the tokens {list(tokens)} are linearly dependent.", "Leave out the repeated ones.")
    return torch.linalg.solve_triangular(r.T, wanted.reshape(-1, len(tokens)).T, upper=False).T.reshape(wanted.shape) @ q.T


@dataclass(frozen=True, eq=False)
class LeftInverse:
    """The left inverse A = (W_U^T W_U)^-1 W_U^T of the unembedding, as a Cholesky factor of (width, width) float64."""

    weight: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> LeftInverse:
        """Raises UnsupportedModelError if W_U has no left inverse."""
        gram = sum((part.double().T @ part.double() for part in weight.split(ROWS)), weight.new_zeros((), dtype=torch.float64))
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed):
            raise UnsupportedModelError(
                f"The unembedding of shape {tuple(weight.shape)} has no left inverse: its columns are dependent.", "Use solver='exact'."
            )
        return cls(weight, factor)

    def shift(self, tokens: Sequence[int], request: torch.Tensor) -> torch.Tensor:
        """A dz for a change dz that is `request` (..., len(tokens)) on the tokens and 0 elsewhere, (..., width) float64.

        The logits change by P dz, P the projector on W_U's columns: token i gets P_ii of what was asked (on average width / V), and
        every other token gets something too.
        """
        wanted = request.to(self.weight.device, torch.float64)
        pulled = wanted @ self.weight[list(tokens)].double()
        return torch.cholesky_solve(pulled.reshape(-1, pulled.shape[-1]).T, self.factor).T.reshape(pulled.shape)


def _extremes(weight: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and highest logit of each state (n, width) without a norm, (n,) float64; the vocabulary is gone through in parts."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    low, high = (torch.full((len(states),), sign * torch.inf, dtype=torch.float64, device=states.device) for sign in (1, -1))
    for part in weight.split(ROWS):
        logits = states.to(kind) @ part.to(kind).T
        low, high = torch.minimum(low, logits.amin(1).double()), torch.maximum(high, logits.amax(1).double())
    return low, high


@dataclass(frozen=True, eq=False)
class _Request:
    """One case: its tokens, and how their logits shall change in every layer."""

    weight: torch.Tensor
    states: torch.Tensor  # (layers, width)
    low: torch.Tensor  # (layers,)
    high: torch.Tensor
    action: str
    inverse: LeftInverse | None
    compensation: float
    strength: float

    def change(self, tokens: Sequence[int]) -> torch.Tensor:
        """What is asked of the tokens' logits, (layers, tokens)."""
        logits = self.states.double() @ self.weight[list(tokens)].double().T
        aim = self.low[:, None].minimum(logits) if self.action == "suppress" else self.high[:, None].maximum(2 * logits)
        return self.strength * (aim - logits)

    def shift(self, tokens: Sequence[int], kept: Sequence[int], compensate: bool) -> torch.Tensor:
        """The change of the states, (layers, width) float64, that leaves the logits of the tokens `kept` as they are, or nearly so."""
        asked = self.change(tokens)
        if self.inverse is None:
            return exact_shift(self.weight, [*tokens, *kept], torch.cat([asked, asked.new_zeros(len(asked), len(kept))], 1))
        moved = self.inverse.shift(tokens, asked)
        if compensate and kept and self.compensation:
            lost = -moved @ self.weight[list(kept)].double().T
            moved = moved + self.inverse.shift(kept, self.compensation * lost)
        return moved


@dataclass(frozen=True, eq=False)
class Implicit:
    """Effects of interventions on the implicit answer. clean: the explicit answer's score, (cases,); bridge, control: its change when the
    bridge's tokens, or as many random ones, are acted on at the output of each block, (cases, layers). float64."""

    clean: np.ndarray
    bridge: np.ndarray
    control: np.ndarray
    action: str
    solver: str
    mode: Mode
    tower: Tower = field(repr=False)
    how: How = field(repr=False)

    @property
    def relative(self) -> np.ndarray:
        """The bridge's effect as a share of the clean score, 0 where that is 0, (cases, layers). Look at medians: small scores rule."""
        clean = self.clean[:, None]
        return np.divide(self.bridge, clean, out=np.zeros_like(self.bridge), where=clean > 0)

    def scores(self, which: Literal["bridge", "control", "difference"] = "bridge") -> Scores:
        """Mean effects as Scores of blocks."""
        values = {"bridge": self.bridge, "control": self.control, "difference": self.bridge - self.control}[which].mean(0)
        named = {name_in(self.tower, layer, "block"): float(x) for layer, x in enumerate(values)}
        return Scores("block", self.tower.name, named, self.how.then(which))

    def rows(self, seed: int = 0) -> list[dict[str, Any]]:
        """Rows of a curve: per layer the mean effect on bridge, control, and of their paired difference, with bootstrap intervals."""
        rows = []
        for name, values in (("bridge", self.bridge), ("control", self.control), ("difference", self.bridge - self.control)):
            mean, low, high = interval(values, seed)
            rows += [{"layer": n, "tokens": name, "effect": mean[n], "low": low[n], "high": high[n]} for n in range(len(mean))]
        return rows


def implicit_effects(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    implicit: Sequence[str],
    explicit: Sequence[str],
    *,
    action: Literal["suppress", "enhance"] = "suppress",
    solver: Literal["exact", "pinv"] = "exact",
    strength: float = 1.0,
    compensation: float = COMPENSATION,
    mode: Mode = "sequence",
    seed: int = 0,
    batch_size: int = 32,
    fingerprint: str | None = None,
    **options: Any,
) -> Implicit:
    """How the score of the explicit answer changes when the implicit one is suppressed or enhanced, after every block in turn.

    prompts, implicit, explicit: for each case the prompt, the bridge it goes over, the answer that is scored. action: `suppress` sets the
    bridge's tokens to the lowest logit in the vocabulary, `enhance` to the highest or to twice their own. Logits are those that the
    unembedding reads of the state without the final norm. solver: `exact` realises that change on the bridge's tokens and leaves the
    explicit answer's own logits as they are, so that what remains is the indirect effect; `pinv` is the published form (left inverse of
    the unembedding, which realises about width / V of what is asked) with its `compensation` for the explicit answer (0: none). The
    control acts on as many tokens, drawn from `seed` out of the rest of the vocabulary (`exact` holds the explicit answer there too,
    `pinv` does not compensate). strength: share of the change that is asked for; 1 is the published setting. Where the lowest logit lies
    far below the others (Gemma 3), it wrecks the state whatever the tokens are, which the control shows. options: of `sweep`.

    Tokens of both answers count for the bridge only, with a warning. Raises DataError for unequal numbers, unknown words and settings,
    UnsupportedModelError where the head does not read the residual stream.
    """
    if not len(prompts) == len(implicit) == len(explicit) or action not in ("suppress", "enhance") or solver not in ("exact", "pinv"):
        raise DataError(
            f"{len(prompts)} prompts, {len(implicit)} implicit and {len(explicit)} explicit answers, action '{action}', solver '{solver}'.",
            "Give one of each per case, 'suppress' or 'enhance', 'exact' or 'pinv'.",
        )
    anatomy = Anatomy.of(model)
    tower, weight = language_tower(anatomy), unembedding(anatomy)
    points = [Point("resid_post", layer, tower.name) for layer in range(tower.n_layers)]
    seen = observe(anatomy, tokenizer, prompts, explicit, points, [0] * len(prompts), mode, batch_size)
    states = torch.stack([seen.states[str(point)] for point in points], 1)  # (cases, layers, width)
    low, high = (part.reshape(states.shape[:2]) for part in _extremes(weight, states.flatten(0, 1)))
    inverse = LeftInverse.of(weight) if solver == "pinv" else None
    shifts = torch.zeros(2, *states.shape, dtype=states.dtype, device=states.device)
    shared = 0
    for case, (prompt, bridge, answer) in enumerate(zip(prompts, implicit, explicit, strict=True)):
        tokens = list(dict.fromkeys(answer_tokens(tokenizer, bridge, prompt)))
        both = list(dict.fromkeys(answer_tokens(tokenizer, answer, prompt)))
        kept = [token for token in both if token not in tokens]
        shared += len(kept) < len(both)
        others = torch.tensor([t for t in range(len(weight)) if t not in {*tokens, *kept}])
        drawn = others[torch.randperm(len(others), generator=generator(seed, "control", case))[: len(tokens)]].tolist()
        request = _Request(weight, states[case], low[case], high[case], action, inverse, compensation, strength)
        shifts[0, case] = request.shift(tokens, kept, compensate=True)
        shifts[1, case] = request.shift(drawn, kept, compensate=False)
    if shared:
        warnings.warn(f"In {shared} cases bridge and explicit answer share tokens, which are acted on as the bridge's.", stacklevel=2)
    asked = ask(anatomy, tokenizer, prompts, explicit, mode)
    ends = ends_at(asked, [0] * len(prompts))
    sets = [_adds(points[layer], shifts[group, :, layer], ends) for group in (0, 1) for layer in range(tower.n_layers)]
    found = sweep(
        anatomy, run_inputs(anatomy, asked), [[], *sets], asked.metric, batch_size=batch_size, read=asked.read, **options
    ).double()  # fmt: skip
    change = (found[1:] - found[0]).reshape(2, tower.n_layers, len(prompts)).transpose(1, 2).numpy()
    how = told(
        *("implicit answer", anatomy.model, fingerprint),
        **{"cases": len(prompts), "action": action, "solver": solver, "strength": strength, "mode": mode, "seed": seed},
        **({"compensation": compensation} if solver == "pinv" else {}),
    )
    return Implicit(found[0].numpy(), change[0], change[1], action, solver, mode, tower, how)


def _adds(point: Point, shift: torch.Tensor, ends: Sequence[tuple[int, ...]]) -> list[Add]:
    """The shifts (cases, width) of one layer, without the cases in which nothing is asked."""
    rows = shift.any(1).nonzero()[:, 0].tolist()
    return [Add(point, shift[rows], positions=tuple(ends[row] for row in rows), rows=rows)] if rows else []


__all__ = ["COMPENSATION", "Implicit", "LeftInverse", "exact_shift", "implicit_effects", "unembedding"]
