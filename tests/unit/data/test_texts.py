"""Captions come out as clean text or are refused with a reason."""

from __future__ import annotations

import pytest

from beit3.data.texts import MAX_CAPTION_CHARS, clean_text
from beit3.errors import BadSampleError


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
     (None, "not_text"), (7, "not_text"), (["a"], "not_text")],
)  # fmt: skip
def test_what_is_no_caption_is_refused(value: object, reason: str) -> None:
    with pytest.raises(BadSampleError) as caught:
        clean_text(value)
    assert caught.value.reason == reason
