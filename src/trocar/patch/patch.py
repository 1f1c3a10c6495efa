"""A patch: a change to one model as data. Made, applied, taken back, saved and loaded."""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from trocar.anatomy import fingerprint, structure_fingerprint, tensor_fingerprint
from trocar.core.errors import EditError, PatchBaseError, PatchFormatError, PatchStateError
from trocar.patch import format as file_format
from trocar.patch.actions import Action, Target, Write, total
from trocar.patch.format import Header
from trocar.patch.ops import KINDS, Op
from trocar.patch.record import MAX_NAME, Base, Effect, Spec, dtype_code, torch_dtype

Verify = Literal["full", "touched", "structure"]


@dataclass(frozen=True, eq=False)
class Patch:
    """A change to one model: operations, the base they belong to, and what was measured when the patch was made.

    base: made by `Base.of(model, ops)`. ops: carried out in order. method, settings, measurements: what made it, as JSON-able data.
    effects: what every operation changed. `Patch.of` fills base and effects in; two patches are equal if their files would be.
    """

    base: Base
    ops: tuple[Op, ...]
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    measurements: Sequence[Mapping[str, Any]] = ()
    effects: tuple[Effect | None, ...] = ()

    def __post_init__(self) -> None:
        set_ = functools.partial(object.__setattr__, self)
        set_("ops", tuple(self.ops))
        set_("effects", tuple(self.effects) or (None,) * len(self.ops))
        set_("settings", file_format.plain(dict(self.settings), "settings"))
        set_("measurements", tuple(file_format.plain([dict(one) for one in self.measurements], "measurements")))
        set_("method", file_format.plain(str(self.method), "method"))
        if len(self.method) > MAX_NAME:
            raise PatchFormatError(f"The name of the patch's method has {len(self.method)} characters.", f"At most {MAX_NAME} are kept.")
        if len(self.effects) != len(self.ops):
            raise PatchFormatError(f"The patch has {len(self.effects)} effects for {len(self.ops)} operations.", "Use Patch.of.")
        if any(op.Record.removes for op in self.ops[:-1]):
            raise PatchFormatError("A removal must be the last operation of a patch.", "The others name things as they were before it.")
        if len(self.ops) > file_format.MAX_OPS:
            raise PatchFormatError(f"The patch has {len(self.ops)} operations.", f"At most {file_format.MAX_OPS} are possible.")

    @classmethod
    def of(
        cls,
        model: Any,
        ops: Sequence[Op],
        method: str = "",
        settings: Mapping[str, Any] | None = None,
        measurements: Sequence[Mapping[str, Any]] = (),
        allow_nonfinite: bool = False,
    ) -> Patch:
        """A patch for `model` as it is now. It is applied once and taken back, to prove that it can be and to measure every operation.

        Raises what `apply` raises, among it EditError for an operation that changes nothing.
        """
        trial = cls(Base.of(model, ops), tuple(ops))
        applied = trial.apply(model, verify="structure", allow_nonfinite=allow_nonfinite)
        applied.revert()
        return cls(trial.base, trial.ops, method, settings or {}, measurements, applied.effects)

    def apply(self, model: Any, verify: Verify = "full", allow_nonfinite: bool = False) -> Applied:
        """Change `model` in place. Everything is checked before anything is touched; if a step fails midway, all are taken back.

        verify: `full` compares the fingerprint of the whole model with the base's (about a second per gigabyte), `touched` only those of
        the parameters that the patch writes, `structure` only names and shapes.
        Raises PatchBaseError (another base), PatchStateError (already applied), ComponentError, and EditError (NaN or infinite values
        without allow_nonfinite, a gate that no weights can express, an operation that changes nothing).
        """
        target = Target.of(model, self.ops, allow_nonfinite)
        if self.ops and any(one.patch.digest == self.digest for one in active(target.model)):
            raise PatchStateError("This patch is already applied to the model.", "Revert it first.")
        check_base(self, target, verify)
        steps = [op.plan(target) for op in self.ops]
        return Applied(self, target, steps).start()

    @contextlib.contextmanager
    def applied(self, model: Any, verify: Verify = "full", allow_nonfinite: bool = False) -> Iterator[Applied]:
        """Apply inside the context, revert on every way out."""
        applied = self.apply(model, verify, allow_nonfinite)
        try:
            yield applied
        finally:
            if applied.active:
                applied.revert()

    def rebase(self, model: Any) -> Patch:
        """The same operations for another model of the same structure, values rounded to its dtypes; measurements are left behind.

        For a base in another dtype, or one that was trained on: whether the change still does what it did must be measured again.
        Raises PatchBaseError if names or shapes differ.
        """
        target = Target.of(model, self.ops)
        check_structure(self, target)
        return Patch.of(model, [op.cast(target) for op in self.ops], self.method, self.settings)

    def touched(self) -> tuple[str, ...]:
        """Names of the parameters that the patch writes."""
        return tuple(self.base.tensors)

    def summary(self) -> list[dict[str, Any]]:
        """One row per operation: op, where, shape, changed (entries), norm (of the change), bytes."""
        return self.header.rows()

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return 8 + len(self._encoded[0]) + sum(len(chunk) for chunk in self._encoded[1])

    @functools.cached_property
    def header(self) -> Header:
        records = tuple(op.record() for op in self.ops)
        return Header(self.base, records, self.effects, self.method, self.settings, tuple(self.measurements))

    @functools.cached_property
    def _raw(self) -> dict[str, memoryview]:
        return {f"{number}.{key}": raw_bytes(tensor) for number, op in enumerate(self.ops) for key, tensor in op.tensors().items()}

    @functools.cached_property
    def _encoded(self) -> tuple[bytes, list[memoryview]]:
        return file_format.encode(self.header, self._raw)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of everything in the patch; equal patches have equal digests and equal files."""
        import json

        return json.loads(json.loads(self._encoded[0])["__metadata__"]["trocar"])["digest"]

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Patch) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Patch({', '.join(op.kind for op in self.ops) or 'nothing'}; {self.nbytes} bytes)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file. Equal patches give equal bytes."""
        file_format.write(path, self.header, self._raw)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Patch:
        """Read a file made by `save`. Nothing in it is executed or imported. Raises PatchFormatError."""
        buffers: dict[str, tuple[bytearray, Spec]] = {}

        def keep(name: str, spec: Spec) -> bytearray:
            buffers[name] = (bytearray(spec.nbytes), spec)
            return buffers[name][0]

        header = file_format.read(path, keep)
        ops = []
        for number, record in enumerate(header.ops):
            tensors = {}
            for key in record.specs():
                buffer, spec = buffers.pop(f"{number}.{key}")
                tensors[key] = torch.frombuffer(buffer, dtype=torch_dtype(spec.dtype)).reshape(spec.shape)
            ops.append(KINDS[record.kind].build(record, tensors))
        return cls(header.base, tuple(ops), header.method, header.settings, header.measurements, header.effects)


