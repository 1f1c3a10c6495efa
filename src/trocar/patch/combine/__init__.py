"""Adapters made from adapters: fused, mixed, aligned, clustered, pruned. One file a way, all of one form: adapters in, `Combined` out."""

from trocar.patch.combine.algebra import Combined
from trocar.patch.combine.align import aligned, aligned_fusion
from trocar.patch.combine.folders import combine_folders
from trocar.patch.combine.fusion import federated, fusion
from trocar.patch.combine.lego import lego
from trocar.patch.combine.mixture import ensemble, mixture
from trocar.patch.combine.prune import magnitude, prune

__all__ = [
    "Combined", "aligned", "aligned_fusion", "combine_folders", "ensemble", "federated", "fusion", "lego", "magnitude", "mixture", "prune",
]  # fmt: skip
