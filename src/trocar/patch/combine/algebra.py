"""What the ways to combine adapters share: matrices known by their factors, checks, the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trocar.core.errors import ConfigError
from trocar.patch.ops.adapter import Adapter, Factors
from trocar.patch.peft_folder import PeftFolder, Shape

Source = Adapter | PeftFolder
WORK = torch.float64


@dataclass(frozen=True)
class Combined:
    """An adapter made from others. rows: what was done to each module: its rank, the norm of its update, and what the way has to say."""

    adapter: Adapter
    rows: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


def shapes_of(source: Source) -> Mapping[str, Shape]:
    return source.shapes if isinstance(source, PeftFolder) else {name: Shape.of(factors) for name, factors in source.factors.items()}


def factors_of(source: Source, name: str) -> Factors:
    return source[name] if isinstance(source, PeftFolder) else source.factors[name]


def weights_for(count: int, weights: Sequence[float] | None, normalise: bool = True) -> list[float]:
    """One weight for each of `count` adapters. normalise: divide by their sum, so that [1, 2] means a third and two thirds."""
    found = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(found) != count:
        raise ConfigError(f"{len(found)} weights were given for {count} adapters.", "Give one for each.")
    if not all(abs(weight) < float("inf") for weight in found):
        raise ConfigError("A weight is not a finite number.")
    if normalise:
        whole = sum(found)
        if whole <= 0:
            raise ConfigError(f"The weights add up to {whole:g}, which cannot be made 1.", "Give positive weights, or normalise=False.")
        found = [weight / whole for weight in found]
    return found


def common_modules(sources: Sequence[Source], need_rank: bool) -> list[str]:
    """The modules of adapters that can be combined, sorted. need_rank: the ranks of a module must be equal.

    Raises ConfigError saying which adapter differs in what.
    """
    if not sources:
        raise ConfigError("There are no adapters to combine.", "Give at least one.")
    tables = [shapes_of(source) for source in sources]
    first = tables[0]
    for number, table in enumerate(tables[1:], 2):
        if odd := sorted(set(first) ^ set(table)):
            owner = "1" if odd[0] in first else str(number)
            raise ConfigError(
                f"Only adapter {owner} changes {odd[0]} ({len(odd)} modules differ between adapters 1 and {number}).",
                "Adapters of different targets can be stacked as patches, or trained anew with equal targets.",
            )
        for name in sorted(first):
            mine, other = first[name], table[name]
            if (mine.inputs, mine.outputs, mine.transposed) != (other.inputs, other.outputs, other.transposed):
                raise ConfigError(
                    f"{name} is {mine.outputs} x {mine.inputs} in adapter 1 and {other.outputs} x {other.inputs} in adapter {number}.",
                    "They belong to different models.",
                )
            if need_rank and mine.rank != other.rank:
                raise ConfigError(
                    f"{name} has rank {mine.rank} in adapter 1 and {other.rank} in adapter {number}: factors of unlike rank have no mean.",
                    "Use a mixture, and `rank` to bring it back to one rank.",
                )
    return sorted(first)


def folded(parts: Sequence[Factors]) -> tuple[list[Factors], float]:
    """Factors in float64 with a common scale: theirs if they agree, else 1 with the scales inside B."""
    agree = len({part.scale for part in parts}) == 1
    wide = [Factors(a.to(WORK), b.to(WORK) * (1.0 if agree else scale), 1.0, swap) for a, b, scale, swap in parts]
    return wide, parts[0].scale if agree else 1.0


def core(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, M, P with B A = Q M P^T, where Q and P have orthonormal columns; never a matrix of the full size."""
    q, left = torch.linalg.qr(b)
    p, right = torch.linalg.qr(a.T)
    return q, left @ right.T, p


def norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """The Frobenius norm of B A."""
    return float(core(b.to(WORK), a.to(WORK))[1].norm())


def stacked(parts: Sequence[Factors], weights: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A of the weighted sum of updates, in float64: sum w s B A = B' A'. Adapters of weight 0 are left out."""
    kept = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight] or [(parts[0], 0.0)]
    b = torch.cat([part.b.to(WORK) * (weight * part.scale) for part, weight in kept], 1)
    return b, torch.cat([part.a.to(WORK) for part, _ in kept])


def mismatch(parts: Sequence[Factors], weights: Sequence[float], fused: Factors) -> float:
    """The norm of (weighted sum of the updates) - (update of the fused factors)."""
    b, a = stacked(parts, weights)
    return norm(torch.cat([b, -fused.scale * fused.b.to(WORK)], 1), torch.cat([a, fused.a.to(WORK)]))


def cosine(first: Factors, second: Factors) -> float:
    """The cosine between two updates: 0 if they share nothing, negative if they undo each other. NaN if one is zero."""
    sizes = [norm(part.b, part.a) for part in (first, second)]
    inner = ((first.b.to(WORK).T @ second.b.to(WORK)) * (first.a.to(WORK) @ second.a.to(WORK).T)).sum()
    return float(inner) / (sizes[0] * sizes[1]) if all(sizes) else float("nan")


def report(name: str, made: Factors, parts: Sequence[Factors], **more: Any) -> dict[str, Any]:
    """A row of `Combined.rows`."""
    row = {"module": name, "rank": made.a.shape[0], "norm": abs(made.scale) * norm(made.b, made.a)}
    if len(parts) == 2:
        row["cosine"] = cosine(*parts)
    return {**row, **more}


def narrowed(a: torch.Tensor, b: torch.Tensor, scale: float, like: Factors) -> Factors:
    """Float64 factors in the dtype that the adapters have."""
    return Factors(a.to(like.a.dtype), b.to(like.b.dtype), scale, like.transposed)
