"""Spikes are told once they stand out, bad steps leave their samples, bad data end a run, batches are described."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from beit3.errors import BadDataError
from beit3.train.watch import LossWatch, check_budget, is_out_of_memory, record_bad_step, shapes_of


def test_a_jump_of_the_loss_is_told_and_ordinary_noise_is_not() -> None:
    watch = LossWatch()
    generator = torch.Generator().manual_seed(0)
    for number in range(200):
        loss = 5 - 0.01 * number + 0.05 * float(torch.randn((), generator=generator))
        assert watch.spike(loss) is None, number
    text = watch.spike(4.5)
    assert text is not None
    assert "jumped to 4.5, from 3.0" in text
    assert watch.spike(4.5) is not None, "the first spike does not hide the second"
    assert watch.spike(3.0) is None


def test_the_first_records_and_what_is_not_finite_raise_no_alarm() -> None:
    watch = LossWatch()
    assert [watch.spike(value) for value in (9.0, 1.0, 20.0, 3.0)] == [None] * 4
    before = watch.records
    assert watch.spike(math.nan) is None
    assert watch.spike(math.inf) is None
    assert watch.records == before


def test_a_bad_step_names_its_samples(tmp_path: Path) -> None:
    record_bad_step(tmp_path, 7, 1, [1.5, math.nan], math.inf, ["pairs/a", "pairs/b"])
    found = json.loads((tmp_path / "bad_steps" / "step-00000007-rank-1.json").read_text())
    assert found["samples"] == ["pairs/a", "pairs/b"]
    assert (found["losses"], found["gradient_norm"]) == (["1.5", "nan"], "inf")


def test_data_worse_than_the_budget_end_the_run_and_the_reasons_are_named() -> None:
    check_budget(Counter(unreadable_image=250), 750, 0.25)
    with pytest.raises(BadDataError, match=r"300 of 1000 .*200 unreadable_image, 100 empty_caption.*max_bad_fraction"):
        check_budget(Counter(empty_caption=100, unreadable_image=200), 700, 0.25)
    check_budget(Counter(unreadable_image=900), 0, 0.25)  # too few to judge


@dataclass
class _Inner:
    ids: torch.Tensor


def test_batches_are_described_by_their_shapes() -> None:
    batch = {"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "text": _Inner(torch.zeros(5, dtype=torch.int64))}
    assert shapes_of(batch) == "images (2, 3, 4, 4) uint8, text.ids (5,) int64"
    assert shapes_of(torch.zeros(3)) == "batch (3,) float32"


def test_only_a_lack_of_memory_is_called_one() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
