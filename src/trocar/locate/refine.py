"""Refine located sets: keep what is found in every setting (language direction, task, data half), not in one alone. Floor 3; no torch.

What every setting finds is tied to the trouble; what one setting finds is tied to its content (arXiv:2410.07054). Besides the intersection
come the sets to compare it with (the union, each setting's own) and how large it would be by chance.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from trocar.core.errors import ScoresError
from trocar.locate.scores import How, Scores, aligned, iou


def top_mask(scores: Scores, k: int | float, positive: bool = False, name: str = "") -> Scores:
    """The mask of the highest by signed value, ties by (layer, index). A number larger than there are entries takes all, with a warning.

    k: a number, or a fraction in (0, 1]. positive: only scores above 0, so that the mask may hold fewer, or none. name: for the warning.
    """
    wanted: int | float = k
    if isinstance(k, int) and not isinstance(k, bool) and k > len(scores):
        where = f" in {name}" if name else ""
        warnings.warn(f"{k} {scores.kind}s are wanted{where}, but only {len(scores)} are scored; all are taken.", stacklevel=2)
        wanted = len(scores)
    mask = scores.top(wanted)
    if positive:
        above = {group: np.nan_to_num(np.asarray(array, dtype=np.float64)) > 0 for group, array in scores.groups.items()}
        mask = mask & Scores(scores.kind, scores.tower, above, mask.how)
        mask = mask.with_how(scores.how.then("top", k=k, positive=True))
    return mask


@overload
def top_masks(by_setting: Mapping[str, Scores], k: int | float, positive: bool = False) -> dict[str, Scores]: ...
@overload
def top_masks(by_setting: Mapping[str, Scores | None], k: int | float, positive: bool = False) -> dict[str, Scores | None]: ...
def top_masks(by_setting: Mapping[str, Any], k: int | float, positive: bool = False) -> dict[str, Any]:
    """`top_mask` of each setting; None (a setting without usable cases) stays None."""
    return {name: None if scores is None else top_mask(scores, k, positive, name) for name, scores in by_setting.items()}


@dataclass(frozen=True, eq=False)
class Refined:
    """The outcome of `refine`.

    mask: what at least `needed` of the settings found (cut to `keep`); union; single: each setting's own mask, by name;
    missing: settings without usable cases, left out; counts, ious: (settings, settings) overlaps, in the order of `single`;
    expected: how many entries would be in at least `needed` sets of these sizes by chance; explanation: one line, and what to do if
    nothing is left; mean_ranks: of the mask's components, best first, if the scores were given.
    """

    mask: Scores
    union: Scores
    single: Mapping[str, Scores]
    missing: tuple[str, ...]
    needed: int
    found: int
    expected: float
    counts: np.ndarray
    ious: np.ndarray
    explanation: str
    mean_ranks: Mapping[str, float]

    def rows(self) -> list[dict[str, Any]]:
        """The pairwise overlaps for a table: one row per pair of settings."""
        names = list(self.single)
        return [
            {"setting": a, "other": b, "size": int(self.counts[i, i]), "other size": int(self.counts[j, j]),
             "shared": int(self.counts[i, j]), "iou": float(self.ious[i, j])}
            for i, a in enumerate(names) for j, b in enumerate(names) if i < j
        ]  # fmt: skip


def refine(
    masks: Mapping[str, Scores | None],
    *,
    min_settings: int | None = None,
    keep: int | None = None,
    scores: Mapping[str, Scores | None] | None = None,
    alone: bool = False,
) -> Refined:
    """What at least `min_settings` of the settings' masks share.

    masks: by setting's name; None for a setting without usable cases, which is left out and named. The order does not matter: the result is
    that of the sorted names. min_settings: all of those present by default. keep: at most so many, the best by mean rank over the settings
    in `scores` (the scores that the masks were made from), ties by (layer, index). alone: allow a single setting, whose own set it returns.

    An empty result is no error; `explanation` says how close the sets came and what to try. Raises ScoresError if fewer than two settings
    are left (unless `alone`), for a `min_settings` out of range, and for masks of different kinds or models.
    """
    present = {name: mask for name, mask in sorted(masks.items()) if mask is not None}
    missing = tuple(name for name, mask in sorted(masks.items()) if mask is None)
    told = f" (nothing was found in {', '.join(missing)})" if missing else ""
    if len(present) < (1 if alone else 2):
        hint = "" if alone or not present else " Say alone=True to take the one there is as it is."
        raise ScoresError(f"{len(present)} settings are too few to refine by what they share{told}.", f"Give two or more.{hint}")
    needed = len(present) if min_settings is None else min_settings
    if not 1 <= needed <= len(present):
        raise ScoresError(f"min_settings={needed} is outside 1..{len(present)}, the settings there are{told}.", "Ask for fewer.")
    for name, mask in present.items():
        mask.need_mask(f"refine, setting '{name}',")
    union = _union(list(present.values()))
    shape = {group: array.size for group, array in union.groups.items()}
    single = {name: _full(mask, union) for name, mask in present.items()}
    votes = {group: sum((np.asarray(mask.groups[group] == 1, int) for mask in single.values()), np.zeros(size, int))
             for group, size in shape.items()}  # fmt: skip
    sources = [{"method": mask.how.method, "data": mask.how.data, "settings": mask.how.settings} for mask in single.values()]
    settings = {"settings": list(single), "missing": list(missing), "min_settings": needed, "keep": keep, "of": sources}
    how = How("refine", settings=settings, fingerprint=union.how.fingerprint)
    mask = Scores(union.kind, union.tower, {group: vote >= needed for group, vote in votes.items()}, how)
    found = mask.count()
    ranks: dict[str, float] = {}
    if keep is not None and scores is None:
        raise ScoresError("keep cuts by mean rank, and there are no scores to rank by.", "Give the scores that the masks were made from.")
    if scores is not None:
        ranks = mean_ranks(mask, [scores.get(name) for name in single], list(single))
    if keep is not None and keep < found:
        if keep < 1:
            raise ScoresError(f"keep={keep} leaves nothing.", "Keep at least 1.")
        ranks = dict(list(ranks.items())[:keep])
        chosen = Scores(union.kind, union.tower, dict.fromkeys(ranks, 1.0), how, partial=True)
        mask = _full(chosen.threshold(1.0), union).with_how(how)
    names = list(single)
    counts = np.array([[(single[a] & single[b]).count() for b in names] for a in names])
    ious = np.array([[iou(single[a], single[b]) for b in names] for a in names])
    sizes = {name: single[name].count() for name in names}
    expected = expected_by_chance(list(sizes.values()), union.flat.size, needed)
    explanation = _explain(found, needed, sizes, counts, expected, union.kind, missing)
    return Refined(mask, union.with_how(how.then("union")), single, missing, needed, found, expected, counts, ious, explanation, ranks)


def mean_ranks(mask: Scores, scores: Sequence[Scores | None], names: Sequence[str]) -> dict[str, float]:
    """The mean over settings of the rank (1 = highest) of each of the mask's components; best first, ties in canonical order."""
    total = np.zeros(mask.flat.size)
    for name, one in zip(names, scores, strict=True):
        if one is None:
            raise ScoresError(f"There are no scores of '{name}' to rank by.", "Give the scores of every setting that has a mask.")
        _, theirs = aligned(mask, one, "rank")
        flat = np.concatenate([np.asarray(theirs[group], dtype=np.float64) for group in mask.groups])
        ranks = np.empty(flat.size)
        ranks[np.argsort(-flat, kind="stable")] = np.arange(1, flat.size + 1)  # what is not scored comes last
        total += ranks
    places = np.flatnonzero(mask.flat == 1)
    order = places[np.argsort(total[places], kind="stable")]
    return {mask.name_at(place): float(total[place] / len(names)) for place in order.tolist()}


