"""Multiway blocks: shared or per-modality self-attention, per-modality feed-forward experts, fusion experts.

Shapes: Nv, Nt rows of the packed vision and text stream, D width, F feed-forward width, H heads.

Sub-LN (Magneto, arXiv 2210.06423, and the released BEiT-3): besides the LayerNorm before each branch there is one
before its last projection. The streams meet only in attention; every other operation runs on one whole stream, or,
for fusion experts, on the leading rows of both that belong to pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model.attention import Plan, multiway_attention
from beit3.model.cache import LayerCache, cached_attention
from beit3.model.presets import ModelConfig


class AttentionInput(nn.Module):
    """LayerNorm and the joint projection to queries, keys and values: (N, D) -> (N, 3D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.qkv = nn.Linear(config.width, 3 * config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Project a stream."""
        out: Tensor = self.qkv(self.norm(x))
        return out


class AttentionOutput(nn.Module):
    """Inner LayerNorm and output projection of attention: (N, D) -> (N, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, mixed: Tensor) -> Tensor:
        """Project mixed values back to the residual stream."""
        out: Tensor = self.out(self.norm(mixed))
        return out


class FeedForward(nn.Module):
    """One expert: LayerNorm, D -> F, GELU, inner LayerNorm, F -> D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.inner_norm = nn.LayerNorm(config.ffn_width, eps=config.norm_eps)
        self.fc2 = nn.Linear(config.ffn_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the branch of a stream."""
        out: Tensor = self.fc2(self.inner_norm(F.gelu(self.fc1(self.norm(x)))))
        return out


class MultiwayBlock(nn.Module):
    """One layer of the Multiway Transformer (BEiT-3, arXiv 2208.10442, figure 2)."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        styles = ("vision", "text") if config.attention == "decoupled" else ("shared",)
        self.attention_in = nn.ModuleDict({name: AttentionInput(config) for name in styles})
        self.attention_out = nn.ModuleDict({name: AttentionOutput(config) for name in styles})
        experts = ["vision", "text"]
        if index >= config.num_layers - config.fusion_layers:
            experts.append("fusion")
        self.ffn = nn.ModuleDict({name: FeedForward(config) for name in experts})
        self.drop_path = config.drop_path * index / max(1, config.num_layers - 1)

    def forward(
        self,
        vision: Tensor,
        text: Tensor,
        plan: Plan,
        sequence_ids: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            vision: (Nv, D), possibly no rows.
            text: (Nt, D), possibly no rows.
            plan: how the sequences attend.
            sequence_ids: sequence of each row of both streams, for drop path; None drops nothing.
            cache: what this layer remembers in decoding; read and extended.

        Returns:
            (Nv, D) and (Nt, D).
        """
        branch = self._attend(vision, text, plan, cache)
        vision, text = self._add(vision, text, branch, plan, sequence_ids)
        branch = self._feed_forward(vision, text, plan)
        return self._add(vision, text, branch, plan, sequence_ids)

    def _attend(self, vision: Tensor, text: Tensor, plan: Plan, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        vision_qkv = self._expert(self.attention_in, "vision", vision, 3)
        text_qkv = self._expert(self.attention_in, "text", text, 3)
        if cache is None:
            vision_mixed, text_mixed = multiway_attention(vision_qkv, text_qkv, plan, self.num_heads)
        else:
            vision_mixed, text_mixed = cached_attention(vision_qkv, text_qkv, plan.layout, self.num_heads, cache)
        return (
            self._expert(self.attention_out, "vision", vision_mixed),
            self._expert(self.attention_out, "text", text_mixed),
        )

    def _feed_forward(self, vision: Tensor, text: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        num_pairs = plan.layout.num_pairs
        if "fusion" not in self.ffn or not num_pairs:
            return self._expert(self.ffn, "vision", vision), self._expert(self.ffn, "text", text)
        # Splits, not slices: the gradient of each slice would fill a whole stream.
        pair_vision, alone_vision = vision.tensor_split((plan.layout.pair_rows[0],))
        pair_text, alone_text = text.tensor_split((plan.layout.pair_rows[1],))
        fused = self.ffn["fusion"](torch.cat([pair_vision, pair_text]))
        fused_vision, fused_text = fused.tensor_split((pair_vision.shape[0],))
        return (
            _append(fused_vision, self._expert(self.ffn, "vision", alone_vision)),
            _append(fused_text, self._expert(self.ffn, "text", alone_text)),
        )

    @staticmethod
    def _expert(experts: nn.ModuleDict, modality: str, x: Tensor, widen: int = 1) -> Tensor:
        """Run a modality's expert, or the shared one; an empty stream costs nothing and trains nothing."""
        if not x.shape[0]:
            return x.new_empty(0, widen * x.shape[1])
        expert = experts[modality] if modality in experts else experts["shared"]
        out: Tensor = expert(x)
        return out

    def _add(
        self,
        vision: Tensor,
        text: Tensor,
        branch: tuple[Tensor, Tensor],
        plan: Plan,
        sequence_ids: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Add a branch to the residual streams, dropped for whole sequences with probability `drop_path`."""
        if sequence_ids is None or not self.drop_path:
            return vision + branch[0], text + branch[1]
        keep = 1 - self.drop_path
        scale = torch.empty(plan.layout.num_sequences, 1, dtype=vision.dtype, device=vision.device)
        scale.bernoulli_(keep).div_(keep)
        return (
            torch.addcmul(vision, branch[0], scale[sequence_ids[0]]),
            torch.addcmul(text, branch[1], scale[sequence_ids[1]]),
        )


def _append(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second]) if second.shape[0] else first
