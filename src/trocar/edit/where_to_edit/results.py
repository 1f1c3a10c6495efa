"""What edits give back: changes as data, their patches, and the edited model's logits without building any patch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from trocar.edit.where_to_edit.config import EditConfig
from trocar.edit.where_to_edit.hypernetwork import model_fingerprint
from trocar.edit.where_to_edit.leaves import AnyLeaf, LowRankLeaf, WholeLeaf, swapped
from trocar.edit.where_to_edit.masks import as_scores
from trocar.edit.where_to_edit.place import Matrix, Place, guarded
from trocar.edit.where_to_edit.suffix import Rows
from trocar.locate import Scores

if TYPE_CHECKING:
    from trocar.patch import Patch

LOST = 0.1  # share of the change that a cast may remove before a warning


@dataclass(frozen=True, eq=False)
class EntryChange:
    """New values (K, d) of entries `index` (K,) of one matrix, in the model's dtype, on the CPU."""

    matrix: Matrix
    index: torch.Tensor
    values: torch.Tensor

    def write(self, weight: torch.Tensor) -> None:
        """Put the values into a copy of the stored parameter."""
        dim = self.matrix.dim
        values = (self.values if dim == 0 else self.values.T).to(weight.device)
        weight.index_copy_(dim, (self.index + (self.matrix.offset if self.matrix.side == "up" else 0)).to(weight.device), values)


@dataclass(frozen=True, eq=False)
class LowRankChange:
    """weight += left (h, r) @ right (r, d), entry-major."""

    matrix: Matrix
    left: torch.Tensor
    right: torch.Tensor

    def write(self, weight: torch.Tensor) -> None:
        change = (self.left @ self.right).to(weight.device)
        change = change if self.matrix.dim == 0 else change.T
        up = self.matrix.side == "up"  # of a fused parameter only the matrix's own entries
        target = weight.narrow(self.matrix.dim, self.matrix.offset, self.matrix.entries) if up else weight
        target.copy_(target.to(change.dtype) + change)


@dataclass(frozen=True, eq=False)
class WholeChange:
    """A whole parameter, for fine-tuning without a mask."""

    name: str
    value: torch.Tensor

    def write(self, weight: torch.Tensor) -> None:
        weight.copy_(self.value.to(weight.device))


Change = EntryChange | LowRankChange | WholeChange


def changes_of(leaves: Sequence[AnyLeaf]) -> tuple[list[Change], float, float]:
    """Changes of one edit from its final leaves (E = 1), the norm of the change, and the share that the cast to the model's dtype loses."""
    changes: list[Change] = []
    moved = lost = 0.0
    for leaf in leaves:
        if isinstance(leaf, LowRankLeaf):
            changes.append(LowRankChange(leaf.matrix, leaf.left[0].detach().cpu(), leaf.right[0].detach().cpu()))
            moved += float((leaf.left[0].detach() @ leaf.right[0].detach()).double().square().sum())
            continue
        if isinstance(leaf, WholeLeaf):
            weight, origin = leaf.weight.detach(), leaf.origin()
            cast = weight.to(origin.dtype)
            moved += float((weight - origin.to(weight.dtype)).double().square().sum())
            lost += float((weight - cast.to(weight.dtype)).double().square().sum())
            changes.append(WholeChange(leaf.name, cast.cpu()))
            continue
        everything = torch.arange(leaf.matrix.entries, device=leaf.weight.device)
        index = everything if leaf.index is None else leaf.index[0]
        weight, origin = leaf.weight[0].detach(), leaf.origin()[0]
        if leaf.valid is not None:
            index, weight, origin = index[leaf.valid[0]], weight[leaf.valid[0]], origin[leaf.valid[0]]
        if not len(index):
            continue
        cast = weight.to(origin.dtype)
        moved += float((weight - origin.to(weight.dtype)).double().square().sum())
        lost += float((weight - cast.to(weight.dtype)).double().square().sum())
        changes.append(EntryChange(leaf.matrix, index.cpu(), cast.cpu()))
    return changes, moved**0.5, (lost / moved) ** 0.5 if moved else 0.0


