"""The exported fast tokenizer gives SentencePiece's ids, in `tokenizers` and through the classes of `transformers`."""

from __future__ import annotations

import io
import json
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from beit3.errors import ConfigError
from beit3.tokenizer.fast import save_fast, to_fast
from beit3.tokenizer.text import MAX_CHARS, TextTokenizer, train_text_tokenizer

LANGUAGES = """the a red green blue cat dog bird house tree with and on under big small flying sleeping photo of two
three élève façade naïve über straße Ελλάδα ὕδωρ кошка собака йод việt nam phở tiếng đường かわいい ガギグ ネコ パン 猫
犬 家 今日は 한국어 고양이 사진 עברית שָׁלוֹם العربية مُحَمَّدٌ हिन्दी क़िताब ไทย น้ำ தொகுப்பு 😀 👨‍👩‍👧 👍🏽 ❤️ 🇫🇷 ... !!! 000
-- 123 2024 & @ ( ) http://x.y/z?q=1"""
WORDS = LANGUAGES.split()
FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")


def wide(text: str) -> str:
    """Full width forms of ASCII."""
    return "".join("\u3000" if character == " " else chr(ord(character) + 0xFEE0) for character in text)


HARD = {
    "empty": "",
    "one space": " ",
    "only white space": " \t\n\u3000 ",
    "spaces at both ends": "  cat dog   ",
    "several spaces": "the   red     cat",
    "tabs and newlines": "cat\tdog\n\nbird\r\nhouse\u2028tree\u0085a",
    "unusual spaces": "cat\u00a0dog\u2003bird\u200bhouse\ufefftree\u1680a",
    "the word mark itself": "▁cat ▁▁ dog▁",
    "composed accents": "élève façade naïve über phở tiếng ὕδωρ",
    "decomposed accents": unicodedata.normalize("NFD", "élève façade naïve über phở tiếng ὕδωρ йод"),
    "partly composed accents": "ti\u00ea\u0301ng ph\u01a1\u0309 Ô\u0303 Ộ\u0301",
    "accents out of order": "e\u0302\u0323 o\u0301\u0323 שָׁלוֹם مُحَمَّدٌ شُدَّ",
    "accents on other forms": "\uff21\u0301 \u2460\u0301 \u00aa\u0302 \u0133\u0302 \ufb01\u0308 ™\ufe0f ½\u20e3",
    "ligatures and signs": "ﬁne oﬃce ½ № ™ ㈱ ㍿ … ″ Ⅷ ²",
    "full width forms": wide("The red cat!123"),
    "half width kana": "ｶﾜｲｲ ﾊﾟﾝ ｶﾞｷﾞｸﾞ ヷ",
    "half width kana marks after others": "a\u0651\uff9e \u05c1\uff9f \u0301\uff9e",
    "decomposed kana": unicodedata.normalize("NFD", "ガギグ パン"),
    "chinese and japanese": "猫と犬 今日は家、「猫」。",
    "compatibility ideographs": "\uf900\ufa0c\U0002f800",
    "korean": "한국어 고양이 사진",
    "decomposed korean": unicodedata.normalize("NFD", "한국어 고양이 사진"),
    "partly composed korean": "\uace0\u11bc \u1100\u1169\u11bc \u11bc",
    "half width korean": "\uffb7\uffc2\uffa4",
    "indic": "हिन्दी क़िताब தொகுப்பு ไทย น้ำ " + unicodedata.normalize("NFD", "ொ ో ේ ৌ"),
    "emoji with joiners": "👨‍👩‍👧 👍🏽 ❤️ 🇫🇷 1️⃣ 🏳️‍🌈 a\u200db\u200c",
    "unknown characters": "𓀀𓀁 cat𓀀dog ☃☃ ☃ \ue000 \U000e0001",
    "control characters": "\x00cat\x07 \x1b[0m\x7f\x9f dog\x01",
    "control characters before marks": "e\x01\u0301 o\x9f\u0302\u0323",
    "control characters alone": "\x01\x02",
    "a mark first": "\u0301cat \u200d",
    "directions": "\u202ecat\u202c \u200fdog",
    "runs of one character": "aaaaaaa !!!!!!!!!!!! ........ 000000 -----------",
    "capitals and digits": "The RED Cat, 2024-01-01: £5.00/€4 (100%)",
    "one long word": "cat" * 400,
    "longest text": ("the big red cat, " * 600)[:MAX_CHARS],
}


def corpus() -> Iterator[str]:
    draw = random.Random(0)
    for _ in range(1500):
        yield " ".join(draw.choices(WORDS, k=draw.randint(3, 12)))


