"""A module that stands in for a mixture of experts: low-bit weights, activations rounded per token, changes of basis in front. Floor 3.

The router is not part of it and sees the hidden states as they are; the change of basis acts in front of the experts' products only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from trocar.core.errors import ConfigError
from trocar.patch.quantised.linear import FullPrecision, GroupInput, unturned
from trocar.patch.quantised.numbers import IntegerRows, Quantiser, dequantise, integer_linear, integer_weight, pack, unpack

Stack = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Matrices(FullPrecision):
    """Weights of one shape, one matrix (O, C) for each expert.

    content: float values (E, O, C) with `quantiser.bits` 16, or codes, step and zero: codes as they are stored (E, O, C), two columns to a
    byte up to 4 bits (`pack`), step and zero (E, O, groups). columns: C.
    """

    def __init__(self, quantiser: Quantiser, content: Stack, columns: int) -> None:
        super().__init__()
        self.quantiser, self.in_features = quantiser, columns
        first = content if isinstance(content, torch.Tensor) else content[0]
        self.count, self.out_features = first.shape[:2]
        if isinstance(content, torch.Tensor):
            self.register_buffer("values", content)
        else:
            code, step, zero = content
            self.register_buffer("codes", code)
            self.register_buffer("step", step.float())
            self.register_buffer("zero", zero.to(torch.uint8 if quantiser.bits <= 8 else torch.int32))

    @classmethod
    def of(cls, quantiser: Quantiser, weights: Iterable[Any]) -> Matrices:
        """From one expert after another: float values (O, C), or their codes (O, C), step and zero (O, groups)."""
        if quantiser.is_float:
            values = torch.stack(list(weights))
            return cls(quantiser, values, values.shape[2])
        parts, columns = [], 0
        for code, step, zero in weights:
            columns = code.shape[1]
            parts.append((pack(code) if quantiser.bits <= 4 else code, step, zero))
        code, step, zero = (torch.stack(part) for part in zip(*parts, strict=True))
        return cls(quantiser, (code, step, zero), columns)

    @property
    def entries(self) -> int:
        return self.count * self.out_features * self.in_features

    def code(self, expert: int) -> torch.Tensor:
        """Codes of one expert's weight, (O, C)."""
        stored = self.get_buffer("codes")[expert]
        return unpack(stored, self.in_features) if self.quantiser.bits <= 4 else stored

    def rounded(self, expert: int) -> torch.Tensor:
        """One expert's rounded weight in the transformed basis, (O, C) float32."""
        if self.quantiser.is_float:
            return self.get_buffer("values")[expert].float()
        return dequantise(self.code(expert), self.get_buffer("step")[expert], self.get_buffer("zero")[expert])

    def integers(self, expert: int) -> IntegerRows:
        return integer_weight(self.code(expert), self.get_buffer("step")[expert], self.get_buffer("zero")[expert], self.quantiser)

    def extra_repr(self) -> str:
        return f"{self.count} x {self.in_features} -> {self.out_features}, {self.quantiser.bits} bits"


class Visit(NamedTuple):
    """What one expert has to do. tokens: rows that were sent to it; slots: as which of each row's choices; hidden: act(gate) * up of these
    rows, (rows, F), before the down map's own transform."""

    expert: int
    tokens: torch.Tensor
    slots: torch.Tensor
    hidden: torch.Tensor


