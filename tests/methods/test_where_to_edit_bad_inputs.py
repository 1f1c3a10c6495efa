"""Section "bad inputs" of the method: every situation gets the answer that was asked for."""

import copy
import warnings
from typing import Any

import pytest
import torch
from edit_models import CLASSES, pictures, same_state, small_vit, state, wrong_labels
from transformers import AlbertConfig, AlbertForSequenceClassification, MixtralConfig, MixtralForCausalLM

from trocar.anatomy import tiny_inputs, tiny_model
from trocar.core.errors import ConfigError, DataError, EditError, ScoresError, TrocarError, UnknownFamilyError, UnsupportedModelError
from trocar.edit.where_to_edit import EditConfig, HypernetworkConfig, LabelConfig, Place, edit, edit_many, predict_masks
from trocar.edit.where_to_edit.baselines import fine_tune
from trocar.edit.where_to_edit.hypernetwork import Made, MaskHypernetwork, made_for
from trocar.edit.where_to_edit.training import train_mask_hypernetwork
from trocar.locate import How, Scores


@pytest.fixture(scope="module")
def model() -> Any:
    return small_vit(torch.float32)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return pictures(4, dtype=torch.float32)


@pytest.fixture(scope="module")
def labels(model: Any, images: torch.Tensor) -> torch.Tensor:
    return wrong_labels(model, images)


def network_for(model: Any, **report: Any) -> MaskHypernetwork:
    return MaskHypernetwork(Made(depth=1, heads=3, report=report, **made_for(Place.of(model)))).eval()


@pytest.mark.parametrize("bad", [CLASSES, -1, 10**6])
def test_label_that_is_no_class(model: Any, images: torch.Tensor, bad: int) -> None:
    with pytest.raises(DataError, match=rf"Label {bad} is not a class.*0 to {CLASSES - 1}"):
        edit(model, images[:1], bad)


@pytest.mark.parametrize("bad", [torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1 + 2j])])
def test_label_that_is_no_integer(model: Any, images: torch.Tensor, bad: torch.Tensor) -> None:
    with pytest.raises(DataError, match="not class indices"):
        edit(model, images[:1], bad)


def test_label_that_is_the_prediction(model: Any, images: torch.Tensor) -> None:
    result = edit(model, images[:1], wrong_labels(model, images[:1], 0))
    assert result.log["status"] == "nothing to do"
    assert "force=True" in result.log["reason"]
    assert result.log["ce"] > 0
    assert result.log["margin"] > 0


