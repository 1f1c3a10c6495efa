"""Several patches on one base."""

from __future__ import annotations

import pytest
import torch

from trocar.anatomy import fingerprint, tiny_model
from trocar.core.errors import PatchBaseError, PatchOverlapError, PatchStateError
from trocar.patch import AddVector, Gate, LowRank, Patch, Remove, ScaleAt, SparseReplace, stack
from trocar.patch.actions import Place
from trocar.patch.stacking import common

NAME = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def rows(model, layer, which, by):
    before = model.get_parameter(NAME.format(layer))
    after = before.detach().clone()
    after[which] += by
    return SparseReplace.between(NAME.format(layer), before, after)


@pytest.fixture(scope="module")
def patches(model):
    generator = torch.Generator().manual_seed(0)
    return {
        "a": Patch.of(model, [rows(model, 0, [1, 2], 1)]),
        "b": Patch.of(model, [rows(model, 0, [2, 3], 2), rows(model, 1, [0], 1)]),
        "gate": Patch.of(model, [Gate({"L0.N2": 0.0})]),
        "mlp": Patch.of(model, [Gate({"L0.mlp": 0.5})]),
        "low": Patch.of(model, [LowRank(NAME.format(0), torch.ones(1, 32), torch.randn(48, 1, generator=generator))]),
        "steer": Patch.of(model, [AddVector("L1.resid_post", torch.ones(32))]),
        "off": Patch.of(model, [ScaleAt({"L0.N2": 0.0, "L0.N3": 2.0}, "last")]),
        "louder": Patch.of(model, [ScaleAt({"L0.N3": 3.0, "L0.N4": 0.0})]),
        "push": Patch.of(model, [AddVector("L1.resid_post", -2 * torch.ones(32))]),
        "remove": Patch.of(model, [Remove(["L0.N1", "L1.H0", "L1.H1"])]),
    }


def test_overlaps_count_entries(model, patches):
    order = ["a", "b", "gate", "mlp", "low", "steer", "push", "off", "louder", "remove"]
    found = {
        (order[one.first], order[one.second]): (one.where, one.entries)
        for one in stack([patches[name] for name in order], "order").overlaps(model)
    }
    down = NAME.format(0).replace("up", "down")
    assert found == {
        ("a", "b"): (NAME.format(0), 32),
        ("a", "low"): (NAME.format(0), 64),
        ("b", "low"): (NAME.format(0), 64),
        ("gate", "mlp"): (down, 32),
        ("steer", "push"): ("L1.resid_post", 1),
        ("off", "louder"): ("L0.N3", 1),
        ("a", "remove"): (NAME.format(0), 32),
        ("low", "remove"): (NAME.format(0), 32),
        ("mlp", "remove"): (down, 32),
    }


def test_overlaps_are_refused_unless_the_order_is_meant(model, patches):
    before = fingerprint(model)
    with pytest.raises(PatchOverlapError, match=r"Patches 0 and 1 both write 32 entries of model\.layers\.0\.mlp\.up_proj\.weight"):
        stack([patches["a"], patches["b"]]).apply(model)
    assert fingerprint(model) == before
    weight = model.get_parameter(NAME.format(0))
    base = weight.detach().clone()
    for order, added in ((("a", "b"), 2), (("b", "a"), 1)):
        with stack([patches[name] for name in order], "order").applied(model):
            assert torch.equal(weight[2], base[2] + added)  # the later one wins
    with stack([patches["a"], patches["gate"]]).applied(model):
        assert torch.equal(weight[1], base[1] + 1)
    assert fingerprint(model) == before


@pytest.mark.parametrize("out", range(6))
def test_any_one_can_be_taken_out(model, patches, out):
    """The state is then what the others alone make of the base, bit for bit, and the base comes back."""
    before = fingerprint(model)
    order = [patches[name] for name in ("a", "b", "mlp", "low", "steer", "remove")]
    alone = stack(order[:out] + order[out + 1 :], "order").apply(model)
    wanted = fingerprint(model)
    alone.revert()
    applied = stack(order, "order").apply(model)
    applied.revert(out)
    assert fingerprint(model) == wanted
    assert applied.numbers == tuple(n for n in range(6) if n != out)
    with pytest.raises(PatchStateError, match="not applied"):
        applied.revert(out)
    applied.revert()
    assert fingerprint(model) == before
    assert applied.numbers == ()


