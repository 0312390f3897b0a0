"""COCO's compressed run lengths, against what pycocotools writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as reference

from beit3.metrics.run_lengths import check_run_lengths, read_run_lengths


@pytest.mark.parametrize("seed", range(20))
def test_strings_of_pycocotools_give_the_runs_of_the_mask(seed: int) -> None:
    generator = np.random.default_rng(seed)
    size = generator.integers(1, 90, 2)
    mask = (generator.random(size) < generator.random()).astype(np.uint8)
    mask = mask.repeat(1 + seed % 3 * 200, axis=0)
    counts = reference.encode(np.asfortranarray(mask))["counts"]
    runs = read_run_lengths(counts)
    assert runs == read_run_lengths(counts.decode())
    found = np.concatenate([np.full(run, number % 2) for number, run in enumerate(runs)])
    assert np.array_equal(found, mask.flatten("F"))


def test_a_run_of_millions_of_pixels_is_read() -> None:
    counts = reference.encode(np.zeros((9000, 9000), np.uint8, order="F"))["counts"]
    assert read_run_lengths(counts) == [9000 * 9000]


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ("zzz~~", "a character that no run length has"),
        ("\x001", "a character that no run length has"),
        ("é", "ascii"),
        ("ZZZZ", "the last run is cut off"),
        ("PPPPP", "the last run is cut off"),
        ("O", "a negative run"),
        ("5M51M", "a negative run"),
        ("o" * 100_000, "a run longer than any picture"),
    ],
    ids=["letters", "control", "accent", "open", "zero open", "negative", "negative difference", "endless"],
)
def test_broken_strings_are_refused(counts: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_run_lengths(counts)


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [2, 3], "counts": ""},
        {"size": [2, 3], "counts": "5"},
        {"size": [2, 3], "counts": "7"},
        {"size": [2, 3], "counts": [6, -1, 1]},
        {"size": [2, 3], "counts": [5]},
        {"size": [2, 3], "counts": None},
        {"size": [3, 2], "counts": "6"},
        {"counts": "6"},
    ],
)
def test_runs_must_fill_the_picture(rle: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"picture|neither a list nor a string"):
        check_run_lengths(rle, 2, 3)


def test_runs_that_fill_the_picture_pass_in_every_form() -> None:
    for counts in ("6", b"6", [6], [0, 6], [1, 0, 5]):
        check_run_lengths({"size": [2, 3], "counts": counts}, 2, 3)
