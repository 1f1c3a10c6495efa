"""Settings of CopRA / CoTo, and of the baselines that it is compared with. arXiv 2410.22911, 2506.05713."""

from __future__ import annotations

from typing import Literal

import pydantic

from trocar.core.config import Config

Strategy = Literal["copra", "stochastic-depth", "progressive-dropout"]


class CopraConfig(Config):
    """When which adapters are switched off during training.

    p0: probability that a group of adapters is on at the first step (0.1 in the authors' callback; 0 in the paper).
    rho: share of the steps after which all are on (0.75: paper and callback).
    schedule: growth from p0 to 1: `linear` (paper), `exp` (convex: (e^x - 1) / (e - 1)), `sine` (concave: sin(pi x / 2)); `constant`
    stays at p0 to the end, without a phase in which all are on. The authors tried the first three and give no formulas; these are ours.
    tilt: `high` drops high blocks more, `low` low ones (the papers' CoTo-H and CoTo-L, in our form: block i of L has probability p ** e, e
    growing from 0.5 to 1.5 with depth, or falling). groups: what is switched together, see `trocar.anatomy.module_groups`; `block` is the
    paper's layer. seed: of the masks; None: the Trainer's seed, else 0.

    strategy: `copra`, or a baseline under the same control. `stochastic-depth` (arXiv 1603.09382, applied to adapters): survival falls
    linearly with depth from 1 to 1 - `depth_rate` at the last group, the same at every step, survivors scaled by 1 / survival, which is
    what the original's scaling at test time amounts to. `progressive-dropout`: elements of the adapters' input are dropped with
    rate 1 - p(t), scaled as dropout scales.

    partial_evaluation: keep the current mask in evaluation mode too, as the authors' callback does (off: the whole network is evaluated).
    tensor: switch by multiplication, for `torch.compile`; saves no time, and gives zero instead of no gradients.
    """

    p0: float = pydantic.Field(default=0.1, ge=0, le=1)
    rho: float = pydantic.Field(default=0.75, gt=0, le=1)
    schedule: Literal["linear", "exp", "sine", "constant"] = "linear"
    tilt: Literal["none", "high", "low"] = "none"
    groups: Literal["block", "module", "role", "tower"] | dict[str, tuple[str, ...]] = "block"
    seed: int | None = pydantic.Field(default=None, ge=0)
    strategy: Strategy = "copra"
    depth_rate: float = pydantic.Field(default=0.5, ge=0, lt=1)
    partial_evaluation: bool = False
    tensor: bool = False