class Applied:
    """A patch on a model, until `revert`. `effects`: what every operation changed."""

    def __init__(self, patch: Patch, target: Target, steps: Sequence[Sequence[Action]], need_effect: bool = True) -> None:
        self.patch, self.target, self.need_effect = patch, target, need_effect
        self._steps = steps
        self._begun: list[Action] = []
        self._after: list[tuple[Any, str]] = []  # (tensor, fingerprint) as the patch left them
        self.effects: tuple[Effect, ...] = ()
        self.active = False

    def start(self) -> Applied:
        try:
            effects = []
            for number, (op, steps) in enumerate(zip(self.patch.ops, self._steps, strict=True)):
                parts = []
                for step in steps:
                    self._begun.append(step)
                    parts.append(step.do())
                effects.append(total(parts))
                if self.need_effect and effects[-1].changed == 0:
                    where = f"operation {number} ({op.kind} of {op.record().where()})"
                    raise EditError(f"The patch's {where} changes nothing: the model already has these values.", "Leave it out.")
            self.effects = tuple(effects)
            tensors = {id(step.tensor): step.tensor for step in self._begun if isinstance(step, Write)}
            self._after = [(tensor, tensor_fingerprint(tensor)) for tensor in tensors.values()]
        except BaseException:
            self._undo()
            raise
        self.active = True
        active(self.target.model).append(self)
        return self

    def revert(self, force: bool = False) -> None:
        """Restore the model bit for bit.

        force: also if what the patch wrote is no longer there; its places then get their original values back, other changes stay.
        Raises PatchStateError if the patch is not applied, if blocks or heads were removed after it, or (without force) if the parameters
        that it wrote were changed in between.
        """
        if not self.active:
            raise PatchStateError("This patch is not applied.", "It was reverted before.")
        others = active(self.target.model)
        later = others[others.index(self) + 1 :]
        if any(op.Record.removes for one in later for op in one.patch.ops):
            raise PatchStateError("Parts of the model were removed after this patch was applied.", "Revert the removal first.")
        if not force and (changed := self._changed()):
            raise PatchStateError(
                f"The model was changed after the patch was applied: {changed}.", "Undo that first, or revert(force=True) to overwrite it."
            )
        self._undo()
        others.remove(self)
        self.active = False

    def _changed(self) -> str:
        names = {id(step.tensor): step.place.name for step in self._begun if isinstance(step, Write)}
        removed = any(op.Record.removes for op in self.patch.ops)
        for tensor, digest in self._after:
            name = names[id(tensor)]
            if not removed and self.target.find(name) is not tensor:
                return f"{name} is another object"
            if tensor_fingerprint(tensor) != digest:
                return f"{name} has other values"
        if any(not step.intact() for step in self._begun if hasattr(step, "intact")):  # type: ignore[attr-defined]
            return "what an operation put into it is not there any more"
        return ""

    def _undo(self) -> None:
        for step in reversed(self._begun):
            step.undo()
        self._begun.clear()


