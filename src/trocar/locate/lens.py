"""Logit lens: what the residual stream after each block would already say. Floor 3.

References: nostalgebraist, "interpreting GPT: the logit lens" (2020); CREME, arXiv:2402.14328, reads the bridge answer with it. States are
read by the model's own final norm and head, run through its own forward pass, so that whatever the family does there (soft-capping in
Gemma 2, projections in OPT) is done once and only once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from trocar.anatomy import Anatomy, Tower
from trocar.core.errors import DataError
from trocar.locate.cases import Position, backs, batches, ends_at, interval, name_in, told
from trocar.locate.scores import How, Scores
from trocar.trace import Point, record
from trocar.trace.calls import override
from trocar.trace.queries import Asked, ask, language_tower
from trocar.trace.shortcut import skipped, starting_at


@contextmanager
def _tail_only(tower: Tower, hidden: torch.Tensor, tuples: bool, normalize: bool) -> Iterator[None]:
    """Inside, no block runs: the last one returns `hidden`, and with `normalize=False` the final norm passes it on as it is."""
    last = tower.blocks[-1]
    restores: list[Any] = []
    own = last not in skipped
    try:
        with starting_at(tower, tower.n_layers - 1, hidden, tuples):
            if own:
                skipped.add(last)
            restores.append(override(last, "forward", lambda *args, **kwargs: (hidden,) if tuples else hidden))
            if not normalize and tower.final_norm is not None:
                restores.append(override(tower.final_norm, "forward", lambda states: states))
            yield
    finally:
        for restore in reversed(restores):
            restore()
        if own:
            skipped.discard(last)


@torch.no_grad()
def read_out(model: Any, states: torch.Tensor, normalize: bool = True) -> torch.Tensor:
    """The logits (n, V) that the model's own final norm and head make of residual states (n, width), in the model's dtype.

    normalize: False reads the states without the final norm (CREME's reference code), which suits models whose scale hardly grows.
    """
    anatomy = Anatomy.of(model)
    tower = language_tower(anatomy)
    if states.ndim != 2 or states.shape[1] != tower.width:
        raise DataError(f"States of shape {tuple(states.shape)} are not (n, {tower.width}).", "Give one residual vector a row.")
    tuples = _returns_tuples(anatomy, tower)
    ids = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
    with _tail_only(tower, states[:, None], tuples, normalize):
        return anatomy.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]


def _returns_tuples(anatomy: Anatomy, tower: Tower) -> bool:
    """Whether blocks return tuples, seen in a pass over one token."""
    seen: list[bool] = []

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        seen.append(isinstance(output, tuple))

    handle = tower.blocks[-1].register_forward_hook(note)
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(anatomy.model.parameters()).device)
        anatomy.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        handle.remove()
    return seen[-1]


@dataclass(frozen=True, eq=False)
class Lens:
    """Readings of the residual stream: index 0 is the embedding, index l the output of block l - 1.

    scores, ranks: name of an answer set -> (cases, L + 1) float64; the rank is of the first token (in mode `bag` the mean over tokens),
    1 = most probable.
    """

    scores: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]
    position: Position
    normalize: bool
    mode: Literal["first", "bag"]
    tower: Tower = field(repr=False)
    how: How = field(repr=False)

    def mean(self, name: str) -> np.ndarray:
        """The mean curve of an answer set, (L + 1,)."""
        return self.scores[name].mean(0)

    def peak(self, name: str) -> int:
        """The reading at which the mean curve is highest."""
        return int(self.mean(name).argmax())

    def as_scores(self, name: str) -> Scores:
        """The mean readings after each block as Scores of blocks (the embedding's reading belongs to none)."""
        values = {name_in(self.tower, layer, "block"): float(x) for layer, x in enumerate(self.mean(name)[1:])}
        return Scores("block", self.tower.name, values, self.how.then("lens of " + name))

    def rows(self, seed: int = 0) -> list[dict[str, Any]]:
        """Rows of a curve: one per answer set and reading, mean score with its bootstrap interval over cases, and mean rank."""
        rows = []
        for name, values in self.scores.items():
            mean, low, high = interval(values, seed)
            rank = self.ranks[name].mean(0)
            rows += [
                {"reading": n, "answer": name, "score": mean[n], "low": low[n], "high": high[n], "rank": rank[n]} for n in range(len(mean))
            ]
        return rows


def logit_lens(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    position: Position = "last",
    *,
    subjects: Sequence[str] | None = None,
    mode: Literal["first", "bag"] = "first",
    normalize: bool = True,
    batch_size: int = 32,
    fingerprint: str | None = None,
) -> Lens:
    """Read every prompt's residual stream at one position, before the first and after every block.

    answers: name of a set -> one answer per prompt, for example `bridge`, `answer` and `wrong`. position, subjects: as in
    `module_effects`. mode: `first` (probability of the answer's first token) or `bag` (mean over its tokens, CREME's published score).
    normalize: see `read_out`. Raises DataError for unequal numbers or unknown positions.
    """
    if mode not in ("first", "bag") or not answers:
        raise DataError(f"A lens cannot read {len(answers)} answer sets in mode '{mode}'.", "Give at least one, and mode 'first' or 'bag'.")
    anatomy = Anatomy.of(model)
    tower = language_tower(anatomy)
    back = backs(tokenizer, prompts, position, subjects)
    points = [Point("resid_pre", 0, tower.name), *(Point("resid_post", layer, tower.name) for layer in range(tower.n_layers))]
    asked = {name: ask(anatomy, tokenizer, prompts, wanted, mode) for name, wanted in answers.items()}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in answers}
    first = next(iter(answers))
    with torch.no_grad():
        for rows in batches(len(prompts), batch_size):
            part = ask(anatomy, tokenizer, prompts[rows], answers[first][rows], mode)
            with record(anatomy, points, positions=ends_at(part, back[rows])) as seen:
                anatomy.model(**part.inputs, use_cache=False)
            states = torch.stack([seen[point][:, 0] for point in points], 1)  # (rows, L + 1, width)
            for name, readings in _read(anatomy, states, asked, rows.start, normalize, batch_size).items():
                found[name].append(readings)
    curves = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    how = told(
        *("logit lens", anatomy.model, fingerprint),
        **{"cases": len(prompts), "position": position, "mode": mode, "normalize": normalize},
    )
    scores, ranks = ({name: curve[..., which] for name, curve in curves.items()} for which in (0, 1))
    return Lens(scores, ranks, position, normalize, mode, tower, how)


def _read(
    anatomy: Anatomy, states: torch.Tensor, asked: Mapping[str, Asked], start: int, normalize: bool, batch_size: int
) -> dict[str, torch.Tensor]:
    """Score and rank of every answer set at all readings of some prompts, (rows, L + 1, 2) float64 on the CPU."""
    count, depth = states.shape[:2]
    number = torch.arange(start, start + count).repeat_interleave(depth)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in asked}
    for chunk, rows in zip(states.flatten(0, 1).split(batch_size), number.split(batch_size), strict=True):
        output = _Logits(read_out(anatomy, chunk, normalize)[:, None])
        for name, one in asked.items():
            parts[name].append(torch.stack([one.metric(output, rows).double(), one.rank(output, rows).to(chunk.device)], 1).cpu())
    return {name: torch.cat(rows).reshape(count, depth, 2) for name, rows in parts.items()}


@dataclass(frozen=True, eq=False)
class _Logits:
    logits: torch.Tensor


__all__ = ["Lens", "logit_lens", "read_out"]
