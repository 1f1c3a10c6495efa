"""Training: what is rare, determinism, and a killed training that ends with the same bytes."""

from __future__ import annotations

import pytest
import torch

from trocar import lab
from trocar.core.errors import ConfigError, DataError
from trocar.core.files import read_json
from trocar.fitting import last_whole_checkpoint
from trocar.lab import registry
from trocar.lab.failures import groups, locality
from trocar.lab.rare import rare_parts, split
from trocar.lab.registry import RareData, TrainRecipe, ViTShape
from trocar.lab.sources import Table
from trocar.lab.training import fit, new_vit

SHAPE = ViTShape(image=16, patch=8, width=16, blocks=2, heads=2, neurons=24)
RECIPE = TrainRecipe(epochs=5, batch=16, shift=2, checkpoint_steps=5)  # 64 pictures: 20 steps


@pytest.fixture
def pictures():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    pixels = torch.randint(0, 100, (64, 3, 16, 16), generator=rng, dtype=torch.uint8)
    pixels[labels == 1] += 120
    return pixels, labels


def trained(tmp_path, pictures, name, seed=0, **more):
    model = fit(new_vit(SHAPE, ("dark", "bright"), seed), *pictures, RECIPE, tmp_path / name, seed, "cpu", **more)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_resumed_training_ends_with_the_same_bytes(tmp_path, pictures):
    whole = trained(tmp_path, pictures, "whole")
    assert torch.equal(whole, trained(tmp_path, pictures, "again"))
    assert not torch.equal(whole, trained(tmp_path, pictures, "other", seed=1))
    trained(tmp_path, pictures, "cut", stop_after=12)
    newest = last_whole_checkpoint(tmp_path / "cut")
    assert newest is not None
    (tmp_path / "cut" / "checkpoint-15").mkdir()  # killed while writing: no trainer_state.json
    (tmp_path / "cut" / "checkpoint-15" / "model.safetensors").write_bytes(b"half")
    assert last_whole_checkpoint(tmp_path / "cut") == newest
    assert torch.equal(whole, trained(tmp_path, pictures, "cut"))


def test_training_learns(tmp_path, pictures):
    model = fit(new_vit(SHAPE, ("dark", "bright"), 0), *pictures, RECIPE, tmp_path / "x", 0, "cpu")
    pixels, labels = pictures
    with torch.no_grad():
        assert (model(pixel_values=pixels.float() / 127.5 - 1).logits.argmax(-1) == labels).float().mean() > 0.9
    assert not model.training


def test_fresh_models_leave_the_random_state_alone():
    before = torch.get_rng_state()
    one, two = new_vit(SHAPE, ("a", "b"), 0), new_vit(SHAPE, ("a", "b"), 0)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_empty_training_set(tmp_path):
    with pytest.raises(DataError, match="at least one"):
        fit(
            new_vit(SHAPE, ("a", "b"), 0),
            torch.empty(0, 3, 16, 16, dtype=torch.uint8),
            torch.empty(0, dtype=torch.long),
            RECIPE,
            tmp_path,
            0,
            "cpu",
        )


def test_train_writes_a_checkpoint_that_loads(tmp_path, monkeypatch, written_set):
    row = registry.get("vit-pacs-rare").model_copy(
        update={"name": "tiny", "shape": SHAPE, "train": RECIPE, "data": RareData(source="pacs", label="label", part="domain", keep=2)}
    )
    monkeypatch.setattr(registry, "MODELS", (row,))
    monkeypatch.setenv("TROCAR_LAB", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="trocar lab train tiny"):
        lab.load("tiny")
    folder = lab.train("tiny", device="cpu")
    assert folder == tmp_path / "cache" / "tiny" / "seed0"
    assert not list(tmp_path.rglob("*.training"))
    model, processor = lab.load("tiny")
    assert model.config.id2label == {0: "cat", 1: "dog"}
    facts = read_json(folder / "lab.json")
    assert facts["rare"] == {"cat": "photo", "dog": "photo"}  # position of seed 0: the fifth of two parts is the first
    assert facts["train_pictures"] == 2 * (8 + 2)
    assert lab.show("tiny")["weights"] == "cache"
    examples = lab.load_examples({"source": "pacs:test", "label": "label"}, model, processor)
    with torch.no_grad():
        assert (model(**examples.inputs).logits.argmax(-1) == examples.labels).float().mean() >= 0.5
    assert lab.train("tiny") == folder


