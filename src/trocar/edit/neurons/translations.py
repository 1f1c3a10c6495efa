"""Translations made by a model and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trocar.core.errors import DataError
from trocar.edit.neurons.prompts import BREAK, Direction
from trocar.evaluate.loops import Mode, repetitions
from trocar.evaluate.translation import mismatches
from trocar.trace.queries import Continuation, continuations


@dataclass(frozen=True)
class Rules:
    """How outputs are made and judged.

    max_new_tokens: budget of an output (400 in the reference code). languages: codes the outputs may be in, besides the direction's.
    mode: loop detector (`evaluate.find_loop`). strict: too short to tell is wrong. batch_size: prompts a pass.
    """

    max_new_tokens: int = 400
    languages: tuple[str, ...] = ()
    mode: Mode = "rule"
    strict: bool = False
    batch_size: int = 16


@dataclass(frozen=True)
class Translations:
    """Outputs of one direction, one a prompt. mismatch, loop: (n,) 0.0 or 1.0."""

    direction: Direction
    made: tuple[Continuation, ...]
    mismatch: np.ndarray
    loop: np.ndarray

    def __len__(self) -> int:
        return len(self.made)

    @property
    def texts(self) -> list[str]:
        return [one.text for one in self.made]

    @property
    def errors(self) -> np.ndarray:
        """1.0 where the language is wrong or the output loops."""
        return np.maximum(self.mismatch, self.loop)

    @property
    def empty(self) -> int:
        return sum(not one.text for one in self.made)

    def data(self) -> list[list[Any]]:
        """JSON-able, for a unit of work."""
        return [[one.text, list(one.tokens), one.stopped] for one in self.made]


def judge(made: Sequence[Continuation], direction: Direction, rules: Rules) -> Translations:
    """Which outputs are in the wrong language, and which loop (only those that used their whole budget)."""
    texts, known = [one.text for one in made], {*rules.languages, direction.source, direction.target}
    wrong = mismatches(texts, direction.target, sorted(known), rules.strict)
    loop = repetitions(texts, [not one.stopped for one in made], direction.target, rules.mode)
    return Translations(direction, tuple(made), wrong, loop)


def translate(model: Any, tokenizer: Any, direction: Direction, prompts: Sequence[str], rules: Rules) -> Translations:
    """Greedy translations up to the first line break, judged. Under an applied patch the changed model translates."""
    if not prompts:
        raise DataError(f"There is nothing to translate from {direction}.", "Give at least one sentence.")
    return judge(continuations(model, tokenizer, prompts, rules.max_new_tokens, BREAK, rules.batch_size), direction, rules)


def from_data(stored: Sequence[Sequence[Any]], direction: Direction, rules: Rules) -> Translations:
    """Translations from what `Translations.data` gave."""
    return judge([Continuation(str(text), tuple(tokens), bool(stopped)) for text, tokens, stopped in stored], direction, rules)


def sampling(model: Any) -> str:
    """A sentence for the log if the checkpoint's own settings ask for sampling; here decoding is greedy whatever they say."""
    own = getattr(model, "generation_config", None)
    if own is None or not getattr(own, "do_sample", False):
        return ""
    return "the checkpoint's generation settings ask for sampling; all outputs here are greedy, so that they can be made again"


def joined(parts: Mapping[str, Sequence[Any]]) -> tuple[list[Any], list[str]]:
    """Columns of several directions one after the other, and each row's direction."""
    return [value for column in parts.values() for value in column], [name for name, column in parts.items() for _ in column]
