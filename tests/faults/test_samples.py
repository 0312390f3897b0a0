"""Single samples that are odd, empty or harmful, on their way through preparation, training streams and losses.

How pictures decode and texts are cleaned is tested piece by piece in `tests/unit/data`; shards are in `test_data.py`.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import signal
import struct
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from megatron.energon import CrudeWebdataset
from megatron.energon.epathlib import EPath
from PIL import Image
from torch import Tensor

from beit3.config import replace
from beit3.data.example_loader import ExampleLoader
from beit3.data.images import decode_image
from beit3.data.prepare import prepare_images, prepare_pairs
from beit3.data.shard_writer import FolderWriter
from beit3.data.shards import Sample, load_prepared
from beit3.data.streams import Source, Stream, StreamLoader
from beit3.data.texts import MAX_CAPTION_CHARS, clean_text
from beit3.data.transforms import CropConfig, RandomCrop
from beit3.errors import BadSampleError, BeitError
from beit3.model.presets import BOS, EOS, ModelConfig
from beit3.pretrain.contrastive_loss import contrastive_loss, sigmoid_loss
from beit3.pretrain.masked_data_modeling import MaskedDataModeling, MaskedDataModelingConfig
from beit3.pretrain.masking import MaskConfig, block_mask, mask_text
from beit3.tokenizer.text import TextTokenizer

if TYPE_CHECKING:
    from tests.conftest import Workspace

Parts = Mapping[str, bytes]


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def tar_of(samples: Mapping[str, Parts]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for key, parts in samples.items():
            for ending, body in parts.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return data.getvalue()


def foreign(folder: Path, samples: Mapping[str, Parts]) -> Path:
    """A folder of a tar, indexed with energon's own tool by whoever has it; nothing was left out."""
    folder.mkdir(parents=True)
    (folder / "in.tar").write_bytes(tar_of(samples))
    CrudeWebdataset.prepare_dataset(EPath(folder), ["in.tar"], split_parts_ratio=[("train", 1.0)], shuffle_seed=None)
    return folder


class Pairs:
    """A picture's first pixel and its text."""

    def encode(self, sample: Sample) -> tuple[str, tuple[int, ...], str]:
        if sample.image is None:
            raise BadSampleError("missing_image", sample.key)
        picture = decode_image(sample.image)
        view = RandomCrop(CropConfig(size=8))(picture).image
        assert view.shape == (3, 8, 8)
        return sample.key, tuple(np.asarray(picture)[0, 0].tolist()), clean_text(sample.text)

    def collate(self, samples: list[Any]) -> list[Any]:
        return samples

    def join(self, units: list[list[Any]]) -> list[Any]:
        return [sample for unit in units for sample in unit]


def drawn(folder: Path, passes: int, good: int) -> tuple[dict[str, Any], Counter[str]]:
    """What some passes over a folder give, by key, and what they leave out, by reason."""
    stream = Stream(sources=(Source(path=folder.name),), batch_size=1, shuffle_buffer=1)
    loader: Any = StreamLoader({"x": stream}, {"x": Pairs()}, data=folder.parent, seed=0)
    found: dict[str, Any] = {}
    for batch in itertools.islice(loader, passes * good):
        ((key, pixel, text),) = batch["x"]
        found[key] = (pixel, text)
    skipped = Counter({reason.removeprefix("x/"): count for reason, count in loader.skipped.items()})
    return found, skipped


# --- Pictures that are not what they are called -----------------------------------------------------------------------

RED = Image.new("RGB", (40, 30), (200, 10, 20))
NOISE = Image.effect_noise((60, 60), 90).convert("RGB")
JPEG = encoded(NOISE, "JPEG", quality=95)


