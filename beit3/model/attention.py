"""Self-attention over packed streams: one meaning, several backends.

Shapes: Nv, Nt rows of the vision and text stream, D width, H heads, W = D / H head width,
n sequences of a group, T = tokens of each of them.

Every backend takes the joint projections of both streams, (Nv, 3D) and (Nt, 3D) with q, k, v side by side, and returns
the mixed values (Nv, D) and (Nt, D): softmax(q k^T / sqrt(W)) v within each sequence. They are tested equal to
`reference_attention`; `choose_backend` picks by measurements that `benchmarks/attention.py` repeats.

With causal text (the sequence-to-sequence mask of captioning) an image sees itself alone, and each token of a text sees
its image and the text up to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.model.packing import Layout
from beit3.model.windows import windowed_attention

Backend = Literal["sdpa", "matmul", "varlen", "reference"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How the sequences of one forward pass attend; built once and shared by all layers."""

    layout: Layout
    backend: Backend
    causal_text: bool = False
    order: Tensor | None = None
    """varlen only: (Nv + Nt,) rows of the joined streams sorted by sequence."""
    inverse: Tensor | None = None
    """varlen only: (Nv + Nt,) the way back."""
    bounds: Tensor | None = None
    """varlen only: (B + 1,) int32 cumulative lengths of the sequences."""
    longest: int = 0
    window: tuple[tuple[int, int], int] | None = None
    """Images alone: the grid of patches and the side of the windows that patches see; None: they see everything."""


def plan_attention(layout: Layout, like: Tensor, backend: Backend | None = None, causal_text: bool = False) -> Plan:
    """Choose a backend for a batch and prepare what it needs.

    Args:
        layout: rows of each sequence.
        like: any tensor of the device and type that attention will see.
        backend: taken as it is; None chooses by `choose_backend`.
        causal_text: whether texts see no token after their own; the varlen kernel has no such mask.
    """
    chosen = backend or choose_backend(layout, like.device, like.dtype)
    if causal_text and chosen == "varlen":
        chosen = "sdpa"
    if chosen != "varlen":
        return Plan(layout, chosen, causal_text)
    order = torch.cat(layout.sequence_ids(like.device)).argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=like.device)
    lengths = torch.zeros(layout.num_sequences, dtype=torch.int64)
    texts = torch.tensor(layout.text_lengths, dtype=torch.int64)
    lengths[: layout.num_images] += layout.vision_length
    lengths[: layout.num_pairs] += texts[: layout.num_pairs]
    lengths[layout.num_images :] += texts[layout.num_pairs :]
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(device=like.device, dtype=torch.int32)
    return Plan(layout, chosen, False, order, inverse, bounds, int(lengths.max()))


