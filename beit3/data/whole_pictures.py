"""Whole pictures through detectors and segmenters: read in as many sizes as asked for, answered at their own size.

Shapes: H, W height and width of a picture in pixels.
"""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from beit3.config import require
from beit3.data.preprocess import Preprocess
from beit3.model.detection import DetectionModel, Detections, DetectionSettings
from beit3.model.multi_scale import View, detect_views
from beit3.model.segmentation import SegmentationModel
from beit3.model.sliding_window import SlidingConfig, segment_views


def canvases(preprocess: Preprocess, patch_size: int, settings: DetectionSettings) -> list[Preprocess]:
    """How a picture is prepared in each size that a detector looks at; sides are rounded to whole patches.

    Raises:
        ConfigError: `preprocess` cuts pictures.
    """
    whole = preprocess.resize in ("pad", "squash")
    require(
        whole, f"detection needs whole pictures: preprocess.resize must be 'pad' or 'squash', not '{preprocess.resize}'"
    )
    sizes = [
        [max(1, round(scale * side / patch_size)) * patch_size for side in preprocess.image_size]
        for scale in settings.scales
    ]
    return [preprocess.resized((height, width)) for height, width in sizes]


def view_on(canvas: Preprocess, pixels: Tensor, size: tuple[int, int]) -> View:
    """A picture of a size (H, W) that lies on a canvas, of which `pixels` are the normalised ones."""
    tall, wide = canvas.placed(size)
    return View(pixels, (tall, wide), (tall / size[0], wide / size[1]))


def detect_image(
    model: DetectionModel, preprocess: Preprocess, image: Image.Image, settings: DetectionSettings | None = None
) -> Detections:
    """Find the objects of an RGB picture of any size, in its own pixels.

    Args:
        model: in eval mode.
        preprocess: its image size is the canvas; it must leave pictures whole ("pad" or "squash").
        image: any size.
        settings: None: the default ones.

    Raises:
        ConfigError: pictures are cut.
    """
    settings = settings or DetectionSettings()
    weight, size, views = next(model.parameters()), (image.height, image.width), []
    for canvas in canvases(preprocess, model.model_config.patch_size, settings):
        pixels = canvas.normalize(canvas(image)[None].to(weight.device))[0].to(weight.dtype)
        views.append(view_on(canvas, pixels, size))
    views += [view.mirror() for view in views] if settings.flip else []
    return detect_views(model, views, size, settings)


def sizes_to_slide_over(preprocess: Preprocess, image: Image.Image, settings: SlidingConfig) -> list[Tensor]:
    """An RGB picture at every size that a window slides over, uint8 (3, h, w) each; mirror images come later."""
    height, width = preprocess.image_size
    sizes = [(max(1, round(scale * height)), max(1, round(scale * width))) for scale in settings.scales]
    return [preprocess.resized(size).whole(image) for size in sizes]


def segment_image(
    model: SegmentationModel, preprocess: Preprocess, image: Image.Image, settings: SlidingConfig | None = None
) -> Tensor:
    """Name the class of every pixel of an RGB picture: (H, W) int64 at its own size, on the model's device.

    Args:
        model: in eval mode.
        preprocess: its image size is the window.
        image: any size.
        settings: None: one size, windows that overlap by a third.
    """
    settings = settings or SlidingConfig()
    device = next(model.parameters()).device
    found = sizes_to_slide_over(preprocess, image, settings)
    views = [preprocess.normalize(view[None].to(device))[0] for view in found]
    return segment_views(model, views, (image.height, image.width), preprocess.image_size, settings)
