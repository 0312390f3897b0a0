"""Embed a folder of pictures and find those nearest to a sentence.

    python examples/find_pictures.py MODEL FOLDER "a grinning cat"

MODEL: a retrieval model: a run's export, "hf-hub:organisation/name", or a released file such as
beit3_base_patch16_384_coco_retrieval.pth with beit3.spm beside it. For large folders `beit3 embed` and `beit3 search`
keep an index on disk.
"""

import sys
from pathlib import Path

import beit3


def main(source: str, folder: str, sentence: str) -> None:
    """Print the five nearest pictures."""
    pictures = sorted(
        path for path in Path(folder).rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    )
    predictor = beit3.load(source)
    vectors = predictor.embed_images(pictures)  # (n, D), unit length
    scores = vectors @ predictor.embed_texts([sentence])[0]  # (n,)
    best = scores.topk(min(5, len(pictures)))
    for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"{score:.3f}  {pictures[index]}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
