"""Tokens of captions: what is split, what is dropped, what stays. (Agreement with Java: tests/parity.)"""

from __future__ import annotations

import pytest

from beit3.metrics.ptb_tokenizer import tokenize_captions


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man riding a horse.", "a man riding a horse"),
        ("Two dogs, one cat; and a bird!", "two dogs one cat and a bird"),
        ("The dog's ball isn't there", "the dog 's ball is n't there"),
        ('a sign that says "STOP"', "a sign that says stop"),
        ("a black-and-white T-shirt -- worn", "a black-and-white t-shirt worn"),
        ("a man (left) waves", "a man -lrb- left -rrb- waves"),  # coco-caption means to drop these, but does not
        ("they cannot and we're gonna", "they can not and we 're gon na"),
        ("at 5 p.m. in the U.S. near St. Paul", "at 5 p.m. in the u.s. near st. paul"),
        ("wow!! really?", "wow !! really"),
        ("1/2 cup & 50% of 1,000", "1/2 cup & 50 % of 1,000"),
        ("a caf\u00e9\u2019s \u201cmenu\u201d", "a caf\u00e9 's menu"),
        ("a dog \U0001f415 runs", "a dog runs"),
        ("so it's", "so it 's"),  # nothing behind the ending
        ("", ""),
        (" ... ", ""),
    ],
)
def test_tokens_of_captions(caption: str, tokens: str) -> None:
    assert tokenize_captions([caption]) == [tokens]


def test_each_caption_keeps_its_place() -> None:
    captions = ["A dog", "", "a\nline break", "...", "two\r\nlines", "The end."]
    assert tokenize_captions(captions) == ["a dog", "", "a line break", "", "two lines", "the end"]
    assert tokenize_captions([]) == []
