"""`trocar doctor`: machine, versions, kernels, devices, extras, models, data, and what works with what. Floor 7."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import Any

from trocar.cli import show

CORE = ("torch", "transformers", "peft", "accelerate", "safetensors", "datasets", "numpy", "pydantic")
# extra -> packages that it installs, by distribution and import name
EXTRAS: dict[str, tuple[tuple[str, str], ...]] = {
    "align": (("trl", "trl"),),
    "quant": (("compressed-tensors", "compressed_tensors"),),
    "mt": (("sacrebleu", "sacrebleu"), ("py3langid", "py3langid")),
    "gguf": (("gguf", "gguf"), ("sentencepiece", "sentencepiece")),
    "bench": (("nnsight", "nnsight"), ("transformer-lens", "transformer_lens"), ("pyvene", "pyvene")),
}
# What a method can work on (weights as loaded) and where its result runs.
FORMATS = ("float32", "bfloat16", "float16", "quantised", "GGUF")
ENGINES = ("transformers", "transformers without trocar", "vLLM", "llama.cpp")
SUPPORT: dict[str, dict[str, str]] = {
    "where-to-edit": {
        "float32": "yes",
        "bfloat16": "yes (edits in float32, then rounds)",
        "float16": "yes (edits in float32, then rounds)",
        "quantised": "no",
        "GGUF": "no",
        "transformers": "patch or merged checkpoint",
        "transformers without trocar": "merged checkpoint",
        "vLLM": "no (vLLM has no image classifiers)",
        "llama.cpp": "no (no image classifiers)",
    },
    "creme": {
        "float32": "yes",
        "bfloat16": "yes (solved in float64, rounded once)",
        "float16": "yes (solved in float64, rounded once)",
        "quantised": "no",
        "GGUF": "no",
        "transformers": "patch, merged checkpoint or LoRA adapter",
        "transformers without trocar": "merged checkpoint or LoRA adapter",
        "vLLM": "merged checkpoint or LoRA adapter",
        "llama.cpp": "merged checkpoint, converted",
    },
    "mt-editing": {
        "float32": "yes",
        "bfloat16": "yes",
        "float16": "yes",
        "quantised": "no",
        "GGUF": "no",
        "transformers": "patch; merged checkpoint for neurons scaled for good",
        "transformers without trocar": "merged checkpoint, neurons scaled for good",
        "vLLM": "merged checkpoint, neurons scaled for good",
        "llama.cpp": "merged checkpoint, neurons scaled for good, converted",
    },
    "copra": {
        "float32": "yes",
        "bfloat16": "yes",
        "float16": "yes (mixed precision is the Trainer's)",
        "quantised": "callback and gate: any base that peft adapts; recipe: no",
        "GGUF": "no",
        "transformers": "LoRA adapter, patch or merged checkpoint",
        "transformers without trocar": "LoRA adapter or merged checkpoint",
        "vLLM": "LoRA adapter or merged checkpoint",
        "llama.cpp": "LoRA adapter or merged checkpoint, converted",
    },
    "merge": {
        "float32": "yes",
        "bfloat16": "yes (combined in float64, rounded once)",
        "float16": "yes (combined in float64, rounded once)",
        "quantised": "adapters of a quantised base: yes, folder by folder",
        "GGUF": "no",
        "transformers": "LoRA adapter, patch or merged checkpoint",
        "transformers without trocar": "LoRA adapter or merged checkpoint",
        "vLLM": "LoRA adapter or merged checkpoint",
        "llama.cpp": "LoRA adapter or merged checkpoint, converted",
    },
    "duquant": {
        "float32": "yes",
        "bfloat16": "yes (transforms and grids in float32 or wider)",
        "float16": "yes, where calibration stays finite",
        "quantised": "no",
        "GGUF": "no",
        "transformers": "patch or quantised folder",
        "transformers without trocar": "compressed-tensors without rotations; plain checkpoint (activations not rounded)",
        "vLLM": "compressed-tensors, one rotation a layer; plain checkpoint (activations not rounded)",
        "llama.cpp": "plain checkpoint, converted (activations not rounded)",
    },
}


def gather() -> dict[str, Any]:
    """All facts as plain data, ready for JSON."""
    import torch

    from trocar import __version__

    return {
        "versions": {"trocar": __version__, "python": platform.python_version(), **{name: _version(name) for name in CORE}},
        "machine": {
            "system": platform.platform(),
            "processor": _cpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory": show.size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else "unknown",
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "kernels": ", ".join(name for name in ("mkl", "mkldnn", "openmp") if getattr(torch.backends, name).is_available()) or "none",
        },
        "devices": _devices(),
        "extras": {extra: _extra(packages) for extra, packages in EXTRAS.items()},
        "models": _models(),
        "data": _data(),
        "support": [{"method": name, **row} for name, row in SUPPORT.items()],
    }


def show_doctor(as_json: bool) -> None:
    """Print what `gather` found."""
    facts = gather()
    if as_json:
        show.line(json.dumps(facts, indent=1))
        return
    for part in ("versions", "machine", "devices", "extras", "models", "data"):
        show.pairs(facts[part], part.capitalize())
        show.line()
    for name, row in SUPPORT.items():
        show.pairs({what: row[what] for what in (*FORMATS, *ENGINES)}, f"{name}: formats it edits, engines that run the result")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extra(packages: tuple[tuple[str, str], ...]) -> str:
    missing = [name for name, module in packages if importlib.util.find_spec(module) is None]
    return f"missing: {', '.join(missing)}" if missing else ", ".join(f"{name} {_version(name)}" for name, _ in packages)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": "float32, bfloat16, float16"}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{facts.name}, {show.size(facts.total_memory)}, compute {facts.major}.{facts.minor}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found["xpu"] = torch.xpu.get_device_name(0)
    return found


def _models() -> dict[str, str]:
    from trocar import lab
    from trocar.recipe.models import local_models, models_root

    found = {f"TROCAR_MODELS ({models_root()})": ", ".join(local_models()) or "nothing there"}
    return found | {f"lab:{row['name']}": row["weights"] for row in lab.list()}


def _data() -> dict[str, str]:
    from trocar.lab.sources import SETS, data_folder, excerpts

    folder = data_folder()
    found = {name: ", ".join(split for split in ("train", "test") if (folder / f"{name}-{split}.parquet").exists()) for name in SETS}
    return {f"TROCAR_DATA ({folder})": "found" if folder.is_dir() else "not found"} | {
        **{name: splits or "not there" for name, splits in found.items()},
        **{f"lab:{name}": "in the package" for name in excerpts()},
    }
