"""CREME on small models that know an invented world: what an edit repairs, what it costs, and what other editors do on the same cases.

Three base models (seeds of world and weights), each with its own natural failures: held-out two-hop questions whose hops it knows. Every
edit is made on the unedited model and asked the same queries: the question, its paraphrases, other second hops of the same first hop, and
unrelated questions (hard: the same second hop of another bridge; easy: another first hop; single: one hop). The window `located` is chosen
by causal patching on other cases than the edited ones; all other windows are given beforehand. Scores are probabilities of the answer's
one token. Intervals are 95 %, from Student's t over the base models.

python benchmarks/creme.py [--quick] [--out FILE] [--work FOLDER]
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, arguments, mean_interval, write_result

from trocar import lab
from trocar.anatomy import Anatomy, fingerprint
from trocar.core.seeds import generator
from trocar.core.workspace import Workspace
from trocar.edit.creme import Case, CremeConfig, answered, second_moment
from trocar.edit.creme.asking import Questions, queries_of, scores_of, wrong_answers
from trocar.edit.creme.baselines import RomeConfig, memory_injection, random_direction, rome
from trocar.edit.creme.edit import operation, solve
from trocar.edit.creme.layers import choose_layers
from trocar.evaluate import relative_change
from trocar.lab.worlds import make_world
from trocar.patch import Patch
from trocar.patch.record import Base
from trocar.trace.queries import next_tokens

SEEDS, CASES, LOCATING, TEXTS, ORDINARY = (0, 1, 2), 30, 20, 500, 800
KINDS = ("hard", "easy", "single")
WINDOWS = {f"{low}-{high}": tuple(range(low, high + 1)) for low, high in ((1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7))}
EARLY, MIDDLE, LATE = "1-2", ("3-4", "4-5"), "6-7"


class Study:
    """One base model, its cases, and everything that is measured on them."""

    def __init__(self, seed: int, cases: int, work: Workspace) -> None:
        self.seed, self.work, world = seed, work.room(f"seed{seed}"), make_world(seed)
        self.model, self.tokenizer = lab.load("world", seed)
        self.anatomy, self.base = Anatomy.of(self.model), fingerprint(self.model)
        held_out = [Case.parse(row) for row in world.cases(shown=False)]
        ask = [answered(self.anatomy, self.tokenizer, *columns(held_out, *names), batch_size=256) for names in HOPS]
        gap = [case for case, right, guide, first in zip(held_out, *ask, strict=True) if guide and first and not right]
        self.counts = {"held out": len(held_out), "both hops": sum(g and f for _, g, f in zip(*ask, strict=True)), "gap": len(gap)}
        order = torch.randperm(len(gap), generator=generator(seed, "cases")).tolist()
        picked = [gap[row] for row in order[: cases + LOCATING]]
        picked = wrong_answers(self.tokenizer, picked, next_tokens(self.anatomy, self.tokenizer, [case.prompt for case in picked]).tolist())
        self.cases, self.locating = picked[:cases], picked[cases:]
        self.askings = {case.id: queries_of(case) for case in self.cases}
        self.pairs = {case.id: [p for asking in self.askings[case.id] for p in asking.pairs()] + ends(case) for case in self.cases}
        pairs = [pair for each in self.pairs.values() for pair in each]
        self.questions = {name: Questions(self.anatomy, self.tokenizer, each, 0, "first", 256) for name, each in self.pairs.items()}
        self.bases: dict[tuple[str, ...], Base] = {}
        asked = {pair[0] for pair in pairs}
        sentences = world.sentences()
        drawn = torch.randperm(len(sentences), generator=generator(seed, "text")).tolist()
        self.texts = [sentences[row].removesuffix(" .") for row in sorted(drawn[:TEXTS])]
        lead_ins = [f"{sentences[row]} {{}}" for row in drawn[TEXTS : TEXTS + 7]]
        self.contexts = ("{}", *lead_ins)
        prompts = [prompt for prompt, _ in [*world.single_hops(), *world.compositions(shown=True)] if prompt not in asked]
        chosen = torch.randperm(len(prompts), generator=generator(seed, "ordinary")).tolist()[:ORDINARY]
        self.ordinary = [prompts[row] for row in sorted(chosen)]
        layers = range(self.anatomy.tower().n_layers)
        made = {"text": (self.texts, "all"), "prompts": (self.ordinary, "last")}
        self.moments = {
            (kind, module): second_moment(self.anatomy, self.tokenizer, texts, layers, module, where, batch_size=64, folder=self.work)  # type: ignore[arg-type]
            for kind, (texts, where) in made.items()
            for module in ("attention", "mlp")
        }

    def config(self, layers: Sequence[int], **changes: Any) -> CremeConfig:
        return CremeConfig(**{"layers": tuple(layers), "contexts": "identity", "mode": "first", **changes})

    def located(self) -> tuple[int, ...]:
        auto = self.config((1,)).model_copy(update={"layers": "auto", "window": 3})
        compute = lambda: list(choose_layers(self.anatomy, self.tokenizer, self.locating, auto, batch_size=64).layers)  # noqa: E731
        return tuple(self.work.values("located", {"cases": [case.id for case in self.locating], "base": self.base}, compute))

    def patch(self, cases: Sequence[Case], config: CremeConfig) -> Patch:
        moments = self.moments.get((config.second_moment, config.module))
        _, factors = solve(self.anatomy, self.tokenizer, cases, config, config.layers, moments)  # type: ignore[arg-type]
        ops = [operation(self.anatomy, config.role, layer, pair) for layer, pair in factors.items()]
        written = tuple(op.parameter for op in ops)
        self.bases.setdefault(written, Base.of(self.anatomy, ops) if written not in self.bases else self.bases[written])
        return Patch(self.bases[written], tuple(ops))

    def say(self, case: Case) -> dict[str, Any]:
        """All queries of a case, asked of the model as it is now."""
        questions = self.questions[case.id]
        scores, said = scores_of(questions, self.askings[case.id]), questions.say(ends(case)).score.tolist()
        end = dict(zip(("guide", "first hop"), said, strict=True))
        columns = {name: np.asarray(getattr(scores, name), float).tolist() for name in ("answer", "wrong", "target", "generated", "first")}
        return {"sets": list(scores.sets), **columns, **end}

    def measure(self, name: str, key: Any, make: Callable[[Case], Patch | None]) -> list[dict[str, Any]]:
        """Every case's answers under its own edit (`make` gives None for the unedited model), and how far ordinary keys' outputs moved."""

        def compute() -> list[dict[str, Any]]:
            rows = []
            for case in self.cases:
                patch = make(case)
                with patch.applied(self.anatomy, verify="structure") if patch is not None else contextlib.nullcontext():
                    rows.append(self.say(case) | {"disturbance": self.disturbance(patch)})
            return rows

        whole = {"base": self.base, "cases": [case.id for case in self.cases], "setting": key}
        return self.work.values(name.replace(" ", "_").replace("/", "-"), whole, compute)

    def disturbance(self, patch: Patch | None) -> float:
        """Root mean square of the change of edited projections' outputs on keys of the 500 sentences, over all of the patch's matrices."""
        total = 0.0
        for op in patch.ops if patch is not None else ():
            if not hasattr(op, "a"):
                return float("nan")
            module = "mlp" if "down" in op.parameter else "attention"  # type: ignore[union-attr]
            moments = self.moments["text", module]
            layer = next(n for n in moments.sums if f".{n}." in op.parameter)  # type: ignore[union-attr]
            moved = op.a.double() @ (moments.sums[layer] / moments.tokens) @ op.a.double().T  # type: ignore[union-attr]
            total += float((op.b.double().T @ op.b.double() * moved).sum())  # type: ignore[union-attr]
        return total**0.5


HOPS = (("prompt", "target"), ("guide", "target"), ("first_hop", "bridge"))


def columns(cases: Sequence[Case], prompt: str, answer: str) -> tuple[list[str], list[str]]:
    return [getattr(case, prompt) for case in cases], [getattr(case, answer) for case in cases]


def ends(case: Case) -> list[tuple[str, str]]:
    return [(case.guide, case.target), (str(case.first_hop), case.bridge)]


def settings_of(study: Study, quick: bool) -> dict[str, tuple[Any, Callable[[Case], Patch | None]]]:
    """Name -> (what its result depends on, how a case is edited)."""
    middle = study.located()
    found: dict[str, tuple[Any, Callable[[Case], Patch | None]]] = {"unedited": ("", lambda case: None)}

    def add(name: str, config: CremeConfig) -> None:
        found[name] = (config.model_dump(mode="json"), lambda case: study.patch([case], config))

    config = study.config
    add("located", config(middle))
    add("located, text", config(middle, second_moment="text"))
    add("located, prompts", config(middle, second_moment="prompts"))
    add("located, MLP", config(middle, module="mlp"))
    base = config(middle)
    random_key = {**base.model_dump(mode="json"), "random": study.seed}
    found["located, random direction"] = (
        random_key,
        lambda case: random_direction(study.anatomy, study.patch([case], base), study.seed),
    )
    for name, layers in WINDOWS.items():
        add(f"blocks {name}", config(layers))
    published = RomeConfig(layer=1, contexts=study.contexts)
    found["ROME"] = (published.model_dump(mode="json"), _rome(study, published))
    if quick:
        return found
    for low, high in ((3, 5), (4, 6)):
        layers = range(low, high + 1)
        add(f"blocks {low}-{high}", config(layers))
        add(f"blocks {low}-{high}, text", config(layers, second_moment="text"))
        add(f"blocks {low}-{high}, MLP", config(layers, module="mlp"))
    add("located, 7 lead-ins", config(middle, contexts=study.contexts))
    add("located, original targets", config(middle, target_from="original"))
    add("located, text, guide and first hop kept", config(middle, second_moment="text", preserve_own=("guide", "first_hop")))
    for strength in (1.0, 10.0):
        key = {"layer": middle[0], "strength": strength}
        found[f"memory injection, first located block, {strength:g}"] = (key, _injection(study, middle[0], strength))
    longer = published.model_copy(update={"steps": 60, "clamp": 16.0})  # the published search is short for a model of this size
    found["ROME, searched longer"] = (longer.model_dump(mode="json"), _rome(study, longer))
    return found


def _rome(study: Study, config: RomeConfig) -> Callable[[Case], Patch]:
    return lambda case: rome(study.anatomy, study.tokenizer, case, config)


def _injection(study: Study, layer: int, strength: float) -> Callable[[Case], Patch]:
    return lambda case: memory_injection(study.anatomy, case, study.tokenizer, layer, strength)


def many(study: Study, counts: Sequence[int]) -> list[dict[str, Any]]:
    """All of the first n cases in one patch: batch against sequential; means over those cases."""
    middle, rows = study.located(), []
    for count in counts:
        for how, ridge in (("sequential", 0.0), ("batch", 0.0), ("batch", 0.1)):
            config = study.config(middle, second_moment="text", many=how, ridge=ridge)

            def compute(config: CremeConfig = config, count: int = count) -> dict[str, Any]:
                cases = study.cases[:count]
                patch = study.patch(cases, config)
                with patch.applied(study.anatomy, verify="structure"):
                    said = [study.say(case) | {"disturbance": study.disturbance(patch)} for case in cases]
                return summary(said, said)

            key = {"base": study.base, "config": config.model_dump(mode="json"), "cases": [case.id for case in study.cases[:count]]}
            found = study.work.values(f"many-{count}-{how}-{ridge}", key, compute)
            rows.append({"cases": count, "how": how + (f", ridge {ridge}" if ridge else ""), **found})
    return rows


def picked(row: dict[str, Any], name: str, column: str = "answer") -> list[float]:
    values = [value for value, kind in zip(row[column], row["sets"], strict=True) if kind == name or kind.partition(".")[0] == name]
    return [float("nan") if value is None else value for value in values]


def summary(rows: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over cases of absolute probabilities, event rates, first tokens that moved; relative changes as mean and median."""

    def mean(name: str, column: str = "answer", side: Sequence[dict[str, Any]] = rows) -> float:
        cases = [np.mean(values) for row in side if (values := picked(row, name, column))]
        return float(np.mean(cases)) if cases else float("nan")

    def event(name: str) -> float:
        pairs = [zip(picked(row, name), picked(row, name, "wrong"), strict=True) for row in rows]
        return float(np.mean([np.mean([right > wrong for right, wrong in pair]) for pair in pairs]))

    def moved(name: str) -> float:
        pairs = [(picked(row, name, "first"), picked(old, name, "first")) for row, old in zip(rows, before, strict=True)]
        return float(np.mean([np.mean(np.array(now) != np.array(was)) for now, was in pairs]))

    found = {name: mean(name) for name in ("edited", "paraphrase", "generalisation")}
    found |= {"event": event("edited"), "event paraphrase": event("paraphrase"), "wrong": mean("edited", "wrong")}
    found |= {kind: mean(f"unrelated.{kind}") for kind in KINDS} | {f"moved {kind}": moved(f"unrelated.{kind}") for kind in KINDS}
    found |= {"leakage": mean("unrelated", "target"), "right": mean("edited", "generated")}
    found |= {
        name: float(np.mean([np.nan if row[name] is None else row[name] for row in rows])) for name in ("guide", "first hop", "disturbance")
    }
    for name, column in (
        ("edited", "answer"),
        ("paraphrase", "answer"),
        ("generalisation", "answer"),
        ("unrelated", "answer"),
        ("unrelated", "target"),
    ):
        cases = [number for number, row in enumerate(rows) for _ in picked(row, name, column)]
        sides = [np.array([value for row in side for value in picked(row, name, column)]) for side in (before, rows)]
        change = relative_change(name, sides[0], sides[1], cases)
        label = "leakage" if column == "target" else name
        found |= {f"relative {label}, mean": change.mean, f"relative {label}, median": change.median}
    return found


