"""MT editing on two published language models: Gemma 3 270M and SmolLM2-135M-Instruct translate Multi30k captions.

Heads and loop neurons are located in four directions on the validation part of the set (en-de, en-fr, de-en, fr-en), refined, and given a
strength on validation sentences; en-de and en-fr are then measured once on sentences of the test part (2016, Flickr), zero-shot and few-shot.
Controls: three draws of random heads of the same number and layers at the chosen strength, the direction's own unrefined set, and the summed
function vector. Every stage is a committed unit, so that the script can be killed and started again. Needs TROCAR_DATA and the models.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, write_result

from trocar.anatomy import Head, Neuron
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
from trocar.patch import Patch
from trocar.recipe import load_model, load_tokenizer

MODELS = {"gemma3-270m": "Gemma 3 270M", "smollm2-135m-instruct": "SmolLM2-135M-Instruct"}
MEASURED = ("en-de", "en-fr")
OTHERS = ("es", "it", "nl", "pt")  # languages an output may stray into
SEED, DRAWS = 0, 3
CONFIG = RecipeConfig(
    directions=("en-de", "en-fr", "de-en", "fr-en"), what="both", head_shots=4, mean_prompts=24, corrupted_prompts=12, corruption="language",
    cases=30, case_shots=1, loop_budget=120, unit_tokens=3, k_neurons=100, min_directions=3, strength=(0.25, 0.5, 1.0, 2.0, 3.0), scale=(0.0,),
    tolerance=2.0, shots=(0, 1), validation=24, test_limit=40, max_new_tokens=40, languages=OTHERS, batch_size=20,
)  # fmt: skip


def run(name: str, config: RecipeConfig, folder: Path) -> list[dict[str, Any]]:
    """All rows of one model."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, tokenizer = load_model(name).eval(), load_tokenizer(name)
    work = Workspace(folder / name, {"model": name})
    rules = Rules(config.max_new_tokens, config.languages, config.mode, config.strict, config.batch_size)
    corpus = Corpus.of(load_texts("multi30k:val"), "multi30k:val")
    test = Corpus.of(load_texts("multi30k:test_2016_flickr"), "multi30k:test_2016_flickr")
    heads = max(6, round(0.05 * sum(model.config.num_attention_heads for _ in range(model.config.num_hidden_layers))))
    config = config.model_copy(update={"k_heads": heads})
    located = locate(model, tokenizer, corpus, config.locating(), rules, ("heads", "loops"), SEED, work.room("locate"))
    found = {"heads": refined(model, located, "heads", config)}
    for direction, one in located.items():
        print(name, direction, dict(one.told), flush=True)
    print(name, found["heads"].explanation, found["heads"].mask.open_names(), flush=True)
    try:
        found["loops"] = refined(model, located, "loops", config)
        print(name, found["loops"].explanation, found["loops"].mask.open_names()[:12], flush=True)
    except Exception as error:
        print(name, error, flush=True)
    shares = split(len(corpus), SEED)
    stream = tokenizer("\n".join(load_texts("wikitext2:valid").fields["text"][:80]))["input_ids"][:1536]
    plain = perplexity(model, stream, 256)
    rows = []
    for text in MEASURED:
        direction = Direction.parse(text)
        case = _Case(model, tokenizer, direction, corpus, test, shares, config, rules, work.room(text), located, found)
        rows += case.rows(MODELS[name], stream, plain)
    return rows


