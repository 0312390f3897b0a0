"""Vocabularies of SuperClass: what counts as a word, CLIP's BPE, and the list that lies with a model."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTokenizer

from beit3.errors import ConfigError, DataMissingError
from beit3.tokenizer.subwords import Subwords, WordList, load_subwords
from beit3.tokenizer.text import TextTokenizer


@pytest.fixture(scope="module")
def text_tokenizer(workspace: Any) -> TextTokenizer:
    """Of the embedded corpus."""
    return TextTokenizer.load(workspace.text_tokenizer)


MERGES = ["#version: 0.2", "d o", "do g</w>", "c a", "ca t</w>", "r u", "ru n</w>", "n i", "n g</w>", "i ng</w>"]


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary in the form of CLIP's own file."""
    path = tmp_path_factory.mktemp("clip") / "bpe.txt.gz"
    path.write_bytes(gzip.compress("\n".join(MERGES).encode()))
    return path


def test_sentencepiece_words_are_distinct_and_without_special_ids(text_tokenizer: TextTokenizer) -> None:
    subwords = Subwords(text_tokenizer)
    ids = subwords.encode("red cat red \u6f22")  # the last one is unknown
    pieces = set(text_tokenizer.encode("red cat red")[1:-1])
    assert ids == sorted(piece for piece in pieces if text_tokenizer.piece(piece) != "\u2581")
    assert not set(ids) & {0, 1, 2, 3, text_tokenizer.mask_id}
    assert subwords.encode("") == []


def test_lower_case_makes_one_word_of_two(text_tokenizer: TextTokenizer) -> None:
    assert Subwords(text_tokenizer, lower_case=True).encode("RED Cat") == Subwords(text_tokenizer).encode("red cat")
    assert Subwords(text_tokenizer).encode("RED Cat") != Subwords(text_tokenizer).encode("red cat")


def test_words_are_shown_as_one_reads_them(text_tokenizer: TextTokenizer, clip_file: Path) -> None:
    subwords = Subwords(text_tokenizer)
    shown = [subwords.word(index) for index in text_tokenizer.encode("cat")[1:-1]]
    assert "".join(shown).replace("##", "") == "cat"
    clip = load_subwords(clip_file)
    assert [clip.word(index) for index in clip.encode("dog ru")] == ["r##", "u", "dog"]


def test_against_transformers_clip_bpe_from_the_same_merges(clip_file: Path, tmp_path: Path) -> None:
    """The ids of CLIP's tokenizer as transformers builds it from vocab.json and merges.txt."""
    ours = load_subwords(clip_file)
    vocabulary = Tokenizer.from_str(ours.file()["tokenizer.json"].decode()).get_vocab()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(MERGES))
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("Dog  running CATS!", "it's 25\u00b0 caf\u00e9", "dog\ncat\tdog", "\u732b <|endoftext|> 1,000"):
        expected = set(theirs(text, add_special_tokens=False)["input_ids"]) - set(theirs.all_special_ids)
        assert ours.encode(text) == sorted(expected), text


def test_the_layout_of_clip_ids_is_bytes_then_ends_then_merges_then_special(clip_file: Path) -> None:
    vocabulary = Tokenizer.from_str(load_subwords(clip_file).file()["tokenizer.json"].decode()).get_vocab()
    assert (vocabulary["!"], vocabulary["!</w>"], vocabulary["do"], vocabulary["dog</w>"]) == (0, 256, 512, 513)
    assert vocabulary["<|startoftext|>"] == 512 + len(MERGES) - 1
    assert vocabulary["<|endoftext|>"] == 512 + len(MERGES)


def test_any_tokenizer_json_serves(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "dog": 1, "##s": 2, "cat": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    subwords = load_subwords(tmp_path / "tokenizer.json", lower_case=True)
    assert subwords.encode("DOGS cat bird") == [1, 2, 3]
    assert subwords.word(2) == "##s"
    assert pickle.loads(pickle.dumps(subwords)).encode("DOGS") == [1, 2]


def test_bare_marks_of_words_are_none_in_any_vocabulary(tmp_path: Path) -> None:
    words = ["\u2581", "\u2581dog", "s", "\u2581&", "d", "o", "g", "a", "m", "p", ";", "&"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    subwords = load_subwords(tmp_path / "tokenizer.json")
    assert [subwords.word(index) for index in subwords.encode("dogs &amp; dog")] == ["dog", "##s", "&"]
    assert 0 in subwords.special


def test_a_vocabulary_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="does not exist"):
        load_subwords(tmp_path / "no.spm")
    for name, content in (("a.json", b"{}"), ("b.gz", b"no gzip"), ("c.txt", b"no merges here at all")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            load_subwords(tmp_path / name)


def test_the_list_survives_a_folder(text_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    size = len(text_tokenizer)
    written = WordList(Subwords(text_tokenizer, True), 7, tuple(range(7)) + (0,) * (size - 7))
    for name, content in written.files().items():
        (tmp_path / name).write_bytes(content)
    read = WordList.read(tmp_path, size)
    assert read.subwords.lower_case
    assert read.weights().tolist() == written.weights().tolist()
    assert read.weights()[7] > read.weights()[6] > 0


@pytest.mark.parametrize(
    "broken",
    [
        b"[]",
        b"{",
        b'{"lower_case": 1, "num_documents": 1, "document_frequency": []}',
        b'{"lower_case": true, "num_documents": 1.5, "document_frequency": []}',
        b'{"lower_case": true, "num_documents": 1, "document_frequency": [2]}',
        b'{"lower_case": true, "num_documents": 1, "document_frequency": [-1]}',
        b'{"lower_case": true, "num_documents": 1, "document_frequency": [1, 1]}',
        b'{"lower_case": true, "num_documents": 1, "document_frequency": 5}',
    ],
)
def test_a_damaged_list_is_one_line(text_tokenizer: TextTokenizer, tmp_path: Path, broken: bytes) -> None:
    for name, content in WordList(Subwords(text_tokenizer)).files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "words.json").write_bytes(broken)
    with pytest.raises(ConfigError, match=r"words\.json") as caught:
        WordList.read(tmp_path, len(text_tokenizer))
    assert "\n" not in str(caught.value)


def test_a_list_without_its_tokenizer_or_of_another_model_is_refused(
    text_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataMissingError, match="names the words"):
        WordList.read(tmp_path, 5)
    for name, content in WordList(Subwords(text_tokenizer)).files().items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="different models"):
        WordList.read(tmp_path, 5)
    (tmp_path / "tokenizer.spm").unlink()
    with pytest.raises(ConfigError, match="vocabulary"):
        WordList.read(tmp_path, len(text_tokenizer))
