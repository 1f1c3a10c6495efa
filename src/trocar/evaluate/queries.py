"""What an edit of one answer does to the questions around it: the edited prompt, its paraphrases, other questions that should follow,
and unrelated ones that should not. Floor 3, no torch.

The published figures of CREME (arXiv:2402.14328) and of its predecessors are means of *relative* changes of a probability, which are ruled
by the few cases that began near zero. So measurements here are of absolute probabilities, with intervals over cases, and relative
changes come beside them, never alone, with mean and median side by side.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from trocar.core.errors import MetricError, nearest
from trocar.evaluate.measurement import Measurement, column_of
from trocar.evaluate.rates import States

SETS = ("edited", "paraphrase", "generalisation", "unrelated")
ORDER = ("correction", "paraphrase", "generalisation", "specificity", "leakage", "event_rate", "generation", "wrong", "moved")
Better = Literal["higher", "lower", "same"]
NAMES = {"edited": "correction", "paraphrase": "paraphrase", "generalisation": "generalisation", "unrelated": "specificity"}


@dataclass(frozen=True, eq=False)
class QueryScores:
    """What one state of a model says to n queries, all sets of all cases together.

    sets: of each query, one of SETS; a kind may follow (`unrelated.hard`) and is reported apart as well. cases: which case it belongs to.
    answer: (n,) probability of the query's own right answer. wrong: (n,) of the answer that the model gave before, on `edited` and
    `paraphrase` queries. target: (n,) of the edited case's right answer on `unrelated` queries, where it is none (leakage).
    generated: (n,) 1 where a generated text holds the right answer (`contains_answer`), else 0. first: (n,) the most probable first
    token. NaN (-1 in `first`) where a query has none; None: not measured. Raises MetricError for unequal lengths, unknown sets, and values
    that are no probabilities.
    """

    sets: Sequence[str]
    cases: Sequence[Hashable]
    answer: Any
    wrong: Any = None
    target: Any = None
    generated: Any = None
    first: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sets", tuple(self.sets))
        object.__setattr__(self, "cases", tuple(self.cases))
        for name in ("answer", "wrong", "target", "generated", "first"):
            value = getattr(self, name)
            if value is not None:
                column = column_of("queries", name, value)
                object.__setattr__(self, name, column)
                if name != "first" and not ((column >= 0) & (column <= 1 + 1e-6) | np.isnan(column)).all():
                    raise MetricError(f"Queries: `{name}` holds values outside of 0..1.", "Give probabilities, not logarithms.")
        for name in ("cases", "answer", "wrong", "target", "generated", "first"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.sets):
                raise MetricError(f"Queries: {len(self.sets)} sets but {len(value)} values of `{name}`.", "Give one a query.")
        for name in self.sets:
            if name.partition(".")[0] not in SETS:
                raise MetricError(f"Queries: there is no set '{name}'.", nearest(name, SETS))

    def __len__(self) -> int:
        return len(self.sets)


@dataclass(frozen=True)
class RelativeChange:
    """How a probability changed relative to where it began: (after - before) / before, and 0 where before is 0.

    n: queries; n_cases: mean and median are over cases, of each case's mean over its queries; mean, median: as fractions (17.03 is
    +1703 %); raised: share of queries whose probability rose; from_zero: queries that began at exactly 0; before, after: mean absolute
    probabilities, over the same cases. A mean far above the median says that a few cases that began near zero rule it.
    """

    name: str
    n: int
    n_cases: int
    mean: float
    median: float
    raised: float
    from_zero: int
    before: float
    after: float

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def relative_change(name: str, before: Any, after: Any, cases: Sequence[Hashable] | None = None) -> RelativeChange:
    """Summarise (n,) probabilities before and after. cases: (n,) labels, None: every query is its own case.

    Queries with NaN on either side are left out. Raises MetricError if none is left or lengths differ.
    """
    before, after = column_of(name, "before", before), column_of(name, "after", after)
    labels = list(range(len(before))) if cases is None else list(cases)
    if not len(before) == len(after) == len(labels):
        raise MetricError(f"'{name}': {len(before)} values before, {len(after)} after, {len(labels)} cases.", "Pair them query by query.")
    keep = ~(np.isnan(before) | np.isnan(after))
    if not keep.any():
        raise MetricError(f"'{name}': no query has a value on both sides.", "Measure at least one.")
    before, after = before[keep], after[keep]
    zero = before < 1e-300  # 0, or so near that ratios overflow
    change = np.where(zero, 0.0, (after - before) / np.where(zero, 1.0, before))
    rows: dict[Hashable, list[int]] = {}
    for row, place in enumerate(np.flatnonzero(keep).tolist()):
        rows.setdefault(labels[place], []).append(row)
    means = np.array([[column[index].mean() for column in (change, before, after)] for index in rows.values()])
    return RelativeChange(
        name, len(before), len(rows), float(means[:, 0].mean()), float(np.median(means[:, 0])), float((after > before).mean()),
        int(zero.sum()), float(means[:, 1].mean()), float(means[:, 2].mean()),
    )  # fmt: skip


def query_measurements(before: QueryScores, after: QueryScores, states: States) -> list[Measurement]:
    """Everything that a state's answers to the same queries say, before and after an edit; sets without queries are passed over.

    `correction`, `paraphrase`, `generalisation` (probability of the right answer, averaged inside a case, then over cases), `wrong` and
    `wrong.paraphrase` (of the answer given before), `event_rate` and `event_rate.paraphrase` (share of prompts that prefer the right to the
    wrong answer), `generation`, `generation.SET` (share of texts that hold the right answer), and of unrelated queries, which should
    not move: `specificity` (probability of their own right answer), `leakage` (of the edited case's) and `moved` (share whose most probable
    first token is another), each also per kind. Raises MetricError if the two sides are not of the same queries.
    """
    found = []
    for name, side, rows in _columns(before, after):
        unrelated = name.partition(".")[0] in ("specificity", "leakage")
        better: Better = "same" if unrelated else "lower" if name.partition(".")[0] == "wrong" else "higher"
        scorer = {
            "wrong": "probability of the answer given before",
            "leakage": "probability of the edited case's answer, which is none here",
        }.get(name.partition(".")[0], "probability of the right answer")
        found.append(
            _measure(name, before, rows, getattr(before, side)[rows], getattr(after, side)[rows], scorer, states, better, "number")
        )
    for part, rows in _parts(before):
        kind, suffix = part.partition(".")[0], "" if part == "edited" else f".{part.removeprefix('unrelated').lstrip('.') or 'unrelated'}"
        if kind in ("edited", "paraphrase") and before.wrong is not None and after.wrong is not None:
            was, now = (np.where(np.isnan(s.wrong + s.answer), np.nan, s.answer > s.wrong)[rows] for s in (before, after))
            if _any(was, now):
                scorer = "the right answer is more probable than the wrong one"
                found.append(_measure(f"event_rate{suffix}", before, rows, was, now, scorer, states, "higher", "share"))
        if before.generated is not None and after.generated is not None and _any(before.generated[rows], after.generated[rows]):
            scorer = "the generated text holds the right answer"
            better = "same" if kind == "unrelated" else "higher"
            was, now = before.generated[rows], after.generated[rows]
            found.append(_measure(f"generation{suffix}", before, rows, was, now, scorer, states, better, "share"))
        if kind == "unrelated" and before.first is not None and after.first is not None:
            there = (before.first[rows] >= 0) & (after.first[rows] >= 0)  # NaN compares false
            was, now = np.where(there, 0.0, np.nan), np.where(there, before.first[rows] != after.first[rows], np.nan)
            if _any(was, now):
                scorer = "the most probable first token is another than before"
                found.append(_measure(part.replace("unrelated", "moved"), before, rows, was, now, scorer, states, "lower", "share"))
    return sorted(found, key=lambda measurement: ORDER.index(measurement.name.partition(".")[0]))


def relative_changes(before: QueryScores, after: QueryScores) -> list[RelativeChange]:
    """The relative changes of every probability that `query_measurements` measures, under the same names."""
    return [
        relative_change(name, getattr(before, side)[rows], getattr(after, side)[rows], [before.cases[row] for row in rows])
        for name, side, rows in _columns(before, after)
    ]


def relative_rows(changes: Sequence[RelativeChange]) -> list[dict[str, Any]]:
    """Rows of a table (a `Figure` of kind `table`, a page of the documentation): relative changes in words beside absolute values."""
    return [
        {
            "measured": change.name, "queries": change.n, "cases": change.n_cases, "mean change": percent(change.mean),
            "median change": percent(change.median), "raised": f"{100 * change.raised:.0f} %", "before": float(f"{change.before:.4g}"),
            "after": float(f"{change.after:.4g}"),
        }
        for change in changes
    ]  # fmt: skip


def percent(fraction: float) -> str:
    """A relative change as it is printed: +1,703 %, +2.5 %, −40 %."""
    value = 100 * fraction
    text = f"{abs(value):,.0f}" if abs(value) >= 100 else f"{abs(value):.3g}" if abs(value) >= 0.001 or value == 0 else f"{abs(value):.1e}"
    return f"{'+' if value > 0 else '−' if value < 0 else '±'}{text} %"


def contains_answer(text: str, answers: str | Sequence[str]) -> bool:
    """Whether the first line of a generated text holds an answer (or one of its aliases), whatever the case and the white space."""
    line = " ".join(text.strip().partition("\n")[0].casefold().split())
    wanted = [" ".join(answer.casefold().split()) for answer in ([answers] if isinstance(answers, str) else answers)]
    return any(answer and answer in line for answer in wanted)


def _parts(scores: QueryScores) -> Iterator[tuple[str, np.ndarray]]:
    """(name, rows) of every set in the order of SETS, each followed by its kinds in the order of first appearance."""
    stems = [name.partition(".")[0] for name in scores.sets]
    for stem in SETS:
        rows = [row for row, name in enumerate(stems) if name == stem]
        kinds = [name for name in dict.fromkeys(scores.sets) if name.startswith(f"{stem}.")]
        if rows:
            yield stem, np.array(rows)
        for kind in kinds:
            yield kind, np.array([row for row, name in enumerate(scores.sets) if name == kind])


def _columns(before: QueryScores, after: QueryScores) -> Iterator[tuple[str, str, np.ndarray]]:
    """(name of a measurement, column, rows) of every probability that both sides have."""
    if before.sets != after.sets or before.cases != after.cases:
        raise MetricError("Queries before and after are not the same ones.", "Ask both states the same questions in the same order.")
    for side, wanted in (("answer", SETS), ("wrong", ("edited", "paraphrase")), ("target", ("unrelated",))):
        if getattr(before, side) is None or getattr(after, side) is None:
            continue
        for part, rows in _parts(before):
            stem, dot, kind = part.partition(".")
            name = {"answer": NAMES[stem], "wrong": "wrong" if stem == "edited" else f"wrong.{stem}", "target": "leakage"}[side]
            if stem in wanted and _any(getattr(before, side)[rows], getattr(after, side)[rows]):
                yield f"{name}{dot}{kind}", side, rows


def _any(before: np.ndarray, after: np.ndarray) -> bool:
    return bool((~(np.isnan(before) | np.isnan(after))).any())


def _measure(
    name: str,
    scores: QueryScores,
    rows: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    scorer: str,
    states: States,
    better: Better,
    form: Literal["share", "number"],
) -> Measurement:
    cases = [scores.cases[row] for row in rows]
    groups = cases if len(set(cases)) < len(cases) else None
    return Measurement(name, "prompt", before, after, scorer, states[0], states[1], better, groups, form=form)
