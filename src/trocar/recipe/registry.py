"""The closed table of methods. A name in a recipe is looked up here and nowhere else; nothing is imported by a file's word. Floor 6."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trocar.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from trocar.method import Method


@dataclass(frozen=True)
class Entry:
    """Where a method lives (`module:attribute`), and what `trocar methods` says about it without importing it."""

    target: str
    kind: str
    summary: str


METHODS: dict[str, Entry] = {
    "where-to-edit": Entry(
        "trocar.edit.where_to_edit.recipe:METHOD",
        "edit",
        "fix a vision transformer's failures on a rare group of images from one example each",
    ),
    "creme": Entry(
        "trocar.edit.creme.recipe:METHOD",
        "edit",
        "repair two-hop questions that a language model fails although it knows both hops, without training",
    ),
    "mt-editing": Entry(
        "trocar.edit.neurons.recipe:METHOD",
        "edit",
        "keep a translating language model from answering in the wrong language and from looping",
    ),
    "copra": Entry(
        "trocar.adapt.copra.recipe:METHOD",
        "adapt",
        "train LoRA adapters that stay linearly connected: they merge across seeds and tasks, and survive pruning",
    ),
    "merge": Entry(
        "trocar.adapt.merging:METHOD",
        "adapt",
        "make one LoRA adapter of several, and measure every task without, with each alone, and merged",
    ),
    "duquant": Entry(
        "trocar.compress.duquant.recipe:METHOD",
        "compress",
        "quantise weights and activations to low bits after rotations and a permutation that spread outliers",
    ),
}


def entry(name: str) -> Entry:
    """The table's row for `name`. Raises ConfigError with the nearest known name."""
    if name not in METHODS:
        raise ConfigError(f"There is no method '{name}'.", nearest(name, METHODS))
    return METHODS[name]


def get_method(name: str) -> Method:
    """Import and return the method called `name`."""
    module, _, attribute = entry(name).target.partition(":")
    return getattr(importlib.import_module(module), attribute)
