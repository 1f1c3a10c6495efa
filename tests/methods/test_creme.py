"""CREME on tiny models of every decoder family: invariants 1, 2, 4, 8 to 12, 18 to 20, options, and what is refused."""

import copy
import warnings
from typing import Any

import pytest
import torch
from creme_models import CASE, CONTEXTS, DECODERS, OTHER, TOKENIZER, last, logits, model_of, plain_loop, same, state

from trocar.anatomy import Anatomy, Linear
from trocar.core.errors import ComponentError, ConfigError, DataError, EditError, UnsupportedModelError
from trocar.core.workspace import Workspace
from trocar.edit.creme import LEAD_INS, Case, CremeConfig, Moments, creme_edit, second_moment
from trocar.patch import stack
from trocar.trace.queries import batch_of

pytestmark = pytest.mark.filterwarnings("ignore:the ", "ignore:case ", "ignore:prompt and guide")
ALL = CremeConfig(layers=(0, 1, 2), contexts=CONTEXTS)
MIDDLE = CremeConfig(layers=(1, 2), contexts=CONTEXTS)
ROTARY = [name for name in DECODERS if name not in ("gpt2", "opt", "opt-post-norm")]


def exact(name: str) -> torch.dtype:
    return torch.float32 if name == "gemma2" else torch.float64  # its softmax is taken in float32, where a float64 mask overflows


