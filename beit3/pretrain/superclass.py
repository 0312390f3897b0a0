"""SuperClass: a vision tower learns by naming the subwords of its pictures' captions (arXiv 2411.03313).

No text passes through the model. Shapes: B pairs of this rank, S side of a picture, K subwords of the batch's captions,
V vocabulary, n held-out pictures, C their distinct captions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3.config import Run, TaskConfig, config, require
from beit3.data.images import decode_image
from beit3.data.preprocess import Preprocess
from beit3.data.shards import Sample, load_prepared
from beit3.data.streams import Stream, StreamLoader
from beit3.data.texts import clean_text
from beit3.data.transforms import CropConfig, EvalResize, RandomCrop, normalize
from beit3.errors import BadSampleError
from beit3.metrics.retrieval import recall_at_k
from beit3.metrics.zero_shot import token_zero_shot
from beit3.model.flops import forward_flops
from beit3.model.heads import SuperClassModel
from beit3.model.hub import local_path
from beit3.model.memory import BatchSizes, Head, Pass, Sequences
from beit3.model.packing import Layout
from beit3.model.presets import ModelConfig
from beit3.model.store import fill_model
from beit3.pretrain.probe import ProbeConfig, Probes
from beit3.pretrain.subword_loss import LossKind, SubwordLoss, Words, concat_words, join_words
from beit3.tokenizer.subwords import Subwords, WordList, load_subwords
from beit3.train.task import Loader, Mapped, Task, Work


@config
class SuperClassConfig(TaskConfig):
    """Model, vocabulary, pairs and loss."""

    model: ModelConfig
    vocabulary: Path
    """A `.spm`, a `tokenizer.json` of a Hugging Face model, or CLIP's `bpe_simple_vocab_16e6.txt.gz`."""
    lower_case: bool = False
    """Whether captions are put into lower case first (CLIP's vocabulary does so by itself)."""
    init_from: Path | None = None
    """Exchange folder or released file to start from; None: random weights."""
    pairs: Stream
    crop: CropConfig
    loss: LossKind = "softmax"
    idf: bool = True
    """Weigh rare words more, by document counts kept while training; the softmax loss only."""
    eval_pairs: str | None = None
    """Prepared folder of pairs to evaluate on, relative to the run's data folder."""
    eval_batch_size: int = 256
    probes: tuple[ProbeConfig, ...] = ()
    """Few-shot and nearest-neighbour accuracy of the frozen features at every evaluation."""

    def __post_init__(self) -> None:
        require(not self.pairs.recorded, "SuperClass reads no codes: leave `codes` of the sources out")
        require(not self.idf or self.loss == "softmax", f"idf weighs the softmax loss only: idf=False for {self.loss}")
        require(
            (self.crop.size, self.crop.size) == self.model.image_size,
            f"crop.size ({self.crop.size}) must be the model's image_size {self.model.image_size}",
        )

    @property
    def sizes(self) -> BatchSizes:
        """A batch; a vocabulary that is not CLIP's is taken to be as large as the model's."""
        model, images = self.model, self.pairs.batch_size
        num_words = 49_408 if self.vocabulary.name.startswith("bpe_simple_vocab") else model.vocab_size
        return BatchSizes(
            build=lambda: self.network(num_words),
            passes=(Pass(model, (Sequences(images, 1 + model.num_patches),)),),
            heads=(Head(images, model.width, num_words),),
            images=images,
            side=self.crop.size,
        )

    def network(self, num_words: int) -> SuperClassModel:
        """What is trained, with random weights; what no picture reaches is frozen."""
        model = SuperClassModel(self.model, num_words=num_words)
        model.backbone.freeze_unreached(images=True, texts=False, pairs=False)
        model.backbone.vision_embedding.mask_token.requires_grad_(False)  # nothing is hidden
        return model

    def build(self) -> SuperClass:
        """Build the Task, with random or given weights."""
        return SuperClass(self)


@dataclass(frozen=True, slots=True)
class WordsBatch:
    """Pictures with the subwords of their captions."""

    images: Tensor
    """(B, 3, S, S) uint8"""
    words: Words


class WordsEncoder:
    """Turns samples into batches of pictures and words."""

    def __init__(self, subwords: Subwords, view: Callable[[Any], Tensor]) -> None:
        self._subwords = subwords
        self._view = view

    def encode(self, sample: Sample) -> tuple[Tensor, list[int]]:
        """Decode, crop and tokenize one pair; a caption may hold no word of the vocabulary."""
        if sample.image is None:
            raise BadSampleError("missing_image", sample.key)
        return self._view(decode_image(sample.image)), self._subwords.encode(clean_text(sample.text))

    def collate(self, samples: Sequence[tuple[Tensor, list[int]]]) -> WordsBatch:
        """Lay pictures side by side, and their words one after the other."""
        return WordsBatch(torch.stack([image for image, _ in samples]), join_words([words for _, words in samples]))

    def join(self, units: list[WordsBatch]) -> WordsBatch:
        """Lay units one behind the other."""
        return WordsBatch(torch.cat([unit.images for unit in units]), concat_words([unit.words for unit in units]))


