"""VQAv2, and any set of questions in its json form: answer vocabulary, soft targets, splits.

Source: Goyal et al., "Making the V in VQA Matter", 2017 (the files); the released BEiT-3 code (splits, soft targets).
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from beit3.config import require
from beit3.data.finetuning.index_writer import IndexReport, IndexWriter, Row
from beit3.data.finetuning.layout import PictureFolder, Pictures, missing_file, progress, read_json, take, text_of
from beit3.data.shards import IMAGE_SUFFIXES
from beit3.errors import BadSampleError, ConfigError, DataMissingError
from beit3.metrics.vqa_accuracy import normalize_answer, soft_score

REST_VAL_IMAGES = 1000
"""Images of val that are kept for validation; all others train."""

_FOLDERS = ("vqa", "annotations", "Annotations", "questions", "Questions")
_INDEXES = {
    "train": "train",
    "trainable_val": "val",
    "rest_val": "val",
    "val": "val",
    "test": "test",
    "test-dev": "test-dev",
}
"""The split of questions that each index comes from."""
_COCO_FOLDERS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test2015"}
_OFFICIAL_FILES = {
    "v2_OpenEnded_mscoco_train2014_questions.json",
    "v2_OpenEnded_mscoco_val2014_questions.json",
    "v2_OpenEnded_mscoco_test2015_questions.json",
    "v2_OpenEnded_mscoco_test-dev2015_questions.json",
    "v2_mscoco_train2014_annotations.json",
    "v2_mscoco_val2014_annotations.json",
}
_PUBLISHED = {
    "train": {"questions": 443_757},
    "val": {"questions": 214_354},
    "test": {"questions": 447_793},
    "test-dev": {"questions": 107_394},
    "labels": {"answers": 3_129},
}
_NUM_PEOPLE = 10
_TYPES = ("question_type", "answer_type")

_normalize = functools.cache(normalize_answer)  # millions of answers are a few hundred thousand distinct ones


@dataclass(frozen=True, slots=True)
class Annotation:
    """What people answered to one question."""

    image_id: int | str
    main: str
    """The commonest answer, by which the vocabulary is counted."""
    answers: tuple[str, ...]
    """All answers, as they were given."""
    types: dict[str, str]
    """`question_type` and `answer_type`, by which accuracy is published; absent where unknown."""


@dataclass(frozen=True, slots=True)
class _Files:
    questions: Path
    annotations: Path | None


def prepare_vqav2(
    root: Path,
    /,
    *,
    annotations: Path | None = None,
    out: Path | None = None,
    official_counts: bool = False,
    min_answer_count: int = 9,
    overwrite: bool = False,
) -> IndexReport:
    """Write the indexes of VQAv2, vqa.{train,trainable_val,rest_val,val,test,test-dev}.jsonl, and labels.json.

    Needs v2_*_questions.json, v2_*_annotations.json and the pictures in train2014, val2014 and test2015. Any set in the
    same json form works: files whose names hold train, val, test or test-dev and questions or annotations; pictures in
    folders of these names (or all in one folder, images), named by their image_id. Indexes of the released code, of the
    same names, need no preparation: training reads them as they are, with answer2label.txt beside them.

    rest_val holds the questions about 1,000 images of val, trainable_val those about the others, to be trained on. The
    1,000 are the images whose SHA-256 of "rest_val:ID" (ID as in the json) is smallest: the same on every machine. A
    set of fewer than 2,000 images gives half of them.

    Args:
        root: folder that holds the folders of pictures, or images with these.
        annotations: folder of the json files; by default they are looked for in ROOT and its folders vqa, annotations
            and questions.
        out: folder of the index files; ROOT by default.
        official_counts: as the released code does, count answers that are not normalised, although the vocabulary is,
            and leave validation questions without a soft target out.
        min_answer_count: how often an answer must occur in train and val together to enter the vocabulary.
        overwrite: replace index files that exist.

    Returns:
        What was written and what was left out.

    Raises:
        DataMissingError: no such folder or file, or no picture is there.
        ConfigError: a file is broken, no answer is frequent enough, or an index exists already.
    """
    require(min_answer_count >= 1, f"min_answer_count must be at least 1, not {min_answer_count}")
    files = _find_files(root, annotations)
    official = "train" in files and files["train"].questions.name in _OFFICIAL_FILES
    opened = IndexWriter(
        "vqav2",
        root,
        out,
        {index: f"vqa.{index}.jsonl" for index in _INDEXES},
        labels="answers",
        published=_PUBLISHED if official else {},
        options={"official_counts": official_counts, "min_answer_count": min_answer_count},
        overwrite=overwrite,
    )
    if "train" not in files:
        raise missing_file("v2_OpenEnded_mscoco_train2014_questions.json", root, annotations, _FOLDERS)
    with opened as writer:
        _write(writer, root, files, min_answer_count, official_counts)
    return writer.report


def _write(
    writer: IndexWriter, root: Path, files: Mapping[str, _Files], min_answer_count: int, official_counts: bool
) -> None:
    """Write the labels and every index whose questions are there."""
    for index, split in _INDEXES.items():
        if split not in files:
            writer.miss(index, f"no {split} questions were found")
    answered = {split: _read_annotations(writer, split, found) for split, found in files.items()}
    main_answers = (answer.main for split in ("train", "val") for answer in answered.get(split, {}).values())
    names = vocabulary(main_answers, min_answer_count)
    require(bool(names), f"no answer in {root} occurs {min_answer_count} times: lower --min-answer-count")
    writer.set_labels(names)
    labels = {name: label for label, name in enumerate(names)}
    pictures = Pictures(root, writer.out)
    for split, found in files.items():
        _Split(writer, split, pictures, answered.pop(split), labels, official_counts).write(found)


def vocabulary(main_answers: Iterable[str], min_count: int) -> list[str]:
    """List the answers to choose from: normalised, at least `min_count` times, in the order of first appearance."""
    counts = Counter(_normalize(answer) for answer in main_answers)
    return [answer for answer, count in counts.items() if count >= min_count]


def soft_targets(answers: Iterable[str], labels: Mapping[str, int]) -> tuple[list[int], list[float]]:
    """Score the answers of the vocabulary by how many people gave them.

    Args:
        answers: what people answered, in the form in which equal ones are counted.
        labels: number of each answer of the vocabulary.

    Returns:
        Labels in the order of first appearance, and the score of each, in (0, 1].
    """
    counts = Counter(answers)
    known = {labels[answer]: soft_score(count) for answer, count in counts.items() if answer in labels}
    return list(known), list(known.values())


def held_out_images(image_ids: Iterable[int | str], limit: int = REST_VAL_IMAGES) -> frozenset[int | str]:
    """Choose the validation images that are not trained on.

    They are those whose SHA-256 of `rest_val:ID` is smallest: the same on every machine, whatever the order of files
    and whichever pictures are there. A set of fewer than `2 * limit` images gives half of them.
    """
    ranked = sorted(
        set(image_ids), key=lambda image_id: hashlib.sha256(f"rest_val:{image_id}".encode(errors="replace")).digest()
    )
    return frozenset(ranked[: min(limit, len(ranked) // 2)])


class _Split:
    """Writes the rows of one file of questions."""

    def __init__(
        self,
        writer: IndexWriter,
        split: str,
        pictures: Pictures,
        answered: Mapping[int, Annotation],
        labels: Mapping[str, int],
        official_counts: bool,
    ) -> None:
        coco = _COCO_FOLDERS[split]
        plain = "test" if split == "test-dev" else split
        places = (coco, f"images/{coco}", f"Images/mscoco/{coco}", plain, f"images/{plain}", "images")
        self._pictures = _PicturesById(pictures.folder(*places))
        self._writer, self._split, self._answered = writer, split, answered
        self._labels, self._official = labels, official_counts
        self._held_out: frozenset[int | str] = frozenset()
        self._validated: set[int | str] = set()

    def write(self, files: _Files) -> None:
        """Write a row for every usable question, count the others."""
        questions = read_json(files.questions, "questions")
        if self._split == "val":
            ids = (question.get("image_id") for question in questions if isinstance(question, dict))
            self._held_out = held_out_images(image_id for image_id in ids if isinstance(image_id, (int, str)))
        seen: set[int] = set()
        for number, question in enumerate(progress(questions, f"vqav2 {self._split}")):
            name = f"question number {number}"
            try:
                question_id = take(question, "question_id", int)
                name = f"question {question_id}"
                if question_id in seen:
                    raise BadSampleError("duplicate_id")
                seen.add(question_id)
                self._add(question, question_id, annotated=files.annotations is not None)
            except BadSampleError as error:
                self._writer.skip(self._split, error, name)
        for question_id in self._answered:
            if question_id not in seen:
                self._writer.skip(self._split, "annotation_without_question", f"question {question_id}")
        if self._split == "val":
            self._writer.count("rest_val", "images", len(self._validated))

    def _add(self, question: object, question_id: int, *, annotated: bool) -> None:
        """Write the row of one question to the indexes it belongs to."""
        text = text_of(take(question, "question", str), "question")
        image_id = _image_id(question)
        row: Row = {"image_path": self._pictures.find(image_id), "qid": question_id, "text": text}
        found = self._answered.get(question_id)
        if annotated and found is None:
            raise BadSampleError("question_without_annotation")
        if found is not None and found.image_id != image_id:
            raise BadSampleError("annotation_of_another_image")
        answers = list(found.answers) if found else []
        counted = answers if self._official else [_normalize(answer) for answer in answers]
        row["labels"], row["scores"] = soft_targets(counted, self._labels)
        self._writer.count(self._split, "questions")
        evaluated = row
        if found is not None:
            outside = sum(answer not in self._labels for answer in counted)
            self._writer.count(self._split, "answers outside the vocabulary", outside)
            if not row["labels"] and (self._split == "train" or self._official):
                raise BadSampleError("no_label")
            if not row["labels"]:
                self._writer.count(self._split, "questions without a label, kept")
            if self._split != "train":
                evaluated = {**row, "answers": answers, **found.types}
        self._writer.add(self._split, evaluated)
        if self._split != "val":
            return
        if image_id in self._held_out:
            self._writer.add("rest_val", evaluated)
            self._validated.add(image_id)
        elif row["labels"]:
            self._writer.add("trainable_val", row)
        else:
            self._writer.skip("trainable_val", "no_label", f"question {question_id}")


class _PicturesById:
    """Pictures of one folder by the number at the end of their names, or by their whole stems."""

    def __init__(self, folder: PictureFolder) -> None:
        self._folder = folder
        self._names: dict[int | str, str | None] = {}
        for name in folder.names:
            path = PurePath(name)
            if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES:
                end = path.stem.rpartition("_")[2]
                for key in {path.stem, int(end) if end.isascii() and end.isdecimal() else path.stem}:
                    self._names[key] = None if key in self._names else name  # None: more than one

    def find(self, image_id: int | str) -> str:
        """Path of the picture of an image."""
        if image_id not in self._names:
            raise BadSampleError("missing_image", f"image {image_id} in {self._folder.path}")
        name = self._names[image_id]
        if name is None:
            raise BadSampleError("ambiguous_image", f"image {image_id} in {self._folder.path}")
        return self._folder.find(name)


def _find_files(root: Path, annotations: Path | None) -> dict[str, _Files]:
    """Find questions and annotations of every split by the names of the files."""
    base = root if annotations is None else annotations
    if annotations is not None and not annotations.is_dir():
        raise DataMissingError(f"{annotations}: no such folder of questions and annotations")
    found: dict[tuple[str, str], dict[str, Path]] = {}
    for folder in (".", *_FOLDERS):
        for path in sorted((base / folder).glob("*.json")):
            kind = re.search("questions|annotations", path.name.lower())
            named = re.search("test-dev|test|train|val", path.name.lower())
            if kind and named:
                found.setdefault((named[0], kind[0]), {}).setdefault(path.name, path)
    chosen = {key: _only(base, *key, paths) for key, paths in found.items()}
    files = {}
    for split in _COCO_FOLDERS:
        if (split, "questions") in chosen:
            files[split] = _Files(chosen[split, "questions"], chosen.get((split, "annotations")))
            if split in ("train", "val") and files[split].annotations is None:
                raise DataMissingError(
                    f"{files[split].questions} has no {split} annotations beside it: unpack them too"
                )
    return files


def _only(base: Path, split: str, kind: str, paths: Mapping[str, Path]) -> Path:
    """Choose among files that could be meant: VQAv2's own, else there must be one."""
    names = sorted(paths.keys() & _OFFICIAL_FILES) or sorted(paths)
    if len(names) > 1:
        raise ConfigError(
            f"{base} holds several files of {split} {kind} ({', '.join(names)}): put those of one set into a folder "
            "of their own and name it with --annotations"
        )
    return paths[names[0]]


