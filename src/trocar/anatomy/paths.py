"""Modules by path, and what wraps them. Floor 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from trocar.anatomy.fingerprints import unwrap_parallel
from trocar.anatomy.linear import base_layer
from trocar.core.errors import UnsupportedModelError


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside parallel, compiled and PEFT wrappers. Raises UnsupportedModelError for FSDP."""
    while True:
        if type(model).__name__ == "FullyShardedDataParallel":
            raise UnsupportedModelError(
                "This model is wrapped in FSDP, which keeps flattened parameters.", "Use the module before wrapping it."
            )
        inner = unwrap_parallel(model)
        if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()  # type: ignore[operator]
        if inner is model:
            return model
        model = inner


def refuse_experts(module: nn.Module, path: str) -> None:
    """Raise UnsupportedModelError if `module` holds a mixture of experts."""
    for name, inner in module.named_modules():
        if name.rpartition(".")[2] == "experts":
            raise UnsupportedModelError(
                f"{join(path, name)} ({type(inner).__name__}) holds experts, which have no single row of neurons.",
                "Dense models are supported.",
            )


def base_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters without those of adapters."""
    inner = base_layer(module)
    if inner is module:
        inner = getattr(module, "original_module", module)  # peft's modules_to_save
    yield from inner.parameters(recurse=False)
    for child in inner.children():
        yield from base_parameters(child)


def get(module: nn.Module, path: str | None) -> nn.Module | None:
    """The module at a dotted path, or None."""
    if path is None:
        return None
    found: Any = module
    for part in path.split(".") if path else ():
        found = getattr(found, part, None) if not part.isdigit() else found[int(part)]
    return found if isinstance(found, nn.Module) else None


def first(module: nn.Module, names: str) -> str | None:
    """The first of `a|b|c` that exists below `module`."""
    return next((name for name in names.split("|") if get(module, name) is not None), None)


def join(*parts: str) -> str:
    """Non-empty parts, joined by dots."""
    return ".".join(part for part in parts if part)


def prefixed(prefix: str, path: str | None) -> str | None:
    """`path` below `prefix`; None stays None."""
    return None if path is None else join(prefix, path)
