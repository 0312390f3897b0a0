"""The vocabulary that SuperClass predicts: SentencePiece of the run, CLIP's BPE, or any Hugging Face `tokenizer.json`.

A caption is the set of its subword ids. Special ids, unknown characters and the bare mark of a word's beginning are no
words.
"""

from __future__ import annotations

import gzip
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from beit3.config import require
from beit3.errors import ConfigError, DataMissingError
from beit3.model.presets import UNK
from beit3.tokenizer.text import MAX_CHARS, TextTokenizer

WORDS_FILE = "words.json"
SPM_FILE, JSON_FILE = "tokenizer.spm", "tokenizer.json"
_CLIP_WORDS = 49_408
_CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_WORD_MARK, _WORD_END, _GOES_ON = "\u2581", "</w>", "##"
_WORD_MARKS = (_WORD_MARK, "\u0120")
"""Of SentencePiece and of byte-level BPE."""


class Subwords:
    """Turns captions into sets of ids, and ids into words to read.

    Args:
        tokenizer: of the run, or one of the library `tokenizers`.
        lower_case: whether captions are put into lower case first, so that "Dog" and "dog" are one word.
    """

    def __init__(self, tokenizer: TextTokenizer | Tokenizer, lower_case: bool = False) -> None:
        self.lower_case = lower_case
        self._tokenizer = tokenizer
        self._marks_ends = self._marks_starts = False
        if isinstance(tokenizer, TextTokenizer):
            bare = {index for index in range(len(tokenizer)) if tokenizer.piece(index) == _WORD_MARK}
            self.special = frozenset({*range(UNK + 1), tokenizer.mask_id, *bare})
        else:
            known = json.loads(tokenizer.to_str())
            unknown = tokenizer.token_to_id(known["model"].get("unk_token") or "")
            special = {token["id"] for token in known["added_tokens"] if token["special"]}
            self._marks_ends = known["model"].get("end_of_word_suffix") == _WORD_END
            marks = () if self._marks_ends else _WORD_MARKS  # CLIP writes the byte of a space so, and never uses it
            self._marks_starts = any(word.startswith(marks) for word in tokenizer.get_vocab()) if marks else False
            nothing = (unknown, *(tokenizer.token_to_id(mark) for mark in marks))
            self.special = frozenset(special | {index for index in nothing if index is not None})

    def __len__(self) -> int:
        if isinstance(self._tokenizer, TextTokenizer):
            return len(self._tokenizer)
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """The distinct subwords of a text, rising; at most its first 8,192 characters are read."""
        text = text[:MAX_CHARS].lower() if self.lower_case else text[:MAX_CHARS]
        if isinstance(self._tokenizer, TextTokenizer):
            return sorted(set(self._tokenizer.encode(text)) - self.special)
        text = html.unescape(text)  # as CLIP's own code does: captions of the web hold "&amp;"
        return sorted(set(self._tokenizer.encode(text, add_special_tokens=False).ids) - self.special)

    def word(self, index: int) -> str:
        """A subword as one reads it; `##` stands where its word goes on."""
        if isinstance(self._tokenizer, TextTokenizer):
            piece = self._tokenizer.piece(index)
            return piece.removeprefix(_WORD_MARK) if piece.startswith(_WORD_MARK) else _GOES_ON + piece
        piece = str(self._tokenizer.id_to_token(index))
        if self._marks_starts:
            return piece[1:] if piece[:1] in _WORD_MARKS else _GOES_ON + piece
        if not self._marks_ends:
            return piece
        return piece.removesuffix(_WORD_END) if piece.endswith(_WORD_END) else piece + _GOES_ON

    def file(self) -> dict[str, bytes]:
        """The tokenizer as a file of an exchange folder."""
        if isinstance(self._tokenizer, TextTokenizer):
            return {SPM_FILE: self._tokenizer.model}
        return {JSON_FILE: self._tokenizer.to_str().encode()}


def load_subwords(path: Path, lower_case: bool = False) -> Subwords:
    """Read a vocabulary.

    Args:
        path: `.spm` of the run; `tokenizer.json` of a Hugging Face model (CLIP, BERT, Llama); or CLIP's own
            `bpe_simple_vocab_16e6.txt.gz`. CLIP's put everything into lower case by themselves.
        lower_case: as in `Subwords`.

    Raises:
        DataMissingError: there is no such file.
        ConfigError: it is none of these.
    """
    if not path.is_file():
        raise DataMissingError(f"vocabulary {path} does not exist: give a .spm, a tokenizer.json or CLIP's .txt.gz")
    if path.suffix == ".spm":
        return Subwords(TextTokenizer.load(path), lower_case)
    try:
        if path.suffix == ".json":
            return Subwords(Tokenizer.from_str(path.read_text(encoding="utf-8")), lower_case)
        content = path.read_bytes()
        merges = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8").split("\n")
        return Subwords(_clip_tokenizer(merges), lower_case)
    except Exception as error:  # the library raises bare exceptions
        raise ConfigError(f"{path} is no vocabulary that can be read: {error!s:.120}") from error


