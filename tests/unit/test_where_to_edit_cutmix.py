import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from trocar.core.errors import ConfigError, DataError
from trocar.edit.where_to_edit.config import CutMixConfig
from trocar.edit.where_to_edit.cutmix import cutmix_pairs, patch_size, random_resized_crop, rectangle, sides

WHOLE = CutMixConfig(crop=1)


def constant_images(count: int, height: int, width: int) -> torch.Tensor:
    """Image i is i + 1 everywhere, so that a pixel says where it comes from."""
    return (torch.arange(count).float() + 1)[:, None, None, None].expand(count, 3, height, width).clone()


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(2, 7), columns=st.integers(2, 7), patch=st.integers(1, 4), images=st.integers(2, 5), seed=st.integers(0, 1000))
def test_rectangle_comes_from_another_image_and_is_patch_aligned(rows: int, columns: int, patch: int, images: int, seed: int) -> None:
    pool = constant_images(images, rows * patch, columns * patch)
    clean, mixed = cutmix_pairs(pool, range(2 * images), (patch, patch), WHOLE, seed)
    for pair in range(2 * images):
        own = clean[pair, 0, 0, 0]
        pasted = mixed[pair] != clean[pair]
        assert torch.equal(mixed[pair][~pasted], clean[pair][~pasted])
        assert pasted.any()
        values = mixed[pair][pasted].unique()
        assert len(values) == 1
        assert values[0] != own  # the donor is another image
        height, width = pasted[0].any(1).sum(), pasted[0].any(0).sum()
        assert pasted.sum() == 3 * height * width  # a full rectangle in every channel
        top, left = pasted[0].any(1).nonzero()[0], pasted[0].any(0).nonzero()[0]
        assert all(int(number) % patch == 0 for number in (height, width, top, left))
        for side, grid in ((height, rows), (width, columns)):
            smallest, largest = sides(grid, WHOLE.low, WHOLE.high)
            assert smallest <= int(side) // patch <= largest <= grid - 1


def test_inside_equals_the_donor_at_the_same_place() -> None:
    pool = torch.randn(2, 3, 32, 32)
    clean, mixed = cutmix_pairs(pool, range(20), (8, 8), WHOLE, 0)
    for pair in range(20):
        donor = pool[1] if torch.equal(clean[pair], pool[0]) else pool[0]
        assert torch.equal(torch.where(mixed[pair] == clean[pair], clean[pair], donor), mixed[pair])


def test_paper_sides() -> None:
    assert sides(14, 0.21, 0.57) == (3, 8)
    assert sides(4, 0.21, 0.57) == (1, 2)
    assert sides(2, 0.21, 0.57) == (1, 1)


def test_every_position_is_reached_equally_often() -> None:
    config = CutMixConfig(low=0.5, high=0.5)
    stream = torch.Generator().manual_seed(0)
    counts = torch.zeros(7, 7)
    for _ in range(10_000):
        top, left, height, width = rectangle((12, 12), config, stream)
        assert (height, width) == (6, 6)
        counts[top, left] += 1
    assert counts.min() > 0  # the last row and column of places too
    assert chisquare(counts.flatten().numpy()).pvalue > 1e-3


def test_pairs_do_not_depend_on_chunks_and_cover_all_images() -> None:
    pool = torch.randn(7, 3, 16, 16)
    whole = cutmix_pairs(pool, range(14), (4, 4), CutMixConfig(), 5)
    parts = [cutmix_pairs(pool, pairs, (4, 4), CutMixConfig(), 5) for pairs in (range(3), range(3, 9), range(9, 14))]
    for side in (0, 1):
        assert torch.equal(whole[side], torch.cat([part[side] for part in parts]))
    clean, _ = cutmix_pairs(constant_images(7, 16, 16), range(14), (4, 4), WHOLE, 5)
    assert sorted(clean[:7, 0, 0, 0].tolist()) == sorted(clean[7:, 0, 0, 0].tolist()) == [1, 2, 3, 4, 5, 6, 7]
    assert not torch.equal(whole[1], cutmix_pairs(pool, range(14), (4, 4), CutMixConfig(), 6)[1])


def test_random_resized_crop_keeps_size_and_type_and_crops() -> None:
    image = torch.arange(32.0).expand(3, 32, 32).clone()
    seen = [random_resized_crop(image, 0.25, torch.Generator().manual_seed(seed)) for seed in range(30)]
    assert all(crop.shape == image.shape and crop.dtype == image.dtype for crop in seen)
    spans = [float(crop[0, 0].max() - crop[0, 0].min()) for crop in seen]
    assert min(spans) > 32 * 0.25**0.5 * 0.6
    assert min(spans) < 25
    assert random_resized_crop(image, 1, torch.Generator()) is image


def test_errors() -> None:
    with pytest.raises(DataError, match="at least two images"):
        cutmix_pairs(torch.zeros(1, 3, 8, 8), range(1), (4, 4), WHOLE, 0)
    with pytest.raises(DataError, match="needs at least 2"):
        cutmix_pairs(torch.zeros(2, 3, 8, 8), range(1), (8, 8), WHOLE, 0)
    with pytest.raises(ConfigError, match="must not exceed"):
        CutMixConfig.parse({"low": 0.6, "high": 0.3})
    with pytest.raises(DataError, match="no patch_size"):
        patch_size(torch.nn.Linear(1, 1))
