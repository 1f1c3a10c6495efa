"""A block's mixture of experts: tokens as the router sends them, smoothing for all that read their input, transforms and rounding. Floor 5.

All experts share the transform of their input, found on all tokens. In front of its down map an expert has one of its own if enough
calibration tokens were sent to it, otherwise one found on what all experts of the block have there. The router sees its input unrotated;
a scale that is folded into the norm before it is multiplied into its columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trocar.anatomy import Tower
from trocar.anatomy.experts import BESIDE
from trocar.compress.duquant import streams
from trocar.compress.duquant.chains import Sizes, build_chain, sizes_of, smoothing_scale
from trocar.compress.duquant.config import DuQuantConfig
from trocar.compress.duquant.groups import Group, Staged, chain_of, fold, is_float, multiply, quantisers
from trocar.compress.duquant.moments import CLIP_ROWS, activation_clip, rounded, row_weights
from trocar.compress.duquant.rounding import best_clip, nearest
from trocar.compress.duquant.streams import Batch
from trocar.core.errors import ConfigError, DataError
from trocar.core.seeds import generator
from trocar.patch.quantised import GroupInput, Matrices, QuantisedExperts, Quantiser, Transform
from trocar.trace.shortcut import Stop

FEWEST = 64  # calibration tokens from which on an expert's own statistics are used


@dataclass(frozen=True, eq=False)
class Route:
    """What the router sent to a block's experts for one batch, padding left out. x: (rows, C); chosen, weights: (rows, k)."""

    x: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor

    def first(self, rows: torch.Tensor) -> Route:
        return Route(self.x[rows], self.chosen[rows], self.weights[rows])


def routes(block: nn.Module, layer: int, experts: nn.Module, batches: Sequence[Batch]) -> list[Route]:
    """Run the block up to its experts, the module that is in it now, batch by batch."""
    found: list[Route] = []
    for batch in batches:

        def see(module: nn.Module, args: tuple[Any, ...], batch: Batch = batch) -> None:
            found.append(Route(*(batch.only_real(part.detach()) for part in args)))
            raise Stop

        handle = experts.register_forward_pre_hook(see)
        try:
            with torch.no_grad():
                streams.run(block, layer, batch)
        except Stop:
            pass
        finally:
            handle.remove()
    return found


