"""COCO's compressed run lengths of masks, read without the library that draws them.

The library trusts such strings: runs that do not fill the picture make its overlaps loop for ever.

Source: the mask API of COCO's evaluation code (`rleFrString`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FIRST, _LAST = 48, 111
"""Characters hold six bits each, from "0" on."""
_MORE, _SIGN, _BITS = 0x20, 0x10, 0x1F
_LONGEST = 35
"""Bits of a length; a picture has fewer pixels."""


def read_run_lengths(counts: str | bytes) -> list[int]:
    """Lengths of the runs outside and inside a mask, in turn, as a string of COCO's holds them.

    From the fourth on, each is stored as its difference to the last but one, in groups of five bits, lowest first.

    Raises:
        ValueError: it is no such string, or a run is negative.
    """
    codes = counts.encode("ascii") if isinstance(counts, str) else counts  # a UnicodeError is a ValueError
    if codes and (min(codes) < _FIRST or max(codes) > _LAST):
        raise ValueError("a character that no run length has")
    runs: list[int] = []
    value = shift = 0
    for code in codes:
        group = code - _FIRST
        value |= (group & _BITS) << shift
        shift += 5
        if group & _MORE:
            if shift > _LONGEST:
                raise ValueError("a run longer than any picture")
            continue
        if group & _SIGN:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if value < 0:
            raise ValueError("a negative run")
        runs.append(value)
        value = shift = 0
    if shift:
        raise ValueError("the last run is cut off")
    return runs


def check_run_lengths(rle: Mapping[str, Any], height: int, width: int) -> None:
    """Refuse a mask as `size` and `counts` whose runs do not fill a picture: a list, or a string of COCO's.

    Raises:
        ValueError: it says why.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise ValueError(f"an RLE of size {size} in a picture of {[height, width]}")
    if isinstance(counts, (str, bytes)):
        counts = read_run_lengths(counts)
    elif not isinstance(counts, list):
        raise ValueError("the counts are neither a list nor a string")
    if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != height * width:
        raise ValueError("the runs do not fill the picture")
