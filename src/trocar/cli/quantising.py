"""What `trocar quantise` does. Floor 7. Imported when it runs."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trocar.cli import show
from trocar.cli.patching import checkpoint
from trocar.core.errors import ConfigError, DataError, ExportError, RunError, nearest

if TYPE_CHECKING:
    import torch

    from trocar.compress.duquant import DuQuantConfig
    from trocar.compress.duquant.folders import Folder

FORMS = ("trocar", "compressed-tensors", "float")
WORST = 5  # layers in the table
OUTLIER = 2.0  # times the mean error from which on a layer is named as one to keep


@dataclass(frozen=True)
class Request:
    """The command as it was given. method: None for the form's own."""

    model: str
    target: Path
    calibration: str
    bits: str
    method: str | None
    form: str
    transforms: bool
    windows: int
    window_tokens: int
    column: str
    block_size: str | None
    search_steps: int | None
    keep: Sequence[str]
    attention: int | None
    changes: Sequence[str]
    dtype: str
    device: str
    seed: int

    @property
    def chosen(self) -> str:
        own = {"trocar": "duquant-gptaq", "float": "duquant-gptq", "compressed-tensors": "export" if self.transforms else "folded"}
        return self.method or own[self.form]


def quantise_model(asked: Request, as_json: bool) -> None:
    """Quantise a checkpoint's folder into another folder. Everything that can be known to be wrong is refused before the work begins."""
    _check(asked)
    config = settings(asked)
    from trocar.compress.duquant.folders import check_compressed, committed, look, refuse_quantised
    from trocar.recipe.models import find_device, load_tokenizer
    from trocar.recipe.schema import ModelSource

    ModelSource.parse({"source": asked.model, "dtype": asked.dtype, "device": asked.device}, "model")
    device, source = find_device(asked.device), checkpoint(asked.model)
    refuse_quantised(source)
    import torch

    from trocar.compress.duquant import quantise_checkpoint
    from trocar.compress.duquant.checkpoint import identity
    from trocar.patch.checkpoint import skeleton

    model = skeleton(source)
    tower = _check_shape(model, asked, config)
    if asked.form == "compressed-tensors":
        check_compressed(model, config, asked.transforms)
    ids = calibration(asked, load_tokenizer(asked.model), model)
    dtype: torch.dtype | None = None if asked.dtype == "auto" else getattr(torch, asked.dtype)
    inputs = {"input_ids": ids}
    work = Path(f"{asked.target}.partial")
    with _owned(work), show.interruptible():
        ours = identity(source, inputs, config, asked.seed, dtype)
        done = max(committed(work / name, ours, tower.n_layers) for name in ("blocks", "blocks.partial"))
        if not as_json:
            _announce(asked, source, config, ids, done, tower.n_layers)
        start = time.monotonic()
        if not (work / "blocks").exists():
            quantise_checkpoint(source, work / "blocks", inputs, config, asked.seed, dtype=dtype, device=device)
        found = look(work / "blocks")
        _finish(asked, source, work)
        seconds = time.monotonic() - start
    facts = _facts(asked, source, found, seconds, done)
    if as_json:
        show.line(json.dumps(facts, indent=1))
    else:
        _tell(asked, facts)


def _check(asked: Request) -> None:
    if asked.target.exists():
        raise ExportError(f"{asked.target} exists.", "Choose another folder, or remove it first.")
    if asked.form not in FORMS:
        raise ConfigError(f"--form {asked.form} is not known.", nearest(asked.form, FORMS))
    if asked.transforms and asked.form != "compressed-tensors":
        raise ConfigError("--transforms is a variant of compressed-tensors.", "Add --form compressed-tensors, or leave it out.")
    if asked.form == "float" and asked.attention is not None:
        raise ExportError("A plain checkpoint cannot say that queries, keys and values are rounded.", "Leave --attention out.")


def settings(asked: Request) -> DuQuantConfig:
    """The method's settings with what the options change. Raises ConfigError naming the option."""
    from trocar.compress.duquant import PRESETS, DuQuantConfig, preset
    from trocar.recipe.schema import override

    if asked.chosen not in PRESETS:
        raise ConfigError(f"--method {asked.chosen} is not known.", nearest(asked.chosen, PRESETS))
    places: dict[str, Any] = {}
    if asked.block_size is not None:
        size = asked.block_size
        if size != "auto" and not (size.isdecimal() and int(size) > 0):
            raise ConfigError(f"--block-size {size} is not a number of channels.", "Say a divisor of the layers' channels, or auto.")
        places["block_size"] = size if size == "auto" else int(size)
    if asked.search_steps is not None:
        places["search_steps"] = asked.search_steps
    if places and preset(asked.chosen, asked.bits).chain is None:
        option = f"--{next(iter(places)).replace('_', '-')}"
        raise ConfigError(f"{option} says how rotations are found, and {asked.chosen} has none.", "Leave it out, or choose another method.")
    config = preset(asked.chosen, asked.bits, **places, attention=asked.attention, keep=kept(asked.keep))
    data = config.model_dump(mode="json")
    for change in asked.changes:
        data = override(data, change)
    return DuQuantConfig.parse(data, "--set")


