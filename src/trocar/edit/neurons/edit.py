"""From what was located to a patch: refine the sets, build the operations, choose their strength on validation sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trocar.anatomy import Anatomy, Head, Neuron
from trocar.core.errors import DataError, ScoresError
from trocar.core.progress import track
from trocar.edit.neurons.config import LocateConfig, RecipeConfig
from trocar.edit.neurons.locating import Located, set_size
from trocar.edit.neurons.plan import factors, heads_add, heads_replace, neurons_scale, random_like, vector_add
from trocar.edit.neurons.prompts import Direction, Pair, test_prompts
from trocar.edit.neurons.translations import Rules, Translations, translate
from trocar.evaluate.translation import sentence_scores
from trocar.locate import Scores
from trocar.locate.refine import Refined, refine, top_masks
from trocar.patch import Op, Patch

KIND = {"heads": Head, "task": Neuron, "loops": Neuron}
NEEDED = {"heads": ("heads",), "loops": ("loops",), "both": ("heads", "loops"), "task": ("task",)}


def refined(model: Any, located: Mapping[Direction, Located], part: str, config: LocateConfig) -> Refined:
    """The refined set of a part (`heads`, `task`, `loops`) over the directions; `.mask` may be empty, `.explanation` then says why.

    Heads and loop neurons are taken only where their score is above 0. A direction without cases is left out and named. A single direction
    is allowed only if `config.directions` has just one: then there is nothing to refine by, and its own set comes back.
    Raises DataError if no direction, or only one of several, has cases.
    """
    scores = {str(direction): getattr(one, part) for direction, one in sorted(located.items())}
    k = set_size(model, "heads" if part == "heads" else "neurons", config.k_heads if part == "heads" else config.k_neurons)
    masks = top_masks(scores, k, positive=part != "task")
    try:
        needed = config.min_directions
        return refine(masks, min_settings=needed, keep=config.keep, scores=scores, alone=len(scores) == 1)
    except ScoresError as error:
        raise DataError(f"{part} cannot be refined: {error.what}", error.hint or "Give more sentences, or other directions.") from None


def chosen_set(model: Any, found: Refined, config: RecipeConfig, direction: Direction, part: str, seed: int) -> Scores:
    """The set that `config.refine` asks for: the refined one, or one to compare it with. Raises DataError if `direction` has none."""
    if config.refine == "intersection":
        return found.mask
    if config.refine == "union":
        return found.union
    if config.refine == "single":
        if str(direction) not in found.single:
            raise DataError(f"{direction} has no set of its own for {part}.", "It has no cases; repair another direction.")
        return found.single[str(direction)]
    drawn = random_like(model, found.mask, KIND[part], seed)
    shape = {group: np.zeros(array.size, dtype=bool) for group, array in found.mask.groups.items()}
    for one in drawn:
        group = next(name for name in shape if str(one).startswith(name) and str(one)[len(name) :].isdigit())
        shape[group][one.index] = True
    return Scores(found.mask.kind, found.mask.tower, shape, found.mask.how.then("random members of its layers", seed=seed))


def operations(
    model: Any,
    located: Mapping[Direction, Located],
    sets: Mapping[str, Scores | Iterable[Any]],
    direction: Direction,
    config: RecipeConfig,
    strength: float,
    scale: float,
) -> list[Op]:
    """The operations for one direction: heads by `strength`, loop neurons by the factor `scale`, task neurons by `config.enhance`."""
    ops: list[Op] = []
    if "heads" in sets:
        means = located[direction].means
        assert means is not None
        if config.form == "vector":
            ops += vector_add(model, sets["heads"], means, strength, config.vector_layer, config.positions)
        else:
            build = heads_add if config.form == "add" else heads_replace
            ops += build(model, sets["heads"], means, strength, config.positions)
    scaled = factors(model, sets.get("loops", ()), sets.get("task", ()), scale, config.enhance)
    return ops + neurons_scale(model, scaled, config.neuron_positions, config.permanent)


@dataclass(frozen=True)
class Trial:
    """One strength tried on validation sentences: shares of outputs with an error, and chrF where the unchanged model made none."""

    what: str
    value: float
    mismatch: float
    repetition: float
    errors: float
    chrf: float
    error_free: float  # chrF there; NaN without such cases
    allowed: bool

    def row(self) -> dict[str, Any]:
        return {"part": self.what, "value": self.value, "mismatch": self.mismatch, "repetition": self.repetition, "chrf": self.chrf,
                "chrf, error-free": self.error_free, "allowed": self.allowed}  # fmt: skip


@dataclass(frozen=True)
class Sentences:
    """Sentences of one direction with their prompts, one list for each number of shots."""

    direction: Direction
    pairs: tuple[Pair, ...]
    prompts: Mapping[int, tuple[str, ...]]

    @classmethod
    def of(cls, direction: Direction, pairs: Sequence[Pair], examples: Sequence[Pair], shots: Sequence[int], seed: int) -> Sentences:
        if not pairs:
            raise DataError(f"There are no sentences to translate from {direction}.", "Give at least one with both sides.")
        return cls(direction, tuple(pairs), {n: tuple(test_prompts(direction, pairs, examples, n, seed)) for n in dict.fromkeys(shots)})

    @property
    def references(self) -> list[str]:
        return [pair[1] for pair in self.pairs]

    def translate(self, model: Any, tokenizer: Any, rules: Rules, ops: Sequence[Op] = ()) -> dict[int, Translations]:
        """Translations for each number of shots, under a patch of `ops` if there are any."""
        with Patch.of(model, ops).applied(model, verify="structure"):
            return {n: translate(model, tokenizer, self.direction, prompts, rules) for n, prompts in self.prompts.items()}


def tried(what: str, value: float, sentences: Sentences, before: Mapping[int, Translations], after: Mapping[int, Translations]) -> Trial:
    """A trial's numbers, over all prompt kinds together; `allowed` is decided by the caller."""
    mismatch, loop, wrong, clean, scores = [], [], [], [], []
    for shots, made in after.items():
        mismatch.append(made.mismatch)
        loop.append(made.loop)
        wrong.append(made.errors)
        clean.append(before[shots].errors == 0)
        scores.append(sentence_scores(made.texts, sentences.references, "chrf", sentences.direction.target))
    chrf, free = np.concatenate(scores), np.concatenate(clean)
    kept = float(chrf[free].mean()) if free.any() else float("nan")
    wrong_language, loops, errors = (float(np.concatenate(column).mean()) for column in (mismatch, loop, wrong))
    return Trial(what, value, wrong_language, loops, errors, float(chrf.mean()), kept, True)


