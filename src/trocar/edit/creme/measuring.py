"""What a run of CREME measures and shows: a case's queries before and after its edit, where the bridge is read, which modules count."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trocar.anatomy import Anatomy
from trocar.edit.creme.asking import Pair, Questions, queries_of, scores_of
from trocar.edit.creme.case import Case
from trocar.edit.creme.config import CremeConfig
from trocar.evaluate import Measurement, QueryScores, RelativeChange, perplexity, perplexity_measurement, relative_rows
from trocar.locate import How, Scores
from trocar.locate.cases import name_in
from trocar.locate.lens import logit_lens
from trocar.locate.patching import module_effects
from trocar.method import Figure, Job, Transcript
from trocar.patch import Patch
from trocar.trace.queries import continuations, language_tower

SHOWN = 24  # cases whose texts are shown
COLUMNS = ("answer", "wrong", "target", "generated", "first")
MODULES = ("attention", "mlp", "block")


class Ask:
    """What is asked around one edit, and of which other questions it is asked whether they moved."""

    def __init__(self, job: Job, anatomy: Anatomy, config: CremeConfig, layer: int, others: Sequence[Case]) -> None:
        self.job, self.anatomy, self.config, self.layer, self.others = job, anatomy, config, layer, list(others)
        self._others: tuple[Questions, dict[Pair, int]] | None = None

    def key(self, case: Case, more: Mapping[str, Any]) -> dict[str, Any]:
        config = self.config.model_dump(mode="json")
        roles = {role: list(examples.ids) for role, examples in self.job.data.items() if role in ("text", "ordinary")}
        others = [other.id for other in self.others]
        return {"case": case.model_dump(mode="json"), "config": config, "others": others, "roles": roles, **more}

    def prepare(self) -> tuple[Questions, dict[Pair, int]]:
        """The other questions, and the first token that the unedited model gives to each; asked once, of the unedited model."""
        if self._others is None:
            pairs: list[Pair] = [(case.prompt, case.target) for case in self.others]
            asked = Questions(self.anatomy, self.job.processor, pairs, self.layer, "first")
            self._others = asked, dict(zip(pairs, asked.say(pairs).first.tolist(), strict=True))
        return self._others

    def moved(self, others: Sequence[Case]) -> list[float]:
        """1 for each other question to which the model as it is now gives another first token."""
        pairs = [(case.prompt, case.target) for case in others]
        if not pairs:
            return []
        asked, first = self.prepare()
        return [float(now != first[pair]) for pair, now in zip(pairs, asked.say(pairs).first.tolist(), strict=True)]


def case_unit(ask: Ask, case: Case, applied: Callable[[], Any]) -> dict[str, Any]:
    """Everything about one case before and after, as JSON. applied: gives the context in which the model is edited."""
    askings, tokenizer = queries_of(case), ask.job.processor
    ends = {"guide": (case.guide, case.target), **({"first_hop": (case.first_hop, case.bridge)} if case.first_hop else {})}
    pairs = [pair for asking in askings for pair in asking.pairs()] + list(ends.values())
    questions = Questions(ask.anatomy, tokenizer, pairs, ask.layer, ask.config.mode)
    shown = _shown(case)
    length = ask.job.config.max_new_tokens
    others = [other for other in ask.others if other.subject != case.subject]

    def side() -> dict[str, Any]:
        scores = scores_of(questions, askings)
        said = {name: float(questions.say([pair]).score[0]) for name, pair in ends.items()}
        texts = [item.text for item in continuations(ask.anatomy, tokenizer, [text for _, text, _ in shown], length)]
        columns = {name: np.asarray(getattr(scores, name), dtype=float).tolist() for name in COLUMNS}
        return {**columns, "guide": said["guide"], "first_hop": said.get("first_hop", math.nan), "texts": texts}

    before = side()
    if others:
        ask.prepare()
    with applied():
        after, moved = side(), ask.moved(others)
    return {
        "case": case.id,
        "sets": [asking.set for asking in askings],
        "before": before,
        "after": after,
        "moved": moved,
        "shown": [list(row) for row in shown],
    }


def scores_from(row: Mapping[str, Any], side: str) -> QueryScores:
    """A unit's side as scores again (what has no value is None in JSON)."""
    columns = {name: np.array([math.nan if value is None else value for value in row[side][name]], dtype=float) for name in COLUMNS}
    return QueryScores(row["sets"], [row["case"]] * len(row["sets"]), **columns)


def _shown(case: Case) -> list[tuple[str, str, str]]:
    """(what it is, prompt, right answer) of the texts that are shown of a case."""
    rows = [("question", case.prompt, case.target), ("guide", case.guide, case.target)]
    for name, queries in (("paraphrase", case.paraphrases), ("generalisation", case.generalisation), ("unrelated", case.unrelated)):
        rows += [(name, query.prompt, query.answer) for query in queries[:1]]
    return rows


