"""Training a visual tokenizer by vector-quantized knowledge distillation (BEiT v2, arXiv 2208.06366, section 2.1).

Shapes: B images, S side, N patches, C teacher features.

    loss = mean over patches of 1 - cos(decoder(code), teacher(patch))  +  commitment
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3.config import Run, TaskConfig, config, require, to_plain
from beit3.data.example_loader import ExampleLoader
from beit3.data.feature_cache import FeatureCache, build_feature_cache
from beit3.data.fingerprint import Fingerprint
from beit3.data.images import decode_image
from beit3.data.shards import Sample, load_prepared
from beit3.data.streams import Stream, StreamLoader, fingerprint_streams
from beit3.data.transforms import CropConfig, EvalResize, RandomCrop
from beit3.errors import BadSampleError
from beit3.tokenizer.teachers import Teacher, TeacherConfig, build_teacher
from beit3.tokenizer.vqkd import VQKD, VQKDConfig, distillation_loss
from beit3.train.distributed import choose_device
from beit3.train.task import Loader, Mapped, Task, Work


@config
class ImageTokenizerConfig(TaskConfig):
    """Tokenizer, teacher and pictures of VQ-KD."""

    tokenizer: VQKDConfig
    teacher: TeacherConfig
    images: Stream
    crop: CropConfig
    cached_crops: int = 0
    """Crops of each picture whose teacher features are computed once and kept on disk; 0 asks the teacher for every
    new crop."""
    eval_images: str | None = None
    """Prepared folder to measure use of the codebook and similarity on, relative to the run's data folder."""
    eval_batch_size: int = 128
    least_use: float = 0.5
    """An alarm line is written whenever a smaller share of the codes is in use."""

    def __post_init__(self) -> None:
        require(
            (self.crop.size, self.crop.size) == self.tokenizer.image_size,
            f"crop.size ({self.crop.size}) must be the tokenizer's image_size {self.tokenizer.image_size}",
        )
        require(not self.images.recorded, "a tokenizer's training reads no codes: leave `codes` of the sources out")
        require(self.cached_crops >= 0, f"cached_crops must not be negative, not {self.cached_crops}")

    def build(self) -> ImageTokenizer:
        """Build the Task with random weights."""
        return ImageTokenizer(self)


@dataclass(frozen=True, slots=True)
class CropBatch:
    """Crops, with their teacher's features where these were cached."""

    images: Tensor
    """(B, 3, S, S) uint8."""
    teacher_images: Tensor | None = None
    """(B, 3, S', S') uint8, the same crops at the teacher's size; None: the tokenizer's."""
    features: Tensor | None = None
    """(B, N, C); None: asked of the teacher."""


