"""Loaders: every source gives the same Examples, and bad input is named."""

from __future__ import annotations

import io
import json

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar import lab
from trocar.core.errors import ConfigError, DataError
from trocar.lab.data import DataConfig, load_examples
from trocar.lab.pixels import processor_for
from trocar.lab.sources import Table, read

LABELS = {"cat": 0, "dog": 1}
PROCESSOR = processor_for(8)


def picture(seed: int, size: int = 8, mode: str = "RGB") -> PIL.Image.Image:
    channels = {"RGB": 3, "L": 1, "RGBA": 4}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size, size, channels), np.uint8)
    return PIL.Image.fromarray(values.squeeze(), mode)


def png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["cat/a.png", "cat/b.png", "dog/deep/c.png"]):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return tmp_path / "pictures"


def examples(source, **more):
    return load_examples({"source": str(source), **more}, processor=PROCESSOR, label2id=LABELS)


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_folder_parquet_and_jsonl_give_the_same_examples(folder):
    import pyarrow
    import pyarrow.parquet

    from_folder = examples(folder)
    names = ["cat/a.png", "cat/b.png", "dog/deep/c.png"]
    rows = [{"image": name, "label": name.split("/")[0]} for name in names]
    from_jsonl = examples(write_jsonl(folder / "rows.jsonl", rows))
    cells = [{"bytes": (folder / name).read_bytes(), "path": None} for name in names]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": ["cat", "cat", "dog"]}), folder / "rows.parquet")
    from_parquet = examples(folder / "rows.parquet")
    for other in (from_jsonl, from_parquet):
        assert other.ids == from_folder.ids
        assert torch.equal(other.inputs["pixel_values"], from_folder.inputs["pixel_values"])
    assert from_folder.labels.tolist() == [0, 0, 1]
    assert from_folder.fields["file"] == ["cat/a.png", "cat/b.png", "dog/deep/c.png"]
    assert np.array_equal(from_folder.pictures[2], np.asarray(picture(2)))  # the view undoes the processor


def test_pictures_are_turned_as_the_camera_says(tmp_path):
    (tmp_path / "cat").mkdir()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(0).save(tmp_path / "cat" / "a.png", exif=exif)
    assert np.array_equal(examples(tmp_path).pictures[0], np.rot90(np.asarray(picture(0)), -1))


def test_relative_sources_start_at_base(folder):
    assert len(load_examples("pictures", processor=PROCESSOR, label2id=LABELS, base=folder.parent)) == 3


def test_where_limit_and_mapping(folder):
    rows = [
        {"image": f"{name}.png", "kind": kind, "style": style}
        for name, kind, style in [("cat/a", "c", "oil"), ("cat/b", "c", "photo"), ("dog/deep/c", "d", "oil")]
    ]
    path = write_jsonl(folder / "rows.jsonl", rows)
    both = examples(path, label="kind", classes={"c": "cat", "d": 1}, where={"style": "oil"})
    assert both.labels.tolist() == [0, 1]
    assert both.fields["style"] == ["oil", "oil"]
    assert examples(path, label="kind", classes={"c": 0, "d": 1}, where={"style": ["oil", "photo"]}).labels.tolist() == [0, 0, 1]
    drawn = examples(path, limit=2, seed=3)
    assert drawn.labels is None
    assert drawn.ids == examples(path, limit=2, seed=3).ids
    assert set(drawn.ids) < set(examples(path).ids)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
@pytest.mark.parametrize("size", [5, 40])
def test_grey_transparent_and_odd_sizes_go_through_the_processor(tmp_path, mode, size):
    (tmp_path / "cat").mkdir()
    picture(0, size, mode).save(tmp_path / "cat" / "x.png")
    assert examples(tmp_path).inputs["pixel_values"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("content", [b"", b"no picture", png(picture(0))[:60]])
def test_damaged_pictures_are_named(folder, content):
    (folder / "dog" / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=r"dog/broken\.png is not a readable picture"):
        examples(folder)


def test_same_pixels_once_but_never_with_two_labels(folder):
    picture(0).save(folder / "cat" / "again.bmp")  # another file, equal pixels
    assert len(examples(folder)) == 3
    picture(0).save(folder / "dog" / "wrong.png")
    with pytest.raises(DataError, match="same pixels but two labels"):
        examples(folder)


@pytest.mark.parametrize(
    ("path", "fits"), [("../outside.png", False), ("/etc/hostname", False), ("cat/../cat/a.png", True), ("link/outside.png", False)]
)
def test_paths_stay_inside(folder, path, fits):
    picture(9).save(folder.parent / "outside.png")
    (folder / "link").symlink_to(folder.parent)
    rows = write_jsonl(folder / "rows.jsonl", [{"image": path}])
    if fits:
        assert len(examples(rows)) == 1
    else:
        with pytest.raises(DataError, match="leads out of"):
            examples(rows)


def test_paths_outside_when_allowed(folder):
    picture(9).save(folder.parent / "outside.png")
    assert len(examples(write_jsonl(folder / "rows.jsonl", [{"image": "../outside.png"}]), allow_outside=True)) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "cat/a.png", "label": "horse"}, "no class 'horse'"),
        ({"image": "cat/a.png", "label": 2}, r"label 2 is not in 0\.\.1"),
        ({"image": "cat/a.png", "label": -1}, "label -1"),
        ({"image": "cat/a.png", "label": 1.0}, "float, not a class"),
        ({"image": "cat/a.png", "label": True}, "bool, not a class"),
        ({"image": "cat/a.png", "label": None}, "NoneType, not a class"),
        ({"image": "gone.png", "label": 0}, r"gone\.png does not exist"),
        ({"image": 3, "label": 0}, "the image is int"),
        ({"label": 0}, "Line 1 .* no key 'image'"),
    ],
)
def test_bad_rows_are_named(folder, row, message):
    with pytest.raises(DataError, match=message):
        examples(write_jsonl(folder / "rows.jsonl", [row]))