def choose(
    sentences: Sentences,
    base: Mapping[int, Translations],
    run: Callable[[float, float], Mapping[int, Translations]],
    strengths: Sequence[float],
    scales: Sequence[float],
    parts: Sequence[str],
    tolerance: float,
) -> tuple[float, float, list[Trial]]:
    """(strength, scale, trials): each part's values are tried alone; of those that cost error-free sentences at most `tolerance` points of
    chrF the one with the fewest errors wins, ties go to the weaker; if none of them leaves fewer errors than there were, nothing is done
    (strength 0, scale 1). A single value is taken as it is. run: translations of the validation sentences for a strength and a scale.
    """
    nothing = tried("none", 0.0, sentences, base, base)
    trials, picked = [nothing], {"heads": 0.0, "loops": 1.0}
    values = {"heads": tuple(strengths) if "heads" in parts else (), "loops": tuple(scales) if "loops" in parts else ()}
    picked |= {part: given[0] for part, given in values.items() if len(given) == 1}
    asked = [("heads", value, value, 1.0) for value in values["heads"]] + [("loops", value, 0.0, value) for value in values["loops"]]
    for part, value, strength, scale in track([one for one in asked if len(values[one[0]]) > 1], "strengths"):
        trial = tried(part, value, sentences, base, run(strength, scale))
        fine = np.isnan(trial.error_free) or trial.error_free >= nothing.error_free - tolerance
        trials.append(replace(trial, allowed=bool(fine)))
    for part in picked:
        able = [one for one in trials if one.what == part and one.allowed and one.errors < nothing.errors]
        if able:
            far = (lambda one: abs(one.value)) if part == "heads" else (lambda one: abs(1 - one.value))
            picked[part] = min(able, key=lambda one: (one.errors, far(one))).value
    return picked["heads"], picked["loops"], trials


def overlaps(found: Refined) -> list[dict[str, Any]]:
    """Pairwise overlaps as rows of a heat map: members that two directions share."""
    names = list(found.single)
    return [{"direction": a, "other": b, "shared": int(found.counts[i, j])} for i, a in enumerate(names) for j, b in enumerate(names)]


def by_layer(found: Refined, model: Any) -> list[dict[str, Any]]:
    """Members a layer of every direction's set and of the refined one, as rows of bars."""
    n_layers = (model if isinstance(model, Anatomy) else Anatomy.of(model)).tower().n_layers
    rows = []
    for name, mask in {**found.single, "refined": found.mask}.items():
        counts = np.zeros(n_layers, dtype=int)
        for component in mask.open_names():
            counts[int(component.rpartition("L")[2].partition(".")[0])] += 1
        rows += [{"layer": layer, "members": int(count), "set": name} for layer, count in enumerate(counts)]
    return rows


__all__ = ["Sentences", "Trial", "by_layer", "choose", "chosen_set", "operations", "overlaps", "refined", "tried"]
