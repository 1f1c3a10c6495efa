"""CREME: copy what attention does with the bridge into the output projections, in closed form (arXiv:2402.14328)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trocar.anatomy import Anatomy, Head, Tower, parse
from trocar.core.errors import ComponentError, ConfigError, DataError, EditError
from trocar.edit.creme.case import Case, answered, best_tokens, look_at
from trocar.edit.creme.config import CremeConfig
from trocar.edit.creme.moments import Moments
from trocar.edit.creme.passing import Factors, Here, edited_pass, view_of
from trocar.edit.creme.solve import Update, least_change, mixed
from trocar.evaluate.forward import evaluating
from trocar.patch import LowRank, Patch
from trocar.trace.queries import answer_scores, language_tower

PUBLISHED = CremeConfig()
LARGE = 0.10  # share of a matrix's norm above which its change is called large


@dataclass(frozen=True)
class CremeResult:
    """patch: the edit (no operations where nothing was to do); layers: one row of diagnostics per edited block; scores: of each case's
    prompt, before and after; notes: what to know before trusting it; status: `edited` or `nothing to do`."""

    patch: Patch
    layers: tuple[Mapping[str, float], ...]
    scores: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()
    status: str = "edited"
    settings: Mapping[str, Any] = field(default_factory=dict)


def creme_edit(
    model: Any,
    tokenizer: Any,
    cases: Case | Sequence[Case],
    config: CremeConfig = PUBLISHED,
    moments: Moments | None = None,
    checked: bool = True,
) -> CremeResult:
    """Repair two-hop questions: at every edited block, what attention returns on the question becomes what it returns on the guide.

    model: a causal language model of a known family, or its `Anatomy`; it is left as it was, bit for bit, on every way out. cases: all are
    repaired by one patch. moments: made by `second_moment`, where `config.second_moment` is not `none`. checked: ask the model first
    whether the guide is answered right and the case is not solved already, and score the prompt before and after.

    Memory: one batch of all prompts under all contexts, without logits. Raises ConfigError and ComponentError for settings that do not fit
    the model, EditError for a step that has no solution and (under `strict`) for a guide that is answered wrongly, DataError for bad cases.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    wanted = [cases] if isinstance(cases, Case) else list(cases)
    if not wanted:
        raise DataError("There is no case to edit.", "Give at least one.")
    if (config.second_moment == "none") != (moments is None):
        needs = "needs the second moment of keys" if moments is None else "uses no second moment, but one was given"
        raise ConfigError(f"second_moment: {config.second_moment} {needs}.", "Pass moments=second_moment(model, tokenizer, texts, ...).")
    with evaluating(anatomy.model):
        notes = [_named(case, note, wanted) for case in wanted for note in look_at(case, tokenizer)]
        if checked:
            wanted, more = _worth_it(anatomy, tokenizer, wanted, config)
            notes += more
        if not wanted:
            return CremeResult(Patch.of(anatomy, [], "creme", config.model_dump(mode="json")), (), (), tuple(notes), "nothing to do")
        config = _with_layers(anatomy, tokenizer, wanted, config, moments)
        layers = edited_layers(anatomy, config)
        before = _scores(anatomy, tokenizer, wanted, config) if checked else []
        rows, factors = solve(anatomy, tokenizer, wanted, config, layers, moments)
        ops = [operation(anatomy, config.role, layer, pair) for layer, pair in factors.items()]
        settings = {**config.model_dump(mode="json"), "edited_layers": list(layers), "cases": [case.id for case in wanted]}
        patch = Patch.of(anatomy, ops, "creme", settings)
        notes += _size(rows, config)
        if checked and ops:
            with patch.applied(anatomy, verify="structure"):
                after = _scores(anatomy, tokenizer, wanted, config)
        else:
            after = before
    for note in notes:
        warnings.warn(note, stacklevel=2)
    told = tuple({"case": case.id, "before": a, "after": b} for case, a, b in zip(wanted, before, after, strict=True)) if checked else ()
    return CremeResult(patch, tuple(rows), told, tuple(notes), "edited" if ops else "nothing to do", settings)


def solve(
    anatomy: Anatomy, tokenizer: Any, cases: Sequence[Case], config: CremeConfig, layers: Sequence[int], moments: Moments | None = None
) -> tuple[list[dict[str, float]], dict[int, Factors]]:
    """The edit's numbers without checks: (diagnostics per block, factors (left, right) per block). Blocks where nothing moves have none."""
    groups = [list(cases)] if config.many == "batch" else [[case] for case in cases]
    rows: list[dict[str, float]] = []
    weights: dict[int, torch.Tensor] = {}
    found: dict[int, list[Factors]] = {layer: [] for layer in layers}
    for group in groups:
        task = _Task(language_tower(anatomy), group, config, moments)
        weights = edited_pass(anatomy, tokenizer, task.prompts, config.role, weights, layers, task.edit, task.original)
        for layer, pair in task.factors.items():
            found[layer].append(pair)
        rows += task.rows
    joined = {
        layer: (torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs], 0))
        for layer, pairs in found.items()
        if pairs
    }
    return rows, joined