def kept(pairs: Sequence[str]) -> dict[str, int]:
    """`L11.mlp.down=8` as settings. Raises ConfigError for what is not of that form."""
    found = {}
    for pair in pairs:
        name, _, bits = pair.partition("=")
        if not name or not bits.isdecimal() or not 2 <= int(bits) <= 16:
            raise ConfigError(f"--keep {pair} is not a layer and its bits.", "For example --keep L11.mlp.down=8; 2 to 16, 16 is float.")
        found[name] = int(bits)
    return found


def _check_shape(model: Any, asked: Request, config: DuQuantConfig) -> Any:
    """The model's tower; what names or sizes in the settings do not fit it is refused."""
    from trocar.anatomy import Anatomy
    from trocar.compress.duquant.chains import block_size
    from trocar.compress.duquant.groups import channels_of, check_keep, groups

    tower = Anatomy.of(model, experts=True).tower()
    every = [group for layer in range(tower.n_layers) for group in groups(tower, layer)]
    check_keep(list(config.keep), every)
    if config.chain is not None and config.chain.block_size != "auto" and config.chain.rotation != "full-hadamard":
        for group in every:
            block_size(channels_of(tower, group), config.chain.block_size, group.components[0])
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and asked.window_tokens > longest:
        raise ConfigError(f"--window-tokens {asked.window_tokens} is more than the {longest} that the model reads.", "Use shorter windows.")
    return tower


def calibration(asked: Request, tokenizer: Any, model: Any) -> torch.Tensor:
    """Windows of the calibration text, (windows, tokens)."""
    from trocar.compress.duquant.recipe import cut

    tokens = read_tokens(asked.calibration, asked.column, tokenizer, asked.windows * asked.window_tokens, "--calibration", model)
    return cut(tokens, asked.window_tokens, f"--calibration {asked.calibration}")


def read_tokens(text: str, column: str, tokenizer: Any, count: int, option: str, model: Any) -> torch.Tensor:
    """The first `count` tokens of a text source of recipes, (at most count,). Raises DataError naming the option."""
    from trocar.compress.duquant.recipe import stream
    from trocar.lab.texts import load_texts

    try:
        fields = load_texts(text).fields
    except DataError as error:
        raise DataError(f"{option}: {error.what}", error.hint) from error
    if column not in fields:
        raise DataError(f"{option} {text} has no column '{column}'.", f"It has {', '.join(fields)}; name one with --column.")
    tokens = stream(fields[column], tokenizer, count, f"{option} {text}")
    size = model.get_input_embeddings().weight.shape[0]
    if int(tokens.max()) >= size:
        raise DataError(f"The tokenizer says token {int(tokens.max())}, the model knows {size}.", "Put the model's own beside it.")
    return tokens


@contextlib.contextmanager
def _owned(work: Path) -> Iterator[None]:
    """Lock the folder of unfinished work; remove it afterwards if nothing was committed there."""
    from trocar.recipe.folder import locked

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(work))
        except RunError as error:
            raise RunError(error.what, "Wait for it to end, or choose another TARGET.") from None
        try:
            yield
        finally:
            stack.close()
            for folder in (work / "blocks.partial", work):
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _announce(asked: Request, source: Path, config: DuQuantConfig, ids: torch.Tensor, done: int, blocks: int) -> None:
    short = "" if len(ids) == asked.windows else f" ({asked.windows} were asked for; the text ends there)"
    text = f"{len(ids)} windows of {ids.shape[1]} tokens{short}"
    by = asked.chosen if asked.method else f"{asked.chosen} (the default for this form)"
    show.line(f"Quantising {source} to W{config.weights.bits}A{config.activations.bits} by {by}, on {text} of {asked.calibration}.")
    if done:
        rest = f"block {done} of {blocks - 1} is next" if done < blocks else "all blocks are done"
        show.line(f"Going on where an earlier run stopped, in {asked.target}.partial: {rest}.")
    else:
        show.line(f"Each of the {blocks} blocks is kept in {asked.target}.partial as it is done; killed, the same command goes on there.")


