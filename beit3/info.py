"""What a file or folder holds: a model, a visual or text tokenizer, prepared data; and a page about a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn
from tyro.conf import Positional

from beit3.config import require
from beit3.data.shard_writer import PrepareReport
from beit3.data.shards import REPORT_FILE
from beit3.errors import ConfigError, DataMissingError
from beit3.model import official
from beit3.model.exchange import read_settings
from beit3.model.presets import ModelConfig
from beit3.model.store import load_model
from beit3.tokenizer.official import is_visual_tokenizer, load_visual_tokenizer
from beit3.tokenizer.teachers import read_teacher
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.vqkd import VQKD
from beit3.tokenizer_page import load_pictures, write_tokenizer_page
from beit3.train.loop import EXPORT


def info(source: Positional[Path], *, page: Path | None = None, images: Path | None = None, number: int = 2000) -> None:
    """Say what a file or folder holds; for a visual tokenizer, write a page of what its codes mean.

    Args:
        source: folder of a run or its export, released `.pth` file, `.spm` file, or prepared data.
        page: HTML file to write about a visual tokenizer; needs `images`.
        images: prepared folder whose pictures the page shows.
        number: pictures of the page, drawn at random.
    """
    if source.is_dir() and (source / EXPORT).is_dir():
        source = source / EXPORT
    print("\n".join(describe(source)))
    require((page is None) == (images is None), "a page needs both --page and --images")
    if page is None or images is None:
        return
    if not _holds_visual_tokenizer(source):
        raise ConfigError(f"{source} is no visual tokenizer: pages are written about those alone")
    tokenizer = load_visual_tokenizer(source)
    pictures = load_pictures(images, tokenizer.config.image_size, number)
    teacher = read_teacher(source) if source.is_dir() else None
    lead = f"{_tokenizer_line(tokenizer)}. Shown on {len(pictures):,} pictures of {images.name}."
    title = f"Visual tokenizer {source.parent.name if source.name == EXPORT else source.stem}"
    write_tokenizer_page(page, tokenizer, pictures, title=title, lead=lead, teacher=teacher)
    print(f"{page}: written")


def describe(source: Path) -> list[str]:
    """What a source holds, in a few lines.

    Raises:
        DataMissingError: the source does not exist.
        ConfigError: it is none of the known kinds, or damaged.
    """
    if not source.exists():
        raise DataMissingError(f"{source} does not exist")
    if (source / REPORT_FILE).is_file():
        return PrepareReport(**json.loads((source / REPORT_FILE).read_text(encoding="utf-8"))).lines()
    if source.suffix == ".spm":
        tokenizer = TextTokenizer.load(source)
        return [f"{source}: text tokenizer", f"  ids         {len(tokenizer):,}, <mask> is {tokenizer.mask_id}"]
    if _holds_visual_tokenizer(source):
        return _describe_tokenizer(source)
    model = load_model(source)
    return [f"{source}: {model.task or 'backbone'}", *_shape(model.model_config), _parameters(model)]


def _holds_visual_tokenizer(source: Path) -> bool:
    if (source / "config.json").is_file():
        return bool(read_settings(source).get("kind") == "vqkd")
    return source.is_file() and source.suffix != ".spm" and is_visual_tokenizer(official.read_official(source))


def _describe_tokenizer(source: Path) -> list[str]:
    tokenizer = load_visual_tokenizer(source)
    lines = [f"{source}: visual tokenizer (VQ-KD)", f"  shape       {_tokenizer_line(tokenizer)}"]
    values = tokenizer.quantize.statistics()
    if float(tokenizer.quantize.usage.sum()):
        use = f"{float(values['codebook_use']):.1%}, perplexity {float(values['perplexity']):,.0f}"
        lines.append(f"  use         {use} (moving average of training)")
    teacher = read_teacher(source) if source.is_dir() else None
    if teacher is not None:
        named = "" if teacher.kind == "efficientnet_lite0" else f" {teacher.name}"
        lines.append(f"  teacher     {teacher.kind}{named} at {teacher.image_size} pixels")
    return [*lines, _parameters(tokenizer)]


def _tokenizer_line(tokenizer: VQKD) -> str:
    own = tokenizer.config
    height, width = own.image_size
    return (
        f"{own.codebook_size:,} codes of {own.code_width}, {height} x {width} pixels in patches of {own.patch_size}, "
        f"encoder of {own.depth} layers and decoder of {own.decoder_depth}, width {own.width}"
    )


def _shape(config: ModelConfig) -> list[str]:
    height, width = config.image_size
    return [
        f"  shape       {config.num_layers} layers of {config.width}, {config.num_heads} heads, FFN {config.ffn_width}",
        f"  attention   {config.attention}, {config.fusion_layers} fusion layers",
        f"  pictures    {height} x {width} pixels in patches of {config.patch_size}",
        f"  texts       {config.vocab_size:,} ids, at most {config.max_text_length} of them",
    ]


def _parameters(model: nn.Module) -> str:
    return f"  parameters  {sum(parameter.numel() for parameter in model.parameters()):,}"
