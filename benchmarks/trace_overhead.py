"""What reading and intervening cost: against the bare model, nnsight and TransformerLens. Sweeps over heads: `head_effects.py`.

Needs an environment with both peers (they pin more than Trocar does):

    python -m venv peers && peers/bin/pip install torch==2.13.0 nnsight==0.8.1 transformer-lens==4.3.0 peft pydantic safetensors
    PYTHONPATH=src OMP_NUM_THREADS=1 peers/bin/python benchmarks/trace_overhead.py --quick

A peer that is not installed is left out, and said so in the result. All models are GPT-2 shaped with random weights and eager attention
(TransformerLens asks for it): `small` has 12 blocks of width 768, `tiny` 12 of width 32, where a pass is so short that overheads show.
The peers open a context for every pass; Trocar is measured so, and with one context for ten passes. Every way of recording is checked to
give the same tensor before it is timed. The ways take turns within a round; reported is the median over rounds of (pass with recording -
that tool's own pass without), with the 95 % interval of the median from the order statistics, in processor time (the untouched model:
wall time).
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, paired_seconds, write_result
from transformers import GPT2Config, GPT2LMHeadModel

from trocar.anatomy import Anatomy
from trocar.trace import Scale, intervene, record, sweep

POINT = "L5.resid_post"
PASSES = 10
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"n_embd": 32, "n_head": 4, "vocab_size": 64},
    "small": {"n_embd": 768, "n_head": 12, "vocab_size": 50257},
}


def build(shape: str) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"n_layer": 12, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}
    return GPT2LMHeadModel(GPT2Config(**settings, **SHAPES[shape])).eval()


def processor_seconds(work: Callable[[], object]) -> float:
    """Processor time of one call: microseconds are to be told apart, and a shared machine's other work must not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules())


