"""The command `beit3 plan`: what a run needs on machines that are not here, on one page, or as rows of a table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from beit3.config import Run, require
from beit3.errors import ConfigError
from beit3.model.memory import BatchSizes
from beit3.plan.fit import Plan, batch_fields, fastest_fit, make_plan, reads_streams
from beit3.plan.footprint import OVERHEAD, SLACK
from beit3.plan.gpus import GIB, GPUS, LINK_EFFICIENCY, Cluster

PICTURE_BYTES = 20_000
"""Assumed of a stored picture: a JPEG of at most 288 pixels, as shards should hold them."""
WORD_BYTES = 4
"""Assumed of a stored token of text."""
DECODED = {"of at most 288 pixels": 400, "as found on the web": 130}
"""Pictures that a data process decodes, crops and masks in a second, by what is stored; assumed."""
GPU_HOURS_A_FAILURE = 16_384 * 54 * 24 / 419
"""Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 H100s (arXiv 2407.21783, section 3.3.4)."""
_DAY = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Where a run would be trained; all other options are fields of the run, as for `beit3 train`."""

    gpus: tuple[int, ...] = ()
    """How many GPUs; several numbers print a table with a row each."""
    gpu: Literal["h100", "h200", "a100-80gb", "a100-40gb", "l40s", "rtx4090"] = "h100"
    """Which GPU."""
    mfu: float | None = None
    """Measured share of the GPU's dense peak, in 0..1: `tflops` of a run's log over the peak. None: assumed."""
    network: float | None = None
    """Gbit/s to other machines for each GPU, one way. None: as the GPU is commonly sold."""
    fit: bool = False
    """Change mesh, activation checkpointing and accumulated batches until it fits, the fastest way."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        require(bool(self.gpus), "beit3 plan needs to know on how many GPUs: --gpus N")
        require(min(self.gpus) >= 1, f"--gpus must be at least 1, not {min(self.gpus)}")
        require(self.mfu is None or 0 < self.mfu < 1, f"--mfu is a share in 0..1, not {self.mfu}")
        known = self.network is None or 0 < self.network < math.inf
        require(known, f"--network must be above 0 Gbit/s, not {self.network}")


def print_plan(run: Run, options: PlanOptions) -> None:
    """Print the plan of a run, or a table of plans.

    Raises:
        ConfigError: it does not fit, or does not divide; the message names settings that do.
    """
    if len(options.gpus) > 1 and not options.json:
        print("\n".join(table_lines(run, options)))
        return
    plans = [plan_on(run, gpus, options) for gpus in options.gpus]
    if options.json:
        print(json.dumps([as_json(plan) for plan in plans] if len(plans) > 1 else as_json(plans[0]), indent=1))
        return
    print("\n".join(_page(plans[0])))


def plan_on(run: Run, gpus: int, options: PlanOptions) -> Plan:
    """Plan a run on so many GPUs.

    Raises:
        ConfigError: it does not fit, or does not divide; the message names settings that do.
    """
    gpu = GPUS[options.gpu]
    if options.network is not None:
        gpu = dataclasses.replace(gpu, network=options.network * 1e9 / 8)
    cluster = Cluster(gpu, gpus)
    plan = None
    if not options.fit:
        plan = make_plan(run, cluster, options.mfu)
        if plan.fits:
            return plan
    fitting = fastest_fit(run, cluster, options.mfu)
    if options.fit and fitting is not None:
        return fitting
    what = f"{run.name} on {gpus} x {gpu.name}"
    if plan is not None:
        over = plan.memory.total / GIB - gpu.memory
        what += f" needs {plan.memory.total / GIB:,.0f} GiB a GPU, {over:,.0f} more than there are"
    if fitting is None:
        raise ConfigError(f"{what}: no mesh, checkpointing or accumulation makes it fit; use more or larger GPUs")
    raise ConfigError(f"{what}: {as_flags(fitting.changes)} fits, with {fitting.memory.total / GIB:.0f} GiB")


def as_flags(changes: Mapping[str, Any]) -> str:
    """Changed fields as options of the command line."""
    words = []
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain data: bytes, seconds, shares."""
    memory, pace = plan.memory, plan.pace
    return {
        "run": plan.run.name,
        "gpus": plan.cluster.gpus,
        "gpu": plan.cluster.gpu.name,
        "changes": dict(plan.changes),
        "parameters": plan.counts.parameters,
        "trained_parameters": plan.counts.trained,
        "memory": {**memory.parts, "total": memory.total},
        "host_memory": memory.host,
        "gpu_memory": plan.cluster.gpu.memory * GIB,
        "seconds_per_step": pace.step,
        "compute_seconds": pace.compute,
        "launch_seconds": pace.launches,
        "exposed_communication_seconds": pace.exposed,
        "communication": {one.name: {"bytes": one.sent, "seconds": one.seconds} for one in pace.exchanges},
        "mfu": pace.mfu,
        "mfu_is_measured": plan.measured,
        "days": plan.seconds / _DAY,
        "gpu_days": plan.seconds / _DAY * plan.cluster.gpus,
        "images_per_second": plan.images_per_second,
        "storage_bytes_per_second": storage_rate(plan),
        "checkpoint_bytes": plan.checkpoint,
        "seconds_lost_per_failure": seconds_lost(plan),
    }


