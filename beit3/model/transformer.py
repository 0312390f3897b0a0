"""The Multiway Transformer: images, texts and pairs through one network, in one pass, without hidden state.

Shapes: B sequences of the padded form, Bi images, N patches, T longest text, D width,
Nv = Bi (1 + N) rows of the vision stream, Nt = real text tokens = rows of the text stream.

`forward_packed` is the engine and takes any mixture of image-only, text-only and paired sequences. `forward` is the
padded form of the public API and packs and unpacks around it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3.model.attention import Backend, Plan, plan_attention
from beit3.model.cache import LayerCache
from beit3.model.embeddings import TextEmbedding, VisionEmbedding
from beit3.model.multiway import AttentionInput, AttentionOutput, FeedForward, MultiwayBlock
from beit3.model.packing import Layout, PackedBatch, pack_texts
from beit3.model.presets import ModelConfig
from beit3.model.pretrained import PretrainedModel
from beit3.model.windows import Windows


@dataclass(frozen=True, slots=True)
class Output:
    """Final states of the padded form."""

    vision: Tensor | None
    """(B, 1 + N, D): class token, then patches; None without images."""
    text: Tensor | None
    """(B, T, D), zero where `text_mask` is False; None without texts."""


@dataclass(frozen=True, slots=True)
class PackedOutput:
    """Final states of the packed form."""

    vision: Tensor
    """(Nv, D)."""
    text: Tensor
    """(Nt, D)."""
    layout: Layout
    """Which rows belong to which sequence."""
    inner: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(Nv, D) and (Nt, D) after the layers asked for, before any final norm; the first layer is 1."""

    def image_rows(self) -> Tensor:
        """The vision stream as (Bi, 1 + N, D)."""
        return self.vision.view(self.layout.num_images, self.layout.vision_length, self.vision.shape[1])

    def first_text_rows(self) -> Tensor:
        """The state of `<s>` of every text, (Bt, D); texts must not be empty."""
        lengths = torch.tensor(self.layout.text_lengths, dtype=torch.int64, device=self.text.device)
        return self.text[lengths.cumsum(0) - lengths]


