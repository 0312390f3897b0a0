"""Captions come out as clean text or are refused with a reason."""

from __future__ import annotations

import pytest

from beit3.data.texts import MAX_CAPTION_CHARS, clean_text
from beit3.errors import BadSampleError
from beit3.model.presets import BOS, EOS, PAD
from beit3.tokenizer.text import TextTokenizer
from tests.conftest import Workspace


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("  a\tdog \n runs ", "a dog runs"),
        (b"caf\xc3\xa9", "caf\u00e9"),
        (b"bad \xff byte", "bad \ufffd byte"),
        ("nul\0 inside", "nul inside"),
        ("lone \ud800surrogate", "lone surrogate"),
        ("\U0001f338 \u05d0\u05d1 </s> [MASK]", "\U0001f338 \u05d0\u05d1 </s> [MASK]"),
    ],
)
def test_text_is_cleaned(value: object, expected: str) -> None:
    assert clean_text(value) == expected


@pytest.mark.parametrize("length", [100_000, 1_000_000])
def test_endless_captions_are_cut(length: int) -> None:
    assert clean_text("ab " * (length // 3)) == ("ab " * 3000)[:MAX_CAPTION_CHARS].rstrip()


@pytest.mark.parametrize(
    ("value", "reason"),
    [("", "empty_caption"), (" \n\t", "empty_caption"), (b"\0", "empty_caption"), ("\ud800", "empty_caption"),
     (None, "missing_caption"), (7, "not_text"), (["a"], "not_text")],
)  # fmt: skip
def test_what_is_no_caption_is_refused(value: object, reason: str) -> None:
    with pytest.raises(BadSampleError) as caught:
        clean_text(value)
    assert caught.value.reason == reason


ODD = {
    "emoji": "\U0001f338\U0001f468\u200d\U0001f469\u200d\U0001f467 flower",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "marks on marks": "z" + "\u0301\u0316" * 500 + "algo",
    "control tokens": "</s> <s> <pad> [MASK] <mask> <unk>",
    "invalid UTF-8": b"\xff\xfe\x80 a \xc3",
    "NUL": "a\0b",
    "lone surrogate": "a \ud83d b",
    "100,000 characters": "word " * 20_000,
    "1,000,000 characters": "w" * 1_000_000,
    "direction marks": "\u202e a \u2066",
    "private and unassigned": "\ue000 \U0010ffff \ufffe",
}


@pytest.mark.parametrize("kind", ODD)
def test_captions_of_every_kind_become_ids_that_no_text_can_forge(workspace: Workspace, kind: str) -> None:
    tokenizer = TextTokenizer.load(workspace.text_tokenizer)
    ids = tokenizer.encode(clean_text(ODD[kind]), 64)
    assert 3 <= len(ids) <= 64
    assert (ids[0], ids[-1]) == (BOS, EOS)
    assert not {BOS, PAD, EOS, tokenizer.mask_id} & set(ids[1:-1])
    assert max(ids) < len(tokenizer)
    assert tokenizer.encode(clean_text(ODD[kind]), 64) == ids
