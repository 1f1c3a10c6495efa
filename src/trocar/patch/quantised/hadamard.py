"""Hadamard matrices of many sizes. Floor 3."""

from __future__ import annotations

import functools

import torch

from trocar.core.errors import ConfigError


@functools.lru_cache(maxsize=32)
def hadamard(size: int) -> torch.Tensor:
    """A normalised Hadamard matrix (size, size), entries +-1/sqrt(size): Sylvester's doubling, Paley's two constructions, and products.

    Raises ConfigError where none is known here, which is so for every size > 2 that is not a multiple of 4.
    """
    signs = _signs(size)
    if signs is None:
        raise ConfigError(
            f"No Hadamard matrix of size {size} can be made.", "Use a multiple of 4 (not all are known), or another kind of rotation."
        )
    return signs / size**0.5


@functools.lru_cache(maxsize=64)
def _signs(size: int) -> torch.Tensor | None:
    if size in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:size, :size]
    if size < 1 or size % 4:
        return None
    for left in [2, *range(4, int(size**0.5) + 1, 4)]:
        if size % left == 0 and (a := _signs(left)) is not None and (b := _signs(size // left)) is not None:
            return torch.kron(a, b)
    if _prime(size - 1):  # Paley I: size - 1 = 3 mod 4
        core = torch.zeros(size, size, dtype=torch.float64)
        core[0, 1:], core[1:, 0], core[1:, 1:] = 1, -1, _characters(size - 1)
        return core + torch.eye(size, dtype=torch.float64)
    if _prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:  # Paley II
        half = size // 2
        core = torch.zeros(half, half, dtype=torch.float64)
        core[0, 1:], core[1:, 0], core[1:, 1:] = 1, 1, _characters(half - 1)
        one, other = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
        return torch.kron(core, one) + torch.kron(torch.eye(half, dtype=torch.float64), other)
    return None


def _characters(prime: int) -> torch.Tensor:
    """Jacobsthal's matrix: the quadratic character of row - column modulo a prime."""
    squares = {i * i % prime for i in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    return character[(index[:, None] - index[None, :]) % prime]


def _prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


@functools.lru_cache(maxsize=32)
def largest_hadamard(channels: int) -> torch.Tensor:
    """The largest matrix (size, size) that can be made whose size divides `channels`."""
    for part in range(1, channels + 1):
        if channels % part == 0 and _signs(channels // part) is not None:
            return hadamard(channels // part)
    raise AssertionError("size 1 always has one")
