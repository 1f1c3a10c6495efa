"""What a model is made of: one table of families, components, slices of parameters, fingerprints. Floor 1.

Names are imported when they are first used, so that component names and checkpoint fingerprints can be had without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trocar.core.lazy import lazy

if TYPE_CHECKING:
    from trocar.anatomy.components import Attention, Block, Channel, Component, Head, Linear, Mlp, Neuron, parse
    from trocar.anatomy.description import describe
    from trocar.anatomy.experts import Experts
    from trocar.anatomy.families import EXPERT_FAMILIES, FAMILIES, Family, TowerRow, register
    from trocar.anatomy.fingerprints import (
        FileTensor,
        checkpoint_fingerprints,
        dtype_name,
        fingerprint,
        structure_fingerprint,
        tensor_fingerprint,
        tensor_fingerprint_bytes,
    )
    from trocar.anatomy.grouping import module_groups
    from trocar.anatomy.linear import LinearView, Slice
    from trocar.anatomy.resolve import Anatomy, Tower
    from trocar.anatomy.tiny import TINY, TINY_EXPERTS, tiny_inputs, tiny_model

_HOMES = {
    "components": ("Attention", "Block", "Channel", "Component", "Head", "Linear", "Mlp", "Neuron", "parse"),
    "description": ("describe",),
    "experts": ("Experts",),
    "families": ("EXPERT_FAMILIES", "FAMILIES", "Family", "TowerRow", "register"),
    "fingerprints": (
        *("FileTensor", "checkpoint_fingerprints", "dtype_name", "fingerprint", "structure_fingerprint"),
        *("tensor_fingerprint", "tensor_fingerprint_bytes"),
    ),
    "grouping": ("module_groups",),
    "linear": ("LinearView", "Slice"),
    "resolve": ("Anatomy", "Tower"),
    "tiny": ("TINY", "TINY_EXPERTS", "tiny_inputs", "tiny_model"),
}
__all__ = [
    "EXPERT_FAMILIES", "FAMILIES", "TINY", "TINY_EXPERTS", "Anatomy", "Attention", "Block", "Channel", "Component",
    "Experts", "Family", "FileTensor", "Head", "Linear", "LinearView", "Mlp", "Neuron",
    "Slice", "Tower", "TowerRow", "checkpoint_fingerprints", "describe", "dtype_name", "fingerprint",
    "module_groups", "parse", "register",
    "structure_fingerprint", "tensor_fingerprint", "tensor_fingerprint_bytes", "tiny_inputs", "tiny_model",
]  # fmt: skip

__getattr__ = lazy(__name__, _HOMES)
