"""Random numbers of data loading that depend on names, not on what ran before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from megatron.energon.rng import SystemRng


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """Seed the global CPU generators of torch, numpy and python from a text, and put them back afterwards.

    CUDA's generators are left alone (`torch.manual_seed` would reset them): the model draws there.
    """
    outer = SystemRng.save_state()
    digest = hashlib.sha256(name.encode()).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest[:7], "big"))
    np.random.seed(int.from_bytes(digest[8:12], "big"))
    random.seed(digest)
    try:
        yield
    finally:
        SystemRng.restore_state(outer)
