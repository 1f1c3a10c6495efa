"""Does a generated text end in a loop? Floor 3, no torch.

Wang et al., EMNLP 2024 (arXiv:2410.07054) call an output a repetition when it used its whole token budget and ends in a repeated unit.
Their detector compares only the first word of each period and may return a period that it had rejected; ours compares every word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trocar.core.errors import MetricError, nearest
from trocar.evaluate.measurement import Measurement

Mode = Literal["rule", "reference"]
MODES = ("rule", "reference")
NO_BLANKS = frozenset({"zh", "ja", "th", "lo", "km", "my", "yue", "wuu"})  # written without blanks between words
PERIODS = 3  # full periods that make a loop
LONG = 12  # words that make a loop whatever share of the text they are
INSIDE = 3  # a last word longer than this is searched for a loop of characters


@dataclass(frozen=True)
class Loop:
    """A repeated unit at the end of a text.

    start, period: in words, or in characters where `characters`; before, unit: the text in front of the loop and one period of it, cut
    from the text as it stands there (blanks included), so that `text.startswith(before + unit)`.
    """

    start: int
    period: int
    before: str
    unit: str
    characters: bool


def find_loop(text: str, characters: bool = False, mode: Mode = "rule") -> Loop | None:
    """The loop that `text` ends in, or None.

    characters: compare characters instead of words (languages written without blanks). The last word may be cut off and only ever
    confirms a loop. mode `rule`: the smallest start, then the smallest period, such that every word from there on equals the word one
    period later, with at least 3 full periods that fill half of the text or 12 words. If there is none, the last word is searched
    by characters (`!!!!!!!!`). mode `reference`: the published detector, for parity. Raises MetricError for an unknown mode.
    """
    if mode not in MODES:
        raise MetricError(f"'{mode}' is not a way to detect repetition.", nearest(mode, MODES))
    text = text.strip()
    items, places = _items(text, characters)
    if len(items) < 2 and (characters or not items):
        return None
    find = find_period if mode == "rule" else _reference_period
    if found := find(items, len(items)):
        return _loop(text, places, found, characters)
    if characters or len(items[-1]) <= INSIDE:
        return None
    last, inner = places[-1][0], list(items[-1])
    whole = len(text.replace(" ", ""))
    if found := find(inner, whole):
        loop = _loop(text, [(last + n, last + n + 1) for n in range(len(inner))], found, True)
        return Loop(last + found[0], found[1], loop.before, loop.unit, True)
    return None


def _items(text: str, characters: bool) -> tuple[list[str], list[tuple[int, int]]]:
    """Words (or characters that are not blank) and where they stand."""
    places, start = [], None
    for place, character in enumerate(text):
        if character.isspace():
            if start is not None:
                places.append((start, place))
            start = None
        elif characters:
            places.append((place, place + 1))
        elif start is None:
            start = place
    if start is not None:
        places.append((start, len(text)))
    return [text[start:end] for start, end in places], places


def _loop(text: str, places: Sequence[tuple[int, int]], found: tuple[int, int], characters: bool) -> Loop:
    start, period = found
    begin = places[start - 1][1] if start and not characters else places[start][0]  # the blank before a unit's first word belongs to it
    after = start + period
    end = places[after - 1][1] if not characters or after >= len(places) else places[after][0]
    return Loop(start, period, text[:begin], text[begin:end], characters)


def find_period(items: Sequence[Hashable], whole: int | None = None) -> tuple[int, int] | None:
    """(start, period) of the loop at the end of `items` (words, characters, tokens), whose last item may be cut off; see `find_loop`.

    whole: how long the text is that the loop should fill half of, in the same unit; the items by default.
    """
    if len(items) < PERIODS:
        return None
    whole = len(items) if whole is None else whole
    known, last = items[:-1], items[-1]
    best = None
    for period in range(1, len(items) // PERIODS + 1):
        place = len(known) - period
        while place > 0 and known[place - 1] == known[place - 1 + period]:
            place -= 1
        place = max(place, 0)
        # the last item counts where it continues the loop; it can never end one, since it may be cut off
        length = len(known) - place + (place <= len(known) - period and last == known[len(known) - period])
        enough = length >= PERIODS * period and (2 * length >= whole or length >= max(LONG, PERIODS * period))
        if enough and (best is None or place < best[0]):
            best = (place, period)
    return best


def _reference_period(items: Sequence[Hashable], whole: int) -> tuple[int, int] | None:
    """The published rule, its two defects included: only the first item of each period is compared, and a rejected period stays in force
    until a later start is tried."""
    count = Counter(items)
    known = items[:-1]
    start, found = 0, None
    while start < len(known):
        if count[known[start]] < 2:
            start += 1
            continue
        ahead = start + 1
        found = None
        while ahead < len(known) and count[known[ahead]] > 1:
            if known[ahead] == known[start]:
                found = (start, ahead - start)
                break
            ahead += 1
        if found is not None and all(known[place] == known[start] for place in range(start, len(known), found[1])):
            return found
        # a walk that met an item standing alone goes on behind it, any other start is simply followed by the next
        start = ahead + 1 if found is None and ahead < len(known) else start + 1
    return found


def repetitions(
    texts: Sequence[str], used_budget: Sequence[bool] | None, language: str | Sequence[str] = "", mode: Mode = "rule"
) -> np.ndarray:
    """1.0 for every text that is a repetition, 0.0 for the others, (n,).

    used_budget: (n,) whether generation was ended by its token budget (`not continuation.stopped`); only such texts count. None drops that
    condition. language: code of the texts' language, or one a text: characters are compared where it is written without blanks.
    """
    languages = [language] * len(texts) if isinstance(language, str) else list(language)
    allowed = [True] * len(texts) if used_budget is None else [bool(used) for used in used_budget]
    if not len(texts) == len(languages) == len(allowed):
        raise MetricError(f"{len(texts)} texts, {len(languages)} languages and {len(allowed)} budgets cannot be paired.")
    flags = [
        used and find_loop(text, code.lower().partition("-")[0] in NO_BLANKS, mode) is not None
        for text, used, code in zip(texts, allowed, languages, strict=True)
    ]
    return np.array(flags, dtype=np.float64)


def repetition(
    before: Sequence[str],
    after: Sequence[str],
    states: tuple[str, str],
    used_budget: tuple[Sequence[bool], Sequence[bool]] | None,
    language: str | Sequence[str] = "",
    mode: Mode = "rule",
    name: str = "repetition",
    groups: Any = None,
) -> Measurement:
    """Share of outputs that are repetitions, before and after a change. used_budget: for both sides; None drops the budget's condition.
    The other arguments are those of `repetitions`; every output counts, empty ones too. Raises MetricError for unequal numbers."""
    used = (None, None) if used_budget is None else used_budget
    sides = [repetitions(texts, budget, language, mode) for texts, budget in zip((before, after), used, strict=True)]
    gate = "" if used_budget is None else " and the token budget is used up"
    scorer = f"the output ends in a loop ({'every word compared' if mode == 'rule' else 'published detector'}){gate}"
    return Measurement(name, "output", sides[0], sides[1], scorer, states[0], states[1], better="lower", groups=groups, form="share")
