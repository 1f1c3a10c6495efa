"""`remove`: heads, neurons and blocks taken out of a model physically, with every coupled shape and setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic

from trocar.core.errors import EditError
from trocar.patch.actions import Target
from trocar.patch.ops.gate import listed
from trocar.patch.ops.sparse import checked, own
from trocar.patch.record import ComponentName, Record, sorted_unique

if TYPE_CHECKING:
    import torch


class RemoveRecord(Record):
    kind: Literal["remove"] = "remove"
    components: Annotated[tuple[ComponentName, ...], pydantic.Field(min_length=1)]

    removes: ClassVar[bool] = True

    @pydantic.field_validator("components")
    @classmethod
    def _removable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name.endswith((".attn", ".mlp")):
                raise ValueError(f"{name} cannot be removed, only heads, neurons and blocks")
        return sorted_unique(value, "components")

    def where(self) -> str:
        return listed(list(self.components))

    def shape_text(self) -> str:
        counts = {"heads": 0, "neurons": 0, "blocks": 0}
        for name in self.components:
            last = name.rpartition(".")[2]
            counts["heads" if last[0] == "H" else "neurons" if last[0] == "N" else "blocks"] += 1
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


@dataclass(frozen=True)
class Surgery:
    """What a removal does, in names: for models and for checkpoints.

    keep: parameter -> ((dim, kept entries), ...); blocks: path of a list of blocks -> kept blocks, in order; heads, kv_heads and
    neurons: (tower, layer before the removal) -> how many remain.
    """

    keep: Mapping[str, tuple[tuple[int, tuple[int, ...]], ...]]
    blocks: Mapping[str, tuple[int, ...]]
    heads: Mapping[tuple[str, int], int]
    kv_heads: Mapping[tuple[str, int], int]
    neurons: Mapping[tuple[str, int], int]

    def renamed(self, name: str) -> str | None:
        """A parameter's name after the removal, None if it goes with its block."""
        for path, kept in self.blocks.items():
            if name.startswith(f"{path}."):
                number, _, rest = name[len(path) + 1 :].partition(".")
                return f"{path}.{kept.index(int(number))}.{rest}" if int(number) in kept else None
        return name


@dataclass(frozen=True, eq=False)
class Remove:
    """Take heads, neurons and blocks out. Must be the last operation of a patch, the others name things as they were before.

    components: heads, neurons and blocks, as objects or names. With grouped queries the query heads that remain must be equally many in
    every group that remains; a group that loses all its heads loses its key and value too. A block's last head or neuron goes only with
    the whole block. `revert` puts the very same modules and parameters back. Raises PatchFormatError for other components; `apply` raises
    ComponentError and EditError.
    """

    components: Sequence[Any]

    kind: ClassVar[str] = "remove"
    Record: ClassVar[type[Record]] = RemoveRecord

    def __post_init__(self) -> None:
        own(self, "components", tuple(sorted({str(component) for component in self.components})))
        self.record()

    def record(self) -> RemoveRecord:
        return checked(RemoveRecord, components=self.components)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    @classmethod
    def build(cls, record: RemoveRecord, tensors: dict[str, torch.Tensor]) -> Remove:
        return cls(record.components)

    def cast(self, target: Target) -> Remove:
        return self

    def parameters(self, target: Target) -> list[str]:
        surgery = self.surgery(target)
        gone = [name for name, _ in target.model.named_parameters() if surgery.renamed(name) is None]
        return sorted({*surgery.keep, *gone})

    def plan(self, target: Target) -> list[Any]:
        from trocar.patch.removal import Removal

        return [Removal(target, self.surgery(target))]

    def surgery(self, target: Target) -> Surgery:
        """Work out what goes, and refuse what would leave the model inconsistent."""
        heads, neurons, blocks = _sorted_out(target, self.components)
        keep: dict[str, dict[int, set[int]]] = {}
        left: dict[str, dict[tuple[str, int], int]] = {"heads": {}, "kv_heads": {}, "neurons": {}}
        for key, gone in heads.items():
            left["heads"][key], left["kv_heads"][key] = _without_heads(target, key, gone, keep)
        for key, gone in neurons.items():
            left["neurons"][key] = _without_neurons(target, key, gone, keep)
        kept = {}
        for name, gone in blocks.items():
            tower = target.anatomy.tower(name)
            if len(gone) == tower.n_layers:
                raise EditError(f"All {tower.n_layers} blocks of {name or 'the model'} would be removed.", "Keep at least one.")
            kept[tower.blocks_path] = tuple(layer for layer in range(tower.n_layers) if layer not in gone)
        frozen = {name: tuple((dim, tuple(sorted(entries))) for dim, entries in sorted(dims.items())) for name, dims in keep.items()}
        return Surgery(frozen, kept, **left)


