"""The three tasks of SmolLM2 on which CopRA is measured: short questions from the function-vector sets, with headroom for the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trocar import lab
from trocar.core.seeds import generator
from trocar.method import Examples

FORMS = {
    "antonym": "The opposite of {} is",
    "landmark-country": "{} is in the country of",
    "present-past": "The past tense of {} is",
}
TEST = {"antonym": 200, "landmark-country": 200, "present-past": 100}  # rows that are never trained on


@dataclass(frozen=True)
class Split:
    train: Examples
    test: Examples


def split(task: str) -> Split:
    """A fixed split by the unordered pair of input and output, so that `hot, cold` and `cold, hot` fall on one side."""
    rows = lab.load_texts(f"function_vectors:{task}")
    pairs = [tuple(sorted((str(a), str(b)))) for a, b in zip(rows.fields["input"], rows.fields["output"], strict=True)]
    kinds = sorted(set(pairs))
    order = torch.randperm(len(kinds), generator=generator(0, "copra", task)).tolist()
    rank = {kinds[place]: number for number, place in enumerate(order)}
    by_rank = sorted(range(len(rows)), key=lambda row: (rank[pairs[row]], row))
    cut = TEST[task]
    while pairs[by_rank[cut]] == pairs[by_rank[cut - 1]]:
        cut += 1
    asked = Examples(
        {},
        rows.ids,
        fields={
            "prompt": [FORMS[task].format(text) for text in rows.fields["input"]],
            "answer": [str(text) for text in rows.fields["output"]],
        },
    )
    return Split(asked.take(sorted(by_rank[cut:])), asked.take(sorted(by_rank[:cut])))