Means = dict[str, list[dict[str, float]]]  # setting -> one summary per base model


class Claims:
    """The relations, from the summaries."""

    def __init__(self, means: Means) -> None:
        self.means, self.rows = means, []

    def __call__(self, setting: str, name: str) -> np.ndarray:
        return np.array([one[name] for one in self.means[setting]])

    def add(self, id_: str, claim: str, values: np.ndarray, holds: bool, **more: Any) -> None:
        interval = mean_interval(values.tolist())[1:] if len(values) > 1 else None
        self.rows.append({"id": id_, "claim": claim, "values": values.tolist(), "interval": interval, "holds": bool(holds), **more})

    def positive(self, id_: str, claim: str, values: np.ndarray, **more: Any) -> None:
        """The mean over base models is positive, and so is each."""
        self.add(id_, claim, values, bool((values > 0).all()), **more)


def relations(means: Means, counts: Sequence[dict[str, int]]) -> list[dict[str, Any]]:
    c = Claims(means)
    gap = np.array([count["gap"] / count["both hops"] for count in counts])
    c.positive("R-1", "share of held-out compositions that fail although both hops are known", gap)
    for way in ("median", "mean"):
        changes = {name: c("located", f"relative {name}, {way}") for name in ("edited", "paraphrase", "generalisation", "unrelated")}
        order = np.stack(list(changes.values())).mean(1)
        ordered = bool(order[0] > order[1] > order[2] > abs(order[3])) and bool((order[:3] > 0).all())
        shown = {name: values.mean() for name, values in changes.items()}
        c.add(
            f"R-5 ({way})",
            f"relative change ({way}): correction > paraphrase > generalisation > |unrelated|",
            order[:3],
            ordered,
            means=shown,
        )
        c.rows[-1]["interval"] = None
    for query in ("edited", "paraphrase"):
        middle = np.maximum(*(c(f"blocks {name}", query) for name in MIDDLE))
        rest = np.maximum(c(f"blocks {EARLY}", query), c(f"blocks {LATE}", query))
        c.positive(
            f"R-6 ({query})", f"pairs of blocks: the best middle one raises the {query} answer more than first and last", middle - rest
        )
    harm = {name: c("unedited", "hard") - c(f"blocks {name}", "hard") for name in (EARLY, *MIDDLE, LATE)}
    c.positive("R-6 (damage)", "the earliest window damages unrelated (hard) answers more than the latest", harm[EARLY] - harm[LATE])
    for query, name in (("event", "edited prompt"), ("event paraphrase", "paraphrases")):
        c.positive(
            f"R-7 ({name})", f"share of {name} that prefer the right to the former answer rises", c("located", query) - c("unedited", query)
        )
    c.positive("R-7 (wrong)", "the former answer loses", c("unedited", "wrong") - c("located", "wrong"))
    for setting in ("located", "located, prompts"):
        for name, most in (("guide", 0.12), ("first hop", 0.0)):
            lost = 1 - c(setting, name) / c("unedited", name)
            words = "at most 12 %" if most else "nothing (within 2 %)"
            c.add(f"R-8 ({name}; {setting})", f"the {name} prompt loses {words} of its answer", lost, bool(lost.mean() <= (most or 0.02)))
    kept = "located, text, guide and first hop kept"
    if kept in means:
        lost = np.maximum(*(1 - c(kept, name) / c("unedited", name) for name in ("guide", "first hop")))
        c.add("R-8 (kept)", "with both prompts' keys projected out, neither loses (within 2 %)", lost, bool((lost < 0.02).all()))
        change = c(kept, "edited") - c("located", "edited")
        c.add("R-8 (kept: correction)", "and the correction is the same within .05", change, bool((change > -0.05).all()))
    for name in (name for name in means if name.startswith("ROME")):
        for setting in ("located", "located, text"):
            leak = c(name, "leakage") - c(setting, "leakage")
            c.positive(f"R-9 (leakage; {name}; {setting})", f"{name} leaks more of the target into unrelated questions than CREME", leak)
        event = c(name, "event") - c("located", "event")
        c.add(f"R-9 (event; {name})", f"{name} has at least the event rate of CREME", event, bool((event >= 0).all()))
    gain = c("located", "edited") - c("unedited", "edited")
    chance = c("located, random direction", "edited") - c("unedited", "edited")
    c.add("R-10 (random)", "a random left factor of equal norm raises the target by less than a tenth of the edit's rise", chance / gain,
          bool((chance < 0.1 * gain).all()))  # fmt: skip
    c.positive("R-10 (MLP)", "editing the MLPs of the same blocks corrects less", c("located", "edited") - c("located, MLP", "edited"))
    for kind in ("text", "prompts"):
        name = f"located, {kind}"
        c.positive(
            f"R-11 ({kind}: disturbance)",
            f"second moment of {kind}: outputs on ordinary keys move less",
            1 - c(name, "disturbance") / c("located", "disturbance"),
        )
        c.positive(
            f"R-11 ({kind}: damage)", f"second moment of {kind}: unrelated (hard) answers lose less", c(name, "hard") - c("located", "hard")
        )
        c.positive(
            f"R-11 ({kind}: leakage)", f"second moment of {kind}: less of the target leaks", c("located", "leakage") - c(name, "leakage")
        )
        change = c(name, "edited") - c("located", "edited")
        c.add(
            f"R-11 ({kind}: correction)",
            f"second moment of {kind}: the correction is the same within .05",
            change,
            bool((change > -0.05).all()),
        )
        change = c(name, "paraphrase") - c("located", "paraphrase")
        c.add(f"R-11 ({kind}: paraphrase)", f"second moment of {kind}: paraphrases lose at most .05", change, bool((change > -0.05).all()))
    return c.rows


