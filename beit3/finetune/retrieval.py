"""Image-text retrieval by a dual encoder (BEiT-3 on COCO and Flickr30k).

Shapes: B pairs of this rank, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from beit3.config import config
from beit3.data.index_files import Index, RetrievalRow, encode_text, read_index, read_picture
from beit3.finetune.common import Predictions, TextBatch, TextFinetuneConfig, TextFinetuneTask, pad_texts
from beit3.metrics.retrieval import feature_ranks, recall_of_ranks
from beit3.model.heads import RetrievalModel
from beit3.model.memory import BatchSizes
from beit3.model.packing import Layout, PackedBatch, pack_texts
from beit3.pretrain.contrastive_loss import contrastive_loss
from beit3.tokenizer.text import TextTokenizer

_NEAREST = 10
"""Candidates of each query that are written down."""
_ROWS = 1024
"""Queries compared with all candidates at once."""


@config
class RetrievalConfig(TextFinetuneConfig):
    """What counts as a negative."""

    same_image_is_negative: bool = False
    """Whether other captions of the same picture are negatives, as in the released code."""

    @property
    def sizes(self) -> BatchSizes:
        """A batch: pictures and texts apart."""
        pairs = self.pairs
        apart = (dataclasses.replace(pairs, text=0), dataclasses.replace(pairs, vision=0))
        sizes = self.sizes_with(RetrievalModel, apart)
        return dataclasses.replace(sizes, gathered=2 * self.batch_size * self.model.width)

    def build(self) -> Retrieval:
        """Build the Task, with random or given weights."""
        return Retrieval(self)


@dataclass(frozen=True, slots=True)
class RetrievalBatch(TextBatch):
    """Pictures and texts, encoded apart; in training text i belongs to picture i."""

    image_ids: Tensor
    """(pictures,) int64"""
    texts_of: Tensor
    """(texts,) int64, the picture that each text belongs to"""
    captions: tuple[str, ...]
    """The texts to read, in evaluation; empty ones in training."""


@dataclass(frozen=True, slots=True)
class _Example:
    image_id: int
    image: Tensor | None
    ids: list[int]
    """Empty: a picture alone."""
    caption: str = ""
    """The text to read, in evaluation."""


class _Pairs:
    """Pictures with a text each, to train on."""

    def __init__(
        self,
        index: Index[RetrievalRow],
        view: Callable[[Image.Image], Tensor],
        tokenizer: TextTokenizer,
        max_length: int,
    ) -> None:
        self.index = index
        self._view = view
        self._tokenizer = tokenizer
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int) -> _Example:
        """Read and prepare one example."""
        row = self.index[index]
        return _Example(row.image_id, self._image(row), self._ids(row))

    def _image(self, row: RetrievalRow) -> Tensor:
        return self._view(read_picture(row.image_path))

    def _ids(self, row: RetrievalRow) -> list[int]:
        return encode_text(row.text, self._tokenizer, self._max_length)

    def collate(self, examples: list[_Example]) -> RetrievalBatch:
        """Lay examples side by side."""
        pictures = [example for example in examples if example.image is not None]
        texts = [example for example in examples if example.ids]
        ids, mask = pad_texts([example.ids for example in texts])
        images = [example.image for example in pictures if example.image is not None]
        return RetrievalBatch(
            torch.stack(images) if images else torch.empty(0),
            ids,
            mask,
            torch.tensor([example.image_id for example in pictures], dtype=torch.int64),
            torch.tensor([example.image_id for example in texts], dtype=torch.int64),
            tuple(example.caption for example in texts),
        )


class _Apart(_Pairs):
    """Every picture once, then every text: each is encoded once, however many texts a picture has."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        first: dict[int, int] = {}
        for number, row in enumerate(self.index):
            first.setdefault(row.image_id, number)
        self._first = list(first.values())

    def __len__(self) -> int:
        return len(self._first) + len(self.index)

    def load(self, index: int) -> _Example:
        """Read and prepare one example."""
        if index < len(self._first):
            row = self.index[self._first[index]]
            return _Example(row.image_id, self._image(row), [])
        row = self.index[index - len(self._first)]
        caption = row.text if isinstance(row.text, str) else self._tokenizer.decode(row.text)
        return _Example(row.image_id, None, self._ids(row), caption)


