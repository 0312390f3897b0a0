"""The one training loop: draws batches, steps, logs, evaluates, saves. It knows no modality and no objective.

fit(run)            a `Run` in, metrics out; works alone or under torchrun
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from beit3.config import Run, nearest, to_plain
from beit3.errors import BeitError, ConfigError, DivergedError, PreemptedError
from beit3.train.checkpoint import Checkpoints, Kept, clean_leftovers, list_checkpoints, set_newer_aside
from beit3.train.distributed import Ranks, join_ranks, refuse_differences
from beit3.train.folder import CHECKPOINTS, EXPORT, fixed_hash, open_folder, write_preempted, write_record
from beit3.train.log import RunLog
from beit3.train.optim import Schedule, build_optimizer
from beit3.train.randomness import seed_all, unchanged
from beit3.train.sharding import clip_and_measure, divide, gradients_stay, is_divided, whole_state
from beit3.train.speed import choose_precision, matmul_ceiling
from beit3.train.task import Loader, Task, Work
from beit3.train.watch import (
    BAD_STEPS,
    LossWatch,
    check_budget,
    is_out_of_memory,
    record_bad_step,
    shapes_of,
    stop_signals,
)

_FORMER_BEST = 9
"""Best steps that are remembered beside the newest: of some the checkpoint may not have been saved."""


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    """Steps in a row that were skipped for NaN or infinity."""
    best: float | None = None
    """Best value so far of the metric of `loop.keep_best`, of which more is better."""
    best_steps: list[int] = field(default_factory=list)
    """Steps at which it was better than ever before, the last few."""
    losses: LossWatch = field(default_factory=LossWatch)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Progress:
        """Rebuild from `dataclasses.asdict`."""
        return cls(**{**saved, "losses": LossWatch(**saved["losses"])})


@dataclass
class Meters:
    """Sums since the last log record."""

    started: float = field(default_factory=time.perf_counter)
    batches: int = 0
    work: Work = field(default_factory=Work)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: dict[str, Tensor], work: Work) -> None:
        """Add the scalars and the work of one batch; nothing is copied from the device."""
        self.batches += 1
        self.work = self.work + work
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value


@dataclass(frozen=True)
class Gradients:
    """What one step found on this rank; the gradients themselves lie in the parameters."""

    losses: list[float]
    """Of each batch."""
    norm: float
    """Over all ranks, before clipping."""
    keys: list[str]
    """The step's samples."""
    statistics: list[Tensor]
    """Of batch norms, as they were before: forward passes change them."""

    @property
    def is_finite(self) -> bool:
        """Whether the weights may be changed."""
        return all(math.isfinite(value) for value in (*self.losses, self.norm))


@dataclass
class Trainer:
    """Everything one rank holds while it trains."""

    run: Run
    ranks: Ranks
    task: Task[Any]
    model: nn.Module
    """The Task as it lies over the ranks: what is called."""
    ema: ModelEmaV3 | None
    optimizer: Optimizer
    schedule: Schedule
    loader: Loader[Any]
    checkpoints: Checkpoints
    progress: Progress
    dtype: torch.dtype
    ceiling: float
    """Measured matrix-product FLOP/s, the denominator of MFU."""
    saved: float = 0.0
    """Seconds of training at the last checkpoint."""
    statistics: list[Tensor] = field(default_factory=list)
    """Running means and variances of batch norms."""
    shapes: str = "none yet"
    """Tensors of the batch that was computed last, in words."""

    @property
    def state(self) -> nn.Module:
        """The modules a checkpoint holds."""
        return nn.ModuleDict({"task": self.task, **({"ema": self.ema} if self.ema is not None else {})})

    def whole(self) -> Task[Any] | None:
        """The Task to evaluate and export: the moving average where there is one, with all its weights.

        All ranks take part; where weights are divided, rank 0 gets a copy of its own and the others None.
        """
        task: Task[Any] = self.task if self.ema is None else self.ema.module
        if not is_divided(task):
            return task
        state = whole_state(task)
        if not self.ranks.is_main:
            return None
        copy: Task[Any] = self.run.task.in_folder(self.run.data).build()
        copy.load_state_dict(state)
        return copy.to(self.ranks.device)


