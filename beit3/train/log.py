"""What a run says: a progress bar or plain lines, `log.jsonl`, TensorBoard. Rank 0 speaks, the others are silent."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from beit3.train.folder import write_whole

LOG_FILE = "log.jsonl"
_SHOWN = ("loss", "mim_accuracy", "mlm_accuracy", "codebook_use", "images_per_second", "mfu")
"""Values in the console line; all others are in the files."""


class RunLog:
    """Writer of one run's records; use it as a context manager.

    Args:
        folder: the run's folder.
        name: shown on the console.
        steps: length of the run.
        first_step: step the run starts or resumes at; later records of an interrupted run are dropped.
        enabled: False on all ranks but 0.
    """

    def __init__(self, folder: Path, name: str, steps: int, first_step: int = 0, enabled: bool = True) -> None:
        self._enabled = enabled
        self._name = name
        self._steps = steps
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG_FILE
        kept = [record for record in _read_records(path) if record["step"] <= first_step]
        write_whole(path, "".join(f"{json.dumps(record)}\n" for record in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
                console=self._console,
            )
            self._line = self._bar.add_task(name, total=steps, completed=first_step, values="")
            self._bar.start()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            if self._bar is not None:
                self._bar.stop()
            self._board.close()
            self._file.close()

    def step(self, step: int) -> None:
        """Move the progress bar."""
        if self._enabled and self._bar is not None:
            self._bar.update(self._line, completed=step)

    def record(self, step: int, values: Mapping[str, float], event: str = "train") -> None:
        """Write one record to all files and show it.

        Args:
            step: finished optimizer steps.
            values: numbers by name.
            event: `train` or `eval`.
        """
        if not self._enabled:
            return
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "event": event, **rounded}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{event}/{name}", value, step)
        shown = values if event == "eval" else {name: values[name] for name in _SHOWN if name in values}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if self._bar is not None and event == "train":
            self._bar.update(self._line, completed=step, values=text)
        else:
            self.say(f"{self._name}  {event}  step {step}/{self._steps}  {text}")

    def alarm(self, step: int, text: str) -> None:
        """Write and print what a user should hear at once."""
        if self._enabled:
            self._file.write(json.dumps({"step": step, "event": "alarm", "text": text}) + "\n")
            self._file.flush()
            self.say(f"{self._name}  ALARM  step {step}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        """Print one line."""
        if self._enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def read_log(folder: Path, event: str = "train") -> list[dict[str, Any]]:
    """Records of a run's log in order."""
    return [record for record in _read_records(folder / LOG_FILE) if record["event"] == event]


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a log; what a kill cut short or a loss of power left unreadable is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and {"step", "event"} <= record.keys():
                records.append(record)
    return records
