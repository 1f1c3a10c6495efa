"""Operations on models: what they change, that revert restores every bit, what is refused before anything is touched."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.anatomy import Anatomy, fingerprint, tiny_inputs, tiny_model
from trocar.core.errors import ComponentError, EditError, PatchBaseError, PatchFormatError, PatchStateError, TrocarError
from trocar.patch import Adapter, AddVector, Factors, Gate, LowRank, Patch, Quantise, Remove, ScaleAt, SparseReplace
from trocar.patch.actions import Place, Write, bits
from trocar.patch.quantised import GroupInput, QuantisedLinear, Quantiser, Transform, codes, grid
from trocar.trace import Scale, intervene

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UP, DOWN, Q = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def models():
    return {dtype: tiny_model("llama").to(dtype) for dtype in DTYPES}


@pytest.fixture(scope="module")
def llama(models):
    return models[torch.float32]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_changed(model, rows=(3, 5), name=f"{UP}.weight"):
    before = model.get_parameter(name)
    after = before.detach().clone()
    after[list(rows)] += 1
    return SparseReplace.between(name, before, after)


def quantised_down(bits=4):
    """The down projection of block 1 in a rotated and permuted basis."""
    rotation = torch.linalg.qr(normal(16, 16))[0]
    transform = Transform(48, None, (rotation, torch.randperm(48, generator=torch.Generator().manual_seed(0))))
    weight, quantiser = transform.weight(normal(32, 48) / 7), Quantiser(bits=bits)
    content = weight if bits == 16 else (codes(weight, *grid(weight, quantiser), quantiser), *grid(weight, quantiser))
    return Quantise([DOWN], [QuantisedLinear(GroupInput(transform, Quantiser(bits=8)), quantiser, content, None)])


def operations(model):
    dtype = model.dtype
    weight = model.get_parameter(f"{UP}.weight").detach()
    columns, entries, whole = weight.clone(), weight.clone(), weight + 1
    columns[:, [0, 9]] += 1
    entries[2, 3] = 7
    entries[40, 31] = -7
    replace = [SparseReplace.between(f"{UP}.weight", weight, after) for after in (columns, entries, whole)]
    return {
        "rows": [rows_changed(model)],
        "columns": replace[:1],
        "entries": replace[1:2],
        "whole": replace[2:],
        "low-rank": [LowRank(f"{Q}.weight", normal(2, 32), normal(64, 2))],
        "low-rank in the base's dtype": [LowRank(f"{Q}.weight", normal(2, 32).to(dtype), normal(64, 2).to(dtype))],
        "gate": [Gate({"L0.H1": 0, "L1.mlp": 0.5, "L2": 0, "L1.N3": -2})],
        "scaled at positions": [ScaleAt({"L0.H1": 0, "L1.N3": -2, "L1.N7": 0.5}, "last")],
        "vector": [AddVector("L1.resid_post", normal(32))],
        "vector at heads": [AddVector("L0.heads", normal(64), positions=[-1])],
        "remove heads": [Remove(["L0.H0", "L0.H1"])],
        "remove neurons and blocks": [Remove(["L2.N4", "L1"])],
        "adapter": [Adapter({Q: Factors(normal(2, 32), normal(64, 2), 0.5), DOWN: Factors(normal(3, 48), normal(32, 3), -1.0)})],
        "quantise": [quantised_down()],
        "several": [rows_changed(model), Gate({"L1.N3": 0}), AddVector("L0.mlp_out", normal(32)), Remove(["L1.N5"])],
    }


NAMES = list(operations(tiny_model("llama")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_changes_the_output_and_leaves_no_trace(models, dtype, name, tmp_path):
    model = models[dtype]
    inputs, before = tiny_inputs(model), fingerprint(model)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    objects = {key: id(value) for key, value in model.named_parameters()}
    modules = [id(module) for module in model.modules()]
    config = copy.deepcopy(model.config.to_dict())
    with torch.no_grad():
        base = model(**inputs).logits
        patch = Patch.of(model, operations(model)[name], method="test", settings={"step": 1e-3})
        patch.save(tmp_path / "p.safetensors")
        loaded = Patch.load(tmp_path / "p.safetensors")
        assert loaded == patch
        assert loaded.nbytes == (tmp_path / "p.safetensors").stat().st_size
        applied = loaded.apply(model)
        assert applied.effects == patch.effects
        assert all(effect.changed > 0 for effect in applied.effects)
        assert not torch.equal(model(**inputs).logits, base)
        applied.revert()
        assert torch.equal(model(**inputs).logits, base)
    assert fingerprint(model) == before
    assert {key: id(value) for key, value in model.named_parameters()} == objects
    assert [id(module) for module in model.modules()] == modules
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model.config.to_dict() == config


def test_sparse_replace_takes_the_smallest_layout_and_is_exact(llama):
    layouts = {name: operations(llama)[name][0].layout for name in ("rows", "columns", "entries", "whole")}
    assert layouts == {"rows": "rows", "columns": "cols", "entries": "flat", "whole": "whole"}
    weight = llama.get_parameter(f"{UP}.weight")
    assert SparseReplace.between(f"{UP}.weight", weight, weight.clone()) is None
    for layout in ("whole", "rows", "cols", "flat"):
        after = weight.detach().clone()
        after[5, 6] = 3.0
        op = SparseReplace.between(f"{UP}.weight", weight, after, layout=layout)
        assert op.layout == layout
        with Patch.of(llama, [op]).applied(llama) as applied:
            assert torch.equal(weight, after)
            assert applied.effects[0].changed == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 5), max_size=4).map(tuple),
    st.sampled_from([*DTYPES, torch.float64, torch.int64, torch.bool]),
    st.integers(0, 2**32),
    st.floats(0, 1),
)
def test_between_reproduces_any_change_bit_for_bit(shape, dtype, seed, share):
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randn(shape, generator=generator).mul(3).to(dtype) for _ in range(2))
    after = torch.where(torch.rand(shape, generator=generator) < share, after, before)
    if after.is_floating_point() and after.numel() > 2:
        after.view(-1)[0], before.view(-1)[0] = -0.0, 0.0
        after.view(-1)[1] = float("nan")
    op = SparseReplace.between("w", before, after)
    if op is None:
        assert torch.equal(before, after)
        return
    tensor = before.clone()
    op.place().write(tensor, op.values.reshape(op.place().read(tensor).shape))
    assert torch.equal(bits(tensor), bits(after))


@pytest.mark.parametrize("contiguous", [True, False])
def test_flat_places_in_any_memory_layout(contiguous):
    tensor = torch.arange(12.0).reshape(3, 4)
    tensor = tensor if contiguous else tensor.T.contiguous().T
    place = Place("w", None, torch.tensor([1, 6, 11]))
    assert place.read(tensor).tolist() == [1, 6, 11]
    place.write(tensor, torch.tensor([-1.0, -6.0, -11.0]))
    assert tensor.flatten().tolist() == [0, -1, 2, 3, 4, 5, -6, 7, 8, 9, 10, -11]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_low_rank_is_w_plus_b_a_in_out_in_orientation(family):
    model = tiny_model(family)
    view = Anatomy.of(model).linear("L1.mlp.up")
    a, b, before = normal(3, view.in_features), normal(view.out_features, 3), view.get().clone()
    with Patch.of(model, [LowRank(view.name, a, b, view.transposed)]).applied(model):
        torch.testing.assert_close(view.get(), before + b @ a)
    if view.transposed:
        with pytest.raises(PatchBaseError, match=r"stored as|shape"):
            Patch.of(model, [LowRank(view.name, a, b)])
        square = Anatomy.of(model).linear("L1.attn.o")
        with pytest.raises(PatchBaseError, match="stored as"):
            Patch.of(model, [LowRank(square.name, normal(2, 32), normal(32, 2))])


FAMILIES = ["llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "vit", "dinov2-swiglu", "clip_text_model", "bert"]


def outputs(model, inputs):
    with torch.no_grad():
        return {key: value for key, value in model(**inputs).items() if isinstance(value, torch.Tensor)}


def furthest(one, two):
    return max(float((one[key] - two[key]).abs().max()) for key in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_equal_the_same_scaling_while_running(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    factors = {"L0.H1": 0.5, "L1.H0": 0.0, "L1.attn": 0.0, "L2.mlp": 0.0, "L1.N5": -2.0}
    if Anatomy.of(model).tower().residual != "post":
        factors["L0"] = 0.0
    for component, factor in factors.items():
        with intervene(model, [Scale(component, factor)]):
            wanted = outputs(model, inputs)
        with Patch.of(model, [Gate({component: factor})]).applied(model):
            assert furthest(outputs(model, inputs), wanted) < 2e-5, component


def test_a_gate_of_zero_leaves_zeros_even_of_infinite_weights(llama):
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.get_parameter(f"{DOWN}.weight")[0, 3] = float("inf")
    with Patch.of(model, [Gate({"L1.N3": 0})]).applied(model):
        column = model.get_parameter(f"{DOWN}.weight")[:, 3]
        assert torch.equal(bits(column), torch.zeros_like(bits(column)))


@pytest.mark.parametrize(
    ("family", "factors", "error", "says"),
    [
        ("gemma3_text", {"L1.attn": 0.5}, EditError, "normalises"),
        ("llama", {"L1": 0.5}, EditError, "only 0 is exact"),
        ("bert", {"L1": 0.0}, EditError, "norms stand behind"),
        ("llama", {"L9.H0": 0.0}, ComponentError, "Layers run"),
        ("llama", {"L1.H4": 0.0}, ComponentError, "0 to 3"),
        ("llama", {"L1.attn": 1.0}, EditError, "changes nothing"),
        ("llama", {"L1.H0": float("nan")}, PatchFormatError, "finite"),
        ("llama", {"L1.attn.q": 0.0}, PatchFormatError, "pattern"),
        ("llama", {}, PatchFormatError, "no component"),
    ],
)
def test_gates_that_no_weights_can_express_are_refused(family, factors, error, says):
    model = tiny_model(family)
    before = fingerprint(model)
    with pytest.raises(error, match=says):
        Patch.of(model, [Gate(factors)])
    assert fingerprint(model) == before


def test_a_parallel_block_can_be_scaled():
    model = tiny_model("gpt_neox")
    inputs = tiny_inputs(model)
    with intervene(model, [Scale("L1", 0.25)]):
        wanted = outputs(model, inputs)
    with Patch.of(model, [Gate({"L1": 0.25})]).applied(model):
        assert furthest(outputs(model, inputs), wanted) < 2e-5


def test_a_vector_acts_in_generation_until_it_is_reverted(llama):
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    plain = llama.generate(**inputs, max_new_tokens=4, do_sample=False)
    patch = Patch.of(llama, [AddVector("L0.resid_post", 20 * normal(32))])
    applied = patch.apply(llama)
    steered = llama.generate(**inputs, max_new_tokens=4, do_sample=False)
    without_cache = llama.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    applied.revert()
    assert torch.equal(steered, without_cache)
    assert not torch.equal(steered, plain)
    assert torch.equal(llama.generate(**inputs, max_new_tokens=4, do_sample=False), plain)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda m: AddVector("L1.resid_post", torch.zeros(32)), EditError, "changes nothing"),
        (lambda m: AddVector("L1.resid_post", normal(31)), PatchBaseError, "31 entries"),
        (lambda m: AddVector("L1.resid_post", torch.full((32,), float("nan"))), EditError, "NaN"),
        (lambda m: ScaleAt({"L1.H0": 1.0}), EditError, "changes nothing"),
        (lambda m: ScaleAt({"L1.mlp": 0.0}), EditError, "at positions"),
        (lambda m: ScaleAt({"L1.N999": 0.0}), ComponentError, "N999"),
        (lambda m: ScaleAt({}), PatchFormatError, "no component"),
        (lambda m: ScaleAt({"L1.H0": 0.0}, "sometimes"), PatchFormatError, "positions"),
        (lambda m: AddVector("L7.resid_post", normal(32)), ComponentError, "Layers run"),
        (lambda m: AddVector("L1.nowhere", normal(32)), PatchFormatError, "pattern"),
        (lambda m: AddVector("L1.resid_post", normal(32), positions="sometimes"), PatchFormatError, "positions"),
        (lambda m: LowRank(f"{Q}.weight", normal(2, 32), torch.full((64, 2), float("inf"))), EditError, "infinite"),
        (lambda m: LowRank(f"{Q}.weight", normal(2, 31), normal(64, 2)), PatchBaseError, "shape"),
        (lambda m: LowRank(f"{Q}.wieght", normal(2, 32), normal(64, 2)), PatchBaseError, "Did you mean"),
        (lambda m: LowRank(f"{Q}.weight", normal(2, 32), normal(64, 3)), PatchFormatError, "rank"),
        (lambda m: LowRank(f"{Q}.weight", normal(2, 32) * 0, normal(64, 2)), EditError, "changes nothing"),
        (lambda m: SparseReplace(f"{UP}.weight", (48, 32), normal(1, 32).half(), torch.tensor([3]), "rows"), PatchBaseError, "float16"),
        (lambda m: SparseReplace(f"{UP}.weight", (48, 33), normal(1, 33), torch.tensor([3]), "rows"), PatchBaseError, "shape"),
        (lambda m: SparseReplace(f"{UP}.weight", (48, 32), normal(2, 32), torch.tensor([5, 3]), "rows"), PatchFormatError, "sorted"),
        (lambda m: SparseReplace(f"{UP}.weight", (48, 32), normal(2, 32), torch.tensor([3, 3]), "rows"), PatchFormatError, "unique"),
        (lambda m: SparseReplace(f"{UP}.weight", (48, 32), normal(2, 32), torch.tensor([3, 48]), "rows"), PatchFormatError, "to 47"),
        (lambda m: SparseReplace(f"{UP}.weight", (48, 32), normal(2, 32), torch.tensor([-1, 3]), "rows"), PatchFormatError, "from 0"),
        (lambda m: SparseReplace(f"{UP}.weight", (48, 32), normal(3, 32), torch.tensor([1, 3]), "rows"), PatchFormatError, "shape"),
        (lambda m: SparseReplace("../etc.weight", (2,), normal(2)), PatchFormatError, "pattern"),
        (lambda m: Adapter({Q: Factors(normal(2, 32), normal(64, 2).half(), 1.0)}), PatchFormatError, "dtypes"),
        (lambda m: Adapter({}), PatchFormatError, "dtypes"),
        (lambda m: Adapter({Q: Factors(normal(2, 32), normal(64, 2), float("inf"))}), PatchFormatError, "finite"),
        (lambda m: Remove(["L0", "L1", "L2"]), EditError, "Keep at least one"),
        (lambda m: Remove(["L0.H0"]), EditError, "key/value head"),
        (lambda m: Remove(["L0.attn"]), PatchFormatError, "only heads"),
        (lambda m: Remove([f"L0.H{h}" for h in range(4)]), EditError, "All 4 heads"),
        (lambda m: Remove([f"L0.N{n}" for n in range(48)]), EditError, "All 48 neurons"),
        (lambda m: Remove(["L0", "L0.H1"]), EditError, "as a whole"),
        (lambda m: Remove([]), PatchFormatError, "components"),
    ],
)
def test_bad_operations_are_refused_with_the_model_untouched(llama, make, error, says):
    before = fingerprint(llama)
    with pytest.raises(error, match=says) as caught:
        Patch.of(llama, [rows_changed(llama), make(llama)])
    assert isinstance(caught.value, TrocarError)
    assert "docs/errors" in str(caught.value)
    assert fingerprint(llama) == before


def test_nothing_may_come_after_a_removal(llama):
    with pytest.raises(PatchFormatError, match="last operation"):
        Patch.of(llama, [Remove(["L1"]), rows_changed(llama)])


def test_a_failure_midway_takes_everything_back(llama, monkeypatch):
    patch = Patch.of(llama, operations(llama)["several"])
    before, calls, real = fingerprint(llama), [], Write.do

    def failing(self):
        calls.append(self)
        if len(calls) == 2:
            real(self)
            raise MemoryError("no room")
        return real(self)

    monkeypatch.setattr(Write, "do", failing)
    with pytest.raises(MemoryError):
        patch.apply(llama)
    monkeypatch.undo()
    assert fingerprint(llama) == before
    with patch.applied(llama):
        pass


def test_overflow_in_the_models_dtype_is_refused_and_taken_back(models):
    model = models[torch.float16]
    before = fingerprint(model)
    with pytest.raises(EditError, match="NaN or infinite"):
        Patch.of(model, [rows_changed(model), LowRank(f"{Q}.weight", 300 * torch.ones(1, 32), 300 * torch.ones(64, 1))])
    assert fingerprint(model) == before


def test_infinite_values_can_be_meant(llama):
    weight = llama.get_parameter(f"{UP}.weight")
    after = weight.detach().clone()
    after[0, 0] = float("-inf")
    op = SparseReplace.between(f"{UP}.weight", weight, after)
    with pytest.raises(EditError, match="allow_nonfinite"):
        Patch.of(llama, [op])
    patch = Patch.of(llama, [op], allow_nonfinite=True)
    with patch.applied(llama, allow_nonfinite=True):
        assert torch.equal(weight, after)
    assert patch.effects[0].norm is None


def test_a_wrong_base_is_named_before_anything_is_touched(llama, models):
    patch = Patch.of(llama, [rows_changed(llama)])
    others = {
        "other values": tiny_model("llama", seed=1),
        "names or shapes": tiny_model("llama", num_hidden_layers=2),
        "family": tiny_model("mistral"),
        "rebase": models[torch.bfloat16],
    }
    for says, model in others.items():
        before = fingerprint(model)
        with pytest.raises(PatchBaseError, match=says):
            patch.apply(model)
        assert fingerprint(model) == before
    elsewhere = copy.deepcopy(llama)
    with torch.no_grad():
        elsewhere.get_parameter("model.norm.weight")[0] += 1
    with pytest.raises(PatchBaseError, match="does not touch"):
        patch.apply(elsewhere)
    with patch.applied(elsewhere, verify="touched"):
        pass
    with torch.no_grad():
        elsewhere.get_parameter(f"{UP}.weight")[0] += 1
    with pytest.raises(PatchBaseError, match="other values"):
        patch.apply(elsewhere, verify="touched")


def test_rebase_makes_a_patch_for_another_dtype(llama, models):
    model = models[torch.bfloat16]
    patch = Patch.of(llama, operations(llama)["several"], measurements=[{"name": "accuracy", "after": 1.0}])
    moved = patch.rebase(model)
    assert moved.base.dtype == "BF16"
    assert moved.measurements == ()
    assert moved.ops[0].values.dtype == torch.bfloat16
    with moved.applied(model):
        pass


def test_apply_and_revert_out_of_order(llama):
    model = copy.deepcopy(llama)
    patch = Patch.of(model, [rows_changed(model)])
    applied = patch.apply(model)
    with pytest.raises(PatchStateError, match="already applied"):
        patch.apply(model)
    with pytest.raises(PatchStateError, match="already applied"):
        patch.apply(model, verify="structure")
    applied.revert()
    with pytest.raises(PatchStateError, match="not applied"):
        applied.revert()


def test_a_model_changed_in_between_is_noticed(llama):
    model = copy.deepcopy(llama)
    before, weight = fingerprint(model), model.get_parameter(f"{UP}.weight")
    patch = Patch.of(model, [rows_changed(model)])
    applied = patch.apply(model)
    with torch.no_grad():
        weight[3, 0] += 1
    with pytest.raises(PatchStateError, match="other values"):
        applied.revert()
    applied.revert(force=True)
    assert fingerprint(model) == before
    applied = patch.apply(model)
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight.detach().clone())
    with pytest.raises(PatchStateError, match="another object"):
        applied.revert()


def test_patches_of_disjoint_parameters_revert_in_any_order(llama):
    model = copy.deepcopy(llama)
    before = fingerprint(model)
    one, two = (Patch.of(model, [rows_changed(model, name=f"model.layers.{layer}.mlp.up_proj.weight")]) for layer in (0, 2))
    first = one.apply(model)
    second = two.apply(model, verify="touched")
    first.revert()
    assert fingerprint(model) != before
    second.revert()
    assert fingerprint(model) == before


def test_nothing_reverts_below_a_removal(llama):
    model = copy.deepcopy(llama)
    before = fingerprint(model)
    first = Patch.of(model, [rows_changed(model)]).apply(model)
    second = Patch.of(model, [Remove(["L1.N3"])]).apply(model)
    with pytest.raises(PatchStateError, match="Revert the removal first"):
        first.revert()
    second.revert()
    first.revert()
    assert fingerprint(model) == before


def test_the_context_reverts_on_errors(llama):
    before = fingerprint(llama)
    patch = Patch.of(llama, [rows_changed(llama)])
    with pytest.raises(RuntimeError, match="inside"):
        with patch.applied(llama):
            raise RuntimeError("inside")
    assert fingerprint(llama) == before


def test_patches_do_not_share_memory_with_what_they_were_made_from(llama):
    values = normal(48, 32)
    op = SparseReplace(f"{UP}.weight", (48, 32), values)
    kept = op.values.clone()
    values.zero_()
    assert torch.equal(op.values, kept)
    settings_ = {"layers": [1, 2]}
    patch = Patch.of(llama, [op], settings=settings_)
    settings_["layers"].append(3)
    assert patch.settings == {"layers": [1, 2]}
    with pytest.raises(PatchFormatError, match="JSON"):
        Patch.of(llama, [op], settings={"rate": float("nan")})


def test_summary_touched_and_size(llama):
    patch = Patch.of(llama, operations(llama)["several"])
    rows = patch.summary()
    assert [row["op"] for row in rows] == ["sparse-replace", "gate", "add-vector", "remove"]
    assert rows[0] == {
        "op": "sparse-replace",
        "where": f"{UP}.weight",
        "shape": "2 of 48 rows in 48x32",
        "changed": 64,
        "norm": pytest.approx(8.0),
        "bytes": 2 * 32 * 4 + 2 * 4,
    }
    assert set(patch.touched()) >= {f"{UP}.weight", f"{DOWN}.weight"}


def test_wrapped_models_are_reached(llama):
    model = copy.deepcopy(llama)
    patch = Patch.of(llama, [rows_changed(llama)])
    with patch.applied(torch.nn.DataParallel(model)):
        assert fingerprint(model) != fingerprint(llama)
    assert fingerprint(model) == fingerprint(llama)


def test_a_tied_weight_changes_under_both_names():
    model = tiny_model("gemma3_text")
    name = "model.embed_tokens.weight"
    with Patch.of(model, [rows_changed(model, (5,), name)]).applied(model):
        assert model.lm_head.weight is model.get_parameter(name)