def _finish(asked: Request, source: Path, work: Path) -> None:
    """Bring the folder of blocks into the form that was asked for, under its name."""
    made = work / "blocks"
    if asked.form == "trocar":
        made.replace(asked.target)
        return
    from trocar.compress.duquant import export_compressed, load_quantised
    from trocar.compress.duquant.folders import export_float
    from trocar.recipe.models import quiet_in_files

    model = load_quantised(made)
    if asked.form == "float":
        with quiet_in_files():
            export_float(model, asked.target, source)
    else:
        export_compressed(model, asked.target, transforms=asked.transforms, tokenizer_from=source)
    shutil.rmtree(made)


def _facts(asked: Request, source: Path, found: Folder, seconds: float, done: int) -> dict[str, Any]:
    before, after = weights_bytes(source), weights_bytes(asked.target)
    kept_bits = {path: bits for path, name in found.names.items() for key, bits in found.settings["keep"].items() if key == name}
    weights, activations = (found.settings[part]["bits"] for part in ("weights", "activations"))

    def said(path: str) -> str:
        least = kept_bits.get(path, 2)
        return f"W{max(weights, least)}A{max(activations, least)}"

    return {
        "target": str(asked.target),
        "form": asked.form + (" with transforms" if asked.transforms else ""),
        "method": asked.chosen,
        "bits": f"W{weights}A{activations}",
        "blocks": found.blocks,
        "resumed_blocks": done,
        "layers": len(found.names),
        "mean_error": found.mean_error,
        "last_block_error": found.errors.get(f"L{found.blocks - 1}"),
        "worst": [{"layer": name, "module": path, "bits": said(path), "output error": error} for name, path, error in found.worst(WORST)],
        "bytes_before": before,
        "bytes_after": after,
        "bytes_in_float": found.elsewhere_bytes,
        "bits_per_weight": found.bits
        if asked.form == "trocar"
        else 8 * (_tensor_bytes(asked.target) - found.elsewhere_bytes) / found.weights,
        "seconds": seconds,
    }


def weights_bytes(folder: Path) -> int:
    """Size of a folder's weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _tensor_bytes(folder: Path) -> int:
    from trocar.patch.checkpoint import entries, shards

    return sum(entry.stop - entry.start for file in shards(folder) for entry in entries(file).values())


def _tell(asked: Request, facts: dict[str, Any]) -> None:
    show.line()
    show.table(facts["worst"], f"The {len(facts['worst'])} of {facts['layers']} layers that suffer most")
    show.line()
    last = facts["last_block_error"]
    share = facts["bytes_after"] / facts["bytes_before"]
    resumed = f", without the {facts['resumed_blocks']} blocks of earlier runs" if facts["resumed_blocks"] else ""
    show.pairs(
        {
            "mean output error of a layer": facts["mean_error"],
            **({"error of the last block's output": last} if last is not None else {}),
            "weights before": show.size(facts["bytes_before"]),
            "weights after": f"{show.size(facts['bytes_after'])} ({share:.0%}), {show.size(facts['bytes_in_float'])} of it "
            "embeddings, norms and head, in float",
            "bits a weight of these layers": f"{facts['bits_per_weight']:.3g}"
            + (", stored in float" if asked.form == "float" else ", with scales and transforms"),
            "time": show.duration(facts["seconds"]) + resumed,
            asked.form: f"{asked.target}",
        }
    )
    show.line()
    worst = facts["worst"][0]
    if worst["output error"] > OUTLIER * facts["mean_error"] and not any(pair.startswith(f"{worst['layer']}=") for pair in asked.keep):
        show.line(f"More bits where they are missed: the same with --keep {worst['layer']}=8.")
    for line in _next(asked):
        show.line(line)


def _next(asked: Request) -> list[str]:
    """What to do with the folder, and what its form cannot say."""
    target = asked.target
    measure = f"Measure it beside the float model: trocar quantise-check {target} {asked.model} --text wikitext2:test"
    if asked.form == "trocar":
        return [measure, f'Load it: trocar.compress.duquant.load_quantised("{target}")']
    if asked.form == "float":
        return [
            "The weights are rounded and stored in float: as large as before, and activations are not rounded when it runs.",
            measure,
            f'Load it anywhere: AutoModelForCausalLM.from_pretrained("{target}")',
        ]
    if asked.transforms:
        return [
            "One rotation in front of each layer is in the transform configuration; a second and permutations have no place there.",
            "Do not load it with transformers: up to 5.24 it leaves transform_config out without a word, and computes something else.",
            measure,
            f"Serve it: vllm serve {target}",
        ]
    return [
        "Smoothing is folded; there is no rotation and no permutation in this form (--transforms allows one rotation, for vLLM).",
        measure,
        f'Load it: AutoModelForCausalLM.from_pretrained("{target}") with compressed-tensors installed, or vllm serve {target}',
    ]
