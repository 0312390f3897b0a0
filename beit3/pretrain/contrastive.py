"""Image-text contrastive tuning of a dual encoder with shared parameters (BEiT-3, appendix A; CLIP's loss).

Shapes: B pairs of this rank, G pairs of all ranks, N patches, D width.

    loss = (CE(s I T^t, diagonal) + CE(s T I^t, diagonal)) / 2      over the global batch, s = exp(logit_scale)

Pairs of equal captions are no negatives of each other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor

from beit3.config import Run, TaskConfig, config, require
from beit3.data.images import decode_image
from beit3.data.shards import Sample, load_prepared
from beit3.data.streams import Stream, StreamLoader
from beit3.data.texts import clean_text
from beit3.data.transforms import CropConfig, EvalResize, RandomCrop, normalize
from beit3.errors import BadSampleError
from beit3.metrics.retrieval import recall_at_k
from beit3.model.flops import forward_flops
from beit3.model.heads import RetrievalModel
from beit3.model.packing import PackedBatch
from beit3.model.presets import ModelConfig
from beit3.model.store import fill_model
from beit3.pretrain.export import export_model
from beit3.tokenizer.text import TextTokenizer
from beit3.train.task import Loader, OneStream, Task, Work

_LARGEST_SCALE = math.log(100)


@config
class ContrastiveConfig(TaskConfig):
    """Model, pairs and loss of contrastive tuning."""

    model: ModelConfig
    text_tokenizer: Path
    """A `.spm` file."""
    init_from: Path | None = None
    """Exchange folder or official file whose backbone is tuned; None starts from random weights."""
    pairs: Stream
    crop: CropConfig
    max_text_length: int = 64
    keep_patches: float = 1.0
    """Share of every image's patches that enters the model in training (FLIP)."""
    keyword_texts: float = 0.0
    """Probability that keywords of the sample's json (`keywords`) are appended to its caption."""
    eval_pairs: str | None = None
    """Prepared folder of pairs to evaluate on, relative to the run's data folder."""
    eval_batch_size: int = 256

    def __post_init__(self) -> None:
        require(not self.pairs.recorded, "contrastive tuning reads no codes: leave `codes` of the sources out")
        require(0 < self.keep_patches <= 1, f"keep_patches must lie in 0..1, not {self.keep_patches}")
        require(0 <= self.keyword_texts <= 1, f"keyword_texts is a probability, not {self.keyword_texts}")
        require(
            (self.crop.size, self.crop.size) == self.model.image_size,
            f"crop.size ({self.crop.size}) must be the model's image_size {self.model.image_size}",
        )

    @property
    def kept_patches(self) -> int:
        """Patches of each image that enter the model."""
        return max(1, round(self.keep_patches * self.model.num_patches))

    def build(self) -> Contrastive:
        """Build the Task, with random or given weights."""
        return Contrastive(self)


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Images and texts that belong together, as separate sequences of one packed batch."""

    packed: PackedBatch
    """Images are uint8 here; no sequence is paired: the encoder is dual."""
    captions: Tensor
    """(B,) int64, equal for equal captions."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    image: Tensor
    ids: list[int]
    caption: int