def choose_backend(layout: Layout, device: torch.device, dtype: torch.dtype) -> Backend:
    """Pick the backend that was fastest for this device, type and batch (tables in benchmarks/README.md)."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and len(layout.groups) > 2:
        return "varlen"  # one launch instead of one for each group
    if device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return "matmul"  # oneDNN's products in bf16 beat PyTorch's flash kernel at every length
    return "sdpa"


def multiway_attention(vision: Tensor, text: Tensor, plan: Plan, num_heads: int) -> tuple[Tensor, Tensor]:
    """Let every sequence of a packed batch attend to itself.

    Args:
        vision: (Nv, 3D) projections q, k, v of the vision stream.
        text: (Nt, 3D) projections of the text stream.
        plan: rows of each sequence and backend.
        num_heads: H.

    Returns:
        (Nv, D) and (Nt, D).
    """
    if plan.window is not None:
        mixed = windowed_attention(vision, *plan.window, num_heads, _CORES[plan.backend])
        return mixed, text.new_empty(0, mixed.shape[1])
    if plan.backend == "varlen":
        return _varlen_attention(vision, text, plan, num_heads)
    return _grouped_attention(vision, text, plan, num_heads, _CORES[plan.backend])


class Core(Protocol):
    """Dense attention of equally long sequences."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix values: q (n, H, S, W), k and v (n, H, T, W), mask (S, T) bool with True = seen, to (n, H, S, W)."""
        ...


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Readable form for tests: one sequence and one head at a time, in float64.

    Args:
        q: (n, H, S, W).
        k, v: (n, H, T, W).
        mask: (S, T) bool, True = seen; None: all.
    """
    out = torch.empty_like(q, dtype=torch.float64)
    for sequence in range(q.shape[0]):
        for head in range(q.shape[1]):
            query, key, value = (x[sequence, head].double() for x in (q, k, v))
            scores = query @ key.T / query.shape[-1] ** 0.5  # (S, T)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
            out[sequence, head] = weights @ value
    return out.to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.matmul(scores.softmax(dim=-1), v)


_CORES: dict[Backend, Core] = {
    "sdpa": _sdpa,
    "matmul": _matmul,
    "reference": reference_attention,
}


def _grouped_attention(vision: Tensor, text: Tensor, plan: Plan, num_heads: int, core: Core) -> tuple[Tensor, Tensor]:
    """One dense attention per group of equal lengths: no padding."""
    layout = plan.layout
    vision_out: list[Tensor] = []
    text_out: list[Tensor] = []
    vision_in = iter(_split(vision, [group.count * group.vision_length for group in layout.groups]))
    text_in = iter(_split(text, [group.count * group.text_length for group in layout.groups]))
    for group in layout.groups:
        parts = []
        if group.vision_length:
            parts.append(next(vision_in).view(group.count, group.vision_length, -1))
        if group.text_length:
            parts.append(next(text_in).view(group.count, group.text_length, -1))
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (n, T, 3D)
        q, k, v = (x.transpose(1, 2) for x in joined.unflatten(2, (3, num_heads, -1)).unbind(2))  # (n, H, T, W)
        mixed = _causal_text(core, q, k, v, group.vision_length) if plan.causal_text else core(q, k, v)
        mixed = mixed.transpose(1, 2).flatten(2)  # (n, T, D)
        if not group.text_length:
            vision_out.append(mixed)
        elif not group.vision_length:
            text_out.append(mixed.flatten(0, 1))
        else:
            of_vision, of_text = mixed.tensor_split((group.vision_length,), dim=1)
            vision_out.append(of_vision)
            text_out.append(of_text.flatten(0, 1))
    return _rows(vision_out, vision).flatten(0, -2), _rows(text_out, text)


def _causal_text(core: Core, q: Tensor, k: Tensor, v: Tensor, vision_length: int) -> Tensor:
    """The image attends to itself; every text token to the image and to the text up to itself."""
    length = q.shape[2]
    if vision_length == length:
        return core(q, k, v)
    seen = torch.ones(length - vision_length, length, dtype=torch.bool, device=q.device).tril(vision_length)
    text = core(q[:, :, vision_length:], k, v, seen)
    if not vision_length:
        return text
    image = core(q[:, :, :vision_length], k[:, :, :vision_length], v[:, :, :vision_length])
    return torch.cat([image, text], dim=2)


def _split(stream: Tensor, rows: list[int]) -> Sequence[Tensor]:
    """Cut a stream into its groups. One split, not slices: each slice's gradient would fill a whole stream."""
    rows = [count for count in rows if count]
    return torch.split(stream, rows) if len(rows) > 1 else [stream]


def _rows(parts: list[Tensor], stream: Tensor) -> Tensor:
    if not parts:
        return stream.new_empty(0, stream.shape[1] // 3)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _varlen_attention(vision: Tensor, text: Tensor, plan: Plan, num_heads: int) -> tuple[Tensor, Tensor]:
    """All sequences in one kernel: rows sorted by sequence, cumulative lengths as boundaries (CUDA)."""
    from torch.nn.attention.varlen import varlen_attn

    assert plan.order is not None
    assert plan.inverse is not None
    assert plan.bounds is not None
    joint = torch.cat([vision, text])[plan.order].view(plan.order.numel(), 3, num_heads, -1)
    q, k, v = joint.unbind(1)
    mixed = varlen_attn(q, k, v, plan.bounds, plan.bounds, plan.longest, plan.longest)
    assert isinstance(mixed, Tensor)
    rows = mixed.flatten(1)[plan.inverse]
    return rows[: vision.shape[0]], rows[vision.shape[0] :]
