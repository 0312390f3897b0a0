"""The computer around a run: folders that cannot be written, signals while saving, clocks, ports, locks, locales.

As a program (`test_surroundings.py ARGUMENT ...`) this is the command `beit3` with a disk as slow as `SLOW` says:
seconds that the writing of each checkpoint takes. The file `MARK` is made as soon as one is being written.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import beit3
from beit3.cli import run_command
from beit3.errors import RankLostError
from beit3.model.build import build_model
from beit3.tokenizer.text import train_text_tokenizer
from beit3.train import checkpoint as module
from beit3.train.checkpoint import list_checkpoints
from beit3.train.log import read_log
from beit3.train.manifest import damaged_files
from beit3.train.pulse import Place, Pulse
from tests.faults.small import small_config
from tests.processes import environment

if TYPE_CHECKING:
    from tests.conftest import Workspace

RECIPE = Path(__file__).with_name("faulty.py")
PREEMPTED = 75
LONGEST = 60.0


def begin(
    arguments: Sequence[str],
    folder: Path,
    *,
    program: Sequence[str] = ("-m", "beit3"),
    options: Sequence[str] = (),
    **more: str,
) -> subprocess.Popen[str]:
    """Start Python in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *options, *program, *arguments],
        cwd=folder,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was said on stderr."""
    try:
        _, error = process.communicate(timeout=LONGEST)
    finally:
        process.kill()
    return process.returncode, error


def train(folder: Path, *options: str, **given: Any) -> subprocess.Popen[str]:
    return begin(["train", str(RECIPE), "--out", str(folder), *options], folder, **given)


def weights(out: Path) -> dict[str, Tensor]:
    """What a run exported."""
    found: dict[str, Tensor] = torch.load(out / "faulty" / "export" / "weights.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights of the run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run_command(["train", str(RECIPE), "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    return weights(out)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


# --- Folders ----------------------------------------------------------------------------------------------------------


def as_an_ordinary_user() -> None:
    """Give up what lets the superuser write everywhere; it is gone with the next program that this process becomes."""
    drop_from_bounding_set, override, search = 24, 1, 2
    for capability in (override, search):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0)


@pytest.mark.parametrize("kind", ["folder", pytest.param("run", marks=pytest.mark.slow)])
def test_a_folder_that_is_read_only_ends_a_run_before_its_first_step(tmp_path: Path, kind: str) -> None:
    """Row 12; that a part of the path is a file, in `test_loop.py`."""
    locked = tmp_path / "locked" if kind == "folder" else tmp_path / "locked" / "faulty"
    locked.mkdir(parents=True)
    locked.chmod(0o555)
    command = [sys.executable, "-m", "beit3", "train", str(RECIPE), "--out", str(tmp_path / "locked")]
    done = subprocess.run(
        command, preexec_fn=as_an_ordinary_user, capture_output=True, text=True, timeout=LONGEST, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("beit3: ")
    assert "cannot be written (Permission denied): choose another --out" in line
    assert not list(locked.iterdir())


# --- Signals while a checkpoint is written ----------------------------------------------------------------------------

SECONDS_OF_A_SAVE = "1.0"


def stopped_while_saving(folder: Path, first: signal.Signals, second: signal.Signals) -> tuple[int, str]:
    """Start a run on a slow disk; while it writes, two signals ten milliseconds apart."""
    mark = folder / "mark"
    process = train(folder, program=[__file__], SLOW=SECONDS_OF_A_SAVE, MARK=str(mark))
    deadline = time.monotonic() + LONGEST
    while not mark.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(first)
    time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(second)
    return ended(process)


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGTERM, signal.SIGTERM, PREEMPTED),
        pytest.param(signal.SIGINT, signal.SIGTERM, PREEMPTED, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_second_signal_during_a_save_leaves_it_whole_or_not_at_all(
    tmp_path: Path, whole: dict[str, Tensor], first: signal.Signals, second: signal.Signals, code: int
) -> None:
    """Row 5."""
    found, error = stopped_while_saving(tmp_path, first, second)
    assert found == code, error
    run = tmp_path / "faulty"
    for path in list_checkpoints(run / "checkpoints"):
        assert not damaged_files(path)
    assert (run / "preempted").exists() == (code == PREEMPTED)
    if code == PREEMPTED:
        assert f"step {list_checkpoints(run / 'checkpoints')[-1].name[-1]}, state saved" in error
    assert run_command(["train", str(RECIPE), "--out", str(tmp_path), "--resume"]) == 0
    assert_same(weights(tmp_path), whole)
    assert not list((run / "checkpoints").glob("*.tmp-*"))


def test_a_run_stopped_in_its_last_step_ends(
    tmp_path: Path, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 32 and 33: nothing is left to do but to save and export, and to resume it once more changes nothing."""
    torch.set_num_threads(1)
    monkeypatch.setenv("FAULT", "terminate:0:8")
    assert run_command(["train", str(RECIPE), "--out", str(tmp_path)]) == 0
    assert_same(weights(tmp_path), whole)
    monkeypatch.delenv("FAULT")
    records = len(read_log(tmp_path / "faulty"))
    assert run_command(["train", str(RECIPE), "--out", str(tmp_path), "--resume"]) == 0
    assert_same(weights(tmp_path), whole)
    assert len(read_log(tmp_path / "faulty")) == records == 8


