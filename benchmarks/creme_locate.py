"""CREME's findings before any edit, on small models that know an invented world: the gap (R-1), the lens (R-2), interventions on the bridge
(R-3), where a copy repairs (R-4), and how well first-order estimates screen for it (F-1, F-2).

python benchmarks/creme_locate.py [--quick] [--out FILE] [--seeds 0 1 2] [--variants world world-shallow]

Needs the models (`trocar lab train world --seed 1`, ...). A relation has to hold on every base seed. Windows and layers are chosen on one
half of the cases and compared on the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import arguments, write_result

from trocar import lab
from trocar.core.seeds import generator
from trocar.lab.worlds import make_world
from trocar.locate import (
    Scores,
    best_window,
    component_effects,
    first_order_effects,
    implicit_effects,
    logit_lens,
    module_effects,
    rank_correlation,
    screen,
)
from trocar.locate.cases import interval
from trocar.trace.queries import answer_tokens, next_tokens

MODULES = ("block", "attention", "mlp")
WINDOWS = (2, 3)  # layers; the reference's 6 of 32 scaled to 6 to 8 layers, and one more
DECODABLE = 10  # times the probability of a guess at random: below that, a lens curve says nothing
VANISHED = 0.1  # share of the largest effect
GAP = 0.05
Row = dict[str, Any]


@dataclass(frozen=True)
class Base:
    """One trained model with its cases: both hops known; solved or failed compositions, at most `limit` of each, in a drawn order."""

    variant: str
    seed: int
    model: Any
    tokenizer: Any
    known: int
    failures: int
    solved: list[Row]
    failed: list[Row]

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    def prompts(self, cases: Sequence[Row]) -> tuple[list[str], list[str], list[str]]:
        """Two-hop prompts, the second-hop prompts that the copies come from, and the answers."""
        return (
            [case["template"].format(case["subject"]) for case in cases],
            [case["template"].format(case["bridge"]) for case in cases],
            [case["target"] for case in cases],
        )


def load(variant: str, seed: int, limit: int) -> Base:
    model, tokenizer = lab.load(variant, seed)
    cases = make_world(seed).cases()

    def right(prompts: list[str], answers: list[str]) -> np.ndarray:
        wanted = torch.tensor([answer_tokens(tokenizer, answer, prompt)[0] for prompt, answer in zip(prompts, answers, strict=True)])
        return (next_tokens(model, tokenizer, prompts, 256) == wanted).numpy()

    targets = [case["target"] for case in cases]
    first = right([case["first_hop"] for case in cases], [case["bridge"] for case in cases])
    second = right([case["template"].format(case["bridge"]) for case in cases], targets)
    composed = right([case["template"].format(case["subject"]) for case in cases], targets)
    order = torch.randperm(len(cases), generator=generator(seed, "order")).tolist()

    def some(chosen: np.ndarray) -> list[Row]:
        return [cases[n] for n in order if chosen[n]][:limit]

    known = first & second
    return Base(
        *(variant, seed, model, tokenizer, int(known.sum()), int((known & ~composed).sum())),
        *(some(known & composed), some(known & ~composed)),
    )


def estimate(values: np.ndarray) -> Row:
    """Mean over cases with its bootstrap interval."""
    mean, low, high = interval(values[:, None])
    return {"mean": round(float(mean[0]), 4), "low": round(float(low[0]), 4), "high": round(float(high[0]), 4), "cases": len(values)}


def rounded(values: np.ndarray) -> list[float]:
    return [round(float(x), 4) for x in values]


def gap(bases: Sequence[Base]) -> Row:
    values, lows = {}, []
    for base in bases:
        share, n = base.failures / base.known, base.known
        half = 1.96 * np.sqrt(share * (1 - share) / n + 1.96**2 / (4 * n * n))
        low = (share + 1.96**2 / (2 * n) - half) / (1 + 1.96**2 / n)  # Wilson
        values[f"seed {base.seed}"] = {"share": round(share, 3), "low": round(low, 3), "failures": base.failures, "both hops known": n}
        lows.append(low)
    return {
        "claim": "of held-out compositions whose two facts the model knows, it fails a share clearly above 0 (lower bound above .05)",
        "values": values,
        "interval": None,
        "holds": min(lows) > GAP,
    }


def through_lens(bases: Sequence[Base]) -> tuple[Row, dict[int, int]]:
    """R-2, and per seed the block after which the bridge reads highest (not the last one)."""
    values, holds, peaks = {}, [], {}
    for base in bases:
        prompts, _, answers = base.prompts(base.solved)
        found = logit_lens(base.model, base.tokenizer, prompts, {"bridge": [case["bridge"] for case in base.solved], "answer": answers})
        bridge, answer = found.mean("bridge"), found.mean("answer")
        at = found.peak("bridge")
        fall = estimate(found.scores["bridge"][:, at] - found.scores["bridge"][:, -1])
        peaks[base.seed] = max(0, int(bridge[1:-1].argmax()))
        readable = bridge[at] >= DECODABLE / base.model.config.vocab_size
        values[f"seed {base.seed}"] = {
            "bridge": rounded(bridge),
            "answer": rounded(answer),
            "bridge rank": rounded(found.ranks["bridge"].mean(0)),
            "bridge peaks at reading": at,
            "answer peaks at reading": found.peak("answer"),
            "peak minus last": fall,
            "readable": bool(readable),
        }
        holds.append(readable and at < found.peak("answer") and fall["low"] > 0)
    row = {
        "claim": "solved items: the bridge is readable (10 times chance), peaks at an earlier reading than the answer, and falls again",
        "values": values,
        "interval": None,
        "holds": all(holds),
    }
    return row, peaks


def caused(bases: Sequence[Base], peaks: dict[int, int]) -> tuple[Row, Row]:
    """R-3: at the lens' peak the bridge's suppression costs more than the control's; at the last block both have vanished."""
    from scipy.stats import wilcoxon

    first: dict[str, Any] = {}
    last: dict[str, Any] = {}
    more, gone, weakest = [], [], None
    for base in bases:
        prompts, _, answers = base.prompts(base.solved)
        bridges = [case["bridge"] for case in base.solved]
        for solver in ("exact", "pinv"):
            found = implicit_effects(base.model, base.tokenizer, prompts, bridges, answers, solver=solver, seed=base.seed)
            at, name = peaks[base.seed], f"seed {base.seed}, {solver}"
            gain = found.control[:, at] - found.bridge[:, at]
            test: Any = wilcoxon(gain, alternative="greater", zero_method="zsplit")
            first[name] = {
                "clean": round(float(found.clean.mean()), 4),
                "bridge": rounded(found.bridge.mean(0)),
                "control": rounded(found.control.mean(0)),
                "block": at,
                "control minus bridge there": estimate(gain),
                "Wilcoxon p": float(test.pvalue),
            }
            largest = np.abs(found.bridge.mean(0)).max()
            share = {"bridge": abs(found.bridge[:, -1].mean()) / largest, "control": abs(found.control[:, -1].mean()) / largest}
            last[name] = {key: round(float(x), 3) for key, x in share.items()}
            if solver == "exact":
                more.append(first[name]["control minus bridge there"]["low"] > 0 and test.pvalue < 0.05)
                gone.append(max(share.values()) < VANISHED)
                bounds = first[name]["control minus bridge there"]
                weakest = min(weakest or (bounds["low"], bounds["high"]), (bounds["low"], bounds["high"]))
    return (
        {
            "claim": "solved items: suppressing the bridge where the lens reads it highest lowers the answer more than random tokens do",
            "values": first,
            "interval": weakest,
            "holds": all(more),
        },
        {
            "claim": "after the last block both effects have vanished (below a tenth of the largest effect)",
            "values": last,
            "interval": None,
            "holds": all(gone),
        },
    )


