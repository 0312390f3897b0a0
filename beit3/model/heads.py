"""Task models of pictures and texts: a backbone with its heads.

Shapes: B sequences, Bi images, Bt texts, N patches, T text length, D width, E width of the space that images and texts
share, V vocabulary, K codebook size.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import replace, require
from beit3.model.beam_search import Captions, beam_search
from beit3.model.packing import PackedBatch
from beit3.model.parts import keep_modality
from beit3.model.presets import BOS, EOS, OFFICIAL_MASK, PAD, UNK, ModelConfig
from beit3.model.task_model import TaskModel
from beit3.model.transformer import MultiwayTransformer, Output, PackedOutput

CODEBOOK_SIZE = 8192
"""Visual tokens of the official release."""
ContrastiveLoss = Literal["clip", "siglip"]
Pooling = Literal["class", "mean"]
_SMALL_START = 1e-3


def first_text_states(text: Tensor, text_mask: Tensor | None) -> Tensor:
    """The states (B, D) of `<s>` in padded texts (B, T, D): it stands in the first place. Zero for an empty text.

    Raises:
        ValueError: a text begins with padding, where states are zero.
    """
    if not text.shape[1]:
        return text.new_zeros(text.shape[0], text.shape[2])
    # A graph cannot look at numbers: what is exported relies on padding on the right.
    if (
        text_mask is not None
        and not torch.compiler.is_compiling()
        and bool((text_mask.any(1) & ~text_mask[:, 0]).any())
    ):
        raise ValueError("a text begins with padding: pad texts on the right, behind `<s>`")
    return text[:, 0]


class PretrainingModel(TaskModel):
    """Backbone with the two heads of masked data modeling: one bare linear map each, as released."""

    task = "pretraining"

    def __init__(self, config: ModelConfig, codebook_size: int = CODEBOOK_SIZE) -> None:
        super().__init__()
        self.backbone = MultiwayTransformer(config)
        self.codebook_size = codebook_size
        self.mlm_head = nn.Linear(config.width, config.vocab_size)
        self.mim_head = nn.Linear(config.width, codebook_size)
        for head in (self.mlm_head, self.mim_head):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    @property
    def head_options(self) -> dict[str, Any]:
        """What rebuilding this model needs besides the transformer's configuration."""
        return {"codebook_size": self.codebook_size}

    def forward(
        self,
        images: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Output:
        """The backbone's states; apply `mlm_head` and `mim_head` to the masked ones only."""
        out: Output = self.backbone(images, text_ids, text_mask, image_mask)
        return out


class RetrievalModel(TaskModel):
    """Dual encoder: the first state of each modality's own pass, a linear map, unit length, one learned scale.

    Args:
        config: of the one transformer that reads images and texts.
        loss: "siglip" starts the scale as that loss wants it, and adds a learned bias of the logits.
    """

    task = "retrieval"
    logit_bias: nn.Parameter | None
    """None without SigLIP's loss, so that folders hold what they did before there was one."""

    def __init__(self, config: ModelConfig, loss: ContrastiveLoss = "clip") -> None:
        super().__init__()
        self.backbone = MultiwayTransformer(config)
        self.vision_head = nn.Linear(config.width, config.width, bias=False)
        self.language_head = nn.Linear(config.width, config.width, bias=False)
        for head in (self.vision_head, self.language_head):
            nn.init.trunc_normal_(head.weight, std=0.02)
        self._start_logits(loss)

    @property
    def head_options(self) -> dict[str, Any]:
        """What rebuilding this model needs besides the transformer's configuration."""
        return {} if self.logit_bias is None else {"loss": "siglip"}

    @property
    def text_tower(self) -> MultiwayTransformer:
        """The transformer that reads texts."""
        return self.backbone

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Embed unpaired images and texts of one packed batch: (Bi, D) and (Bt, D), unit length."""
        out: PackedOutput = self.backbone.forward_packed(batch)
        image, text = self.vision_head(out.image_rows()[:, 0]), self.language_head(out.first_text_rows())
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) as (B, D) of unit length."""
        out: Output = self.backbone(images)
        assert out.vision is not None
        return F.normalize(self.vision_head(self._pool(out.vision)), dim=-1)

    def encode_text(self, text_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Embed texts (B, T) as (B, D) of unit length; a ValueError if one begins with padding."""
        out: Output = self.text_tower(text_ids=text_ids, text_mask=text_mask)
        assert out.text is not None
        return F.normalize(self.language_head(first_text_states(out.text, text_mask)), dim=-1)

    def _pool(self, states: Tensor) -> Tensor:
        """What stands for an image, (B, D), of its states (B, 1 + N, D)."""
        return states[:, 0]

    def _start_logits(self, loss: ContrastiveLoss) -> None:
        """Scale and bias of the logits as CLIP and SigLIP start them."""
        scale = math.log(1 / 0.07) if loss == "clip" else math.log(10)
        self.logit_scale = nn.Parameter(torch.tensor(scale))
        self.register_parameter("logit_bias", None if loss == "clip" else nn.Parameter(torch.tensor(-10.0)))


class ClipModel(RetrievalModel):
    """Dual encoder whose texts have a transformer of their own (CLIP, arXiv 2103.00020; SigLIP, arXiv 2303.15343).

    Both towers are transformers of this package, each kept to its modality. Unlike CLIP's text tower ours has no causal
    mask, and a text's vector is the state of its first token, `<s>`, not of its last.

    Args:
        config: of the image tower; its vocabulary, text positions and further settings are the text tower's as well.
        text_width: features of a text token; the feed-forward width is four times that.
        text_layers: blocks of the text tower.
        text_heads: attention heads of the text tower.
        embed_width: features of the shared space.
        pooling: what stands for an image: its "class" token, or the "mean" of its patches.
        loss: as for `RetrievalModel`.
    """

    task = "clip"

    def __init__(
        self,
        config: ModelConfig,
        text_width: int = 512,
        text_layers: int = 12,
        text_heads: int = 8,
        embed_width: int = 512,
        pooling: Pooling = "class",
        loss: ContrastiveLoss = "clip",
    ) -> None:
        TaskModel.__init__(self)  # towers and heads are others than those of the shared form
        text = {"width": text_width, "num_layers": text_layers, "num_heads": text_heads, "ffn_width": 4 * text_width}
        self.backbone = MultiwayTransformer(config)
        self.text_backbone = MultiwayTransformer(replace(config, **text, fusion_layers=0, final_norm=True))
        keep_modality(self.backbone, "vision")
        keep_modality(self.text_backbone, "text")
        self.vision_head = nn.Linear(config.width, embed_width, bias=False)
        self.language_head = nn.Linear(text_width, embed_width, bias=False)
        for head in (self.vision_head, self.language_head):
            nn.init.normal_(head.weight, std=head.in_features**-0.5)
        self.pooling = pooling
        self._embed_width = embed_width
        self._start_logits(loss)

    @property
    def head_options(self) -> dict[str, Any]:
        """What rebuilding this model needs besides the image tower's configuration."""
        text = self.text_backbone.config
        sizes = {"text_width": text.width, "text_layers": text.num_layers, "text_heads": text.num_heads}
        return {**sizes, "embed_width": self._embed_width, "pooling": self.pooling, **super().head_options}

    @property
    def vector_width(self) -> int:
        """E."""
        return self._embed_width

    @property
    def text_tower(self) -> MultiwayTransformer:
        """The transformer that reads texts."""
        return self.text_backbone

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Embed unpaired images and texts of one packed batch: (Bi, E) and (Bt, E), unit length."""
        images = PackedBatch(images=batch.images, image_mask=batch.image_mask, kept_patches=batch.kept_patches)
        out: PackedOutput = self.backbone.forward_packed(images)
        return self.project_images(self._pool(out.image_rows())), self.embed_packed_texts(batch)

    def embed_packed_texts(self, batch: PackedBatch) -> Tensor:
        """Embed the texts of a packed batch: (Bt, E), unit length."""
        texts = PackedBatch(
            text_ids=batch.text_ids, text_positions=batch.text_positions, text_lengths=batch.text_lengths
        )
        out: PackedOutput = self.text_backbone.forward_packed(texts)
        return F.normalize(self.language_head(out.first_text_rows()), dim=-1)

    def project_images(self, features: Tensor) -> Tensor:
        """Bring pooled features of images (B, D) into the shared space: (B, E), unit length."""
        return F.normalize(self.vision_head(features), dim=-1)

    def _pool(self, states: Tensor) -> Tensor:
        return states[:, 0] if self.pooling == "class" else states[:, 1:].mean(1)


class ClassificationModel(TaskModel):
    """Images to classes: the mean of the patches, a LayerNorm, a linear map (BEiT-3 on ImageNet-1k)."""

    task = "classification"

    def __init__(self, config: ModelConfig, num_classes: int = 1000) -> None:
        super().__init__()
        self.backbone = MultiwayTransformer(config)
        self.fc_norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, num_classes)
        _start_small(self.head)

    @property
    def head_options(self) -> dict[str, Any]:
        """What rebuilding this model needs besides the transformer's configuration."""
        return {"num_classes": self.head.out_features}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, H, W)."""
        out: Output = self.backbone(images)
        assert out.vision is not None
        logits: Tensor = self.head(self.fc_norm(out.vision[:, 1:].mean(dim=1)))
        return logits


class WordHead(nn.Module):
    """The mean of an image's patches, a LayerNorm, a linear map to the vocabulary (SuperClass)."""

    def __init__(self, width: int, num_words: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_words)
        nn.init.normal_(self.linear.weight, std=width**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Logits (B, words) of final states (B, 1 + N, D)."""
        logits: Tensor = self.linear(self.norm(states[:, 1:].mean(dim=1)))
        return logits


class SuperClassModel(TaskModel):
    """Images to the subwords of their captions: the mean of the patches, a LayerNorm, a linear map to the vocabulary.

    Source: SuperClass, arXiv 2411.03313, section 3.
    """

    task = "superclass"

    def __init__(self, config: ModelConfig, num_words: int | None = None) -> None:
        super().__init__()
        self.backbone = MultiwayTransformer(config)
        self.word_head = WordHead(config.width, num_words or config.vocab_size)

    @property
    def head_options(self) -> dict[str, Any]:
        """What rebuilding this model needs besides the transformer's configuration."""
        return {"num_words": self.word_head.linear.out_features}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, words) of images (B, 3, H, W)."""
        out: Output = self.backbone(images)
        assert out.vision is not None
        logits: Tensor = self.word_head(out.vision)
        return logits


class Pooler(nn.Module):
    """LayerNorm, linear map and tanh of one state (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        """Pool (B, D)."""
        return torch.tanh(self.dense(self.norm(state)))


class VQAModel(TaskModel):
    """A question about an image to one of the frequent answers, from the image's class token (BEiT-3 on VQAv2)."""

    task = "vqa"

    def __init__(self, config: ModelConfig, num_answers: int = 3129) -> None:
        super().__init__()
        self.backbone = MultiwayTransformer(config)
        self.pooler = Pooler(config.width)
        hidden = 2 * config.width
        first, last = nn.Linear(config.width, hidden), nn.Linear(hidden, num_answers)
        self.head = nn.Sequential(first, nn.LayerNorm(hidden), nn.GELU(), last)
        for layer in (self.pooler.dense, first, last):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    @property
    def head_options(self) -> dict[str, Any]:
        """What rebuilding this model needs besides the transformer's configuration."""
        return {"num_answers": self.head[-1].out_features}

    def forward(self, images: Tensor, text_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Logits (B, answers) of images (B, 3, H, W) and questions (B, T)."""
        out: Output = self.backbone(images, text_ids, text_mask)
        assert out.vision is not None
        logits: Tensor = self.head(self.pooler(out.vision[:, 0]))
        return logits


class TwoLayerHead(nn.Module):
    """LayerNorm, linear map, LayerNorm, GELU, linear map; the second width is half the first."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.dense1 = nn.Linear(width, width // 2)
        self.norm2 = nn.LayerNorm(width // 2)
        self.dense2 = nn.Linear(width // 2, outputs)
        for layer in (self.dense1, self.dense2):
            _start_small(layer)

    def forward(self, state: Tensor) -> Tensor:
        """(B, width) to (B, outputs)."""
        logits: Tensor = self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(state)))))
        return logits


class NLVR2Model(TaskModel):
    """Whether a sentence is true of two images: each is read with the sentence, four first states decide (NLVR2)."""

    task = "nlvr2"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = MultiwayTransformer(config)
        self.head = TwoLayerHead(4 * config.width, 2)

    def forward(self, images: Tensor, text_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Logits (B, 2) of false and true for images (B, 2, 3, H, W), left and right, and sentences (B, T).

        Raises:
            ValueError: a sentence begins with padding.
        """
        ids = torch.cat([text_ids, text_ids])
        mask = None if text_mask is None else torch.cat([text_mask, text_mask])
        out: Output = self.backbone(torch.cat([images[:, 0], images[:, 1]]), ids, mask)
        assert out.vision is not None
        assert out.text is not None
        first = torch.cat([out.vision[:, 0], first_text_states(out.text, mask)], dim=-1)
        left, right = first.unflatten(0, (2, images.shape[0])).unbind(0)
        logits: Tensor = self.head(torch.cat([left, right], dim=-1))
        return logits


class CaptioningModel(TaskModel):
    """Images to sentences: masked words are named under the sequence-to-sequence mask (BEiT-3 on COCO)."""

    task = "captioning"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = MultiwayTransformer(config)
        self.mlm_head = nn.Linear(config.width, config.vocab_size)
        nn.init.trunc_normal_(self.mlm_head.weight, std=0.02)
        nn.init.zeros_(self.mlm_head.bias)

    def forward(self, images: Tensor, text_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the words at each place, for images (B, 3, H, W) and texts (B, T) with `<mask>`.

        A place is told the image and the text up to itself: only those of `<mask>` name a word they have not seen.
        """
        out: Output = self.backbone(images, text_ids, text_mask, causal_text=True)
        assert out.text is not None
        logits: Tensor = self.mlm_head(out.text)
        return logits

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        *,
        num_beams: int = 3,
        max_length: int = 32,
        length_penalty: float = 0.6,
        mask_id: int = OFFICIAL_MASK,
        official: bool = False,
    ) -> Captions:
        """Write a caption for each image by beam search; images are encoded once.

        Args:
            images: (B, 3, H, W) float, normalised.
            num_beams: beams of each image.
            max_length: places of a text, as released: at most `max_length - 3` words.
            length_penalty: power of the length that scores are divided by.
            mask_id: of the text tokenizer; ids from here on are no words.
            official: True searches exactly as the released code does, which may write `<unk>`, `<mask>`, `<pad>`
                and unused ids; False forbids them.

        Returns:
            (B, max_length - 3) ids without `<s>` and `</s>`, filled up with `<pad>`, and (B,) scores.

        Raises:
            ConfigError: a setting is out of range.
        """
        config = self.backbone.config
        require(num_beams >= 1, f"num_beams must be at least 1, not {num_beams}")
        require(
            4 <= max_length <= config.max_text_length,
            f"max_length must lie in 4..{config.max_text_length}, not {max_length}",
        )
        require(EOS < mask_id < config.vocab_size, f"mask_id must be one of {config.vocab_size} ids, not {mask_id}")
        if not images.shape[0]:
            nothing = images.new_empty(0, dtype=torch.float32)
            return Captions(nothing.new_empty(0, max_length - 3, dtype=torch.int64), nothing)
        caches = self.backbone.start_decoding(images)

        def next_word(words: Tensor, parents: Tensor | None) -> Tensor:
            """Log-probabilities of the word behind each beam, after the caches took over its parent's rows."""
            if parents is not None:
                for cache in caches:
                    cache.select(parents)
            ids = torch.stack([words.flatten(), torch.full_like(words.flatten(), mask_id)], dim=1)
            logits = self.mlm_head(self.backbone.decode(ids, caches)[:, 1])
            log_probs: Tensor = logits.float().log_softmax(-1)
            if not official:
                log_probs[:, [BOS, PAD, UNK]] = -torch.inf
                log_probs[:, mask_id:] = -torch.inf
            return log_probs.view(*words.shape, -1)

        return beam_search(
            next_word,
            images.shape[0],
            images.device,
            num_beams=num_beams,
            max_length=max_length,
            length_penalty=length_penalty,
        )


def _start_small(layer: nn.Linear) -> None:
    """Begin near equal probabilities: the official factor of a thousandth."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layer.weight.mul_(_SMALL_START)