def storage_rate(plan: Plan) -> float:
    """Bytes a second that all GPUs read."""
    batch = plan.sizes.images * PICTURE_BYTES + plan.sizes.words * WORD_BYTES
    return batch * plan.run.loop.accumulate / plan.pace.step


def seconds_lost(plan: Plan) -> float:
    """Training time that a failure costs on average: half of the time between two checkpoints."""
    between = plan.run.loop.save_every * plan.pace.step
    if plan.run.loop.save_minutes is not None:
        between = min(between, 60 * plan.run.loop.save_minutes)
    return between / 2


def table_lines(run: Run, options: PlanOptions) -> Iterator[str]:
    """Plans as a table in Markdown, a row for each number of GPUs."""
    names = ("GPUs", "weights", "batches a step", "recomputed", "GiB a GPU", "s a step", "MFU", "days", "GPU-days")
    yield f"| {' | '.join(names)} | images/s of a GPU |"
    yield f"|{'---|' * (len(names) + 1)}"
    for gpus in options.gpus:
        try:
            plan = plan_on(run, gpus, options)
        except ConfigError as error:
            yield f"| {gpus:,} | {error} |{' |' * (len(names) - 1)}"
            continue
        own = plan.run
        days = plan.seconds / _DAY
        yield (
            f"| {gpus:,} | {_layout(plan)} | {own.loop.accumulate} | {'yes' if plan.sizes.recomputed else 'no'} "
            f"| {plan.memory.total / GIB:.0f} | {_number(plan.pace.step)} | {plan.pace.mfu:.2f} "
            f"| {_number(days)} | {_number(days * gpus)} | {_number(plan.images_per_second / gpus)} |"
        )


def _layout(plan: Plan) -> str:
    """How weights lie over the GPUs, in a word or two."""
    gpus, shard = plan.cluster.gpus, plan.shard
    if gpus == 1:
        return "one GPU"
    return "DDP" if shard == 1 else "FSDP" if shard == gpus else f"hybrid, {shard} a copy"


def _number(value: float) -> str:
    """Two or three figures that mean something."""
    if value >= 100:
        digits = 10 ** max(0, len(f"{value:.0f}") - 3)
        return f"{round(value / digits) * digits:,}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def _page(plan: Plan) -> Iterator[str]:
    """One plan on one page."""
    run, cluster, sizes = plan.run, plan.cluster, plan.sizes
    nodes = f" ({cluster.nodes} machines of {cluster.gpu.per_node})" if cluster.nodes > 1 else ""
    precision = "fp32" if run.precision == "fp32" else "bf16"
    yield f"{run.name} on {cluster.gpus:,} x {cluster.gpu.name}{nodes}, {precision}, {_mesh_line(plan)}"
    if plan.changes:
        yield f"changed to fit: {as_flags(plan.changes)}"
    yield ""
    batches = f"{run.loop.accumulate} batches of " if run.loop.accumulate > 1 else ""
    yield f"a step      {batches}{_sequences(sizes)}"
    if cluster.gpus > 1:
        yield f"a GPU       {batches}{_sequences(sizes.of_rank(cluster.gpus))}"
    yield f"parameters  {_count(plan.counts.parameters)}, {_count(plan.counts.trained)} of them trained"
    yield ""
    yield from _memory_lines(plan)
    yield ""
    yield from _time_lines(plan)
    yield ""
    yield from _data_lines(plan)
    yield ""
    yield from _checkpoint_lines(plan)
    yield ""
    yield from _assumptions(plan)


def _mesh_line(plan: Plan) -> str:
    shard = plan.shard
    if plan.cluster.gpus == 1:
        return "everything on it"
    if shard == 1:
        return "weights whole on every GPU (DDP)"
    copies = plan.cluster.gpus // shard
    kind = "FSDP" if copies == 1 else f"hybrid, {copies} copies"
    return f"weights divided over {shard:,} GPUs ({kind}{'' if plan.run.mesh.reshard else ', kept gathered'})"


def _sequences(sizes: BatchSizes) -> str:
    """Kinds of sequences of all passes, with their lengths."""
    found: Counter[str] = Counter()
    for one in sizes.passes:
        for part in one.sequences:
            kind = "pairs" if part.vision and part.text else "images" if part.vision else "texts"
            lengths = " + ".join(f"{length}" for length in (part.vision, part.text) if length)
            found[f"{kind} of {lengths} tokens"] += part.count
    return ", ".join(f"{count:,} {kind}" for kind, count in found.items() if count)


