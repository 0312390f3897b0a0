"""Predictor: a model with everything around it that an application needs.

Shapes: n inputs, D width.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from beit3.config import require
from beit3.data.images import ImageInput, open_image
from beit3.data.labels import labels_file
from beit3.data.preprocess import Preprocess, prepare_text
from beit3.data.source import TOKENIZER_FILE, find_source, num_outputs
from beit3.data.whole_pictures import detect_image, segment_image
from beit3.errors import ConfigError
from beit3.model.build import AnyModel
from beit3.model.detection import DetectionModel, Detections, DetectionSettings, paste_masks
from beit3.model.heads import (
    CaptioningModel,
    ClassificationModel,
    NLVR2Model,
    PretrainingModel,
    RetrievalModel,
    SuperClassModel,
    VQAModel,
)
from beit3.model.presets import BOS, EOS
from beit3.model.pretrained import Part
from beit3.model.segmentation import SegmentationModel
from beit3.model.sliding_window import SlidingConfig
from beit3.model.store import load_model
from beit3.model.transformer import MultiwayTransformer, Output
from beit3.tokenizer.subwords import WordList
from beit3.tokenizer.text import TextTokenizer
from beit3.train.distributed import choose_device

Ranking = list[tuple[str, float]]
"""Names with their scores, best first."""


@dataclass(frozen=True, slots=True, eq=False)
class FoundObject:
    """One object that was found in a picture."""

    name: str
    score: float
    """In 0..1."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels of the picture."""
    shape: Tensor
    """(28, 28) float on the CPU, probabilities over the box."""
    picture_size: tuple[int, int]
    """H and W of the picture."""

    @property
    def mask(self) -> Tensor:
        """(H, W) bool, True on the object; made when it is asked for, since a hundred of them may fill the memory."""
        return paste_masks(self.shape[None], torch.tensor([self.box]), self.picture_size)[0]


logger = logging.getLogger(__name__)
T = TypeVar("T")
M = TypeVar("M")
_TEXTS = 256
"""Texts of one batch."""
_IMAGE_TOKENS = 16_384
"""Patches of one batch: 83 pictures of 224 pixels."""
_MASK = re.compile(r"\s*<mask>\s*")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    require(dtype is None or dtype in _DTYPES, f"dtype must be one of {', '.join(map(str, _DTYPES))}, not {dtype!r}")
    size = None if image_size is None else _as_size(image_size)
    target = choose_device(device or "auto")
    found = find_source(source, tokenizer=tokenizer, labels=labels)
    model = load_model(found.path, image_size=size, parts=parts)
    preprocess = found.read_preprocess(model)
    if size is not None:
        preprocess = preprocess.resized(size)
    own = model.model_config.image_size
    require(
        preprocess.image_size == own,
        f"{source} prepares pictures of {preprocess.image_size} for a model of {own}: pass image_size to load",
    )
    text = found.read_tokenizer(model, preprocess)
    names = found.read_labels(model)
    if names is None and (outputs := num_outputs(model)):
        logger.warning(
            "%s has no names for its %d outputs, so they are numbered: give a list of labels", source, outputs
        )
    words = found.read_words(model)
    model = model.to(target) if dtype is None else model.to(target, dtype)
    return Predictor(model, text, preprocess, labels=names, words=words, allow_urls=allow_urls)


