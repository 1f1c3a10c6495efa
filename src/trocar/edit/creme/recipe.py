"""CREME as a recipe's method: find the compositional gap, repair it, measure what else moved."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pydantic
import torch

from trocar.anatomy import Anatomy, fingerprint
from trocar.core.errors import DataError
from trocar.core.progress import track
from trocar.core.seeds import generator
from trocar.edit.creme.asking import joined, wrong_answers
from trocar.edit.creme.case import Case, answered, look_at
from trocar.edit.creme.config import CremeConfig
from trocar.edit.creme.edit import edited_layers, operation, solve
from trocar.edit.creme.layers import choose_layers
from trocar.edit.creme.measuring import Ask, case_unit, figures, located, perplexities, scores_from, transcripts
from trocar.edit.creme.moments import Moments, second_moment
from trocar.edit.creme.ordinary import ordinary_prompts
from trocar.evaluate import Measurement, query_measurements, relative_changes
from trocar.method import Estimate, Job, Method, Outcome
from trocar.patch import LowRank, Patch
from trocar.patch.record import Base
from trocar.trace.queries import encode, language_tower, next_tokens


class RecipeConfig(CremeConfig):
    """Settings of an edit, and which cases are edited how.

    edit: `each` case alone on the unedited model (the published protocol; the patch is that of `ship`), all in one `batch`, or one after
    the other, `sequential`. cases: at most so many of the gap. first_hop: `required`: a case counts as a gap only if the model also says
    the bridge, `reported`: the guide is enough. ship: id of the case whose patch is kept (`each`); None: the first that was repaired.
    locate: how many failed (and how many solved) cases are looked into for the figures and for `layers: auto`. others: how many of the
    other cases' questions are asked again after each edit. windows, window_tokens: of the perplexity. max_new_tokens: of shown texts.
    """

    edit: Literal["each", "batch", "sequential"] = "each"
    cases: int | None = pydantic.Field(default=None, ge=1)
    first_hop: Literal["required", "reported"] = "required"
    ship: str | None = None
    locate: int = pydantic.Field(default=12, ge=1)
    others: int = pydantic.Field(default=32, ge=0)
    windows: int = pydantic.Field(default=12, ge=1)
    window_tokens: int = pydantic.Field(default=512, ge=2)
    max_new_tokens: int = pydantic.Field(default=8, ge=1)

    def edit_config(self, layers: Sequence[int] | None = None) -> CremeConfig:
        chosen = {name: getattr(self, name) for name in CremeConfig.model_fields}
        chosen |= {"layers": tuple(layers)} if layers is not None else {}
        return CremeConfig(**{**chosen, "many": self.many if self.edit == "each" else self.edit})


def run(job: Job) -> Outcome:
    """Ask all cases, edit those that are a gap, ask again."""
    config: RecipeConfig = job.config
    anatomy = Anatomy.of(job.model)
    base = fingerprint(anatomy.model)
    cases = _cases(job)
    known = _knowledge(job, anatomy, cases)
    gap = _gap(config, cases, known)
    solved = [case for case, right, guide in zip(cases, known["prompt"], known["guide"], strict=True) if right and guide]
    gap = wrong_answers(job.processor, gap, next_tokens(anatomy, job.processor, [case.prompt for case in gap]).tolist())
    chosen = gap[: config.cases]
    moments_for = _Moments(job, anatomy, cases)
    where = located(job, anatomy, gap[: config.locate], solved[: config.locate], base)
    layers, gain = _layers(job, anatomy, gap[: config.locate], moments_for)
    fixed = config.edit_config(layers)
    edited_layers(anatomy, fixed)
    moments = moments_for(layers)
    others = _others(config, cases, known, job.seed)
    ask = Ask(job, anatomy, fixed, min(layers), others)
    work = _Edits(job, anatomy, fixed, moments, chosen, ask)
    rows = work.each() if config.edit == "each" else work.together()
    patch = work.patch(_shipped(config, chosen, rows))
    after, ppl = _measured_after(job, anatomy, patch, base)
    states = (base, after if config.edit != "each" else f"each of {len(chosen)} edits")
    before_scores, after_scores = (joined([scores_from(row, side) for row in rows]) for side in ("before", "after"))
    measurements = query_measurements(before_scores, after_scores, states)
    measurements += _extra(rows, states, config) + ppl
    changes = relative_changes(before_scores, after_scores)
    return Outcome(
        patch,
        measurements,
        where.scores,
        figures(where, changes, layers),
        (),
        _log(config, cases, known, gap, chosen, rows, layers, gain, work, patch, job),
        transcripts(chosen, rows),
        {"edited": encode(anatomy, job.processor, [case.prompt for case in work.in_patch])},
    )


def _cases(job: Job) -> list[Case]:
    examples = job.data["cases"]
    cases = Case.rows(examples.fields, examples.ids)
    if not cases:
        raise DataError("data.cases holds no rows.", "Give at least one case.")
    for case in cases:
        look_at(case, job.processor)  # DataError for answers that are no tokens, before anything is run
    return list(cases)


def _knowledge(job: Job, anatomy: Anatomy, cases: Sequence[Case]) -> dict[str, list[Any]]:
    """Whether the model answers each case's question, guide and first hop (None: it has none), by greedy decoding."""

    def compute() -> dict[str, list[Any]]:
        targets = [case.target for case in cases]
        asked = [case for case in cases if case.first_hop]
        first = dict(zip([case.id for case in asked], _right(anatomy, job, asked), strict=True))
        return {
            "prompt": answered(anatomy, job.processor, [case.prompt for case in cases], targets),
            "guide": answered(anatomy, job.processor, [case.guide for case in cases], targets),
            "first_hop": [first.get(case.id) for case in cases],
        }

    return job.work.values("knowledge", {"cases": [case.model_dump(mode="json") for case in cases]}, compute)


