"""Load, list and show the lab's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trocar.core.errors import DataError
from trocar.core.files import read_json
from trocar.lab import registry
from trocar.lab.registry import WEIGHTS, LabModel, cache_folder, get

MEASURED = ("accuracy", "rare", "planted_neurons")  # what a card holds beyond the row


def find(name: str, seed: int = 0) -> Path | None:
    """The folder of a lab model's weights: in the package (base seed 0 of shipped models), else in the cache; None if not trained yet."""
    row = get(name)
    folders = [cache_folder() / name / f"seed{seed}"]
    if row.shipped and seed == 0:
        folders.insert(0, WEIGHTS / name)
    return next((folder for folder in folders if (folder / "lab.json").exists()), None)


def load(name: str, seed: int = 0) -> tuple[Any, Any]:
    """(model, image processor or tokenizer) of a lab model, in float32 and eval mode; the stored weights are float16. Never trains.

    Raises ConfigError for an unknown name, DataError if the model neither comes with the package nor was trained here.
    """
    folder = find(name, seed)
    if folder is None:
        raise DataError(
            f"Lab model '{name}' (seed {seed}) is not trained on this machine.", f"Run `trocar lab train {name} --seed {seed}`."
        )
    import torch
    import transformers

    if get(name).reads == "texts":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)
    from trocar.lab.data import load_processor

    model = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), load_processor(str(folder))


def load_model(name: str, seed: int = 0) -> Any:
    """The model alone; see `load`."""
    return load(name, seed)[0]


def mask_hypernetwork(name: str) -> Path:
    """The file of a shipped model's mask hypernetwork, for Where-to-Edit's setting `hypernetwork`. DataError if none comes with it."""
    path = WEIGHTS / get(name).name / "mask.safetensors"
    if not path.exists():
        raise DataError(f"No mask hypernetwork comes with lab model '{name}'.", "Train one with train_mask_hypernetwork.")
    return path


def list_models() -> list[dict[str, Any]]:
    """One row per lab model: name, title, trouble, and where its weights are (`package`, `cache` or `not trained`)."""
    return [{"name": row.name, "title": row.title, "trouble": row.trouble, "weights": _whereabouts(row)} for row in registry.MODELS]


def show(name: str, seed: int = 0) -> dict[str, Any]:
    """Everything about a lab model: its row, where its weights are, and what was measured if it has been trained."""
    row = get(name)
    folder = find(name, seed)
    result = row.model_dump(mode="json") | {"weights": _whereabouts(row), "folder": str(folder) if folder else None, "seed": seed}
    if folder:
        card = read_json(folder / "lab.json")
        result |= {name: card[name] for name in MEASURED if name in card}
    return result


def _whereabouts(row: LabModel) -> str:
    folder = find(row.name)
    return "not trained" if folder is None else "package" if folder.is_relative_to(WEIGHTS) else "cache"
