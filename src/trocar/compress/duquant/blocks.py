"""One block: smoothing folded, transforms found, weights rounded, the quantised layers put in place. Floor 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trocar.anatomy import Anatomy, Tower
from trocar.compress.duquant import streams
from trocar.compress.duquant.chains import Sizes, build_chain, sizes_of, smoothing_scale
from trocar.compress.duquant.config import DuQuantConfig
from trocar.compress.duquant.experts import Route, output_error, quantise_experts, routes, sent_as, smooth_experts
from trocar.compress.duquant.groups import (
    Group,
    Staged,
    by_value,
    chain_of,
    fold,
    groups,
    is_float,
    multiply,
    quantisers,
    stage,
    to_heads,
)
from trocar.compress.duquant.learning import learn_clips
from trocar.compress.duquant.moments import CLIP_ROWS, activation_clip, group_inputs, moments, rounded
from trocar.compress.duquant.rounding import towards
from trocar.compress.duquant.streams import Batch
from trocar.core.errors import DataError, UnsupportedModelError
from trocar.core.seeds import generator
from trocar.patch.quantised import GroupInput, QuantisedExperts, QuantisedLinear, Transform

FOLD_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # of a block's output, a router's weights; half precision: 3e-2


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the float block does: sizes (C,) of the channels of each group's input, outputs per batch, and whether a ReLU lies before the
    down map."""

    sizes: Mapping[str, torch.Tensor]
    outputs: Sequence[torch.Tensor]
    relu: bool


@dataclass(frozen=True, eq=False)
class BlockResult:
    """A quantised block. layers: path -> module in place; norms: path -> module in float that took a scale (norms, a router); taken: (path,
    original module); errors: relative error of each layer's output on the float block's inputs, and of the block's output (`block`);
    experts: path -> mixture of experts in place; tokens: path -> how many calibration tokens each expert was sent."""

    layers: dict[str, QuantisedLinear]
    norms: dict[str, nn.Module]
    taken: list[tuple[str, nn.Module]]
    errors: dict[str, float]
    experts: dict[str, QuantisedExperts] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)


def quantise_block(
    anatomy: Anatomy, tower: Tower, layer: int, reference: list[Batch], current: list[Batch], config: DuQuantConfig, seed: int
) -> tuple[BlockResult, list[Batch], list[Batch]]:
    """Quantise block `layer` in place. reference: its inputs in the float model; current: those in the model quantised so far.

    Returns the result and both streams at the next block. The original modules are kept aside unchanged; nothing else is touched.
    Raises DataError for input that is not finite, UnsupportedModelError if a fold would change what the block computes.
    """
    block = tower.blocks[layer]
    found = groups(tower, layer)
    seen = statistics(tower, layer, found, reference, config)
    sent = routes(block, layer, tower.module(layer, "experts"), reference) if tower.has(layer, "experts") else []
    staged = stage(anatomy, tower, layer)
    tokens: list[int] = []
    try:
        online = smooth(staged, found, seen, config, sent)
        _check_folds(staged, reference, seen, config, sent)
        samples = _samples(staged, found, reference)
        sent = routes(block, layer, staged.experts, reference[:1]) if staged.experts is not None else []
        staged.floats, staged.float_experts = dict(staged.layers), staged.experts
        bases, learned = {}, config.weights.clip == "learned"
        for group in _dense(found):
            basis = quantise_group(staged, group, online.get(group.name), reference, current, config, seed)
            bases |= {group.name: basis} if learned else {}  # a copy of the block in float, needed to learn only
        if staged.experts is not None:
            tokens = quantise_experts(staged, found, current, config, seed)
        if learned:
            learn_clips(block, layer, staged.layers, bases, current, seen.outputs, config)
        errors = _errors(staged, found, samples, sent, 0 if reference[0].real is not None else reference[0].hidden.shape[1])
        with torch.no_grad():
            after = [batch.entering(streams.run(block, layer, batch)) for batch in current]
        following = [batch.entering(out) for batch, out in zip(reference, seen.outputs, strict=True)]
        if config.calibration == "rows":
            errors["block"] = _block_error(after, following)
    except BaseException:
        staged.put_back()
        raise
    paths = {id(anatomy.model.get_submodule(path)): path for path, _ in staged.taken}
    layers = {paths[id(module)]: module for module in staged.layers.values()}
    experts = {} if staged.experts is None else {tower.path(layer, "experts"): staged.experts}
    norms = {path: anatomy.model.get_submodule(path) for path, _ in staged.taken if path not in layers and path not in experts}
    result = BlockResult(layers, norms, list(staged.taken), errors, experts, dict.fromkeys(experts, tokens))
    return result, following, after


