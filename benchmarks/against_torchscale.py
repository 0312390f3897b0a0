"""Speed and memory of our backbone against torchscale's BEiT3, with the same weights, in one process.

    pip install --no-deps torchscale==0.3.0 fairscale==0.4.13
    python benchmarks/against_torchscale.py --size base --dtype fp32

Both arms run in turn, round after round, so that a neighbour's load hits both; ratios are medians over the rounds.
Inference gives both the same padded tensors. A training step is forward, backward and a fused AdamW step; ours takes a
packed batch, as data loaders make it, and both compute one loss on the real tokens. torchscale pads texts to 64 tokens,
as the released loaders do.

Shapes: B sequences, T = 64 padded text length, D width, F feed-forward width.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model.flops import forward_flops
from beit3.model.official import to_ours
from beit3.model.packing import Layout, PackedBatch, pack_texts
from beit3.model.presets import ModelConfig, model_config
from beit3.model.transformer import MultiwayTransformer

PADDED = 64
"""Text length of the released loaders."""
CAPTIONS = (
    *(12, 13, 11, 14, 24, 13, 10, 15),
    *(16, 12, 13, 11, 22, 14, 12, 12),
    *(13, 12, 20, 11, 14, 17, 10, 15),
    *(13, 12, 18, 11, 14, 16, 15, 13),
)
"""Lengths of captions in tokens with both special ones, shaped like COCO's; every eight of them have the mean 14."""
CASES = {"image": (8, 0), "text": (0, 64), "pair": (8, 8)}
"""Images and texts of a batch where `--batch` is 8."""


@dataclass(frozen=True, slots=True)
class Case:
    """One batch in the padded form that both arms understand."""

    name: str
    images: Tensor | None
    text_ids: Tensor | None
    text_mask: Tensor | None
    layout: Layout
    """Real tokens of the batch, for counting operations."""


