"""Hidden states on their way through a model, one block at a time: what enters a block, and how the model calls it. Floor 5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trocar.anatomy import Anatomy, Tower
from trocar.compress.duquant.config import DuQuantConfig
from trocar.core.errors import DataError
from trocar.patch.quantised import RoundedHeads
from trocar.trace.calls import override
from trocar.trace.shortcut import Stop, hidden_argument

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows that run together. hidden: the input of the block at hand, (rows, length, width); calls: what each block is called with
    beside it (masks, rotary tables); real: (rows * length,) which positions are not padding, None: all; heads: rounding of queries, keys
    and values that is on while blocks run on this batch."""

    hidden: torch.Tensor
    calls: Sequence[Call]
    real: torch.Tensor | None
    heads: RoundedHeads | None = None

    def entering(self, hidden: torch.Tensor) -> Batch:
        return replace(self, hidden=hidden)

    @property
    def positions(self) -> int:
        """How many positions are not padding."""
        return self.hidden.shape[0] * self.hidden.shape[1] if self.real is None else int(self.real.sum())

    def only_real(self, x: torch.Tensor) -> torch.Tensor:
        """Values of a layer, of any leading shape, as rows without padding."""
        rows = x.reshape(-1, x.shape[-1])
        return rows if self.real is None or len(self.real) != len(rows) else rows[self.real.to(rows.device)]


def enter(anatomy: Anatomy, tower: Tower, inputs: Mapping[str, torch.Tensor], batch_size: int) -> list[Batch]:
    """Run the model up to its first block, and learn how it calls all of them. No block runs, so their weights need not be there.

    inputs: keyword arguments of the model (of the tower, where there are several), tensors with rows first.
    """
    rows = {value.shape[0] for value in inputs.values()}
    if len(rows) != 1 or 0 in rows:
        raise DataError("The calibration inputs are empty or differ in their number of rows.", "Give every input one entry per window.")
    return [
        _enter(anatomy, tower, {name: value[start : start + batch_size] for name, value in inputs.items()})
        for start in range(0, rows.pop(), batch_size)
    ]


def _enter(anatomy: Anatomy, tower: Tower, inputs: Mapping[str, torch.Tensor]) -> Batch:
    calls: list[Call] = []
    hidden: list[torch.Tensor] = []

    def passing(layer: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = hidden_argument(args, kwargs)
            if layer == 0:
                hidden.append(given.detach())
            calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))
            if layer == tower.n_layers - 1:
                raise Stop
            return given

        return forward

    restores = [override(block, "forward", passing(layer)) for layer, block in enumerate(tower.blocks)]
    runner: Any = anatomy.model if len(anatomy.towers) == 1 else tower.root
    settings = {"use_cache": False} if tower.causal else {}
    try:
        with torch.no_grad():
            runner(**inputs, **settings)
    except Stop:
        pass
    finally:
        for restore in restores:
            restore()
    if not hidden[0].isfinite().all():
        raise DataError("The input of the first block is not finite.", "Calibrate in bfloat16 or float32.")
    mask = inputs.get("attention_mask")
    return Batch(hidden[0], calls, mask.reshape(-1) != 0 if mask is not None and mask.ndim == 2 and not bool(mask.all()) else None)


def both(anatomy: Anatomy, tower: Tower, inputs: Mapping[str, torch.Tensor], config: DuQuantConfig) -> tuple[list[Batch], list[Batch]]:
    """What enters the first block of the float model and of the quantised one."""
    reference = enter(anatomy, tower, inputs, config.batch_size)
    return reference, reference if config.calibration == "rows" else averaged(anatomy, tower, inputs, reference)


def averaged(anatomy: Anatomy, tower: Tower, inputs: Mapping[str, torch.Tensor], batches: Sequence[Batch]) -> list[Batch]:
    """One pseudo-window: the first block's inputs averaged over all windows, position by position (the paper's calibration)."""
    if any(batch.real is not None for batch in batches):
        raise DataError("Windows with padding cannot be averaged position by position.", "Use windows of one length, or calibration: rows.")
    one = _enter(anatomy, tower, {name: value[:1] for name, value in inputs.items()})
    total = torch.stack([batch.hidden.sum(0) for batch in batches]).sum(0) / sum(len(batch.hidden) for batch in batches)
    return [one.entering(total[None])]


def run(block: nn.Module, layer: int, batch: Batch) -> torch.Tensor:
    """The block's output on a batch."""
    args, kwargs = batch.calls[layer]
    with batch.heads.running() if batch.heads is not None else nullcontext():
        out = block(batch.hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def watch(
    block: nn.Module,
    layer: int,
    batch: Batch,
    inputs: Mapping[str, nn.Module],
    see: Callable[[str, torch.Tensor], None],
    stop: bool = False,
) -> torch.Tensor | None:
    """Run the block and show the real rows of the inputs of some modules to `see` as they come. stop: end after all were seen."""
    left = set(inputs)

    def hook(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
            see(name, batch.only_real(args[0].detach()))
            left.discard(name)
            if stop and not left:
                raise Stop

        return seen

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in inputs.items()]
    try:
        with torch.no_grad():
            return run(block, layer, batch)
    except Stop:
        return None
    finally:
        for handle in handles:
            handle.remove()


def sample(parts: Sequence[torch.Tensor], limit: int, generator: torch.Generator) -> torch.Tensor:
    """At most `limit` rows of the parts: half are those with the largest entries, the others are drawn at random; in their order."""
    count = sum(len(part) for part in parts)
    if count <= limit:
        return torch.cat([part.float() for part in parts])
    high = torch.cat([part.abs().amax(1).float().cpu() for part in parts]).argsort(descending=True, stable=True)
    chosen, rest = high[: limit // 2], high[limit // 2 :]
    drawn = rest[torch.randperm(len(rest), generator=generator)[: limit - limit // 2]]
    wanted = torch.cat([chosen, drawn]).sort().values
    taken, start = [], 0
    for part in parts:
        inside = wanted[(wanted >= start) & (wanted < start + len(part))] - start
        taken.append(part[inside.to(part.device)].float())
        start += len(part)
    return torch.cat(taken)
