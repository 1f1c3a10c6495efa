"""Rotations and permutations that spread outliers (arXiv 2406.01721, section 4): greedy search, zigzag. Floor 5.

Matrices are built in float64. Rows are vectors of b channels; a rotation acts from the right.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from trocar.core.errors import ConfigError, DataError


def base_matrix(size: int) -> torch.Tensor:
    """An orthogonal matrix (size, size) whose first row is flat, every entry 1/sqrt(size): Helmert's, for any size >= 2.

    Before the last exchange row i < size - 1 holds i + 1 entries 1/sqrt((i+1)(i+2)), then -sqrt((i+1)/(i+2)), then zeros, and the last row
    is flat; then the first and the last index change places in rows and columns, which is the form of the authors' own matrix.
    """
    if size < 1:
        raise ConfigError(f"There is no rotation of {size} channels.")
    row = torch.arange(1, size, dtype=torch.float64)
    helmert = (1 / (row * (row + 1)).sqrt())[:, None] * torch.ones(size - 1, size, dtype=torch.float64).tril()
    helmert[:, 1:] -= torch.diag((row / (row + 1)).sqrt())
    whole = torch.cat([helmert, torch.full((1, size), size**-0.5, dtype=torch.float64)])
    order = torch.arange(size)
    order[[0, -1]] = order[[-1, 0]]
    return whole[order][:, order]


def random_orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    """An orthogonal matrix (size, size), uniform: QR of a Gaussian with the signs of R's diagonal taken out. Drawn on the CPU."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


class Search(NamedTuple):
    """rotation: (b, b) float64; step: after how many steps it was found, 0 = identity; peaks: the objective at steps 0..N."""

    rotation: torch.Tensor
    step: int
    peaks: tuple[float, ...]


def greedy_rotation(
    x: torch.Tensor,
    block: int,
    steps: int,
    generator: torch.Generator,
    *,
    objective: Literal["peak", "range"] = "peak",
    outlier: Literal["column", "row"] = "column",
    draw: Literal["each", "once"] = "each",
    prune: bool = True,
) -> Search:
    """The rotation of blocks that lowers the largest magnitude of `x` most, among those met on a greedy walk of `steps` steps.

    x: (T, C), C a multiple of `block`; each step turns the channel of the largest entry so that it is spread evenly over its block, and
    mixes the other channels at random. One rotation serves all blocks; the identity is among the candidates, without which the peak could
    rise. Parity with the authors' released code: objective `range` (largest minus smallest entry), outlier `row` (the row's number modulo
    b in place of the column), draw `once` (one random mixture for all steps).

    prune: leave out rows that cannot matter. A rotation keeps the norm of a row: no entry can exceed it, and the longest row keeps an entry
    of at least norm / sqrt(b), so shorter rows than that never hold the peak, and the walk is the same with or without them. (This does
    not hold for `range`, where nothing is left out.)

    Raises DataError for input that is not finite, ConfigError for a block that does not divide C.
    """
    if block < 1 or x.shape[-1] % block:
        raise ConfigError(f"Blocks of {block} do not divide {x.shape[-1]} channels.", "Choose a divisor as the block size, or 'auto'.")
    rows = (x if x.dtype in (torch.float32, torch.float64) else x.float()).reshape(-1, block)
    norms = torch.linalg.vector_norm(rows, dim=1)
    longest = float(norms.max()) if len(rows) else 0.0
    if not longest < float("inf"):
        raise DataError(f"{int((~rows.isfinite()).sum())} entries of a layer's input are not finite.", "Calibrate in bfloat16 or float32.")
    number = None
    if prune and objective == "peak":
        number = (norms >= longest * block**-0.5 * (1 - 1e-5)).nonzero().flatten()
        rows = rows[number]
    identity = torch.eye(block, dtype=torch.float64)
    if longest == 0 or block == 1:
        return Search(identity, 0, (longest,) * (steps + 1))
    base, walked, best = base_matrix(block), identity, Search(identity, 0, ())
    peak, where = _extreme(rows, objective)
    peaks = [peak]
    mixture = _mixture(base, generator) if draw == "once" else None
    for step in range(1, steps + 1):
        at, column = divmod(where, block)
        spread = column if outlier == "column" else (at if number is None else int(number[at])) % block
        turn = _exchange(_mixture(base, generator) if mixture is None else mixture, spread)
        rows = rows @ turn.to(rows)
        walked = walked @ turn
        peak, where = _extreme(rows, objective)
        if peak < min(peaks):
            best = Search(walked, step, ())
        peaks.append(peak)
    return best._replace(peaks=tuple(peaks))


def _mixture(base: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The base matrix, its channels but the first mixed at random."""
    size = base.shape[0]
    mixed = base.clone()
    mixed[:, 1:] = base[:, 1:] @ random_orthogonal(size - 1, generator)
    return mixed


def _exchange(matrix: torch.Tensor, index: int) -> torch.Tensor:
    """Rows and columns 0 and `index` exchanged."""
    order = torch.arange(matrix.shape[0])
    order[0], order[index] = index, 0
    return matrix[order][:, order]


def _extreme(rows: torch.Tensor, objective: str) -> tuple[float, int]:
    """The objective, and the flat place of the entry of largest magnitude."""
    flat = rows.flatten()
    low, high = flat.aminmax()
    where = int(flat.argmax()) if high >= -low else int(flat.argmin())
    return (float(high - low) if objective == "range" else float(torch.maximum(high, -low))), where


def zigzag(order: torch.Tensor, block: int) -> torch.Tensor:
    """A permutation (gather index, int64) that deals channels to blocks so that all blocks get alike sums.

    order: (C,) size of each channel. Channels go from the largest down to the blocks 0..K-1, then K-1..0, then 0..K-1, and so on; inside a
    block the largest comes first. Equal channels keep their order. For even blocks the means of any two blocks differ by at most
    min((K - 1) / 2 times the largest gap between neighbours in size, (largest - smallest) / block).
    """
    if block < 1 or len(order) % block:
        raise ConfigError(f"Blocks of {block} do not divide {len(order)} channels.", "Choose a divisor as the block size.")
    dealt = order.argsort(descending=True, stable=True).reshape(block, -1).clone()
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.flatten()
