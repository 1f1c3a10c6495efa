"""Causal localisation: patching and first-order estimates, each against the plain computation."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from two_hop_words import ANSWERS, BRIDGES, FAMILIES, PROMPTS, SOURCES, SUBJECTS, model_of, tokenizer

from trocar.anatomy import Anatomy, tiny_model
from trocar.core.errors import ComponentError, DataError, InterventionError, UnsupportedModelError
from trocar.locate import (
    Scores,
    best_window,
    component_effects,
    first_order_effects,
    implicit_effects,
    logit_lens,
    module_effects,
    rank_correlation,
    screen,
)
from trocar.locate.cases import after_phrase, interval
from trocar.locate.first_order import frozen
from trocar.locate.lens import read_out
from trocar.locate.patching import MODULES, pair, window_of
from trocar.trace import intervene
from trocar.trace.queries import answer_scores, encode, language_tower

pytestmark = pytest.mark.filterwarnings("ignore:.*source runs are wrong")  # random models know nothing


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer()


def plain(model: Any, words: Any, case: int, kind: str, layers: Any, back: int, mode: str, share: float = 1.0, index: Any = None) -> float:
    """The answer's score after a copy, by hooks of torch alone: one prompt, one full pass, a fresh batch of one."""
    anatomy = Anatomy.of(model)
    tower = language_tower(anatomy)
    place = {"block": ("block", "out"), "attention": ("o", "out"), "mlp": ("down", "out"), "head": ("o", "in"), "neuron": ("down", "in")}
    role, side = place[kind]
    kept: dict[int, torch.Tensor] = {}
    source = encode(model, words, [SOURCES[case]])
    at = source["input_ids"].shape[1] - 1 - back
    own = encode(model, words, [PROMPTS[case]])["input_ids"].shape[1] - 1 - back

    def flat(value: Any) -> torch.Tensor:
        value = value[0] if isinstance(value, tuple) else value
        return value if value.ndim == 2 else value[0]  # OPT's MLP is flat already; a batch of one row

    handles = []
    for layer in layers:
        module = tower.module(layer, role)
        if side == "out":
            handles.append(module.register_forward_hook(lambda m, a, o, layer=layer: kept.__setitem__(layer, flat(o)[at].clone())))
        else:
            handles.append(module.register_forward_pre_hook(lambda m, a, layer=layer: kept.__setitem__(layer, flat(a)[at].clone())))
    with torch.no_grad():
        model(**source)
    for handle in handles:
        handle.remove()

    def put(value: Any, layer: int) -> None:
        row = flat(value)[own]
        width = len(row) // tower.heads(layer) if kind == "head" else 1
        chosen = slice(None) if index is None else slice(index * width, (index + 1) * width)
        row[chosen] += share * (kept[layer][chosen] - row[chosen])

    handles = []
    for layer in layers:
        module = tower.module(layer, role)
        if side == "out":
            handles.append(module.register_forward_hook(lambda m, a, o, layer=layer: put(o, layer)))
        else:
            handles.append(module.register_forward_pre_hook(lambda m, a, layer=layer: put(a, layer)))
    try:
        return float(answer_scores(model, words, [PROMPTS[case]], [ANSWERS[case]], mode)[0])  # type: ignore[arg-type]
    finally:
        for handle in handles:
            handle.remove()


