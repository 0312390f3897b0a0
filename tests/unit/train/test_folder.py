"""What decides a run's result is hashed and held against a resumed run; what does not is free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from beit3.config import Run
from beit3.errors import ConfigError
from beit3.train.distributed import Ranks
from beit3.train.folder import fixed_hash, open_folder, write_preempted, write_record

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"loop.keep": 7}, True),
        ({"mesh.shard": 4}, True),
        ({"loop.num_workers": 3}, True),
        ({"resume": True}, True),
        ({"seed": 1}, False),
        ({"optim.lr": 0.2}, False),
        ({"loop.accumulate": 2}, False),
        ({"task.batch_size": 16}, False),
    ],
)
def test_the_hash_is_of_what_decides_the_result(
    line_run: Callable[..., Run], changes: dict[str, Any], same: bool
) -> None:
    assert (fixed_hash(line_run()) == fixed_hash(line_run(**changes))) == same
    with open_folder(line_run(), ALONE):
        write_record(line_run())
    if "resume" not in changes:
        run = line_run(**changes, resume=True)
        if same:
            with open_folder(run, ALONE):
                return
        with pytest.raises(ConfigError, match="other values of"), open_folder(run, ALONE):
            pass


def test_overwriting_empties_the_folder_and_keeps_the_lock(line_run: Callable[..., Run]) -> None:
    run = line_run()
    with open_folder(run, ALONE):
        write_record(run)
        (run.folder / "checkpoints").mkdir()
        (run.folder / "old").write_text("")
    with open_folder(line_run(overwrite=True), ALONE):
        assert [path.name for path in run.folder.iterdir()] == ["lock"]
        with pytest.raises(ConfigError, match="in use"), open_folder(line_run(overwrite=True), ALONE):
            pass


def test_a_folder_that_holds_no_run_is_not_overwritten(line_run: Callable[..., Run]) -> None:
    run = line_run(overwrite=True)
    run.folder.mkdir()
    (run.folder / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"holds no run, but thesis.tex"), open_folder(run, ALONE):
        pass
    assert [path.name for path in run.folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_record_is_named_and_may_be_deleted(line_run: Callable[..., Run], content: bytes) -> None:
    with open_folder(line_run(), ALONE):
        write_record(line_run())
    record = line_run().folder / "run.json"
    record.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run.json is damaged"), open_folder(line_run(resume=True), ALONE):
        pass
    record.unlink()
    with open_folder(line_run(resume=True), ALONE):
        pass


def test_a_start_that_is_refused_leaves_no_marker_of_an_earlier_stop(line_run: Callable[..., Run]) -> None:
    with open_folder(line_run(), ALONE):
        write_record(line_run())
        write_preempted(line_run(), ALONE, 5)
    assert (line_run().folder / "preempted").read_text() == "5\n"
    changed = line_run(seed=1, resume=True)
    with pytest.raises(ConfigError, match="other values of seed"), open_folder(changed, ALONE):
        pass
    assert not (line_run().folder / "preempted").exists(), "or the job would be queued for ever"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0b"])
def test_a_run_cannot_leave_its_folder(line_run: Callable[..., Run], name: str) -> None:
    with pytest.raises(ConfigError, match="plain folder name"):
        line_run(name=name)