class CropEncoder:
    """Turns pictures into batches of crops."""

    def __init__(self, view: RandomCrop | EvalResize) -> None:
        self._view = view

    def encode(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """Decode and crop one picture."""
        if sample.image is None:
            raise BadSampleError("missing_image", sample.key)
        image = decode_image(sample.image)
        if isinstance(self._view, EvalResize):
            return self._view(image), None
        views = self._view(image)
        return views.image, views.tokenizer_image

    def collate(self, samples: list[tuple[Tensor, Tensor | None]]) -> CropBatch:
        """Stack crops."""
        second = [large for _, large in samples if large is not None]
        return CropBatch(torch.stack([image for image, _ in samples]), torch.stack(second) if second else None)

    def join(self, units: list[CropBatch]) -> CropBatch:
        """Lay units one behind the other."""
        second = [unit.teacher_images for unit in units if unit.teacher_images is not None]
        return CropBatch(torch.cat([unit.images for unit in units]), torch.cat(second) if second else None)


class ImageTokenizer(Task[CropBatch]):
    """Learn codes from which a decoder rebuilds a teacher's features."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = VQKD(config.tokenizer)

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher, loaded when it is first needed."""
        if not self._frozen:
            loaded, wanted = build_teacher(self.config.teacher), self.config.tokenizer.teacher_width
            require(
                loaded.width == wanted,
                f"tokenizer.teacher_width is {wanted}, the teacher has {loaded.width} features",
            )
            self.keep_frozen(loaded.to(self.model.quantize.codebook.device))
        (teacher,) = self._frozen
        assert isinstance(teacher, Teacher)
        return teacher

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[CropBatch]:
        """Batches of new crops, or of cached ones with their features."""
        config = self.config
        if not config.cached_crops:
            encoder = CropEncoder(RandomCrop(config.crop))
            loader = StreamLoader.for_run({"images": config.images}, {"images": encoder}, run, rank, world_size)
            return Mapped(loader, operator.itemgetter("images"))
        data = fingerprint_streams({"images": config.images}, run.data)
        cache = self._cache(run, data)
        return ExampleLoader.for_run(
            cache, _collate_cached, run, rank, world_size, batch_size=config.images.batch_size, data=data
        )

    def prepare_data(self, run: Run) -> None:
        """Fill the cache of crops and their features."""
        if self.config.cached_crops:
            self._cache(run, fingerprint_streams({"images": self.config.images}, run.data))

    def _cache(self, run: Run, data: Fingerprint) -> FeatureCache:
        """The cache of this run, filled if it is not."""
        config = self.config
        teacher = self.teacher  # of another width: better said before its features are computed
        folders = [run.data / source.path for source in config.images.sources]
        return build_feature_cache(
            run.folder / "cache",
            (sample for folder in folders for sample in load_prepared(folder)),
            teacher=teacher,
            teacher_settings=to_plain(config.teacher),
            crop=config.crop,
            grid=config.tokenizer.grid,
            crops_per_picture=config.cached_crops,
            seed=run.seed,
            source=", ".join(source.path for source in config.images.sources),
            data=data,
            device=choose_device(run.device),
        )

    def forward(self, batch: CropBatch) -> dict[str, Tensor]:
        """Distillation and commitment loss, and the state of the codebook.

        `quantization_error` is the mean squared distance of a unit vector from its code, 2 - 2 cos.
        """
        decoded, _, commitment = self.model(batch.images.float() / 255)
        distillation = distillation_loss(decoded, self._features(batch))
        return {
            "loss": distillation + commitment,
            "distillation_loss": distillation,
            "commitment_loss": commitment,
            "quantization_error": commitment.detach() * self.config.tokenizer.code_width,
            **self.model.quantize.statistics(),
        }

    def alarms(self, values: Mapping[str, float]) -> list[str]:
        """Warn of a codebook that collapses."""
        use, least = values["codebook_use"], self.config.least_use
        if use >= least:
            return []
        return [f"only {use:.1%} of the codes are in use (bound {least:.0%}): the codebook collapses"]

    def work(self, batch: CropBatch) -> Work:
        """Images, patches and the operations of encoder and decoder (matrix products, 3 x forward)."""
        config = self.config.tokenizer
        tokens = config.grid[0] * config.grid[1] + 1
        layers = config.depth + config.decoder_depth
        flops = layers * (24 * tokens * config.width**2 + 4 * tokens**2 * config.width)
        return Work(len(batch.images), len(batch.images) * tokens, 3.0 * len(batch.images) * flops)

    def move(self, batch: CropBatch, device: torch.device) -> CropBatch:
        """Copy a batch to the device."""
        parts = (batch.images, batch.teacher_images, batch.features)
        return CropBatch(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]

    def save(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.model.save(folder, to_plain(self.config.teacher))

    def eval_loader(self, run: Run) -> Iterable[CropBatch] | None:
        """Held-out pictures, whole."""
        if self.config.eval_images is None:
            return None
        encoder = CropEncoder(EvalResize(self.config.tokenizer.image_size))
        encoded = [encoder.encode(sample) for sample in load_prepared(run.data / self.config.eval_images)]
        size = self.config.eval_batch_size
        return [encoder.collate(encoded[start : start + size]) for start in range(0, len(encoded), size)]

    def evaluate(self, loader: Iterable[CropBatch]) -> dict[str, float]:
        """Similarity to the teacher, share of codes used and perplexity over all patches of the loader."""
        similarity = patches = 0.0
        counts = torch.zeros(self.config.tokenizer.codebook_size)
        for batch in loader:
            decoded, codes, _ = self.model(batch.images.float() / 255)
            patches += codes.numel()
            similarity += (1 - float(distillation_loss(decoded, self._features(batch)))) * codes.numel()
            counts += codes.flatten().bincount(minlength=len(counts)).cpu()
        share = counts / counts.sum()
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        return {
            "teacher_similarity": similarity / patches,
            "codebook_use": float((counts > 0).float().mean()),
            "perplexity": float(entropy.exp()),
        }

    def _features(self, batch: CropBatch) -> Tensor:
        if batch.features is not None:
            return batch.features
        images = batch.images if batch.teacher_images is None else batch.teacher_images
        return self.teacher.patch_features(images.float() / 255, self.config.tokenizer.grid)


def _collate_cached(rows: list[tuple[Any, Any]]) -> CropBatch:
    return CropBatch(torch.stack([crop for crop, _ in rows]), features=torch.stack([features for _, features in rows]))
