"""Tokenizers that are damaged, collapse, are left in training mode, or are not those that recorded codes came from."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import beit3
from beit3.config import replace
from beit3.data.feature_cache import FeatureCache, build_feature_cache
from beit3.data.shard_writer import FolderWriter
from beit3.data.shards import Sample
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.data.visual_codes import CodeTable, tokenizer_hash
from beit3.data.write_codes import CodesConfig, write_codes
from beit3.errors import BeitError, ConfigError
from beit3.model.build import build_model
from beit3.pretrain.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from beit3.tokenizer.subwords import load_subwords
from beit3.tokenizer.teachers import Teacher, TeacherConfig
from beit3.tokenizer.text import TextTokenizer, train_text_tokenizer
from beit3.tokenizer.vqkd import VQKD, VQKDConfig, distillation_loss
from tests.faults.small import small_config

LINES = ["a red cat", "two blue dogs", "a green tree and a house"] * 30


@pytest.fixture(scope="module")
def proto() -> bytes:
    return train_text_tokenizer(iter(LINES), 60).model


# --- Damage -----------------------------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(100),
    "half": lambda data: data[: len(data) // 2],
    "html": lambda data: b"<!DOCTYPE html><html><body>not found</body></html>",
    "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1356047\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_text_tokenizer_is_refused_by_name_wherever_it_is_read(
    damage: str, proto: bytes, tmp_path: Path
) -> None:
    """Row 50; that a training run says so too, in `test_bad_input.py`."""
    folder = model_with(proto, tmp_path)
    path = folder / "tokenizer.spm"
    path.write_bytes(DAMAGE[damage](proto))
    reads: list[Callable[[], object]] = [
        lambda: TextTokenizer.load(path),
        lambda: load_subwords(path),
        lambda: beit3.load(folder, device="cpu"),
    ]
    for read in reads:
        with pytest.raises(ConfigError, match=r"tokenizer\.spm") as caught:
            read()
        assert str(caught.value).isprintable()


def model_with(proto: bytes, folder: Path) -> Path:
    config = small_config(len(TextTokenizer(proto)))
    build_model(config, "retrieval").save_pretrained(folder / "model", {"tokenizer.spm": proto})
    return folder / "model"


def test_an_inverted_byte_near_the_start_is_refused_or_harmless(proto: bytes) -> None:
    """Row 50: SentencePiece has no checksum; what it still reads gives ids of its own vocabulary, never a crash."""
    refused = 0
    for place in range(300):
        data = bytearray(proto)
        data[place] ^= 0xFF
        try:
            tokenizer = TextTokenizer(bytes(data))
        except ConfigError:
            refused += 1
            continue
        ids = tokenizer.encode("a red cat and 3 dogs", 12)
        assert 2 <= len(ids) <= 12
        assert 0 <= min(ids) <= max(ids) < len(tokenizer)
        tokenizer.decode(ids)
    assert refused > 50


def test_a_tokenizer_of_more_words_than_the_model_is_refused(proto: bytes, tmp_path: Path) -> None:
    """Row 27; released files, which tell the exact number, in `test_predictor.py`."""
    other = train_text_tokenizer(iter(["ab ba"] * 30), 10).model
    assert len(TextTokenizer(other)) < len(TextTokenizer(proto))
    folder = model_with(other, tmp_path)
    (tmp_path / "beit3.spm").write_bytes(proto)
    with pytest.raises(ConfigError, match="this tokenizer belongs to another model"):
        beit3.load(folder, device="cpu", tokenizer=tmp_path / "beit3.spm")


# --- Collapse and training mode ---------------------------------------------------------------------------------------

SMALL = VQKDConfig(
    image_size=(16, 16), patch_size=8, width=16, depth=1, num_heads=2, codebook_size=64, code_width=4, teacher_width=4
)


def alarms_after(images: Callable[[], Tensor]) -> list[str]:
    """What the Task says of a codebook that was trained on such pictures."""
    torch.manual_seed(0)
    model = VQKD(replace(SMALL, decay=0.9)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    features = torch.randn(16, 4, 4)
    for _ in range(60):
        decoded, _, loss = model(images())
        (distillation_loss(decoded, features) + loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    config = ImageTokenizerConfig(
        tokenizer=SMALL,
        teacher=TeacherConfig(),
        images=Stream(sources=(Source(path="images"),), batch_size=2),
        crop=CropConfig(size=16),
        least_use=0.3,
    )
    values = {name: float(value) for name, value in model.quantize.statistics().items()}
    return ImageTokenizer(config).alarms(values)


def test_constant_pictures_collapse_the_codebook_and_raise_the_alarm() -> None:
    """Row 57: four patches that never change use four codes of sixty-four at most."""
    (alarm,) = alarms_after(lambda: torch.full((16, 3, 16, 16), 0.5))
    assert "the codebook collapses" in alarm
    assert alarms_after(lambda: torch.rand(16, 3, 16, 16)) == []


def test_a_tokenizer_left_in_training_mode_gives_the_same_codes_and_moves_nothing(tmp_path: Path) -> None:
    """Row 57: neither does one in evaluation move when it is asked to rebuild."""
    torch.manual_seed(0)
    VQKD(SMALL).save(tmp_path / "tokenizer")
    model = VQKD.load(tmp_path / "tokenizer")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(8, 3, 16, 16)
    wanted = model.tokenize(images)
    with torch.no_grad():
        assert torch.equal(model(images)[1], wanted)
    model.train()
    for _ in range(5):
        assert torch.equal(model.tokenize(images), wanted)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with torch.no_grad():
        model(images)
    assert not torch.equal(model.quantize.usage, before["quantize.usage"]), "training does move them"


# --- Recorded codes ---------------------------------------------------------------------------------------------------

CROP = CropConfig(size=16, scale=(0.5, 1.0))


@pytest.fixture
def codes(tmp_path: Path) -> tuple[CodeTable, str, Path]:
    """Codes of six pictures, the digest of their tokenizer, and the pictures."""
    VQKD(SMALL).save(tmp_path / "tokenizer")
    draw = np.random.default_rng(0)
    with FolderWriter(tmp_path / "pictures", "images") as writer:
        for number in range(6):
            data = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(data, "PNG")
            writer.add(f"{number}", {"png": data.getvalue()})
    settings = CodesConfig(tokenizer=tmp_path / "tokenizer", crop=CROP)
    write_codes(tmp_path / "pictures", tmp_path / "codes", settings, device=torch.device("cpu"))
    return CodeTable(tmp_path / "codes"), tokenizer_hash(tmp_path / "tokenizer"), tmp_path / "pictures"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ({"tokenizer": "0" * 16}, "tokenizer"),
        ({"tokenizer": None}, "tokenizer"),
        ({"crop": {"size": 32}}, r"crop\."),
        ({"crop": None}, "crop"),
        ({"shards": {}}, "shards"),
        ({"shards": {"shard-00000.tar": "1-2"}}, r"shards\.shard-00000\.tar"),
    ],
)
def test_an_edited_header_of_codes_is_stale(
    edit: dict[str, Any], named: str, codes: tuple[CodeTable, str, Path]
) -> None:
    """Row 58: the header names what the codes were made with, and all of it must be what the run has."""
    table, digest, pictures = codes
    table.expect(digest, CROP, pictures)
    path = table.folder / "codes.json"
    header = json.loads(path.read_text())
    path.write_text(json.dumps({**header, **edit}))
    with pytest.raises(ConfigError, match=rf"is stale: its codes were made with another .*{named}"):
        CodeTable(table.folder).expect(digest, CROP, pictures)


def test_a_tokenizer_changed_by_one_bit_has_another_digest_and_its_old_codes_are_stale(
    codes: tuple[CodeTable, str, Path],
) -> None:
    """Rows 50 and 58: the digest is of the weights, whatever the folder is called."""
    table, digest, pictures = codes
    path = pictures.parent / "tokenizer" / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])["quantize.codebook"]
    data[start + entry["data_offsets"][0] + 6] ^= 1
    path.write_bytes(data)
    changed = tokenizer_hash(path.parent)
    assert changed != digest
    with pytest.raises(ConfigError, match="made with another tokenizer;"):
        table.expect(changed, CROP, pictures)


def test_codes_of_another_resolution_are_stale(codes: tuple[CodeTable, str, Path]) -> None:
    """Row 58."""
    table, digest, pictures = codes
    for crop in (replace(CROP, size=32), replace(CROP, tokenizer_size=32), replace(CROP, scale=(0.1, 1.0))):
        with pytest.raises(ConfigError, match=r"made with another crop\."):
            table.expect(digest, crop, pictures)


class Mean(Teacher):
    """Averages over patches, and counts the pictures it has seen."""

    def __init__(self) -> None:
        super().__init__(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 3)
        self.seen = 0

    def feature_map(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return F.avg_pool2d(images, 4)


def features(folder: Path, teacher: Teacher) -> FeatureCache:
    data = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(data, "PNG")
    return build_feature_cache(
        folder,
        [Sample("a", data.getvalue())],
        teacher=teacher,
        teacher_settings={"kind": "mean"},
        crop=CROP,
        grid=(4, 4),
        crops_per_picture=2,
        seed=0,
        source="images",
        data={"a.tar": {"bytes": 1}},
        device=torch.device("cpu"),
    )


def test_features_kept_of_a_teacher_are_taken_again(tmp_path: Path) -> None:
    """Row 58: the header that the next test damages is read; what differs between runs, in `test_feature_cache.py`."""
    wanted = features(tmp_path, Mean()).load(1)
    again = Mean()
    assert torch.equal(features(tmp_path, again).load(1)[1], wanted[1])
    assert not again.seen


@pytest.mark.parametrize("damage", ["cut", "missing", "other_seed", "other_shapes", "short"])
def test_features_under_a_damaged_header_are_refused(damage: str, tmp_path: Path) -> None:
    """Row 58."""
    folder = features(tmp_path, Mean()).folder
    path = folder / "cache.json"
    header = json.loads(path.read_text())
    match damage:
        case "cut":
            path.write_text(path.read_text()[:40])
        case "missing":
            path.unlink()
        case "other_seed":
            path.write_text(json.dumps({**header, "seed": 7}))
        case "other_shapes":
            path.write_text(json.dumps({**header, "shapes": {"crops": [9, 3, 16, 16], "features": [9, 16, 3]}}))
        case "short":
            (folder / "features.bin").write_bytes(b"")
    with pytest.raises(BeitError, match=r"is damaged"):
        features(tmp_path, Mean())
    shutil.rmtree(folder)
    features(tmp_path, Mean())