def expected_by_chance(sizes: Sequence[int], total: int, needed: int) -> float:
    """How many of `total` entries would be in at least `needed` of independently drawn sets of these sizes."""
    if not total:
        return 0.0
    chance = np.zeros(len(sizes) + 1)  # chance[j]: that an entry is in exactly j of the sets so far
    chance[0] = 1.0
    for size in sizes:
        share = size / total
        chance[1:] = chance[1:] * (1 - share) + chance[:-1] * share
        chance[0] *= 1 - share
    return float(total * chance[needed:].sum())


def _union(masks: Sequence[Scores]) -> Scores:
    union = masks[0] | masks[0]
    for mask in masks[1:]:
        union = union | mask
    return union


def _full(mask: Scores, like: Scores) -> Scores:
    """The mask over all of `like`'s components, False where it says nothing."""
    mine, _ = aligned(mask, like.with_how(mask.how), "refine")
    return Scores(mask.kind, mask.tower, {group: np.asarray(mine[group] == 1) for group in like.groups}, mask.how)


def _explain(
    found: int, needed: int, sizes: Mapping[str, int], counts: np.ndarray, expected: float, kind: str, missing: Sequence[str]
) -> str:
    left_out = f" Left out, without usable cases: {', '.join(missing)}." if missing else ""
    told = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if found:
        return f"{found} {kind}s are in at least {needed} of {len(sizes)} sets ({told}); by chance it would be {expected:.2g}.{left_out}"
    pairs = counts[np.triu_indices(len(sizes), 1)]
    closest = f" the closest two share {int(pairs.max())}, the least close {int(pairs.min())};" if len(pairs) else ""
    return (
        f"No {kind} is in at least {needed} of {len(sizes)} sets ({told});{closest} by chance it would be {expected:.2g}. "
        f"Take larger sets, or ask for fewer settings (min_settings).{left_out}"
    )


__all__ = ["Refined", "expected_by_chance", "mean_ranks", "refine", "top_mask", "top_masks"]
