"""Export of the text tokenizer as a Hugging Face fast tokenizer: the same ids from `tokenizers` and `transformers`.

Two things that SentencePiece does and `tokenizers` does not are spelled out:

- Normalisation. SentencePiece replaces the longest match of its table. `tokenizers` takes the shortest one within a
  character and its combining marks, and loses the other marks. So here every character is normalised by itself, and
  characters are composed afterwards: by NFC, kept from composing where SentencePiece would not.
- BPE. SentencePiece merges whatever gives the best piece, `tokenizers` wants pairs by rank.

Ids still differ from those of `TextTokenizer` where

- a text holds `<s>`, `<pad>`, `</s>`, `<unk>` or `<mask>`: Hugging Face reads the mark, ours the letters;
- it is longer than 8,192 characters, which ours cuts, or holds lone surrogates, which `tokenizers` refuses;
- two segmentations of a unigram model score the same, such as `000` as 00 0 or 0 00: SentencePiece's sums are of single
  precision, so its choice depends on what stands before;
- it stacks marks as no language does, spells characters of Unicode 13 or newer in parts, writes accents as U+0340 to
  U+0344, or holds the noncharacters U+FDD0 and U+FDD1.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from beit3.errors import ConfigError
from beit3.model.presets import BOS, EOS, PAD, UNK
from beit3.tokenizer.text import TextTokenizer

_WORD_MARK = "▁"
_JOINT, _STOP = "\ufdd0", "\ufdd1"
"""Noncharacters put between characters: each is normalised by itself; it does not compose with the one before."""


def to_fast(tokenizer: TextTokenizer) -> Tokenizer:
    """Convert a text tokenizer to a `tokenizers.Tokenizer`.

    A text becomes `<s> A </s>`, two become `<s> A </s> </s> B </s>` (XLM-R's rule). `<mask>` in a text takes the white
    space before it.

    Raises:
        ConfigError: the model was trained with options that the trainer of this package does not use.
    """
    proto = model_pb2.ModelProto.FromString(tokenizer.model)
    _check(proto)
    fast = Tokenizer(_model(tokenizer, proto))
    fast.normalizer = _normalizer(proto.normalizer_spec.precompiled_charsmap)
    fast.pre_tokenizer = pre_tokenizers.Metaspace(_WORD_MARK, "always", split=proto.trainer_spec.split_by_whitespace)
    fast.decoder = decoders.Metaspace(_WORD_MARK, "always")
    special = [AddedToken(tokenizer.piece(i), normalized=False, special=True) for i in (BOS, PAD, EOS, UNK)]
    special.append(AddedToken(tokenizer.piece(tokenizer.mask_id), normalized=False, special=True, lstrip=True))
    fast.add_special_tokens(special)
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return fast


def save_fast(tokenizer: TextTokenizer, folder: Path | str) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` reads.

    Args:
        tokenizer: of the model.
        folder: made if need be; its other files stay. A model's folder is a good place.

    Raises:
        ConfigError: see `to_fast`.
    """
    from transformers import PreTrainedTokenizerFast

    names: dict[str, Any] = {"bos_token": BOS, "cls_token": BOS, "eos_token": EOS, "sep_token": EOS}
    names |= {"pad_token": PAD, "unk_token": UNK}
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=to_fast(tokenizer),
        **{name: tokenizer.piece(index) for name, index in names.items()},
        mask_token=AddedToken(tokenizer.piece(tokenizer.mask_id), normalized=False, special=True, lstrip=True),
        model_input_names=["input_ids", "attention_mask"],
    )
    wrapped.save_pretrained(folder)


def _check(proto: Any) -> None:
    """Refuse what would give other ids."""
    kinds, trainer, normalizer = model_pb2.TrainerSpec, proto.trainer_spec, proto.normalizer_spec
    faults = {
        "a model that is neither unigram nor BPE": trainer.model_type not in (kinds.UNIGRAM, kinds.BPE),
        "pieces with a meaning of their own": any(piece.type != piece.NORMAL for piece in proto.pieces[3:]),
        "word marks at the end of words": trainer.treat_whitespace_as_suffix,
        "white space kept as it is": not normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces,
        "no mark before the first word": not normalizer.add_dummy_prefix,
    }
    if found := [fault for fault, present in faults.items() if present]:
        raise ConfigError(f"the text tokenizer has {', '.join(found)}: a fast tokenizer would give other ids")


def _model(tokenizer: TextTokenizer, proto: Any) -> models.Model:
    """The pieces under the official ids."""
    names = [tokenizer.piece(index) for index in range(len(tokenizer))]
    scores = {piece.piece: piece.score for piece in proto.pieces[3:]}
    if proto.trainer_spec.model_type == model_pb2.TrainerSpec.UNIGRAM:
        return models.Unigram([(name, scores.get(name, 0.0)) for name in names], unk_id=UNK, byte_fallback=False)
    vocabulary = {name: index for index, name in enumerate(names)}
    return models.BPE(vocabulary, _merges(scores), unk_token=tokenizer.piece(UNK), fuse_unk=True)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best piece first."""
    ranked = sorted(scores, key=lambda piece: -scores[piece])
    cuts = ((piece[:end], piece[end:]) for piece in ranked for end in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in scores and right in scores]


def _normalizer(table: bytes) -> normalizers.Normalizer:
    """The model's own normalisation, then single spaces and none at the end (the first becomes the word mark)."""
    steps: list[normalizers.Normalizer] = []
    if table:
        whole = normalizers.Precompiled(table)
        # No character below U+0300 joins the one before. An insertion at the very start makes `tokenizers` panic.
        joints = Regex(r"(?!\A)(?=[^\x{0}-\x{2ff}])")
        steps = [normalizers.Replace(joints, _JOINT), whole, normalizers.Replace(_JOINT, "")]
        if whole.normalize_str("e\u0301") == "\u00e9":  # the table composes
            steps = [normalizers.Replace(_stops(), _STOP), *steps, normalizers.NFC(), normalizers.Replace(_STOP, "")]
    spaces = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r" \z"), "")]
    return normalizers.Sequence([*steps, *spaces])


def _stops() -> Regex:
    """The places where NFC composes and SentencePiece does not.

    Its table holds fully decomposed characters, marks in canonical order. So no mark joins what already stands for
    several characters (or for none), and no mark joins another unless some character decomposes into both.
    """
    followers: dict[str, set[str]] = defaultdict(set)
    several = []
    for character in map(chr, (*range(0xD800), *range(0xE000, 0x30000))):
        if len(unicodedata.normalize("NFKD", character)) > 1 or unicodedata.category(character) == "Cc":
            several.append(character)
        parts = unicodedata.normalize("NFD", character)
        for first, second in itertools.pairwise(parts):
            if unicodedata.category(first)[0] == unicodedata.category(second)[0] == "M":
                followers[first].add(second)
    pairs = "|".join(f"(?<=[{_ranges(first)}])[{_ranges(second)}]" for first, second in followers.items())
    mark = r"[\p{M}\x{ff9e}\x{ff9f}]"  # with the two halfwidth ones of Japanese
    final = r"[\x{11a8}-\x{11c2}]"  # consonants that end a Korean syllable
    return Regex(rf"(?={mark}|{final})(?<=[{_ranges(several)}])|(?={mark})(?<={mark})(?!{pairs})")


def _ranges(characters: Iterable[str]) -> str:
    """The inside of a character class."""
    found: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return "".join(rf"\x{{{first:x}}}-\x{{{last:x}}}" for first, last in found)
