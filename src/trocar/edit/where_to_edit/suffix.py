"""The part of a model from the first edited block up, run with per-edit weights in its feed-forward matrices.

One entry of a mask is one vector of length d: row i of fc1 (`up`) or column i of fc2 (`down`) of an edited block, so every matrix is held
entry-major, (h, d), whatever its storage layout. A gated block's first entry is the pair gate row + up row. Entry (k, i) of the
(n, h) mask belongs to matrix k in the order up(l0), down(l0), up(l0 + 1), ...
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from trocar.anatomy import Anatomy, Linear, LinearView, Tower
from trocar.anatomy.linear import base_layer
from trocar.core.errors import ConfigError, DataError, UnsupportedModelError
from trocar.trace import capture_prefix
from trocar.trace.calls import override


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix that belongs to mask row `row`; `offset` is where its entries start in a fused module's output."""

    row: int
    layer: int
    side: str  # "up" (also the gate) or "down"
    view: LinearView
    entries: int  # h
    width: int  # d

    @property
    def module(self) -> torch.nn.Module:
        return self.view.module

    @property
    def offset(self) -> int:
        return self.view.rows[0] if self.view.rows is not None else 0

    def start(self) -> torch.Tensor:
        """The matrix as it stands in the model, entry-major (h, d)."""
        return self.view.get() if self.side == "up" else self.view.get().T

    @property
    def dim(self) -> int:
        """Dimension of the stored parameter along which entries are counted."""
        return self.view.out_dim if self.side == "up" else 1 - self.view.out_dim


@dataclass(frozen=True, eq=False)
class Place:
    """Where an edit may act: `blocks` feed-forward blocks in a row from `first` in one tower."""

    anatomy: Anatomy
    tower: Tower
    first: int
    blocks: int
    entries: int  # h
    width: int  # d
    matrices: tuple[Matrix, ...]

    @property
    def rows(self) -> int:
        """n, the number of mask rows: two per block."""
        return 2 * self.blocks

    @property
    def model(self) -> torch.nn.Module:
        return self.anatomy.model

    @cached_property
    def device(self) -> torch.device:
        return self.matrices[0].view.parameter.device

    @classmethod
    def of(cls, model: torch.nn.Module, first: int | None = None, blocks: int = 3, tower: str | None = None) -> Place:
        """Find the edited matrices.

        first: 0-based; None takes round(7/12 L), at most L - blocks (the paper's 7 of 12).
        Raises ConfigError for blocks the model does not have, UnsupportedModelError for weights that cannot be edited in place.
        """
        anatomy = Anatomy.of(model)
        found = anatomy.tower(tower)
        last = found.n_layers - blocks
        if last < 0:
            raise ConfigError(
                f"The model has {found.n_layers} blocks, {blocks} were to be edited.", f"Set blocks to 1 to {found.n_layers}."
            )
        chosen = min(round(7 / 12 * found.n_layers), last) if first is None else first
        if not 0 <= chosen <= last:
            raise ConfigError(f"first_block {chosen} is out of range.", f"With {blocks} blocks edited it must be in 0 to {last}.")
        matrices = [
            matrix
            for offset in range(blocks)
            for side in ("up", "down")
            for matrix in _matrices(anatomy, found, chosen + offset, side, 2 * offset + (side == "down"))
        ]
        _refuse_shared(anatomy, matrices)
        shapes = {(matrix.entries, matrix.width) for matrix in matrices}
        if len(shapes) != 1:
            raise UnsupportedModelError(f"The edited blocks have feed-forward matrices of different shapes: {sorted(shapes)}.")
        entries, width = shapes.pop()
        return cls(anatomy, found, chosen, blocks, entries, width, tuple(matrices))


def _matrices(anatomy: Anatomy, tower: Tower, layer: int, side: str, row: int) -> list[Matrix]:
    roles = ["down"] if side == "down" else [role for role in ("gate", "up") if role in tower.linears(layer)]
    found = []
    for role in roles:
        view = anatomy.linear(Linear(layer, role, tower.name))
        if view.module is not base_layer(view.module):
            raise UnsupportedModelError(
                f"{view.path} is wrapped in {type(view.module).__name__}.", "Merge or unload the adapter (merge_and_unload) before editing."
            )
        entries, width = view.out_features, view.in_features
        if side == "down":
            entries, width = width, entries
        found.append(Matrix(row, layer, side, view, entries, width))
    return found


