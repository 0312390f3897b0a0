"""Recorded visual tokens: what the tokenizer makes of the recorded crops, never stale, never half written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from beit3.config import replace
from beit3.data.images import decode_image
from beit3.data.shard_writer import FolderWriter
from beit3.data.shards import load_prepared
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig, RandomCrop
from beit3.data.visual_codes import CodeTable, draw_crop, open_codes, tokenizer_hash
from beit3.data.write_codes import CodesConfig, CodesReport, write_codes
from beit3.errors import BadSampleError, ConfigError, DataMissingError
from beit3.tokenizer.vqkd import VQKD
from tests.conftest import Workspace

CROP = CropConfig(size=48, scale=(0.5, 1.0), color_jitter=0.3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(workspace: Workspace) -> CodesConfig:
    return CodesConfig(tokenizer=workspace.visual_tokenizer, crop=CROP, crops=2, seed=5)


@pytest.fixture(scope="module")
def pictures(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, with one picture that cannot be decoded."""
    folder = tmp_path_factory.mktemp("pictures") / "pictures"
    with FolderWriter(folder, "images", max_per_shard=20) as writer:
        for number, sample in enumerate(load_prepared(workspace.data / "images")):
            if number < 45:
                writer.add(sample.key, {"webp": b"no picture" if number == 7 else sample.image or b""})
    return folder


@pytest.fixture(scope="module")
def codes(pictures: Path, settings: CodesConfig) -> Path:
    out = pictures.parent / "codes"
    report = write_codes(pictures, out, settings, device=CPU, num_workers=2)
    assert report == CodesReport(44, 3, 0, report.skipped)
    assert report.skipped == {"unreadable_image": 1}
    return out


def test_codes_are_those_of_the_recorded_crops(pictures: Path, codes: Path, settings: CodesConfig) -> None:
    table, tokenizer = CodeTable(codes), VQKD.load(settings.tokenizer)
    draw = RandomCrop(CROP)
    boxes = set()
    for sample in list(load_prepared(pictures))[:5]:
        crops = table.find(sample.key)
        assert len(crops) == 2
        for crop in crops:
            view = draw_crop(draw, decode_image(sample.image or b""), int(crop["seed"]))
            assert view.box == tuple(crop["box"].tolist())
            expected = tokenizer.tokenize(view.image[None].float() / 255)[0]
            assert crop["codes"].tolist() == expected.tolist()
            boxes.add(view.box)
    assert len(boxes) > 5
    assert table.find(sample.key)["codes"].dtype == np.uint16


def test_a_recorded_crop_does_not_disturb_other_random_numbers(pictures: Path) -> None:
    image = decode_image(next(load_prepared(pictures)).image or b"")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    draw_crop(RandomCrop(CROP), image, 77)
    assert torch.equal(torch.rand(3), expected)


