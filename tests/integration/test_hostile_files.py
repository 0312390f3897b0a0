"""Files made to do harm: every one is refused in one line, runs nothing and writes nothing.

Called as a script, this file reads the files of a folder and notes what Python's audit hook sees: an audit hook stays
for the life of its process, so it gets one of its own. torch's restricted reader looks no class up by name and so
raises no event; that the hook would see one is shown by the unrestricted reader on the same files.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import beit3
from beit3.cli import run_command
from beit3.errors import ConfigError, DataMissingError
from beit3.model.build import build_model
from beit3.model.official import to_official
from beit3.model.presets import ModelConfig
from beit3.model.released_files import read_official

WATCHED = {
    *("pickle.find_class", "import", "exec", "compile", "ctypes.dlopen", "socket.connect", "subprocess.Popen"),
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn"),
    *("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "shutil.rmtree"),
}
ALLOWED = {"collections.OrderedDict", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2", "argparse.Namespace"}
"""What an ordinary file names; all other lookups that the hook sees are those of a hostile part."""

MKDIR = f"{os.mkdir.__module__}.mkdir"

CONFIG = ModelConfig(
    width=64,
    num_layers=1,
    num_heads=1,
    ffn_width=8,
    patch_size=2,
    image_size=(4, 4),
    vocab_size=5,
    max_text_positions=5,
    attention="decoupled",
    fusion_layers=0,
)


def weights() -> dict[str, Tensor]:
    """A whole small model in the official layout."""
    return to_official(CONFIG, build_model(CONFIG, "classification", num_classes=3).state_dict())


class Call:
    """An object that a file describes as the result of a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def planted() -> object:
    """An object of a class in a module that only the hostile folder has; it acts when it is given its content."""
    made: Any = sys.modules["planted"].__dict__["Planted"]()
    made.content = 1
    return made


def on_a_tensor() -> Tensor:
    tensor = torch.zeros(1)
    tensor.note = Call(os.mkdir, "mark")  # type: ignore[attr-defined]
    return tensor