def _dense(found: Sequence[Group]) -> list[Group]:
    return [group for group in found if not group.of_experts]


def statistics(tower: Tower, layer: int, found: Sequence[Group], batches: Sequence[Batch], config: DuQuantConfig) -> Statistics:
    """One pass of the float block over its inputs."""
    measure = "peak" if config.smoothing is None else config.smoothing.measure
    seen = [group for group in found if group.name != "experts_hidden"]
    sizes = {group.name: Sizes(measure) for group in seen}
    heads = {group.name: tower.module(layer, group.roles[0]) for group in seen}

    def see(name: str, rows: torch.Tensor) -> None:
        if not rows.isfinite().all():
            where = f"{tower.path(layer, 'block')}, input of {name}"
            raise DataError(f"{where}: {int((~rows.isfinite()).sum())} entries are not finite.", "Calibrate in bfloat16 or float32.")
        sizes[name].add_tokens(rows)

    relu = _Relu()
    asked = any(group.name == "mlp_hidden" and not group.source for group in found)
    handles = relu.attach(tower, layer) if asked else []
    try:
        outputs = [streams.watch(tower.blocks[layer], layer, batch, heads, see) for batch in batches]
    finally:
        for handle in handles:
            handle.remove()
    return Statistics({name: size.result() for name, size in sizes.items()}, [out for out in outputs if out is not None], relu.holds)


class _Relu:
    """Whether what enters the down map is, entry by entry, the positive part of what left the up map."""

    def __init__(self) -> None:
        self.up: torch.Tensor | None = None
        self.checks: list[bool] = []

    @property
    def holds(self) -> bool:
        return bool(self.checks) and all(self.checks)

    def attach(self, tower: Tower, layer: int) -> list[Any]:
        def after(module: nn.Module, args: Any, out: torch.Tensor) -> None:
            self.up = out.detach()

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            same = self.up is not None and self.up.numel() == args[0].numel()
            self.checks.append(same and torch.equal(self.up.clamp(min=0).flatten(), args[0].detach().flatten()))  # type: ignore[union-attr]

        up, down = tower.module(layer, "up"), tower.module(layer, "down")
        return [up.register_forward_hook(after), down.register_forward_pre_hook(before)]


def smooth(
    staged: Staged, found: Sequence[Group], seen: Statistics, config: DuQuantConfig, sent: Sequence[Route]
) -> dict[str, torch.Tensor]:
    """Move outliers from activations to weights. Scales come from the unchanged weights of all groups; each is folded into what lies before
    its group. Returns, by group, the scales that fold into nothing and have to be divided by as the model runs. sent: to the experts."""
    if config.smoothing is None:
        return {}
    online, scales = {}, {}
    if staged.experts is not None:
        smooth_experts(staged, found, seen.sizes["experts_in"], sent, config)
    plain = [group for group in _dense(found) if group.name != "shared_in"]  # which has the experts' scale
    for group in plain:
        roles = group.roles if config.smoothing.weights == "all" else group.roles[:1]
        weight = sizes_of(torch.cat([staged.layers[role].get_buffer("values") for role in roles]), config.smoothing.measure)
        a = seen.sizes[group.name].to(weight)
        if group.source == "v":
            a, weight = (sizes_of(by_value(part, staged.tower, staged.layer), config.smoothing.measure) for part in (a, weight))
        scale = smoothing_scale(a, weight, config.smoothing.alpha)
        scales[group.name] = to_heads(scale, staged.tower, staged.layer) if group.source == "v" else scale
    for group in plain:
        if is_float(group, config):
            continue
        source = "up" if group.name == "mlp_hidden" and seen.relu else group.source
        if source:
            multiply(staged, group, fold(staged, Group(group.tower, group.layer, group.name, group.roles, source), scales[group.name]))
        elif config.smoothing.online:
            online[group.name] = scales[group.name]
    return online


