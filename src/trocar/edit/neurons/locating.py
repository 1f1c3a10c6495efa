"""Locate MT heads, MT-KN and RP-KN in every direction (arXiv:2410.07054).

MT heads: causal effect of putting a head's mean activation into prompts whose examples are wrong. MT-KN: integrated gradients of the tokens
of good translations. RP-KN: how often a neuron is among the highest for tokens of a repeated unit, from its second occurrence on.
Parameters are never changed. Everything of a direction is a few committed units, so that a killed run goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trocar.anatomy import Anatomy, Head, fingerprint
from trocar.core.errors import DataError
from trocar.core.seeds import derive
from trocar.core.workspace import Workspace
from trocar.edit.neurons.config import LocateConfig
from trocar.edit.neurons.instances import Instance, loop_instances, task_instances
from trocar.edit.neurons.prompts import Corpus, Direction, Split, clean_prompts, corrupted_prompts, split, test_prompts
from trocar.edit.neurons.translations import Rules, Translations, from_data, translate
from trocar.locate import How, Scores
from trocar.locate.heads import head_effects, mean_heads
from trocar.locate.neurons import Attributions, NeuronLists, frequency, neuron_attributions, neuron_scores
from trocar.trace.queries import ask, prompt_tokens

PARTS = ("heads", "task", "loops")
# the settings that each stored unit depends on
HEADS = ("head_shots", "mean_prompts")
CASES = ("cases", "case_shots")
ATTRIBUTION = (*CASES, "steps", "grid", "stored")
UNITS = {
    "means": HEADS,
    "effects": (*HEADS, "corrupted_prompts", "corruption"),
    "cases": CASES,
    "task": (*ATTRIBUTION, "instances"),
    "loops": (*ATTRIBUTION, "loop_budget", "loop_context", "unit_tokens"),
}


@dataclass(frozen=True)
class Located:
    """What one direction gave.

    means: (layers, heads, head_size), mean head activations of its clean prompts, or None if heads were not asked for. heads: causal effect
    of every head; task: attribution of every neuron; loops: share of loop lists that hold a neuron; each None where not asked for or where
    the direction has no cases. told: numbers of cases and sentences about what was left out.
    """

    direction: Direction
    means: torch.Tensor | None
    heads: Scores | None
    task: Scores | None
    loops: Scores | None
    told: Mapping[str, Any]


def locate(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    config: LocateConfig,
    rules: Rules,
    parts: Sequence[str] = PARTS,
    seed: int = 0,
    work: Workspace | None = None,
) -> dict[Direction, Located]:
    """Locate `parts` (of `heads`, `task`, `loops`) in every direction of `config`.

    corpus: parallel sentences; 70 % of them give examples and cases, 9 % the queries of corrupted prompts, the rest is left for
    validation (`prompts.split`). work: a folder of committed units. Raises DataError for a language without a column.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    with _workspace(work) as room:
        state = fingerprint(anatomy.model)
        shares = split(len(corpus), seed)
        known = digest({code: list(column) for code, column in sorted(corpus.columns.items())})
        key = {"model": state, "seed": seed, "corpus": known, "rules": _json(rules)}
        found = {}
        for direction in dict.fromkeys(Direction.parse(text) for text in config.directions):
            corpus.pairs(direction)  # a missing language is found before any work
            found[direction] = _Direction(anatomy, tokenizer, corpus, direction, config, rules, shares, seed, room, key, state).run(parts)
    return found


