"""Random streams that depend on a seed and a name, not on what ran before. Floor 0."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for the stream called `names`, so that a resumed unit of work draws what an uninterrupted run would have drawn."""
    text = "/".join([str(seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU `torch.Generator` for the stream called `names`."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))
