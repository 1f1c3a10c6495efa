"""LoRA-LEGO (arXiv 2409.16167): adapters of several tasks as bags of rank-one units, clustered and put together at any rank.

Our reading of the paper, since its code was not at hand. A unit is one row of A with its column of B, its scale folded in evenly. The units
of all adapters are clustered by k-means on (a, b) joined; each cluster gives one unit, the mean of its members. Two corrections follow: the
mean is stretched to the mean norm of its members (averaging directions shrinks it: "parameter reweighting"), and the update is scaled by
sqrt(mean rank of the adapters / rank) ("output reweighting").
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2

from trocar.core.errors import ConfigError
from trocar.core.seeds import derive
from trocar.patch.combine.algebra import WORK, Combined, Source, common_modules, factors_of, narrowed, report
from trocar.patch.ops.adapter import Adapter, Factors


def build(parts: Sequence[Factors], rank: int, seed: int) -> tuple[Factors, dict[str, Any]]:
    """One module."""
    units, width = [], parts[0].a.shape[1]
    for a, b, scale, _ in parts:
        root = abs(scale) ** 0.5
        units.append(torch.cat([a.to(WORK) * root, b.to(WORK).T * (root if scale >= 0 else -root)], 1))
    bag = torch.cat(units).numpy()
    kept = bag[np.abs(bag).sum(1) > 0]
    if len(kept) <= rank:
        centres, label = kept, np.arange(len(kept))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty cluster: its centre is a unit, and has no members
            # in coordinates of the units' own span, where distances are the same and vectors as short as there are units
            _, label = kmeans2(np.asarray(np.linalg.qr(kept.T, mode="r")).T, rank, minit="++", rng=np.random.default_rng(seed))
        used = np.unique(label)
        centres, label = np.array([kept[label == one].mean(0) for one in used]), np.searchsorted(used, label)
    sizes = np.linalg.norm(kept, axis=1)
    for number in range(len(centres)):
        length = np.linalg.norm(centres[number])
        if length:
            centres[number] *= sizes[label == number].mean() / length
    filled = np.zeros((rank, bag.shape[1]))
    filled[: len(centres)] = centres
    made = torch.from_numpy(filled)
    scale = (np.mean([part.a.shape[0] for part in parts]) / rank) ** 0.5
    return narrowed(made[:, :width], made[:, width:].T, float(scale), parts[0]), {"clusters": len(centres)}


def lego(adapters: Sequence[Source], *, rank: int | None = None, seed: int = 0) -> Combined:
    """Cluster the adapters' rank-one units. rank: of the result; None: the first adapter's. Raises ConfigError as `mixture` does."""
    if rank is not None and rank < 1:
        raise ConfigError(f"A rank of {rank} cannot be.", "Use 1 or more.")
    made, rows = {}, []
    for name in common_modules(adapters, need_rank=False):
        parts = [factors_of(adapter, name) for adapter in adapters]
        made[name], told = build(parts, rank or parts[0].a.shape[0], derive(seed, "lego", name) % 2**32)
        rows.append(report(name, made[name], parts, **told))
    return Combined(Adapter(made, adapters[0].task, adapters[0].dropout), rows)