def flipped(data: bytes) -> bytes:
    """The byte in the middle inverted: among the coefficients."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that unpacks to a square of this side."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = zlib.compress(b"\0" * (side * (side // 8 + 1)), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


PICTURES: dict[str, tuple[dict[str, bytes], str]] = {
    "whole": ({"jpg": encoded(RED, "JPEG")}, ""),
    "png_named_jpg": ({"jpg": encoded(RED, "PNG")}, ""),
    "webp_named_jpeg": ({"jpeg": encoded(RED, "WEBP", lossless=True)}, ""),
    "jpeg_named_png": ({"png": encoded(RED, "JPEG")}, ""),
    "flipped_in_the_middle": ({"jpg": flipped(JPEG)}, ""),
    "half": ({"jpg": JPEG[: len(JPEG) // 2]}, "unreadable_image"),
    "empty": ({"jpg": b""}, "unreadable_image"),
    "html_named_jpg": ({"jpg": b"<!DOCTYPE html><html>not found</html>"}, "unreadable_image"),
    "text_named_png": ({"png": b"404 page not found"}, "unreadable_image"),
    "tiff_named_jpg": ({"jpg": encoded(RED, "TIFF")}, "unreadable_image"),
    "dot": ({"png": encoded(Image.new("RGB", (1, 1)), "PNG")}, "too_small"),
    "line": ({"png": encoded(Image.new("RGB", (4000, 1)), "PNG")}, "too_small"),
    "column": ({"png": encoded(Image.new("RGB", (1, 4000)), "PNG")}, "too_small"),
    "ribbon": ({"png": encoded(Image.new("RGB", (4, 4000), "red"), "PNG")}, ""),
    "bomb": ({"png": bomb(10_000)}, "too_many_pixels"),
}
"""Files of a sample, and the reason for which it is left out; none for those that are read."""


@pytest.mark.filterwarnings("ignore:Image size")
def test_pictures_are_read_by_their_signature_or_left_out_by_reason(tmp_path: Path) -> None:
    """Rows 45, 46 and 48: prepared, and read as they are. Only a hash would notice the byte that is flipped."""
    samples = {key: {**files, "txt": key.encode()} for key, (files, _) in PICTURES.items()}
    good = sorted(key for key, (_, reason) in PICTURES.items() if not reason)
    reasons = Counter(reason for _, reason in PICTURES.values() if reason)
    raw = foreign(tmp_path / "raw", samples)
    found, skipped = drawn(raw, 2, len(good))
    assert sorted(found) == good
    assert skipped.keys() == reasons.keys()
    for reason, count in reasons.items():
        assert count <= skipped[reason] <= 2 * count, "in two passes; the last ones may not have been come to"
    assert all(text == key for key, (_, text) in found.items())
    for key in ("png_named_jpg", "webp_named_jpeg"):
        assert found[key][0] == (200, 10, 20)
    report = prepare_images([raw / "in.tar"], tmp_path / "images")
    assert {"unreadable_image", "too_small", "too_many_pixels"} >= report.skipped.keys()
    for sample in load_prepared(tmp_path / "images"):
        if sample.key in good:
            decode_image(sample.image or b"")


# --- Tars -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [1, 100, 511])
def test_a_shard_cut_within_a_header_costs_what_follows_and_no_more(tmp_path: Path, place: int) -> None:
    """Row 40, while training: other cuts and damages in `test_data.py`, preparation in `test_prepare.py`."""
    with FolderWriter(tmp_path / "pairs", "pairs", max_per_shard=10) as writer:
        for number in range(30):
            writer.add(f"{number:02d}", {"png": PNG, "txt": f"red {number}".encode()})
    shard = tmp_path / "pairs" / "shard-00001.tar"
    with tarfile.open(shard) as tar:
        start = tar.getmember("14.txt").offset
    stream = Stream(sources=(Source(path="pairs"),), batch_size=1, shuffle_buffer=1)
    loader: Any = StreamLoader({"x": stream}, {"x": Pairs()}, data=tmp_path, seed=0)
    os.truncate(shard, start + place)
    batches = list(itertools.islice(loader, 2 * 24))
    good = {f"{number:02d}" for number in range(30) if not 14 <= number < 20}
    assert Counter(batch["x"][0][0] for batch in batches) == Counter(dict.fromkeys(good, 2))
    assert loader.skipped.keys() == {"x/unreadable_shard"}
    assert loader.skipped["x/unreadable_shard"] in (6, 12)


@pytest.mark.slow
def test_a_million_members_take_little_memory(tmp_path: Path) -> None:
    """Row 41: none of them belongs to a sample; the pair before and the one after are found."""
    with (tmp_path / "in.tar").open("wb") as file:
        file.write(tar_of({"a": {"png": PNG, "txt": b"one"}}).rstrip(b"\0").ljust(4 * 512, b"\0"))
        for number in range(1000):
            file.write(tarfile.TarInfo(f"noise{number}.bin").tobuf() * 1000)
        file.write(tar_of({"b": {"png": PNG, "txt": b"two"}}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = prepare_pairs([tmp_path / "in.tar"], tmp_path / "out")
    assert (report.samples, report.skipped, report.damaged) == (2, {}, [])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024, "KiB"


# --- Captions ---------------------------------------------------------------------------------------------------------

PNG = encoded(RED, "PNG")


def described(value: object) -> dict[str, bytes]:
    """A pair whose caption stands in its json: as img2dataset calls it, and as folders call it that are read as is."""
    return {"png": PNG, "json": json.dumps({"caption": value, "text": value}).encode()}


CAPTIONS: dict[str, tuple[dict[str, bytes], str]] = {
    "plain": ({"png": PNG, "txt": b"a red square"}, ""),
    "in_json": (described("a red square"), ""),
    "no_bytes": ({"png": PNG, "txt": b""}, "empty_caption"),
    "spaces": ({"png": PNG, "txt": b" \t\r\n "}, "empty_caption"),
    "nul": ({"png": PNG, "txt": b"\0"}, "empty_caption"),
    "none": ({"png": PNG}, "missing_caption"),
    "null": (described(None), "missing_caption"),
    "number": (described(7), "missing_caption"),
    "list": (described(["a", "b"]), "missing_caption"),
    "surrogate": ({"png": PNG, "json": b'{"caption": "a \\ud83d cat", "text": "a \\ud83d cat"}'}, ""),
    "not_a_number": ({"png": PNG, "json": b'{"caption": NaN, "text": NaN}'}, "missing_caption"),
    "latin": ({"png": PNG, "txt": b"caf\xe9"}, ""),
    "emoji": ({"png": PNG, "txt": "\U0001f338 \u05e9\u05dc".encode()}, ""),
    "zalgo": ({"png": PNG, "txt": ("z" + "\u0301\u0316" * 500).encode()}, ""),
    "control": ({"png": PNG, "txt": b"</s> [MASK] <mask> <s>"}, ""),
    "long": ({"png": PNG, "txt": b"word " * 20_000}, ""),
    "longer": ({"png": PNG, "txt": b"w" * 1_000_000}, ""),
}


def test_captions_of_every_kind_are_ids_or_left_out_by_reason(workspace: Workspace, tmp_path: Path) -> None:
    """Row 49: prepared, and read as they are; no caption ends a run."""
    tokenizer = TextTokenizer.load(workspace.text_tokenizer)
    good = sorted(key for key, (_, reason) in CAPTIONS.items() if not reason)
    reasons = Counter(reason for _, reason in CAPTIONS.values() if reason)
    raw = foreign(tmp_path / "raw", {key: parts for key, (parts, _) in CAPTIONS.items()})
    report = prepare_pairs([raw / "in.tar"], tmp_path / "prepared")
    no_text = {"missing_caption": -3, "not_text": 3}  # where data are prepared, what is there and no text is told apart
    assert report.skipped == Counter({reason: reasons[reason] + no_text.get(reason, 0) for reason in reasons | no_text})
    assert sorted(sample.key for sample in load_prepared(tmp_path / "prepared")) == good
    for folder in (raw, tmp_path / "prepared"):
        found, skipped = drawn(folder, 2, len(good))
        assert sorted(found) == good
        assert skipped.keys() == (reasons.keys() if folder == raw else set())
        for key, (_, text) in found.items():
            assert 0 < len(text) <= MAX_CAPTION_CHARS
            ids = tokenizer.encode(text, 64)
            assert (ids[0], ids[-1]) == (BOS, EOS), key
            assert not {BOS, EOS, tokenizer.mask_id} & set(ids[1:-1]), key


# --- Nothing to learn from --------------------------------------------------------------------------------------------

TINY = ModelConfig(
    width=16,
    num_layers=1,
    num_heads=2,
    ffn_width=16,
    patch_size=8,
    image_size=(48, 48),
    vocab_size=420,
    max_text_positions=40,
    fusion_layers=1,
)


@pytest.fixture
def task(workspace: Workspace) -> MaskedDataModeling:
    """Pairs, pictures and texts under masks."""
    config = MaskedDataModelingConfig(
        model=TINY,
        visual_tokenizer=workspace.visual_tokenizer,
        text_tokenizer=workspace.text_tokenizer,
        pairs=Stream(sources=(Source(path="pairs"),), batch_size=2),
        images=Stream(sources=(Source(path="pairs"),), batch_size=2),
        texts=Stream(sources=(Source(path="text"),), batch_size=2),
        crop=CropConfig(size=48),
        max_text_length=24,
    )
    return MaskedDataModeling(config)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (2, 2), (6, 6), (14, 14)])
def test_no_patch_and_every_patch_can_be_hidden(grid: tuple[int, int]) -> None:
    """Row 52: a mask has as many patches as it was asked for, and a share hides one at least and all at most."""
    count = grid[0] * grid[1]
    assert not block_mask(grid, 0).any()
    assert block_mask(grid, count).all()
    assert MaskConfig(patches=1e-9).num_patches(grid) == 1
    assert MaskConfig(patches=1.0).num_patches(grid) == count


@pytest.mark.parametrize("share", [1e-9, 0.15, 1.0])
def test_texts_of_one_and_two_words_keep_a_target(workspace: Workspace, share: float) -> None:
    """Row 52."""
    tokenizer = TextTokenizer.load(workspace.text_tokenizer)
    for words in (1, 2):
        ids = [BOS, *range(10, 10 + words), EOS]
        masked = mask_text(ids, share, tokenizer, MaskConfig())
        assert 1 <= len(masked.targets) <= words
        assert masked.targets == [ids[place] for place in masked.places]


@pytest.mark.parametrize("share", [1e-9, 1.0])
@pytest.mark.parametrize("text", ["", " ", "a", "a b", "</s>"])
def test_the_loss_of_next_to_nothing_is_finite_and_so_is_its_gradient(
    task: MaskedDataModeling, share: float, text: str, workspace: Workspace
) -> None:
    """Row 52: pictures under all or one hidden patch, texts of no, one and two words; a mean over nothing is no NaN."""
    config = replace(task.config, **{"mask.patches": share, "mask.words": share, "mask.pair_words": share})
    odd = MaskedDataModeling(config)
    image = next(iter(load_prepared(workspace.data / "pairs"))).image
    refused: list[str] = []
    given: list[tuple[Any, Sample]] = [
        ("pairs", Sample("a", image, text)),
        ("images", Sample("a", image)),
        ("texts", Sample("a", None, text)),
    ]
    for name, sample in given:
        encoder = odd.encoder(name, RandomCrop(config.crop))
        try:
            unit = encoder.encode(sample)
        except BadSampleError as error:
            refused.append(error.reason)
            continue
        loss = odd(encoder.collate([unit]))["loss"]
        assert torch.isfinite(loss), (name, text)
        if loss.requires_grad:
            loss.backward()
        for parameter in odd.parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    assert refused == ([] if text.strip() else ["empty_caption"] * 2)


# --- Scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [4.7, 20.0, 1e4, 1e30])
def test_a_logit_scale_beyond_reason_is_clamped_and_all_stays_finite(dtype: torch.dtype, start: float) -> None:
    """Row 54: in the types that autocast computes vectors in; SigLIP's scale has no bound but that of its exponent."""
    vectors = torch.nn.functional.normalize(torch.randn(2, 6, 8), dim=-1).to(dtype).requires_grad_()
    scale = torch.nn.Parameter(torch.tensor(start))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        values = contrastive_loss(vectors[0], vectors[1], None, scale)
    values["loss"].backward()
    assert scale.exp() <= 100.01
    assert torch.isfinite(values["loss"])
    assert torch.isfinite(scale.grad if scale.grad is not None else scale)
    assert vectors.grad is not None
    assert torch.isfinite(vectors.grad).all()
    free = torch.nn.Parameter(torch.tensor(min(start, 20.0)))
    values = sigmoid_loss(vectors[0], vectors[1], None, free, torch.tensor(-10.0))
    values["loss"].backward()
    assert torch.isfinite(values["loss"])
    assert free.grad is not None
    assert torch.isfinite(free.grad)


