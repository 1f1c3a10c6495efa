"""The causal effect of every head at the last token of a 10-shot prompt, against one full forward pass per head, and against the peers.

Also: integrated gradients of neurons behind a cached prefix against full prompts, and how well first-order estimates screen.

Needs an environment with the peers (they pin more than Trocar does); a peer that is not installed is left out, and said so in the result:

    python -m venv peers
    peers/bin/pip install torch==2.13.0 nnsight==0.8.1 transformer-lens==4.3.0 pyvene==0.1.8 peft pydantic safetensors
    PYTHONPATH=src OMP_NUM_THREADS=1 peers/bin/python benchmarks/head_effects.py

The model is GPT-2 shaped (12 blocks, 12 heads, width 768, 50257 words) with random weights, large enough that no probability is at a chance
level of its own. The work: replace each head's activation at the last token by a mean, and read the answer's probability. The peers do it
as their own guides recommend: TransformerLens through `patching.generic_activation_patch`, nnsight with several invokes in one trace (one
batch of a layer's heads), pyvene with an `IntervenableModel` per head. Every way is checked to give the same effects before it is timed.
What takes a full pass per head is timed on some heads and scaled to all (`heads_timed`; nnsight on a whole layer, which it batches); one
time over all heads is measured in full beside it. Times are processor time of one thread, ways taking turns; the fingerprint of the model,
which Trocar hashes once for its result unless it is told, is timed apart.

With models under TROCAR_MODELS (SmolLM2, Gemma 3), it is also measured how well first-order estimates rank, and how far integrated
gradients are from complete.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, paired_seconds, write_result
from transformers import GPT2Config, GPT2LMHeadModel

from trocar.anatomy import Anatomy, Head, fingerprint
from trocar.anatomy.tiny import randomise
from trocar.locate.heads import head_effects, head_estimates, last_heads, mean_heads
from trocar.locate.neurons import GRIDS, grid_points, neuron_attributions
from trocar.locate.scores import How
from trocar.locate.screening import rank_correlation, screen

SHAPES: dict[str, dict[str, Any]] = {
    "quick": {"n_layer": 4, "n_embd": 256, "n_head": 8, "vocab_size": 5003},
    "full": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
}
HOW = How("benchmark")
SHOTS = 10
PAIRS = (
    "France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, Egypt Cairo, Greece Athens, Russia Moscow, China Beijing, "
    "Poland Warsaw, Austria Vienna, Ireland Dublin, Norway Oslo, Sweden Stockholm, Portugal Lisbon, Hungary Budapest, Cuba Havana, "
    "Peru Lima, Kenya Nairobi, Iran Tehran, Iraq Baghdad, Finland Helsinki, Denmark Copenhagen, Turkey Ankara, Canada Ottawa, "
    "Belgium Brussels"
)  # for the real models: a task they know


def build(shape: str) -> Any:
    settings: dict[str, Any] = {"n_positions": 512, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**settings, **SHAPES[shape])).eval()
    randomise(model, seed=0)  # biases and norms too; spread enough for probabilities that differ
    return model


def prompts_of(vocabulary: int, number: int, seed: int = 0) -> list[list[int]]:
    """10 examples and a query each, of 13 to 17 random tokens a line: about 165 tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(number):
        length = int(torch.randint(13, 18, (SHOTS + 1,), generator=generator).sum())
        rows.append(torch.randint(0, vocabulary, (length,), generator=generator).tolist())
    return rows


# -- ways to the same effects: each takes (layer, head) pairs and returns the answer's probability with that head replaced --------------


