"""Floor 3: measurements paired before and after, checks with thresholds, cached base outputs.

Names are imported when they are first used, so that measurements, checks and reports can be had without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trocar.core.lazy import lazy

if TYPE_CHECKING:
    from trocar.evaluate.checks import Check, CheckRow, Verdict, parse_checks, run_checks
    from trocar.evaluate.costs import counts, latency
    from trocar.evaluate.forward import BaseOutputs, data_digest, evaluating, outputs, refuse_overlap
    from trocar.evaluate.fronts import Difference, at_equal, group_bootstrap_difference
    from trocar.evaluate.language import Perplexity, kl, kl_to_base, perplexity, perplexity_measurement
    from trocar.evaluate.measurement import Measurement, Summary
    from trocar.evaluate.rates import accuracy, cost, generalisation, generalisation_rate, locality, predictions, success

_HOMES = {
    "checks": ("Check", "CheckRow", "Verdict", "parse_checks", "run_checks"),
    "costs": ("counts", "latency"),
    "fronts": ("Difference", "at_equal", "group_bootstrap_difference"),
    "language": ("Perplexity", "kl", "kl_to_base", "perplexity", "perplexity_measurement"),
    "measurement": ("Measurement", "Summary"),
    "forward": ("BaseOutputs", "data_digest", "evaluating", "outputs", "refuse_overlap"),
    "rates": ("accuracy", "cost", "generalisation", "generalisation_rate", "locality", "predictions", "success"),
}
__all__ = [
    "BaseOutputs",
    "Check",
    "CheckRow",
    "Difference",
    "Measurement",
    "Perplexity",
    "Summary",
    "Verdict",
    "accuracy",
    "at_equal",
    "cost",
    "counts",
    "data_digest",
    "evaluating",
    "generalisation",
    "generalisation_rate",
    "group_bootstrap_difference",
    "kl",
    "kl_to_base",
    "latency",
    "locality",
    "outputs",
    "parse_checks",
    "perplexity",
    "perplexity_measurement",
    "predictions",
    "refuse_overlap",
    "run_checks",
    "success",
]

__getattr__ = lazy(__name__, _HOMES)
