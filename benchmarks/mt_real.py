"""MT editing on two published language models: Gemma 3 270M and SmolLM2-135M-Instruct translate Multi30k captions.

Heads and loop neurons are located in four directions on the validation part of the set (en-de, en-fr, de-en, fr-en), refined, and given
a strength on validation sentences; en-de and en-fr are then measured once on sentences of the test part (2016, Flickr), zero- and
one-shot. Two forms of heads: `added` (as published: means added at the newest position; here located with examples in a wrong language),
and `replaced` (ours: located on the zero-shot prompts that fail, replaced by their means at the prompt's last token only). Controls: three
draws of random heads of the same number and layers at the chosen strength, the direction's own unrefined set, and the summed function
vector. Every stage is a committed unit, so that the script can be killed and started again. Needs TROCAR_DATA and the models.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, arguments, write_result

from trocar.anatomy import Head, Neuron, fingerprint
from trocar.core.errors import DataError
from trocar.core.seeds import derive
from trocar.core.workspace import Workspace
from trocar.edit.neurons import (
    Corpus,
    Direction,
    RecipeConfig,
    Rules,
    Sentences,
    Translations,
    choose,
    locate,
    operations,
    random_like,
    refined,
    split,
)
from trocar.edit.neurons.translations import from_data
from trocar.evaluate import Measurement, corpus_score, perplexity
from trocar.lab.texts import load_texts
from trocar.patch import Gate, Patch
from trocar.recipe import load_model, load_tokenizer

MODELS = {"gemma3-270m": "Gemma 3 270M", "smollm2-135m-instruct": "SmolLM2-135M-Instruct"}
MEASURED = ("en-de", "en-fr")
MEASURED_FORMS = {"gemma3-270m": ("added", "replaced"), "smollm2-135m-instruct": ("replaced",)}  # the second cannot translate
OTHERS = ("es", "it", "nl", "pt")  # languages an output may stray into
SEED, DRAWS, WINDOW = 0, 3, 256
ADDED = RecipeConfig(
    directions=("en-de", "en-fr", "de-en", "fr-en"), what="both", head_shots=4, mean_prompts=24, corrupted_prompts=12,
    corruption="language", cases=30, case_shots=1, loop_budget=120, unit_tokens=3, k_neurons=100, min_directions=3,
    strength=(0.25, 0.5, 1.0, 2.0, 3.0), tolerance=2.0, validation=24, test_limit=40, max_new_tokens=40, languages=OTHERS, batch_size=20,
)  # fmt: skip
OURS = {"corruption": "absent", "form": "replace", "positions": "last", "strength": (0.5, 1.0)}
FORMS = {"added": ADDED, "replaced": ADDED.model_copy(update=OURS)}


def run(name: str, forms: Mapping[str, RecipeConfig], folder: Path) -> list[dict[str, Any]]:
    """All rows of one model."""
    model, tokenizer = load_model(name).eval(), load_tokenizer(name)
    work = Workspace(folder / name, {"model": fingerprint(model)})
    first = next(iter(forms.values()))
    rules = Rules(first.max_new_tokens, first.languages, first.mode, first.strict, first.batch_size)
    corpus = Corpus.of(load_texts("multi30k:val"), "multi30k:val")
    test = Corpus.of(load_texts("multi30k:test_2016_flickr"), "multi30k:test_2016_flickr")
    n_heads = model.config.num_attention_heads * model.config.num_hidden_layers
    found: dict[str, Any] = {}
    for form, config in forms.items():
        config = config.model_copy(update={"k_heads": max(6, round(0.05 * n_heads))})
        parts = ("heads", "loops") if form == "added" else ("heads",)
        located = locate(model, tokenizer, corpus, config.locating(), rules, parts, SEED, work.room("locate"))
        sets = {"heads": refined(model, located, "heads", config)}
        if form == "added":
            for direction, one in located.items():
                print(name, direction, dict(one.told), flush=True)
            try:
                sets["loops"] = refined(model, located, "loops", config)
            except DataError as error:  # too few loops to locate from: that is a result
                print(name, error.what, flush=True)
        for part, one in sets.items():
            print(name, form, part, one.explanation, one.mask.open_names()[:20], flush=True)
        found[form] = (config, located, sets)
    ids = tokenizer("\n".join(load_texts("wikitext2:valid").fields["text"][:80]))["input_ids"][: 6 * WINDOW]
    base = perplexity(model, ids, WINDOW).value
    rows = []
    for text in MEASURED:
        case = _Case(model, tokenizer, Direction.parse(text), corpus, test, first, rules, work.room(text))
        rows += case.rows(MODELS[name], found, ids, base)
    return rows


class _Case:
    """One direction of one model."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        direction: Direction,
        corpus: Corpus,
        test: Corpus,
        config: RecipeConfig,
        rules: Rules,
        work: Workspace,
    ) -> None:
        self.model, self.tokenizer, self.direction, self.rules, self.work = model, tokenizer, direction, rules, work
        shares = split(len(corpus), SEED)
        examples = corpus.pairs(direction, shares.examples)
        rng = np.random.default_rng(derive(SEED, "test", direction))
        rows = sorted(rng.permutation(len(test))[: config.test_limit].tolist())
        self.test = Sentences.of(direction, test.pairs(direction, rows), examples, config.shots, SEED)
        self.validation = Sentences.of(direction, corpus.pairs(direction, shares.validation)[: config.validation], examples, (0,), SEED)

    def made(self, label: str, sentences: Sentences, ops: list[Any], shots: tuple[int, ...] | None = None) -> dict[int, Translations]:
        """Translations under `ops`, a unit for each number of shots."""
        patch, found = Patch.of(self.model, ops), {}
        with patch.applied(self.model, verify="structure"):
            for n, prompts in sentences.prompts.items():
                if shots is None or n in shots:
                    part = Sentences(sentences.direction, sentences.pairs, {n: prompts})
                    key = {"prompts": list(prompts), "ops": patch.digest, "tokens": self.rules.max_new_tokens}

                    def compute(part: Sentences = part, n: int = n) -> Any:
                        return part.translate(self.model, self.tokenizer, self.rules)[n].data()

                    found[n] = from_data(self.work.values(f"{label}-{n}", key, compute), self.direction, self.rules)
        return found

    def rows(self, name: str, found: Mapping[str, Any], ids: list[int], base: float) -> list[dict[str, Any]]:
        start, rows = time.time(), []
        before = self.made("test-none", self.test, [])
        rows += [self._row(name, "none", n, None, one, one, None) for n, one in before.items()]
        for form, (config, located, sets) in found.items():
            edits, used, fine = self._edits(name, form, config, located, sets)
            for label, (ops, shots) in edits.items():
                after = self.made(f"test-{label.replace(' ', '-')}", self.test, ops, shots)
                general = self._perplexity(label, ops, ids) / base if label.startswith("refined") else None
                strength = used if "neurons" not in label else None
                rows += [self._row(name, label, n, strength, before[n], one, general) for n, one in after.items()]
                rows[-1]["strength kept the constraint"] = fine if strength is not None else None
                print(rows[-len(after) :], flush=True)
        print(name, self.direction, f"{time.time() - start:.0f} s", flush=True)
        return [{"strength kept the constraint": None, **row} for row in rows]

    def _edits(
        self, name: str, form: str, config: RecipeConfig, located: Any, sets: Mapping[str, Any]
    ) -> tuple[dict[str, Any], float, bool]:
        """(label -> (operations, shots), strength, whether a strength kept error-free sentences within the tolerance)."""

        def build(chosen: Any, c: float = 0.0, part: str = "heads", **changed: Any) -> list[Any]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return operations(self.model, located, {part: chosen}, self.direction, config.model_copy(update=changed), c, 0.0)

        heads = sets["heads"]
        word = "" if form == "added" else f"-{form}"
        base = self.made("validation", self.validation, [])
        strength, _, trials = choose(
            self.validation,
            base,
            lambda c, s: self.made(f"validation{word}-{c}-{s}", self.validation, build(heads.mask, c)),
            config.strength,
            (),
            ("heads",),
            config.tolerance,
        )
        for trial in trials:
            print(name, self.direction, form, trial.row(), flush=True)
        used = strength or min(config.strength)  # if no strength kept the constraint, the weakest is shown and marked
        end = "" if form == "added" else f", {form}"
        edits: dict[str, Any] = {f"refined heads{end}": (build(heads.mask, used), (0, 1))}
        edits[f"own heads, unrefined{end}"] = (build(heads.single[str(self.direction)], used), (0,))
        if form == "added":
            edits["function vector"] = (build(heads.mask, used, form="vector"), (0,))
        outside = sorted({one for mask in heads.single.values() for one in mask.open_names()})
        for draw in range(DRAWS):
            edits[f"random heads {draw}{end}"] = (build(random_like(self.model, heads.mask, Head, draw, outside), used), (0,))
        if "loops" in sets and sets["loops"].mask.count():
            edits["refined loop neurons off"] = (build(sets["loops"].mask, part="loops"), (0, 1))
            for draw in range(DRAWS):
                edits[f"random neurons off {draw}"] = (build(random_like(self.model, sets["loops"].mask, Neuron, draw), part="loops"), (1,))
        return edits, used, bool(strength)

    def _perplexity(self, label: str, ops: list[Any], ids: list[int]) -> float:
        """Perplexity with the change at every position: in generation every new position was once the newest."""
        everywhere = [op if isinstance(op, Gate) else replace(op, positions=None) for op in ops]

        def compute() -> float:
            with Patch.of(self.model, everywhere).applied(self.model, verify="structure"):
                return perplexity(self.model, ids, WINDOW).value

        key = {"tokens": len(ids), "ops": Patch.of(self.model, ops).digest}
        return self.work.values(f"perplexity-{label.replace(' ', '-')}", key, compute)

    def _row(
        self, model: str, label: str, shots: int, strength: float | None, before: Translations, after: Translations, general: float | None
    ) -> dict[str, Any]:
        everything, free = np.ones(len(after), bool), before.errors == 0

        def score(metric: Any, rows: np.ndarray) -> float | None:
            chosen = np.flatnonzero(rows).tolist()
            if not chosen:
                return None
            sides = [[side[row] for row in chosen] for side in (before.texts, after.texts, self.test.references)]
            return round(corpus_score(sides[0], sides[1], sides[2], metric, self.direction.target, resamples=0).after, 1)

        change = Measurement("mismatch", "output", before.mismatch, after.mismatch, "", "", "", "lower").summary()
        row = {"model": model, "direction": str(self.direction), "edit": label, "shots": shots, "n": len(after), "strength": strength}
        row |= {"mismatch": round(float(after.mismatch.mean()), 3), "repetition": round(float(after.loop.mean()), 3)}
        row |= {"change of mismatch": round(change.difference, 3), "low": round(change.low, 3), "high": round(change.high, 3)}
        for part, chosen in (("", everything), (", error-free", free), (", errors", ~free)):
            row |= {f"BLEU{part}": score("bleu", chosen), f"chrF{part}": score("chrf", chosen)}
        return {**row, "n error-free": int(free.sum()), "perplexity ratio, everywhere": None if general is None else round(general, 3)}


def main() -> None:
    def extend(parser: Any) -> None:
        parser.add_argument("--models", nargs="*", default=list(MODELS), help="which models")
        parser.add_argument("--work", type=Path, default=ROOT / "build" / "mt_real", help="where units are kept")
        parser.add_argument("--forms", nargs="*", default=list(FORMS), help="which forms of heads")

    options = arguments("mt_real", __doc__ or "", extend=extend)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    forms = {name: FORMS[name] for name in options.forms}
    if options.quick:
        small = {"mean_prompts": 8, "corrupted_prompts": 4, "cases": 8, "test_limit": 8, "validation": 4, "strength": (1.0,)}
        forms = {name: config.model_copy(update=small) for name, config in forms.items()}
    folder = options.work / ("quick" if options.quick else "full")
    able = {name: {form: config for form, config in forms.items() if form in MEASURED_FORMS[name]} for name in options.models}
    rows = [row for name, own in able.items() if own for row in run(name, own, folder)]
    settings = {name: config.locating().model_dump(mode="json") for name, config in forms.items()}
    write_result(options.out, "mt_real", [SEED], {"forms": settings, "draws": DRAWS}, real=rows)


if __name__ == "__main__":
    main()
