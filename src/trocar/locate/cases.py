"""What the causal routines share: where a prompt is changed, what its source run says there, and means over cases. Floor 3."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trocar.anatomy import Anatomy, Tower, fingerprint
from trocar.core.errors import ComponentError, DataError, nearest
from trocar.core.seeds import derive
from trocar.locate.scores import How
from trocar.trace import Point, record
from trocar.trace.queries import Asked, Mode, ask, only_last, prompt_tokens

# kind of component -> the point where its output flows, and how its name goes on after `L5`
POINTS = {"block": "resid_post", "attention": "attn_out", "mlp": "mlp_out", "head": "heads", "neuron": "neurons"}
SUFFIX = {"block": "", "attention": ".attn", "mlp": ".mlp", "head": ".H", "neuron": ".N"}
LIKELY = 10  # a source run that ranks the answer below this place has nothing right to copy
RESAMPLES = 2000

Position = str | int  # "last", "subject", or a negative number counted from the prompt's end


def name_in(tower: Tower, layer: int, kind: str) -> str:
    """The name of a layer's component, for heads and neurons of their group: `L5.attn`, `text.L5.H`."""
    return f"{tower.name + '.' if tower.name else ''}L{layer}{SUFFIX[kind]}"


def check_kinds(kinds: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    if not kinds:
        raise ComponentError("There is no kind of component to look at.", f"Name some of {', '.join(known)}.")
    for kind in kinds:
        if kind not in known:
            raise ComponentError(f"'{kind}' is not a kind whose output can be copied here.", nearest(str(kind), known))
    return tuple(dict.fromkeys(kinds))


def after_phrase(tokenizer: Any, prompt: str, phrase: str) -> int:
    """How many tokens of the prompt follow the last token of `phrase` (its last occurrence). Raises DataError if it is not in there."""
    phrase = phrase.strip()
    start = prompt.rfind(phrase) if phrase else -1
    if start < 0:
        raise DataError(f"The prompt {prompt!r} does not contain {phrase!r}.", "Give the noun phrase as it stands in the prompt.")
    whole, upto = prompt_tokens(tokenizer, prompt), prompt_tokens(tokenizer, prompt[: start + len(phrase)])
    same = next((place for place, pair in enumerate(zip(whole, upto, strict=False)) if pair[0] != pair[1]), min(len(whole), len(upto)))
    last = same - 1 if same == len(upto) else same  # else the tokenizer joins the phrase's end with what follows
    return len(whole) - 1 - last


def backs(tokenizer: Any, prompts: Sequence[str], position: Position, subjects: Sequence[str] | None) -> list[int]:
    """How many tokens before its last one each prompt is looked at. Raises DataError for positions that a prompt does not have."""
    if position == "subject":
        if subjects is None or len(subjects) != len(prompts):
            raise DataError(f"Position 'subject' needs one noun phrase for each of {len(prompts)} prompts.", "Give them as subjects=[...].")
        return [after_phrase(tokenizer, prompt, phrase) for prompt, phrase in zip(prompts, subjects, strict=True)]
    if position == "last":
        return [0] * len(prompts)
    if isinstance(position, bool) or not isinstance(position, int) or position >= 0:
        raise DataError(f"position={position!r} has no meaning.", "Use 'last', 'subject', or a negative number from the prompt's end.")
    for prompt in prompts:
        if len(prompt_tokens(tokenizer, prompt)) < -position:
            raise DataError(f"The prompt {prompt!r} has no position {position}.", "It has fewer tokens.")
    return [-position - 1] * len(prompts)


def batches(count: int, size: int) -> list[slice]:
    """Slices of at most `size` of `count` rows."""
    if size < 1:
        raise DataError(f"batch_size={size} is not a number of rows.", "Use 1 or more.")
    return [slice(start, start + size) for start in range(0, count, size)]


def ends_at(asked: Asked, back: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The positions `back` tokens before each prompt's last one, as interventions and recordings of `asked.inputs` take them."""
    return tuple((end - before,) for (end,), before in zip(asked.end(), back, strict=True))


def run_inputs(anatomy: Anatomy, asked: Asked) -> dict[str, Any]:
    """The inputs of a run that needs the logits of the answers' positions only."""
    return {**asked.inputs, **only_last(anatomy.model, max(map(len, asked.tokens)) if asked.read == "all" else 1)}


def score_and_rank(asked: Asked) -> Any:
    """A sweep's metric of two numbers: the answer's score and its rank."""

    def metric(output: Any, rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([asked.metric(output, rows).double(), asked.rank(output, rows).to(output.logits.device)], dim=1)

    return metric


@dataclass(frozen=True, eq=False)
class Run:
    """What unchanged runs say. score, rank: of the answers, (n,); states: point -> activations at the looked-at position, (n, ...)."""

    score: torch.Tensor
    rank: torch.Tensor
    states: Mapping[str, torch.Tensor]


@torch.no_grad()
def observe(
    anatomy: Anatomy,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    points: Sequence[Point],
    back: Sequence[int],
    mode: Mode,
    batch_size: int,
) -> Run:
    """Run prompts (with their answers, which come later and change nothing before them) and keep what flows at one position of each."""
    parts: list[dict[str, torch.Tensor]] = []
    for rows in batches(len(prompts), batch_size):
        asked = ask(anatomy, tokenizer, prompts[rows], answers[rows], mode)
        with record(anatomy, points, positions=ends_at(asked, back[rows])) as seen:
            output = anatomy.model(**run_inputs(anatomy, asked), use_cache=False)
        found = score_and_rank(asked)(output, torch.arange(len(asked))).cpu()
        parts.append({"score": found[:, 0], "rank": found[:, 1], **{str(point): seen[point][:, 0] for point in points}})
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Run(joined.pop("score"), joined.pop("rank"), joined)


def check_pairs(tokenizer: Any, prompts: Sequence[str], sources: Sequence[str], back: Sequence[int]) -> None:
    """Prompts and sources must share what follows the looked-at position; a warning where they end in different tokens."""
    if len(prompts) != len(sources) or not prompts:
        raise DataError(f"{len(prompts)} prompts and {len(sources)} source prompts cannot be paired.", "Give one source for every prompt.")
    odd = []
    for prompt, source, before in zip(prompts, sources, back, strict=True):
        mine, theirs = prompt_tokens(tokenizer, prompt), prompt_tokens(tokenizer, source)
        if len(theirs) <= before or (before and mine[-before:] != theirs[-before:]):
            raise DataError(
                f"{prompt!r} and {source!r} differ in the {before} tokens after the position that is copied.",
                "Positions are aligned from the end: use the same words after the noun phrase.",
            )
        if mine[-1] != theirs[-1]:
            odd.append((prompt, source))
    if odd:
        prompt, source = odd[0]
        warnings.warn(
            f"{len(odd)} prompts end in another token than their source ({prompt[-20:]!r} and {source[-20:]!r}): what is copied had "
            "another role there.",
            stacklevel=4,
        )
    spaced = [text for text in (*prompts, *sources) if text[-1:].isspace()]
    if spaced:
        warnings.warn(f"{len(spaced)} prompts end in white space, for example {spaced[0]!r}: it changes the last token.", stacklevel=4)


def warn_of_sources(run: Run, sources: Sequence[str], answers: Sequence[str]) -> None:
    """A source run that does not know the answer has nothing right to copy."""
    wrong = (run.rank > LIKELY).nonzero()[:, 0].tolist()
    if wrong:
        first = wrong[0]
        warnings.warn(
            f"{len(wrong)} of {len(sources)} source runs are wrong, so a wrong answer is copied: after {sources[first]!r}, "
            f"{answers[first]!r} has rank {run.rank[first]:.0f}.",
            stacklevel=4,
        )


def told(method: str, model: Any, known: str | None, **settings: Any) -> How:
    """How Scores were obtained; the model's fingerprint is computed unless it is known."""
    return How(method, f"{settings.pop('cases')} prompts", settings, fingerprint(model) if known is None else known)


def interval(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over cases (the first axis) with its 95 % percentile-bootstrap interval, each shaped as one case."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(derive(seed, "cases"))
    counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples) / len(values)
    drawn = np.tensordot(counts, values, axes=1)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return values.mean(0), low, high
