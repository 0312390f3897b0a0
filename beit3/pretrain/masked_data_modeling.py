"""Masked data modeling: BEiT-3's one objective over images, texts and pairs (arXiv 2208.10442, section 3).

Shapes: Bi images, Bt texts, N patches, K codes, V vocabulary, Nv and Nt rows of the packed streams,
M hidden patches and Mw hidden words of the batch.

    loss = sum over parts p of  weight_p * mean over hidden positions of -log softmax(head(state))[target]
    parts: patches of images, patches of pairs (targets: VQ-KD codes), words of texts, words of pairs

Heads and losses touch hidden positions only. All three streams go through the model in one pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from beit3.config import Run, TaskConfig, config, require
from beit3.data.streams import Stream, StreamLoader
from beit3.data.transforms import CropConfig, EvalResize, Views, normalize
from beit3.data.visual_codes import CodeTable, open_codes
from beit3.model.flops import forward_flops
from beit3.model.heads import CODEBOOK_SIZE, PretrainingModel
from beit3.model.memory import BatchSizes, Head, Pass, Sequences, tokenizer_pass
from beit3.model.packing import PackedBatch
from beit3.model.presets import ModelConfig
from beit3.model.store import fill_model
from beit3.model.transformer import PackedOutput
from beit3.pretrain.export import export_model
from beit3.pretrain.masked_batches import (
    IGNORE,
    KINDS,
    Kind,
    MaskedBatch,
    MaskedEncoder,
    average_words,
    fixed_batches,
    hidden_codes,
    join_streams,
    training_crop,
)
from beit3.pretrain.masking import MaskConfig
from beit3.pretrain.probe import ProbeConfig, Probes
from beit3.tokenizer.official import load_visual_tokenizer
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.vqkd import VQKD
from beit3.train.task import Loader, Mapped, Task, Work


@config
class MaskedDataModelingConfig(TaskConfig):
    """Model, tokenizers, streams and masks of masked data modeling."""

    model: ModelConfig
    visual_tokenizer: Path
    """Exchange folder or released file of a VQ-KD tokenizer; its grid must be the model's."""
    text_tokenizer: Path
    """A `.spm` file."""
    init_from: Path | None = None
    """Exchange folder or released file to go on from; its heads are kept if they have the same sizes. None: random."""
    pairs: Stream | None = None
    images: Stream | None = None
    texts: Stream | None = None
    crop: CropConfig
    pair_flip: float = 0.0
    """Probability of mirroring the image of a pair: captions may name sides, so 0."""
    max_text_length: int = 64
    """Longest text in ids; longer ones are cut."""
    mask: MaskConfig = MaskConfig()
    image_weight: float = 1.0
    text_weight: float = 1.0
    pair_image_weight: float = 1.0
    pair_text_weight: float = 1.0
    eval_pairs: str | None = None
    """Prepared folder of pairs to evaluate on, relative to the run's data folder."""
    eval_batch_size: int = 128
    probes: tuple[ProbeConfig, ...] = ()
    """Few-shot and nearest-neighbour accuracy of the frozen features at every evaluation."""

    def __post_init__(self) -> None:
        require(
            any((self.pairs, self.images, self.texts)),
            "masked data modeling needs at least one of pairs, images, texts",
        )
        require(
            (self.crop.size, self.crop.size) == self.model.image_size,
            f"crop.size ({self.crop.size}) must be the model's image_size {self.model.image_size}",
        )
        recorded = {stream.recorded for stream in (self.pairs, self.images) if stream is not None}
        require(len(recorded) < 2, "either pairs and images both have `codes`, or neither has")
        require(self.texts is None or not self.texts.recorded, "a stream of texts reads no codes: leave `codes` out")
        require(
            2 < self.max_text_length <= self.model.max_text_length,
            f"max_text_length must lie in 3..{self.model.max_text_length}, not {self.max_text_length}",
        )

    @property
    def reached(self) -> dict[str, bool]:
        """Kinds of sequences that pass through the model; `MultiwayTransformer.freeze_unreached` asks."""
        return {kind: getattr(self, kind) is not None for kind in ("images", "texts", "pairs")}

    @property
    def sizes(self) -> BatchSizes:
        """A batch: captions are taken to fill half of `max_text_length`, texts alone all of it."""
        model, masks, patches = self.model, self.mask, 1 + self.model.num_patches
        texts = {"pairs": self.max_text_length // 2, "images": 0, "texts": self.max_text_length}
        streams = {kind: stream for kind in KINDS if (stream := getattr(self, kind)) is not None}
        parts = {
            kind: Sequences(stream.batch_size, 0 if kind == "texts" else patches, texts[kind])
            for kind, stream in streams.items()
        }
        images = sum(part.count for part in parts.values() if part.vision)
        shares = {"pairs": masks.pair_words, "texts": masks.words}
        hidden = sum(part.count * max(1, round(shares[kind] * part.text)) for kind, part in parts.items() if part.text)
        recorded = any(stream.recorded for stream in streams.values())
        side = self.crop.tokenizer_size or self.crop.size
        return BatchSizes(
            build=self.network,
            passes=(Pass(model, tuple(parts.values())),),
            heads=(
                Head(images * masks.num_patches(model.grid), model.width, CODEBOOK_SIZE),
                Head(hidden, model.width, model.vocab_size),
            ),
            images=images,
            side=self.crop.size,
            words=sum(part.count * part.text for part in parts.values()),
            tokenizer=tokenizer_pass(0 if recorded else images, model.grid, side),
        )

    def network(self, codebook_size: int = CODEBOOK_SIZE) -> PretrainingModel:
        """What is trained, with random weights; what no sequence reaches is frozen."""
        model = PretrainingModel(self.model, codebook_size)
        model.backbone.freeze_unreached(**self.reached)
        model.mim_head.requires_grad_(self.images is not None or self.pairs is not None)
        model.mlm_head.requires_grad_(self.texts is not None or self.pairs is not None)
        return model

    def build(self) -> MaskedDataModeling:
        """Build the Task with random weights."""
        return MaskedDataModeling(self)


class MaskedDataModeling(Task[MaskedBatch]):
    """Predict visual tokens and words that are hidden."""

    def __init__(self, config: MaskedDataModelingConfig) -> None:
        super().__init__()
        self.config = config
        self.text_tokenizer = TextTokenizer.load(config.text_tokenizer)
        visual_tokenizer = load_visual_tokenizer(config.visual_tokenizer)
        visual_tokenizer.check_fits(config.model.grid, config.crop.tokenizer_size or config.crop.size)
        require(
            len(self.text_tokenizer) <= config.model.vocab_size,
            f"{config.text_tokenizer} has {len(self.text_tokenizer)} ids, the model {config.model.vocab_size}",
        )
        self.model = config.network(visual_tokenizer.config.codebook_size)
        if config.init_from is not None:
            fill_model(self.model, config.init_from)
        self.keep_frozen(visual_tokenizer)
        self._probes = Probes(config.probes, config.model.image_size)

    @property
    def visual_tokenizer(self) -> VQKD:
        """The frozen tokenizer that makes the targets."""
        (tokenizer,) = self._frozen
        assert isinstance(tokenizer, VQKD)
        return tokenizer

    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[MaskedBatch]:
        """One batch of every stream for each step, joined."""
        streams = {kind: stream for kind in KINDS if (stream := getattr(self.config, kind)) is not None}
        crop = self.config.crop
        pair_crop = dataclasses.replace(crop, flip=self.config.pair_flip)
        encoders: dict[str, MaskedEncoder] = {}
        for kind, stream in streams.items():
            own = pair_crop if kind == "pairs" else crop
            codes = open_codes(stream, run.data, self.config.visual_tokenizer, own)
            encoders[kind] = self.encoder(kind, training_crop(own, codes), codes)
        named = {str(kind): stream for kind, stream in streams.items()}
        return Mapped(StreamLoader.for_run(named, encoders, run, rank, world_size), join_streams)

    def encoder(
        self, kind: Kind, view: Callable[[Image.Image], Views], codes: Mapping[str, CodeTable] | None = None
    ) -> MaskedEncoder:
        """What turns samples of a stream into masked batches, with `view` from picture to tensors."""
        config = self.config
        return MaskedEncoder(
            kind,
            self.text_tokenizer,
            view,
            codes=codes or {},
            masks=config.mask,
            grid=config.model.grid,
            max_text_length=config.max_text_length,
        )

    def prepare_step(self, batches: Sequence[MaskedBatch]) -> Sequence[MaskedBatch]:
        """Weigh hidden words alike in all batches and ranks of a step, however many of them each has."""
        return average_words(batches)

    def forward(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """Losses and accuracies of all parts of the batch."""
        values = self.masked_losses(self.encode(batch.packed), batch)
        return {"loss": values.pop("masked_loss"), **values}

    def encode(self, packed: PackedBatch) -> PackedOutput:
        """States of sequences whose images are uint8."""
        if packed.images is not None:
            packed = dataclasses.replace(packed, images=normalize(packed.images))
        return self.model.backbone.forward_packed(packed)

    def masked_losses(self, states: PackedOutput, batch: MaskedBatch) -> dict[str, Tensor]:
        """`masked_loss`, the weighted sum, and its parts; `states` may hold more sequences behind the batch's own."""
        packed = batch.packed
        values: dict[str, Tensor] = {}
        if packed.images is not None:
            codes = self.hidden_codes(batch)
            logits = self.model.mim_head(states.vision[batch.patch_rows])  # (M, K)
            paired = packed.num_pairs * (len(codes) // packed.images.shape[0])
            values |= _loss_and_accuracy("pair_mim", logits[:paired], codes[:paired])
            values |= _loss_and_accuracy("mim", logits[paired:], codes[paired:])
        if packed.text_ids is not None:
            logits = self.model.mlm_head(states.text[batch.word_rows])
            own, pairs = batch.words, batch.pair_words
            means = batch.mean_words or (None, None)
            values |= _loss_and_accuracy("pair_mlm", logits[:pairs], own[:pairs], means[0])
            values |= _loss_and_accuracy("mlm", logits[pairs:], own[pairs:], means[1])
        weights = {
            "mim_loss": self.config.image_weight,
            "mlm_loss": self.config.text_weight,
            "pair_mim_loss": self.config.pair_image_weight,
            "pair_mlm_loss": self.config.pair_text_weight,
        }
        parts = [weight * values[name] for name, weight in weights.items() if name in values]
        return {"masked_loss": torch.stack(parts).sum(), **values}

    def hidden_codes(self, batch: MaskedBatch) -> Tensor:
        """Visual tokens (M,) of the hidden patches."""
        return hidden_codes(batch, self.visual_tokenizer)

    def work(self, batch: MaskedBatch) -> Work:
        """Images, tokens and useful operations of a step; the visual tokenizer's are not counted."""
        packed, model = batch.packed, self.config.model
        num_images = 0 if packed.images is None else packed.images.shape[0]
        layout = packed.layout(model.patch_size)
        flops = 3 * forward_flops(
            model,
            layout,
            masked_patches=num_images * self.config.mask.num_patches(model.grid),
            masked_words=sum(batch.hidden_words),
            codebook_size=self.visual_tokenizer.config.codebook_size,
        )
        return Work(num_images, num_images * layout.vision_length + sum(packed.text_lengths), flops)

    def move(self, batch: MaskedBatch, device: torch.device) -> MaskedBatch:
        """Copy a batch to the device."""
        return batch.to(device)

    def save(self, folder: Path) -> None:
        """Write the model with its text tokenizer and preprocessing."""
        export_model(self.model, self.text_tokenizer, self.config.max_text_length, folder)

    def eval_loader(self, run: Run) -> Iterable[MaskedBatch] | None:
        """Held-out pairs under fixed masks."""
        self._probes.read(run.data)
        if self.config.eval_pairs is None:
            return [] if self._probes else None
        size = self.config.crop.tokenizer_size
        first, second = EvalResize(self.config.model.image_size), EvalResize(size or 1)
        encoder = self.encoder("pairs", lambda image: Views(first(image), second(image) if size else None))
        batches = fixed_batches(run.data / self.config.eval_pairs, encoder, self.config.eval_batch_size, run.seed)
        return [batch for batch in batches if batch.packed.num_pairs > 1]  # a single pair has no wrong picture

    def evaluate(self, loader: Iterable[MaskedBatch]) -> dict[str, float]:
        """Masked patches and words of held-out pairs, with the right picture, a wrong one, and none.

        Returns:
            `mim_accuracy` and `mim_loss` beside `commonest_code` (what always naming the commonest hidden code
            scores); `mlm_loss_right_picture`, `_wrong_picture`, `_no_picture` and the accuracies of the same names;
            what the probes find.
        """
        sums: dict[str, float] = {}
        hidden_codes: list[Tensor] = []
        words = 0

        def add(name: str, value: Tensor) -> None:
            """Add to a sum over all batches."""
            sums[name] = sums.get(name, 0.0) + float(value)

        for batch in loader:
            packed = batch.packed
            assert packed.images is not None
            hidden_codes.append(self.hidden_codes(batch))
            turned = packed.images.roll(max(1, len(packed.images) // 2), dims=0)
            kinds = {
                "right_picture": packed,
                "wrong_picture": dataclasses.replace(packed, images=turned),
                "no_picture": dataclasses.replace(packed, images=None, image_mask=None, num_pairs=0),
            }
            real = batch.words != IGNORE
            words += int(real.sum())
            for name, view in kinds.items():
                states = self.encode(view)
                logits = self.model.mlm_head(states.text[batch.word_rows[real]]).float()
                add(f"mlm_loss_{name}", F.cross_entropy(logits, batch.words[real], reduction="sum"))
                add(f"mlm_accuracy_{name}", (logits.argmax(-1) == batch.words[real]).sum())
                if name == "right_picture":
                    logits = self.model.mim_head(states.vision[batch.patch_rows]).float()
                    add("mim_loss", F.cross_entropy(logits, hidden_codes[-1], reduction="sum"))
                    add("mim_accuracy", (logits.argmax(-1) == hidden_codes[-1]).sum())
        probed = self._probes.measure(self.model.backbone)
        if not hidden_codes:
            return probed
        codes = torch.cat(hidden_codes)
        means = {name: value / (words if name.startswith("mlm") else len(codes)) for name, value in sums.items()}
        return {**means, "commonest_code": float(codes.bincount().max()) / len(codes), **probed}


def _loss_and_accuracy(name: str, logits: Tensor, targets: Tensor, expected: float | None = None) -> dict[str, Tensor]:
    """Loss (the mean, or the sum over `expected`) and accuracy of one part's hidden positions; nothing if empty."""
    if not targets.numel():
        return {}
    real = (targets != IGNORE).sum().clamp_min(1)
    loss = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
    loss = loss / (real if expected is None else max(expected, 1.0))
    accuracy = (logits.detach().argmax(-1) == targets).sum() / real
    return {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