@pytest.mark.slow
def test_a_slow_disk_does_not_slow_the_steps_between(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    """Row 13: a save of a second, begun at step 2, is awaited at step 4 and not before."""
    mark = tmp_path / "mark"
    process = train(tmp_path, "--loop.steps", "4", program=[__file__], SLOW=SECONDS_OF_A_SAVE, MARK=str(mark))
    code, error = ended(process)
    assert code == 0, error
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "faulty" / "checkpoints")] == ["2", "4"]
    begun = mark.read_text().split()
    assert len(begun) == 2
    assert float(begun[1]) - float(begun[0]) >= float(SECONDS_OF_A_SAVE), "one after the other"
    seconds = [record["seconds"] for record in read_log(tmp_path / "faulty")]
    assert seconds[2] - seconds[1] < 0.5 * float(SECONDS_OF_A_SAVE), "the third step ran while the second was saved"


# --- Two runs, one folder ---------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused_and_the_lock_of_a_dead_one_is_none(
    tmp_path: Path, whole: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 63: by --resume as by --overwrite; the first one loses nothing by it."""
    first = train(tmp_path, FAULT="sleep:0:5")
    log = tmp_path / "faulty" / "log.jsonl"
    deadline = time.monotonic() + LONGEST
    while not (log.exists() and log.read_text().count("\n") >= 4):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.02)
    before = log.read_bytes()
    for option in ("--resume", "--overwrite"):
        capsys.readouterr()
        assert run_command(["train", str(RECIPE), "--out", str(tmp_path), option]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "is in use by another process: wait for it, or choose another --name" in error
    assert log.read_bytes() == before
    assert first.poll() is None
    first.kill()
    first.communicate()
    assert (tmp_path / "faulty" / "lock").exists(), "the lock is stale now"
    assert run_command(["train", str(RECIPE), "--out", str(tmp_path), "--resume"]) == 0
    assert_same(weights(tmp_path), whole)


# --- Clock and ports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-3e8, 3e8])
def test_a_clock_that_jumps_changes_nothing_of_a_run(
    tmp_path: Path, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """Row 63: ten years, back or ahead, from the fifth question for the time on; with a limit of time."""
    clock, asked = time.time, 0

    def jumping() -> float:
        nonlocal asked
        asked += 1
        return clock() + (jump if asked > 5 else 0)

    monkeypatch.setattr(time, "time", jumping)
    torch.set_num_threads(1)
    limit = ["--loop.max-seconds", "3600", "--loop.save-minutes", "30"]
    assert run_command(["train", str(RECIPE), "--out", str(tmp_path), *limit]) == 0
    assert time.time() - clock() == pytest.approx(jump, abs=60)
    assert_same(weights(tmp_path), whole)
    steps = [path.name[-1] for path in list_checkpoints(tmp_path / "faulty" / "checkpoints")]
    assert steps == ["6", "8"], "none more, none less"


def test_signs_of_life_go_on_though_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 63: an hour at each look; or nobody could say which rank hangs, or one would be ended that lives."""
    store: Any = getattr(dist, "HashStore")()  # noqa: B009 - hidden from type checkers
    store.set_timeout(timedelta(seconds=1))
    hours = itertools.count(500_000, -1)
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    places = [Place.of(0, os.getpid()), Place(1, "elsewhere", 1, "another machine", "")]
    shown, watching = (Pulse(store, places, rank, 0.5) for rank in (1, 0))
    shown.keep_alive()
    deadline = time.monotonic() + 2
    watching.wait_until(lambda: time.monotonic() > deadline)
    shown.leave()
    with pytest.raises(RankLostError, match="rank 1"):
        watching.wait_until(lambda: time.monotonic() > deadline + 20)


