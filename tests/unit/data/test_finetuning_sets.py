"""Index files of the finetuning sets, from small copies of the published layouts; every expected row is written out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from beit3.data.finetuning import FINETUNING_SETS
from beit3.data.finetuning.image_folders import prepare_image_folder, prepare_imagenet
from beit3.data.finetuning.index_writer import IndexReport, IndexWriter, Part
from beit3.data.finetuning.karpathy import prepare_coco_captions, prepare_coco_retrieval, prepare_flickr30k
from beit3.data.finetuning.nlvr2 import prepare_nlvr2
from beit3.data.finetuning.nocaps import prepare_nocaps
from beit3.data.finetuning.vqav2 import held_out_images, prepare_vqav2, soft_targets, vocabulary
from beit3.data.labels import read_labels
from beit3.errors import ConfigError, DataMissingError

Json = dict[str, Any]


def touch(root: Path, *names: str) -> None:
    """Put files where pictures are expected; none is opened."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
    return path


def rows(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def left_out(report: IndexReport) -> dict[str, dict[str, int]]:
    """Reasons and counts of each split that has any; "" is what belongs to no split."""
    found = {split: part.left_out.counts for split, part in report.parts.items()}
    return {split: counts for split, counts in {**found, "": report.left_out.counts}.items() if counts}


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


# --- COCO and Flickr30k ---


def coco_image(number: int, split: str, *captions: str) -> Json:
    folder = "train2014" if split == "train" else "val2014"
    return {
        "filepath": folder,
        "filename": f"COCO_{folder}_{number:012d}.jpg",
        "cocoid": number,
        "split": split,
        "sentences": [{"raw": caption, "tokens": [], "sentid": 0} for caption in captions],
    }


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Five images: the second of train comes from `restval`."""
    images = [
        coco_image(9, "train", "A cat.", "Two\n cats. "),
        coco_image(42, "val", "A dog.", "The dog."),
        coco_image(73, "restval", "A bus."),
        coco_image(74, "test", "A man.", "A tall man."),
        coco_image(133, "test", "A boat."),
    ]
    root = tmp_path / "coco"
    write(root / "dataset_coco.json", {"dataset": "coco", "images": images})
    touch(root, *(f"{image['filepath']}/{image['filename']}" for image in images))
    return root


def test_coco_captions_have_a_row_a_caption_to_train_on_and_a_row_an_image_to_evaluate_on(coco: Path) -> None:
    report = prepare_coco_captions(coco)
    assert rows(coco / "coco_captioning.train.jsonl") == [
        {"image_path": "train2014/COCO_train2014_000000000009.jpg", "text": "A cat.", "image_id": 9},
        {"image_path": "train2014/COCO_train2014_000000000009.jpg", "text": "Two cats.", "image_id": 9},
        {"image_path": "val2014/COCO_val2014_000000000073.jpg", "text": "A bus.", "image_id": 73},
    ]
    assert rows(coco / "coco_captioning.val.jsonl") == [
        {"image_path": "val2014/COCO_val2014_000000000042.jpg", "image_id": 42, "captions": ["A dog.", "The dog."]},
    ]
    assert rows(coco / "coco_captioning.test.jsonl") == [
        {"image_path": "val2014/COCO_val2014_000000000074.jpg", "image_id": 74, "captions": ["A man.", "A tall man."]},
        {"image_path": "val2014/COCO_val2014_000000000133.jpg", "image_id": 133, "captions": ["A boat."]},
    ]
    assert left_out(report) == {}
    assert report.lines() == [
        f"{coco}: coco-captions",
        "  coco_captioning.train.jsonl: 3 rows; 2 images (published: 113,287); 3 captions (published: 566,747)",
        "  coco_captioning.val.jsonl: 1 rows; 1 images (published: 5,000); 2 captions (published: 25,010)",
        "  coco_captioning.test.jsonl: 2 rows; 2 images (published: 5,000); 3 captions (published: 25,010)",
    ]


def test_coco_retrieval_has_a_row_a_caption_and_numbers_the_images_of_each_split(coco: Path) -> None:
    prepare_coco_retrieval(coco)
    assert rows(coco / "coco_retrieval.train.jsonl") == [
        {"image_path": "train2014/COCO_train2014_000000000009.jpg", "text": "A cat.", "image_id": 0},
        {"image_path": "train2014/COCO_train2014_000000000009.jpg", "text": "Two cats.", "image_id": 0},
        {"image_path": "val2014/COCO_val2014_000000000073.jpg", "text": "A bus.", "image_id": 1},
    ]
    assert [(row["text"], row["image_id"]) for row in rows(coco / "coco_retrieval.val.jsonl")] == [
        ("A dog.", 0),
        ("The dog.", 0),
    ]
    assert [(row["text"], row["image_id"]) for row in rows(coco / "coco_retrieval.test.jsonl")] == [
        ("A man.", 0),
        ("A tall man.", 0),
        ("A boat.", 1),
    ]


def test_what_is_wrong_in_karpathys_files_is_counted_by_reason(tmp_path: Path) -> None:
    images: list[object] = [
        coco_image(1, "train", "A cat.", "  ", "A tom."),
        coco_image(2, "train", "A missing picture."),
        coco_image(1, "test", "The same image tested on."),
        coco_image(3, "val", " \n"),
        coco_image(4, "holdout", "A split nobody knows."),
        coco_image(5, "val", "A dog.") | {"cocoid": "five"},
        coco_image(6, "test", "A path that leads out.") | {"filepath": "..", "filename": "secret.jpg"},
        coco_image(7, "val", "A hat."),
        "no object",
    ]
    touch(tmp_path, f"train2014/{coco_image(1, 'train')['filename']}", "secret.jpg")
    touch(tmp_path, *(f"val2014/{coco_image(number, 'val')['filename']}" for number in (3, 4, 5, 6, 7)))
    write(tmp_path / "karpathy" / "dataset_coco.json", {"images": images})
    report = prepare_coco_captions(tmp_path)
    assert left_out(report) == {
        "train": {"empty_caption": 1, "missing_image": 1},
        "val": {"empty_caption": 1, "no_caption": 1, "malformed": 1},
        "test": {"duplicate_id": 1, "malformed": 1},
        "": {"unknown_split": 1, "malformed": 1},
    }
    assert [row["text"] for row in rows(tmp_path / "coco_captioning.train.jsonl")] == ["A cat.", "A tom."]
    assert [row["image_id"] for row in rows(tmp_path / "coco_captioning.val.jsonl")] == [7]
    assert not (tmp_path / "coco_captioning.test.jsonl").exists()
    lines = report.lines()
    missing = tmp_path / "train2014" / "COCO_train2014_000000000002.jpg"
    assert f"    left out: 1 missing_image (such as {missing.name}: {missing})" in lines
    assert "  coco_captioning.test.jsonl: not written, nothing is usable; 0 images (published: 5,000); " in "\n".join(
        lines
    )
    assert "  left out: 1 malformed (such as image 8: no str 'split')" in lines


@pytest.mark.parametrize("folder", ["flickr30k-images", "flickr30k_images", "images"])
def test_flickr30k_is_read_from_the_folders_people_unpack_it_into(folder: str, tmp_path: Path) -> None:
    images = [
        {"filename": "36979.jpg", "split": "train", "sentences": [{"raw": "A man ."}, {"raw": "Men ."}]},
        {"filename": "65567.jpg", "split": "val", "sentences": [{"raw": "A cook ."}]},
        {"filename": "1007129816.jpg", "split": "test", "sentences": [{"raw": "A hat ."}]},
        {"filename": "65567.jpg", "split": "test", "sentences": [{"raw": "A cook again ."}]},
    ]
    annotations = write(tmp_path / "elsewhere" / "splits.json", {"images": images})
    touch(tmp_path, *(f"{folder}/{image['filename']}" for image in images))
    report = prepare_flickr30k(tmp_path, annotations=annotations)
    assert rows(tmp_path / "flickr30k.train.jsonl") == [
        {"image_path": f"{folder}/36979.jpg", "text": "A man .", "image_id": 0},
        {"image_path": f"{folder}/36979.jpg", "text": "Men .", "image_id": 0},
    ]
    assert rows(tmp_path / "flickr30k.val.jsonl") == [
        {"image_path": f"{folder}/65567.jpg", "text": "A cook .", "image_id": 0}
    ]
    assert rows(tmp_path / "flickr30k.test.jsonl") == [
        {"image_path": f"{folder}/1007129816.jpg", "text": "A hat .", "image_id": 0}
    ]
    assert left_out(report) == {"test": {"duplicate_id": 1}}


# --- VQA ---


def question(number: int, image: int | str, text: str = "What?") -> Json:
    return {"question_id": number, "image_id": image, "question": text}


def answer(number: int, image: int | str, main: str, *given: str) -> Json:
    answers = [{"answer": text, "answer_confidence": "yes", "answer_id": index} for index, text in enumerate(given)]
    types = {"question_type": "what", "answer_type": "other"}
    return {"question_id": number, "image_id": image, "multiple_choice_answer": main, "answers": answers, **types}


def write_vqa(root: Path, questions: dict[str, list[Any]], answers: dict[str, list[Any]]) -> None:
    """Write files under the published names."""
    for split, items in questions.items():
        write(root / "vqa" / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": items})
    for split, items in answers.items():
        write(root / "vqa" / f"v2_mscoco_{split}_annotations.json", {"annotations": items})


@pytest.fixture
def vqa(tmp_path: Path) -> Path:
    """Two images to train on, two to validate on, one to test on."""
    root = tmp_path / "coco"
    touch(root, "train2014/COCO_train2014_000000000010.jpg", "train2014/COCO_train2014_000000000011.jpg")
    touch(root, "val2014/COCO_val2014_000000000020.jpg", "val2014/COCO_val2014_000000000021.jpg")
    touch(root, "test2015/COCO_test2015_000000000030.jpg")
    write_vqa(
        root,
        {
            "train2014": [question(100, 10, "Is it?"), question(101, 10), question(102, 11), question(103, 11)],
            "val2014": [question(200, 20), question(201, 20), question(202, 20), question(210, 21), question(211, 21)],
            "test2015": [question(300, 30), question(301, 30)],
            "test-dev2015": [question(301, 30)],
        },
        {
            "train2014": [
                answer(100, 10, "Yes", "Yes", "yes", "YES.", "no", "Yes", "maybe"),
                answer(101, 10, "2", "2", "two", "2 dogs", "3"),
                answer(102, 11, "no", "no", "no", "yes"),
                answer(103, 11, "purple", "purple", "purple"),
            ],
            "val2014": [
                answer(200, 20, "two", "two", "two", "two"),
                answer(201, 20, "no", "no"),
                answer(202, 20, "violet", "violet"),
                answer(210, 21, "yes", "yes", "yes", "yes", "yes", "yes", "yes", "yes", "yes", "yes", "no"),
                answer(211, 21, "orange", "orange", "an orange"),
            ],
        },
    )
    return root


def test_vqa_rows_hold_soft_targets_of_normalised_answers(vqa: Path) -> None:
    report = prepare_vqav2(vqa, min_answer_count=2)
    assert read_labels(vqa / "labels.json") == ["yes", "2", "no"]
    first, second = "train2014/COCO_train2014_000000000010.jpg", "train2014/COCO_train2014_000000000011.jpg"
    assert rows(vqa / "vqa.train.jsonl") == [
        {"image_path": first, "qid": 100, "text": "Is it?", "labels": [0, 2], "scores": [1.0, 0.3]},
        {"image_path": first, "qid": 101, "text": "What?", "labels": [1], "scores": [0.6]},
        {"image_path": second, "qid": 102, "text": "What?", "labels": [2, 0], "scores": [0.6, 0.3]},
    ]
    assert left_out(report)["train"] == {"no_label": 1}
    assert report.parts["train"].counts == {"questions": 4, "answers outside the vocabulary": 5}
    assert rows(vqa / "vqa.val.jsonl")[0] == {
        "image_path": "val2014/COCO_val2014_000000000020.jpg",
        "qid": 200,
        "text": "What?",
        "labels": [1],
        "scores": [0.9],
        "answers": ["two", "two", "two"],
        "question_type": "what",
        "answer_type": "other",
    }
    assert rows(vqa / "vqa.val.jsonl")[4] == {
        "image_path": "val2014/COCO_val2014_000000000021.jpg",
        "qid": 211,
        "text": "What?",
        "labels": [],
        "scores": [],
        "answers": ["orange", "an orange"],
        "question_type": "what",
        "answer_type": "other",
    }
    image = "test2015/COCO_test2015_000000000030.jpg"
    expected: list[Json] = [
        {"image_path": image, "qid": qid, "text": "What?", "labels": [], "scores": []} for qid in (300, 301)
    ]
    assert rows(vqa / "vqa.test.jsonl") == expected
    assert rows(vqa / "vqa.test-dev.jsonl") == expected[1:]
    lines = report.lines()
    assert "  labels.json: 3 answers (published: 3,129)" in lines
    assert any(
        "5 questions (published: 214,354)" in line and "2 questions without a label, kept" in line for line in lines
    )


def test_official_counts_score_answers_as_they_were_typed(vqa: Path) -> None:
    report = prepare_vqav2(vqa, min_answer_count=2, official_counts=True)
    assert read_labels(vqa / "labels.json") == ["yes", "2", "no"]
    targets = {row["qid"]: (row["labels"], row["scores"]) for row in rows(vqa / "vqa.train.jsonl")}
    assert targets == {100: ([0, 2], [0.3, 0.3]), 101: ([1], [0.3]), 102: ([2, 0], [0.6, 0.3])}
    assert [row["qid"] for row in rows(vqa / "vqa.val.jsonl")] == [201, 210]
    assert left_out(report) == {"train": {"no_label": 1}, "val": {"no_label": 3}}
    kept = json.loads((vqa / "vqav2.prepare.json").read_text())
    assert kept["options"] == {"official_counts": True, "min_answer_count": 2}


def test_validation_images_are_divided_and_only_labelled_questions_train(vqa: Path) -> None:
    report = prepare_vqav2(vqa, min_answer_count=2)
    (held_out,) = held_out_images([20, 21])
    validated, trained = rows(vqa / "vqa.rest_val.jsonl"), rows(vqa / "vqa.trainable_val.jsonl")
    assert [row["qid"] for row in validated] == ([200, 201, 202] if held_out == 20 else [210, 211])
    assert [row["qid"] for row in trained] == ([210] if held_out == 20 else [200, 201])
    assert all("answers" in row for row in validated)
    assert not any("answers" in row for row in trained)
    assert report.parts["rest_val"].counts == {"images": 1}
    assert left_out(report)["trainable_val"] == {"no_label": 1}


def test_an_answer_enters_the_vocabulary_with_its_ninth_question() -> None:
    answers = ["the cat"] * 4 + ["Dog"] * 9 + ["a Bus"] * 8 + ["cat"] * 5 + ["bird"] * 9
    assert vocabulary(answers, 9) == ["cat", "dog", "bird"]


@pytest.mark.parametrize(("people", "score"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (10, 1.0)])
def test_the_soft_target_follows_how_many_people_agree(people: int, score: float) -> None:
    assert soft_targets(["red"] * people + ["blue"], {"red": 7}) == ([7], [score])


def test_a_thousand_validation_images_are_held_out_whatever_their_order() -> None:
    ids = list(range(3000))
    held_out = held_out_images(ids)
    assert len(held_out) == 1000
    assert held_out == held_out_images(reversed(ids))
    assert len(held_out_images(range(50))) == 25
    # `printf rest_val:$i | sha256sum | sort`: the rule is part of what a validation score means
    assert held_out_images(range(10), limit=3) == {0, 2, 8}


def test_what_is_wrong_with_questions_and_answers_is_counted_by_reason(tmp_path: Path) -> None:
    touch(tmp_path, "train2014/COCO_train2014_000000000001.jpg", "train2014/COCO_train2014_000000000002.jpg")
    touch(tmp_path, "train2014/other_2.jpg")
    questions = [
        question(1, 1),
        question(1, 1),
        question(2, 999),
        question(3, 1, "  "),
        question(4, 1),
        question(5, 1),
        question(6, 2),
        {"question_id": "seven", "image_id": 1, "question": "What?"},
        {"question_id": 8, "question": "Where?"},
        {"question_id": 10, "image_id": 1},
        "no object",
    ]
    answers = [
        answer(1, 1, "yes", "yes", "yes"),
        answer(2, 999, "yes", "yes"),
        answer(3, 1, "yes", "yes"),
        answer(5, 2, "yes", "yes"),
        answer(6, 2, "yes", "yes"),
        answer(9, 1, "yes", "yes"),
        answer(9, 1, "no", "no"),
        {"question_id": 11, "image_id": 1, "answers": []},
        answer(12, 1, "yes"),
    ]
    write_vqa(tmp_path, {"train2014": questions}, {"train2014": answers})
    report = prepare_vqav2(tmp_path, min_answer_count=1)
    assert left_out(report) == {
        "train": {
            "duplicate_id": 1,
            "missing_image": 1,
            "empty_question": 1,
            "question_without_annotation": 1,
            "annotation_of_another_image": 1,
            "ambiguous_image": 1,
            "malformed": 5,
            "annotation_without_question": 1,
            "duplicate_annotation": 1,
            "no_answer": 1,
        }
    }
    assert [row["qid"] for row in rows(tmp_path / "vqa.train.jsonl")] == [1]
    assert "  vqa.val.jsonl: not written, no val questions were found" in report.lines()


def test_any_set_in_the_json_form_of_vqav2_is_read(tmp_path: Path) -> None:
    touch(tmp_path, "images/kitchen_a.png", "images/kitchen_b.png", "images/17.jpg")
    for split, image in (("train", "kitchen_a"), ("val", "kitchen_b"), ("test", 17)):
        write(tmp_path / f"{split}_questions.json", {"questions": [question(1, image, "Which room?")]})
        only = {"question_id": 1, "image_id": image, "multiple_choice_answer": "The Kitchen"}
        write(tmp_path / f"{split}_annotations.json", {"annotations": [only]})
    report = prepare_vqav2(tmp_path, min_answer_count=1)
    target = {"qid": 1, "text": "Which room?", "labels": [0], "scores": [1.0]}
    assert read_labels(tmp_path / "labels.json") == ["kitchen"]
    assert rows(tmp_path / "vqa.train.jsonl") == [{"image_path": "images/kitchen_a.png", **target}]
    answers = {"answers": ["The Kitchen"] * 10}
    assert rows(tmp_path / "vqa.val.jsonl") == [{"image_path": "images/kitchen_b.png", **target, **answers}]
    assert rows(tmp_path / "vqa.test.jsonl") == [{"image_path": "images/17.jpg", **target, **answers}]
    assert "published" not in "\n".join(report.lines())


def test_files_of_vqav2_go_before_others_and_two_others_are_refused(vqa: Path) -> None:
    write(vqa / "vqa" / "OpenEnded_mscoco_train2014_questions.json", {"questions": []})
    assert prepare_vqav2(vqa, min_answer_count=2).parts["train"].rows == 3
    own = vqa / "own"
    for name in ("train_questions.json", "train_annotations.json", "train_more_questions.json"):
        write(own / name, {"questions": [], "annotations": []})
    with pytest.raises(ConfigError, match=r"several files of train questions \(train_more_.*--annotations"):
        prepare_vqav2(vqa, annotations=own, overwrite=True)


def test_questions_to_train_on_need_their_annotations(vqa: Path) -> None:
    (vqa / "vqa" / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(DataMissingError, match="has no val annotations beside it"):
        prepare_vqav2(vqa)
    assert not files_of(vqa)


def test_a_vocabulary_without_answers_is_refused(vqa: Path) -> None:
    with pytest.raises(ConfigError, match="occurs 9 times: lower --min-answer-count"):
        prepare_vqav2(vqa)
    assert not files_of(vqa)


# --- NLVR2 and NoCaps ---


def sentence(identifier: str, text: str = "There are dogs.", label: object = "True", **more: object) -> str:
    return json.dumps({"identifier": identifier, "sentence": text, "label": label, "left_url": "", **more})


def test_nlvr2_rows_name_both_pictures(tmp_path: Path) -> None:
    data = tmp_path / "nlvr2" / "data"
    data.mkdir(parents=True)
    (data / "train.json").write_text(sentence("train-10171-0-0", directory=33) + "\n")
    (data / "dev.json").write_text(sentence("dev-850-0-1", "One is  black.", "False") + "\n" + sentence("dev-850-0-0"))
    (data / "test1.json").write_text(sentence("test1-0-1-0", label=False) + "\n")
    touch(tmp_path, "images/train/33/train-10171-0-img0.png", "images/train/33/train-10171-0-img1.png")
    touch(tmp_path, "dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png")
    touch(tmp_path, "test1/test1-0-1-img0.png", "test1/test1-0-1-img1.png")
    report = prepare_nlvr2(tmp_path)
    assert rows(tmp_path / "nlvr2.train.index.jsonl") == [
        {
            "image_path": "images/train/33/train-10171-0-img0.png",
            "image2_path": "images/train/33/train-10171-0-img1.png",
            "text": "There are dogs.",
            "label": 1,
            "identifier": "train-10171-0-0",
        }
    ]
    assert [(row["identifier"], row["text"], row["label"]) for row in rows(tmp_path / "nlvr2.dev.index.jsonl")] == [
        ("dev-850-0-1", "One is black.", 0),
        ("dev-850-0-0", "There are dogs.", 1),
    ]
    assert rows(tmp_path / "nlvr2.test-P.index.jsonl") == [
        {
            "image_path": "test1/test1-0-1-img0.png",
            "image2_path": "test1/test1-0-1-img1.png",
            "text": "There are dogs.",
            "label": 0,
            "identifier": "test1-0-1-0",
        }
    ]
    assert "  nlvr2.dev.index.jsonl: 2 rows; 2 sentences (published: 6,982)" in report.lines()


def test_what_is_wrong_in_nlvr2s_files_is_counted_by_reason(tmp_path: Path) -> None:
    lines = [
        sentence("dev-1-0-0"),
        sentence("dev-1-0-0"),
        sentence("dev-1-0-1", " "),
        sentence("dev-1-0-2", label="Perhaps"),
        sentence("dev-2-0-0"),
        sentence("test1-1-0-0"),
        '{"identifier": "dev-3-0-0", "label": "True"}',
        '{"identifier": "dev-4',
        '["dev-5-0-0"]',
    ]
    (tmp_path / "dev.json").write_text("\n".join(lines))
    touch(tmp_path, "images/dev/dev-1-0-img0.png", "images/dev/dev-1-0-img1.png", "images/dev/dev-2-0-img0.png")
    report = prepare_nlvr2(tmp_path)
    assert left_out(report) == {
        "dev": {
            "duplicate_id": 1,
            "empty_sentence": 1,
            "unknown_label": 1,
            "missing_image": 1,
            "wrong_split": 1,
            "malformed": 3,
        }
    }
    assert [row["image_path"] for row in rows(tmp_path / "nlvr2.dev.index.jsonl")] == ["images/dev/dev-1-0-img0.png"]
    assert "  nlvr2.train.index.jsonl: not written, train.json was not found" in report.lines()


def test_nocaps_has_references_to_validate_and_none_to_test(tmp_path: Path) -> None:
    images = [{"id": 0, "file_name": "00a.jpg"}, {"id": 1, "file_name": "00b.jpg"}, {"id": 2, "file_name": "00c.jpg"}]
    images += [{"id": 0, "file_name": "00a.jpg"}, {"id": 3, "file_name": "absent.jpg"}]
    captions = [(0, "A baby."), (1, "A car."), (0, "A child."), (1, " "), (9, "A ghost."), (3, "Nothing.")]
    content = {"images": images, "annotations": [{"image_id": i, "caption": text} for i, text in captions]}
    write(tmp_path / "annotations" / "nocaps_val_4500_captions.json", content)
    write(tmp_path / "nocaps_test_image_info.json", {"images": [{"id": 5, "file_name": "f.jpg"}], "annotations": []})
    touch(tmp_path, "validation/00a.jpg", "validation/00b.jpg", "validation/00c.jpg", "test/f.jpg")
    report = prepare_nocaps(tmp_path)
    assert rows(tmp_path / "nocaps.val.jsonl") == [
        {"image_path": "validation/00a.jpg", "image_id": 0, "captions": ["A baby.", "A child."]},
        {"image_path": "validation/00b.jpg", "image_id": 1, "captions": ["A car."]},
    ]
    assert rows(tmp_path / "nocaps.test.jsonl") == [{"image_path": "test/f.jpg", "image_id": 5, "captions": []}]
    reasons = {"empty_caption": 1, "no_caption": 1, "duplicate_id": 1, "missing_image": 1, "caption_without_image": 1}
    assert left_out(report) == {"val": reasons}
    assert "  nocaps.test.jsonl: 1 rows; 1 images (published: 10,600)" in report.lines()


# --- folders of classes ---


def test_imagenet_numbers_its_folders_in_their_order_and_names_them_for_people(tmp_path: Path) -> None:
    touch(tmp_path, "train/n02102040/b.JPEG", "train/n01440764/a.JPEG", "train/n02102040/a.JPEG")
    touch(tmp_path, "val/n02102040/ILSVRC2012_val_00000001.JPEG", "train/n99999999/x.JPEG")
    report = prepare_imagenet(tmp_path)
    assert rows(tmp_path / "imagenet.train.index.jsonl") == [
        {"image_path": "train/n01440764/a.JPEG", "label": 0},
        {"image_path": "train/n02102040/a.JPEG", "label": 1},
        {"image_path": "train/n02102040/b.JPEG", "label": 1},
        {"image_path": "train/n99999999/x.JPEG", "label": 2},
    ]
    assert rows(tmp_path / "imagenet.val.index.jsonl") == [
        {"image_path": "val/n02102040/ILSVRC2012_val_00000001.JPEG", "label": 1}
    ]
    names = read_labels(tmp_path / "labels.json")
    assert names == ["tench, Tinca tinca", "English springer, English springer spaniel", "n99999999"]
    assert "  labels.json: 3 classes (published: 1,000)" in report.lines()
    assert left_out(report) == {"val": {"empty_class": 2}}


def test_imagenet_is_read_as_kaggle_packs_it(tmp_path: Path) -> None:
    base = "ILSVRC/Data/CLS-LOC"
    touch(tmp_path, f"{base}/train/n01440764/a.JPEG", f"{base}/train/n01443537/b.JPEG")
    touch(tmp_path, *(f"{base}/val/ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2, 3, 4)))
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000002,n01443537 83 137 246 349 n01443537 1 2 3 4 \n"
        "ILSVRC2012_val_00000001,n01440764 85 1 499 272 \n"
        "ILSVRC2012_val_00000003,n00000000 1 1 2 2 \n"
        "ILSVRC2012_val_00000009,n01440764 1 1 2 2 \n"
    )
    report = prepare_imagenet(tmp_path)
    assert rows(tmp_path / "imagenet.val.index.jsonl") == [
        {"image_path": f"{base}/val/ILSVRC2012_val_00000001.JPEG", "label": 0},
        {"image_path": f"{base}/val/ILSVRC2012_val_00000002.JPEG", "label": 1},
    ]
    assert left_out(report) == {"val": {"unknown_class": 1, "missing_image": 1, "image_without_class": 1}}


def test_what_is_wrong_in_folders_of_classes_is_counted_by_reason(tmp_path: Path) -> None:
    touch(
        tmp_path, "train/cat/1.jpg", "train/cat/old/2.PNG", "train/cat/notes.txt", "train/loose.jpg", "train/.git/x.jpg"
    )
    touch(tmp_path, "val/dog/1.jpg", "val/cat/3.jpg")
    (tmp_path / "train" / "empty").mkdir()
    report = prepare_image_folder(tmp_path)
    assert rows(tmp_path / "image_folder.train.jsonl") == [
        {"image_path": "train/cat/1.jpg", "label": 0},
        {"image_path": "train/cat/old/2.PNG", "label": 0},
    ]
    assert left_out(report) == {
        "train": {"not_a_picture": 1, "outside_class_folders": 1, "empty_class": 1},
        "val": {"unknown_class": 1, "empty_class": 1},
    }
    assert read_labels(tmp_path / "labels.json") == ["cat", "empty"]


def test_a_share_of_every_class_is_held_out_by_the_seed(tmp_path: Path) -> None:
    touch(tmp_path, *(f"cat/{number}.png" for number in range(20)), *(f"dog/{number}.png" for number in range(10)))
    prepare_image_folder(tmp_path, val_share=0.2)

    def validated() -> list[str]:
        return [row["image_path"] for row in rows(tmp_path / "image_folder.val.jsonl")]

    first = validated()
    assert [path.partition("/")[0] for path in first] == ["cat"] * 4 + ["dog"] * 2
    trained = [row["image_path"] for row in rows(tmp_path / "image_folder.train.jsonl")]
    assert not set(first) & set(trained)
    assert len(trained) == 24
    prepare_image_folder(tmp_path, val_share=0.2, overwrite=True)
    assert validated() == first
    prepare_image_folder(tmp_path, val_share=0.2, seed=1, overwrite=True)
    assert validated() != first
    report = prepare_image_folder(tmp_path, overwrite=True)
    assert report.parts["train"].rows == 30
    assert not (tmp_path / "image_folder.val.jsonl").exists()  # it would hold what is trained on now


def test_rows_stand_in_the_order_of_names_however_deep(tmp_path: Path) -> None:
    names = [f"cat/{folder}/1.png" for folder in ("m", "z", "a", "t", "c", "x", "b")]
    touch(tmp_path, *names)
    prepare_image_folder(tmp_path)
    assert [row["image_path"] for row in rows(tmp_path / "image_folder.train.jsonl")] == sorted(names)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.jpg", "plane/1.jpg")
    prepare_image_folder(tmp_path)
    assert rows(tmp_path / "image_folder.train.jsonl") == [
        {"image_path": "plane/1.jpg", "label": 0},
        {"image_path": "train/1.jpg", "label": 1},
    ]


def test_a_share_beside_a_val_folder_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.jpg", "valid/cat/2.jpg")
    with pytest.raises(ConfigError, match="valid is there to validate on"):
        prepare_image_folder(tmp_path, val_share=0.1)
    with pytest.raises(ConfigError, match="val_share must be at least 0 and below 1"):
        prepare_image_folder(tmp_path, val_share=1.0)
    assert prepare_image_folder(tmp_path).parts["val"].rows == 1


# --- writing ---


def test_an_index_elsewhere_leads_to_the_pictures(coco: Path, tmp_path: Path) -> None:
    out = tmp_path / "indexes" / "coco"
    prepare_coco_captions(coco, out=out)
    (row,) = rows(out / "coco_captioning.val.jsonl")
    assert row["image_path"] == "../../coco/val2014/COCO_val2014_000000000042.jpg"
    assert (out / row["image_path"]).read_bytes() == b"picture"
    assert files_of(coco) == {"dataset_coco.json"}


def test_an_index_behind_a_link_leads_to_the_pictures(coco: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep" / "er", target_is_directory=True)
    prepare_coco_captions(coco, out=tmp_path / "link")
    (row,) = rows(tmp_path / "link" / "coco_captioning.val.jsonl")
    assert (tmp_path / "link" / row["image_path"]).read_bytes() == b"picture"
    coco.rename(tmp_path / "disk" / "deep" / "coco")
    prepare_coco_captions(tmp_path / "link" / ".." / "coco", out=tmp_path / "out")
    (row,) = rows(tmp_path / "out" / "coco_captioning.val.jsonl")
    assert (tmp_path / "out" / row["image_path"]).read_bytes() == b"picture"


def test_indexes_are_replaced_only_on_request_and_stale_ones_go(coco: Path) -> None:
    prepare_coco_captions(coco)
    before = (coco / "coco_captioning.train.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"coco_captioning\.train\.jsonl exists: use it as it is"):
        prepare_coco_captions(coco)
    assert (coco / "coco_captioning.train.jsonl").read_bytes() == before
    write(coco / "dataset_coco.json", {"images": [coco_image(42, "val", "Now one.")]})
    prepare_coco_captions(coco, overwrite=True)
    assert files_of(coco) == {"dataset_coco.json", "coco_captioning.val.jsonl", "coco-captions.prepare.json"}
    assert rows(coco / "coco_captioning.val.jsonl")[0]["captions"] == ["Now one."]


def test_labels_of_another_set_are_not_replaced(vqa: Path) -> None:
    prepare_vqav2(vqa, min_answer_count=2)
    touch(vqa, "train/cat/1.jpg", "train/dog/1.jpg")
    with pytest.raises(
        ConfigError, match=r"labels\.json belongs to the indexes of vqav2 beside it: choose another --out"
    ):
        prepare_image_folder(vqa, overwrite=True)
    assert read_labels(vqa / "labels.json") == ["yes", "2", "no"]
    prepare_image_folder(vqa, out=vqa / "folders")
    assert read_labels(vqa / "folders" / "labels.json") == ["cat", "dog"]
    prepare_vqav2(vqa, min_answer_count=2, overwrite=True)


def test_a_stopped_preparation_leaves_what_was_there(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_coco_captions(coco)
    before = {name: (coco / name).read_bytes() for name in files_of(coco)}
    write(coco / "dataset_coco.json", {"images": [coco_image(42, "val", "Now one.")] * 3})
    before["dataset_coco.json"] = (coco / "dataset_coco.json").read_bytes()

    def stop(writer: IndexWriter, split: str, row: Json) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(IndexWriter, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_coco_captions(coco, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        prepare_coco_captions(coco, out=coco / "new")
    assert {name: (coco / name).read_bytes() for name in files_of(coco)} == before
    assert not (coco / "new").exists()


def test_a_place_that_cannot_be_written_is_refused(coco: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder: choose another --out"):
        prepare_coco_captions(coco, out=coco / "dataset_coco.json")
    with pytest.raises(ConfigError, match=r"cannot be written to .*: choose another --out"):
        prepare_coco_captions(coco, out=coco / "dataset_coco.json" / "below")


def test_a_name_that_no_text_can_hold_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png")
    touch(tmp_path / "cat", os.fsdecode(b"caf\xe9.png"))
    report = prepare_image_folder(tmp_path)
    assert left_out(report) == {"train": {"not_utf8": 1}}
    assert rows(tmp_path / "image_folder.train.jsonl") == [{"image_path": "cat/1.png", "label": 0}]
    assert "    left out: 1 not_utf8 (such as cat/caf\\udce9.png)" in report.lines()


def test_the_report_says_whether_counts_are_the_published_ones() -> None:
    part = Part("x.jsonl", {"images": 5_000, "captions": 25_010}, rows=5_000, counts={"images": 5_000, "captions": 25})
    assert part.lines() == ["  x.jsonl: 5,000 rows; 5,000 images (as published); 25 captions (published: 25,010)"]


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no list 'images'"),
        ('{"images": {}}', "holds no list"),
        ("[" * 99999, "is no JSON"),
    ],
    ids=["cut", "list", "object", "deep"],
)
def test_a_file_that_is_not_the_published_one_is_refused(content: str, hint: str, coco: Path) -> None:
    (coco / "dataset_coco.json").write_text(content)
    with pytest.raises(ConfigError, match=hint):
        prepare_coco_captions(coco)
    assert files_of(coco) == {"dataset_coco.json"}


@pytest.mark.parametrize("kind", sorted(FINETUNING_SETS))
def test_a_set_that_is_not_there_is_missing(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="no such folder"):
        FINETUNING_SETS[kind](tmp_path / "absent")
    with pytest.raises(DataMissingError, match=str(tmp_path)):
        FINETUNING_SETS[kind](tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_set_whose_pictures_are_all_missing_is_missing(coco: Path) -> None:
    (coco / "train2014").rename(coco / "elsewhere")
    (coco / "val2014").rename(coco / "elsewhere2")
    with pytest.raises(
        DataMissingError, match=r"coco-captions: nothing in .* is usable: 5 missing_image \(such as COCO_"
    ):
        prepare_coco_captions(coco)
    assert files_of(coco) == {"dataset_coco.json"}


def test_a_set_without_a_usable_row_is_refused(coco: Path) -> None:
    write(coco / "dataset_coco.json", {"images": []})
    with pytest.raises(ConfigError, match="its files are empty"):
        prepare_coco_captions(coco)
    write(coco / "dataset_coco.json", {"images": [{}, {}]})
    with pytest.raises(ConfigError, match="2 malformed"):
        prepare_coco_captions(coco)
