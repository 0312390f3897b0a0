"""What the quickstart measures: retrieval on three held-out parts, beside honest baselines.

Shapes: n pictures, m captions, D features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit3.data.emoji import TEST_PARTS, TRAIN_VENDORS, EmojiCell, load_cells
from beit3.metrics.retrieval import recall_at_k
from beit3.predict import Predictor

KS = (1, 5, 10)
PART_TITLES = {
    "test_vendor": "seen concepts, unseen vendor",
    "test_concept": "unseen concepts, seen vendors",
    "test_both": "unseen concepts, unseen vendor",
}


@dataclass(frozen=True)
class Recall:
    """Recall at 1, 5, 10 of one method on one part."""

    part: str
    candidates: int
    """Captions a picture is matched with."""
    image_to_text: dict[str, float] | None
    text_to_image: dict[str, float] | None
    """None where a method cannot answer."""


@dataclass(frozen=True)
class Part:
    """Pictures of one held-out part, and the captions they are matched with."""

    name: str
    images: list[Image.Image]
    captions: list[str]
    labels: Tensor
    """(n,) place in `captions` of each picture's own."""


def load_parts() -> list[Part]:
    """The three held-out parts, each with its own captions and with all of the corpus."""
    everything = [cell.caption for cell in load_cells(TRAIN_VENDORS[0])]
    parts = []
    for name, (vendors, heldout) in TEST_PARTS.items():
        cells = [cell for vendor in vendors for cell in load_cells(vendor, heldout=heldout)]
        own = list(dict.fromkeys(cell.caption for cell in cells))
        parts += [_part(name, cells, own), _part(name, cells, list(dict.fromkeys(everything)))]
    return parts


def _part(name: str, cells: Sequence[EmojiCell], captions: list[str]) -> Part:
    places = {caption: place for place, caption in enumerate(captions)}
    labels = torch.tensor([places[cell.caption] for cell in cells])
    return Part(name, [cell.image for cell in cells], captions, labels)


def model_recall(predictor: Predictor, parts: Sequence[Part]) -> list[Recall]:
    """Recall of a model on every part; pictures and captions that parts share are embedded once."""
    images = {part.name: predictor.embed_images(part.images) for part in {part.name: part for part in parts}.values()}
    captions = list(dict.fromkeys(caption for part in parts for caption in part.captions))
    texts = dict(zip(captions, predictor.embed_texts(captions), strict=True))
    return [_recall(part, images[part.name] @ torch.stack([texts[c] for c in part.captions]).T) for part in parts]


def chance_recall(parts: Sequence[Part]) -> list[Recall]:
    """Expected recall of a random ranking: of m candidates with r right ones, 1 - C(m - r, k) / C(m, k)."""
    results = []
    for part in parts:
        total, pictures = len(part.captions), len(part.images)
        right = torch.bincount(part.labels, minlength=total).max().item()
        to_text = {f"r{k}": min(1.0, k / total) for k in KS}
        missed = {k: float(np.prod([(pictures - right - i) / (pictures - i) for i in range(k)])) for k in KS}
        results.append(Recall(part.name, total, to_text, {f"r{k}": 1 - missed[k] for k in KS}))
    return results


def pixel_recall(parts: Sequence[Part]) -> list[Recall]:
    """Nearest training picture by raw pixels (L1, the best of the simple distances) names the picture.

    Unseen concepts cannot be named that way.
    """
    train = [cell for vendor in TRAIN_VENDORS for cell in load_cells(vendor, heldout=False)]
    seen = next(part for part in parts if part.name == "test_vendor")
    distances = torch.cdist(_pixels(seen.images), _pixels([cell.image for cell in train]), p=1)
    results = []
    for part in parts:
        if part.name != seen.name:
            results.append(Recall(part.name, len(part.captions), None, None))
            continue
        places = {caption: place for place, caption in enumerate(part.captions)}
        drawn = torch.tensor([places[cell.caption] for cell in train])
        scores = torch.full((len(part.images), len(part.captions)), -torch.inf)
        scores.scatter_reduce_(1, drawn.expand(len(part.images), -1), -distances, "amax")
        results.append(_recall(part, scores))
    return results


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32).reshape(-1) for image in images])) / 255


def _recall(part: Part, scores: Tensor) -> Recall:
    """Recall in both directions from scores (n, m); captions without a picture are no queries."""
    places = torch.arange(len(part.captions))
    asked = part.labels.unique()
    to_text = recall_at_k(scores, part.labels, places, KS)
    to_image = recall_at_k(scores.T[asked], asked, part.labels, KS)
    return Recall(part.name, len(part.captions), to_text, to_image)


def save_recall(path: Path, methods: dict[str, list[Recall]]) -> None:
    """Write all results as JSON."""
    path.write_text(json.dumps({name: [asdict(row) for row in rows] for name, rows in methods.items()}, indent=1))
