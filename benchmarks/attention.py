"""Attention backends against each other: the table behind `beit3.model.attention.choose_backend`.

    python benchmarks/attention.py --dtype fp32

Equal sequences of T tokens, about `--tokens` of them in all, so that rows of the table compare. Backends run in turn.
Times are of `multiway_attention` alone: from the joint projections to the mixed values, copies included.

Shapes: n sequences, T tokens of each, D width, H heads.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from beit3.model.attention import Backend, Plan, choose_backend, multiway_attention, plan_attention
from beit3.model.packing import Layout

LENGTHS = (4, 8, 16, 32, 64, 128, 197, 261, 577, 901)


def run(qkv: Tensor, plan: Plan, num_heads: int, training: bool) -> None:
    """One pass of attention, with its backward pass in training."""
    text = qkv.new_empty(0, qkv.shape[1])
    if training:
        mixed, _ = multiway_attention(qkv, text, plan, num_heads)
        torch.autograd.backward(mixed, torch.ones_like(mixed))
        qkv.grad = None
        return
    with torch.inference_mode():
        multiway_attention(qkv, text, plan, num_heads)


def measure(options: argparse.Namespace, length: int, training: bool) -> dict[Backend, float]:
    """Median milliseconds of each backend on one shape."""
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    count = max(1, options.tokens // length)
    layout = Layout.build(count, length, (), 0)
    width = options.heads * options.head_width
    qkv = torch.randn(count * length, 3 * width, device=device, dtype=dtype, requires_grad=training)
    backends: list[Backend] = ["sdpa", "matmul"]
    if device.type == "cuda" and dtype == torch.bfloat16:
        backends.append("varlen")
    now = time.process_time if options.clock == "cpu" else time.perf_counter
    times: dict[Backend, list[float]] = {backend: [] for backend in backends}
    for round_ in range(options.rounds + 1):
        for backend in backends:
            plan = plan_attention(layout, qkv, backend)
            start = now()
            run(qkv, plan, options.heads, training)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:  # the first round warms up
                times[backend].append(1e3 * (now() - start))
    return {backend: statistics.median(taken) for backend, taken in times.items()}


def main() -> None:
    """Print one markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: see against_torchscale.py")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    names = ["sdpa", "matmul"] + (["varlen"] if options.device == "cuda" and options.dtype == "bf16" else [])
    print("| T | " + " | ".join(f"{mode} {name} ms" for mode in ("infer", "train") for name in names) + " | chosen |")
    print("|---" * (2 + 2 * len(names)) + "|")
    for length in LENGTHS:
        rows = [measure(options, length, training) for training in (False, True)]
        cells = [f"{value:.2f}" for row in rows for value in row.values()]
        chosen = choose_backend(Layout.build(1, length, (), 0), torch.device(options.device), dtype)
        print(f"| {length} | {' | '.join(cells)} | {chosen} |", flush=True)


if __name__ == "__main__":
    main()