def _refuse_shared(anatomy: Anatomy, matrices: Sequence[Matrix]) -> None:
    owners: dict[int, set[str]] = {}
    for name, parameter in anatomy.model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), set()).add(name)
    for matrix in matrices:
        names = owners[matrix.view.parameter.data_ptr()]
        if len(names) > 1:
            raise UnsupportedModelError(
                f"The weight of {matrix.view.path} is shared: {', '.join(sorted(names))}.",
                "An edit of one would change the other; untie them first.",
            )


# ---------------------------------------------------------------------------------------------- weights of an edit


@dataclass(eq=False)
class Leaf:
    """Open entries of one matrix for each of E edits: `weight` (E, K, d), `index` (E, K) their places, None if all h are there in order.

    Where edits have different numbers of open entries the rest of K is padded with closed ones; `valid` (E, K) tells them apart.
    """

    matrix: Matrix
    weight: torch.Tensor
    index: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    def origin(self) -> torch.Tensor:
        """The unedited values of the same entries, (E, K, d) or broadcastable to it, in the model's dtype."""
        start = self.matrix.start()
        return start[None] if self.index is None else start[self.index]

    def take(self, edits: torch.Tensor) -> Leaf:
        """The same leaf for some of its edits."""
        pick = [None if part is None else part[edits] for part in (self.index, self.valid)]
        return Leaf(self.matrix, self.weight.detach()[edits], *pick)


@dataclass(eq=False)
class LowRankLeaf:
    """A low-rank update of one matrix for each of E edits, entry-major: change = left (E, h, r) @ right (E, r, d)."""

    matrix: Matrix
    left: torch.Tensor
    right: torch.Tensor

    def take(self, edits: torch.Tensor) -> LowRankLeaf:
        return LowRankLeaf(self.matrix, self.left.detach()[edits], self.right.detach()[edits])


@dataclass(eq=False)
class WholeLeaf:
    """A whole parameter of one edit (E = 1), for fine-tuning without a mask."""

    model: torch.nn.Module
    name: str
    weight: torch.Tensor

    def origin(self) -> torch.Tensor:
        return self.model.get_parameter(self.name).detach()

    def take(self, edits: torch.Tensor) -> WholeLeaf:
        return WholeLeaf(self.model, self.name, self.weight.detach())


AnyLeaf = Leaf | LowRankLeaf | WholeLeaf