def _memory_lines(plan: Plan) -> Iterator[str]:
    gpu, memory = plan.cluster.gpu, plan.memory
    rows = {"memory of a GPU": "GiB"}
    rows |= {f"  {name}": f"{value / GIB:.1f}" for name, value in memory.parts.items()}
    for name, value in memory.aside.items():
        rows[f"  {name}, before or after the fullest moment"] = f"({value / GIB:.1f})"
    free = gpu.memory - memory.total / GIB
    rows[f"  together, of {gpu.memory:.0f}: fits, {free:.0f} left"] = f"{memory.total / GIB:.1f}"
    if memory.host:
        rows["  in the machine's memory instead, for each GPU"] = f"{memory.host / GIB:.1f}"
    names, values = max(map(len, rows)), max(map(len, rows.values()))
    yield from (f"{name:<{names}}    {value:>{values}}" for name, value in rows.items())


def _time_lines(plan: Plan) -> Iterator[str]:
    pace, run = plan.pace, plan.run
    origin = "from the given MFU" if plan.measured else "assumed, not measured"
    yield f"time of a step                 {_seconds(pace.step)}, an MFU of {pace.mfu:.2f} ({origin})"
    extra = ", ".join(f"{value / pace.compute:.0%} {name}" for name, value in pace.extra.items())
    yield f"  computation                  {_seconds(pace.compute)}{f', of which {extra}' if extra else ''}"
    if pace.launches > pace.compute:
        yield f"  but starting its kernels     {_seconds(pace.launches)}: batches are too small for so many GPUs"
    for one in pace.exchanges:
        yield f"  {one.name:<28} {_bytes(one.sent)} sent by each GPU, {_seconds(one.seconds)}"
    if pace.exchanges:
        yield f"  of which not hidden          {_seconds(pace.exposed)}"
    whole = f", {_span(plan.seconds * plan.cluster.gpus)} of one GPU" if plan.cluster.gpus > 1 else ""
    yield f"{run.loop.steps:,} steps".ljust(31) + f"{_span(plan.seconds)}{whole}"


def _data_lines(plan: Plan) -> Iterator[str]:
    gpus, rate = plan.cluster.gpus, plan.images_per_second
    if not rate:
        return
    yield f"pictures needed                {_number(rate)} a second, {_number(rate / gpus)} by each GPU"
    storage = storage_rate(plan)
    yield f"  from storage                 {_bytes(storage)} a second, {_bytes(storage / gpus)} by each GPU"
    streams = sum(1 for name in batch_fields(plan.run) if name.startswith(("task.pairs", "task.images")))
    given = max(1, plan.run.loop.num_workers) * (streams if reads_streams(plan.run) else 1)
    needed = [f"{_processes(rate / gpus, speed)} for pictures {kind}" for kind, speed in DECODED.items()]
    yield f"  data processes of a GPU      {', '.join(needed)}; the run has {given}"


def _processes(rate: float, speed: float) -> str:
    return f"{-(-rate // speed):.0f}"


def _checkpoint_lines(plan: Plan) -> Iterator[str]:
    between = 2 * seconds_lost(plan)
    yield f"checkpoint                     {_bytes(plan.checkpoint)}, every {_span(between)}"
    failures = _between_failures(plan)
    lost = f"a failure costs half of that, {_span(between / 2)}, and the new start"
    if plan.seconds > failures:
        lost += f"; expect one every {_span(failures)}"
    yield f"  {lost}"


def _assumptions(plan: Plan) -> Iterator[str]:
    yield "assumed"
    if plan.sizes.words:
        yield "  captions fill half of max_text_length, texts alone all of it"
    if plan.sizes.tokenizer is not None:
        yield "  a visual tokenizer of base size with 8,192 codes"
    if not plan.measured:
        kind = "compiled" if plan.run.loop.compile else "not compiled (--loop.compile is faster)"
        yield f"  speed by a roofline, blocks {kind}; --mfu takes a measured one"
    yield f"  {SLACK:.0%} of the activations lost to fragments, {OVERHEAD / GIB} GiB for CUDA and NCCL"
    if plan.pace.exchanges:
        yield f"  links at {LINK_EFFICIENCY:.0%} of nominal; exchanges hide behind computation but for a block's share"
    if plan.run.mesh.offload:
        yield "  copies between GPU and host, and the optimizer on the CPU (mesh.offload), take no time: they do"
    if plan.sizes.images:
        speeds = " or ".join(f"{speed}" for speed in DECODED.values())
        yield f"  {PICTURE_BYTES / 1000:.0f} kB a picture, {speeds} pictures a second by a data process; no waiting"
    if plan.seconds > _between_failures(plan):
        yield "  failures as often as Llama 3's on 16,384 H100s (arXiv 2407.21783)"


def _between_failures(plan: Plan) -> float:
    return GPU_HOURS_A_FAILURE * 3600 / plan.cluster.gpus


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.0f} million"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{_number(number / size)} {unit}"
    return f"{_number(number / 1e3)} kB"


def _seconds(value: float) -> str:
    return f"{_number(value)} s" if value >= 1 else f"{_number(value * 1000)} ms"


def _span(seconds: float) -> str:
    for unit, size in (("days", _DAY), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{_number(seconds / size)} {unit}"
    return f"{_number(seconds)} seconds"
