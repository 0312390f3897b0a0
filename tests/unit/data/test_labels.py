"""Names of outputs: our list, the released answers, ImageNet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from beit3.data.labels import find_labels, imagenet_labels, labels_beside, labels_file, read_labels
from beit3.errors import ConfigError, DataMissingError


def test_our_own_list_comes_back(tmp_path: Path) -> None:
    names = ["yes", "no", "crème brûlée"]
    for name, content in labels_file(names).items():
        (tmp_path / name).write_bytes(content)
    assert read_labels(tmp_path / "labels.json") == names


def test_the_released_answer_list_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    rows = [{"answer": "no", "label": 1}, {"answer": "2", "label": 2}, {"answer": "yes", "label": 0}]
    (tmp_path / "answer2label.txt").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    assert read_labels(tmp_path / "answer2label.txt") == ["yes", "no", "2"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1, 2]",
        "yes\nno",
        '{"answer": "yes", "label": 1}',
        '{"label": 0}',
        '{"answer": "a", "label": 0}\n' * 2,
        "[}",
        "[" * 100_000,
    ],
    ids=["empty", "numbers", "lines", "gap", "no_answer", "twice", "no_json", "deep"],
)
def test_anything_else_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ConfigError, match="is no list of labels"):
        read_labels(tmp_path / "labels.json")
    for missing in ("other.json", "x" * 300):
        with pytest.raises(DataMissingError, match="do not exist"):
            read_labels(tmp_path / missing)


def test_labels_are_taken_from_the_data_folder_before_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    here, data = Path("labels.json"), Path("data")
    with pytest.raises(DataMissingError, match=r"labels\.json are neither in data nor in the current folder"):
        find_labels(here, data)
    here.write_text("[]")
    assert find_labels(here, data) == here
    (data / here).write_text("[]")
    assert find_labels(here, data) == data / here
    assert find_labels(here.absolute(), data) == here.absolute()
    with pytest.raises(DataMissingError, match="labels /nowhere do not exist"):
        find_labels(Path("/nowhere"), data)


def test_an_index_has_our_list_beside_it_or_the_released_one(tmp_path: Path) -> None:
    index = tmp_path / "vqa.train.jsonl"
    assert labels_beside(index) is None
    for name in ("answer2label.txt", "labels.json"):
        (tmp_path / name).write_text("[]")
        assert labels_beside(index) == tmp_path / name


def test_imagenet_has_its_thousand_classes_in_the_order_of_their_folders() -> None:
    names = imagenet_labels()
    assert len(names) == 1000
    for index, word in (
        (0, "tench"),
        (1, "goldfish"),
        (207, "golden retriever"),
        (281, "tabby"),
        (999, "toilet tissue"),
    ):
        assert word in names[index], (index, names[index])
