"""Masked image modeling of images alone: BEiT v2 (arXiv 2208.06366) with patch aggregation, or pixel targets.

Shapes: B images, N patches, M hidden patches of the batch, K codes, P patch side, D width, Nv = B (1 + N).

    loss = l(head(norm(states after the last layer)))  +  l(head(norm(aggregated states)))     at hidden patches
    aggregated = two more blocks over [class token after the last layer, patches after an early layer]

The class token alone carries what the early patches lack, so it learns to describe the whole picture (BEiT v2, section
2.3). Norm and head are shared; the two blocks are dropped after pretraining. `l` is cross-entropy over visual tokens,
or the squared error of pixels that were normalised patch by patch (MAE, arXiv 2111.06377).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import Run, TaskConfig, config, require
from beit3.data.preprocess import Preprocess
from beit3.data.streams import Stream, StreamLoader
from beit3.data.transforms import CropConfig, EvalResize, Views, normalize
from beit3.data.visual_codes import CodeTable, open_codes
from beit3.model.attention import plan_attention
from beit3.model.embeddings import cut_patches
from beit3.model.flops import forward_flops
from beit3.model.heads import CODEBOOK_SIZE
from beit3.model.memory import BatchSizes, Head, Pass, Sequences, tokenizer_pass
from beit3.model.multiway import MultiwayBlock
from beit3.model.presets import ModelConfig
from beit3.model.transformer import MultiwayTransformer, PackedOutput, init_sub_ln
from beit3.pretrain.masked_batches import MaskedBatch, MaskedEncoder, fixed_batches, hidden_codes, training_crop
from beit3.pretrain.masking import MaskConfig
from beit3.tokenizer.official import load_visual_tokenizer
from beit3.tokenizer.vqkd import VQKD
from beit3.train.task import Loader, Mapped, Task, Work

_PIXEL_EPS = 1e-6


@config
class MaskedImageModelingConfig(TaskConfig):
    """Model, targets, pictures and masks of masked image modeling."""

    model: ModelConfig
    target: Literal["codes", "pixels"] = "codes"
    """`codes`: visual tokens of `visual_tokenizer`; `pixels`: the hidden patches themselves, normalised."""
    visual_tokenizer: Path | None = None
    """Exchange folder or released file of a VQ-KD tokenizer; needed for `codes`, unused for `pixels`."""
    images: Stream
    crop: CropConfig
    mask: MaskConfig = MaskConfig()
    early_layer: int | None = None
    """Patch aggregation: the layer (from 1) whose patches join the final class token; None: no aggregation."""
    aggregation_layers: int = 2
    """Blocks over the aggregated states."""
    eval_images: str | None = None
    """Prepared folder of pictures to evaluate on, relative to the run's data folder."""
    eval_batch_size: int = 128

    def __post_init__(self) -> None:
        require(
            (self.crop.size, self.crop.size) == self.model.image_size,
            f"crop.size ({self.crop.size}) must be the model's image_size {self.model.image_size}",
        )
        require(
            self.early_layer is None or 1 <= self.early_layer < self.model.num_layers,
            f"early_layer must lie in 1..{self.model.num_layers - 1} (below the last layer), not {self.early_layer}",
        )
        require(self.aggregation_layers >= 1, f"aggregation_layers must be at least 1, not {self.aggregation_layers}")
        if self.target == "codes":
            require(self.visual_tokenizer is not None, "target 'codes' needs visual_tokenizer")
        else:
            require(not self.images.recorded, "target 'pixels' reads no codes: leave `codes` of the sources out")

    @property
    def sizes(self) -> BatchSizes:
        """A batch."""
        model, images = self.model, self.images.batch_size
        outputs = CODEBOOK_SIZE if self.target == "codes" else 3 * model.patch_size**2
        head = Head(images * self.mask.num_patches(model.grid), model.width, outputs)
        side = self.crop.tokenizer_size or self.crop.size
        tokenizer = tokenizer_pass(0 if self.images.recorded else images, model.grid, side)
        more_layers = 0 if self.early_layer is None else self.aggregation_layers
        return BatchSizes(
            build=lambda: MaskedImageModel(self, outputs),
            passes=(Pass(model, (Sequences(images, 1 + model.num_patches),), more_layers),),
            heads=(head, head) if more_layers else (head,),
            images=images,
            side=self.crop.size,
            tokenizer=tokenizer if self.target == "codes" else None,
        )

    def build(self) -> MaskedImageModeling:
        """Build the Task with random weights."""
        return MaskedImageModeling(self)


