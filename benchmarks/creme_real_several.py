"""Several CREME edits in one model: one after the other, as one least change, or as a stack of single edits that can be taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trocar.anatomy import tensor_fingerprint
from trocar.core.seeds import generator
from trocar.edit.creme import Case
from trocar.patch import Patch, stack

SIZES = (1, 5, 20)
DRAWS = 3
HOW: dict[str, dict[str, Any]] = {
    "sequential": {"many": "sequential"},
    "batch": {"many": "batch"},
    "batch, ridge 0.1": {"many": "batch", "ridge": 0.1},
}


def several(bench: Any, cases: Sequence[Case], setting: str, window: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    """For 1, 5 and 20 cases, three draws each: shares repaired, of paraphrases right, and of other questions moved."""
    rows = []
    for size in SIZES[: 2 if quick else None]:
        for seed in range(1 if quick else DRAWS):
            if size > len(cases):
                continue
            order = torch.randperm(len(cases), generator=generator(seed, "several")).tolist()[:size]
            chosen = [cases[row] for row in order]
            for how in HOW if size > 1 else ("batch",):  # of one case they are the same edit
                key = {"cases": [case.id for case in chosen], "setting": setting, "window": list(window), "how": HOW[how], "quick": quick}
                name = "".join(mark if mark.isalnum() else "-" for mark in f"{how} {size} {seed}")
                rows.append(bench.work.room("several").values(name, key, lambda c=chosen, h=how: _measured(bench, c, setting, window, h)))
                rows[-1] |= {"how": how, "size": size, "seed": seed}
    return rows


def _measured(bench: Any, cases: Sequence[Case], setting: str, window: Sequence[int], how: str) -> dict[str, Any]:
    patch, rows = bench.edit(cases, setting, window, **HOW[how])
    share = max(row["share"] for row in rows)
    with patch.applied(bench.anatomy, verify="structure"):
        return {**asked(bench, cases, window), "largest share of a matrix": share}


def asked(bench: Any, cases: Sequence[Case], window: Sequence[int]) -> dict[str, float]:
    """What the model as it is now says to the cases, their paraphrases and the other questions."""
    split, subjects = str(cases[0].split), {case.subject for case in cases}
    own = [bench.asked(f"first {case.id}", _pairs(case), min(window)) for case in cases]
    now = [said.now() for said in own]
    others = bench.others(split)
    around = bench.asked(f"others {split}", [(other.prompt, other.target) for other in others], min(window))
    after = around.now()
    kept = [row for row, other in enumerate(others) if other.subject not in subjects]
    return {
        "repaired": float(np.mean([said["right"][0] for said in now])),
        "paraphrases": float(np.mean([value for said in now for value in said["right"][1:]])),
        "moved": float(np.mean([around.before["first"][row] != after["first"][row] for row in kept])),
        "broken": float(np.mean([not after["right"][row] for row in kept if around.before["right"][row]])),
    }


def _pairs(case: Case) -> list[tuple[str, str]]:
    return [(case.prompt, case.target), *((query.prompt, query.answer) for query in case.paraphrases)]


def stacked(bench: Any, cases: Sequence[Case], setting: str, window: Sequence[int]) -> dict[str, Any]:
    """Single edits of the unedited model, stacked: what they share, what they do together, and taking one out."""
    patches = [bench.edit([case], setting, window)[0] for case in cases]
    together = stack(patches, on_overlap="order")
    overlaps = together.overlaps(bench.anatomy)
    cosines = [_cosine(patches[one.first], patches[one.second], one.where) for one in overlaps]
    before = weights(bench)
    with together.applied(bench.anatomy) as applied:
        said = asked(bench, cases, window)
        applied.revert(1)
        without = weights(bench)
        left = asked(bench, [case for number, case in enumerate(cases) if number != 1], window)
    after = weights(bench)
    with stack([patch for number, patch in enumerate(patches) if number != 1], on_overlap="order").applied(bench.anatomy):
        expected = weights(bench)
    return {
        "cases": len(cases),
        **said,
        "overlapping places": len(overlaps),
        "pairs of edits": len(patches) * (len(patches) - 1) // 2,
        "entries both write": int(sum(one.entries for one in overlaps)),
        "largest |cosine| of two updates": float(np.max(np.abs(cosines))) if cosines else 0.0,
        "undoing one leaves exactly the others": without == expected,
        "undoing all leaves exactly the model": after == before,
        "repaired of the others after undoing one": left["repaired"],
    }


def weights(bench: Any) -> Mapping[str, str]:
    return {name: tensor_fingerprint(value) for name, value in bench.model.named_parameters()}


def _cosine(one: Patch, two: Patch, where: str) -> float:
    """Of the two updates of one matrix, as vectors of its entries."""
    changes: list[Any] = [next(op for op in patch.ops if getattr(op, "parameter", None) == where) for patch in (one, two)]
    (a, b), (c, d) = ((op.b.double(), op.a.double()) for op in changes)
    inner = float(((a.T @ c) * (b @ d.T)).sum())
    norms = [float(((x.T @ x) * (y @ y.T)).sum()) ** 0.5 for x, y in ((a, b), (c, d))]
    return inner / (norms[0] * norms[1])
