"""Progress bars on long work, silent where nobody looks. Floor 0."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` under a rich progress bar on standard error; without a terminal, or with TROCAR_PROGRESS=0, just yield them."""
    if not sys.stderr.isatty() or os.environ.get("TROCAR_PROGRESS") == "0":
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description=title, total=total, console=Console(stderr=True), transient=True)
