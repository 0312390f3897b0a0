"""Foreign files of models and tokenizers: what is wrong with one is said in a line, and nothing is guessed.

Pickles have a file of their own, `test_pickles.py`; cut files, wrong shapes and settings of any content are in
`tests/integration/test_hostile_files.py`.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import beit3
from beit3.cli import run_command
from beit3.config import replace
from beit3.errors import BeitError, ConfigError
from beit3.model.build import build_model
from beit3.model.exchange import read_settings, write_folder
from beit3.model.store import fill_model
from beit3.tokenizer.official import load_visual_tokenizer
from beit3.tokenizer.official import to_official as tokenizer_to_official
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.vqkd import VQKD, VQKDConfig
from tests.integration.test_hostile_files import CONFIG, weights

VISUAL = VQKDConfig(
    image_size=(16, 16), patch_size=8, width=64, depth=1, num_heads=1, codebook_size=8, code_width=4, teacher_width=4
)


def refused(read: Callable[[], object]) -> str:
    """The one line in which something is refused; anything else fails."""
    with pytest.raises(BeitError) as caught:
        read()
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- Headers of safetensors -------------------------------------------------------------------------------------------

Header = dict[str, Any]


def put(path: Path, header: bytes, body: bytes, length: int | None = None) -> None:
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)


def changed(header: Header, name: str, **fields: Any) -> bytes:
    return json.dumps({**header, name: {**header[name], **fields}}).encode()


def doubled(header: Header, name: str, place: str) -> bytes:
    """The entry of a tensor is there twice, and the second time leads to the numbers of another one."""
    text = json.dumps(header)
    return ("{" + f"{json.dumps(name)}: {json.dumps(header[place])}, " + text[1:]).encode()


ATTACKS: dict[str, Callable[[Path, Header, bytes, str, str], None]] = {
    "length_beyond_the_file": lambda path, header, body, a, b: put(path, json.dumps(header).encode(), body, 2**40),
    "length_beyond_any_number": lambda path, header, body, a, b: put(
        path, json.dumps(header).encode(), body, 2**64 - 1
    ),
    "header_of_105_megabytes": lambda path, header, body, a, b: put(
        path, b'{"__metadata__": {"a": "' + b"x" * (105 * 2**20) + b'"}}', b""
    ),
    "overlap": lambda path, header, body, a, b: put(
        path, changed(header, b, data_offsets=header[a]["data_offsets"]), body
    ),
    "hole": lambda path, header, body, a, b: put(
        path, json.dumps({name: entry for name, entry in header.items() if name != a}).encode(), body
    ),
    "overflow": lambda path, header, body, a, b: put(path, changed(header, a, shape=[2**62, 2**62]), body),
    "negative_shape": lambda path, header, body, a, b: put(path, changed(header, a, shape=[-1]), body),
    "one_name_twice": lambda path, header, body, a, b: put(path, doubled(header, a, b), body),
    "one_field_twice": lambda path, header, body, a, b: put(
        path, json.dumps(header).replace('"shape"', '"dtype": "F16", "shape"', 1).encode(), body
    ),
    "trailing_bytes": lambda path, header, body, a, b: put(path, json.dumps(header).encode(), body + b"123"),
    "deep_json": lambda path, header, body, a, b: put(path, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "no_json": lambda path, header, body, a, b: put(path, b"<html>", body),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Files of safetensors by kind, and what reads each."""
    folder = tmp_path_factory.mktemp("kinds")
    build_model(CONFIG, "classification", num_classes=3).save_pretrained(folder / "model")
    VQKD(VISUAL).save(folder / "tokenizer")
    save_file(weights(), folder / "released.safetensors")
    return {
        "folder": (folder / "model/model.safetensors", lambda: beit3.load_model(folder / "model")),
        "released": (
            folder / "released.safetensors",
            lambda: beit3.load_model(folder / "released.safetensors"),
        ),
        "tokenizer": (folder / "tokenizer/model.safetensors", lambda: VQKD.load(folder / "tokenizer")),
    }


