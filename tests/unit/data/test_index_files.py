"""Index files: official and own rows are read, whatever is wrong with one is counted under its reason."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beit3.data.index_files import (
    CaptioningRow,
    CaptioningTrainingRow,
    ClassificationRow,
    NLVR2Row,
    RetrievalRow,
    Row,
    VQARow,
    VQATrainingRow,
    encode_text,
    read_index,
    read_picture,
)
from beit3.errors import BadSampleError, DataMissingError
from beit3.tokenizer.text import TextTokenizer, train_text_tokenizer

PICTURE = "images/a.png"
QUESTION = {"image_path": PICTURE, "text": "What is it?", "labels": [3], "scores": [1.0], "qid": 1}
PAIR = {
    "image_path": PICTURE,
    "image2_path": "images/b.png",
    "text": "Two dogs.",
    "label": 1,
    "identifier": "dev-1-0-0",
}
CAPTION = {"image_path": PICTURE, "text": "A dog.", "image_id": 7}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures `images/a.png` and `images/b.png`."""
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def write(path: Path, *rows: dict[str, Any] | bytes) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


# Lines as the released code writes them, and what they mean.
OFFICIAL: list[tuple[type[Row], dict[str, Any], dict[str, Any]]] = [
    (ClassificationRow, {"image_path": PICTURE, "label": 5}, {"label": 5}),
    (
        VQARow,
        {"image_path": PICTURE, "text_segment": [9, 4], "labels": [3, 8], "scores": [1.0, 0.3], "qid": 262148000},
        {"text": (9, 4), "labels": (3, 8), "scores": (1.0, 0.3), "qid": 262148000, "answers": ()},
    ),
    (
        VQARow,
        {"image_path": PICTURE, "text_segment": [9], "labels": [], "scores": [], "qid": 5},
        {"text": (9,), "labels": (), "scores": (), "qid": 5, "answers": ()},
    ),
    (
        NLVR2Row,
        {**{k: PAIR[k] for k in ("image_path", "label", "identifier")}, "image2_path": PICTURE, "text_segment": [8, 9]},
        {"image2_path": PICTURE, "text": (8, 9), "label": 1, "identifier": "dev-1-0-0"},
    ),
    (
        CaptioningTrainingRow,
        {"image_path": PICTURE, "text_segment": [5], "image_id": 391895},
        {"text": (5,), "image_id": 391895},
    ),
    (
        CaptioningRow,
        {"image_path": PICTURE, "text_segment": None, "image_id": 391895},
        {"captions": (), "image_id": 391895},
    ),
    (RetrievalRow, {"image_path": PICTURE, "text_segment": [5, 6], "image_id": 0}, {"text": (5, 6), "image_id": 0}),
]


@pytest.mark.parametrize(("kind", "line", "expected"), OFFICIAL)
def test_official_rows_are_read_as_they_are(
    folder: Path, kind: type[Row], line: dict[str, Any], expected: dict[str, Any]
) -> None:
    index = read_index(write(folder / "x.jsonl", line), kind)
    expected = {name: str(folder / value) if name == "image2_path" else value for name, value in expected.items()}
    assert list(index) == [kind(image_path=str(folder / PICTURE), **expected)]
    assert not index.skipped


def test_own_rows_hold_texts_answers_and_references(folder: Path) -> None:
    question = write(folder / "q.jsonl", {**QUESTION, "text": " What\n is it? ", "answers": ["dog", "a  dog"]})
    row = read_index(question, VQATrainingRow)[0]
    assert row.text == "What is it?"
    assert row.answers == ("dog", "a  dog"), "people's answers are kept as written"
    line = {"image_path": PICTURE, "image_id": 1, "captions": ["A dog.", "One dog."]}
    assert read_index(write(folder / "c.jsonl", line), CaptioningRow)[0].captions == ("A dog.", "One dog.")


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