class QuantisedExperts(FullPrecision):
    """sum over the chosen experts e of weight_e * down_e(act(gate_e(x)) * up_e(x)), all matrices quantised, gate first in gate_up.

    shared: transform and rounding of x, done once for all experts; hidden: those in front of the down maps, of which expert e takes number
    which[e]; gate_up: (E, 2 F, C); down: (E, C, F); activation: of the gate. mode: `simulated` (float products of rounded values) or
    `integer`, set by `execute`; what a mode needs of an expert is made when the expert is first asked and kept beside the codes.
    """

    def __init__(
        self, shared: GroupInput, hidden: Sequence[GroupInput], which: Sequence[int], gate_up: Matrices, down: Matrices, activation: Any
    ) -> None:
        super().__init__()
        self.input, self.hidden, self.which = shared, nn.ModuleList(hidden), tuple(which)
        self.gate_up, self.down, self.act_fn = gate_up, down, activation
        self.mode, self.keep = "simulated", True
        self._ready: tuple[Any, dict[Any, Any]] = (None, {})

    @property
    def shared(self) -> GroupInput:
        """The input of all experts, under the name that it has in a QuantisedLinear."""
        return self.input

    @property
    def count(self) -> int:
        return self.gate_up.count

    def in_front_of(self, expert: int) -> GroupInput:
        """Transform and rounding in front of an expert's down map."""
        return self.hidden[self.which[expert]]  # type: ignore[return-value]

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """(rows, C), chosen experts (rows, k) and their weights (rows, k) -> (rows, C)."""
        out = torch.zeros_like(hidden_states)
        for visit in self.visits(hidden_states, top_k_index):
            rows = self.prepared(self.in_front_of(visit.expert), visit.hidden)
            made = self._times(self.down, visit.expert, rows, visit.hidden)
            out.index_add_(0, visit.tokens, (made * top_k_weights[visit.tokens, visit.slots, None]).to(out.dtype))
        return out

    def visits(self, x: torch.Tensor, chosen: torch.Tensor) -> Iterator[Visit]:
        """The experts that rows of x (rows, C) were sent to, in order. chosen: (rows, k); numbers that are no expert's are left out."""
        front = self.prepared(self.input, x)
        for expert in chosen.unique().tolist():
            if 0 <= expert < self.count:
                yield self.visit(expert, front, chosen, x)

    def visit(self, expert: int, front: torch.Tensor | IntegerRows, chosen: torch.Tensor, like: torch.Tensor) -> Visit:
        """One expert's work. front: all rows as `prepared(self.input, x)` gave them; like: of the dtype to compute in."""
        tokens, slots = torch.where(chosen == expert)
        if isinstance(front, IntegerRows):
            rows: Any = IntegerRows(front.values[tokens], front.step[tokens], None if front.zero is None else front.zero[tokens])
        else:
            rows = front[tokens]
        gate, up = self._times(self.gate_up, expert, rows, like).chunk(2, dim=-1)
        return Visit(expert, tokens, slots, self.act_fn(gate) * up)

    def prepared(self, front: GroupInput, x: torch.Tensor) -> torch.Tensor | IntegerRows:
        """x (rows, C) transformed and rounded, as the mode needs it."""
        return front.integers(x) if self.mode == "integer" else front(x)

    def _times(self, matrices: Matrices, expert: int, rows: torch.Tensor | IntegerRows, like: torch.Tensor) -> torch.Tensor:
        """Prepared rows times an expert's weight, in the dtype of `like`."""
        key = (self.mode, like.dtype, like.device)
        if self._ready[0] != key:
            self._ready = (key, {})
        weight: Any = self._ready[1].get((matrices is self.down, expert))
        if weight is None:
            with torch.inference_mode(False):  # what is kept must serve outside of it too
                weight = matrices.integers(expert) if self.mode == "integer" else matrices.rounded(expert).to(like)
            if self.keep:
                self._ready[1][matrices is self.down, expert] = weight
        if isinstance(rows, IntegerRows):
            return integer_linear(rows, weight).to(like.dtype)
        return functional.linear(rows, weight)

    def effective(self, expert: int, part: int) -> torch.Tensor:
        """An expert's weight in the basis of its own input, float32: what a float expert would hold. part: 0 gate_up (2 F, C), 1 down."""
        if part == 0:
            return unturned(self.gate_up.rounded(expert), self.input.transform)
        return unturned(self.down.rounded(expert), self.in_front_of(expert).transform)

    def can(self, mode: str) -> str:
        """Why these experts cannot run in `mode`; empty if they can."""
        if mode not in ("simulated", "integer"):
            return f"experts have no {mode} products"
        if mode == "integer":
            pairs = [(self.gate_up, self.input), (self.down, self.in_front_of(0))]
            if any(matrices.quantiser.bits > 8 or front.quantiser.bits > 8 for matrices, front in pairs):
                return "integer products need at most 8 bits on both sides"
            if any(one.quantiser.group not in (None, matrices.in_features) for matrices, front in pairs for one in (matrices, front)):
                return "integer products need one grid a row"
        return ""

    @property
    def float_entries(self) -> int:
        """Entries of the float experts that they stand for."""
        return self.gate_up.entries + self.down.entries

    def bytes_kept(self, mode: str, dtype: torch.dtype = torch.float32) -> int:
        """What `mode` keeps beside the codes for inputs of `dtype`, once every expert was asked."""
        pairs = (self.gate_up, self.down)
        if mode == "integer":
            rows = [matrices.count * matrices.out_features * 4 * (2 if matrices.quantiser.centred else 3) for matrices in pairs]
            return self.float_entries + sum(rows)
        there = [matrices.quantiser.is_float and matrices.get_buffer("values").dtype == dtype for matrices in pairs]
        return sum(matrices.entries * dtype.itemsize for matrices, known in zip(pairs, there, strict=True) if not known)

    def forget(self) -> None:
        """To be called when a stored weight or the mode was changed."""
        self._ready = (None, {})

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.count} experts, {len(self.hidden)} inputs of down, {self.mode}"


def float_experts(gate_up: torch.Tensor, down: torch.Tensor, activation: Any) -> QuantisedExperts:
    """Experts in float32 whose matrices may be changed, without rounding or transform. gate_up: (E, 2 F, C); down: (E, C, F)."""
    from trocar.patch.quantised.transform import Transform

    if gate_up.shape[1] != 2 * down.shape[2] or gate_up.shape[2] != down.shape[1] or len(gate_up) != len(down):
        raise ConfigError(f"Experts of {tuple(gate_up.shape)} and {tuple(down.shape)} do not fit together.")
    untouched = Quantiser(bits=16)
    fronts = [GroupInput(Transform(channels), untouched) for channels in (gate_up.shape[2], down.shape[2])]
    up, back = (Matrices(untouched, one.detach().to(torch.float32, copy=True), one.shape[2]) for one in (gate_up, down))
    return QuantisedExperts(fronts[0], fronts[1:], [0] * len(gate_up), up, back, activation)
