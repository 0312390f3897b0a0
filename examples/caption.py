"""Describe pictures in a sentence each.

    python examples/caption.py MODEL PICTURE [PICTURE ...]

MODEL: a captioning model, such as the released beit3_base_patch16_480_coco_captioning.pth with beit3.spm beside it.
"""

import sys

import beit3


def main(source: str, *pictures: str) -> None:
    """Print a caption for each picture."""
    predictor = beit3.load(source)
    for picture, caption in zip(pictures, predictor.caption(pictures), strict=True):
        print(f"{picture}: {caption}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
