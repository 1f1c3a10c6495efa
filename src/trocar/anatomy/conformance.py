"""What must be true of every family: the same measurements for a tiny random model, a real one, and a row that you add. Floor 1.

```python
from trocar.anatomy import tiny_model
from trocar.anatomy.conformance import check
assert all(result.ok for result in check(tiny_model("llama")))
```
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trocar.anatomy.components import Head, Linear, Neuron
from trocar.anatomy.fingerprints import fingerprint
from trocar.anatomy.resolve import Anatomy, Tower
from trocar.anatomy.tiny import tiny_inputs

TOLERANCE = 1e-4  # relative to the largest entry of the module's own output, float32


@dataclass(frozen=True)
class Result:
    """One property of one model: what was asked, whether it holds, and what was seen when it does not."""

    name: str
    ok: bool
    seen: str = ""


def check(model: torch.nn.Module, inputs: Mapping[str, Any] | None = None, layers: tuple[int, ...] | None = None) -> list[Result]:
    """Measure `model` (float32, evaluation mode) on `inputs` (default: random ones); `layers`, by default the first and the last.

    The model is left bit for bit as it was. Raises UnknownFamilyError or UnsupportedModelError where the model cannot be resolved at all.
    """
    anatomy = Anatomy.of(model)
    inputs = tiny_inputs(model) if inputs is None else inputs
    before = fingerprint(model)
    results = []
    for tower in anatomy.towers.values():
        for layer in layers or sorted({0, tower.n_layers - 1}):
            where = f"{tower.name + '.' if tower.name else ''}L{layer}"
            results += [Result(f"{where} {r.name}", r.ok, r.seen) for r in _layer(anatomy, tower, layer, inputs)]
    results.append(Result("the model is as it was", fingerprint(model) == before))
    first = next(iter(anatomy.model.parameters()))
    kept = first.detach().reshape(-1)[:1].clone()
    with torch.no_grad():
        first.reshape(-1)[:1].add_(1)
    results.append(Result("the fingerprint sees one changed entry", fingerprint(model) != before))
    with torch.no_grad():
        first.reshape(-1)[:1].copy_(kept)
    results.append(Result("the fingerprint sees it restored", fingerprint(model) == before))
    return results


def _layer(anatomy: Anatomy, tower: Tower, layer: int, inputs: Mapping[str, Any]) -> Iterator[Result]:
    heads, size, neurons = tower.heads(layer), tower.head_size(layer), tower.neurons(layer)
    yield Result("groups divide the heads", heads % tower.kv_heads(layer) == 0, f"{heads} heads, {tower.kv_heads(layer)} key/value heads")
    o, down = (anatomy.linear(Linear(layer, role, tower.name)) for role in ("o", "down"))
    yield Result("heads x head size is the input of o", heads * size == o.in_features, f"{heads} x {size}, {o.in_features}")
    for kind, view, count in ((Head, o, heads), (Neuron, down, neurons)):
        columns = [i for n in range(count) for s in anatomy.slices(kind(layer, n, tower.name)) if s.name == view.name for i in s.index]
        yield Result(f"{kind.kind}s cover {view.path.rsplit('.', 1)[-1]} once", sorted(columns) == list(range(view.in_features)))

    roles = tower.linears(layer)
    seen = _calls(anatomy, tower, layer, roles, inputs)
    for role in roles:
        view = anatomy.linear(Linear(layer, role, tower.name))
        given, put_out = seen[view.path]
        ours = given.to(view.get().dtype) @ view.get().T
        bias = view.get_bias()
        ours = ours if bias is None else ours + bias
        theirs = put_out if view.rows is None else put_out[..., list(view.rows)]
        yield _close(f"{role} as a matrix gives what the module gives", ours, theirs)
        value = view.get().clone()
        view.set(value)
        yield Result(f"{role} set to itself is the same", torch.equal(view.get(), value))

    for view, kind, index, width in ((o, Head, heads - 1, size), (down, Neuron, neurons // 2, 1)):
        columns = slice(index * width, (index + 1) * width)
        weight = view.get().clone()
        given = seen[view.path][0]
        without = given.clone()
        without[..., columns] = 0
        try:
            for part in anatomy.slices(kind(layer, index, tower.name)):
                if part.name == view.name:
                    part.put(view.parameter, 0.0)
            yield _close(f"a {kind.kind} zeroed in the weights is zeroed in the input", view.module(given), _with(view, weight, without))
        finally:
            view.set(weight)


def _calls(anatomy: Anatomy, tower: Tower, layer: int, roles: tuple[str, ...], inputs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Input and output of each linear map's module in one forward pass."""
    seen: dict[str, tuple[Any, Any]] = {}
    views = {view.path: view for view in (anatomy.linear(Linear(layer, role, tower.name)) for role in roles)}
    hooks = [view.module.register_forward_hook(_keeper(seen, path)) for path, view in views.items()]
    try:
        with torch.no_grad():
            anatomy.model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _keeper(seen: dict[str, tuple[Any, Any]], path: str) -> Any:
    def keep(_module: torch.nn.Module, args: tuple[Any, ...], out: Any) -> None:
        seen[path] = (args[0].detach(), out.detach())

    return keep


def _with(view: Any, weight: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    bias = view.get_bias()
    result = given.to(weight.dtype) @ weight.T
    return result if bias is None else result + bias


def _close(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> Result:
    if ours.shape != theirs.shape:
        return Result(name, False, f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
    gap = float((ours - theirs).detach().abs().max()) / max(1e-12, float(theirs.abs().max()))
    return Result(name, gap < TOLERANCE, f"relative deviation {gap:.1e}")
