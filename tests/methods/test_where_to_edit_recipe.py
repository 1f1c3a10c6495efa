"""Training a hypernetwork and the recipe's method, with everything a run folder needs."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edit_models import pictures, same_state, small_vit, state, wrong_labels

from trocar.anatomy import fingerprint
from trocar.core.errors import ConfigError, DataError
from trocar.core.workspace import Workspace
from trocar.edit.where_to_edit import HypernetworkConfig, MaskHypernetwork, train_mask_hypernetwork
from trocar.edit.where_to_edit.recipe import METHOD, STARTER, RecipeConfig
from trocar.method import Examples, Job

TRAINING = {"pairs": 96, "chunk": 32, "epochs": 6, "lr": 1e-3, "batch": 16, "steps_per_batch": 1, "depth": 1, "cutmix": {"crop": 1}}
EDIT = {"lr": 1e-3, "stop_ce": 0.3, "keep": 0.1}


@pytest.fixture(scope="module")
def model() -> Any:
    return small_vit(torch.float32)


def examples(count: int, seed: int, labels: torch.Tensor | None = None, name: str = "") -> Examples:
    values = pictures(count, seed, torch.float32)
    shown = (values.clamp(-2, 2) * 60 + 128).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return Examples({"pixel_values": values}, tuple(f"{name}{seed}-{row}" for row in range(count)), labels, shown)


def job(model: Any, folder: Path, settings: dict[str, Any], **roles: Examples) -> Job:
    failures = examples(5, 1)
    failures = dataclasses.replace(failures, labels=wrong_labels(model, failures.inputs["pixel_values"]))
    apart = examples(12, 2)
    apart = dataclasses.replace(apart, labels=wrong_labels(model, apart.inputs["pixel_values"], 0))
    data = {"edit": failures, "locality.random": apart, "unlabelled": examples(16, 3), **roles}
    return Job(model, data, RecipeConfig.parse({**EDIT, **settings}), 0, Workspace(folder), [f"class {i}" for i in range(5)])


def test_training_resumes_to_the_same_weights(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from trocar.edit.where_to_edit import training

    images = pictures(12, dtype=torch.float32)
    config = HypernetworkConfig.parse(TRAINING)
    before = state(model)
    whole = train_mask_hypernetwork(model, images, config, Workspace(tmp_path / "a"), 3)
    assert same_state(before, state(model))
    assert whole.learned
    assert whole.made.report["held_out"] < whole.made.report["constant"]
    real, calls = training._Checkpoint.save, []

    def dies(self: Any, *words: Any) -> None:
        real(self, *words)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Checkpoint, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        train_mask_hypernetwork(model, images, config, Workspace(tmp_path / "b"), 3)
    resumed = train_mask_hypernetwork(model, images, config, Workspace(tmp_path / "b"), 3)
    assert len(calls) == 6
    assert resumed.made == whole.made
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in whole.state_dict().items())
    files = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "b"): path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    other = train_mask_hypernetwork(model, images, config, Workspace(tmp_path / "b"), 4)  # another key is never served old units
    assert not torch.equal(other.mean, whole.mean)


def test_a_run_measures_everything_and_leaves_the_model(model: Any, tmp_path: Path) -> None:
    before = state(model)
    outcome = METHOD.run(job(model, tmp_path, {"training": TRAINING}))
    assert same_state(before, state(model))
    by_name = {measurement.name: measurement for measurement in outcome.measurements}
    assert set(by_name) == {"success", "generalisation", "locality.random", "accuracy.locality.random"}
    assert by_name["success"].summary(0).after == 1
    assert by_name["success"].summary(0).before == 0
    assert by_name["generalisation"].summary(0).n == 4  # leave-one-out
    assert by_name["locality.random"].summary(0).before == 1
    assert outcome.patch is not None
    wanted = wrong_labels(model, pictures(5, 1, torch.float32))[0]
    with outcome.patch.applied(model), torch.no_grad():
        edited = fingerprint(model)
        logits = model(pictures(12, 2, torch.float32)).logits
        assert int(model(pictures(1, 1, torch.float32)).logits.argmax()) == int(wanted)
    assert {measurement.state_after for measurement in outcome.measurements} == {edited}
    assert {measurement.state_before for measurement in outcome.measurements} == {fingerprint(model)}
    base = model(pictures(12, 2, torch.float32)).logits
    kept = (logits.argmax(1) == base.argmax(1)).float().mean()
    assert by_name["locality.random"].summary(0).after == pytest.approx(float(kept))
    assert outcome.log["flips_total"] == round(12 * (1 - float(kept)))
    assert outcome.log["status"] == "converged"
    assert outcome.scores["mask"].count() == 24
    assert {figure.id for figure in outcome.figures} == {"open-entries", "hypernetwork"}
    assert {gallery.id for gallery in outcome.galleries} >= {"edited", "others"}
    gallery = next(gallery for gallery in outcome.galleries if gallery.id == "edited")
    assert list(gallery.after) == list(gallery.truth)
    assert list(gallery.before) != list(gallery.truth)
    assert MaskHypernetwork.load(tmp_path / "hypernetwork.safetensors").learned
    again = METHOD.run(job(model, tmp_path / "again", {"hypernetwork": str(tmp_path / "hypernetwork.safetensors"), "training": TRAINING}))
    assert again.patch is not None
    assert [op.tensors()["values"].tolist() for op in again.patch.ops] == [op.tensors()["values"].tolist() for op in outcome.patch.ops]


@pytest.mark.parametrize(
    "settings", [{"mask": "gradient-norm"}, {"mask": "dense", "keep": 1}, {"baseline": "lora"}, {"baseline": "classifier"}]
)
def test_masks_and_baselines_without_training(model: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    made = job(model, tmp_path, settings)
    made = dataclasses.replace(made, data={role: rows for role, rows in made.data.items() if role != "unlabelled"})
    outcome = METHOD.run(made)
    assert next(m for m in outcome.measurements if m.name == "success").summary(0).after == 1
    assert outcome.patch is not None
    assert outcome.patch.ops


def test_several_edit_images_and_similar_ones_leave_one_out(model: Any, tmp_path: Path) -> None:
    made = job(model, tmp_path, {"mask": "gradient-norm", "edit_images": 2})
    similar = made.data["edit"].take([0, 3])  # holds an edited image and one that is counted already
    more = examples(2, 8, torch.tensor([0, 1]))
    similar = Examples(
        {"pixel_values": torch.cat([similar.inputs["pixel_values"], more.inputs["pixel_values"]])},
        similar.ids + more.ids,
        torch.cat([similar.labels, more.labels]),  # type: ignore[list-item]
        np.concatenate([similar.pictures, more.pictures]),  # type: ignore[list-item]
    )
    outcome = METHOD.run(dataclasses.replace(made, data={**made.data, "similar": similar}))
    counts = {measurement.name: measurement.summary(0).n for measurement in outcome.measurements}
    assert counts["success"] == 2
    assert counts["generalisation"] == 3 + 2


def test_group_of_one_has_no_generalisation(model: Any, tmp_path: Path) -> None:
    made = job(model, tmp_path, {"mask": "gradient-norm"})
    outcome = METHOD.run(dataclasses.replace(made, data={**made.data, "edit": made.data["edit"].take([0])}))
    assert "generalisation" not in {measurement.name for measurement in outcome.measurements}
    assert "not measured" in outcome.log["generalisation"]


def test_locality_set_with_images_of_the_group_is_refused(model: Any, tmp_path: Path) -> None:
    made = job(model, tmp_path, {"mask": "gradient-norm"})
    same_id = made.data["edit"].take([4])
    renamed = dataclasses.replace(same_id, ids=("another name",))
    for overlap in (same_id, renamed):
        with pytest.raises(DataError, match=r"locality\.random"):
            METHOD.run(dataclasses.replace(made, data={**made.data, "locality.random": overlap}))


def test_missing_roles_and_contradictions(model: Any, tmp_path: Path) -> None:
    made = job(model, tmp_path, {})
    without = dataclasses.replace(made, data={role: rows for role, rows in made.data.items() if role != "unlabelled"})
    with pytest.raises(DataError, match=r"no data\.unlabelled.*gradient-norm"):
        METHOD.run(without)
    with pytest.raises(DataError, match="edit_images is 9"):
        METHOD.run(job(model, tmp_path, {"edit_images": 9}))
    with pytest.raises(DataError, match="no labels"):
        METHOD.run(job(model, tmp_path, {}, edit=examples(2, 5)))
    with pytest.raises(ConfigError, match=r"training\.first_block is 0, but first_block is 1"):
        METHOD.run(job(model, tmp_path, {"first_block": 1, "training": {**TRAINING, "first_block": 0}}))
    with pytest.raises(ConfigError, match="baseline"):
        RecipeConfig.parse({"baseline": "everything"})


def test_an_image_that_is_right_gives_an_empty_patch(model: Any, tmp_path: Path) -> None:
    made = job(model, tmp_path, {"mask": "gradient-norm"})
    group = made.data["edit"]
    right = dataclasses.replace(group, labels=wrong_labels(model, group.inputs["pixel_values"], 0))
    outcome = METHOD.run(dataclasses.replace(made, data={**made.data, "edit": right}))
    assert outcome.log["status"] == "nothing to do"
    assert outcome.patch is not None
    assert outcome.patch.ops == ()
    assert next(m for m in outcome.measurements if m.name == "locality.random").summary(0).after == 1


def test_estimate_is_of_the_right_order(model: Any, tmp_path: Path) -> None:
    import time

    made = job(model, tmp_path, {"training": TRAINING})
    predicted = METHOD.estimate(made)
    start = time.perf_counter()
    METHOD.run(made)
    took = time.perf_counter() - start
    assert took / 30 < predicted.seconds < took * 30
    assert predicted.peak_bytes > 0
    assert "timed on this machine" in predicted.how
    assert "96 labels" in predicted.how
    assert "labels" not in METHOD.estimate(job(model, tmp_path, {"mask": "gradient-norm"})).how


def test_starter_is_a_recipe_that_this_method_takes() -> None:
    import yaml

    recipe = yaml.safe_load(STARTER)
    RecipeConfig.parse({key: value for key, value in recipe["method"].items() if key != "name"}, "method")
    stems = {role.rstrip("?*") for role in METHOD.roles}
    assert {role.partition(".")[0] for role in recipe["data"]} <= stems
    assert recipe["method"]["name"] == METHOD.name