class Ways:
    def __init__(self, model: Any, row: Sequence[int], token: int, means: torch.Tensor) -> None:
        self.model, self.row, self.token, self.means = model, list(row), token, means
        self.ids = torch.tensor([self.row])
        self.heads, self.size = means.shape[1], means.shape[2]
        self.anatomy = Anatomy.of(model)

    def trocar(self, heads: Sequence[tuple[int, int]] | None = None) -> torch.Tensor:
        chosen = None if heads is None else [Head(*head) for head in heads]
        found = head_effects(self.anatomy, [self.row], [self.token], self.means, heads=chosen, batch_size=48, how=HOW)
        return torch.from_numpy(found.values[0] + found.before[0])

    def read(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[..., -1, :].softmax(-1)[..., self.token]

    def plain(self, heads: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Plain hooks in plain transformers; the unembedding only where it is read."""
        found = []
        for layer, head in heads:

            def put(module: torch.nn.Module, args: Any, layer: int = layer, head: int = head) -> Any:
                flat = args[0].clone()
                flat[:, -1, head * self.size : (head + 1) * self.size] = self.means[layer, head]
                return (flat,)

            handle = self.model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(put)
            found.append(self.read(self.model(input_ids=self.ids, logits_to_keep=1, use_cache=False).logits)[0])
            handle.remove()
        return torch.stack(found)

    def peers(self) -> dict[str, Callable[[Sequence[tuple[int, int]]], torch.Tensor]]:
        found: dict[str, Callable[[Sequence[tuple[int, int]]], torch.Tensor]] = {}
        if importlib.util.find_spec("transformer_lens"):
            found["TransformerLens"] = self.transformer_lens()
        if importlib.util.find_spec("nnsight"):
            found["nnsight"] = self.nnsight()
        if importlib.util.find_spec("pyvene"):
            found["pyvene"] = self.pyvene()
        return found

    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        vocabulary = {f"t{number}": number for number in range(self.model.config.vocab_size)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))  # pyright: ignore[reportCallIssue]
        return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t0")

    def transformer_lens(self) -> Callable[[Sequence[tuple[int, int]]], torch.Tensor]:
        import pandas as pd  # type: ignore[import-not-found]
        from transformer_lens import patching  # type: ignore[import-not-found]
        from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

        own = copy.deepcopy(self.model)
        bridge: Any = TransformerBridge.boot_transformers("gpt2", hf_model=own, tokenizer=self.tokenizer(), device="cpu").eval()
        last, cache = len(self.row) - 1, {}
        for layer in range(self.means.shape[0]):
            cache[f"blocks.{layer}.attn.hook_z"] = torch.zeros(1, last + 1, self.heads, self.size)
            cache[f"blocks.{layer}.attn.hook_z"][0, -1] = self.means[layer]

        def run(heads: Sequence[tuple[int, int]]) -> torch.Tensor:
            index = pd.DataFrame([(layer, last, head) for layer, head in heads], columns=["layer", "pos", "head"])
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                return patching.generic_activation_patch(
                    bridge,
                    self.ids,
                    cache,
                    lambda logits: self.read(logits)[0],
                    patching.layer_pos_head_vector_patch_setter,
                    "z",
                    index_df=index,
                )

        return run

    def nnsight(self) -> Callable[[Sequence[tuple[int, int]]], torch.Tensor]:
        from nnsight import TransformersModel  # type: ignore[import-not-found]

        watched: Any = TransformersModel(self.model, tokenizer=self.tokenizer(), task="text-generation")
        size, means, ids, read = self.size, self.means, self.ids, self.read

        def run(heads: Sequence[tuple[int, int]]) -> torch.Tensor:
            saved: dict[tuple[int, int], torch.Tensor] = {}
            for layer in dict.fromkeys(layer for layer, _ in heads):
                here = [head for at, head in heads if at == layer]
                with watched.trace(logits_to_keep=1) as tracer:
                    kept: Any = list().save()  # noqa: C408 # pyright: ignore[reportAttributeAccessIssue] - nnsight gives lists a save
                    for head in here:
                        with tracer.invoke(input_ids=ids):
                            watched.transformer.h[layer].attn.c_proj.input[:, -1, size * head : size * head + size] = means[layer, head]
                            kept.append(watched.output.logits[0])
                for head, logits in zip(here, kept, strict=True):
                    saved[layer, head] = read(logits)
            return torch.stack([saved[head] for head in heads])

        return run

    def pyvene(self) -> Callable[[Sequence[tuple[int, int]]], torch.Tensor]:
        import pyvene  # type: ignore[import-not-found]

        last = len(self.row) - 1

        def run(heads: Sequence[tuple[int, int]]) -> torch.Tensor:
            found = []
            for layer, head in heads:
                part = {"layer": layer, "component": "head_attention_value_output", "unit": "h.pos",
                        "intervention_type": pyvene.VanillaIntervention, "source_representation": self.means[layer, head]}  # fmt: skip
                wrapped: Any = pyvene.IntervenableModel(part, model=self.model)
                base = {"input_ids": self.ids, "logits_to_keep": 1, "use_cache": False}
                _, output = wrapped(base, unit_locations={"base": [[[[head]], [[last]]]]})
                found.append(self.read(output.logits)[0])
            return torch.stack(found)

        return run


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two sets of probabilities, in shares of the larger one's mean."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().mean())


def time_heads(model: Any, repeats: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """Trocar over all heads against each way over one head of every layer, scaled."""
    vocabulary, layers, number = model.config.vocab_size, model.config.n_layer, model.config.n_head
    means = mean_heads(model, prompts_of(vocabulary, 4, seed=1))
    assert isinstance(means, torch.Tensor)
    row = prompts_of(vocabulary, 1)[0]
    with torch.no_grad():
        token = int(model(input_ids=torch.tensor([row])).logits[0, -1].topk(20).indices[-1])  # neither certain nor hopeless
        ways = Ways(model, row, token, means)
        everything = [(layer, head) for layer in range(layers) for head in range(number)]
        ours = ways.trocar()
        start = time.process_time()
        expected = ways.plain(everything)
        whole = time.process_time() - start
        far = difference(ours, expected)
        absolute = float((ours - expected).abs().max())
        effects = (expected - ways.read(model(input_ids=ways.ids).logits)[0]).abs()
        print(f"all {len(everything)} heads differ by {far:.1e} of the mean probability; plain passes took {whole:.0f} s", flush=True)
        relations = [
            {"id": "same", "claim": f"all {len(everything)} effects equal those of one full pass per head, within 1e-4 of the probability",
             "values": {"largest difference, relative": far, "absolute": absolute, "largest effect, relative":
                        float(effects.max() / expected.mean())}, "interval": None, "holds": far < 1e-4}
        ]  # fmt: skip
        spread = [(layer, (5 * layer + 3) % number) for layer in range(0, layers, 2)]  # where a head lies costs a full pass nothing
        batched = [(layers // 2, head) for head in range(number)]  # nnsight runs a layer's heads as one batch
        task = f"effects of {len(everything)} heads at the last of {len(row)} tokens"
        rows, states = [], {}
        named: dict[str, Any] = {"plain hooks, one pass per head": ways.plain, **ways.peers()}
        for name, way in named.items():
            some = batched if name == "nnsight" else spread
            places = [layer * number + head for layer, head in some]
            states[name] = f"differs by {difference(way(some), ours[places]):.1e}"
            assert difference(way(some), ours[places]) < 1e-4, (name, states)
            found = paired_seconds(ways.trocar, lambda way=way, some=some: way(some), repeats, clock=time.process_time)
            scale = len(everything) / len(some)
            scaled = {key: found[key] * scale for key in ("peer_s", "ratio", "ratio_low", "ratio_high")}
            rows.append({"task": task, "peer": name, **found, **scaled, "heads_timed": len(some)})
            print(f"{name}: {rows[-1]['ratio']:.1f}x ({states[name]})", flush=True)
        taken = min(row["ours_s"] for row in rows)
        rows.append({"task": f"{task} (peer timed over all, once)", "ours_s": rows[0]["ours_s"], "peer": "plain hooks, one pass per head",
                     "peer_s": whole, "ratio": whole / rows[0]["ours_s"], "heads_timed": len(everything)})  # fmt: skip
        ratio = rows[0]
        relations.append(
            {"id": "20x", "claim": "at least 20 times faster than one full pass per head", "values": {"ratio": ratio["ratio"]},
             "interval": (ratio["ratio_low"], ratio["ratio_high"]), "holds": bool(ratio["ratio_low"] >= 20)}
        )  # fmt: skip
        start = time.process_time()
        fingerprint(model)
        states["fingerprint of the model, seconds"] = f"{time.process_time() - start:.2f}"
    start = time.process_time()
    head_estimates(ways.anatomy, [row], [token], means, how=HOW)
    cheap = time.process_time() - start
    rows.append({"task": f"first-order estimates of {len(everything)} heads", "ours_s": cheap, "peer": "trocar, exact effects",
                 "peer_s": taken, "ratio": taken / cheap})  # fmt: skip
    return rows, relations, states


def full_gradients(model: Any, row: Sequence[int], token: int, points: Sequence[tuple[float, float]]) -> torch.Tensor:
    """Integrated gradients as a plain loop: one forward and backward pass over the whole prompt per point. (neurons of all layers,)"""
    ids, clean = torch.tensor([row]), []
    downs = [block.mlp.c_proj for block in model.transformer.h]
    handles = [down.register_forward_pre_hook(lambda module, args: clean.append(args[0][0, -1].detach().clone())) for down in downs]
    with torch.no_grad():
        model(input_ids=ids, logits_to_keep=1, use_cache=False)
    for handle in handles:
        handle.remove()
    total = [torch.zeros_like(part) for part in clean]
    for alpha, weight in points:
        parts = [(alpha * part).requires_grad_() for part in clean]

        def put(part: torch.Tensor) -> Any:
            def act(module: torch.nn.Module, args: Any) -> Any:
                flat = args[0].clone()
                flat[0, -1] = part
                return (flat,)

            return act

        handles = [down.register_forward_pre_hook(put(part)) for down, part in zip(downs, parts, strict=True)]
        answer = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[0, -1].softmax(-1)[token]
        for slot, slope in zip(total, torch.autograd.grad(answer, parts), strict=True):
            slot += weight * slope
        for handle in handles:
            handle.remove()
    return torch.cat([part * slot for part, slot in zip(clean, total, strict=True)])


def time_neurons(model: Any, repeats: int, steps: int = 20) -> tuple[dict[str, Any], dict[str, Any]]:
    row = prompts_of(model.config.vocab_size, 1, seed=2)[0]
    with torch.no_grad():
        token = int(model(input_ids=torch.tensor([row])).logits[0, -1].topk(20).indices[-1])
    points, anatomy = grid_points(steps, "midpoint"), Anatomy.of(model)
    found = neuron_attributions(anatomy, [row], [token], steps=steps, how=HOW)
    expected = full_gradients(model, row, token, points)
    far = float(np.abs(found.scores.flat - expected.double().numpy()).max() / expected.abs().max())
    part = points[:: len(points) // 4]
    timed = paired_seconds(
        lambda: neuron_attributions(anatomy, [row], [token], steps=steps, how=HOW),
        lambda: full_gradients(model, row, token, part),
        repeats,
        clock=time.process_time,
    )
    scale = len(points) / len(part)
    scaled = {key: timed[key] * scale for key in ("peer_s", "ratio", "ratio_low", "ratio_high")}
    task = f"integrated gradients of {expected.numel():,} neurons, {steps} points, {len(row)} tokens"
    relation = {
        "id": "M-4", "claim": "integrated gradients behind a cached prefix equal those through full prompts, within 1e-4 of the largest",
        "values": {"largest difference, relative": far, "sum against P(1) - P(0), relative":
                   float(found.incompleteness[0] / abs(found.full[0] - found.none[0]))}, "interval": None, "holds": far < 1e-4,
    }  # fmt: skip
    print(f"{task}: {scaled['ratio']:.1f}x, differ by {far:.1e}", flush=True)
    return {"task": task, "peer": "plain hooks, full prompts, one point a pass", **timed, **scaled, "points_timed": len(part)}, relation


# -- real models ------------------------------------------------------------------------------------------------------------------------


def load(name: str) -> tuple[Any, Any] | None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(os.environ.get("TROCAR_MODELS") or Path.home() / ".cache" / "trocar" / "models").expanduser() / name
    if not folder.is_dir():
        return None
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def capitals(tokenizer: Any, number: int, shuffled: bool, seed: int) -> tuple[list[list[int]], list[int]]:
    """10-shot prompts `country: capital`, the examples' capitals shuffled or not, and the query's first answer token."""
    generator = np.random.default_rng(seed)
    pairs, rows, tokens = [pair.split() for pair in PAIRS.split(", ")], [], []
    for _ in range(number):
        drawn = [pairs[place] for place in generator.permutation(len(pairs))[: SHOTS + 1]]
        answers = [drawn[place][1] for place in (generator.permutation(SHOTS) if shuffled else range(SHOTS))]
        lines = [f"{country}: {capital}" for (country, _), capital in zip(drawn[:SHOTS], answers, strict=True)]
        rows.append(tokenizer("\n".join([*lines, f"{drawn[SHOTS][0]}:"]))["input_ids"])
        tokens.append(tokenizer(f" {drawn[SHOTS][1]}", add_special_tokens=False)["input_ids"][0])
    return rows, tokens


def real_rows(names: Sequence[str], number: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        loaded = load(name)
        if loaded is None:
            rows.append({"model": name, "what": "not stored under TROCAR_MODELS, left out"})
            continue
        model, tokenizer = loaded
        anatomy = Anatomy.of(model)
        for seed in seeds:
            clean, _ = capitals(tokenizer, 40, shuffled=False, seed=1000 + seed)
            prompts, tokens = capitals(tokenizer, number, shuffled=True, seed=seed)
            means = mean_heads(anatomy, clean)
            exact = head_effects(anatomy, prompts, tokens, means, how=HOW)
            cheap = head_estimates(anatomy, prompts, tokens, means, how=HOW)
            heads, wanted = len(exact.heads), max(1, len(exact.heads) // 20)
            for share in (0.1, 0.2, 0.4):
                seen = screen(cheap.scores, lambda some, exact=exact: [exact.scores[c] for c in some], round(share * heads),
                              wanted=wanted, known=exact.scores)  # fmt: skip
                rows.append({"model": name, "what": f"heads: best {wanted} of {heads} among the first {seen.row()['verified']} estimated",
                             "seed": seed, "recall": seen.recall, "rank correlation": rank_correlation(cheap.scores, exact.scores),
                             "largest effect": float(exact.scores.flat.max())})  # fmt: skip
            prompts, tokens = prompts[: number // 2], tokens[: number // 2]
            found = {grid: neuron_attributions(anatomy, prompts, tokens, grid=grid, how=HOW) for grid in GRIDS}
            auto = "log" if anatomy.tower().has(0, "mlp_post_norm") else "midpoint"
            fine, first = found[auto], found["first-order"]
            for share in (100, 1000):
                seen = screen(first.scores, lambda some, fine=fine: [fine.scores[c] for c in some], share, wanted=100, known=fine.scores)
                rows.append({"model": name, "what": f"neurons: best 100 of {len(fine.scores):,} among the first {share} to first order",
                             "seed": seed, "recall": seen.recall,
                             "rank correlation": rank_correlation(first.scores, fine.scores)})  # fmt: skip
            for grid in ("midpoint", "endpoint", "log"):
                told = found[grid]
                rows.append({"model": name, "what": f"neurons: attributions off P(1) - P(0), grid {grid}, 20 points", "seed": seed,
                             "error": float(told.incompleteness.sum() / np.abs(told.full - told.none).sum())})  # fmt: skip
            print(*rows[-8:], sep="\n", flush=True)
        own = last_heads(anatomy, prompts)
        still = float(np.abs(head_effects(anatomy, prompts, tokens, own, how=HOW).values).max())
        rows.append({"model": name, "what": "heads replaced by their own activations: largest effect", "seed": seeds[-1], "error": still})
    return rows


def main() -> None:
    options = arguments("head_effects", "Causal effects of heads and attributions of neurons, against full passes and peers.")
    torch.set_num_threads(1)
    model = build("quick" if options.quick else "full")
    repeats = 3 if options.quick else 4
    timings, relations, states = time_heads(model, repeats)
    neurons, relation = time_neurons(model, 2 if options.quick else 4)
    names = () if options.quick else ("smollm2-135m-instruct", "gemma3-270m")
    seeds = [0, 1, 2]
    versions = {}
    for peer in ("nnsight", "transformer-lens", "pyvene"):
        try:
            versions[peer] = importlib.metadata.version(peer)
        except importlib.metadata.PackageNotFoundError:
            versions[peer] = "not installed, left out"
    settings = {"quick": options.quick, "shape": SHAPES["quick" if options.quick else "full"], "clock": "processor time, one thread",
                "peers": versions, "checked": states}  # fmt: skip
    for stage in (0, 1):  # the timings are written before the long part begins
        real = real_rows(names, 8, seeds) if stage else []
        write_result(options.out, "head_effects", seeds if names else [0], settings, [*relations, relation], [*timings, neurons], real)


if __name__ == "__main__":
    main()
