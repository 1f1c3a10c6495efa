"""Does the family table tell the truth about a model? The same questions for every family, answered by running it. Floor 1.

The tests, the support table of the docs and anybody who adds a row run exactly this: `check(model)`. Nothing here knows a family: what a
name claims is compared with what the model computes. The model is changed on the way and restored bit for bit, which is checked last.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from trocar.anatomy.components import Head, Linear, Neuron
from trocar.anatomy.fingerprints import checkpoint_fingerprints, fingerprint, structure_fingerprint, tensor_fingerprint
from trocar.anatomy.probing import (
    Mismatch,
    ablate,
    add_at,
    at,
    changed,
    close,
    equal,
    hooks,
    input_of,
    named,
    read,
    require,
    run,
    stored_transposed,
)
from trocar.anatomy.resolve import Anatomy, Tower
from trocar.core.errors import TrocarError


@dataclass(frozen=True)
class Result:
    """One answer. name: the question; tower; state: `holds`, `fails` or `absent` (the model has no such thing); detail: why."""

    name: str
    tower: str
    state: str
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.state != "fails"


class _Absent(Exception):
    """The question does not apply to this model."""


def check(model: nn.Module, thorough: bool = True, layers: tuple[int, ...] | None = None) -> list[Result]:
    """Ask all questions about a model in evaluation mode on any device.

    thorough: also those that copy the model or write it to a temporary folder (for small models). layers: where behaviour is compared,
    by default the first and the last block; names and sizes are compared in all. Raises what `Anatomy.of` raises.
    """
    anatomy, before = Anatomy.of(model), fingerprint(model)
    results = []
    with torch.no_grad():
        for tower in anatomy.towers.values():
            where = layers or tuple(sorted({0, tower.n_layers - 1}))
            for name, question in TOWER_QUESTIONS.items():
                results.append(_ask(name, tower.name, lambda question=question, tower=tower, where=where: question(anatomy, tower, where)))
        for name, question in MODEL_QUESTIONS.items():
            if thorough or name not in THOROUGH:
                results.append(_ask(name, "", lambda question=question: question(anatomy)))
    same = fingerprint(model) == before
    results.append(Result("restored", "", "holds" if same else "fails", "" if same else "the model is not what it was before the check"))
    return results


def _ask(name: str, tower: str, question: Callable[[], None]) -> Result:
    try:
        question()
    except _Absent as absent:
        return Result(name, tower, "absent", str(absent))
    except (Mismatch, TrocarError, ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError) as error:
        return Result(name, tower, "fails", str(error) if isinstance(error, Mismatch) else f"{type(error).__name__}: {error}")
    return Result(name, tower, "holds")


def sizes(anatomy: Anatomy, tower: Tower, where: tuple[int, ...]) -> None:
    """Blocks, width, heads, key/value heads, head size and neurons are those of the config (of a model from which nothing was removed)."""
    config = tower.config
    heads = config.num_attention_heads
    hidden = next(
        (config_value for key in ("intermediate_size", "ffn_dim", "n_inner") if (config_value := getattr(config, key, None))), None
    )
    equal(tower.n_layers, config.num_hidden_layers, "blocks")
    equal(tower.width, config.hidden_size, "width")
    for layer in range(tower.n_layers):
        equal(tower.heads(layer), heads, f"heads of block {layer}")
        equal(tower.kv_heads(layer), getattr(config, "num_key_value_heads", None) or heads, f"key/value heads of block {layer}")
        equal(tower.head_size(layer), getattr(config, "head_dim", None) or config.hidden_size // heads, f"head size of block {layer}")
        if hidden is not None:
            equal(tower.neurons(layer), hidden, f"neurons of block {layer}")
        equal(len(anatomy.components("head", tower.name)), heads * tower.n_layers, "heads in all")


def grouped(anatomy: Anatomy, tower: Tower, where: tuple[int, ...]) -> None:
    """With grouped queries the k and v rows of a head are marked shared, and are the same for exactly the heads of its group."""
    if tower.group(0) == 1:
        raise _Absent("every query head has its own key/value head")
    for layer in where:
        shared = [
            [part for part in anatomy.slices(item) if part.shared] for item in anatomy.components("head", tower.name) if item.layer == layer
        ]
        for index, own in enumerate(shared):
            require(bool(own), f"L{layer}.H{index} shares nothing")
            same = [other for other, parts in enumerate(shared) if parts == own]
            group = range(index // tower.group(layer) * tower.group(layer), (index // tower.group(layer) + 1) * tower.group(layer))
            equal(same, list(group), f"heads that read what L{layer}.H{index} reads")


def coverage(anatomy: Anatomy, tower: Tower, where: tuple[int, ...]) -> None:
    """Heads cover q and o exactly once and k and v once per query head of the group; neurons cover up, gate and down exactly once.
    No matrix of the block is left over (a gate that the row forgot)."""
    parameters = dict(anatomy.model.named_parameters())
    for layer in where:
        views = {role: anatomy.linear(Linear(layer, role, tower.name)) for role in tower.linears(layer)}
        for kind, roles, count in ((Head, "qkvo", tower.heads(layer)), (Neuron, ("up", "gate", "down"), tower.neurons(layer))):
            present = [role for role in roles if role in views]
            touched = {part.name: torch.zeros(parameters[part.name].shape) for role in present for part in views[role].whole()}
            wanted = {name: torch.zeros_like(grid) for name, grid in touched.items()}
            for index in range(count):
                for part in anatomy.slices(kind(layer, index, tower.name)):
                    part.put(touched[part.name], part.take(touched[part.name]) + 1)
            for role in present:
                whole = views[role].whole()
                for part in whole[:1] if role in ("o", "down") else whole:  # their bias belongs to no single head or neuron
                    part.put(wanted[part.name], tower.group(layer) if role in "kv" else 1)
            for name, grid in touched.items():
                require(torch.equal(grid, wanted[name]), f"L{layer}: the {kind.kind}s do not cover {name} as often as they should")
        attn, mlp, block = (named(anatomy, at(tower, layer) + tail) for tail in (".attn", ".mlp", ""))
        equal(set(attn) & set(mlp), set(), f"parameters that attention and MLP of block {layer} share")
        inside = {name for name in parameters if name.startswith(f"{tower.blocks_path}.{layer}.")}
        equal(set(block), inside, f"parameters of block {layer}")
        require({view.name for view in views.values()} <= set(attn) | set(mlp), f"L{layer}: attention and MLP lack a projection")
        matrices = {name for name in block if parameters[name].ndim > 1}
        equal(matrices, {view.name for view in views.values()}, f"matrices of block {layer}")


def linears(anatomy: Anatomy, tower: Tower, where: tuple[int, ...]) -> None:
    """get() applied to a linear map's input, plus its bias, is its output."""
    for layer in where:
        for role in tower.linears(layer):
            view = anatomy.linear(Linear(layer, role, tower.name))
            seen: dict[str, torch.Tensor] = {}
            with hooks(view.module.register_forward_hook(lambda _, args, out, seen=seen: seen.update(x=args[0], y=out))):
                run(tower)
            wanted = seen["y"] if view.rows is None else seen["y"][..., list(view.rows)]
            bias = view.get_bias()
            got = seen["x"] @ view.get().T + (0 if bias is None else bias)
            close(got, wanted, f"L{layer} {role}")


