"""Damaged files of every kind are refused in words: no crash, no hang, no other error, little memory.

As a program (`test_fuzz.py KIND NUMBER SCRATCH`) this opens mutated files of a kind, and tells what came of them.
"""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3.data.images import decode_image
from beit3.data.index_files import ClassificationRow, read_index
from beit3.data.prepare import prepare_pairs
from beit3.data.shard_writer import FolderWriter
from beit3.data.shards import load_prepared
from beit3.data.verify import verify_folder
from beit3.errors import BeitError
from beit3.model.build import build_model
from beit3.model.store import load_model
from beit3.predict import load
from beit3.tokenizer.text import TextTokenizer, train_text_tokenizer
from tests.faults.small import small_config

SECONDS = 5
"""Of computing, for one file."""
MEMORY = 2 * 2**30
"""Bytes, of the whole process: what the README promises."""
Open = Callable[[bytes], None]
"""Opens a mutated file in every way that the package has for it."""


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to three changes: flipped bits, cuts, holes, repetitions, extreme numbers, foreign bytes."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        size = len(found)
        if size < 8:
            return bytes(found)
        start = draw.randrange(size - 4)
        length = draw.randint(1, max(1, min(size - start, draw.choice((4, 64, 512)))))
        match draw.randrange(7):
            case 0:
                for _ in range(draw.randint(1, 8)):
                    found[draw.randrange(size)] ^= 1 << draw.randrange(8)
            case 1:
                del found[start:]
            case 2:
                del found[start : start + length]
            case 3:
                found[start : start + length] = bytes(length)
            case 4:
                found[start:start] = found[start : start + length]
            case 5:
                found[start : start + 4] = draw.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x80"))
            case 6:
                found[start : start + length] = draw.randbytes(length)
    return bytes(found)


def pictures(scratch: Path) -> tuple[list[bytes], Open]:
    """JPEG, PNG, WebP, GIF and BMP, of several modes."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA")
    found = []
    for kind, mode in {"JPEG": "RGB", "PNG": "RGBA", "WEBP": "RGBA", "GIF": "P", "BMP": "RGB"}.items():
        stream = io.BytesIO()
        image.convert(mode).save(stream, kind)
        found.append(stream.getvalue())
    for kind, options in (("JPEG", {"progressive": True}), ("PNG", {"save_all": True, "append_images": [image]})):
        stream = io.BytesIO()
        image.convert("CMYK" if kind == "JPEG" else "P").save(stream, kind, **options)
        found.append(stream.getvalue())

    def look(data: bytes) -> None:
        decode_image(data)

    return found, look


def tars(scratch: Path) -> tuple[list[bytes], Open]:
    """A shard of pairs: as a foreign tar that is prepared, and as a prepared one that is read and verified."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(stream, "PNG")
    with FolderWriter(scratch / "pairs", "pairs") as writer:
        for number in range(6):
            writer.add(f"{number:04d}", {"png": stream.getvalue(), "txt": b"a red square", "json": b'{"a": 1}'})
    shard = scratch / "pairs" / "shard-00000.tar"

    def look(data: bytes) -> None:
        foreign = scratch / "foreign.tar"
        foreign.write_bytes(data)
        try:
            prepare_pairs([foreign], scratch / "out", overwrite=True)
        except BeitError:
            shard.write_bytes(data)
            verify_folder(scratch / "pairs")
            raise
        shard.write_bytes(data)
        verify_folder(scratch / "pairs")
        list(load_prepared(scratch / "pairs"))

    return [shard.read_bytes()], look


def small_model(scratch: Path) -> Path:
    tokenizer = train_text_tokenizer(iter(["a red cat", "two blue dogs", "a green tree"] * 20), 40)
    config = small_config(len(tokenizer))
    model = build_model(config, "classification", num_classes=3)
    model.save_pretrained(scratch / "model")
    tokenizer.save(scratch / "model" / "tokenizer.spm")
    (scratch / "model" / "labels.json").write_text('["cat", "dog", "tree"]')
    return scratch / "model"


def one_of_a_model(scratch: Path, name: str) -> tuple[list[bytes], Open]:
    folder = small_model(scratch)
    path = folder / name

    def look(data: bytes) -> None:
        path.write_bytes(data)
        load_model(folder)
        load(folder, device="cpu")

    return [path.read_bytes()], look


def safetensors(scratch: Path) -> tuple[list[bytes], Open]:
    """The weights of an exchange folder."""
    return one_of_a_model(scratch, "model.safetensors")


def jsons(scratch: Path) -> tuple[list[bytes], Open]:
    """What describes a model, names its classes, or lists pictures."""
    folder = small_model(scratch)
    for number in range(3):
        Image.new("RGB", (8, 8)).save(scratch / f"{number}.png")
    rows = [{"image_path": f"{number}.png", "label": number} for number in range(3)]
    (scratch / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    files = [folder / "config.json", folder / "labels.json", scratch / "rows.jsonl"]
    originals = [path.read_bytes() for path in files]

    def look(data: bytes) -> None:
        number = min(range(3), key=lambda number: abs(len(originals[number]) - len(data)))
        files[number].write_bytes(data)
        try:
            load(folder, device="cpu")
            list(read_index([scratch / "rows.jsonl"], ClassificationRow))
        finally:
            files[number].write_bytes(originals[number])

    return originals, look


def sentencepiece(scratch: Path) -> tuple[list[bytes], Open]:
    """A text tokenizer."""
    path = small_model(scratch) / "tokenizer.spm"

    def look(data: bytes) -> None:
        path.write_bytes(data)
        tokenizer = TextTokenizer.load(path)
        tokenizer.decode(tokenizer.encode("a red cat and \ud7ff 12", 16))

    return [path.read_bytes()], look


KINDS: dict[str, Callable[[Path], tuple[list[bytes], Open]]] = {
    "pictures": pictures,
    "tars": tars,
    "safetensors": safetensors,
    "jsons": jsons,
    "sentencepiece": sentencepiece,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "number", [pytest.param(40), pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])]
)
def test_mutated_files_are_refused_in_words(kind: str, number: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.test_fuzz", kind, str(number), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    at = (tmp_path / "at.txt").read_text()
    assert done.returncode == 0, f"{kind} {at}: {done.stderr[-2000:]}"
    told = json.loads(done.stdout.splitlines()[-1])
    assert sum(told["outcomes"].values()) == number
    assert told["outcomes"].keys() <= {"opened", "refused"}, told["outcomes"]
    assert told["outcomes"]["refused"] > 0
    assert told["memory"] < MEMORY


def main() -> None:
    kind, number, scratch = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    originals, look = KINDS[kind](scratch)

    def hang(*_: object) -> None:
        raise TimeoutError(f"longer than {SECONDS} seconds")

    signal.signal(signal.SIGPROF, hang)
    for original in originals:
        look(original)  # opens; imports what is imported late
    outcomes: Counter[str] = Counter()
    for index in range(number):
        draw = random.Random(f"{kind} {index}")
        data = mutate(draw.choice(originals), draw)
        (scratch / "at.txt").write_text(f"file {index}")
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            look(data)
            outcomes["opened"] += 1
        except BeitError:
            outcomes["refused"] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    status = Path("/proc/self/status").read_text(encoding="ascii")  # getrusage would tell the peak of who started this
    memory = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    print(json.dumps({"outcomes": outcomes, "memory": memory}))


if __name__ == "__main__":
    main()
