"""Crops, resizing and normalization."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from beit3.data.transforms import CropConfig, EvalResize, RandomCrop, normalize, to_tensor
from beit3.errors import ConfigError


def gradient(size: int = 64) -> Image.Image:
    """Draw a picture whose red tells the column and whose green tells the row."""
    row, column = np.mgrid[0:size, 0:size] * (255 // size)
    return Image.fromarray(np.stack([column, row, np.full_like(row, 128)], axis=2).astype(np.uint8))


def test_both_views_show_one_crop_with_one_flip_and_one_colour() -> None:
    torch.manual_seed(0)
    crop = RandomCrop(CropConfig(size=32, tokenizer_size=16, color_jitter=0.4, grayscale=0.2))
    flips = 0
    for _ in range(40):
        image, second, _ = crop(gradient())
        assert image.shape == (3, 32, 32)
        assert second is not None
        assert second.shape == (3, 16, 16)
        shrunk = torch.nn.functional.avg_pool2d(image.float(), 2)
        assert (shrunk - second.float())[:, 1:-1, 1:-1].abs().max() < 8
        flips += int(image[0, 0, 0] > image[0, 0, -1])
    assert 8 < flips < 32


@pytest.mark.parametrize("tokenizer_size", [None, 32])
def test_equal_sizes_share_one_tensor(tokenizer_size: int | None) -> None:
    views = RandomCrop(CropConfig(size=32, tokenizer_size=tokenizer_size))(gradient())
    assert views.tokenizer_image is None
    assert views.image.dtype == torch.uint8
    assert views.image.is_contiguous()


def test_crops_repeat_with_torchs_generator_only() -> None:
    crop = RandomCrop(CropConfig(size=24, color_jitter=0.4))
    torch.manual_seed(1)
    first = [crop(gradient()).image for _ in range(3)]
    np.random.seed(9)
    torch.manual_seed(1)
    assert all(torch.equal(crop(gradient()).image, view) for view in first)
    assert not torch.equal(first[0], first[1])


def test_no_variation_gives_the_resized_picture() -> None:
    crop = RandomCrop(CropConfig(size=20, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0))
    assert torch.equal(crop(gradient()).image, EvalResize(20)(gradient()))


def test_the_colour_map_equals_the_three_steps_of_torchvision() -> None:
    image = gradient()
    crop = RandomCrop(CropConfig(size=64, color_jitter=0.5))
    for brightness, contrast, saturation in [(0.9, 0.8, 0.7), (0.6, 1.2, 0.5), (1.1, 0.7, 1.3)]:
        draws = [(factor - 1) + 0.5 for factor in (brightness, contrast, saturation)]
        matrix = crop._color_matrix(image, draws, gray=False)
        steps = functional.adjust_brightness(image, brightness)
        steps = functional.adjust_saturation(functional.adjust_contrast(steps, contrast), saturation)
        difference = np.abs(np.asarray(image.convert("RGB", matrix)).astype(int) - np.asarray(steps).astype(int))
        assert np.quantile(difference, 0.95) <= 3


def test_grey_crops_have_no_colour() -> None:
    view = RandomCrop(CropConfig(size=16, grayscale=1.0))(gradient()).image.int()
    assert (view[0] - view[1]).abs().max() <= 1
    assert (view[1] - view[2]).abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (4, 4000), (5, 5)])
def test_odd_shapes_still_give_a_crop(size: tuple[int, int]) -> None:
    view = RandomCrop(CropConfig(size=16, tokenizer_size=8))(Image.new("RGB", size, "red"))
    assert view.image.shape == (3, 16, 16)


def test_evaluation_keeps_the_whole_picture_at_any_shape() -> None:
    assert EvalResize((20, 30))(gradient()).shape == (3, 20, 30)
    assert torch.equal(EvalResize(64)(gradient()), to_tensor(gradient()))
    wide = EvalResize(32)(Image.new("RGB", (100, 10), (1, 2, 3)))
    assert wide.shape == (3, 32, 32)
    assert wide[:, 0, 0].tolist() == [1, 2, 3]


def test_a_tall_picture_is_squashed_to_the_same_with_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tall = gradient().resize((8, 4000))
    expected = EvalResize((24, 32))(tall)
    monkeypatch.setattr("beit3.data.resize._MOST_BETWEEN", 1000)
    assert (EvalResize((24, 32))(tall).int() - expected.int()).abs().max() <= 1


def test_normalize_spans_minus_one_to_one() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(3).view(2, 3, 1, 1)
    for pixels in (images, images.float()):
        out = normalize(pixels)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out[:, 0, 0, 0], torch.tensor([-1.0, 1.0]), rtol=0, atol=1e-6)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": (0.5, 0.2)}, {"scale": (NAN, 1.0)}, {"scale": (0.1, NAN)},
        {"ratio": (NAN, 1.0)}, {"ratio": (1.0, NAN)}, {"ratio": (0.5, INF)},
        {"flip": 2.0}, {"flip": NAN}, {"grayscale": NAN}, {"color_jitter": -1.0}, {"color_jitter": NAN}, {"size": 0},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        CropConfig(**{"size": 8, **wrong})  # type: ignore[arg-type]
