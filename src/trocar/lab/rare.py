"""Natural subpopulation shift: a classifier's training set in which one part of every class was made rare.

The unseen pictures of the rare parts are where such a model fails; failures of one part that it takes for the same wrong class are a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trocar.core.errors import ConfigError
from trocar.core.seeds import generator
from trocar.lab.registry import RareData
from trocar.lab.sources import Table, read


@dataclass(frozen=True)
class RareSplit:
    """Row numbers of one rare-part data set. Rows 0..n_train-1 are the `train` table's, the rest the `test` table's.

    classes: names in the order of the model's outputs; rare: class name -> the part of it that was made rare.
    """

    table: Table
    classes: tuple[str, ...]
    rare: Mapping[str, str]
    train: list[int]  # common parts, and `keep` pictures of every rare part
    common_test: list[int]  # test pictures of common parts: accuracy, locality
    rare_unseen: list[int]  # pictures of rare parts that training never saw, from both files

    def labels(self, rows: list[int], column: str) -> torch.Tensor:
        index = {name: i for i, name in enumerate(self.classes)}
        values = self.table.columns[column]
        return torch.tensor([index[values[row]] for row in rows])


def rare_parts(data: RareData, parts: Mapping[str, list[str]], seed: int) -> dict[str, str]:
    """Which part of each class is rare for base seed `seed`.

    `position`: the alphabetically fifth part for seed 0, the third for 1, the first for 2, then fourth and second (modulo the number of
    parts). `rotate`: class number plus seed, so that every class has another rare part under every seed.
    """
    if data.assignment == "position":
        return {name: members[(4, 2, 0, 3, 1)[seed % 5] % len(members)] for name, members in parts.items()}
    return {name: members[(i + seed) % len(members)] for i, (name, members) in enumerate(parts.items())}


def split(data: RareData, seed: int) -> RareSplit:
    """The rare-part split of base seed `seed`; needs the data set's files (TROCAR_DATA)."""
    train, test = read(f"{data.source}:train"), read(f"{data.source}:test")
    table = Table(
        data.source,
        [*train.images, *test.images],
        {name: [*train.columns[name], *test.columns[name]] for name in train.columns},
    )
    label, part = table.column(data.label), table.column(data.part)
    classes = data.classes or tuple(sorted(set(label)))
    unknown = set(classes) - set(label)
    if unknown:
        raise ConfigError(f"{data.source} has no class {sorted(unknown)[0]!r} in column '{data.label}'.")
    members = {name: sorted({p for c, p in zip(label, part, strict=True) if c == name}) for name in classes}
    rare = rare_parts(data, members, seed)
    kept: set[int] = set()
    for name in classes:
        rows = [row for row in range(len(train)) if label[row] == name and part[row] == rare[name]]
        order = torch.randperm(len(rows), generator=generator(seed, "rare", name)).tolist()
        kept.update(rows[i] for i in order[: data.keep])
    is_rare = [c in rare and p == rare[c] for c, p in zip(label, part, strict=True)]
    known = [c in rare for c in label]
    return RareSplit(
        table,
        tuple(classes),
        rare,
        [row for row in range(len(train)) if known[row] and (not is_rare[row] or row in kept)],
        [row for row in range(len(train), len(table)) if known[row] and not is_rare[row]],
        [row for row in range(len(table)) if is_rare[row] and row not in kept],
    )
