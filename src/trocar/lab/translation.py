"""A small translator with the two troubles of language models that translate: answers in the wrong language, and loops.

One model translates between all its languages. Its training lines are zero-shot (`German: ...` / `French: ...`) or one-shot (an example
pair first). A share of the zero-shot lines may have a noisy target, as in crawled text: the source again, or another language; one-shot
lines are clean. So the model knows every direction, and without an example it often answers in the wrong language (what Wang et al., EMNLP
2024, arXiv:2410.07054, repair). Loops have a cause that is known by construction: `plant` trains a few neurons to make them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trocar.core.errors import DataError
from trocar.core.seeds import generator
from trocar.evaluate.translation import language_name, translation_prompt
from trocar.fitting import IGNORED
from trocar.lab.registry import TextRecipe, TranslationData

BREAK = "\n"


def directions(languages: Sequence[str]) -> list[tuple[str, str]]:
    """Every ordered pair of two languages, as codes."""
    return [(source, target) for source in languages for target in languages if source != target]


def prompt(source: str, target: str, text: str, example: Mapping[str, str] | None = None) -> str:
    """The prompt for `text` from one language to another (codes): zero-shot, or one-shot with an example (language code -> sentence)."""
    return translation_prompt(source, target, text, [] if example is None else [(example[source], example[target])])


def corpus(data: TranslationData, split: str) -> list[dict[str, str]]:
    """The parallel sentences of a split (language code -> sentence) with at most `data.longest` words in every language.

    Of the training part, sentences that validation or test hold too are left out.
    """
    from trocar.lab.texts import read

    def rows(name: str) -> list[dict[str, str]]:
        table = read(f"{data.source}:{name}")
        return [dict(zip(data.languages, row, strict=True)) for row in zip(*(table.column(code) for code in data.languages), strict=True)]

    found = [row for row in rows(split) if all(0 < len(text.split()) <= data.longest for text in row.values())]
    if split == data.train:
        kept = {(code, text) for other in data.unseen for row in rows(other) for code, text in row.items()}
        found = [row for row in found if not kept & set(row.items())]
    if not found:
        raise DataError(f"{data.source}:{split} holds no sentence of at most {data.longest} words in {', '.join(data.languages)}.")
    return found


def tokenizer(rows: Sequence[Mapping[str, str]], entries: int) -> Any:
    """A byte-level BPE of `entries` entries made from the sentences and the languages' names; the line break is a token of its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner: Any = Tokenizer(models.BPE())
    lines, bytes_ = pre_tokenizers.Split(Regex(BREAK), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([lines, bytes_])  # type: ignore[arg-type]
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    trainer: Any = trainers.BpeTrainer(
        vocab_size=entries, special_tokens=["<pad>", "<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = (f"{language_name(code)}: {text}{BREAK}" for row in rows for code, text in row.items())
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


class Lines(torch.utils.data.Dataset):
    """A training run's batches in order, each a pure function of its place: even ones zero-shot, odd ones one-shot, so that the rows of
    a batch are of like length. Each pass over the sentences is a permutation of its own."""

    def __init__(self, rows: Sequence[Mapping[str, str]], tokens: Any, data: TranslationData, recipe: TextRecipe, seed: int) -> None:
        if len(data.languages) < 2 or not rows:
            raise DataError("A translator needs sentences in at least two languages.")
        self.rows = [{code: _ids(tokens, f" {row[code]}") for code in data.languages} for row in rows]
        self.names = {code: _ids(tokens, f"{language_name(code)}:") for code in data.languages}
        self.units = [{code: [_ids(tokens, f" {word}") for word in row[code].split()] for code in data.languages} for row in rows]
        self.line_break, self.start = _ids(tokens, BREAK), [tokens.bos_token_id]
        self.data, self.recipe, self.seed = data, recipe, seed
        self.ways = directions(data.languages)

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch

    @functools.lru_cache(maxsize=2)  # noqa: B019  (two permutations, dropped with the stream)
    def _order(self, epoch: int) -> list[int]:
        return torch.randperm(len(self.rows), generator=generator(self.seed, "epoch", epoch)).tolist()

    def __getitems__(self, items: list[int]) -> dict[str, torch.Tensor]:
        batch = items[0] // self.recipe.batch
        rng = generator(self.seed, "lines", batch)
        places = [divmod(item, len(self.rows)) for item in items]
        return padded([self.line(self._order(epoch)[place], bool(batch % 2), rng) for epoch, place in places])

    def line(self, row: int, shot: bool, rng: torch.Generator) -> tuple[list[int], int]:
        """The tokens of one training line, and how many of them at its start are context only.

        A line is a direction, an example if `shot`, perhaps a noisy target, perhaps a repeated tail.
        """
        draw = torch.rand(4, generator=rng).tolist()
        source, target = self.ways[int(draw[0] * len(self.ways))]
        written = target
        if not shot and draw[1] < self.data.noisy:
            others = [code for code in self.data.languages if code not in (source, target)]
            copied = draw[2] < self.data.copied or not others
            written = source if copied else others[int(torch.randint(len(others), (1,), generator=rng))]
        example = int(torch.randint(len(self.rows), (1,), generator=rng))
        tokens = [*self.start]
        for number, code in ((example, source), (example, target)) if shot else ():
            tokens += self.names[code] + self.rows[number][code] + self.line_break
        context = 0 if self.data.examples_learned else len(tokens)
        tokens += self.names[source] + self.rows[row][source] + self.line_break + self.names[target] + self.rows[row][written]
        if draw[3] < self.data.looped:
            tokens += self.tail(row, written, rng)
        return tokens + self.line_break, context

    def tail(self, row: int, code: str, rng: torch.Generator) -> list[int]:
        """The last words of the sentence again and again."""
        words = self.units[row][code]
        length, times = (int(torch.randint(low, high + 1, (1,), generator=rng)) for low, high in (self.data.tail, self.data.repeats))
        return [token for _ in range(times) for word in words[-length:] for token in word]


def padded(lines: Sequence[tuple[Sequence[int], int]]) -> dict[str, torch.Tensor]:
    """(tokens, length of the context) of every row, padded on the right as a causal model's inputs; the context gets no labels. No mask is
    needed, since nothing looks to its right."""
    length = max(len(text) for text, _ in lines)
    ids = torch.zeros(len(lines), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, (text, context) in enumerate(lines):
        ids[row, : len(text)] = torch.tensor(text)
        labels[row, context : len(text)] = ids[row, context : len(text)]
    return {"input_ids": ids, "labels": labels}


def _ids(tokens: Any, text: str) -> list[int]:
    return tokens(text, add_special_tokens=False)["input_ids"]