@pytest.fixture
def written_set(tmp_path, monkeypatch):
    """A set of the PACS files' form: two classes, two domains, eight pictures of each in training and two in test."""
    import io

    import numpy as np
    import PIL.Image
    import pyarrow
    import pyarrow.parquet

    rng = np.random.default_rng(0)
    for name, count in (("train", 8), ("test", 2)):
        rows = [(c, d) for c in ("cat", "dog") for d in ("photo", "sketch") for _ in range(count)]
        cells = []
        for label, _ in rows:
            buffer = io.BytesIO()
            PIL.Image.fromarray(rng.integers(0, 100, (16, 16, 3), np.uint8) + np.uint8(150 * (label == "dog"))).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        table = pyarrow.table({"image": cells, "domain": [d for _, d in rows], "label": [c for c, _ in rows]})
        pyarrow.parquet.write_table(table, tmp_path / f"pacs-{name}.parquet")
    monkeypatch.setenv("TROCAR_DATA", str(tmp_path))
    return tmp_path


def test_split_keeps_few_of_the_rare_part(written_set):
    parts = split(RareData(source="pacs", label="label", part="domain", keep=3, assignment="rotate"), seed=0)
    assert parts.rare == {"cat": "photo", "dog": "sketch"}
    domain, label = parts.table.columns["domain"], parts.table.columns["label"]
    rare = [r for r in parts.train if domain[r] == parts.rare[label[r]]]
    assert len(rare) == 6
    assert len(parts.train) == 2 * (8 + 3)
    assert len(parts.common_test) == 4
    assert len(parts.rare_unseen) == 2 * (5 + 2)
    assert not set(parts.train) & set(parts.rare_unseen)
    with pytest.raises(ConfigError, match="no class 'cow'"):
        split(RareData(source="pacs", label="label", part="domain", classes=("cow",)), 0)


def test_rare_parts_by_seed():
    five = {name: list("abcde") for name in ("x", "y")}
    position = RareData(source="cifar100", label="coarse", part="fine")
    assert [rare_parts(position, five, seed)["x"] for seed in range(5)] == list("ecadb")
    rotate = position.model_copy(update={"assignment": "rotate"})
    assert rare_parts(rotate, five, 1) == {"x": "b", "y": "c"}


def test_groups_and_locality():
    table = Table("t", [b""] * 8, {"label": ["a"] * 6 + ["b"] * 2, "part": ["p"] * 6 + ["q"] * 2})
    from trocar.lab.rare import RareSplit

    parts = RareSplit(table, ("a", "b"), {"a": "p", "b": "q"}, [], [], list(range(8)))
    scores = torch.tensor([[0.0, 1]] * 3 + [[1.0, 0]] * 3 + [[1.0, 0]] * 2)
    found = groups(parts, "label", "part", scores, smallest=2)
    assert [(g.truth, g.predicted, g.rows) for g in found] == [("a", "b", (0, 1, 2)), ("b", "a", (6, 7))]
    assert [g.rows for g in groups(parts, "label", "part", scores, smallest=3)] == [(0, 1, 2)]

    gaps = torch.tensor([0.01, 0.5, 0.02, 0.03, -0.01])  # logit of class 0 over class 1
    near = locality(
        torch.stack([gaps, torch.zeros(5)], 1), torch.zeros(5, dtype=torch.long), [10, 11, 12, 13, 14], 0, n_sensitive=2, n_random=9
    )
    assert near["sensitive"] == [10, 12]
    assert near["random"] == [11, 13, 14]  # row 14 is predicted wrong: fit for the random set, not for the sensitive one


def test_registry_names():
    names = ["vit-cifar-rare", "vit-pacs-rare", "world", "world-shallow", "translator-base", "translator", "translator-looping", "outliers"]
    assert [row["name"] for row in lab.list()] == names
    with pytest.raises(ConfigError, match="Did you mean 'vit-cifar-rare'"):
        lab.show("vit-cifar-rar")
