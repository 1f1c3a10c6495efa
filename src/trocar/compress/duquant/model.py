"""A whole model, block by block. Floor 5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from trocar.anatomy import Anatomy, Tower
from trocar.compress.duquant import streams
from trocar.compress.duquant.blocks import BlockResult, quantise_block
from trocar.compress.duquant.config import DuQuantConfig
from trocar.compress.duquant.groups import check_keep, groups, put
from trocar.core.progress import track
from trocar.evaluate.forward import evaluating
from trocar.patch import Op, Patch, RoundHeads, SparseReplace
from trocar.patch.ops.quantise import one_per_input
from trocar.patch.quantised import QuantisedLinear, RoundedHeads


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
    def errors(self) -> dict[str, float]:
        """Relative output error of every layer on the calibration input; of whole blocks under `L5`."""
        named = {}
        for number, block in enumerate(self.blocks):
            named |= {f"L{number}" if path == "block" else path: error for path, error in block.errors.items()}
        return named

    def operations(self) -> list[Op]:
        """What was done, as operations of a patch: the norms' new gains, then one operation for each input. Valid after `revert` too."""
        ops: list[Op] = []
        for block in self.blocks:
            original = dict(block.taken)
            for path, norm in block.norms.items():
                for name, parameter in norm.named_parameters():
                    old = original[path].get_parameter(name)
                    op = SparseReplace.between(f"{path}.{name}", old, parameter)
                    ops += [op] if op is not None else []
            ops += one_per_input(block.layers)
        return ops if self.heads is None else [*ops, RoundHeads(self.tower.name, self.heads.quantiser.bits)]

    def patch(self, **settings: Any) -> Patch:
        """The quantisation as a patch of the float model, which is put back first. settings: what made it, for the file's header."""
        ops = self.operations()
        self.revert()
        return Patch.of(self.anatomy.model, ops, "duquant", settings)

    def revert(self) -> None:
        if self.heads is not None:
            self.heads.remove()
        while self.blocks:
            for path, module in reversed(self.blocks.pop().taken):
                put(self.anatomy.model, path, module)


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
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    chosen = anatomy.tower(tower)
    check_keep(list(config.keep), [group for layer in range(chosen.n_layers) for group in groups(chosen, layer)])
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
    return done