def recorders(model: Any, ids: torch.Tensor) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """name -> (that tool's pass that records POINT and returns it, its pass without recording)."""
    anatomy = Anatomy.of(model)

    def plain() -> Any:
        return model(input_ids=ids).logits

    def ours() -> torch.Tensor:
        with record(anatomy, POINT) as rec:
            model(input_ids=ids)
        return rec[POINT]

    def hook() -> torch.Tensor:
        kept: list[torch.Tensor] = []
        handle = model.transformer.h[5].register_forward_hook(lambda module, args, output: kept.append(output.detach()))
        model(input_ids=ids)
        handle.remove()
        return kept[0]

    found: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "trocar": (ours, plain),
        "a bare PyTorch hook": (hook, plain),
    }
    if importlib.util.find_spec("nnsight"):
        from nnsight import NNsight  # type: ignore[import-not-found]

        watched: Any = NNsight(model)

        def with_nnsight() -> torch.Tensor:
            with watched.trace(input_ids=ids):
                kept = watched.transformer.h[5].output.save()
            return kept

        found["nnsight"] = (with_nnsight, plain)
    if importlib.util.find_spec("transformer_lens"):
        from tokenizers import Tokenizer, models
        from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]
        from transformers import PreTrainedTokenizerFast

        vocabulary = {f"t{number}": number for number in range(model.config.vocab_size)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), eos_token="t0")
        bridge: Any = TransformerBridge.boot_transformers("gpt2", hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu").eval()

        def with_lens() -> torch.Tensor:
            _, cache = bridge.run_with_cache(ids, names_filter="blocks.5.hook_resid_post")
            return cache["blocks.5.hook_resid_post"]

        found["TransformerLens"] = (with_lens, lambda: bridge(ids))
    return found


def time_recorders(shape: str, rounds: int) -> dict[str, dict[str, float]]:
    model = build(shape)
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (1, 16), generator=torch.Generator().manual_seed(1))
    ways = recorders(model, ids)
    expected = ways["a bare PyTorch hook"][0]()
    for name, (recording, plain) in ways.items():
        torch.testing.assert_close(recording(), expected, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(plain(), model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    extra: dict[str, list[float]] = {name: [] for name in ways}
    passes: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds + 3):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            recording, plain = ways[name]
            pair = (recording, plain) if number % 2 else (plain, recording)
            seconds = [processor_seconds(work) for work in pair]
            with_, without = seconds if number % 2 else seconds[::-1]
            if number >= 3:  # the first rounds warm up
                extra[name].append(with_ - without)
                passes[name].append(without)
    return {name: {**median_interval(extra[name]), "plain_pass_s": statistics.median(passes[name])} for name in names}


def time_standing(shape: str, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Recording, and a bare hook, over several passes in one context: what the recorded point itself costs a pass."""
    model = build(shape)
    anatomy, ids = Anatomy.of(model), torch.arange(16)[None]
    latest: list[torch.Tensor] = []

    def plain() -> None:
        for _ in range(PASSES):
            model(input_ids=ids)

    def ours() -> None:
        with record(anatomy, POINT):
            plain()

    def bare() -> None:
        handle = model.transformer.h[5].register_forward_hook(lambda module, args, output: latest.append(output.detach()))
        plain()
        handle.remove()
        latest.clear()

    ways = {"ours": ours, "plain": plain, "bare": bare}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for place in range(3):
            name = list(ways)[(number + place) % 3]
            seconds[name].append(processor_seconds(ways[name]) / PASSES)
    extra = [[with_ - without for with_, without in zip(seconds[name], seconds["plain"], strict=True)][1:] for name in ("ours", "bare")]
    return median_interval(extra[0]), median_interval(extra[1])


def compared(task: str, mine: dict[str, float], peer: str, row: dict[str, float]) -> dict[str, Any]:
    """A row of the result. Where noise hides either time (its interval reaches below zero) there is no ratio."""
    resolved = mine["low_s"] > 0 and row["low_s"] > 0
    intervals = {"ours_interval_s": [mine["low_s"], mine["high_s"]], "peer_interval_s": [row["low_s"], row["high_s"]]}
    ratio = row["median_s"] / mine["median_s"] if resolved else None
    return {"task": task, "ours_s": mine["median_s"], "peer": peer, "peer_s": row["median_s"], "ratio": ratio, **intervals}


def median_interval(values: list[float]) -> dict[str, float]:
    """Median with the 95 % interval from order statistics (binomial, normal approximation)."""
    ordered, n = sorted(values), len(values)
    half = 0.98 * n**0.5
    low, high = max(0, int(n / 2 - half)), min(n - 1, int(n / 2 + half) + 1)
    return {"median_s": statistics.median(ordered), "low_s": ordered[low], "high_s": ordered[high]}


def time_untouched(rounds: int) -> dict[str, Any]:
    """A pass of a model that Trocar has worked on, against one that it never saw."""
    fresh, used = build("tiny"), build("tiny")
    ids = torch.arange(16)[None]
    for _ in range(3):
        with record(used, [POINT, "L2.heads"]), intervene(used, [Scale("L3.H1", 0.0), Scale("L7", 0.5)]):
            used(input_ids=ids)
        sweep(used, {"input_ids": ids}, [Scale("L3.H1", 0.0)], lambda output, rows: output.logits[:, -1, 0])
    assert hooks(used) == 0
    assert torch.equal(fresh(input_ids=ids).logits, used(input_ids=ids).logits)
    return paired_seconds(lambda: used(input_ids=ids), lambda: fresh(input_ids=ids), rounds)


def main() -> None:
    options = arguments("trace", "What reading and intervening cost.")
    rounds = {"tiny": 300 if options.quick else 1000, "small": 40 if options.quick else 200}
    timings: list[dict[str, Any]] = []
    with torch.no_grad():
        timings.append(
            {"task": "one pass, no intervention active (tiny)", "peer": "a model that Trocar never touched", **time_untouched(200)}
        )
        passes = {}
        for shape in SHAPES:
            gc.collect()
            measured = time_recorders(shape, rounds[shape])
            passes[shape] = {name: row["plain_pass_s"] for name, row in measured.items()}
            for peer, row in measured.items():
                if peer != "trocar":
                    timings.append(
                        compared(f"record {POINT}, a context for every pass, time beyond it ({shape})", measured["trocar"], peer, row)
                    )
            mine, bare = time_standing(shape, rounds[shape] // 5)
            task = f"record {POINT}, one context for {PASSES} passes, time per pass beyond it ({shape})"
            timings.append(compared(task, mine, "a bare PyTorch hook", bare))
    versions = {}
    for peer in ("nnsight", "transformer-lens"):
        try:
            versions[peer] = importlib.metadata.version(peer)
        except importlib.metadata.PackageNotFoundError:
            versions[peer] = "not installed, left out"
    settings = {"quick": options.quick, "rounds": rounds, "peers": versions, "plain_pass_s": passes}
    write_result(options.out, "trace", [0], settings, timings=timings)
    for row in timings:
        ratio = "not resolved" if row["ratio"] is None else f"ratio {row['ratio']:.2f}"
        print(f"{row['task']}: {row['ours_s'] * 1e6:.0f} us; {row['peer']} {row['peer_s'] * 1e6:.0f} us; {ratio}")


if __name__ == "__main__":
    main()
