"""Where a lab model fails, and what must not change: failure groups and locality sets of a rare-part split.

Everything is computed with the weights as stored (float16), loaded in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from trocar.core.seeds import generator
from trocar.lab.pixels import decode_all
from trocar.lab.rare import RareSplit

SENSITIVE_GAP = 0.05  # top-2 probability gap below which a right prediction counts as sensitive (arXiv 2411.01948, published code)


@dataclass(frozen=True)
class Group:
    """Failures of one rare part that the model takes for the same wrong class. rows: row numbers of the split's table, in order."""

    truth: str
    part: str
    predicted: str
    rows: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.part} ({self.truth}) taken for {self.predicted}"


def pixel_values(parts: RareSplit, rows: Sequence[int], size: int) -> torch.Tensor:
    """Model inputs (n, 3, size, size) of table rows, as the lab models' processor makes them."""
    return decode_all(parts.table, rows, size).float() / 127.5 - 1


@torch.no_grad()
def logits(model: torch.nn.Module, values: torch.Tensor, batch: int = 500) -> torch.Tensor:
    """(n, classes) logits of (n, 3, h, w) inputs."""
    return torch.cat([model(pixel_values=values[i : i + batch]).logits for i in range(0, len(values), batch)])


def groups(parts: RareSplit, label: str, part: str, scores: torch.Tensor, smallest: int = 20) -> list[Group]:
    """Failure groups among `parts.rare_unseen`, largest first. scores: (n, classes) logits of those rows; smallest: members of a group."""
    predicted = scores.argmax(-1).tolist()
    truth, piece = parts.table.columns[label], parts.table.columns[part]
    found: dict[tuple[str, str, str], list[int]] = {}
    for row, number in zip(parts.rare_unseen, predicted, strict=True):
        if parts.classes[number] != truth[row]:
            found.setdefault((truth[row], piece[row], parts.classes[number]), []).append(row)
    kept = [Group(*key, tuple(rows)) for key, rows in found.items() if len(rows) >= smallest]
    return sorted(kept, key=lambda group: (-len(group.rows), group.name))


def locality(
    scores: torch.Tensor, labels: torch.Tensor, rows: Sequence[int], seed: int, n_sensitive: int = 100, n_random: int = 200
) -> Mapping[str, list[int]]:
    """Two locality sets among common test pictures (`rows`, with their logits and labels).

    `sensitive`: predicted right with the smallest top-2 probability gaps, all below .05; `random`: drawn from the others.
    """
    top = scores.softmax(-1).topk(2, -1).values
    gap = torch.where(scores.argmax(-1) == labels, top[:, 0] - top[:, 1], torch.inf)
    order = [i for i in gap.argsort(stable=True).tolist()[:n_sensitive] if gap[i] < SENSITIVE_GAP]
    others = [i for i in torch.randperm(len(rows), generator=generator(seed, "random locality")).tolist() if i not in set(order)]
    return {"sensitive": [rows[i] for i in order], "random": [rows[i] for i in sorted(others[:n_random])]}
