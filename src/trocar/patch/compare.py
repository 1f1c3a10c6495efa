"""The patch between two models of one structure, or between two checkpoints."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trocar.anatomy import Anatomy, FileTensor, fingerprint, structure_fingerprint
from trocar.core.errors import EditError, PatchBaseError
from trocar.patch.actions import effect
from trocar.patch.checkpoint import entries, match, read_tensor, scan, skeleton
from trocar.patch.ops import Op
from trocar.patch.ops.low_rank import LowRank, updated
from trocar.patch.ops.sparse import SparseReplace
from trocar.patch.patch import Patch
from trocar.patch.record import Base, Effect, dtype_code


def diff(base: Any, edited: Any, low_rank: float | None = None) -> Patch:
    """The patch that turns `base` into `edited`, parameter by parameter in the smallest form (whole, rows, columns, entries).

    base, edited: two loaded models, or two checkpoint folders, which are read one tensor at a time. low_rank: for weight matrices, the
    largest relative error (Frobenius norm of the rest over that of the change) at which a low-rank update is taken where it is smaller;
    None (default) is lossless: `base` with the patch is `edited` bit for bit. Equal models give a patch without operations.

    Raises PatchBaseError if names, shapes or dtypes differ, DataError and ExportError for folders that cannot be read or matched.
    """
    folders = [isinstance(one, str | os.PathLike) for one in (base, edited)]
    if folders[0] != folders[1]:
        raise PatchBaseError("A model cannot be compared with a folder.", "Give two models, or two folders.")
    settings = {} if low_rank is None else {"low_rank": low_rank}
    if folders[0]:
        return _diff_folders(Path(base), Path(edited), low_rank, settings)
    one, two = Anatomy.of(base), Anatomy.of(edited)
    if one.family.name != two.family.name or structure_fingerprint(one.model) != structure_fingerprint(two.model):
        raise PatchBaseError(f"The models differ in their parameters: {_first_difference(one.model, two.model)}.", _SAME)
    theirs = dict(_tensors(two.model))
    linears = _linear_weights(one.model)
    ops = []
    for name, before in _tensors(one.model):
        op = _compare(name, before, theirs[name], low_rank, linears)
        ops += [] if op is None else [op]
    patch = Patch.of(one.model, ops, "diff", settings, allow_nonfinite=True)
    if low_rank is None:
        with patch.applied(one.model, verify="structure", allow_nonfinite=True):
            if fingerprint(one.model) != fingerprint(two.model):
                raise EditError("The difference cannot be expressed: the models differ in something other than values.", "Check adapters.")
    return patch


_SAME = "Only models of one structure can be compared; a removal is made with trocar.patch.Remove."


def _compare(name: str, before: torch.Tensor, after: torch.Tensor, low_rank: float | None, linears: dict[str, bool]) -> Op | None:
    if before.dtype != after.dtype:
        raise PatchBaseError(f"{name} is {before.dtype} in one and {after.dtype} in the other.", "Load both in one dtype.")
    op = SparseReplace.between(name, before, after)
    if op is None or low_rank is None or name not in linears:
        return op
    return _factored(name, before, after, low_rank, linears[name], sum(part.nbytes for part in op.tensors().values())) or op


def _factored(name: str, before: torch.Tensor, after: torch.Tensor, tolerance: float, transposed: bool, budget: int) -> LowRank | None:
    """The smallest low-rank update that is exact enough and smaller than `budget` bytes, or None."""
    wide = torch.float64 if before.dtype == torch.float64 else torch.float32
    delta = after.detach().to(wide) - before.detach().to(wide)
    if not bool(delta.isfinite().all()):
        return None
    delta = delta.T if transposed else delta
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    norm = float(values.norm())
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # what is left out when the rank is the position
    enough = [rank for rank in range(1, len(values) + 1) if rank == len(values) or float(tails[rank]) <= tolerance * norm]
    rank = enough[0]
    if rank * sum(delta.shape) * values.element_size() >= budget:
        return None
    root = values[:rank].sqrt()
    op = LowRank(name, root[:, None] * right[:rank], left[:, :rank] * root, transposed)
    got = updated(before.detach(), op.a, op.b, 1.0, transposed)
    rest = float((got.to(wide) - after.detach().to(wide)).norm())
    rounding = float(torch.finfo(before.dtype).eps) * float(after.detach().to(wide).norm())
    return op if rest <= tolerance * norm + rounding else None


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, tied ones once."""
    yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _linear_weights(model: Any) -> dict[str, bool]:
    """Weights of linear maps -> whether they are stored (in, out)."""
    from transformers.pytorch_utils import Conv1D

    modules = model.named_modules()
    return {f"{name}.weight": isinstance(one, Conv1D) for name, one in modules if isinstance(one, torch.nn.Linear | Conv1D)}


def _first_difference(one: Any, two: Any) -> str:
    ours, theirs = ({name: tuple(tensor.shape) for name, tensor in _tensors(model)} for model in (one, two))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            return f"{name} is {ours.get(name, 'missing')} in the base and {theirs.get(name, 'missing')} in the other"
    return "they belong to different families"


def _diff_folders(base: Path, edited: Path, low_rank: float | None, settings: dict[str, Any]) -> Patch:
    models = [skeleton(folder) for folder in (base, edited)]
    if structure_fingerprint(models[0]) != structure_fingerprint(models[1]):
        raise PatchBaseError(f"The checkpoints differ in their parameters: {_first_difference(*models)}.", _SAME)
    model = models[0]
    names: dict[str, None] = {name: None for name, _ in _tensors(model)}
    ours = match(model, names, scan(base))
    theirs = match(model, names, scan(edited))
    linears = _linear_weights(model)
    ops: list[Op] = []
    effects: list[Effect] = []
    sizes: dict[str, int] = {}
    for name in names:
        before, after = _read(ours[name][0]), None
        sizes[str(dtype_code(before.dtype))] = sizes.get(str(dtype_code(before.dtype)), 0) + before.numel()
        if ours[name][0].fingerprint == theirs[name][0].fingerprint:
            continue
        after = _read(theirs[name][0])
        if before.shape != after.shape:
            raise PatchBaseError(f"{name} is {tuple(before.shape)} in one and {tuple(after.shape)} in the other.", _SAME)
        op = _compare(name, before, after, low_rank, linears)
        if op is not None:
            new = after if isinstance(op, SparseReplace) else updated(before, op.a, op.b, 1.0, op.transposed)  # type: ignore[union-attr]
            ops.append(op)
            effects.append(effect(before, new))
    touched = {op.parameter: ours[op.parameter][0].fingerprint for op in ops}  # type: ignore[union-attr]
    record = Base(
        fingerprint=joint_fingerprint({name: found[0].fingerprint for name, found in ours.items()}),
        structure=structure_fingerprint(model),
        family=Anatomy.of(model).family.name,
        dtype=max(sorted(sizes), key=lambda code: sizes[code]),  # type: ignore[arg-type]
        tensors=dict(sorted(touched.items())),
    )
    return Patch(record, tuple(ops), "diff", settings, (), tuple(effects))


def _read(tensor: FileTensor) -> torch.Tensor:
    return read_tensor(tensor.file, entries(tensor.file)[tensor.name])


def joint_fingerprint(digests: dict[str, str]) -> str:
    """The fingerprint of a model whose tensors have these fingerprints (`trocar.anatomy.fingerprint` of the loaded one)."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        total.update(f"{name}\0{digests[name]}\n".encode())
    return total.hexdigest()