def trained(**options: Any) -> TextTokenizer:
    """A model by SentencePiece's own trainer with options that ours does not offer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(), model_writer=model, hard_vocab_limit=False, minloglevel=2, **options
    )
    return TextTokenizer(model.getvalue())


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    return train_text_tokenizer(corpus(), 500, model_type=request.param, character_coverage=1.0)


@pytest.fixture(scope="module")
def fast(tokenizer: TextTokenizer) -> Tokenizer:
    return to_fast(tokenizer)


@pytest.fixture(scope="module")
def folder(tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fast")
    save_fast(tokenizer, place)
    return place


@pytest.fixture(scope="module", params=["AutoTokenizer", "tokenizer_file"])
def wrapped(request: pytest.FixtureRequest, folder: Path) -> Any:
    """The tokenizer of `transformers`, by both ways of loading."""
    if request.param == "AutoTokenizer":
        return AutoTokenizer.from_pretrained(folder)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(folder / "tokenizer.json"), mask_token="<mask>", **names
    )


@pytest.mark.parametrize("text", HARD.values(), ids=HARD)
def test_ids_of_hard_texts_are_sentencepieces(text: str, tokenizer: TextTokenizer, fast: Tokenizer) -> None:
    assert fast.encode(text).ids == tokenizer.encode(text)


def test_ids_of_random_texts_are_sentencepieces(tokenizer: TextTokenizer, fast: Tokenizer) -> None:
    draw = random.Random(1)
    characters = "".join(HARD[name] for name in HARD if "long" not in name) + "".join(WORDS)
    for number in range(2000):
        if number % 2:
            text = "".join(draw.choices(characters, k=draw.randint(1, 25)))
        else:
            form = draw.choice(FORMS)
            text = unicodedata.normalize(form, " ".join(draw.choices(WORDS, k=draw.randint(1, 12))))
        assert fast.encode(text).ids == tokenizer.encode(text), ascii(text)


def test_every_character_is_normalised_as_by_sentencepiece(tokenizer: TextTokenizer, fast: Tokenizer) -> None:
    raw = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    codes = {*range(0x30000)} - {*range(0xD800, 0xE000), 0x344, 0xFDD0, 0xFDD1}
    characters = [chr(code) for code in sorted(codes)]
    parts = {unicodedata.normalize("NFD", character) for character in characters} - {*characters}
    known = [text for text in parts if NFC().normalize_str(text) == unicodedata.normalize("NFC", text)]
    assert len(known) > 12_000
    for text in [f"a{character}b" for character in characters] + known:
        normal = fast.normalizer.normalize_str(text).replace(" ", "▁")
        assert (f"▁{normal}" if normal and normal[0] != "▁" else normal) == raw.normalize(text), ascii(text)


def test_the_layout_is_that_of_xlm_r(tokenizer: TextTokenizer, fast: Tokenizer) -> None:
    raw = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    pieces = raw.get_piece_size()
    assert [fast.id_to_token(index) for index in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert [fast.id_to_token(piece + 1) for piece in range(3, pieces)] == [raw.id_to_piece(p) for p in range(3, pieces)]
    assert fast.token_to_id("<mask>") == pieces + 1
    assert fast.get_vocab_size() == pieces + 2


@pytest.mark.parametrize("kind", ["UNIGRAM", "BPE"])
def test_ids_of_a_written_out_model_are_the_documented_numbers(kind: str) -> None:
    proto = model_pb2.ModelProto()
    proto.trainer_spec.model_type = model_pb2.TrainerSpec.ModelType.Value(kind)
    for name in ("<unk>", "<s>", "</s>"):
        proto.pieces.add(piece=name, score=0, type=2 if name == "<unk>" else 3)
    for rank, name in enumerate(["▁a", "ca", "cat", "▁cat", "▁", "a", "c", "t", "s"]):
        proto.pieces.add(piece=name, score=-1 - rank)
    fast = to_fast(TextTokenizer(proto.SerializeToString()))
    assert fast.encode("a cat").ids == [0, 4, 7, 2]
    assert fast.encode("acts").ids == [0, 4, 10, 11, 12, 2]
    assert fast.encode("xcat ☃☃ a").ids == [0, 8, 3, 6, 8, 3, 4, 2]
    assert fast.encode("a <mask>cat").ids == [0, 4, 13, 7, 2]
    assert fast.encode("a", "cat").ids == [0, 4, 2, 2, 7, 2]


@pytest.mark.parametrize("rule", ["identity", "nfkc", "nfkc_cf", "nmt_nfkc_cf"])
def test_normalisation_is_the_models_own(rule: str) -> None:
    tokenizer = trained(vocab_size=400, character_coverage=1.0, normalization_rule_name=rule)
    fast = to_fast(tokenizer)
    texts = [
        "The  RED Cat",
        wide("Cat") + " ﬁne ①",
        unicodedata.normalize("NFD", "ÉLÈVE tiếng 고양이"),
        " cat\u3000 dog ",
    ]
    for text in texts:
        assert fast.encode(text).ids == tokenizer.encode(text), text
    folded = tokenizer.encode("RED") == tokenizer.encode("red")
    assert folded == rule.endswith("_cf")


def test_what_the_fast_tokenizer_decodes_is_what_ours_does(tokenizer: TextTokenizer, fast: Tokenizer) -> None:
    draw = random.Random(2)
    for _ in range(200):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))
        ids = tokenizer.encode(text)
        assert fast.decode(ids) == tokenizer.decode(ids)
    assert fast.decode(fast.encode("the  red\ncat").ids) == "the red cat"
    assert fast.decode(fast.encode("").ids) == ""


def test_a_mask_takes_the_space_before_it_and_splits_the_text(tokenizer: TextTokenizer, wrapped: Any) -> None:
    red, cat = tokenizer.encode("the red")[1:-1], tokenizer.encode("cat")[1:-1]
    mask = len(tokenizer) - 1
    assert wrapped.mask_token_id == mask
    for text in ("the red <mask> cat", "the red<mask>cat", "the red   <mask>  cat"):
        assert wrapped(text)["input_ids"] == [0, *red, mask, *cat, 2]
    assert wrapped(" <mask> <mask> ")["input_ids"] == [0, mask, mask, 2]
    encoded = to_fast(tokenizer).encode("the red  <mask> cat")
    assert encoded.offsets[encoded.ids.index(mask)] == (7, 15)
    assert wrapped.decode([0, *red, mask, *cat, 2], skip_special_tokens=True) == "the red cat"


def test_transformers_gives_the_same_ids_and_special_ones(tokenizer: TextTokenizer, wrapped: Any) -> None:
    for text in HARD.values():
        assert wrapped(text)["input_ids"] == tokenizer.encode(text)
    assert len(wrapped) == len(tokenizer)
    special = (wrapped.bos_token_id, wrapped.pad_token_id, wrapped.eos_token_id, wrapped.unk_token_id)
    assert special == (0, 1, 2, 3)


def test_transformers_pads_and_cuts_as_ours(tokenizer: TextTokenizer, wrapped: Any) -> None:
    texts = ["cat", "", "the big red cat and the small blue bird"]
    batch = wrapped(texts, padding=True, truncation=True, max_length=6, return_tensors="pt")
    ids, mask = tokenizer.encode_batch(texts, 6)
    assert batch["input_ids"].tolist() == ids.tolist()
    assert batch["attention_mask"].tolist() == mask.int().tolist()
    assert set(batch) == {"input_ids", "attention_mask"}
    assert wrapped.batch_decode(batch["input_ids"], skip_special_tokens=True) == tokenizer.decode_batch(ids)


def test_two_texts_are_joined_as_in_xlm_r(tokenizer: TextTokenizer, wrapped: Any) -> None:
    first, second = tokenizer.encode("the red cat"), tokenizer.encode("a dog")
    assert wrapped("the red cat", "a dog")["input_ids"] == [*first, 2, *second[1:]]


def test_offsets_point_into_the_text_as_given(wrapped: Any) -> None:
    text = "  the" + wide(" cat") + "\ttree"
    offsets = wrapped(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    assert "".join(text[start:end] for start, end in offsets).split() == ["the", wide("cat"), "tree"]


def test_a_folder_of_another_kind_of_model_is_a_good_place(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """AutoTokenizer looks at `config.json`, whose model type it need not know; other files stay."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of-no-registered-kind", "task": None}))
    save_fast(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("the red cat")["input_ids"] == tokenizer.encode("the red cat")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_documented_differences(tokenizer: TextTokenizer, fast: Tokenizer) -> None:
    text = "cat dog " * 2000
    assert fast.encode(text[:MAX_CHARS]).ids == tokenizer.encode(text)
    assert len(fast.encode(text).ids) > len(tokenizer.encode(text))
    assert fast.encode("cat </s> dog").ids == [0, *tokenizer.encode("cat")[1:], *tokenizer.encode("dog")[1:]]
    with pytest.raises(TypeError):
        fast.encode("cat \ud800")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"model_type": "char"}, "neither unigram nor BPE"),
        ({"byte_fallback": True, "vocab_size": 800}, "a meaning of their own"),
        ({"user_defined_symbols": ["<box>"]}, "a meaning of their own"),
        ({"treat_whitespace_as_suffix": True}, "word marks at the end"),
        ({"remove_extra_whitespaces": False}, "white space kept"),
        ({"add_dummy_prefix": False}, "no mark before the first word"),
    ],
)
def test_models_that_would_give_other_ids_are_refused(options: dict[str, object], fault: str, tmp_path: Path) -> None:
    tokenizer = trained(**{"vocab_size": 400, "character_coverage": 1.0, **options})
    with pytest.raises(ConfigError, match=fault) as caught:
        save_fast(tokenizer, tmp_path / "fast")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "fast").exists()
