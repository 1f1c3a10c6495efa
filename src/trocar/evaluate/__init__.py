"""Floor 3: measurements paired before and after, checks with thresholds, cached base outputs.

Names are imported when they are first used, so that measurements, checks and reports can be had without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trocar.core.lazy import lazy

if TYPE_CHECKING:
    from trocar.evaluate.checks import Check, CheckRow, Verdict, parse_checks, run_checks
    from trocar.evaluate.costs import counts, latency
    from trocar.evaluate.curves import Curve, connectivity
    from trocar.evaluate.forward import BaseOutputs, data_digest, evaluating, outputs, refuse_overlap
    from trocar.evaluate.fronts import Difference, at_equal, group_bootstrap_difference
    from trocar.evaluate.language import Perplexity, kl, kl_to_base, perplexity, perplexity_measurement
    from trocar.evaluate.loops import Loop, find_loop, repetition, repetitions
    from trocar.evaluate.measurement import Measurement, Summary
    from trocar.evaluate.queries import (
        QueryScores,
        RelativeChange,
        contains_answer,
        query_measurements,
        relative_change,
        relative_changes,
        relative_rows,
    )
    from trocar.evaluate.rates import accuracy, cost, generalisation, generalisation_rate, locality, predictions, success
    from trocar.evaluate.tasks import Task, TaskScores, task_accuracy
    from trocar.evaluate.translation import (
        CorpusScore,
        corpus_score,
        identify,
        language_code,
        language_mismatch,
        language_name,
        mismatches,
        sentence_scores,
        translation_quality,
    )

_HOMES = {
    "checks": ("Check", "CheckRow", "Verdict", "parse_checks", "run_checks"),
    "curves": ("Curve", "connectivity"),
    "costs": ("counts", "latency"),
    "fronts": ("Difference", "at_equal", "group_bootstrap_difference"),
    "language": ("Perplexity", "kl", "kl_to_base", "perplexity", "perplexity_measurement"),
    "measurement": ("Measurement", "Summary"),
    "forward": ("BaseOutputs", "data_digest", "evaluating", "outputs", "refuse_overlap"),
    "loops": ("Loop", "find_loop", "repetition", "repetitions"),
    "translation": (
        "CorpusScore",
        "corpus_score",
        "identify",
        "language_code",
        "language_mismatch",
        "language_name",
        "mismatches",
        "sentence_scores",
        "translation_quality",
    ),
    "queries": (
        "QueryScores",
        "RelativeChange",
        "contains_answer",
        "query_measurements",
        "relative_change",
        "relative_changes",
        "relative_rows",
    ),
    "tasks": ("Task", "TaskScores", "task_accuracy"),
    "rates": ("accuracy", "cost", "generalisation", "generalisation_rate", "locality", "predictions", "success"),
}
__all__ = [
    "BaseOutputs",
    "Check",
    "CheckRow",
    "CorpusScore",
    "Curve",
    "Difference",
    "Loop",
    "Measurement",
    "Perplexity",
    "QueryScores",
    "RelativeChange",
    "Summary",
    "Task",
    "TaskScores",
    "Verdict",
    "accuracy",
    "at_equal",
    "connectivity",
    "contains_answer",
    "corpus_score",
    "cost",
    "counts",
    "data_digest",
    "evaluating",
    "find_loop",
    "generalisation",
    "generalisation_rate",
    "group_bootstrap_difference",
    "identify",
    "kl",
    "kl_to_base",
    "language_code",
    "language_mismatch",
    "language_name",
    "latency",
    "locality",
    "mismatches",
    "outputs",
    "parse_checks",
    "perplexity",
    "perplexity_measurement",
    "predictions",
    "query_measurements",
    "refuse_overlap",
    "relative_change",
    "relative_changes",
    "relative_rows",
    "repetition",
    "repetitions",
    "run_checks",
    "sentence_scores",
    "success",
    "task_accuracy",
    "translation_quality",
]

__getattr__ = lazy(__name__, _HOMES)