def quantise_group(
    staged: Staged,
    group: Group,
    scale: torch.Tensor | None,
    reference: Sequence[Batch],
    current: Sequence[Batch],
    config: DuQuantConfig,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Find the group's transform on its input in the model as it is quantised so far, round its weights, put the layers in place.

    Returns the float weights in the transformed basis, by role.
    """
    if is_float(group, config):
        return {}
    stream = generator(seed, "duquant", group)
    parts = group_inputs(staged, group, current, config.rows, stream)
    rows = streams.sample(parts, config.rows, stream)
    channels = rows.shape[1]
    scaled = rows if scale is None else rows / scale.to(rows)
    transform = build_chain(scaled, chain_of(group, config), stream, name=staged.tower.path(staged.layer, group.roles[0]))
    transform = Transform(channels, scale, transform.steps).to(torch.float32)
    activations, weights = quantisers(group, channels, config)
    if config.activations.clip == "search" and not activations.is_float:
        every = torch.cat([part[:: max(1, len(part) * len(parts) // CLIP_ROWS)] for part in parts])
        activations = activations.model_copy(update={"clip": activation_clip(transform.online(every.float()), activations)})
    shared = GroupInput(transform, activations, readers=len(group.roles)).to(rows.device)
    bases = {role: transform.weight(staged.layers[role].get_buffer("values")) for role in group.roles}
    seen = None
    if config.weights.rounding != "nearest" and not weights.is_float:
        seen = moments(
            staged, group, current, shared, parts, reference if config.weights.rounding == "gptaq" else None, config.weights.reach
        )
    aims = list(bases.values())
    if seen is not None and seen.halves is not None:
        aims = list(towards(torch.cat(aims), *seen.halves).split([len(weight) for weight in aims]))
    for number, role in enumerate(group.roles):
        old = staged.layers[role]
        content = bases[role] if weights.is_float else rounded(aims[number], weights, config, None if seen is None else seen.hessian)
        new = QuantisedLinear(shared, weights, content, old.bias, owner=number == 0).to(rows.device)
        staged.place(role, new)
    return bases


def _check_folds(staged: Staged, reference: Sequence[Batch], seen: Statistics, config: DuQuantConfig, sent: Sequence[Route]) -> None:
    """The smoothed float block must compute what the block computed: readers that nobody knew of would show here."""
    if config.smoothing is None and staged.experts is None:
        return
    forced = nullcontext([0.0]) if staged.experts is None else sent_as(sent[0], reference[0], staged.experts)
    with torch.no_grad(), forced as router:
        now = streams.run(staged.tower.blocks[staged.layer], staged.layer, reference[0])
    was, now = reference[0].only_real(seen.outputs[0]).float(), reference[0].only_real(now).float()
    error = max(float((now - was).norm() / was.norm()), router[0])
    if not error < FOLD_TOLERANCE.get(seen.outputs[0].dtype, 3e-2):
        path = staged.tower.path(staged.layer, "block")
        if config.smoothing is None:
            raise UnsupportedModelError(
                f"The experts of {path} compute something else than act(gate x) * up x (relative error {error:.2g}).",
                "Such experts cannot be quantised yet.",
            )
        raise UnsupportedModelError(
            f"Smoothing would change what {path} computes (relative error {error:.2g}).",
            "Something outside the known layers reads a norm, or the values pass through more than attention. Set smoothing to null.",
        )


def _samples(staged: Staged, found: Sequence[Group], reference: Sequence[Batch], limit: int = 512) -> dict[str, torch.Tensor]:
    """Inputs of each group in the smoothed float block, the first position of every window left out."""
    rows: dict[str, torch.Tensor] = {}
    length = reference[0].hidden.shape[1]

    def see(name: str, x: torch.Tensor) -> None:
        inside = torch.arange(len(x), device=x.device) % length != 0 if reference[0].real is None else slice(None)
        rows[name] = x[inside][:limit]

    heads = {group.name: staged.layers[group.roles[0]] for group in _dense(found)}
    streams.watch(staged.tower.blocks[staged.layer], staged.layer, reference[0], heads, see)
    return rows


def _errors(
    staged: Staged, found: Sequence[Group], samples: Mapping[str, torch.Tensor], sent: Sequence[Route], length: int
) -> dict[str, float]:
    """||quantised output - float output|| / ||float output|| of every layer, biases left out; of all experts together."""
    errors = {}
    with torch.no_grad():
        if staged.experts is not None and staged.float_experts is not None:
            path = staged.tower.path(staged.layer, "experts")
            errors[path] = output_error(staged.experts, staged.float_experts, sent[0], length)
        for group in _dense(found):
            x = samples[group.name].float()
            for role in group.roles:
                layer = staged.layers[role]
                right = x @ staged.floats[role].get_buffer("values").T
                bias = 0 if layer.bias is None else layer.bias
                errors[staged.tower.path(staged.layer, role)] = float((layer(x) - bias - right).norm() / right.norm())
    return errors


def _block_error(after: Sequence[Batch], following: Sequence[Batch]) -> float:
    """Root mean square over positions of the relative error of the block's output."""
    parts = []
    for ours, theirs in zip(after, following, strict=True):
        a, b = ours.only_real(ours.hidden).float(), theirs.only_real(theirs.hidden).float()
        parts.append(((a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-12)).square())
    return float(torch.cat(parts).mean().sqrt())