def view(model: Any, layer: int, role: str = "o") -> Any:
    anatomy = Anatomy.of(model)
    return anatomy.linear(Linear(layer, role, "" if len(anatomy.towers) == 1 else "text"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def llama() -> Any:
    return model_of("llama")


# ------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("name", DECODERS)
def test_the_edit_is_that_of_the_plain_loop(name: str) -> None:
    model = model_of(name, exact(name))
    before = state(model)
    close = 1e-12 if exact(name) == torch.float64 else 1e-6
    for config, role in (
        (ALL, "o"),
        (ALL.model_copy(update={"target_from": "original"}), "o"),
        (ALL.model_copy(update={"module": "mlp", "layers": (1,)}), "down"),
    ):
        result = creme_edit(model, TOKENIZER, CASE, config)
        assert same(before, state(model))
        plain = copy.deepcopy(model)
        plain_loop(plain, CASE, list(config.layers), CONTEXTS, config.target_from == "original", role)  # type: ignore[arg-type]
        written = {view(model, layer, role).name for layer in config.layers}  # type: ignore[arg-type]
        assert set(result.patch.touched()) == written
        with result.patch.applied(model):
            for key, value in state(model).items():
                other = plain.state_dict()[key]
                assert torch.allclose(value, other, rtol=close, atol=close * float(other.abs().max())), key
                assert key in written or torch.equal(value, before[key]) or "embed" in key or "head" in key, key  # I-9
            for layer in config.layers:
                delta = view(model, layer, role).get() - before_matrix(before, model, layer, role)  # type: ignore[arg-type]
                assert torch.linalg.matrix_rank(delta.double(), rtol=1e-5) <= 1  # I-2
        assert same(before, state(model))  # I-8, I-9: bit for bit


def before_matrix(before: dict[str, torch.Tensor], model: Any, layer: int, role: str) -> torch.Tensor:
    found = view(model, layer, role)
    return before[found.name].T if found.transposed else before[found.name]


@pytest.mark.parametrize("name", DECODERS)
def test_edited_everywhere_the_question_is_the_guide(name: str) -> None:
    """I-12: exact where positions are relative; with learned positions for prompts of equal length, and not otherwise."""
    model = model_of(name, exact(name))
    close = 1e-10 if exact(name) == torch.float64 else 1e-5
    config = CremeConfig(layers=(0, 1, 2), contexts="identity", target_from="original")
    short = CASE.model_copy(update={"subject": "ostland"})
    for case, holds in ((CASE, name in ROTARY), (short, True)):
        goal = logits(model, case.guide)
        result = creme_edit(model, TOKENIZER, case, config.model_copy(update={"force": True}))
        with result.patch.applied(model):
            gap = float((logits(model, case.prompt) - goal).abs().max())
        assert (gap < close) == holds, (case.subject, gap)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_key_goes_to_the_value(dtype: torch.dtype) -> None:
    """I-1, at the edited block, with the stored key and value."""
    model = model_of("qwen3", dtype)
    bound = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    config = CremeConfig(layers=(1,), contexts="identity")
    result = creme_edit(model, TOKENIZER, CASE, config)
    assert result.layers[0]["residual"] < bound
    key, _ = last(model, [CASE.prompt], 1)
    _, value = last(model, [CASE.guide], 1)
    with result.patch.applied(model):
        moved = view(model, 1).get().double() @ key[0].double()
    assert float((moved - value[0].double()).norm()) < 2 * bound * float(value.double().norm())
    assert view(model, 1).parameter.dtype == dtype


def test_storage_makes_no_difference() -> None:
    """I-18: the same weights stored the other way round are the same edit."""
    from transformers.pytorch_utils import Conv1D

    conv = model_of("gpt2")
    linear = copy.deepcopy(conv)
    for block in linear.transformer.h:
        old = block.attn.c_proj
        assert isinstance(old, Conv1D)
        block.attn.c_proj = torch.nn.Linear(*old.weight.shape, dtype=torch.float64)
        block.attn.c_proj.load_state_dict({"weight": old.weight.T.clone(), "bias": old.bias.clone()})
    patches = [creme_edit(model, TOKENIZER, CASE, MIDDLE).patch for model in (conv, linear)]
    with patches[0].applied(conv), patches[1].applied(linear):
        for layer in (1, 2):
            assert torch.allclose(view(conv, layer).get(), view(linear, layer).get(), atol=1e-13)
    assert patches[0].ops[0].transposed  # type: ignore[union-attr]
    assert not patches[1].ops[0].transposed  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------- invariants on one family


def test_equal_prompts_change_nothing(llama: Any) -> None:
    """I-4, for both kinds of target and several blocks."""
    case = CASE.model_copy(update={"bridge": CASE.subject})
    for target in ("current", "original"):
        config = ALL.model_copy(update={"target_from": target, "force": True})
        result = creme_edit(llama, TOKENIZER, case, config)
        assert sum(row["change"] for row in result.layers) < 1e-12


def test_contexts_and_batching_do_not_matter(llama: Any) -> None:
    """I-10: the order of contexts, and what else is in the batch (other lengths of padding)."""
    first = creme_edit(llama, TOKENIZER, CASE, ALL)
    turned = creme_edit(llama, TOKENIZER, CASE, ALL.model_copy(update={"contexts": CONTEXTS[::-1]}))
    padded = creme_edit(
        llama, TOKENIZER, CASE, ALL.model_copy(update={"preserve": ("the " * 30 + "capital is",), "preserve_weight": 1e-12})
    )
    for other in (turned, padded):
        for one, two in zip(first.patch.ops, other.patch.ops, strict=True):
            assert torch.allclose(one.b @ one.a, two.b @ two.a, atol=1e-10)  # type: ignore[union-attr]


def test_layers_are_a_set(llama: Any) -> None:
    """I-11"""
    twice = CremeConfig(layers=(2, 0, 1, 2, 0), contexts=CONTEXTS)
    assert twice.layers == (0, 1, 2)
    assert creme_edit(llama, TOKENIZER, CASE, twice).patch == creme_edit(llama, TOKENIZER, CASE, ALL).patch


def test_many_cases(llama: Any) -> None:
    """I-19 on a model: a batch of one is the single edit; batch and sequence meet every case's value at the first block."""
    single = creme_edit(llama, TOKENIZER, CASE, ALL).patch
    assert creme_edit(llama, TOKENIZER, [CASE], ALL.model_copy(update={"many": "sequential"})).patch.ops[0].b.equal(single.ops[0].b)  # type: ignore[union-attr]
    for many in ("batch", "sequential"):
        result = creme_edit(llama, TOKENIZER, [CASE, OTHER], ALL.model_copy(update={"many": many}))
        assert [op.a.shape[0] for op in result.patch.ops] == [2, 2, 2]  # type: ignore[union-attr]
        assert max(row["residual"] for row in result.layers) < 1e-9
    plain = copy.deepcopy(llama)
    plain_loop(plain, CASE, [0, 1, 2], CONTEXTS)
    plain_loop(plain, OTHER, [0, 1, 2], CONTEXTS)
    with result.patch.applied(llama):
        for layer in range(3):
            assert torch.allclose(view(llama, layer).get(), view(plain, layer).get(), atol=1e-12)


def test_undo_and_stacking(llama: Any) -> None:
    """Two edits overlap and say so; undoing the first of them leaves exactly the second."""
    before = state(llama)
    first, second = (creme_edit(llama, TOKENIZER, case, MIDDLE).patch for case in (CASE, OTHER))
    with second.applied(llama):
        only_second = state(llama)
    both = stack([first, second], on_overlap="order")
    assert {(overlap.where, overlap.entries) for overlap in both.overlaps(llama)} == {(view(llama, n).name, 32 * 64) for n in (1, 2)}
    applied = both.apply(llama)
    assert not same(only_second, state(llama))
    applied.revert(0)
    assert same(only_second, state(llama))
    applied.revert()
    assert same(before, state(llama))


def test_preserved_prompts_keep_their_outputs(llama: Any) -> None:
    config = CremeConfig(layers=(1,), contexts="identity", preserve=("the river of sudland is",), preserve_own=("guide", "first_hop"))
    prompts = ["the river of sudland is", CASE.guide, str(CASE.first_hop)]
    _, before = last(llama, prompts, 1)
    result = creme_edit(llama, TOKENIZER, CASE, config)
    assert 0 < result.layers[0]["free"] < 1
    assert result.layers[0]["residual"] < 1e-9
    with result.patch.applied(llama):
        _, after = last(llama, prompts, 1)
    assert torch.allclose(before, after, atol=1e-10)
    with creme_edit(llama, TOKENIZER, CASE, CremeConfig(layers=(1,), contexts="identity")).patch.applied(llama):
        _, moved = last(llama, prompts, 1)
    soft = creme_edit(llama, TOKENIZER, CASE, config.model_copy(update={"preserve_weight": 10.0}))
    with soft.patch.applied(llama):
        _, little = last(llama, prompts, 1)
    assert 0 < float((little - before).norm()) < float((moved - before).norm())


def test_heads_and_strength(llama: Any) -> None:
    size = Anatomy.of(llama).tower().head_size(1)
    config = CremeConfig(layers=(1,), contexts="identity", heads=("L1.H2", "L1.H0"))
    op: Any = creme_edit(llama, TOKENIZER, CASE, config).patch.ops[0]
    assert {column // size for column in op.a[0].nonzero().flatten().tolist()} == {0, 2}
    whole: Any = creme_edit(llama, TOKENIZER, CASE, CremeConfig(layers=(1,), contexts="identity")).patch.ops[0]
    half: Any = creme_edit(llama, TOKENIZER, CASE, CremeConfig(layers=(1,), contexts="identity", strength=0.5)).patch.ops[0]
    assert torch.allclose(half.b @ half.a, 0.5 * whole.b @ whole.a, atol=1e-13)


def test_an_interrupted_edit_leaves_no_trace(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls = state(llama), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    import trocar.edit.creme.edit as module

    original = module.least_change
    monkeypatch.setattr(module, "least_change", failing)
    with pytest.raises(KeyboardInterrupt):
        creme_edit(llama, TOKENIZER, CASE, ALL)
    assert len(calls) == 2
    assert same(before, state(llama))
    assert not any(block.self_attn.o_proj._forward_hooks for block in llama.model.layers)


# ------------------------------------------------------------------------------------- second moments

TEXTS = ["anna lee was born in norland", "the river of oslo is big", "we say yes", "he speaks greek and she speaks latin in rome"]


def test_second_moments_are_those_of_real_tokens(llama: Any) -> None:
    """I-20: padding adds nothing, halves add up to the whole."""
    whole = second_moment(llama, TOKENIZER, TEXTS, [0, 2])
    alone = second_moment(llama, TOKENIZER, TEXTS, [0, 2], batch_size=1)  # no padding
    halves = second_moment(llama, TOKENIZER, TEXTS[:2], [0, 2]) + second_moment(llama, TOKENIZER, TEXTS[2:], [0, 2])
    direct = 0
    for text in TEXTS:
        row = TOKENIZER(text)["input_ids"]
        keys: list[torch.Tensor] = []
        handle = llama.model.layers[2].self_attn.o_proj.register_forward_pre_hook(lambda module, args, keys=keys: keys.append(args[0][0]))
        llama(**batch_of(llama, [row]))
        handle.remove()
        direct = direct + (keys[0].T @ keys[0]).detach()
    assert whole.tokens == alone.tokens == halves.tokens == sum(len(TOKENIZER(text)["input_ids"]) for text in TEXTS)
    for layer in (0, 2):
        for other in (alone, halves):
            assert torch.allclose(whole.sums[layer], other.sums[layer], atol=1e-10)
    assert torch.allclose(whole.sums[2], torch.as_tensor(direct), atol=1e-10)


def test_second_moments_are_kept_under_their_key(llama: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import trocar.edit.creme.moments as module

    first = second_moment(llama, TOKENIZER, TEXTS, [1], folder=tmp_path)
    calls, original = [], module._measure
    monkeypatch.setattr(module, "_measure", lambda *args: calls.append(1) or original(*args))
    again = second_moment(llama, TOKENIZER, TEXTS, [1], folder=Workspace(tmp_path))
    assert not calls
    assert torch.equal(first.sums[1], again.sums[1])
    second_moment(llama, TOKENIZER, TEXTS[:3], [1], folder=tmp_path)
    other = model_of("llama", seed=1)
    second_moment(other, TOKENIZER, TEXTS[:3], [1], folder=tmp_path)
    assert len(calls) == 2


def test_the_second_moment_protects_ordinary_keys(llama: Any) -> None:
    """The same constraint, less change on the text's keys; with too little text a ridge is taken and said."""
    moments = second_moment(llama, TOKENIZER, TEXTS * 2, [1])
    config = CremeConfig(layers=(1,), contexts="identity", second_moment="text")
    with_moment, without = (
        creme_edit(llama, TOKENIZER, CASE, config, moments),
        creme_edit(llama, TOKENIZER, CASE, config.model_copy(update={"second_moment": "none"})),
    )
    costs = []
    for result in (with_moment, without):
        assert result.layers[0]["residual"] < 1e-9
        op: Any = result.patch.ops[0]
        delta = op.b @ op.a
        costs.append(float((delta @ moments.sums[1] @ delta.T).trace()))
    assert costs[0] < 0.9 * costs[1]
    with pytest.warns(UserWarning, match="tokens cannot fix a second moment of 64 inputs"):
        moments.metric(1, 0.0)
    with pytest.raises(ConfigError, match="needs the second moment"):
        creme_edit(llama, TOKENIZER, CASE, config)
    with pytest.raises(DataError, match="block 2 was not taken"):
        creme_edit(llama, TOKENIZER, CASE, config.model_copy(update={"layers": (2,)}), moments)
    with pytest.raises(DataError, match="cannot be added"):
        moments + Moments({0: moments.sums[1]}, 3, "o")


# ------------------------------------------------------------------------------------- what is refused, and what is said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"template": "the capital is"}, "the capital is' has 0 holes"),
        ({"template": "the {} of {} is"}, "has 2 holes"),
        ({"subject": ""}, "subject"),
        ({"target": "  "}, "must not be blank"),
        ({"targt": "x"}, "Did you mean 'target'"),
    ],
)
def test_bad_cases(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Case.parse({"id": "x", "template": "the capital of {} is", "subject": "a", "bridge": "b", "target": "c", **change}, "case 0")


def test_bad_settings(llama: Any) -> None:
    with pytest.raises(ConfigError, match="names no block"):
        CremeConfig.parse({"layers": []})
    with pytest.raises(ConfigError, match="needs one hole"):
        CremeConfig.parse({"contexts": ["no hole"]})
    with pytest.raises(ConfigError, match="leave them out for module: mlp"):
        CremeConfig.parse({"heads": ["L1.H0"], "module": "mlp"})
    with pytest.raises(ComponentError, match="blocks 0 to 2"):
        creme_edit(llama, TOKENIZER, CASE, CremeConfig(layers=(3,)))
    with pytest.raises(ConfigError, match=r"heads lie in the blocks \[1\]"):
        creme_edit(llama, TOKENIZER, CASE, CremeConfig(layers=(1, 2), heads=("L1.H0",)))
    with pytest.raises(ComponentError, match="is not a head"):
        creme_edit(llama, TOKENIZER, CASE, CremeConfig(layers=(1,), heads=("L1.attn",)))
    with pytest.raises(DataError, match="no case"):
        creme_edit(llama, TOKENIZER, [], ALL)
    with pytest.raises(DataError, match="nothing that this tokenizer knows"):
        creme_edit(llama, TOKENIZER, CASE.model_copy(update={"target": "Zzz"}), ALL)
    assert len(LEAD_INS) == len(set(LEAD_INS)) == 22
    assert LEAD_INS[0] == "{}"


def test_models_that_cannot_be_edited(llama: Any) -> None:
    bert = model_of("bert")
    with pytest.raises(UnsupportedModelError, match="left to right"):
        creme_edit(bert, TOKENIZER, CASE, ALL.model_copy(update={"force": True}), checked=False)
    empty = copy.deepcopy(llama)
    empty.model.layers[1].self_attn.o_proj.to("meta")
    with pytest.raises(UnsupportedModelError, match="meta device"):
        creme_edit(empty, TOKENIZER, CASE, ALL, checked=False)


def test_what_is_said_about_a_case(llama: Any) -> None:
    said = " / ".join(creme_edit(llama, TOKENIZER, CASE.model_copy(update={"wrong": "oslo big"}), ALL).notes)
    for words in ("the source run is wrong", "the first hop is not known", "begin with the same token"):
        assert words in said
    with pytest.raises(EditError, match="the source run is wrong"):
        creme_edit(llama, TOKENIZER, CASE, ALL.model_copy(update={"strict": True}))
    tail = CASE.model_copy(update={"template": "the capital of {}"})
    assert any("end in different tokens" in note for note in creme_edit(llama, TOKENIZER, tail, ALL).notes)
    blank = CASE.model_copy(update={"template": "the capital of {} is "})
    assert any("white space" in note for note in creme_edit(llama, TOKENIZER, blank, ALL).notes)
    big = creme_edit(llama, TOKENIZER, CASE, CremeConfig(layers=(1,), contexts="identity", strength=20.0))
    assert any("% of its matrix's norm" in note for note in big.notes)


def test_a_solved_case_is_left_alone(llama: Any) -> None:
    words = [TOKENIZER.decode([int(logits(llama, prompt).argmax())]) for prompt in (CASE.prompt,)]
    solved = CASE.model_copy(update={"target": words[0]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = creme_edit(llama, TOKENIZER, solved, ALL)
        assert result.status == "nothing to do"
        assert result.patch.ops == ()
        assert any("already gives this answer" in note for note in result.notes)
        assert creme_edit(llama, TOKENIZER, solved, ALL.model_copy(update={"force": True})).patch.ops


def test_cases_from_columns() -> None:
    columns = {"template": ["the {} is"] * 2, "subject": ["a", "b"], "bridge": ["c", "d"], "target": ["e", "f"], "wrong": [None, "g"],
               "paraphrases": [[{"prompt": "p"}], ["q", {"prompt": "r", "answer": "s"}]], "own": [1, 2]}  # fmt: skip
    first, second = Case.rows(columns, ids=("one", "two"))
    assert (first.id, first.prompt, first.guide, first.wrong) == ("one", "the a is", "the c is", None)
    assert [(row.prompt, row.answer) for row in (*first.paraphrases, *second.paraphrases)] == [("p", "e"), ("q", "f"), ("r", "s")]
    with pytest.raises(DataError, match="Two cases are called 'x'"):
        Case.rows({**columns, "id": ["x", "x"]})
