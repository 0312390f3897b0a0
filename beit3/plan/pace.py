"""Time of an optimizer step: operations (`beit3.model.flops`) at an assumed speed, and bytes between GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from beit3.config import Run
from beit3.model.memory import BatchSizes, Pass
from beit3.model.presets import ModelConfig
from beit3.plan.footprint import Counts
from beit3.plan.gpus import Cluster, Gpu

LAUNCH_SECONDS = 5e-6
"""Assumed time to start one kernel from Python: a step cannot be faster than its kernels are started."""
LAUNCHES = {True: 40, False: 80}
"""Kernels that one layer starts for one stream of tokens in a training step: compiled (assumed), and not, where
`benchmarks/launches.py` counts 79 for images alone and 74 in a mixed batch, with drop path."""
GEMM_SHARE = 0.64
"""Assumed share of the peak in the matrix products of a step."""
COPY_SHARE = 0.9
"""Assumed share of the memory bandwidth in all other kernels."""
_MOVED = {True: 82, False: 134}
"""Bytes, assumed, that kernels other than products move in bf16 for each feature of a token in a layer's forward pass,
a third of forward and backward pass: with compiled blocks, and without. If nothing stayed in a cache the latter would
be 124 to 174, by the kind of batch (`benchmarks/launches.py`)."""


_MOVED_FP32 = 164
"""The same in fp32, assumed."""
_DDP_BUCKET = 25 * 2**20
"""Bytes of gradients that DDP reduces at once: PyTorch's own setting."""
_GATHER_LAUNCHES = 20
"""Kernels, assumed, that gathering or reducing a block of divided weights starts beside its collective."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One kind of collective in a step."""

    name: str
    sent: float
    """Bytes that each GPU sends."""
    collectives: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of one optimizer step."""

    compute: float
    extra: Mapping[str, float]
    """What of it is no useful operation, by name; empty where the MFU was given."""
    exchanges: tuple[Exchange, ...]
    exposed: float
    """What of the exchanges does not hide behind computation."""
    launches: float
    """Least time that starting the kernels takes."""
    mfu: float
    """Useful operations over the peak in the whole step."""

    @property
    def step(self) -> float:
        """The whole step."""
        return max(self.compute, self.launches) + self.exposed


def assumed_share(gpu: Gpu, model: ModelConfig, bf16: bool, compiled: bool) -> float:
    """Share of the peak that a model's operations reach: a roofline, not a measurement.

    Matrix products at `GEMM_SHARE` of the peak, and after them everything else at `COPY_SHARE` of the memory bandwidth.
    """
    operations = 8 * model.width**2 + 4 * model.width * model.ffn_width  # of a token in a layer
    peak = gpu.bf16 if bf16 else gpu.fp32
    moved = model.width * (_MOVED[compiled] if bf16 else _MOVED_FP32)
    seconds = operations / (GEMM_SHARE * peak) + moved / (COPY_SHARE * gpu.bandwidth)
    return operations / peak / seconds


def estimate_pace(run: Run, sizes: BatchSizes, counts: Counts, cluster: Cluster, mfu: float | None = None) -> Pace:
    """Time of one optimizer step.

    Args:
        run: mesh, accumulation, precision.
        sizes: one GPU's share of a batch.
        counts: parameters.
        cluster: where.
        mfu: measured share of the peak; None: assumed.
    """
    bf16 = run.precision != "fp32"
    peak = cluster.gpu.bf16 if bf16 else cluster.gpu.fp32
    parts = {"useful": sizes.flops / (mfu * peak)} if mfu else {}
    for name, model, flops in () if mfu else _work(sizes):
        seconds = flops / (peak * assumed_share(cluster.gpu, model, bf16, run.loop.compile))
        parts[name] = parts.get(name, 0.0) + seconds
    parts = {name: value * run.loop.accumulate for name, value in parts.items() if value}
    compute = sum(parts.values())
    parts.pop("useful")
    exchanges = list_exchanges(run, counts, cluster)
    kernels = LAUNCHES[run.loop.compile] * sum(map(_streams, sizes.passes)) * run.loop.accumulate
    if run.mesh.ranks_of_copy(cluster.gpus) > 1:
        kernels += _GATHER_LAUNCHES * sum(one.collectives for one in exchanges)
    launches = kernels * LAUNCH_SECONDS
    busy = max(compute, launches)
    seconds = sum(one.seconds for one in exchanges)
    # DDP reduces beside the last batch's backward pass, two thirds of its time; divided weights move all the time.
    hidden = busy if run.mesh.ranks_of_copy(cluster.gpus) > 1 else 2 / 3 * busy / run.loop.accumulate
    exposed = max(seconds - hidden, seconds / counts.num_blocks)
    useful = sizes.flops * run.loop.accumulate
    return Pace(compute, parts, tuple(exchanges), exposed, launches, useful / (peak * (busy + exposed)))


def _work(sizes: BatchSizes) -> Iterator[tuple[str, ModelConfig, float]]:
    """All operations of a batch by name, with the model whose widths they have."""
    for one in sizes.passes:
        yield "useful", one.model, 3 * one.flops
        if one.model.activation_checkpointing:
            yield "computed again", one.model, one.flops
    for head in sizes.heads:
        yield "useful", sizes.passes[0].model, 3 * head.flops
    if sizes.tokenizer is not None:
        yield "visual tokens", sizes.tokenizer.model, sizes.tokenizer.flops


def _streams(one: Pass) -> float:
    """Layers that are gone through in a training step, each stream by itself; a recomputed one counts for 1.4."""
    streams = int(any(part.vision for part in one.sequences)) + int(any(part.text for part in one.sequences))
    again = 1.4 if one.model.activation_checkpointing else 1.0
    return streams * one.num_layers * again


def list_exchanges(run: Run, counts: Counts, cluster: Cluster) -> list[Exchange]:
    """What each GPU sends to others in an optimizer step.

    Rings: of n members each sends (n - 1) / n of the bytes to gather or reduce-scatter them, and twice that to
    all-reduce them. Gradients travel in fp32, gathered weights in the run's type.
    """
    gpus, shard = cluster.gpus, run.mesh.ranks_of_copy(cluster.gpus)
    if gpus == 1:
        return []
    gradients = 4.0 * counts.trained

    def ring(name: str, moved: float, members: int, stride: int, collectives: int) -> Exchange:
        """Among `members` GPUs, `stride` apart, with so many bytes between them."""
        sent = moved * (members - 1) / members
        return Exchange(name, sent, collectives, cluster.seconds(sent, members, stride, collectives))

    if shard == 1:
        return [ring("all-reduce of gradients", 2 * gradients, gpus, 1, math.ceil(gradients / _DDP_BUCKET))]
    narrow = 4 if run.precision == "fp32" else 2
    blocks = counts.num_blocks + 1
    times = run.loop.accumulate
    again = (counts.parameters - counts.rest) if run.mesh.reshard else 0  # gathered once more for the backward pass
    gathered = narrow * (counts.parameters + again) * times
    found = [
        ring("all-gather of weights", gathered, shard, 1, (2 if again else 1) * blocks * times),
        ring("reduce-scatter of gradients", gradients, shard, 1, blocks),
    ]
    if shard < gpus:
        copies = gpus // shard
        found.append(ring("all-reduce between copies", 2 * gradients / shard, copies, shard, blocks))
    return found
