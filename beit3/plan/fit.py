"""A run on a cluster: whether it divides and fits, and what must change so that it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from beit3.config import Run, replace, require
from beit3.data.streams import Stream
from beit3.errors import ConfigError
from beit3.model.memory import BF16, FP32, BatchSizes
from beit3.plan.footprint import Counts, Memory, count_memory, count_parameters
from beit3.plan.gpus import GIB, Cluster
from beit3.plan.pace import Pace, estimate_pace

_WORTHWHILE = 0.9
"""A setting that changes more must make the step shorter by this factor to be proposed: nearer figures mean nothing."""


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
        return self.run.mesh.ranks_of_copy(self.cluster.gpus)

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
    run.mesh.ranks_of_copy(gpus)


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
    batch = sizes_of(run)
    sizes = batch_fields(run)
    most = 1 if batch.gathered else min(sizes.values()) // gpus
    for power in range(max(1, most).bit_length()):
        for again in ({}, {"task.model.activation_checkpointing": True}) if not batch.recomputed else ({},):
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