def _as_size(image_size: object) -> tuple[int, int]:
    """Height and width of a side, or of both."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not (isinstance(sides, (tuple, list)) and len(sides) == 2 and all(type(side) is int for side in sides)):
        raise ConfigError(f"image_size is a side, or height and width, in pixels, not {image_size!r}")
    return sides[0], sides[1]


class Predictor:
    """Applies a model to pictures and texts. Deterministic; safe to use from several threads.

    Pictures are PIL pictures, paths, arrays, tensors, and addresses if allowed (`beit3.data.images.ImageInput`); any
    number of them at once.

    Args:
        model: in eval mode.
        tokenizer: of the model; None: verbs that need texts are refused.
        preprocess: how pictures and texts were prepared in training.
        labels: names of the classes or answers.
        words: vocabulary of a SuperClass model.
        allow_urls: whether pictures may be `http(s)://` addresses.
    """

    def __init__(
        self,
        model: AnyModel,
        tokenizer: TextTokenizer | None,
        preprocess: Preprocess,
        *,
        labels: Sequence[str] | None = None,
        words: WordList | None = None,
        allow_urls: bool = False,
    ) -> None:
        self.model = model.eval()
        self.preprocess = preprocess
        self.labels = labels
        self.words = words
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
            reason = "no tokenizer.spm or beit3.spm lies with it; name one: beit3.load(..., tokenizer=), or --tokenizer"
            if self.model.part == "vision":
                reason = "it is a vision tower alone"
            elif not self.preprocess.max_text_length:
                reason = "it reads no texts"
            raise ConfigError(f"this model has no text tokenizer: {reason}")
        return self._tokenizer

    @torch.no_grad()
    def embed_images(self, images: Iterable[ImageInput]) -> Tensor:
        """Embed pictures.

        Returns:
            (n, D) float32 on the CPU, unit length. Retrieval models use their heads, SuperClass models the mean of the
            patches, which is what they train, others the class token.

        Raises:
            DataMissingError: a picture does not exist.
            ConfigError: one cannot be read, or a picture was given instead of a list of them.
        """
        model = self.model
        if isinstance(model, RetrievalModel):
            return self._rows(images, lambda pixels: _unit(model.encode_image(pixels)))
        if isinstance(model, SuperClassModel):
            return self._rows(images, lambda pixels: _unit(_vision(self._backbone(pixels))[:, 1:].mean(1)))
        return self._rows(images, lambda pixels: _unit(_vision(self._backbone(pixels))[:, 0]))

    @torch.no_grad()
    def embed_texts(self, texts: Iterable[str]) -> Tensor:
        """Embed texts.

        Returns:
            (n, D) float32 on the CPU, unit length. Retrieval models use their heads, others the state of `<s>`.

        Raises:
            ConfigError: the model reads no texts, or a text was given instead of a list of them.
        """
        require(not isinstance(texts, (str, bytes)), "give a list of texts: embed_texts([text])")
        parts = [self._encode_texts(batch).cpu() for batch in _chunks(texts, _TEXTS)]
        return torch.cat(parts) if parts else torch.empty(0, self.model.vector_width)

    @torch.no_grad()
    def classify(self, images: Iterable[ImageInput], top: int = 5) -> list[Ranking]:
        """Name what pictures show, with probabilities.

        Raises:
            ConfigError: the model has no classes, or `top` is below 1.
        """
        _check_top(top)
        model = self._needs(ClassificationModel, "classify")
        logits = self._rows(images, model)
        return self._ranked(logits.softmax(-1), top)

    @torch.no_grad()
    def predict_words(self, images: Iterable[ImageInput], top: int = 10) -> list[Ranking]:
        """Name the subwords that the captions of pictures would hold, with probabilities; `##` marks parts of words.

        Raises:
            ConfigError: the model is no SuperClass model, or `top` is below 1.
        """
        _check_top(top)
        model = self._needs(SuperClassModel, "predict_words")
        if self.words is None:
            raise ConfigError("this model has no vocabulary: load it with beit3.load, from a folder with words.json")
        chances = self._rows(images, model).softmax(-1)[:, : len(self.words.subwords)]
        values, found = chances.topk(min(top, chances.shape[-1]))
        return [
            [(self.words.subwords.word(index), value) for index, value in zip(indices, row, strict=True)]
            for indices, row in zip(found.tolist(), values.tolist(), strict=True)
        ]

    @torch.no_grad()
    def detect(
        self,
        images: Iterable[ImageInput],
        *,
        score_threshold: float = 0.5,
        max_detections: int = 100,
        soft_nms: bool = False,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> list[list[FoundObject]]:
        """Find the objects of pictures of any size.

        Args:
            images: pictures.
            score_threshold: least score.
            max_detections: most objects of a picture.
            soft_nms: lower the scores of overlapping boxes instead of dropping them.
            scales: sizes at which a picture is looked at, relative to the model's; what is found is merged.
            flip: look at mirror images as well.

        Returns:
            for each picture its objects, best first.

        Raises:
            ConfigError: the model does not detect, or a setting is out of range.
        """
        model = self._needs(DetectionModel, "detect")
        settings = DetectionSettings(
            score_threshold=score_threshold,
            max_detections=max_detections,
            soft_nms=soft_nms,
            scales=tuple(scales),
            flip=flip,
        )
        names = self.output_names()
        return [
            self._objects(detect_image(model, self.preprocess, picture, settings), picture, names)
            for picture in self._opened(images)
        ]

    @torch.no_grad()
    def segment(
        self, images: Iterable[ImageInput], *, scales: Sequence[float] = (1.0,), flip: bool = False
    ) -> list[Tensor]:
        """Name every pixel of pictures of any size.

        Args:
            images: pictures.
            scales: sizes at which a picture is looked at, relative to the usual one; probabilities are averaged.
            flip: look at mirror images as well.

        Returns:
            for each picture (H, W) int64 on the CPU, the numbers of `labels`, at the picture's own size.

        Raises:
            ConfigError: the model does not segment, or a setting is out of range.
        """
        model = self._needs(SegmentationModel, "segment")
        settings = SlidingConfig(scales=tuple(scales), flip=flip)
        return [segment_image(model, self.preprocess, picture, settings).cpu() for picture in self._opened(images)]

    def output_names(self) -> list[str]:
        """Names of the classes or answers; numbers where the model came without."""
        kind = "answer" if isinstance(self.model, VQAModel) else "class"
        return list(self.labels or [f"{kind} {number}" for number in range(num_outputs(self.model))])

    @overload
    def answer(self, image: ImageInput, question: str, top: int = 5) -> Ranking: ...  # type: ignore[overload-overlap]

    @overload
    def answer(self, image: Sequence[ImageInput], question: Sequence[str], top: int = 5) -> list[Ranking]: ...

    @torch.no_grad()
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
            ConfigError: the model has no answers, there are not as many questions as pictures, or `top` is below 1.
        """
        _check_top(top)
        model = self._needs(VQAModel, "answer")
        found: list[Ranking] = []
        for batch in self._image_batches(_rows_of(image, question)):
            pictures, questions = zip(*batch, strict=True)
            ids, mask = self._ids(questions)
            found += self._ranked(model(self._pixels(pictures), ids, mask).float().sigmoid().cpu(), top)
        return found if _is_many(image) else found[0]

    @overload
    def reason(self, left: ImageInput, right: ImageInput, sentence: str) -> float: ...  # type: ignore[overload-overlap]

    @overload
    def reason(
        self, left: Sequence[ImageInput], right: Sequence[ImageInput], sentence: Sequence[str]
    ) -> list[float]: ...

    @torch.no_grad()
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

    def caption(
        self,
        images: Iterable[ImageInput],
        *,
        num_beams: int = 3,
        max_length: int = 32,
        length_penalty: float = 0.6,
        official: bool = False,
    ) -> list[str]:
        """Describe pictures in a sentence each, by beam search (settings as in `CaptioningModel.generate`).

        Raises:
            ConfigError: the model does not caption, or a setting is out of range.
        """
        found = self.caption_scores(
            images, num_beams=num_beams, max_length=max_length, length_penalty=length_penalty, official=official
        )
        return [text for text, _ in found]

    @torch.no_grad()
    def caption_scores(
        self,
        images: Iterable[ImageInput],
        *,
        num_beams: int = 3,
        max_length: int = 32,
        length_penalty: float = 0.6,
        official: bool = False,
    ) -> Ranking:
        """As `caption`, with the score that each search ended with: log-probability over length to a power."""
        model = self._needs(CaptioningModel, "caption")
        found: Ranking = []
        for batch in self._image_batches(_many(images)):
            captions = model.generate(
                self._pixels(batch),
                num_beams=num_beams,
                max_length=max_length,
                length_penalty=length_penalty,
                mask_id=self.tokenizer.mask_id,
                official=official,
            )
            texts = self.tokenizer.decode_batch(captions.ids)
            found += zip(texts, captions.scores.tolist(), strict=True)
        return found

    @torch.no_grad()
    def fill_mask(self, text: str, image: ImageInput | None = None, top: int = 5) -> list[Ranking]:
        """Fill every `<mask>` of a text, with or without a picture beside it.

        Args:
            text: holds `<mask>` at least once.
            image: a picture.
            top: candidates for each mask.

        Returns:
            for each mask, the most probable pieces and their probabilities.

        Raises:
            ConfigError: the model has no word head, the text no mask, or `top` is below 1.
        """
        _check_top(top)
        model = self._needs(PretrainingModel, "fill_mask")
        row = torch.tensor([self._ids_with_masks(text)], device=self._device)
        out = model(images=None if image is None else self._pixels([image]), text_ids=row)
        assert out.text is not None
        logits = model.mlm_head(out.text[0, row[0] == self.tokenizer.mask_id]).float()
        chances = logits[:, : self.tokenizer.mask_id].softmax(-1)
        values, found = chances.topk(min(top, chances.shape[-1]))
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
        words = {} if self.words is None else self.words.files()
        return {**self.preprocess.file(), **tokenizer, **labels, **words}

    def _needs(self, kind: type[M], verb: str) -> M:
        if not isinstance(self.model, kind):
            held = "a backbone" if self.model.task is None else f"a {self.model.task} model"
            raise ConfigError(f"{verb} needs a {getattr(kind, 'task', kind.__name__)} model; this is {held}")
        return self.model

    def _rows(self, images: Iterable[ImageInput], encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a map of pixels to rows batch by batch; (n, ...) float32 on the CPU."""
        parts = [encode(self._pixels(batch)).float().cpu() for batch in self._image_batches(_many(images))]
        return torch.cat(parts) if parts else torch.empty(0, self.model.vector_width)

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        ids, mask = self._ids(texts)
        if isinstance(self.model, RetrievalModel):
            return _unit(self.model.encode_text(ids, mask))
        out: Output = self._backbone(text_ids=ids, text_mask=mask)
        assert out.text is not None
        return _unit(out.text[:, 0])

    def _ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokenizer = self.tokenizer
        ids, mask = tokenizer.encode_batch([prepare_text(text) for text in texts], self.preprocess.max_text_length)
        return ids.to(self._device), mask.to(self._device)

    def _ids_with_masks(self, text: str) -> list[int]:
        parts = _MASK.split(prepare_text(text))
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

    def _opened(self, images: Iterable[ImageInput]) -> Iterator[Image.Image]:
        """Pictures at their own size, one after the other."""
        return (open_image(image, self._allow_urls) for image in _many(images))

    @staticmethod
    def _objects(found: Detections, picture: Image.Image, names: Sequence[str]) -> list[FoundObject]:
        """What was found in a picture, by name."""
        size = (picture.height, picture.width)
        boxes, scores, labels = found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()
        return [
            FoundObject(names[label], score, (box[0], box[1], box[2], box[3]), shape, size)
            for label, score, box, shape in zip(labels, scores, boxes, found.masks.float().cpu(), strict=True)
        ]

    def _image_batches(self, items: Iterable[T]) -> Iterator[list[T]]:
        return _chunks(items, self._images_at_once)

    def _ranked(self, scores: Tensor, top: int) -> list[Ranking]:
        """The best `top` of scores (n, outputs), by name."""
        names = self.output_names()
        values, found = scores.topk(min(top, scores.shape[-1]))
        return [
            [(names[index], value) for index, value in zip(indices, row, strict=True)]
            for indices, row in zip(found.tolist(), values.tolist(), strict=True)
        ]


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


def _unit(states: Tensor) -> Tensor:
    """Unit length in float32: in half precision a length is off by thousandths."""
    return F.normalize(states.float(), dim=-1)


def _check_top(top: int) -> None:
    require(isinstance(top, int) and top >= 1, f"top must be a whole number of at least 1, not {top!r}")


def _many(images: Iterable[ImageInput]) -> Iterable[ImageInput]:
    """Refuse one picture where a list of them belongs."""
    single = isinstance(images, (str, bytes, Path, Image.Image))
    if single or (isinstance(images, (Tensor, np.ndarray)) and images.ndim < 4):
        raise ConfigError("give a list of pictures: [picture] for one")
    if not isinstance(images, Iterable):
        raise ConfigError(f"give a list of pictures, not a {type(images).__name__}")
    return images


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
