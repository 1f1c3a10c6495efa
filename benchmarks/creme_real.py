"""CREME on real language models: which two-hop questions are a compositional gap, what repairs them, and what else moves.

The two-hop set of the package has a development and a test half, disjoint in bridges. All settings are compared on the development half
(the trade-off curve: repaired against moved); one of them, fixed there, is measured on the test half beside the published form and the
form with a second moment of running text. Every edit starts from the unedited model.

repaired: the target's first token has become the most probable one (`whole`: greedy decoding gives all of the target). moved: share of the
other two-hop questions (another subject, second hop known) whose most probable first token is another one afterwards. Intervals: 95 %,
bootstrap over cases. Every unit is committed in the work folder, so that a killed run goes on. Needs TROCAR_MODELS and TROCAR_DATA.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, arguments, write_result
from creme_real_several import HOW, several, stacked
from creme_real_table import brief, claims, condensed, grouped, shown
from transformers import AutoModelForCausalLM, AutoTokenizer

from trocar.anatomy import Anatomy, fingerprint
from trocar.core.workspace import Workspace
from trocar.edit import creme
from trocar.edit.creme import Case, CremeConfig, Moments, creme_edit, second_moment
from trocar.edit.creme.asking import Questions
from trocar.edit.creme.layers import choose_layers
from trocar.edit.creme.ordinary import ordinary_prompts
from trocar.evaluate import perplexity
from trocar.patch import Patch
from trocar.trace.queries import answer_tokens, continuations, next_tokens

MODELS = {"smollm2-135m-instruct": "SmolLM2-135M-Instruct", "gemma3-270m": "Gemma 3 270M"}
FOUND = 12  # development cases on which the window of blocks is located
CURVE_CASES = 9  # development cases, spread over them, on which the settings are compared
PPL_CASES = 2  # edits after which perplexity is measured
CHOSEN = "prompts, ridge 0.1"  # fixed on the development half
# name: (what the second moment is of, ridge, further settings, blocks: None = the located window)
SETTINGS: dict[str, tuple[str | None, float, dict[str, Any], str]] = {
    "identity (published)": (None, 0.0, {}, "window"),
    "identity, half the window": (None, 0.0, {}, "half"),
    "text, ridge 0.01": ("text", 0.01, {}, "window"),
    "prompts, ridge 10": ("prompts", 10.0, {}, "window"),
    "prompts, ridge 1": ("prompts", 1.0, {}, "window"),
    CHOSEN: ("prompts", 0.1, {}, "window"),
    "prompts, ridge 0.01": ("prompts", 0.01, {}, "window"),
    "prompts, half the window": ("prompts", 0.1, {}, "half"),
    "prompts, twice the window": ("prompts", 0.1, {}, "double"),
    "prompts, strength 0.7": ("prompts", 0.1, {"strength": 0.7}, "window"),
    "prompts, strength 1.5": ("prompts", 0.1, {"strength": 1.5}, "window"),
    "prompts, targets from the unedited model": ("prompts", 0.1, {"target_from": "original"}, "window"),
    "prompts, guide and first hop kept": ("prompts", 0.1, {"preserve_own": ("guide", "first_hop")}, "window"),
    "prompts, 22 lead-ins": ("prompts", 0.1, {"contexts": "lead-ins"}, "window"),
}
TESTED = ("identity (published)", "text, ridge 0.01", CHOSEN)
QUICK = ("identity (published)", CHOSEN)


class Bench:
    """One model, the cases, and what it says before any edit."""

    def __init__(self, name: str, quick: bool, folder: Path) -> None:
        path = Path(os.environ["TROCAR_MODELS"]).expanduser() / name
        self.name, self.quick = name, quick
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.anatomy = Anatomy.of(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
        self.model: Any = self.anatomy.model
        self.work = Workspace(folder / name, {"model": fingerprint(self.model)})
        self.cases = all_cases()
        self.known = self._known()
        self._moments: dict[str, Moments] = {}
        self._asked: dict[str, Said] = {}

    def _known(self) -> dict[str, dict[str, Any]]:
        """Of every case: the first token given to question, guide and first hop, and whether it is the right one."""

        def compute() -> dict[str, Any]:
            found: dict[str, dict[str, Any]] = {case.id: {} for case in self.cases}
            for kind in ("prompt", "guide", "first_hop"):
                asked = [(case, getattr(case, kind)) for case in self.cases if getattr(case, kind)]
                said = next_tokens(self.anatomy, self.tokenizer, [prompt for _, prompt in asked]).tolist()
                for (case, prompt), token in zip(asked, said, strict=True):
                    right = {case.bridge, case.bridge.removeprefix("the ")} if kind == "first_hop" else {case.target}
                    firsts = {answer_tokens(self.tokenizer, answer, prompt)[0] for answer in right}
                    found[case.id] |= {kind: token in firsts, f"{kind}_token": token}
            return found

        return self.work.values("known", {"cases": [case.id for case in self.cases]}, compute)

    def pick(self, split: str, strict: bool = True) -> list[Case]:
        """The gap: second hop (strict: and first hop) right, composition wrong."""
        rows = [(case, self.known[case.id]) for case in self.cases if case.split == split]
        return [case for case, row in rows if row["guide"] and not row["prompt"] and (row["first_hop"] or not strict)]

    def others(self, split: str) -> list[Case]:
        return [case for case in self.cases if case.split == split and self.known[case.id]["guide"]]

    def moments(self, kind: str, layers: Sequence[int]) -> Moments:
        """Second moments of all blocks that any setting edits, taken once."""
        if kind not in self._moments:
            more: dict[str, Any]
            if kind == "text":
                texts, more = [wikitext("valid")[:120_000]], {"positions": "all", "length": 256}
            else:
                texts, more = ordinary_prompts(self.cases), {"positions": "last"}
            self._moments[kind] = second_moment(self.anatomy, self.tokenizer, texts, list(layers), folder=self.work.folder, **more)
        return self._moments[kind]

    def window(self) -> tuple[int, ...]:
        """The blocks whose attention outputs, copied from guide to question, help most on development cases."""
        cases = self.pick("dev")[:FOUND]
        config = CremeConfig(mode="first", contexts="identity")
        key = {"cases": [case.id for case in cases], "config": config.model_dump(mode="json")}
        return tuple(self.work.values("window", key, lambda: list(choose_layers(self.anatomy, self.tokenizer, cases, config).layers)))

    def blocks(self, which: str, window: Sequence[int]) -> tuple[int, ...]:
        size, depth = len(window), sum(tower.n_layers for tower in self.anatomy.towers.values() if tower.modality == "text")
        if which == "half":
            return tuple(window[: max(1, size // 2)])
        if which == "double":
            start = max(1, window[0] - size // 2)
            return tuple(range(start, min(depth, start + 2 * size)))
        return tuple(window)

    def setting(self, name: str, window: Sequence[int]) -> tuple[CremeConfig, Moments | None]:
        kind, ridge, more, which = SETTINGS[name]
        layers = self.blocks(which, window)
        config = CremeConfig(**{"layers": layers, "contexts": "identity", "second_moment": kind or "none", "moment_ridge": ridge, **more})
        return config, self.moments(kind, self.blocks("double", window)) if kind else None

    def edit(self, cases: Sequence[Case], name: str, window: Sequence[int], **more: Any) -> tuple[Patch, list[Mapping[str, float]]]:
        config, moments = self.setting(name, window)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = creme_edit(self.anatomy, self.tokenizer, list(cases), config.model_copy(update=more), moments, checked=False)
        return result.patch, list(result.layers)

    def forget(self) -> None:
        self._asked.clear()

    def asked(self, name: str, queries: Sequence[tuple[str, str]], layer: int, mode: str = "first") -> Said:
        """Questions and what the unedited model says to them, kept for all edits from block `layer` on."""
        key = f"{name} {layer} {mode}"
        if key not in self._asked:
            self._asked[key] = Said(self, queries, layer, mode)
        return self._asked[key]


class Said:
    """Prompts with their answers, asked of the unedited model (`before`) and, by `now`, of whatever the model has become."""

    def __init__(self, bench: Bench, queries: Sequence[tuple[str, str]], layer: int, mode: Any) -> None:
        self.queries = list(queries)
        self.questions = Questions(bench.anatomy, bench.tokenizer, self.queries, layer, mode)
        self.answers = np.array([answer_tokens(bench.tokenizer, answer, prompt)[0] for prompt, answer in self.queries])
        self.before = self.now()

    def now(self) -> dict[str, list[float]]:
        """Of each query, as the model is now: first token, whether it is the answer's, probability of the answer, whole answer said."""
        said = self.questions.say(self.queries)
        columns = {"first": said.first, "right": said.first == self.answers, "score": said.score, "whole": said.right}
        return {name: column.astype(float).tolist() for name, column in columns.items()}