FAULTS: list[tuple[type[Row], dict[str, Any] | bytes, str]] = [
    (RetrievalRow, b"{not json", "malformed_line"),
    (RetrievalRow, b"[1, 2]", "malformed_line"),
    (RetrievalRow, b'{"image_path": "\xff"}', "malformed_line"),
    (RetrievalRow, b"[" * 100_000, "malformed_line"),
    (RetrievalRow, b'{"image_id": ' + b"9" * 5000 + b"}", "malformed_line"),
    (RetrievalRow, without(CAPTION, "image_path"), "missing_image_path"),
    (RetrievalRow, {**CAPTION, "image_path": 3}, "invalid_image_path"),
    (RetrievalRow, {**CAPTION, "image_path": ""}, "invalid_image_path"),
    (RetrievalRow, {**CAPTION, "image_path": "images/c.png"}, "picture_not_found"),
    (RetrievalRow, {**CAPTION, "image_path": "nowhere/a.png"}, "picture_not_found"),
    (RetrievalRow, {**CAPTION, "image_path": "images/a.png\0"}, "picture_not_found"),
    (RetrievalRow, {**CAPTION, "image_path": "\ud800/\ud800"}, "picture_not_found"),
    (RetrievalRow, without(CAPTION, "text"), "missing_text"),
    (RetrievalRow, {**CAPTION, "text": " \n"}, "empty_caption"),
    (RetrievalRow, {**without(CAPTION, "text"), "text_segment": []}, "empty_caption"),
    (RetrievalRow, {**without(CAPTION, "text"), "text_segment": [4, "x"]}, "not_text"),
    (RetrievalRow, {**without(CAPTION, "text"), "text_segment": [4, -1]}, "not_text"),
    (RetrievalRow, {**CAPTION, "text": 5}, "not_text"),
    (RetrievalRow, without(CAPTION, "image_id"), "missing_image_id"),
    (RetrievalRow, {**CAPTION, "image_id": "7"}, "invalid_image_id"),
    (RetrievalRow, {**CAPTION, "image_path": "images/b.png"}, "image_id_of_another_picture"),
    (CaptioningTrainingRow, {**CAPTION, "text": None}, "missing_text"),
    (CaptioningRow, {**CAPTION, "image_id": 8, "captions": "A dog."}, "invalid_captions"),
    (CaptioningRow, {**CAPTION, "image_id": 8, "captions": ["A dog.", None]}, "invalid_captions"),
    (CaptioningRow, CAPTION, "duplicate_image_id"),
    (ClassificationRow, {"image_path": PICTURE}, "missing_label"),
    (ClassificationRow, {"image_path": PICTURE, "label": 10}, "label_out_of_range"),
    (ClassificationRow, {"image_path": PICTURE, "label": -1}, "invalid_label"),
    (ClassificationRow, {"image_path": PICTURE, "label": True}, "invalid_label"),
    (ClassificationRow, {"image_path": PICTURE, "label": 1.0}, "invalid_label"),
    (VQARow, without(QUESTION, "qid"), "missing_qid"),
    (VQARow, {**QUESTION, "qid": 2, "labels": [3, 10], "scores": [1, 1]}, "label_out_of_range"),
    (VQARow, {**QUESTION, "qid": 2, "scores": [1.0, 0.3]}, "invalid_scores"),
    (VQARow, {**QUESTION, "qid": 2, "scores": [1.5]}, "invalid_scores"),
    (VQARow, {**QUESTION, "qid": 2, "scores": [float("nan")]}, "invalid_scores"),
    (VQARow, {**QUESTION, "qid": 2, "scores": ["1"]}, "invalid_scores"),
    (VQARow, {**QUESTION, "qid": 2, "labels": 3}, "invalid_labels"),
    (VQARow, {**QUESTION, "text": "Where is it?"}, "duplicate_qid"),
    (VQATrainingRow, {**QUESTION, "qid": 2, "labels": [], "scores": []}, "no_answer_in_vocabulary"),
    (VQARow, {**QUESTION, "qid": 2, "text": " \n"}, "empty_question"),
    (VQARow, {**without(QUESTION, "text"), "qid": 2, "text_segment": []}, "empty_question"),
    (VQARow, {**QUESTION, "qid": 2, "text": 5}, "not_text"),
    (NLVR2Row, {**PAIR, "identifier": "dev-2-0-0", "label": 2}, "invalid_label"),
    (NLVR2Row, {**PAIR, "identifier": "dev-2-0-0", "label": "True"}, "invalid_label"),
    (NLVR2Row, {**PAIR, "identifier": "dev-2-0-0", "image2_path": "images/c.png"}, "picture_not_found"),
    (NLVR2Row, {**PAIR, "identifier": "dev-2-0-0", "text": "\t"}, "empty_sentence"),
    (NLVR2Row, without(PAIR, "identifier"), "missing_identifier"),
    (NLVR2Row, {**PAIR, "identifier": 2}, "invalid_identifier"),
    (NLVR2Row, {**PAIR, "identifier": ["dev-2-0-0"]}, "invalid_identifier"),
    (NLVR2Row, {**PAIR, "identifier": "dev-2-0"}, "invalid_identifier"),
    (NLVR2Row, {**PAIR, "identifier": "dev--0-0"}, "invalid_identifier"),
    (NLVR2Row, PAIR, "duplicate_identifier"),
]
GOOD: dict[type[Row], dict[str, Any]] = {
    ClassificationRow: {"image_path": PICTURE, "label": 9},
    VQARow: QUESTION,
    VQATrainingRow: QUESTION,
    NLVR2Row: PAIR,
    CaptioningTrainingRow: CAPTION,
    CaptioningRow: CAPTION,
    RetrievalRow: CAPTION,
}


