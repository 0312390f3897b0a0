"""The log: one record a line, cut where a resumed run goes on, robust against a kill in the middle of a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from beit3.train.log import RunLog, read_log


def write(folder: Path, steps: range, first_step: int = 0) -> None:
    with RunLog(folder, "run", 10, first_step) as log:
        for step in steps:
            log.record(step, {"loss": 1 / 3, "lr": step})
            if step % 2 == 0:
                log.record(step, {"r1": 0.5}, event="eval")


def test_records_come_back_in_order_by_event(tmp_path: Path) -> None:
    write(tmp_path, range(1, 5))
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3, 4]
    assert read_log(tmp_path)[0] == {"step": 1, "event": "train", "loss": 0.333333, "lr": 1}
    assert [record["step"] for record in read_log(tmp_path, "eval")] == [2, 4]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, range(1, 7))
    write(tmp_path, range(4, 6), first_step=3)
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in read_log(tmp_path, "eval")] == [2, 4]


def test_a_half_written_last_line_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "log.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 4, "event": "tr')
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3]
    write(tmp_path, range(4, 5), first_step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2, 3, 4, 4]


def test_what_a_loss_of_power_made_unreadable_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes() + 40 * b"\0" + b'\n[]\n{"step": 3}\n\xff\n')
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3]
    write(tmp_path, range(4, 5), first_step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2, 3, 4, 4]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["log.jsonl"]


def test_records_are_on_disk_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, "run", 10) as log:
        log.record(1, {"loss": 2.0})
        assert [record["loss"] for record in read_log(tmp_path)] == [2.0]


def test_a_silent_rank_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run", "run", 10, enabled=False) as log:
        log.step(1)
        log.record(1, {"loss": 2.0})
        log.say("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_folder_without_a_log_has_no_records(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []


def test_an_alarm_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, "run", 10) as log:
        log.alarm(4, "only 3% of the codes are in use")
    assert read_log(tmp_path, "alarm") == [{"step": 4, "event": "alarm", "text": "only 3% of the codes are in use"}]
    assert "ALARM  step 4/10  only 3% of the codes are in use" in capsys.readouterr().err
