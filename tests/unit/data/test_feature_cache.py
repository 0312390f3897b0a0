"""Teacher features kept on disk: what they are, and when they are computed again."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.data.emoji import load_cells
from beit3.data.feature_cache import FeatureCache, build_feature_cache
from beit3.data.shards import Sample
from beit3.data.transforms import CropConfig, RandomCrop
from beit3.errors import ConfigError
from beit3.tokenizer.teachers import Teacher

CROP = CropConfig(size=16, scale=(0.4, 1.0))


class MeanColor(Teacher):
    """Averages over patches of 4 pixels, and counts the pictures it has seen."""

    def __init__(self, image_size: int = 16) -> None:
        super().__init__(image_size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 3)
        self.seen = 0

    def feature_map(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return F.avg_pool2d(images, 4)


def samples(count: int = 11) -> list[Sample]:
    """Pictures, the fourth of which cannot be decoded."""
    found = []
    for number, cell in enumerate(load_cells("google")[:count]):
        content = io.BytesIO()
        cell.image.save(content, "PNG")
        found.append(Sample(str(number), b"no picture" if number == 3 else content.getvalue()))
    return found


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., FeatureCache]:
    def make(teacher: Teacher, **changes: Any) -> FeatureCache:
        settings: dict[str, Any] = {"teacher_settings": {"kind": "mean"}, "crop": CROP, "grid": (4, 4), "seed": 0}
        settings |= {"crops_per_picture": 2, "source": "images", "data": {"a.tar": {"bytes": 1}}, **changes}
        return build_feature_cache(tmp_path, samples(), teacher=teacher, device=torch.device("cpu"), **settings)

    return make


def test_features_are_the_teachers_of_the_crops_beside_them(build: Callable[..., FeatureCache]) -> None:
    cache = build(MeanColor())
    assert len(cache) == 20
    assert cache.settings["skipped"] == {"unreadable_image": 1}
    for row in range(20):
        crop, features = cache.load(row)
        assert (crop.shape, crop.dtype, features.dtype) == ((3, 16, 16), torch.uint8, torch.float16)
        expected = F.avg_pool2d(crop.float() / 255, 4).flatten(1).T
        torch.testing.assert_close(features.float(), expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(cache.load(0)[0], cache.load(1)[0]), "two crops of one picture differ"


def test_a_crop_can_be_drawn_again_from_its_seed(build: Callable[..., FeatureCache]) -> None:
    cache = build(MeanColor())
    picture = load_cells("google")[1].image
    torch.manual_seed(cache.settings["crop_seeds"][2])
    assert torch.equal(RandomCrop(CROP)(picture).image, cache.load(2)[0])


def test_the_teacher_sees_the_crop_at_its_own_size(build: Callable[..., FeatureCache]) -> None:
    sizes: list[int] = []

    class Large(MeanColor):
        def patch_features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
            sizes.append(images.shape[-1])
            return super().patch_features(images, grid)

    cache = build(Large(32), crop=CropConfig(size=16, tokenizer_size=32), grid=(8, 8))
    assert set(sizes) == {32}
    assert cache.load(0)[0].shape == (3, 16, 16)
    assert cache.load(0)[1].shape == (64, 3)


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({}, False),
        ({"teacher_settings": {"kind": "other"}}, True),
        ({"crop": CropConfig(size=16, scale=(0.5, 1.0))}, True),
        ({"grid": (2, 2)}, True),
        ({"seed": 1}, True),
        ({"crops_per_picture": 1}, True),
        ({"source": "photos"}, True),
        ({"data": {"a.tar": {"bytes": 2}}}, True),
    ],
)
def test_features_are_computed_again_exactly_when_something_differs(
    build: Callable[..., FeatureCache], changes: dict[str, Any], again: bool
) -> None:
    build(MeanColor())
    teacher = MeanColor()
    build(teacher, **changes)
    assert bool(teacher.seen) == again


def test_random_numbers_of_the_run_are_left_alone(build: Callable[..., FeatureCache]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build(MeanColor())
    assert torch.equal(torch.rand(1), expected)


def test_pictures_that_are_all_unreadable_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no readable picture in images"):
        build_feature_cache(
            tmp_path,
            samples()[3:4],
            teacher=MeanColor(),
            teacher_settings={},
            crop=CROP,
            grid=(4, 4),
            crops_per_picture=1,
            seed=0,
            source="images",
            data={},
            device=torch.device("cpu"),
        )
