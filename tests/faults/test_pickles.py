"""No pickle of a stranger is opened: not one lookup of a class, whatever reads a file, whatever the file is called.

Rows 20 and 21, and "no pickle" for every way in which the package loads something. Called as a program, this file reads
hostile files in every way and notes what Python's audit hook sees; a hook stays for the life of its process, so it gets
one of its own. How each kind of hostile `.pth` is refused is in `tests/integration/test_hostile_files.py`.

One pickle there is: the index (`.metadata`) of a run's own training checkpoints, by the design of
torch.distributed.checkpoint. It is read only by `beit3 train --resume` in the run's own folder, once the SHA-256 of
every file verified; no loader of models opens it (`test_checkpoints.py`).
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.energon import CrudeWebdataset
from megatron.energon.epathlib import EPath
from PIL import Image

HOSTILE = "mkdir"


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("mark",)


def torch_file() -> bytes:
    data = io.BytesIO()
    torch.save({"model": Payload()}, data)
    return data.getvalue()


def numpy_file(*, packed: bool = False) -> bytes:
    data, values = io.BytesIO(), np.array([Payload()], dtype=object)
    if packed:
        np.savez(data, pictures=values, vectors=values)
    else:
        np.save(data, values, allow_pickle=True)
    return data.getvalue()


CONTENTS: dict[str, bytes] = {
    "text": pickle.dumps(Payload(), 0),
    "pickle": pickle.dumps(Payload(), 4),
    "torch": torch_file(),
    "numpy": numpy_file(),
    "packed": numpy_file(packed=True),
    "zipped": gzip.compress(pickle.dumps(Payload(), 2)),
}
"""One object in every wrapping that some library unpacks."""
FILES_OF_A_MODEL = ("config.json", "model.safetensors", "preprocess.json", "tokenizer.spm", "labels.json", "words.json")
NAMES = ("model.pth", "model.bin", "model.pkl", "model.zip", "model.safetensors")
COMMANDS = {
    "info": ["info", "{source}"],
    "convert": ["convert", "{source}", "{out}"],
    "caption": ["caption", "picture.png", "--model", "{source}"],
    "answer": ["answer", "picture.png", "--question", "what?", "--model", "{source}"],
    "detect": ["detect", "picture.png", "--model", "{source}"],
    "segment": ["segment", "picture.png", "--model", "{source}"],
    "embed": ["embed", ".", "--model", "{source}", "--out", "{out}"],
    "search": ["search", "{source}", "a cat"],
    "evaluate": ["evaluate", "{source}", "--data", "rows.jsonl", "--out", "{out}"],
    "tokenize": ["tokenize", "text", "captions.txt", "--tokenizer", "{source}"],
    "codes": ["tokenize", "images", "good/pairs", "{out}", "--tokenizer", "{source}"],
    "prepare": ["prepare", "pairs", "{source}", "--out", "{out}"],
}


# --- Hostile files ----------------------------------------------------------------------------------------------------


def tar_of(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return data.getvalue()


def picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(data, "PNG")
    return data.getvalue()


def write_good(folder: Path) -> None:
    """What is read without objection: models with all that belongs to them, tokenizers, pairs, an index, codes."""
    from beit3.data.shard_writer import FolderWriter
    from beit3.model.build import build_model
    from beit3.search.embed import embed_folder
    from beit3.tokenizer.text import train_text_tokenizer
    from beit3.tokenizer.vqkd import VQKD, VQKDConfig
    from tests.faults.small import small_config

    tokenizer = train_text_tokenizer(iter(["a red cat", "two blue dogs", "a green tree"] * 20), 40)
    config = small_config(len(tokenizer))
    files = {"tokenizer.spm": tokenizer.model}
    build_model(config, "retrieval").save_pretrained(folder / "retrieval", files)
    files["labels.json"] = b'["cat", "dog", "tree"]'
    build_model(config, "classification", num_classes=3).save_pretrained(folder / "classification", files)
    VQKD(
        VQKDConfig(image_size=(16, 16), patch_size=8, width=16, depth=1, num_heads=2, codebook_size=8, code_width=4)
    ).save(folder / "vqkd")
    with FolderWriter(folder / "pairs", "pairs") as writer:
        for number in range(4):
            writer.add(f"{number}", {"png": picture(), "txt": b"a red cat", "json": b"{}"})
    (folder / "pictures").mkdir()
    (folder / "pictures" / "one.png").write_bytes(picture())
    embed_folder(folder / "pictures", str(folder / "retrieval"), folder / "index", device="cpu")
    codes = ["tokenize", "images", str(folder / "pairs"), str(folder / "codes"), "--tokenizer", str(folder / "vqkd")]
    from beit3.cli import run_command

    assert run_command([*codes, "--crop.size", "16", "--device", "cpu"]) == 0


def replaced(good: Path, name: str, content: bytes, scratch: Path) -> Path:
    """A copy of a good folder with one file of a hostile content; its weights stay where they are if it has another."""
    folder = scratch / "replaced"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def foreign_shards(folder: Path) -> None:
    """A tar with pickles under every ending that some reader decodes, indexed by energon's own tool."""
    endings = (
        "pyd",
        "pickle",
        "pkl",
        "pth",
        "pt",
        "npy",
        "npz",
        "json",
        "txt",
        "png",
        "ten",
        "tb",
        "cls",
        "mp",
        "cbor",
    )
    files = {"0.png": picture(), "0.txt": b"a red cat"}
    for number, content in enumerate(CONTENTS.values(), start=1):
        files |= {f"{number}.{ending}": content for ending in endings}
    folder.mkdir(parents=True)
    (folder / "in.tar").write_bytes(tar_of(files))
    CrudeWebdataset.prepare_dataset(EPath(folder), ["in.tar"], split_parts_ratio=[("train", 1.0)], shuffle_seed=None)
    call = "!!python/object/apply:os.mkdir [mark]\n"
    (folder / ".nv-meta" / "dataset.yaml").write_text(f"__module__: os\n__class__: mkdir\npath: mark\nmore: {call}")


