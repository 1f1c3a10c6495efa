"""Which entries an edit may open: top-k of a hypernetwork's logits, of gradient or weight norms, of a mean label, or at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from trocar.core.errors import ConfigError, ScoresError
from trocar.core.seeds import generator
from trocar.edit.where_to_edit.labels import row_norms
from trocar.edit.where_to_edit.place import Place
from trocar.edit.where_to_edit.suffix import Rows
from trocar.locate import How, Scores


def top_k(scores: torch.Tensor, keep: float) -> torch.Tensor:
    """Boolean mask of the k = max(1, round(keep n h)) highest of the (..., n, h) scores, all matrices competing, ties by lower index.

    Exactly k for any input (the published code keeps those strictly above the k-th, hence k - 1 or, saturated, none); masks are nested in
    keep. Raises ScoresError for NaN, ConfigError for keep outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep is the share of entries that are opened and must be in (0, 1], not {keep}.", "sparsity is 1 - keep.")
    if scores.isnan().any():
        raise ScoresError(f"{int(scores.isnan().sum())} mask scores are NaN.", "The model or the hypernetwork has diverged.")
    flat = scores.reshape(*scores.shape[:-2], -1)
    count = max(1, round(keep * flat.shape[-1]))
    order = flat.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros(flat.shape, dtype=torch.bool, device=flat.device).scatter_(-1, order, True).reshape(scores.shape)


def gradient_norms(rows: Rows, groups: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared row norms of the cross-entropy gradient at the right labels, (E, n, h): label-aware, one backward pass, no training.

    groups: (E, m) row numbers, labels: (E, m); the loss of an edit is the mean over its images.
    """
    target = labels.flatten().to(rows.place.device)
    return row_norms(rows, groups, lambda logits: F.cross_entropy(logits, target, reduction="sum") / groups.shape[1])


def magnitudes(place: Place) -> torch.Tensor:
    """Squared norms of the weights of each entry, (n, h)."""
    norms = torch.zeros(place.rows, place.entries, device=place.device)
    for matrix in place.matrices:
        norms[matrix.row] += matrix.start().float().square().sum(-1)
    return norms


def random_scores(place: Place, seed: int, name: object) -> torch.Tensor:
    """U(0, 1), (n, h), from the stream of one edit."""
    return torch.rand(place.rows, place.entries, generator=generator(seed, "random mask", name)).to(place.device)


def _groups(place: Place) -> list[str]:
    tower = f"{place.tower.name}." if place.tower.name else ""
    return [f"{tower}L{place.first + row // 2}.mlp.{'down.in' if row % 2 else 'up.out'}" for row in range(place.rows)]


def as_scores(place: Place, values: torch.Tensor, method: str, settings: Mapping[str, Any], fingerprint: str, data: str = "") -> Scores:
    """(n, h) values as Scores of channels. In a gated block `L5.mlp.up.out17` stands for the pair of gate row and up row."""
    array = values.detach().cpu()
    array = array.numpy() if array.dtype == torch.bool else array.float().numpy()
    return Scores("channel", place.tower.name, dict(zip(_groups(place), array, strict=True)), How(method, data, settings, fingerprint))


def from_scores(place: Place, scores: Scores) -> torch.Tensor:
    """(n, h) values from Scores of channels that cover the edited matrices. Raises ScoresError naming what does not fit."""
    names = _groups(place)
    wrong = [name for name in names if name not in scores.groups or len(scores.groups[name]) != place.entries]
    if scores.kind != "channel" or wrong:
        raise ScoresError(
            f"The mask scores {scores.kind} components of {', '.join(list(scores.groups)[:3])}; the edit needs {place.entries} channels of "
            f"{', '.join((wrong or names)[:3])}.",
            "Set first_block and blocks as they were when the mask was made.",
        )
    return torch.stack([torch.as_tensor(scores.groups[name].copy()) for name in names]).to(place.device)
