"""Models and processors for the `Auto` classes of Hugging Face, which importing this module registers.

    import beit3.huggingface
    model = transformers.AutoModel.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model(**processor(images=picture, text="a red cat")).last_hidden_state

A folder is an exchange folder, or `organisation/name` on the Hub. Nothing else of the package imports this module.
Loading and saving stay with `beit3.load_model` and `save_pretrained`; the model itself is held as `.model`.

Shapes: B batch, N patches, T text length, D width.
"""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, BatchFeature, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from beit3.config import require
from beit3.data.images import ImageInput, open_image
from beit3.data.preprocess import Preprocess, prepare_text
from beit3.data.source import TOKENIZER_FILE
from beit3.model.build import AnyModel, build_model
from beit3.model.exchange import CARD_FILE, is_exchange, is_weights, read_settings
from beit3.model.heads import PretrainingModel, RetrievalModel, first_text_states
from beit3.model.hub import PREFIX, local_path
from beit3.model.pretrained import model_settings, parse_model_settings
from beit3.model.store import load_model
from beit3.model.transformer import MultiwayTransformer
from beit3.tokenizer.text import TextTokenizer

_DOWNLOADING = ("cache_dir", "force_download", "local_files_only", "token")
"""Options of loading that the Hub library is given."""
_EMPTY = ("adapter_kwargs", "code_revision", "proxies", "subfolder")
"""Options that the `Auto` classes may add; there is nothing here that they could ask for."""
_IGNORED = ("revision", "trust_remote_code", "_from_auto")
"""Options that change nothing for a folder: `revision` is part of the source, and no code is run."""
_PREPARING: dict[str, tuple[object, ...]] = {
    "return_tensors": ("pt",),
    "padding": (True, "longest"),
    "truncation": (True, "longest_first"),
}
"""Usual options of processors, with the values that ask for what is done anyway."""


class Beit3Config(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """What `config.json` of an exchange folder says: task, shape of the transformer, options of the heads."""

    model_type = "beit3"
    task: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)


@dataclass
class Beit3Output(ModelOutput):
    """What a model returned; None where its task has no such thing."""

    last_hidden_state: Tensor | None = None
    """(B, 1 + N + T, D): states of the image, then of the text; backbones and pretraining models."""
    vision_hidden_state: Tensor | None = None
    """(B, 1 + N, D): class token, then patches."""
    text_hidden_state: Tensor | None = None
    """(B, T, D), zero at padding."""
    logits: Tensor | None = None
    """(B, classes) or (B, answers); (B, T, words) of captioning."""
    image_embeds: Tensor | None = None
    """(B, D) of unit length; retrieval models."""
    text_embeds: Tensor | None = None
    """(B, D) of unit length; retrieval models."""


