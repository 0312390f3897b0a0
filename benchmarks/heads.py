"""What predicting hidden positions alone saves: heads and losses over hidden positions against over all of them.

    python benchmarks/heads.py

One image of 224 pixels hides 78 of 196 patches (8,192 codes), one caption of 14 ids hides six words (64,010 ids). Both
arms run in turn, forward and backward.

Shapes: M hidden rows of all rows, D width, V classes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 768
CASES = {"visual tokens": (196, 78, 8192), "words": (14, 6, 64010)}
"""Rows of a sequence, hidden ones, classes."""


def arm(head: nn.Linear, states: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor | None) -> None:
    """Head and loss with their gradients; `hidden` (M,) picks rows before the head, None ignores targets after it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=states.dtype == torch.bfloat16):
        picked = states if hidden is None else states[hidden]
        wanted = targets if hidden is None else targets[hidden]
        loss = F.cross_entropy(head(picked).float(), wanted)
    torch.autograd.backward(loss)
    head.zero_grad()
    states.grad = None


def measure(options: argparse.Namespace, name: str) -> tuple[float, float]:
    """Median seconds of hidden rows alone, and of all rows."""
    rows, hidden_rows, classes = CASES[name]
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    head = nn.Linear(WIDTH, classes)
    states = torch.randn(options.batch * rows, WIDTH, dtype=dtype, requires_grad=True)
    mask = torch.arange(rows).lt(hidden_rows).repeat(options.batch)
    targets = torch.randint(classes, (options.batch * rows,)).masked_fill(~mask, -100)
    hidden = mask.nonzero()[:, 0]
    arms: list[Callable[[], None]] = [
        lambda: arm(head, states, targets, hidden),
        lambda: arm(head, states, targets, None),
    ]
    times: list[list[float]] = [[], []]
    for round_ in range(options.rounds + 1):
        for place, run in enumerate(arms):
            start = time.perf_counter()
            run()
            if round_:  # the first round warms up
                times[place].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Print one markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| head | hidden rows alone, s | all rows, s | saved |\n|---|---|---|---|")
    for name in CASES:
        alone, everything = measure(options, name)
        print(f"| {name} | {alone:.3f} | {everything:.3f} | {everything / alone:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