@pytest.fixture
def taken() -> Iterator[str]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield str(listening.getsockname()[1])


@pytest.mark.distributed
def test_a_port_in_use_is_one_line(tmp_path: Path, taken: str) -> None:
    """Row 63."""
    meeting = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken}
    code, error = ended(train(tmp_path, **meeting))
    assert code == 1
    (line,) = error.splitlines()
    assert line.startswith("beit3: ")
    assert f"did not meet at 127.0.0.1:{taken}" in line


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_see_other_data_are_refused_at_the_start(workspace: Workspace, tmp_path: Path) -> None:
    """Row 10: the path is the same, what lies there is not, as on the disks of two machines."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    processes = []
    for rank in range(2):
        place = tmp_path / f"machine-{rank}"
        (place / "data").mkdir(parents=True)
        (place / "runs").symlink_to(workspace.folder / "runs", target_is_directory=True)
        for name in ("pairs", "text", "test_vendor"):
            source = "test_vendor" if (rank, name) == (1, "pairs") else name
            (place / "data" / name).symlink_to(workspace.data / source, target_is_directory=True)
        meeting = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        meeting |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = ["train", "recipe:pretrain/mdm_emoji:debug", "--device", "cpu", "--out", str(tmp_path / "out")]
        processes.append(begin(command, place, **meeting))
    for code, error in [ended(process) for process in processes]:
        assert code == 2, error
        assert "rank 1 was started with other values of data than rank 0" in error.splitlines()[-1]


# --- Python, locale, current folder, names ----------------------------------------------------------------------------

ODD = "ein Ordner mit \u00fc, \u540d\u524d & 'quotes' $HOME"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of pictures and texts in a folder of an odd name."""
    tokenizer = train_text_tokenizer(iter(["a red cat", "two blue dogs", "ein gr\u00fcner Baum"] * 20), 50)
    config = small_config(len(tokenizer))
    folder = tmp_path_factory.mktemp("models") / ODD
    made = build_model(config, "classification", num_classes=2)
    labels = json.dumps(["gr\u00fcn", "\u540d"]).encode()
    made.save_pretrained(folder, {"tokenizer.spm": tokenizer.model, "labels.json": labels})
    return folder


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SURROUNDINGS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "without_asserts_in_locale_C": (("-O",), {"LC_ALL": "C"}),
    "isolated_and_without_docstrings": (("-I", "-OO"), {}),
    "in_ascii_alone": ((), ASCII),
}
"""Options of Python and variables of the environment."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_training_ends_the_same_in_any_surroundings(tmp_path: Path, whole: dict[str, Tensor], name: str) -> None:
    """Row 64: how Python is started, and which letters the system knows."""
    options, environment = SURROUNDINGS[name]
    code, error = ended(train(tmp_path, options=options, **environment))
    assert code == 0, error
    assert_same(weights(tmp_path), whole)


def test_a_folder_of_an_odd_name_is_trained_in_without_asserts_and_resumed(
    tmp_path: Path, whole: dict[str, Tensor]
) -> None:
    """Row 64: spaces, letters beyond ASCII, quotes."""
    options, environment = SURROUNDINGS["without_asserts_in_locale_C"]
    folder = tmp_path / ODD
    folder.mkdir()
    code, error = ended(train(folder, options=options, FAULT="terminate:0:5", **environment))
    assert code == PREEMPTED, error
    assert run_command(["train", str(RECIPE), "--out", str(folder), "--resume"]) == 0
    assert_same(weights(folder), whole)


@pytest.mark.slow
def test_without_asserts_what_is_wrong_is_refused_as_well(tmp_path: Path) -> None:
    """Row 64: no check of a file or an option is an assert."""
    (tmp_path / "a.pth").write_bytes(b"<html>")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"format_version": 1, "kind": "model", "model": {"width": -1}}')
    sources = ["a.pth", "folder", "none", "/dev/zero"]
    script = "import sys; from beit3.cli import run_command; print([run_command(['info', a]) for a in sys.argv[1:]])"
    process = begin(sources, tmp_path, program=["-c", script], options=["-O"])
    out, error = process.communicate(timeout=LONGEST)
    assert set(json.loads(out.splitlines()[-1])) == {2, 3}
    assert error.count("\n") == error.count("beit3: ") == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_model_in_a_folder_of_an_odd_name_is_described(model: Path, name: str) -> None:
    """Row 64."""
    options, environment = SURROUNDINGS[name]
    process = begin(["info", str(model)], model.parent, options=options, **environment)
    out, error = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, error
    assert "2 classes" in out


GONE = """
import os, sys
import torch
import beit3
source, folder = sys.argv[1:]
first = beit3.load(source, device="cpu")
pictures = [torch.zeros(3, 16, 16), torch.ones(3, 20, 30)]
wanted = first.embed_images(pictures), first.classify(pictures)
os.chdir(folder)
os.rmdir(folder)
for predictor in (first, beit3.load(source, device="cpu")):
    assert torch.equal(predictor.embed_images(pictures), wanted[0])
    assert predictor.classify(pictures) == wanted[1]
