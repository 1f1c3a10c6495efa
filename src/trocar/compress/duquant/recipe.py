"""DuQuant as a recipe's method: quantise a language model, show what it costs in quality and what it saves. Floor 5."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import pydantic
import torch

from trocar.anatomy import Anatomy, fingerprint
from trocar.compress.duquant.blocks import BlockResult
from trocar.compress.duquant.config import DuQuantConfig
from trocar.compress.duquant.diagnostics import captured, outlier_figures
from trocar.compress.duquant.model import QuantisedModel, quantise
from trocar.core.errors import DataError
from trocar.evaluate import Measurement, perplexity, perplexity_measurement
from trocar.method import Estimate, Figure, Job, Method, Outcome, Transcript
from trocar.patch import Patch
from trocar.patch.ops.quantise import Quantise
from trocar.patch.quantised import MODES, memory
from trocar.trace.queries import continuations, encode


class RecipeConfig(DuQuantConfig):
    """Settings of the quantisation, and how much is read. windows: of calibration text; test_windows: of held-out text; window_tokens:
    length of both; max_new_tokens: of the continuations that the report shows."""

    windows: int = pydantic.Field(default=16, ge=1)
    test_windows: int = pydantic.Field(default=12, ge=1)
    window_tokens: int = pydantic.Field(default=512, ge=2)
    max_new_tokens: int = pydantic.Field(default=32, ge=1)

    def quantisation(self) -> DuQuantConfig:
        return DuQuantConfig(**{name: getattr(self, name) for name in DuQuantConfig.model_fields})


def run(job: Job) -> Outcome:
    """Quantise, make the patch, measure the model with and without it."""
    config: RecipeConfig = job.config
    anatomy = Anatomy.of(job.model)
    base = fingerprint(anatomy.model)
    windows = cut(_stream(job, "calibration", config.windows * config.window_tokens), config.window_tokens, "data.calibration")
    count = len(windows)
    inputs = {"input_ids": windows.to(_device(anatomy))}
    done = quantise(anatomy, inputs, config.quantisation(), job.seed)
    errors, places = done.errors, _places(done)
    patch = done.patch(**config.model_dump(mode="json"))
    prompts = _prompts(job)
    before = continuations(anatomy, job.processor, prompts, config.max_new_tokens, None) if prompts else []
    held_out = _stream(job, "held_out", config.test_windows * config.window_tokens)
    window = {"input_ids": held_out[: config.window_tokens][None].to(_device(anatomy))}
    transforms = {op.names[0]: op.layers[0].shared.transform for op in patch.ops if isinstance(op, Quantise)}
    floats = captured(anatomy.model, list(transforms), window)
    float_perplexity = perplexity(anatomy.model, held_out, config.window_tokens)
    with patch.applied(anatomy, verify="structure"):
        after = continuations(anatomy, job.processor, prompts, config.max_new_tokens, None) if prompts else []
        state = fingerprint(anatomy.model)
        received = captured(anatomy.model, list(transforms), window)
        measured: list[Measurement] = [
            perplexity_measurement(float_perplexity, perplexity(anatomy.model, held_out, config.window_tokens), (base, state))
        ]
    shown = () if not prompts else (_transcript(prompts, [one.text for one in before], [one.text for one in after]),)
    return Outcome(
        patch,
        measured,
        {},
        [*_figures(errors, places), *outlier_figures(floats, received, transforms)],
        (),
        _log(config, anatomy, patch, errors, count),
        shown,
        {"held_out": window},
    )


def _device(anatomy: Anatomy) -> torch.device:
    return next(anatomy.model.parameters()).device


def _stream(job: Job, role: str, count: int) -> torch.Tensor:
    """The first `count` tokens of a role's texts."""
    fields = job.data[role].fields
    if "text" not in fields:
        raise DataError(f"data.{role} has no column 'text'.", f"It has {', '.join(fields)}; rename one with `columns`.")
    return stream(fields["text"], job.processor, count, f"data.{role}")


