"""The part of a model from the first edited block up, run with per-edit weights in its feed-forward matrices."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from trocar.core.errors import DataError, UnsupportedModelError
from trocar.edit.where_to_edit.leaves import AnyLeaf, Leaf, columns, edited_forward, overridden, product, with_leaves
from trocar.edit.where_to_edit.place import Place, guarded
from trocar.trace import capture_prefix

_READS_ONE_TOKEN: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()
FIXED_BYTES = 256 << 20

__all__ = ["Fixed", "Rows", "guarded"]  # rows are run inside guarded(model)


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
        self.fixed: Fixed | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, one pass over all rows without leaves; afterwards edits compute in the first edited block only what their entries change.

        Does nothing where that would take more than 256 MiB, or where the first edited block is the last one. The model's weights must
        stay as they are for as long as these rows are used.
        """
        hidden, place = self.prefix.hidden, self.place
        size = hidden.numel() // hidden.shape[2] * (2 * hidden.shape[2] + 3 * place.entries) * hidden.element_size()
        if size > FIXED_BYTES or self.prefix.layer != place.first or place.first == place.tower.n_layers - 1:
            yield
            return
        fixed = Fixed(place, self.count)
        with overridden(fixed.recorders()):
            yield
        self.fixed = fixed

    def logits(self, leaves: Sequence[AnyLeaf] = (), rows: Sequence[int] | torch.Tensor | None = None) -> torch.Tensor:
        """(rows, classes) in at least float32; `leaves` hold one weight per edit, rows are grouped by edit."""
        chosen = None if rows is None else torch.as_tensor(rows, device=self.place.device)
        context = with_leaves(leaves) if self.fixed is None else self.fixed.with_leaves(leaves, chosen)
        with context, self.shortened():
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


class Fixed:
    """What the first edited block makes of its fixed input with the model's own weights: attention, fc1 and fc2.

    Its input is the same in every step of an edit, so attention need not run again, fc1 only in its open rows, and fc2 only in the columns
    that these rows feed and in its own open ones. Exact up to rounding.
    """

    def __init__(self, place: Place, count: int) -> None:
        matrices = [matrix for matrix in place.matrices if matrix.layer == place.first]
        self.count = count
        self.attention = place.tower.module(place.first, "attn")
        self.ups = list(dict.fromkeys(matrix.module for matrix in matrices if matrix.side == "up"))
        self.down = next(matrix for matrix in matrices if matrix.side == "down")
        self.outputs: dict[torch.nn.Module, Any] = {}
        self.entered: torch.Tensor | None = None

    def recorders(self) -> dict[torch.nn.Module, Callable[..., Any]]:
        def recorder(module: torch.nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*words: Any, **named: Any) -> Any:
                if module is self.down.module:
                    self.entered = words[0].detach()
                self.outputs[module] = plain(*words, **named)
                return self.outputs[module]

            return forward

        return {module: recorder(module, module.forward) for module in (self.attention, *self.ups, self.down.module)}

    def with_leaves(self, leaves: Sequence[AnyLeaf], rows: torch.Tensor | None) -> contextlib.AbstractContextManager[Any]:
        """As `leaves.with_leaves`, for the given rows."""
        if not leaves or not all(isinstance(leaf, Leaf) for leaf in leaves):
            return with_leaves(leaves)
        every = rows is None or (len(rows) == self.count and bool((rows == torch.arange(self.count, device=rows.device)).all()))

        def pick(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(pick(part) for part in value)
            return value if every or not isinstance(value, torch.Tensor) else value.index_select(0, rows)  # type: ignore[arg-type]

        here = [leaf for leaf in leaves if isinstance(leaf, Leaf) and leaf.matrix.layer == self.down.layer]
        above = [leaf for leaf in leaves if leaf not in here]
        ups = [leaf for leaf in here if leaf.matrix.side == "up"]
        downs = [leaf for leaf in here if leaf.matrix.side == "down"]
        attended = pick(self.outputs[self.attention])
        forwards: dict[torch.nn.Module, Callable[..., Any]] = {self.attention: lambda *words, **named: attended}
        for module in self.ups:
            group, known = [leaf for leaf in ups if leaf.matrix.module is module], pick(self.outputs[module])
            forwards[module] = edited_forward(module, group, known) if group else lambda x, known=known: known
        if any(leaf.index is None for leaf in here):
            forwards |= {self.down.module: edited_forward(self.down.module, downs)} if downs else {}
        else:
            forwards[self.down.module] = self._through(ups, downs, pick(self.entered), pick(self.outputs[self.down.module]))
        stack = contextlib.ExitStack()
        stack.enter_context(with_leaves(above))
        stack.enter_context(overridden(forwards))
        return stack

    def _through(
        self, ups: Sequence[Leaf], downs: Sequence[Leaf], entered: torch.Tensor, left: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """fc2 for the neurons that open rows of fc1 feed, and for its own open columns; the others pass on what they did before."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            edits = (ups or downs)[0].weight.shape[0] if ups or downs else 1
            flat = x.reshape(edits, -1, x.shape[-1])
            y = left.reshape(edits, flat.shape[1], -1)
            wide = torch.promote_types(x.dtype, torch.float32)
            if ups and ups[0].index is not None:
                index = ups[0].index
                moved = columns(flat, index).to(wide) - columns(entered.reshape(flat.shape), index).to(wide)
                y = y + product(moved, self.down.start()[index].to(wide)).to(x.dtype)
            if downs:
                return edited_forward(self.down.module, downs, y)(x)
            return y.reshape(left.shape)

        return forward