Key = tuple[str, int]  # tower, layer


def _sorted_out(target: Target, names: Sequence[str]) -> tuple[dict[Key, set[int]], dict[Key, set[int]], dict[str, set[int]]]:
    from trocar.anatomy import Block, Head

    heads: dict[Key, set[int]] = {}
    neurons: dict[Key, set[int]] = {}
    blocks: dict[str, set[int]] = {}
    for name in names:
        item: Any = target.anatomy.check(name)
        if isinstance(item, Block):
            blocks.setdefault(item.tower, set()).add(item.layer)
        else:
            (heads if isinstance(item, Head) else neurons).setdefault((item.tower, item.layer), set()).add(item.index)
    for tower, layer in [*heads, *neurons]:
        if layer in blocks.get(tower, ()):
            raise EditError(
                f"{f'{tower}.' if tower else ''}L{layer} is removed as a whole, its heads or neurons need not be named.", "Drop them."
            )
    return heads, neurons, blocks


def _without_heads(target: Target, key: Key, gone: set[int], keep: dict[str, dict[int, set[int]]]) -> tuple[int, int]:
    """Note what remains of a block's attention; returns the numbers of query heads and key/value heads left."""
    from trocar.anatomy import Linear

    name, layer = key
    tower = target.anatomy.tower(name)
    total, group, size = tower.heads(layer), tower.group(layer), tower.head_size(layer)
    kept = [head for head in range(total) if head not in gone]
    place = f"{f'{name}.' if name else ''}L{layer}"
    if not kept:
        raise EditError(f"All {total} heads of {place} would be removed.", f"Gate {place}.attn to 0, or remove the block.")
    per_group: dict[int, int] = {}
    for head in kept:
        per_group[head // group] = per_group.get(head // group, 0) + 1
    if len(set(per_group.values())) > 1:
        raise EditError(
            f"{place} has {group} query heads on each key/value head; removing {listed([f'H{head}' for head in sorted(gone)])} would leave "
            f"{', '.join(str(per_group.get(one, 0)) for one in range(total // group))} of them.",
            "Remove whole groups, or equally many from every group, or gate the heads to 0 instead.",
        )

    def entries(which: Sequence[int]) -> list[int]:
        return [head * size + offset for head in which for offset in range(size)]

    for role, which in (("q", kept), ("k", list(per_group)), ("v", list(per_group))):
        for part in target.anatomy.linear(Linear(layer, role, name)).row(entries(which)):
            keep.setdefault(part.name, {}).setdefault(part.dim, set()).update(part.index)
    for part in target.anatomy.linear(Linear(layer, "o", name)).column(entries(kept)):
        keep.setdefault(part.name, {}).setdefault(part.dim, set()).update(part.index)
    return len(kept), len(per_group)


def _without_neurons(target: Target, key: Key, gone: set[int], keep: dict[str, dict[int, set[int]]]) -> int:
    from trocar.anatomy import Linear

    name, layer = key
    tower = target.anatomy.tower(name)
    kept = [neuron for neuron in range(tower.neurons(layer)) if neuron not in gone]
    if not kept:
        place = f"{f'{name}.' if name else ''}L{layer}"
        raise EditError(f"All {tower.neurons(layer)} neurons of {place} would be removed.", f"Gate {place}.mlp to 0, or remove the block.")
    roles = [role for role in tower.linears(layer) if role in ("up", "gate")]
    parts = [part for role in roles for part in target.anatomy.linear(Linear(layer, role, name)).row(kept)]
    for part in parts + target.anatomy.linear(Linear(layer, "down", name)).column(kept):
        keep.setdefault(part.name, {}).setdefault(part.dim, set()).update(part.index)
    return len(kept)
