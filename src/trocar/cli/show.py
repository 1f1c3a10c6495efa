"""Tables and lines on standard output. Floor 7."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def console() -> Console:
    """Standard output; into a file or pipe it is wide, so that nothing is cut off."""
    return Console(width=None if sys.stdout.isatty() else 240, highlight=False)


def line(text: str = "") -> None:
    """Print one line as it is, never wrapped by us."""
    console().print(Text(text), soft_wrap=True)


def table(rows: Iterable[Mapping[str, Any]], title: str = "", columns: Sequence[str] | None = None) -> None:
    """Print rows of equal keys as a table; numbers stand on the right."""
    rows = list(rows)
    columns = list(columns or (rows[0] if rows else ()))
    view = Table(title=title or None, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        right = bool(rows) and all(isinstance(row.get(column), int | float) or row.get(column) is None for row in rows)
        view.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        view.add_row(*(Text(cell(row.get(column))) for column in columns))
    console().print(view)


def pairs(facts: Mapping[str, Any], title: str = "") -> None:
    """Print names and values, one pair a line."""
    view = Table(title=title or None, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    view.add_column(style="dim")
    view.add_column(overflow="fold")
    for name, value in facts.items():
        view.add_row(name, Text(cell(value)))
    console().print(view)


def cell(value: Any) -> str:
    """How a value reads in a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value)
    return str(value)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C on long work: one line that says how to go on, exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        message = "Interrupted. It goes on where it stopped when the same command is given again."
        Console(stderr=True, soft_wrap=True).print(message)
        raise typer.Exit(130) from None


def size(count: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