class _Case:
    """One direction of one model."""

    def __init__(self, model, tokenizer, direction, corpus, test, shares, config, rules, work, located, found) -> None:
        self.model, self.tokenizer, self.direction, self.config, self.rules, self.work = model, tokenizer, direction, config, rules, work
        self.located, self.found = located, found
        examples = corpus.pairs(direction, shares.examples)
        rng = np.random.default_rng(derive(SEED, "test", direction))
        rows = sorted(rng.permutation(len(test))[: config.test_limit].tolist())
        self.test = Sentences.of(direction, test.pairs(direction, rows), examples, config.shots, SEED)
        self.validation = Sentences.of(direction, corpus.pairs(direction, shares.validation)[: config.validation], examples, (0,), SEED)

    def made(self, label: str, sentences: Sentences, ops: list[Any], shots: tuple[int, ...] | None = None) -> dict[int, Translations]:
        """Translations under `ops`, a unit for each number of shots."""
        found = {}
        patch = Patch.of(self.model, ops)
        digest = patch.digest
        with patch.applied(self.model, verify="structure"):
            for n, prompts in sentences.prompts.items():
                if shots is None or n in shots:
                    part = Sentences(sentences.direction, sentences.pairs, {n: prompts})
                    stored = self.work.values(
                        f"{label}-{n}",
                        {"prompts": list(prompts), "ops": digest, "tokens": self.rules.max_new_tokens},
                        lambda part=part, n=n: part.translate(self.model, self.tokenizer, self.rules)[n].data(),
                    )
                    found[n] = from_data(stored, self.direction, self.rules)
        return found

    def operations(self, sets: Mapping[str, Any], strength: float = 0.0, scale: float = 1.0, **changed: Any) -> list[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return operations(self.model, self.located, sets, self.direction, self.config.model_copy(update=changed), strength, scale)

    def rows(self, model_name: str, stream: list[int], plain: Any) -> list[dict[str, Any]]:
        start = time.time()
        sets = {part: one.mask for part, one in self.found.items()}
        base = self.made("validation", self.validation, [])
        strength, _, trials = choose(
            self.validation, base,
            lambda c, s: self.made(f"validation-{c}-{s}", self.validation, self.operations({"heads": sets["heads"]}, c)),
            self.config.strength, (), ("heads",), self.config.tolerance,
        )  # fmt: skip
        for trial in trials:
            print(model_name, self.direction, trial.row(), flush=True)
        used = strength or min(self.config.strength)  # no strength kept the constraint: the weakest is shown, and marked
        edits: dict[str, tuple[list[Any], tuple[int, ...]]] = {"none": ([], self.config.shots)}
        edits["refined heads"] = (self.operations({"heads": sets["heads"]}, used), self.config.shots)
        edits["own heads, unrefined"] = (self.operations({"heads": self.found["heads"].single[str(self.direction)]}, used), (0,))
        edits["function vector"] = (self.operations({"heads": sets["heads"]}, used, form="vector"), (0,))
        located = [name for one in self.found["heads"].single.values() for name in one.open_names()]
        for draw in range(DRAWS):
            drawn = random_like(self.model, sets["heads"], Head, draw, sorted(set(located)))
            edits[f"random heads {draw}"] = (self.operations({"heads": drawn}, used), (0,))
        if "loops" in sets and sets["loops"].count():
            edits["refined loop neurons off"] = (self.operations({"loops": sets["loops"]}, scale=0.0), self.config.shots)
            for draw in range(DRAWS):
                drawn = random_like(self.model, sets["loops"], Neuron, draw)
                edits[f"random neurons off {draw}"] = (self.operations({"loops": drawn}, scale=0.0), (1,))
        before = self.made("test-none", self.test, [])
        rows = []
        for label, (ops, shots) in edits.items():
            after = self.made(f"test-{label.replace(' ', '-')}", self.test, ops, shots)
            general = (
                self._perplexity(label, ops, stream, plain) if label in ("refined heads", "refined loop neurons off") else float("nan")
            )
            rows += [self._row(model_name, label, n, used if "heads" in label or "vector" in label else None, bool(strength), before[n], one, general)
                     for n, one in after.items()]  # fmt: skip
            print(model_name, rows[-1], flush=True)
        print(model_name, self.direction, f"{time.time() - start:.0f} s", flush=True)
        return rows

    def _perplexity(self, label: str, ops: list[Any], stream: list[int], plain: Any) -> float:
        """Perplexity with the change at every position, over that without: in generation every new position was once the newest."""
        from dataclasses import replace

        def compute() -> float:
            with Patch.of(self.model, [replace(op, positions=None) for op in ops]).applied(self.model, verify="structure"):
                return perplexity(self.model, stream, 256).value

        return (
            self.work.values(
                f"perplexity-{label.replace(' ', '-')}", {"tokens": len(stream), "ops": Patch.of(self.model, ops).digest}, compute
            )
            / plain.value
        )

    def _row(self, model: str, label: str, shots: int, strength: float | None, allowed: bool, before: Translations, after: Translations,
             general: float) -> dict[str, Any]:  # fmt: skip
        free, references = before.errors == 0, self.test.references

        def score(metric: str, rows: np.ndarray) -> float | None:
            chosen = np.flatnonzero(rows).tolist()
            if not chosen:
                return None
            parts = [[side[row] for row in chosen] for side in (before.texts, after.texts, references)]
            return round(corpus_score(parts[0], parts[1], parts[2], metric, self.direction.target, resamples=0).after, 1)

        change = Measurement("mismatch", "output", before.mismatch, after.mismatch, "", "", "", "lower").summary()
        return {
            "model": model, "direction": str(self.direction), "edit": label, "shots": shots, "n": len(after),
            "strength": strength, "strength kept the constraint": allowed if strength is not None else None,
            "mismatch": round(float(after.mismatch.mean()), 3), "change": [round(change.difference, 3), round(change.low, 3), round(change.high, 3)],
            "repetition": round(float(after.loop.mean()), 3), "BLEU": score("bleu", np.ones(len(after))), "chrF": score("chrf", np.ones(len(after))),
            "BLEU error-free": score("bleu", free), "chrF error-free": score("chrf", free), "n error-free": int(free.sum()),
            "BLEU errors": score("bleu", ~free), "chrF errors": score("chrf", ~free), "perplexity ratio": None if np.isnan(general) else round(general, 4),
        }  # fmt: skip


def main() -> None:
    options = arguments("mt_real", __doc__ or "", extend=lambda parser: parser.add_argument("--models", nargs="*", default=list(MODELS)))
    config = CONFIG
    if options.quick:
        config = config.model_copy(
            update={"mean_prompts": 8, "corrupted_prompts": 4, "cases": 8, "test_limit": 8, "validation": 4, "strength": (1.0,)}
        )
    folder = Path("~/.cache/trocar/bench/mt_real").expanduser() / ("quick" if options.quick else "full")
    rows = [row for name in options.models for row in run(name, config, folder)]
    settings = config.model_dump(mode="json", exclude={"repair", "enhance", "others", "window", "vector_layer"})
    write_result(options.out, "mt_real", [SEED], settings, real=rows)


if __name__ == "__main__":
    main()
