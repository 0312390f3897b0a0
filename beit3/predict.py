"""Predictor: a model with everything around it that an application needs.

Shapes: n inputs, D width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from beit3.data.images import decode_image
from beit3.data.texts import clean_text
from beit3.data.transforms import EvalResize, normalize
from beit3.errors import BadSampleError, ConfigError, DataMissingError
from beit3.model.heads import AnyModel, PretrainingModel, RetrievalModel
from beit3.model.presets import BOS, EOS
from beit3.model.store import load_model
from beit3.model.transformer import MultiwayTransformer
from beit3.tokenizer.text import TextTokenizer
from beit3.train.distributed import choose_device

ImageInput = Image.Image | str | Path
T = TypeVar("T")
_BATCH = 256
_MASK = re.compile(r"\s*<mask>\s*")


def load(source: str | Path, device: str | None = None, dtype: torch.dtype | None = None) -> Predictor:
    """Load a model with its text tokenizer and preprocessing.

    Args:
        source: exchange folder written by a run.
        device: None takes CUDA, then MPS, then the CPU.
        dtype: of the weights; None keeps fp32.

    Raises:
        DataMissingError: the folder or one of its files does not exist.
    """
    folder = Path(source)
    model = load_model(folder).to(choose_device(device or "auto"))
    preprocess = folder / "preprocess.json"
    if not preprocess.is_file():
        raise DataMissingError(f"{preprocess} does not exist: use load_model for a model without preprocessing")
    settings = json.loads(preprocess.read_text(encoding="utf-8"))
    tokenizer = TextTokenizer.load(folder / "tokenizer.spm") if "max_text_length" in settings else None
    return Predictor(model if dtype is None else model.to(dtype), tokenizer, settings)


class Predictor:
    """Applies a model to pictures and texts. Safe to use from several threads.

    Args:
        model: in eval mode.
        tokenizer: of the model; None for one that was trained on images alone.
        preprocess: content of `preprocess.json`.
    """

    def __init__(self, model: AnyModel, tokenizer: TextTokenizer | None, preprocess: dict[str, Any]) -> None:
        self.model = model.eval()
        self._backbone = model if isinstance(model, MultiwayTransformer) else model.backbone
        self._tokenizer = tokenizer
        self.max_text_length = int(preprocess.get("max_text_length", 0))
        height, width = preprocess["image_size"]
        self._view = EvalResize((height, width))
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype

    @property
    def tokenizer(self) -> TextTokenizer:
        """The text tokenizer.

        Raises:
            ConfigError: the model was trained on images alone.
        """
        if self._tokenizer is None:
            raise ConfigError("this model was trained on images alone: it has no text tokenizer")
        return self._tokenizer

    @torch.inference_mode()
    def embed_images(self, images: Sequence[ImageInput]) -> Tensor:
        """Embed pictures.

        Args:
            images: PIL pictures or paths.

        Returns:
            (n, D) float32 on the CPU, unit length. Retrieval models use their heads, others the class token.
        """
        return self._in_batches(images, lambda batch: self._encode_images(self._images(batch)))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as (n, D) float32 on the CPU, unit length."""
        return self._in_batches(texts, self._encode_texts)

    @torch.inference_mode()
    def fill_mask(self, text: str, image: ImageInput | None = None, top: int = 5) -> list[list[tuple[str, float]]]:
        """Fill every `<mask>` of a text, with or without a picture beside it.

        Args:
            text: holds `<mask>` at least once.
            image: PIL picture or path.
            top: candidates for each mask.

        Returns:
            for each mask, the most probable pieces and their probabilities.

        Raises:
            ConfigError: the model has no word head, or the text no mask.
        """
        if not isinstance(self.model, PretrainingModel):
            raise ConfigError("fill_mask needs a pretraining model: load the export of a masked-data-modeling run")
        parts = _MASK.split(text)
        if len(parts) < 2:
            raise ConfigError("fill_mask needs a text with <mask>")
        ids = [BOS]
        for number, part in enumerate(parts):
            ids += [self.tokenizer.mask_id] if number else []
            ids += self.tokenizer.encode(part)[1:-1]
        longest = self.model.backbone.config.max_text_length
        if len(ids) >= longest:
            raise ConfigError(f"the text has {len(ids) + 1} ids, the model reads {longest}: shorten it")
        row = torch.tensor([[*ids, EOS]], device=self._device)
        out = self.model(images=None if image is None else self._images([image]), text_ids=row)
        assert out.text is not None
        logits = self.model.mlm_head(out.text[0, row[0] == self.tokenizer.mask_id]).float()
        values, found = logits[:, : self.tokenizer.mask_id].softmax(-1).topk(top)
        return [
            [(self.tokenizer.piece(int(index)), float(value)) for index, value in zip(indices, row_values, strict=True)]
            for indices, row_values in zip(found, values, strict=True)
        ]

    def _encode_images(self, images: Tensor) -> Tensor:
        if isinstance(self.model, RetrievalModel):
            return self.model.encode_image(images)
        out = self._backbone(images)
        assert out.vision is not None
        return F.normalize(out.vision[:, 0], dim=-1)

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        ids, mask = self.tokenizer.encode_batch([_clean(text) for text in texts], self.max_text_length)
        ids, mask = ids.to(self._device), mask.to(self._device)
        if isinstance(self.model, RetrievalModel):
            return self.model.encode_text(ids, mask)
        out = self._backbone(text_ids=ids, text_mask=mask)
        assert out.text is not None
        return F.normalize(out.text[:, 0], dim=-1)

    def _images(self, images: Sequence[ImageInput]) -> Tensor:
        pixels = torch.stack([self._view(_open(image)) for image in images])
        return normalize(pixels.to(self._device)).to(self._dtype)

    def _in_batches(self, items: Sequence[T], encode: Callable[[Sequence[T]], Tensor]) -> Tensor:
        parts = [encode(batch).float().cpu() for batch in _chunks(items)]
        return torch.cat(parts) if parts else torch.empty(0, self._backbone.config.width)


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]


def _clean(text: str) -> str:
    """The text as in training; an empty one stays empty."""
    return clean_text(text) if text.strip() else ""


def _open(image: ImageInput) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    path = Path(image)
    if not path.is_file():
        raise DataMissingError(f"picture {path} does not exist")
    try:
        return decode_image(path.read_bytes())
    except BadSampleError as error:
        raise ConfigError(f"picture {path} cannot be read ({error})") from error
