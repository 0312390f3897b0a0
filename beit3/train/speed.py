"""What the device can do: the measured ceiling of matrix products, and the compute type that is faster."""

from __future__ import annotations

import time
from typing import Literal

import torch
import torch.nn.functional as F

_SHAPE = (2048, 512, 2048)
_REPEATS = 5
_WORTHWHILE = 1.3
"""bf16 must beat fp32 by this factor to be chosen: casts and elementwise work eat smaller gains."""


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Fastest of a few linear maps, in FLOP/s: the denominator of MFU in our logs."""
    rows, width, out = _SHAPE if device.type == "cpu" else tuple(4 * n for n in _SHAPE)
    x = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(out, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(_REPEATS + 1):
        _synchronize(device)
        start = time.perf_counter()
        F.linear(x, weight)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * rows * width * out / best


def choose_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    """The compute type of a run; `auto` measures both."""
    if name == "auto":
        bf16, fp32 = (matmul_ceiling(device, dtype) for dtype in (torch.bfloat16, torch.float32))
        name = "bf16" if bf16 > _WORTHWHILE * fp32 else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