class Retrieval(TextFinetuneTask[RetrievalConfig, RetrievalBatch]):
    """Bring pictures and their texts together, in one space."""

    kind = RetrievalModel

    def __init__(self, config: RetrievalConfig, model: RetrievalModel | None = None) -> None:
        super().__init__(config, model)
        self.model.backbone.freeze_unreached(images=True, texts=True, pairs=False)

    def examples(self, paths: Sequence[Path], *, training: bool) -> _Pairs:
        """Pairs of index files to train on; pictures and texts apart for evaluation."""
        index = read_index(paths, RetrievalRow)
        kind, view = (_Pairs, self.training_view) if training else (_Apart, self.preprocess)
        return kind(index, view, self.text_tokenizer, self.config.max_text_length)

    def forward(self, batch: RetrievalBatch) -> dict[str, Tensor]:
        """Symmetric cross-entropy over the pairs of all ranks."""
        packed, order = self._pack(batch)
        assert packed.images is not None
        images, texts = self.model(dataclasses.replace(packed, images=packed.images[order]))
        labels = None if self.config.same_image_is_negative else batch.image_ids[order]
        return contrastive_loss(images, texts, labels, self.model.logit_scale)

    def layout(self, batch: RetrievalBatch) -> Layout:
        """Pictures and texts apart."""
        return Layout.build(len(batch.images), 1 + self.config.model.num_patches, batch.lengths, 0)

    def predict(self, batch: RetrievalBatch) -> Predictions:
        """Vectors of pictures and of texts."""
        packed, order = self._pack(batch)
        images = texts = torch.empty(0)
        if not len(batch.texts_of):
            images = self.model.encode_image(packed.images)
        elif not len(batch.images):
            texts = self.model.encode_text(batch.text_ids, batch.text_mask)
        else:
            images, texts = self.model(packed)
            texts = texts[order.argsort()]
        pictures: Predictions = [
            {"image_id": number, "image": vector}
            for number, vector in zip(batch.image_ids.tolist(), images.float().cpu(), strict=True)
        ]
        return pictures + [
            {"image_id": number, "caption": caption, "text": vector}
            for number, caption, vector in zip(
                batch.texts_of.tolist(), batch.captions, texts.float().cpu(), strict=True
            )
        ]

    def measure(self, predictions: Predictions) -> dict[str, float]:
        """Recall at 1, 5 and 10 both ways, among all pictures and texts."""
        images, owners = _column(predictions, "image")
        texts, texts_of = _column(predictions, "text")
        to_text = recall_of_ranks(feature_ranks(images, owners, texts, texts_of))
        to_image = recall_of_ranks(feature_ranks(texts, texts_of, images, owners))
        metrics = {f"image_to_text_{name}": value for name, value in to_text.items()}
        return metrics | {f"text_to_image_{name}": value for name, value in to_image.items()}

    def readable(self, predictions: Predictions) -> Iterator[dict[str, Any]]:
        """What each picture finds, then what each text finds: wrong candidates before the right one, the ten nearest.

        A rank is 0 where the right one comes first, and counted as for `measure`; scores are cosines.
        """
        images, owners = _column(predictions, "image")
        texts, texts_of = _column(predictions, "text")
        captions = [row["caption"] for row in predictions if "text" in row]
        pictures, numbers = owners.tolist(), texts_of.tolist()
        ranks = feature_ranks(images, owners, texts, texts_of).tolist()
        for number, rank, found in zip(pictures, ranks, _nearest(images, texts), strict=True):
            near = [{"image_id": numbers[at], "caption": captions[at], "score": score} for at, score in found]
            yield {"image_id": number, "rank": rank, "texts": near}
        ranks = feature_ranks(texts, texts_of, images, owners).tolist()
        for number, caption, rank, found in zip(numbers, captions, ranks, _nearest(texts, images), strict=True):
            near = [{"image_id": pictures[at], "score": score} for at, score in found]
            yield {"image_id": number, "caption": caption, "rank": rank, "images": near}

    def _pack(self, batch: RetrievalBatch) -> tuple[PackedBatch, Tensor]:
        """Pictures and texts as separate sequences, texts shortest first, and the order of the texts."""
        ids, positions, lengths, order = pack_texts(batch.text_ids, batch.text_mask)
        images = self.pixels(batch) if len(batch.images) else None
        return PackedBatch(images=images, text_ids=ids, text_positions=positions, text_lengths=lengths), order


def _nearest(queries: Tensor, candidates: Tensor) -> Iterator[list[tuple[int, float]]]:
    """Place and score of the candidates nearest to each query, best first; a share of the queries at a time."""
    count = min(_NEAREST, len(candidates))
    for rows in queries.split(_ROWS):
        scores, places = (rows @ candidates.T).topk(count)
        for found, values in zip(places.tolist(), scores.tolist(), strict=True):
            yield [(place, round(value, 4)) for place, value in zip(found, values, strict=True)]


def _column(predictions: Predictions, name: str) -> tuple[Tensor, Tensor]:
    """Vectors of one kind, and the picture that each belongs to."""
    rows = [row for row in predictions if name in row]
    return torch.stack([row[name] for row in rows]), torch.tensor([row["image_id"] for row in rows])
