"""Several views of one picture: one view is plain detection, a mirror mirrors, two views merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from beit3.config import replace
from beit3.data.preprocess import Preprocess
from beit3.data.whole_pictures import detect_image
from beit3.errors import ConfigError
from beit3.model.detection import DetectionModel, Detections, DetectionSettings
from beit3.model.multi_scale import View, detect_views
from beit3.model.presets import ModelConfig

PICTURE = (20, 30)
SETTINGS = DetectionSettings(score_threshold=0.2, max_detections=40)


@pytest.fixture
def model(tiny: ModelConfig) -> DetectionModel:
    """Its boxes move and its classes differ."""
    torch.manual_seed(1)
    made = DetectionModel(tiny, 3, stages=2, pyramid_width=8, head_width=16).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("bbox_pred.weight", "cls_score.weight")):
                parameter.normal_(std=0.2)
    return made


def view(picture: Tensor, scale: float, flipped: bool = False) -> View:
    """A picture (3, h, w) scaled, mirrored and put on a canvas with 4 and 8 pixels to spare at least."""
    height, width = round(picture.shape[1] * scale), round(picture.shape[2] * scale)
    pixels = F.interpolate(picture[None], size=(height, width), mode="bilinear")[0]
    canvas = torch.zeros(3, height // 4 * 4 + 8, width // 4 * 4 + 12)
    canvas[:, :height, :width] = pixels.flip(2) if flipped else pixels
    return View(canvas, (height, width), (height / picture.shape[1], width / picture.shape[2]), flipped)


def same(found: Detections, wanted: Detections) -> None:
    assert len(found) == len(wanted) > 5
    assert found.labels.tolist() == wanted.labels.tolist()
    for one, other in ((found.scores, wanted.scores), (found.boxes, wanted.boxes), (found.masks, wanted.masks)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_one_view_is_plain_detection_brought_back_to_the_picture(
    scale: float, soft: bool, model: DetectionModel
) -> None:
    settings = DetectionSettings(score_threshold=0.2, max_detections=40, soft_nms=soft)
    seen = view(torch.randn(3, *PICTURE), scale)
    plain = model.detect(seen.pixels[None], torch.tensor([seen.size]), settings)[0]
    down, across = seen.scale
    boxes = plain.boxes / torch.tensor([across, down, across, down])
    found = detect_views(model, [seen], PICTURE, settings)
    same(found, Detections(boxes, plain.scores, plain.labels, plain.masks))
    assert found.boxes[:, 2].max() <= PICTURE[1]
    assert found.boxes[:, 3].max() <= PICTURE[0]


def test_a_flipped_view_of_a_mirrored_picture_gives_the_mirrored_detections(model: DetectionModel) -> None:
    picture = torch.randn(3, *PICTURE)
    plain = detect_views(model, [view(picture, 1.5)], PICTURE, SETTINGS)
    left, top, right, bottom = plain.boxes.unbind(1)
    boxes = torch.stack([PICTURE[1] - right, top, PICTURE[1] - left, bottom], dim=1)
    mirrored = Detections(boxes, plain.scores, plain.labels, plain.masks.flip(2))
    same(detect_views(model, [view(picture.flip(2), 1.5, flipped=True)], PICTURE, SETTINGS), mirrored)


def test_the_same_view_twice_changes_nothing(model: DetectionModel) -> None:
    seen = view(torch.randn(3, *PICTURE), 1.0)
    same(detect_views(model, [seen, seen], PICTURE, SETTINGS), detect_views(model, [seen], PICTURE, SETTINGS))


def test_boxes_of_all_views_compete_and_masks_are_their_mean(model: DetectionModel) -> None:
    picture = torch.randn(3, *PICTURE)
    views = [view(picture, 1.0), view(picture, 1.6, flipped=True)]
    alone = [detect_views(model, [one], PICTURE, SETTINGS) for one in views]
    found = detect_views(model, views, PICTURE, SETTINGS)
    assert found.scores[0] == max(one.scores[0] for one in alone)
    origins = [(torch.cdist(found.boxes, one.boxes).amin(1) < 1e-3).sum().item() for one in alone]
    assert min(origins) > 0
    masks = torch.zeros(len(found), 28, 28)
    for one in views:
        down, across = one.scale
        boxes = found.boxes * torch.tensor([across, down, across, down])
        if one.flipped:
            boxes = torch.stack([one.size[1] - boxes[:, 2], boxes[:, 1], one.size[1] - boxes[:, 0], boxes[:, 3]], 1)
        with torch.no_grad():
            mask = model.masks(model.features(one.pixels[None]), [boxes], [found.labels], [one.size])[0]
        masks += (mask.flip(2) if one.flipped else mask) / 2
    torch.testing.assert_close(found.masks, masks)


def test_no_view_is_refused(model: DetectionModel) -> None:
    with pytest.raises(ValueError, match="at least one view"):
        detect_views(model, [], PICTURE)


PREPROCESS = Preprocess(image_size=(24, 36), resize="pad")


def photo(height: int, width: int) -> Image.Image:
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy())


@pytest.mark.parametrize("size", [(48, 60), (7, 90), (24, 36)])
def test_a_picture_is_detected_in_its_own_pixels(size: tuple[int, int], model: DetectionModel) -> None:
    picture = photo(*size)
    placed = PREPROCESS.placed(size)
    plain = model.detect(PREPROCESS.normalize(PREPROCESS(picture)[None]), torch.tensor([placed]), SETTINGS)[0]
    down, across = placed[0] / size[0], placed[1] / size[1]
    boxes = plain.boxes / torch.tensor([across, down, across, down])
    found = detect_image(model, PREPROCESS, picture, SETTINGS)
    same(found, Detections(boxes, plain.scores, plain.labels, plain.masks))


def test_a_mirrored_look_mirrors_the_picture_and_not_what_fills_the_canvas(model: DetectionModel) -> None:
    picture = photo(50, 40)
    mirrored = Image.fromarray(np.asarray(picture)[:, ::-1].copy())
    one = detect_image(model, PREPROCESS, picture, replace(SETTINGS, flip=True))
    other = detect_image(model, PREPROCESS, mirrored, replace(SETTINGS, flip=True))
    left, top, right, bottom = other.boxes.unbind(1)
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.boxes[0], torch.stack([40 - right, top, 40 - left, bottom], 1)[0], atol=0.1, rtol=0)


def test_scales_round_to_whole_patches(model: DetectionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    features = model.features

    def noted(images: Tensor) -> dict[str, Tensor]:
        seen.append(tuple(images.shape[2:]))
        return features(images)

    monkeypatch.setattr(model, "features", noted)
    detect_image(model, PREPROCESS, photo(30, 30), replace(SETTINGS, scales=(0.1, 1.0, 1.3), flip=True))
    assert seen == [(4, 4), (24, 36), (32, 48)] * 2


def test_cut_pictures_and_odd_scales_are_refused(model: DetectionModel) -> None:
    with pytest.raises(ConfigError, match="scales must be one or more within"):
        DetectionSettings(scales=())
    with pytest.raises(ConfigError, match=r"scales must be one or more within 0.1..4, not \(9,\)"):
        DetectionSettings(scales=(9,))
    with pytest.raises(ConfigError, match=r"detection.scales must be values, each a finite number, not \(1, 'x'\)"):
        DetectionSettings(scales=(1, "x"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be 'pad' or 'squash', not 'slide'"):
        detect_image(model, Preprocess(image_size=(24, 36), resize="slide"), photo(9, 9))
