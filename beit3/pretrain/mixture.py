"""Masked data modeling, SuperClass and contrastive learning in one forward and one backward pass.

Shapes: P pairs, N patches, D width, V vocabulary, Np tokens of the pairs' texts.

    loss = a * masked data modeling + b * SuperClass + c * contrastive

The pairs pass twice through the model, in the same packed batch: once joined and with hidden parts, and once clean, the
pictures alone (SuperClass reads the mean of their patches, the contrastive loss their class tokens) and, for the
contrastive loss, the captions alone. Words are the ids of the caption before any was hidden.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import config, require
from beit3.data.preprocess import Preprocess
from beit3.metrics.retrieval import dual_recall
from beit3.model.flops import forward_flops
from beit3.model.heads import RetrievalModel, SuperClassModel, WordHead
from beit3.model.memory import BatchSizes, Head, Sequences
from beit3.model.packing import Layout, PackedBatch, concat
from beit3.model.transformer import PackedOutput
from beit3.pretrain.contrastive_loss import contrastive_loss
from beit3.pretrain.export import export_model
from beit3.pretrain.masked_batches import IGNORE, MaskedBatch
from beit3.pretrain.masked_data_modeling import MaskedDataModeling, MaskedDataModelingConfig
from beit3.pretrain.subword_loss import SubwordLoss, Words
from beit3.pretrain.superclass import split_words, word_metrics
from beit3.tokenizer.subwords import Subwords
from beit3.train.task import Work

_FACTOR = 6_364_136_223_846_793_005
"""Odd multiplier of the hash of captions (Knuth's MMIX generator)."""


@config
class ObjectiveWeights:
    """What the losses of a mixture are multiplied with; 0 leaves an objective and its passes out."""

    masked_data_modeling: float = 1.0
    superclass: float = 1.0
    contrastive: float = 0.0

    def __post_init__(self) -> None:
        for name in ("masked_data_modeling", "superclass", "contrastive"):
            weight = getattr(self, name)
            require(weight >= 0, f"objective.{name} must not be negative, not {weight}")
        require(
            self.masked_data_modeling > 0,
            "objective.masked_data_modeling must be above 0: mixtures stand on its batches",
        )


@config
class MixtureConfig(MaskedDataModelingConfig):
    """Masked data modeling with further objectives on its pairs."""

    objective: ObjectiveWeights = ObjectiveWeights()
    idf: bool = True
    """Weigh rare words of SuperClass more."""

    def __post_init__(self) -> None:
        MaskedDataModelingConfig.__post_init__(self)
        others = self.objective.superclass + self.objective.contrastive
        require(self.pairs is not None or not others, "SuperClass and contrastive learning need a stream of pairs")

    @property
    def reached(self) -> dict[str, bool]:
        """Kinds of sequences that pass through the model: the clean pictures and captions are alone."""
        reached = MaskedDataModelingConfig.reached.__get__(self)
        contrastive = self.objective.contrastive > 0
        images = reached["images"] or contrastive or self.objective.superclass > 0
        return {**reached, "images": images, "texts": reached["texts"] or contrastive}

    @property
    def sizes(self) -> BatchSizes:
        """A batch, with the clean pictures of its pairs and, for the contrastive loss, the clean captions."""
        sizes: BatchSizes = MaskedDataModelingConfig.sizes.__get__(self)
        pairs = 0 if self.pairs is None else self.pairs.batch_size
        contrastive = pairs if self.objective.contrastive else 0
        (joint,) = sizes.passes
        clean = (
            Sequences(pairs, 1 + self.model.num_patches),
            Sequences(contrastive, text=self.max_text_length // 2),
        )
        words = Head(pairs if self.objective.superclass else 0, self.model.width, self.model.vocab_size)
        return dataclasses.replace(
            sizes,
            build=self.networks,
            passes=(dataclasses.replace(joint, sequences=joint.sequences + clean),),
            heads=(*sizes.heads, words),
            gathered=2 * contrastive * self.model.width,
        )

    def networks(self) -> nn.ModuleDict:
        """What is trained, with random weights."""
        heads: dict[str, nn.Module] = {}
        if self.objective.superclass:
            heads["word_head"] = WordHead(self.model.width, self.model.vocab_size)
        if self.objective.contrastive:
            heads["dual"] = DualHeads(self.model.width)
        return nn.ModuleDict({"model": self.network(), **heads})

    def build(self) -> Mixture:
        """Build the Task with random or given weights."""
        return Mixture(self)


class DualHeads(nn.Module):
    """The heads of a dual encoder, named as in `RetrievalModel`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vision_head = nn.Linear(width, width, bias=False)
        self.language_head = nn.Linear(width, width, bias=False)
        for head in (self.vision_head, self.language_head):
            nn.init.trunc_normal_(head.weight, std=0.02)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


@dataclass(frozen=True, slots=True)
class _Clean:
    """Where the clean pictures and captions of the pairs stand in the outputs."""

    images: Tensor
    """(P, 1 + N, D)"""
    texts: Tensor | None
    """(P, D) states of `<s>`"""


class Mixture(MaskedDataModeling):
    """Hidden patches and words, the words of a picture, and which caption belongs to it."""

    config: MixtureConfig

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        width, size = config.model.width, config.model.vocab_size
        self.subwords = Subwords(self.text_tokenizer)
        self.word_head = WordHead(width, size) if config.objective.superclass else None
        self.criterion = SubwordLoss(size, "softmax", config.idf) if config.objective.superclass else None
        self.dual = DualHeads(width) if config.objective.contrastive else None

    def prepare_step(self, batches: Sequence[MaskedBatch]) -> Sequence[MaskedBatch]:
        """Count the captions of the whole step before any of them is weighted."""
        if self.criterion is not None:
            self.criterion.count([self.words(batch) for batch in batches])
        return super().prepare_step(batches)

    def forward(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """The weighted sum and all parts."""
        weights = self.config.objective
        states, clean = self.encode_all(batch)
        values = self.masked_losses(states, batch)
        loss = weights.masked_data_modeling * values["masked_loss"]
        if self.criterion is not None and self.word_head is not None:
            named = self.criterion(self.word_head(clean.images), self.words(batch))
            values |= {"superclass_loss": named["loss"], "word_accuracy": named["word_accuracy"]}
            loss = loss + weights.superclass * named["loss"]
        if self.dual is not None:
            images, texts = self.embed(clean)
            matched = contrastive_loss(images, texts, caption_labels(batch), self.dual.logit_scale)
            values |= {"contrastive_loss": matched.pop("loss"), **matched}
            loss = loss + weights.contrastive * values["contrastive_loss"]
        return {"loss": loss, **values}

    def encode_all(self, batch: MaskedBatch) -> tuple[PackedOutput, _Clean]:
        """Everything in one pass: the batch, and its pairs' pictures (and captions) clean and alone behind it."""
        states = self.encode(concat([batch.packed, self.clean_sequences(batch)]))
        return states, self._read_clean(states, batch.packed.num_pairs)

    def _read_clean(self, states: PackedOutput, pairs: int) -> _Clean:
        """The last sequences of a pass: pictures, and captions where the contrastive loss wants them."""
        texts = states.first_text_rows()[-pairs:] if self.dual is not None else None
        return _Clean(states.image_rows()[-pairs:], texts)

    def clean_sequences(self, batch: MaskedBatch) -> PackedBatch:
        """The pictures of the batch's pairs unmasked and alone, then, for `dual`, their captions in full and alone."""
        packed, pairs = batch.packed, batch.packed.num_pairs
        assert packed.images is not None
        assert packed.image_mask is not None
        clean = PackedBatch(images=packed.images[:pairs], image_mask=torch.zeros_like(packed.image_mask[:pairs]))
        if self.dual is not None:
            assert packed.text_positions is not None
            tokens = sum(packed.text_lengths[:pairs])
            clean = dataclasses.replace(
                clean,
                text_ids=clean_text_ids(batch),
                text_positions=packed.text_positions[:tokens],
                text_lengths=packed.text_lengths[:pairs],
            )
        return clean

    def embed(self, clean: _Clean) -> tuple[Tensor, Tensor]:
        """Unit vectors (P, D) of pictures and captions."""
        assert self.dual is not None
        assert clean.texts is not None
        images, texts = self.dual.vision_head(clean.images[:, 0]), self.dual.language_head(clean.texts)
        return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)

    def words(self, batch: MaskedBatch) -> Words:
        """The distinct words of the pairs' captions; special ids are none."""
        lengths = torch.tensor(batch.packed.text_lengths[: batch.packed.num_pairs])
        ids = clean_text_ids(batch)
        rows = torch.arange(len(lengths), device=ids.device).repeat_interleave(lengths.to(ids.device))
        size = self.config.model.vocab_size
        named = ~torch.isin(ids, torch.tensor(sorted(self.subwords.special), device=ids.device))
        distinct = (rows[named] * size + ids[named]).unique()  # sorted: rows rise
        return Words(distinct % size, distinct // size, len(lengths))

    def work(self, batch: MaskedBatch) -> Work:
        """Images, tokens and useful operations of a step, the clean passes included."""
        masked, pairs, config = super().work(batch), batch.packed.num_pairs, self.config
        length = 1 + config.model.num_patches
        texts = batch.packed.text_lengths[:pairs] if self.dual is not None else ()
        clean = forward_flops(config.model, Layout.build(pairs, length, texts, 0))
        head = 2 * pairs * config.model.width * config.model.vocab_size if self.word_head is not None else 0
        return masked + Work(0, pairs * length + sum(texts), 3 * (clean + head))

    def save(self, folder: Path) -> None:
        """Write the pretraining model, and inside its folder `superclass` and `retrieval`, each loadable by itself."""
        super().save(folder)
        if self.word_head is not None and self.criterion is not None:
            with torch.device("meta"):
                named = SuperClassModel(self.config.model, num_words=self.config.model.vocab_size)
            named.backbone, named.word_head = self.model.backbone, self.word_head
            words = self.criterion.word_list(self.subwords)
            files = Preprocess(image_size=self.config.model.image_size).file()
            named.save_pretrained(folder / "superclass", files={**files, **words.files()})
        if self.dual is not None:
            with torch.device("meta"):
                dual = RetrievalModel(self.config.model)
            dual.backbone, dual.logit_scale = self.model.backbone, self.dual.logit_scale
            dual.vision_head, dual.language_head = self.dual.vision_head, self.dual.language_head
            export_model(dual, self.text_tokenizer, self.config.max_text_length, folder / "retrieval")

    def evaluate(self, loader: Iterable[MaskedBatch]) -> dict[str, float]:
        """Metrics of masked data modeling, of words and of retrieval on held-out pairs."""
        batches = list(loader)
        metrics = super().evaluate(batches)
        logits: list[Tensor] = []
        vectors: tuple[list[Tensor], list[Tensor]] = ([], [])
        words: list[tuple[int, ...]] = []
        labels: list[Tensor] = []
        for batch in batches:
            clean = self._read_clean(self.encode(self.clean_sequences(batch)), batch.packed.num_pairs)
            labels.append(caption_labels(batch))
            if self.word_head is not None:
                logits.append(self.word_head(clean.images).float())
                words += split_words(self.words(batch))
            if self.dual is not None:
                for found, embedded in zip(vectors, self.embed(clean), strict=True):
                    found.append(embedded.float())
        if self.criterion is not None and logits:
            named = word_metrics(torch.cat(logits), words, self.criterion.weights())
            metrics |= {f"superclass/{name}": value for name, value in named.items()}
        if vectors[0]:
            metrics |= dual_recall(torch.cat(vectors[0]), torch.cat(vectors[1]), torch.cat(labels))
        return metrics


def clean_text_ids(batch: MaskedBatch) -> Tensor:
    """Ids (Np,) of the pairs' captions, as they were before words were hidden."""
    packed = batch.packed
    assert packed.text_ids is not None
    tokens = sum(packed.text_lengths[: packed.num_pairs])
    rows, words = batch.word_rows[: batch.pair_words], batch.words[: batch.pair_words]
    real = words != IGNORE
    return packed.text_ids[:tokens].index_put((rows[real],), words[real])


def caption_labels(batch: MaskedBatch) -> Tensor:
    """A hash (P,) int64 of each pair's caption: equal captions are equal."""
    packed = batch.packed
    assert packed.text_positions is not None
    lengths = torch.tensor(packed.text_lengths[: packed.num_pairs])
    ids = clean_text_ids(batch)
    rows = torch.arange(len(lengths), device=ids.device).repeat_interleave(lengths.to(ids.device))
    powers = torch.full((int(lengths.max()),), _FACTOR, dtype=torch.int64).cumprod(0).to(ids.device)
    return ids.new_zeros(len(lengths)).index_add(0, rows, (ids + 1) * powers[packed.text_positions[: len(ids)]])
