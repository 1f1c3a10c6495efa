"""MT editing as a recipe's method."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trocar.anatomy import Anatomy, fingerprint
from trocar.core.errors import ConfigError, DataError
from trocar.core.workspace import Workspace
from trocar.edit.neurons.config import RecipeConfig
from trocar.edit.neurons.edit import NEEDED, Sentences, Trial, by_layer, choose, chosen_set, operations, overlaps, refined
from trocar.edit.neurons.locating import Located, locate
from trocar.edit.neurons.prompts import Corpus, Direction, prompt, split
from trocar.edit.neurons.translations import Rules, Translations, from_data, sampling
from trocar.evaluate import Measurement, corpus_score, perplexity, perplexity_measurement, translation_quality
from trocar.evaluate.translation import marks
from trocar.locate import Scores
from trocar.locate.refine import Refined
from trocar.method import Estimate, Figure, Job, Method, Outcome, Transcript
from trocar.patch import Gate, Op, Patch
from trocar.trace.queries import encode

SHOWN = 24  # sentences a transcript
STREAM = 20_000  # tokens of plain text at most
NAMES = {0: "zero", 1: "one", 2: "two", 3: "three", 5: "five", 10: "ten"}  # of prompt kinds in measurements' names


def run(job: Job) -> Outcome:
    """Locate in every direction, refine, choose the strength on validation sentences, and measure on `test`."""
    return _Run(job).outcome()


def shots_name(shots: int) -> str:
    return NAMES.get(shots, str(shots))


@dataclass
class _Run:
    job: Job

    def __post_init__(self) -> None:
        job, config = self.job, self.job.config
        self.config: RecipeConfig = config
        self.model, self.tokenizer = job.model, job.processor
        if self.tokenizer is None:
            raise DataError("MT editing needs the model's tokenizer.", "Save it into the model's folder.")
        self.directions = list(dict.fromkeys(Direction.parse(text) for text in config.directions))
        self.direction = self.directions[0] if config.repair is None else Direction.parse(config.repair)
        if self.direction not in self.directions:
            raise ConfigError(f"method.repair is {self.direction}, which is not among method.directions.", "Add it there.")
        self.rules = Rules(config.max_new_tokens, config.languages, config.mode, config.strict, config.batch_size)
        self.corpus = Corpus.of(job.data["examples"], "data.examples")
        self.test = Corpus.of(job.data["test"], "data.test")
        known = set(self.corpus.pairs(self.direction))
        if shared := [pair for pair in self.test.pairs(self.direction) if pair in known]:
            raise DataError(f"{len(shared)} sentences of data.test are in data.examples too, for example {shared[0][0]!r}.", "Part them.")
        self.parts = NEEDED[config.what]
        self.base = fingerprint(self.model)
        self.said: list[str] = [line for line in (sampling(self.model),) if line]

    def outcome(self) -> Outcome:
        job, config = self.job, self.config
        located = locate(
            self.model, self.tokenizer, self.corpus, config.locating(), self.rules, self.parts, job.seed, job.work.room("located")
        )
        found = {part: one for part in self.parts if (one := self._refined(located, part)) is not None}
        self.said += [one.explanation for one in found.values()]
        sets = {part: chosen_set(self.model, one, config, self.direction, part, job.seed) for part, one in found.items()}
        sets = {part: mask for part, mask in sets.items() if mask.count()}
        strength, scale, trials = self._strength(located, sets)
        ops = self._operations(located, sets, strength, scale)
        used = {"heads": strength, "loops": scale, "task": config.enhance}
        settings = {
            "direction": str(self.direction),
            "what": config.what,
            "refine": config.refine,
            "used": {part: used[part] for part in sets},
        }
        patch = Patch.of(self.model, ops, "mt-editing", settings)
        measurements, transcripts, corpus_scores = self._measured(patch)
        log = {
            "says": self.said,
            "direction": str(self.direction),
            "set sizes": {part: mask.count() for part, mask in sets.items()},
            "members": {part: mask.open_names()[:50] for part, mask in sets.items()},
            "used": settings["used"],
            "located": {str(direction): dict(one.told) for direction, one in located.items()},
            "strengths": [trial.row() for trial in trials],
            "corpus scores": corpus_scores,
        }
        probe = dict(encode(self.model, self.tokenizer, [prompt(self.direction, text) for text, _ in self._test_pairs()[:8]]))
        return Outcome(
            patch, measurements, _scores(located, found, sets), _figures(self.model, found, trials), log=log, transcripts=transcripts,
            probes={"data.test": probe},
        )  # fmt: skip

    def _refined(self, located: Mapping[Direction, Located], part: str) -> Refined | None:
        """The refined set, or None (said in the log) where too few directions have cases, unless nothing else was asked for."""
        try:
            return refined(self.model, located, part, self.config)
        except DataError as error:
            if len(self.parts) == 1:
                raise
            self.said.append(f"{part} left out: {error.what} {error.hint}")
            return None

    def _operations(self, located: Mapping[Direction, Located], sets: Mapping[str, Scores], strength: float, scale: float) -> list[Op]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ops = operations(self.model, located, sets, self.direction, self.config, strength, scale)
        self.said += [line for line in dict.fromkeys(str(one.message) for one in caught) if line not in self.said]
        return ops

    def _translated(self, label: str, sentences: Sentences, ops: Sequence[Op], patch: Patch | None = None) -> dict[int, Translations]:
        """Translations under a patch, one committed unit for each number of shots."""
        work: Workspace = self.job.work.room("translations")
        patch = Patch.of(self.model, ops) if patch is None else patch
        found = {}
        for shots, prompts in sentences.prompts.items():
            part = Sentences(sentences.direction, sentences.pairs, {shots: prompts})
            key = {"prompts": list(prompts), "patch": patch.digest, "tokens": self.rules.max_new_tokens}

            def compute(part: Sentences = part, shots: int = shots) -> Any:
                with patch.applied(self.model, verify="structure"):
                    return part.translate(self.model, self.tokenizer, self.rules)[shots].data()

            found[shots] = from_data(work.values(f"{label}-{sentences.direction}-{shots}", key, compute), sentences.direction, self.rules)
        return found

    def _strength(self, located: Mapping[Direction, Located], sets: Mapping[str, Scores]) -> tuple[float, float, list[Trial]]:
        """The strengths to use. Single values are taken as they are; of several the best on validation sentences."""
        config = self.config
        strengths = config.strength if "heads" in sets else ()
        scales = config.scale if "loops" in sets else ()
        if len(strengths) <= 1 and len(scales) <= 1:
            return (*strengths, 0.0)[0], (*scales, 1.0)[0], []
        shares = split(len(self.corpus), self.job.seed)
        examples = self.corpus.pairs(self.direction, shares.examples)
        pairs = self.corpus.pairs(self.direction, shares.validation)[: config.validation]
        sentences = Sentences.of(self.direction, pairs, examples, config.shots, self.job.seed)

        def attempt(strength: float, scale: float) -> dict[int, Translations]:
            return self._translated(f"validation-{strength}-{scale}", sentences, self._operations(located, sets, strength, scale))

        base = self._translated("validation", sentences, [])
        strength, scale, trials = choose(sentences, base, attempt, strengths, scales, tuple(sets), config.tolerance)
        for part, nothing, value in (("heads", 0.0, strength), ("loops", 1.0, scale)):
            if part in sets and value == nothing:
                self.said.append(
                    f"no strength of {part} left fewer errors and kept error-free sentences within {config.tolerance} points of chrF; "
                    "none is used"
                )
        return strength, scale, trials

    def _test_pairs(self, direction: Direction | None = None) -> list[tuple[str, str]]:
        return self.test.pairs(direction or self.direction)[: self.config.test_limit]

    def _sentences(self, direction: Direction) -> Sentences:
        shares = split(len(self.corpus), self.job.seed)
        examples = self.corpus.pairs(direction, shares.examples)
        return Sentences.of(direction, self._test_pairs(direction), examples, self.config.shots, self.job.seed)

    def _measured(self, patch: Patch) -> tuple[list[Measurement], list[Transcript], dict[str, Any]]:
        config, made, transcripts, whole = self.config, [], [], {}
        gates = any(isinstance(op, Gate) for op in patch.ops)
        with patch.applied(self.model, verify="structure"):
            weights = fingerprint(self.model) if gates else self.base
        states = (self.base, weights if gates or not patch.ops else f"{self.base}+{patch.digest[:16]}")
        for direction in [self.direction, *([one for one in self.directions if one != self.direction] if config.others else [])]:
            sentences = self._sentences(direction)
            before = self._translated("test", sentences, [])
            after = self._translated("test-patched", sentences, [], patch) if patch.ops else before
            for shots in sentences.prompts:
                kind = shots_name(shots) + ("" if direction == self.direction else f".{direction}")
                made += measurements(sentences, before[shots], after[shots], states, kind, config)
                transcripts.append(_transcript(sentences, before[shots], after[shots], kind))
                whole[kind] = _corpus_scores(sentences, before[shots], after[shots], self.job.seed)
                whole[kind] |= {"empty before": before[shots].empty, "empty after": after[shots].empty}
        if "perplexity" in self.job.data:
            made.append(self._perplexity(patch, states))
        return made, transcripts, whole

    def _perplexity(self, patch: Patch, states: tuple[str, str]) -> Measurement:
        """With the change at every position: in generation every new position was once the newest, so this is what a long text meets."""
        rows = self.job.data["perplexity"].column("text", "perplexity")
        stream = self.tokenizer("\n".join(str(row) for row in rows))["input_ids"][:STREAM]
        before = perplexity(self.model, stream, self.config.window)
        everywhere = [op if isinstance(op, Gate) else replace(op, positions=None) for op in patch.ops]  # type: ignore[call-arg]
        with Patch.of(self.model, everywhere).applied(self.model, verify="structure"):
            after = perplexity(self.model, stream, self.config.window)
        return perplexity_measurement(before, after, states)


def measurements(
    sentences: Sentences, before: Translations, after: Translations, states: tuple[str, str], kind: str, config: RecipeConfig
) -> list[Measurement]:
    """`mismatch.KIND`, `repetition.KIND`, `errors.KIND`, and `bleu.KIND`, `chrf.KIND` on all, error-free and error cases."""
    texts = {
        "mismatch": "the output is in another language than asked for",
        "repetition": f"the output ends in a loop and has used its {config.max_new_tokens} tokens",
        "errors": "wrong language or loop",
    }
    sides = {
        "mismatch": (before.mismatch, after.mismatch),
        "repetition": (before.loop, after.loop),
        "errors": (before.errors, after.errors),
    }
    made = [
        Measurement(f"{name}.{kind}", "output", *sides[name], texts[name], *states, better="lower", form="share")
        for name in texts  # type: ignore[misc]
    ]
    quality = translation_quality(before.texts, after.texts, sentences.references, states, before.errors, sentences.direction.target)
    for one in quality:
        metric, _, part = one.name.partition(".")
        made.append(replace(one, name=f"{metric}.{kind}" + (f".{part}" if part else "")))
    return made


def _corpus_scores(sentences: Sentences, before: Translations, after: Translations, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metric in ("bleu", "chrf"):
        one = corpus_score(before.texts, after.texts, sentences.references, metric, sentences.direction.target, seed)
        found[metric] = {"before": one.before, "after": one.after, "low": one.low, "high": one.high}
    return found


def _transcript(sentences: Sentences, before: Translations, after: Translations, kind: str) -> Transcript:
    """Sentences whose output was wrong or has changed come first."""
    changed = [old != new for old, new in zip(before.texts, after.texts, strict=True)]
    bad = (before.errors + after.errors).tolist()
    order = sorted(range(len(before)), key=lambda row: (not bad[row], not changed[row], row))[:SHOWN]
    sides = [marks(side.mismatch[order], side.loop[order]) for side in (before, after)]
    return Transcript(
        f"translations-{kind.replace('.', '-')}",
        f"Translations {sentences.direction}, {kind}-shot prompts",
        [sentences.pairs[row][0] for row in order],
        [before.texts[row] for row in order],
        [after.texts[row] for row in order],
        [sentences.pairs[row][1] for row in order],
        *sides,
        caption="Wrong and changed outputs first.",
    )


def _scores(located: Mapping[Direction, Located], found: Mapping[str, Refined], sets: Mapping[str, Scores]) -> dict[str, Scores]:
    made = {}
    for part in found:
        for direction, one in located.items():
            if (scores := getattr(one, part)) is not None:
                made[f"{part}-{direction}"] = scores
        made[f"{part}-refined"] = found[part].mask
    return made | {f"{part}-used": mask for part, mask in sets.items() if mask != found[part].mask}


def _figures(model: Any, found: Mapping[str, Refined], trials: Sequence[Trial]) -> list[Figure]:
    figures = []
    titles = {"heads": "Translation heads", "loops": "Loop neurons", "task": "Task neurons"}
    for part, one in found.items():
        figures.append(
            Figure(
                f"overlap-{part}",
                f"{titles[part]}: what two directions share",
                "heatmap",
                "other",
                "direction",
                overlaps(one),
                value="shared",
                caption=one.explanation,
            )
        )
        figures.append(Figure(f"layers-{part}", f"{titles[part]} by layer", "bars", "layer", "members", by_layer(one, model), series="set"))
    for part, name in (("heads", "strength"), ("loops", "scale")):
        rows = [
            {name: trial.value if trial.what == part else (0.0 if part == "heads" else 1.0), "share": value, "of": what}
            for trial in trials
            if trial.what in (part, "none")
            for what, value in (("wrong language", trial.mismatch), ("loop", trial.repetition), ("chrF / 100", trial.chrf / 100))
        ]
        if len(rows) > 3:
            rows.sort(key=lambda row: (row["of"], row[name]))
            figures.append(
                Figure(f"sweep-{part}", f"{titles[part]}: {name} on validation sentences", "curve", name, "share", rows, series="of")
            )
    return figures


def estimate(job: Job) -> Estimate:
    """Time two translations and one attribution's passes, and multiply by how many there are."""
    config: RecipeConfig = job.config
    run_ = _Run(job)
    pairs = run_._test_pairs()[:2]
    sentences = Sentences.of(run_.direction, pairs, run_.corpus.pairs(run_.direction), config.shots[:1], job.seed)
    start = time.perf_counter()
    sentences.translate(job.model, job.processor, run_.rules)
    each = (time.perf_counter() - start) / len(pairs)
    n_test = len(run_._test_pairs()) * len(config.shots) * (len(run_.directions) if config.others else 1)
    tries = len(config.strength) * ("heads" in run_.parts) + len(config.scale) * ("loops" in run_.parts)
    outputs = 2 * n_test + ((tries + 1) * config.validation * len(config.shots) if tries > len(run_.parts) else 0)
    outputs += len(run_.directions) * config.cases * any(part in run_.parts for part in ("task", "loops"))
    inputs = encode(job.model, job.processor, [prompt(run_.direction, pairs[0][0])])
    start = time.perf_counter()
    with torch.no_grad():
        job.model(**inputs)
    passed = time.perf_counter() - start
    long = 1 + config.head_shots
    passes = len(run_.directions) * (config.mean_prompts + 4 * config.corrupted_prompts) * long * ("heads" in run_.parts)
    attributed = config.instances * ("task" in run_.parts) + min(config.loop_budget, 20 * config.cases) * ("loops" in run_.parts)
    passes += len(run_.directions) * attributed * config.steps / 4
    tower = Anatomy.of(job.model).tower()
    neurons = sum(tower.neurons(layer) for layer in range(tower.n_layers))
    peak = 64 * neurons * 4 * 4 + config.batch_size * 512 * tower.width * 4 * tower.n_layers
    told = f"timed on this machine: {outputs} translations of {each:.2g} s, about {passes:.3g} passes of {passed:.2g} s"
    return Estimate(int(peak), float(outputs * each + passes * passed), told)