# --- Ways of reading --------------------------------------------------------------------------------------------------


def ways(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything that reads, over everything that is hostile."""
    yield from _models(folder)
    yield from _tokenizers_and_teachers(folder)
    yield from _data(folder)
    yield from _indexes_and_codes(folder)
    yield from _commands(folder)


def _models(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    import beit3
    from beit3.model.store import fill_model

    good = folder / "good"
    start = beit3.load_model(good / "retrieval")
    for kind, content in CONTENTS.items():
        for name in NAMES:
            path = folder / "files" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            yield f"load_model {name} {kind}", partial(beit3.load_model, path)
            yield f"load {name} {kind}", partial(beit3.load, path, device="cpu")
            yield f"fill_model {name} {kind}", partial(fill_model, start, path)
        for task in ("classification", "retrieval"):
            for name in (*FILES_OF_A_MODEL, "pytorch_model.bin", "model.safetensors.index.json", "tokenizer.json"):
                place = replaced(good / task, name, content, folder)
                yield f"load_model {task}/{name} {kind}", partial(beit3.load_model, place)
                yield f"load {task}/{name} {kind}", partial(beit3.load, place, device="cpu")
                shutil.copy(place / name, folder / "as-it-lies")
                options: Any
                for options in ({"tokenizer": folder / "as-it-lies"}, {"labels": folder / "as-it-lies"}):
                    yield (
                        f"load with {list(options)} {kind}",
                        partial(beit3.load, good / task, device="cpu", **options),
                    )


def _tokenizers_and_teachers(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    from transformers import CLIPVisionConfig

    from beit3.tokenizer.official import load_visual_tokenizer
    from beit3.tokenizer.subwords import WordList, load_subwords
    from beit3.tokenizer.teachers import TeacherConfig, build_teacher
    from beit3.tokenizer.text import TextTokenizer
    from beit3.tokenizer.vqkd import VQKD

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=8).save_pretrained(folder / "clip")
    (folder / "timm").mkdir()
    network = {"architecture": "resnet10t", "num_classes": 0, "pretrained_cfg": {"num_classes": 0}}
    (folder / "timm" / "config.json").write_text(json.dumps(network))
    for kind, content in CONTENTS.items():
        for name in ("v.spm", "v.json", "v.txt.gz", "v.txt", "v.pth"):
            path = folder / name
            path.write_bytes(content)
            yield f"text tokenizer {name} {kind}", partial(TextTokenizer.load, path)
            yield f"subwords {name} {kind}", partial(load_subwords, path)
            yield f"visual tokenizer {name} {kind}", partial(load_visual_tokenizer, path)
        for name in ("config.json", "model.safetensors"):
            place = replaced(folder / "good" / "vqkd", name, content, folder)
            yield f"VQKD {name} {kind}", partial(VQKD.load, place)
        (folder / "words.json").write_bytes(content)
        yield f"words {kind}", lambda: WordList.read(folder, 8)
        teacher: Any
        for teacher, names in (
            ("clip", ("pytorch_model.bin", "model.safetensors")),
            ("timm", ("pytorch_model.bin", "model.safetensors", "open_clip_pytorch_model.bin")),
        ):
            for name in names:
                path = folder / teacher / name
                path.write_bytes(content)
                config = TeacherConfig(kind=teacher, name=str(folder / teacher), image_size=32)
                yield f"teacher {teacher} {name} {kind}", partial(build_teacher, config)
                path.unlink()


def _data(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    from beit3.data.index_files import ClassificationRow, read_index
    from beit3.data.labels import read_labels
    from beit3.data.prepare import prepare_images, prepare_pairs, prepare_text
    from beit3.data.shards import load_prepared
    from beit3.data.streams import Source, Stream, StreamLoader
    from beit3.data.verify import verify_folder

    class Nothing:
        def encode(self, sample: object) -> object:
            return sample

        def collate(self, samples: list[object]) -> list[object]:
            return samples

        def join(self, units: list[list[object]]) -> list[object]:
            return [sample for unit in units for sample in unit]

    def draw(name: str) -> object:
        stream = Stream(sources=(Source(path=name),), batch_size=2, shuffle_buffer=1)
        loader: Any = StreamLoader({"x": stream}, {"x": Nothing()}, data=folder, seed=0)
        return [next(iter(loader)) for _ in range(4)]

    def read_all(place: Path) -> object:
        return list(load_prepared(place))

    foreign_shards(folder / "foreign")
    yield "read foreign shards", partial(read_all, folder / "foreign")
    yield "train on foreign shards", lambda: draw("foreign")
    yield "verify foreign shards", lambda: verify_folder(folder / "foreign")
    sources = [folder / "foreign" / "in.tar"]
    for prepare in (prepare_pairs, prepare_images):
        yield prepare.__name__, partial(prepare, sources, folder / "out", overwrite=True)
    names = ["prepare.json", *(f".nv-meta/{name}" for name in ("dataset.yaml", "split.yaml", ".info.json"))]
    for kind, content in CONTENTS.items():
        for name in (*names, ".nv-meta/index.sqlite", "shard-00000.tar", "shard-00000.tar.idx"):
            place = replaced(folder / "good" / "pairs", name, content, folder)
            yield f"read {name} {kind}", partial(read_all, place)
            yield f"train on {name} {kind}", lambda: draw("replaced")
            yield f"verify {name} {kind}", partial(verify_folder, place)
        for name in ("a.tar", "a.tar.gz", "a.tgz", "a.txt", "a.jsonl", "a.parquet"):
            path = folder / name
            path.write_bytes(content)
            for source in (prepare_pairs, prepare_images, prepare_text):
                yield (
                    f"{source.__name__} {name} {kind}",
                    partial(source, [path], folder / "out", overwrite=True),
                )
            yield f"index {name} {kind}", partial(read_index, path, ClassificationRow)
            yield f"labels {name} {kind}", partial(read_labels, path)
            path.unlink()


def _indexes_and_codes(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    from beit3.data.visual_codes import CodeTable
    from beit3.evaluation_parts import read_parts
    from beit3.search import embed
    from beit3.search.index import Index

    (folder / "parts").mkdir()
    for kind, content in CONTENTS.items():
        for name in ("vectors.npy", "pictures.jsonl", "index.faiss", "settings.json"):
            place = replaced(folder / "good" / "index", name, content, folder)
            yield f"index {name} {kind}", partial(Index.load, place)
        for name in ("codes.json", "shard-00000.npy"):
            place = replaced(folder / "good" / "codes", name, content, folder)
            yield f"codes {name} {kind}", partial(CodeTable, place)
        (folder / "parts" / "digest-1.npz").write_bytes(content)
        yield f"parts of an index {kind}", lambda: embed._read_parts(folder / "parts", "digest")
        (folder / "parts" / "0000-000000.pt").write_bytes(content)
        yield f"parts of an evaluation {kind}", lambda: list(read_parts(folder / "parts"))


def _commands(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    from beit3.cli import run_command
    from beit3.errors import BeitError

    (folder / "picture.png").write_bytes(picture())
    (folder / "captions.txt").write_text("a red cat\n")
    (folder / "rows.jsonl").write_text('{"image_path": "picture.png", "label": 1}\n')

    def ask(arguments: list[str]) -> None:
        if run_command(arguments) in (1, 2, 3):
            raise BeitError("refused")

    for verb, template in COMMANDS.items():
        for kind in ("pickle", "torch"):
            path = folder / "files" / "model.pth"
            path.write_bytes(CONTENTS[kind])
            shutil.rmtree(folder / "new", ignore_errors=True)
            given = [part.format(source=path, out=folder / "new") for part in template]
            yield f"beit3 {verb} {kind}", partial(ask, given)


def watch(folder: Path) -> None:
    """Read everything, and write down what was looked up, what acted, and how it ended."""
    importlib.import_module("torch._dynamo")  # PyTorch itself imports it late
    write_good(folder / "good")
    events: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            events.append(f"{arguments[0]}.{arguments[1]}")

    sys.addaudithook(hook)
    seen: dict[str, Any] = {}
    for name, read in ways(folder):
        events.clear()
        try:
            read()
            ending = "read"
        except Exception as error:
            ending = type(error).__name__
        seen[name] = {"ending": ending, "events": list(events), "acted": Path("mark").exists()}
        shutil.rmtree("mark", ignore_errors=True)
    events.clear()
    pickle.loads(CONTENTS["pickle"])
    seen["control"] = {"ending": "read", "events": list(events), "acted": Path("mark").exists()}
    (folder / "seen.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each way of reading led to."""
    from tests.processes import environment

    folder = tmp_path_factory.mktemp("pickles")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        cwd=folder,
        env=environment(HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads((folder / "seen.json").read_text())
    return found


def test_the_watch_sees_a_pickle_that_is_opened(seen: dict[str, dict[str, Any]]) -> None:
    control = seen["control"]
    assert control["acted"]
    assert any(HOSTILE in event for event in control["events"])


def test_no_way_of_reading_looks_up_a_class_or_runs_what_a_file_says(seen: dict[str, dict[str, Any]]) -> None:
    ways_of_reading = {name: found for name, found in seen.items() if name != "control"}
    assert len(ways_of_reading) > 400
    for name, found in ways_of_reading.items():
        assert not found["acted"], name
        # energon sends what it found in a tar from one of its processes to another.
        allowed = ("megatron.energon.", "pathlib.PurePosixPath") if name.startswith("prepare") else ()
        events = [event for event in found["events"] if not event.startswith(allowed)]
        assert not events, (name, events)


KNOWN = {"ConfigError", "DataMissingError", "BadDataError", "BeitError", "read"}


def test_each_is_refused_in_words_or_read_without_its_pickles(seen: dict[str, dict[str, Any]]) -> None:
    """No other error than the package's own; read is what a good folder holds beside the hostile file."""
    assert not {name: found["ending"] for name, found in seen.items() if found["ending"] not in KNOWN}
    for name, found in seen.items():
        if name.startswith(("load_model model", "load model", "fill_model", "visual tokenizer", "beit3 ")):
            assert found["ending"] != "read", name


if __name__ == "__main__":
    torch.set_num_threads(1)
    watch(Path(sys.argv[1]))