class SuperClass(Task[WordsBatch]):
    """Name the subwords of a picture's caption."""

    def __init__(self, config: SuperClassConfig) -> None:
        super().__init__()
        self.config = config
        self.subwords = load_subwords(config.vocabulary, config.lower_case)
        self.model = config.network(len(self.subwords))
        if config.init_from is not None:
            fill_model(self.model, config.init_from)
        self.criterion = SubwordLoss(len(self.subwords), config.loss, config.idf)
        if config.init_from is not None and (words := WordList.of_same(local_path(config.init_from), self.subwords)):
            self.criterion.start_from(words)
        self._probes = Probes(config.probes, config.model.image_size)

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[WordsBatch]:
        """Endless batches of pictures and words."""
        crop = RandomCrop(self.config.crop)
        encoder = WordsEncoder(self.subwords, lambda image: crop(image).image)
        loader = StreamLoader.for_run({"pairs": self.config.pairs}, {"pairs": encoder}, run, rank, world_size)
        return Mapped(loader, operator.itemgetter("pairs"))

    def prepare_step(self, batches: Sequence[WordsBatch]) -> Sequence[WordsBatch]:
        """Count the captions of the whole step before any of them is weighted."""
        self.criterion.count([batch.words for batch in batches])
        return batches

    def forward(self, batch: WordsBatch) -> dict[str, Tensor]:
        """Loss, and the share of pictures whose likeliest word is in their caption."""
        losses: dict[str, Tensor] = self.criterion(self.model(normalize(batch.images)), batch.words)
        return losses

    def work(self, batch: WordsBatch) -> Work:
        """Images, tokens and useful operations of a step."""
        layout = Layout.build(len(batch.images), 1 + self.config.model.num_patches, (), 0)
        head = 2 * len(batch.images) * self.config.model.width * len(self.subwords)
        flops = 3 * (forward_flops(self.config.model, layout) + head)
        return Work(layout.num_images, layout.num_images * layout.vision_length, flops)

    def move(self, batch: WordsBatch, device: torch.device) -> WordsBatch:
        """Copy a batch to the device."""
        return WordsBatch(batch.images.to(device, non_blocking=True), batch.words.to(device))

    def save(self, folder: Path) -> None:
        """Write the model with its vocabulary, document counts and preprocessing."""
        preprocess = Preprocess(image_size=self.config.model.image_size)
        words = self.criterion.word_list(self.subwords)
        self.model.save_pretrained(folder, files={**preprocess.file(), **words.files()})

    def eval_loader(self, run: Run) -> Iterable[WordsBatch] | None:
        """Held-out pairs in order."""
        self._probes.read(run.data)
        if self.config.eval_pairs is None:
            return [] if self._probes else None
        encoder = WordsEncoder(self.subwords, EvalResize(self.config.model.image_size))
        encoded = [encoder.encode(sample) for sample in load_prepared(run.data / self.config.eval_pairs)]
        size = self.config.eval_batch_size
        return [encoder.collate(encoded[start : start + size]) for start in range(0, len(encoded), size)]

    def evaluate(self, loader: Iterable[WordsBatch]) -> dict[str, float]:
        """`word_metrics` of all batches, and the probe's."""
        logits, captions = [], []
        for batch in loader:
            logits.append(self.model(normalize(batch.images)).float())
            captions += split_words(batch.words)
        metrics = {} if not logits else word_metrics(torch.cat(logits), captions, self.criterion.weights())
        return {**metrics, **self._probes.measure(self.model.backbone)}


def split_words(words: Words) -> list[tuple[int, ...]]:
    """The words of each image."""
    found: list[list[int]] = [[] for _ in range(words.num_images)]
    for row, word in zip(words.rows.tolist(), words.ids.tolist(), strict=True):
        found[row].append(word)
    return [tuple(row) for row in found]


def word_metrics(logits: Tensor, captions: Sequence[tuple[int, ...]], weights: Tensor) -> dict[str, float]:
    """How well words are named, and captions found by their words alone.

    Pictures whose captions hold no word of the vocabulary are left out; nothing where all are.

    Args:
        logits: (n, V) float.
        captions: words of each picture.
        weights: (V,) of the words.

    Returns:
        `word_precision_1` and `_5`: share of the best 1 and 5 words that are in the caption;
        `image_to_text_r1` ... `text_to_image_r10`: recall where a caption's score is the weighted mean log-probability
        of its words (token zero-shot); captions of equal words are one.
    """
    kept = [place for place, caption in enumerate(captions) if caption]
    if not kept:
        return {}
    logits, captions = logits[kept], [captions[place] for place in kept]
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices.tolist()
    found = [[word in caption for word in row] for row, caption in zip(best, captions, strict=True)]
    metrics = {f"word_precision_{k}": sum(sum(row[:k]) for row in found) / (k * len(found)) for k in (1, 5)}
    distinct = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    labels = torch.tensor([distinct[caption] for caption in captions], device=logits.device)
    names = torch.arange(len(distinct), device=logits.device)
    scores = token_zero_shot(logits.log_softmax(dim=1), list(distinct), weights)  # (n, C)
    to_text, to_image = recall_at_k(scores, labels, names), recall_at_k(scores.T, names, labels)
    return (
        metrics
        | {f"image_to_text_{name}": value for name, value in to_text.items()}
        | {f"text_to_image_{name}": value for name, value in to_image.items()}
    )
