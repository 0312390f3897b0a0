"""Contrastive training of image and text encoders: CLIP, SigLIP, and BEiT-3's tuning with shared parameters.

Shapes: B pairs of this rank, D width of vectors, H, W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from beit3.config import Run, config, replace, require
from beit3.data.preprocess import Preprocess
from beit3.model.flops import forward_flops
from beit3.model.heads import ClipModel, RetrievalModel
from beit3.model.memory import BatchSizes, Pass, Sequences
from beit3.model.packing import Layout, PackedBatch
from beit3.model.presets import ModelConfig, TextTowerConfig
from beit3.model.store import fill_model
from beit3.pretrain.export import export_model
from beit3.pretrain.pairs import PairBatch, PairConfig, PairTask
from beit3.pretrain.probe import ProbeConfig, Probes
from beit3.train.task import Work


@config
class ContrastiveConfig(PairConfig):
    """Model and how much of the images it sees."""

    model: ModelConfig
    text_tower: TextTowerConfig | None = None
    """A text transformer of its own, as CLIP has it; None: `model` reads images and texts with shared parameters."""
    init_from: Path | None = None
    """Exchange folder or official file whose backbone is tuned; None starts from random weights."""
    keep_patches: float = 1.0
    """Share of every image's patches that enters the model in training (FLIP)."""
    probes: tuple[ProbeConfig, ...] = ()
    """Few-shot and nearest-neighbour accuracy of the frozen features at every evaluation."""

    def __post_init__(self) -> None:
        PairConfig.__post_init__(self)
        require(0 < self.keep_patches <= 1, f"keep_patches must lie in 0..1, not {self.keep_patches}")
        require(
            (self.crop.size, self.crop.size) == self.model.image_size,
            f"crop.size ({self.crop.size}) must be the model's image_size {self.model.image_size}",
        )
        require(
            2 < self.max_text_length <= self.model.max_text_length,
            f"max_text_length must lie in 3..{self.model.max_text_length}, not {self.max_text_length}",
        )

    @property
    def kept_patches(self) -> int:
        """Patches of each image that enter the model."""
        return max(1, round(self.keep_patches * self.model.num_patches))

    @property
    def patches(self) -> tuple[int, int] | None:
        """How many patches of each training image enter the model, and of how many; None: all."""
        total = self.model.num_patches
        return (self.kept_patches, total) if self.kept_patches < total else None

    @property
    def sizes(self) -> BatchSizes:
        """A batch: captions are taken to fill half of `max_text_length`."""
        model, tower, pairs = self.model, self.text_tower, self.pairs.batch_size
        images = Sequences(pairs, 1 + self.kept_patches)
        texts = Sequences(pairs, text=self.max_text_length // 2)
        passes: tuple[Pass, ...] = (Pass(model, (images, texts)),)
        if tower is not None:
            shape = {"width": tower.width, "num_layers": tower.num_layers, "num_heads": tower.num_heads}
            words = replace(model, **shape, ffn_width=4 * tower.width, fusion_layers=0, final_norm=True)
            passes = (Pass(model, (images,)), Pass(words, (texts,)))
        return BatchSizes(
            build=self.network,
            passes=passes,
            heads=(),
            images=pairs,
            side=self.crop.size,
            words=texts.tokens,
            gathered=2 * pairs * (model.width if tower is None else tower.embed_width),
        )

    def network(self) -> RetrievalModel:
        """What is trained, with random weights; what no sequence reaches is frozen."""
        if self.text_tower is None:
            model = RetrievalModel(self.model, loss=self.loss)
        else:
            model = ClipModel(self.model, **self.text_tower.options, loss=self.loss)
        model.backbone.freeze_unreached(images=True, texts=True, pairs=False)
        model.backbone.vision_embedding.mask_token.requires_grad_(False)  # nothing is hidden
        return model

    def build(self) -> Contrastive:
        """Build the Task, with random or given weights."""
        return Contrastive(self)


class Contrastive(PairTask[ContrastiveConfig]):
    """Train both encoders."""

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__(config, Preprocess(image_size=config.model.image_size, max_text_length=config.max_text_length))
        self.model = config.network()
        if config.init_from is not None:
            fill_model(self.model, config.init_from)
        self._probes = Probes(config.probes, config.model.image_size)

    def embed(self, packed: PackedBatch) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, D) of the images, which are normalised, and of the texts of a batch."""
        vectors: tuple[Tensor, Tensor] = self.model(packed)
        return vectors

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B, 3, H, W), normalised."""
        return self.model.encode_image(images)

    def work(self, batch: PairBatch) -> Work:
        """Images, tokens and useful operations of a step."""
        both = batch.packed.layout(self.config.model.patch_size)
        images = Layout.build(both.num_images, both.vision_length, (), 0)
        texts = Layout.build(0, 0, both.text_lengths, 0)
        flops = forward_flops(self.config.model, images) + forward_flops(self.model.text_tower.config, texts)
        return Work(both.num_images, both.num_images * both.vision_length + sum(both.text_lengths), 3 * flops)

    def save(self, folder: Path) -> None:
        """Write the model with its text tokenizer and preprocessing."""
        export_model(self.model, self.text_tokenizer, self.config.max_text_length, folder)

    def eval_loader(self, run: Run) -> Iterable[Any] | None:
        """Held-out pairs in order, then the pictures of the zero-shot measure."""
        self._probes.read(run.data)
        return super().eval_loader(run) or ([] if self._probes else None)

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """Recall, zero-shot accuracy, and what the probe finds."""
        metrics = super().evaluate(loader)
        return {**metrics, **self._probes.measure(self.model.backbone)}