class Arm(ABC):
    """One implementation with its weights and optimizer."""

    def __init__(self, model: nn.Module, case: Case, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self.model, self.case, self.autocast = model, case, autocast
        self.optimizer: torch.optim.Optimizer | None = None

    @abstractmethod
    def states(self, training: bool) -> Tensor:
        """Final states of the batch; in training of its real tokens only, (rows, D)."""

    def infer(self) -> None:
        """Run one forward pass without gradients."""
        self.model.eval()
        with torch.inference_mode(), self.autocast():
            self.states(training=False)

    def train(self) -> None:
        """Run one training step."""
        self.model.train()
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        with self.autocast():
            states = self.states(training=True)
        probe = torch.linspace(-1, 1, states.shape[1], device=states.device)
        torch.autograd.backward((states.float() @ probe).square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()


class Ours(Arm):
    """This project's backbone."""

    def __init__(self, model: nn.Module, case: Case, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__(model, case, autocast)
        images, self.packed = case.images, PackedBatch(images=case.images)
        if case.text_ids is not None:
            ids, positions, lengths, order = pack_texts(case.text_ids, case.text_mask)
            self.packed = PackedBatch(
                images=None if images is None else images[order],
                text_ids=ids,
                text_positions=positions,
                text_lengths=lengths,
                num_pairs=0 if images is None else len(lengths),
            )

    def states(self, training: bool) -> Tensor:
        """See `Arm.states`."""
        assert isinstance(self.model, MultiwayTransformer)
        if training:
            packed = self.model.forward_packed(self.packed)
            return torch.cat([packed.vision, packed.text])
        out = self.model(self.case.images, self.case.text_ids, self.case.text_mask)
        last: Tensor | None = out.text if out.vision is None else out.vision
        assert last is not None
        return last


class Torchscale(Arm):
    """BEiT3 of torchscale."""

    def __init__(self, model: nn.Module, case: Case, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__(model, case, autocast)
        self.padding = None if case.text_mask is None else ~case.text_mask
        real = [] if case.images is None else [torch.ones(case.layout.num_images, case.layout.vision_length)]
        real += [] if case.text_mask is None else [case.text_mask.cpu().float()]
        device = next(model.parameters()).device
        self.rows = torch.cat(real, dim=1).flatten().nonzero()[:, 0].to(device)

    def states(self, training: bool) -> Tensor:
        """See `Arm.states`."""
        out: Tensor = self.model(
            textual_tokens=self.case.text_ids, visual_tokens=self.case.images, text_padding_position=self.padding
        )["encoder_out"]
        return out.flatten(0, 1)[self.rows] if training else out


def build_peer(config: ModelConfig) -> nn.Module:
    """torchscale's model of the same sizes, with the released settings."""
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    settings = EncoderConfig(
        img_size=config.image_size[0],
        patch_size=config.patch_size,
        vocab_size=config.vocab_size,
        multiway=True,
        layernorm_embedding=False,
        normalize_output=True,
        no_output_layer=True,
        encoder_embed_dim=config.width,
        encoder_attention_heads=config.num_heads,
        encoder_ffn_embed_dim=config.ffn_width,
        encoder_layers=config.num_layers,
        max_source_positions=config.max_text_positions,
    )
    torch.manual_seed(0)
    model: nn.Module = BEiT3(settings)
    return model


def build_ours(config: ModelConfig, peer: nn.Module) -> MultiwayTransformer:
    """Our backbone with the peer's weights."""
    converted = to_ours(peer.state_dict(), num_heads=config.num_heads)
    model = MultiwayTransformer(converted.config)
    model.load_state_dict(converted.state)
    return model


def make_case(name: str, config: ModelConfig, batch: int, device: torch.device) -> Case:
    """Draw a batch; caption lengths come from the table."""
    num_images, num_texts = (count * batch // 8 for count in CASES[name])
    torch.manual_seed(1)
    images = torch.randn(num_images, 3, *config.image_size).to(device) if num_images else None
    lengths = tuple(CAPTIONS[index % len(CAPTIONS)] for index in range(num_texts))
    mask = torch.arange(PADDED) < torch.tensor(lengths)[:, None] if lengths else None
    ids = torch.randint(3, config.vocab_size, (num_texts, PADDED)) if lengths else None
    layout = Layout.build(
        num_images, 1 + config.num_patches if num_images else 0, lengths, num_texts if num_images else 0
    )
    return Case(
        name,
        images,
        None if ids is None else ids.to(device),
        None if mask is None else mask.to(device),
        layout,
    )


class Watch:
    """Times calls: by the wall, or by the processor time of this process, which neighbours do not add to."""

    def __init__(self, clock: str, device: torch.device) -> None:
        self.now = time.process_time if clock == "cpu" else time.perf_counter
        self.device = device

    def seconds(self, work: Callable[[], object]) -> float:
        """Time one call, the device's queue included."""
        self._wait()
        start = self.now()
        work()
        self._wait()
        return self.now() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Ceiling:
    """Matrix products of one forward pass alone: `F.linear` at the model's own shapes, real tokens."""

    def __init__(self, config: ModelConfig, case: Case, dtype: torch.dtype, watch: Watch) -> None:
        width, hidden = config.width, config.ffn_width
        rows = (case.layout.num_images * case.layout.vision_length, sum(case.layout.text_lengths))
        self.watch, self.flops = watch, 0.0
        self.products: list[tuple[Tensor, Tensor]] = []
        for count in filter(None, rows):
            for inputs, outputs in ((width, 3 * width), (width, width), (width, hidden), (hidden, width)):
                self.flops += 2.0 * count * inputs * outputs
                x, weight = torch.randn(count, inputs), torch.randn(outputs, inputs)
                self.products.append((x.to(watch.device, dtype), weight.to(watch.device, dtype)))
        self.best = [float("inf")] * len(self.products)

    def measure(self) -> None:
        """Time every product once more."""
        with torch.inference_mode():
            for index, (x, weight) in enumerate(self.products):
                elapsed = self.watch.seconds(functools.partial(F.linear, x, weight))
                self.best[index] = min(self.best[index], elapsed)

    @property
    def rate(self) -> float:
        """Operations a second, from the best time of each product."""
        return self.flops / sum(self.best)


def measure(options: argparse.Namespace, config: ModelConfig, name: str, training: bool) -> dict[str, Any]:
    """Time both arms and the ceiling on one batch, in turn."""
    device = torch.device(options.device)
    case = make_case(name, config, options.batch, device)
    ours, peer = make_arms(options, config, case)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    watch = Watch(options.clock, device)
    ceiling = Ceiling(config, case, dtype, watch)
    arms: list[Arm] = [ours, peer]
    times: list[list[float]] = [[], []]
    for round_ in range(options.rounds + 1):
        for arm, taken in zip(arms, times, strict=True):
            elapsed = watch.seconds(arm.train if training else arm.infer)
            if round_:  # the first round warms up
                taken.append(elapsed)
        for _ in range(2):
            ceiling.measure()
    flops = forward_flops(config, case.layout) * (3 if training else 1)
    return {
        "ours": statistics.median(times[0]),
        "torchscale": statistics.median(times[1]),
        "ratio": statistics.median(peer_s / our_s for our_s, peer_s in zip(*times, strict=True)),
        "share": flops / min(times[0]) / ceiling.rate,
        "peer_share": flops / min(times[1]) / ceiling.rate,
        "ceiling": ceiling.rate,
    }


def make_arms(options: argparse.Namespace, config: ModelConfig, case: Case) -> tuple[Arm, Arm]:
    """Build both arms with equal weights."""
    peer = build_peer(config)
    ours = build_ours(config, peer)
    if options.compile:
        ours.compile_blocks()
    return make_arm(options, ours, case), make_arm(options, peer, case)


def make_arm(options: argparse.Namespace, model: nn.Module, case: Case) -> Arm:
    """Move a model to the device and give it the batch."""
    device = torch.device(options.device)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if options.dtype == "bf16" else nullcontext()

    arm = Ours if isinstance(model, MultiwayTransformer) else Torchscale
    return arm(model.to(device), case, autocast)


def peak_memory(options: argparse.Namespace, name: str, training: bool, arm: str) -> float:
    """GB that a few steps of one arm need beyond its weights; on a CPU measured in a process of its own."""
    command = [sys.executable, __file__, "--child", arm, "--cases", name, "--modes", "train" if training else "infer"]
    for option in ("size", "dtype", "device", "batch", "threads"):
        command += [f"--{option}", str(getattr(options, option))]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def child(options: argparse.Namespace, config: ModelConfig) -> None:
    """Run two steps of one arm and print the peak in GB beyond the weights."""
    device = torch.device(options.device)
    model = MultiwayTransformer(config) if options.child == "ours" else build_peer(config)
    arm = make_arm(options, model, make_case(options.cases[0], config, options.batch, device))
    with PeakMemory(device) as peak:
        for _ in range(2):
            arm.train() if options.modes == ["train"] else arm.infer()
    print(json.dumps(peak.gigabytes))


class PeakMemory:
    """Largest memory in use inside a `with` block, beyond what was in use before it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gigabytes = device, 0.0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._before = torch.cuda.memory_allocated() if self.device.type == "cuda" else _resident()
        if self.device.type != "cuda":
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.gigabytes = (torch.cuda.max_memory_allocated() - self._before) / 1e9
            return
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.gigabytes = max(self.gigabytes, (_resident() - self._before) / 1e9)


def _resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="small", help="size of the catalogue: tiny, small, base, large")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast over fp32 weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="images or pairs; text-only takes eight times as many")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds after one to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu, with --threads 1, for a machine others use too"
    )
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--modes", nargs="+", choices=("infer", "train"), default=["infer", "train"])
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, in child processes")
    parser.add_argument("--child", choices=("ours", "torchscale"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Print one markdown table."""
    options = parse()
    torch.set_num_threads(options.threads)
    config = model_config(f"beit3_{options.size}_patch16_224", attention="decoupled")
    if options.child:
        child(options, config)
        return
    print(
        "| batch | mode | ours s | torchscale s | ratio | share of F.linear | torchscale's share | F.linear GF/s |"
        + (" peak GB ours | peak GB torchscale |" if options.memory else "")
    )
    print("|---|---|---|---|---|---|---|---|" + ("---|---|" if options.memory else ""))
    for name in options.cases:
        for mode in options.modes:
            row = measure(options, config, name, mode == "train")
            line = f"| {name} | {mode} | {row['ours']:.3f} | {row['torchscale']:.3f} | **{row['ratio']:.2f}** "
            line += f"| {row['share']:.2f} | {row['peer_share']:.2f} | {row['ceiling'] / 1e9:.0f} |"
            if options.memory:
                peaks = [peak_memory(options, name, mode == "train", arm) for arm in ("ours", "torchscale")]
                line += f" {peaks[0]:.2f} | {peaks[1]:.2f} |"
            print(line, flush=True)


if __name__ == "__main__":
    main()