def test_windows_follow_the_reference_rule() -> None:
    for layers in (1, 5, 32):
        for width in (1, 2, 5, 6):
            for layer in range(layers):
                low, high = max(0, layer - width // 2), min(layers, layer - (-width // 2)) - 1
                assert list(window_of(layer, width, layers)) == list(range(low, high + 1))
    assert list(window_of(10, 6, 32)) == [7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_are_those_of_plain_hooks(family: str, words: Any) -> None:
    """Every kind, layer, window and position, prompts and answers of different lengths, against one pass per cell."""
    model = model_of(family)
    for window, position, mode in ((1, "last", "sequence"), (2, "subject", "first")):
        subjects = SUBJECTS if position == "subject" else None
        found = module_effects(
            model, words, PROMPTS, SOURCES, ANSWERS, position=position, subjects=subjects, window=window, mode=mode, fingerprint=""
        )
        clean = answer_scores(model, words, PROMPTS, ANSWERS, mode).numpy()
        np.testing.assert_allclose(found.clean, clean, rtol=1e-6)
        np.testing.assert_allclose(found.source, answer_scores(model, words, SOURCES, ANSWERS, mode).numpy(), rtol=1e-6)
        layers = found.effects["block"].shape[1]
        back = int(position == "subject")
        for kind in MODULES:
            for layer in range(layers):
                copied = window_of(layer, 1 if kind == "block" else window, layers)
                for case in range(3) if (kind, layer) == ("mlp", 1) else [(layer + window) % 3]:
                    by_hand = plain(model, words, case, kind, copied, back, mode) - clean[case]
                    np.testing.assert_allclose(found.effects[kind][case, layer], by_hand, atol=1e-7)
    scores = found.scores("mlp")
    assert isinstance(scores, Scores)
    assert scores.flat[1] == pytest.approx(found.effects["mlp"][:, 1].mean())
    assert scores.kind == "mlp"
    assert len(found.rows()) == 3 * layers


@pytest.mark.parametrize("family", FAMILIES)
def test_copying_oneself_does_nothing_and_the_last_block_everything(family: str, words: Any) -> None:
    model = model_of(family)
    same = module_effects(model, words, PROMPTS, PROMPTS, ANSWERS, window=2, fingerprint="")
    for kind in MODULES:
        assert np.abs(same.effects[kind]).max() < 1e-7
        assert (same.ranks[kind] == 0).all()
    found = module_effects(model, words, PROMPTS, SOURCES, ANSWERS, ["block"], mode="bag", fingerprint="")
    np.testing.assert_allclose(found.clean + found.effects["block"][:, -1], found.source, rtol=1e-5)
    np.testing.assert_allclose(found.clean_rank + found.ranks["block"][:, -1], found.source_rank, rtol=1e-6)
    pairs = pair(model, words, PROMPTS[:1], SOURCES[:1], ["u"], ["block"])
    last = pairs.tower.n_layers - 1
    with intervene(model, pairs.copy(Anatomy.of(model).components("block", pairs.tower.name)[last])), torch.no_grad():
        patched = model(**pairs.asked.inputs).logits[0, -1].softmax(-1)
    wanted = model(**encode(model, words, SOURCES[:1])).logits[0, -1].softmax(-1)
    torch.testing.assert_close(patched, wanted, rtol=1e-9, atol=1e-12)


def test_single_components_and_their_modules_agree(words: Any) -> None:
    """Copying one head, neuron or module, and the modules' own routine."""
    model = model_of("qwen3")
    names = ["L1.H2", "L2.N7", "L1.attn", "L0.mlp", "L2", "L0.H0"]
    found = component_effects(model, words, PROMPTS, SOURCES, ANSWERS, names)
    clean = answer_scores(model, words, PROMPTS, ANSWERS).numpy()
    for place, (kind, layer, index) in enumerate(
        [("head", 1, 2), ("neuron", 2, 7), ("attention", 1, None), ("mlp", 0, None), ("block", 2, None), ("head", 0, 0)]
    ):
        by_hand = [plain(model, words, case, kind, [layer], 0, "sequence", index=index) - clean[case] for case in range(3)]
        np.testing.assert_allclose(found[:, place], by_hand, atol=1e-7)
    modules = module_effects(model, words, PROMPTS, SOURCES, ANSWERS, fingerprint="")
    np.testing.assert_allclose(found[:, 2], modules.effects["attention"][:, 1], atol=1e-7)
    np.testing.assert_allclose(found[:, 4], modules.effects["block"][:, 2], atol=1e-7)


def test_the_best_window_is_the_best_and_skips_layer_0(words: Any) -> None:
    values = np.array([9.0, 1, 2, 5, 4, 0])
    assert best_window(values, 2) == (3, 4)
    assert best_window(values, 2, skip_first=False) == (0, 1)
    assert best_window(np.stack([values, -values, values]), 5) == (1, 2, 3, 4, 5)
    assert best_window(np.array([0.0, 1, 1, 1]), 1) == (1,)
    for width in (0, 6, 9):
        with pytest.raises(DataError, match="no window"):
            best_window(values, width)
    model = model_of("llama")
    whole = module_effects(model, words, PROMPTS, SOURCES, ANSWERS, ["attention"], window=2, fingerprint="")
    chosen = best_window(whole, 2)
    assert chosen == (1, 2)  # of three layers, without the first
    single = module_effects(model, words, PROMPTS, SOURCES, ANSWERS, ["attention"], fingerprint="")
    assert (
        best_window(single, 1) == best_window(single.scores("attention"), 1) == (1 + int(single.effects["attention"].mean(0)[1:].argmax()),)
    )
    with pytest.raises(DataError, match="do not choose"):
        best_window(whole, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_are_the_slope_of_the_exact_effect(family: str, words: Any) -> None:
    """Copying a small share of the way to the source: effect / share is the estimate, for modules, heads and neurons."""
    model = model_of(family)
    kinds = ("block", "attention", "mlp", "head", "neuron")
    found = first_order_effects(model, words, PROMPTS, SOURCES, ANSWERS, kinds, batch_size=2, fingerprint="")
    clean = answer_scores(model, words, PROMPTS, ANSWERS).numpy()
    np.testing.assert_allclose(found.clean, clean, rtol=1e-9)
    case, layer, small = 1, 1, 3e-3  # norms of some families compute in float32 whatever the model's dtype
    for kind, index in (("block", None), ("attention", None), ("mlp", None), ("head", 3), ("neuron", 5)):
        up, down = (plain(model, words, case, kind, [layer], 0, "sequence", share, index) for share in (small, -small))
        here = (case, layer) if index is None else (case, layer, index)
        assert found.values[kind][here] == pytest.approx((up - down) / (2 * small), rel=2e-3, abs=1e-9)
    np.testing.assert_allclose(found.values["head"].sum(2), found.values["attention"], atol=1e-12)
    assert found.scores("head").matrix().values.shape == found.values["head"].shape[1:]


def test_a_backward_pass_leaves_the_model_alone(words: Any) -> None:
    model = tiny_model("llama").double()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    first_order_effects(model, words, PROMPTS, SOURCES, ANSWERS, fingerprint="")
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.layers.0.mlp.up_proj.weight"]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]
    assert (model.lm_head.weight.grad == 1).all()
    with pytest.raises(KeyError), frozen(model):
        raise KeyError
    assert model.lm_head.weight.requires_grad


def test_screening_heads_by_first_order_verifies_exactly(words: Any) -> None:
    model = model_of("llama")
    estimate = first_order_effects(model, words, PROMPTS, SOURCES, ANSWERS, ["head"]).scores("head")

    def exact(components: list) -> np.ndarray:
        return component_effects(model, words, PROMPTS, SOURCES, ANSWERS, components).mean(0)

    every = [component for component, _ in estimate.sorted()]
    known = Scores("head", "", dict(zip(every, exact(every).tolist(), strict=True)), estimate.how)
    found = screen(estimate, exact, 6, wanted=3, known=known)
    assert len(found.verified) == 6
    assert all(found.verified[c] == pytest.approx(known[c]) for c in found.verified.components())
    assert found.correlation == pytest.approx(rank_correlation(estimate, known))
    assert found.recall == len(set(map(str, found.verified.components())) & {name for name, _ in known.ranked(3)}) / 3
    assert {str(c) for c in found.top().components()} <= {str(c) for c in found.verified.components()}


def test_phrases_are_found_by_tokens(words: Any) -> None:
    assert [after_phrase(words, prompt, phrase) for prompt, phrase in zip(PROMPTS, SUBJECTS, strict=True)] == [1, 1, 1]
    assert after_phrase(words, "the home of Ann is the capital of Aland", "Ann") == 5
    assert after_phrase(words, "Ann is Ann", "Ann ") == 0
    letters: Any = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "bc": 3, " ": 4, "[UNK]": 5}, [("b", "c")], unk_token="[UNK]"))
    joined = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]")
    assert joined("abcab")["input_ids"] == [0, 3, 0, 1]
    assert after_phrase(joined, "abcab", "ab") == 0
    assert after_phrase(joined, "abcaa", "ab") == 2  # `b` lies in the token `bc`


