"""The input groups of a block: linear layers that read the same tensor, and what lies before it to fold a scale into. Floor 5."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from trocar.anatomy import Anatomy, LinearView, Tower
from trocar.anatomy.linear import base_layer
from trocar.compress.duquant.config import Chain, DuQuantConfig
from trocar.core.errors import ConfigError, UnsupportedModelError
from trocar.patch.quantised import GroupInput, QuantisedExperts, QuantisedLinear, Quantiser, Transform, float_experts

# in the order of the forward pass; a mixture of experts has the last four in place of the MLP's two
NAMES = ("attn_in", "attn_out", "mlp_in", "mlp_hidden", "shared_in", "shared_hidden", "experts_in", "experts_hidden")
FLOAT = Quantiser(bits=16)


@dataclass(frozen=True)
class Group:
    """Linear layers of one block that read one tensor.

    name: one of NAMES; roles: their modules' roles (fused ones count once); source: the role that a scale of the input folds into - a norm,
    `v` (its rows, since attention mixes them linearly), `up` (its rows, which the gate or a ReLU lets through linearly) - or "". The
    groups of experts stand for the matrices of all experts of the block; they have one module, with the role `experts`.
    """

    tower: str
    layer: int
    name: str
    roles: tuple[str, ...]
    source: str

    def __str__(self) -> str:
        return f"{self.tower + '.' if self.tower else ''}L{self.layer}.{self.name}"

    @property
    def components(self) -> tuple[str, ...]:
        """Names of its linear layers as components have them, `L5.mlp.down`; `L5.mlp.experts.down`, `L5.mlp.shared.up` for experts."""
        prefix = f"{self.tower + '.' if self.tower else ''}L{self.layer}."
        part = "attn" if self.name.startswith("attn") else "mlp"
        roles = EXPERTS_OF[self.name] if self.of_experts else self.roles
        return tuple(f"{prefix}{part}.{role.replace('_', '.', 1)}" for fused in roles for role in MEMBERS.get(fused, (fused,)))

    @property
    def of_experts(self) -> bool:
        return self.name in EXPERTS_OF


MEMBERS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
EXPERTS_OF = {"experts_in": ("experts_up", "experts_gate"), "experts_hidden": ("experts_down",)}


def groups(tower: Tower, layer: int) -> list[Group]:
    """The input groups of a block, in the order in which the forward pass comes to them.

    With norms after the additions (`post`) the input of a block is the residual stream itself, into which nothing folds. Whether a hidden
    layer without a gate lets a scale through (ReLU) is found out on data, by `is_relu`; here it has no source.
    """

    def present(*roles: str) -> tuple[str, ...]:
        return tuple(role for role in roles if tower.has(layer, role))

    def norm(role: str) -> str:
        return role if tower.residual != "post" and tower.has(layer, role) else ""

    attention = [
        Group(tower.name, layer, "attn_in", present("qkv") or present("q", "k", "v"), norm("attn_norm")),
        Group(tower.name, layer, "attn_out", ("o",), "v"),
    ]
    if tower.has(layer, "experts"):
        shared = [
            Group(tower.name, layer, "shared_in", present("shared_up", "shared_gate"), norm("mlp_norm")),
            Group(tower.name, layer, "shared_hidden", ("shared_down",), "shared_up"),
        ]
        return [
            *attention,
            *(shared if tower.has(layer, "shared_up") else []),
            Group(tower.name, layer, "experts_in", ("experts",), norm("mlp_norm")),
            Group(tower.name, layer, "experts_hidden", ("experts",), ""),
        ]
    gated = tower.has(layer, "gate") or tower.has(layer, "gate_up")
    return [
        *attention,
        Group(tower.name, layer, "mlp_in", present("gate_up") or present("up", "gate"), norm("mlp_norm")),
        Group(tower.name, layer, "mlp_hidden", ("down",), "up" if gated else ""),
    ]


@dataclass
class Staged:
    """A block whose linear layers were exchanged for float stand-ins that may be changed, the originals untouched.

    layers: by role, those in place now; floats: the stand-ins with smoothed weights, for a look at the float block later on; experts and
    float_experts: the same of a mixture of experts, None in dense blocks; taken: (path, original) of every exchanged module; views: of v
    and up, for their rows in fused projections.
    """

    anatomy: Anatomy
    tower: Tower
    layer: int
    layers: dict[str, QuantisedLinear]
    taken: list[tuple[str, nn.Module]]
    views: dict[str, LinearView]
    floats: dict[str, QuantisedLinear] = field(default_factory=dict)
    experts: QuantisedExperts | None = None
    float_experts: QuantisedExperts | None = None

    def place_experts(self, experts: QuantisedExperts) -> None:
        """Make `experts` the block's."""
        self.experts = experts
        self.exchange(self.tower.path(self.layer, "experts"), experts)

    def place(self, role: str, layer: QuantisedLinear) -> None:
        """Make `layer` the one of its role."""
        self.layers[role] = layer
        self.exchange(self.tower.path(self.layer, role), layer)

    def exchange(self, path: str, module: nn.Module) -> None:
        """Put `module` at `path`, remembering what the model came with."""
        if all(path != known for known, _ in self.taken):
            self.taken.append((path, self.anatomy.model.get_submodule(path)))
        put(self.anatomy.model, path, module)

    def put_back(self) -> None:
        """The very modules that were there."""
        while self.taken:
            put(self.anatomy.model, *self.taken.pop())


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)


