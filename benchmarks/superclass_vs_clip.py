"""SuperClass against CLIP and SigLIP on the same vision tower: step time, memory, and the largest batch that fits.

    python benchmarks/superclass_vs_clip.py speed  --sizes small base --batch 8 --rounds 7
    python benchmarks/superclass_vs_clip.py memory --sizes small base large --batch 64 --budget 80
    python benchmarks/superclass_vs_clip.py ranks  --sizes base --batch 256 --pairs 256 4096 32768

Arms see the same images and captions, have the same tower, AdamW and autocast, and run in turn, round after round.
`clip` and `siglip` are ours (logits in chunks, no padding), `superclass` is the sparse loss; `clip-matrix` and
`superclass-dense` form what the released codes form: all logits at once, and (B, V) targets.

Memory is counted: the step runs on fake tensors under torch's MemTracker, which adds up every tensor that lives, so
that any batch can be tried anywhere. On CUDA the peak of `--batch` is measured as well (`max_memory_allocated`).
`ranks` gives a rank the vectors of all `--pairs` as if other ranks had sent them, and counts head and objective alone.

Shapes: B images and captions, V = 49,408 words, E width of the joint space.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from beit3.model.heads import ClipModel, ContrastiveLoss, SuperClassModel
from beit3.model.packing import PackedBatch
from beit3.model.parts import keep_part
from beit3.model.presets import TextTowerConfig, model_config
from beit3.pretrain import contrastive_loss as contrastive
from beit3.pretrain.contrastive_loss import contrastive_loss, sigmoid_loss
from beit3.pretrain.subword_loss import SubwordLoss, Words

WORDS = 49_408
"""V of CLIP's vocabulary."""
WORDS_OF_A_CAPTION = 12
ARMS = ("clip", "clip-matrix", "siglip", "superclass", "superclass-dense")
TEXT_TOWERS = {
    "small": TextTowerConfig(width=384, num_heads=6, embed_width=384),
    "base": TextTowerConfig(width=512, num_heads=8, embed_width=512),
    "large": TextTowerConfig(width=768, num_heads=12, embed_width=768),
}
EXPECTED = {"small": (1.36, "-28 to -35 %"), "base": (1.17, "-17 to -21 %"), "large": (1.11, "-13 to -17 %")}
"""By operations and parameters alone: the most that SuperClass can be faster than CLIP, and its saving of memory."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Images, texts of equal lengths, and words."""

    images: Tensor
    text_ids: Tensor
    text_positions: Tensor
    text_lengths: tuple[int, ...]
    words: Words


