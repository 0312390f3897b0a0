"""Captions into words as the published caption metrics see them, without Java.

Those metrics run Stanford's Penn Treebank tokenizer and drop punctuation. Here are the conventions of the Treebank that
captions meet: contractions and possessives are words of their own ("is n't", "dog 's"), brackets have names,
abbreviations keep their full stops, hyphens join. Written from what the program answers, not from its source. Ordinary
captions give the same words (tests/parity), rare writing such as addresses, slang or amounts of money need not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_DROPPED = frozenset("'\"`.?!,:;-‘’“”«»‹›…–—")  # noqa: RUF001 - quotes and dashes as captions hold them
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPLIT = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "lemme": "lem me",
}
_CLITIC = r"(?:['’](?:s|re|ve|ll|d|m)|n['’]t)(?![^\W_])"  # noqa: RUF001
_LETTERS = rf"(?:(?!{_CLITIC})[^\W_])+"
_ABBREVIATED = "mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|co|corp|ltd|ave|blvd|rd|mt|ft|jan|feb|aug|sept|oct|nov|dec"
_TOKEN = re.compile(
    rf"""
    (?P<smiley> [:;=]-?[()] )
  | (?P<clitic> {_CLITIC} )
  | (?P<word> (?:[^\W\d_]\.){{2,}}                       # u.s., a.m.
            | (?:{_ABBREVIATED})\.(?!\w)
            | no\.(?=\s\d)
            | (?-i:[A-Z]\.(?=\s[A-Z]))                   # an initial
            | \d+(?:[.,:/]\d+)+(?![^\W_])                # 1,000, 1/2, 5:30
            | {_LETTERS}(?:(?!{_CLITIC})[-&._'’](?=[^\W_]){_LETTERS})* )
  | (?P<run> \.{{2,}} | -{{2,}} )
  | (?P<shout> [!?]{{2,}} )
  | (?P<mark> \S )
    """,  # noqa: RUF001
    re.VERBOSE | re.IGNORECASE,
)


def tokenize_captions(captions: Sequence[str]) -> list[str]:
    """Split captions into words without punctuation, in lower case.

    Returns:
        each caption's words, joined by one space.
    """
    return [" ".join(_words(caption)) for caption in captions]


def _words(caption: str) -> list[str]:
    words: list[str] = []
    for match in _TOKEN.finditer(caption):
        token, kind = match[0].lower(), match.lastgroup
        if kind == "smiley":
            token = token[:-1] + _BRACKETS[token[-1]]
        elif kind == "clitic":
            token = token.replace("’", "'")  # noqa: RUF001
        elif kind == "mark":
            token = _BRACKETS.get(token, token) if token <= "\uffff" else "."  # emoji are dropped
        if kind != "run" and token not in _DROPPED:
            words += _SPLIT.get(token, token).split()
    return words
