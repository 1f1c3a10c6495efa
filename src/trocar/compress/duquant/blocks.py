"""One block: smoothing folded, transforms found, weights rounded, the quantised layers put in place. Floor 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trocar.anatomy import Anatomy, Tower
from trocar.compress.duquant import streams
from trocar.compress.duquant.chains import build_chain, sizes_of, smoothing_scale
from trocar.compress.duquant.config import DuQuantConfig
from trocar.compress.duquant.groups import Group, Staged, by_value, fold, groups, multiply, stage, to_heads, wanted_bits
from trocar.compress.duquant.learning import learn_clips
from trocar.compress.duquant.moments import Moments, activation_clip, group_inputs, moments
from trocar.compress.duquant.rounding import Codes, best_clip, gptq, nearest, towards
from trocar.compress.duquant.streams import Batch
from trocar.core.errors import DataError, UnsupportedModelError
from trocar.core.seeds import generator
from trocar.patch.quantised import GroupInput, QuantisedLinear, Quantiser, Transform

CLIP_ROWS = 2048  # about how many rows the search for a clip of activations looks at
FOLD_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # of a block's output; half precision: 3e-2


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the float block does: sizes (C,) of the channels of each group's input, outputs per batch, and whether a ReLU lies before the
    down map."""

    sizes: Mapping[str, torch.Tensor]
    outputs: Sequence[torch.Tensor]
    relu: bool


@dataclass(frozen=True, eq=False)
class BlockResult:
    """A quantised block. layers: path -> module in place; norms: path -> module whose gain was divided; taken: (path, original module);
    errors: relative error of each layer's output on the float block's inputs, and of the block's output (`block`)."""

    layers: dict[str, QuantisedLinear]
    norms: dict[str, nn.Module]
    taken: list[tuple[str, nn.Module]]
    errors: dict[str, float]


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
    staged = stage(anatomy, tower, layer)
    try:
        online = smooth(staged, found, seen, config)
        _check_folds(staged, reference, seen, config)
        samples = _samples(staged, found, reference)
        staged.floats = dict(staged.layers)
        bases, learned = {}, config.weights.clip == "learned"
        for group in found:
            basis = quantise_group(staged, group, online.get(group.name), reference, current, config, seed)
            bases |= {group.name: basis} if learned else {}  # a copy of the block in float, needed to learn only
        if learned:
            learn_clips(block, layer, staged.layers, bases, current, seen.outputs, config)
        errors = _errors(staged, found, samples)
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
    norms = {path: anatomy.model.get_submodule(path) for path, _ in staged.taken if path not in layers}
    return BlockResult(layers, norms, list(staged.taken), errors), following, after


def statistics(tower: Tower, layer: int, found: Sequence[Group], batches: Sequence[Batch], config: DuQuantConfig) -> Statistics:
    """One pass of the float block over its inputs."""
    measure = "peak" if config.smoothing is None else config.smoothing.measure
    parts: dict[str, list[torch.Tensor]] = {group.name: [] for group in found}
    heads = {group.name: tower.module(layer, group.roles[0]) for group in found}

    def see(name: str, rows: torch.Tensor) -> None:
        if not rows.isfinite().all():
            where = f"{tower.path(layer, 'block')}, input of {name}"
            raise DataError(f"{where}: {int((~rows.isfinite()).sum())} entries are not finite.", "Calibrate in bfloat16 or float32.")
        wide = rows.float()
        if measure == "rms":  # every token counts alike, however long: it is rounded on a grid of its own
            wide = wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-30)
        parts[name].append(sizes_of(wide, measure))

    relu = _Relu()
    hidden = next(group for group in found if group.name == "mlp_hidden")
    handles = [] if hidden.source else relu.attach(tower, layer)
    try:
        outputs = [streams.watch(tower.blocks[layer], layer, batch, heads, see) for batch in batches]
    finally:
        for handle in handles:
            handle.remove()
    sizes = {name: sizes_of(torch.stack(found), measure) for name, found in parts.items()}
    return Statistics(sizes, [out for out in outputs if out is not None], relu.holds)


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


