"""Numbers as people read them, the same in the page and in the terminal. Floor 6."""

from __future__ import annotations

import math

from trocar.result import Result, TableRow


def compact(value: float | None) -> str:
    """Four significant digits, thousands separated: 12,345 · 0.3517 · 1.2e-06."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−") if abs(value) >= 1e-4 else f"{value:.1e}".replace("-", "−")


def shown(row: TableRow, value: float | None) -> str:
    """A measurement's value: shares in percent, numbers compact."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if row.form == "share" else compact(value)


def change(row: TableRow, value: float | None) -> str:
    """A difference with its sign; of shares in percentage points, without a unit."""
    if value is None:
        return "–"
    text = f"{100 * abs(value):.1f}" if row.form == "share" else compact(abs(value))
    return ("+" if value > 0 else "−" if value < 0 else "±") + text


def interval(row: TableRow) -> str:
    """The 95 % interval of the difference."""
    return "–" if row.low is None or row.high is None else f"[{change(row, row.low)}, {change(row, row.high)}]"


def probability(p: float | None) -> str:
    """A p-value."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def direction(row: TableRow) -> str:
    """`good`, `bad`, or `none`: which way the value moved, as the measurement judges it."""
    if row.difference == 0:
        return "none"
    if row.better == "same":
        return "bad" if row.low is not None and row.high is not None and not row.low <= 0 <= row.high else "none"
    return "good" if (row.difference > 0) == (row.better == "higher") else "bad"


def arrow(row: TableRow) -> str:
    return "▲" if row.difference > 0 else "▼" if row.difference < 0 else "="


def size(count: int) -> str:
    """Bytes in binary units."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def notes(result: Result) -> list[str]:
    """What a reader should know first: that nothing was changed, and the sentences that the method left under `says` or `notes`."""
    said = [result.log.get(key) for key in ("says", "notes")]
    lines = [str(line) for part in said if isinstance(part, list | tuple) for line in part]
    empty = result.model.fingerprint_after == result.model.fingerprint_before and not (result.patch and result.patch.ops)
    return [*(["Nothing was changed: the method made no patch, or an empty one."] if empty else []), *lines]


def units(row: TableRow) -> str:
    """How much a number rests on: `82 edits in 41 groups (2 left out)`."""
    many = f"{row.n:,} {row.unit}{'s' if row.n != 1 else ''}"
    groups = f" in {row.n_groups:,} group{'s' if row.n_groups != 1 else ''}" if row.n_groups else ""
    return many + groups


def left_out(row: TableRow) -> str:
    """What had no value: `3 edits and 2 groups left out`."""
    parts = [(row.left_out, row.unit), (row.left_out_groups, "group")]
    named = [f"{count:,} {what}{'s' if count != 1 else ''}" for count, what in parts if count]
    return f"{' and '.join(named)} left out (no value)" if named else ""