def fit(run: Run) -> dict[str, float]:
    """Train a run to its end.

    Args:
        run: what to train; `run.folder` receives log, checkpoints and the exported model.

    Returns:
        The last evaluation's metrics (rank 0; empty elsewhere).

    Raises:
        ConfigError: the run contradicts its folder or the data.
        DataMissingError: something it needs does not exist.
        BadDataError: too many samples cannot be used.
        DivergedError: too many steps in a row were not finite.
        RankLostError: another process of the run ended or hangs.
        PreemptedError: asked to stop; the state is saved.
    """
    with join_ranks(run.device, run.mesh.timeout) as ranks, stop_signals() as stop:
        refuse_differences(ranks, to_plain(run))
        with open_folder(run, ranks):
            trainer = _build(run, ranks)
            if ranks.is_main:
                write_record(run)  # once the run could be built: one that could not has not started
            if run.resume:
                _resume(trainer)
            with _last_save(trainer), _memory_told(trainer):
                with RunLog(run.folder, run.name, run.loop.steps, trainer.progress.step, ranks.is_main) as log:
                    for text in trainer.checkpoints.damaged:
                        log.alarm(trainer.progress.step, f"{text}, and put aside; what is older goes on")
                    _train(trainer, log, stop)
                    _save(trainer, log, wait=True)  # first: an evaluation that fails costs no training
                    metrics = _evaluate(trainer, log)
                _export(trainer, metrics)
            return metrics


def _build(run: Run, ranks: Ranks) -> Trainer:
    """Build everything in the order that makes ranks equal: one seed for weights, then one per rank."""
    seed_all(run.seed)
    dtype = choose_precision(run.precision, ranks.device)
    (narrow,) = ranks.agree(float(dtype == torch.bfloat16))
    dtype = torch.bfloat16 if narrow else torch.float32
    seed_all(run.seed)
    task = run.task.in_folder(run.data).build().to(ranks.device)
    ema = ModelEmaV3(task, decay=run.optim.ema_decay, use_warmup=True) if run.optim.ema_decay else None
    if ranks.is_main:
        task.prepare_data(run)
    ranks.barrier()
    loader = task.train_loader(run, ranks.rank, ranks.world_size)
    refuse_differences(ranks, {"data": loader.data_digest})
    if run.loop.compile:
        task.compile()
    model = divide(task, run.mesh, ranks, dtype)
    if ema is not None and is_divided(task):
        divide(ema.module, run.mesh, ranks, dtype)
    optimizer = build_optimizer(task, run.optim)
    ceiling = matmul_ceiling(ranks.device, dtype)
    seed_all(run.seed + 1000 * ranks.rank + 1)
    return Trainer(
        run=run,
        ranks=ranks,
        task=task,
        model=model,
        ema=ema,
        optimizer=optimizer,
        schedule=Schedule(optimizer, run.optim, run.loop.steps),
        loader=loader,
        checkpoints=Checkpoints(run.folder / CHECKPOINTS, ranks, fixed_hash(run)),
        progress=Progress(),
        dtype=dtype,
        ceiling=ceiling,
        statistics=[buffer for norm in task.modules() if isinstance(norm, _BatchNorm) for buffer in norm.buffers()],
    )


def _train(trainer: Trainer, log: RunLog, stop: list[int]) -> None:
    run, progress, ranks = trainer.run, trainer.progress, trainer.ranks
    trainer.model.train()
    batches = iter(trainer.loader)
    meters = Meters()
    done = _share_done(trainer) >= 1
    counted = _now()
    while not done:
        trainer.schedule.set(_share_done(trainer))
        found = _find_gradients(trainer, batches, meters)
        now = _now()
        bad, progress.seconds, stopping = ranks.agree(
            float(not found.is_finite), progress.seconds + now - counted, float(len(stop))
        )
        counted = now
        if bad:
            _skip_step(trainer, log, found)
        else:
            _take_step(trainer)
        progress.step += 1
        log.step(progress.step)
        paused = _now()
        _tell_failure(trainer, log)
        done = _share_done(trainer) >= 1
        logged = progress.step % run.loop.log_every == 0 or done
        if logged:
            _log(trainer, log, meters, found.norm)
        best = False
        if run.loop.eval_every and progress.step % run.loop.eval_every == 0 and not done:
            best = _is_best(trainer, _evaluate(trainer, log))
        if stopping and not done:
            _save(trainer, log, wait=True)
            write_preempted(run, ranks, progress.step)
            raise PreemptedError(f"stopped at step {progress.step}, state saved in {run.folder}: go on with --resume")
        if best or _is_due(trainer):
            _save(trainer, log)
        pause = _now() - paused  # what is not training does not count
        counted += pause
        meters.started += pause
        if logged:
            meters = Meters()


def _find_gradients(trainer: Trainer, batches: Iterator[Any], meters: Meters) -> Gradients:
    """Forward and backward passes over `accumulate` batches."""
    before = [buffer.clone() for buffer in trainer.statistics]
    window: list[Any] = []
    keys: list[str] = []
    for _ in range(trainer.run.loop.accumulate):
        window.append(next(batches))
        keys += trainer.loader.keys
    losses = _add_gradients(trainer, trainer.task.prepare_step(window), meters)
    norm = clip_and_measure(trainer.task, trainer.run.optim.clip_grad)
    return Gradients(torch.stack(losses).tolist(), norm, keys, before)