@contextmanager
def sent_as(route: Route, batch: Batch, experts: QuantisedExperts) -> Iterator[list[float]]:
    """Inside, the rows of `batch` go to the experts that `route` says, whatever the router finds: choices that are nearly ties turn over at
    the slightest rounding. The list gets the median over rows of the relative error of the router's own weights against the route's."""
    errors: list[float] = []

    def of_all(chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return weights.new_zeros(len(weights), experts.count, dtype=torch.float32).scatter_(1, chosen, weights.float())

    def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, chosen, weights = (part.clone() for part in args)
        real = slice(None) if batch.real is None else batch.real.to(x.device)
        was, now = of_all(route.chosen, route.weights), of_all(chosen[real], weights[real])
        errors.append(float(((now - was).norm(dim=1) / was.norm(dim=1)).median()))
        chosen[real], weights[real] = route.chosen, route.weights
        return x, chosen, weights

    handle = experts.register_forward_pre_hook(replace)
    try:
        yield errors
    finally:
        handle.remove()


def counts(sent: Sequence[Route], experts: int) -> list[int]:
    """How many tokens were sent to each expert."""
    return torch.stack([torch.bincount(route.chosen.flatten().cpu(), minlength=experts)[:experts] for route in sent]).sum(0).tolist()


def check_settings(tower: Tower, config: DuQuantConfig) -> None:
    """Raise ConfigError for settings that mixtures of experts cannot have."""
    if not any(tower.has(layer, "experts") for layer in range(tower.n_layers)):
        return
    if config.weights.rounding == "gptaq":
        raise ConfigError(
            "gptaq compares rows of the float and of the quantised model, but an expert is not sent the same tokens in both.",
            "Use rounding: gptq (the method duquant-gptq).",
        )
    if config.weights.clip == "learned":
        raise ConfigError("Learned clips are not made for mixtures of experts.", "Use clip: search.")


def told(tokens: Mapping[str, Sequence[int]]) -> str:
    """What to say of experts that were sent too few tokens, by the path of their mixture; empty if there are none."""
    rare = {path: sum(count < FEWEST for count in seen) for path, seen in tokens.items()}
    if not any(rare.values()):
        return ""
    worst = max(rare, key=lambda path: rare[path])
    few, every = sum(rare.values()), sum(map(len, tokens.values()))
    return (
        f"{few} of {every} experts were sent fewer than {FEWEST} calibration tokens, most of them in {worst} ({rare[worst]} of "
        f"{len(tokens[worst])}). Their down maps share one transform a block, without smoothing, and gptq rounds their weights to nearest. "
        "Give more text to calibrate on."
    )


def smooth_experts(staged: Staged, found: Sequence[Group], sizes: torch.Tensor, sent: Sequence[Route], config: DuQuantConfig) -> None:
    """Fold scales into the norm before the experts, for all that read it, and into each expert's rows of up.

    sizes: (C,) of the channels of the experts' input; sent: what the router of the float model sends them. The scale of the norm is rounded
    to powers of two: then norm and router compute the same bits as before, in half precision too, and no token is sent elsewhere.
    """
    experts = staged.experts
    assert config.smoothing is not None and experts is not None  # noqa: PT018 - for the type checker
    gate_up, down = experts.gate_up.get_buffer("values"), experts.down.get_buffer("values")
    half, first = down.shape[2], config.smoothing.weights == "first"
    named = {group.name: group for group in found}
    into = [named[name] for name in ("shared_in", "experts_in") if name in named]
    roles = [role for group in into if not group.of_experts for role in group.roles]
    size = Sizes(config.smoothing.measure)
    for rows in (
        gate_up[:, half:] if first else gate_up,
        *(staged.layers[role].get_buffer("values") for role in (roles[:1] if first else roles)),
    ):
        for part in rows if rows.ndim == 3 else (rows,):
            size.add(part)
    weight = size.result()
    if not is_float(named["experts_hidden"], config):
        for expert, found_size in hidden_sizes(experts, sent, config.smoothing.measure).items():
            scale = smoothing_scale(found_size.to(down), sizes_of(down[expert], config.smoothing.measure), config.smoothing.alpha)
            gate_up[expert, half:] /= scale[:, None]
            down[expert] *= scale
    experts.forget()
    if not named["experts_in"].source or all(is_float(group, config) for group in into):
        return
    scale = smoothing_scale(sizes.to(weight), weight, config.smoothing.alpha).log2().round().exp2()
    exact = fold(staged, named["experts_in"], scale)
    gate_up *= exact.to(gate_up)
    for group in into:
        if not group.of_experts:
            multiply(staged, group, exact)
    for role in BESIDE:
        if not staged.tower.has(staged.layer, role):
            continue
        path = staged.tower.path(staged.layer, role)
        reader: Any = copy.deepcopy(staged.anatomy.model.get_submodule(path))
        with torch.no_grad():
            reader.weight.copy_(reader.weight.double() * exact.double())
        reader.requires_grad_(False)
        staged.exchange(path, reader)


def hidden_sizes(experts: QuantisedExperts, sent: Sequence[Route], measure: str) -> dict[int, torch.Tensor]:
    """Sizes (F,) of the channels that enter the down map of each expert that was sent enough tokens. Channels of different experts have
    nothing to do with each other, so the others get no scale rather than one from elsewhere."""
    sizes = {expert: Sizes(measure) for expert, count in enumerate(counts(sent, experts.count)) if count >= FEWEST}
    for route in sent:
        for visit in experts.visits(route.x, route.chosen):
            if not visit.hidden.isfinite().all():
                raise DataError(f"The input of the down map of expert {visit.expert} is not finite.", "Calibrate in bfloat16 or float32.")
            if visit.expert in sizes:
                sizes[visit.expert].add_tokens(visit.hidden)
    return {expert: size.result() for expert, size in sizes.items()}


def quantise_experts(staged: Staged, found: Sequence[Group], current: Sequence[Batch], config: DuQuantConfig, seed: int) -> list[int]:
    """Transforms and low-bit weights of all experts, put in place. Returns how many tokens of `current` each expert was sent.

    With rounding by gptq an expert has a Hessian of its own, from its own tokens; one that was sent too few is rounded to nearest, with
    the best clip of each row.
    """
    experts = staged.experts
    assert experts is not None
    into, hidden = (next(group for group in found if group.name == name) for name in ("experts_in", "experts_hidden"))
    sent = routes(staged.tower.blocks[staged.layer], staged.layer, experts, current)
    seen = counts(sent, experts.count)
    if not is_float(into, config):
        experts = _quantise_input(staged, experts, into, sent, seen, config, seed)
        staged.place_experts(experts)
    if not is_float(hidden, config):
        staged.place_experts(_quantise_hidden(staged, experts, hidden, sent, seen, config, seed))
    return seen


def _quantise_input(
    staged: Staged, experts: QuantisedExperts, group: Group, sent: Sequence[Route], seen: Sequence[int], config: DuQuantConfig, seed: int
) -> QuantisedExperts:
    stream = generator(seed, "duquant", group)
    rows = streams.sample([route.x for route in sent], config.rows, stream)
    transform = build_chain(rows, chain_of(group, config), stream, name=staged.tower.path(staged.layer, "experts")).to(torch.float32)
    activations, weights = quantisers(group, transform.channels, config)
    if config.activations.clip == "search" and not activations.is_float:
        total = sum(len(route.x) for route in sent)
        every = torch.cat([route.x[:: max(1, total // CLIP_ROWS)] for route in sent])
        activations = activations.model_copy(update={"clip": activation_clip(transform.online(every.float()), activations)})
    front = GroupInput(transform, activations).to(rows.device)
    inputs = [front.values(route.x) for route in sent]
    values = experts.gate_up.get_buffer("values")

    def rows_of(expert: int) -> Iterator[torch.Tensor]:
        return (x[torch.where(route.chosen == expert)[0]] for x, route in zip(inputs, sent, strict=True))

    made = _rounded(values, lambda _: transform, weights, rows_of, seen, config)
    return QuantisedExperts(front, list(experts.hidden), experts.which, made, experts.down, experts.act_fn)  # type: ignore[arg-type]


def _quantise_hidden(
    staged: Staged, experts: QuantisedExperts, group: Group, sent: Sequence[Route], seen: Sequence[int], config: DuQuantConfig, seed: int
) -> QuantisedExperts:
    name = f"{staged.tower.path(staged.layer, 'experts')}.down_proj"
    values = experts.down.get_buffer("values")
    ready = [experts.prepared(experts.input, route.x) for route in sent]

    def rows_of(expert: int) -> Iterator[torch.Tensor]:
        return (experts.visit(expert, front, route.chosen, route.x).hidden for front, route in zip(ready, sent, strict=True))

    chain = chain_of(group, config)
    own = [expert for expert, count in enumerate(seen) if count >= FEWEST] if chain is not None else []
    which = [own.index(expert) if expert in own else len(own) for expert in range(experts.count)]
    share = [-(-config.rows * count // max(1, sum(seen))) for count in seen]  # of all rows of the block, those of each expert
    pooled: list[torch.Tensor] = []
    transforms: list[Transform] = []
    for expert in range(experts.count) if chain is not None else ():
        if seen[expert]:
            draw = generator(seed, "duquant", group, expert)
            rows = streams.sample(list(rows_of(expert)), config.rows, draw)
            pooled.append(streams.sample([rows], share[expert], draw))
            if expert in own:
                transforms.append(build_chain(rows, chain, draw, name=name).to(torch.float32))
    if len(own) < experts.count:
        rows = torch.cat(pooled) if pooled else values.new_zeros(1, values.shape[2])
        transforms.append(build_chain(rows, chain, generator(seed, "duquant", group), name=name).to(torch.float32))
    activations, weights = quantisers(group, values.shape[2], config)
    if config.activations.clip == "search" and not activations.is_float:
        turned = [transforms[which[expert]].online(rows) for expert, rows in _some(rows_of, seen)]
        activations = activations.model_copy(update={"clip": activation_clip(torch.cat(turned), activations)})
    fronts = [GroupInput(transform, activations).to(values.device) for transform in transforms]

    def turned_of(expert: int) -> Iterator[torch.Tensor]:
        return (fronts[which[expert]].values(rows) for rows in rows_of(expert))

    made = _rounded(values, lambda expert: transforms[which[expert]], weights, turned_of, seen, config)
    return QuantisedExperts(experts.input, fronts, which, experts.gate_up, made, experts.act_fn)


def _some(rows_of: Callable[[int], Iterator[torch.Tensor]], seen: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """About CLIP_ROWS rows of all experts together."""
    stride = max(1, sum(seen) // CLIP_ROWS)
    for expert, count in enumerate(seen):
        if count:
            yield expert, torch.cat(list(rows_of(expert)))[::stride].float()


def _rounded(
    values: torch.Tensor,
    transform_of: Callable[[int], Transform],
    quantiser: Quantiser,
    rows_of: Callable[[int], Iterator[torch.Tensor]],
    seen: Sequence[int],
    config: DuQuantConfig,
) -> Matrices:
    """All experts' matrices (E, O, C) in their transformed bases, rounded one after the other. rows_of: their transformed inputs."""

    def one(expert: int) -> Any:
        weight = transform_of(expert).weight(values[expert])
        if quantiser.is_float:
            return weight
        if config.weights.rounding == "nearest":
            return rounded(weight, quantiser, config, None)
        if seen[expert] < FEWEST:
            return nearest(weight, quantiser, best_clip(weight, quantiser))
        return rounded(weight, quantiser, config, hessian(rows_of(expert), config.weights.reach))

    return Matrices.of(quantiser, (one(expert) for expert in range(len(values))))


def hessian(parts: Iterator[torch.Tensor], reach: float | None) -> torch.Tensor:
    """The sum of x x^T over rows x, (C, C) float32. reach: as in `Weights`, against the median row of each part."""
    total: torch.Tensor | None = None
    for part in parts:
        x = part.float()
        total = torch.zeros(x.shape[1], x.shape[1], device=x.device) if total is None else total
        if len(x):
            total.addmm_((x * row_weights(x, reach)).T, x)
    assert total is not None
    return total


def output_error(now: QuantisedExperts, was: QuantisedExperts, route: Route, length: int, limit: int = 512) -> float:
    """||quantised - float|| / ||float|| of what the experts give on the float block's tokens, the first position of each window (of
    `length`, 0 if padding was left out) passed over."""
    rows = torch.arange(len(route.x), device=route.x.device)
    chosen = route.first((rows[rows % length != 0] if length else rows)[:limit])
    x = chosen.x.float()
    right = was(x, chosen.chosen, chosen.weights)
    return float((now(x, chosen.chosen, chosen.weights) - right).norm() / right.norm())