@dataclass(frozen=True, eq=False)
class EditResult:
    """One edit: its patch, its mask over channels (None for edits without one), and what happened (status, steps, losses, warnings)."""

    patch: Patch
    mask: Scores | None
    log: Mapping[str, Any]


@dataclass(eq=False)
class Edits:
    """Many edits of one model, each from the clean weights. `edits[i]` is edit i with its patch; `logits` evaluates without patches."""

    place: Place
    config: EditConfig
    method: str
    masks: torch.Tensor | None  # (E, n, h) bool, on the CPU
    changes: list[list[Change]]
    logs: list[dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.changes)

    @cached_property
    def fingerprint(self) -> str:
        return model_fingerprint(self.place.model)

    def parameters(self, edit: int) -> dict[str, torch.Tensor]:
        """Full edited parameters by name, copies."""
        found: dict[str, torch.Tensor] = {}
        for change in self.changes[edit]:
            name = change.name if isinstance(change, WholeChange) else change.matrix.view.name
            if name not in found:
                found[name] = self.place.model.get_parameter(name).detach().clone()
            change.write(found[name])
        return found

    def logits(self, rows: Rows, which: Sequence[Sequence[int]] | None = None, batch: int = 512) -> Iterator[torch.Tensor]:
        """Yield for every edit its logits on `rows` (or on its own rows `which[i]`), (rows, classes), on the CPU.

        Everything below the first edited block comes from the cache, so an edit costs one pass through the blocks above it.
        """
        every = list(range(rows.count))
        upper = {
            f"{path}." for layer in range(self.place.first, self.place.tower.n_layers) for path in [self.place.tower.path(layer, "block")]
        }
        upper |= {f"{path}." for path in (self.place.tower.final_norm_path, self.place.tower.head_path) if path}
        with guarded(self.place.model), torch.no_grad():
            for edit in range(len(self)):
                chosen = every if which is None else list(which[edit])
                values = self.parameters(edit)
                below = any(not name.startswith(tuple(upper)) for name in values)
                with swapped(self.place.model, values):
                    parts = [
                        (rows.whole if below else rows.logits)(rows=chosen[start : start + batch]).cpu()
                        for start in range(0, len(chosen), batch)
                    ]
                yield torch.cat(parts)

    def mask(self, edit: int) -> Scores | None:
        if self.masks is None:
            return None
        return as_scores(self.place, self.masks[edit], f"where-to-edit {self.method}", self.settings, self.fingerprint)

    def patch(self, edit: int) -> Patch:
        """The change as a patch of rows and columns; without operations where nothing was done."""
        from trocar.patch import Base, LowRank, Patch, SparseReplace

        ops: list[Any] = []
        whole: dict[str, torch.Tensor] = {}
        for change in self.changes[edit]:
            if isinstance(change, LowRankChange) and change.matrix.view.rows is None:
                up = change.matrix.side == "up"
                a, b = (change.right, change.left) if up else (change.left.T.contiguous(), change.right.T.contiguous())
                ops.append(LowRank(change.matrix.view.name, a, b, change.matrix.view.transposed))
            else:
                name = change.name if isinstance(change, WholeChange) else change.matrix.view.name
                if name not in whole:
                    whole[name] = self.place.model.get_parameter(name).detach().clone()
                change.write(whole[name])
        for name, value in whole.items():
            op = SparseReplace.between(name, self.place.model.get_parameter(name), value)
            ops += [] if op is None else [op]
        settings = {**self.settings, **self.config.model_dump(mode="json"), "mask": self.method}
        if not ops:
            return Patch(Base.of(self.place.model, ops), (), "where-to-edit", settings)
        return Patch.of(self.place.model, ops, "where-to-edit", settings)

    def __getitem__(self, edit: int) -> EditResult:
        return EditResult(self.patch(edit), self.mask(edit), self.logs[edit])
