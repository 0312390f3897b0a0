"""Pairs of images and texts, encoded apart: what contrastive training with one or two trained encoders shares.

Shapes: B pairs of this rank, N patches, D width of vectors, H, W height and width in pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from beit3.config import Run, TaskConfig, config, require
from beit3.data.example_loader import evaluation_batches
from beit3.data.images import decode_image
from beit3.data.labelled_pictures import LabelledBatch, LabelledPictures
from beit3.data.labels import read_labels
from beit3.data.preprocess import Preprocess
from beit3.data.prompts import PROMPTS, Prompts
from beit3.data.shards import Sample, load_prepared
from beit3.data.streams import Stream, StreamLoader
from beit3.data.texts import clean_text
from beit3.data.transforms import CropConfig, RandomCrop
from beit3.errors import BadSampleError
from beit3.metrics.retrieval import dual_recall
from beit3.metrics.zero_shot import class_vectors, zero_shot_accuracy
from beit3.model.heads import ContrastiveLoss, RetrievalModel
from beit3.model.packing import PackedBatch, concat
from beit3.pretrain.contrastive_loss import contrastive_loss, sigmoid_loss
from beit3.tokenizer.text import TextTokenizer
from beit3.train.task import Loader, Mapped, Task


@config
class ZeroShotConfig:
    """Pictures with classes that are told apart by the names of the classes."""

    index: str
    """Classification index file, relative to the run's data folder."""
    labels: Path
    """`labels.json` with the names of the classes."""
    prompts: Prompts = "imagenet"
    """Texts that the names are put into."""