@contextlib.contextmanager
def swapped(model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let named parameters (in all places, where tied) be other tensors inside; the model's own objects are put back on every exit."""
    wanted = {id(model.get_parameter(name)): value for name, value in values.items()}
    kept: list[tuple[torch.nn.Module, str, torch.nn.Parameter | None]] = []
    try:
        for module in model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None and id(parameter) in wanted:
                    kept.append((module, key, parameter))
                    module._parameters[key] = wanted[id(parameter)]  # type: ignore[assignment]  # a plain tensor, so that gradients reach it
        yield
    finally:
        for module, key, parameter in reversed(kept):
            module._parameters[key] = parameter


@contextlib.contextmanager
def overridden(forwards: Mapping[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Give modules another forward for the time of the context; what was on the instances before is put back on every exit."""
    with contextlib.ExitStack() as stack:
        for module, forward in forwards.items():
            stack.callback(override(module, "forward", forward))
        yield


def with_leaves(leaves: Sequence[AnyLeaf]) -> contextlib.AbstractContextManager[None]:
    """Run the edited modules with the given weights. Rows of the batch belong to edits in order: (E * rows per edit, length, width)."""
    whole = [leaf for leaf in leaves if isinstance(leaf, WholeLeaf)]
    if whole:
        return swapped(whole[0].model, {leaf.name: leaf.weight.to(leaf.origin().dtype) for leaf in whole})
    grouped: dict[torch.nn.Module, list[Leaf | LowRankLeaf]] = {}
    for leaf in leaves:
        assert not isinstance(leaf, WholeLeaf)
        grouped.setdefault(leaf.matrix.module, []).append(leaf)
    return overridden({module: _forward(module, group) for module, group in grouped.items()})


def _forward(module: torch.nn.Module, leaves: Sequence[Leaf | LowRankLeaf]) -> Callable[[torch.Tensor], torch.Tensor]:
    plain = module.forward
    bias = leaves[0].matrix.view.bias

    def forward(x: torch.Tensor) -> torch.Tensor:
        edits = (leaves[0].weight if isinstance(leaves[0], Leaf) else leaves[0].left).shape[0]
        flat = x.reshape(edits, -1, x.shape[-1])
        parts = []
        y = None
        if not _all_open(leaves):
            y = plain(x).reshape(edits, flat.shape[1], -1)
        for leaf in leaves:
            matrix = leaf.matrix
            if isinstance(leaf, LowRankLeaf):
                first, second = (leaf.right.mT, leaf.left.mT) if matrix.side == "up" else (leaf.left, leaf.right)
                change = _product(_product(flat, first.to(x.dtype)), second.to(x.dtype))
                assert y is not None
                if change.shape[-1] != y.shape[-1]:  # one of the matrices of a fused module
                    change = F.pad(change, (matrix.offset, y.shape[-1] - matrix.offset - matrix.entries))
                y = y + change
            elif matrix.side == "up":
                weight = leaf.weight.to(x.dtype)
                opened = _product(flat, weight.mT)
                if bias is not None:
                    here = slice(matrix.offset, matrix.offset + matrix.entries)
                    opened = opened + (bias[here] if leaf.index is None else bias[here][leaf.index][:, None])
                if y is None:
                    parts.append(opened)
                elif leaf.index is None:
                    y = torch.cat([y[..., : matrix.offset], opened, y[..., matrix.offset + matrix.entries :]], -1)
                elif edits == 1:
                    y = y.index_copy(2, leaf.index[0] + matrix.offset, opened)
                else:
                    y = y.scatter(2, (leaf.index + matrix.offset)[:, None].expand(-1, flat.shape[1], -1), opened)
            elif leaf.index is None:
                opened = _product(flat, leaf.weight.to(x.dtype))
                y = opened if bias is None else opened + bias
            else:  # the change alone passes through the open columns: the closed ones are never touched nor differentiated
                opened = flat[..., leaf.index[0]] if edits == 1 else flat.gather(2, leaf.index[:, None].expand(-1, flat.shape[1], -1))
                wide = torch.promote_types(x.dtype, torch.float32)
                change = leaf.weight.to(x.dtype).to(wide) - leaf.origin().to(wide)
                assert y is not None
                y = y + _product(opened.to(wide), change).to(x.dtype)
        if parts:
            y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        assert y is not None
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return forward


def _all_open(leaves: Sequence[Leaf | LowRankLeaf]) -> bool:
    """Whether the leaves cover every output of their module, in order, so that its own weight need not be multiplied at all."""
    if not all(isinstance(leaf, Leaf) and leaf.index is None for leaf in leaves):
        return False
    matrix = leaves[0].matrix
    outputs = matrix.view.parameter.shape[matrix.view.out_dim]
    return matrix.side == "down" or sum(leaf.matrix.entries for leaf in leaves) == outputs


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Batched (E, t, a) @ (E, a, b); for one edit the plain product, which keeps the layer's own order of summation."""
    return F.linear(x, weight[0].mT) if len(weight) == 1 else torch.bmm(x, weight)


# ---------------------------------------------------------------------------------------------- running the suffix

_READS_ONE_TOKEN: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


class Rows:
    """Rows of a data set, run up to the first edited block once; everything below is a constant of every edit."""

    def __init__(self, place: Place, inputs: Mapping[str, torch.Tensor], layer: int | None = None) -> None:
        self.place = place
        moved = self.inputs = {name: value.to(place.device) for name, value in inputs.items()}
        self.count = len(next(iter(moved.values())))
        mask = moved.get("attention_mask")
        self._last = None if mask is None else mask.shape[1] - 1 - mask.flip(1).argmax(1)
        with torch.no_grad():
            self.prefix = capture_prefix(place.anatomy, moved, place.first if layer is None else layer, tower=place.tower.name)
        if place.model not in _READS_ONE_TOKEN:
            _READS_ONE_TOKEN[place.model] = self._reads_one_token()

    def logits(self, leaves: Sequence[AnyLeaf] = (), rows: Sequence[int] | torch.Tensor | None = None) -> torch.Tensor:
        """(rows, classes) in at least float32; `leaves` hold one weight per edit, rows are grouped by edit."""
        chosen = None if rows is None else torch.as_tensor(rows, device=self.place.device)
        with with_leaves(leaves), self.shortened():
            output = self.prefix.run(rows=chosen)
        return self.read(output, chosen)

    def shortened(self, fill: float = 0.0) -> contextlib.AbstractContextManager[None]:
        """Let the last block's output projection and feed-forward network see token 0 alone, if nothing but that token is read after it.

        Exact: above the last attention tokens do not meet. The other tokens' states are `fill`.
        """
        if not _READS_ONE_TOKEN.get(self.place.model, True):
            return contextlib.nullcontext()

        def first_token(plain: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
            def forward(x: torch.Tensor) -> torch.Tensor:
                return F.pad(plain(x[:, :1]), (0, 0, 0, x.shape[1] - 1), value=fill)

            return forward

        last = self.place.tower.n_layers - 1
        modules = [self.place.tower.module(last, role) for role in ("o", "mlp")]
        return overridden({module: first_token(module.forward) for module in modules})

    def _reads_one_token(self) -> bool:
        """Whether the logits depend on token 0 alone after the last block: NaN in all other tokens does not reach them."""
        tower = self.place.tower
        last = tower.n_layers - 1
        if tower.causal or len(self.place.anatomy.towers) > 1 or not (tower.has(last, "o") and tower.has(last, "mlp")):
            return False
        with torch.no_grad(), self.shortened(fill=float("nan")):
            logits = getattr(self.prefix.run(rows=[0]), "logits", None)
        return isinstance(logits, torch.Tensor) and not bool(logits.isnan().any())

    def whole(self, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Logits of the model as it stands, from the inputs on."""
        chosen = None if rows is None else torch.as_tensor(rows, device=self.place.device)
        inputs = self.inputs if chosen is None else {name: value[chosen] for name, value in self.inputs.items()}
        return self.read(self.place.model(**inputs), chosen)

    def read(self, output: object, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The class logits of a model output: its `logits`, for models with one row per token those of the last real token."""
        logits = getattr(output, "logits", None)
        if not isinstance(logits, torch.Tensor):
            raise DataError(
                f"{type(self.place.model).__name__} returns no logits.", "Load the model with a classification or language head."
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.ndim == 3 and not self.place.tower.causal:
            raise DataError(
                f"{type(self.place.model).__name__} gives logits for every token.", "Load the model with a classification head."
            )
        return self.at_read_position(logits, rows) if logits.ndim == 3 else logits

    def at_read_position(self, states: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Choose from (rows, length, width): the last real token if attention is causal, else token 0 (the class token), else the mean."""
        if not self.place.tower.causal:
            return states[:, 0] if self._has_class_token() else states.mean(1)
        if self._last is None:
            return states[:, -1]
        last = self._last if rows is None else self._last[rows]
        return states[torch.arange(len(states), device=states.device), last]

    def _has_class_token(self) -> bool:
        names = ("cls_token", "class_embedding")
        tower = self.place.tower
        assert tower.root is not None
        return tower.modality == "text" or any(name.endswith(names) for name, _ in tower.root.named_parameters())

    def features(self, rows: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(features (rows, d), logits): the final norm's output at the class token (encoders) or the last token (decoders)."""
        seen: list[torch.Tensor] = []
        norm = self.place.tower.final_norm
        if norm is None:
            raise UnsupportedModelError(f"{type(self.place.model).__name__} has no final norm to take features from.")
        handle = norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
        chosen = None if rows is None else torch.as_tensor(rows, device=self.place.device)
        try:
            with torch.no_grad():
                with self.shortened():
                    logits = self.read(self.prefix.run(rows=chosen), chosen)
        finally:
            handle.remove()
        if not seen:
            raise UnsupportedModelError(f"The final norm of {type(self.place.model).__name__} did not run in the forward pass.")
        states = seen[-1].float()
        return (self.at_read_position(states, chosen) if states.ndim == 3 else states), logits


@contextlib.contextmanager
def guarded(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients; flags, modes and random state are put back on every exit."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        try:
            model.eval()
            for parameter in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            for module, mode in modes.items():
                module.training = mode
