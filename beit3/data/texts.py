"""Captions as found in public data, made safe for the tokenizer: bytes, control characters, endless lines."""

from __future__ import annotations

from beit3.errors import BadSampleError

MAX_CAPTION_CHARS = 8192
"""Characters kept of one text; longer ones are cut before the tokenizer sees them."""


def clean_text(value: object) -> str:
    """Turn a caption as stored into text that any tokenizer accepts.

    Invalid UTF-8 is replaced, NUL and lone surrogates are removed, runs of white space become one space, and what
    exceeds `MAX_CAPTION_CHARS` is cut.

    Args:
        value: the caption, `str` or UTF-8 `bytes`.

    Returns:
        At least one and at most `MAX_CAPTION_CHARS` characters.

    Raises:
        BadSampleError: `missing_caption` for None, `empty_caption` when nothing is left, `not_text` for other types.
    """
    if isinstance(value, bytes):
        text = value.decode("utf-8", errors="replace")
    elif isinstance(value, str):
        text = value.encode("utf-8", errors="ignore").decode("utf-8")
    elif value is None:
        raise BadSampleError("missing_caption")
    else:
        raise BadSampleError("not_text", f"a caption must be text, not {type(value).__name__}")
    text = " ".join(text.replace("\0", "").split())[:MAX_CAPTION_CHARS].rstrip()
    if not text:
        raise BadSampleError("empty_caption")
    return text