def test_wrong_numbers_of_labels_and_groups(model: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(DataError, match="4 images, but labels of shape"):
        edit_many(model, images, labels[:3])
    with pytest.raises(DataError, match="members"):
        edit_many(model, images, labels, groups=[[0, 1], [2]])
    with pytest.raises(DataError, match="names row 9"):
        edit_many(model, images, labels, groups=[[0, 9]])
    with pytest.raises(DataError, match="rows"):
        edit_many(model, images[:0], labels[:0])


def test_blocks_out_of_range(images: torch.Tensor) -> None:
    shallow = small_vit(torch.float32, num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"has 2 blocks, 3 were to be edited.*1 to 2"):
        edit(shallow, images[:1], 0)
    assert Place.of(shallow, blocks=2).first == 0
    with pytest.raises(ConfigError, match=r"first_block 2 is out of range.*0 to 1"):
        Place.of(small_vit(), first=2)
    with pytest.raises(ConfigError, match="out of range"):
        Place.of(small_vit(), first=-1)
    depths = {12: 7, 6: 3, 24: 14, 4: 1, 3: 0}
    assert {n: Place.of(small_vit(num_hidden_layers=n)).first for n in depths} == depths


def test_hypernetwork_of_another_model(model: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
    network = network_for(model, better_than_constant=True)
    for other in (small_vit(torch.float32, intermediate_size=48), small_vit(torch.float32, num_hidden_layers=5)):
        with pytest.raises(EditError, match="of another model or place"):
            edit(other, images[:1], labels[:1], network)
    with pytest.raises(EditError, match="of another model or place: first_block was 1 and is 0"):
        edit(model, images[:1], labels[:1], network, EditConfig(first_block=0))
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.classifier.bias.add_(0.1)
    with pytest.warns(UserWarning, match="edited or tuned since"):
        edit(tuned, images[:1], labels[:1], network, EditConfig(steps=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit(model, images[:1], labels[:1], network, EditConfig(steps=1))
        assert predict_masks(model, images, network).shape == (4, 6, 40)


def test_hypernetwork_that_is_no_better_than_the_constant_mask(model: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
    network = network_for(model, better_than_constant=False, held_out=0.5, constant=0.4)
    with pytest.warns(UserWarning, match="No better than the constant mask.*constant or gradient-norm"):
        result = edit(model, images[:1], labels[:1], network, EditConfig(lr=1e-3, stop_ce=0.5))
    assert result.mask is not None
    assert "learned" not in result.mask.how.method
    assert "No better" in result.log["warnings"][0]


def test_training_says_when_nothing_was_learned(images: torch.Tensor) -> None:
    own = small_vit(torch.float32)
    config = HypernetworkConfig(pairs=8, epochs=1, lr=1e-9, chunk=8)
    with pytest.warns(UserWarning, match="No better than the constant mask"):
        network = train_mask_hypernetwork(own, images, config)
    assert not network.learned


@pytest.mark.parametrize(("weight", "alpha", "what"), [(1e6, 1e-3, "collapsed"), (0.0, 0.05, "saturated")])
def test_collapsed_labels_are_never_trained_on(model: Any, images: torch.Tensor, weight: float, alpha: float, what: str) -> None:
    labels = LabelConfig(kind="ref", alpha=alpha, sparsity_weight=weight, outer_steps=6)
    with pytest.raises(EditError, match=rf"{what}.*alpha.*sparsity_weight.*1e-1"):
        train_mask_hypernetwork(model, images, HypernetworkConfig(pairs=8, chunk=8, labels=labels))


def test_step_limit(model: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
    result = edit(model, images[:1], labels[:1], "random", EditConfig(lr=1e-7, steps=3))
    assert result.log["status"] == "not converged"
    assert result.log["steps"] == 3
    assert not result.log["right"]
    assert "larger lr or keep" in result.log["hint"]


def test_divergence_restores_the_weights(model: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
    before = state(model)
    edits = edit_many(model, images, labels, "dense", EditConfig(lr=1e38, stop_ce=0.0))
    assert all(log["status"] == "diverged" and "smaller lr" in log["hint"] for log in edits.logs)
    assert all(not edits.changes[number] for number in range(4))
    assert edits[0].patch.ops == ()
    assert same_state(before, state(model))


def test_one_image_with_two_labels(model: Any, images: torch.Tensor) -> None:
    twice = torch.cat([images[:1], images[:1]])
    with pytest.raises(DataError, match="Rows 0 and 1 are the same image with the labels 1 and 2"):
        edit(model, twice, [1, 2])
    with pytest.warns(UserWarning, match="different labels"):
        edit(model, images[:2], [1, 2], config=EditConfig(steps=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit(model, twice, [1, 1], config=EditConfig(steps=1))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda x: x[:, :1], "own image processor"),  # grey
        (lambda x: x[..., :16], "own image processor"),  # wrong size
        (lambda x: x[0], "own image processor"),  # no batch
        (lambda x: (x * 50 + 128).to(torch.uint8), "not normalised floats"),
        (lambda x: x * float("nan"), "NaN or infinite"),
    ],
)
def test_images_that_do_not_fit(model: Any, images: torch.Tensor, make: Any, what: str) -> None:
    with pytest.raises(DataError, match=what):
        edit(model, make(images[:1]), 0)


def test_masks_that_do_not_fit(model: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="'learnt' is not a kind of mask"):
        edit(model, images[:1], labels[:1], "learnt")
    for kind in ("learned", "constant"):
        with pytest.raises(ConfigError, match=f"A {kind} mask needs a trained hypernetwork"):
            edit(model, images[:1], labels[:1], kind)
    with pytest.raises(DataError, match="mask has shape"):
        edit(model, images[:1], labels[:1], torch.ones(5, 40))
    with pytest.raises(ScoresError, match="NaN"):
        edit(model, images[:1], labels[:1], torch.full((6, 40), float("nan")))
    for scores in (
        Scores("neuron", "", {"L1.N": torch.ones(40).numpy()}, How("test")),
        Scores("channel", "", {"L1.mlp.up.out": torch.ones(40).numpy()}, How("test")),
    ):
        with pytest.raises(ScoresError, match="needs 40 channels"):
            edit(model, images[:1], labels[:1], scores)
    with pytest.raises(ConfigError, match="no ordinary images"):
        edit(model, images[:1], labels[:1], config=EditConfig(locality_weight=1.0))
    with pytest.raises(ConfigError, match="full, classifier or L0 to L3"):
        fine_tune(model, images[:1], labels[:1], "L9")


def test_models_that_cannot_be_edited(images: torch.Tensor) -> None:
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    albert = AlbertForSequenceClassification(
        AlbertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, vocab_size=30, embedding_size=8)
    )
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, vocab_size=30
        )
    )
    for model in (albert, mixtral, torch.nn.Linear(2, 2)):
        with pytest.raises((UnknownFamilyError, UnsupportedModelError)):
            edit(model, inputs, 0)

    shared = small_vit(torch.float32)
    layers = Place.of(shared).tower.blocks
    layers[2].mlp.fc1.weight = layers[3].mlp.fc1.weight  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModelError, match=r"shares its weight|is shared"):
        edit(shared, images[:1], 0)

    quantised = torch.ao.quantization.quantize_dynamic(small_vit(torch.float32), {torch.nn.Linear}, torch.qint8)
    with pytest.raises(TrocarError):
        edit(quantised, images[:1], 0)

    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(small_vit(torch.float32), LoraConfig(r=2, target_modules=["fc1", "fc2"]))
    with pytest.raises(UnsupportedModelError, match="Merge or unload"):
        edit(adapted, images[:1], 0)

    headless = tiny_model("vit", task="base")
    with pytest.raises(DataError, match="returns no logits"):
        edit(headless, tiny_inputs(headless, rows=1), 0)


def test_safe_wrappers_are_looked_through(model: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
    plain = edit(model, images[:1], labels[:1], config=EditConfig(lr=1e-3, stop_ce=0.3))
    wrapped = edit(torch.nn.DataParallel(model), images[:1], labels[:1], config=EditConfig(lr=1e-3, stop_ce=0.3))
    assert plain.patch == wrapped.patch
    with wrapped.patch.applied(model), torch.no_grad():
        assert int(model(images[:1]).logits.argmax()) == int(labels[0])


def test_only_images_can_train_a_hypernetwork() -> None:
    with pytest.raises(DataError, match="no patch_size"):
        train_mask_hypernetwork(tiny_model("gpt2"), torch.zeros(4, 3, 8, 8))
    with pytest.raises(DataError, match="at least two images"):
        train_mask_hypernetwork(small_vit(torch.float32), torch.zeros(1, 3, 32, 32))