def test_an_interval_over_cases_covers_the_mean_of_many() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        mean, low, high = interval(rng.normal(size=(40, 2)), seed)
        assert mean.shape == low.shape == high.shape == (2,)
        covered += int(((low <= 0) & (high >= 0)).sum())
    assert 105 <= covered <= 119  # of 120, 95 % in the long run


def test_bad_inputs_are_refused(words: Any) -> None:
    model = model_of("llama")
    with pytest.raises(DataError, match="cannot be paired"):
        module_effects(model, words, PROMPTS, SOURCES[:2], ANSWERS)
    with pytest.raises(DataError, match="cannot be paired"):
        module_effects(model, words, [], [], [])
    with pytest.raises(ComponentError, match="no kind of component"):
        module_effects(model, words, PROMPTS, SOURCES, ANSWERS, [])
    with pytest.raises(ComponentError, match="'head' is not a kind"):
        module_effects(model, words, PROMPTS, SOURCES, ANSWERS, ["head"])
    with pytest.raises(DataError, match="window of 0"):
        module_effects(model, words, PROMPTS, SOURCES, ANSWERS, window=0)
    for position in ("first", 0, True, -40):
        with pytest.raises(DataError, match="position"):
            module_effects(model, words, PROMPTS, SOURCES, ANSWERS, position=position)
    with pytest.raises(DataError, match="one noun phrase"):
        module_effects(model, words, PROMPTS, SOURCES, ANSWERS, position="subject")
    for phrase in ("Zoe", " "):
        with pytest.raises(DataError, match="does not contain"):
            module_effects(model, words, PROMPTS, SOURCES, ANSWERS, position="subject", subjects=[phrase, *SUBJECTS[1:]])
    with pytest.raises(DataError, match="differ in the 1 tokens after"):
        module_effects(model, words, PROMPTS, [*SOURCES[:2], "the language of Cland of"], ANSWERS, position="subject", subjects=SUBJECTS)
    with pytest.raises(ComponentError, match="Layers run from 0 to 2"):
        component_effects(model, words, PROMPTS, SOURCES, ANSWERS, ["L9.H0"])
    with pytest.raises(ComponentError, match="not a kind whose output"):
        component_effects(model, words, PROMPTS, SOURCES, ANSWERS, ["L1.attn.q"])
    with pytest.raises(DataError, match="mode 'sequence'"):
        logit_lens(model, words, PROMPTS, {"a": ANSWERS}, mode="sequence")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="cannot be paired"):
        logit_lens(model, words, PROMPTS, {"a": ANSWERS[:1]})
    with pytest.raises(DataError, match="not \\(n, 32\\)"):
        read_out(model, torch.zeros(3, 31))
    for wrong in ({"action": "erase"}, {"solver": "lstsq"}):
        with pytest.raises(DataError, match="action"):
            implicit_effects(model, words, PROMPTS, BRIDGES, ANSWERS, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="Acting on token logits"):
        implicit_effects(tiny_model("opt-post-norm"), words, PROMPTS, BRIDGES, ANSWERS)
    with pytest.raises(UnsupportedModelError, match="from left to right"):
        logit_lens(tiny_model("bert"), words, PROMPTS, {"a": ANSWERS})


