"""Text tokenizer: SentencePiece with the official id layout.

Ids: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, piece p >= 3 -> p + 1, `<mask>` last (64,001 for `beit3.spm`).
A text becomes `<s>` pieces `</s>`; what does not fit is cut before `</s>`, and cuts are counted by the caller.

Shapes: B texts, T the longest of them in tokens.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece
import torch
from torch import Tensor

from beit3.errors import ConfigError, DataMissingError
from beit3.model.presets import BOS, EOS, PAD, UNK
from beit3.model.released_files import shown

_SHIFT = 1
_FIRST_PIECE = 3
MAX_CHARS = 8192
"""Longer texts are cut before they are encoded: no model reads more, and time grows with length."""


class TextTokenizer:
    """Encode and decode text with a SentencePiece model.

    Args:
        model: content of a `.spm` file whose ids 0, 1, 2 are `<unk>`, `<s>`, `</s>` (SentencePiece's default).
        name: named in errors.
    """

    def __init__(self, model: bytes, name: str = "the tokenizer") -> None:
        self.model = model
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{name} is not a SentencePiece model: download or train it again") from error
        if not model or (self._pieces.unk_id(), self._pieces.bos_id(), self._pieces.eos_id()) != (0, 1, 2):
            raise ConfigError(f"{name} must have <unk>, <s>, </s> as pieces 0, 1, 2: train it with this package")

    @classmethod
    def load(cls, path: Path | str) -> TextTokenizer:
        """Read a `.spm` file."""
        path = Path(path)
        if not os.path.isfile(path):  # unlike Path's, this answers for names of any length
            raise DataMissingError(
                f"text tokenizer {shown(path, 300)} does not exist: train one with `beit3 train tokenizers/...`"
            )
        return cls(path.read_bytes(), str(path))

    def save(self, path: Path | str) -> None:
        """Write the `.spm` file."""
        Path(path).write_bytes(self.model)

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[bytes]]:
        return TextTokenizer, (self.model,)

    def __len__(self) -> int:
        return int(self._pieces.get_piece_size()) + _SHIFT + 1

    @property
    def mask_id(self) -> int:
        """Id of `<mask>`, the last one."""
        return len(self) - 1

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Turn a text into `<s>` pieces `</s>`.

        Args:
            text: any string; lone surrogates are replaced, the empty text becomes `<s> </s>`.
            max_length: most ids returned, at least 2; None keeps all of the first 8,192 characters.
        """
        if max_length is not None and max_length < 2:
            raise ConfigError(f"max_length must be at least 2 for <s> and </s>, not {max_length}")
        clean = text[:MAX_CHARS].encode("utf-8", "replace").decode("utf-8")
        pieces = [piece + _SHIFT if piece >= _FIRST_PIECE else UNK for piece in self._pieces.encode(clean)]
        if max_length is not None:
            pieces = pieces[: max_length - 2]
        return [BOS, *pieces, EOS]

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> tuple[Tensor, Tensor]:
        """Encode texts and pad them to the longest.

        Returns:
            ids (B, T) int64 and mask (B, T) bool, True = real token.
        """
        rows = [torch.tensor(self.encode(text, max_length)) for text in texts]
        if not rows:
            return torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0, dtype=torch.bool)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(ids.shape[1]) < lengths[:, None]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids back into text; special ids are left out, `<unk>` and `<mask>` are shown."""
        text = ""
        pieces: list[int] = []
        for index in ids:
            shown = {UNK: "<unk>", self.mask_id: "<mask>"}.get(index)
            if shown is not None:
                text = " ".join(part for part in (text, self._decode(pieces), shown) if part)
                pieces = []
            elif index > UNK and index < self.mask_id:
                pieces.append(index - _SHIFT)
        return " ".join(part for part in (text, self._decode(pieces)) if part)

    def decode_batch(self, ids: Tensor) -> list[str]:
        """Decode padded ids (B, T)."""
        return [self.decode(row) for row in ids.tolist()]

    def piece(self, index: int) -> str:
        """The written form of one id, such as `_cat` (with SentencePiece's word mark) or `<mask>`."""
        named = {BOS: "<s>", PAD: "<pad>", EOS: "</s>", UNK: "<unk>", self.mask_id: "<mask>"}
        return named.get(index) or str(self._pieces.id_to_piece(index - _SHIFT))

    def _decode(self, pieces: list[int]) -> str:
        return str(self._pieces.decode(pieces)) if pieces else ""


def train_text_tokenizer(
    texts: Iterator[str],
    vocab_size: int,
    *,
    model_type: Literal["unigram", "bpe"] = "unigram",
    character_coverage: float = 0.9995,
    seed: int = 0,
) -> TextTokenizer:
    """Train a SentencePiece model on a corpus.

    Args:
        texts: the corpus, one text at a time.
        vocab_size: largest number of pieces; a small corpus gives fewer.
        model_type: the official tokenizer is a unigram model.
        character_coverage: share of the corpus' characters that get a piece of their own.
        seed: of SentencePiece's sampling.
    """
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(f"the text tokenizer could not be trained ({error}): is the corpus empty?") from error
    return TextTokenizer(model.getvalue())
