"""DuQuant: low-bit weights and activations after smoothing, greedy rotations and a zigzag permutation (arXiv 2406.01721). Floor 5."""

from trocar.compress.duquant.chains import build_chain, smoothing_scale
from trocar.compress.duquant.checkpoint import load_quantised, quantise_checkpoint
from trocar.compress.duquant.config import Activations, Chain, DuQuantConfig, Learning, Smoothing, Weights
from trocar.compress.duquant.export import export_compressed
from trocar.compress.duquant.groups import Group, groups
from trocar.compress.duquant.model import QuantisedModel, quantise
from trocar.compress.duquant.presets import PRESETS, preset
from trocar.compress.duquant.rotation import base_matrix, greedy_rotation, random_orthogonal, zigzag
from trocar.compress.duquant.rounding import best_clip, gptq, nearest
from trocar.patch.quantised import hadamard

__all__ = [
    "PRESETS",
    "Activations",
    "Chain",
    "DuQuantConfig",
    "Group",
    "Learning",
    "QuantisedModel",
    "Smoothing",
    "Weights",
    "base_matrix",
    "best_clip",
    "build_chain",
    "export_compressed",
    "gptq",
    "greedy_rotation",
    "groups",
    "hadamard",
    "load_quantised",
    "nearest",
    "preset",
    "quantise",
    "quantise_checkpoint",
    "random_orthogonal",
    "smoothing_scale",
    "zigzag",
]
