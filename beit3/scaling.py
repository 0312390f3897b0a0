"""Memory, time and traffic of a run on GPUs that are not here: what `beit3 plan` prints.

Counted: parameters (of the very networks, without numbers), activations (`beit3.model.memory`), operations
(`beit3.model.flops`), bytes between GPUs. From data sheets: the GPUs. Assumed, and said so wherever it is printed: the
share of the peak that is reached, the efficiency of the links, and what is added for CUDA and fragmentation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from beit3.config import OptimConfig, Run, replace, require
from beit3.data.streams import Stream
from beit3.errors import ConfigError
from beit3.model.memory import (
    BF16,
    FP32,
    BatchSizes,
    Numbers,
    Pass,
    bytes_after_backward,
    bytes_before_backward,
    cast_bytes,
)
from beit3.model.presets import ModelConfig
from beit3.tokenizer.vqkd import VQKD, vqkd_config
from beit3.train.optim import build_optimizer
from beit3.train.sharding import blocks_of

GIB = 2**30
OVERHEAD = 1.5 * GIB
"""Assumed for the CUDA context, cuBLAS workspaces and NCCL's buffers."""
SLACK = 0.1
"""Assumed share of activations and working memory that the allocator loses to fragments, as text lengths vary."""
LINK_EFFICIENCY = 0.8
"""Assumed share of a link's nominal speed that collectives of large messages reach."""
HOP_SECONDS = 15e-6
"""Assumed start-up time of a collective for each doubling of its members."""
LAUNCH_SECONDS = 5e-6
"""Assumed time to start one kernel from Python: a step cannot be faster than its kernels are started."""
LAUNCHES = {True: 40, False: 80}
"""Kernels that one layer starts for one stream of tokens in a training step: compiled (assumed), and not (counted)."""
GEMM_SHARE = 0.64
"""Assumed share of the peak in the matrix products of a step: 790 of 989 TFLOP/s, measured once on an H100 for large
ones, and four fifths of that for a model's shapes."""
COPY_SHARE = 0.9
"""Assumed share of the memory bandwidth in all other kernels: 3.0 of 3.35 TB/s, measured once on an H100."""
_MOVED = {True: 82, False: 134}
"""Bytes that kernels other than matrix products move in bf16, for each feature of a token in a layer's forward pass, a
third of forward and backward pass: with compiled blocks (assumed), and without (counted)."""
_MOVED_FP32 = 164
_DDP_BUCKET = 25 * 2**20
_GATHER_LAUNCHES = 20
"""Kernels, assumed, that gathering or reducing a block of divided weights starts beside its collective."""
_WORTHWHILE = 0.9
"""A setting that changes more must make the step shorter by this factor to be proposed: nearer figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU and the machines it is commonly sold in; bytes and operations a second, one way."""

    name: str
    memory: float
    """GiB, as PyTorch reports them."""
    bf16: float
    """Dense peak with fp32 sums."""
    fp32: float
    bandwidth: float
    link: float
    """To the other GPUs of the machine."""
    network: float
    """To other machines, for each GPU."""
    per_node: int = 8


