"""Linear maps with low-bit weights and activations: their arithmetic, the change of basis in front of them, and their modules. Floor 3."""

from trocar.patch.quantised.execution import execute, memory
from trocar.patch.quantised.experts import Matrices, QuantisedExperts, float_experts
from trocar.patch.quantised.hadamard import hadamard, largest_hadamard
from trocar.patch.quantised.heads import RoundedHeads
from trocar.patch.quantised.linear import MODES, GroupInput, QuantisedLinear
from trocar.patch.quantised.numbers import (
    Quantiser,
    codes,
    dequantise,
    grid,
    integer_linear,
    integer_rows,
    integer_weight,
    pack,
    quantised,
    unpack,
)
from trocar.patch.quantised.transform import Transform

__all__ = [
    "MODES",
    "GroupInput",
    "Matrices",
    "QuantisedExperts",
    "QuantisedLinear",
    "Quantiser",
    "RoundedHeads",
    "Transform",
    "codes",
    "dequantise",
    "execute",
    "float_experts",
    "grid",
    "hadamard",
    "integer_linear",
    "integer_rows",
    "integer_weight",
    "largest_hadamard",
    "memory",
    "pack",
    "quantised",
    "unpack",
]