PARTS: dict[str, tuple[Callable[[], object], str]] = {
    "system": (lambda: Call(os.system, "mkdir mark"), f"{os.system.__module__}.system"),
    "eval": (lambda: Call(eval, "__import__('os').mkdir('mark')"), "builtins.eval"),
    "exec": (lambda: Call(exec, "import os; os.mkdir('mark')"), "builtins.exec"),
    "process": (lambda: Call(subprocess.Popen, ["true"]), "commands.Popen"),  # as protocol 2 spells it
    "file": (lambda: Call(open, "mark", "w"), "io.open"),
    "nested load": (lambda: Call(torch.load, "inner.pth"), "torch.serialization.load"),
    "partial": (lambda: functools.partial(torch.load, weights_only=False), "functools.partial"),
    "attribute": (lambda: Call(getattr, Call(importlib.import_module, "os"), "mkdir"), "builtins.getattr"),
    "planted class": (planted, "planted.Planted"),
    "in a namespace": (lambda: argparse.Namespace(lr=1e-3, hook=Call(os.mkdir, "mark")), MKDIR),
    "in a default dictionary": (lambda: defaultdict(None, a=Call(os.mkdir, "mark")), MKDIR),
    "in a numpy array": (lambda: np.array([Call(os.mkdir, "mark")], dtype=object), MKDIR),
    "in a set": (lambda: {Call(os.mkdir, "mark")}, MKDIR),
    "as a key": (lambda: {Call(os.mkdir, "mark"): 1}, MKDIR),
    "on a tensor": (on_a_tensor, MKDIR),
    "model": (lambda: torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
}
"""Hostile parts, and the name that a file gives away when it holds them."""

PICKLES = {
    "inst": b"(S'mark'\nios\nmkdir\n.",
    "obj": b"(cos\nmkdir\nS'mark'\no.",
    "persistent id": b"\x80\x02(X\x06\x00\x00\x00modulecplanted\nPlanted\nX\x01\x00\x00\x00fX\x01\x00\x00\x00stQ.",
    "two in a row": b"\x80\x02cos\nmkdir\nX\x04\x00\x00\x00mark\x85R0}.",
    "build": b"\x80\x02cplanted\nPlanted\n)\x81}X\x01\x00\x00\x00aK\x01sb.",
}
"""Written by hand: opcodes that Python's own writer avoids; a persistent id that asks for the source of a class."""


def write_hostile_files(folder: Path) -> dict[str, str]:
    """Write all files; returns each one's hostile name."""
    state, names = weights(), {}
    for part, (make, name) in PARTS.items():
        for place, content in (
            ("beside", {"model": state, "epoch": make()}),
            ("inside", {"model": {**state, "head.scale": make()}}),
        ):
            for kind, modern in (("zip", True), ("legacy", False)):
                names[file := f"{part}, {place}, {kind}.pth"] = name
                torch.save(content, folder / file, _use_new_zipfile_serialization=modern)
    bad = {"model": Call(os.mkdir, "mark")}
    for protocol in (0, 3, 4, 5):
        names[file := f"protocol {protocol}.pth"] = MKDIR
        torch.save(bad, folder / file, pickle_protocol=protocol)
        names[file := f"bare protocol {protocol}.pkl"] = MKDIR
        (folder / file).write_bytes(pickle.dumps(bad, protocol))
    for what, data in PICKLES.items():
        name = "planted.Planted" if b"planted" in data else "os.mkdir"
        names[f"{what}, zip.zip"] = names[f"{what}, legacy.pth"] = name
        pack_zip(folder / f"{what}, zip.zip", data)
        pack_legacy(folder / f"{what}, legacy.pth", data)
    names["old.tar"] = MKDIR
    pack_tar(folder / "old.tar", pickle.dumps(bad, 2))
    return names


def pack_zip(path: Path, pickled: bytes) -> None:
    """As torch.save writes since 1.6."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", data)


def pack_legacy(path: Path, pickled: bytes) -> None:
    """As torch.save wrote before."""
    head = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True})
    path.write_bytes(b"".join([*(pickle.dumps(value, 2) for value in head), pickled, pickle.dumps([], 2)]))


def pack_tar(path: Path, pickled: bytes) -> None:
    """As torch.save wrote before 0.1.10: no storages, no views of them, no tensors."""
    zero = pickle.dumps(0, 2)
    with tarfile.open(path, "w") as tar:
        for name, data in (("storages", zero + pickle.dumps([], 2)), ("tensors", zero), ("pickle", pickled)):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every way of reading every file led to."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "path").mkdir()
    source = "import os\nclass Planted:\n    def __setstate__(self, state):\n        os.mkdir('mark')\n"
    (folder / "path" / "planted.py").write_text(source)
    module = types.ModuleType("planted")
    module.__dict__["Planted"] = type("Planted", (), {"__module__": "planted"})
    sys.modules["planted"] = module
    try:
        (folder / "files").mkdir()
        names = write_hostile_files(folder / "files")
    finally:
        del sys.modules["planted"]
    for file, modern in (("warm.pth", True), ("warm-legacy.pth", False)):
        content = {"model": weights(), "args": argparse.Namespace(), "best": np.float64(85.4)}
        torch.save(content, folder / file, _use_new_zipfile_serialization=modern)
    (folder / "warm.html").write_text("<html>")
    with zipfile.ZipFile(folder / "warm.zip", "w") as archive:
        archive.writestr("one", b"")
    torch.save({"model": torch.nn.Linear(1, 1)}, folder / "inner.pth")
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    assert found["files"].keys() == names.keys()
    assert len(names) > 80
    for file, name in names.items():
        found["files"][file]["name"] = name
    return found


def test_ordinary_files_are_read_in_the_same_process(seen: dict[str, Any]) -> None:
    assert seen["ordinary"] == {"warm.pth": 0, "warm-legacy.pth": 0}


def test_every_hostile_file_is_refused_in_one_line(seen: dict[str, Any]) -> None:
    for file, found in seen["files"].items():
        for kind, reason in (found["read_official"], found["load_model"]):
            assert kind == "ConfigError", (file, kind, reason)
            assert reason.isprintable(), file
            assert "is not read: it " in reason, (file, reason)
        code, said = found["info"]
        assert code == ConfigError.exit_code, (file, said)
        assert said.startswith("beit3: "), (file, said)
        assert said.count("\n") == 1, (file, said)


def test_the_refused_name_is_told_wherever_torchs_reader_comes_to_it(seen: dict[str, Any]) -> None:
    silent = [file for file, found in seen["files"].items() if "it holds '" not in found["read_official"][1]]
    unknown_to_the_reader = {"old.tar", "inst, zip.zip", "inst, legacy.pth"}
    unknown_to_the_reader |= {f"protocol {number}.pth" for number in (0, 4, 5)}
    unknown_to_the_reader |= {f"bare protocol {number}.pkl" for number in (0, 4, 5)}
    assert set(silent) == unknown_to_the_reader
    for file, found in seen["files"].items():
        if file not in silent:
            assert f"it holds '{found['name'].removeprefix('builtins.')}'" in found["read_official"][1], file


def test_reading_them_looks_nothing_up_imports_nothing_and_runs_nothing(seen: dict[str, Any]) -> None:
    for file, found in seen["files"].items():
        allowed = {"os.mkdir", "os.rmdir", "shutil.rmtree"} if file == "old.tar" else set()  # torch's empty one
        events = {event.split()[0] for event in found["events"]} - allowed
        assert not events, (file, found["events"])
        assert not found["acted"], file


def test_the_watch_sees_the_same_files_act_in_the_unrestricted_reader(seen: dict[str, Any]) -> None:
    for file, found in seen["files"].items():
        looked_up = {event.split()[1] for event in found["control"] if event.startswith("pickle.find_class ")}
        assert found["name"] in looked_up - ALLOWED, (file, found["control"])
    acted = {file for file, found in seen["files"].items() if found["acted_in_control"]}
    assert len(acted) > 60
    events = {event.split()[0] for found in seen["files"].values() for event in found["control"]}
    assert {"pickle.find_class", "import", "exec", "os.system", "subprocess.Popen", "os.mkdir", "open"} <= events


def watch(folder: Path) -> None:
    """Read the files of a folder in every way, the unrestricted one last, and write what happened."""
    sys.path.insert(0, str(folder / "path"))
    events: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            events.append(f"{event} {arguments[0].replace('__builtin__', 'builtins')}.{arguments[1]}")
        elif event == "open":
            if set(str(arguments[1])) & set("wax+") or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                events.append(f"{event} {arguments[0]}")
        elif event in WATCHED:
            events.append(f"{event} {arguments[:1]}")

    seen: dict[str, Any] = {"files": {}}
    for _ in range(2):  # the first round imports what reading and refusing need
        seen["ordinary"] = {file: ask_info(folder / file)[0] for file in ("warm.pth", "warm-legacy.pth")}
        for name in ("warm.html", "warm.zip"):
            refuse(beit3.load_model, folder / name)
            ask_info(folder / name)
    tempfile.gettempdir()  # tries the folder out once
    sys.addaudithook(hook)
    mark = folder / "mark"
    for path in sorted((folder / "files").iterdir()):
        events.clear()
        found: dict[str, Any] = {
            "read_official": refuse(read_official, path),
            "load_model": refuse(beit3.load_model, path),
        }
        first = len(events)
        found["info"] = ask_info(path)
        # The command's own parser compiles the annotations of its options.
        events[first:] = [event for event in events[first:] if event.split()[0] not in ("compile", "exec")]
        seen["files"][path.name] = found | {"events": list(events), "acted": mark.exists() or "planted" in sys.modules}
    for name, found in seen["files"].items():
        events.clear()
        with contextlib.suppress(Exception):
            torch.load(folder / "files" / name, weights_only=False)
        found |= {"control": list(events), "acted_in_control": mark.exists()}
        if mark.exists():
            mark.rmdir() if mark.is_dir() else mark.unlink()
    (folder / "seen.json").write_text(json.dumps(seen))


def refuse(read: Callable[[Path], object], path: Path) -> tuple[str, str]:
    """Type and text of the error."""
    try:
        read(path)
    except BaseException as error:
        return type(error).__name__, str(error)
    return "", "it was read"


def ask_info(path: Path) -> tuple[int, str]:
    """Exit code of `beit3 info` and what it writes to stderr."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = run_command(["info", str(path)])
    return code, said.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", ["zip.pth", "legacy.pth", "safetensors.safetensors"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    whole = tmp_path / kind
    if kind.endswith("safetensors"):
        save_file(weights(), whole)
    else:
        torch.save({"model": weights()}, whole, _use_new_zipfile_serialization=kind == "zip.pth")
    data = whole.read_bytes()
    cut = tmp_path / f"cut{whole.suffix}"
    lengths = {*range(0, len(data), len(data) // 60), *range(12), *(len(data) - left for left in (1, 2, 22, 23, 100))}
    for length in sorted(lengths):
        cut.write_bytes(data[:length])
        with pytest.raises(
            ConfigError, match=r"cut\.\w+ is not read: it is damaged, or no file of weights as"
        ) as caught:
            beit3.load_model(cut)
        assert str(caught.value).isprintable()
    assert beit3.load_model(whole).task == "classification"


def test_every_missing_tensor_is_named(tmp_path: Path) -> None:
    state = weights()
    for key in state:
        torch.save({"model": {name: value for name, value in state.items() if name != key}}, tmp_path / "bad.pth")
        with pytest.raises(ConfigError) as caught:
            beit3.load_model(tmp_path / "bad.pth")
        assert str(caught.value).isprintable()
        assert key.removeprefix("beit3.") in str(caught.value)


def test_every_wrong_shape_and_every_unknown_tensor_is_refused(tmp_path: Path) -> None:
    state = weights()
    for key, value in state.items():
        for wrong in (value[..., None], value.flatten()[0], torch.cat([value, value], dim=-1)):
            torch.save({"model": {**state, key: wrong.clone()}}, tmp_path / "bad.pth")
            with pytest.raises(ConfigError) as caught:
                beit3.load_model(tmp_path / "bad.pth")
            assert str(caught.value).isprintable(), key
        torch.save({"model": {**state, f"{key}.more": value}}, tmp_path / "bad.pth")
        with pytest.raises(ConfigError, match=rf"{key.removeprefix('beit3.')}\.more"):
            beit3.load_model(tmp_path / "bad.pth")


def test_a_zip_file_whose_entries_lead_elsewhere_writes_nothing(tmp_path: Path) -> None:
    torch.save({"model": weights()}, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    (tmp_path / "inner").mkdir()
    for number, root in enumerate(("..", "../..", str(tmp_path / "evil"), "a/../../evil")):
        with zipfile.ZipFile(tmp_path / "inner" / f"root{number}.pth", "w") as archive:
            for name, data in entries.items():
                archive.writestr(f"{root}/{name}", data)
    with zipfile.ZipFile(tmp_path / "inner" / "more.pth", "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
        for name in ("../evil", "../../evil", str(tmp_path / "evil"), "archive/data/../../../evil"):
            archive.writestr(name, b"evil")
    before = tree(tmp_path)
    for path in sorted((tmp_path / "inner").iterdir()):
        kind, reason = refuse(beit3.load_model, path)
        assert kind in ("", "ConfigError"), reason
        assert reason.isprintable()
    assert tree(tmp_path) == before


def test_a_few_bytes_that_claim_to_be_much_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data.pkl", bytes(2**26))
    assert (tmp_path / "bomb.pth").stat().st_size < 2**17
    with pytest.raises(ConfigError, match="unpacked and compressed it"):
        read_official(tmp_path / "bomb.pth")
    # One number repeated as a word embedding of 2^40 rows, and a storage that says it is longer than the file.
    torch.save(
        {"model": {**weights(), "beit3.text_embed.weight": torch.zeros(1, 1).expand(2**40, 64)}}, tmp_path / "a.pth"
    )
    with pytest.raises(ConfigError, match=r"repeated or missing numbers.*beit3\.text_embed\.weight"):
        beit3.load_model(tmp_path / "a.pth")
    for modern in (True, False):
        torch.save({"a": torch.zeros(1013)}, tmp_path / "b.pth", _use_new_zipfile_serialization=modern)
        data = (tmp_path / "b.pth").read_bytes()
        small, large = b"M\xf5\x03", b"J\x00\x00\x00\x40"  # 1,013 and 2^30 as pickled numbers
        assert data.count(small) == 2
        if modern:
            with zipfile.ZipFile(tmp_path / "b.pth") as archive:
                entries = {name: archive.read(name) for name in archive.namelist()}
            with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
                for name, content in entries.items():
                    archive.writestr(name, content.replace(small, large) if name.endswith("data.pkl") else content)
        else:
            (tmp_path / "c.pth").write_bytes(data.replace(small, large))
        with pytest.raises(ConfigError, match="it is damaged, or no file of weights"):
            read_official(tmp_path / "c.pth")


def test_an_exchange_folder_reads_links_but_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_model(CONFIG).save_pretrained("model")
    file = Path("model/model.safetensors")
    file.rename("blob")  # caches of downloaded models keep the numbers elsewhere, and link to them
    file.symlink_to("../blob")
    assert beit3.load_model("model").task is None
    Path("blob").unlink()
    with pytest.raises(DataMissingError, match=r"model\.safetensors does not exist"):
        beit3.load_model("model")
    torch.save(OrderedDict(a=Call(os.mkdir, "mark")), "blob")
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        beit3.load_model("model")
    file.unlink()
    Path("blob").rename("model/pytorch_model.bin")  # never looked for
    with pytest.raises(DataMissingError, match=r"model\.safetensors does not exist"):
        beit3.load_model("model")
    assert not Path("mark").exists()


WRONG = (None, True, -1, 0, 3, 1.5, 10**18, 10**400, 1e-300, float("nan"), float("inf"), "x", "\n\x1b[2J", "y" * 5000)
WRONG_DEEP: tuple[Any, ...] = (
    [],
    [1],
    ["x", "x"],
    [8, 8, 8],
    [None, 1],
    {},
    {"x": 1},
    {"\n": "\n"},
    {"config": 3},
    {"num_classes": "x"},
)


def slots(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Ways to every value within dictionaries."""
    found = [path] if path else []
    if isinstance(value, dict):
        for name in value:
            found += slots(value[name], (*path, name))
    return found


def read_or_refused(folder: Path, **options: Any) -> str:
    """What `load_model` says of a folder; anything but a short line or a model is a failure."""
    try:
        beit3.load_model(folder, **options)
    except (ConfigError, DataMissingError) as error:
        said = str(error)
        assert said.isprintable(), said
        assert len(said) - len(str(folder)) < 600, said
        return said
    return ""


def test_every_field_of_a_config_json_may_hold_anything(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_model(CONFIG, "classification", num_classes=3).save_pretrained(folder)
    good = json.loads((folder / "config.json").read_text())
    places = [*slots(good), ("part",)]
    assert len(places) > 20
    refused, tried = 0, 0
    for place in places:
        for value in (*WRONG, *WRONG_DEEP):
            changed = json.loads(json.dumps(good))
            inner = changed
            for name in place[:-1]:
                inner = inner[name]
            inner[place[-1]] = value
            (folder / "config.json").write_text(json.dumps(changed))
            tried += 1
            refused += bool(read_or_refused(folder))
            for options in ({"task": "backbone"}, {"task": "vqa", "strict": False}, {"image_size": 8}):
                read_or_refused(folder, **options)
        inner = changed
        for name in place[:-1]:
            inner = inner[name]
        inner.pop(place[-1])
        (folder / "config.json").write_text(json.dumps(changed))
        read_or_refused(folder)
    assert refused > 0.7 * tried
    (folder / "config.json").write_text(json.dumps(good))
    assert read_or_refused(folder) == ""


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("task", 3, "'task' must be a text or null, not 3"),
        ("task", ["vqa"], "'task' must be a text or null"),
        ("task", "vqaa", "unknown task 'vqaa'; did you mean 'vqa'"),
        ("heads", [1], r"'heads' must be options by name, not \[1\]"),
        ("heads", "x", "'heads' must be options by name, not x"),
        ("heads", {"num_classes": "x"}, "num_classes must be a whole number of at least 1, not 'x'"),
        ("heads", {"num_classes": -1}, "num_classes must be a whole number of at least 1, not -1"),
        ("heads", {"num_classes": None}, "num_classes must be a whole number of at least 1, not None"),
        ("heads", {"config": 3}, "a classification model has no option config"),
        ("part", ["text"], r"'part' must be vision, text or null, not \['text'\]"),
        ("model", [1], "not a model"),
    ],
)
def test_a_wrong_field_of_config_json_is_named(field: str, value: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_model(CONFIG, "classification", num_classes=3).save_pretrained(folder)
    good = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**good, field: value}))
    assert re.search(message, read_or_refused(folder))


def test_a_config_json_of_any_bytes_is_read_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_model(CONFIG).save_pretrained(folder)
    path = folder / "config.json"
    good = path.read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(good)
        for place in draw.integers(0, len(data), draw.integers(1, 4)):
            data[place] = draw.integers(0, 256)
        path.write_bytes(data)
        read_or_refused(folder)
    for broken in (
        *(good[:length] for length in range(0, len(good), 40)),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5000,
        b'{"format_version": 1, "kind": "' + b"k" * 9999 + b'"}',
        b'{"format_version": 1, "kind": "model", "model": {"' + b"w" * 9999 + b'": 1}}',
        good.replace(b'"width"', b'"wi\\ndth"'),
    ):
        path.write_bytes(broken)
        assert read_or_refused(folder)


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
