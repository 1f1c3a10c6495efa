"""Checks: thresholds on measurements, and the verdict on a change. Floor 3."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trocar.core.config import Config
from trocar.core.errors import ConfigError, nearest
from trocar.evaluate.measurement import Measurement

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


class Check(Config):
    """`measurement`'s `statistic` must stand in relation `op` to `threshold`. A statistic that has no value (NaN) does not hold.

    statistic: `before`, `after`, `difference`, `ratio` (after / before), `low` and `high` (the 95 % interval of the difference), `p`, `n`.
    """

    measurement: str
    statistic: Literal["before", "after", "difference", "ratio", "low", "high", "p", "n"] = "after"
    op: Literal[">=", "<=", ">", "<", "=="]
    threshold: float

    def __str__(self) -> str:
        return f"{self.measurement} {self.statistic} {self.op} {self.threshold:g}"


@dataclass(frozen=True)
class CheckRow:
    """One check's result; note: why a check without a value failed."""

    check: Check
    value: float
    ok: bool
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """ok: every check holds. Without checks nothing was claimed: `ok` is true and `rows` empty (`outcome` says `unchecked`)."""

    ok: bool
    rows: tuple[CheckRow, ...]

    @property
    def outcome(self) -> Literal["passed", "failed", "unchecked"]:
        return ("passed" if self.ok else "failed") if self.rows else "unchecked"


def parse_checks(checks: Sequence[Mapping[str, Any] | Check], where: str = "checks") -> tuple[Check, ...]:
    """Read checks from a recipe. Raises ConfigError that names the entry, the key and the nearest known one."""
    if isinstance(checks, str | Mapping):
        raise ConfigError(f"{where} must be a list of checks, not {type(checks).__name__}.", "Start each check with '- measurement: ...'.")
    parsed = tuple(check if isinstance(check, Check) else Check.parse(check, f"{where}.{row}") for row, check in enumerate(checks))
    for row, check in enumerate(parsed):
        if not math.isfinite(check.threshold):
            raise ConfigError(f"{where}.{row}: a threshold of {check.threshold} cannot be checked.", "Give a finite number.")
    return parsed


def run_checks(checks: Sequence[Mapping[str, Any] | Check], measurements: Sequence[Measurement], seed: int = 0) -> Verdict:
    """Judge `measurements` by `checks`. Raises ConfigError for a check of a measurement that was not made."""
    made: dict[str, Measurement] = {}
    for measurement in measurements:
        if measurement.name in made:
            raise ConfigError(f"Two measurements are called '{measurement.name}'.", "Give each a name of its own.")
        made[measurement.name] = measurement
    rows, summaries = [], {}
    for check in parse_checks(checks):
        if check.measurement not in made:
            raise ConfigError(f"A check asks for '{check.measurement}', which was not measured.", nearest(check.measurement, made))
        if check.measurement not in summaries:
            summaries[check.measurement] = made[check.measurement].summary(seed)
        value = float(getattr(summaries[check.measurement], check.statistic))
        note = f"{check.statistic} has no value here" if math.isnan(value) else ""
        rows.append(CheckRow(check, value, not note and bool(OPERATORS[check.op](value, check.threshold)), note))
    return Verdict(all(row.ok for row in rows), tuple(rows))