def located(bases: Sequence[Base], width: int) -> Row:
    """R-4 with windows of one width. Layer 0 is in no window: it reads the source's own words."""
    values, holds, weakest = {}, [], None
    for base in bases:
        prompts, sources, answers = base.prompts(base.failed)
        found = module_effects(base.model, base.tokenizer, prompts, sources, answers, ("attention", "mlp"), window=width)
        half, early, late = len(prompts) // 2, 1 + width // 2, base.layers - width + width // 2  # effects of a window stand at its centre
        at = early + 1 + int(found.effects["attention"][:half, early + 1 : late].mean(0).argmax())
        attention, mlp = found.effects["attention"][half:], found.effects["mlp"][half:]
        gaps = {
            "over early window": estimate(attention[:, at] - attention[:, early]),
            "over late window": estimate(attention[:, at] - attention[:, late]),
            "over MLPs of the same window": estimate(attention[:, at] - mlp[:, at]),
        }
        start = at - width // 2
        values[f"seed {base.seed}"] = {
            "window": f"{start}-{start + width - 1}",
            "effect there": estimate(attention[:, at]),
            **gaps,
            "attention, windows": rounded(found.effects["attention"].mean(0)),
            "MLP, windows": rounded(found.effects["mlp"].mean(0)),
            "score before": round(float(found.clean.mean()), 4),
            "score of the source": round(float(found.source.mean()), 4),
            "best of all cases": "-".join(str(layer) for layer in best_window(found, width)),
        }
        holds.append(all(e["low"] > 0 for e in gaps.values()))
        worst = min((e["low"], e["high"]) for e in gaps.values())
        weakest = min(weakest or worst, worst)
    return {
        "claim": f"failed items: copying the attention of the best middle window of {width} layers (chosen on the other half of the cases) "
        "repairs more than early and late windows and than the MLPs of the same window",
        "values": values,
        "interval": weakest,
        "holds": all(holds),
    }