STARTER = """\
# Repair a model that translates: keep it from answering in the wrong language, and from looping.
version: 1
seed: 0
model: path/to/model            # a Hugging Face causal language model with its tokenizer

data:
  examples:                     # parallel sentences, one column a language: shots, locating and validation
    source: path/to/examples.jsonl
  test:                         # other parallel sentences, to measure on
    source: path/to/test.jsonl
  perplexity:                   # plain text in a column `text`: what else changed. Optional
    source: path/to/plain.txt

method:
  name: mt-editing
  directions: [en-de, en-fr, de-en, fr-en]   # located one by one; what they share is kept
  repair: en-de                 # the direction whose test sentences are measured
  what: both                    # heads (wrong language), loops (neurons of loops), or both
  corruption: absent            # locate heads on prompts without examples; published: permuted, with form: add
  form: replace
  positions: last               # at the prompt's last token; published: last+generated
  strength: [0.5, 1.0]          # the best on validation sentences is taken
  max_new_tokens: 400           # an output is a loop only if it uses all of them

checks:
  - {measurement: mismatch.zero, statistic: difference, op: "<", threshold: 0}
  - {measurement: errors.zero, statistic: difference, op: "<", threshold: 0}
"""

METHOD = Method(
    name="mt-editing",
    title="MT editing",
    paper="arXiv 2410.07054",
    summary="keep a translating language model from answering in the wrong language and from looping",
    config=RecipeConfig,
    roles={
        "examples": "parallel sentences, one column a language (`en`, `de`, ...): shots, locating and validation",
        "test": "other parallel sentences in the same columns, to measure on",
        "perplexity?": "plain text in a column `text`, to see what else changed",
    },
    run=run,
    estimate=estimate,
    starter=STARTER,
    default_checks=({"measurement": "errors.zero", "statistic": "difference", "op": "<", "threshold": 0},),
    reads="texts",
)

__all__ = ["METHOD", "measurements", "run"]
