"""Detection indexes from COCO's layout and from anybody's json; every expected row and count is written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beit3.data.dense_rows import DetectionRow, category_ids
from beit3.data.finetuning.coco_detection import prepare_coco_detection
from beit3.data.finetuning.index_writer import IndexReport
from beit3.data.images import decode_image
from beit3.data.index_files import read_index
from beit3.data.labels import read_labels
from beit3.errors import BadSampleError, ConfigError, DataMissingError

Json = dict[str, Any]
CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}]
TRIANGLE = [[1, 1, 6, 1, 3.5, 7]]


def picture(root: Path, name: str, size: tuple[int, int] = (10, 8), **save: Any) -> None:
    """Draw a picture of this width and height."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (len(name), 100, 100)).save(path, **save)


def image(number: int, name: str, **more: Any) -> Json:
    return {"id": number, "file_name": name, "width": 10, "height": 8, **more}


def note(number: int, of: int, **more: Any) -> Json:
    return {"id": number, "image_id": of, "category_id": 1, "bbox": [1, 1, 5, 6], "area": 15.5, "iscrowd": 0, **more}


def write(path: Path, images: list[Any], notes: list[Any], categories: list[Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": notes, "categories": CATEGORIES if categories is None else categories}
    path.write_text(json.dumps(content), "utf-8")
    return path


def rows(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def left_out(report: IndexReport) -> dict[str, dict[str, int]]:
    found = {split: part.left_out.counts for split, part in report.parts.items()}
    return {split: counts for split, counts in {**found, "": report.left_out.counts}.items() if counts}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """COCO 2017 with two training images, one to validate on, one to test on, and files of other tasks beside."""
    root = tmp_path / "coco"
    for name in ("train2017/1.jpg", "train2017/2.jpg", "val2017/3.jpg", "test2017/4.jpg"):
        picture(root, name)
    crowd = {"iscrowd": 1, "segmentation": {"size": [8, 10], "counts": [40, 16, 24]}, "bbox": [5, 0, 2, 8], "area": 16}
    write(
        root / "annotations" / "instances_train2017.json",
        [image(1, "1.jpg"), image(2, "2.jpg")],
        [
            note(10, 2, segmentation=TRIANGLE, category_id=90),
            note(11, 2, **crowd),
            note(12, 2, bbox=[9, 7, 1, 1], area=1, category_id=13),
        ],
    )
    write(root / "annotations" / "instances_val2017.json", [image(3, "3.jpg")], [note(10, 3)])
    for name in ("captions_train2017", "person_keypoints_train2017", "captions_val2017", "image_info_unlabeled2017"):
        write(root / "annotations" / f"{name}.json", [], [])
    info = {"images": [image(4, "4.jpg")], "categories": CATEGORIES}
    (root / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(info))
    (root / "annotations" / "image_info_test2017.json").write_text(json.dumps(info))
    return root


def test_coco_2017_is_read_from_its_layout(coco: Path) -> None:
    report = prepare_coco_detection(coco)
    base = {"height": 8, "width": 10}
    assert rows(coco / "coco_detection.train.jsonl") == [
        {"image_path": "train2017/1.jpg", "image_id": 1, **base, "objects": []},
        {
            "image_path": "train2017/2.jpg",
            "image_id": 2,
            **base,
            "objects": [
                {"bbox": [1, 1, 5, 6], "label": 2, "iscrowd": 0, "area": 15.5, "segmentation": TRIANGLE},
                {
                    "bbox": [5, 0, 2, 8],
                    "label": 0,
                    "iscrowd": 1,
                    "area": 16,
                    "segmentation": {"size": [8, 10], "counts": [40, 16, 24]},
                },
                {"bbox": [9, 7, 1, 1], "label": 1, "iscrowd": 0, "area": 1},
            ],
        },
    ]
    validated = {"bbox": [1, 1, 5, 6], "label": 0, "iscrowd": 0, "area": 15.5}
    assert rows(coco / "coco_detection.val.jsonl") == [
        {"image_path": "val2017/3.jpg", "image_id": 3, **base, "objects": [validated]}
    ]
    assert rows(coco / "coco_detection.test.jsonl") == [
        {"image_path": "test2017/4.jpg", "image_id": 4, **base, "objects": []}
    ]
    assert left_out(report) == {}
    assert report.lines() == [
        f"{coco}: coco-detection",
        "  coco_detection.train.jsonl: 2 rows; 2 images (published: 118,287); 3 objects (published: 860,001); "
        "1 images without an object; 1 crowd regions; 1 objects without a mask",
        "  coco_detection.val.jsonl: 1 rows; 1 images (published: 5,000); 1 objects (published: 36,781); "
        "1 objects without a mask",
        "  coco_detection.test.jsonl: 1 rows; 1 images; 0 objects; 1 images without an object",
        "  labels.json: 3 classes (published: 80)",
    ]


def test_gaps_between_ids_are_closed_and_the_ids_kept_beside(coco: Path) -> None:
    prepare_coco_detection(coco)
    assert read_labels(coco / "labels.json") == ["person", "stop sign", "toothbrush"]
    assert json.loads((coco / "categories.json").read_text()) == [
        {"id": 1, "name": "person"},
        {"id": 13, "name": "stop sign"},
        {"id": 90, "name": "toothbrush"},
    ]
    assert category_ids(coco / "coco_detection.val.jsonl", 3) == [1, 13, 90]


def test_what_is_written_is_what_rows_of_detection_are(coco: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "deep"
    prepare_coco_detection(coco, out=out)
    index = read_index(out / "coco_detection.train.jsonl", DetectionRow, num_labels=3)
    assert not index.skipped
    assert not index.dropped
    for row in index:
        assert decode_image(Path(row.image_path).read_bytes()).size == (row.width, row.height)
    assert [item.is_crowd for item in index[1].objects] == [False, True, False]


BOXES: list[tuple[list[float], list[float] | None, int]] = [
    ([1, 1, 5, 6], [1, 1, 5, 6], 0),
    ([0, 0, 10, 8], [0, 0, 10, 8], 0),
    ([-2, 1, 5, 6], [0, 1, 3, 6], 1),
    ([8, 6, 5, 6], [8, 6, 2, 2], 1),
    ([-3, -3, 99, 99], [0, 0, 10, 8], 1),
    ([5, 2, 5.05, 2], [5, 2, 5, 2], 0),  # rounded beyond the edge: cut, but nothing to speak of
    ([9, 7, 1, 1], [9, 7, 1, 1], 0),
    ([10, 0, 5, 5], None, 0),
    ([-5, 0, 5, 5], None, 0),
    ([1, 1, 0, 4], None, 0),
    ([1, 1, 3, -1], None, 0),
]


@pytest.mark.parametrize(("box", "kept", "cut"), BOXES, ids=[str(box) for box, _, _ in BOXES])
def test_boxes_are_cut_to_the_picture_and_empty_ones_left_out(
    box: list[float], kept: list[float] | None, cut: int, tmp_path: Path
) -> None:
    picture(tmp_path, "a.png")
    write(tmp_path / "set.json", [image(1, "a.png")], [note(1, 1, bbox=box)])
    report = prepare_coco_detection(tmp_path)
    (row,) = rows(tmp_path / "coco_detection.train.jsonl")
    assert [item["bbox"] for item in row["objects"]] == ([kept] if kept else [])
    assert left_out(report) == ({} if kept else {"train": {"empty_box": 1}})
    assert report.parts["train"].counts.get("boxes cut to the picture", 0) == cut


def test_what_is_wrong_with_objects_is_counted_and_their_picture_stays(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    notes = [
        note(1, 1),
        note(1, 1, bbox=[2, 2, 2, 2]),
        note(2, 1, category_id=5),
        note(3, 1, bbox=[1, 2, 3]),
        note(4, 1, bbox=[1, 2, 3, float("nan")]),
        note(5, 1, bbox=[1, 2, 3, "4"]),
        note(6, 1, iscrowd=2),
        {"id": 7, "image_id": 1, "bbox": [1, 1, 2, 2]},
        note(8, 99),
        note(9, 99),
        note(10, 1, segmentation=[[1, 2, 3, 4]], bbox=[3, 3, 2, 2]),
        note(11, 1, segmentation={"size": [10, 8], "counts": [80]}, bbox=[4, 4, 2, 2]),
        note(12, 1, segmentation={"size": [8, 10], "counts": "zzz~~"}, bbox=[5, 4, 2, 2]),
        note(13, 1, segmentation={"size": [8, 10], "counts": "ZZZZ"}, bbox=[6, 4, 2, 2]),
        "no object",
        {"id": "twelve", "image_id": 1},
    ]
    write(tmp_path / "train.json", [image(1, "a.png")], notes)
    report = prepare_coco_detection(tmp_path)
    assert left_out(report) == {
        "train": {
            "duplicate_annotation": 1,
            "unknown_category": 1,
            "malformed": 7,
            "annotation_of_unknown_image": 2,
            "invalid_segmentation": 4,
        }
    }
    (row,) = rows(tmp_path / "coco_detection.train.jsonl")
    assert [item["bbox"] for item in row["objects"]] == [
        [1, 1, 5, 6],
        [3, 3, 2, 2],
        [4, 4, 2, 2],
        [5, 4, 2, 2],
        [6, 4, 2, 2],
    ]
    assert not any("segmentation" in item for item in row["objects"])


def test_what_is_wrong_with_images_is_counted(tmp_path: Path) -> None:
    picture(tmp_path, "images/a.png")
    picture(tmp_path, "images/wide.png", (12, 8))
    picture(tmp_path, "images/tiny.png", (2, 2))
    (tmp_path / "images" / "broken.jpg").write_bytes(b"<html>")
    picture(tmp_path, "secret.png")
    images: list[Any] = [
        image(1, "a.png"),
        image(1, "wide.png"),
        image(2, "a.png"),
        image(3, "wide.png"),
        image(4, "absent.png"),
        image(5, "../secret.png"),
        image(6, "broken.jpg"),
        image(7, "tiny.png", width=2, height=2),
        image(8, "a.png", split="holdout"),
        {"id": 9},
        {"file_name": "a.png"},
        "no object",
    ]
    write(tmp_path / "all.json", images, [note(1, 4)])
    report = prepare_coco_detection(tmp_path)
    assert left_out(report) == {
        "train": {
            "duplicate_id": 1,
            "duplicate_image": 1,
            "other_size": 1,
            "missing_image": 2,
            "unreadable_image": 1,
            "too_small": 1,
            "malformed": 3,
        },
        "": {"unknown_split": 1},
    }
    assert [row["image_id"] for row in rows(tmp_path / "coco_detection.train.jsonl")] == [1]
    said = "\n".join(report.lines())
    assert "wide.png: (8, 10) in the json, (8, 12) in" in said


@pytest.mark.parametrize(("orientation", "shown"), [(1, (8, 10)), (3, (8, 10)), (6, (10, 8)), (8, (10, 8))])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_sizes_are_those_of_the_picture_as_it_is_shown(
    orientation: int, shown: tuple[int, int], suffix: str, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(tmp_path, f"a.{suffix}", exif=exif)
    width, height = decode_image((tmp_path / f"a.{suffix}").read_bytes()).size
    assert (height, width) == shown
    write(tmp_path / "set.json", [image(1, f"a.{suffix}", height=height, width=width)], [])
    assert left_out(prepare_coco_detection(tmp_path)) == {}
    write(tmp_path / "set.json", [image(1, f"a.{suffix}", height=width, width=height)], [])
    with pytest.raises(ConfigError, match="1 other_size"):
        prepare_coco_detection(tmp_path, overwrite=True)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_pixels_are_not_decoded_to_learn_a_size(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((10, 8), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(BadSampleError, match="unreadable_image"):
        decode_image(path.read_bytes())
    write(tmp_path / "set.json", [image(1, path.name)], [])
    assert left_out(prepare_coco_detection(tmp_path)) == {}


def test_sizes_and_areas_that_nobody_wrote_down_are_measured(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    content = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 6]}
    write(tmp_path / "set.json", [{"id": 1, "file_name": "a.png", "height": None}], [content])
    prepare_coco_detection(tmp_path)
    (row,) = rows(tmp_path / "coco_detection.train.jsonl")
    assert (row["height"], row["width"]) == (8, 10)
    assert row["objects"] == [{"bbox": [1, 1, 5, 6], "label": 0, "iscrowd": 0, "area": 30}]


def test_one_json_may_tell_the_split_of_each_image(tmp_path: Path) -> None:
    splits = ["train", "valid", "test", "training", None]
    for number in range(5):
        picture(tmp_path, f"{number}.png")
    images = [image(number, f"{number}.png", split=split) for number, split in enumerate(splits)]
    write(tmp_path / "coco.json", images, [note(number, number) for number in range(5)])
    prepare_coco_detection(tmp_path)
    found = {split: [row["image_id"] for row in rows(tmp_path / f"coco_detection.{split}.jsonl")] for split in SPLITS}
    assert found == {"train": [0, 3, 4], "val": [1], "test": [2]}
    prepare_coco_detection(tmp_path, overwrite=True)  # what was written is not taken for annotations


SPLITS = ("train", "val", "test")


def test_a_share_of_the_images_is_held_out_by_the_seed(tmp_path: Path) -> None:
    names = [f"{number:02d}.png" for number in range(20)]
    for name in names:
        picture(tmp_path, f"images/{name}")
    path = write(tmp_path / "export.json", [image(number, name) for number, name in enumerate(names)], [])

    def validated(**options: Any) -> list[int]:
        prepare_coco_detection(tmp_path, annotations=path, overwrite=True, **options)
        trained = {row["image_id"] for row in rows(tmp_path / "coco_detection.train.jsonl")}
        found = [row["image_id"] for row in rows(tmp_path / "coco_detection.val.jsonl")]
        assert trained == set(range(20)) - set(found)
        return found

    first = validated(val_share=0.2)
    assert len(first) == 4
    assert validated(val_share=0.2) == first
    assert validated(val_share=0.2, seed=1) != first
    write(path, [image(0, "00.png"), image(1, "01.png", split="val")], [])
    with pytest.raises(ConfigError, match="images to validate on: leave --val-share out"):
        prepare_coco_detection(tmp_path, val_share=0.2, overwrite=True)


def test_exports_with_a_json_in_each_folder_of_pictures_are_read(tmp_path: Path) -> None:
    for folder in ("train", "valid", "test"):
        picture(tmp_path, f"{folder}/same.jpg")
        write(tmp_path / folder / "_annotations.coco.json", [image(0, "same.jpg")], [note(0, 0)])
    prepare_coco_detection(tmp_path)
    paths = [rows(tmp_path / f"coco_detection.{split}.jsonl")[0]["image_path"] for split in SPLITS]
    assert paths == ["train/same.jpg", "valid/same.jpg", "test/same.jpg"]


def test_objects365_lies_in_patches(tmp_path: Path) -> None:
    for split, patch in (("train", "patch8"), ("val", "patch0")):
        picture(tmp_path, f"{split}/{patch}/objects365_v1_1.jpg")
        write(
            tmp_path / "annotations" / f"zhiyuan_objv2_{split}.json",
            [image(1, f"images/v1/{patch}/objects365_v1_1.jpg")],
            [note(1, 1)],
        )
    prepare_coco_detection(tmp_path)
    (row,) = rows(tmp_path / "coco_detection.train.jsonl")
    assert row["image_path"] == "train/patch8/objects365_v1_1.jpg"
    (row,) = rows(tmp_path / "coco_detection.val.jsonl")
    assert row["image_path"] == "val/patch0/objects365_v1_1.jpg"


@pytest.mark.parametrize("name", ["a.png", "deep/a.png", "/home/someone/deep/a.png", "C:\\labels\\a.png"])
def test_annotations_and_pictures_may_lie_apart(name: str, tmp_path: Path) -> None:
    picture(tmp_path, "pictures/deep/a.png" if name == "deep/a.png" else "pictures/a.png")
    path = write(tmp_path / "notes" / "my_export.json", [image(1, name)], [note(1, 1)])
    (tmp_path / "root").mkdir()
    report = prepare_coco_detection(
        tmp_path / "root", annotations=path, images=tmp_path / "pictures", out=tmp_path / "index"
    )
    (row,) = rows(tmp_path / "index" / "coco_detection.train.jsonl")
    assert (tmp_path / "index" / row["image_path"]).samefile(next((tmp_path / "pictures").rglob("a.png")))
    assert "not written, there are no images of val (see --val-share)" in "\n".join(report.lines())


def test_pictures_beside_the_json_come_before_others_of_their_name(tmp_path: Path) -> None:
    for name in ("a.png", "images/a.png", "second/a.png"):
        picture(tmp_path, name)
    path = write(tmp_path / "second" / "export.json", [image(1, "a.png")], [])
    prepare_coco_detection(tmp_path, annotations=path)
    assert rows(tmp_path / "coco_detection.train.jsonl")[0]["image_path"] == "second/a.png"


def test_names_that_two_classes_have_are_told_apart(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    names = [{"id": 4, "name": "mouse"}, {"id": 2, "name": "cat"}, {"id": 9, "name": " mouse"}, {"id": 1, "name": " "}]
    write(tmp_path / "set.json", [image(1, "a.png")], [note(1, 1, category_id=9)], names)
    report = prepare_coco_detection(tmp_path)
    assert read_labels(tmp_path / "labels.json") == ["cat", "mouse (4)", "mouse (9)"]
    assert rows(tmp_path / "coco_detection.train.jsonl")[0]["objects"][0]["label"] == 2
    assert left_out(report) == {"": {"empty_name": 1}}
    assert "  labels.json: 3 classes; 1 names that two classes have" in report.lines()


def test_files_whose_categories_disagree_are_refused(coco: Path) -> None:
    write(coco / "annotations" / "instances_val2017.json", [image(3, "3.jpg")], [], [{"id": 1, "name": "cat"}])
    with pytest.raises(ConfigError, match="calls category 1 'cat', elsewhere it is 'person'"):
        prepare_coco_detection(coco)
    assert not list(coco.glob("*.jsonl"))


def test_classes_of_one_split_alone_are_classes_of_all(coco: Path) -> None:
    write(coco / "annotations" / "instances_val2017.json", [image(3, "3.jpg")], [], [{"id": 2, "name": "cat"}])
    prepare_coco_detection(coco)
    assert read_labels(coco / "labels.json") == ["person", "cat", "stop sign", "toothbrush"]


def test_several_files_that_could_be_meant_are_named(tmp_path: Path) -> None:
    write(tmp_path / "train_a.json", [], [])
    write(tmp_path / "train_b.json", [], [])
    with pytest.raises(ConfigError, match=r"several json files of train \(train_a\.json, train_b\.json\)"):
        prepare_coco_detection(tmp_path)
    picture(tmp_path, "1.png")
    write(tmp_path / "train_b.json", [image(1, "1.png")], [])
    assert prepare_coco_detection(tmp_path, annotations=tmp_path / "train_b.json").parts["train"].rows == 1


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no list 'images'"),
        ('{"images": []}', "holds no list 'annotations'"),
        ('{"images": [], "annotations": {}}', "holds no list 'annotations'"),
        ('{"images": [], "annotations": []}', "holds no list 'categories'"),
        ('{"images": [], "annotations": [], "categories": []}', "names no categories"),
        ("[" * 99999, "is no JSON"),
    ],
)
def test_a_file_in_another_form_is_refused(content: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "coco.json").write_text(content)
    with pytest.raises(ConfigError, match=hint):
        prepare_coco_detection(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["coco.json"]


def test_places_that_do_not_exist_are_named(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="no such file or folder of annotations"):
        prepare_coco_detection(coco, annotations=tmp_path / "nowhere")
    with pytest.raises(DataMissingError, match="no such folder of pictures"):
        prepare_coco_detection(coco, images=tmp_path / "nowhere")
    with pytest.raises(DataMissingError, match=r"holds no instances_train2017\.json"):
        prepare_coco_detection(tmp_path)
    with pytest.raises(DataMissingError, match=r"4 missing_image .*train2017"):
        prepare_coco_detection(coco, images=tmp_path / "coco" / "annotations")


def test_the_categories_of_another_preparation_are_not_replaced_unasked(coco: Path) -> None:
    (coco / "categories.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"categories\.json exists"):
        prepare_coco_detection(coco)
    assert (coco / "categories.json").read_text() == "mine"
    prepare_coco_detection(coco, overwrite=True)
    assert category_ids(coco / "x", 3) == [1, 13, 90]
    assert not list(coco.glob(".*"))
