"""Small models, data sets and loaders to learn, test and demonstrate on. Floor 5.

`lab.load(name) -> (model, processor)`, `lab.train(name)`, `lab.list()`, `lab.show(name)`, `lab.load_examples(source, model)`,
`lab.load_texts(source)`. Names are imported on first use, so that listing models does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trocar.lab.data import DataConfig, load_examples, load_processor
    from trocar.lab.models import list_models as list
    from trocar.lab.models import load, load_model, mask_hypernetwork, show
    from trocar.lab.texts import TextConfig, load_texts
    from trocar.lab.training import train

__all__ = [
    "DataConfig",
    "TextConfig",
    "list",
    "load",
    "load_examples",
    "load_model",
    "load_processor",
    "load_texts",
    "mask_hypernetwork",
    "show",
    "train",
]

_WHERE = {
    "DataConfig": ("data", "DataConfig"),
    "TextConfig": ("texts", "TextConfig"),
    "load_examples": ("data", "load_examples"),
    "load_processor": ("data", "load_processor"),
    "load_texts": ("texts", "load_texts"),
    "list": ("models", "list_models"),
    "load": ("models", "load"),
    "load_model": ("models", "load_model"),
    "mask_hypernetwork": ("models", "mask_hypernetwork"),
    "show": ("models", "show"),
    "train": ("training", "train"),
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _WHERE:
        raise AttributeError(f"module 'trocar.lab' has no attribute '{name}'")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(f"trocar.lab.{module}"), attribute)
