"""Units of several data workers joined to a batch: the batch of one worker, but for the order of its sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3.data.shards import Sample
from beit3.data.transforms import CropConfig, EvalResize, RandomCrop
from beit3.pretrain.contrastive import Contrastive
from beit3.pretrain.image_tokenizer import CropEncoder
from beit3.pretrain.masked_batches import IGNORE, Kind, MaskedBatch, join_batches
from beit3.pretrain.masked_data_modeling import MaskedDataModeling
from beit3.pretrain.pairs import PairEncoder
from beit3.pretrain.superclass import WordsEncoder, split_words
from beit3.tokenizer.subwords import Subwords

Parts = tuple[Any, ...]


def split(values: Tensor | None, lengths: tuple[int, ...]) -> list[list[int]]:
    return [] if values is None else [part.tolist() for part in values.split(list(lengths))]


def contents(batch: MaskedBatch) -> list[Parts]:
    """Every sequence: its picture, what is hidden of it, its ids, and the words hidden among them."""
    packed = batch.packed
    images = [] if packed.images is None else [image.numpy().tobytes() for image in packed.images]
    seconds = [] if batch.tokenizer_images is None else [image.numpy().tobytes() for image in batch.tokenizer_images]
    masks = [] if packed.image_mask is None else packed.image_mask.tolist()
    hidden: dict[int, list[int]] = {}
    for row in batch.patch_rows.tolist():
        image, place = divmod(row, packed.image_mask.shape[1] + 1 if packed.image_mask is not None else 1)
        hidden.setdefault(image, []).append(place - 1)
    words: dict[int, int] = {
        row: word for row, word in zip(batch.word_rows.tolist(), batch.words.tolist(), strict=True) if word != IGNORE
    }
    ids, positions = split(packed.text_ids, packed.text_lengths), split(packed.text_positions, packed.text_lengths)
    starts = [sum(packed.text_lengths[:place]) for place in range(len(ids))]
    own = [[(row - start, word) for row, word in words.items() if start <= row < start + len(text)]
           for start, text in zip(starts, ids, strict=True)]  # fmt: skip
    found: list[Parts] = []
    for place in range(max(len(images), len(ids))):
        found.append(tuple(str(part[place]) for part in (images, seconds, masks, ids, positions, own) if part))
        assert not images or hidden[place] == [n for n, masked in enumerate(masks[place]) if masked]
    return sorted(found)


@pytest.mark.parametrize("kind", ["pairs", "images", "texts"])
@pytest.mark.parametrize("sizes", [(4, 4), (2, 5, 1)])
def test_masked_units_join_to_the_batch_of_their_samples(
    build_mdm: Callable[..., MaskedDataModeling], samples: list[Sample], kind: Kind, sizes: tuple[int, ...]
) -> None:
    task = build_mdm(**{"crop": CropConfig(size=48, tokenizer_size=48)})
    encoder = task.encoder(kind, RandomCrop(task.config.crop))
    encoded = [encoder.encode(sample) for sample in samples[: sum(sizes)]]
    whole = encoder.collate(encoded)
    units = [encoder.collate(encoded[sum(sizes[:n]) : sum(sizes[: n + 1])]) for n in range(len(sizes))]
    joined = encoder.join(units)
    assert contents(joined) == contents(whole)
    assert (joined.packed.num_pairs, joined.hidden_words) == (whole.packed.num_pairs, whole.hidden_words)
    assert bool(joined.pair_words) == (kind == "pairs")
    for name, value in task(whole).items():
        torch.testing.assert_close(task(joined)[name], value, rtol=1e-5, atol=1e-6)


def test_joined_units_of_several_streams_join_again(
    build_mdm: Callable[..., MaskedDataModeling], samples: list[Sample]
) -> None:
    task = build_mdm()
    kinds: tuple[Kind, ...] = ("pairs", "images", "texts")
    streams: list[tuple[MaskedBatch, MaskedBatch]] = []
    for kind in kinds:
        encoder = task.encoder(kind, RandomCrop(task.config.crop))
        encoded = [encoder.encode(sample) for sample in samples[:6]]
        streams.append((encoder.collate(encoded), encoder.join([encoder.collate(encoded[n::3]) for n in range(3)])))
    whole, joined = (join_batches([batches[place] for batches in streams]) for place in (0, 1))
    for name, value in task(whole).items():
        torch.testing.assert_close(task(joined)[name], value, rtol=1e-5, atol=1e-6)


def test_units_of_pairs_join_with_their_captions(
    build_contrastive: Callable[..., Contrastive], samples: list[Sample]
) -> None:
    task = build_contrastive()
    encoder = PairEncoder(task.config, task.text_tokenizer, EvalResize(48), training=True)
    encoded = [encoder.encode(sample) for sample in samples[:9]]
    whole, joined = encoder.collate(encoded), encoder.join([encoder.collate(encoded[n::3]) for n in range(3)])
    for name, value in task(whole).items():
        torch.testing.assert_close(task(joined)[name], value, rtol=1e-5, atol=1e-6)


def test_units_of_pairs_keep_the_patches_that_were_drawn(
    build_contrastive: Callable[..., Contrastive], samples: list[Sample]
) -> None:
    task = build_contrastive(keep_patches=0.5)
    encoder = PairEncoder(task.config, task.text_tokenizer, EvalResize(48), training=True)
    units = [encoder.collate([encoder.encode(sample) for sample in samples[n : n + 2]]) for n in (0, 2, 4)]
    kept = encoder.join(units).packed.kept_patches
    assert kept is not None
    assert torch.equal(kept, torch.cat([u.packed.kept_patches for u in units if u.packed.kept_patches is not None]))
    assert kept.shape == (6, 18)


def test_units_of_words_and_of_crops_lie_one_behind_the_other(
    build_contrastive: Callable[..., Contrastive], samples: list[Sample]
) -> None:
    words = WordsEncoder(Subwords(build_contrastive().text_tokenizer), EvalResize(48))
    encoded = [words.encode(sample) for sample in samples[:7]]
    whole, joined = words.collate(encoded), words.join([words.collate(encoded[:3]), words.collate(encoded[3:])])
    assert torch.equal(joined.images, whole.images)
    assert split_words(joined.words) == split_words(whole.words)
    for size in (None, 24):
        crops = CropEncoder(RandomCrop(CropConfig(size=48, tokenizer_size=size)))
        views = [crops.encode(sample) for sample in samples[:7]]
        apart, both = crops.collate(views), crops.join([crops.collate(views[:3]), crops.collate(views[3:])])
        assert torch.equal(both.images, apart.images)
        assert (both.teacher_images is None) == (size is None)
        assert size is None or torch.equal(getattr(both, "teacher_images"), getattr(apart, "teacher_images"))  # noqa: B009
