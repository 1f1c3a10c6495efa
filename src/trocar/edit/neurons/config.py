"""Settings of locating and of the recipe."""

from __future__ import annotations

from typing import Literal

import pydantic

from trocar.core.config import Config

What = Literal["heads", "loops", "both", "task"]


class LocateConfig(Config):
    """How heads and neurons are located in every direction, and how the sets are refined. Defaults are those of the reference code where it
    has one (arXiv:2410.07054; LLaMA-2-7B).

    directions: `en-de`, ...; each is located on its own. head_shots: examples in prompts for heads. mean_prompts: clean prompts that head
    activations are averaged over (N_a). corrupted_prompts: prompts on which a head's effect is measured (N_c). corruption: targets
    `permuted` among the examples, from another `language` (the permuted ones still show the target's language), or no examples
    (`absent`: what do a head's means of few-shot prompts bring to the zero-shot prompt). cases: sentences
    translated with case_shots examples, whose good outputs give task neurons and whose loops give loop neurons. instances: tokens of good
    outputs that are attributed. loop_budget: tokens of loops that are attributed; loop_context: longest context; unit_tokens: tokens of a
    unit (all by default). steps, grid: of integrated gradients. stored: neurons listed a loop token (default: 2 %, at most 500).
    contrast: what loop frequencies are compared with: `none`, `task` (normal generation), `first` (the unit's first occurrence).
    k_heads, k_neurons: size of each direction's set (default: 5 % of the heads; 0.1 % of the neurons, at least 100). min_directions: how
    many directions must share a member (default: all). keep: at most so many of the refined set, best mean rank first.
    """

    directions: tuple[str, ...] = pydantic.Field(min_length=1)
    head_shots: int = pydantic.Field(default=10, ge=1)
    mean_prompts: int = pydantic.Field(default=1000, ge=1)
    corrupted_prompts: int = pydantic.Field(default=25, ge=1)
    corruption: Literal["permuted", "language", "absent"] = "permuted"
    cases: int = pydantic.Field(default=1000, ge=1)
    case_shots: int = pydantic.Field(default=1, ge=0)
    instances: int = pydantic.Field(default=2000, ge=1)
    loop_budget: int = pydantic.Field(default=2000, ge=1)
    loop_context: int = pydantic.Field(default=1024, ge=8)
    unit_tokens: int | None = pydantic.Field(default=None, ge=1)
    steps: int = pydantic.Field(default=20, ge=1)
    grid: Literal["auto", "midpoint", "endpoint", "log", "first-order"] = "auto"
    stored: int | None = pydantic.Field(default=None, ge=1)
    contrast: Literal["none", "task", "first"] = "none"
    k_heads: int | None = pydantic.Field(default=None, ge=1)
    k_neurons: int | None = pydantic.Field(default=None, ge=1)
    min_directions: int | None = pydantic.Field(default=None, ge=1)
    keep: int | None = pydantic.Field(default=None, ge=1)


class RecipeConfig(LocateConfig):
    """What is located, what is done to it, and how the result is measured.

    repair: the direction whose mean activations are added and whose test sentences are translated (default: the first). what: `heads`
    (against the wrong language), `loops` (neurons of loops), `both`, or `task` (task neurons, enhanced; mainly for comparison).
    refine: `intersection` over the directions, or for comparison the `union`, the `single` set of `repair`, or `random` members of the
    refined set's layers. form: `add` the heads' means (published), `replace` the heads by them, or add them as one `vector` after block
    vector_layer (MT-FV).
    strength: of the added means; scale: factor of loop neurons (0: off) and `enhance` of task neurons. Several values: the one with the
    fewest errors on validation sentences is taken among those that cost error-free sentences at most `tolerance` points of chrF.
    positions (of heads), neuron_positions, permanent: see `trocar.edit.neurons.plan`. shots: prompt kinds that are measured. test_limit,
    validation: sentences.
    max_new_tokens, languages, mode, strict, batch_size: see `translations.Rules`. others: measure the other directions too.
    """

    repair: str | None = None
    what: What = "both"
    refine: Literal["intersection", "union", "single", "random"] = "intersection"
    form: Literal["add", "replace", "vector"] = "add"
    vector_layer: int | None = pydantic.Field(default=None, ge=0)
    strength: tuple[float, ...] = pydantic.Field(default=(1.0,), min_length=1)
    scale: tuple[float, ...] = pydantic.Field(default=(0.0,), min_length=1)
    enhance: float = 2.0
    tolerance: float = pydantic.Field(default=1.0, ge=0)
    positions: Literal["last", "generated", "last+generated", "all"] = "last+generated"
    neuron_positions: Literal["last", "generated", "last+generated", "all"] = "last+generated"
    permanent: bool = False
    shots: tuple[int, ...] = pydantic.Field(default=(0, 1), min_length=1)
    test_limit: int | None = pydantic.Field(default=None, ge=1)
    validation: int = pydantic.Field(default=100, ge=1)
    max_new_tokens: int = pydantic.Field(default=400, ge=1)
    languages: tuple[str, ...] = ()
    mode: Literal["rule", "reference"] = "rule"
    strict: bool = False
    batch_size: int = pydantic.Field(default=16, ge=1)
    others: bool = False
    window: int = pydantic.Field(default=128, ge=2)

    def locating(self) -> LocateConfig:
        return LocateConfig(**{name: getattr(self, name) for name in LocateConfig.model_fields})
