"""What decides a run's result is hashed and held against a resumed run; what does not is free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from beit3.config import Run
from beit3.errors import ConfigError
from beit3.train.distributed import Ranks
from beit3.train.folder import fixed_hash, open_folder, write_record

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