_ACTIVE: weakref.WeakKeyDictionary[Any, list[Applied]] = weakref.WeakKeyDictionary()


def active(model: Any) -> list[Applied]:
    """The patches on a model at this moment, in the order in which they were applied."""
    return _ACTIVE.setdefault(model, [])


def check_structure(patch: Patch, target: Target) -> None:
    """Raises PatchBaseError unless family, names and shapes are those of the base."""
    base, family = patch.base, target.anatomy.family.name
    if family != base.family:
        raise PatchBaseError(f"The patch belongs to a model of the family {base.family}, this one is a {family}.", "Use its own base.")
    if structure_fingerprint(target.model) != base.structure:
        raise PatchBaseError(
            f"The patch belongs to a {base.family} with other parameters (names or shapes differ).",
            "Use its own base: the same class of the same size, without adapters or removed parts.",
        )


def check_base(patch: Patch, target: Target, verify: Verify) -> None:
    """Raises PatchBaseError unless the model is the patch's base."""
    base = patch.base
    check_structure(patch, target)
    if verify == "structure":
        return
    if verify not in ("full", "touched"):
        raise PatchBaseError(f"verify='{verify}' has no meaning.", "Use 'full', 'touched' or 'structure'.")
    wanted = sorted({name for op in patch.ops for name in op.parameters(target)})
    unknown = [name for name in wanted if name not in base.tensors]
    if verify == "touched" and unknown:
        raise PatchBaseError(f"The patch does not know the fingerprint of {unknown[0]}.", "Make it with Patch.of, or use verify='full'.")
    if verify == "full" and fingerprint(target.model) == base.fingerprint:
        return
    different = [name for name in wanted if name in base.tensors and tensor_fingerprint(target.tensor(name)) != base.tensors[name]]
    if verify == "touched" and not different:
        return
    dtype = Base.of(target.anatomy).dtype
    if dtype != base.dtype:
        raise PatchBaseError(
            f"The patch belongs to a base in {torch_dtype(base.dtype)}, the model is in {torch_dtype(dtype)}.",
            f"Load the model with dtype={torch_dtype(base.dtype)}, or make a patch for this model with patch.rebase(model).",
        )
    if different:
        raise PatchBaseError(
            f"The model is not the patch's base: {different[0]} has other values"
            + (f" (so do {len(different) - 1} more of its {len(wanted)} parameters)." if len(different) > 1 else "."),
            "Load the base again, revert what was applied, or patch.rebase(model).",
        )
    raise PatchBaseError(
        "The model is not the patch's base: parameters that the patch does not touch have other values.",
        "Load the base again; verify='touched' accepts the model as long as what the patch writes is the base's.",
    )


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, little-endian."""
    assert dtype_code(tensor.dtype) is not None
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
