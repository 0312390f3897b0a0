"""`beit3 prepare` of finetuning sets on the command line: published files in, indexes that training reads out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from beit3.cli import run_command
from beit3.data.dense_rows import DetectionRow, SegmentationRow
from beit3.data.finetuning import FINETUNING_SETS
from beit3.data.index_files import (
    CaptioningRow,
    CaptioningTrainingRow,
    ClassificationRow,
    NLVR2Row,
    RetrievalRow,
    Row,
    VQARow,
    VQATrainingRow,
    read_index,
    read_picture,
)
from beit3.data.labels import read_labels


def draw(root: Path, *names: str) -> None:
    """Draw a small picture for each name, whatever its ending."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (number, 100, 100)).save(path, "PNG")


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


def make_coco(root: Path) -> None:
    """Two training images, one to validate on, one to test on, of which COCO calls three `val2014`."""
    images = []
    for number, split in enumerate(("train", "restval", "val", "test")):
        folder = "train2014" if split == "train" else "val2014"
        name = f"COCO_{folder}_{number:012d}.jpg"
        draw(root, f"{folder}/{name}")
        sentences = [{"raw": f"Picture {number}, caption {caption}."} for caption in range(5)]
        images.append({"filepath": folder, "filename": name, "cocoid": number, "split": split, "sentences": sentences})
    write(root / "annotations" / "dataset_coco.json", {"images": images})


def make_flickr30k(root: Path) -> None:
    draw(root, *(f"flickr30k-images/{number}.jpg" for number in range(3)))
    images = [
        {"filename": f"{number}.jpg", "split": split, "sentences": [{"raw": "A man ."}, {"raw": "He runs ."}]}
        for number, split in enumerate(("train", "val", "test"))
    ]
    write(root / "dataset_flickr30k.json", {"images": images})


