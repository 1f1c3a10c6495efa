"""Settings of a CREME edit, and the lead-ins under which keys and values are averaged."""

from __future__ import annotations

from typing import Literal

import pydantic

from trocar.core.config import Config
from trocar.trace.queries import Mode

# 22 contexts, the published count (arXiv:2402.14328, reference code): the prompt alone, and after short texts. The wording is ours.
LEAD_INS = (
    "{}",
    "Question: {}",
    "Answer: {}",
    "Note: {}",
    "Text: {}",
    "Fact: {}",
    "Good morning. {}",
    "Here is a fact. {}",
    "It is well known. {}",
    "Let us begin. {}",
    "As everybody knows, {}",
    "Listen to this. {}",
    "The sun was shining. {}",
    "She opened the book. {}",
    "We talked for an hour. {}",
    "He looked at the map. {}",
    "Yesterday it rained. {}",
    "The train was late. {}",
    "They had tea at noon. {}",
    "I read this somewhere. {}",
    "After a while he said: {}",
    "Please complete the sentence. {}",
)


class CremeConfig(Config):
    """How an edit is made. The defaults are the published method's.

    layers: blocks to edit, or `auto`: the window of `window` contiguous blocks (a fifth of the model, at least 3) whose attention outputs,
    copied from the guide's run, help most. budget: `auto` considers only windows whose edit moves no matrix by more than this share of
    its norm. contexts: `lead-ins` (22, published), `identity` (the prompt alone), or strings with one hole each.
    second_moment: `none` (published: identity); `text`: the least change is measured on keys of ordinary text, or `prompts`: on the
    last-token keys of ordinary prompts. The moment has to be given; `moment_ridge` times its mean diagonal is added to it (None: 0.01 for
    text, 0.1 for prompts; both measured).
    target_from: the value is read on the partly edited model (`current`, published) or on the unedited one (`original`: exact, no drift).
    strength: the step towards the value, 1 = all the way.
    heads: only these heads' columns change (`L18.H3`); every layer that is named must be edited.
    preserve: prompts whose last token's output must stay; preserve_own: also the case's own `guide`, `first_hop`. preserve_weight: None
    keeps these outputs exactly (projection); a number adds their second moment to the metric with that weight instead.
    ridge: of the batch form over several cases, relative to the mean squared key. many: `batch` (one least change for all cases) or
    `sequential` (one after the other). module: `attention` (published) or `mlp` (a baseline).
    mode: how answers are scored. force: edit also what is already right; strict: refuse a case whose guide is answered wrongly.
    """

    layers: tuple[int, ...] | Literal["auto"] = "auto"
    window: int | None = pydantic.Field(default=None, ge=1)
    budget: float | None = pydantic.Field(default=None, gt=0)
    contexts: Literal["lead-ins", "identity"] | tuple[str, ...] = "lead-ins"
    second_moment: Literal["none", "text", "prompts"] = "none"
    moment_ridge: float | None = pydantic.Field(default=None, ge=0)
    target_from: Literal["current", "original"] = "current"
    strength: float = pydantic.Field(default=1.0, gt=0)
    heads: tuple[str, ...] | None = None
    preserve: tuple[str, ...] = ()
    preserve_own: tuple[Literal["guide", "first_hop"], ...] = ()
    preserve_weight: float | None = pydantic.Field(default=None, gt=0)
    ridge: float = pydantic.Field(default=0.0, ge=0)
    many: Literal["batch", "sequential"] = "batch"
    module: Literal["attention", "mlp"] = "attention"
    mode: Mode = "sequence"
    force: bool = False
    strict: bool = False

    @pydantic.field_validator("layers")
    @classmethod
    def _sorted_layers(cls, value: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if isinstance(value, str):
            return value
        if not value:
            raise ValueError("names no block; give at least one, or auto")
        return tuple(sorted(set(value)))

    @pydantic.field_validator("contexts")
    @classmethod
    def _holes(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if not isinstance(value, str):
            bad = [text for text in value if text.count("{}") != 1]
            if bad or not value:
                raise ValueError(f"every context needs one hole {{}}, {bad[0]!r} has not" if bad else "there is no context")
        return value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> CremeConfig:
        if self.heads is not None and self.module == "mlp":
            raise ValueError("heads are columns of the attention's output projection; leave them out for module: mlp")
        if self.heads is not None and not self.heads:
            raise ValueError("heads is empty; leave it out to edit all columns")
        return self

    @property
    def role(self) -> str:
        return "o" if self.module == "attention" else "down"

    @property
    def moment_share(self) -> float:
        """The ridge of the second moment, relative to its mean diagonal."""
        return self.moment_ridge if self.moment_ridge is not None else 0.1 if self.second_moment == "prompts" else 0.01

    @property
    def lead_ins(self) -> tuple[str, ...]:
        if isinstance(self.contexts, tuple):
            return self.contexts
        return LEAD_INS if self.contexts == "lead-ins" else LEAD_INS[:1]