print("the same")
"""


def test_a_program_whose_folder_is_deleted_goes_on(model: Path, tmp_path: Path) -> None:
    """Row 64: models are loaded and asked as before."""
    gone = tmp_path / "gone"
    gone.mkdir()
    process = begin([str(model), str(gone)], tmp_path, program=["-c", GONE])
    out, error = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, error
    assert out == "the same\n"


@pytest.mark.slow
def test_a_run_whose_current_folder_is_deleted_goes_on(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    """Row 64: it saves, exports, and can be resumed."""
    gone, out = tmp_path / "gone", tmp_path / "out"
    gone.mkdir()
    mark = tmp_path / "mark"
    command = ["train", str(RECIPE), "--out", str(out)]
    process = begin(command, gone, program=[__file__], SLOW="0.3", MARK=str(mark))
    deadline = time.monotonic() + LONGEST
    while not mark.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    gone.rmdir()
    code, error = ended(process)
    assert code == 0, error
    assert_same(weights(out), whole)
    shutil.rmtree(list_checkpoints(out / "faulty" / "checkpoints")[-1])
    assert run_command([*command, "--resume"]) == 0
    assert_same(weights(out), whole)


@pytest.mark.parametrize("verb", ["train", "info"])
def test_a_command_started_in_a_deleted_folder_is_one_line(model: Path, tmp_path: Path, verb: str) -> None:
    """Row 64: no relative path means anything there, and PyTorch itself does not start."""
    gone = tmp_path / "gone"
    arguments = {"train": [str(RECIPE), "--out", str(tmp_path / "out")], "info": [str(model)]}[verb]
    command = ["sh", "-c", 'mkdir "$0"; cd "$0"; rmdir "$0"; exec "$@"', str(gone)]
    done = subprocess.run(
        [*command, sys.executable, "-m", "beit3", verb, *arguments],
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(beit3.__file__).parent.parent)},
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("beit3: the current folder")


def test_a_folder_whose_name_is_no_text_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Row 64: bytes that are no UTF-8; TensorBoard cannot write there."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    code, error = ended(begin(["train", str(RECIPE), "--out", folder], tmp_path))
    assert code == 2, error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def slowly(write: Callable[..., None], seconds: float, mark: Path) -> Callable[..., None]:
    """Write as from a slow disk."""

    def write_slowly(*given: Any) -> None:
        with mark.open("a") as file:
            file.write(f"{time.monotonic()}\n")
        time.sleep(seconds)
        write(*given)

    return write_slowly


if __name__ == "__main__":
    torch.set_num_threads(1)
    module._write_tensors = slowly(module._write_tensors, float(os.environ["SLOW"]), Path(os.environ["MARK"]))
    sys.exit(run_command(sys.argv[1:]))
