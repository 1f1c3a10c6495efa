"""Causal localisation: patching, lens, interventions on an implicit answer, first-order estimates, each against the plain computation."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
from trocar.locate.cases import after_phrase, interval, language_tower
from trocar.locate.first_order import frozen
from trocar.locate.implicit import LeftInverse, exact_shift, unembedding
from trocar.locate.lens import read_out
from trocar.locate.patching import MODULES, pair, window_of
from trocar.trace import Add, intervene, record
from trocar.trace.queries import answer_scores, answer_tokens, encode

WORDS = ["the", "capital", "language", "of", "home", "employer", "Ann", "Bob", "Cid", "Aland", "Bland", "Cland", "is", *"uvwxyz"]
FAMILIES = ["llama", "gpt2", "qwen3", "gemma3", "gpt_neox", "opt", "phi3"]
PROMPTS = ["the capital of the home of Ann is", "the language of the employer of Bob is", "the capital of Cid is"]
SUBJECTS = ["the home of Ann", "the employer of Bob", "Cid"]
SOURCES = ["the capital of Aland is", "Bland is", "the language of Cland is"]
SOURCE_SUBJECTS = ["Aland", "Bland", "Cland"]
ANSWERS = ["u", "v w", "x y z"]
BRIDGES = ["Aland", "Bland Bob", "Cland"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Random models know nothing, and are told so at every turn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*source runs are wrong")
        yield


@pytest.fixture(scope="module")
def words() -> Any:
    inner: Any = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["[UNK]", "[BOS]", *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


_MADE: dict[str, Any] = {}


def model_of(family: str) -> Any:
    if family not in _MADE:
        _MADE[family] = tiny_model(family).double()
    return _MADE[family]


def point_of(model: Any, kind: str, layer: int) -> str:
    tower = language_tower(Anatomy.of(model)).name
    name = {"block": "resid_post", "attention": "attn_out", "mlp": "mlp_out", "head": "heads", "neuron": "neurons"}[kind]
    return f"{tower + '.' if tower else ''}L{layer}.{name}"


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


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_the_last_reading_is_the_models_own_and_others_pass_its_norm_once(family: str, words: Any) -> None:
    model = tiny_model(family) if family == "gemma2" else model_of(family)  # its attention over padding overflows in float64
    close: Any = {"rtol": 1e-4, "atol": 1e-6} if family == "gemma2" else {"rtol": 1e-9, "atol": 1e-12}
    for mode in ("first", "bag"):
        found = logit_lens(model, words, PROMPTS, {"answer": ANSWERS, "bridge": BRIDGES}, mode=mode, batch_size=2, fingerprint="")
        for name, wanted in (("answer", ANSWERS), ("bridge", BRIDGES)):
            np.testing.assert_allclose(found.scores[name][:, -1], answer_scores(model, words, PROMPTS, wanted, mode), **close)
    tower = language_tower(Anatomy.of(model))
    inputs = encode(model, words, PROMPTS[:1])
    points = [point_of(model, "block", layer) for layer in range(tower.n_layers)]
    with record(model, points) as seen, torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    states = torch.stack([seen[point][0, -1] for point in points])
    torch.testing.assert_close(read_out(model, states)[-1], logits, **close)
    head: Any = tower.head
    with torch.no_grad():
        bare, normed = head(states), head(tower.final_norm(states))
        cap = getattr(tower.config, "final_logit_softcapping", None)
        bare, normed = (cap * torch.tanh(x / cap) if cap else x for x in (bare, normed))
    torch.testing.assert_close(read_out(model, states, normalize=False), bare)
    torch.testing.assert_close(read_out(model, states), normed)
    assert (family == "gemma2") <= bool(cap)
    assert not torch.allclose(bare, normed)


def test_the_lens_at_the_subject_reads_there_and_leaves_no_trace(words: Any) -> None:
    model = model_of("llama")
    before = dict(model.model.norm.__dict__), [dict(block.__dict__) for block in model.model.layers]
    found = logit_lens(model, words, PROMPTS, {"bridge": BRIDGES}, "subject", subjects=SUBJECTS, normalize=False, fingerprint="")
    for case, prompt in enumerate(PROMPTS):
        with record(model, ["L0.resid_pre", "L1.resid_post"]) as seen, torch.no_grad():
            model(**encode(model, words, [prompt]))
        token = answer_tokens(words, BRIDGES[case], prompt)[0]
        for reading, point in ((0, "L0.resid_pre"), (2, "L1.resid_post")):
            p = (model.lm_head.weight @ seen[point][0, -2]).softmax(-1)
            np.testing.assert_allclose(found.scores["bridge"][case, reading], float(p[token].detach()), rtol=1e-9)
            assert found.ranks["bridge"][case, reading] == 1 + int((p > p[token]).sum())
    assert found.peak("bridge") == int(found.scores["bridge"].mean(0).argmax())
    assert found.as_scores("bridge")["L2"] == pytest.approx(found.scores["bridge"][:, 3].mean())
    assert [row["reading"] for row in found.rows()] == [0, 1, 2, 3]

    def fail(*args: Any) -> None:
        raise KeyError

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        read_out(model, torch.zeros(2, 32, dtype=torch.float64), normalize=False)
    handle.remove()
    assert before == (dict(model.model.norm.__dict__), [dict(block.__dict__) for block in model.model.layers])


def test_readings_see_no_intervention_at_the_last_block(words: Any) -> None:
    """An open intervention changes the run that is read, not the reading."""
    model = model_of("gpt2")
    states = torch.randn(4, 32, dtype=torch.float64)
    wanted = read_out(model, states)
    with intervene(model, Add("L2.resid_post", torch.ones(32, dtype=torch.float64))):
        torch.testing.assert_close(read_out(model, states), wanted)
        with torch.no_grad():
            model(**encode(model, words, PROMPTS))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans())
def test_solvers_realise_what_they_promise(seed: int, count: int, batched: bool) -> None:
    """I-14: W A is an orthogonal projector of trace d and A W the identity; `pinv` realises P dz, `exact` the request itself."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(29, 8, generator=rng, dtype=torch.float64)
    inverse = LeftInverse.of(weight)
    eye = torch.eye(29, dtype=torch.float64)
    a = inverse.shift(range(29), eye).T  # (d, V)
    p = weight @ a
    torch.testing.assert_close(a @ weight, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(p, p.T, rtol=0, atol=1e-9)
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-9)
    assert float(p.trace()) == pytest.approx(8)
    tokens = torch.randperm(29, generator=rng)[:count].tolist()
    request = torch.randn(*([3] if batched else []), count, generator=rng, dtype=torch.float64)
    dz = torch.zeros(*request.shape[:-1], 29, dtype=torch.float64)
    dz[..., tokens] = request
    torch.testing.assert_close(inverse.shift(tokens, request) @ weight.T, dz @ p, rtol=0, atol=1e-9)
    shift = exact_shift(weight, tokens, request)
    torch.testing.assert_close(shift @ weight[tokens].T, request, rtol=0, atol=1e-9)
    gram = weight[tokens] @ weight[tokens].T
    torch.testing.assert_close(shift, request @ torch.linalg.solve(gram, weight[tokens]), rtol=1e-7, atol=1e-9)  # the shortest


