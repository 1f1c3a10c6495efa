"""Several patches on one base: what they both write, in which order they act, and taking any one of them out again."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from trocar.anatomy import tensor_fingerprint
from trocar.core.errors import PatchBaseError, PatchOverlapError, PatchStateError
from trocar.patch.actions import Place, Target, Write
from trocar.patch.ops.vector import Attach
from trocar.patch.patch import Applied, Patch, Verify, active, check_base
from trocar.patch.removal import Removal


class Overlap(NamedTuple):
    """What two patches both write: their numbers in the stack, the parameter or point, and how many of its entries."""

    first: int
    second: int
    where: str
    entries: int


@dataclass(frozen=True)
class Stack:
    """Patches of one base, to be applied together, in this order."""

    patches: tuple[Patch, ...]
    on_overlap: Literal["refuse", "order"]

    @property
    def ops(self) -> list[Any]:
        """The operations of all patches."""
        return [op for patch in self.patches for op in patch.ops]

    def overlaps(self, model: Any) -> list[Overlap]:
        """Entries, points and parts that more than one patch writes. model: the base, for what gates and removals reach; may be on meta."""
        target = Target.of(model, self.ops, allow_nonfinite=True)
        reached = [_reached(patch, target) for patch in self.patches]
        found = []
        for (one, ours), (two, theirs) in itertools.combinations(enumerate(reached), 2):
            for name in sorted(ours.keys() & theirs.keys()):
                count = common(ours[name], theirs[name], _shape(target, name))
                if count:
                    found.append(Overlap(one, two, name, count))
        return found

    def apply(self, model: Any, verify: Verify = "full", allow_nonfinite: bool = False) -> AppliedStack:
        """Apply all, or none.

        Raises PatchOverlapError if two write the same place and on_overlap is "refuse", and what `Patch.apply` raises.
        """
        target = Target.of(model, self.ops, allow_nonfinite)
        for patch in self.patches:
            if patch.ops and any(one.patch.digest == patch.digest for one in active(target.model)):
                raise PatchStateError("A patch of the stack is already applied to the model.", "Revert it first.")
            check_base(patch, target, verify)
        if self.on_overlap == "refuse" and (overlaps := self.overlaps(target.anatomy)):
            first = overlaps[0]
            more = f" (and {len(overlaps) - 1} more places)" if len(overlaps) > 1 else ""
            raise PatchOverlapError(
                f"Patches {first.first} and {first.second} both write {first.entries} entries of {first.where}{more}.",
                'Use on_overlap="order" if the later one shall act on what the earlier one left.',
            )
        return AppliedStack(self.patches, target)

    @contextlib.contextmanager
    def applied(self, model: Any, verify: Verify = "full") -> Iterator[AppliedStack]:
        """Apply inside the context, revert all on every way out."""
        applied = self.apply(model, verify)
        try:
            yield applied
        finally:
            applied.revert()

    def combined(self, model: Any) -> Patch:
        """One patch that does what the stack does, for the same base (which `model` must be). Raises what `apply` raises."""
        with self.applied(model):
            pass
        first = self.patches[0]
        settings = {"stack": [{"method": patch.method, "settings": patch.settings, "digest": patch.digest} for patch in self.patches]}
        return Patch.of(model, self.ops, first.method if len(self.patches) == 1 else "stack", settings)


def stack(patches: Sequence[Patch], on_overlap: Literal["refuse", "order"] = "refuse") -> Stack:
    """Patches of one base, to be applied together.

    on_overlap: "refuse" (default) raises when two write the same entry, point or part; "order" lets them act in the given order, each on
    what the ones before it left: a later replacement wins, updates, gates and vectors add up.
    Raises PatchBaseError if they belong to different bases, PatchOverlapError if one is there twice or a removal is not the last.
    """
    patches = tuple(patches)
    if not patches:
        raise PatchOverlapError("A stack needs at least one patch.", "Give one or more.")
    if on_overlap not in ("refuse", "order"):
        raise PatchOverlapError(f"on_overlap='{on_overlap}' has no meaning.", "Use 'refuse' or 'order'.")
    if len({patch.base.fingerprint for patch in patches}) > 1:
        raise PatchBaseError("The patches belong to different bases.", "Only patches of one base can be stacked; see patch.rebase.")
    digests = [patch.digest for patch in patches if patch.ops]  # patches that do nothing may be there any number of times
    if len(set(digests)) < len(digests):
        raise PatchOverlapError("The same patch is in the stack twice.", "Leave one of them out.")
    if any(op.Record.removes for patch in patches[:-1] for op in patch.ops):
        raise PatchOverlapError("A patch that removes parts must be the last of a stack, and only one can.", "Change the order.")
    return Stack(patches, on_overlap)


class AppliedStack:
    """A stack on a model. `revert(i)` takes one patch out, `revert()` all."""

    def __init__(self, patches: Sequence[Patch], target: Target) -> None:
        self.target, self.ops = target, [op for patch in patches for op in patch.ops]
        self._applied: dict[int, Applied] = {}
        try:
            for number, patch in enumerate(patches):
                self._applied[number] = self._start(patch)
        except BaseException:
            self._take_back(0)
            raise

    @property
    def numbers(self) -> tuple[int, ...]:
        """The patches that are on the model, by their numbers in the stack."""
        return tuple(self._applied)

    def revert(self, number: int | None = None, force: bool = False) -> None:
        """Take patch `number` (or all) off: the model is then, bit for bit, what the base with the others is.

        Later patches are taken back and applied again, on the base's own bits. Raises PatchStateError if that patch is not applied, or
        (without force) if the model was changed in between.
        """
        if number is not None and number not in self._applied:
            raise PatchStateError(f"Patch {number} of the stack is not applied.", f"Applied are: {list(self._applied)}.")
        if not force:
            self._check()
        later = self._take_back(min(self._applied, default=0) if number is None else number)
        if number is None:
            return
        for again in later:
            if again.patch is not later[0].patch:
                self._applied[self._number(again)] = self._start(again.patch)

    def _number(self, applied: Applied) -> int:
        return self._numbers[id(applied)]

    def _start(self, patch: Patch) -> Applied:
        target = Target.of(self.target.model, self.ops, self.target.allow_nonfinite)
        return Applied(patch, target, [op.plan(target) for op in patch.ops], need_effect=False).start()

    def _take_back(self, number: int) -> list[Applied]:
        """Take back all from `number` on, the last first; returns them in order."""
        later = [one for one in self._applied if one >= number]
        self._numbers = {id(self._applied[one]): one for one in later}
        taken = [self._applied[one] for one in later]
        for one in reversed(later):
            self._applied.pop(one).revert(force=True)
        return taken

    def _check(self) -> None:
        """Raises PatchStateError if what the patches left is not there any more."""
        latest: dict[int, tuple[torch.Tensor, str]] = {}
        for applied in self._applied.values():
            latest |= {id(tensor): (tensor, digest) for tensor, digest in applied._after}
        if any(tensor_fingerprint(tensor) != digest for tensor, digest in latest.values()):
            raise PatchStateError("The model was changed after the stack was applied.", "Undo that first, or use force=True.")


def _reached(patch: Patch, target: Target) -> dict[str, list[Place]]:
    """Parameter or point -> the places of it that a patch writes."""
    found: dict[str, list[Place]] = {}
    for op in patch.ops:
        for step in op.plan(target):
            if isinstance(step, Write):
                found.setdefault(target.first_name(step.place.name), []).append(step.place)
            elif isinstance(step, Attach):
                for where in step.reach or (str(step.intervention.where),):
                    found.setdefault(where, []).append(Place(where))
            elif isinstance(step, Removal):
                for name, parameter in target.model.named_parameters():
                    if step.surgery.renamed(name) is None:
                        found.setdefault(name, []).append(Place(name))
                    for dim, left in step.surgery.keep.get(name, ()):
                        gone = sorted(set(range(parameter.shape[dim])) - set(left))
                        found.setdefault(name, []).append(Place(name, dim, torch.tensor(gone)))
    return found


def _shape(target: Target, name: str) -> tuple[int, ...]:
    tensor = target.find(name)
    return () if tensor is None else tuple(tensor.shape)


def common(ours: Sequence[Place], theirs: Sequence[Place], shape: tuple[int, ...]) -> int:
    """How many entries of a tensor of `shape` lie both in one of our and in one of their places."""
    if not shape:
        return 1
    if all(place.index is None or place.dim is not None for place in [*ours, *theirs]) and len(ours) == len(theirs) == 1:
        return _slices(ours[0], theirs[0], shape)  # the common case, without a mask of the whole tensor
    marks = [torch.zeros(shape, dtype=torch.bool) for _ in range(2)]
    for mark, places in zip(marks, (ours, theirs), strict=True):
        for place in places:
            place.write(mark, torch.ones_like(place.read(mark)))
    return int((marks[0] & marks[1]).sum())


def _slices(a: Place, b: Place, shape: tuple[int, ...]) -> int:
    size = math.prod(shape)
    for dim in {place.dim for place in (a, b) if place.dim is not None}:
        sets = [set(place.index.tolist()) for place in (a, b) if place.dim == dim and place.index is not None]
        size = size // shape[dim] * len(set.intersection(*sets))
    return size
