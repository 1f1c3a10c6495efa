"""From words to inputs and back: prompts as batches, answers as tokens, the probability of an answer, greedy continuations. Floor 2.

Prompts are padded on the left, with a mask and (where the model takes them) positions that count real tokens only, so that a row of a
batch is the same computation as the prompt alone. Tokens of a prompt and its answer are joined as ids, never as text, so that a token's
boundary cannot move between them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trocar.anatomy import Anatomy, Tower
from trocar.core.errors import DataError, UnsupportedModelError

Mode = Literal["sequence", "first", "bag"]
MODES = ("sequence", "first", "bag")


def prompt_tokens(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """The prompt's tokens with whatever the tokenizer puts before a text (BOS), without what it may put after it (EOS)."""
    ids = list(tokenizer(prompt)["input_ids"])
    bare = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    while len(ids) > len(bare) and ids and bare and ids[-1] != bare[-1]:
        ids.pop()
    if not ids:
        raise DataError(f"The prompt {prompt!r} gives no tokens.", "Give at least one word.")
    return tuple(ids)


def answer_tokens(tokenizer: Any, answer: str, prompt: str = "") -> tuple[int, ...]:
    """The tokens of `answer` as it would appear after `prompt`: after a blank, unless either side brings white space along.

    Where the tokenizer joins prompt and answer differently than apart, the answer is tokenised alone, with its leading blank.
    Raises DataError for an answer that gives no tokens or only unknown ones.
    """
    blank = "" if not answer or answer[0].isspace() or (prompt and prompt[-1].isspace()) else " "
    ids: list[int] = []
    if prompt:
        start = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(prompt + blank + answer, add_special_tokens=False)["input_ids"])
        ids = whole[len(start) :] if whole[: len(start)] == start else []
    if not ids:
        ids = list(tokenizer(blank + answer, add_special_tokens=False)["input_ids"])
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not answer.strip() or not ids or (unknown is not None and all(token == unknown for token in ids)):
        raise DataError(f"The answer {answer!r} is nothing that this tokenizer knows.", "Write it in the model's own vocabulary.")
    return tuple(ids)


