"""Names of classes and answers: `labels.json`, the released answer list of VQAv2, and ImageNet's own names."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from beit3.errors import ConfigError, DataMissingError

FILE = "labels.json"
RELEASED_FILE = "answer2label.txt"


def find_labels(labels: Path, data: Path) -> Path:
    """Where the labels lie that a run names: in its data folder if they are there, else where the path itself leads.

    Args:
        labels: as named, absolute or not.
        data: the run's data folder.

    Raises:
        DataMissingError: a relative path leads to nothing from either place.
    """
    for place in (data / labels, labels):
        if os.path.isfile(place):
            return place
    if labels.is_absolute():
        raise DataMissingError(f"labels {labels} do not exist")
    raise DataMissingError(
        f"labels {labels} are neither in {data} nor in the current folder: prepare the data, or name others with "
        "--task.labels"
    )


def labels_beside(index: Path) -> Path | None:
    """The labels that an index file came with: `labels.json` in its folder, or else the released answer list."""
    places = (index.with_name(name) for name in (FILE, RELEASED_FILE))
    return next((place for place in places if os.path.isfile(place)), None)


def read_labels(path: Path) -> list[str]:
    """Read names in the order of their outputs.

    Args:
        path: `labels.json` (a list), or the `answer2label.txt` that the released VQA code writes (a JSON object with
            `answer` and `label` on each line).

    Raises:
        DataMissingError: no such file.
        ConfigError: neither form, or numbers that leave gaps.
    """
    if not os.path.isfile(path):
        raise DataMissingError(f"labels {path} do not exist")
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            names = json.loads(text)
            if all(isinstance(name, str) for name in names):
                return list(names)
            raise ValueError("the list holds more than names")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        by_number = {int(row["label"]): str(row["answer"]) for row in rows}
        if not rows or sorted(by_number) != list(range(len(rows))):
            raise ValueError("labels do not number 0, 1, 2, ...")
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} is no list of labels ({error})") from error
    return [by_number[number] for number in range(len(by_number))]


def labels_file(names: Sequence[str]) -> dict[str, bytes]:
    """`labels.json` by name, as `save_pretrained` takes it."""
    return {FILE: (json.dumps(list(names), ensure_ascii=False, indent=0) + "\n").encode()}


def imagenet_labels() -> list[str]:
    """The thousand classes of ImageNet-1k in the order of their folder names, which the released files follow."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return [str(info.index_to_description(index)) for index in range(info.num_classes())]
