"""Packed batches: order, groups, and the way from padded texts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from beit3.model.packing import Group, Layout, PackedBatch, concat, pack_texts


def test_neighbours_of_equal_length_form_one_group() -> None:
    layout = Layout.build(4, 7, (5, 5, 2, 3, 3), 3)
    assert layout.groups == (
        Group(2, 7, 5, 0, 0),
        Group(1, 7, 2, 14, 10),
        Group(1, 7, 0, 21, 12),
        Group(2, 0, 3, 28, 12),
    )
    assert layout.pair_rows == (21, 12)
    assert layout.num_sequences == 6


def test_groups_cover_every_row_once() -> None:
    layout = Layout.build(5, 4, (3, 0, 0, 2, 2, 0, 1), 3)
    vision = [row for group in layout.groups for row in range(20)[group.vision_rows]]
    text = [row for group in layout.groups for row in range(8)[group.text_rows]]
    assert vision == list(range(20))
    assert text == list(range(8))


def test_the_two_halves_of_a_pair_carry_one_sequence_number() -> None:
    vision, text = Layout.build(3, 2, (1, 2, 3), 2).sequence_ids(torch.device("cpu"))
    assert vision.tolist() == [0, 0, 1, 1, 2, 2]
    assert text.tolist() == [0, 1, 1, 3, 3, 3]


def test_packing_takes_real_tokens_only_shortest_text_first() -> None:
    ids = torch.tensor([[10, 11, 12, 1], [20, 1, 1, 1], [30, 31, 32, 33]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    packed, positions, lengths, order = pack_texts(ids, mask)
    assert packed.tolist() == [20, 10, 11, 12, 30, 31, 32, 33]
    assert positions.tolist() == [0, 0, 1, 2, 0, 1, 2, 3]
    assert lengths == (1, 3, 4)
    assert order.tolist() == [1, 0, 2]


def test_more_pairs_than_images_or_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_pairs is 2, but there are 1 images and 3 texts"):
        PackedBatch(images=torch.zeros(1, 3, 4, 4), text_lengths=(1, 1, 1), num_pairs=2)


def test_joined_batches_keep_pairs_first(ragged: Callable[..., PackedBatch]) -> None:
    pairs, images, texts = ragged((2, 3), 2, ()), ragged((), 3, ()), ragged((), 0, (4, 1))
    joined = concat([pairs, images, texts])
    assert joined.num_pairs == 2
    assert joined.text_lengths == (2, 3, 4, 1)
    assert joined.images is not None
    assert joined.image_mask is not None
    assert pairs.images is not None
    assert images.images is not None
    assert torch.equal(joined.images, torch.cat([pairs.images, images.images]))
    assert len(joined.image_mask) == 5


def test_joining_refuses_pairs_after_lone_sequences_and_half_masked_batches(ragged: Callable[..., PackedBatch]) -> None:
    pairs, images = ragged((2,), 1, ()), ragged((), 1, ())
    mixed = concat([pairs, images])
    assert concat([mixed, images]).num_pairs == 1
    for batches in ([images, pairs], [mixed, pairs]):
        with pytest.raises(ValueError, match="pairs first"):
            concat(batches)
    with pytest.raises(ValueError, match="image_mask or none"):
        concat([images, PackedBatch(images=images.images)])


def test_moving_a_batch_keeps_its_numbers(batch: PackedBatch) -> None:
    moved = batch.to(torch.device("meta"))
    assert moved.images is not None
    assert moved.images.device.type == "meta"
    assert moved.text_lengths == batch.text_lengths
    assert moved.num_pairs == batch.num_pairs
