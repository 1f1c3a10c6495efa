"""From a model's short name to a loaded model: folder, name under TROCAR_MODELS, `lab:NAME`, or hub id. Floor 6."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trocar.core.errors import DataError, UnsupportedModelError, nearest
from trocar.core.files import read_json
from trocar.recipe.schema import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")

# Which automatic class loads an architecture: its name's ending, longest first. Closed: no class name from a file is imported.
_HEADS: tuple[tuple[str, str], ...] = (
    ("ForCausalLM", "AutoModelForCausalLM"),
    ("LMHeadModel", "AutoModelForCausalLM"),
    ("ForConditionalGeneration", "AutoModelForImageTextToText"),
    ("ForImageClassification", "AutoModelForImageClassification"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "AutoModelForTokenClassification"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    ("ForMaskedLM", "AutoModelForMaskedLM"),
    ("ForMaskedImageModeling", "AutoModelForMaskedImageModeling"),
    ("ForPreTraining", "AutoModelForPreTraining"),
)


@dataclass(frozen=True)
class Place:
    """Where a model was found. `where` is the folder, the lab's name or the hub id."""

    kind: Literal["folder", "lab", "hub"]
    where: str


def models_root() -> Path:
    """The folder of TROCAR_MODELS, by default ~/.cache/trocar/models."""
    return Path(os.environ.get("TROCAR_MODELS") or Path.home() / ".cache" / "trocar" / "models").expanduser()


def local_models() -> list[str]:
    """Names of the checkpoints under `models_root()`."""
    root = models_root()
    return sorted(path.parent.name for path in root.glob("*/config.json")) if root.is_dir() else []


def find_model(source: str, base: Path | None = None) -> Place:
    """Say what `source` names, without loading it: lab, folder, name under TROCAR_MODELS, hub id, in this order.

    base: the folder that relative paths start from. Raises DataError for a folder without a checkpoint, and for what can be none of
    the four.
    """
    if source.startswith("lab:"):
        return Place("lab", source.removeprefix("lab:"))
    folder = (base or Path()) / Path(source).expanduser()
    for candidate in (folder, models_root() / source):
        if (candidate / "config.json").is_file():
            return Place("folder", str(candidate))
    if folder.exists():
        raise DataError(f"{source} is not a model: it has no config.json.", "Give the folder of a Hugging Face checkpoint.")
    if not _HUB_ID.match(source) or source.count("/") > 1:
        raise DataError(f"There is no model folder {source}.", _known_models(source))
    return Place("hub", source)


def _known_models(source: str) -> str:
    names = local_models()
    return nearest(source, names) if names else f"Nothing is stored under {models_root()} (TROCAR_MODELS) either."


def load_model(model: ModelSource | str, base: Path | None = None) -> PreTrainedModel:
    """Load the model, in eval mode, on its device. Raises DataError if it cannot be found or read, UnsupportedModelError if not loadable.

    Nothing is ever executed from a checkpoint unless `trust_remote_code` is set; weights are read from safetensors only.
    """
    asked = ModelSource(source=model) if isinstance(model, str) else model
    place = find_model(asked.source, base)
    with quiet_in_files():
        return _load_lab(place.where, asked) if place.kind == "lab" else _load_pretrained(place, asked)


def load_tokenizer(model: ModelSource | str, base: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside the model's weights, wherever `load_model` would find those.

    Raises DataError if there is none or it cannot be read. A checkpoint without one is never given its family's empty default (which
    transformers makes up for some families).
    """
    import transformers

    asked = ModelSource(source=model) if isinstance(model, str) else model
    place = find_model(asked.source, base)
    common: dict[str, Any] = {"trust_remote_code": asked.trust_remote_code}
    if place.kind == "hub":
        common["revision"] = asked.revision
    where = _lab_folder(place.where) if place.kind == "lab" else place.where
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(where, **common)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        if place.kind == "hub" and isinstance(error, OSError):
            raise _explained(error, place, asked) from error
        if place.kind != "hub" and not any(Path(where).glob("*token*")) and not any(Path(where).glob("vocab*")):
            raise DataError(f"{asked.source} has no tokenizer.", _NO_TOKENIZER) from None
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{asked.source} has no usable tokenizer: {first.rstrip('. :')}.", _NO_TOKENIZER) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise DataError(f"{asked.source} has no tokenizer: there is nothing beside its weights that knows a word.", _NO_TOKENIZER)
    return tokenizer


def refuse_speechless(model: Any, source: str) -> None:
    """Raise UnsupportedModelError for a model that does not predict the next token of a text."""
    from trocar.anatomy import Anatomy

    def speaks(tower: Any) -> bool:  # a classifier has a head as well, of another size
        sizes = [getattr(getattr(part, "weight", None), "shape", (0,))[0] for part in (tower.head, tower.embedding)]
        return tower.modality == "text" and tower.causal and sizes[0] == sizes[1] > 0

    if not any(map(speaks, Anatomy.of(model, experts=True).towers.values())):
        raise UnsupportedModelError(
            f"{source} is a {type(model).__name__}, which predicts no next token; this method edits language models.",
            "Name a checkpoint of a causal language model.",
        )


_NO_TOKENIZER = "Save the model's tokenizer into the same folder (tokenizer.save_pretrained); methods that read texts need it."


def _lab_folder(name: str) -> str:
    from trocar.lab.models import find
    from trocar.lab.registry import get

    folder = find(get(name).name)
    if folder is None:
        raise DataError(f"Lab model '{name}' is not trained on this machine.", f"Run `trocar lab train {name}`.")
    return str(folder)


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of everything that a tokenizer does to a text: its vocabulary, merges, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return hashlib.blake2b(f"{type(tokenizer).__name__}\n{special}\n{rules}".encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def quiet_in_files() -> Iterator[None]:
    """No progress bars of the libraries where nobody looks (core.progress has the same rule)."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty() or os.environ.get("TROCAR_PROGRESS") == "0":
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_lab(name: str, asked: ModelSource) -> PreTrainedModel:
    from trocar import lab

    model = lab.load_model(name)
    if asked.attn_implementation:
        model.set_attn_implementation(asked.attn_implementation)
    return _settle(model, asked)


