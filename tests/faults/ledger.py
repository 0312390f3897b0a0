"""A recipe of masked data modeling that writes down every sample it draws; STOP_AT=N asks it to stop at draw N."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from beit3.config import Run, config, replace
from beit3.pretrain.masked_batches import MaskedBatch
from beit3.pretrain.masked_data_modeling import MaskedDataModeling, MaskedDataModelingConfig
from beit3.recipes import load_recipe
from beit3.train.task import Loader, Mapped


@config
class LedgerConfig(MaskedDataModelingConfig):
    def build(self) -> LedgerTask:
        return LedgerTask(self)


class LedgerTask(MaskedDataModeling):
    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[MaskedBatch]:
        return Ledger(super().train_loader(run, rank, world_size), run.folder / f"ledger-{rank}.jsonl")


class Ledger(Mapped[MaskedBatch, MaskedBatch]):
    """A loader that appends a line for each draw."""

    def __init__(self, loader: Loader[MaskedBatch], path: Path) -> None:
        super().__init__(loader, lambda batch: batch)
        self.path, self.draw = path, 0

    def __iter__(self) -> Iterator[MaskedBatch]:
        for batch in super().__iter__():
            self.draw += 1
            with open(self.path, "a") as file:
                file.write(json.dumps([self.draw, list(self.keys)]) + "\n")
            if self.draw == int(os.environ.get("STOP_AT", "0")):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"loader": super().state_dict(), "draw": self.draw}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        super().load_state_dict([state["loader"] for state in states])
        self.draw = states[0]["draw"]


def recipe() -> Run:
    """Pairs, pictures and texts, a tiny model, saved every few steps."""
    run = load_recipe("recipe:pretrain/mdm_emoji:debug")
    assert isinstance(run, Run)
    assert isinstance(run.task, MaskedDataModelingConfig)
    fields = {field.name: getattr(run.task, field.name) for field in dataclasses.fields(run.task)}
    changes: dict[str, Any] = {
        "loop.steps": 300,
        "loop.save_every": 3,
        "loop.log_every": 1,
        "loop.num_workers": 1,
        "mesh.timeout": 20,
    }
    changes |= {"task.model.drop_path": 0.0, "precision": "fp32", "device": "cpu", "optim.ema_decay": 0.9}
    return replace(replace(run, name="ledger", task=LedgerConfig(**fields)), **changes)


def read_ledger(folder: Path, rank: int) -> dict[int, list[str]]:
    """Samples of every draw of a rank, as it was made last; a line that a kill cut short counts for nothing."""
    found: dict[int, list[str]] = {}
    text = (folder / f"ledger-{rank}.jsonl").read_text()
    for line in text[: text.rfind("\n") + 1].splitlines():
        if line.startswith("[") and line.endswith("]]"):
            draw, keys = json.loads(line)
            found[draw] = keys
    return found


def in_order_of_streams(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Join what two ranks drew as one rank has it: stream by stream, rank by rank."""
    streams = dict.fromkeys(key.partition("/")[0] for key in first)
    return [key for stream in streams for keys in (first, second) for key in keys if key.startswith(f"{stream}/")]
