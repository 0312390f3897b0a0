"""The one training loop: draws batches, steps, logs, evaluates, saves. It knows no modality and no objective.

fit(run)            a `Run` in, metrics out; works alone or under torchrun
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from beit3.config import Run, differences, to_plain, with_defaults
from beit3.errors import ConfigError, DivergedError, PreemptedError
from beit3.train.checkpoint import (
    clean_leftovers,
    delete_newer,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from beit3.train.distributed import Ranks, join_ranks
from beit3.train.log import RunLog
from beit3.train.optim import Schedule, build_optimizer, clip_and_measure
from beit3.train.speed import choose_precision, matmul_ceiling
from beit3.train.task import Loader, Task, Work

RUN_FILE = "run.json"
EXPORT = "export"
_FREE_TO_CHANGE = {"out", "resume", "overwrite", "device", "loop.log_every", "loop.eval_every", "loop.save_every"} | {
    "loop.keep",
    "loop.max_seconds",
    "data",
}
"""Fields that may differ when a run is resumed: they do not decide the result."""


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    """Steps in a row that were skipped for NaN or infinity."""


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


@dataclass
class Trainer:
    """Everything one rank holds while it trains."""

    run: Run
    ranks: Ranks
    task: Task[Any]
    model: nn.Module
    """The Task, under DistributedDataParallel if there are several ranks."""
    ema: ModelEmaV3 | None
    optimizer: Optimizer
    schedule: Schedule
    loader: Loader[Any]
    progress: Progress
    dtype: torch.dtype
    ceiling: float
    """Measured matrix-product FLOP/s, the denominator of MFU."""

    @property
    def state(self) -> nn.Module:
        """The modules a checkpoint holds."""
        return nn.ModuleDict({"task": self.task, **({"ema": self.ema} if self.ema is not None else {})})

    @property
    def evaluated(self) -> Task[Any]:
        """The Task that is evaluated and exported: the moving average where there is one."""
        if self.ema is None:
            return self.task
        averaged: Task[Any] = self.ema.module
        return averaged


def fit(run: Run) -> dict[str, float]:
    """Train a run to its end.

    Args:
        run: what to train; `run.folder` receives log, checkpoints and the exported model.

    Returns:
        The last evaluation's metrics (rank 0; empty elsewhere).

    Raises:
        ConfigError: the run contradicts its folder or the data.
        DataMissingError: something it needs does not exist.
        DivergedError: too many steps in a row were not finite.
        PreemptedError: asked to stop; the state is saved.
    """
    with join_ranks(run.device) as ranks, _stop_signals() as stop:
        _open_folder(run, ranks)
        trainer = _build(run, ranks)
        record = run.folder / RUN_FILE  # written once the run could be built: one that could not has not started
        if ranks.is_main and not record.exists():
            record.write_text(json.dumps(to_plain(run), indent=1) + "\n")
        checkpoints = run.folder / "checkpoints"
        if run.resume:
            _resume(trainer)
        with RunLog(run.folder, run.name, run.loop.steps, trainer.progress.step, ranks.is_main) as log:
            _train(trainer, log, stop)
            _save(trainer)  # first: an evaluation that fails costs no training
            metrics = _evaluate(trainer, log)
        if ranks.is_main:
            trainer.evaluated.save(run.folder / EXPORT)
            (run.folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
            clean_leftovers(checkpoints)
        ranks.barrier()
        return metrics


def _build(run: Run, ranks: Ranks) -> Trainer:
    """Build everything in the order that makes ranks equal: one seed for weights, then one per rank."""
    _seed(run.seed)
    dtype = choose_precision(run.precision, ranks.device)
    (narrow,) = ranks.agree(float(dtype == torch.bfloat16))
    dtype = torch.bfloat16 if narrow else torch.float32
    _seed(run.seed)
    task = run.task.in_folder(run.data).build().to(ranks.device)
    ema = ModelEmaV3(task, decay=run.optim.ema_decay, use_warmup=True) if run.optim.ema_decay else None
    loader = task.train_loader(run, ranks.rank, ranks.world_size)
    if run.loop.compile:
        task.compile()
    model: nn.Module = task
    if ranks.world_size > 1:
        device_ids = [ranks.device] if ranks.device.type == "cuda" else None
        model = DistributedDataParallel(task, device_ids=device_ids, broadcast_buffers=False)
    optimizer = build_optimizer(task, run.optim)
    ceiling = matmul_ceiling(ranks.device, dtype)
    _seed(run.seed + 1000 * ranks.rank + 1)
    return Trainer(
        run=run,
        ranks=ranks,
        task=task,
        model=model,
        ema=ema,
        optimizer=optimizer,
        schedule=Schedule(optimizer, run.optim, run.loop.steps),
        loader=loader,
        progress=Progress(),
        dtype=dtype,
        ceiling=ceiling,
    )


def _train(trainer: Trainer, log: RunLog, stop: list[int]) -> None:
    run, progress = trainer.run, trainer.progress
    trainer.model.train()
    batches = iter(trainer.loader)
    meters = Meters()
    while _share_done(trainer) < 1:
        started = _now()
        trainer.schedule.set(_share_done(trainer))
        norm = _step(trainer, batches, meters)
        progress.step += 1
        seconds, stopping = trainer.ranks.agree(progress.seconds + _now() - started, float(len(stop)))
        progress.seconds = seconds
        log.step(progress.step)
        if progress.step % run.loop.log_every == 0 or _share_done(trainer) >= 1:
            values = _summary(trainer, meters, norm)
            log.record(progress.step, values)
            for text in trainer.task.alarms(values):
                log.alarm(progress.step, text)
            meters = Meters()
        done = _share_done(trainer) >= 1
        if run.loop.eval_every and progress.step % run.loop.eval_every == 0 and not done:
            _evaluate(trainer, log)
            meters.started = time.perf_counter()
        if progress.step % run.loop.save_every == 0 or stopping:
            _save(trainer)
        if stopping and not done:
            (run.folder / "preempted").write_text(f"{progress.step}\n")
            raise PreemptedError(f"stopped at step {progress.step}, state saved in {run.folder}: go on with --resume")


def _step(trainer: Trainer, batches: Iterator[Any], meters: Meters) -> float:
    """One optimizer step over `accumulate` batches; a step that is not finite changes nothing."""
    run, ranks, progress = trainer.run, trainer.ranks, trainer.progress
    finite = True
    window = [next(batches) for _ in range(run.loop.accumulate)]
    trainer.task.prepare_step(window)
    for index, drawn in enumerate(window):
        batch = trainer.task.move(drawn, ranks.device)
        last = index == run.loop.accumulate - 1
        with _no_sync(trainer.model, last), _autocast(trainer):
            values = trainer.model(batch)
            loss = values["loss"] / run.loop.accumulate
        loss.backward()
        finite = finite and bool(torch.isfinite(loss.detach()))
        meters.add(values, trainer.task.work(batch))
    norm = float(clip_and_measure(trainer.task, run.optim.clip_grad))
    (bad,) = ranks.agree(float(not finite or not np.isfinite(norm)))
    if bad:
        _skip_step(trainer)
    else:
        progress.bad_steps = 0
        trainer.optimizer.step()
        if trainer.ema is not None:
            trainer.ema.update(trainer.task, step=progress.step)
    trainer.optimizer.zero_grad(set_to_none=True)
    return norm


def _skip_step(trainer: Trainer) -> None:
    """Count a step that was not finite; end the run when there are too many in a row."""
    progress, limit = trainer.progress, trainer.run.loop.max_bad_steps
    progress.bad_steps += 1
    if progress.bad_steps >= limit:
        raise DivergedError(
            f"loss or gradient was NaN or infinite in {limit} steps in a row up to step {progress.step + 1}: "
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


def _summary(trainer: Trainer, meters: Meters, norm: float) -> dict[str, float]:
    """Means and rates since the last record; rates are of all ranks, loss parts and skipped samples of this one."""
    elapsed = time.perf_counter() - meters.started
    size = trainer.ranks.world_size
    values = {name: float(total) / meters.batches for name, total in meters.sums.items()}
    skipped = {f"skipped/{reason}": float(count) for reason, count in trainer.loader.skipped.items()}
    return {
        **values,
        "lr": max(group["lr"] for group in trainer.optimizer.param_groups),
        "grad_norm": norm,
        "images_per_second": meters.work.images * size / elapsed,
        "tokens_per_second": meters.work.tokens * size / elapsed,
        "tflops": meters.work.flops / elapsed / 1e12,
        "mfu": meters.work.flops / elapsed / trainer.ceiling,
        "seconds": trainer.progress.seconds,
        "bad_steps": float(trainer.progress.bad_steps),
        **skipped,
    }


def _evaluate(trainer: Trainer, log: RunLog) -> dict[str, float]:
    """Evaluate on rank 0, without touching the random numbers of training."""
    metrics: dict[str, float] = {}
    if trainer.ranks.is_main and (batches := trainer.task.eval_loader(trainer.run)) is not None:
        task, device = trainer.evaluated, trainer.ranks.device
        task.eval()
        outer = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(), torch.no_grad(), _autocast(trainer):
            metrics = task.evaluate(trainer.task.move(batch, device) for batch in batches)
        random.setstate(outer[0])
        np.random.set_state(outer[1])
        log.record(trainer.progress.step, metrics, event="eval")
        trainer.model.train()
    trainer.ranks.barrier()
    return metrics


def _save(trainer: Trainer) -> None:
    run = trainer.run
    extra = {
        "progress": vars(trainer.progress).copy(),
        "loader": trainer.loader.state_dict(),
        "dtype": str(trainer.dtype),
    }
    save_checkpoint(
        run.folder / "checkpoints",
        trainer.progress.step,
        trainer.state,
        trainer.optimizer,
        extra,
        trainer.ranks,
        run.loop.keep,
    )


def _resume(trainer: Trainer) -> None:
    """Go to the newest valid checkpoint; without one the run starts at step 0."""
    folder = trainer.run.folder / "checkpoints"
    if trainer.ranks.is_main:
        clean_leftovers(folder)
        (trainer.run.folder / "preempted").unlink(missing_ok=True)
    trainer.ranks.barrier()
    path = latest_checkpoint(folder)
    if path is None and list_checkpoints(folder):
        raise ConfigError(f"no checkpoint in {folder} is whole: restore one, or start again with --overwrite")
    trainer.ranks.barrier()
    if path is None:
        return
    if trainer.ranks.is_main:
        delete_newer(path)
    extra = load_checkpoint(path, trainer.state, trainer.optimizer, trainer.ranks)
    trainer.progress = Progress(**extra["progress"])
    trainer.loader.load_state_dict(extra["loader"])
    trainer.dtype = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}[extra["dtype"]]


def _open_folder(run: Run, ranks: Ranks) -> None:
    """Make the run's folder, or check that it belongs to this run; all ranks end if it does not."""
    refused: ConfigError | None = None
    if ranks.is_main:
        try:
            _claim_folder(run)
        except ConfigError as error:
            refused = error
    (failed,) = ranks.agree(float(refused is not None))
    if failed:
        raise refused or ConfigError("rank 0 refused to start: see its message")


def _claim_folder(run: Run) -> None:
    record = run.folder / RUN_FILE
    if run.overwrite and run.folder.exists():
        shutil.rmtree(run.folder)
    if record.exists() and not run.resume:
        raise ConfigError(f"{run.folder} holds an earlier run: use --resume, --overwrite or another --name")
    if record.exists():
        stored = with_defaults(json.loads(record.read_text()), run)  # which may be of an earlier version
        changed = differences(stored, json.loads(json.dumps(to_plain(run))))
        changed = [name for name in changed if name not in _FREE_TO_CHANGE]
        if changed:
            raise ConfigError(f"{run.folder} was started with other values of {', '.join(changed)}: cannot resume")
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{run.folder} cannot be written ({error.strerror}): choose another --out") from error


def _autocast(trainer: Trainer) -> Any:
    if trainer.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(trainer.ranks.device.type, dtype=trainer.dtype)


def _no_sync(model: nn.Module, last: bool) -> Any:
    """Exchange gradients only with the last batch of an accumulated step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and the first SIGINT, so that the loop stops at a step boundary with its state saved."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: signals stay as they are
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
