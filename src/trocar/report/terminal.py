"""The report's table and verdict for the terminal. Floor 6."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trocar.report import numbers
from trocar.result import Result

if TYPE_CHECKING:
    from rich.console import Group

COLOURS = {"good": "green", "bad": "red", "none": "default"}
VERDICTS = {"passed": "[bold green]PASSED[/]", "failed": "[bold red]FAILED[/]", "unchecked": "[bold]NOT CHECKED[/]"}


def verdict_line(result: Result) -> str:
    """The verdict in one sentence, without colours."""
    held = sum(check.ok for check in result.checks)
    many = len(result.checks)
    if result.verdict == "unchecked":
        return "measured, but no checks were asked for"
    if held == many:
        return "the check holds" if many == 1 else f"all {many} checks hold"
    if many == 1:
        return "the check does not hold"
    return f"{many - held} of {many} checks do{'es' if many - held == 1 else ''} not hold"


def terminal_table(result: Result) -> Group:
    """Measurements before and after with intervals, the checks, and the verdict, to be printed by rich."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(title=escape(result.title), title_justify="left")
    for name, side in (
        ("", "left"),
        ("n", "left"),
        ("before", "right"),
        ("after", "right"),
        ("change", "right"),
        ("95 %", "right"),
        ("p", "right"),
    ):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for row in result.table:
        colour = COLOURS[numbers.direction(row)]
        change = f"[{colour}]{numbers.arrow(row)} {numbers.change(row, row.difference)}[/]"
        values = numbers.shown(row, row.before), numbers.shown(row, row.after)
        table.add_row(
            escape(row.name), escape(numbers.units(row)), *values, change, escape(numbers.interval(row)), numbers.probability(row.p)
        )
    parts: list[Table | Text] = [table]
    if result.checks:
        checks = Table(box=None, show_header=False, padding=(0, 1))
        for check in result.checks:
            mark = "[green]✓[/]" if check.ok else "[red]✗[/]"
            told = f"{check.measurement} {check.statistic} {check.op} {check.threshold:g}"
            checks.add_row(mark, escape(told), f"is {numbers.compact(check.value)}{f' ({check.note})' if check.note else ''}")
        parts.append(checks)
    parts += [Text(f"note: {note}") for note in numbers.notes(result)]
    parts.append(Text.from_markup(f"{VERDICTS[result.verdict]} {verdict_line(result)}"))
    return Group(*parts)
