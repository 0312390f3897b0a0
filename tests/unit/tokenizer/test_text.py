"""The text tokenizer against raw SentencePiece and the official rule: piece p >= 3 gets id p + 1, `<mask>` is last."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from beit3.data.texts import clean_text
from beit3.errors import BadSampleError, ConfigError, DataMissingError
from beit3.model.presets import BOS, EOS, PAD, UNK
from beit3.tokenizer.text import MAX_CHARS, TextTokenizer, train_text_tokenizer

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "house", "tree", "with", "and", "on", "under", "big", "small"]
WORDS += ["the", "a", "flying", "sleeping", "happy", "sad"]


def corpus() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(400)]


@pytest.fixture(scope="module")
def proto() -> bytes:
    """A model trained by SentencePiece itself, with its default special pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=60, minloglevel=2, hard_vocab_limit=False
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def raw(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


@pytest.fixture(scope="module")
def tokenizer(proto: bytes) -> TextTokenizer:
    return TextTokenizer(proto)


def official(raw: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """XLM-R's rule, which BEiT-3 uses: fairseq ids 0..3 are <s> <pad> </s> <unk>, the other pieces move up by one."""
    moved = {0: 3, 1: 0, 2: 2}
    return [0, *(moved.get(piece, piece + 1) for piece in raw.encode(text)), 2]


@pytest.mark.parametrize("text", [*corpus()[:20], "", "   ", "qqq zzz", "cat ☃ dog", "CAT, dog!", "a" * 300])
def test_ids_follow_the_official_offset(
    tokenizer: TextTokenizer, raw: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    assert tokenizer.encode(text) == official(raw, text)


def test_ids_agree_with_the_tokenizer_of_the_official_code(
    tokenizer: TextTokenizer, raw: sentencepiece.SentencePieceProcessor, proto: bytes, tmp_path: Path
) -> None:
    """The official code reads `beit3.spm` with XLMRobertaTokenizer, whose vocabulary is built like this."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [(raw.id_to_piece(i), raw.get_score(i)) for i in range(raw.get_piece_size())]
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces[3:], ("<mask>", 0.0)]
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=3))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    for text in corpus()[20:60]:
        assert tokenizer.encode(text)[1:-1] == fast.encode(text).ids
    assert len(tokenizer) == len(vocabulary)
    assert vocabulary[tokenizer.mask_id][0] == "<mask>"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", [0, 2]),
        ("a cat", [0, 4, 7, 2]),
        ("  a\tcat ", [0, 4, 7, 2]),
        ("catcat", [0, 7, 6, 2]),
        ("acts", [0, 4, 10, 11, 12, 2]),
        ("xcat", [0, 8, 3, 6, 2]),
        ("cat ☃☃ a", [0, 7, 8, 3, 4, 2]),
    ],
)
def test_ids_of_a_written_out_model_are_the_documented_numbers(text: str, ids: list[int]) -> None:
    """Pieces 0, 1, 2 are `<unk>`, `<s>`, `</s>`; the nine others start at id 4 and end at 12; `<mask>` is 13."""
    proto = model_pb2.ModelProto()
    charsmap = model_pb2.ModelProto.FromString(train_text_tokenizer(iter(corpus()), 40).model).normalizer_spec
    proto.normalizer_spec.CopyFrom(charsmap)
    proto.pieces.add(piece="<unk>", type=2)
    proto.pieces.add(piece="<s>", type=3)
    proto.pieces.add(piece="</s>", type=3)
    for rank, name in enumerate(["▁a", "ca", "cat", "▁cat", "▁", "a", "c", "t", "s"]):
        proto.pieces.add(piece=name, score=-1.0 - rank)
    tokenizer = TextTokenizer(proto.SerializeToString())
    assert tokenizer.encode(text) == ids
    assert (len(tokenizer), tokenizer.mask_id) == (14, 13)


def test_special_ids_and_the_mask_at_the_end(
    tokenizer: TextTokenizer, raw: sentencepiece.SentencePieceProcessor
) -> None:
    assert (BOS, PAD, EOS, UNK) == (0, 1, 2, 3)
    assert len(tokenizer) == raw.get_piece_size() + 2
    assert tokenizer.mask_id == len(tokenizer) - 1
    assert [tokenizer.piece(i) for i in (0, 1, 2, 3, tokenizer.mask_id)] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tokenizer.piece(4) == raw.id_to_piece(3)
    assert tokenizer.piece(tokenizer.mask_id - 1) == raw.id_to_piece(raw.get_piece_size() - 1)


@pytest.mark.parametrize("text", corpus()[60:90])
def test_decoding_gives_the_text_back(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_shows_unknown_and_masked_words(tokenizer: TextTokenizer) -> None:
    cat, dog = tokenizer.encode("cat")[1:-1], tokenizer.encode("dog")[1:-1]
    ids = [BOS, *cat, tokenizer.mask_id, UNK, *dog, EOS, PAD, PAD]
    assert tokenizer.decode(ids) == "cat <mask> <unk> dog"


def test_the_empty_text_is_two_ids(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode("") == [BOS, EOS]
    assert tokenizer.decode([BOS, EOS]) == ""


def test_marks_written_in_a_text_stay_text(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("cat </s> <s> <pad> <mask> dog")
    assert ids[0] == BOS
    assert ids[-1] == EOS
    assert not {BOS, PAD, EOS, tokenizer.mask_id} & set(ids[1:-1])


@pytest.mark.parametrize("text", ["\ud800", "cat \udfff dog", "\x00", "\x00cat\x07", "‮cat", "☃" * 50, "\U0001f600"])
def test_odd_characters_are_encoded_not_refused(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == BOS
    assert ids[-1] == EOS
    assert all(UNK <= i < tokenizer.mask_id for i in ids[1:-1])


def test_invalid_utf8_passes_through_the_cleaner(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(clean_text(b"cat \xff\xfe dog"))
    cat, dog = tokenizer.encode("cat")[1:-1], tokenizer.encode("dog")[1:-1]
    assert ids[1 : 1 + len(cat)] == cat
    assert ids[-1 - len(dog) : -1] == dog
    with pytest.raises(BadSampleError, match="empty_caption"):
        clean_text(b"\x00 \n")


def test_a_hundred_thousand_characters_are_cut_first(tokenizer: TextTokenizer) -> None:
    text = "cat dog " * 12_500
    assert len(text) == 100_000
    assert tokenizer.encode(text) == tokenizer.encode(text[:MAX_CHARS])
    assert len(tokenizer.encode(text, 64)) == 64


@pytest.mark.parametrize("length", [2, 3, 5, 8])
def test_a_cut_keeps_the_end_mark(tokenizer: TextTokenizer, length: int) -> None:
    whole = tokenizer.encode("the big red cat and the small blue bird")
    assert len(whole) > length
    assert tokenizer.encode("the big red cat and the small blue bird", length) == [*whole[: length - 1], EOS]


def test_a_text_that_fits_is_not_cut(tokenizer: TextTokenizer) -> None:
    whole = tokenizer.encode("the big red cat")
    assert tokenizer.encode("the big red cat", len(whole)) == whole


def test_a_length_without_room_for_the_marks_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        tokenizer.encode("cat", 1)


def test_a_batch_is_padded_to_its_longest(tokenizer: TextTokenizer) -> None:
    texts = ["cat", "", "the big red cat and the small blue bird"]
    ids, mask = tokenizer.encode_batch(texts, 6)
    assert ids.shape == mask.shape == (3, 6)
    assert ids.dtype == torch.int64
    for row, real, text in zip(ids, mask, texts, strict=True):
        assert row[real].tolist() == tokenizer.encode(text, 6)
        assert (row[~real] == PAD).all()
        assert real.tolist() == sorted(real.tolist(), reverse=True)
    assert tokenizer.decode_batch(ids)[0] == "cat"
    assert tokenizer.encode_batch([])[0].shape == (0, 0)


@pytest.mark.parametrize("damage", [b"", b"not a model", b"\x00" * 100])
def test_a_damaged_model_is_one_clear_line(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.spm"
    path.write_bytes(damage)
    with pytest.raises(ConfigError) as caught:
        TextTokenizer.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_model_is_refused(proto: bytes) -> None:
    with pytest.raises(ConfigError):
        TextTokenizer(proto[: len(proto) // 2 + 1])


def test_a_model_of_another_layout_is_refused() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=40, minloglevel=2, unk_id=3, pad_id=0
    )
    with pytest.raises(ConfigError, match="pieces 0, 1, 2"):
        TextTokenizer(model.getvalue())


def test_a_missing_file_is_missing_data(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="does not exist"):
        TextTokenizer.load(tmp_path / "none.spm")


def test_saving_pickling_and_copying_keep_the_ids(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "copy.spm")
    for copy in (TextTokenizer.load(tmp_path / "copy.spm"), pickle.loads(pickle.dumps(tokenizer))):
        assert len(copy) == len(tokenizer)
        assert [copy.encode(text) for text in WORDS] == [tokenizer.encode(text) for text in WORDS]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_gives_the_official_layout_and_repeats(kind: str) -> None:
    made = [
        train_text_tokenizer(iter(corpus()), 80, model_type="bpe" if kind == "bpe" else "unigram") for _ in range(2)
    ]
    assert made[0].model == made[1].model
    assert len(made[0]) <= 82
    assert made[0].decode(made[0].encode("the red cat")) == "the red cat"


def test_an_empty_corpus_is_refused() -> None:
    with pytest.raises(ConfigError, match="corpus"):
        train_text_tokenizer(iter([]), 100)
