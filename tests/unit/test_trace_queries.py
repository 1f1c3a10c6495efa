"""Prompts, answers and continuations: padding changes nothing, modes agree where they must, tokens are those of the text in place."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trocar.anatomy import tiny_model
from trocar.core.errors import DataError
from trocar.trace import Replace, sweep
from trocar.trace.queries import answer_scores, answer_tokens, ask, batch_of, continuations, encode, next_tokens, prompt_tokens

WORDS = ["the", "capital", "of", "Austria", "is", "Vienna", "German", "France", "Paris", "who", "was", "born", "in", "Rome", ".", *"abcdef"]
FAMILIES = ["llama", "gpt2", "qwen3", "gemma3", "gpt_neox", "opt"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "\n", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # type: ignore[assignment]
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


PROMPTS = ["the capital of Austria is", "who was born in Rome", "is"]
ANSWERS = ["Vienna", "a b c", "German ."]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_batch_is_the_prompt_alone(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(family).double()
    for mode in ("sequence", "first", "bag"):
        together = answer_scores(model, tokenizer, PROMPTS, ANSWERS, mode)
        alone = torch.cat([answer_scores(model, tokenizer, [p], [a], mode) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    alone = torch.cat([next_tokens(model, tokenizer, [p]) for p in PROMPTS])
    assert torch.equal(next_tokens(model, tokenizer, PROMPTS), alone)


def test_modes_agree_on_answers_of_one_token_and_sequence_is_the_product(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama").double()
    scores = {mode: answer_scores(model, tokenizer, PROMPTS, ["Vienna", "Rome", "a"], mode) for mode in ("sequence", "first", "bag")}
    assert torch.equal(scores["first"], scores["sequence"])
    torch.testing.assert_close(scores["bag"], scores["first"])
    ids = [*prompt_tokens(tokenizer, PROMPTS[1]), *answer_tokens(tokenizer, "a b c")]
    log = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    by_hand = sum(log[len(ids) - 4 + k, ids[len(ids) - 3 + k]] for k in range(3))
    torch.testing.assert_close(answer_scores(model, tokenizer, [PROMPTS[1]], ["a b c"])[0], torch.as_tensor(by_hand).exp())
    p = model(**encode(model, tokenizer, [PROMPTS[1]])).logits[0, -1].softmax(-1)
    torch.testing.assert_close(answer_scores(model, tokenizer, [PROMPTS[1]], ["a b c"], "bag")[0], p[ids[-3:]].mean())


@pytest.mark.parametrize("mode", ["sequence", "first", "bag"])
def test_metric_and_ends_fit_a_sweep(mode: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """`end()` is the prompt's last token whatever follows it: replacing the last block's output there by another prompt's moves the first
    token's probability to that prompt's."""
    model = tiny_model("llama").double()
    asked = ask(model, tokenizer, PROMPTS, ANSWERS, mode)  # type: ignore[arg-type]
    clean = answer_scores(model, tokenizer, PROMPTS, ANSWERS, mode)  # type: ignore[arg-type]
    value = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    last = model.config.num_hidden_layers - 1
    found = sweep(model, asked.inputs, [[], [Replace(f"L{last}.resid_post", value, positions=asked.end())]], asked.metric, read=asked.read)
    torch.testing.assert_close(found[0].double(), clean, rtol=1e-5, atol=1e-8)
    if mode == "first":  # a zero residual makes every token equally probable
        torch.testing.assert_close(found[1], torch.full((3,), 1 / model.config.vocab_size), rtol=1e-5, atol=1e-8)
    assert not torch.allclose(found[0], found[1])


def test_ranks_count_from_one(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama").double()
    logits = model(**encode(model, tokenizer, [PROMPTS[0]])).logits[0, -1]
    order = logits.argsort(descending=True).tolist()
    names = tokenizer.convert_ids_to_tokens([token for token in order if 2 <= token < 2 + len(WORDS)])
    asked = ask(model, tokenizer, [PROMPTS[0]] * 2, [names[0], names[-1]], "first")
    ranks = asked.rank(model(**asked.inputs), torch.arange(2)).tolist()
    assert ranks == [1 + order.index(tokenizer.convert_tokens_to_ids(name)) for name in (names[0], names[-1])]


def test_continuations_are_greedy_whatever_the_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama").double()
    model.generation_config.do_sample = True
    together = continuations(model, tokenizer, PROMPTS, 6, stop=None)
    assert together == [continuations(model, tokenizer, [prompt], 6, stop=None)[0] for prompt in PROMPTS]
    ids = list(prompt_tokens(tokenizer, PROMPTS[0]))
    for _ in range(6):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert together[0].tokens == tuple(ids[-6:])
    assert not together[0].stopped


def test_a_stop_ends_its_row_only(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama").double()
    free = continuations(model, tokenizer, PROMPTS, 6, stop=None)
    word = str(tokenizer.decode([free[0].tokens[2]]))
    assert word.strip()
    assert word not in str(tokenizer.decode(list(free[0].tokens[:2])))
    stopped = continuations(model, tokenizer, PROMPTS, 6, stop=word)
    assert stopped[0].stopped
    assert stopped[0].tokens == free[0].tokens[:2]
    assert word not in stopped[0].text


def test_bad_queries_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")
    with pytest.raises(DataError, match="cannot be paired"):
        ask(model, tokenizer, PROMPTS, ANSWERS[:1])
    with pytest.raises(DataError, match="is not a way to score"):
        ask(model, tokenizer, PROMPTS, ANSWERS, "mean")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="nothing that this tokenizer knows"):
        answer_tokens(tokenizer, "xyzzy")
    with pytest.raises(DataError, match="nothing that this tokenizer knows"):
        answer_tokens(tokenizer, "  ")
    with pytest.raises(DataError, match="empty prompt"):
        batch_of(model, [[1], []])