def operation(anatomy: Anatomy, role: str, layer: int, factors: Factors) -> LowRank:
    """The update of one block as a patch's operation; its rank is cut where cases outnumber the matrix's own."""
    view = view_of(anatomy, layer, role)
    left, right = factors
    most = min(view.out_features, view.in_features)
    if right.shape[0] > most:
        u, s, v = torch.linalg.svd(left @ right, full_matrices=False)
        left, right = u[:, :most] * s[:most], v[:most]
    dtype = torch.float64 if view.parameter.dtype == torch.float64 else torch.float32
    return LowRank(view.name, right.to(dtype), left.to(dtype), view.transposed)


class _Task:
    """What one pass is for: the rows (questions and guides under every context, then preserved prompts) and what is done at each block."""

    def __init__(self, tower: Tower, cases: Sequence[Case], config: CremeConfig, moments: Moments | None) -> None:
        self.tower = tower
        self.config, self.moments, self.count, self.contexts = config, moments, len(cases), config.lead_ins
        own = [prompt for case in cases for prompt in _own(case, config)]
        self.kept = list(dict.fromkeys([*config.preserve, *own]))
        asked = [context.replace("{}", text) for case in cases for text in (case.prompt,) for context in self.contexts]
        guides = [context.replace("{}", case.guide) for case in cases for context in self.contexts]
        self.prompts = [*asked, *guides, *self.kept]
        self.span = len(asked)
        self.original = range(self.span, 2 * self.span) if config.target_from == "original" else ()
        self.columns = _columns(config.heads)
        self.rows: list[dict[str, float]] = []
        self.factors: dict[int, Factors] = {}

    def edit(self, here: Here) -> Factors | None:
        """The update of one block, from the keys and values that reach it."""
        keys, goal = (self._mean(here.keys, part) for part in (0, 1))  # (inputs, cases)
        out, value = (self._mean(here.values, part) for part in (0, 1))
        residuals = value - out
        if here.plain and here.values.dtype not in (torch.float32, torch.float64):  # the values themselves were rounded: compute them again
            start = here.view.get().to(here.weight.dtype) if self.original else here.weight
            residuals = (start @ goal.to(start) - here.weight @ keys.to(start)).double().cpu()
        residuals = residuals * self.config.strength
        if not bool((residuals != 0).any()):
            return None
        where, kept = f"block {here.layer}", here.keys[2 * self.span :].double().cpu().T
        moment = None if self.moments is None else self.moments.metric(here.layer, self.config.moment_share)
        if kept.numel() and self.config.preserve_weight is not None:
            moment, kept = mixed(moment, kept, self.config.preserve_weight), kept[:, :0]
        columns = None if self.columns is None else self._inputs(here)
        update = least_change(keys, residuals, moment, kept, columns, self.config.ridge, where)
        factors = self._written(here, update)
        self._tell(here, update, keys, goal, residuals, value, factors)
        if factors is not None:
            self.factors[here.layer] = factors
        return factors

    def _mean(self, rows: torch.Tensor, part: int) -> torch.Tensor:
        """Mean over contexts of the questions' (0) or guides' (1) rows: (features, cases), float64 on the CPU."""
        chosen = rows[part * self.span : (part + 1) * self.span].double().cpu()
        return chosen.reshape(self.count, len(self.contexts), -1).mean(1).T

    def _inputs(self, here: Here) -> list[int]:
        assert self.columns is not None
        size = self.tower.head_size(here.layer)
        return [column for head in self.columns[here.layer] for column in range(head * size, (head + 1) * size)]

    def _written(self, here: Here, update: Update) -> Factors | None:
        """The factors in the precision in which they will be kept, or None where rounding leaves nothing of them."""
        dtype = here.weight.dtype
        left, right = update.left.to(dtype), update.right.to(dtype)
        device = here.weight.device
        new = (here.weight + left.to(device) @ right.to(device)).to(here.view.parameter.dtype)
        return None if torch.equal(new, here.weight.to(new.dtype)) else (left, right)

    def _tell(self, here: Here, update: Update, keys: Any, goal: Any, residuals: Any, value: Any, factors: Factors | None) -> None:
        weight = here.weight
        left = residuals
        if factors is not None:
            new = (weight + factors[0].to(weight.device) @ factors[1].to(weight.device)).to(here.view.parameter.dtype).to(weight.dtype)
            left = residuals - (new.double() - weight.double()).cpu() @ keys
        size = float(torch.linalg.vector_norm(weight.double()))
        self.rows.append(
            {
                "layer": here.layer,
                "change": update.norm,
                "share": update.norm / size,
                "residual": float(left.norm() / value.norm()),
                "step": float(residuals.norm() / value.norm()),
                "key_cosine": float(torch.cosine_similarity(keys, goal, dim=0).mean()),
                "free": update.free,
                "condition": update.condition,
            }
        )


def _own(case: Case, config: CremeConfig) -> list[str]:
    prompts = {"guide": case.guide, "first_hop": case.first_hop}
    return [text for name in config.preserve_own if (text := prompts[name]) is not None]