def test_an_interrupted_call_goes_on_and_ends_with_the_same_files(
    pictures: Path, codes: Path, settings: CodesConfig, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(codes, again)
    (again / "shard-00001.npy").unlink()
    (again / ".shard-00001.tmp-1").write_bytes(b"half")
    before = (again / "shard-00000.npy").stat().st_mtime_ns
    report = write_codes(pictures, again, settings, device=CPU)
    assert (report.shards, report.kept) == (1, 2)
    assert (again / "shard-00000.npy").stat().st_mtime_ns == before
    assert (again / "shard-00001.npy").read_bytes() == (codes / "shard-00001.npy").read_bytes()


def test_ranks_share_the_shards(
    pictures: Path, codes: Path, settings: CodesConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    written = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        written.append(write_codes(pictures, tmp_path / "out", settings, device=CPU).shards)
    assert written == [2, 1]
    for path in codes.glob("*.npy"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_folder_with_other_codes_is_not_written_to(
    pictures: Path, codes: Path, settings: CodesConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"codes of another crop\.color_jitter, seed: choose another folder"):
        write_codes(pictures, codes, replace(settings, seed=6, **{"crop.color_jitter": 0.1}), device=CPU)


def another_tokenizer(settings: CodesConfig, folder: Path) -> Path:
    model = VQKD.load(settings.tokenizer)
    model.quantize.codebook.neg_()
    model.save(folder)
    return folder


def test_stale_codes_are_refused_and_say_what_differs(
    pictures: Path, codes: Path, settings: CodesConfig, tmp_path: Path
) -> None:
    table, own = CodeTable(codes), tokenizer_hash(settings.tokenizer)
    table.expect(own, CROP, pictures)
    with pytest.raises(ConfigError, match="made with another tokenizer;"):
        table.expect(tokenizer_hash(another_tokenizer(settings, tmp_path / "other")), CROP, pictures)
    with pytest.raises(ConfigError, match=r"made with another crop\.flip, crop\.size;"):
        table.expect(own, replace(CROP, flip=0.0, size=32), pictures)


def test_codes_of_pictures_that_were_prepared_again_are_stale(
    pictures: Path, codes: Path, settings: CodesConfig, tmp_path: Path
) -> None:
    """Keys and sizes may be the same: the shards themselves count."""
    others = tmp_path / "pictures"
    shutil.copytree(pictures, others)
    shard = others / "shard-00001.tar"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ConfigError, match=r"made with another shards\.shard-00001\.tar;"):
        CodeTable(codes).expect(tokenizer_hash(settings.tokenizer), CROP, others)
    with pytest.raises(ConfigError, match=r"codes of another shards\.shard-00001\.tar: choose"):
        write_codes(others, codes, settings, device=CPU)


def test_a_training_run_waits_for_the_codes_of_all_shards(
    pictures: Path, codes: Path, settings: CodesConfig, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(codes, half)
    (half / "shard-00002.npy").unlink()
    with pytest.raises(DataMissingError, match=r"1 of 3 shards have no codes yet, such as shard-00002\.tar"):
        CodeTable(half).expect(tokenizer_hash(settings.tokenizer), CROP, pictures)


@pytest.mark.parametrize("name", ["codes.json", "shard-00001.npy"])
def test_a_damaged_file_is_one_line(codes: Path, tmp_path: Path, name: str) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(codes, damaged)
    (damaged / name).write_bytes((damaged / name).read_bytes()[:90])
    with pytest.raises(ConfigError, match=name) as caught:
        CodeTable(damaged)
    assert "\n" not in str(caught.value)


def test_a_folder_of_texts_is_refused(workspace: Workspace, settings: CodesConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="text holds no pictures"):
        write_codes(workspace.data / "text", tmp_path / "out", settings, device=CPU)
    assert not (tmp_path / "out").exists()


def test_a_training_run_opens_the_codes_of_its_own_tokenizer_and_crop_only(codes: Path, settings: CodesConfig) -> None:
    stream = Stream(sources=(Source(path="pictures", codes=codes.name),), batch_size=4)
    found = open_codes(stream, codes.parent, settings.tokenizer, CROP)
    assert list(found) == ["pictures"]
    assert len(found["pictures"]) == 44
    with pytest.raises(ConfigError, match="stale"):
        open_codes(stream, codes.parent, settings.tokenizer, CropConfig(size=48))
    with pytest.raises(DataMissingError, match="holds no codes"):
        open_codes(
            replace(stream, sources=(Source(path="pictures", codes="nothing"),)), codes.parent, settings.tokenizer, CROP
        )


def test_a_picture_without_codes_is_a_bad_sample(codes: Path) -> None:
    with pytest.raises(BadSampleError, match="no_codes"):
        CodeTable(codes).find("stranger")


def test_two_pictures_of_one_key_are_refused(codes: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice"
    shutil.copytree(codes, twice)
    shutil.copy(twice / "shard-00000.npy", twice / "shard-00009.npy")
    with pytest.raises(ConfigError, match="same key"):
        CodeTable(twice)


def test_a_tokenizer_of_another_size_is_refused_before_work_starts(
    pictures: Path, settings: CodesConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"takes images of \(48, 48\), the crop gives \(64, 64\)"):
        write_codes(pictures, tmp_path / "out", replace(settings, crop=CropConfig(size=64)), device=CPU)
    assert not (tmp_path / "out").exists()


def test_the_settings_say_what_made_the_codes(codes: Path) -> None:
    record = json.loads((codes / "codes.json").read_text())
    assert record["crops"] == 2
    assert record["grid"] == [6, 6]
    assert record["codebook_size"] == 24
    assert len(record["tokenizer"]) == 16