class Arm:
    """One objective with its model and optimizer; `step` trains once."""

    def __init__(self, name: str, size: str, checkpointing: bool, device: str, dtype: torch.dtype) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        config = model_config(
            f"beit3_{size}_patch16_224",
            vocab_size=WORDS,
            max_text_positions=79,
            fusion_layers=0,
            activation_checkpointing=checkpointing,
        )
        self.model: Any
        with torch.device("meta"):
            if name.startswith("superclass"):
                self.model = SuperClassModel(config)
                keep_part(self.model, "vision")
            else:
                kind: ContrastiveLoss = "siglip" if name == "siglip" else "clip"
                self.model = ClipModel(config, **TEXT_TOWERS[size].options, loss=kind)
        _materialise(self.model, device)
        self.criterion = SubwordLoss(WORDS).to(device)
        self.criterion.num_documents += 10**6  # of words that no caption held so far
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, foreach=True)

    def step(self, batch: Batch) -> None:
        """One training step."""
        if self.name.startswith("superclass"):
            self.criterion.count([batch.words])
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(self.encode(batch), batch)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def outputs(self, batch: Batch) -> list[Tensor]:
        """Outputs of the towers as if they were given."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32), torch.no_grad():
            return [state.detach().requires_grad_() for state in self.encode(batch)]

    def finish(self, states: Sequence[Tensor], batch: Batch) -> None:
        """Head and objective alone, forward and backward, on given outputs of the towers."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(states, batch)
        torch.autograd.backward(loss)
        self.optimizer.zero_grad()

    def encode(self, batch: Batch) -> Sequence[Tensor]:
        """Outputs of the tower, or of both."""
        if isinstance(self.model, SuperClassModel):
            return [self.model.backbone(batch.images).vision]
        return self.embed(batch)

    def loss(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        """The objective."""
        model = self.model
        if isinstance(model, SuperClassModel):
            logits = model.word_head(states[0])
            if self.name == "superclass":
                found: Tensor = self.criterion(logits, batch.words)["loss"]
                return found
            return _dense(logits, batch, self.criterion.weights())
        images, texts = states
        if self.name == "clip-matrix":  # as released: every rank forms the logits of all pairs
            pairs = contrastive._gather(images, texts, None)
            scores = model.logit_scale.exp() * pairs.all_images @ pairs.all_texts.T
            own = torch.arange(len(scores), device=images.device)
            return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        if self.name == "siglip":
            return sigmoid_loss(images, texts, None, model.logit_scale, model.logit_bias)["loss"]
        return contrastive_loss(images, texts, None, model.logit_scale)["loss"]

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Vectors (B, E) of images and texts."""
        packed = PackedBatch(
            images=batch.images,
            text_ids=batch.text_ids,
            text_positions=batch.text_positions,
            text_lengths=batch.text_lengths,
        )
        found: tuple[Tensor, Tensor] = self.model(packed)
        return found


def _dense(logits: Tensor, batch: Batch, weights: Tensor) -> Tensor:
    """SuperClass's loss as released: (B, V) targets, weighted, normalised, against a full log-softmax."""
    targets = torch.zeros_like(logits, dtype=torch.float32)
    targets[batch.words.rows, batch.words.ids] = 1
    targets = F.normalize(targets * weights, p=1, dim=1)
    return -(targets * logits.float().log_softmax(1)).sum(1).mean()


@contextmanager
def among(count: int, width: int) -> Iterator[None]:
    """As if other ranks had sent vectors, so that there are `count` pairs; no gradients go back to them."""
    gather = contrastive._gather

    def with_others(images: Tensor, texts: Tensor, labels: Tensor | None) -> Any:
        others = torch.zeros(2, count - len(images), width)
        pairs = gather(images, texts, labels)
        every = (torch.cat(both) for both in zip((pairs.images, pairs.texts), others, strict=True))
        all_images, all_texts = every
        return replace(pairs, all_images=all_images, all_texts=all_texts)

    setattr(contrastive, "_gather", with_others)  # noqa: B010 - for this program alone
    try:
        yield
    finally:
        setattr(contrastive, "_gather", gather)  # noqa: B010


def measure_ranks(options: argparse.Namespace) -> None:
    """GiB of head and objective alone, forward and backward, beside the vectors of all ranks."""
    print(f"| size | pairs of a rank | pairs of all ranks | {' | '.join(options.arms)} |")
    print("|---" * (3 + len(options.arms)) + "|")
    for size, count, _ in _cases(options):
        for pairs in options.pairs:
            cells = []
            for name in options.arms:
                with FakeTensorMode(), among(pairs, TEXT_TOWERS[size].embed_width):
                    arm = Arm(name, size, False, "cpu", options.type)
                    batch = make_batch(count, options.context, "cpu")
                    arm.step(batch)
                    kinds = _peak(arm, partial(arm.finish, arm.outputs(batch), batch))
                cells.append(f"{kinds['Total'] - kinds['Parameter'] - kinds['Optstate']:.2f}")
            print(f"| {size} | {count:,} | {pairs:,} | {' | '.join(cells)} |", flush=True)


def _materialise(model: nn.Module, device: str) -> None:
    """Give a model that was built without memory small random weights, real or fake as the mode around it says."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(0.02 * torch.randn(parameter.shape, device=device))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)


def make_batch(size: int, context: int, device: str) -> Batch:
    """Random images and captions of `context` tokens."""
    rows = torch.arange(size).repeat_interleave(WORDS_OF_A_CAPTION)
    ids = torch.randint(4, WORDS, (len(rows),))
    return Batch(
        images=torch.randn(size, 3, 224, 224, device=device),
        text_ids=torch.randint(4, WORDS, (size * context,), device=device),
        text_positions=torch.arange(context, device=device).repeat(size),
        text_lengths=(context,) * size,
        words=Words(ids.to(device), rows.to(device), size),
    )


def measure_speed(options: argparse.Namespace) -> None:
    """Seconds of a step, arms in turn; ratios of `clip` over each arm are medians over the rounds."""
    print("| size | batch | recomputed | arm | step s (quartiles) | images/s | clip over it | most expected |")
    print("|---|---|---|---|---|---|---|---|")
    for size, count, checkpointing in _cases(options):
        batch = make_batch(count, options.context, options.device)
        arms = {name: Arm(name, size, checkpointing, options.device, options.type) for name in options.arms}
        taken: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(options.rounds + 1):
            for name, arm in arms.items():
                seconds = _seconds(partial(arm.step, batch), options)
                if number:
                    taken[name].append(seconds)
        for name, times in taken.items():
            low, middle, high = statistics.quantiles(times, n=4)
            ratio = statistics.median(a / b for a, b in zip(taken[options.arms[0]], times, strict=True))
            expected = f"{EXPECTED[size][0]:.2f}" if name == "superclass" else ""
            print(
                f"| {size} | {count} | {'yes' if checkpointing else 'no'} | {name} | "
                f"{middle:.3f} ({low:.3f}-{high:.3f}) | {count / middle:.1f} | {ratio:.2f} | {expected} |",
                flush=True,
            )


def _seconds(work: Callable[[], None], options: argparse.Namespace) -> float:
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    if options.device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    for _ in range(options.steps):
        work()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return (clock() - started) / int(options.steps)


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB at the peak of a training step, and of its last part alone."""

    states: float
    """Weights, gradients and moments that exist at the peak."""
    activations: float
    """All else: what the towers keep, and what is in work."""
    loss: float
    """Head and objective, forward and backward, on given outputs of the towers: not part of the sum, for the peak may
    lie elsewhere."""

    @property
    def total(self) -> float:
        """States and activations."""
        return self.states + self.activations


def count_memory(name: str, size: str, count: int, checkpointing: bool, options: argparse.Namespace) -> Memory:
    """Add up the tensors of an arm's second step, on fake tensors."""
    with FakeTensorMode():
        arm = Arm(name, size, checkpointing, "cpu", options.type)
        batch = make_batch(count, options.context, "cpu")
        arm.step(batch)
        kinds = _peak(arm, partial(arm.step, batch))
        states = sum(kinds[kind] for kind in ("Parameter", "Buffer", "Gradient", "Optstate"))
        head = _peak(arm, partial(arm.finish, arm.outputs(batch), batch))
        return Memory(states, kinds["Total"] - states, head["Total"] - sum(head[k] for k in ("Parameter", "Optstate")))


def _peak(arm: Arm, work: Callable[[], None]) -> dict[str, float]:
    """GiB by kind of tensor while `work` runs."""
    tracker = MemTracker()
    tracker.track_external(arm.model, arm.optimizer)
    with tracker:
        work()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return {getattr(kind, "value", kind): size / 2**30 for kind, size in peak.items()}


def _measured_peak(name: str, size: str, count: int, checkpointing: bool, options: argparse.Namespace) -> float:
    """GiB that CUDA held at the peak of an arm's second step."""
    arm = Arm(name, size, checkpointing, "cuda", options.type)
    batch = make_batch(count, options.context, "cuda")
    arm.step(batch)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    arm.step(batch)
    return torch.cuda.max_memory_allocated() / 2**30


def measure_memory(options: argparse.Namespace) -> None:
    """Peak of a step by parts, and the largest batch within the budget."""
    print(
        "| size | batch | recomputed | arm | states GiB | activations | peak | of clip | expected | head and loss "
        f"alone | largest batch in {options.budget:g} GiB |" + (" measured peak |" if options.device == "cuda" else "")
    )
    print("|---" * (12 if options.device == "cuda" else 11) + "|")
    for size, count, checkpointing in _cases(options):
        first: float | None = None
        for name in options.arms:
            found = count_memory(name, size, count, checkpointing, options)
            first = found.total if first is None else first
            largest = largest_batch(
                partial(_total, name, size, checkpointing, options), options.budget, count, found.total
            )
            expected = EXPECTED[size][1] if name == "superclass" and not checkpointing else ""
            row = (
                f"| {size} | {count} | {'yes' if checkpointing else 'no'} | {name} | {found.states:.2f} | "
                f"{found.activations:.2f} | {found.total:.2f} | {found.total / first - 1:+.0%} | {expected} | "
                f"{found.loss:.2f} | {largest:,} |"
            )
            if options.device == "cuda":
                row += f" {_measured_peak(name, size, count, checkpointing, options):.2f} |"
            print(row, flush=True)


def _total(name: str, size: str, checkpointing: bool, options: argparse.Namespace, count: int) -> float:
    with FakeTensorMode():
        arm = Arm(name, size, checkpointing, "cpu", options.type)
        batch = make_batch(count, options.context, "cpu")
        arm.step(batch)
        return _peak(arm, partial(arm.step, batch))["Total"]


def largest_batch(peak: Callable[[int], float], budget: float, count: int, known: float) -> int:
    """The largest batch found to fit, to a hundredth; memory grows nearly in a straight line.

    Args:
        peak: GiB of a batch; counted, so that no batch is too large to try.
        budget: GiB.
        count: a batch.
        known: its peak.
    """
    peaks = {count: known, 4 * count: peak(4 * count)}
    low, high = count, 4 * count
    for _ in range(5):
        slope = (peaks[high] - peaks[low]) / (high - low)
        guess = max(1, int(high + (0.995 * budget - peaks[high]) / slope))
        if abs(guess - high) <= max(1, guess // 100):
            break
        low, high = high, guess
        peaks[high] = peak(high)
    return max((tried for tried, size in peaks.items() if size <= budget), default=0)


def _cases(options: argparse.Namespace) -> Iterator[tuple[str, int, bool]]:
    for size in options.sizes:
        for count in options.batch:
            for checkpointing in (False, True) if options.checkpointing else (False,):
                yield size, count, checkpointing


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "ranks"))
    parser.add_argument("--sizes", nargs="+", default=["small"], choices=tuple(TEXT_TOWERS))
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--pairs", type=int, nargs="+", default=[4096, 32768], help="of all ranks")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="the first is compared with")
    parser.add_argument("--context", type=int, default=77, help="tokens of every caption")
    parser.add_argument("--checkpointing", action="store_true", help="also with activations computed again")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps of one timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=80.0, help="GiB")
    options = parser.parse_args()
    options.type = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    torch.set_num_threads(options.threads)
    {"speed": measure_speed, "memory": measure_memory, "ranks": measure_ranks}[options.what](options)


if __name__ == "__main__":
    main()
