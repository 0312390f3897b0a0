"""Predictor: a model with everything around it that an application needs.

Shapes: n inputs, D width.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.data import labels as label_files
from beit3.data.images import ImageInput, open_image
from beit3.data.labels import imagenet_labels, labels_file, read_labels
from beit3.data.preprocess import Preprocess
from beit3.data.texts import clean_text
from beit3.errors import ConfigError
from beit3.model.exchange import CONFIG_FILE, Part
from beit3.model.heads import (
    AnyModel,
    CaptioningModel,
    ClassificationModel,
    NLVR2Model,
    PretrainingModel,
    RetrievalModel,
    VQAModel,
)
from beit3.model.hub import local_path
from beit3.model.presets import BOS, EOS, PAD
from beit3.model.store import load_model
from beit3.model.transformer import MultiwayTransformer, Output
from beit3.tokenizer.text import TextTokenizer
from beit3.train.distributed import choose_device

Ranking = list[tuple[str, float]]
"""Names with their scores, best first."""
logger = logging.getLogger(__name__)
T = TypeVar("T")
M = TypeVar("M")
_TEXTS = 256
"""Texts of one batch."""
_IMAGE_TOKENS = 16_384
"""Patches of one batch: 83 pictures of 224 pixels."""
_MASK = re.compile(r"\s*<mask>\s*")
TOKENIZER_FILE = "tokenizer.spm"
RELEASED_TOKENIZER = "beit3.spm"
_UNUSED_ROWS = 8
"""Rows of the released word embedding that no id of `beit3.spm` reaches."""


def load(
    source: str | Path,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    parts: Part | None = None,
    tokenizer: str | Path | None = None,
    labels: str | Path | None = None,
    allow_urls: bool = False,
) -> Predictor:
    """Load a model with its text tokenizer, preprocessing and labels.

    Args:
        source: exchange folder written by a run, `save_pretrained` or `beit3 convert`; "hf-hub:organisation/name"; or a
            released `.pth` file, beside which `beit3.spm` is looked for.
        device: None takes CUDA, then MPS, then the CPU.
        dtype: of the weights; None keeps fp32.
        image_size: side, or height and width; None keeps the source's resolution.
        parts: "vision" or "text" loads one tower, in half the memory.
        tokenizer: `.spm` file to use instead.
        labels: `labels.json` or the released `answer2label.txt` to use instead.
        allow_urls: whether pictures may be `http(s)://` addresses.

    Raises:
        DataMissingError: the source or one of its files does not exist.
        ConfigError: the source is damaged, or tokenizer or labels do not fit the model.
    """
    place = local_path(source)
    model = load_model(place, image_size=image_size, parts=parts)
    if (place / CONFIG_FILE).is_file():
        preprocess = Preprocess.read(place)
        if image_size is not None:
            preprocess = preprocess.resized(model.model_config.image_size)
        beside = place / TOKENIZER_FILE if preprocess.max_text_length else None
    else:
        preprocess = Preprocess.of_task(model.model_config, model.task)
        found = place.with_name(RELEASED_TOKENIZER)
        beside = found if preprocess.max_text_length and found.is_file() else None
    spm = Path(tokenizer) if tokenizer is not None else beside
    text = None if spm is None or model.part == "vision" else TextTokenizer.load(spm)
    if text is not None:
        _check_vocabulary(text, model, f"{spm}", released=not (place / CONFIG_FILE).is_file())
    names = _find_labels(model, place, None if labels is None else Path(labels))
    target = choose_device(device or "auto")
    model = model.to(target) if dtype is None else model.to(target, dtype)
    return Predictor(model, text, preprocess, labels=names, allow_urls=allow_urls)


class Predictor:
    """Applies a model to pictures and texts. Deterministic; safe to use from several threads.

    Pictures are PIL pictures, paths, arrays, tensors, and addresses if allowed (`beit3.data.images.ImageInput`); any
    number of them at once.

    Args:
        model: in eval mode.
        tokenizer: of the model; None for one that was trained on images alone.
        preprocess: how pictures and texts were prepared in training.
        labels: names of the classes or answers.
        allow_urls: whether pictures may be `http(s)://` addresses.
    """

    def __init__(
        self,
        model: AnyModel,
        tokenizer: TextTokenizer | None,
        preprocess: Preprocess,
        *,
        labels: Sequence[str] | None = None,
        allow_urls: bool = False,
    ) -> None:
        self.model = model.eval()
        self.preprocess = preprocess
        self.labels = labels
        self._backbone = model if isinstance(model, MultiwayTransformer) else model.backbone
        self._tokenizer = tokenizer
        self._allow_urls = allow_urls
        self._images_at_once = max(1, _IMAGE_TOKENS // (1 + model.model_config.num_patches))
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype

    @property
    def tokenizer(self) -> TextTokenizer:
        """The text tokenizer.

        Raises:
            ConfigError: the model has none.
        """
        if self._tokenizer is None:
            raise ConfigError(
                "this model has no text tokenizer: it was trained on images alone, or no beit3.spm lies beside it; "
                "pass tokenizer='beit3.spm' to beit3.load"
            )
        return self._tokenizer

    @torch.inference_mode()
    def embed_images(self, images: Sequence[ImageInput]) -> Tensor:
        """Embed pictures.

        Returns:
            (n, D) float32 on the CPU, unit length. Retrieval models use their heads, others the class token.
        """
        if isinstance(self.model, RetrievalModel):
            return self._rows(images, self.model.encode_image)
        return self._rows(images, lambda pixels: F.normalize(_vision(self._backbone(pixels))[:, 0], dim=-1))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as (n, D) float32 on the CPU, unit length."""
        parts = [self._encode_texts(batch).float().cpu() for batch in _chunks(texts, _TEXTS)]
        return torch.cat(parts) if parts else torch.empty(0, self._backbone.config.width)

    @torch.inference_mode()
    def classify(self, images: Sequence[ImageInput], top: int = 5) -> list[Ranking]:
        """Name what pictures show, with probabilities.

        Raises:
            ConfigError: the model has no classes.
        """
        model = self._needs(ClassificationModel, "classify")
        logits = self._rows(images, model)
        return self._ranked(logits.softmax(-1), top, "class")

    @overload
    def answer(self, image: ImageInput, question: str, top: int = 5) -> Ranking: ...  # type: ignore[overload-overlap]

    @overload
    def answer(self, image: Sequence[ImageInput], question: Sequence[str], top: int = 5) -> list[Ranking]: ...

    @torch.inference_mode()
    def answer(
        self, image: ImageInput | Sequence[ImageInput], question: str | Sequence[str], top: int = 5
    ) -> Ranking | list[Ranking]:
        """Answer questions about pictures.

        Args:
            image: a picture, or a list or tuple of them.
            question: a question, or one for each picture.
            top: answers for each.

        Returns:
            Answers and their scores in 0..1 (each judged on its own, as in training); a list of such for lists.

        Raises:
            ConfigError: the model has no answers, or there are not as many questions as pictures.
        """
        model = self._needs(VQAModel, "answer")
        found: list[Ranking] = []
        for batch in self._image_batches(_rows_of(image, question)):
            pictures, questions = zip(*batch, strict=True)
            ids, mask = self._ids(questions)
            found += self._ranked(model(self._pixels(pictures), ids, mask).float().sigmoid().cpu(), top, "answer")
        return found if _is_many(image) else found[0]

    @overload
    def reason(self, left: ImageInput, right: ImageInput, sentence: str) -> float: ...  # type: ignore[overload-overlap]

    @overload
    def reason(
        self, left: Sequence[ImageInput], right: Sequence[ImageInput], sentence: Sequence[str]
    ) -> list[float]: ...

    @torch.inference_mode()
    def reason(
        self,
        left: ImageInput | Sequence[ImageInput],
        right: ImageInput | Sequence[ImageInput],
        sentence: str | Sequence[str],
    ) -> float | list[float]:
        """Judge whether sentences are true of two pictures each: probabilities.

        Raises:
            ConfigError: the model was not trained for it, or the numbers of inputs differ.
        """
        model = self._needs(NLVR2Model, "reason")
        found: list[float] = []
        for batch in self._image_batches(_rows_of(left, right, sentence)):
            lefts, rights, sentences = zip(*batch, strict=True)
            ids, mask = self._ids(sentences)
            logits = model(torch.stack([self._pixels(lefts), self._pixels(rights)], dim=1), ids, mask)
            found += logits.float().softmax(-1)[:, 1].tolist()
        return found if _is_many(left) else found[0]

    @torch.inference_mode()
    def caption(
        self, images: Sequence[ImageInput], *, num_beams: int = 3, max_length: int = 32, length_penalty: float = 0.6
    ) -> list[str]:
        """Describe pictures in a sentence each, by beam search (settings as in `CaptioningModel.generate`).

        Raises:
            ConfigError: the model does not caption, or a setting is out of range.
        """
        model = self._needs(CaptioningModel, "caption")
        found: list[str] = []
        for batch in self._image_batches(images):
            captions = model.generate(
                self._pixels(batch),
                num_beams=num_beams,
                max_length=max_length,
                length_penalty=length_penalty,
                mask_id=self.tokenizer.mask_id,
            )
            found += [self.tokenizer.decode(word for word in row if word != PAD) for row in captions.ids.tolist()]
        return found

    @torch.inference_mode()
    def fill_mask(self, text: str, image: ImageInput | None = None, top: int = 5) -> list[Ranking]:
        """Fill every `<mask>` of a text, with or without a picture beside it.

        Args:
            text: holds `<mask>` at least once.
            image: a picture.
            top: candidates for each mask.

        Returns:
            for each mask, the most probable pieces and their probabilities.

        Raises:
            ConfigError: the model has no word head, or the text no mask.
        """
        model = self._needs(PretrainingModel, "fill_mask")
        row = torch.tensor([self._ids_with_masks(text)], device=self._device)
        out = model(images=None if image is None else self._pixels([image]), text_ids=row)
        assert out.text is not None
        logits = model.mlm_head(out.text[0, row[0] == self.tokenizer.mask_id]).float()
        values, found = logits[:, : self.tokenizer.mask_id].softmax(-1).topk(top)
        return [
            [(self.tokenizer.piece(index), value) for index, value in zip(indices, row_values, strict=True)]
            for indices, row_values in zip(found.tolist(), values.tolist(), strict=True)
        ]

    def save_pretrained(
        self, folder: str | Path, *, licence: str | None = None, numbers: Mapping[str, float | str] | None = None
    ) -> None:
        """Write model, tokenizer, preprocessing and labels as an exchange folder (see `PretrainedModel`)."""
        self.model.save_pretrained(folder, self._files(), licence=licence, numbers=numbers)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        licence: str | None = None,
        numbers: Mapping[str, float | str] | None = None,
    ) -> str:
        """Publish all of it on the Hugging Face Hub (see `PretrainedModel`); returns the commit's address."""
        return self.model.push_to_hub(name, self._files(), private=private, licence=licence, numbers=numbers)

    def _files(self) -> dict[str, bytes]:
        tokenizer = {} if self._tokenizer is None else {TOKENIZER_FILE: self._tokenizer.model}
        labels = {} if self.labels is None else labels_file(self.labels)
        return {**self.preprocess.file(), **tokenizer, **labels}

    def _needs(self, kind: type[M], verb: str) -> M:
        if not isinstance(self.model, kind):
            held = "a backbone" if self.model.task is None else f"a {self.model.task} model"
            raise ConfigError(f"{verb} needs a {getattr(kind, 'task', kind.__name__)} model; this is {held}")
        return self.model

    def _rows(self, images: Sequence[ImageInput], encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a map of pixels to rows batch by batch; (n, ...) float32 on the CPU."""
        parts = [encode(self._pixels(batch)).float().cpu() for batch in self._image_batches(images)]
        return torch.cat(parts) if parts else torch.empty(0, self._backbone.config.width)

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        ids, mask = self._ids(texts)
        if isinstance(self.model, RetrievalModel):
            return self.model.encode_text(ids, mask)
        out: Output = self._backbone(text_ids=ids, text_mask=mask)
        assert out.text is not None
        return F.normalize(out.text[:, 0], dim=-1)

    def _ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = self.tokenizer.encode_batch([_clean(text) for text in texts], self.preprocess.max_text_length)
        return ids.to(self._device), mask.to(self._device)

    def _ids_with_masks(self, text: str) -> list[int]:
        parts = _MASK.split(text)
        if len(parts) < 2:
            raise ConfigError("fill_mask needs a text with <mask>")
        ids = [BOS]
        for number, part in enumerate(parts):
            ids += [self.tokenizer.mask_id] if number else []
            ids += self.tokenizer.encode(part)[1:-1]
        longest = self._backbone.config.max_text_length
        if len(ids) >= longest:
            raise ConfigError(f"the text has {len(ids) + 1} ids, the model reads {longest}: shorten it")
        return [*ids, EOS]

    def _pixels(self, images: Sequence[ImageInput]) -> Tensor:
        pixels = torch.stack([self.preprocess(open_image(image, self._allow_urls)) for image in images])
        return self.preprocess.normalize(pixels.to(self._device)).to(self._dtype)

    def _image_batches(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        return _chunks(items, self._images_at_once)

    def _ranked(self, scores: Tensor, top: int, kind: str) -> list[Ranking]:
        """The best `top` of scores (n, outputs), by name."""
        names = self.labels or [f"{kind} {number}" for number in range(scores.shape[-1])]
        values, found = scores.topk(min(top, scores.shape[-1]))
        return [
            [(names[index], value) for index, value in zip(indices, row, strict=True)]
            for indices, row in zip(found.tolist(), values.tolist(), strict=True)
        ]


def _find_labels(model: AnyModel, place: Path, given: Path | None) -> list[str] | None:
    """Names of a model's outputs: those given, those stored with it, or ImageNet's; their number must fit."""
    outputs = next(
        (int(model.head_options[name]) for name in ("num_classes", "num_answers") if name in model.head_options), 0
    )
    if not outputs:
        return None
    path = given or place / label_files.FILE
    if given is None and not path.is_file():
        if model.task == "classification" and outputs == len(names := imagenet_labels()):
            return names
        logger.warning(
            "%s has no names for its %d outputs, so they are numbered: give a list of labels", place, outputs
        )
        return None
    names = read_labels(path)
    if len(names) != outputs:
        raise ConfigError(
            f"{path} names {len(names)} outputs, the model has {outputs}: these labels belong to another model"
        )
    return names


def _check_vocabulary(tokenizer: TextTokenizer, model: AnyModel, path: str, *, released: bool) -> None:
    rows = model.model_config.vocab_size
    if len(tokenizer) > rows or (released and len(tokenizer) != rows - _UNUSED_ROWS):
        raise ConfigError(
            f"{path} has {len(tokenizer):,} ids, but the model {rows:,} words: this tokenizer belongs to another model"
        )


def _is_many(part: object) -> bool:
    return isinstance(part, (list, tuple))


def _rows_of(*inputs: Any) -> list[tuple[Any, ...]]:
    """Rows of pictures and a text, from single inputs or from lists."""
    columns = [part if _is_many(part) else [part] for part in inputs]
    if len({_is_many(part) for part in inputs}) > 1 or len({len(column) for column in columns}) > 1:
        numbers = ", ".join(str(len(column)) for column in columns)
        raise ConfigError(f"{numbers} pictures and texts: give one of each, or lists of equal length")
    return list(zip(*columns, strict=True))


def _vision(out: Output) -> Tensor:
    assert out.vision is not None
    return out.vision


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _clean(text: str) -> str:
    """The text as in training; an empty one stays empty."""
    return clean_text(text) if text.strip() else ""