def _right(anatomy: Anatomy, job: Job, cases: Sequence[Case]) -> list[bool]:
    return answered(anatomy, job.processor, [str(case.first_hop) for case in cases], [case.bridge for case in cases])


def _gap(config: RecipeConfig, cases: Sequence[Case], known: Mapping[str, Sequence[Any]]) -> list[Case]:
    """The cases whose hops are known and whose composition fails. Raises DataError, with the counts, if there are none."""
    rows = list(zip(cases, known["prompt"], known["guide"], known["first_hop"], strict=True))
    strict = config.first_hop == "required"
    gap = [case for case, right, guide, first in rows if guide and not right and (first is not False or not strict)]
    if not gap:
        counts = {name: sum(bool(value) for value in values) for name, values in known.items()}
        hint = "Set first_hop: reported to repair questions whose guide alone is known." if strict else "There is nothing to repair."
        raise DataError(f"None of the {len(cases)} cases is a compositional gap (answered: {counts}).", hint)
    return gap


class _Moments:
    """The second moment that the settings ask for, measured once for the blocks that need it."""

    def __init__(self, job: Job, anatomy: Anatomy, cases: Sequence[Case]) -> None:
        self.job, self.anatomy, self.config = job, anatomy, job.config
        self.texts: list[str] = []
        if self.config.second_moment == "text":
            self.texts = _texts(job, "text", "text")
        elif self.config.second_moment == "prompts":
            asked = {case.prompt for case in cases} | {case.guide for case in cases}
            own = _texts(job, "ordinary", "prompt") if "ordinary" in job.data else ordinary_prompts(cases)
            self.texts = [text for text in own if text not in asked]

    def __call__(self, layers: Sequence[int]) -> Moments | None:
        if self.config.second_moment == "none":
            return None
        last = "last" if self.config.second_moment == "prompts" else "all"
        return second_moment(self.anatomy, self.job.processor, self.texts, layers, self.config.module, last, folder=self.job.work)


def _texts(job: Job, role: str, column: str) -> list[str]:
    if role not in job.data:
        raise DataError(f"second_moment: {job.config.second_moment} needs data.{role}.", f"Give rows with a column '{column}'.")
    return [str(text) for text in job.data[role].column(column, role)]


def _layers(job: Job, anatomy: Anatomy, cases: Sequence[Case], moments: _Moments) -> tuple[tuple[int, ...], float | None]:
    """The blocks to edit, and the mean effect of copying them where they were chosen here."""
    config: RecipeConfig = job.config
    if config.layers != "auto":
        return config.layers, None
    key = {"cases": [case.model_dump(mode="json") for case in cases], "config": config.model_dump(mode="json")}

    def compute() -> dict[str, Any]:
        all_blocks = moments(range(language_tower(anatomy).n_layers)) if config.budget is not None else None
        found = choose_layers(anatomy, job.processor, cases, config.edit_config(), all_blocks)
        return {"layers": list(found.layers), "gain": found.gain}

    found = job.work.values("layers", key, compute)
    return tuple(found["layers"]), found["gain"]


def _others(config: RecipeConfig, cases: Sequence[Case], known: Mapping[str, Sequence[Any]], seed: int) -> list[Case]:
    """Further two-hop questions whose answers are asked again after every edit: drawn once, of those whose guide is known."""
    pool = [case for case, guide in zip(cases, known["guide"], strict=True) if guide]
    order = torch.randperm(len(pool), generator=generator(seed, "others")).tolist()[: config.others]
    return [pool[row] for row in sorted(order)]