# Peak, memory and bandwidth: NVIDIA's data sheets of the SXM and PCIe boards named (dense figures, without sparsity).
# Links: NVLink 4 (900 GB/s both ways) and 3 (600), PCIe 4.0 x16; the RTX 4090 has no peer-to-peer, so half of PCIe.
# Network: DGX H100 and H200 400 Gbit/s a GPU, DGX A100 200; of the others nothing is standard: 100 and 10 are assumed.
GPUS = {
    "h100": Gpu("H100 80GB", 79.1, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu("H200 141GB", 139.7, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    "a100-80gb": Gpu("A100 80GB", 79.1, 312e12, 19.5e12, 2.04e12, 300e9, 25e9),
    "a100-40gb": Gpu("A100 40GB", 39.4, 312e12, 19.5e12, 1.56e12, 300e9, 25e9),
    "l40s": Gpu("L40S 48GB", 44.4, 362e12, 91.6e12, 0.864e12, 32e9, 12.5e9),
    "rtx4090": Gpu("RTX 4090 24GB", 23.6, 165e12, 82.6e12, 1.01e12, 16e9, 1.25e9),
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal GPUs in machines that are full, but for a single one."""

    gpu: Gpu
    gpus: int

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.gpus // self.gpu.per_node)

    def seconds(self, sent: float, members: int, stride: int, collectives: int) -> float:
        """Time of collectives.

        Args:
            sent: bytes that each GPU sends.
            members: GPUs that exchange.
            stride: distance from one to the next; 1 = neighbours.
            collectives: how many there are.
        """
        inside = max(1, self.gpu.per_node // stride)  # members in one machine: each has a network card of its own
        speed = self.gpu.link if members <= inside else min(self.gpu.link, inside * self.gpu.network)
        return sent / (LINK_EFFICIENCY * speed) + collectives * HOP_SECONDS * math.ceil(math.log2(members))


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters of a run's networks."""

    parameters: int
    trained: int
    optimizer: float
    """Bytes of the optimizer's state."""
    casts: tuple[int, int]
    """Bytes of autocast's copies of matrices: of all, and of those outside of blocks."""
    block: int
    """Parameters of the largest block that is gathered at once."""
    rest: int
    """Parameters outside of blocks, which stay gathered through a step."""
    num_blocks: int
    largest: int
    """Parameters of the largest tensor that is trained."""
    frozen: int
    """Parameters of the visual tokenizer."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU where it is fullest."""

    parts: Mapping[str, float]
    """They add up to `total`."""
    aside: Mapping[str, float]
    """What is there at another moment, in place of something larger."""
    host: float = 0.0
    """In the memory of the machine, for each GPU."""

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())


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


@dataclass(frozen=True, slots=True)
class Plan:
    """A run on a cluster."""

    run: Run
    cluster: Cluster
    sizes: BatchSizes
    """One batch of all GPUs."""
    counts: Counts
    memory: Memory
    pace: Pace
    measured: bool
    """Whether the MFU was given."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the run that were changed to make it fit."""

    @property
    def shard(self) -> int:
        """GPUs over which one copy of the weights is divided."""
        return ranks_of_copy(self.run, self.cluster.gpus)

    @property
    def fits(self) -> bool:
        """Whether a GPU's memory is enough."""
        return self.memory.total <= self.cluster.gpu.memory * GIB

    @property
    def seconds(self) -> float:
        """Of all steps, without what a failure costs."""
        return self.run.loop.steps * self.pace.step

    @property
    def images_per_second(self) -> float:
        """That all GPUs together need."""
        return self.sizes.images * self.run.loop.accumulate / self.pace.step

    @property
    def checkpoint(self) -> float:
        """Bytes of a checkpoint: weights, their moving average, optimizer."""
        copies = 2 if self.run.optim.ema_decay else 1
        return 4 * self.counts.parameters * copies + self.counts.optimizer


def make_plan(run: Run, cluster: Cluster, mfu: float | None = None, counts: Counts | None = None) -> Plan:
    """Plan a run.

    Args:
        run: what is trained; no file that it names is needed.
        cluster: where.
        mfu: measured share of the peak, 0..1, in which recomputation and targets are contained; None: assumed.
        counts: of this run's networks, if they are known; they do not depend on mesh, batch or checkpointing.

    Raises:
        ConfigError: nothing is known of the task, or batch or mesh do not divide among the GPUs.
    """
    sizes = sizes_of(run)
    check_division(run, cluster.gpus)
    counts = counts or count_parameters(sizes, run.optim)
    own = sizes.of_rank(cluster.gpus)
    memory = count_memory(run, own, counts, cluster.gpus, FP32 if run.precision == "fp32" else BF16)
    pace = estimate_pace(run, own, counts, cluster, mfu)
    return Plan(run, cluster, sizes, counts, memory, pace, mfu is not None)


def sizes_of(run: Run) -> BatchSizes:
    """One batch of all GPUs.

    Raises:
        ConfigError: nobody counts what this task keeps.
    """
    sizes = run.task.sizes
    if isinstance(sizes, BatchSizes):
        return sizes
    raise ConfigError(
        f"beit3 plan does not know what {type(run.task).__name__} keeps in memory: it plans pretraining "
        "(but not of tokenizers), classification, VQA, NLVR2, captioning and retrieval"
    )


def batch_fields(run: Run) -> dict[str, int]:
    """Names and values of the run's fields that hold a batch of all ranks."""
    found = {}
    for one in dataclasses.fields(run.task):
        value = getattr(run.task, one.name)
        if isinstance(value, Stream):
            found[f"task.{one.name}.batch_size"] = value.batch_size
        elif one.name == "batch_size":
            found["task.batch_size"] = value
    return found


def reads_streams(run: Run) -> bool:
    """Whether data processes make parts of a batch, which must then divide by them too."""
    return any(name != "task.batch_size" for name in batch_fields(run))


def check_division(run: Run, gpus: int) -> None:
    """Make sure that batches and mesh divide among the GPUs.

    Raises:
        ConfigError: they do not, and what would.
    """
    for name, size in batch_fields(run).items():
        require(
            size % gpus == 0,
            f"{name} {size} does not divide by {gpus} GPUs: use {_nearest_divisors(size, gpus)} GPUs, or "
            f"--{name.replace('_', '-')} {gpus * max(1, round(size / gpus))}",
        )
        workers = gpus * max(1, run.loop.num_workers)
        require(
            not reads_streams(run) or size % workers == 0,
            f"{name} {size} does not divide by {workers} data workers ({gpus} GPUs x {run.loop.num_workers}): "
            f"use --loop.num-workers {_workers_that_divide(run, gpus)}",
        )
    shard = ranks_of_copy(run, gpus)
    require(
        gpus % shard == 0,
        f"mesh.shard {shard} does not divide {gpus} GPUs: use a divisor, or --mesh.shard 0 for all of them",
    )


def _nearest_divisors(size: int, gpus: int) -> str:
    below = max(n for n in range(1, gpus + 1) if size % n == 0)
    above = next((n for n in range(gpus, size + 1) if size % n == 0), None)
    return f"{below}" if above is None else f"{below} or {above}"


def _workers_that_divide(run: Run, gpus: int) -> int:
    """Most data processes a GPU, up to those of the run, that batches divide by."""
    sizes = batch_fields(run).values()
    return max(
        n for n in range(1, max(1, run.loop.num_workers) + 1) if n == 1 or all(s % (n * gpus) == 0 for s in sizes)
    )


def ranks_of_copy(run: Run, gpus: int) -> int:
    """GPUs over which one copy of weights, gradients and optimizer state is divided."""
    return run.mesh.shard or gpus


def count_parameters(sizes: BatchSizes, optim: OptimConfig) -> Counts:
    """Count what a run trains, on networks without numbers."""
    with torch.device("meta"):
        model = sizes.build()
        frozen = 0
        if sizes.tokenizer is not None:
            shape = sizes.tokenizer.model
            config = vqkd_config(
                "vqkd_base_clip", decoder_depth=3, image_size=shape.image_size, patch_size=shape.patch_size
            )
            frozen = _size(VQKD(config))
    blocks = [_size(block) for block in blocks_of(model)]
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    inside, outside = optimizer_bytes(optim)
    matrices = sum(one.numel() for name, one in trained if "blocks." in name and one.ndim >= 2)
    total = sum(one.numel() for _, one in trained)
    return Counts(
        parameters=_size(model),
        trained=total,
        optimizer=inside * matrices + outside * (total - matrices),
        casts=cast_bytes(model),
        block=max(blocks, default=0),
        rest=_size(model) - sum(blocks),
        num_blocks=max(1, len(blocks)),
        largest=max((one.numel() for _, one in trained), default=0),
        frozen=frozen,
    )


def _size(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


class _TwoMatrices(nn.Module):
    """One matrix inside a block and one outside, for which optimizers may keep different things."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 64, bias=False)])
        self.head = nn.Linear(64, 64, bias=False)

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"blocks": r"blocks\.(\d+)\."}


def optimizer_bytes(optim: OptimConfig) -> tuple[float, float]:
    """Bytes that the optimizer keeps of a number in a block's matrix, and of any other: asked of the optimizer."""
    model = _TwoMatrices()
    optimizer = build_optimizer(model, optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = []
    for parameter in model.parameters():
        kept = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        found.append(sum(value.nbytes for value in kept if value.numel() > 1) / parameter.numel())
    return found[0], found[1]


def count_memory(
    run: Run, sizes: BatchSizes, counts: Counts, gpus: int, numbers: Numbers, *, reserves: bool = True
) -> Memory:
    """Bytes on one GPU.

    Args:
        run: optimizer, mesh and accumulation.
        sizes: one GPU's share of a batch.
        counts: parameters.
        gpus: how many share the run.
        numbers: bytes of a value.
        reserves: whether to add what CUDA takes and the allocator loses.
    """
    slack = 1 + SLACK * reserves
    shard = ranks_of_copy(run, gpus)
    narrow = numbers.compute < 4
    casts = counts.casts if narrow and shard == 1 else (0, 0)  # divided weights are gathered in bf16 already
    states = {
        "weights": 4 * counts.parameters / shard,
        f"optimizer ({run.optim.name})": counts.optimizer / shard,
        "moving average": 4 * counts.parameters / shard if run.optim.ema_decay else 0.0,
    }
    gradients = 4 * counts.trained / shard
    late = 0.0
    buffers = {"DDP's gradient buckets": 4.0 * counts.trained if gpus > 1 else 0.0}
    if shard > 1:
        gathered = counts.rest + 2 * counts.block if run.mesh.reshard else counts.parameters
        buffers = {"gathered weights": float(numbers.compute * gathered)}
        late = (numbers.compute + 4.0) * (counts.rest + counts.block)  # whole gradients, and in fp32 to be reduced
    host = 0.0
    if run.mesh.offload:
        host, states = sum(states.values()) + gradients, dict.fromkeys(states, 0.0)
        gradients = 0.0
    if shard > 1 and run.loop.accumulate > 1:
        gradients += 4 * counts.trained  # whole on every GPU until the last batch of the step
    added = 4.0 * counts.largest if run.loop.accumulate > 1 else 0.0  # a new gradient beside the one it is added to
    pixels = 3 * sizes.side**2 * sizes.images
    buffers |= {
        "visual tokenizer": 4.0 * counts.frozen * (2 if run.optim.ema_decay else 1),  # the average copies it too
        "pictures": (1 + 4 + numbers.compute) * pixels + 16 * sizes.gathered,
    }
    before = bytes_before_backward(sizes, numbers, casts) * slack + added
    after = bytes_after_backward(sizes, numbers) * slack + late
    aside: dict[str, float] = {}
    if run.loop.accumulate > 1:
        moment = {"gradients": gradients, "activations": max(before, after)}
    elif before >= after + gradients:
        moment, aside = {"activations": before}, {"gradients": gradients}
    else:
        moment, aside = {"gradients": gradients, "last activations": after}, {"activations": before}
    parts = {**states, **buffers, **moment, "CUDA and NCCL": OVERHEAD * reserves}
    return Memory({name: value for name, value in parts.items() if value}, aside, host)


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
    if ranks_of_copy(run, cluster.gpus) > 1:
        kernels += _GATHER_LAUNCHES * sum(one.collectives for one in exchanges)
    launches = kernels * LAUNCH_SECONDS
    busy = max(compute, launches)
    seconds = sum(one.seconds for one in exchanges)
    # DDP reduces beside the last batch's backward pass, two thirds of its time; divided weights move all the time.
    hidden = busy if ranks_of_copy(run, cluster.gpus) > 1 else 2 / 3 * busy / run.loop.accumulate
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
    gpus, shard = cluster.gpus, ranks_of_copy(run, cluster.gpus)
    if gpus == 1:
        return []
    gradients = 4.0 * counts.trained

    def exchange(name: str, moved: float, members: int, stride: int, collectives: int) -> Exchange:
        sent = moved * (members - 1) / members
        return Exchange(name, sent, collectives, cluster.seconds(sent, members, stride, collectives))

    if shard == 1:
        return [exchange("all-reduce of gradients", 2 * gradients, gpus, 1, math.ceil(gradients / _DDP_BUCKET))]
    narrow = 4 if run.precision == "fp32" else 2
    blocks = counts.num_blocks + 1
    times = run.loop.accumulate
    again = (counts.parameters - counts.rest) if run.mesh.reshard else 0  # gathered once more for the backward pass
    gathered = narrow * (counts.parameters + again) * times
    found = [
        exchange("all-gather of weights", gathered, shard, 1, (2 if again else 1) * blocks * times),
        exchange("reduce-scatter of gradients", gradients, shard, 1, blocks),
    ]
    if shard < gpus:
        copies = gpus // shard
        found.append(exchange("all-reduce between copies", 2 * gradients / shard, copies, shard, blocks))
    return found


def fastest_fit(run: Run, cluster: Cluster, mfu: float | None = None) -> Plan | None:
    """The fastest plan that fits, over meshes, activation checkpointing and accumulated batches; None: there is none.

    A batch is divided only where that leaves the objective as it is: contrastive losses compare pairs of one batch.
    """
    counts = count_parameters(sizes_of(run), run.optim)
    best: Plan | None = None
    for changes in _alternatives(run, cluster):
        try:
            found = make_plan(replace(run, **changes), cluster, mfu, counts)
        except ConfigError:  # does not divide
            continue
        if found.fits and (best is None or found.pace.step < _WORTHWHILE * best.pace.step):
            best = dataclasses.replace(found, changes=changes)
    return best


def _alternatives(run: Run, cluster: Cluster) -> Iterator[dict[str, Any]]:
    """Changes of the run, those that change least first."""
    gpus, per_node = cluster.gpus, cluster.gpu.per_node
    meshes = [run.mesh.shard]
    if gpus > 1:
        meshes += [shard for shard in (per_node, 0) if shard != run.mesh.shard and shard < gpus]
    recomputed = getattr(getattr(run.task, "model", None), "activation_checkpointing", True)
    sizes = batch_fields(run)
    most = 1 if run.task.sizes.gathered else min(sizes.values()) // gpus
    for power in range(max(1, most).bit_length()):
        for again in ({}, {"task.model.activation_checkpointing": True}) if not recomputed else ({},):
            for shard in meshes:
                changes: dict[str, Any] = {} if shard == run.mesh.shard else {"mesh.shard": shard}
                changes |= again
                if power:
                    changes["loop.accumulate"] = run.loop.accumulate * 2**power
                    changes |= {name: size // 2**power for name, size in sizes.items()}
                workers = _workers_that_divide(replace(run, **changes), gpus)
                if reads_streams(run) and workers < run.loop.num_workers:
                    changes["loop.num_workers"] = workers
                yield changes
