"""Settings of Where-to-Edit, each default with its source: "code" is the authors' published code, "ours" a choice of this library."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from trocar.core.config import Config

MaskKind = Literal["learned", "gradient-norm", "constant", "magnitude", "random", "dense"]
Auto = Literal["auto"]


def keep_from_sparsity(data: Any) -> Any:
    """Accept `sparsity` (share of entries that stay closed, the paper's word) as the other spelling of `keep` (share left open)."""
    if isinstance(data, dict) and "sparsity" in data:
        if "keep" in data:
            raise ValueError("give keep (share of entries opened) or sparsity (share left closed, 1 - keep), not both")
        sparsity = data["sparsity"]
        if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, not {sparsity!r}")
        data = {key: value for key, value in data.items() if key != "sparsity"} | {"keep": round(1 - sparsity, 12)}
    return data


class CutMixConfig(Config):
    """Pseudo-failures: a patch-aligned rectangle of another image is pasted in.

    low, high: side lengths as a fraction of the patch grid (code: 3 to 8 of 14 patches); crop: smallest area of the random resized
    crop taken first (code: .25; 1 takes no crop).
    """

    low: float = pydantic.Field(default=0.21, gt=0, lt=1)
    high: float = pydantic.Field(default=0.57, gt=0, lt=1)
    crop: float = pydantic.Field(default=0.25, gt=0, le=1)

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> CutMixConfig:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        return self


class LabelConfig(Config):
    """Per-pair masks that the hypernetwork learns to predict.

    kind: `fo` regresses on centred log squared row norms of the pair's gradient (ours: as good on small models at 1/20 of the cost and
    cannot collapse), `ref` is the bi-level search of the paper. temperature, inner_steps, outer_steps, outer_lr, mask_scale, label_scale,
    decay: code. alpha: step of the inner loop (code: 1e-3) and sparsity_weight: lambda per sample (code: 1 per batch of 8 = .125); both
    are absolute and do not carry over between models, so `auto` finds them on a few pairs.
    """

    kind: Literal["fo", "ref"] = "fo"
    temperature: float = pydantic.Field(default=5.0, gt=0)
    inner_steps: int = pydantic.Field(default=5, ge=1)
    outer_steps: int = pydantic.Field(default=10, ge=1)
    outer_lr: float = pydantic.Field(default=0.1, gt=0)
    decay: float = pydantic.Field(default=0.99, ge=0, lt=1)
    mask_scale: float = pydantic.Field(default=10.0, gt=0)
    label_scale: float = pydantic.Field(default=3.0, gt=0)
    alpha: float | Auto = "auto"
    sparsity_weight: float | Auto = "auto"

    @pydantic.field_validator("alpha", "sparsity_weight")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not (0 <= value < float("inf")):
            raise ValueError("must be 'auto' or a finite number of at least 0")
        return value


class HypernetworkConfig(Config):
    """Training of the mask hypernetwork.

    first_block: first edited block, 0-based (None: round(7/12 L), at most L - blocks; the paper edits 7, 8, 9 of 12); blocks: edited
    blocks in a row (code: 3). pairs: CutMix pairs (code: 10,000 batches of 8, each seen once; ours: fewer, seen over many epochs);
    chunk: pairs per committed unit of work. depth, lr, batch, steps_per_batch, loss_scale: code (its default depth is 5, its commands
    use 3); heads: 6 (code), or the largest divisor of the width below 6; epochs, held_out (share of pairs kept for early stopping),
    patience (epochs without a better held-out loss): ours. start: `mean` lets the untrained network predict the mean label (zero output
    weights, the mean as bias; ours), `published` leaves the output maps as they are initialised.
    """

    first_block: int | None = None
    blocks: int = pydantic.Field(default=3, ge=1)
    tower: str | None = None
    pairs: int = pydantic.Field(default=2048, ge=4)
    chunk: int = pydantic.Field(default=64, ge=1)
    cutmix: CutMixConfig = CutMixConfig()
    labels: LabelConfig = LabelConfig()
    depth: int = pydantic.Field(default=3, ge=1)
    heads: int | None = pydantic.Field(default=None, ge=1)
    lr: float = pydantic.Field(default=1e-4, gt=0)
    batch: int = pydantic.Field(default=8, ge=1)
    steps_per_batch: int = pydantic.Field(default=4, ge=1)
    loss_scale: float = pydantic.Field(default=0.1, gt=0)
    epochs: int = pydantic.Field(default=25, ge=1)
    patience: int = pydantic.Field(default=5, ge=1)
    start: Literal["mean", "published"] = "mean"
    held_out: float = pydantic.Field(default=0.125, gt=0, lt=1)


class EditConfig(Config):
    """How one failure is fine-tuned away.

    keep: share of the n x h entries that is opened (code: .75, .5, .25, .1, .05; `sparsity` = 1 - keep is accepted instead). lr 2e-5,
    steps 100, stop_ce .01, decay .99: code, for ViT-B/16; small models trained from scratch need lr 1e-4 to 1e-3 and a stop_ce of .3.
    stop_margin: stop as soon as every image is right with this logit margin over the runner-up, instead of stop_ce (ours). force: edit
    although the image is already right. penalty, penalty_weight: c ||W - W0||_1 or c/2 ||W - W0||_2^2 added to the loss (code, its dense
    baseline); first_step `sgd` repeats that baseline's first step, plain gradient descent with first_step_lr. shrink: afterwards move back
    along W0 + s (W - W0) to the smallest s that still satisfies the stop rule (ours). locality_weight: weight of a KL term to the base
    model on ordinary images, when such images are given (ours). optimiser `sgd` has momentum, `adamw` weight decay (ours).
    """

    keep: float = pydantic.Field(default=0.05, gt=0, le=1)
    first_block: int | None = None
    blocks: int = pydantic.Field(default=3, ge=1)
    tower: str | None = None
    optimiser: Literal["rmsprop", "sgd", "adamw"] = "rmsprop"
    lr: float = pydantic.Field(default=2e-5, gt=0)
    momentum: float = pydantic.Field(default=0.0, ge=0, lt=1)
    weight_decay: float = pydantic.Field(default=0.0, ge=0)
    decay: float = pydantic.Field(default=0.99, ge=0, lt=1)
    steps: int = pydantic.Field(default=100, ge=0)
    stop_ce: float = pydantic.Field(default=0.01, ge=0)
    stop_margin: float | None = pydantic.Field(default=None, ge=0)
    force: bool = False
    penalty: Literal["l1", "l2"] | None = None
    penalty_weight: float = pydantic.Field(default=0.0, ge=0)
    first_step: Literal["same", "sgd"] = "same"
    first_step_lr: float = pydantic.Field(default=2e-5, gt=0)
    shrink: bool = False
    shrink_steps: int = pydantic.Field(default=8, ge=1)
    locality_weight: float = pydantic.Field(default=0.0, ge=0)
    locality_temperature: float = pydantic.Field(default=1.0, gt=0)
    batch: int | None = pydantic.Field(default=None, ge=1)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _sparsity(cls, data: Any) -> Any:
        return keep_from_sparsity(data)