def make_vqav2(root: Path) -> None:
    """Four images a split; every second answer is yes."""
    number = 0
    for split, pictures in (("train2014",) * 2, ("val2014",) * 2, ("test2015",) * 2, ("test-dev2015", "test2015")):
        questions, annotations = [], []
        for image in range(4):
            draw(root, f"{pictures}/COCO_{pictures}_{image:012d}.jpg")
            number += 1
            common = {"question_id": number, "image_id": image}
            main = "yes" if image % 2 else "2"
            given = [{"answer": main if person else "two"} for person in range(10)]
            questions.append({"question": f"Is it {image}?", **common})
            types = {"answer_type": "other", "question_type": "is it"}
            annotations.append({"multiple_choice_answer": main, "answers": given, **types, **common})
        write(root / "vqa" / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
        if not split.startswith("test"):
            write(root / "vqa" / f"v2_mscoco_{split}_annotations.json", {"annotations": annotations})


def make_nlvr2(root: Path) -> None:
    for name, folder, more in (
        ("train", "images/train/7", {"directory": 7}),
        ("dev", "dev", {}),
        ("test1", "test1", {}),
    ):
        draw(root, f"{folder}/{name}-5-0-img0.png", f"{folder}/{name}-5-0-img1.png")
        row = {"identifier": f"{name}-5-0-1", "sentence": "Both show a dog.", "label": "True", **more}
        (root / "nlvr2" / "data").mkdir(parents=True, exist_ok=True)
        (root / "nlvr2" / "data" / f"{name}.json").write_text(json.dumps(row) + "\n")


def make_nocaps(root: Path) -> None:
    draw(root, "val/0a.jpg", "test/0b.jpg")
    caption = {"id": 0, "image_id": 3, "caption": "A mirror."}
    write(
        root / "nocaps_val_4500_captions.json", {"images": [{"id": 3, "file_name": "0a.jpg"}], "annotations": [caption]}
    )
    write(root / "nocaps_test_image_info.json", {"images": [{"id": 4, "file_name": "0b.jpg"}]})


def make_imagenet(root: Path) -> None:
    draw(root, "train/n01440764/1.JPEG", "train/n01443537/2.JPEG", "val/n01443537/3.JPEG")


def make_image_folder(root: Path) -> None:
    draw(root, *(f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(4)))


def make_coco_detection(root: Path) -> None:
    """Two training images, one to validate on."""
    for split, numbers in (("train2017", (1, 2)), ("val2017", (3,))):
        draw(root, *(f"{split}/{number}.jpg" for number in numbers))
        content = {
            "images": [{"id": number, "file_name": f"{number}.jpg", "height": 6, "width": 8} for number in numbers],
            "annotations": [
                {"id": number, "image_id": number, "category_id": 7, "bbox": [1, 1, 4, 3]} for number in numbers
            ],
            "categories": [{"id": 7, "name": "train"}, {"id": 3, "name": "car"}],
        }
        write(root / "annotations" / f"instances_{split}.json", content)


def make_ade20k(root: Path) -> None:
    for split, folder in (("train", "training"), ("val", "validation")):
        name = f"{folder}/ADE_{split}_00000001"
        draw(root, f"ADEChallengeData2016/images/{name}.jpg", f"ADEChallengeData2016/annotations/{name}.png")


MADE = {
    "coco-captions": make_coco,
    "coco-retrieval": make_coco,
    "flickr30k": make_flickr30k,
    "vqav2": make_vqav2,
    "nlvr2": make_nlvr2,
    "nocaps": make_nocaps,
    "imagenet": make_imagenet,
    "image-folder": make_image_folder,
    "coco-detection": make_coco_detection,
    "ade20k": make_ade20k,
}
MORE = {"vqav2": ["--min-answer-count", "2"], "image-folder": ["--val-share", "0.25"]}
EXPECTED: dict[str, dict[str, tuple[type[Row], int]]] = {
    "coco-captions": {
        "coco_captioning.train": (CaptioningTrainingRow, 10),
        "coco_captioning.val": (CaptioningRow, 1),
        "coco_captioning.test": (CaptioningRow, 1),
    },
    "coco-retrieval": {
        "coco_retrieval.train": (RetrievalRow, 10),
        "coco_retrieval.val": (RetrievalRow, 5),
        "coco_retrieval.test": (RetrievalRow, 5),
    },
    "flickr30k": {
        "flickr30k.train": (RetrievalRow, 2),
        "flickr30k.val": (RetrievalRow, 2),
        "flickr30k.test": (RetrievalRow, 2),
    },
    "vqav2": {
        "vqa.train": (VQATrainingRow, 4),
        "vqa.val": (VQARow, 4),
        "vqa.trainable_val": (VQATrainingRow, 2),
        "vqa.rest_val": (VQARow, 2),
        "vqa.test": (VQARow, 4),
        "vqa.test-dev": (VQARow, 4),
    },
    "nlvr2": {
        "nlvr2.train.index": (NLVR2Row, 1),
        "nlvr2.dev.index": (NLVR2Row, 1),
        "nlvr2.test-P.index": (NLVR2Row, 1),
    },
    "nocaps": {"nocaps.val": (CaptioningRow, 1), "nocaps.test": (CaptioningRow, 1)},
    "imagenet": {"imagenet.train.index": (ClassificationRow, 2), "imagenet.val.index": (ClassificationRow, 1)},
    "image-folder": {"image_folder.train": (ClassificationRow, 6), "image_folder.val": (ClassificationRow, 2)},
    "coco-detection": {"coco_detection.train": (DetectionRow, 2), "coco_detection.val": (DetectionRow, 1)},
    "ade20k": {"ade20k.train": (SegmentationRow, 1), "ade20k.val": (SegmentationRow, 1)},
}
BESIDE = {"coco-detection": {"categories.json"}}


def complaint(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail with this code and say why in one line."""
    capsys.readouterr()
    assert run_command(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("beit3: ")
    return lines[0]


def test_every_set_is_covered_here() -> None:
    assert MADE.keys() == EXPECTED.keys() == FINETUNING_SETS.keys()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in_root", "elsewhere"])
@pytest.mark.parametrize("kind", sorted(FINETUNING_SETS))
def test_training_reads_what_prepare_writes(
    kind: str, elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    MADE[kind](Path("root"))
    out = Path("indexes/here") if elsewhere else Path("root")
    before = {path for path in Path("root").rglob("*") if path.is_file()}
    arguments = ["prepare", kind, "root", *MORE.get(kind, []), *(["--out", str(out)] if elsewhere else [])]
    assert run_command(arguments) == 0
    said = capsys.readouterr().out
    num_labels = len(read_labels(out / "labels.json")) if (out / "labels.json").exists() else None
    for name, (row_kind, count) in EXPECTED[kind].items():
        index = read_index(out / f"{name}.jsonl", row_kind, num_labels=num_labels)
        assert (len(index), dict(index.skipped)) == (count, {})
        assert f"  {name}.jsonl: {count} rows" in said
        for row in index:
            assert read_picture(row.image_path).size == (8, 6)
    new = {path for path in out.rglob("*") if path.is_file()} - before
    beside = ({"labels.json"} if num_labels else set()) | BESIDE.get(kind, set()) | {f"{kind}.prepare.json"}
    assert {path.name for path in new} == {f"{name}.jsonl" for name in EXPECTED[kind]} | beside
    assert before <= {path for path in Path("root").rglob("*") if path.is_file()}


def test_sets_that_share_pictures_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_coco(tmp_path)
    make_vqav2(tmp_path)
    for arguments in (["coco-captions"], ["coco-retrieval"], ["vqav2", "--min-answer-count", "2"]):
        assert run_command(["prepare", arguments[0], str(tmp_path), *arguments[1:]]) == 0
    names = [name for kind in ("coco-captions", "coco-retrieval", "vqav2") for name in EXPECTED[kind]]
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == sorted(f"{name}.jsonl" for name in names)


def test_what_is_left_out_is_said_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_nlvr2(tmp_path)
    (tmp_path / "dev" / "dev-5-0-img1.png").unlink()
    assert run_command(["prepare", "nlvr2", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    missing = tmp_path / "dev" / "dev-5-0-img1.png"
    assert "  nlvr2.dev.index.jsonl: not written, nothing is usable; 0 sentences (published: 6,982)" in said
    assert f"    left out: 1 missing_image (such as dev-5-0-1: {missing})" in said
    kept = json.loads((tmp_path / "nlvr2.prepare.json").read_text())
    assert kept["parts"]["dev"]["left_out"]["counts"] == {"missing_image": 1}


def test_broken_sets_end_in_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    assert "no such folder" in complaint(["prepare", "vqav2", str(root)], 3, capsys)
    root.mkdir()
    assert "v2_OpenEnded_mscoco_train2014" in complaint(["prepare", "vqav2", str(root)], 3, capsys)
    assert "train.json is neither" in complaint(["prepare", "nlvr2", str(root)], 3, capsys)
    assert "folder a class" in complaint(["prepare", "imagenet", str(root)], 3, capsys)
    assert "no such file" in complaint(["prepare", "flickr30k", str(root), "--annotations", "nowhere"], 3, capsys)
    (root / "dataset_coco.json").write_text('{"images": [{"filepath"')
    assert "is no JSON" in complaint(["prepare", "coco-captions", str(root)], 2, capsys)
    make_coco(root)
    (root / "dataset_coco.json").unlink()
    for folder in ("train2014", "val2014"):
        (root / folder).rename(tmp_path / folder)
    assert "4 missing_image" in complaint(["prepare", "coco-captions", str(root)], 3, capsys)
    assert sorted(path.name for path in root.iterdir()) == ["annotations"]


def test_official_indexes_are_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_flickr30k(tmp_path)
    official = tmp_path / "flickr30k.train.jsonl"
    official.write_text('{"image_path": "flickr30k-images/0.jpg", "text_segment": [5, 6], "image_id": 0}\n')
    assert "use it as it is" in complaint(["prepare", "flickr30k", str(tmp_path)], 2, capsys)
    assert read_index(official, RetrievalRow)[0].text == (5, 6)
    assert run_command(["prepare", "flickr30k", str(tmp_path), "--overwrite"]) == 0
    assert read_index(official, RetrievalRow)[0].text == "A man ."


def test_wrong_use_says_what_would_be_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'vqav2'" in complaint(["prepare", "vqa2", str(tmp_path)], 2, capsys)
    assert "--official-counts" in complaint(["prepare", "nlvr2", str(tmp_path), "--official-counts"], 2, capsys)
    assert "must be at least 1" in complaint(["prepare", "vqav2", str(tmp_path), "--min-answer-count", "0"], 2, capsys)


def test_help_names_the_sets_and_says_what_needs_no_preparation(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["prepare", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(kind in said for kind in FINETUNING_SETS)
    assert "Indexes of the released code (*.jsonl) need no preparation" in said
    assert run_command(["prepare", "vqav2", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--min-answer-count" in said
    assert '1,000 are the images whose SHA-256 of "rest_val:ID"' in said, "the rule of the validation split"
