"""From translations to what is attributed: tokens of good translations (MT-KN) and of repeated units (RP-KN).

An instance is a context as ids and the token that follows. Contexts are joined from the prompt's ids and the ids that the model generated,
never from text that is tokenised again, so no token's boundary can move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trocar.core.seeds import derive
from trocar.evaluate.loops import find_period
from trocar.trace.queries import Continuation

PER_CASE, FIRST = 6, 20  # positions drawn a case, among the first so many generated tokens (arXiv:2410.07054, reference code)


@dataclass(frozen=True)
class Instance:
    """A context and the token after it. case: the translation that it is from; occurrence: which repetition of the unit, 0 is the first."""

    ids: tuple[int, ...]
    token: int
    case: int
    occurrence: int = 0


def task_instances(
    prompts: Sequence[Sequence[int]],
    made: Sequence[Continuation],
    good: Sequence[bool],
    n: int,
    seed: int,
    per_case: int = PER_CASE,
    first: int = FIRST,
) -> list[Instance]:
    """At most `n` instances from the translations marked good.

    prompts: token ids of each prompt. From every case min(per_case, tokens) positions are drawn with replacement among its first `first`
    generated tokens; of all drawn instances exactly `n` are sampled, or all if there are fewer.
    """
    rng = np.random.default_rng(derive(seed, "task instances"))
    found = []
    for case, (prompt, one, right) in enumerate(zip(prompts, made, good, strict=True)):
        reach = min(first, len(one.tokens))
        if not right or not reach:
            continue
        for place in rng.integers(0, reach, min(per_case, reach)).tolist():
            found.append(Instance((*prompt, *one.tokens[:place]), one.tokens[place], case))
    keep = sorted(rng.permutation(len(found))[:n].tolist())
    return [found[row] for row in keep]


@dataclass(frozen=True)
class Loops:
    """Instances of repeated units. cases: loops used; dropped: loops of the text that do not repeat as tokens; occurrences: how many
    repetitions a case at most, after the budget."""

    instances: tuple[Instance, ...]
    cases: int
    dropped: int
    occurrences: int


def loop_instances(
    prompts: Sequence[Sequence[int]],
    made: Sequence[Continuation],
    looping: Sequence[bool],
    budget: int = 2000,
    longest: int = 1024,
    unit_tokens: int | None = None,
) -> Loops:
    """Every token of a repeated unit, once for its first occurrence and once for every repetition, as far as the output holds them.

    looping: which outputs are repetitions. longest: contexts stay below so many tokens. budget: at most so many instances of repetitions;
    beyond, the number of repetitions a case is cut to the smallest that fills it, shortest loops first. unit_tokens: only so many tokens
    of each unit, all by default.
    """
    cases: list[tuple[int, int, int, int]] = []  # case, start, period, repetitions
    dropped = 0
    for case, (prompt, one, flagged) in enumerate(zip(prompts, made, looping, strict=True)):
        if not flagged:
            continue
        found = find_period(one.tokens)
        if found is None:
            dropped += 1
            continue
        start, period = found
        reach = min(len(one.tokens), longest - len(prompt))  # the longest context of a token at place k holds k tokens
        times = (reach - start) // period
        if times < 2:
            dropped += 1
            continue
        cases.append((case, start, period, times - 1))
    cases.sort(key=lambda one: (one[2], one[0]))
    most = max((times for *_, times in cases), default=0)
    size = {case: min(period, unit_tokens or period) for case, _, period, _ in cases}
    limit = next(
        (limit for limit in range(1, most + 1) if sum(size[case] * min(times, limit) for case, _, _, times in cases) >= budget), most
    )
    instances: list[Instance] = []
    left, used = budget, 0
    for case, start, period, times in cases:
        repeats = min(times, limit, left // size[case])
        if repeats < 1:
            continue
        left -= repeats * size[case]
        used += 1
        tokens = made[case].tokens
        for occurrence in range(repeats + 1):
            for step in range(size[case]):
                place = start + occurrence * period + step
                instances.append(Instance((*prompts[case], *tokens[:place]), tokens[place], case, occurrence))
    return Loops(tuple(instances), used, dropped, limit)