class _Edits:
    """The edits of the chosen cases, and what the model says before and after each."""

    def __init__(self, job: Job, anatomy: Anatomy, config: CremeConfig, moments: Moments | None, cases: Sequence[Case], ask: Ask) -> None:
        self.job, self.anatomy, self.config, self.moments, self.cases, self.ask = job, anatomy, config, moments, list(cases), ask
        self.in_patch: list[Case] = []
        self.diagnostics: list[dict[str, float]] = []
        self._base: Base | None = None

    def operations(self, cases: Sequence[Case]) -> list[LowRank]:
        layers = self.config.layers
        assert not isinstance(layers, str)
        self.diagnostics, factors = solve(self.anatomy, self.job.processor, cases, self.config, layers, self.moments)
        return [operation(self.anatomy, self.config.role, layer, pair) for layer, pair in factors.items()]

    def applied(self, ops: Sequence[LowRank]) -> Any:
        """A context in which the model is edited; the base's fingerprint is taken once for all edits of the same matrices."""
        if self._base is None or set(self._base.tensors) != {op.parameter for op in ops}:
            self._base = Base.of(self.anatomy, ops)
        return Patch(self._base, tuple(ops)).applied(self.anatomy, verify="structure")

    def each(self) -> list[dict[str, Any]]:
        rows = []
        for case in track(self.cases, "edits"):
            key = self.ask.key(case, {"edit": "each"})

            def compute(case: Case = case) -> dict[str, Any]:
                ops = self.operations([case])
                return case_unit(self.ask, case, lambda: self.applied(ops)) | {"layers": self.diagnostics}

            rows.append(self.job.work.values(f"edit-{case.id}".replace("/", "-").replace(" ", "_"), key, compute))
        return rows

    def together(self) -> list[dict[str, Any]]:
        ops: list[LowRank] = []
        rows = []
        for case in track(self.cases, "cases"):
            key = self.ask.key(case, {"edit": self.config.many, "all": [other.id for other in self.cases]})

            def compute(case: Case = case) -> dict[str, Any]:
                ops.extend([] if ops else self.operations(self.cases))
                return case_unit(self.ask, case, lambda: self.applied(ops)) | {"layers": []}

            rows.append(self.job.work.values(f"after-{case.id}".replace("/", "-").replace(" ", "_"), key, compute))
        return rows

    def patch(self, shipped: Case | None) -> Patch:
        self.in_patch = self.cases if shipped is None else [shipped]
        settings = {**self.config.model_dump(mode="json"), "cases": [case.id for case in self.in_patch]}
        return Patch.of(self.anatomy, self.operations(self.in_patch), "creme", settings)


def _shipped(config: RecipeConfig, cases: Sequence[Case], rows: Sequence[Mapping[str, Any]]) -> Case | None:
    if config.edit != "each":
        return None
    if config.ship is not None:
        found = next((case for case in cases if case.id == config.ship), None)
        if found is None:
            raise DataError(
                f"ship: the case '{config.ship}' was not edited.", f"Edited were {', '.join(case.id for case in cases[:6])} ..."
            )
        return found
    return next((case for case, row in zip(cases, rows, strict=True) if row["after"]["generated"][0]), cases[0])


def _measured_after(job: Job, anatomy: Anatomy, patch: Patch, base: str) -> tuple[str, list[Measurement]]:
    """The edited model's fingerprint, and perplexity before and after where there is text for it."""
    if not patch.ops:
        return base, []
    with patch.applied(anatomy, verify="structure"):
        after = fingerprint(anatomy.model)
    return after, perplexities(job, anatomy, patch, (base, after))


def _extra(rows: Sequence[Mapping[str, Any]], states: tuple[str, str], config: RecipeConfig) -> list[Measurement]:
    """Whether other two-hop questions are answered with another first token, and what guide and first hop still say."""
    made = []
    moved = np.array([value for row in rows for value in row["moved"]], dtype=float)
    if len(moved):
        groups = [number for number, row in enumerate(rows) for _ in row["moved"]]
        scorer = "the most probable first token of another two-hop question is another than before"
        zeros = np.zeros(len(moved))
        made.append(Measurement("moved.two-hop", "prompt", zeros, moved, scorer, *states, "lower", groups, form="share"))
    for name, what in (("guide", "the target after the guide"), ("first_hop", "the bridge after the first hop")):
        before, after = (np.array([row[side][name] for row in rows], dtype=float) for side in ("before", "after"))
        if not np.isnan(before).all():
            scorer = f"probability of {what} ({config.mode})"
            made.append(Measurement(name, "prompt", before, after, scorer, *states, "same", form="number"))
    return made


