"""Pictures reach a model as its training prepared them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from beit3.data.preprocess import Preprocess, prepare_text
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
        (
            '{"image_size": [8, 8], "resize": "stretch"}',
            "resize must be 'squash' or 'crop' or 'pad' or 'slide', not 'stretch'",
        ),
        ('{"image_size": [8, 8], "std": [0, 1, 1]}', r"std must lie in 0\.001\.\.1"),
        ('{"image_size": [8]}', "image_size must be 2 values"),
        ('{"image_size": [8, 8.5]}', "image_size must be 2 values"),
        ('{"image_size": [true, 8]}', "image_size must be 2 values"),
        ('{"image_size": [8, -8]}', "sides must lie in"),
        ('{"image_size": [8, 8], "mean": [0.5, "x", 0.5]}', "mean must be 3 values"),
        ('{"image_size": [8, 8], "mean": [0.5, NaN, 0.5]}', "mean must be 3 values"),
        ('{"image_size": [8, 8], "mean": [0.5, 2, 0.5]}', r"mean must lie in 0\.\.1"),
        ('{"image_size": [8, 8], "std": [NaN, 1, 1]}', "std must be 3 values"),
        ('{"image_size": [8, 8], "std": [1, 1e999, 1]}', "std must be 3 values"),
        ('{"image_size": [8, 8], "std": [1, 1]}', "std must be 3 values"),
        ('{"image_size": [8, 8], "std": [1e-30, 1, 1]}', r"std must lie in 0\.001\.\.1"),
        ('{"image_size": [8, 8], "max_text_length": "64"}', "max_text_length must be a whole number"),
        ('{"image_size": [8, 8], "max_text_length": 1}', "max_text_length must be 0 or at least 2"),
        pytest.param("[" * 100_000, "is damaged", id="deep"),
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


def test_sizes_that_the_model_cannot_take_are_refused(base: ModelConfig) -> None:
    Preprocess(image_size=(224, 64), max_text_length=1022).check_fits(base)
    with pytest.raises(ConfigError, match=r"\(230, 224\) does not divide into the model's patches of 16"):
        Preprocess(image_size=(230, 224)).check_fits(base)
    with pytest.raises(ConfigError, match="max_text_length is 64000, but the model reads 1022 ids"):
        Preprocess(image_size=(224, 224), max_text_length=64000).check_fits(base)


@pytest.mark.parametrize("size", [(3000, 10), (10, 3000)])
def test_an_elongated_picture_is_cut_as_torchvision_does(size: tuple[int, int]) -> None:
    across = np.linspace(0, 60, max(size))[None].repeat(min(size), 0)
    values = (127 + 120 * np.sin(across)).astype(np.uint8)
    image = Image.fromarray(values if size[0] > size[1] else values.T).convert("RGB")
    peer = v2.Compose([v2.Resize(32, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(32), v2.PILToTensor()])
    cut = Preprocess(image_size=(32, 32), resize="crop")(image)
    assert (cut.int() - peer(image).int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(60_000, 4), (4, 60_000), (4, 3_000_000), (3_000_000, 4)])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad", "slide"])
def test_an_elongated_picture_fills_no_memory(
    resize: Literal["squash", "crop", "pad", "slide"], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow resizes rows first: between its two passes a picture is as wide as the result, as high as the source."""
    largest = 0
    whole = Image.Image.resize

    def watched(self: Image.Image, to: tuple[int, int], resample: int, box: Any = None) -> Image.Image:
        nonlocal largest
        rows = self.height if box is None else box[3] - box[1] + 8
        rows = 0 if to[0] == self.width and box is None else rows
        largest = max(largest, int(to[0] * rows), to[0] * to[1])
        return whole(self, to, resample, box)

    image = Image.new("RGB", size, (10, 20, 30))
    monkeypatch.setattr(Image.Image, "resize", watched)
    seen = Preprocess(image_size=(224, 224), resize=resize)(image)
    assert 0 < largest <= 100_000_000
    place = {"pad": (0, 0)}.get(resize, (100, 100))
    assert seen[:, *place].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("size", "placed"), [((30, 60), (20, 40)), ((60, 30), (20, 10)), ((20, 40), (20, 40)), ((1, 400), (1, 40))]
)
def test_a_padded_picture_stands_at_the_top_left_of_the_mean_colour(
    size: tuple[int, int], placed: tuple[int, int]
) -> None:
    preprocess = Preprocess(image_size=(20, 40), resize="pad", mean=(0.2, 0.5, 0.8))
    assert preprocess.placed(size) == placed
    seen = preprocess(Image.new("RGB", (size[1], size[0]), (255, 0, 0)))
    assert seen.shape == (3, 20, 40)
    inside = torch.zeros(20, 40, dtype=torch.bool)
    inside[: placed[0], : placed[1]] = True
    assert (torch.tensor([255, 0, 0]) == seen[:, inside].T).all()
    assert (torch.tensor([51, 128, 204]) == seen[:, ~inside].T).all()


@pytest.mark.parametrize(
    ("size", "placed"),
    [
        ((300, 400), (32, 43)),
        ((400, 300), (43, 32)),
        ((10, 10), (32, 32)),
        ((10, 100), (13, 128)),
        ((1, 999), (1, 128)),
    ],
)
def test_a_picture_to_slide_over_covers_the_window_but_is_four_windows_long_at_most(
    size: tuple[int, int], placed: tuple[int, int]
) -> None:
    preprocess = Preprocess(image_size=(32, 32), resize="slide")
    assert preprocess.placed(size) == placed
    assert preprocess.whole(Image.new("RGB", (size[1], size[0]))).shape == (3, *placed)
    assert preprocess(Image.new("RGB", (size[1], size[0]))).shape == (3, 32, 32)


def test_texts_are_cleaned_and_other_things_refused() -> None:
    assert prepare_text("  a \n cat\0 ") == "a cat"
    assert [prepare_text(text) for text in ("", "  ", "\0", "\ud800")] == [""] * 4
    for wrong in (None, 3, b"cat", ["cat"]):
        with pytest.raises(ConfigError, match=f"a text must be a str, not {type(wrong).__name__}"):
            prepare_text(wrong)