def _read_annotations(writer: IndexWriter, split: str, files: _Files) -> dict[int, Annotation]:
    """Read what people answered, by question."""
    found: dict[int, Annotation] = {}
    if files.annotations is None:
        return found
    for number, item in enumerate(progress(read_json(files.annotations, "annotations"), f"vqav2 {split} answers")):
        try:
            question_id = take(item, "question_id", int)
            if question_id in found:
                raise BadSampleError("duplicate_annotation")
            main = _plain(take(item, "multiple_choice_answer", str))
            answers = (main,) * _NUM_PEOPLE  # a set with one answer a question: everybody gave it
            if "answers" in item:
                answers = tuple(_plain(take(answer, "answer", str)) for answer in take(item, "answers", list))
            if not answers:
                raise BadSampleError("no_answer")
            types = {name: sys.intern(take(item, name, str)) for name in _TYPES if name in item}
            found[question_id] = Annotation(_image_id(item), main, answers, types)
        except BadSampleError as error:
            writer.skip(split, error, f"annotation number {number}")
    return found


def _image_id(row: object) -> int | str:
    value = take(row, "image_id", object)
    if not isinstance(value, (int, str)):
        raise BadSampleError("malformed", "image_id is neither a number nor a name")
    return value


def _plain(answer: str) -> str:
    """Keep one copy of equal answers, without what UTF-8 cannot hold."""
    return sys.intern(answer.encode(errors="ignore").decode())