def screened(bases: Sequence[Base], quick: bool) -> tuple[Row, Row]:
    """How well one backward pass ranks modules, heads and neurons, and what a screening by it misses."""
    ranks, recalls, good, found_all = {}, {}, [], []
    for base in bases:
        prompts, sources, answers = base.prompts(base.failed)
        arguments_ = (base.model, base.tokenizer, prompts, sources, answers)
        single = module_effects(*arguments_)
        guess = first_order_effects(*arguments_, ("block", "attention", "mlp", "head", "neuron"))
        heads = [component for component, _ in guess.scores("head").sorted()]
        values = component_effects(*arguments_, heads).mean(0)
        exact = Scores("head", "", dict(zip(heads, values.tolist(), strict=True)), guess.how)
        row = {kind: rank_correlation(guess.scores(kind), single.scores(kind).with_how(guess.how)) for kind in MODULES}
        row["head"] = rank_correlation(guess.scores("head"), exact)
        k, wanted = len(heads) // 4, len(heads) // 8
        by_head = screen(guess.scores("head"), lambda c, e=exact: [e[x] for x in c], k, wanted=wanted, known=exact)
        few = slice(0, 12 if quick else 24)
        part = (base.model, base.tokenizer, prompts[few], sources[few], answers[few])
        by_neuron = screen(
            guess.scores("neuron"),
            lambda c, part=part: component_effects(*part, c, batch_size=256).mean(0),
            k=100,
            wanted=20,
            sample=100 if quick else 400,
            seed=base.seed,
        )
        row["neuron (verified and sampled)"] = by_neuron.correlation
        ranks[f"seed {base.seed}"] = {name: round(float(x), 3) for name, x in row.items()} | {
            f"exact effects, {kind}": rounded(single.effects[kind].mean(0)) for kind in MODULES
        }
        recalls[f"seed {base.seed}"] = {"heads": rounded_row(by_head.row()), "neurons, estimated": rounded_row(by_neuron.row())}
        good.append(min(row["attention"], row["head"]) >= 0.7)
        found_all.append((by_head.recall or 0) >= 0.75)
    return (
        {
            "claim": "first-order estimates rank attention modules and heads like exact patching (Spearman at least .7 on every seed)",
            "values": ranks,
            "interval": None,
            "holds": all(good),
        },
        {
            "claim": "verifying the quarter of heads with the highest estimates finds three quarters of the exact top eighth",
            "values": recalls,
            "interval": None,
            "holds": all(found_all),
        },
    )


def rounded_row(row: Row) -> Row:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}


def main(argv: Sequence[str] | None = None) -> None:
    def extend(parser: Any) -> None:
        parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        parser.add_argument("--variants", nargs="+", default=["world", "world-shallow"])

    given = arguments("creme_locate", __doc__ or "", argv, extend)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=r".*source runs are wrong")
    limit = 24 if given.quick else 80
    relations = []
    for variant in given.variants:
        bases = [load(variant, seed, limit) for seed in given.seeds]
        lens_row, peaks = through_lens(bases)
        more, gone = caused(bases, peaks)
        rows = {"R-1": gap(bases), "R-2": lens_row, "R-3a": more, "R-3b": gone}
        rows |= {f"R-4, {width} layers": located(bases, width) for width in WINDOWS}
        rows["F-1"], rows["F-2"] = screened(bases, given.quick)
        for number, row in rows.items():
            relations.append({"id": f"{number}/{variant}", **row})
            print(f"{number}/{variant}", "holds" if row["holds"] else "fails", flush=True)
    settings = {"cases": limit, "windows": list(WINDOWS), "answers": "probability of the answer's only token", "resamples": 2000}
    write_result(given.out, "creme_locate", given.seeds, settings, relations)


if __name__ == "__main__":
    main()