@config
class PairConfig(TaskConfig):
    """Pairs, texts and loss of contrastive training."""

    text_tokenizer: Path
    """A `.spm` file."""
    pairs: Stream
    crop: CropConfig
    max_text_length: int = 64
    keyword_texts: float = 0.0
    """Probability that keywords of the sample's json (`keywords`) are appended to its caption."""
    loss: ContrastiveLoss = "clip"
    """`clip`: softmax over the batch; `siglip`: each image with each text is one yes or no."""
    equal_captions_are_negatives: bool = False
    """Whether an image and the equal caption of another pair are told apart, as in the papers."""
    eval_pairs: str | None = None
    """Prepared folder of pairs to evaluate on, relative to the run's data folder."""
    eval_batch_size: int = 256
    zero_shot: ZeroShotConfig | None = None
    """Zero-shot accuracy at every evaluation."""

    def __post_init__(self) -> None:
        require(not self.pairs.recorded, "contrastive training reads no codes: leave `codes` of the sources out")
        require(0 <= self.keyword_texts <= 1, f"keyword_texts is a probability, not {self.keyword_texts}")

    @property
    def patches(self) -> tuple[int, int] | None:
        """How many patches of each training image enter the model, and of how many; None: all."""
        return None


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Images and texts that belong together, as separate sequences of one packed batch."""

    packed: PackedBatch
    """Images are uint8 here; no sequence is paired: the encoder is dual."""
    captions: Tensor
    """(B,) int64, equal for equal captions."""

    def to(self, device: torch.device) -> PairBatch:
        """Copy to a device."""
        return PairBatch(self.packed.to(device), self.captions.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class _Encoded:
    image: Tensor
    ids: list[int]
    caption: int


class PairEncoder:
    """Turns samples into batches of images and texts."""

    def __init__(
        self, config: PairConfig, tokenizer: TextTokenizer, view: Callable[[Any], Tensor], training: bool
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._view = view
        self._training = training

    def encode(self, sample: Sample) -> _Encoded:
        """Decode, crop and tokenize one pair."""
        if sample.image is None:
            raise BadSampleError("missing_image", sample.key)
        image = self._view(decode_image(sample.image))
        text = caption = clean_text(sample.text)
        found = sample.meta.get("keywords")
        keywords: list[object] = found if isinstance(found, list) else []
        if self._training and keywords and random.random() < self._config.keyword_texts:
            chosen = random.sample(keywords, random.randint(1, len(keywords)))
            text = clean_text(f"{caption}: {', '.join(map(str, chosen))}")
        digest = hashlib.sha256(caption.encode()).digest()
        ids = self._tokenizer.encode(text, self._config.max_text_length)
        return _Encoded(image, ids, int.from_bytes(digest[:7], "big"))

    def collate(self, samples: list[_Encoded]) -> PairBatch:
        """Pack samples, shortest text first."""
        samples = sorted(samples, key=lambda sample: len(sample.ids))
        kept = None
        if self._training and self._config.patches is not None:
            count, total = self._config.patches
            kept = torch.rand(len(samples), total).argsort(dim=1)[:, :count].sort(dim=1).values
        packed = PackedBatch(
            images=torch.stack([sample.image for sample in samples]),
            kept_patches=kept,
            text_ids=torch.tensor([i for sample in samples for i in sample.ids], dtype=torch.int64),
            text_positions=torch.cat([torch.arange(len(sample.ids)) for sample in samples]),
            text_lengths=tuple(len(sample.ids) for sample in samples),
        )
        return PairBatch(packed, torch.tensor([sample.caption for sample in samples]))

    def join(self, units: list[PairBatch]) -> PairBatch:
        """Lay units one behind the other; each has its own texts shortest first."""
        kept = [unit.packed.kept_patches for unit in units if unit.packed.kept_patches is not None]
        packed = concat([unit.packed for unit in units])
        packed = dataclasses.replace(packed, kept_patches=torch.cat(kept) if kept else None)
        return PairBatch(packed, torch.cat([unit.captions for unit in units]))


C = TypeVar("C", bound=PairConfig)


class PairTask(Task[PairBatch], ABC, Generic[C]):
    """Bring images and their captions together, in one space.

    Args:
        config: pairs, texts and loss.
        preprocess: how pictures are normalised, and prepared for evaluation.
    """

    model: RetrievalModel

    def __init__(self, config: C, preprocess: Preprocess) -> None:
        super().__init__()
        self.config = config
        self.preprocess = preprocess
        self.text_tokenizer = TextTokenizer.load(config.text_tokenizer)
        self._names = [] if config.zero_shot is None else read_labels(config.zero_shot.labels)

    @abstractmethod
    def embed(self, packed: PackedBatch) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, D) of the images, which are normalised, and of the texts of a batch."""

    @abstractmethod
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B, 3, H, W), normalised."""

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Unit vectors (texts, D)."""
        device, longest = self.model.logit_scale.device, self.config.max_text_length
        parts = []
        for start in range(0, len(texts), self.config.eval_batch_size):
            part = texts[start : start + self.config.eval_batch_size]
            ids, mask = self.text_tokenizer.encode_batch(part, longest)
            parts.append(self.model.encode_text(ids.to(device), mask.to(device)).float())
        return torch.cat(parts)

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:
        """The loss over the pairs of all ranks."""
        images, texts = self.embed(self._normalized(batch.packed))
        model, labels = self.model, None if self.config.equal_captions_are_negatives else batch.captions
        if model.logit_bias is None:
            return contrastive_loss(images, texts, labels, model.logit_scale)
        return sigmoid_loss(images, texts, labels, model.logit_scale, model.logit_bias)

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[PairBatch]:
        """Endless batches of pairs."""
        crop = RandomCrop(self.config.crop)
        encoder = PairEncoder(self.config, self.text_tokenizer, lambda image: crop(image).image, training=True)
        loader = StreamLoader.for_run({"pairs": self.config.pairs}, {"pairs": encoder}, run, rank, world_size)
        return Mapped(loader, operator.itemgetter("pairs"))

    def move(self, batch: Any, device: torch.device) -> Any:
        """Copy a batch of pairs, or of pictures with classes, to the device."""
        return batch.to(device)

    def eval_loader(self, run: Run) -> Iterable[Any] | None:
        """Held-out pairs in order, then the pictures of the zero-shot measure (`LabelledBatch`)."""
        size, zero_shot = self.config.eval_batch_size, self.config.zero_shot
        parts: list[Iterable[Any]] = []
        if self.config.eval_pairs is not None:
            encoder = PairEncoder(self.config, self.text_tokenizer, self.preprocess, training=False)
            encoded = [encoder.encode(sample) for sample in load_prepared(run.data / self.config.eval_pairs)]
            parts.append([encoder.collate(encoded[start : start + size]) for start in range(0, len(encoded), size)])
        if zero_shot is not None:
            pictures = LabelledPictures(run.data / zero_shot.index, self.preprocess, num_classes=len(self._names))
            parts.append(evaluation_batches(pictures, pictures.collate, batch_size=size))
        return _Chain(parts) if parts else None

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """Recall at 1, 5, 10 in both directions over all pairs, and zero-shot accuracy of the first and first five."""
        images, texts, captions, features, labels = [], [], [], [], []
        for batch in loader:
            if isinstance(batch, LabelledBatch):
                features.append(self.embed_images(self.preprocess.normalize(batch.images)).float())
                labels.append(batch.labels)
                continue
            image, text = self.embed(self._normalized(batch.packed))
            images.append(image.float())
            texts.append(text.float())
            captions.append(batch.captions)
        classes = torch.empty(0)
        if self.config.zero_shot is not None and labels:
            classes = class_vectors(self.embed_texts, self._names, PROMPTS[self.config.zero_shot.prompts])
        metrics = dual_recall(torch.cat(images), torch.cat(texts), torch.cat(captions)) if captions else {}
        with torch.autocast(self.model.logit_scale.device.type, enabled=False):  # as in `dual_recall`
            return metrics | (zero_shot_accuracy(torch.cat(features), classes, torch.cat(labels)) if labels else {})

    def _normalized(self, packed: PackedBatch) -> PackedBatch:
        """The batch with its pictures as the model takes them, float32."""
        assert packed.images is not None
        return dataclasses.replace(packed, images=self.preprocess.normalize(packed.images))


class _Chain:
    """Some batches, then others, as often as asked."""

    def __init__(self, parts: Sequence[Iterable[Any]]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Any]:
        for part in self._parts:
            yield from part
