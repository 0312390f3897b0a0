"""Pictures reach a model as its training prepared them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from beit3.data.preprocess import Preprocess
from beit3.errors import ConfigError, DataMissingError
from beit3.model.presets import ModelConfig, model_config


@pytest.fixture
def base() -> ModelConfig:
    return model_config("beit3_base_patch16_224", attention="decoupled")


def picture(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(1)
    coarse = generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (224, 224), (500, 501), (90, 61), (1000, 230), (225, 224)])
def test_the_crop_of_classification_against_torchvision(size: tuple[int, int], base: ModelConfig) -> None:
    preprocess = Preprocess.of_task(base, "classification")
    peer = v2.Compose(
        [
            v2.Resize(224, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    image = picture(*size)
    actual = preprocess.normalize(preprocess(image)[None])[0]
    torch.testing.assert_close(actual, peer(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", ["retrieval", "vqa", "nlvr2", "captioning", "pretraining", None])
def test_all_other_tasks_squash_against_torchvision(task: str | None, base: ModelConfig) -> None:
    preprocess = Preprocess.of_task(base, task)
    peer = v2.Compose(
        [
            v2.Resize((224, 224), interpolation=v2.InterpolationMode.BICUBIC),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
    )
    image = picture(300, 200)
    torch.testing.assert_close(preprocess.normalize(preprocess(image)[None])[0], peer(image), atol=1e-6, rtol=1e-6)
    assert preprocess.max_text_length == 64


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64)])
def test_a_crop_that_is_no_square_keeps_the_shape_of_things(size: tuple[int, int]) -> None:
    """A disc in the middle of a picture stays a disc."""
    preprocess = Preprocess(image_size=(48, 96), resize="crop")
    width, height = size
    across, down = np.meshgrid(np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2)
    radius = min(size) / 8
    disc = Image.fromarray(((across**2 + down**2 < radius**2) * 255).astype(np.uint8)).convert("RGB")
    seen = preprocess(disc)[0] > 127
    assert seen.shape == (48, 96)
    rows, columns = seen.any(1).sum().item(), seen.any(0).sum().item()
    assert abs(rows - columns) <= 2
    assert rows > 4


def test_it_is_written_and_read_back(tmp_path: Path, base: ModelConfig) -> None:
    for task in ("classification", "vqa"):
        preprocess = Preprocess.of_task(base, task)
        for name, content in preprocess.file().items():
            (tmp_path / name).write_bytes(content)
        assert Preprocess.read(tmp_path) == preprocess


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"image_size": 3}', "is damaged"),
        ('{"image_size": [8, 8], "resize": "stretch"}', "resize is squash or crop, not 'stretch'"),
        ('{"image_size": [8, 8], "std": [0, 1, 1]}', "std must be positive"),
        ('{"imagesize": [8, 8]}', "no field 'imagesize'; did you mean 'image_size'"),
    ],
)
def test_damage_is_explained(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocess.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Preprocess.read(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"preprocess\.json does not exist: use load_model"):
        Preprocess.read(tmp_path)
