"""A Task without modality: fits a line, and can be told to misbehave at a step."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beit3.config import Run, TaskConfig, config, replace
from beit3.errors import DataMissingError
from beit3.train.task import Loader, Task, Work

WIDTH = 4


@config
class LineConfig(TaskConfig):
    batch_size: int = 8
    nan_at: tuple[int, ...] = ()
    """Numbers of forward passes, from 1, whose loss is NaN."""
    stop_at: int = 0
    """Forward pass during which SIGTERM arrives."""
    dropout: float = 0.0
    evaluation_fails: bool = False

    def build(self) -> Line:
        return Line(self)


class Rows:
    """Endless batches of rows that depend on their number alone."""

    data_digest = ""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank, self.position = size, rank, 0
        self.skipped: Counter[str] = Counter()
        self.used = 0
        self.keys: list[str] = []

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            rows = range(self.position * self.size, (self.position + 1) * self.size)
            self.position += 1
            self.skipped["odd"] += 1
            self.used += self.size
            self.keys = [f"row {row}" for row in rows]
            yield torch.stack([torch.randn(WIDTH + 1, generator=torch.Generator().manual_seed(row)) for row in rows])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "skipped": dict(self.skipped), "used": self.used}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        (state,) = states
        self.position, self.used = state["position"], state["used"]
        self.skipped = Counter(state["skipped"])


class Line(Task[Tensor]):
    """y = w x + b under squared error."""

    def __init__(self, config: LineConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(WIDTH, 1)
        self.drop = nn.Dropout(config.dropout)
        self.seen: list[Tensor] = []
        """The weights of every forward pass."""
        self.passes = 0

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[Tensor]:
        return Rows(self.config.batch_size, rank)

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        self.passes += 1
        self.seen.append(self.linear.weight.detach().clone())
        if self.passes == self.config.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = ((self.linear(self.drop(batch[:, 1:]))[:, 0] - batch[:, 0]) ** 2).mean()
        if self.passes in self.config.nan_at:
            loss = loss * torch.nan
        return {"loss": loss, "passes": torch.tensor(float(self.passes))}

    def work(self, batch: Tensor) -> Work:
        return Work(len(batch), batch.numel(), 2.0 * batch.numel())

    def move(self, batch: Tensor, device: torch.device) -> Tensor:
        return batch.to(device)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.linear.state_dict(), folder / "line.pt")

    def eval_loader(self, run: Run) -> Iterable[Tensor] | None:
        if self.config.evaluation_fails:
            raise DataMissingError("held out: no such folder")
        return [torch.ones(2, WIDTH + 1)]

    def evaluate(self, loader: Iterable[Tensor]) -> dict[str, float]:
        torch.rand(3)  # draws random numbers, as an evaluation may
        return {"answer": sum(float(self.linear(batch[:, 1:]).sum()) for batch in loader)}


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[Line]:
    """The Tasks that runs of this test have built, in order."""
    built: list[Line] = []

    def build(self: LineConfig) -> Line:
        built.append(Line(self))
        return built[-1]

    monkeypatch.setattr(LineConfig, "build", build)
    return built


@pytest.fixture
def line_run(tmp_path: Path, tasks: list[Line]) -> Callable[..., Run]:
    """A run of six steps on the CPU, with fields changed."""

    def make(**changes: Any) -> Run:
        run = Run(name="line", task=LineConfig(), out=tmp_path, device="cpu", precision="fp32")
        defaults = {"optim.lr": 0.05, "loop.steps": 6, "loop.log_every": 1, "loop.save_every": 2}
        return replace(run, **{**defaults, **changes})

    return make
