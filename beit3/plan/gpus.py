"""GPUs, the machines they are commonly sold in, and the links between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

GIB = 2**30
LINK_EFFICIENCY = 0.8
"""Assumed share of a link's nominal speed that collectives of large messages reach."""
HOP_SECONDS = 15e-6
"""Assumed start-up time of a collective for each doubling of its members."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU and the machines it is commonly sold in; bytes and operations a second, one way."""

    name: str
    memory: float
    """GiB, as PyTorch reports them."""
    bf16: float
    """Dense peak with fp32 sums."""
    fp32: float
    bandwidth: float
    link: float
    """To the other GPUs of the machine."""
    network: float
    """To other machines, for each GPU."""
    per_node: int = 8


# Peak, memory and bandwidth: NVIDIA's data sheets of the SXM and PCIe boards named (dense figures, without sparsity).
# Links: NVLink 4 (900 GB/s both ways) and 3 (600), PCIe 4.0 x16; the RTX 4090 has no peer-to-peer, so half of PCIe.
# Network: DGX H100 and H200 400 Gbit/s a GPU, DGX A100 200; of the others nothing is standard: 100 and 10 are assumed.
GPUS = {
    "h100": Gpu("H100 80GB", 79.1, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu("H200 141GB", 139.7, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    "a100-80gb": Gpu("A100 80GB", 79.1, 312e12, 19.5e12, 2.04e12, 300e9, 25e9),
    "a100-40gb": Gpu("A100 40GB", 39.4, 312e12, 19.5e12, 1.56e12, 300e9, 25e9),
    "l40s": Gpu("L40S 48GB", 44.4, 362e12, 91.6e12, 0.864e12, 32e9, 12.5e9),
    "rtx4090": Gpu("RTX 4090 24GB", 23.6, 165e12, 82.6e12, 1.01e12, 16e9, 1.25e9),
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal GPUs in machines that are full, but for a single one."""

    gpu: Gpu
    gpus: int

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.gpus // self.gpu.per_node)

    def seconds(self, sent: float, members: int, stride: int, collectives: int) -> float:
        """Time of collectives.

        Args:
            sent: bytes that each GPU sends.
            members: GPUs that exchange.
            stride: distance from one to the next; 1 = neighbours.
            collectives: how many there are.
        """
        inside = max(1, self.gpu.per_node // stride)  # members in one machine: each has a network card of its own
        speed = self.gpu.link if members <= inside else min(self.gpu.link, inside * self.gpu.network)
        return sent / (LINK_EFFICIENCY * speed) + collectives * HOP_SECONDS * math.ceil(math.log2(members))
