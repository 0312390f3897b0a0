"""What `beit3 info` says of a model: task, shapes, counts by tower, how it is stored, what is missing around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from beit3.data.preprocess import Preprocess
from beit3.data.source import RELEASED_TOKENIZER, TOKENIZER_FILE, Source
from beit3.errors import BeitError
from beit3.model.build import AnyModel
from beit3.model.heads import ClipModel
from beit3.model.transformer import MultiwayTransformer


def describe_model(source: Source, model: AnyModel) -> list[str]:
    """Describe a model and what lies with it, and name what does not fit together."""
    config = model.model_config
    height, width = config.image_size
    part = "" if model.part is None else f", {model.part} tower alone"
    rows, columns = config.grid
    around, problems = _around(source, model)
    layout = "exchange folder" if source.is_folder else "released layout"
    backbone = model if isinstance(model, MultiwayTransformer) else model.backbone
    reads_no_text = backbone.part == "vision" and not isinstance(model, ClipModel)
    words = f"  texts       {config.vocab_size:,} rows of words, at most {config.max_text_length} ids; "
    words += around["tokenizer"]
    return [
        f"{source.path}: {model.task or 'backbone'}{part}, {layout}",
        f"  shape       {config.num_layers} layers of {config.width}, {config.num_heads} heads, FFN {config.ffn_width}",
        *_text_tower(model),
        f"  attention   {config.attention}, {config.fusion_layers} fusion layers"
        + ("" if config.final_norm else ", no final norm"),
        f"  pictures    {height} x {width} pixels in {rows} x {columns} patches of {config.patch_size}; "
        + around["preprocess"],
        *([] if reads_no_text else [words]),
        *(f"  outputs     {number:,} {name}{around['labels']}" for name, number in _outputs(model)),
        f"  parameters  {model.num_parameters:,} ({_by_tower(model)})",
        *(f"  problems    {problem}" for problem in problems),
    ]


def _around(source: Source, model: AnyModel) -> tuple[dict[str, str], list[str]]:
    """What lies with a model, in words; and why some of it cannot be used, as loading it would say."""
    absent = TOKENIZER_FILE if source.is_folder else RELEASED_TOKENIZER
    words = {"preprocess": "preprocessing unusable", "tokenizer": f"no {absent}", "labels": ""}
    problems: list[str] = []
    preprocess = Preprocess.of_task(model.model_config, model.task)
    try:
        preprocess = source.read_preprocess(model)
        mean = " ".join(f"{value:g}" for value in preprocess.mean)
        words["preprocess"] = f"{preprocess.resize}, mean {mean}" + (" (as released)" if not source.preprocess else "")
    except BeitError as error:
        problems.append(str(error))
    try:
        tokenizer = source.read_tokenizer(model, preprocess)
        if tokenizer is not None and source.tokenizer is not None:
            words["tokenizer"] = f"{source.tokenizer.name} has {len(tokenizer):,} ids"
        elif source.tokenizer is not None:
            words["tokenizer"] = f"{source.tokenizer.name} is not used"
    except BeitError as error:
        words["tokenizer"] = "text tokenizer unusable"
        problems.append(str(error))
    try:
        labels = source.read_labels(model)
        if labels is not None:
            words["labels"] = f"; {source.labels.name if source.labels else 'ImageNet'} names {len(labels):,}"
    except BeitError as error:
        problems.append(str(error))
    return words, problems


def _text_tower(model: AnyModel) -> list[str]:
    if not isinstance(model, ClipModel):
        return []
    text, width = model.text_backbone.config, model.head_options["embed_width"]
    return [
        f"  text tower  {text.num_layers} layers of {text.width}, {text.num_heads} heads; vectors of {width}, "
        f"images by {model.pooling}"
    ]


def _outputs(model: AnyModel) -> list[tuple[str, int]]:
    return [
        (option.removeprefix("num_").replace("_size", " codes"), number)
        for option, number in model.head_options.items()
        if option in ("num_classes", "num_answers", "num_words", "codebook_size")
    ]


def _by_tower(model: AnyModel) -> str:
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if model.task is not None and not name.startswith(("backbone.", "text_backbone.")):
            counts["heads"] += parameter.numel()
        else:
            counts[next((tower for tower in ("vision", "text", "fusion") if tower in name), "shared")] += (
                parameter.numel()
            )
    return ", ".join(
        f"{name} {counts[name] / 1e6:,.1f}M" for name in ("vision", "text", "shared", "fusion", "heads") if counts[name]
    )


def describe_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Say how many tensors there are, of which types and size."""
    types = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
    size = sum(value.nbytes for value in tensors.values())
    return f"  stored      {len(tensors):,} tensors as {' and '.join(types)}, {size / 1e6:,.1f} MB"
