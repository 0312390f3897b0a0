"""The embedded corpus: its counts, its held-out part, and the data written from it."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest

from beit3.data.emoji import HELD_OUT_VENDOR, TRAIN_VENDORS, VENDORS, load_cells, write_emoji
from beit3.data.images import decode_image
from beit3.data.shards import load_prepared
from beit3.errors import ConfigError


def test_every_vendor_draws_every_concept() -> None:
    for vendor in VENDORS:
        assert len(load_cells(vendor)) == 1570
        assert len(load_cells(vendor, heldout=True)) == 172
    assert HELD_OUT_VENDOR not in TRAIN_VENDORS


def test_cells_show_pictures_under_their_names() -> None:
    cell = load_cells("google")[100]
    assert (cell.caption, cell.hex, cell.group) == ("cherry blossom", "1F338", "animals & nature")
    assert cell.image.size == (48, 48)
    assert cell.image.mode == "RGB"
    assert np.asarray(cell.image).std() > 20


def test_the_held_out_rule_is_the_documented_one() -> None:
    for cell in load_cells("google"):
        assert cell.heldout == (int(hashlib.md5(cell.hex.encode()).hexdigest(), 16) % 10 == 0)


def test_an_unknown_vendor_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'google'"):
        load_cells("gogle")


def test_written_data_holds_seen_concepts_of_training_vendors_only(tmp_path: Path) -> None:
    started = time.monotonic()
    report = write_emoji(tmp_path)
    assert time.monotonic() - started < 60
    held_out = {cell.caption for cell in load_cells("google", heldout=True)}
    samples = list(load_prepared(tmp_path / "pairs"))
    assert report.samples == len(samples) == 4194
    assert {sample.meta["vendor"] for sample in samples} == set(TRAIN_VENDORS)
    assert not held_out & {sample.text.decode() for sample in samples if isinstance(sample.text, bytes)}
    first = samples[0]
    cell = load_cells("google", heldout=False)[0]
    assert first.image is not None
    assert (np.asarray(decode_image(first.image)) == np.asarray(cell.image)).all()
    texts = [sample.text for sample in load_prepared(tmp_path / "text")]
    assert "cherry blossom, animals & nature, flowers" in texts
    assert "cherry blossom: blossom, cherry, flower, plant, spring, springtime" in texts
    assert not held_out & set(texts)
    assert len(texts) == report_texts()


def report_texts() -> int:
    """Count the texts of the seen concepts: two each, three where there are keywords."""
    return sum(2 + bool(cell.keywords) for cell in load_cells("google", heldout=False))
