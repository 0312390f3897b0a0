"""Vector quantizer of BEiT v2: unit vectors, a codebook that follows by moving average, straight-through gradient.

Shapes: M vectors of a batch, C features of a code, K codes.

Source: BEiT v2 (arXiv 2208.06366), section 2.1.  z <- l2norm(z);  code i = argmax_k z . e_k;
loss = mean((stopgrad(e_i) - z)^2);  e_k <- l2norm(decay e_k + (1 - decay) l2norm(mean of the z assigned to k)).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK = 65536
"""Vectors compared with the codebook at once: bounds the (M, K) similarities."""
_KMEANS_STEPS = 10


class VectorQuantizer(nn.Module):
    """Nearest unit code by cosine; all statistics are buffers and move in training mode only.

    Args:
        num_codes: K.
        width: C.
        decay: of the moving averages of codes and of their use.
        revive_after: a code that no vector chose for this many training batches restarts at a random live vector;
            0 never revives (as the official code).
    """

    codebook: Tensor
    usage: Tensor
    idle: Tensor
    ready: Tensor

    def __init__(self, num_codes: int, width: int, decay: float = 0.99, revive_after: int = 0) -> None:
        super().__init__()
        self.decay = decay
        self.revive_after = revive_after
        self.register_buffer("codebook", F.normalize(torch.randn(num_codes, width), dim=-1))
        self.register_buffer("usage", torch.zeros(num_codes))
        self.register_buffer("idle", torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize vectors.

        Args:
            z: (M, C) float.

        Returns:
            codes' vectors with straight-through gradient (M, C), codes (M,) int64, commitment loss ().
        """
        z = F.normalize(z.to(self.codebook.dtype), dim=-1)
        if self.training and not bool(self.ready):
            self._init_codebook(z.detach())
        codes = self.nearest(z.detach())
        chosen = self.codebook[codes]
        if self.training:
            self._update(z.detach(), codes)
        loss = F.mse_loss(z, chosen)
        return z + (chosen - z).detach(), codes, loss

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Codes (M,) of unit vectors (M, C), a chunk at a time."""
        return torch.cat([(part @ self.codebook.T).argmax(dim=1) for part in z.split(_CHUNK)])

    def statistics(self) -> dict[str, Tensor]:
        """State of the moving average of use, as scalars: share of codes in use, dead codes, perplexity.

        A code is dead when fewer than a hundredth of an equal share of the vectors choose it.
        """
        share = self.usage / self.usage.sum().clamp_min(1e-12)
        used = share > 0.01 / share.numel()
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        return {
            "codebook_use": used.float().mean(),
            "dead_codes": (~used).sum().float(),
            "perplexity": entropy.exp(),
        }

    @torch.no_grad()
    def _init_codebook(self, z: Tensor) -> None:
        """K-means on the first batch of all ranks; rank 0's result holds everywhere."""
        sample = _gather(z)
        sample = sample[sample.isfinite().all(dim=1)]
        num_codes = self.codebook.shape[0]
        if not sample.shape[0]:
            return
        if sample.shape[0] < num_codes:
            sample = sample[torch.randint(sample.shape[0], (num_codes,), device=z.device)]
        means = sample[torch.randperm(sample.shape[0], device=z.device)[:num_codes]]
        for _ in range(_KMEANS_STEPS):
            codes = torch.cat([(part @ means.T).argmax(dim=1) for part in sample.split(_CHUNK)])
            sums, counts = _totals(sample, codes, num_codes)
            means = torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), means)
        if dist.is_initialized():
            dist.broadcast(means, src=0)
        self.codebook.copy_(means)
        self.ready.fill_(True)

    @torch.no_grad()
    def _update(self, z: Tensor, codes: Tensor) -> None:
        """Move the codes towards the vectors that chose them, and restart codes that nobody chooses."""
        sums, counts = _totals(z, codes, self.codebook.shape[0])
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        chosen = counts > 0
        target = torch.where(chosen[:, None], F.normalize(sums, dim=-1), self.codebook)
        self.codebook.copy_(F.normalize(self.codebook.lerp(target, 1 - self.decay), dim=-1))
        self.usage.lerp_(counts, 1 - self.decay)
        self.idle.copy_(torch.where(chosen, 0, self.idle + 1))
        if self.revive_after:
            self._revive(z)

    def _revive(self, z: Tensor) -> None:
        """Restart idle codes at vectors drawn from all ranks; rank 0's draw holds everywhere."""
        dead = self.idle >= self.revive_after
        if not bool(dead.any()):
            return
        live = _gather(z)
        fresh = live[torch.randint(live.shape[0], (self.codebook.shape[0],), device=z.device)]
        if dist.is_initialized():
            dist.broadcast(fresh, src=0)
        dead &= fresh.isfinite().all(dim=1)
        self.codebook.copy_(torch.where(dead[:, None], fresh, self.codebook))
        self.idle.masked_fill_(dead, 0)


def _totals(z: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Sum (K, C) and number (K,) of the vectors of each code; what is not finite is left out."""
    finite = z.isfinite().all(dim=1)
    sums = z.new_zeros(num_codes, z.shape[1]).index_add_(0, codes, torch.where(finite[:, None], z, 0))
    return sums, z.new_zeros(num_codes).index_add_(0, codes, finite.to(z.dtype))


def _gather(z: Tensor) -> Tensor:
    """Vectors of all ranks; every rank holds equally many."""
    if not dist.is_initialized():
        return z
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.contiguous())
    return torch.cat(parts)
