"""Combining adapters: identities between the two spaces, exactness against dense updates and peft, folders, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trocar.anatomy import fingerprint, tiny_inputs, tiny_model
from trocar.core.errors import ConfigError, MetricError, PatchFormatError
from trocar.evaluate import connectivity
from trocar.evaluate.curves import barrier
from trocar.patch import Adapter, Factors, Patch, attached
from trocar.patch.combine import aligned, aligned_fusion, combine_folders, ensemble, federated, fusion, lego, magnitude, mixture, prune
from trocar.patch.combine.algebra import norm
from trocar.patch.peft_folder import write_folder

NAMES = [f"model.layers.{layer}.self_attn.{role}" for layer in range(3) for role in ("q_proj", "v_proj")]


def random_adapter(seed: int, rank: int = 3, scale: float = 2.0, dtype: torch.dtype = torch.float64, names: list[str] = NAMES) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    sizes = {"q_proj": (64, 32), "v_proj": (32, 32)}
    model = tiny_model("llama")
    made = {}
    for name in names:
        outputs, inputs = model.get_submodule(name).weight.shape if name in NAMES else sizes["v_proj"]
        a, b = torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)
        made[name] = Factors(a.to(dtype), b.to(dtype), scale)
    return Adapter(made)


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: scale * b.double() @ a.double() for name, (a, b, scale, _) in adapter.factors.items()}


def close(found: Adapter, wanted: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    have = dense(found)
    assert set(have) == set(wanted)
    for name, value in wanted.items():
        assert float((have[name] - value).norm()) <= tolerance * max(1.0, float(value.norm())), name


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_fusion_and_mixture_differ_by_the_product_of_differences(share: float, seed: int) -> None:
    first, second = random_adapter(seed), random_adapter(seed + 5000)
    fused, mixed = fusion([first, second], [1 - share, share]), mixture([first, second], [1 - share, share])
    for (name, one), row in zip(first.factors.items(), fused.rows, strict=True):
        two = second.factors[name]
        gap = 2.0 * share * (1 - share) * (one.b - two.b) @ (one.a - two.a)
        difference = dense(mixed.adapter)[name] - dense(fused.adapter)[name]
        assert float((difference - gap).norm()) <= 1e-6 * max(1.0, float(gap.norm()))
        assert row["mismatch"] == pytest.approx(float(gap.norm()), abs=1e-8)
        assert row["norm"] == pytest.approx(float(dense(fused.adapter)[name].norm()))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0.1, 3), min_size=3, max_size=3), st.integers(0, 1000))
def test_three_adapters(weights: list[float], seed: int) -> None:
    adapters = [random_adapter(seed + 100 * number) for number in range(3)]
    shares = np.array(weights) / sum(weights)
    fused, mixed = fusion(adapters, weights), mixture(adapters, weights)
    for name in NAMES:
        parts = [adapter.factors[name] for adapter in adapters]
        half = sum(shares[i] * shares[j] * (parts[i].b - parts[j].b) @ (parts[i].a - parts[j].a) for i in range(3) for j in range(3))
        difference = dense(mixed.adapter)[name] - dense(fused.adapter)[name]
        torch.testing.assert_close(difference, 2.0 * 0.5 * half, rtol=1e-9, atol=1e-9)


def test_the_ends_are_the_adapters_themselves_and_copies_fuse_to_one() -> None:
    first, second = (random_adapter(seed, dtype=torch.float32) for seed in (1, 2))
    for weights, one in (([1, 0], first), ([0, 1], second)):
        found = fusion([first, second], weights).adapter
        for name, factors in one.factors.items():
            assert torch.equal(found.factors[name].a, factors.a)
            assert torch.equal(found.factors[name].b, factors.b)
        close(mixture([first, second], weights).adapter, dense(one), 1e-7)
    close(fusion([first] * 3).adapter, dense(first), 1e-6)
    close(federated([first, second], [300, 100]).adapter, dense(fusion([first, second], [0.75, 0.25]).adapter))
    assert federated([first, second], [300, 100]).rows[0]["cosine"] == pytest.approx(fusion([first, second]).rows[0]["cosine"])


def test_a_mixture_is_the_weighted_sum_of_updates_at_any_rank() -> None:
    first, second = random_adapter(1, rank=3), random_adapter(2, rank=2, scale=0.7)
    wanted = {name: 0.25 * dense(first)[name] + 0.75 * dense(second)[name] for name in NAMES}
    exact = mixture([first, second], [1, 3])
    close(exact.adapter, wanted)
    assert {factors.a.shape[0] for factors in exact.adapter.factors.values()} == {5}
    assert ensemble is mixture
    for rank in (1, 3, 5, 7):
        found = mixture([first, second], [1, 3], rank=rank)
        for row in found.rows:
            left, sizes, right = torch.linalg.svd(wanted[row["module"]])
            best = left[:, :rank] * sizes[:rank] @ right[:rank]
            torch.testing.assert_close(dense(found.adapter)[row["module"]], best, rtol=1e-8, atol=1e-8)
            assert row["lost"] == pytest.approx(float(sizes[rank:].norm() / sizes.norm()), abs=1e-8)
            assert row["rank"] == rank
    summed = mixture([first, second], [1, 1], normalise=False)
    close(summed.adapter, {name: dense(first)[name] + dense(second)[name] for name in NAMES})


def test_outputs_are_those_of_explicit_updates_in_plain_peft(tmp_path: Path) -> None:
    model = tiny_model("llama").double()
    inputs, base = tiny_inputs(model), fingerprint(model)
    first, second = random_adapter(1), random_adapter(2)
    for how, made in (("fusion", fusion([first, second]).adapter), ("mixture", mixture([first, second], rank=4).adapter)):
        with Patch.of(model, [made]).applied(model):
            expected = model(**inputs)[0]
        write_folder(made, tmp_path / how)
        loaded: Any = peft.PeftModel.from_pretrained(tiny_model("llama").double(), tmp_path / how).eval()
        torch.testing.assert_close(loaded(**inputs)[0], expected, rtol=1e-9, atol=1e-10)
        with attached(model, made) as outer:
            torch.testing.assert_close(outer(**inputs)[0], expected, rtol=1e-9, atol=1e-10)
    assert fingerprint(model) == base


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_merges_the_same_where_it_is_right(rslora: bool) -> None:
    """As of peft 0.21: `cat` is the mixture, `svd` its best approximation, `linear` with equal weights twice the fusion; rsLoRA is off."""
    model = tiny_model("llama").double()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=rslora, init_lora_weights=False)
    torch.manual_seed(0)
    outer: Any = peft.get_peft_model(model, config, "one")
    outer.add_adapter("two", config)
    outer.double()
    one, two = (Adapter.of(outer, name) for name in ("one", "two"))
    assert next(iter(one.factors.values())).scale == pytest.approx(6 / (3**0.5 if rslora else 3))
    theirs = {}
    for kind in ("cat", "svd", "linear"):
        more = {"svd_rank": 4} if kind == "svd" else {}
        outer.add_weighted_adapter(["one", "two"], [0.5, 0.5], kind, combination_type=kind, **more)
        modules = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
        theirs[kind] = {name: module.get_delta_weight(kind).detach() for name, module in modules.items()}
    ours = {"cat": mixture([one, two]), "svd": mixture([one, two], rank=4), "linear": fusion([one, two])}
    factor = {"cat": 1.0, "svd": 1.0, "linear": 2.0}
    for kind, made in ours.items():
        gaps = {name: dense(made.adapter)[name] * factor[kind] - value for name, value in theirs[kind].items()}
        wrong = max(float(gap.norm() / theirs[kind][name].norm()) for name, gap in gaps.items())
        if rslora:
            assert wrong > 0.1  # peft multiplies by the square root of the new rank
        else:
            assert wrong < 1e-6


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_alignment_keeps_the_update_and_never_adds_mismatch(seed: int) -> None:
    first, second = random_adapter(seed, names=NAMES[:2]), random_adapter(seed + 1, scale=0.5, names=NAMES[:2])
    made = aligned(first, second)
    close(made.adapter, dense(second), 1e-5)
    for row in made.rows:
        assert row["mismatch after"] <= row["mismatch before"]
    plain = sum(row["mismatch"] for row in fusion([first, second]).rows)
    assert sum(row["mismatch"] for row in aligned_fusion([first, second]).rows) <= plain * (1 + 1e-9)


def test_one_adapter_in_other_coordinates_is_found_again() -> None:
    first = random_adapter(3)
    moved = {}
    for number, (name, (a, b, scale, swap)) in enumerate(first.factors.items()):
        p = torch.randn(3, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64) + 2 * torch.eye(3)
        moved[name] = Factors(torch.linalg.solve(p, a), b @ p, scale, swap)
    other = Adapter(moved)
    assert max(row["mismatch"] for row in fusion([first, other]).rows) > 1
    made = aligned(first, other)
    assert max(row["mismatch after"] for row in made.rows) < 1e-6
    close(fusion([first, made.adapter]).adapter, dense(first), 1e-5)
    fresh = Adapter({name: Factors(a, torch.zeros_like(b), scale) for name, (a, b, scale, _) in first.factors.items()})
    left = aligned(first, fresh)
    assert {row["note"] for row in left.rows} == {"a factor has not full rank; left alone"}
    close(left.adapter, dense(fresh))


def test_lego_puts_units_together() -> None:
    adapters = [random_adapter(seed) for seed in (1, 2, 3)]
    whole = lego(adapters, rank=9)  # every unit is a cluster of its own: the sum of all updates, by the correction for rank
    wanted = {name: (1 / 3) ** 0.5 * sum(dense(adapter)[name] for adapter in adapters) for name in NAMES}
    close(whole.adapter, wanted)
    same = lego([adapters[0]] * 3, rank=3)  # three copies of each unit are its three clusters
    close(same.adapter, dense(adapters[0]), 1e-6)
    small = lego(adapters, seed=1)
    assert {factors.a.shape[0] for factors in small.adapter.factors.values()} == {3}
    close(lego(adapters, seed=1).adapter, dense(small.adapter))
    negative = Adapter({name: Factors(a, b, -scale) for name, (a, b, scale, _) in adapters[0].factors.items()})
    close(lego([negative], rank=3).adapter, dense(negative), 1e-9)


def test_pruned_modules_are_the_base_again() -> None:
    model = tiny_model("llama").double()
    inputs, adapter = tiny_inputs(model), random_adapter(1)
    for keep, blocks in (("everyother", [0, 2]), ("otherhalf", [1]), ("low", [0]), ("middle", [1]), ("high", [2]), (["L1", "L2"], [1, 2])):
        found = prune(adapter, keep).adapter
        assert {int(name.split(".")[2]) for name in found.factors} == set(blocks)
        by_hand = Adapter({name: factors for name, factors in adapter.factors.items() if int(name.split(".")[2]) in blocks})
        with attached(model, found) as one:
            pruned = one(**inputs)[0]
        with attached(model, by_hand) as two:
            assert torch.equal(two(**inputs)[0], pruned)
            merged = two.merge_and_unload()
            torch.testing.assert_close(merged(**inputs)[0], pruned, rtol=1e-9, atol=1e-10)
        model = tiny_model("llama").double()
    assert set(prune(adapter, ["v_proj"], by="role").adapter.factors) == {name for name in NAMES if name.endswith("v_proj")}
    assert [row["kept"] for row in prune(adapter, "low").rows] == [True, True, False, False, False, False]
    for keep, words in (("lowest", "Did you mean 'low'"), (["L9"], "no group 'L9'"), ([], "Nothing of the adapter is left")):
        with pytest.raises(ConfigError, match=words):
            prune(adapter, keep)
    half = magnitude(adapter, 0.5)
    for name, (a, b, *_) in half.adapter.factors.items():
        for part, before in ((a, adapter.factors[name].a), (b, adapter.factors[name].b)):
            assert int((part == 0).sum()) == part.numel() // 2
            assert float(before[part == 0].abs().max()) <= float(before[part != 0].abs().min())
    close(magnitude(adapter, 0).adapter, dense(adapter))
    with pytest.raises(ConfigError, match="cannot be removed"):
        magnitude(adapter, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("how", "more"), [("fusion", {}), ("mixture", {}), ("mixture", {"rank": 2}), ("lego", {"rank": 4})])
def test_folders_are_combined_as_adapters_are(tmp_path: Path, how: str, more: dict[str, int], dtype: torch.dtype) -> None:
    scales = (2.0, 2.0) if how != "lego" else (2.0, 1.5)
    adapters = [random_adapter(seed, scale=scale, dtype=dtype) for seed, scale in zip((1, 2), scales, strict=True)]
    for number, adapter in enumerate(adapters):
        write_folder(adapter, tmp_path / str(number), "some/base")
    weights = None if how == "lego" else [1, 3]
    rows = combine_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "made", how, weights=weights, **more)
    ways: dict[str, Any] = {"fusion": fusion, "mixture": mixture, "lego": lego}
    given: dict[str, Any] = {} if weights is None else {"weights": weights}
    expected = ways[how](adapters, **given, **more)
    assert [dict(row) for row in rows] == [dict(row) for row in expected.rows]
    found = Adapter.from_peft(tmp_path / "made")
    for name, (a, b, scale, _) in expected.adapter.factors.items():
        assert torch.equal(found.factors[name].a, a)
        assert torch.equal(found.factors[name].b, b)
        assert found.factors[name].scale == pytest.approx(scale)
    assert len(load_file(tmp_path / "made" / "adapter_model.safetensors")) == 2 * len(NAMES)
    assert "some/base" in (tmp_path / "made" / "adapter_config.json").read_text()


def test_adapters_that_do_not_fit_are_refused_with_what_differs(tmp_path: Path) -> None:
    first = random_adapter(1)
    cases: list[tuple[Any, str]] = [
        (random_adapter(2, rank=2), "has rank 3 in adapter 1 and 2 in adapter 2"),
        (random_adapter(2, names=NAMES[:5]), "Only adapter 1 changes"),
        (random_adapter(2, names=[*NAMES, "model.layers.9.self_attn.v_proj"]), "Only adapter 2 changes"),
        (Adapter({name: Factors(a[:, :-1], b, s) for name, (a, b, s, _) in first.factors.items()}), "is 64 x 32 in adapter 1 and 64 x 31"),
    ]
    for other, words in cases:
        with pytest.raises(ConfigError, match=words):
            fusion([first, other])
    mixture([first, cases[0][0]])  # ranks may differ here
    folded = fusion([first, random_adapter(2, scale=1.0)]).adapter  # scales may differ
    one, two = first.factors[NAMES[0]], random_adapter(2, scale=1.0).factors[NAMES[0]]
    torch.testing.assert_close(dense(folded)[NAMES[0]], (2 * one.b + two.b) / 2 @ (one.a + two.a) / 2)
    for weights, words in (([1], "1 weights were given for 2"), ([1, -1], "add up to 0"), ([float("nan"), 1], "not a finite")):
        with pytest.raises(ConfigError, match=words):
            fusion([first, first], weights)
    with pytest.raises(ConfigError, match="rank of 0"):
        mixture([first], rank=0)
    with pytest.raises(ConfigError, match="no adapters"):
        fusion([])
    write_folder(first, tmp_path / "a", "base/one")
    write_folder(first, tmp_path / "b", "base/two")
    with pytest.raises(ConfigError, match="name different base models: base/one, base/two"):
        combine_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with pytest.raises(ConfigError, match="'ties' cannot be done"):
        combine_folders([tmp_path / "a"], tmp_path / "c", "ties")
    dora = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(use_dora=True, target_modules=["q_proj"]))
    dora.save_pretrained(tmp_path / "dora")
    with pytest.raises(PatchFormatError, match="use_dora"):
        combine_folders([tmp_path / "dora"], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_norms_need_no_dense_matrix() -> None:
    factors = random_adapter(4).factors[NAMES[0]]
    assert norm(factors.b, factors.a) == pytest.approx(float((factors.b @ factors.a).norm()))


def test_a_barrier_is_the_deepest_fall_below_the_chord() -> None:
    curve = connectivity(lambda place: 1 - place + 0.2 * place - 0.4 * (place * (1 - place)) * 4, points=5)
    assert curve.barrier == pytest.approx(0.4)
    assert curve.at == 0.5
    assert connectivity(lambda place: place**0.5).barrier == 0
    assert barrier([1.0, 0.2, 1.0]) == pytest.approx(0.8)
    assert [row["series"] for row in curve.rows(series="x")] == ["x"] * 5
    with pytest.raises(MetricError, match="no barrier"):
        connectivity(lambda place: 0.0, points=2)
    with pytest.raises(MetricError, match="not finite"):
        connectivity(lambda place: float("nan"))
