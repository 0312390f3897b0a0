"""From raw files to training batches: the embedded corpus and foreign tars through preparation, streams and crops."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from beit3.data.emoji import write_emoji
from beit3.data.images import decode_image
from beit3.data.prepare import prepare_images, prepare_pairs, prepare_text
from beit3.data.shards import Sample
from beit3.data.streams import Source, Stream, StreamLoader
from beit3.data.texts import clean_text
from beit3.data.transforms import CropConfig, RandomCrop, normalize
from beit3.errors import BadSampleError

Batch = dict[str, Tensor | list[str]]


class Reader:
    """Reads pictures, texts or both, as the Tasks do."""

    def __init__(self, image: bool, text: bool) -> None:
        self.image, self.text = image, text
        self.crop = RandomCrop(CropConfig(size=48, color_jitter=0.4, tokenizer_size=96))

    def encode(self, sample: Sample) -> tuple[Tensor | None, Tensor | None, str]:
        views = None
        if self.image:
            if sample.image is None:
                raise BadSampleError("missing_image")
            views = self.crop(decode_image(sample.image))
        text = clean_text(sample.text) if self.text else ""
        return (views.image if views else None), (views.tokenizer_image if views else None), text

    def collate(self, samples: list[tuple[Tensor | None, Tensor | None, str]]) -> Batch:
        batch: Batch = {}
        if self.image:
            batch["images"] = normalize(torch.stack([image for image, _, _ in samples if image is not None]))
            batch["large"] = torch.stack([large for _, large, _ in samples if large is not None])
        if self.text:
            batch["texts"] = [text for _, _, text in samples]
        return batch

    def join(self, units: list[Batch]) -> Batch:
        return {
            name: torch.cat([part for unit in units if isinstance(part := unit[name], Tensor)])
            if isinstance(first, Tensor)
            else [text for unit in units for text in unit[name]]
            for name, first in units[0].items()
        }


def make(data: Path, workers: int) -> StreamLoader[Batch]:
    paths = {"images": "pairs", "texts": "text", "pairs": "pairs"}
    streams = {name: Stream(sources=(Source(path=path),), batch_size=24) for name, path in paths.items()}
    encoders = {"images": Reader(True, False), "texts": Reader(False, True), "pairs": Reader(True, True)}
    return StreamLoader(streams, encoders, data=data, seed=1, num_workers=workers)


@pytest.mark.slow
def test_the_embedded_corpus_feeds_three_streams_and_resumes(tmp_path: Path) -> None:
    write_emoji(tmp_path)
    loader = make(tmp_path, 1)
    batches = list(itertools.islice(loader, 4))
    for batch in batches:
        images = batch["pairs"]["images"]
        assert isinstance(images, Tensor)
        assert images.shape == (24, 3, 48, 48)
        assert images.min() >= -1
        assert images.max() <= 1
        assert batch["images"].keys() == {"images", "large"}
        assert batch["texts"].keys() == {"texts"}
    state = loader.state_dict()
    expected = next(iter(loader))
    again = make(tmp_path, 1)
    again.load_state_dict([state])
    restored = next(iter(again))
    for name in ("images", "large", "texts"):
        left, right = restored["pairs"][name], expected["pairs"][name]
        assert torch.equal(left, right) if isinstance(left, Tensor) and isinstance(right, Tensor) else left == right
    assert loader.skipped == {}


def test_foreign_files_become_batches(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(12):
            picture = io.BytesIO()
            Image.new("RGB", (40 + number, 30), (number, 0, 0)).save(picture, "JPEG")
            meta = json.dumps({"split": "train" if number < 10 else "test"}).encode()
            parts = {"jpg": picture.getvalue(), "txt": f"shade {number}".encode(), "json": meta}
            for ending, body in parts.items():
                info = tarfile.TarInfo(f"{number:09d}.{ending}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    (tmp_path / "words.txt").write_text("".join(f"line {number}\n" for number in range(30)))
    report = prepare_pairs([tmp_path / "00000.tar"], tmp_path / "pairs", where={"split": "train"})
    assert (report.samples, report.skipped) == (10, {"filtered": 2})
    assert prepare_images([tmp_path / "00000.tar"], tmp_path / "images").samples == 12
    assert prepare_text([tmp_path / "words.txt"], tmp_path / "text").samples == 30
    batch = next(iter(make(tmp_path, 0)))
    texts = batch["pairs"]["texts"]
    assert isinstance(texts, list)
    assert set(texts) <= {f"shade {number}" for number in range(10)}
