"""What a backbone's features know of classes while it is pretrained: few-shot and nearest-neighbour accuracy.

Shapes: n training pictures, m test pictures, H, W height and width in pixels, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from beit3.config import config, require
from beit3.data.example_loader import evaluation_batches
from beit3.data.labelled_pictures import LabelledPictures
from beit3.data.preprocess import Preprocess
from beit3.metrics.probe import few_shot_accuracy, knn_accuracy
from beit3.model.transformer import MultiwayTransformer

_AT_ONCE = 64
"""Pictures of one forward pass."""


@config
class ProbeConfig:
    """Pictures with classes; both sets are held in memory at the size of the model's pictures."""

    name: str = "probe"
    """Stands before its metrics: `probe/few_shot`, `probe/knn`."""
    train: str
    """Classification index file, relative to the run's data folder: what the probes learn from."""
    test: str
    """Classification index file that they are measured on."""
    shots: int = 10
    """Training pictures of each class that the few-shot probe learns from; nearest neighbours have all."""

    def __post_init__(self) -> None:
        require(self.shots >= 1, f"shots must be at least 1, not {self.shots}")


class Probe:
    """Measures the mean patch feature of a backbone again and again; pictures are read and resized once.

    A copy of a Task, such as its moving average, shares them.

    Args:
        config: which pictures.
        image_size: height and width in pixels that the backbone sees.
    """

    def __init__(self, config: ProbeConfig, image_size: tuple[int, int]) -> None:
        self._config = config
        self._preprocess = Preprocess(image_size=image_size)
        self._sets: list[tuple[Tensor, Tensor]] = []
        """uint8 (n, 3, H, W) and int64 (n,) of training; (m, 3, H, W) and (m,) of test."""

    def __deepcopy__(self, memo: object) -> Probe:
        return self

    def read(self, data: Path) -> None:
        """Read the pictures, unless that has been done.

        Args:
            data: folder that the index files' names are relative to.

        Raises:
            DataMissingError: an index does not exist, or holds no usable row.
            BeitError: a picture cannot be read.
        """
        if self._sets:
            return
        sets = [LabelledPictures(data / name, self._preprocess) for name in (self._config.train, self._config.test)]
        for pictures in sets:
            (batch,) = evaluation_batches(pictures, pictures.collate, batch_size=len(pictures))
            self._sets.append((batch.images, batch.labels))

    @torch.no_grad()
    def measure(self, backbone: MultiwayTransformer) -> dict[str, float]:
        """Accuracies in 0..1 of a backbone as it is now: `NAME/few_shot` (mean over three draws) and `NAME/knn`.

        Draws no random number of torch, numpy or python, and leaves the backbone in the mode that it was in.
        """
        assert self._sets, "read the pictures first"
        was_training = backbone.training
        backbone.eval()
        train, test = (self._describe(backbone, images) for images, _ in self._sets)
        backbone.train(was_training)
        (_, train_labels), (_, test_labels) = self._sets
        with torch.autocast("cpu", enabled=False):  # half precision makes ties between neighbours
            few_shot = few_shot_accuracy(train, train_labels, test, test_labels, shots=self._config.shots)
            knn = knn_accuracy(train, train_labels, test, test_labels)
        return {f"{self._config.name}/few_shot": few_shot.mean, f"{self._config.name}/knn": knn}

    def _describe(self, backbone: MultiwayTransformer, images: Tensor) -> Tensor:
        """Mean patch features, (n, D) float32 on the CPU."""
        device = next(backbone.parameters()).device
        features = []
        for batch in images.split(_AT_ONCE):
            states: Tensor | None = backbone(self._preprocess.normalize(batch.to(device))).vision
            assert states is not None
            features.append(states[:, 1:].float().mean(1).cpu())
        return torch.cat(features)


class Probes:
    """All probes of a run."""

    def __init__(self, configs: Sequence[ProbeConfig], image_size: tuple[int, int]) -> None:
        names = [config.name for config in configs]
        require(len(set(names)) == len(names), f"probes have equal names: {', '.join(sorted(names))}")
        self._probes = [Probe(config, image_size) for config in configs]

    def __bool__(self) -> bool:
        return bool(self._probes)

    def read(self, data: Path) -> None:
        """Read the pictures of all, unless that has been done."""
        for probe in self._probes:
            probe.read(data)

    def measure(self, backbone: MultiwayTransformer) -> dict[str, float]:
        """What all of them find; nothing without probes."""
        return {name: value for probe in self._probes for name, value in probe.measure(backbone).items()}