SHOWN = (
    "edited",
    "event",
    "paraphrase",
    "event paraphrase",
    "generalisation",
    "hard",
    "easy",
    "single",
    "moved hard",
    "leakage",
    "guide",
    "first hop",
)


def main(argv: Sequence[str] | None = None) -> None:
    def more(parser: Any) -> None:
        parser.add_argument("--work", type=Path, default=ROOT / "build" / "creme", help="where finished settings are kept")
        parser.add_argument("--seeds", type=int, nargs="+", help="base models (default: 0 1 2; with --quick: 0)")

    asked = arguments("creme", __doc__ or "", argv, more)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seeds = asked.seeds or ([0] if asked.quick else list(SEEDS))
    cases = 8 if asked.quick else CASES
    means: Means = {}
    counts, windows, batches = [], {}, []
    for seed in seeds:
        study = Study(seed, cases, Workspace(asked.work))
        counts.append(study.counts)
        windows[f"seed {seed}"] = list(study.located())
        before: list[dict[str, Any]] = []
        for name, (key, make) in settings_of(study, asked.quick).items():
            rows = study.measure(name, key, make)
            before = before or rows
            means.setdefault(name, []).append(summary(rows, before))
            print(f"seed {seed} {name}: " + ", ".join(f"{key} {means[name][-1][key]:.3f}" for key in SHOWN), flush=True)
        batches.append(many(study, (1, 5) if asked.quick else (1, 5, 20)))
    table = {f"setting: {name}": {key: float(np.mean([row[key] for row in rows])) for key in SHOWN} for name, rows in means.items()}
    medians = {
        f"relative changes: {name}": {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key.startswith("relative")}
        for name, rows in means.items()
    }
    together = {
        f"together: {rows[0]['cases']} cases, {rows[0]['how']}": {
            key: float(np.mean([row[key] for row in rows])) for key in ("edited", "right", *KINDS)
        }
        for rows in zip(*batches, strict=True)
    }
    settings = {"cases per base model": cases, "gap": counts, "located windows": windows, **table, **together, **medians}
    write_result(asked.out, "creme", seeds, settings, relations(means, counts))


if __name__ == "__main__":
    main()
