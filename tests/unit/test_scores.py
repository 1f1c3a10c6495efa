"""Scores: order, masks, sets, files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.anatomy import parse
from trocar.core.errors import ScoresError
from trocar.locate import How, Scores, iou, mean

HOW = How("test", "data", {"alpha": 0.1}, "state-a")


def channels(up, down, how=HOW):
    return Scores("channel", "", {"L3.mlp.down.in": down, "L3.mlp.up.out": up}, how)


def test_order_is_layer_matrix_index_and_ties_go_to_the_lower_one():
    scores = channels([2.0, 2.0, 0.0], [1.0, 2.0, 5.0])
    assert list(scores.groups) == ["L3.mlp.up.out", "L3.mlp.down.in"]
    assert [name for name, _ in scores.ranked(4)] == ["L3.mlp.down.in2", "L3.mlp.up.out0", "L3.mlp.up.out1", "L3.mlp.down.in1"]
    assert scores.top(3).open_names() == ["L3.mlp.up.out0", "L3.mlp.up.out1", "L3.mlp.down.in2"]
    many = Scores("neuron", "", {f"L{layer}.N": [1.0] for layer in (10, 9, 0, 2)}, HOW)
    assert list(many.groups) == ["L0.N", "L2.N", "L9.N", "L10.N"]  # by number, not by letter


def test_mapping_of_components_names_and_arrays_agree():
    by_name = Scores("head", "", {"L1.H0": 1.0, "L1.H2": 3.0, "L0.H1": 2.0}, HOW)
    by_component = Scores("head", "", {parse(name): value for name, value in {"L1.H0": 1.0, "L1.H2": 3.0, "L0.H1": 2.0}.items()}, HOW)
    assert by_name == by_component
    assert len(by_name) == 3
    assert by_name["L1.H2"] == 3.0
    assert by_name[parse("L0.H1")] == 2.0
    assert [str(component) for component, _ in by_name.sorted()] == ["L1.H2", "L0.H1", "L1.H0"]
    assert by_name.sorted()[0][0] == parse("L1.H2")
    with pytest.raises(ScoresError, match=r"no score of L1\.H1"):
        by_name["L1.H1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool])
def test_tensors_of_any_dtype(dtype):
    scores = Scores("neuron", "", {"L0.N": torch.tensor([0, 1, 1], dtype=dtype)}, HOW)
    assert scores.flat.tolist() == [0, 1, 1]
    assert scores.is_mask
    assert scores.count() == 2


def test_tower_is_part_of_the_names():
    scores = Scores("block", "vision", {"vision.L0": 1.0, "vision.L2": 0.5}, HOW)
    assert scores.matrix().rows == ("vision.L0", "vision.L2")
    with pytest.raises(ScoresError, match="does not name blocks of tower 'vision'"):
        Scores("block", "vision", {"L0": 1.0}, HOW)
    with pytest.raises(ScoresError):
        Scores("block", "", {"vision.L0": 1.0}, HOW)


def test_matrix():
    heads = Scores("head", "", {"L0.H": [1.0, 2.0], "L2.H": [3.0]}, HOW).matrix()
    assert heads.rows == ("L0.H", "L2.H")
    assert heads.values.shape == (2, 2)
    assert np.isnan(heads.values[1, 1])
    linears = Scores("linear", "", {"L1.mlp.up": 1.0, "L0.attn.q": 2.0, "L0.mlp.up": 0.0}, HOW).matrix()
    assert (linears.rows, linears.columns) == (("L0", "L1"), ("attn.q", "mlp.up"))
    assert linears.values[0].tolist() == [2.0, 0.0]
    assert linears.values[1, 1] == 1.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, -3.5, float("inf")]), min_size=1, max_size=40), st.data())
def test_top_is_exact_and_nested(values, data):
    half = max(1, len(values) // 2)
    groups = {"L0.N": values[:half]} | ({"L1.N": values[half:]} if values[half:] else {})
    scores = Scores("neuron", "", groups, HOW)
    small, large = sorted([data.draw(st.integers(1, len(values))), data.draw(st.integers(1, len(values)))])
    assert scores.top(small).count() == small
    assert scores.top(large).count() == large
    assert (scores.top(small) - scores.top(large)).count() == 0
    fraction = data.draw(st.floats(1e-6, 1.0))
    assert scores.top(fraction).count() == max(1, round(fraction * len(values)))
    chosen = [value for value, kept in zip(values, scores.top(small).flat, strict=True) if kept]
    assert sorted(chosen) == sorted(values)[len(values) - small :]


@pytest.mark.parametrize("k", [0, -1, 7, 0.0, 1.5, float("nan"), True, "3"])
def test_top_outside_the_range(k):
    with pytest.raises(ScoresError, match="top"):
        channels([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).top(k)


masks = st.lists(st.booleans(), min_size=6, max_size=6)


@settings(max_examples=40, deadline=None)
@given(masks, masks)
def test_masks_combine_as_sets(left, right):
    a, b = (channels(side[:3], side[3:]) for side in (left, right))
    sets = [set(side.open_names()) for side in (a, b)]
    assert set((a & b).open_names()) == sets[0] & sets[1]
    assert set((a | b).open_names()) == sets[0] | sets[1]
    assert set((a - b).open_names()) == sets[0] - sets[1]
    assert iou(a, b) == (len(sets[0] & sets[1]) / len(sets[0] | sets[1]) if sets[0] | sets[1] else 1.0)


def test_difference_and_mean_of_values():
    a, b = channels([3.0, 2.0], [1.0]), channels([1.0, 2.0], [4.0])
    assert (a - b).flat.tolist() == [2.0, 0.0, -3.0]
    assert mean([a, b]).flat.tolist() == [2.0, 2.0, 2.5]
    assert mean([a, a]).how.fingerprint == "state-a"


def test_foreign_scores_do_not_combine():
    mask = channels([1, 0], [1])
    other_model = channels([1, 0], [1], How("test", fingerprint="state-b"))
    with pytest.raises(ScoresError, match="different models"):
        _ = mask & other_model
    assert iou(mask, other_model, across_models=True) == 1.0
    with pytest.raises(ScoresError, match="one side scores channels, the other neurons"):
        _ = mask | Scores("neuron", "", {"L3.N": [1, 0]}, HOW)
    with pytest.raises(ScoresError, match="needs masks"):
        _ = mask & channels([0.5, 0], [1])
    with pytest.raises(ScoresError, match="not with list"):
        _ = mask & [1, 0]


def test_partial_scores_are_left_out_not_zero():
    scores = Scores("neuron", "", {"L0.N1": -1.0, "L0.N4": -2.0}, HOW)
    assert len(scores) == 2
    assert scores.flat.size == 5
    assert scores.top(2).open_names() == ["L0.N1", "L0.N4"]
    assert scores.threshold(-1.5).open_names() == ["L0.N1"]
    with pytest.raises(ScoresError, match="range of 2 scores"):
        scores.top(3)


@pytest.mark.parametrize(
    ("kind", "values", "what"),
    [
        ("haed", {"L0.H0": 1.0}, "Did you mean 'head'"),
        ("head", {}, "no head scores"),
        ("head", {"L0.N0": 1.0}, "does not name heads"),
        ("head", {"L0": 1.0}, "does not name heads"),
        ("head", {"L0.H0": float("nan")}, "must be one number"),
        ("head", {"L0.H": [1.0, float("nan")]}, "1 of 2 scores"),
        ("block", {"L0": float("nan")}, "are NaN"),
        ("head", {"L0.H": [[1.0]]}, "list of numbers"),
        ("head", {"L0.H": ["a"]}, "list of numbers"),
        ("head", {"L0.H": [1.0], "L0.H3": 1.0}, "both as an array"),
        ("neuron", {"L0.N99999999999": 1.0}, "beyond every model"),
        ("linear", {"L0.mlp.upp": 1.0}, "does not name linears"),
    ],
)
def test_bad_values(kind, values, what):
    with pytest.raises(ScoresError, match=what):
        Scores(kind, "", values, HOW)


def test_values_are_a_copy_and_cannot_be_written():
    source = np.array([1.0, 2.0])
    scores = Scores("neuron", "", {"L0.N": source}, HOW)
    source[0] = 9
    assert scores["L0.N0"] == 1.0
    with pytest.raises(ValueError):
        scores.groups["L0.N"][0] = 3


@pytest.mark.parametrize("make", [lambda: channels([0.5, float("inf")], [-1.0]), lambda: channels([True, False], [True])])
def test_round_trip_is_exact_and_bytes_are_stable(make, tmp_path):
    scores = make()
    scores.save(tmp_path / "a.safetensors")
    make().save(tmp_path / "b.safetensors")
    assert Scores.load(tmp_path / "a.safetensors") == scores
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_partial_round_trip(tmp_path):
    scores = Scores("head", "", {"L0.H3": 1.0}, HOW)
    scores.save(tmp_path / "a.safetensors")
    assert Scores.load(tmp_path / "a.safetensors") == scores


def _file(tmp_path, tensors, header):
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    save_file(tensors, path, None if header is None else {"trocar": header if isinstance(header, str) else json.dumps(header)})
    return path


GOOD = {
    "format": "trocar-scores", "version": 1, "kind": "head", "tower": "", "partial": False,
    "how": {"method": "m", "data": "", "settings": {}, "fingerprint": ""},
}  # fmt: skip
HEADS = {"L0.H": np.array([1.0, 2.0], np.float32)}


@pytest.mark.parametrize(
    ("tensors", "header"),
    [
        (HEADS, None),
        (HEADS, "not json"),
        (HEADS, {**GOOD, "format": "trocar-patch"}),
        (HEADS, {**GOOD, "version": 2}),
        (HEADS, {**GOOD, "kind": "os.system"}),
        (HEADS, {**GOOD, "kind": 3}),
        (HEADS, {**GOOD, "how": {"method": "m"}}),
        (HEADS, {**GOOD, "extra": 1}),
        (HEADS, "[" * 100000),
        ({"L0.H": np.array([[1.0]])}, GOOD),
        ({"L0.H": np.array([1], np.int64)}, GOOD),
        ({"L0.H": np.array([np.nan])}, GOOD),
        ({"../../etc": np.array([1.0])}, GOOD),
        ({"L0.N": np.array([1.0])}, GOOD),
    ],
)
def test_foreign_files_are_refused(tensors, header, tmp_path):
    with pytest.raises(ScoresError):
        Scores.load(_file(tmp_path, tensors, header))


def test_good_header_of_the_cases_above_loads(tmp_path):
    assert len(Scores.load(_file(tmp_path, HEADS, GOOD))) == 2


def test_damaged_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    channels([1.0, 2.0], [3.0]).save(path)
    content = path.read_bytes()
    for broken in (b"", b"\x80\x04pickle", content[:20], content[:-3], b"\xff" * 8 + content[8:]):
        path.write_bytes(broken)
        with pytest.raises(ScoresError):
            Scores.load(path)
    with pytest.raises(ScoresError, match="no file"):
        Scores.load(tmp_path / "none.safetensors")


def test_a_large_model_is_quick():
    import time

    values = np.random.default_rng(0).random((32, 11008), np.float32)
    start = time.perf_counter()
    scores = Scores("neuron", "", {f"L{layer}.N": row for layer, row in enumerate(values)}, HOW)
    mask = scores.top(0.05)
    assert mask.count() == round(0.05 * values.size)
    assert iou(mask, scores.top(100)) == 100 / mask.count()
    assert scores.ranked(1)[0][1] == values.max()
    assert time.perf_counter() - start < 2


def test_rows_and_table():
    scores = channels([3.0, 2.0], [1.0])
    assert scores.rows(2) == [
        {"component": "L3.mlp.up.out0", "score": 3.0, "rank": 1},
        {"component": "L3.mlp.up.out1", "score": 2.0, "rank": 2},
    ]
    assert scores.table(2).row_count == 2
    assert "1 chosen" in repr(scores.top(1))