def batch_of(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Rows of token ids as left-padded inputs on the model's device: `input_ids`, `attention_mask`, `position_ids` where it takes them."""
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    if not rows or not all(rows):
        raise DataError("There is an empty prompt, or there are no prompts at all.", "Give at least one token a row.")
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = torch.tensor(list(row))
        mask[number, length - len(row) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(type(anatomy.model).forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    device = next(anatomy.model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


def only_last(model: torch.nn.Module, count: int) -> dict[str, int]:
    """The argument that makes a model compute logits of its last `count` positions only, if it takes one."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}


def language_tower(model: Any) -> Tower:
    """The tower that reads text from left to right. Raises UnsupportedModelError if the model has none."""
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    found = [tower for tower in anatomy.towers.values() if tower.causal and tower.modality == "text"]
    if not found:
        raise UnsupportedModelError(f"{type(anatomy.model).__name__} does not read text from left to right.", "Use a language model.")
    return found[0]


def encode(model: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Prompts as left-padded inputs of `model`; see `batch_of`."""
    return batch_of(model, [prompt_tokens(tokenizer, prompt) for prompt in prompts])


@dataclass(frozen=True, eq=False)
class Asked:
    """Prompts with one answer each, ready to be run: `model(**asked.inputs)`, then `asked.metric(output, rows)`.

    inputs: left-padded; in mode `sequence` they hold the answer's tokens but the last after the prompt. tokens: each answer's, as ids.
    mode: `sequence` (probability of the whole answer, teacher-forced), `first` (of its first token), `bag` (mean probability of its
    tokens, all read after the prompt: CREME's published score, arXiv:2402.14328, reference code).
    """

    inputs: dict[str, torch.Tensor]
    tokens: tuple[tuple[int, ...], ...]
    mode: Mode

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def read(self) -> Literal["all", "last"]:
        """What `sweep` has to keep of the logits."""
        return "all" if self.mode == "sequence" and any(len(row) > 1 for row in self.tokens) else "last"

    def end(self, back: int = 0) -> tuple[tuple[int, ...], ...]:
        """The position of each prompt's last token (`back` tokens before it), counted from the end of its row: negative, one list a row."""
        return tuple((-back - (len(row) if self.mode == "sequence" else 1),) for row in self.tokens)

    def metric(self, output: Any, rows: torch.Tensor) -> torch.Tensor:
        """The probability of each row's answer, (len(rows),), float32 (float64 for a float64 model). rows: which prompts they are."""
        chosen = [self.tokens[row] for row in rows.tolist()]
        logits = output.logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.mode == "bag":
            wanted, there = _right(chosen, logits.device)
            found = logits[:, -1].softmax(-1).gather(1, wanted)
            return torch.where(there, found, 0).sum(1) / there.sum(1)
        if self.mode == "first":
            chosen = [row[:1] for row in chosen]
        wanted, there = _right(chosen, logits.device)
        found = logits[:, -wanted.shape[1] :].log_softmax(-1).gather(2, wanted[..., None])[..., 0]
        return torch.where(there, found, 0).sum(1).exp()

    def rank(self, output: Any, rows: torch.Tensor) -> torch.Tensor:
        """The rank (1 = most probable) of the answer's first token after the prompt, in mode `bag` the mean over its tokens."""
        ends, logits = self.end(), output.logits
        ranks = []
        for number, row in enumerate(rows.tolist()):
            here = logits[number, ends[row][0]]
            tokens = list(self.tokens[row] if self.mode == "bag" else self.tokens[row][:1])
            ranks.append((here[None] > here[tokens][:, None]).sum(1).double().add(1).mean())
        return torch.stack(ranks)


def _right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows as (n, longest), aligned on the right, and where there is something."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    there = torch.zeros(len(rows), longest, dtype=torch.bool, device=device)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = torch.tensor(list(row), device=device)
        there[number, longest - len(row) :] = True
    return ids, there


def ask(model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], mode: Mode = "sequence") -> Asked:
    """Pair prompts with answers. Raises DataError for unequal numbers, an unknown mode, or an answer without tokens."""
    if mode not in MODES:
        raise DataError(f"'{mode}' is not a way to score an answer.", f"Use one of {', '.join(MODES)}.")
    if len(prompts) != len(answers) or not prompts:
        raise DataError(f"{len(prompts)} prompts and {len(answers)} answers cannot be paired.", "Give one answer for every prompt.")
    tokens = tuple(answer_tokens(tokenizer, answer, prompt) for prompt, answer in zip(prompts, answers, strict=True))
    rows = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    if mode == "sequence":
        rows = [(*row, *answer[:-1]) for row, answer in zip(rows, tokens, strict=True)]
    return Asked(batch_of(model, rows), tokens, mode)


def answer_scores(
    model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], mode: Mode = "sequence", batch_size: int = 32
) -> torch.Tensor:
    """The probability of each answer after its prompt, (n,) float64 on the CPU; see `Asked` for the modes."""
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    parts = []
    with torch.no_grad():
        for start in range(0, max(1, len(prompts)), batch_size):
            asked = ask(anatomy, tokenizer, prompts[start : start + batch_size], answers[start : start + batch_size], mode)
            parts.append(asked.metric(anatomy.model(**asked.inputs, use_cache=False), torch.arange(len(asked))).double().cpu())
    return torch.cat(parts)


def next_tokens(model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int = 32) -> torch.Tensor:
    """The most probable next token of each prompt, (n,) int64 on the CPU."""
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    parts = []
    with torch.no_grad():
        for start in range(0, max(1, len(prompts)), batch_size):
            inputs = encode(anatomy, tokenizer, prompts[start : start + batch_size])
            parts.append(anatomy.model(**inputs, **only_last(anatomy.model, 1), use_cache=False).logits[:, -1].argmax(-1).cpu())
    return torch.cat(parts)


@dataclass(frozen=True)
class Continuation:
    """What a model went on with. tokens: the new ids, up to and without the stop; text: decoded; stopped: False if the budget ended it."""

    text: str
    tokens: tuple[int, ...]
    stopped: bool


def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 16, stop: str | None = "\n", batch_size: int = 16
) -> list[Continuation]:
    """Greedy continuations of the prompts, always greedy whatever the checkpoint's own generation settings say.

    stop: a row ends at the first token whose text contains this (and at the model's end-of-text token). Under an open `intervene` or an
    applied patch the changed model goes on.
    """
    import transformers

    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    bare: Any = anatomy.model
    own = getattr(bare, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = ends[0] if ends else 0
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=ends or None, pad_token_id=pad, use_cache=True
    )
    found: list[Continuation] = []
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))  # like lengths together: less padding
    for start in range(0, len(order), batch_size):
        inputs = encode(anatomy, tokenizer, [prompts[row] for row in order[start : start + batch_size]])
        length = inputs["input_ids"].shape[1]
        inputs.pop("position_ids", None)  # generate makes them from the mask
        halt = [] if stop is None else [_Stop(tokenizer, stop, length)]
        with torch.no_grad():
            made = bare.generate(**inputs, generation_config=config, stopping_criteria=transformers.StoppingCriteriaList(halt))
        for row in made[:, length:].tolist():
            cut = next(
                (n for n, token in enumerate(row) if token in ends or (stop is not None and stop in tokenizer.decode([token]))), None
            )
            text = tokenizer.decode(row if cut is None else row[: cut + 1], skip_special_tokens=True)
            text = text.partition(stop)[0] if stop is not None else text
            found.append(Continuation(text.strip(), tuple(row if cut is None else row[:cut]), cut is not None))
    return [found[place] for place in sorted(range(len(order)), key=order.__getitem__)]


class _Stop:
    """Ends a row when a new token's text contains `stop`."""

    def __init__(self, tokenizer: Any, stop: str, length: int) -> None:
        self.tokenizer, self.stop, self.length = tokenizer, stop, length
        self.known: dict[int, bool] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ends = []
        for token in input_ids[:, -1].tolist():
            if token not in self.known:
                self.known[token] = self.stop in self.tokenizer.decode([token])
            ends.append(self.known[token])
        return torch.tensor(ends, dtype=torch.bool, device=input_ids.device)


__all__ = [
    "Asked",
    "Continuation",
    "Mode",
    "answer_scores",
    "answer_tokens",
    "ask",
    "batch_of",
    "continuations",
    "encode",
    "language_tower",
    "next_tokens",
    "only_last",
    "prompt_tokens",
]
