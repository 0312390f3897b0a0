"""Linear probe: one linear map on a frozen image tower, trained on varied pictures (MAE's recipe).

Shapes: B pictures of this rank, G pictures of all ranks, D features, C classes.

    logits = W batch_norm(feature) + b        the norm has no weights of its own
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import config, require
from beit3.data.augment import ClassificationView, ClassificationViewConfig
from beit3.data.labelled_pictures import CentralCrop, LabelledBatch, LabelledPictures, View
from beit3.errors import ConfigError
from beit3.finetune.image_tower import ImageTower, Pooling, load_image_tower
from beit3.finetune.index_task import IndexConfig, IndexTask
from beit3.metrics.accuracy import class_ranks, topk_accuracy
from beit3.model.exchange import read_settings, read_tensors, write_folder
from beit3.train.task import Work

KIND = "linear_probe"
"""In `config.json` of what a run writes."""


@config
class LinearProbeConfig(IndexConfig):
    """Tower, classes and views."""

    tower: str
    """Exchange folder, released `.pth` file, `hf-hub:organisation/name`, or `timm:NAME`."""
    pooling: Pooling = "auto"
    """`mean` of the patches, `class` token, or what the tower's own head reads (see `load_image_tower`)."""
    pretrained: bool = True
    """False: a tower of timm with random weights; the baseline that shows what training is worth."""
    num_classes: int = 1000
    batch_size: int = 16_384
    """Examples of one batch of all ranks."""
    eval_batch_size: int = 256
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the picture's area that a training crop covers."""
    flip: float = 0.5
    """Probability of mirroring a training picture left and right; 0 for writing and digits."""
    central_crop: float = 0.875
    """Share of the fitted picture's side that evaluation sees: 224 of 256 pixels. 1 keeps the shorter side whole."""

    def __post_init__(self) -> None:
        require(self.num_classes >= 2, f"num_classes must be at least 2, not {self.num_classes}")
        IndexConfig.__post_init__(self)
        require(0 < self.central_crop <= 1, f"central_crop must lie in 0..1, not {self.central_crop}")
        _ = self.view

    @property
    def view(self) -> ClassificationViewConfig:
        """Training views: crops and mirroring, nothing else."""
        return ClassificationViewConfig(
            scale=self.scale, flip=self.flip, auto_augment=None, color_jitter=0.0, erase=0.0
        )

    def build(self) -> LinearProbe:
        """Load the tower and start the linear map."""
        return LinearProbe(self)


class FeatureNorm(nn.BatchNorm1d):
    """Batch normalisation of features that carry no gradient, over the batch of all ranks (eps 1e-6, no weights)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6, affine=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) to (B, D); ranks must hold equally many rows."""
        rows = features
        if self.training and dist.is_initialized():
            gathered = [torch.empty_like(features) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, features.contiguous())
            rows = torch.cat(gathered)
        normed: Tensor = super().forward(rows)
        return normed if rows is features else normed.split(len(features))[dist.get_rank()]


class LinearProbe(IndexTask[LabelledBatch]):
    """Name what a picture shows by a linear map of frozen features.

    Pictures are normalised as the tower was trained. The tower is in no checkpoint, and what is exported is no model:
    `save` writes the linear map with the tower's description, for a `ClassificationModel` has a LayerNorm before its
    linear map that could not be made to vanish. `load_linear_probe` joins both again.

    The optimizer is timm's `lars` with a weight decay next to nothing, such as 1e-20: it scales the steps of what
    decays, as MAE's own scales those of the matrix and not the bias; at exactly 0 it would scale none.

    Source: MAE (arXiv 2111.06377), appendix A.1, and its `main_linprobe.py`.
    """

    def __init__(self, config: LinearProbeConfig) -> None:
        super().__init__()
        self.config = config
        tower = load_image_tower(config.tower, pooling=config.pooling, pretrained=config.pretrained)
        self.keep_frozen(tower)
        self.norm = FeatureNorm(tower.width)
        self.head = nn.Linear(tower.width, config.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    @property
    def tower(self) -> ImageTower:
        """The frozen tower."""
        (tower,) = self._frozen
        assert isinstance(tower, ImageTower)
        return tower

    def examples(self, paths: Sequence[Path], *, training: bool) -> LabelledPictures:
        """Pictures of index files, varied in training."""
        view: View = CentralCrop(self.tower.preprocess, self.config.central_crop)
        if training:
            view = ClassificationView(self.config.view, self.tower.preprocess)
        return LabelledPictures(paths, view, self.config.num_classes)

    def logits(self, batch: LabelledBatch) -> Tensor:
        """(B, C) float32."""
        features = self.tower(self.tower.preprocess.normalize(batch.images))
        logits: Tensor = self.head(self.norm(features))
        return logits.float()

    def forward(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """Cross-entropy."""
        logits = self.logits(batch)
        loss = F.cross_entropy(logits, batch.labels)
        return {"loss": loss, "accuracy": (logits.argmax(1) == batch.labels).float().mean()}

    def evaluate(self, loader: Iterable[LabelledBatch]) -> dict[str, float]:
        """Accuracy of the first and of the first five guesses, and the share of rows that `eval_loader` left out."""
        ranks = [class_ranks(self.logits(batch), batch.labels).cpu() for batch in loader]
        return topk_accuracy(torch.cat(ranks)) | self.left_out()

    def work(self, batch: LabelledBatch) -> Work:
        """Images and useful operations of a step: the tower runs forward only."""
        head = 3 * 2 * self.head.weight.numel()
        return Work(images=len(batch.images), flops=len(batch.images) * (self.tower.flops + head))

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Write `model.safetensors` (`weight` (C, D) and `bias` (C,), the norm folded in) and `config.json`."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        weight = self.head.weight * (variance + self.norm.eps).rsqrt()
        bias = self.head.bias - weight @ mean
        write_folder(folder, {"kind": KIND, "tower": self.tower.describe()}, {"weight": weight, "bias": bias})


def load_linear_probe(folder: str | Path) -> nn.Sequential:
    """Load the tower and the linear map of a finished run: normalised images (B, 3, H, W) to logits (B, C).

    The tower is the first of the two modules; its `preprocess` prepares pictures.

    Raises:
        DataMissingError: there is no such folder, or its tower is not where it was.
        ConfigError: the folder holds something else.
    """
    settings = read_settings(Path(folder))
    if settings.get("kind") != KIND:
        raise ConfigError(f"{folder} holds a '{settings.get('kind')}', not a linear probe: give the export of its run")
    state = read_tensors(Path(folder))
    require(state.keys() == {"weight", "bias"}, f"{folder} lacks weight or bias: copy it again")
    classes, width = state["weight"].shape
    head = nn.Linear(width, classes)
    head.load_state_dict(state)
    return nn.Sequential(load_image_tower(**settings["tower"]), head).eval()