class MaskedImageModel(nn.Module):
    """Backbone, the blocks of patch aggregation, and one head for both."""

    def __init__(self, config: MaskedImageModelingConfig, outputs: int) -> None:
        super().__init__()
        self.early_layer = config.early_layer
        self.backbone = MultiwayTransformer(config.model)
        self.backbone.freeze_unreached(images=True, texts=False, pairs=False)
        self.aggregation_blocks = nn.ModuleList()
        if config.early_layer is not None:
            plain = dataclasses.replace(config.model, fusion_layers=0)
            for _ in range(config.aggregation_layers):
                block = MultiwayBlock(plain, config.model.num_layers - 1)
                del block.ffn["text"]
                for experts in (block.attention_in, block.attention_out):
                    if "text" in experts:
                        del experts["text"]
                self.aggregation_blocks.append(block)
            init_sub_ln(self.aggregation_blocks, config.model.num_layers + config.aggregation_layers)
        self.head = nn.Linear(config.model.width, outputs)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: MaskedBatch) -> list[Tensor]:
        """Predictions (M, outputs) at the hidden patches: of the last layer, and of the aggregation if there is one."""
        packed = batch.packed
        assert packed.images is not None
        packed = dataclasses.replace(packed, images=normalize(packed.images))
        last = self.backbone.config.num_layers
        layers = () if self.early_layer is None else (self.early_layer, last)
        out = self.backbone.forward_packed(packed, layers=layers)
        states = [out.vision]
        if self.early_layer is not None:
            states.append(self._aggregate(out, self.early_layer, last))
        return [self.head(rows[batch.patch_rows]) for rows in states]

    def _aggregate(self, out: PackedOutput, early: int, last: int) -> Tensor:
        """States (Nv, D) of the class token after the last layer among the patches after the early one."""
        shape = (out.layout.num_images, out.layout.vision_length, -1)
        final, patches = out.inner[last][0].view(shape), out.inner[early][0].view(shape)
        vision = torch.cat([final[:, :1], patches[:, 1:]], dim=1).flatten(0, 1)
        text = vision.new_empty(0, vision.shape[1])
        plan = plan_attention(out.layout, vision, None)
        drops = self.training and self.backbone.config.drop_path > 0
        sequence_ids = out.layout.sequence_ids(vision.device) if drops else None
        for block in self.aggregation_blocks:
            vision, text = block(vision, text, plan, sequence_ids)
        norm = self.backbone.norm
        return norm["vision"](vision) if "vision" in norm else vision


