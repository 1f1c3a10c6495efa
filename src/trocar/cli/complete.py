"""What the shell offers after <tab>. Floor 7. Called on every keystroke: no torch, no error may escape."""

from __future__ import annotations

# the names of trocar.compress.duquant.PRESETS, which cannot be imported without torch; a test compares them
QUANTISERS = (
    "duquant-gptaq", "duquant-gptq", "duquant", "duquant-clip", "duquant-lwc", "folded", "export", "rtn", "gptq", "smoothquant",
    "quarot", "quarot-gptq", "hadamard", "random", "smooth", "smooth-random", "smooth-hadamard", "rotation", "smooth-rotation",
    "no-permutation", "random-permutation", "no-smoothing", "two-permutations", "permute-first", "per-block", "hadamard-zigzag",
)  # fmt: skip


def quantisers(incomplete: str) -> list[str]:
    return [name for name in QUANTISERS if name.startswith(incomplete)]


def methods(incomplete: str) -> list[tuple[str, str]]:
    from trocar.recipe.registry import METHODS

    return [(name, entry.summary) for name, entry in METHODS.items() if name.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    from trocar.lab.registry import MODELS
    from trocar.recipe.models import local_models

    names = [*local_models(), *(f"lab:{row.name}" for row in MODELS)]
    return [name for name in names if name.startswith(incomplete)]


def lab_models(incomplete: str) -> list[tuple[str, str]]:
    from trocar.lab.registry import MODELS

    return [(row.name, row.title) for row in MODELS if row.name.startswith(incomplete)]


def dtypes(incomplete: str) -> list[str]:
    return [name for name in ("auto", "float32", "bfloat16", "float16", "float64") if name.startswith(incomplete)]