def test_unlike_tails_and_wrong_sources_are_told(words: Any) -> None:
    model = model_of("llama")
    with pytest.warns(UserWarning, match="1 prompts end in another token"):
        module_effects(model, words, PROMPTS, ["the capital of Aland", *SOURCES[1:]], ANSWERS, ["mlp"], fingerprint="")
    with pytest.warns(UserWarning, match="end in white space"):
        module_effects(model, words, PROMPTS, [SOURCES[0] + " ", *SOURCES[1:]], ANSWERS, ["mlp"], fingerprint="")
    found = module_effects(model, words, PROMPTS, SOURCES, ANSWERS, ["mlp"], fingerprint="")
    assert (found.source_rank > 10).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=f"{int((found.source_rank > 10).sum())} of 3 source runs are wrong"):
            module_effects(model, words, PROMPTS, SOURCES, ANSWERS, ["mlp"], fingerprint="")


def test_hooks_are_gone_after_a_failure(words: Any) -> None:
    model = model_of("llama")
    for routine in (component_effects, first_order_effects):
        with pytest.raises(DataError, match="batch_size=0"):
            routine(model, words, PROMPTS, SOURCES, ANSWERS, ["L1.attn"] if routine is component_effects else ["mlp"], batch_size=0)
    pairs = pair(model, words, PROMPTS, SOURCES, ANSWERS, ["mlp"])
    with pytest.raises(InterventionError, match="replaces what another"):
        pairs.run([[pairs.copy(Anatomy.of(model).components("mlp")[1])] * 2])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all("forward" not in module.__dict__ for module in model.modules())