def all_cases() -> list[Case]:
    path = Path(creme.__file__).parent / "data" / "two_hop.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return list(Case.rows({name: [row.get(name) for row in rows] for name in rows[0]}))


def wikitext(part: str) -> str:
    with gzip.open(Path(os.environ["TROCAR_DATA"]).expanduser() / "wikitext2" / f"{part}.txt.gz", "rt", encoding="utf-8") as file:
        return file.read()


def queries_of(case: Case) -> list[tuple[str, str, str]]:
    """(set, prompt, answer) of everything that is asked about one case."""
    found = [("correction", case.prompt, case.target), ("guide", case.guide, case.target)]
    found += [("first hop", case.first_hop, case.bridge)] if case.first_hop else []
    for name, queries in (("paraphrase", case.paraphrases), ("generalisation", case.generalisation), ("specificity", case.unrelated)):
        found += [(name, query.prompt, query.answer) for query in queries]
    return [*found, *(("leakage", query.prompt, case.target) for query in case.unrelated)]


def unit(bench: Bench, case: Case, setting: str, window: Sequence[int], most: int | None) -> dict[str, Any]:
    """One case edited alone in one setting: everything before and after. most: how many other questions are asked at most."""

    def compute() -> dict[str, Any]:
        first = min(bench.blocks(SETTINGS[setting][3], window))
        queries = queries_of(case)
        own = bench.asked(case.id, [(prompt, answer) for _, prompt, answer in queries], first, "sequence")
        pool = bench.others(str(case.split))[:: 1 if most is None else max(1, len(bench.others(str(case.split))) // most)]
        around = bench.asked(f"others {case.split}", [(other.prompt, other.target) for other in pool], first)
        start = time.perf_counter()
        patch, rows = bench.edit([case], setting, window)
        seconds = time.perf_counter() - start
        wrong = bench.known[case.id]["prompt_token"]
        with patch.applied(bench.anatomy, verify="structure"):
            after, moved = own.now(), around.now()
        kept = [row for row, other in enumerate(pool) if other.subject != case.subject]
        before = around.before
        return {
            "sets": [name for name, _, _ in queries],
            "before": own.before,
            "after": after,
            "moved": [before["first"][row] != moved["first"][row] for row in kept],
            "broken": [not moved["right"][row] for row in kept if before["right"][row]],
            "leaked": [answer_tokens(bench.tokenizer, case.target)[0] == moved["first"][row] != before["first"][row] for row in kept],
            "kept wrong": after["first"][0] == wrong,
            "share": float(np.mean([row["share"] for row in rows])) if rows else 0.0,
            "seconds": seconds,
        }

    config, _ = bench.setting(setting, window)
    key = {"case": case.model_dump(mode="json"), "config": config.model_dump(mode="json"), "setting": SETTINGS[setting][:2], "most": most}
    name = "".join(mark if mark.isalnum() else "-" for mark in f"{setting} {case.id}")
    return bench.work.room("units").values(name, key, compute)


def perplexities(bench: Bench, edits: Mapping[str, Sequence[Case]], setting: str, window: Sequence[int]) -> dict[str, float]:
    """Perplexity on the test part of WikiText-2 of the unedited model (`base`) and after each of the named edits."""
    tokens = bench.tokenizer(wikitext("test"), add_special_tokens=False)["input_ids"][: 512 * (12 if bench.quick else 16)]

    def value(name: str, cases: Sequence[Case]) -> float:
        key = {"cases": [case.id for case in cases], "setting": setting if cases else "", "window": list(window), "tokens": len(tokens)}

        def compute() -> float:
            patch = bench.edit(cases, setting, window, many="batch")[0] if cases else Patch.of(bench.anatomy, [], "creme", {})
            with patch.applied(bench.anatomy, verify="structure"):
                return perplexity(bench.model, tokens, 512).value

        label = "".join(mark if mark.isalnum() else "-" for mark in f"{setting if cases else ''} {name}")
        return bench.work.room("perplexity").values(label, key, compute)

    return {"base": value("base", ()), **{name: value(name, cases) for name, cases in edits.items()}}


def examples(bench: Bench, cases: Sequence[Case], setting: str, window: Sequence[int]) -> list[dict[str, str]]:
    """What the model goes on with, before and after each edit."""

    def compute() -> list[dict[str, str]]:
        rows = []
        for case in cases:
            prompts = [case.prompt, *(query.prompt for query in case.paraphrases[:1])]
            before = [item.text for item in continuations(bench.anatomy, bench.tokenizer, prompts, 8)]
            with bench.edit([case], setting, window)[0].applied(bench.anatomy, verify="structure"):
                after = [item.text for item in continuations(bench.anatomy, bench.tokenizer, prompts, 8)]
            rows += [{"prompt": p, "right": case.target, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)]
        return rows

    return bench.work.values("examples", {"cases": [case.id for case in cases], "setting": setting, "window": list(window)}, compute)


def measure(bench: Bench, curve: bool) -> dict[str, Any]:
    """Everything about one model: relations, rows of the table, and what belongs to the settings."""
    model, window = MODELS[bench.name], bench.window()
    test, dev = bench.pick("test"), bench.pick("dev")
    if bench.quick:
        test, dev = test[:6], dev[:6]
    dev = dev[:: -(-len(dev) // CURVE_CASES)]
    names = QUICK if bench.quick else TESTED
    spaced = test[:: max(1, len(test) // 5)][:5]  # neighbours in the file share their subject
    tag, found, rows = bench.name.partition("-")[0], {}, []
    for name in names:
        found[name] = [unit(bench, case, name, window, None) for case in test]
        _say(f"{model}, test, {name}: {brief(condensed(found[name]))}")
    ppl = {name: perplexities(bench, {case.id: [case] for case in spaced[:PPL_CASES]}, name, window) for name in names}
    ratios = {name: max(value / values["base"] for value in values.values()) for name, values in ppl.items()}
    for name in names:
        text = f"{ppl[name]['base']:.2f}, at most {100 * (ratios[name] - 1):+.2f} %"
        rows.append(shown(model, "test", name, bench.blocks(SETTINGS[name][3], window), condensed(found[name]), text))
    relations = claims(tag, found, ratios, CHOSEN)
    many = several(bench, test, CHOSEN, window, bench.quick)
    key = {"window": list(window)}

    def pile(five: Sequence[Case]) -> Any:
        return lambda: stacked(bench, five, CHOSEN, window)

    piles = {
        which: bench.work.values(f"stacked-{which}", key | {"cases": [case.id for case in five]}, pile(five))
        for which, five in (("spread", spaced), ("neighbours", test[:5]))
    }
    _say(f"{model}, several: {[(row['how'], row['size'], row['repaired'], row['moved']) for row in many]}; stacked: {piles}")
    exact = all(one["undoing one leaves exactly the others"] and one["undoing all leaves exactly the model"] for one in piles.values())
    claim = "undoing one of a stack of edits leaves exactly the others, undoing all exactly the model"
    relations.append({"id": f"{tag}-stack", "claim": claim, "values": piles, "interval": None, "holds": bool(exact)})
    sets = {f"all {size}": list(test[:size]) for size in (5, 20) if size <= len(test)}
    extra = {
        "window": list(window),
        "counts": counts(bench),
        "perplexity": ppl,
        "perplexity of several edits (batch)": perplexities(bench, sets, CHOSEN, window) if sets else {},
        "several": grouped(many),
        "stacked": piles,
        "examples": examples(bench, test[::3][:8], CHOSEN, window),
        "test": {name: condensed(units) for name, units in found.items()},
    }
    if curve:
        extra["curve"] = {}
        for name in names if bench.quick else SETTINGS:
            bench.forget()  # an edit of lower blocks has rewritten weights below the kept prefixes, to the same values
            whole = condensed([unit(bench, case, name, window, 48) for case in dev])
            extra["curve"][name] = whole
            rows.append(shown(model, "development", name, bench.blocks(SETTINGS[name][3], window), whole))
            _say(f"{model}, development, {name}: {brief(whole)}")
    if curve and not bench.quick:
        wide = [unit(bench, case, CHOSEN, window, None) for case in bench.pick("test", strict=False)]
        whole = condensed(wide)
        rows.append(shown(model, "test, first hop not required", CHOSEN, window, whole))
        extra["test, first hop not required"] = whole
    return {"relations": relations, "rows": rows, "extra": extra}


def counts(bench: Bench) -> dict[str, Any]:
    """How many questions are known, and how large the gap is."""
    found = {}
    for split in ("dev", "test"):
        rows = [bench.known[case.id] for case in bench.cases if case.split == split]
        found[split] = {
            "questions": len(rows),
            "second hop known": sum(row["guide"] for row in rows),
            "both hops known": sum(bool(row["guide"] and row["first_hop"]) for row in rows),
            "of these solved": sum(bool(row["guide"] and row["first_hop"] and row["prompt"]) for row in rows),
            "gap": len(bench.pick(split)),
            "gap, first hop not required": len(bench.pick(split, strict=False)),
        }
    return found


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    """Measure the models and write the result."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--models", nargs="+", choices=sorted(MODELS), help="which models (default: all; --quick: the first)")
        parser.add_argument("--work", type=Path, default=ROOT / "build" / "creme_real", help="where units are kept")

    options = arguments("creme_real", (__doc__ or "").partition("\n")[0], extend=more)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    parts: dict[str, dict[str, Any]] = {}
    chosen = options.models or list(MODELS)[: 1 if options.quick else None]
    benches = [Bench(name, options.quick, options.work) for name in chosen]
    for curve in (False, True):  # first what counts, on the test half; then the settings side by side
        for bench in benches:
            if not curve:
                _say(f"{MODELS[bench.name]}: {counts(bench)}, window {bench.window()}")
            parts[bench.name] = measure(bench, curve)
            settings = {"chosen": CHOSEN, "several": list(HOW), "quick": options.quick, "models": {n: p["extra"] for n, p in parts.items()}}
            relations, rows = ([row for part in parts.values() for row in part[kind]] for kind in ("relations", "rows"))
            write_result(options.out, "creme_real", [0, 1, 2], settings, relations, real=rows)


if __name__ == "__main__":
    main()
