"""A case: a two-hop question that a model fails although it knows both hops, and the queries that show what an edit does.

    template    "The country that {} belongs to is"
    subject     "the creator of C. Auguste Dupin"       the first hop as a noun phrase
    bridge      "Edgar Allan Poe"                       its answer, which the question leaves unsaid
    target      "the United States"                     the right answer

`prompt` is the two-hop question, `guide` the second hop asked of the bridge itself: what the model does there is copied (arXiv:2402.14328).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
import torch

from trocar.anatomy import Anatomy
from trocar.core.config import Config
from trocar.core.errors import DataError
from trocar.trace.queries import answer_tokens, ask, encode, prompt_tokens

HOLE = "{}"
KNOWN = 0.1  # a source run that gives the answer less than this, and prefers another, is called wrong


class Query(Config):
    """A prompt with its own answer. kind: a group that is reported apart (`hard`, `easy`, `single`)."""

    prompt: str = pydantic.Field(min_length=1)
    answer: str = pydantic.Field(min_length=1)
    kind: str = ""


class Case(Config):
    """One two-hop question. Paraphrases without an answer of their own have the target's.

    template: one hole. wrong: what the model says today (found by asking it where it is not given). first_hop: a prompt whose answer is the
    bridge. generalisation: other second hops on the same first hop. unrelated: what must not change. split: a label of the data's own.
    Raises ConfigError (through `parse`) for empty fields and a template without, or with several, holes.
    """

    id: str = pydantic.Field(min_length=1)
    template: str
    subject: str = pydantic.Field(min_length=1)
    bridge: str = pydantic.Field(min_length=1)
    target: str = pydantic.Field(min_length=1)
    wrong: str | None = None
    first_hop: str | None = None
    paraphrases: tuple[Query, ...] = ()
    generalisation: tuple[Query, ...] = ()
    unrelated: tuple[Query, ...] = ()
    split: str | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _answers(cls, data: Any) -> Any:
        """Empty optional columns are absent; a paraphrase's answer is the target unless it says otherwise."""
        if not isinstance(data, Mapping):
            return data
        given = {name: value for name, value in data.items() if not (value is None and name not in ("template", "subject", "bridge"))}
        rows = given.get("paraphrases", ())
        filled = []
        for row in rows if isinstance(rows, Sequence) and not isinstance(rows, str) else ():
            row = {"prompt": row} if isinstance(row, str) else row
            filled.append({**row, "answer": row.get("answer") or given.get("target")} if isinstance(row, Mapping) else row)
        return {**given, "paraphrases": filled} if filled else given

    @pydantic.field_validator("template")
    @classmethod
    def _one_hole(cls, value: str) -> str:
        if value.count(HOLE) != 1:
            raise ValueError(f"the template '{value}' has {value.count(HOLE)} holes; write {HOLE} once, where the subject goes")
        return value

    @pydantic.field_validator("subject", "bridge", "target", "id")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be blank")
        return value

    @property
    def prompt(self) -> str:
        """The two-hop question, which is to be repaired."""
        return self.template.replace(HOLE, self.subject)

    @property
    def guide(self) -> str:
        """The second hop asked of the bridge, whose behaviour is copied."""
        return self.template.replace(HOLE, self.bridge)

    @classmethod
    def rows(cls, columns: Mapping[str, Sequence[Any]], ids: Sequence[str] = ()) -> tuple[Case, ...]:
        """Cases from columns of equal length (as a loader of texts gives them); columns that a case does not have are passed over.

        Raises DataError naming the row.
        """
        known = {name: column for name, column in columns.items() if name in cls.model_fields}
        count = len(next(iter(known.values()))) if known else 0
        if "id" not in known:
            known["id"] = list(ids) if ids else [str(number) for number in range(count)]
        cases = tuple(cls.parse({name: column[row] for name, column in known.items()}, f"case {row}") for row in range(count))
        taken: set[str] = set()
        for case in cases:
            if case.id in taken:
                raise DataError(f"Two cases are called '{case.id}'.", "Give every case an id of its own.")
            taken.add(case.id)
        return cases


def look_at(case: Case, tokenizer: Any) -> list[str]:
    """What is odd about a case as this tokenizer sees it, one sentence each. Raises DataError for answers that give no tokens."""
    notes = []
    ends = [prompt_tokens(tokenizer, text)[-1] for text in (case.prompt, case.guide)]
    if ends[0] != ends[1]:
        tails = " and ".join(repr(tokenizer.decode(prompt_tokens(tokenizer, text)[-3:])) for text in (case.prompt, case.guide))
        notes.append(f"prompt and guide end in different tokens ({tails}): key and value come from different roles")
    if case.prompt[-1].isspace():
        notes.append("the prompt ends in white space, which changes its last token")
    target = answer_tokens(tokenizer, case.target, case.prompt)
    for name, other in (("wrong answer", case.wrong), ("bridge", case.bridge)):
        if other and other != case.target and answer_tokens(tokenizer, other, case.prompt)[0] == target[0]:
            notes.append(f"the target and the {name} '{other}' begin with the same token: score answers by `sequence`")
    for query in (*case.paraphrases, *case.generalisation, *case.unrelated):
        answer_tokens(tokenizer, query.answer, query.prompt)
    return notes


def answered(model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], batch_size: int = 32) -> list[bool]:
    """Whether greedy decoding gives each answer: every one of its tokens is the most probable one after those before it."""
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    found: list[bool] = []
    with torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            asked = ask(anatomy, tokenizer, prompts[start : start + batch_size], answers[start : start + batch_size])
            logits = anatomy.model(**asked.inputs, use_cache=False).logits
            for row, tokens in enumerate(asked.tokens):
                best = logits[row, -len(tokens) :].argmax(-1).tolist()
                found.append(best == list(tokens))
    return found


def best_tokens(model: Any, tokenizer: Any, prompt: str, count: int = 5) -> list[tuple[str, float]]:
    """The most probable next tokens after a prompt, as text, with their probabilities."""
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    with torch.no_grad():
        last = anatomy.model(**encode(anatomy, tokenizer, [prompt]), use_cache=False).logits[0, -1].float().softmax(-1)
    top = last.topk(min(count, len(last)))
    return [(tokenizer.decode([token]), value) for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