def stage(anatomy: Anatomy, tower: Tower, layer: int) -> Staged:
    """Exchange a block's linear layers for float32 stand-ins. Raises UnsupportedModelError where an adapter is attached."""
    staged = Staged(anatomy, tower, layer, {}, [], {})
    prefix = f"{tower.name + '.' if tower.name else ''}L{layer}."
    staged.views = {"v": anatomy.linear(f"{prefix}attn.v")}
    experts = tower.experts(layer)
    if experts is None:
        staged.views["up"] = anatomy.linear(f"{prefix}mlp.up")
    else:
        staged.place_experts(float_experts(experts.gate_up, experts.down, experts.activation))
    for group in groups(tower, layer):
        if group.of_experts:
            continue
        for role in group.roles:
            module: Any = tower.module(layer, role)
            path = tower.path(layer, role)
            if base_layer(module) is not module:
                raise UnsupportedModelError(
                    f"{path} carries an adapter.", "Merge it (merge_and_unload) before quantising; it reads inputs that change their basis."
                )
            weight = module.weight.detach()
            weight = weight.T if tower._transposed[layer, role] else weight
            staged.place(role, stand_in(weight.float().contiguous(), None if module.bias is None else module.bias.detach().float()))
    return staged


def stand_in(weight: torch.Tensor, bias: torch.Tensor | None) -> QuantisedLinear:
    """A layer in float with a float32 weight (O, C) that may be changed."""
    return QuantisedLinear(
        GroupInput(Transform(weight.shape[1]), FLOAT), FLOAT, weight.clone(), None if bias is None else bias.detach().clone()
    )


def by_value(channels: torch.Tensor, tower: Tower, layer: int) -> torch.Tensor:
    """Channels of the attention's output by the value channel they read: (heads * size,) -> (heads of a group, kv_heads * size)."""
    return channels.reshape(tower.kv_heads(layer), tower.group(layer), -1).transpose(0, 1).flatten(1)


def to_heads(scale: torch.Tensor, tower: Tower, layer: int) -> torch.Tensor:
    """Value channels repeated for every query head that reads them: (kv_heads * size,) -> (heads * size,)."""
    return scale.reshape(tower.kv_heads(layer), 1, -1).expand(-1, tower.group(layer), -1).flatten()


def fold(staged: Staged, group: Group, scale: torch.Tensor) -> torch.Tensor:
    """Divide what produces the group's input by `scale`, exactly, and return the scale that weights must be multiplied by.

    A norm in half precision cannot hold gain / scale; the scale is then the ratio of the gain to what it was rounded to.
    """
    if group.source in ("v", "up", "shared_up"):
        layer, rows = _rows(staged, group.source)
        small = by_value(scale, staged.tower, staged.layer)[0] if group.source == "v" else scale
        values: torch.Tensor = layer.get_buffer("values")
        values[rows] /= small[:, None].to(values)
        if layer.bias is not None:
            layer.bias[rows] /= small.to(layer.bias)
        layer.forget()
        return scale
    path = staged.tower.path(staged.layer, group.source)
    original: Any = staged.anatomy.model.get_submodule(path)
    norm = copy.deepcopy(original)
    offset, gain = gain_offset(original), original.weight.detach().double()
    with torch.no_grad():
        norm.weight.copy_((gain + offset) / scale.double() - offset)
        now = norm.weight.double() + offset
        exact = torch.where(now != 0, (gain + offset) / now, scale.double())
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_(original.bias.double() / exact)
    norm.requires_grad_(False)
    staged.exchange(path, norm)
    return exact.to(scale)