def test_no_tokens_and_no_request_change_nothing(words: Any) -> None:
    model = model_of("llama")
    assert not exact_shift(unembedding(model), [], torch.zeros(3, 0)).any()
    inputs = encode(model, words, PROMPTS)
    with torch.no_grad():
        logits = model(**inputs).logits
        for shift in (
            exact_shift(unembedding(model), [3, 5], torch.zeros(2)),
            LeftInverse.of(unembedding(model)).shift([3], torch.zeros(1)),
        ):
            with intervene(model, Add("L1.resid_post", shift, positions="last")):
                assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model(**inputs).logits, logits)
    with pytest.raises(DataError, match="linearly dependent"):
        exact_shift(unembedding(model), [3, 3], torch.ones(2))
    with pytest.raises(UnsupportedModelError, match="no left inverse"):
        LeftInverse.of(torch.ones(9, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_interventions_on_the_implicit_answer_follow_the_definition(family: str, words: Any) -> None:
    """Both solvers and actions against the formulas written out with the full inverse, tied and untied heads."""
    model = model_of(family)
    tower = language_tower(Anatomy.of(model))
    w = unembedding(model)
    a = torch.linalg.pinv(w)
    clean = answer_scores(model, words, PROMPTS, ANSWERS)
    for solver, action in (("exact", "suppress"), ("pinv", "suppress"), ("pinv", "enhance")):
        found = implicit_effects(model, words, PROMPTS, BRIDGES, ANSWERS, solver=solver, action=action, fingerprint="")  # type: ignore[arg-type]
        np.testing.assert_allclose(found.clean, clean, rtol=1e-6)
        assert found.control.shape == found.bridge.shape == (3, tower.n_layers)
        for case, prompt in list(enumerate(PROMPTS))[:2] if solver == "exact" else [(1, PROMPTS[1])]:
            tokens, kept = (list(answer_tokens(words, text[case], prompt)) for text in (BRIDGES, ANSWERS))
            for layer in range(tower.n_layers):
                with record(model, point_of(model, "block", layer), positions="last") as seen, torch.no_grad():
                    model(**encode(model, words, [prompt]))
                h = seen[point_of(model, "block", layer)][0, 0]
                z = w @ h
                dz = torch.zeros_like(z)
                dz[tokens] = (z.min() if action == "suppress" else z.max().maximum(2 * z[tokens])) - z[tokens]
                if solver == "exact":
                    both = [*tokens, *kept]
                    new = h + w[both].T @ torch.linalg.solve(w[both] @ w[both].T, dz[both])
                else:
                    new = h + a @ dz
                    back = torch.zeros_like(z)
                    back[kept] = 10 * (z - w @ new)[kept]
                    new = new + a @ back
                ends = encode(model, words, [prompt])["input_ids"].shape[1] - 1
                with intervene(model, Add(point_of(model, "block", layer), new - h, positions=[ends])):
                    by_hand = answer_scores(model, words, [prompt], [ANSWERS[case]]) - clean[case]
                np.testing.assert_allclose(found.bridge[case, layer], float(by_hand), atol=1e-7)
        assert np.abs(found.control).max() > 0
    assert len(found.rows()) == 3 * tower.n_layers
    assert found.scores("difference").flat[0] == pytest.approx((found.bridge - found.control)[:, 0].mean())
    np.testing.assert_allclose(found.relative, found.bridge / found.clean[:, None])


def test_a_share_of_the_change_is_asked_and_none_changes_nothing(words: Any) -> None:
    model = model_of("llama")
    none = implicit_effects(model, words, PROMPTS, BRIDGES, ANSWERS, strength=0, fingerprint="")
    assert not none.bridge.any()
    assert not none.control.any()
    sizes = [np.abs(implicit_effects(model, words, PROMPTS, BRIDGES, ANSWERS, strength=x, fingerprint="").bridge) for x in (1e-3, 2e-3)]
    np.testing.assert_allclose(sizes[1], 2 * sizes[0], rtol=0.1, atol=1e-6)


def test_control_tokens_follow_the_seed_and_shared_tokens_are_the_bridges(words: Any) -> None:
    model = model_of("llama")
    one, same, other = (implicit_effects(model, words, PROMPTS, BRIDGES, ANSWERS, seed=seed, fingerprint="").control for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.allclose(one, other)
    with pytest.warns(UserWarning, match="share tokens"):
        implicit_effects(model, words, PROMPTS[:1], ["u v"], ["v w"], fingerprint="")


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
    with pytest.raises(ComponentError, match="from left to right"):
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
