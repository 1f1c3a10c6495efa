"""Floor 3: measurements paired before and after, checks with thresholds, cached base outputs."""

from trocar.evaluate.checks import Check, CheckRow, Verdict, parse_checks, run_checks
from trocar.evaluate.measurement import Measurement, Summary
from trocar.evaluate.rates import accuracy, cost, generalisation, generalisation_rate, locality, predictions, success

__all__ = [
    "Check",
    "CheckRow",
    "Measurement",
    "Summary",
    "Verdict",
    "accuracy",
    "cost",
    "generalisation",
    "generalisation_rate",
    "locality",
    "parse_checks",
    "predictions",
    "run_checks",
    "success",
]