class MultiwayTransformer(PretrainedModel):
    """BEiT-3's backbone (arXiv 2208.10442)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_embedding = VisionEmbedding(config)
        self.text_embedding = TextEmbedding(config)
        self.blocks = nn.ModuleList(MultiwayBlock(config, index) for index in range(config.num_layers))
        self.norm = nn.ModuleDict()
        if config.final_norm:
            self.norm.update({name: nn.LayerNorm(config.width, eps=config.norm_eps) for name in ("vision", "text")})
        self.init_weights()

    @property
    def model_config(self) -> ModelConfig:
        """Shape of the transformer."""
        return self.config

    def forward(
        self,
        images: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        causal_text: bool = False,
    ) -> Output:
        """Encode images, texts, or pairs of both.

        Args:
            images: (B, 3, H, W) float, normalised; H and W divide by the patch size.
            text_ids: (B, T) int.
            text_mask: (B, T) bool, True = real token; None: all tokens are real.
            image_mask: (B, N) bool, True = masked patch.
            causal_text: each text token sees its image and the text up to itself, images see themselves alone
                (the sequence-to-sequence mask of captioning).

        Returns:
            States of both modalities; text states are zero where `text_mask` is False.

        Raises:
            ValueError: nothing to encode, or shapes that do not fit together.
        """
        _check_padded(images, text_ids, text_mask, image_mask)
        if text_ids is None:
            packed = self.forward_packed(PackedBatch(images=images, image_mask=image_mask))
            return Output(packed.image_rows(), None)
        ids, positions, lengths, order = pack_texts(text_ids, text_mask)
        ordered = order if images is not None else None
        batch = PackedBatch(
            images=None if images is None else images[ordered],
            image_mask=None if image_mask is None else image_mask[ordered],
            text_ids=ids,
            text_positions=positions,
            text_lengths=lengths,
            num_pairs=0 if images is None else images.shape[0],
        )
        packed = self.forward_packed(batch, causal_text=causal_text)
        rows = order.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=order.device))
        text = packed.text.new_zeros(*text_ids.shape, packed.text.shape[-1])
        text = text.index_put((rows, positions), packed.text)
        if images is None:
            return Output(None, text)
        back = order.argsort()
        return Output(packed.image_rows()[back], text)

    def forward_packed(
        self,
        batch: PackedBatch,
        backend: Backend | None = None,
        layers: Collection[int] = (),
        causal_text: bool = False,
        windows: Windows | None = None,
    ) -> PackedOutput:
        """Encode any mixture of images, texts and pairs.

        Args:
            batch: the sequences, without padding.
            backend: attention backend; None takes the one measured fastest.
            layers: layers (from 1) whose states are returned as well.
            causal_text: as in `forward`.
            windows: what patches see in which layers, for images alone of which all patches enter; None: everything.

        Returns:
            (Nv, D) and (Nt, D) states in the order of the batch.

        Raises:
            ValueError: windows for a batch with texts or left-out patches.
        """
        vision, text, layout = self.embed(batch)
        plan = plan_attention(layout, vision, backend, causal_text)
        plans = [plan] * len(self.blocks) if windows is None else self._windowed(plan, batch, windows)
        drops = self.training and self.config.drop_path > 0
        sequence_ids = layout.sequence_ids(vision.device) if drops else None
        inner: dict[int, tuple[Tensor, Tensor]] = {}
        for number, (block, plan) in enumerate(zip(self.blocks, plans, strict=True), start=1):
            if self.config.activation_checkpointing and self.training:
                vision, text = checkpoint(block, vision, text, plan, sequence_ids, use_reentrant=False)
            else:
                vision, text = block(vision, text, plan, sequence_ids)
            if number in layers:
                inner[number] = vision, text
        vision, text = self._finish(vision, text)
        return PackedOutput(vision, text, layout, inner)

    def _windowed(self, plan: Plan, batch: PackedBatch, windows: Windows) -> list[Plan]:
        """How each layer attends: as planned, or within windows."""
        if batch.images is None or batch.text_ids is not None or batch.kept_patches is not None:
            raise ValueError("windows are for images alone, of which all patches enter")
        side = self.config.patch_size
        grid = (batch.images.shape[2] // side, batch.images.shape[3] // side)
        narrow = replace(plan, window=(grid, windows.side))
        return [plan if n in windows.global_layers else narrow for n in range(1, len(self.blocks) + 1)]

    def start_decoding(self, images: Tensor) -> list[LayerCache]:
        """Encode images (B, 3, H, W) as the beginning of texts; `decode` goes on from there."""
        vision, text, layout = self.embed(PackedBatch(images=images))
        # Pairs whose texts are still empty: fusion experts see the images as they do beside a text.
        layout = Layout.build(images.shape[0], layout.vision_length, (0,) * images.shape[0], images.shape[0])
        caches = [LayerCache.empty(vision) for _ in self.blocks]
        for block, cache in zip(self.layers(), caches, strict=True):
            vision, text = block(vision, text, Plan(layout, "sdpa", causal_text=True), cache=cache)
        return caches

    def decode(self, ids: Tensor, caches: list[LayerCache]) -> Tensor:
        """Encode the next tokens of texts; the last of them stands for the word to predict and is not remembered.

        Args:
            ids: (n, t) int64; the n / B texts of an image side by side.
            caches: of `start_decoding`; extended by the first t - 1 tokens.

        Returns:
            (n, t, D) states, equal to those of `forward` on the whole text with `causal_text`.
        """
        count, new = ids.shape
        start = caches[0].length
        positions = torch.arange(start, start + new, device=ids.device).expand(count, -1)
        text = self.text_embedding(ids.flatten(), positions.flatten())
        vision = text[:0]
        plan = Plan(Layout(0, 0, (new,) * count, count, ()), "sdpa", causal_text=True)
        for block, cache in zip(self.layers(), caches, strict=True):
            vision, text = block(vision, text, plan, cache=cache)
        return self._finish(vision, text)[1].view(count, new, -1)

    def _finish(self, vision: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the final norms, if the model has them."""
        if self.config.final_norm:
            vision = self.norm["vision"](vision) if vision.shape[0] else vision
            text = self.norm["text"](text) if text.shape[0] else text
        return vision, text

    def embed(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Layout]:
        """Turn a packed batch into the two streams (Nv, D), (Nt, D) and their layout."""
        weight = next(self.parameters())
        device = weight.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        vision = text = torch.empty(0, self.config.width, dtype=dtype, device=device)
        if batch.images is not None:
            vision = self.vision_embedding(batch.images.to(dtype), batch.image_mask, batch.kept_patches).to(dtype)
        if batch.text_ids is not None:
            longest = max(batch.text_lengths, default=0)
            if longest > self.config.max_text_length:
                raise ValueError(
                    f"a text has {longest} tokens, the position table holds {self.config.max_text_length}: cut it"
                )
            assert batch.text_positions is not None
            text = self.text_embedding(batch.text_ids, batch.text_positions).to(dtype)
        return vision, text, batch.layout(self.config.patch_size)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise blocks for sub-LN, and embeddings small enough for the first blocks to move them."""
        init_sub_ln(self, self.config.num_layers)
        embedding, std = self.vision_embedding, self.config.width**-0.5
        for vector in (embedding.cls_token, embedding.mask_token, embedding.positions, self.text_embedding.positions):
            nn.init.trunc_normal_(vector, std=std, a=-2 * std, b=2 * std)
        nn.init.normal_(self.text_embedding.words.weight, std=std)

    def compile_blocks(self) -> None:
        """Compile the dense parts of every block; stream lengths stay dynamic, attention stays outside the graph."""
        for module in self.modules():
            if isinstance(module, (AttentionInput, AttentionOutput, FeedForward)):
                module.compile(dynamic=True)

    def layers(self) -> Iterator[MultiwayBlock]:
        """The blocks from bottom to top."""
        for block in self.blocks:
            assert isinstance(block, MultiwayBlock)
            yield block

    def freeze_unreached(self, *, images: bool, texts: bool, pairs: bool) -> None:
        """Freeze what no sequence of a training run reaches: several ranks would wait for its gradients in vain.

        Args:
            images: whether images come without a text.
            texts: whether texts come without an image.
            pairs: whether there are pairs.
        """
        for name, alone in (("vision", images), ("text", texts)):
            used = pairs or alone
            parts = [] if used else [getattr(self, f"{name}_embedding"), *_present(self.norm, name)]
            for block in self.layers():
                if not used:
                    parts += [*_present(block.attention_in, name), *_present(block.attention_out, name)]
                if not alone and (not pairs or "fusion" in block.ffn):
                    parts.append(block.ffn[name])
                if not pairs:
                    parts += _present(block.ffn, "fusion")
            for part in parts:
                part.requires_grad_(False)

    def freeze_unread(self, modality: str) -> None:
        """Freeze what shapes the last states of a modality alone: heads that read the other one give it no gradient."""
        last = self.blocks[-1]
        assert isinstance(last, MultiwayBlock)
        for experts in (self.norm, last.attention_out, last.ffn):
            for part in _present(experts, modality):
                part.requires_grad_(False)

    def no_weight_decay(self) -> set[str]:
        """Names of matrices that weight decay leaves alone (vectors and biases always are)."""
        return {"vision_embedding.positions", "text_embedding.positions"}


@torch.no_grad()
def init_sub_ln(module: nn.Module, num_layers: int) -> None:
    """Initialise all matrices of a module for sub-LN (Magneto, arXiv 2210.06423, section 2.3).

    Matrices are Xavier-normal; values, output projections and both feed-forward matrices are scaled by
    sqrt(ln(2 L)). (The official wrapper computes this gain and then overwrites it.)

    Args:
        module: holds blocks.
        num_layers: L of the whole network.
    """
    gain = math.sqrt(math.log(2 * num_layers)) if num_layers > 1 else 1.0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_normal_(part.weight)
            nn.init.zeros_(part.bias)
    for part in module.modules():  # a second walk: the first one reaches a Linear after the module that owns it
        if isinstance(part, AttentionInput):
            for matrix, scale in zip(part.qkv.weight.chunk(3), (1.0, 1.0, gain), strict=True):
                nn.init.xavier_normal_(matrix, gain=scale)
        elif isinstance(part, AttentionOutput):
            nn.init.xavier_normal_(part.out.weight, gain=gain)
        elif isinstance(part, FeedForward):
            nn.init.xavier_normal_(part.fc1.weight, gain=gain)
            nn.init.xavier_normal_(part.fc2.weight, gain=gain)


def _present(experts: nn.ModuleDict, name: str) -> list[nn.Module]:
    return [experts[name]] if name in experts else []


def _check_padded(
    images: Tensor | None, text_ids: Tensor | None, text_mask: Tensor | None, image_mask: Tensor | None
) -> None:
    if images is None and text_ids is None:
        raise ValueError("nothing to encode: give images, text_ids or both")
    if images is not None and (images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point()):
        raise ValueError(f"images must be float (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
    if image_mask is not None and images is None:
        raise ValueError("image_mask needs images")
    if text_ids is None:
        if text_mask is not None:
            raise ValueError("text_mask needs text_ids")
        return
    if text_ids.ndim != 2:
        raise ValueError(f"text_ids must be (B, T), not {tuple(text_ids.shape)}")
    if text_mask is not None and (text_mask.dtype != torch.bool or text_mask.shape != text_ids.shape):
        raise ValueError(
            f"text_mask must be bool {tuple(text_ids.shape)}, not {text_mask.dtype} {tuple(text_mask.shape)}"
        )
    if images is not None and images.shape[0] != text_ids.shape[0]:
        raise ValueError(f"{images.shape[0]} images but {text_ids.shape[0]} texts: pairs need as many of each")