def _take_step(trainer: Trainer) -> None:
    """Change the weights."""
    trainer.progress.bad_steps = 0
    trainer.optimizer.step()
    if trainer.ema is not None:
        trainer.ema.update(trainer.task, step=trainer.progress.step)
    trainer.optimizer.zero_grad(set_to_none=True)


def _add_gradients(trainer: Trainer, window: Sequence[Any], meters: Meters) -> list[Tensor]:
    """Forward and backward passes of all batches of a step; their losses."""
    losses: list[Tensor] = []
    for index, drawn in enumerate(window):
        batch = trainer.task.move(drawn, trainer.ranks.device)
        trainer.shapes = shapes_of(batch)
        with gradients_stay(trainer.model, index < len(window) - 1), _autocast(trainer):
            values = trainer.model(batch)
            loss = values["loss"] / len(window)
        loss.backward()
        losses.append(loss.detach().float())
        meters.add(values, trainer.task.work(batch))
    return losses


def _skip_step(trainer: Trainer, log: RunLog, found: Gradients) -> None:
    """Change nothing, tell of it, and end the run when there were too many such steps in a row."""
    for buffer, value in zip(trainer.statistics, found.statistics, strict=True):
        buffer.copy_(value)
    run, progress, step = trainer.run, trainer.progress, trainer.progress.step + 1
    record_bad_step(run.folder, step, trainer.ranks.rank, found.losses, found.norm, found.keys)
    trainer.optimizer.zero_grad(set_to_none=True)
    progress.bad_steps += 1
    told = f"losses of rank 0 {found.losses}, gradient norm {found.norm:g}"
    log.alarm(step, f"not finite ({told}): nothing is changed, its samples are in {BAD_STEPS}")
    if progress.bad_steps >= run.loop.max_bad_steps:
        raise DivergedError(
            f"loss or gradient was NaN or infinite in {run.loop.max_bad_steps} steps in a row up to step {step}: "
            "lower optim.lr or resume from an earlier checkpoint"
        )


def _now() -> float:
    """Seconds of a steady clock."""
    return time.perf_counter()


def _share_done(trainer: Trainer) -> float:
    """Finished share of the run: by steps, or by time where a limit is set and nearer.

    The share of time counts squared: it ends a slow run at its limit, but the slow first steps of a run that has time
    enough do not move its learning rate, which then depends on nothing but the step.
    """
    loop, progress = trainer.run.loop, trainer.progress
    share = progress.step / loop.steps
    return share if loop.max_seconds is None else max(share, (progress.seconds / loop.max_seconds) ** 2)


def _log(trainer: Trainer, log: RunLog, meters: Meters, norm: float) -> None:
    """Write a record of all ranks, with what should be heard at once.

    Raises:
        BadDataError: on all ranks.
    """
    own = {name: float(total) / meters.batches for name, total in meters.sums.items()}
    loader = trainer.loader
    everyone = trainer.ranks.gather((own, dict(loader.skipped), loader.used))
    means = {name: statistics.fmean(one[name] for one, _, _ in everyone if name in one) for name in own}
    skipped: Counter[str] = Counter()
    for _, reasons, _ in everyone:
        skipped.update(reasons)
    elapsed = time.perf_counter() - meters.started
    size = trainer.ranks.world_size
    values = {
        **means,
        "lr": max(group["lr"] for group in trainer.optimizer.param_groups),
        "grad_norm": norm,
        "images_per_second": meters.work.images * size / elapsed,
        "tokens_per_second": meters.work.tokens * size / elapsed,
        "tflops": meters.work.flops / elapsed / 1e12,
        "mfu": meters.work.flops / elapsed / trainer.ceiling,
        "seconds": trainer.progress.seconds,
        "bad_steps": float(trainer.progress.bad_steps),
        **{f"skipped/{reason}": float(count) for reason, count in skipped.items()},
    }
    step = trainer.progress.step
    log.record(step, values)
    spike = trainer.progress.losses.spike(values["loss"])
    for text in (*trainer.task.alarms(values), *([spike] if spike else [])):
        log.alarm(step, text)
    check_budget(skipped, sum(used for _, _, used in everyone), trainer.run.loop.max_bad_fraction)


def _evaluate(trainer: Trainer, log: RunLog) -> dict[str, float]:
    """Evaluate on rank 0, without touching the random numbers of training."""
    metrics: dict[str, float] = {}
    with unchanged():
        task = trainer.whole()
        if trainer.ranks.is_main and task is not None and (batches := task.eval_loader(trainer.run)) is not None:
            task.eval()
            with torch.no_grad(), _autocast(trainer):
                metrics = task.evaluate(task.move(batch, trainer.ranks.device) for batch in batches)
            log.record(trainer.progress.step, metrics, event="eval")
            trainer.model.train()
    trainer.ranks.barrier()
    return metrics