def multiply(staged: Staged, group: Group, scale: torch.Tensor) -> None:
    """Multiply the input channels of the group's weights by `scale`."""
    for role in group.roles:
        values: torch.Tensor = staged.layers[role].get_buffer("values")
        values *= scale.to(values)
        staged.layers[role].forget()


def _rows(staged: Staged, role: str) -> tuple[QuantisedLinear, Any]:
    owner = role if role in staged.layers else {"v": "qkv", "up": "gate_up"}[role]
    rows = staged.views[role].rows if role in staged.views else None
    return staged.layers[owner], slice(None) if rows is None else torch.tensor(list(rows))


def gain_offset(norm: nn.Module) -> float:
    """0 for norms that multiply by their weight, 1 for those that multiply by 1 + weight (Gemma), found by trying.

    Raises UnsupportedModelError for norms that do neither.
    """
    weight = norm.get_parameter("weight")
    zeros = {name: torch.zeros_like(parameter) for name, parameter in norm.named_parameters()}
    sample = torch.linspace(-1, 2, weight.shape[0], device=weight.device, dtype=weight.dtype)[None]
    with torch.no_grad():
        for offset in (0.0, 1.0):
            if not functional_call(norm, {**zeros, "weight": torch.full_like(weight, -offset)}, (sample,)).any():
                return offset
    raise UnsupportedModelError(
        f"{type(norm).__name__} does not multiply by its weight, so no scale folds into it.", "Set smoothing to null, or report the family."
    )


def wanted_bits(group: Group, keep: dict[str, int]) -> int | None:
    """The bits that settings ask for one of the group's layers, the largest of several."""
    named = [bits for name, bits in keep.items() if name in group.components]
    return max(named, default=None)


def is_float(group: Group, config: DuQuantConfig) -> bool:
    """Whether the settings leave the group as it is."""
    kept = wanted_bits(group, config.keep)
    return kept == 16 or (config.weights.bits == 16 and config.activations.bits == 16 and config.chain is None and config.smoothing is None)


def quantisers(group: Group, channels: int, config: DuQuantConfig) -> tuple[Quantiser, Quantiser]:
    """Grids of the group's activations and weights. channels: of its input."""
    bits = wanted_bits(group, config.keep)
    activations, weights = config.activations.quantiser(channels), config.weights.quantiser(channels)
    if bits is not None:
        activations = activations.model_copy(update={"bits": max(bits, activations.bits), "clip": 1.0})
        weights = weights.model_copy(update={"bits": max(bits, weights.bits), "clip": 1.0})
    return activations, weights


def channels_of(tower: Tower, group: Group) -> int:
    """How many channels the group's input has."""
    if group.of_experts:
        experts = tower.experts(group.layer)
        assert experts is not None
        return experts.hidden if group.name == "experts_hidden" else experts.width
    weight: Any = tower.module(group.layer, group.roles[0]).weight
    return weight.shape[0 if tower._transposed[group.layer, group.roles[0]] else 1]


def chain_of(group: Group, config: DuQuantConfig) -> Chain | None:
    """The group's chain: a foldable one permutes in front of down maps only."""
    chain = config.chain
    if chain is not None and chain.foldable and not group.name.endswith("hidden"):
        chain = chain.model_copy(update={"steps": tuple(step for step in chain.steps if step != "permute")})
    return chain


def check_keep(names: Sequence[str], known: Sequence[Group]) -> None:
    """Raise ConfigError for names that no group has."""
    from trocar.core.errors import nearest

    every = [component for group in known for component in group.components]
    for name in names:
        if name not in every:
            raise ConfigError(f"keep names '{name}', which is none of the quantised layers.", nearest(name, every))
