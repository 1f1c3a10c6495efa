"""A model's outputs on examples, cached under the model's fingerprint. Floor 3.

A cached output is served only to the model and the data that it was computed for: both are part of the file's name and are stored in
the file in full, and the tensors carry a digest. So no number is ever measured on the wrong state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trocar.anatomy import fingerprint, tensor_fingerprint
from trocar.core.errors import DataError, MetricError
from trocar.core.files import atomic_path
from trocar.core.progress import track

if TYPE_CHECKING:
    from trocar.method import Examples


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own training flag is restored on every way out."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def place(inputs: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Inputs on the model's device; floating-point ones in the dtype of its parameters."""
    parameter = next(model.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else None
    return {name: value.to(parameter.device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}


def outputs(model: torch.nn.Module, examples: Examples, batch_size: int = 64) -> torch.Tensor:
    """Logits of a classifier, (n, classes) float32 on the CPU, in evaluation mode and without gradients; training flags are restored.

    Raises MetricError if the model gives no logits of that shape, or gives NaN.
    """
    if batch_size < 1:
        raise MetricError(f"A batch of {batch_size} rows cannot be run.", "Say batch_size >= 1.")
    if len(examples) == 0:
        raise MetricError("There are no examples to run the model on.", "Give at least one.")
    parts = []
    with evaluating(model):
        for start in track(range(0, len(examples), batch_size), "outputs", -(-len(examples) // batch_size)):
            batch = {name: value[start : start + batch_size] for name, value in examples.inputs.items()}
            logits = getattr(model(**place(batch, model)), "logits", None)
            if logits is None or logits.ndim != 2 or logits.shape[0] != min(batch_size, len(examples) - start):
                shape = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
                raise MetricError(
                    f"{type(model).__name__} gives {shape}, not one row of class logits per example.", "Give it a classifier."
                )
            parts.append(logits.float().cpu())
    result = torch.cat(parts)
    if result.isnan().any():
        rows = result.isnan().any(1).nonzero().flatten().tolist()
        raise MetricError(f"The model gives NaN for {len(rows)} of {len(result)} examples, the first being '{examples.ids[rows[0]]}'.")
    return result


def data_digest(examples: Examples) -> str:
    """A digest of what a model sees of examples: names, dtypes, shapes and bytes of all inputs, in row order; of texts, which have no
    inputs yet, the digest of ids and columns."""
    if not examples.inputs:
        return hashlib.blake2b(json.dumps([list(examples.ids), *_texts(examples)], default=str).encode(), digest_size=16).hexdigest()
    parts = [f"{name}:{tensor_fingerprint(value)}" for name, value in sorted(examples.inputs.items())]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


class BaseOutputs:
    """A folder of outputs of models on data, so that the base runs once, before anything is touched."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, state: str, data_key: str) -> Path:
        """The file for a model's fingerprint and a digest of the data (and of whatever else the outputs depend on)."""
        name = hashlib.blake2b(json.dumps([state, data_key]).encode(), digest_size=16).hexdigest()
        return self.folder / f"{name}.safetensors"

    def get(self, state: str, data_key: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The stored tensor, or the one that `compute` returns, which is then stored.

        A file that says it is of another state or other data, or whose content does not match its digest (a disk error, a truncated
        copy), is never served: a warning says so, and it is computed again. Raises MetricError for an empty state or key.
        """
        if not state or not data_key:
            raise MetricError("Base outputs need a model's fingerprint and a data digest, and one is empty.", "Use fingerprint(model).")
        path = self.path(state, data_key)
        if path.exists():
            stored = _read(path, state, data_key)
            if stored is not None:
                return stored
            warnings.warn(f"{path} is damaged or belongs to another model or data; its outputs are computed again.", stacklevel=2)
        from safetensors.torch import save_file

        value = compute().detach().cpu().contiguous()
        header = json.dumps({"state": state, "data": data_key, "content": tensor_fingerprint(value)}, sort_keys=True)
        with atomic_path(path) as temporary:
            save_file({"outputs": value}, temporary, metadata={"trocar": header})
        return value

    def logits(self, model: torch.nn.Module, examples: Examples, batch_size: int = 64) -> torch.Tensor:
        """`outputs` of this model in its present state. Raises MetricError while the model is intervened on: its fingerprint, which is of
        its weights, would not tell these outputs from the plain ones."""
        if _intervened(model):
            raise MetricError("The model is under an intervention or a patch with hooks; its outputs cannot be cached.", "Use outputs().")
        return self.get(fingerprint(model), f"logits {data_digest(examples)}", lambda: outputs(model, examples, batch_size))


def _read(path: Path, state: str, data_key: str) -> torch.Tensor | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["trocar"])
            if (header["state"], header["data"]) != (state, data_key):
                return None
            value = file.get_tensor("outputs")
        return value if tensor_fingerprint(value) == header["content"] else None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _intervened(model: torch.nn.Module) -> bool:
    """Whether a hook of ours is on the model; hooks of others (transformers, accelerate) do not change what it computes."""
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if str(getattr(hook, "__module__", type(hook).__module__)).startswith("trocar."):
                return True
    return False


def refuse_overlap(locality: Examples, edited: Examples, what: str = "The locality set") -> None:
    """Raise DataError if examples to stay hold one that is edited (or of the edited group), by id or by the bytes of its inputs."""
    ids = sorted(set(locality.ids) & set(edited.ids))
    if ids:
        raise DataError(f"{what} holds {len(ids)} of the edited examples, the first being '{ids[0]}'.", "Choose unrelated examples.")
    known = dict(zip(_row_digests(edited), edited.ids, strict=True))
    for digest, name in zip(_row_digests(locality), locality.ids, strict=True):
        if digest in known:
            raise DataError(f"{what} holds '{name}', whose content equals the edited '{known[digest]}'.", "Choose unrelated examples.")


def _texts(examples: Examples) -> list[list[tuple[str, Any]]]:
    """The columns of every row of texts, in the order of their names."""
    return [[(name, examples.fields[name][row]) for name in sorted(examples.fields)] for row in range(len(examples))]


def _row_digests(examples: Examples) -> Sequence[str]:
    """One digest a row: of the picture if there are pictures of all rows, else of the model's inputs, or of a text's columns."""
    if not examples.inputs:
        return [hashlib.blake2b(json.dumps(row, default=str).encode(), digest_size=16).hexdigest() for row in _texts(examples)]
    if examples.pictures is not None:
        return [hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest() for picture in examples.pictures]
    names: list[Any] = sorted(examples.inputs)
    return ["".join(tensor_fingerprint(examples.inputs[name][row]) for name in names) for row in range(len(examples))]