def _clip_tokenizer(lines: Sequence[str]) -> Tokenizer:
    """CLIP's BPE from its file of merges, of which it uses the first 48,894 (arXiv 2103.00020, section 2.4)."""
    letters = _byte_letters()
    merges = [(pair[0], pair[1]) for line in lines[1:] if len(pair := line.split()) == 2]
    merges = merges[: _CLIP_WORDS - 2 * len(letters) - len(_CLIP_SPECIAL)]
    words = [*letters, *(letter + _WORD_END for letter in letters), *(a + b for a, b in merges), *_CLIP_SPECIAL]
    require(len(words) > 2 * len(letters) + len(_CLIP_SPECIAL), "it holds no merges")
    vocabulary = {word: index for index, word in enumerate(words)}
    model: Any = models.BPE(vocabulary, merges, end_of_word_suffix=_WORD_END, unk_token=_CLIP_SPECIAL[1])
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(list(_CLIP_SPECIAL))
    return tokenizer


def _byte_letters() -> list[str]:
    """The letters that byte-level BPE writes bytes with: printable ones, then 256 and up for the rest."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(256 - len(printable))]


def inverse_document_frequency(num_documents: Tensor, document_frequency: Tensor) -> Tensor:
    """Weight of each word, log((N + 1) / (df + 1)), never below 0: 0 for a word of every caption.

    Args:
        num_documents: N, () int64.
        document_frequency: df, (V,) int64.

    Returns:
        (V,) float32.

    Source: SuperClass, equation 2, in the form of its code; the paper's own is negative where df = N.
    """
    ratio = (num_documents + 1).double() / (document_frequency + 1).double()
    return ratio.log().clamp_min(0).float()


@dataclass(frozen=True, slots=True)
class WordList:
    """A vocabulary with what training counted: what a SuperClass model needs to name words and to weigh them."""

    subwords: Subwords
    num_documents: int = 0
    document_frequency: tuple[int, ...] = ()
    """Captions that hold each word; empty: not counted."""

    def weights(self) -> Tensor:
        """IDF of each word, (V,) float32; 1 where nothing was counted."""
        if not self.document_frequency:
            return torch.ones(len(self.subwords))
        return inverse_document_frequency(torch.tensor(self.num_documents), torch.tensor(self.document_frequency))

    def files(self) -> dict[str, bytes]:
        """All of it as files of an exchange folder."""
        record = {
            "lower_case": self.subwords.lower_case,
            "num_documents": self.num_documents,
            "document_frequency": list(self.document_frequency),
        }
        return {**self.subwords.file(), WORDS_FILE: json.dumps(record).encode()}

    @classmethod
    def of_same(cls, folder: Path, subwords: Subwords) -> WordList | None:
        """The list of an exchange folder if its vocabulary is this one; None of any other folder or file."""
        ((name, content),) = subwords.file().items()
        places = folder / WORDS_FILE, folder / name
        if not all(place.is_file() for place in places) or places[1].read_bytes() != content:
            return None
        found = cls.read(folder, len(subwords))
        return found if found.subwords.lower_case == subwords.lower_case else None

    @classmethod
    def read(cls, folder: Path, num_words: int) -> WordList:
        """Read it from an exchange folder.

        Args:
            folder: holds words.json and a tokenizer.
            num_words: V of the model.

        Raises:
            DataMissingError: a file is not there.
            ConfigError: one is damaged, or belongs to another model.
        """
        place = folder / WORDS_FILE
        if not place.is_file():
            raise DataMissingError(f"{place} does not exist: copy it with the model, it names the words")
        try:
            record = json.loads(place.read_text(encoding="utf-8"))
            lower_case, documents = record["lower_case"], record["num_documents"]
            counts = tuple(record["document_frequency"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{place} is damaged ({error!s:.80}): copy it again") from error
        numbers = (documents, *counts)
        plain = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        require(plain and type(lower_case) is bool, f"{place} is damaged: counts are whole numbers of at least 0")
        require(all(number <= documents for number in counts), f"{place}: a word is in more captions than there are")
        names = [name for name in (SPM_FILE, JSON_FILE) if (folder / name).is_file()]
        require(bool(names), f"{folder} has no {SPM_FILE} or {JSON_FILE}: copy the model's vocabulary there")
        subwords = load_subwords(folder / names[0], lower_case)
        require(
            len(subwords) <= num_words and len(counts) in (0, num_words),
            f"{folder / names[0]} has {len(subwords):,} ids, {place.name} {len(counts):,}, the model {num_words:,} "
            "words: they belong to different models",
        )
        return cls(subwords, documents, counts)