def test_taking_out_several_in_any_order(model, patches):
    before = fingerprint(model)
    applied = stack([patches[name] for name in ("a", "b", "low", "mlp")], "order").apply(model)
    for number in (2, 0, 3, 1):
        applied.revert(number)
    assert fingerprint(model) == before


def test_changes_in_between_are_noticed(model, patches):
    before = fingerprint(model)
    applied = stack([patches["a"], patches["low"]], "order").apply(model)
    with torch.no_grad():
        model.get_parameter(NAME.format(0))[0, 0] += 1
    with pytest.raises(PatchStateError, match="changed"):
        applied.revert(0)
    applied.revert(force=True)
    assert fingerprint(model) == before


def test_a_stack_can_become_one_patch(model, patches, tmp_path):
    order = stack([patches[name] for name in ("a", "b", "steer", "remove")], "order")
    with order.applied(model):
        wanted = fingerprint(model)
    patch = order.combined(model)
    patch.save(tmp_path / "p")
    with Patch.load(tmp_path / "p").applied(model):
        assert fingerprint(model) == wanted
    assert [one["digest"] for one in patch.settings["stack"]] == [one.digest for one in order.patches]


def test_what_cannot_be_stacked(model, patches):
    other = tiny_model("llama", seed=3)
    with pytest.raises(PatchBaseError, match="different bases"):
        stack([patches["a"], Patch.of(other, [rows(other, 0, [1], 1)])])
    with pytest.raises(PatchOverlapError, match="twice"):
        stack([patches["a"], patches["a"]])
    with pytest.raises(PatchOverlapError, match="last"):
        stack([patches["remove"], patches["a"]])
    with pytest.raises(PatchOverlapError, match="at least one"):
        stack([])
    with pytest.raises(PatchOverlapError, match="no meaning"):
        stack([patches["a"]], "maybe")  # type: ignore[arg-type]
    with patches["a"].applied(model), pytest.raises(PatchStateError, match="already applied"):
        stack([patches["a"], patches["steer"]]).apply(model)


def test_patches_that_do_nothing_stand_anywhere_any_number_of_times(model, patches):
    before = fingerprint(model)
    nothing = Patch.of(model, [])
    applied = stack([nothing, patches["a"], nothing]).apply(model)
    applied.revert(0)
    assert fingerprint(model) != before
    applied.revert()
    assert fingerprint(model) == before
    with nothing.applied(model), nothing.applied(model):
        assert fingerprint(model) == before


def test_a_failing_member_leaves_nothing_behind(model, patches):
    before = fingerprint(model)
    overflow = Patch.of(model, [LowRank(NAME.format(2), 1e19 * torch.ones(1, 32), 1e19 * torch.ones(48, 1))])
    again = Patch.of(model, [LowRank(NAME.format(2), 1.5e19 * torch.ones(1, 32), 2e19 * torch.ones(48, 1))])
    with pytest.raises(Exception, match="infinite"):
        stack([patches["a"], overflow, again], "order").apply(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("seed", range(20))
def test_common_entries_against_masks(seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 5, 3)

    def place():
        kind = int(torch.randint(0, 5, (), generator=generator))
        if kind == 4:
            return Place("w")
        extent = 60 if kind == 3 else shape[kind]
        index = (torch.rand(extent, generator=generator) < 0.5).nonzero().flatten()
        return Place("w", None if kind == 3 else kind, index)

    ours, theirs = place(), place()
    masks = []
    for one in (ours, theirs):
        mask = torch.zeros(shape, dtype=torch.bool)
        one.write(mask, torch.ones_like(one.read(mask)))
        masks.append(mask)
    assert common([ours], [theirs], shape) == int((masks[0] & masks[1]).sum())
