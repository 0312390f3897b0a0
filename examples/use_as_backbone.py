"""Use the image tower as a backbone: maps of several layers, as timm's `features_only` models give them.

    python examples/use_as_backbone.py MODEL PICTURE

A detector or a segmentation head reads `backbone.feature_info` and a list of maps (B, D, h, w). Here is no head at all:
the principal components of each place's features are shown as colours, which tells how a model divides a picture.
"""

import sys

import torch
from PIL import Image

import beit3
from beit3.data.images import open_image
from beit3.model.features import FeatureBackbone


def main(source: str, picture: str, out: str = "features.png") -> None:
    """Write a picture of the last layer's first three principal components."""
    predictor = beit3.load(source, "cpu", parts="vision")
    backbone = FeatureBackbone(predictor.model, out_indices=2)
    for place in backbone.feature_info.get_dicts():
        print(f"{place['module']}: {place['num_chs']} channels, one place for {place['reduction']} pixels")
    pixels = predictor.preprocess(open_image(picture))[None]
    with torch.inference_mode():
        maps = backbone(predictor.preprocess.normalize(pixels))
    places = maps[-1][0].flatten(1).T  # (h w, D)
    _, _, directions = torch.pca_lowrank(places, q=3)
    colours = (places - places.mean(0)) @ directions  # (h w, 3)
    colours = (colours - colours.amin(0)) / (colours.amax(0) - colours.amin(0))
    height, width = maps[-1].shape[2:]
    pixels = (colours.view(height, width, 3) * 255).byte().numpy()
    Image.fromarray(pixels).resize((width * 16, height * 16), Image.Resampling.NEAREST).save(out)
    print(f"{out}: written")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
