"""The contract between an objective and the loop: all that `fit` knows of a Task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from beit3.config import Run

A = TypeVar("A")
B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)


class Loader(Protocol[B_co]):
    """An endless source of one rank's batches whose exact position can be saved."""

    @property
    def skipped(self) -> Counter[str]:
        """Samples left out so far, by reason."""

    @property
    def used(self) -> int:
        """Samples that entered batches so far."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of the samples of the batch drawn last."""

    @property
    def data_digest(self) -> str:
        """Of what is known of the data, the same on all ranks that see the same data."""

    def __iter__(self) -> Iterator[B_co]: ...

    def state_dict(self) -> dict[str, Any]:
        """The position: everything needed to go on with the next batch, bit for bit; plain data."""

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go to a saved position.

        Args:
            states: what each rank saved, in the order of ranks; there may have been more or fewer of them than now.

        Raises:
            ConfigError: the position means nothing to this loader, and why.
        """


class Mapped(Generic[A, B]):
    """A loader whose batches are changed after they are drawn.

    Args:
        loader: what is drawn from.
        change: turns one of its batches into another.
    """

    def __init__(self, loader: Loader[A], change: Callable[[A], B]) -> None:
        self._loader = loader
        self._change = change

    @property
    def skipped(self) -> Counter[str]:
        """Samples left out so far, by reason."""
        return self._loader.skipped

    @property
    def used(self) -> int:
        """Samples that entered batches so far."""
        return self._loader.used

    @property
    def keys(self) -> Sequence[str]:
        """Names of the samples of the batch drawn last."""
        return self._loader.keys

    @property
    def data_digest(self) -> str:
        """As the loader's."""
        return self._loader.data_digest

    def __iter__(self) -> Iterator[B]:
        return map(self._change, self._loader)

    def state_dict(self) -> dict[str, Any]:
        """The loader's position."""
        return self._loader.state_dict()

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go to a saved position."""
        self._loader.load_state_dict(states)


@dataclass(frozen=True, slots=True)
class Work:
    """What one batch amounts to, for throughput figures. Padding and masked-out work are not counted."""

    images: int = 0
    tokens: int = 0
    """Patches, class tokens and text tokens that pass through the model."""
    flops: float = 0.0
    """Useful floating-point operations of one training step (3 x forward)."""

    def __add__(self, other: Work) -> Work:
        return Work(self.images + other.images, self.tokens + other.tokens, self.flops + other.flops)


class Task(nn.Module, ABC, Generic[B]):
    """One objective: a model, its batches and its loss. The loop knows nothing else of it."""

    def __init__(self) -> None:
        super().__init__()
        self._frozen: list[nn.Module] = []

    def keep_frozen(self, module: nn.Module) -> None:
        """Keep a network that makes targets: it follows to other devices, but it is trained and saved nowhere."""
        self._frozen.append(module)  # a list, which torch does not search for modules

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Task[B]:
        for module in self._frozen:
            module._apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def prepare_data(self, run: Run) -> None:
        """Write what loaders read, such as a cache: on rank 0, which all others wait for, however long it takes."""

    @abstractmethod
    def train_loader(self, run: Run, rank: int, world_size: int) -> Loader[B]:
        """The endless batches of this rank."""

    def prepare_step(self, batches: Sequence[B]) -> Sequence[B]:
        """Look at all batches of an optimizer step of this rank, on the CPU, before the first of them is computed.

        For what must be known of the whole step, such as document counts; every rank comes here once a step.

        Returns:
            the batches, completed by what they need of it.
        """
        return batches

    @abstractmethod
    def forward(self, batch: B) -> dict[str, Tensor]:
        """Compute the loss.

        Returns:
            scalars by name: `loss` is minimised; loss parts and accuracies beside it are logged as means.
        """

    @abstractmethod
    def work(self, batch: B) -> Work:
        """Count what a batch amounts to."""

    @abstractmethod
    def move(self, batch: B, device: torch.device) -> B:
        """Copy a batch to the device."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the trained model as an exchange folder."""

    def eval_loader(self, run: Run) -> Iterable[B] | None:
        """Finite batches for `evaluate`, the same at every call; None if the Task evaluates nothing."""
        return None

    def evaluate(self, loader: Iterable[B]) -> dict[str, float]:
        """Metrics over the batches of `eval_loader`; called in eval mode without gradients."""
        return {}

    def alarms(self, values: Mapping[str, float]) -> list[str]:
        """What a user should hear of a log record's values at once, a line each; usually nothing."""
        return []

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what pays; by default every Multiway block."""
        for module in self.modules():
            compile_blocks = getattr(module, "compile_blocks", None)
            if compile_blocks is not None:
                compile_blocks()

    def no_weight_decay(self) -> set[str]:
        """Names of matrices that weight decay leaves alone, gathered from the models within."""
        names: set[str] = set()
        for prefix, module in self.named_modules():
            listed = getattr(module, "no_weight_decay", None)
            if listed is not None and module is not self:
                names |= {f"{prefix}.{name}" for name in listed()}
        return names

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer-wise learning rates: embeddings, each block; what matches neither comes last."""
        return {
            "stem": r".*(?:vision_embedding|text_embedding)\.",
            "blocks": r"(?:.*\.)?blocks\.(\d+)\.",
        }