class PairEncoder:
    """Turns samples into batches of images and texts."""

    def __init__(
        self, config: ContrastiveConfig, tokenizer: TextTokenizer, view: Callable[[Any], Tensor], training: bool
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
        keywords = sample.meta.get("keywords")
        if self._training and keywords and random.random() < self._config.keyword_texts:
            chosen = random.sample(keywords, random.randint(1, len(keywords)))
            text = f"{caption}: {', '.join(map(str, chosen))}"
        digest = hashlib.sha256(caption.encode()).digest()
        ids = self._tokenizer.encode(text, self._config.max_text_length)
        return _Encoded(image, ids, int.from_bytes(digest[:7], "big"))

    def collate(self, samples: list[_Encoded]) -> PairBatch:
        """Pack samples, shortest text first."""
        samples = sorted(samples, key=lambda sample: len(sample.ids))
        kept = None
        count, total = self._config.kept_patches, self._config.model.num_patches
        if self._training and count < total:
            kept = torch.rand(len(samples), total).argsort(dim=1)[:, :count].sort(dim=1).values
        packed = PackedBatch(
            images=torch.stack([sample.image for sample in samples]),
            kept_patches=kept,
            text_ids=torch.tensor([i for sample in samples for i in sample.ids], dtype=torch.int64),
            text_positions=torch.cat([torch.arange(len(sample.ids)) for sample in samples]),
            text_lengths=tuple(len(sample.ids) for sample in samples),
        )
        return PairBatch(packed, torch.tensor([sample.caption for sample in samples]))


class Contrastive(Task[PairBatch]):
    """Bring images and their captions together, in one space."""

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config
        self.text_tokenizer = TextTokenizer.load(config.text_tokenizer)
        self.model = RetrievalModel(config.model)
        if config.init_from is not None:
            fill_model(self.model, config.init_from)
        self.model.backbone.freeze_unreached(images=True, texts=True, pairs=False)
        self.model.backbone.vision_embedding.mask_token.requires_grad_(False)  # nothing is hidden

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[PairBatch]:
        """Endless batches of pairs."""
        crop = RandomCrop(self.config.crop)
        encoder = PairEncoder(self.config, self.text_tokenizer, lambda image: crop(image).image, training=True)
        loader: StreamLoader[PairBatch] = StreamLoader(
            {"pairs": self.config.pairs},
            {"pairs": encoder},
            data=run.data,
            seed=run.seed,
            rank=rank,
            world_size=world_size,
            num_workers=run.loop.num_workers,
        )
        return OneStream(loader, "pairs")

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:
        """Symmetric cross-entropy over the pairs of all ranks."""
        images, texts = self.model(_normalized(batch.packed))
        return contrastive_loss(images, texts, batch.captions, self.model.logit_scale)

    def work(self, batch: PairBatch) -> Work:
        """Images, tokens and useful operations of a step."""
        layout = batch.packed.layout(self.config.model.patch_size)
        tokens = layout.num_images * layout.vision_length + sum(layout.text_lengths)
        return Work(layout.num_images, tokens, 3 * forward_flops(self.config.model, layout))

    def move(self, batch: PairBatch, device: torch.device) -> PairBatch:
        """Copy a batch to the device."""
        return PairBatch(batch.packed.to(device), batch.captions.to(device))

    def save(self, folder: Path) -> None:
        """Write the model with its text tokenizer and preprocessing."""
        export_model(self.model, self.text_tokenizer, self.config.max_text_length, folder)

    def eval_loader(self, run: Run) -> Iterable[PairBatch] | None:
        """Held-out pairs in order."""
        if self.config.eval_pairs is None:
            return None
        view = EvalResize(self.config.model.image_size)
        encoder = PairEncoder(self.config, self.text_tokenizer, view, training=False)
        encoded = [encoder.encode(sample) for sample in load_prepared(run.data / self.config.eval_pairs)]
        size = self.config.eval_batch_size
        return [encoder.collate(encoded[start : start + size]) for start in range(0, len(encoded), size)]

    def evaluate(self, loader: Iterable[PairBatch]) -> dict[str, float]:
        """Recall at 1, 5, 10 in both directions over all pairs of the loader."""
        images, texts, captions = [], [], []
        for batch in loader:
            image, text = self.model(_normalized(batch.packed))
            images.append(image.float())
            texts.append(text.float())
            captions.append(batch.captions)
        image, text, labels = torch.cat(images), torch.cat(texts), torch.cat(captions)
        unique, first = _first_of_each(labels)
        to_text = recall_at_k(image @ text[first].T, labels, unique)
        to_image = recall_at_k(text[first] @ image.T, unique, labels)
        return {f"image_to_text_{name}": value for name, value in to_text.items()} | {
            f"text_to_image_{name}": value for name, value in to_image.items()
        }


def contrastive_loss(images: Tensor, texts: Tensor, labels: Tensor | None, logit_scale: Tensor) -> dict[str, Tensor]:
    """Symmetric cross-entropy over the pairs of all ranks; gradients flow through the gathered vectors.

    Args:
        images: (B, D) unit length, equally many on every rank.
        texts: (B, D) unit length, text i belongs to image i.
        labels: (B,) int64; pairs of equal labels are no negatives of each other. None: all others are.
        logit_scale: logarithm of the scale, clamped here to that of 100.

    Returns:
        `loss`, `batch_accuracy` (image to text) and `logit_scale`.
    """
    rank = 0
    all_images, all_texts, all_labels = images, texts, labels
    if dist.is_initialized():
        rank = dist.get_rank()
        all_images = torch.cat(dist_nn.all_gather(images))
        all_texts = torch.cat(dist_nn.all_gather(texts))
        if labels is not None:
            gathered = [torch.empty_like(labels) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, labels)
            all_labels = torch.cat(gathered)
    own = torch.arange(len(images), device=images.device)
    targets = own + rank * len(images)
    with torch.no_grad():
        logit_scale.clamp_(max=_LARGEST_SCALE)
    scale = logit_scale.exp()
    by_image = scale * images.float() @ all_texts.float().T  # (B, G)
    by_text = scale * texts.float() @ all_images.float().T
    if labels is not None and all_labels is not None:
        same = labels[:, None] == all_labels[None]
        same[own, targets] = False
        by_image, by_text = by_image.masked_fill(same, -torch.inf), by_text.masked_fill(same, -torch.inf)
    loss = (F.cross_entropy(by_image, targets) + F.cross_entropy(by_text, targets)) / 2
    accuracy = (by_image.detach().argmax(1) == targets).float().mean()
    return {"loss": loss, "batch_accuracy": accuracy, "logit_scale": scale}


def _normalized(packed: PackedBatch) -> PackedBatch:
    assert packed.images is not None
    return dataclasses.replace(packed, images=normalize(packed.images))


def _first_of_each(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct labels and the first place of each."""
    unique, inverse = labels.unique(return_inverse=True)
    places = torch.arange(len(labels), device=labels.device)
    first = torch.full_like(unique, len(labels)).scatter_reduce(0, inverse, places, "amin")
    return unique, first
