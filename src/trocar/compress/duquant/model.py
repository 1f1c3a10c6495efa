"""A whole model, block by block. Floor 5."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from trocar.anatomy import Anatomy, Tower
from trocar.anatomy.linear import check_linear
from trocar.compress.duquant import streams
from trocar.compress.duquant.blocks import BlockResult, quantise_block
from trocar.compress.duquant.config import DuQuantConfig
from trocar.compress.duquant.experts import check_settings, told
from trocar.compress.duquant.groups import check_keep, groups, put
from trocar.core.progress import track
from trocar.evaluate.forward import evaluating
from trocar.patch import Op, Patch, QuantiseExperts, RoundHeads, SparseReplace
from trocar.patch.ops.quantise import one_per_input
from trocar.patch.quantised import QuantisedExperts, QuantisedLinear, RoundedHeads


@dataclass
class QuantisedModel:
    """A model whose blocks were quantised in place. `revert` puts the very modules back that were there."""

    anatomy: Anatomy
    tower: Tower
    blocks: list[BlockResult] = field(default_factory=list)
    heads: RoundedHeads | None = None

    @property
    def layers(self) -> dict[str, QuantisedLinear]:
        """Every quantised layer by its path."""
        return {path: layer for block in self.blocks for path, layer in block.layers.items()}

    @property
    def experts(self) -> dict[str, QuantisedExperts]:
        """Every mixture of experts by its path."""
        return {path: experts for block in self.blocks for path, experts in block.experts.items()}

    @property
    def tokens(self) -> dict[str, list[int]]:
        """How many calibration tokens each expert of a mixture was sent, by the mixture's path."""
        return {path: tokens for block in self.blocks for path, tokens in block.tokens.items()}

    @property
    def errors(self) -> dict[str, float]:
        """Relative output error of every layer on the calibration input; of whole blocks under `L5`."""
        named = {}
        for number, block in enumerate(self.blocks):
            named |= {f"L{number}" if path == "block" else path: error for path, error in block.errors.items()}
        return named

    def operations(self) -> list[Op]:
        """What was done, as operations of a patch: the norms' new gains, then one operation for each input. Valid after `revert` too.
        What the settings left in float and no scale reached has none."""
        ops: list[Op] = []
        for block in self.blocks:
            original = dict(block.taken)
            for path, norm in block.norms.items():
                for name, parameter in norm.named_parameters():
                    old = original[path].get_parameter(name)
                    op = SparseReplace.between(f"{path}.{name}", old, parameter)
                    ops += [op] if op is not None else []
            ops += one_per_input({path: layer for path, layer in block.layers.items() if not unchanged(path, layer, original[path])})
            ops += [
                QuantiseExperts(path, experts) for path, experts in block.experts.items() if not experts_unchanged(experts, original[path])
            ]
        return ops if self.heads is None else [*ops, RoundHeads(self.tower.name, self.heads.quantiser.bits)]

    def patch(self, **settings: Any) -> Patch:
        """The quantisation as a patch of the float model, which is put back first. settings: what made it, for the file's header."""
        ops = self.operations()
        self.revert()
        return Patch.of(self.anatomy, ops, "duquant", settings)

    def revert(self) -> None:
        if self.heads is not None:
            self.heads.remove()
        while self.blocks:
            for path, module in reversed(self.blocks.pop().taken):
                put(self.anatomy.model, path, module)


def unchanged(path: str, layer: QuantisedLinear, original: Any) -> bool:
    """Whether a layer computes what the float layer in its place did."""
    if not (layer.quantiser.is_float and layer.shared.quantiser.is_float) or layer.shared.kinds:
        return False
    weight = original.weight.T if check_linear(original, path) else original.weight
    same = torch.equal(layer.get_buffer("values"), weight.float())
    return same and (layer.bias is None or torch.equal(layer.bias, original.bias.float()))


def experts_unchanged(experts: QuantisedExperts, original: nn.Module) -> bool:
    """The same for a mixture of experts."""
    fronts: list[Any] = [experts.input, *experts.hidden]
    pairs = ((experts.gate_up, "gate_up_proj"), (experts.down, "down_proj"))
    if any(front.kinds or not front.quantiser.is_float for front in fronts) or not all(one.quantiser.is_float for one, _ in pairs):
        return False
    return all(torch.equal(one.get_buffer("values"), original.get_parameter(name).float()) for one, name in pairs)


def quantise(
    model: nn.Module | Anatomy,
    inputs: Mapping[str, torch.Tensor],
    config: DuQuantConfig | None = None,
    seed: int = 0,
    *,
    tower: str | None = None,
    tell: Callable[[int, BlockResult], None] | None = None,
) -> QuantisedModel:
    """Quantise the linear layers of every block in place (arXiv 2406.01721); embeddings, norms and heads stay in float.

    inputs: calibration windows, keyword arguments of the model with rows first (`input_ids` (n, length); of the tower, where there are
    several). Each block sees what the blocks before it, already quantised, make of them; smoothing looks at the float model. seed: of the
    rotations. tell: called after each block.

    Raises ConfigError (blocks that do not divide a layer's channels, unknown names in `keep`), DataError (calibration input that is empty
    or not finite), UnsupportedModelError (adapters attached, weights already quantised, a fold that is not exact). On any of them the
    model is as it was.
    """
    config = config or DuQuantConfig()
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model, experts=True)
    chosen = anatomy.tower(tower)
    check_keep(list(config.keep), [group for layer in range(chosen.n_layers) for group in groups(chosen, layer)])
    check_settings(chosen, config)
    done = QuantisedModel(anatomy, chosen)
    with evaluating(anatomy.model), torch.no_grad():
        reference, current = streams.both(anatomy, chosen, inputs, config)
        try:
            if config.attention is not None:
                done.heads = RoundedHeads(chosen, config.attention, on=False)
                done.heads.install()
                current = [replace(batch, heads=done.heads) for batch in current]
            for layer in track(range(chosen.n_layers), "quantise", chosen.n_layers):
                result, reference, current = quantise_block(anatomy, chosen, layer, reference, current, config, seed)
                done.blocks.append(result)
                if tell is not None:
                    tell(layer, result)
            if done.heads is not None:
                done.heads.switch_on()
        except BaseException:
            done.revert()
            raise
    if note := told(done.tokens):
        warnings.warn(note, stacklevel=2)
    return done
