"""Pictures with classes, and the central crop of published protocols."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from beit3.data.example_loader import evaluation_batches
from beit3.data.labelled_pictures import CentralCrop, LabelledPictures
from beit3.data.preprocess import Preprocess
from beit3.errors import ConfigError
from tests.conftest import Workspace


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with edges, so that a shift by a pixel shows."""
    rows = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(rows).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (640, 333), (100, 81)])
def test_the_central_crop_is_torchvisions_resize_and_crop(size: tuple[int, int]) -> None:
    """224 of 256 pixels, as in MAE's linear probe and big_vision's few-shot evaluation."""
    expected = v2.Compose(
        [v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()]
    )(photo(*size))
    found = CentralCrop(Preprocess(image_size=(224, 224)), 0.875)(photo(*size))
    assert torch.equal(found, expected)


def test_a_share_of_one_keeps_the_shorter_side() -> None:
    preprocess = Preprocess(image_size=(48, 32), resize="crop")
    assert torch.equal(CentralCrop(preprocess, 1.0)(photo(90, 70)), preprocess(photo(90, 70)))
    with pytest.raises(ConfigError, match=r"must lie in 0\.\.1, not 1\.2"):
        CentralCrop(preprocess, 1.2)


def test_pictures_come_in_the_order_of_their_index_with_their_classes(workspace: Workspace, tmp_path: Path) -> None:
    view = Preprocess(image_size=(16, 24))
    index = workspace.data / "groups.test.jsonl"
    pictures = LabelledPictures([index, index], view)
    assert len(pictures) == 24
    batches = list(evaluation_batches(pictures, pictures.collate, batch_size=5))
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.tolist() == [number % 3 for number in range(12)] * 2
    images = torch.cat([batch.images for batch in batches])
    assert images.dtype == torch.uint8
    assert images.shape == (24, 3, 16, 24)
    assert torch.equal(images[15], view(Image.open(workspace.data / "drawings/03.png").convert("RGB")))
    assert len(LabelledPictures(index, view, num_classes=2)) == 8
