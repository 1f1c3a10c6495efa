"""Many questions, asked of many edited states of one model: what lies below the first edited block is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trocar.anatomy import Anatomy
from trocar.edit.creme.case import Case
from trocar.evaluate.forward import evaluating
from trocar.evaluate.queries import QueryScores
from trocar.trace.prefix import Prefix, capture_prefix
from trocar.trace.queries import Asked, Mode, answer_tokens, ask, language_tower, only_last

Pair = tuple[str, str]  # prompt, answer


@dataclass(frozen=True, eq=False)
class Said:
    """What a state of the model says to n pairs, (n,) each. score: of the answer; first: most probable next token; right: greedy decoding
    gives the answer."""

    score: np.ndarray
    first: np.ndarray
    right: np.ndarray


class Questions:
    """Pairs of prompt and answer, ready to be asked of a model whose blocks below `layer` stay as they are.

    `say(pairs)` asks the model as it is at that moment; the pairs must be among those given here.
    """

    def __init__(
        self, model: Any, tokenizer: Any, pairs: Sequence[Pair], layer: int = 0, mode: Mode = "sequence", batch_size: int = 32
    ) -> None:
        anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
        self.model, self.mode, self.batch_size = anatomy.model, mode, batch_size
        unique = list(dict.fromkeys(pairs))
        order = sorted(unique, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))  # like lengths together
        self.place: dict[Pair, tuple[int, int]] = {}
        self.batches: list[tuple[Asked, Prefix]] = []
        with evaluating(self.model):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                asked = ask(anatomy, tokenizer, [prompt for prompt, _ in rows], [answer for _, answer in rows], mode)
                kept = max(map(len, asked.tokens)) if mode == "sequence" else 1
                inputs = {**asked.inputs, **only_last(self.model, kept)}
                self.place |= {pair: (len(self.batches), row) for row, pair in enumerate(rows)}
                self.batches.append((asked, capture_prefix(anatomy, inputs, layer, language_tower(anatomy).name)))

    def say(self, pairs: Sequence[Pair]) -> Said:
        """Score, first token and greedy success of each pair."""
        found = np.zeros((len(pairs), 3))
        wanted: dict[int, list[int]] = {}
        for number, pair in enumerate(pairs):
            wanted.setdefault(self.place[pair][0], []).append(number)
        with evaluating(self.model):
            for batch, numbers in wanted.items():
                asked, prefix = self.batches[batch]
                rows = torch.tensor([self.place[pairs[number]][1] for number in numbers])
                output = prefix.run(rows)
                score = asked.metric(output, rows).double().cpu()
                best = output.logits.argmax(-1).cpu()
                for spot, (number, row) in enumerate(zip(numbers, rows.tolist(), strict=True)):
                    tokens = asked.tokens[row] if self.mode == "sequence" else asked.tokens[row][:1]
                    said = best[spot, -len(tokens) :].tolist()
                    found[number] = float(score[spot]), said[0], said == list(tokens)
        return Said(found[:, 0], found[:, 1].astype(np.int64), found[:, 2] > 0)


@dataclass(frozen=True)
class Asking:
    """One query of one case: its set (as in `QueryScores`), prompt, right answer, the answer that was given before, the case's target."""

    set: str
    case: str
    prompt: str
    answer: str
    wrong: str | None = None
    target: str | None = None

    def pairs(self) -> list[Pair]:
        return [(self.prompt, text) for text in (self.answer, self.wrong, self.target) if text]


def queries_of(case: Case) -> list[Asking]:
    """Everything that is asked about a case: the question, its paraphrases, other second hops, unrelated questions."""
    found = [Asking("edited", case.id, case.prompt, case.target, case.wrong)]
    found += [Asking("paraphrase", case.id, query.prompt, query.answer, case.wrong) for query in case.paraphrases]
    found += [Asking("generalisation", case.id, query.prompt, query.answer) for query in case.generalisation]
    for query in case.unrelated:
        name = f"unrelated.{query.kind}" if query.kind else "unrelated"
        found.append(Asking(name, case.id, query.prompt, query.answer, target=case.target))
    return found


def scores_of(questions: Questions, askings: Sequence[Asking]) -> QueryScores:
    """Ask a state all queries: what `query_measurements` compares before and after."""
    pairs = [pair for asking in askings for pair in asking.pairs()]
    said = questions.say(pairs)
    at = {pair: number for number, pair in enumerate(pairs)}

    def column(name: str) -> np.ndarray:
        texts = [getattr(asking, name) for asking in askings]
        return np.array([said.score[at[asking.prompt, text]] if text else np.nan for asking, text in zip(askings, texts, strict=True)])

    own = [at[asking.prompt, asking.answer] for asking in askings]
    return QueryScores(
        [asking.set for asking in askings],
        [asking.case for asking in askings],
        *(column("answer"), column("wrong"), column("target")),
        generated=said.right[own].astype(float),
        first=said.first[own],
    )


def joined(parts: Sequence[QueryScores]) -> QueryScores:
    """The queries of several states, one after the other."""
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in ("answer", "wrong", "target", "generated", "first")
    }
    return QueryScores([name for part in parts for name in part.sets], [case for part in parts for case in part.cases], **columns)


def wrong_answers(tokenizer: Any, cases: Sequence[Case], first: Sequence[int]) -> list[Case]:
    """Cases whose `wrong` is filled in from the most probable next token, where it is a word that can be scored."""
    filled = []
    for case, token in zip(cases, first, strict=True):
        text = tokenizer.decode([int(token)]).strip()
        known = text and any(mark.isalnum() for mark in text) and answer_tokens(tokenizer, text, case.prompt)
        filled.append(case if case.wrong or not known else case.model_copy(update={"wrong": text}))
    return filled