def transcripts(cases: Sequence[Case], rows: Sequence[Mapping[str, Any]]) -> list[Transcript]:
    """The questions before and after, and what surrounds them."""
    titles = {
        "question": "Repaired questions",
        "paraphrase": "Paraphrases, not edited on",
        "generalisation": "Other second hops on the same first hop",
        "guide": "Guides, whose behaviour was copied",
        "unrelated": "Unrelated questions, which should not change",
    }
    found = []
    for kind, title in titles.items():
        picked = [(spot, row) for row in rows[:SHOWN] for spot, item in enumerate(row["shown"]) if item[0] == kind]
        if picked:
            prompts, truth = ([row["shown"][spot][which] for spot, row in picked] for which in (1, 2))
            sides = [[row[side]["texts"][spot] for spot, row in picked] for side in ("before", "after")]
            found.append(Transcript(kind, title, prompts, sides[0], sides[1], truth))
    return found


@dataclass(frozen=True)
class Located:
    """lens: curves by group (`failed`, `solved`); effects: rows of the heat map; scores: of modules at the last token."""

    lens: Mapping[str, Sequence[Mapping[str, Any]]]
    effects: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Scores] = field(default_factory=dict)


def located(job: Job, anatomy: Anatomy, failed: Sequence[Case], solved: Sequence[Case], base: str) -> Located:
    """Read the bridge and the answers after every block, and copy every module's output from guide to question, on some cases."""
    mode = job.config.mode
    key = {"failed": [case.model_dump(mode="json") for case in failed], "solved": [case.id for case in solved], "mode": mode}

    def compute() -> dict[str, Any]:
        lens = {name: _lens(job, anatomy, group, base) for name, group in (("failed", failed), ("solved", solved)) if group}
        return {"lens": lens, "effects": _effects(job, anatomy, failed, base)}

    found = job.work.values("located", key, compute)
    tower = language_tower(anatomy)
    how = How("causal patching from guide to question", f"{len(failed)} cases", {"position": "last", "window": 1, "mode": mode}, base)
    scores = {
        kind: Scores(
            kind,
            tower.name,
            {name_in(tower, row["layer"], kind): row["effect"] for row in found["effects"] if row["place"] == f"{kind}, last token"},
            how,
        )
        for kind in MODULES
    }
    return Located(found["lens"], found["effects"], scores)


def _lens(job: Job, anatomy: Anatomy, cases: Sequence[Case], base: str) -> list[dict[str, Any]]:
    answers = {"bridge": [case.bridge for case in cases], "answer": [case.target for case in cases]}
    if all(case.wrong for case in cases):
        answers["said instead"] = [str(case.wrong) for case in cases]
    return logit_lens(anatomy, job.processor, [case.prompt for case in cases], answers, fingerprint=base).rows(job.seed)


def _effects(job: Job, anatomy: Anatomy, cases: Sequence[Case], base: str) -> list[dict[str, Any]]:
    """Single-block effects of the three modules at the last token and at the end of the first hop's noun phrase."""
    asked = ([case.prompt for case in cases], [case.guide for case in cases], [case.target for case in cases])
    rows = []
    for place, name in (("last", "last token"), ("subject", "end of the first hop")):
        subjects = [case.subject for case in cases] if place == "subject" else None
        options = {"subjects": subjects, "mode": job.config.mode, "fingerprint": base}
        found = module_effects(anatomy, job.processor, *asked, MODULES, place, **options)
        for kind in MODULES:
            mean = found.effects[kind].mean(0).tolist()
            rows += [{"place": f"{kind}, {name}", "layer": layer, "effect": value} for layer, value in enumerate(mean)]
    return rows


def figures(where: Located, changes: Sequence[RelativeChange], layers: Sequence[int]) -> list[Figure]:
    span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
    made = [
        Figure(
            f"lens-{group}",
            f"What the residual stream would say at the last token: {group} questions",
            *("curve", "reading", "score"),
            rows,
            series="answer",
            caption="Probability of the first token by the logit lens; reading 0 is the embedding, reading l the output of block l - 1.",
        )
        for group, rows in where.lens.items()
    ]
    caption = f"How much a module's output, copied from the guide's run into the question's, raises the answer. Edited: blocks {span}."
    made.append(
        Figure("effects", "Which modules bring the answer back", "heatmap", "layer", "place", where.effects, "effect", caption=caption)
    )
    text = "Means of relative changes are ruled by the few cases that began near zero: read them beside median and absolute values."
    made.append(Figure("relative", "Relative changes", "table", "measured", "cases", relative_rows(changes), caption=text))
    return made


def perplexities(job: Job, anatomy: Anatomy, patch: Patch, states: tuple[str, str]) -> list[Measurement]:
    """Perplexity of the role `perplexity` before and after the patch, window by window."""
    if "perplexity" not in job.data:
        return []
    texts = job.data["perplexity"].column("text", "perplexity")
    config = job.config
    count = config.windows * config.window_tokens
    ids: list[int] = []
    for text in texts:
        ids += job.processor(f"{text}\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            break
    stream = torch.tensor(ids[:count])
    before = perplexity(anatomy.model, stream, config.window_tokens)
    with patch.applied(anatomy, verify="structure"):
        after = perplexity(anatomy.model, stream, config.window_tokens)
    return [perplexity_measurement(before, after, states)]
