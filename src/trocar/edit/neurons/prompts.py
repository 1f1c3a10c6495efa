"""Directions, sentence pairs and prompts of the translation task.

A prompt is line-separated and names the languages, as in Wang et al., EMNLP 2024 (arXiv:2410.07054):
`English: <source>\\nGerman:`, with example pairs in the same form before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trocar.core.errors import ConfigError, DataError, MetricError, nearest
from trocar.core.seeds import derive
from trocar.evaluate.translation import language_code, translation_prompt
from trocar.method import Examples

BREAK = "\n"
Corruption = Literal["permuted", "language", "absent"]
Pair = tuple[str, str]  # source sentence, target sentence


@dataclass(frozen=True, order=True)
class Direction:
    """From one language into another, as two-letter codes; written `en-de`."""

    source: str
    target: str

    @classmethod
    def parse(cls, text: str | Direction) -> Direction:
        """Read `en-de`, `English-German` or `eng-deu`. Raises ConfigError for anything else and for a language into itself."""
        if isinstance(text, Direction):
            return text
        source, _, target = text.partition("-")
        if not source or not target or "-" in target:
            raise ConfigError(f"'{text}' is not a direction.", "Write source and target, for example en-de.")
        made = cls(language_code(source), language_code(target))
        if made.source == made.target:
            raise ConfigError(f"'{text}' translates a language into itself.", "Name two languages.")
        return made

    def __str__(self) -> str:
        return f"{self.source}-{self.target}"


def prompt(direction: Direction, text: str, shots: Sequence[Pair] = ()) -> str:
    """The prompt that asks for the translation of `text`, after `shots` example pairs."""
    return translation_prompt(direction.source, direction.target, text, shots)


@dataclass(frozen=True)
class Corpus:
    """Parallel sentences: language code -> sentences, all of one length, empty where a row has no sentence in that language."""

    columns: Mapping[str, Sequence[str]]
    origin: str = "the examples"

    @classmethod
    def of(cls, examples: Examples, origin: str = "the examples") -> Corpus:
        """From rows with one column a language, named by code or English name. Columns that name no language are left out."""
        found = {}
        for name, column in examples.fields.items():
            try:
                code = language_code(name)
            except MetricError:  # any other column of the source
                continue
            if code in found:
                raise DataError(f"{origin} have two columns for the language '{code}'.", "Keep one of them.")
            found[code] = [str(cell or "").strip() for cell in column]
        return cls(found, origin)

    def __len__(self) -> int:
        return max((len(column) for column in self.columns.values()), default=0)

    def pairs(self, direction: Direction, rows: Sequence[int] | None = None) -> list[Pair]:
        """The sentence pairs of a direction at `rows` (all by default) that have both sides. Raises DataError naming a missing language."""
        for code in (direction.source, direction.target):
            if code not in self.columns:
                raise DataError(f"{self.origin} have no column for the language '{code}'.", nearest(code, self.columns))
        chosen = range(len(self)) if rows is None else rows
        made = [(self.columns[direction.source][row], self.columns[direction.target][row]) for row in chosen]
        return [pair for pair in made if pair[0] and pair[1]]


@dataclass(frozen=True)
class Split:
    """Rows for examples (70 %), for validation (21 %) and for queries (9 %): the shares of the reference code."""

    examples: tuple[int, ...]
    validation: tuple[int, ...]
    queries: tuple[int, ...]


def split(n: int, seed: int) -> Split:
    """`n` rows in three parts, the same for all directions. Raises DataError for fewer than 12 rows."""
    if n < 12:
        raise DataError(f"{n} parallel sentences are too few to take examples, queries and validation from.", "Give at least 12.")
    order = np.random.default_rng(derive(seed, "split")).permutation(n).tolist()
    first, second = round(0.7 * n), round(0.91 * n)
    return Split(tuple(sorted(order[:first])), tuple(sorted(order[first:second])), tuple(sorted(order[second:])))


def draw_shots(pairs: Sequence[Pair], shots: int, rng: np.random.Generator, without: str = "") -> list[Pair]:
    """`shots` different pairs drawn at random, none of them with the source sentence `without`."""
    able = [pair for pair in pairs if pair[0] != without] if without else list(pairs)
    if len(able) < shots:
        raise DataError(f"{shots} examples a prompt are asked for, and there are {len(able)}.", "Give more examples, or ask for fewer.")
    return [able[place] for place in rng.choice(len(able), shots, replace=False).tolist()]


def corrupt(shots: Sequence[Pair], kind: Corruption, rng: np.random.Generator, others: Sequence[Sequence[str]] = ()) -> list[Pair]:
    """The example pairs with targets that no longer translate their sources.

    kind: `permuted` gives every source another one's target (the published corruption: the meaning is gone, the target's language stays
    visible); `language` puts sentences of other languages instead, drawn from `others` (one list of sentences a language); `absent`
    leaves the examples out, which is the zero-shot prompt that fails. With a single example there is nothing to permute.
    """
    if kind == "absent":
        return []
    sources, targets = [pair[0] for pair in shots], [pair[1] for pair in shots]
    if kind == "permuted":
        if len(shots) < 2:
            raise ConfigError("The target of a single example cannot be permuted.", "Use two or more shots, or the corruption 'language'.")
        shift = rng.permutation(len(shots))
        while (shift == np.arange(len(shots))).any():  # every source gets another one's target
            shift = rng.permutation(len(shots))
        return [(source, targets[place]) for source, place in zip(sources, shift.tolist(), strict=True)]
    if not any(others):
        raise DataError("There is no other language to take wrong targets from.", "Give a third language, or the corruption 'permuted'.")
    pools = [pool for pool in others if pool]
    picked = [pools[int(rng.integers(len(pools)))] for _ in shots]
    return [(source, pool[int(rng.integers(len(pool)))]) for source, pool in zip(sources, picked, strict=True)]


def clean_prompts(direction: Direction, pairs: Sequence[Pair], n: int, shots: int, seed: int) -> list[str]:
    """`n` prompts with `shots` right examples each, whose queries are further examples: what head activations are averaged over."""
    rng = np.random.default_rng(derive(seed, "clean", direction, shots))
    queries = rng.choice(len(pairs), n, replace=n > len(pairs)).tolist()
    return [prompt(direction, pairs[row][0], draw_shots(pairs, shots, rng, pairs[row][0])) for row in queries]


def corrupted_prompts(
    direction: Direction,
    pairs: Sequence[Pair],
    queries: Sequence[Pair],
    n: int,
    shots: int,
    seed: int,
    kind: Corruption = "permuted",
    others: Sequence[Sequence[str]] = (),
) -> tuple[list[str], list[str]]:
    """(prompts with `shots` corrupted examples, right answers): at most `n`, one a query, never the same query twice."""
    rng = np.random.default_rng(derive(seed, "corrupted", direction, shots, kind))
    chosen = [queries[row] for row in rng.permutation(len(queries))[:n].tolist()]
    made = [corrupt(draw_shots(pairs, shots, rng, source), kind, rng, others) for source, _ in chosen]
    prompts = [prompt(direction, source, bad) for (source, _), bad in zip(chosen, made, strict=True)]
    return prompts, [target for _, target in chosen]


def test_prompts(direction: Direction, pairs: Sequence[Pair], examples: Sequence[Pair], shots: int, seed: int) -> list[str]:
    """One prompt a pair, each with its own `shots` examples drawn from `examples`."""
    rng = np.random.default_rng(derive(seed, "test", direction, shots))
    return [prompt(direction, source, draw_shots(examples, shots, rng, source)) for source, _ in pairs]


test_prompts.__test__ = False  # type: ignore[attr-defined]  # a name that pytest would collect