def _columns(heads: Sequence[str] | None) -> dict[int, list[int]] | None:
    """Block -> its heads whose columns may change."""
    if heads is None:
        return None
    found: dict[int, list[int]] = {}
    for name in heads:
        head = parse(name)
        if not isinstance(head, Head):
            raise ComponentError(f"{name} is not a head.", "Write for example L18.H3.")
        found.setdefault(head.layer, []).append(head.index)
    return {layer: sorted(set(numbers)) for layer, numbers in found.items()}


def _with_layers(anatomy: Anatomy, tokenizer: Any, cases: Sequence[Case], config: CremeConfig, moments: Moments | None) -> CremeConfig:
    if config.layers != "auto":
        return config
    from trocar.edit.creme.layers import choose_layers  # which solves edits itself, under a budget

    return config.model_copy(update={"layers": choose_layers(anatomy, tokenizer, cases, config, moments).layers})


def edited_layers(anatomy: Anatomy, config: CremeConfig) -> tuple[int, ...]:
    """The blocks that `config` names. Raises ComponentError with the valid range, ConfigError for heads in other blocks."""
    tower, layers = language_tower(anatomy), config.layers
    assert not isinstance(layers, str)
    for layer in layers:
        if not 0 <= layer < tower.n_layers:
            raise ComponentError(f"There is no block {layer} to edit.", f"The model has blocks 0 to {tower.n_layers - 1}.")
        view_of(anatomy, layer, config.role)
    if config.heads is not None:
        for name in config.heads:
            anatomy.check(name)
        named = set(_columns(config.heads) or {})
        if named != set(layers):
            raise ConfigError(
                f"heads lie in the blocks {sorted(named)}, but the edited blocks are {list(layers)}.", "Name heads in every edited block."
            )
    return tuple(layers)


def _worth_it(anatomy: Anatomy, tokenizer: Any, cases: Sequence[Case], config: CremeConfig) -> tuple[list[Case], list[str]]:
    """The cases that are to be edited, and what the model itself says about them."""
    targets = [case.target for case in cases]
    solved = answered(anatomy, tokenizer, [case.prompt for case in cases], targets)
    guided = answered(anatomy, tokenizer, [case.guide for case in cases], targets)
    notes, kept = [], []
    for case, right, source in zip(cases, solved, guided, strict=True):
        if right and not config.force:
            notes.append(_named(case, "the model already gives this answer; force edits it all the same", cases))
            continue
        kept.append(case)
        if not source:
            top = ", ".join(f"{text!r} {share:.2f}" for text, share in best_tokens(anatomy, tokenizer, case.guide))
            text = f"the source run is wrong: after '{case.guide}' the model does not say '{case.target}' (it says {top})"
            if config.strict:
                raise EditError(
                    f"case {case.id}: {text}.", "Copying would copy a wrong answer; leave the case out, or set strict to false."
                )
            notes.append(_named(case, f"{text}; copying it copies a wrong answer", cases))
        if case.first_hop and not answered(anatomy, tokenizer, [case.first_hop], [case.bridge])[0]:
            notes.append(_named(case, f"the first hop is not known ('{case.first_hop}'): this adds a fact, it repairs no reasoning", cases))
    return kept, notes


def _named(case: Case, note: str, cases: Sequence[Case]) -> str:
    return f"case {case.id}: {note}" if len(cases) > 1 else note


def _scores(anatomy: Anatomy, tokenizer: Any, cases: Sequence[Case], config: CremeConfig) -> list[dict[str, float]]:
    """Of each case's prompt: the probability of the target, and of the wrong answer where there is one."""
    asked = [(number, name, answer) for number, case in enumerate(cases) for name, answer in _answers(case)]
    prompts = [cases[number].prompt for number, _, _ in asked]
    scores = answer_scores(anatomy, tokenizer, prompts, [answer for _, _, answer in asked], config.mode).tolist()
    rows: list[dict[str, float]] = [{} for _ in cases]
    for (number, name, _), score in zip(asked, scores, strict=True):
        rows[number][name] = score
    return rows


def _answers(case: Case) -> list[tuple[str, str]]:
    return [("target", case.target), *([("wrong", case.wrong)] if case.wrong else [])]


def _size(rows: Sequence[Mapping[str, float]], config: CremeConfig) -> list[str]:
    """A warning where the change is large beside the weights."""
    layers = sorted({int(row["layer"]) for row in rows})
    shares = {layer: sum(row["share"] ** 2 for row in rows if row["layer"] == layer) ** 0.5 for layer in layers}
    large = {layer: share for layer, share in shares.items() if share > LARGE}
    if not large:
        return []
    layer = max(large, key=large.__getitem__)
    hint = "; many: batch with a ridge changes less" if config.many == "sequential" else ""
    others = f"{len(large)} of {len(layers)} blocks above 10 %"
    return [f"the change of block {layer} is {100 * large[layer]:.0f} % of its matrix's norm ({others}){hint}"]
