"""KL to the base and perplexity, in bounded memory for vocabulary-sized logits. Floor 3."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from trocar.core.errors import MetricError
from trocar.core.progress import track
from trocar.evaluate.forward import evaluating
from trocar.evaluate.measurement import Measurement
from trocar.trace.queries import only_last

CHUNK = 1 << 24  # logits turned to float32 at a time: 64 MiB


def kl(base: torch.Tensor, other: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(base || other) of the last dimension's softmax at `temperature`, in nats: (..., classes) twice -> (...) float32.

    Computed in float32, a chunk of rows at a time. Equal logits give exactly 0; a base probability that underflows to 0 adds 0; a class
    that the base excludes (logit -inf) adds 0, one that only the other excludes makes the result infinite.
    Raises MetricError for shapes that differ.
    """
    if base.shape != other.shape or base.ndim < 1:
        raise MetricError(f"KL of logits of shape {tuple(base.shape)} and {tuple(other.shape)} is not defined.", "Compare equal shapes.")
    if not temperature > 0:
        raise MetricError(f"A temperature of {temperature} is not positive.", "Say 1.0.")
    classes = base.shape[-1]
    rows = max(1, CHUNK // classes)
    flat = zip(base.reshape(-1, classes).split(rows), other.reshape(-1, classes).split(rows), strict=True)
    result = torch.cat([_kl(p.float() / temperature, q.to(p.device).float() / temperature) for p, q in flat])
    return result.reshape(base.shape[:-1])


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    probability = p.exp()
    terms = torch.where(probability > 0, probability * (p - q), torch.zeros((), device=p.device))
    return terms.sum(-1).clamp_min(0)  # rounding can make the sum of a tiny divergence negative


def kl_to_base(
    base: torch.Tensor, after: torch.Tensor, states: tuple[str, str], name: str = "kl_to_base", unit: str = "image", groups: Any = None
) -> Measurement:
    """How far the outputs have moved: KL(base || after) per unit, (n, classes) logits; before, it is the base's to itself, exactly 0."""
    values = kl(base, after).reshape(base.shape[0], -1).mean(1)
    scorer = "KL(base || after) of the predicted distribution, nats"
    return Measurement(
        name, unit, np.zeros(len(values)), values.numpy(force=True), scorer, states[0], states[1], "lower", groups, form="number"
    )


@dataclass(frozen=True)
class Perplexity:
    """value: exp of the mean negative log-likelihood per scored token; nats: (windows,) means per token; tokens: (windows,) counts."""

    value: float
    nats: np.ndarray
    tokens: np.ndarray
    window: int
    stride: int


def perplexity(model: torch.nn.Module, tokens: Any, window: int, stride: int | None = None) -> Perplexity:
    """Perplexity of a causal language model on a stream of token ids, (n,), in windows of `window` tokens that start every `stride` ones.

    Each token is scored once, with all the context its first window gives it (stride < window: at least window - stride tokens). With the
    default, stride = window, windows do not overlap and the first token of each is context only: the usual setting of the
    quantisation literature. One window runs at a time; the model is asked for the logits of scored positions only, where it can be
    asked, and CHUNK of them are float32 at once.
    Raises MetricError for a stream shorter than two tokens, a stride outside 1..window, ids outside the vocabulary, or NaN.
    """
    stream = torch.as_tensor(tokens).flatten().long()
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise MetricError(f"Windows of {window} tokens every {stride} cannot score a stream.", "Say window >= 2 and 1 <= stride <= window.")
    if len(stream) < 2:
        raise MetricError(f"A stream of {len(stream)} tokens has nothing to predict.", "Give at least two tokens.")
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    if int(stream.min()) < 0 or int(stream.max()) >= table.weight.shape[0]:
        raise MetricError(
            f"Token ids reach {int(stream.max())}, the vocabulary has {table.weight.shape[0]} entries.", "Use the model's tokenizer."
        )
    nats, counts, scored = [], [], 0
    starts = [start for start in range(0, len(stream) - 1, stride) if start == 0 or start + window - stride < len(stream)]
    with evaluating(model):
        for start in track(starts, "perplexity", len(starts)):
            end = min(start + window, len(stream))
            first = max(scored, start + 1)  # the first position of this window that no window has scored
            loss = _loss(model, stream[start:end].to(table.weight.device), end - first)
            nats.append(loss / (end - first))
            counts.append(end - first)
            scored = end
    mean = float(np.average(nats, weights=counts))
    if math.isnan(mean):
        raise MetricError("The model gives NaN on the token stream.", "It has diverged, or its dtype overflows.")
    return Perplexity(math.exp(min(mean, 700)), np.array(nats), np.array(counts), window, stride)


def _loss(model: torch.nn.Module, ids: torch.Tensor, count: int) -> float:
    """Summed negative log-likelihood, in nats, of the last `count` of the ids given those before."""
    logits = model(input_ids=ids[None], use_cache=False, **only_last(model, count + 1)).logits[0, -count - 1 : -1]
    rows = max(1, CHUNK // logits.shape[-1])
    pairs = zip(logits.split(rows), ids[-count:].to(logits.device).split(rows), strict=True)
    return sum(functional.cross_entropy(part.float(), target, reduction="sum").item() for part, target in pairs)


def perplexity_measurement(before: Perplexity, after: Perplexity, states: tuple[str, str], name: str = "perplexity") -> Measurement:
    """Perplexity before and after on the same windows, paired window by window. Raises MetricError if the windows differ."""
    settings = [(side.window, side.stride, side.tokens.tolist()) for side in (before, after)]
    if settings[0] != settings[1]:
        raise MetricError(f"'{name}' before and after were measured on different windows.", "Use the same stream, window and stride.")
    scorer = f"perplexity, windows of {before.window} tokens every {before.stride}"
    nats, weights = (before.nats, after.nats), before.tokens
    return Measurement(name, "window", *nats, scorer, *states, "lower", average="exp_mean", weights=weights, form="number")