def smooth(staged: Staged, found: Sequence[Group], seen: Statistics, config: DuQuantConfig) -> dict[str, torch.Tensor]:
    """Move outliers from activations to weights. Scales come from the unchanged weights of all groups; each is folded into what lies before
    its group. Returns, by group, the scales that fold into nothing and have to be divided by as the model runs."""
    if config.smoothing is None:
        return {}
    online, scales = {}, {}
    for group in found:
        roles = group.roles if config.smoothing.weights == "all" else group.roles[:1]
        weight = sizes_of(torch.cat([staged.layers[role].get_buffer("values") for role in roles]), config.smoothing.measure)
        a = seen.sizes[group.name].to(weight)
        if group.source == "v":
            a, weight = (sizes_of(by_value(part, staged.tower, staged.layer), config.smoothing.measure) for part in (a, weight))
        scale = smoothing_scale(a, weight, config.smoothing.alpha)
        scales[group.name] = to_heads(scale, staged.tower, staged.layer) if group.source == "v" else scale
    for group in found:
        if _float_group(group, config):
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
    if _float_group(group, config):
        return {}
    stream = generator(seed, "duquant", group)
    parts = group_inputs(staged, group, current, config.rows, stream)
    rows = streams.sample(parts, config.rows, stream)
    channels = rows.shape[1]
    scaled = rows if scale is None else rows / scale.to(rows)
    chain = config.chain
    if chain is not None and chain.foldable and group.name != "mlp_hidden":
        chain = chain.model_copy(update={"steps": tuple(step for step in chain.steps if step != "permute")})
    transform = build_chain(scaled, chain, stream, name=staged.tower.path(staged.layer, group.roles[0]))
    transform = Transform(channels, scale, transform.steps).to(torch.float32)
    bits = wanted_bits(group, config.keep)
    activations, weights = config.activations.quantiser(channels), config.weights.quantiser(channels)
    if bits is not None:
        activations = activations.model_copy(update={"bits": max(bits, activations.bits), "clip": 1.0})
        weights = weights.model_copy(update={"bits": max(bits, weights.bits), "clip": 1.0})
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
        content = bases[role] if weights.is_float else rounded(aims[number], weights, config, seen)
        new = QuantisedLinear(shared, weights, content, old.bias, owner=number == 0).to(rows.device)
        staged.place(role, new)
    return bases


def rounded(weight: torch.Tensor, quantiser: Quantiser, config: DuQuantConfig, seen: Moments | None) -> Codes:
    """Codes of a weight as the settings ask for it."""
    clip = None
    if config.weights.clip == "search":
        clip = best_clip(weight, quantiser, None if seen is None else seen.hessian.diagonal())
    return nearest(weight, quantiser, clip) if seen is None else gptq(weight, seen.hessian, quantiser, clip)


def _float_group(group: Group, config: DuQuantConfig) -> bool:
    kept = wanted_bits(group, config.keep)
    return kept == 16 or (config.weights.bits == 16 and config.activations.bits == 16 and config.chain is None and config.smoothing is None)


def _check_folds(staged: Staged, reference: Sequence[Batch], seen: Statistics, config: DuQuantConfig) -> None:
    """The smoothed float block must compute what the block computed: readers that nobody knew of would show here."""
    if config.smoothing is None:
        return
    with torch.no_grad():
        now = streams.run(staged.tower.blocks[staged.layer], staged.layer, reference[0])
    was, now = reference[0].only_real(seen.outputs[0]).float(), reference[0].only_real(now).float()
    error = float((now - was).norm() / was.norm())
    if not error < FOLD_TOLERANCE.get(seen.outputs[0].dtype, 3e-2):
        raise UnsupportedModelError(
            f"Smoothing would change what {staged.tower.path(staged.layer, 'block')} computes (relative error {error:.2g}).",
            "Something outside the known layers reads a norm, or the values pass through more than attention. Set smoothing to null.",
        )


def _samples(staged: Staged, found: Sequence[Group], reference: Sequence[Batch], limit: int = 512) -> dict[str, torch.Tensor]:
    """Inputs of each group in the smoothed float block, the first position of every window left out."""
    rows: dict[str, torch.Tensor] = {}
    length = reference[0].hidden.shape[1]

    def see(name: str, x: torch.Tensor) -> None:
        inside = torch.arange(len(x), device=x.device) % length != 0 if reference[0].real is None else slice(None)
        rows[name] = x[inside][:limit]

    heads = {group.name: staged.layers[group.roles[0]] for group in found}
    streams.watch(staged.tower.blocks[staged.layer], staged.layer, reference[0], heads, see)
    return rows


def _errors(staged: Staged, found: Sequence[Group], samples: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """||quantised output - float output|| / ||float output|| of every layer, biases left out."""
    errors = {}
    with torch.no_grad():
        for group in found:
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