def stream(texts: Iterable[Any], tokenizer: Any, count: int, where: str) -> torch.Tensor:
    """The first `count` tokens of the texts, (at most count,), each text followed by a line end. where: what holds them, for the error.
    Raises DataError for fewer than two."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(f"{text}\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            break
    if len(ids) < 2:
        raise DataError(f"{where} has {len(ids)} tokens of text.", "Give more.")
    return torch.tensor(ids[:count])


def cut(tokens: torch.Tensor, length: int, where: str) -> torch.Tensor:
    """A stream (n,) as windows (n // length, length); what is left over falls away. Raises DataError if it does not fill one."""
    count = len(tokens) // length
    if count < 1:
        raise DataError(f"{where} has {len(tokens)} tokens, fewer than one window of {length}.", "Give more text, or shorter windows.")
    return tokens[: count * length].reshape(count, length)


def _prompts(job: Job) -> list[str]:
    if "prompts" not in job.data:
        return []
    fields = job.data["prompts"].fields
    column = next((name for name in ("prompt", "text") if name in fields), None)
    if column is None:
        raise DataError("data.prompts has no column 'prompt' or 'text'.", f"It has {', '.join(fields)}; rename one with `columns`.")
    return [str(text) for text in fields[column]]


def _transcript(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Transcript:
    """What float and quantised model answer; nothing is known to be right or wrong here."""
    caption = "Greedy continuations of the float model and of the quantised one."
    return Transcript("continuations", "Continuations before and after", prompts, before, after, [""] * len(prompts), caption=caption)


def _places(done: QuantisedModel) -> dict[str, tuple[int, str]]:
    """Path of a layer -> its block and the end of its name."""
    return {path: (number, path.rpartition(".")[2]) for number, block in enumerate(done.blocks) for path in _paths(block)}


def _paths(block: BlockResult) -> list[str]:
    return list(block.layers)


def _figures(errors: dict[str, float], places: dict[str, tuple[int, str]]) -> list[Figure]:
    layers = [{"layer": places[path][1], "block": places[path][0], "error": value} for path, value in errors.items() if path in places]
    blocks = [{"block": int(name[1:]), "error": value, "what": "output"} for name, value in errors.items() if name not in places]
    found = [
        Figure(
            "layer_errors",
            "Output error of every layer",
            "heatmap",
            "layer",
            "block",
            layers,
            "error",
            caption="Relative error of a quantised layer's output on the float model's inputs (calibration text, without first positions).",
        )
    ]
    if blocks:
        caption = "Relative error of the hidden states after each block, all blocks before it quantised too."
        found.append(Figure("block_errors", "How the error grows", "curve", "block", "error", blocks, series="what", caption=caption))
    return found


def _log(config: RecipeConfig, anatomy: Anatomy, patch: Patch, errors: dict[str, float], windows: int) -> dict[str, Any]:
    quantised = [op for op in patch.ops if isinstance(op, Quantise)]
    weights = sum(layer.out_features * layer.in_features for op in quantised for layer in op.layers)
    stored = sum(spec.nbytes for op in quantised for spec in op.record().specs().values())
    dtype = next(anatomy.model.parameters()).dtype
    width = dtype.itemsize
    kept = {mode: size for mode, size in memory([layer for op in quantised for layer in op.layers], dtype).items() if mode in MODES}
    layers = {name: error for name, error in errors.items() if "." in name}
    worst = max(layers, key=lambda name: layers[name])
    return {
        "bits": f"W{config.weights.bits}A{config.activations.bits}",
        "layers": len(layers),
        "quantised weights": weights,
        "bytes of these layers": {"float": weights * width, "quantised": stored, "bits a weight": 8 * stored / weights},
        "bytes kept beside these by mode": kept,
        "calibration": f"{windows} windows of {config.window_tokens} tokens",
        "mean output error of a layer": sum(layers.values()) / len(layers),
        "worst layer": {worst: layers[worst]},
        "in float": "embeddings, norms, head, the softmax" + (", queries, keys and values" if config.attention is None else ""),
        "execution": "simulated here: float products of rounded values; trocar.patch.quantised.execute runs them in integers",
        "undo": "patch.revert(), or leave the patch off: the base is unchanged",
    }


def estimate(job: Job) -> Estimate:
    """Time one window, and multiply by the passes over all blocks; the search adds about as much on small models."""
    config: RecipeConfig = job.config
    anatomy = Anatomy.of(job.model)
    tower = anatomy.tower()
    inputs = encode(anatomy, job.processor, [str(job.data["calibration"].fields["text"][0])])
    inputs = {name: value[:, : config.window_tokens] for name, value in inputs.items()}
    with torch.no_grad():
        anatomy.model(**inputs, use_cache=False)
        start = time.perf_counter()
        anatomy.model(**inputs, use_cache=False)
    token = (time.perf_counter() - start) / inputs["input_ids"].shape[1]
    passes = 6 + {"nearest": 0, "gptq": 3, "gptaq": 9}[config.weights.rounding]
    if config.weights.clip == "learned":
        passes += 3 * config.learning.epochs
    seconds = token * config.window_tokens * (config.windows * passes + 2 * config.test_windows)
    largest = max(tower.neurons(layer) for layer in range(tower.n_layers))
    rows = min(config.rows, config.windows * config.window_tokens)
    block = sum(parameter.numel() for parameter in tower.blocks[0].parameters())
    peak = 4 * (3 * rows * largest + 4 * config.windows * config.window_tokens * tower.width + 4 * block)
    peak += 4 * largest**2 * {"nearest": 0, "gptq": 3, "gptaq": 8}[config.weights.rounding]
    return Estimate(
        int(peak), float(seconds * 1.5), f"{token * 1e3:.3g} ms a token on this machine; {passes} passes over the calibration text"
    )


STARTER = """\
# Quantise a language model's linear layers to 4-bit weights and activations, and see what it costs.
version: 1
seed: 0
model: path/to/model            # a Hugging Face language model

data:
  calibration:                  # text to find scales and rotations on (column text)
    source: wikitext2:valid
  held_out:                     # text to measure perplexity on
    source: wikitext2:test

method:
  name: duquant
  weights: {bits: 4, clip: search, rounding: gptaq}   # rounding: nearest is the published form
  activations: {bits: 4, clip: search}   # 16 leaves them alone, 8 costs far less quality than 4
  smoothing: {alpha: 0.5, measure: rms}  # paper: {alpha: 0.6}
  chain: {steps: [rotate, permute, rotate], search_steps: 16}
  keep: {}                      # layers with bits of their own, such as L1.mlp.down: 8
  windows: 16                   # of calibration text

checks:
  - {measurement: perplexity, statistic: ratio, op: "<", threshold: 1.5}
"""

METHOD = Method(
    name="duquant",
    title="DuQuant",
    paper="arXiv 2406.01721",
    summary="quantise weights and activations to low bits after rotations and a permutation that spread outliers",
    config=RecipeConfig,
    roles={
        "calibration": "text (column `text`) on which scales, rotations and permutations are found",
        "held_out": "other text (column `text`), to measure perplexity on",
        "prompts?": "prompts (column `prompt` or `text`) whose continuations the report shows side by side",
    },
    run=run,
    estimate=estimate,
    starter=STARTER,
    default_checks=({"measurement": "perplexity", "statistic": "ratio", "op": "<", "threshold": 1.5},),
    reads="texts",
)