def test_bad_sources_are_named(folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.csv").write_text("a,b")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe{}")
    (tmp_path / "bad.jsonl").write_text('{"image": "a"}\n{"image":')
    monkeypatch.setenv("TROCAR_DATA", str(tmp_path))
    for source, message in {
        tmp_path / "empty": "no pictures in class sub-folders",
        tmp_path / "text.csv": r"unknown ending '\.csv'",
        tmp_path / "bad.parquet": "not a readable parquet",
        tmp_path / "bad.jsonl": "Line 2 .* is not JSON",
        tmp_path / "bytes.jsonl": "not text in UTF-8",
        tmp_path / "nowhere": "neither a known set nor an existing file",
        "cifar100:test": "cifar100-test.parquet does not exist. Set TROCAR_DATA",
        "cifar100:valid": "no split 'valid'",
        "lab:cifar-rar": "Did you mean 'cifar-rare'",
    }.items():
        with pytest.raises(DataError, match=message):
            examples(source)
    nested = write_jsonl(folder / "nested.jsonl", [{"image": "cat/a.png", "tags": ["x"]}])
    with pytest.raises(DataError, match="column 'tags' holds lists"):
        examples(nested, where={"tags": "x"})
    with pytest.raises(DataError, match="no row has label = 'horse'"):
        examples(folder, where={"label": "horse"})
    with pytest.raises(DataError, match=r"no column 'lable'\. Did you mean 'label'"):
        examples(folder, label="lable")
    with pytest.raises(ConfigError, match="Did you mean 'limit'"):
        examples(folder, limits=3)
    with pytest.raises(DataError, match="Neither a model nor a processor"):
        load_examples({"source": str(folder), "classes": {"cat": 0, "dog": 1}})


def test_hub_errors_are_plain(monkeypatch):
    import datasets

    def offline(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"'some/set' \(split 'train'\) could not be had from the hub: Couldn't reach"):
        examples("hub:some/set:train")


def test_hub_sets_keep_bytes_and_class_names(monkeypatch):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(picture(n)), "path": None} for n in range(2)], "label": [1, 0]}, features=features
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_kwargs: data)
    assert examples("hub:some/set").labels.tolist() == [1, 0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=1, max_size=12), st.data())
def test_where_keeps_exactly_the_matching_rows(rows, data):
    table = Table("x", [b""] * len(rows), {"s": [s for s, _ in rows], "n": [n for _, n in rows], "row": list(range(len(rows)))})
    wanted = data.draw(st.sets(st.sampled_from(sorted({n for _, n in rows})), min_size=1))
    kept = table.where({"n": sorted(wanted)}).columns["row"]
    assert list(kept) == [i for i, (_, n) in enumerate(rows) if n in wanted]


def test_shipped_weights_on_the_excerpt():
    model = lab.load_model("vit-cifar-rare")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(p, p.half().float()) for p in model.parameters())
    data = {
        role: lab.load_examples({"source": "lab:cifar-rare", "where": {"role": role}}, model) for role in ("failure", "sensitive", "random")
    }
    with torch.no_grad():
        logits = {role: model(**part.inputs).logits for role, part in data.items()}
    right = {role: (logits[role].argmax(-1) == part.labels).float().mean().item() for role, part in data.items()}
    assert right["failure"] == 0
    assert right["sensitive"] == 1
    stated = lab.show("vit-cifar-rare")["accuracy"]["common_test"]
    assert abs(right["random"] - stated) < 0.08  # 200 of the other test pictures: a standard error of .035
    top = logits["sensitive"].softmax(-1).topk(2).values
    assert (top[:, 0] - top[:, 1]).max() < 0.05
    named = [model.config.id2label[i] for i in logits["failure"].argmax(-1).tolist()]
    assert named == data["failure"].fields["predicted"]
    sizes = [data["failure"].fields["group"].count(group) for group in set(data["failure"].fields["group"])]
    assert len(sizes) == 3
    assert min(sizes) >= 20
    assert not set(data["sensitive"].ids) & set(data["random"].ids)


def test_shipped_mask_hypernetwork_beats_the_constant_mask():
    from trocar.edit.where_to_edit import MaskHypernetwork, Place

    network = MaskHypernetwork.load(lab.mask_hypernetwork("vit-cifar-rare"))
    network.fit_to(Place.of(lab.load_model("vit-cifar-rare"), network.made.first_block))
    assert network.learned
    assert network.made.report["held_out"] < network.made.report["constant"]
    with pytest.raises(DataError, match="No mask hypernetwork comes with"):
        lab.mask_hypernetwork("vit-pacs-rare")


def test_excerpt_is_attributed():
    import pyarrow.parquet

    from trocar.lab.sources import EXCERPTS

    path = EXCERPTS / "cifar-rare.parquet"
    assert path.stat().st_size < 2**20
    assert b"Krizhevsky" in pyarrow.parquet.read_schema(path).metadata[b"attribution"]
    assert len(read("lab:cifar-rare")) > 900


def test_config_is_frozen_and_plain():
    config = DataConfig(source="x", where={"a": ["b", 1]})
    assert DataConfig.parse(config.model_dump(mode="json")) == config