def attention(anatomy: Anatomy, tower: Tower, where: tuple[int, ...]) -> None:
    """q, k and v are what their names say, head by head: a query acts at its own position only, a key at others too, and with q switched
    off a head returns the mean of the values it may look at, which belong to its own key/value head."""
    for layer in where:
        maps = {role: anatomy.linear(Linear(layer, role, tower.name)) for role in "qkv"}
        size, group, heads = tower.head_size(layer), tower.group(layer), tower.heads(layer)
        plain, value = read(tower, layer, maps["v"])
        length = plain.shape[1]
        for role, alone in (("q", True), ("k", False)):
            moved = read(tower, layer, maps[role], change=functools.partial(add_at, position=length // 2))[0]
            elsewhere = [t for t in range(length) if t != length // 2]
            quiet = torch.equal(moved[:, elsewhere], plain[:, elsewhere])
            require(quiet == alone, f"L{layer}: changing {role} at one position {'moves' if alone else 'leaves'} the others")
        mean = (
            value.cumsum(1) / torch.arange(1, length + 1, device=value.device)[:, None, None]
            if tower.causal
            else value.mean(1, keepdim=True)
        )
        mean = mean.expand(-1, length, -1, -1).repeat_interleave(group, dim=2)
        index = heads - 1
        with changed(anatomy, maps["q"].row(range(index * size, (index + 1) * size))):
            off = read(tower, layer, maps["v"])[0]
        close(off[:, :, index], mean[:, :, index], f"L{layer}.H{index} without its query")
        require(torch.equal(off[:, :, :index], plain[:, :, :index]), f"L{layer}: switching off the query of H{index} changed other heads")
        for role in ("q", "k"):
            with changed(anatomy, maps[role].whole()):
                close(read(tower, layer, maps["v"])[0], mean, f"L{layer} without {role}")
        with changed(anatomy, maps["v"].row(range(size))):
            close(
                read(tower, layer, maps["v"])[0][:, :, :group],
                torch.zeros_like(plain[:, :, :group]),
                f"L{layer} without the first value head",
            )


def heads(anatomy: Anatomy, tower: Tower, where: tuple[int, ...]) -> None:
    """Zeroing a head's columns of o is zeroing that head at the input of o, and it changes the output."""
    for layer in where:
        size, view = tower.head_size(layer), anatomy.linear(Linear(layer, "o", tower.name))
        for index in {0, tower.heads(layer) - 1}:
            columns = [
                part for part in anatomy.slices(Head(layer, index, tower.name)) if part.name == view.name and part.dim == 1 - view.out_dim
            ]
            ablate(anatomy, tower, view.module, columns, slice(index * size, (index + 1) * size), f"L{layer}.H{index}")


def neurons(anatomy: Anatomy, tower: Tower, where: tuple[int, ...]) -> None:
    """Zeroing a neuron's column of down is zeroing it at the input of down; its up rows scale it alone; a closed gate silences it alone."""
    for layer in where:
        view, count = anatomy.linear(Linear(layer, "down", tower.name)), tower.neurons(layer)
        busy = input_of(tower, view.module).abs().flatten(0, -2).amax(0)  # with ReLU some neurons may be silent on these inputs
        for index in {int(busy.argmax()), *[i for i in (0, count - 1) if busy[i] > 0]}:
            parts = anatomy.slices(Neuron(layer, index, tower.name))
            columns = [part for part in parts if part.name == view.name and part.dim == 1 - view.out_dim]
            ablate(anatomy, tower, view.module, columns, slice(index, index + 1), f"L{layer}.N{index}")
            plain, others = input_of(tower, view.module), [i for i in range(count) if i != index]
            for role in ("up", "gate"):
                if role not in tower.linears(layer):
                    continue
                rows = anatomy.linear(Linear(layer, role, tower.name)).row([index])
                require(all(part in parts for part in rows), f"L{layer}.N{index} lacks its rows of {role}")
                with changed(anatomy, rows):
                    moved = input_of(tower, view.module)
                require(torch.equal(moved[..., others], plain[..., others]), f"L{layer}.N{index}: its {role} row changes other neurons")
                close(moved[..., index], torch.zeros_like(moved[..., index]), f"L{layer}.N{index} without {role}")
            gated = "gate" in tower.linears(layer)
            with changed(anatomy, anatomy.linear(Linear(layer, "up", tower.name)).row([index]), factor=2):
                moved = input_of(tower, view.module)[..., index]
            linear = torch.allclose(moved, 2 * plain[..., index], rtol=1e-4, atol=1e-6 * float(plain.abs().max()))
            require(linear or not gated, f"L{layer}.N{index}: the activation is not proportional to up, so up and gate are mixed up")


def fused(anatomy: Anatomy, tower: Tower, where: tuple[int, ...]) -> None:
    """Members of a fused projection divide its rows among them without a rest."""
    found = [(layer, role) for layer in where for role in ("qkv", "gate_up") if tower.has(layer, role)]
    if not found:
        raise _Absent("no fused projection")
    for layer, role in found:
        views = [anatomy.linear(Linear(layer, member, tower.name)) for member in tower.row.layouts[role].removeprefix("head:").split(",")]
        rows = sorted(row for view in views for row in view.rows or ())
        equal(rows, list(range(views[0].parameter.shape[views[0].out_dim])), f"rows of L{layer} {role}")


def setting(anatomy: Anatomy, tower: Tower, where: tuple[int, ...]) -> None:
    """set() writes what get() reads, and writing back what was read restores every bit."""
    for layer in where:
        for role in tower.linears(layer):
            view = anatomy.linear(Linear(layer, role, tower.name))
            weight, bias, before = view.get().clone(), view.get_bias(), tensor_fingerprint(view.parameter)
            new = torch.linspace(-1, 1, weight.numel(), device=weight.device).reshape(weight.shape).to(weight.dtype)
            view.set(new)
            try:
                require(torch.equal(view.get(), new), f"L{layer} {role}: get() is not what was set")
                require(tensor_fingerprint(view.parameter) != before, f"L{layer} {role}: set() did not reach the parameter")
            finally:
                view.set(weight)
            equal(tensor_fingerprint(view.parameter), before, f"L{layer} {role} written back")
            if bias is not None and view.bias is not None:
                before = tensor_fingerprint(view.bias)
                view.set_bias((kept := bias.clone()) + 1)
                moved = (view.get_bias() - kept).round()  # type: ignore[operator]
                view.set_bias(kept)
                require(torch.equal(moved, torch.ones_like(kept)), f"L{layer} {role}: get_bias() is not what was set")
                equal(tensor_fingerprint(view.bias), before, f"bias of L{layer} {role} written back")


def names(anatomy: Anatomy) -> None:
    """Embedding and head are those that transformers knows, every slice names a parameter and fits into it."""
    model, parameters = anatomy.model, dict(anatomy.model.named_parameters())
    text = [tower for tower in anatomy.towers.values() if tower.modality == "text"]
    if text:
        with contextlib.suppress(NotImplementedError):  # CLIPModel itself does not know its embedding
            require(any(tower.embedding is model.get_input_embeddings() for tower in text), "the embedding is another")
    output = model.get_output_embeddings()
    if output is not None:
        require(any(tower.head is output for tower in anatomy.towers.values()), "the head is another than the model's")
    for kind in ("block", "attention", "mlp", "head", "linear"):
        for component in anatomy.components(kind):
            for part in anatomy.slices(component):
                require(part.name in parameters, f"{component}: there is no parameter {part.name}")
                require(part.take(parameters[part.name]).numel() > 0, f"{component}: nothing of {part.name}")


def fingerprints(anatomy: Anatomy) -> None:
    """The fingerprint stays the same when nothing changes, and changes with one entry of any parameter (of two, in
    models of a million parameters and more)."""
    model = anatomy.model
    before, structure = fingerprint(model), structure_fingerprint(model)
    tensors = list(dict(model.named_parameters()).items())
    small = sum(value.numel() for _, value in tensors) < 1_000_000  # each parameter costs hashing the whole model
    few = tensors if small else [tensors[len(tensors) // 2], tensors[-1]]
    for name, parameter in few:
        flat, last = parameter.detach().view(-1), parameter.numel() - 1
        kept = flat[last].clone()
        flat[last] = torch.nextafter(kept.float(), kept.float() + 1).to(kept.dtype) if kept.dtype == torch.float32 else -kept - 1
        try:
            require(fingerprint(model) != before, f"a change of {name} is not seen")
        finally:
            flat[last] = kept
    require((fingerprint(model), structure_fingerprint(model)) == (before, structure), "the fingerprint is not stable")


def saving(anatomy: Anatomy) -> None:
    """The fingerprint survives save_pretrained and from_pretrained."""
    model = anatomy.model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=model.dtype).to(model.device)
    equal(fingerprint(again), fingerprint(model), "fingerprint after saving and loading")


def files(anatomy: Anatomy) -> None:
    """Every projection is found in the saved files by its content, without torch."""
    with tempfile.TemporaryDirectory() as folder:
        anatomy.model.save_pretrained(folder)
        stored = list(checkpoint_fingerprints(folder))
    own = {view.name: view.parameter for item in anatomy.components("linear") for view in [anatomy.linear(item)]}
    contents, known = {tensor.fingerprint for tensor in stored}, {tensor.name for tensor in stored}
    missing = [name for name, value in own.items() if tensor_fingerprint(value) not in contents]
    if missing and not known & set(missing):
        raise _Absent(f"transformers rewrites {missing[0]} and {len(missing) - 1} more into other tensors when it saves")
    equal(missing, [], "parameters not found in the file by content")


def wrappers(anatomy: Anatomy) -> None:
    """DataParallel and torch.compile are seen through; a PEFT model's linear maps are those of the base."""
    from peft import LoraConfig, get_peft_model

    model = anatomy.model
    for wrapped in (cast(nn.Module, torch.compile(model)), nn.DataParallel(model, device_ids=[])):
        require(Anatomy.of(wrapped).model is model, f"{type(wrapped).__name__} is not seen through")
        equal(fingerprint(wrapped), fingerprint(model), f"fingerprint inside {type(wrapped).__name__}")
    targets = sorted({anatomy.linear(item).path for item in anatomy.components("linear")})
    adapted = Anatomy.of(
        get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=targets, fan_in_fan_out=stored_transposed(anatomy)))
    )
    for item in anatomy.components("linear"):
        view = adapted.linear(item)
        require(torch.equal(view.get(), anatomy.linear(item).get()), f"{item} of the PEFT model is not the base's")
        require(hasattr(view.module, "base_layer"), f"{item} of the PEFT model is not called through its adapter")
    for kind in ("head", "attention", "block"):
        for item in anatomy.components(kind):
            wanted = [(part.dim, part.index, part.shared) for part in anatomy.slices(item)]
            equal([(part.dim, part.index, part.shared) for part in adapted.slices(item)], wanted, f"slices of {item} under PEFT")


TOWER_QUESTIONS: dict[str, Callable[[Anatomy, Tower, tuple[int, ...]], None]] = {
    "sizes": sizes,
    "grouped queries": grouped,
    "coverage": coverage,
    "linear maps": linears,
    "attention": attention,
    "heads": heads,
    "neurons": neurons,
    "fused": fused,
    "set and restore": setting,
}
MODEL_QUESTIONS: dict[str, Callable[[Anatomy], None]] = {
    "names": names,
    "fingerprint": fingerprints,
    "save and load": saving,
    "files": files,
    "wrappers": wrappers,
}
THOROUGH = ("save and load", "files", "wrappers")
