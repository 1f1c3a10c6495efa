"""MT editing's relations on small translators of real captions: natural errors for heads, a planted cause for loop neurons.

The lab's `translator` (three base seeds) often answers a zero-shot prompt in the wrong language, as its training lines did; nothing was
built into it that a head would have to be. `translator-looping` is the same model with four neurons trained to make it loop: there the
cause is known, and recall and precision can be told. Heads and neurons are located on sentences of the training part, strengths are chosen
on the validation part, and everything is measured on sentences of the test part, in all six directions. Controls: random heads or
neurons of equal number and layers (three draws), each direction's own set, the union, the summed function vector. Two forms of heads:
published (located with permuted examples, their means added), and ours (located on the zero-shot prompts that fail, replaced by their
means). The bases must have been trained (`trocar lab train`); each seed is a committed unit.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, arguments, mean_interval, write_result

from trocar import lab
from trocar.anatomy import Head, Neuron, fingerprint
from trocar.core.seeds import derive
from trocar.core.workspace import Workspace
from trocar.edit.neurons import (
    Corpus,
    Direction,
    RecipeConfig,
    Rules,
    Sentences,
    factors,
    heads_add,
    heads_replace,
    locate,
    neurons_scale,
    prompt,
    random_like,
    refined,
    split,
    vector_add,
)
from trocar.evaluate import perplexity, perplexity_measurement, sentence_scores
from trocar.lab import translation
from trocar.lab.models import find
from trocar.lab.registry import get
from trocar.locate.refine import refine, top_masks
from trocar.patch import Patch

DIRECTIONS = ("en-de", "en-fr", "de-en", "de-fr", "fr-en", "fr-de")
DRAWS, TOLERANCE, LOCATED, VALIDATION, TASK = 3, 1.0, 300, 20, 77
STRENGTHS, SHARES, SCALES = (0.25, 0.5, 1.0, 2.0), (0.5, 1.0), (0.5, 0.25, 0.0)
HEADS = RecipeConfig(
    directions=DIRECTIONS, head_shots=4, mean_prompts=60, corrupted_prompts=32, corruption="permuted", cases=60, instances=60, steps=10,
    k_heads=6, k_neurons=15, min_directions=4, max_new_tokens=48, batch_size=80,
)  # fmt: skip
OURS = HEADS.model_copy(update={"head_shots": 1, "corruption": "absent"})
LOOPS = HEADS.model_copy(update={"cases": 100, "case_shots": 0, "loop_budget": 110, "unit_tokens": 3, "stored": 30, "min_directions": None})
Ops = Mapping[Direction, Sequence[Any]]


@dataclasses.dataclass
class Bench:
    """One base model with its sentences; `score` translates them under operations, pooled over the directions."""

    name: str
    seed: int
    config: RecipeConfig
    tested: int

    def __post_init__(self) -> None:
        self.model, self.tokenizer = lab.load(self.name, self.seed)
        data: Any = get(self.name).data
        parts = {part: translation.corpus(data, part) for part in ("train", "val", "test_2016_flickr")}
        rng = np.random.default_rng(derive(self.seed, "located"))
        parts["train"] = [parts["train"][row] for row in sorted(rng.permutation(len(parts["train"]))[:LOCATED].tolist())]
        parts["val"], parts["test_2016_flickr"] = parts["val"][:VALIDATION], parts["test_2016_flickr"][: self.tested]
        made = {part: Corpus({code: [row[code] for row in rows] for code in data.languages}, part) for part, rows in parts.items()}
        self.corpus, self.validation, self.test = made.values()
        self.rules = Rules(self.config.max_new_tokens, batch_size=self.config.batch_size)
        self.directions = [Direction.parse(text) for text in self.config.directions]
        self.shares = split(len(self.corpus), self.seed)

    def sentences(self, shots: int, validation: bool = False) -> dict[Direction, Sentences]:
        source = {d: (self.validation if validation else self.test).pairs(d) for d in self.directions}
        examples = {d: self.corpus.pairs(d, self.shares.examples) for d in self.directions}
        return {d: Sentences.of(d, source[d], examples[d], (shots,), self.seed) for d in self.directions}

    def score(self, shots: int, ops: Ops | None = None, free: np.ndarray | None = None, validation: bool = False) -> dict[str, Any]:
        """Shares and mean chrF over all directions. free: outputs that were right before; by default those of this run."""
        wrong, loops, errors, chrf = [], [], [], []
        for direction, part in self.sentences(shots, validation).items():
            made = part.translate(self.model, self.tokenizer, self.rules, (ops or {}).get(direction, ()))[shots]
            wrong.append(made.mismatch)
            loops.append(made.loop)
            errors.append(made.errors)
            chrf.append(sentence_scores(made.texts, part.references, "chrf", direction.target))
        flags, scores = np.concatenate(errors), np.concatenate(chrf)
        right = flags == 0 if free is None else free
        looping = np.concatenate(loops) > 0
        return {
            "mismatch": float(np.concatenate(wrong).mean()), "loops": float(looping.mean()), "chrf": float(scores.mean()),
            "chrf_free": float(scores[right].mean()), "chrf_errors": float(scores[~right].mean()) if (~right).any() else None,
            "chrf_loops": float(scores[looping].mean()) if looping.any() else None, "free": right.astype(int).tolist(), "n": len(scores),
        }  # fmt: skip

    def perplexity(self, ops: Ops) -> dict[str, float]:
        """Of right one-shot translations of the test sentences, with the change at every position, against the unchanged model."""
        total = {"before": [], "after": [], "tokens": []}
        for direction in self.directions:
            pairs, shots = self.test.pairs(direction), self.corpus.pairs(direction, self.shares.examples)
            lines = [prompt(direction, pair[0], [shots[n % len(shots)]]) + f" {pair[1]}\n" for n, pair in enumerate(pairs)]
            stream = self.tokenizer("".join(lines), add_special_tokens=False)["input_ids"]
            before = perplexity(self.model, stream, 128)
            everywhere = [dataclasses.replace(op, positions=None) for op in ops.get(direction, ())]
            with Patch.of(self.model, everywhere).applied(self.model, verify="structure"):
                after = perplexity(self.model, stream, 128)
            for side, one in (("before", before), ("after", after)):
                total[side] += one.nats.tolist()
            total["tokens"] += before.tokens.tolist()
        sides = [dataclasses.replace(before, nats=np.array(total[side]), tokens=np.array(total["tokens"])) for side in ("before", "after")]
        summary = perplexity_measurement(sides[0], sides[1], ("base", "edited")).summary(self.seed)
        return {
            "before": summary.before,
            "ratio": summary.ratio,
            "low": summary.low / summary.before,
            "high": summary.high / summary.before,
        }


def natural(seed: int, tested: int, draws: int) -> dict[str, Any]:
    """Heads against the wrong language in both forms, task neurons, and what loop neurons there are."""
    bench = Bench("translator", seed, HEADS, tested)
    base, one_shot, trial = bench.score(0), bench.score(1), bench.score(0, validation=True)
    published = _heads(bench, HEADS, heads_add, STRENGTHS, draws, base, trial)
    ours = _heads(bench, OURS, heads_replace, SHARES, draws, base, trial)
    located = locate(bench.model, bench.tokenizer, bench.corpus, HEADS.locating(), bench.rules, ("task", "loops"), seed)
    task = refined(bench.model, located, "task", HEADS.model_copy(update={"k_neurons": TASK}))
    plain, rows = np.array(one_shot["free"], bool), {}
    drawn = {f"random {draw}": random_like(bench.model, task.mask, Neuron, draw) for draw in range(draws)}
    for label, chosen in {"task neurons": task.mask, **drawn}.items():
        off = neurons_scale(bench.model, factors(bench.model, chosen))
        rows[f"one-shot, {label} off"] = bench.score(1, dict.fromkeys(bench.directions, off), plain)
    return {
        "zero-shot": base, "one-shot": one_shot, "published": published, "ours": ours, "rows": rows, "task neurons": task.mask.open_names(),
        "loop cases": sum(one.told["loop cases"] for one in located.values()),
    }  # fmt: skip


def _heads(bench: Bench, config: RecipeConfig, build: Any, strengths: Sequence[float], draws: int, base: Any, trial: Any) -> dict[str, Any]:
    """One form of heads: located, refined, given a strength on validation sentences, and measured beside its controls."""
    model = bench.model
    located = locate(model, bench.tokenizer, bench.corpus, config.locating(), bench.rules, ("heads",), bench.seed)
    means = {d: one.means for d, one in located.items()}
    found = refined(model, located, "heads", config)
    own = {Direction.parse(name): mask for name, mask in found.single.items()}

    def put(sets: Mapping[Direction, Any], c: float, form: Any = build) -> Ops:
        return {d: form(model, sets[d], means[d], c) for d in bench.directions}

    same, free = dict.fromkeys(bench.directions, found.mask), np.array(base["free"], bool)
    trials = {c: bench.score(0, put(same, c), np.array(trial["free"], bool), True) for c in strengths}
    fine = [c for c in strengths if trials[c]["chrf_free"] >= trial["chrf_free"] - TOLERANCE]
    chosen = min(fine, key=lambda c: (trials[c]["mismatch"] + trials[c]["loops"], c)) if fine else min(strengths)
    rows = {f"refined, c={c}": bench.score(0, put(same, c), free) for c in strengths}
    rows["own set"] = bench.score(0, put(own, chosen), free)
    rows["union"] = bench.score(0, put(dict.fromkeys(bench.directions, found.union), chosen), free)
    rows["function vector"] = bench.score(0, put(same, chosen, vector_add), free)
    for draw in range(draws):
        drawn = random_like(model, found.mask, Head, draw)
        rows[f"random {draw}"] = bench.score(0, put(dict.fromkeys(bench.directions, drawn), chosen), free)
        rows[f"random {draw}"]["heads"] = [str(head) for head in drawn]
    return {
        "chosen": chosen, "within tolerance": bool(fine), "rows": rows, "heads": found.mask.open_names(),
        "own": {name: mask.open_names() for name, mask in found.single.items()}, "growth": growth(dict(found.single)),
        "perplexity": bench.perplexity(put(same, chosen)), "validation": {str(c): _bare(one) for c, one in {0.0: trial, **trials}.items()},
    }  # fmt: skip


def planted(seed: int, tested: int, draws: int) -> dict[str, Any]:
    """Loop neurons against loops whose cause is known, zero-shot."""
    bench = Bench("translator-looping", seed, LOOPS, tested)
    model, known = bench.model, set(lab.show("translator-looping", seed)["planted_neurons"])
    scores: dict[str, dict[str, Any]] = {}
    for contrast in ("none", "task", "first"):
        config = LOOPS.model_copy(update={"contrast": contrast})
        parts = ("loops", "heads") if contrast == "none" else ("loops",)
        located = locate(model, bench.tokenizer, bench.corpus, config.locating(), bench.rules, parts, seed)
        scores[contrast] = {str(d): one.loops for d, one in located.items()}
        if contrast == "none":
            first = located
    masks = {contrast: top_masks(by, LOOPS.k_neurons or 1, positive=True) for contrast, by in scores.items()}
    present = sum(mask is not None for mask in masks["none"].values())
    sets = {contrast: refine(by) for contrast, by in masks.items()}
    some = refine(masks["none"], min_settings=max(2, present - 2))

    def off(chosen: Any, scale: float = 0.0) -> Ops:
        return dict.fromkeys(bench.directions, neurons_scale(model, factors(model, chosen, off=scale)) if chosen else [])

    base = bench.score(0)
    free = np.array(base["free"], bool)
    names = sets["none"].mask.open_names()
    rows = {"oracle: planted off": bench.score(0, off(sorted(known)), free)}
    rows |= {f"refined, s={s}": bench.score(0, off(names, s), free) for s in SCALES}
    rows["shared by all but two"] = bench.score(0, off(some.mask.open_names()), free)
    own = {d: mask.open_names() for d in bench.directions if (mask := masks["none"][str(d)]) is not None}
    rows["own set"] = bench.score(0, {d: neurons_scale(model, factors(model, own.get(d, ()))) for d in bench.directions}, free)
    rows["union"] = bench.score(0, off(sets["none"].union.open_names()), free)
    for contrast in ("task", "first"):
        rows[f"refined, contrast {contrast}"] = bench.score(0, off(sets[contrast].mask.open_names()), free)
    for draw in range(draws):
        drawn = random_like(model, sets["none"].mask, Neuron, draw, sorted(known)) if names else []
        rows[f"random {draw}"] = bench.score(0, off(drawn), free)
    heads = refined(model, first, "heads", HEADS)
    means: dict[Direction, Any] = {d: first[d].means for d in bench.directions}
    crossed = bench.score(0, {d: heads_add(model, heads.mask, means[d], 0.5) for d in bench.directions}, free)
    quality = {name: _found(one, known) for name, one in (("refined", names), ("all but two", some.mask.open_names()),
               *((f"contrast {c}", sets[c].mask.open_names()) for c in ("task", "first")))}  # fmt: skip
    return {
        "base": base, "rows": rows, "planted": sorted(known), "located": names, "quality": quality, "growth": growth(masks["none"]),
        "heads, c=0.5": crossed, "perplexity": bench.perplexity(off(names)), "directions with loops": present,
        "own quality": {str(d): _found(found, known) for d, found in own.items()},
    }  # fmt: skip


def growth(masks: Mapping[str, Any]) -> list[dict[str, float]]:
    """Members shared by the first n directions, beside what chance would give."""
    rows, names = [], [name for name, mask in masks.items() if mask is not None]
    for n in range(1, len(names) + 1):
        part = refine({name: masks[name] for name in names[:n]}, alone=True)
        rows.append({"directions": n, "shared": part.found, "chance": part.expected})
    return rows


def _found(chosen: Sequence[str], known: set[str]) -> dict[str, Any]:
    hits = len(known & set(chosen))
    return {"size": len(chosen), "planted": hits, "recall": hits / len(known), "precision": hits / len(chosen) if chosen else None}


def _bare(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "free"}


def main() -> None:
    def extend(parser: Any) -> None:
        parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="base seeds")
        parser.add_argument("--work", type=Path, default=ROOT / "build" / "mt_editing", help="where finished seeds are kept")

    options = arguments("mt_editing", __doc__ or "", extend=extend)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    tested, draws, seeds = (10, 1, options.seeds[:1]) if options.quick else (30, DRAWS, options.seeds)
    work = Workspace(options.work)
    done: dict[str, dict[int, Any]] = {"natural": {}, "planted": {}}
    for seed in seeds:
        for kind, compute in (("natural", natural), ("planted", planted)):
            name = {"natural": "translator", "planted": "translator-looping"}[kind]
            if find(name, seed) is None:
                print(f"{name} of seed {seed} is not trained here; left out")
                continue
            common = {"tested": tested, "draws": draws, "model": fingerprint(lab.load(name, seed)[0])}
            dumps = [config.model_dump(mode="json") for config in (HEADS, OURS, LOOPS)]
            own = {"heads": dumps[0], "ours": dumps[1], "strengths": (STRENGTHS, SHARES)}
            key = common | (own if kind == "natural" else {"loops": dumps[2], "scales": SCALES})
            done[kind][seed] = work.values(f"{kind}-{seed}-{tested}", key, lambda compute=compute, seed=seed: compute(seed, tested, draws))
            print(kind, seed, "measured", flush=True)
    from mt_relations import relations

    settings = {"heads": HEADS.locating().model_dump(mode="json"), "loops": LOOPS.locating().model_dump(mode="json"), "tested": tested,
                "strengths": STRENGTHS, "scales": SCALES, "tolerance": TOLERANCE, "draws": draws,
                "natural": {seed: _slim(one) for seed, one in done["natural"].items()},
                "planted": {seed: _slim(one) for seed, one in done["planted"].items()}}  # fmt: skip
    write_result(options.out, "mt_editing", seeds, settings, relations(done["natural"], done["planted"], mean_interval))


def _slim(one: Any) -> Any:
    """Without the marks of every output."""
    return {key: _slim(value) for key, value in one.items() if key != "free"} if isinstance(one, dict) else one


if __name__ == "__main__":
    main()