class Beit3Model(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Any model of this package under the names of Hugging Face; random weights if none is given."""

    config_class = Beit3Config
    main_input_name = "pixel_values"

    def __init__(self, config: Beit3Config, model: AnyModel | None = None) -> None:
        super().__init__(config)
        if model is None:
            settings = {"kind": "model", "model": config.model, "task": config.task, "heads": config.heads}
            shape, task, heads, _ = parse_model_settings(settings, Path(config.name_or_path or "config"))
            model = build_model(shape, task, **heads)
        self.model = model
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights alone: our modules initialise themselves."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *_: Any, config: Beit3Config | None = None, **options: Any
    ) -> Beit3Model:
        """Load a model with `beit3.load_model`, in eval mode.

        Args:
            pretrained_model_name_or_path: source of `beit3.load_model`, or a repository of the Hub.
            config: its task is loaded.
            **options: `dtype`, the options of `beit3.load_model`, whose errors are raised, and for the Hub `revision`,
                `token`, `cache_dir`, `local_files_only`, `force_download`.
        """
        source, options = _local(pretrained_model_name_or_path, options)
        dtype = options.pop("dtype", None)
        if config is not None and config.task is not None:
            options.setdefault("task", config.task)
        unknown = sorted(options.keys() - inspect.signature(load_model).parameters.keys())
        require(not unknown, f"{', '.join(unknown)}: not an option here; load the model, then move or change it")
        model = load_model(source, **options)
        if dtype not in (None, "auto"):
            model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        own = Beit3Config(**model_settings(model))
        own.name_or_path = str(pretrained_model_name_or_path)
        loaded = cls(own, model)
        loaded.train(False)
        return loaded

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # type: ignore[override]
        """Write the files of an exchange folder; what else is in the folder stays."""
        wrong = sorted({"push_to_hub", "state_dict", "variant"} & {name for name, value in options.items() if value})
        require(not wrong, f"{', '.join(wrong)}: not an option here; use .model.save_pretrained or .model.push_to_hub")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / folder.resolve().name
            self.model.save_pretrained(made, max_shard_size=options.get("max_shard_size", "5GB"))
            for old in folder.iterdir():
                if is_weights(old.name):  # an index of other shards would lead astray
                    old.unlink()
            for file in made.iterdir():
                if file.name != CARD_FILE or not (folder / CARD_FILE).exists():
                    os.replace(file, folder / file.name)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Beit3Output | tuple[Tensor, ...]:
        """Run the model on images, texts, or pairs of both.

        Args:
            pixel_values: (B, 3, H, W) float; (B, 2, 3, H, W) for NLVR2.
            input_ids: (B, T) int.
            attention_mask: (B, T) int or bool, 1 = real token.
            bool_masked_pos: (B, N) bool, True = masked patch; backbones and pretraining models.
            return_dict: False returns what there is as a tuple.

        Raises:
            ConfigError: the model's task needs other inputs.
        """
        mask = None if attention_mask is None else attention_mask.bool()
        out = self._run(pixel_values, input_ids, mask, bool_masked_pos)
        return out.to_tuple() if return_dict is False else out

    def _run(
        self, pixel_values: Tensor | None, input_ids: Tensor | None, mask: Tensor | None, bool_masked_pos: Tensor | None
    ) -> Beit3Output:
        model = self.model
        if isinstance(model, (MultiwayTransformer, PretrainingModel)):
            out = model(pixel_values, input_ids, mask, bool_masked_pos)
            states = [state for state in (out.vision, out.text) if state is not None]
            return Beit3Output(torch.cat(states, dim=1), out.vision, out.text)
        require(bool_masked_pos is None, f"a {model.task} model takes no bool_masked_pos")
        if isinstance(model, RetrievalModel):
            require(pixel_values is not None or input_ids is not None, "give pixel_values, input_ids or both")
            return Beit3Output(
                image_embeds=None if pixel_values is None else model.encode_image(pixel_values),
                text_embeds=None if input_ids is None else model.encode_text(input_ids, mask),
            )
        reads_text = "text_ids" in inspect.signature(model.forward).parameters
        fits = pixel_values is not None and (input_ids is not None) == reads_text
        require(fits, f"a {model.task} model takes pixel_values {'and input_ids' if reads_text else 'alone'}")
        return Beit3Output(logits=model(pixel_values, input_ids, mask) if reads_text else model(pixel_values))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) as (B, D) of unit length: retrieval heads, or else the class token."""
        model = self.model
        if isinstance(model, RetrievalModel):
            return model.encode_image(pixel_values)
        out = (model if isinstance(model, MultiwayTransformer) else model.backbone)(pixel_values)
        return F.normalize(out.vision[:, 0].float(), dim=-1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embed texts (B, T) as (B, D) of unit length: retrieval heads, or else the state of `<s>`."""
        model, mask = self.model, None if attention_mask is None else attention_mask.bool()
        if isinstance(model, RetrievalModel):
            return model.encode_text(input_ids, mask)
        out = (model if isinstance(model, MultiwayTransformer) else model.backbone)(text_ids=input_ids, text_mask=mask)
        return F.normalize(first_text_states(out.text, mask).float(), dim=-1)


class Beit3Processor:
    """Pictures and texts to a model's inputs, as in training; no tokenizer for a model that reads no texts."""

    def __init__(self, preprocess: Preprocess, tokenizer: TextTokenizer | None = None) -> None:
        self.preprocess = preprocess
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Beit3Processor:
        """Read `preprocess.json` and `tokenizer.spm`; a `DataMissingError` names the one that does not exist.

        Options are those of the Hub, as for a model. An image tower alone needs no tokenizer.
        """
        place, options = _local(folder, options)
        require(not options, f"{', '.join(sorted(options))}: not an option of a processor")
        preprocess, path = Preprocess.read(place), place / TOKENIZER_FILE
        reads_text = preprocess.max_text_length > 0 and (path.is_file() or not _is_image_tower(place))
        return cls(preprocess, TextTokenizer.load(path) if reads_text else None)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write `preprocess.json` and `tokenizer.spm`; what else is in the folder stays."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        files = {} if self.tokenizer is None else {TOKENIZER_FILE: self.tokenizer.model}
        for name, content in {**self.preprocess.file(), **files}.items():
            (Path(folder) / name).write_bytes(content)

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | None = None,
        text: str | Sequence[str] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Prepare pictures, texts or both.

        Args:
            images: one or more pictures, or their paths.
            text: one or more texts; they are padded to the longest and cut to the model's `max_text_length`.
            **options: `return_tensors="pt"`, `padding=True` and `truncation=True`, which hold anyway.

        Returns:
            `pixel_values` (B, 3, H, W) float32, `input_ids` (B, T) int64, `attention_mask` (B, T) int64, 1 = real.

        Raises:
            ConfigError: another option, neither picture nor text, or a text for a model that reads none.
        """
        wrong = sorted(name for name, value in options.items() if value not in _PREPARING.get(name, ()))
        require(not wrong, f"{', '.join(wrong)}: texts come as tensors, padded to the longest, cut to max_text_length")
        require(images is not None or text is not None, "give images, text or both")
        batch: dict[str, Tensor] = {}
        if images is not None:
            pictures: Any = images if isinstance(images, (list, tuple)) else [images]
            views = [self.preprocess(open_image(picture)) for picture in pictures]
            none = torch.empty(0, 3, *self.preprocess.image_size)
            batch["pixel_values"] = self.preprocess.normalize(torch.stack(views)) if views else none
        if text is not None:
            require(self.tokenizer is not None, "this model was trained on images alone: it reads no text")
            assert self.tokenizer is not None
            texts = [prepare_text(one) for one in ([text] if isinstance(text, str) else text)]
            ids, mask = self.tokenizer.encode_batch(texts, self.preprocess.max_text_length)
            batch |= {"input_ids": ids, "attention_mask": mask.long()}
        return BatchFeature(batch)


def _local(source: str | Path, options: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Where a source lies, and the options that do not say where.

    What is no path here but looks like a repository is fetched from the Hub.
    """
    asked = sorted(name for name in _EMPTY if options.get(name))
    require(not asked, f"{', '.join(asked)}: not an option here; give the folder or the repository itself")
    rest = {name: value for name, value in options.items() if name not in (*_EMPTY, *_DOWNLOADING, *_IGNORED)}
    if not Path(source).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        revision = options.get("revision")
        source = f"{PREFIX}{source}" + (f"@{revision}" if revision else "")
    return local_path(source, **{name: options[name] for name in _DOWNLOADING if name in options}), rest


def _is_image_tower(folder: Path) -> bool:
    return is_exchange(folder) and read_settings(folder).get("part") == "vision"


AutoConfig.register("beit3", Beit3Config, exist_ok=True)
AutoModel.register(Beit3Config, Beit3Model, exist_ok=True)
AutoProcessor.register(Beit3Config, Beit3Processor, exist_ok=True)  # type: ignore[no-untyped-call]