def _is_best(trainer: Trainer, metrics: dict[str, float]) -> bool:
    """Whether the metric of `loop.keep_best` was never better; the same on all ranks.

    Raises:
        ConfigError: it is none of the evaluation's.
    """
    name, progress, main = trainer.run.loop.keep_best, trainer.progress, trainer.ranks.is_main
    if name is None:
        return False
    key = name.removeprefix("-")
    value = metrics.get(key, math.nan) * (-1 if name.startswith("-") else 1)
    unknown, value = trainer.ranks.agree(float(main and key not in metrics), value if main else -math.inf)
    if unknown:
        raise ConfigError(f"loop.keep_best '{key}' is no metric of this evaluation; {nearest(key, metrics)}")
    if not math.isfinite(value) or (progress.best is not None and value <= progress.best):
        return False
    progress.best = value
    progress.best_steps = [*progress.best_steps[-_FORMER_BEST:], progress.step]
    return True


def _is_due(trainer: Trainer) -> bool:
    """Whether steps or time since the last checkpoint ask for the next."""
    loop, progress = trainer.run.loop, trainer.progress
    waited = progress.seconds - trainer.saved
    return progress.step % loop.save_every == 0 or (loop.save_minutes is not None and waited >= 60 * loop.save_minutes)


def _save(trainer: Trainer, log: RunLog, wait: bool = False) -> None:
    """Save beside training, or to the end; a save that failed is told, and what was saved before stays."""
    run, progress = trainer.run, trainer.progress
    trainer.saved = progress.seconds
    extra = {
        "progress": dataclasses.asdict(progress),
        "loader": trainer.loader.state_dict(),
        "dtype": str(trainer.dtype),
    }
    kept = Kept(last=run.loop.keep, every=run.loop.keep_every, best=tuple(progress.best_steps))
    if wait:
        trainer.checkpoints.finish()
        _tell_failure(trainer, log)  # of an earlier save
    trainer.checkpoints.save(progress.step, trainer.state, trainer.optimizer, extra, kept)
    if wait:
        trainer.checkpoints.finish()
        if failure := _tell_failure(trainer, log):
            raise BeitError(f"{failure}; make room, and go on with --resume")


def _tell_failure(trainer: Trainer, log: RunLog) -> str | None:
    """Say that a save failed, as soon as it is known."""
    failure = trainer.checkpoints.take_failure()
    if failure:
        log.alarm(trainer.progress.step, failure)
    return failure


def _export(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Write the exchange folder and the last metrics."""
    folder = trainer.run.folder
    task = trainer.whole()
    if trainer.ranks.is_main and task is not None:
        task.save(folder / EXPORT)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        clean_leftovers(folder / CHECKPOINTS)
    trainer.ranks.barrier()


def _resume(trainer: Trainer) -> None:
    """Go to the newest valid checkpoint; without one the run starts at step 0."""
    run, ranks = trainer.run, trainer.ranks
    folder = run.folder / CHECKPOINTS
    if ranks.is_main:
        clean_leftovers(folder)
    ranks.barrier()
    path = trainer.checkpoints.newest()
    if path is None and list_checkpoints(folder):
        raise ConfigError(f"no checkpoint in {folder} is whole: restore one, or start again with --overwrite")
    if path is None:
        return
    if ranks.is_main:
        set_newer_aside(path)
    ranks.barrier()
    saved = trainer.checkpoints.restore(path, trainer.state, trainer.optimizer)
    trainer.progress = Progress.of(saved[0]["progress"])
    trainer.saved = trainer.progress.seconds
    trainer.dtype = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}[saved[0]["dtype"]]
    trainer.loader.load_state_dict([one["loader"] for one in saved])
    if len(saved) != ranks.world_size:  # nobody's random numbers are this rank's
        seed_all(run.seed + 1000 * ranks.rank + 1 + 1_000_003 * trainer.progress.step)


@contextmanager
def _last_save(trainer: Trainer) -> Iterator[None]:
    """Let a save under way end before an error does, unless the other ranks know nothing of the error."""
    try:
        yield
    except Exception as error:
        if trainer.ranks.world_size == 1 or isinstance(error, (DivergedError, PreemptedError)):
            with suppress(Exception):  # the first error is the one to tell
                trainer.checkpoints.finish()
        raise


@contextmanager
def _memory_told(trainer: Trainer) -> Iterator[None]:
    """Say what a device had no memory for."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise BeitError(
            f"out of memory after step {trainer.progress.step} on rank {trainer.ranks.rank}, with the batch "
            f"{trainer.shapes}: make it smaller, recompute (--task.model.activation-checkpointing), or divide "
            "(--mesh.shard 0)"
        ) from error


def _autocast(trainer: Trainer) -> Any:
    if trainer.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(trainer.ranks.device.type, dtype=trainer.dtype)
