"""Logit lens and interventions on an implicit answer, each against the plain computation."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from two_hop_words import ANSWERS, BRIDGES, FAMILIES, PROMPTS, SUBJECTS, model_of, point_of, tokenizer

from trocar.anatomy import Anatomy, tiny_model
from trocar.core.errors import DataError, UnsupportedModelError
from trocar.locate import (
    implicit_effects,
    logit_lens,
)
from trocar.locate.implicit import LeftInverse, exact_shift, unembedding
from trocar.locate.lens import read_out
from trocar.trace import Add, intervene, record
from trocar.trace.queries import answer_scores, answer_tokens, encode, language_tower

pytestmark = pytest.mark.filterwarnings("ignore:.*source runs are wrong")  # random models know nothing


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer()


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