@pytest.mark.parametrize("kind", ["folder", "released", "tokenizer"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_made_up_header_is_refused_by_the_name_of_its_file(
    kind: str, attack: str, kinds: dict[str, tuple[Path, Callable[[], object]]]
) -> None:
    """Row 22."""
    path, read = kinds[kind]
    good = path.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header: Header = json.loads(good[8 : 8 + length])
    first, second = [name for name in header if name != "__metadata__"][:2]
    try:
        ATTACKS[attack](path, header, good[8 + length :], first, second)
        started = time.process_time()
        assert path.name in refused(read)
        assert time.process_time() - started < 2
    finally:
        path.write_bytes(good)
    read()


# --- What fits and what does not --------------------------------------------------------------------------------------


def test_values_become_narrower_only_on_request(tmp_path: Path) -> None:
    """Row 25."""
    model = build_model(CONFIG, "retrieval")
    model.save_pretrained(tmp_path / "model")
    for loaded, dtype in (
        (beit3.load(tmp_path / "model", device="cpu").model, torch.float32),
        (beit3.load(tmp_path / "model", device="cpu", dtype=torch.bfloat16).model, torch.bfloat16),
    ):
        for name, value in loaded.state_dict().items():
            assert value.dtype == dtype
            assert torch.equal(value, model.state_dict()[name].to(dtype)), name


def test_another_patch_size_is_refused_with_both_shapes(tmp_path: Path) -> None:
    """Row 26: pictures of another size are interpolated on request, patches of another size never."""
    build_model(CONFIG).save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model/config.json").read_text())
    settings["model"]["patch_size"] = 1
    (tmp_path / "model/config.json").write_text(json.dumps(settings))
    said = refused(lambda: beit3.load_model(tmp_path / "model"))
    assert "vision_embedding.patch.weight (64, 12) instead of (64, 3)" in said
    assert "vision_embedding.positions (7, 64) instead of (19, 64)" in said
    build_model(CONFIG).save_pretrained(tmp_path / "right")
    other = build_model(replace(CONFIG, patch_size=4))
    assert "patch_size differ" in refused(lambda: fill_model(other, tmp_path / "right"))


@pytest.mark.parametrize("rows", [1, 6, 8, 100])
def test_a_position_table_of_another_length_is_not_cut_to_fit(rows: int, tmp_path: Path) -> None:
    """Row 26: neither as it is nor for another image size."""
    model = build_model(CONFIG)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    state = load_file(path)
    save_file({**state, "vision_embedding.positions": torch.zeros(rows, 64)}, path)
    for size in (None, 8):
        said = refused(lambda size=size: beit3.load_model(tmp_path / "model", image_size=size))  # type: ignore[misc]
        assert f"vision_embedding.positions ({rows}, 64) instead of (7, 64)" in said


def test_a_file_with_a_moving_average_gives_the_weights_it_calls_the_model(tmp_path: Path) -> None:
    """Row 29: neither is taken for the other, whichever stands first."""
    state = weights()
    average = {name: value + 1 for name, value in state.items()}
    torch.save({"model": state}, tmp_path / "plain.pth")
    expected = beit3.load_model(tmp_path / "plain.pth").state_dict()
    for number, both in enumerate(
        ({"model_ema": average, "model": state}, {"model": state, "ema": average}, {"ema": average, "module": state})
    ):
        torch.save(both, tmp_path / f"{number}.pth")
        found = beit3.load_model(tmp_path / f"{number}.pth").state_dict()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    for name in ("model_ema", "ema"):
        torch.save({name: average, "epoch": 3}, tmp_path / "average.pth")
        assert f"no named tensors under {name}" in refused(lambda: beit3.load_model(tmp_path / "average.pth"))


# --- Places -----------------------------------------------------------------------------------------------------------

PLACES = [
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "/etc",
    "/dev/zero",
    "/dev/null",
    "http://127.0.0.1:9/model.pth",
    "https://example.com/model.pth",
    "file:///etc/passwd",
    "s3://bucket/model",
    "hf-hub:../../etc/passwd",
    "hf-hub:/etc/passwd",
    "hf-hub:a/b/../../c",
    "hf-hub:",
    "\0",
    "a\nb",
    "x" * 5000,
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Addresses that something tried to reach."""
    found: list[object] = []

    def refuse(_: object, address: object, *more: object) -> None:
        found.append(address)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **named: refuse(None, host))
    return found


@pytest.mark.parametrize("place", PLACES)
def test_places_that_are_none_are_refused_without_a_call(
    place: str, calls: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 30: addresses, ways out of the folder, devices, names beyond reason."""
    monkeypatch.chdir(tmp_path)
    for read in (beit3.load_model, beit3.load, load_visual_tokenizer):
        refused(lambda read=read: read(place))  # type: ignore[misc]
    if "\0" not in place:
        assert run_command(["info", place]) in (2, 3)
    assert not calls
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_and_labels_are_files_of_this_machine(calls: list[object], tmp_path: Path) -> None:
    """Row 30."""
    build_model(CONFIG, "classification", num_classes=3).save_pretrained(tmp_path / "model")
    for place in PLACES:
        if "\0" not in place and len(place) < 1000:
            refused(lambda place=place: TextTokenizer.load(place))  # type: ignore[misc]
            with pytest.raises(BeitError):
                beit3.load(tmp_path / "model", labels=place)
    assert not calls


# --- Settings ---------------------------------------------------------------------------------------------------------


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_settings_of_ten_megabytes_are_read_or_refused_in_a_short_line(tmp_path: Path) -> None:
    """Row 31."""
    build_model(CONFIG, "classification", num_classes=3).save_pretrained(tmp_path / "model")
    good, path = settings_of(tmp_path / "model"), tmp_path / "model/config.json"
    many = {f"field{number}": number for number in range(100_000)}
    for extra, fits in (
        ({"note": "x" * 10_000_000}, True),
        ({"notes": many}, True),
        ({"model": {**good["model"], "x" * 10_000_000: 1}}, False),
        ({"model": {**good["model"], **many}}, False),
        ({"task": "x" * 10_000_000}, False),
        ({"heads": {**good["heads"], **many}}, False),
    ):
        path.write_text(json.dumps({**good, **extra}))
        started = time.process_time()
        if fits:
            beit3.load_model(tmp_path / "model")
        else:
            assert len(refused(lambda: beit3.load_model(tmp_path / "model"))) < 600 + len(str(tmp_path))
        assert time.process_time() - started < 5


CODE = "__import__('os').mkdir('mark')"


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_in_settings_is_text(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 31: in every field, and as the name of one."""
    monkeypatch.chdir(tmp_path)
    build_model(CONFIG, "classification", num_classes=3).save_pretrained("model")
    VQKD(VISUAL).save(Path("tokenizer"))
    load: Callable[[Path], object] = beit3.load_model if kind == "model" else VQKD.load
    good = settings_of(Path(kind))
    for name in good[kind]:
        Path(kind, "config.json").write_text(json.dumps({**good, kind: {**good[kind], name: CODE}}))
        refused(lambda: load(Path(kind)))
    Path(kind, "config.json").write_text(json.dumps({**good, kind: {**good[kind], CODE: 1}}))
    refused(lambda: load(Path(kind)))
    for name in ("kind", "task", "heads", "format_version"):
        Path(kind, "config.json").write_text(json.dumps({**good, name: CODE}))
        if name in good:
            refused(lambda: load(Path(kind)))
    assert not os.path.exists("mark")


WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    3,
    1.5,
    10**6,
    10**18,
    float("nan"),
    float("inf"),
    "x",
    "\n",
    [],
    [1],
    ["x", "y"],
    [8, 8, 8],
    {},
)


def read_or_refused(folder: Path) -> str:
    """What the loader of visual tokenizers says of a folder; anything but a short line or a tokenizer is a failure."""
    try:
        VQKD.load(folder)
    except BeitError as error:
        said = str(error)
        assert said.isprintable(), said
        assert len(said) < 900 + len(str(folder)), said
        return said
    return ""


def test_settings_of_a_visual_tokenizer_may_hold_anything(tmp_path: Path) -> None:
    """Row 31: each field any value, each missing; nothing but a tokenizer or one short line."""
    VQKD(VISUAL).save(tmp_path / "tokenizer")
    path, good = tmp_path / "tokenizer/config.json", settings_of(tmp_path / "tokenizer")
    count = 0
    for place in [(name,) for name in good if name != "teacher"] + [("tokenizer", name) for name in good["tokenizer"]]:
        for value in (*WRONG, "missing"):
            settings = copy.deepcopy(good)
            inner = settings if len(place) == 1 else settings["tokenizer"]
            inner[place[-1]] = value
            if value == "missing":
                del inner[place[-1]]
            path.write_text(json.dumps(settings))
            count += bool(read_or_refused(tmp_path / "tokenizer"))
    assert count > 150
    path.write_text(json.dumps(good))
    VQKD.load(tmp_path / "tokenizer")


def test_every_tensor_of_a_released_visual_tokenizer_may_have_any_shape(tmp_path: Path) -> None:
    """Row 25."""
    state = tokenizer_to_official(VQKD(VISUAL).state_dict())
    torch.save({"model": state}, tmp_path / "good.pth")
    load_visual_tokenizer(tmp_path / "good.pth")
    ignored = {"quantize.embedding.cluster_size", "quantize.embedding.embed_avg", "quantize.embedding.initted"}
    telling = {"quantize.embedding.weight", "encoder.pos_embed", "encoder.patch_embed.proj.weight"}
    for number, name in enumerate(sorted(state.keys() - ignored)):
        value = state[name]
        wrongs = [value[..., None], value.flatten()[0], value.flatten()[:0], value.to(torch.complex64), value.long()]
        for wrong in wrongs if name in telling else [wrongs[number % 5]]:
            torch.save({"model": {**state, name: wrong.clone()}}, tmp_path / "bad.pth")
            refused(lambda: load_visual_tokenizer(tmp_path / "bad.pth"))
    for wrong in (torch.zeros(0), torch.ones(2), torch.ones(3, 3)):
        torch.save({"model": {**state, "quantize.embedding.initted": wrong}}, tmp_path / "odd.pth")
        load_visual_tokenizer(tmp_path / "odd.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_visual_tokenizer_that_holds_no_numbers_is_refused(value: float, tmp_path: Path) -> None:
    """Row 23: every code would be the same."""
    model = VQKD(VISUAL)
    model.quantize.codebook[3, 1] = value
    model.save(tmp_path / "folder")
    torch.save({"model": tokenizer_to_official(model.state_dict())}, tmp_path / "file.pth")
    for source in ("folder", "file.pth"):
        assert "NaN or infinity in quantize.codebook" in refused(lambda s=source: load_visual_tokenizer(tmp_path / s))  # type: ignore[misc]


def test_a_folder_of_a_newer_form_is_named(tmp_path: Path) -> None:
    """Row 19, for what is passed on; checkpoints in `test_checkpoint.py`."""
    build_model(CONFIG).save_pretrained(tmp_path / "model")
    VQKD(VISUAL).save(tmp_path / "tokenizer")
    for name, load in (("model", beit3.load_model), ("tokenizer", VQKD.load)):
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**settings_of(path.parent), "format_version": 2}))
        with pytest.raises(ConfigError, match="is not of format version 1"):
            load(path.parent)
        with pytest.raises(ConfigError):
            read_settings(path.parent)


def test_tensors_that_nobody_asked_for_are_listed(tmp_path: Path) -> None:
    """Row 24, of visual tokenizers; models in `test_hostile_files.py`."""
    model = VQKD(VISUAL)
    state, shape = model.state_dict(), read_shape(model, tmp_path)
    write_folder(tmp_path / "more", {"kind": "vqkd", "tokenizer": shape}, {**state, "extra": torch.zeros(1)})
    assert "extra is unknown" in refused(lambda: VQKD.load(tmp_path / "more"))
    less = {name: value for name, value in state.items() if name != "encoder.cls_token"}
    write_folder(tmp_path / "less", {"kind": "vqkd", "tokenizer": shape}, less)
    assert "encoder.cls_token is missing" in refused(lambda: VQKD.load(tmp_path / "less"))


def read_shape(model: VQKD, folder: Path) -> Any:
    model.save(folder / "shape")
    return settings_of(folder / "shape")["tokenizer"]
