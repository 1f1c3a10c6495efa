"""What CREME is compared with: ROME on one MLP, memory injection, a random direction, hop by hop in words, and patching across prompts.

`module: mlp` of `CremeConfig` is the sixth: the same closed form on the MLP's down projections.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pydantic
import torch

from trocar.anatomy import Anatomy
from trocar.core.config import Config
from trocar.core.errors import ComponentError, EditError
from trocar.core.seeds import generator
from trocar.edit.creme.case import HOLE, Case
from trocar.edit.creme.config import LEAD_INS
from trocar.edit.creme.edit import operation
from trocar.edit.creme.moments import Moments
from trocar.edit.creme.solve import least_change
from trocar.evaluate.forward import evaluating
from trocar.locate.cases import after_phrase
from trocar.patch import AddVector, LowRank, Patch
from trocar.trace import Add, Point, Replace, intervene, record, sweep
from trocar.trace.queries import Mode, answer_tokens, ask, batch_of, continuations, encode, language_tower, prompt_tokens


class RomeConfig(Config):
    """ROME as it was run beside CREME (arXiv:2402.14328, reference code; the method is arXiv:2202.05262).

    layer: None is a sixth of the depth (5 of 32). steps, lr, weight_decay, stop, clamp (share of the value's norm), kl: of the search for
    the value. contexts: as in `CremeConfig`.
    """

    layer: int | None = pydantic.Field(default=None, ge=0)
    steps: int = pydantic.Field(default=20, ge=1)
    lr: float = pydantic.Field(default=0.1, gt=0)
    weight_decay: float = pydantic.Field(default=1e-3, ge=0)
    stop: float = pydantic.Field(default=5e-3, ge=0)
    clamp: float = pydantic.Field(default=4.0, gt=0)
    kl: float = pydantic.Field(default=0.0625, ge=0)
    contexts: tuple[str, ...] = LEAD_INS


def rome(model: Any, tokenizer: Any, case: Case, config: RomeConfig | None = None, moments: Moments | None = None) -> Patch:
    """One rank-one edit of an MLP's down projection at the subject's last token, whose value is searched with Adam.

    The fact is (noun phrase of the first hop, template) -> target, the answer tokenised as it follows the prompt. moments: of the MLP's
    keys, None for the identity. Raises EditError if the search diverges.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    config, tower = config or RomeConfig(), language_tower(anatomy)
    layer = max(1, round(tower.n_layers * 5 / 32)) if config.layer is None else config.layer
    if layer >= tower.n_layers:
        raise ComponentError(f"There is no block {layer} to edit.", f"The model has blocks 0 to {tower.n_layers - 1}.")
    answer = answer_tokens(tokenizer, case.target, case.prompt)
    prompts = [context.replace(HOLE, case.prompt) for context in config.contexts]
    essence = f"{case.subject} is"
    rows = [(*prompt_tokens(tokenizer, prompt), *answer[:-1]) for prompt in prompts] + [prompt_tokens(tokenizer, essence)]
    behind = [after_phrase(tokenizer, prompt, case.subject) + len(answer) - 1 for prompt in prompts]
    places = tuple((-1 - back,) for back in (*behind, after_phrase(tokenizer, essence, case.subject)))
    inputs, count = batch_of(anatomy, rows), len(prompts)
    wanted = torch.tensor(answer, device=inputs["input_ids"].device)
    key_point, value_point = (Point(kind, layer, tower.name) for kind in ("neurons", "mlp_out"))
    with evaluating(anatomy.model):
        with record(anatomy, [key_point, value_point], positions=places) as seen:
            clean = anatomy.model(**inputs, use_cache=False).logits[-1, -1].float().log_softmax(-1)
        keys, values = (seen[point][:count, 0].double() for point in (key_point, value_point))
        kind = seen[value_point].dtype
        start = seen[value_point][0, 0].float()
        step = _search(anatomy, inputs, value_point, places, wanted, clean, start, kind, config)
    residual = (start.double() + step.double() - values.mean(0)).cpu()
    moment = None if moments is None else moments.metric(layer)
    update = least_change(keys.mean(0)[:, None], residual[:, None], moment, where=f"block {layer}")
    settings = {**config.model_dump(mode="json"), "layer": layer, "case": case.id}
    return Patch.of(anatomy, [operation(anatomy, "down", layer, (update.left, update.right))], "rome", settings)


def _search(
    anatomy: Anatomy, inputs: Any, point: Point, places: Any, answer: Any, clean: Any, start: Any, kind: torch.dtype, config: RomeConfig
) -> torch.Tensor:
    """The change of the value, (width,) float32, that makes the answer likely under every context."""
    step = torch.zeros_like(start, requires_grad=True)
    optimiser, count = torch.optim.Adam([step], lr=config.lr), len(places) - 1
    with torch.enable_grad():
        for _ in range(config.steps):
            with intervene(anatomy, [Add(point, step.to(kind), positions=places)]):
                logits = anatomy.model(**inputs, use_cache=False).logits
            said = logits[:count, -len(answer) :].float().log_softmax(-1)
            loss = -said[:, range(len(answer)), answer].mean()
            kept = logits[-1, -1].float().log_softmax(-1)
            drift = (kept.exp() * (kept - clean)).sum()
            total = loss + config.kl * drift + config.weight_decay * step.norm() / start.norm() ** 2
            if not bool(total.isfinite()):
                raise EditError(f"The search for a value at {point} diverged.", "Use a smaller lr.")
            if float(total.detach()) < config.stop:
                break
            (step.grad,) = torch.autograd.grad(total, [step])
            optimiser.step()
            with torch.no_grad():
                most = config.clamp * start.norm()
                if step.norm() > most:
                    step.mul_(most / step.norm())
    return step.detach()


def memory_injection(model: Any, case: Case, tokenizer: Any, layer: int, strength: float) -> Patch:
    """Add `strength` times the unembedding rows of the bridge's tokens to attention's output at the last token, while the model runs.

    Reference: arXiv:2309.05605; grid over layer and strength. Raises ComponentError where the model has no unembedding matrix.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    tower = language_tower(anatomy)
    weight = getattr(tower.head, "weight", None)
    if weight is None or weight.shape[1] != tower.width:
        raise ComponentError(f"{type(anatomy.model).__name__} has no unembedding of the residual stream's width.", "Use a language model.")
    rows = weight.detach()[list(answer_tokens(tokenizer, case.bridge))].float().sum(0)
    vector = AddVector(Point("attn_out", layer, tower.name), strength * rows, positions="last")
    return Patch.of(anatomy, [vector], "memory-injection", {"layer": layer, "strength": strength, "case": case.id})


def random_direction(model: Any, patch: Patch, seed: int = 0) -> Patch:
    """The control of an edit: every update keeps its right factor and its norm and gets a random left factor. It must not correct."""
    ops = []
    for number, op in enumerate(patch.ops):
        assert isinstance(op, LowRank)
        drawn = torch.randn(op.b.shape, generator=generator(seed, "direction", number), dtype=torch.float64)
        size = float((op.b.double() @ op.a.double()).norm() / (drawn @ op.a.double()).norm())
        ops.append(LowRank(op.parameter, op.a, (drawn * size).to(op.b.dtype), op.transposed))
    return Patch.of(model, ops, "random-direction", {"of": patch.digest, "seed": seed})


def chain_of_thought(model: Any, tokenizer: Any, cases: Sequence[Case], max_new_tokens: int = 16) -> list[tuple[str, str]]:
    """Each case hop by hop, in words: (what the model says to the first hop, what it says to the second asked of that). An upper reference.

    A first hop's answer ends at the first mark or line's end. Cases without `first_hop` are asked "<subject> is".
    """
    asked = [case.first_hop or f"{case.subject} is" for case in cases]
    first = [_phrase(item.text) for item in continuations(model, tokenizer, asked, max_new_tokens)]
    prompts = [case.template.replace(HOLE, bridge or case.subject) for case, bridge in zip(cases, first, strict=True)]
    second = continuations(model, tokenizer, prompts, max_new_tokens)
    return list(zip(first, [item.text for item in second], strict=True))


def _phrase(text: str) -> str:
    return re.split(r"[.,;:!?\n]| and | who | which ", text.strip() + "\n", maxsplit=1)[0].strip()


def patchscopes(
    model: Any, tokenizer: Any, case: Case, pairs: Sequence[tuple[int, int]], placeholder: str = "x", mode: Mode = "sequence"
) -> list[float]:
    """The target's probability when the state at the end of the first hop is written where the second hop's subject stands.

    pairs: (block whose output is read in the question, block whose output is replaced in the template with `placeholder` for a subject).
    Reference: arXiv:2401.06102 (two passes, no change of weights).
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    tower = language_tower(anatomy)
    shown = case.template.replace(HOLE, placeholder)
    read = sorted({source for source, _ in pairs})
    with evaluating(anatomy.model):
        at = -1 - after_phrase(tokenizer, case.prompt, case.subject)
        with record(anatomy, [Point("resid_post", layer, tower.name) for layer in read], positions=[at]) as seen:
            anatomy.model(**encode(anatomy, tokenizer, [case.prompt]), use_cache=False)
        asked = ask(anatomy, tokenizer, [shown], [case.target], mode)
        place = asked.end(after_phrase(tokenizer, shown, placeholder))
        states = {layer: seen[Point("resid_post", layer, tower.name)][:, 0] for layer in read}
        sets = [Replace(Point("resid_post", target, tower.name), states[source], positions=place) for source, target in pairs]
        return sweep(anatomy, asked.inputs, sets, asked.metric)[:, 0].tolist()
