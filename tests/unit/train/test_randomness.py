"""Random numbers: one seed for all generators, and back where they stood."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch

from beit3.train.randomness import random_state, seed_all, set_random_state, unchanged


def draw() -> list[float]:
    """From each generator of the CPU, and from numpy's and Python's second normal number, which they keep."""
    return [float(torch.rand(())), float(np.random.randn()), random.random(), random.gauss(0, 1)]


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 7])
def test_a_seed_decides_all_generators(seed: int) -> None:
    seed_all(seed)
    first = draw()
    assert draw() != first
    seed_all(seed)
    assert draw() == first
    seed_all(seed + 1)
    assert not set(draw()) & set(first)


def test_a_state_is_plain_data_and_brings_every_generator_back() -> None:
    seed_all(3)
    draw()
    file = io.BytesIO()
    torch.save(random_state(), file)
    expected = [draw() for _ in range(3)]
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    set_random_state(state)
    assert [draw() for _ in range(3)] == expected


def test_what_draws_within_moves_nothing_outside_even_if_it_fails() -> None:
    def fail() -> None:
        with unchanged():
            draw()
            raise ZeroDivisionError

    seed_all(5)
    expected = draw()
    seed_all(5)
    with unchanged():
        draw()
        seed_all(9)
    with pytest.raises(ZeroDivisionError):
        fail()
    assert draw() == expected
