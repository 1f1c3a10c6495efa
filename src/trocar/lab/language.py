"""Small language models: fresh decoders, and the stream of sentences that they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trocar.core.errors import DataError
from trocar.core.seeds import derive, generator
from trocar.fitting import IGNORED, Passes
from trocar.lab.registry import DecoderShape, TextRecipe


def new_decoder(shape: DecoderShape, vocabulary: int, seed: int, positions: int = 512) -> Any:
    """A fresh `LlamaForCausalLM` with weights from `seed`; the global random state is untouched."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.neurons,
        max_position_embeddings=positions,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        return transformers.LlamaForCausalLM(config)


class Sentences(torch.utils.data.Dataset):
    """A training run's batches in order: every row holds one to `recipe.packed` sentences drawn for its place, padded on the right.

    Each pass over the sentences is a permutation of its own, so all are seen equally often.
    """

    def __init__(self, rows: Sequence[Sequence[int]], start: Sequence[int], recipe: TextRecipe, seed: int) -> None:
        if not rows:
            raise DataError("There are no sentences to train on.")
        self.rows, self.start, self.recipe, self.seed = [list(row) for row in rows], list(start), recipe, seed
        self.order = Passes(len(self.rows), seed)

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch

    def __getitems__(self, items: list[int]) -> dict[str, torch.Tensor]:
        most, rng = self.recipe.packed, generator(self.seed, "packed", items[0])
        counts = torch.randint(1, most + 1, (len(items),), generator=rng).tolist()
        texts = [
            self.start + [token for k in range(count) for token in self.rows[self.order[item * most + k]]]
            for item, count in zip(items, counts, strict=True)
        ]
        length = max(len(text) for text in texts)
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


@torch.no_grad()
def completed(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch: int = 256) -> float:
    """Share of (prompt, answer) pairs whose answer's first token is the most probable one."""
    from trocar.trace.queries import answer_tokens, next_tokens

    wanted = torch.tensor([answer_tokens(tokenizer, answer, prompt)[0] for prompt, answer in pairs])
    return float((next_tokens(model, tokenizer, [prompt for prompt, _ in pairs], batch) == wanted).float().mean())