@pytest.mark.parametrize(("kind", "line", "reason"), FAULTS)
def test_a_bad_row_is_counted_under_its_reason_and_the_others_stay(
    folder: Path, caplog: pytest.LogCaptureFixture, kind: type[Row], line: dict[str, Any] | bytes, reason: str
) -> None:
    path = write(folder / "x.jsonl", GOOD[kind], line)
    with caplog.at_level(logging.WARNING):
        index = read_index(path, kind, num_labels=10)
    assert index.skipped == {reason: 1}
    assert len(index) == 1
    assert index[0].image_path == str(folder / PICTURE)
    assert caplog.messages == [f"{path}: 1 of 2 rows; left out: 1 {reason} (such as x.jsonl:2)"]


def test_the_report_counts_all_and_names_a_few_places(folder: Path) -> None:
    lost = [{**CAPTION, "image_path": f"images/{number}.png"} for number in range(1234)]
    index = read_index(write(folder / "x.jsonl", CAPTION, *lost, b"?"), RetrievalRow)
    assert index.report() == (
        f"{folder / 'x.jsonl'}: 1 of 1,236 rows; left out: 1 malformed_line (such as x.jsonl:1236); "
        "1,234 picture_not_found (such as x.jsonl:2, x.jsonl:3, x.jsonl:4)"
    )


