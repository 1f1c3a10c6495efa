"""Tasks: what a model did with rows, against the same numbers made by other ways of the house."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trocar.anatomy import tiny_inputs, tiny_model
from trocar.core.errors import DataError, MetricError
from trocar.evaluate import Task, outputs, task_accuracy
from trocar.method import Examples
from trocar.trace import Scale, sweep
from trocar.trace.queries import answer_scores, continuations

WORDS = [*"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["[UNK]", "\n", *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def texts(**columns: list[str]) -> Examples:
    return Examples({}, tuple(map(str, range(len(next(iter(columns.values())))))), fields=columns)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_texts_score_as_their_answers_do_alone_and_are_right_where_greedy_decoding_is(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(family).eval()
    prompts = ["a b c", "d", "e f g h i"]
    said = [one.text.split() for one in continuations(model, tokenizer, prompts, 3, stop=None)]
    said = [[word for word in row if word in WORDS] or ["z"] for row in said]
    answers = [" ".join(said[0]), " ".join([*said[1][:1], "q", "q"]), "q " + " ".join(said[2])]
    found = Task.of(model, texts(prompt=prompts, answer=answers), tokenizer).measure(model, batch_size=2)
    np.testing.assert_allclose(np.exp(found.score), answer_scores(model, tokenizer, prompts, answers).numpy(), rtol=1e-4)
    greedy = [
        continuations(model, tokenizer, [prompt], len(answer.split()), stop=None)[0]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    expected = [list(one.tokens) == tokenizer(answer)["input_ids"] for one, answer in zip(greedy, answers, strict=True)]
    assert found.right.tolist() == expected
    first = [one.tokens[:1] == tuple(tokenizer(answer)["input_ids"][:1]) for one, answer in zip(greedy, answers, strict=True)]
    assert found.first.tolist() == first


def test_pictures_are_right_where_the_label_is_the_most_probable_class() -> None:
    model = tiny_model("vit", task="class").eval()
    inputs = tiny_inputs(model, rows=7)
    bare = Examples(inputs, tuple("abcdefg"))
    logits = outputs(model, bare)
    labels = logits.argmax(-1)
    labels[3] = (labels[3] + 1) % logits.shape[1]
    task = Task.of(model, Examples(inputs, bare.ids, labels))
    found = task.measure(model, batch_size=3)
    assert found.right.tolist() == [1, 1, 1, 0, 1, 1, 1]
    assert found.accuracy == pytest.approx(6 / 7)
    np.testing.assert_allclose(found.score, logits.log_softmax(-1)[range(7), labels].numpy(), rtol=1e-5)
    assert task.digest() == Task.of(model, Examples(inputs, bare.ids, labels.clone())).digest()
    assert task.digest() != Task.of(model, Examples(inputs, bare.ids, (labels + 1) % logits.shape[1])).digest()
    assert task.digest() != Task.of(model, Examples({"pixel_values": inputs["pixel_values"] + 1}, bare.ids, labels)).digest()
    swept = sweep(model, inputs, [[], Scale("L1.mlp", 0.0)], task.metric, numbers=3)
    np.testing.assert_allclose(swept[0, :, 1].numpy(), found.score, rtol=1e-5)
    change = task_accuracy("accuracy.test", task.unit, found, found, ("base", "base")).summary()
    assert (change.n, change.difference) == (7, 0.0)
    with pytest.raises(DataError, match="needs labels"):
        Task.of(model, bare)


def test_what_cannot_be_judged_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama").eval()
    with pytest.raises(DataError, match="tokenizer"):
        Task.of(model, texts(prompt=["a"], answer=["b"]))
    with pytest.raises(DataError, match="no column 'answer'"):
        Task.of(model, texts(prompt=["a"], reply=["b"]), tokenizer)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(MetricError, match="NaN on 1 of 1"):
        Task.of(model, texts(prompt=["a"], answer=["b"]), tokenizer).measure(model)