@dataclass
class _Direction:
    anatomy: Anatomy
    tokenizer: Any
    corpus: Corpus
    direction: Direction
    config: LocateConfig
    rules: Rules
    shares: Split
    seed: int
    work: Workspace
    key: Mapping[str, Any]
    state: str

    def __post_init__(self) -> None:
        self.examples = self.corpus.pairs(self.direction, self.shares.examples)
        self.queries = self.corpus.pairs(self.direction, self.shares.queries)
        self.told: dict[str, Any] = {}

    def run(self, parts: Sequence[str]) -> Located:
        means, heads = self._heads() if "heads" in parts else (None, None)
        task = self._task() if "task" in parts else None
        loops = self._loops() if "loops" in parts else None
        return Located(self.direction, means, heads, task, loops, self.told)

    def _how(self, method: str, **settings: Any) -> How:
        return How(method, str(self.direction), settings, self.state)

    def _unit(self, name: str, compute: Any) -> dict[str, torch.Tensor]:
        return self.work.room(str(self.direction)).tensors(name, self._key(name), compute)

    def _key(self, unit: str) -> dict[str, Any]:
        return {**self.key, **{name: getattr(self.config, name) for name in UNITS[unit]}}

    def _heads(self) -> tuple[torch.Tensor, Scores]:
        config, direction = self.config, self.direction
        if config.head_shots >= len(self.examples):
            raise DataError(
                f"{direction}: {config.head_shots} examples a prompt, and only {len(self.examples)} sentences to take them from."
            )
        others = [
            [self.corpus.columns[code][row] for row in self.shares.examples if self.corpus.columns[code][row]]
            for code in self.corpus.columns
            if code not in (direction.source, direction.target)
        ]

        def means() -> dict[str, torch.Tensor]:
            prompts = clean_prompts(direction, self.examples, config.mean_prompts, config.head_shots, self.seed)
            found = mean_heads(self.anatomy, [prompt_tokens(self.tokenizer, text) for text in prompts], self.rules.batch_size)
            return {f"{layer}": part.float() for layer, part in enumerate(found)}

        layers = self._unit("means", means)
        zbar = [layers[f"{layer}"] for layer in range(len(layers))]

        def effects() -> dict[str, torch.Tensor]:
            prompts, answers = corrupted_prompts(
                direction, self.examples, self.queries, config.corrupted_prompts, config.head_shots, self.seed, config.corruption, others
            )
            asked = ask(self.anatomy, self.tokenizer, prompts, answers, "first")
            found = head_effects(self.anatomy, asked, None, zbar, how=self._how("causal effect of heads"))
            return {"effects": torch.tensor(found.values), "before": torch.tensor(found.before)}

        unit = self._unit("effects", effects)
        self.told |= {"corrupted prompts": len(unit["before"]), "probability of the right first token there": float(unit["before"].mean())}
        settings = {"shots": config.head_shots, "mean_prompts": config.mean_prompts, "prompts": len(unit["before"])}
        names = [str(head) for head in self.anatomy.components(Head)]
        effects_of = dict(zip(names, unit["effects"].mean(0).tolist(), strict=True))
        scores = Scores("head", self.anatomy.tower().name, effects_of, self._how("causal effect of heads", **settings))
        return torch.stack(zbar) if len({part.shape for part in zbar}) == 1 else zbar, scores  # type: ignore[return-value]

    def cases(self) -> tuple[list[tuple[int, ...]], Translations]:
        """Token ids of the case prompts, and their translations."""
        rng = np.random.default_rng(derive(self.seed, "cases", self.direction))
        rows = rng.permutation(len(self.examples))[: self.config.cases].tolist()
        pairs = [self.examples[row] for row in sorted(rows)]
        prompts = test_prompts(self.direction, pairs, self.examples, self.config.case_shots, self.seed)
        room = self.work.room(str(self.direction))
        stored = room.values(
            "cases", self._key("cases"), lambda: translate(self.anatomy.model, self.tokenizer, self.direction, prompts, self.rules).data()
        )
        made = from_data(stored, self.direction, self.rules)
        good = int((made.errors == 0).sum())
        self.told |= {"cases": len(made), "good": good, "loops": int(made.loop.sum()), "wrong language": int(made.mismatch.sum())}
        return [prompt_tokens(self.tokenizer, text) for text in prompts], made

    def _task_unit(self) -> dict[str, torch.Tensor] | None:
        """Summed attributions of the tokens of good translations, and their lists; None without a good translation."""
        config = self.config
        prompts, made = self.cases()
        good = [not bad and bool(one.text) for bad, one in zip(made.errors.tolist(), made.made, strict=True)]
        instances = task_instances(prompts, made.made, good, config.instances, derive(self.seed, self.direction))
        self.told["task instances"] = len(instances)
        if not instances:
            return None

        def compute() -> dict[str, torch.Tensor]:
            found = self._attributed(instances)
            return self._stored_lists(found) | {"sum": torch.tensor(found.scores.flat), "incomplete": torch.tensor(found.incompleteness)}

        unit = self._unit("task", compute)
        self.told["integration error, mean"] = float(unit["incomplete"].mean())
        return unit

    def _task(self) -> Scores | None:
        unit = self._task_unit()
        if unit is None:
            self.told["task"] = "no good translation: left out"
            return None
        how = self._how("integrated gradients", steps=self.config.steps, grid=self.config.grid, instances=self.told["task instances"])
        return neuron_scores(unit["sum"].numpy(), self._sizes(), self.anatomy.tower().name, how)

    def _attributed(self, instances: Sequence[Instance]) -> Attributions:
        rows, tokens = [one.ids for one in instances], [one.token for one in instances]
        settings = {"steps": self.config.steps, "grid": self.config.grid, "keep": self._stored()}
        return neuron_attributions(self.anatomy, rows, tokens, how=self._how("integrated gradients"), **settings)

    @staticmethod
    def _stored_lists(found: Attributions) -> dict[str, torch.Tensor]:
        assert found.lists is not None
        return {"places": torch.tensor(found.lists.places), "values": torch.tensor(found.lists.values)}

    def _loops(self) -> Scores | None:
        config = self.config
        prompts, made = self.cases()
        loops = loop_instances(prompts, made.made, (made.loop > 0).tolist(), config.loop_budget, config.loop_context, config.unit_tokens)
        self.told |= {
            "loop cases": loops.cases,
            "loops without literal repetition": loops.dropped,
            "occurrences at most": loops.occurrences,
        }
        if not loops.instances:
            self.told["loops"] = "no repetition to locate from: left out"
            return None

        unit = self._unit("loops", lambda: self._stored_lists(self._attributed(loops.instances)))
        later = np.array([one.occurrence > 0 for one in loops.instances])
        self.told["loop tokens"] = int(later.sum())
        lists = self._lists(unit)
        if config.contrast == "none":
            return frequency(lists[later])
        if config.contrast == "first":
            return frequency(lists[later], lists[~later], contrast="first")
        normal = self._task_unit()
        if normal is None:
            self.told["loops"] = "no normal generation to contrast with: left out"
            return None
        return frequency(lists[later], self._lists(normal), contrast="task")

    def _lists(self, unit: Mapping[str, torch.Tensor]) -> NeuronLists:
        how = self._how("loop frequency", steps=self.config.steps, grid=self.config.grid)
        return NeuronLists(unit["places"].numpy(), unit["values"].numpy(), self._sizes(), self.anatomy.tower().name, how)

    def _sizes(self) -> tuple[int, ...]:
        tower = self.anatomy.tower()
        return tuple(tower.neurons(layer) for layer in range(tower.n_layers))

    def _stored(self) -> int:
        total = sum(self._sizes())
        return min(total, self.config.stored or max(10, min(500, round(0.02 * total))))


def set_size(model: Any, kind: str, k: int | None) -> int:
    """How many members a direction's set has: `k`, or 5 % of the heads, or 0.1 % of the neurons and at least 100."""
    tower = (model if isinstance(model, Anatomy) else Anatomy.of(model)).tower()
    heads, neurons = (sum(of(layer) for layer in range(tower.n_layers)) for of in (tower.heads, tower.neurons))
    if k is not None:
        return k
    return max(1, round(0.05 * heads)) if kind == "heads" else min(neurons, max(100, round(0.001 * neurons)))


@contextlib.contextmanager
def _workspace(work: Workspace | None) -> Iterator[Workspace]:
    if work is not None:
        yield work
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Workspace(folder)


def digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, ensure_ascii=False).encode(), digest_size=16).hexdigest()


def _json(rules: Rules) -> dict[str, Any]:
    return {"max_new_tokens": rules.max_new_tokens, "languages": list(rules.languages), "mode": rules.mode, "strict": rules.strict}
