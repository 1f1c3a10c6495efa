"""What `trocar quantise-check` does. Floor 7. Imported when it runs."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trocar.cli import show
from trocar.cli.quantising import read_tokens, weights_bytes
from trocar.core.errors import ConfigError, DataError, MissingExtraError, UnsupportedModelError, nearest

if TYPE_CHECKING:
    import torch

    from trocar.evaluate import Perplexity

EXECUTE = ("auto", "simulated", "integer", "packed", "float8")
TIMED = 3  # windows that the reading speed is the median of


@dataclass(frozen=True)
class Request:
    """The command as it was given."""

    folder: Path
    model: str
    text: str
    column: str
    windows: int
    window_tokens: int
    execute: str
    prompts: Sequence[str]
    max_new_tokens: int
    dtype: str
    device: str
    seed: int


@dataclass
class Side:
    """What was found of one model."""

    perplexity: Perplexity
    state: str
    reading: float
    writing: float
    said: list[str]
    runs: str = ""


def check_quantised(asked: Request, as_json: bool) -> None:
    """Measure a quantised folder beside the float model, one after the other, so that never both are in memory."""
    if asked.execute not in EXECUTE:
        raise ConfigError(f"--execute {asked.execute} is not known.", nearest(asked.execute, EXECUTE))
    from trocar.recipe.schema import ModelSource

    source = ModelSource.parse({"source": asked.model, "dtype": asked.dtype, "device": asked.device}, "model")
    from trocar.compress.duquant.folders import kind_of
    from trocar.recipe.models import load_model, load_tokenizer, refuse_speechless

    kind = kind_of(asked.folder)
    if asked.execute != "auto" and kind != "trocar":
        raise ConfigError(f"--execute chooses for folders of the form trocar; {asked.folder} is {kind}.", "Leave it out.")
    tokenizer = load_tokenizer(asked.model)
    with show.interruptible():
        model: Any = load_model(source)
        refuse_speechless(model, asked.model)
        tokens = read_tokens(asked.text, asked.column, tokenizer, asked.windows * asked.window_tokens, "--text", model)
        generation, shape = model.generation_config, _shape(model)
        before = _measure(asked, model, tokenizer, tokens)
        del model
        gc.collect()
        quantised, runs = load_any(asked.folder, kind, source)
        if _shape(quantised) != shape:
            raise DataError(f"{asked.folder} is not {asked.model}: its shape differs.", "Name the model it was made from.")
        quantised.generation_config = generation  # both end where the float model ends
        with _without_bars():
            after = _measure(asked, quantised, tokenizer, tokens)
        after.runs = runs(quantised)
    _tell(asked, before, after, as_json)


def load_any(folder: Path, kind: str, source: Any) -> tuple[Any, Callable[[Any], str]]:
    """The model in a folder of any form, and a function that says how it computes."""
    from trocar.recipe.models import find_device, load_model

    device = find_device(source.device)
    if kind == "trocar":
        from trocar.compress.duquant import load_quantised

        return load_quantised(folder, device), _modes
    if kind == "transforms":
        import torch

        from trocar.compress.duquant.folders import load_transforms

        dtype = None if source.dtype == "auto" else getattr(torch, source.dtype)
        with _without_bars():
            return load_transforms(folder, dtype).to(device), lambda _: "compressed-tensors, with the transform configuration"
    if kind not in ("compressed-tensors", "float"):
        raise UnsupportedModelError(f"{folder} is quantised by {kind}, which is none of Trocar's forms.", "Load it with its own library.")
    if kind == "compressed-tensors":
        try:
            import compressed_tensors  # noqa: F401 - transformers needs it, and would say so in more words
        except ImportError:
            raise MissingExtraError(f"Reading {folder} needs compressed-tensors.", "Install trocar[quant].") from None
    how = "transformers, in float" if kind == "float" else "transformers, float products of rounded values"
    with _without_bars():
        return load_model(source.model_copy(update={"source": str(folder)})), lambda _: how


def _modes(model: Any) -> str:
    from trocar.patch.quantised import QuantisedLinear

    modes = [module.mode for module in model.modules() if isinstance(module, QuantisedLinear)]
    return ", ".join(f"{modes.count(mode)} layers {mode}" for mode in dict.fromkeys(modes))


def _shape(model: Any) -> tuple[int, ...]:
    """Blocks, vocabulary and width; of quantised layers anatomy knows nothing."""
    config = model.config.get_text_config()
    return config.num_hidden_layers, *model.get_input_embeddings().weight.shape


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """compressed-tensors draws its progress bars into files too."""
    from trocar.recipe.models import quiet_in_files

    with quiet_in_files(), contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield


def _measure(asked: Request, model: Any, tokenizer: Any, tokens: torch.Tensor) -> Side:
    """Perplexity, speed and continuations of one model."""
    from trocar.anatomy import fingerprint
    from trocar.evaluate import perplexity
    from trocar.patch.quantised import execute

    state = fingerprint(model)
    execute(model, asked.execute)
    found = perplexity(model, tokens, asked.window_tokens)
    window = tokens[: asked.window_tokens][None].to(model.device)
    reading = window.shape[1] / _median(lambda: _read(model, window))
    writing = _writing(model, window[:, : min(32, window.shape[1])], asked.max_new_tokens)
    said = [_said(model, tokenizer, prompt, asked.max_new_tokens) for prompt in asked.prompts]
    return Side(found, state, reading, writing, said)


def _median(call: Callable[[], Any]) -> float:
    """Median seconds of a call, whose first run (kernels chosen, weights laid out) does not count."""
    return statistics.median([_seconds(call) for _ in range(1 + TIMED)][1:])


def _seconds(call: Callable[[], Any]) -> float:
    import torch

    def settled() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    start = settled()
    call()
    return settled() - start


def _read(model: Any, ids: torch.Tensor) -> None:
    import torch

    with torch.no_grad():
        model(input_ids=ids, use_cache=False)


def _write(model: Any, ids: torch.Tensor, count: int, least: int = 0) -> torch.Tensor:
    """Greedy new tokens after `ids` (1, length), at least `least` of them; fewer than `count` where the model ends."""
    import torch
    import transformers

    ends = None if least else model.generation_config.eos_token_id
    config = transformers.GenerationConfig(
        max_new_tokens=count, min_new_tokens=least, do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=0, use_cache=True
    )
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return made[0, ids.shape[1] :]


def _writing(model: Any, ids: torch.Tensor, count: int) -> float:
    """Tokens a second, one after another: the time of `count` new tokens less that of the first."""
    count = max(2, count)
    whole, first = (_median(lambda number=number: _write(model, ids, number, number)) for number in (count, 1))
    return (count - 1) / max(whole - first, 1e-9)


def _said(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    import torch

    from trocar.trace.queries import prompt_tokens

    ids = torch.tensor([prompt_tokens(tokenizer, prompt)], device=model.device)
    return tokenizer.decode(_write(model, ids, count), skip_special_tokens=True).strip()


def _tell(asked: Request, before: Side, after: Side, as_json: bool) -> None:
    from trocar.evaluate import perplexity_measurement
    from trocar.result import table_rows

    row = table_rows([perplexity_measurement(before.perplexity, after.perplexity, (before.state, after.state))], asked.seed)[0]
    sizes = weights_bytes(_folder(asked.model)), weights_bytes(asked.folder)
    rows = [
        {
            "model": name,
            "perplexity": side.perplexity.value,
            "weights": show.size(size),
            "tokens/s read": _speed(side.reading),
            "tokens/s written": _speed(side.writing),
            "computes": side.runs or "float",
        }
        for name, side, size in zip((asked.model, str(asked.folder)), (before, after), sizes, strict=True)
    ]
    if as_json:
        facts = [{**row, "weights": size, "continuations": side.said} for row, side, size in zip(rows, (before, after), sizes, strict=True)]
        show.line(json.dumps({"float": facts[0], "quantised": facts[1], "perplexity": row.model_dump(mode="json")}, indent=1))
        return
    count = f"{len(before.perplexity.tokens)} windows of {asked.window_tokens} tokens of {asked.text}"
    show.table(rows, f"On {count}")
    show.line()
    show.line(f"Perplexity is {after.perplexity.value / before.perplexity.value:.3f} times the float model's{_interval(row)}.")
    show.line(f"Speeds: medians of {TIMED}, windows of {asked.window_tokens} read, {max(2, asked.max_new_tokens)} tokens written, one row.")
    for prompt, first, second in zip(asked.prompts, before.said, after.said, strict=True):
        show.line()
        show.pairs({"prompt": prompt, "float": first, "quantised": second})


def _speed(value: float) -> float:
    return round(value) if value >= 100 else round(value, 1)


def _interval(row: Any) -> str:
    if row.low is None or row.high is None:
        return ""
    return f" (difference {row.difference:+.3g}, 95 % from {row.low:+.3g} to {row.high:+.3g} over windows)"


def _folder(model: str) -> Path:
    from trocar.cli.patching import checkpoint

    return checkpoint(model)
