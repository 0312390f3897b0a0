"""Models by name: every task's model, built from a configuration and options of its heads."""

from __future__ import annotations

import inspect
from typing import Any, get_args

from beit3.config import nearest, require
from beit3.errors import ConfigError
from beit3.model.detection import DetectionModel
from beit3.model.heads import (
    CaptioningModel,
    ClassificationModel,
    ClipModel,
    ContrastiveLoss,
    NLVR2Model,
    Pooling,
    PretrainingModel,
    RetrievalModel,
    SuperClassModel,
    VQAModel,
)
from beit3.model.presets import ModelConfig, model_config
from beit3.model.segmentation import SegmentationHead, SegmentationModel
from beit3.model.task_model import TaskModel
from beit3.model.transformer import MultiwayTransformer

AnyModel = (
    MultiwayTransformer
    | PretrainingModel
    | RetrievalModel
    | ClassificationModel
    | VQAModel
    | NLVR2Model
    | CaptioningModel
    | SuperClassModel
    | ClipModel
    | DetectionModel
    | SegmentationModel
)
_TASKS: dict[str, type[TaskModel]] = {
    "pretraining": PretrainingModel,
    "captioning": CaptioningModel,
    "retrieval": RetrievalModel,
    "classification": ClassificationModel,
    "vqa": VQAModel,
    "nlvr2": NLVR2Model,
    "superclass": SuperClassModel,
    "clip": ClipModel,
    "detection": DetectionModel,
    "segmentation": SegmentationModel,
}
_TEXT_TOWER = ("text_width", "text_layers", "text_heads", "embed_width")
_DENSE = ("stages", "pyramid_width", "head_width", "num_maps", "num_queries", "window_size", "num_global_layers")
_CHOICES: dict[str, tuple[str, ...]] = {
    "pooling": get_args(Pooling),
    "loss": get_args(ContrastiveLoss),
    "head": get_args(SegmentationHead),
}
_HEAD_OPTIONS = ("codebook_size", "num_classes", "num_answers", "num_words", *_TEXT_TOWER, *_DENSE, *_CHOICES)


def build_model(config: ModelConfig, task: str | None = None, /, **head_options: Any) -> AnyModel:
    """Build a backbone (`task=None`) or a task model with random weights."""
    if task is None:
        return MultiwayTransformer(config)
    if task not in _TASKS:
        raise ConfigError(f"unknown task '{task}'; {nearest(task, _TASKS)}")
    known = inspect.signature(_TASKS[task]).parameters.keys() & set(_HEAD_OPTIONS)
    if unknown := head_options.keys() - known:
        raise ConfigError(f"a {task} model has no option {', '.join(sorted(unknown))}")
    for name, value in head_options.items():
        if name in _CHOICES:
            fits = isinstance(value, str) and value in _CHOICES[name]
            require(fits, f"{name} must be {' or '.join(_CHOICES[name])}, not {value!r:.60}")
            continue
        fits = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
        require(fits, f"{name} must be a whole number of at least 1, not {value!r:.60}")
    model: Any = _TASKS[task](config, **head_options)
    assert isinstance(model, AnyModel)
    return model


def create_model(name: str, task: str | None = None, attention: str = "shared", **config: object) -> AnyModel:
    """Create a model of the catalogue with random weights.

    The default is the paper's model (shared self-attention, fusion experts on top). It is not the model that
    Microsoft released: for that architecture pass `attention="decoupled"`, for its weights use `load_model`.

    Args:
        name: such as `beit3_base_patch16_224`; see `list_models`.
        task: None for the backbone alone, or "pretraining", "retrieval", "classification", "vqa", "nlvr2",
            "captioning", "superclass", "clip", "detection", "segmentation".
        attention: "shared" or "decoupled".
        **config: further fields of `ModelConfig`; `codebook_size` for pretraining, `num_classes` for classification,
            `num_answers` for vqa, `num_words` for superclass; those of `ClipModel` for clip, `loss` for retrieval,
            those of `DetectionModel` and `SegmentationModel` for detection and segmentation.

    Raises:
        ConfigError: unknown name, task or field; the message holds the nearest valid one.
    """
    options = {option: config.pop(option) for option in _HEAD_OPTIONS if option in config}
    return build_model(model_config(name, attention=attention, **config), task, **options)