def _load_pretrained(place: Place, asked: ModelSource) -> PreTrainedModel:
    import transformers

    common: dict[str, Any] = {"trust_remote_code": asked.trust_remote_code}
    if place.kind == "hub":
        common["revision"] = asked.revision
    elif asked.revision:
        raise DataError(f"model.revision is set, but {asked.source} is a folder.", "Only hub ids have revisions; remove the key.")
    try:
        config = transformers.AutoConfig.from_pretrained(place.where, **common)
        loader = getattr(transformers, _auto_class(config, place))
        if asked.attn_implementation:
            common["attn_implementation"] = asked.attn_implementation
        model, report = loader.from_pretrained(
            place.where, config=config, dtype=asked.dtype, use_safetensors=True, output_loading_info=True, **common
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _explained(error, place, asked) from error
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise DataError(
            f"{asked.source} lacks {len(missing)} of its architecture's parameters, {missing[0]} first; they would be random.",
            "Use a complete checkpoint, or its architecture without the head.",
        )
    return _settle(model, asked)


def _settle(model: Any, asked: ModelSource) -> PreTrainedModel:
    import torch

    device = find_device(asked.device)
    dtype = None if asked.dtype == "auto" else getattr(torch, asked.dtype)
    try:
        return model.to(device=device, dtype=dtype).eval()
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UnsupportedModelError(f"{asked.source} cannot be moved to {device}: {str(error).splitlines()[0]}.") from error


def find_device(name: str) -> str:
    """The device that a name stands for, `auto` being the first accelerator, else the CPU. Raises DataError if this machine has none."""
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator.type if accelerator else "cpu"
    kind = name.partition(":")[0]
    if kind != "cpu" and not (torch.accelerator.is_available() and str(torch.accelerator.current_accelerator().type) == kind):  # type: ignore[union-attr]
        raise DataError(
            f"model.device is {name}, which this machine does not have.", "Set it to auto or cpu; `trocar doctor` lists devices."
        )
    return name


def _auto_class(config: Any, place: Place) -> str:
    architecture = (config.architectures or [""])[0] or ""
    for ending, loader in _HEADS:
        if architecture.endswith(ending):
            return loader
    return "AutoModel"


def _explained(error: Exception, place: Place, asked: ModelSource) -> Exception:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if place.kind == "hub" and isinstance(error, OSError):
        offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "ON", "YES", "TRUE")
        why = "the hub is switched off (HF_HUB_OFFLINE) and has left no copy." if offline else f"it could not be had from the hub: {first}"
        return DataError(f"The model {asked.source} is no folder, not under {models_root()}, and {why}", _known_models(asked.source))
    if isinstance(error, OSError) and "safetensors" in str(error):
        return DataError(
            f"{asked.source} has no weights in safetensors: {first}", "Convert them; other formats can execute code and are not read."
        )
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return UnsupportedModelError(
            f"{asked.source} needs code of its own.", "Set model.trust_remote_code: true if you have read that code."
        )
    return UnsupportedModelError(f"{asked.source} cannot be loaded: {first}")


def describe_source(model: ModelSource, base: Path | None = None) -> str:
    """One line for a dry run: where the model would come from, and its size on disk where that is known."""
    place = find_model(model.source, base)
    if place.kind != "folder":
        return f"{place.kind} {place.where}"
    weights = sorted(Path(place.where).glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    kind = read_json(Path(place.where) / "config.json").get("model_type", "unknown type")
    return f"folder {place.where} ({kind}, {len(weights)} file{'s' * (len(weights) != 1)}, {size / 2**20:.1f} MiB)"
