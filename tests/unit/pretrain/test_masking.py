"""Masks of patches lie in blocks and have exact counts; masks of words follow BERT's 80 / 10 / 10."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from beit3.errors import ConfigError
from beit3.model.presets import BOS, EOS, UNK
from beit3.pretrain.masking import MaskConfig, block_mask, mask_text
from beit3.tokenizer.text import TextTokenizer
from tests.conftest import Workspace

Mask = npt.NDArray[np.bool_]
GRIDS = [(1, 1), (1, 7), (2, 2), (3, 5), (6, 6), (14, 14), (16, 16), (7, 24), (30, 30)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.75, 1.0])
def test_exactly_as_many_patches_are_hidden_as_asked(grid: tuple[int, int], share: float) -> None:
    count = round(share * grid[0] * grid[1])
    for _ in range(10):
        mask = block_mask(grid, count)
        assert mask.shape == grid
        assert mask.dtype == np.bool_
        assert int(mask.sum()) == count


@pytest.mark.parametrize("count", [-1, 37])
def test_more_patches_than_there_are_cannot_be_hidden(count: int) -> None:
    with pytest.raises(ValueError, match="cannot hide"):
        block_mask((6, 6), count)


@pytest.mark.parametrize(
    ("share", "grid", "count"), [(0.4, (14, 14), 78), (0.4, (6, 6), 14), (0.4, (1, 1), 1), (0.01, (6, 6), 1)]
)
def test_the_count_is_the_rounded_share_and_at_least_one(share: float, grid: tuple[int, int], count: int) -> None:
    assert MaskConfig(patches=share).num_patches(grid) == count


def hidden_neighbours(mask: Mask) -> float:
    """Mean number of hidden patches above, below, left and right of a hidden one."""
    height, width = mask.shape
    total = 0
    for row, column in zip(*np.nonzero(mask), strict=True):
        for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            y, x = row + down, column + right
            total += int(0 <= y < height and 0 <= x < width and mask[y, x])
    return total / int(mask.sum())


@pytest.mark.parametrize(("grid", "count"), [((14, 14), 78), ((16, 16), 102), ((6, 6), 14)])
def test_hidden_patches_form_blocks_and_are_not_scattered(grid: tuple[int, int], count: int) -> None:
    blocks = np.mean([hidden_neighbours(block_mask(grid, count)) for _ in range(100)])
    scattered = []
    for _ in range(100):
        mask = np.zeros(grid, dtype=np.bool_)
        mask.flat[np.random.permutation(mask.size)[:count]] = True
        scattered.append(hidden_neighbours(mask))
    assert blocks > 1.5 * np.mean(scattered)


def largest_piece(mask: Mask) -> int:
    """Patches of the largest connected part."""
    todo = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    best = 0
    while todo:
        front, size = [todo.pop()], 0
        while front:
            y, x = front.pop()
            size += 1
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & todo
            todo -= near
            front += near
        best = max(best, size)
    return best


def test_no_block_is_smaller_than_the_smallest() -> None:
    """With as many patches as the smallest block has, one block takes (nearly) all of them."""
    large = [largest_piece(block_mask((14, 14), 16, smallest=16)) for _ in range(200)]
    small = [largest_piece(block_mask((14, 14), 16, smallest=1)) for _ in range(200)]
    assert np.mean(large) > 14
    assert np.mean(small) < np.mean(large) - 2


@pytest.mark.parametrize(("grid", "smallest"), [((14, 14), 16), ((16, 16), 21), ((6, 6), 3), ((2, 2), 1)])
def test_the_smallest_block_is_16_of_196_in_proportion(grid: tuple[int, int], smallest: int) -> None:
    def draw(value: int | None) -> list[Mask]:
        random.seed(1)
        np.random.seed(1)
        return [block_mask(grid, round(0.4 * grid[0] * grid[1]), value) for _ in range(20)]

    assert all(np.array_equal(a, b) for a, b in zip(draw(None), draw(smallest), strict=True))


def test_every_patch_is_hidden_now_and_then() -> None:
    hidden = np.mean([block_mask((6, 6), 14) for _ in range(600)], axis=0)
    assert hidden.min() > 0.1
    assert abs(hidden.mean() - 14 / 36) < 1e-9


def test_the_same_generators_give_the_same_masks() -> None:
    def draw() -> list[Mask]:
        random.seed(3)
        np.random.seed(3)
        return [block_mask((14, 14), 78) for _ in range(5)]

    assert all(np.array_equal(a, b) for a, b in zip(draw(), draw(), strict=True))


@pytest.fixture(scope="module")
def tokenizer(workspace: Workspace) -> TextTokenizer:
    return TextTokenizer.load(workspace.text_tokenizer)


def a_text(words: int) -> list[int]:
    return [BOS, *range(10, 10 + words), EOS]


@pytest.mark.parametrize("words", [1, 2, 5, 6, 7, 13, 60])
@pytest.mark.parametrize("share", [0.01, 0.15, 0.5, 1.0])
def test_the_share_of_words_is_hidden_and_at_least_one(tokenizer: TextTokenizer, words: int, share: float) -> None:
    ids = a_text(words)
    for _ in range(20):
        masked = mask_text(ids, share, tokenizer, MaskConfig())
        assert len(masked.places) == len(set(masked.places)) == max(1, round(share * words))
        assert masked.places == sorted(masked.places)
        assert masked.targets == [ids[place] for place in masked.places]
        assert 0 not in masked.places
        assert len(ids) - 1 not in masked.places
        shown = [i for i in range(len(ids)) if i not in masked.places]
        assert [masked.ids[i] for i in shown] == [ids[i] for i in shown]
    assert ids == a_text(words), "the input is left alone"


def test_a_text_without_words_has_no_targets(tokenizer: TextTokenizer) -> None:
    masked = mask_text([BOS, EOS], 0.5, tokenizer, MaskConfig())
    assert (masked.ids, masked.places, masked.targets) == ([BOS, EOS], [], [])


def test_eighty_ten_ten(tokenizer: TextTokenizer) -> None:
    """Of 20,000 hidden words 80% become <mask>, 10% a random word, 10% stay; three standard errors are below 1%."""
    kinds: Counter[str] = Counter()
    replaced: Counter[int] = Counter()
    for _ in range(400):
        ids = a_text(100)
        masked = mask_text(ids, 0.5, tokenizer, MaskConfig())
        for place, target in zip(masked.places, masked.targets, strict=True):
            seen = masked.ids[place]
            kind = "mask" if seen == tokenizer.mask_id else "keep" if seen == target else "random"
            kinds[kind] += 1
            if kind == "random":
                replaced[seen] += 1
    total = sum(kinds.values())
    assert total == 20_000
    assert kinds["mask"] / total == pytest.approx(0.8, abs=0.01)
    assert kinds["random"] / total == pytest.approx(0.1, abs=0.01)
    assert kinds["keep"] / total == pytest.approx(0.1, abs=0.01)
    assert min(replaced) > UNK
    assert max(replaced) < tokenizer.mask_id
    assert len(replaced) > 0.9 * (tokenizer.mask_id - UNK - 1), "all words take part"


def test_all_places_are_equally_likely(tokenizer: TextTokenizer) -> None:
    counts: Counter[int] = Counter()
    for _ in range(4000):
        counts.update(mask_text(a_text(5), 0.2, tokenizer, MaskConfig()).places)
    assert set(counts) == {1, 2, 3, 4, 5}
    assert max(counts.values()) < 1.2 * min(counts.values())


@pytest.mark.parametrize(
    "wrong", [{"patches": 0.0}, {"words": 1.5}, {"pair_words": -0.1}, {"keep": 0.6, "replace": 0.6}, {"keep": -0.1}]
)
def test_shares_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"mask\."):
        MaskConfig(**wrong)  # type: ignore[arg-type]