def _log(
    config: RecipeConfig,
    cases: Sequence[Case],
    known: Mapping[str, Sequence[Any]],
    gap: Sequence[Case],
    chosen: Sequence[Case],
    rows: Sequence[Mapping[str, Any]],
    layers: Sequence[int],
    gain: float | None,
    work: _Edits,
    patch: Patch,
    job: Job,
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "cases": len(cases),
        "answered": {name: sum(bool(value) for value in values) for name, values in known.items()},
        "gap": len(gap),
        "edited": len(chosen),
        "repaired": sum(bool(row["after"]["generated"][0]) for row in rows),
        "layers": list(layers),
        "shipped": [case.id for case in work.in_patch],
        "diagnostics": work.diagnostics,
        "scored by": config.mode,
        "undo": "patch.revert(), or leave the patch off: the base is unchanged",
    }
    if gain is not None:
        told["layers chosen"] = f"the window whose attention outputs, copied from the guide's run, raise the answer by {gain:.3f}"
    told["notes"] = [note for case in work.in_patch for note in look_at(case, job.processor)]
    if not patch.ops:
        told["notes"].append("the edit changes nothing: question and guide give the same outputs there")
    return told


def estimate(job: Job) -> Estimate:
    """Time the questions of a few cases, and multiply by what is asked of and around every edit."""
    config: RecipeConfig = job.config
    anatomy = Anatomy.of(job.model)
    cases = _cases(job)
    few = cases[: min(8, len(cases))]

    def ask() -> None:
        next_tokens(anatomy, job.processor, [case.prompt for case in few])

    ask()
    start = time.perf_counter()
    ask()
    row = (time.perf_counter() - start) / len(few)
    edits = min(config.cases or len(cases), len(cases))
    contexts, queries = 2 * len(config.lead_ins), 3 * (3 + len(few[0].paraphrases) + len(few[0].generalisation) + len(few[0].unrelated))
    depth = language_tower(anatomy).n_layers
    locating = min(config.locate, len(cases)) * 2 * 3 * depth / 2
    per_edit = contexts + 2 * queries + config.others + 5 * config.max_new_tokens
    ppl = 2 * config.windows * config.window_tokens / 16 if "perplexity" in job.data else 0
    ordinary = len(job.data["ordinary"]) if "ordinary" in job.data else 400 if config.second_moment == "prompts" else 0
    seconds = row * (3 * len(cases) + locating + edits * per_edit + ppl + ordinary)
    width = max(language_tower(anatomy).width, language_tower(anatomy).neurons(0))
    words = language_tower(anatomy).embedding.weight.shape[0]  # type: ignore[union-attr]
    peak = 4 * 32 * (contexts + config.others) * (8 * width) + 64 * 4 * int(words)
    said = f"{row:.3g} s a prompt on this machine; at most {edits} edits of {per_edit} prompts each"
    return Estimate(int(peak), float(seconds), said)


STARTER = """\
# Repair two-hop questions that a language model fails although it knows both hops, and measure what else changed.
version: 1
seed: 0
model: path/to/model            # a Hugging Face language model

data:
  cases:                        # one two-hop question a row: template, subject, bridge, target, first_hop, paraphrases, ...
    source: lab:two-hop         # well-known facts, in the package; or a .jsonl of yours
  perplexity:                   # held-out text, to see what the patch costs elsewhere
    source: wikitext2:test
    limit: 200

method:
  name: creme
  edit: each                    # every case by itself (published); or batch, sequential: all in one patch
  layers: auto                  # the window of blocks whose attention outputs bring the answer back; or [18, 19, 20, 21, 22, 23]
  second_moment: prompts        # protect ordinary prompts of the same form; none is the published setting
  contexts: lead-ins            # 22 lead-ins (published), or identity
  first_hop: required           # count a question as a gap only if the model also says the bridge; or reported

checks:
  - {measurement: correction, statistic: difference, op: ">", threshold: 0}
  - {measurement: generation, op: ">=", threshold: 0.5}
"""

METHOD = Method(
    name="creme",
    title="CREME",
    paper="arXiv 2402.14328",
    summary="repair two-hop questions that a language model fails although it knows both hops, without training",
    config=RecipeConfig,
    roles={
        "cases": "two-hop questions: template, subject, bridge, target; optional wrong, first_hop, paraphrases, generalisation, unrelated",
        "text?": "ordinary text (column `text`) whose second moment the edit is measured with; for second_moment: text",
        "ordinary?": "ordinary prompts (column `prompt`) for second_moment: prompts; without it, the cases' templates with other subjects",
        "perplexity?": "held-out text (column `text`) to measure perplexity on",
    },
    run=run,
    estimate=estimate,
    starter=STARTER,
    default_checks=({"measurement": "correction", "statistic": "difference", "op": ">", "threshold": 0.0},),
    reads="texts",
)