# --- Throughput and workers -------------------------------------------------------------------------------------------


def test_bad_samples_cost_their_own_reading_and_no_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 51: five in a hundred are bad; nothing sleeps, and each sample is looked at once a pass."""
    bad = range(0, 100, 20)
    samples = {
        f"{number:03d}": {"png": b"<html>" if number in bad else PNG, "txt": b"a red square"} for number in range(100)
    }
    raw = foreign(tmp_path / "raw", samples)
    looked = Counter[str]()
    encode = Pairs.encode

    def count(self: Pairs, sample: Sample) -> tuple[str, tuple[int, ...], str]:
        looked[sample.key] += 1
        return encode(self, sample)

    def never(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} seconds")

    monkeypatch.setattr(Pairs, "encode", count)
    monkeypatch.setattr(time, "sleep", never)
    found, skipped = drawn(raw, 1, 95)
    assert len(found) == 95
    assert skipped.total() <= 5
    assert max(looked.values()) == 1
    assert looked.total() == 95 + skipped.total()


class Rows:
    """Examples of an index, as finetuning reads them."""

    def __len__(self) -> int:
        return 64

    def load(self, index: int) -> Tensor:
        return torch.tensor(index)


def test_a_killed_data_process_of_a_finetuning_run_ends_it_in_one_line() -> None:
    """Rows 3 and 56, for index files; streams in `test_data.py`."""
    loader: Any = ExampleLoader(Rows(), torch.stack, batch_size=4, seed=0, num_workers=2)
    batches = iter(loader)
    next(batches)
    victims = list(torch.multiprocessing.active_children())
    assert len(victims) == 2
    os.kill(victims[0].pid or 0, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(BeitError) as caught:
        list(itertools.islice(batches, 200))
    assert time.monotonic() - started < 30
    assert "\n" not in str(caught.value)
    assert loader.state_dict()
    victims[1].kill()  # it may wait for ever for a lock that the killed one held
    victims[1].join()
    loader.close()
