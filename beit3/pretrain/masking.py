"""What is hidden from the model: blocks of patches, words of texts.

Shapes: (h, w) grid of N = h w patches; n ids of a text, `<s>` and `</s>` included.
All random numbers come from numpy's and python's global generators, which the data streams seed.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from beit3.config import config, require
from beit3.model.presets import UNK
from beit3.tokenizer.text import TextTokenizer

_TRIES = 10
_SMALLEST_ASPECT = 0.3


@config
class MaskConfig:
    """How much is hidden (BEiT-3, section 3: 40% of patches, 15% of words alone, 50% of words in pairs)."""

    patches: float = 0.4
    """Share of an image's patches, hidden in blocks."""
    smallest_block: int | None = None
    """Fewest patches of a block; None: 16 of 196, in proportion."""
    words: float = 0.15
    """Share of a text's words when it stands alone."""
    pair_words: float = 0.5
    """Share of a text's words when its image stands beside it."""
    keep: float = 0.1
    """Share of the hidden words that are shown all the same (BERT)."""
    replace: float = 0.1
    """Share of the hidden words that are replaced by a random word (BERT)."""

    def __post_init__(self) -> None:
        for name in ("patches", "words", "pair_words"):
            value = getattr(self, name)
            require(0 < value <= 1, f"mask.{name} must lie in 0..1 and hide something, not {value}")
        require(self.keep >= 0 and self.replace >= 0 and self.keep + self.replace <= 1, "mask.keep + mask.replace > 1")

    def num_patches(self, grid: tuple[int, int]) -> int:
        """Patches hidden in every image: round(share N), at least one."""
        return max(1, round(self.patches * grid[0] * grid[1]))


def block_mask(grid: tuple[int, int], count: int, smallest: int | None = None) -> npt.NDArray[np.bool_]:
    """Hide exactly `count` patches in rectangular blocks (BEiT, arXiv 2106.08254, algorithm 1).

    Blocks have at least `smallest` patches and an aspect ratio within 0.3 .. 1/0.3; ten tries each. What blocks leave
    missing or exceed is evened out at random, as in BEiT v2.

    Args:
        grid: rows and columns of patches.
        count: patches hidden.
        smallest: fewest patches of a block; None: 16 of 196, in proportion.

    Returns:
        (h, w) bool, True = hidden.
    """
    height, width = grid
    if not 0 <= count <= height * width:
        raise ValueError(f"cannot hide {count} of {height * width} patches")
    smallest = smallest or max(1, round(16 * height * width / 196))
    mask = np.zeros(grid, dtype=np.bool_)
    hidden = 0
    while hidden < count and _add_block(mask, count - hidden, min(smallest, count)):
        hidden = int(mask.sum())
    if hidden != count:
        candidates = np.flatnonzero(mask if hidden > count else ~mask)
        mask.flat[np.random.permutation(candidates)[: abs(count - hidden)]] = hidden < count
    return mask


def _add_block(mask: npt.NDArray[np.bool_], most: int, smallest: int) -> bool:
    """Try to hide one more block with at most `most` new patches."""
    height, width = mask.shape
    for _ in range(_TRIES):
        area = random.uniform(smallest, max(smallest, most))
        aspect = math.exp(random.uniform(math.log(_SMALLEST_ASPECT), -math.log(_SMALLEST_ASPECT)))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < rows <= height and 0 < columns <= width):
            continue
        top, left = random.randint(0, height - rows), random.randint(0, width - columns)
        block = mask[top : top + rows, left : left + columns]
        fresh = rows * columns - int(block.sum())
        if 0 < fresh <= most:
            block[:] = True
            return True
    return False


@dataclass(frozen=True, slots=True)
class MaskedText:
    """A text with hidden words."""

    ids: list[int]
    """What the model sees, n ids."""
    places: list[int]
    """Where words are hidden."""
    targets: list[int]
    """The hidden words."""


def mask_text(ids: list[int], share: float, tokenizer: TextTokenizer, masks: MaskConfig) -> MaskedText:
    """Hide a share of a text's words, at least one; `<s>` and `</s>` stay.

    Args:
        ids: `<s>` words `</s>`.
        share: of the words.
        tokenizer: gives `<mask>` and the range of random words.
        masks: how many hidden words are shown or replaced instead.
    """
    words = len(ids) - 2
    if words < 1:
        return MaskedText(list(ids), [], [])
    count = min(words, max(1, round(share * words)))
    places = sorted(random.sample(range(1, words + 1), count))
    seen = list(ids)
    for place in places:
        draw = random.random()
        if draw < 1 - masks.keep - masks.replace:
            seen[place] = tokenizer.mask_id
        elif draw < 1 - masks.keep:
            seen[place] = random.randrange(UNK + 1, tokenizer.mask_id)
    return MaskedText(seen, places, [ids[place] for place in places])