class MaskedImageModeling(Task[MaskedBatch]):
    """Predict visual tokens, or pixels, of hidden patches."""

    def __init__(self, config: MaskedImageModelingConfig) -> None:
        super().__init__()
        self.config = config
        outputs = 3 * config.model.patch_size**2
        if config.target == "codes":
            assert config.visual_tokenizer is not None
            tokenizer = load_visual_tokenizer(config.visual_tokenizer)
            tokenizer.check_fits(config.model.grid, config.crop.tokenizer_size or config.crop.size)
            outputs = tokenizer.config.codebook_size
            self.keep_frozen(tokenizer)
        self.model = MaskedImageModel(config, outputs)

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[MaskedBatch]:
        """Endless batches of masked pictures."""
        config = self.config
        codes: dict[str, CodeTable] = {}
        if config.visual_tokenizer is not None:
            codes = open_codes(config.images, run.data, config.visual_tokenizer, config.crop)
        encoder = self._encoder(training_crop(config.crop, codes), codes)
        loader = StreamLoader.for_run({"images": config.images}, {"images": encoder}, run, rank, world_size)
        return Mapped(loader, operator.itemgetter("images"))

    def forward(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """Loss and, for codes, accuracy of both predictions."""
        targets = self._targets(batch)
        values: dict[str, Tensor] = {}
        for name, found in zip(("mim", "aggregated"), self.model(batch), strict=False):
            found = found.float()
            if self.config.target == "pixels":
                values[f"{name}_loss"] = F.mse_loss(found, targets)
            else:
                values[f"{name}_loss"] = F.cross_entropy(found, targets)
                values[f"{name}_accuracy"] = (found.detach().argmax(-1) == targets).float().mean()
        losses = [value for name, value in values.items() if name.endswith("_loss")]
        return {"loss": torch.stack(losses).sum(), **values}

    def work(self, batch: MaskedBatch) -> Work:
        """Images, tokens and useful operations of a step; the visual tokenizer's are not counted."""
        config, packed = self.config, batch.packed
        layout = packed.layout(config.model.patch_size)
        hidden, outputs = len(batch.patch_rows), self.model.head.out_features
        flops = forward_flops(config.model, layout, masked_patches=hidden, codebook_size=outputs)
        if len(self.model.aggregation_blocks):
            extra = dataclasses.replace(config.model, num_layers=len(self.model.aggregation_blocks), fusion_layers=0)
            flops += forward_flops(extra, layout, masked_patches=hidden, codebook_size=outputs, patches=0)
        return Work(layout.num_images, layout.num_images * layout.vision_length, 3 * flops)

    def move(self, batch: MaskedBatch, device: torch.device) -> MaskedBatch:
        """Copy a batch to the device."""
        return batch.to(device)

    def save(self, folder: Path) -> None:
        """Write the backbone with its preprocessing; head and aggregation end with pretraining."""
        preprocess = Preprocess(image_size=self.config.model.image_size)
        self.model.backbone.save_pretrained(folder, files=preprocess.file())

    def eval_loader(self, run: Run) -> Iterable[MaskedBatch] | None:
        """Held-out pictures under fixed masks."""
        config = self.config
        if config.eval_images is None:
            return None
        size = config.crop.tokenizer_size
        first, second = EvalResize(config.model.image_size), EvalResize(size or 1)
        encoder = self._encoder(lambda image: Views(first(image), second(image) if size else None), {})
        return fixed_batches(run.data / config.eval_images, encoder, config.eval_batch_size, run.seed)

    def evaluate(self, loader: Iterable[MaskedBatch]) -> dict[str, float]:
        """Means of all losses and accuracies over the hidden patches of the loader."""
        sums: dict[str, float] = {}
        patches = 0
        for batch in loader:
            for name, value in self(batch).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch.patch_rows)
            patches += len(batch.patch_rows)
        return {name: value / patches for name, value in sums.items() if name != "loss"}

    @torch.no_grad()
    def _targets(self, batch: MaskedBatch) -> Tensor:
        """Codes (M,), or normalised pixels (M, 3 P P), of the hidden patches."""
        if self.config.target == "codes":
            (tokenizer,) = self._frozen
            assert isinstance(tokenizer, VQKD)
            return hidden_codes(batch, tokenizer)
        images, mask = batch.packed.images, batch.packed.image_mask
        assert images is not None
        assert mask is not None
        pixels = cut_patches(normalize(images), self.config.model.patch_size)[mask]
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        return (pixels - mean) / (variance + _PIXEL_EPS).sqrt()

    def _encoder(self, view: Callable[..., Views], codes: dict[str, CodeTable]) -> MaskedEncoder:
        config = self.config
        return MaskedEncoder(
            "images", None, view, codes=codes, masks=config.mask, grid=config.model.grid, max_text_length=0
        )