def test_references_are_cleaned_and_empty_ones_counted_though_their_rows_stay(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some = {"image_path": PICTURE, "image_id": 1, "captions": [" A\n dog. ", "", " \t", "One\0 dog."]}
    none = {"image_path": PICTURE, "image_id": 2, "captions": ["\n"]}
    twice = {"image_path": PICTURE, "image_id": 1, "captions": [" "]}
    path = write(folder / "x.jsonl", some, none, twice)
    with caplog.at_level(logging.WARNING):
        index = read_index(path, CaptioningRow)
    assert [row.captions for row in index] == [("A dog.", "One dog."), ()]
    assert (index.skipped, index.dropped) == ({"duplicate_image_id": 1}, {"empty_caption": 3})
    assert caplog.messages == [
        f"{path}: 2 of 3 rows; left out: 1 duplicate_image_id (such as x.jsonl:3); "
        "left out of rows that stay: 3 empty_caption (such as x.jsonl:1, x.jsonl:2)"
    ]
    caplog.clear()
    read_index(write(folder / "y.jsonl", none), CaptioningRow)
    assert len(caplog.messages) == 1, "it is said of rows that all stay, too"


def test_nothing_is_said_of_an_index_without_faults(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_index(write(folder / "x.jsonl", CAPTION, {**CAPTION, "text": "Another."}), RetrievalRow)
    assert not caplog.messages


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"image_path": "images/c.png"}\n', b"\x89PNG\r\n\x1a\n\0\0"])
def test_an_index_without_a_usable_row_ends_with_one_line(folder: Path, content: bytes) -> None:
    (folder / "x.jsonl").write_bytes(content)
    with pytest.raises(DataMissingError, match=r"no usable RetrievalRow in .*x.jsonl: 0 of \d rows") as caught:
        read_index(folder / "x.jsonl", RetrievalRow)
    assert "\n" not in str(caught.value)


def test_a_missing_index_is_named(folder: Path) -> None:
    path = write(folder / "x.jsonl", CAPTION)
    with pytest.raises(DataMissingError, match=r"index .*y.jsonl does not exist"):
        read_index([path, folder / "y.jsonl"], RetrievalRow)


def test_several_files_are_one_index_with_paths_from_their_own_folders(folder: Path) -> None:
    (folder / "val").mkdir()
    outside = {**QUESTION, "image_path": "../images/b.png", "qid": 2}
    absolute = {**QUESTION, "image_path": str(folder / PICTURE), "qid": 3}
    first = write(folder / "train.jsonl", QUESTION)
    second = write(folder / "val" / "val.jsonl", QUESTION, outside, absolute)
    (folder / "val" / "images").symlink_to(folder / "images")
    index = read_index([first, second], VQATrainingRow)
    assert [row.qid for row in index] == [1, 2, 3]
    assert [Path(row.image_path).resolve() for row in index] == [
        (folder / f"images/{name}.png").resolve() for name in "aba"
    ]
    assert index.skipped == {"duplicate_qid": 1}


def test_byte_order_mark_blank_lines_and_windows_line_ends_do_not_matter(folder: Path) -> None:
    line = json.dumps({**CAPTION, "text": "Größe 犬"}, ensure_ascii=False).encode()
    (folder / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)  # and no line end at the end
    index = read_index(folder / "x.jsonl", RetrievalRow)
    assert [row.text for row in index] == ["Größe 犬"] * 2
    assert not index.skipped


def test_rows_are_found_like_those_of_a_list(folder: Path) -> None:
    index = read_index(
        write(folder / "x.jsonl", *({**CAPTION, "text": f"{number}"} for number in range(5))), RetrievalRow
    )
    rows = list(index)
    assert [row.text for row in rows] == list("01234")
    assert index[-1] == rows[-1]
    assert index[1:4] == rows[1:4]
    with pytest.raises(IndexError):
        index[5]


def test_data_processes_are_sent_little_more_than_the_lines(folder: Path) -> None:
    path = write(folder / "x.jsonl", *({**CAPTION, "text": f"caption {number}"} for number in range(2000)))
    index = read_index(path, RetrievalRow)
    sent = pickle.dumps(index)
    assert len(sent) < path.stat().st_size + 2000 * 12 + 1000
    assert pickle.loads(sent)[1999] == index[1999]
    rows = list(index)
    listed = sum(sys.getsizeof(part) for row in rows for part in (row, row.image_path, row.text, row.image_id))
    assert len(sent) < listed / 2


def test_each_folder_of_pictures_is_listed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    listdir, isfile = os.listdir, os.path.isfile
    monkeypatch.setattr(os, "listdir", lambda path: asked.append(path) or listdir(path))  # type: ignore[func-returns-value]
    monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(path) or isfile(path))  # type: ignore[func-returns-value]
    read_index(write(folder / "x.jsonl", *[CAPTION] * 50), RetrievalRow)
    assert asked == [str(folder / "images")]


def test_pictures_are_read_or_refused_with_their_names(folder: Path) -> None:
    data = io.BytesIO()
    Image.new("P", (8, 8)).save(data, "GIF")
    (folder / "c.png").write_bytes(data.getvalue())
    assert read_picture(folder / "c.png").mode == "RGB"
    (folder / "d.png").write_bytes(b"<html>")
    for path, reason in [
        ("d.png", "unreadable_image"),
        ("e.png", "picture_not_found"),
        ("images", "picture_not_found"),
        ("\0", "picture_not_found"),
    ]:
        with pytest.raises(BadSampleError) as caught:
            read_picture(str(folder / path))
        assert caught.value.reason == reason
        assert str(folder / path) in str(caught.value)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_text_tokenizer(iter(["a small dog", "a large cat"] * 20), 30)


def test_texts_and_ids_of_texts_become_the_same_tokens(tokenizer: TextTokenizer) -> None:
    text = "a small dog and a large cat"
    ids = tuple(tokenizer.encode(text)[1:-1])
    for length in (2, 4, len(ids) + 1, len(ids) + 2, 64):
        expected = tokenizer.encode(text, length)
        assert encode_text(text, tokenizer, length) == expected
        assert encode_text(ids, tokenizer, length) == expected


def test_ids_of_another_tokenizer_are_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(BadSampleError) as caught:
        encode_text((5, len(tokenizer)), tokenizer, 8)
    assert caught.value.reason == "token_out_of_range"
