"""A run is one typed value.

Recipes build a `Run`; the command line overrides its fields (`--optim.lr 1e-3`); `beit3.train.loop.fit` executes it.
Unknown names and contradictions fail when a value is built, and the error names the nearest valid one.
This module imports nothing of the package but its errors: everything else stands on it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from beit3.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Say which valid name is nearest to a wrong one, as the tail of an error line."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid names: {', '.join(names)}"


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only, slotted dataclass that answers a wrong field name with the nearest valid one."""
    made = dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(cls)
    build: Any = made.__init__
    fields = [field for field in dataclasses.fields(made) if field.init]  # type: ignore[arg-type]
    names = {field.name for field in fields}
    required = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }

    @functools.wraps(build)
    def checked_init(self: Any, *args: Any, **values: Any) -> None:
        """Name what is wrong with the fields before the dataclass does."""
        if args:
            raise ConfigError(f"{cls.__name__} takes fields by name only")
        for name in values:
            if name not in names:
                raise ConfigError(f"{cls.__name__} has no field '{name}'; {nearest(name, names)}")
        missing = required - values.keys()
        if missing:
            raise ConfigError(f"{cls.__name__} needs the field '{min(missing)}'")
        build(self, **values)

    setattr(made, "__init__", checked_init)  # noqa: B010 - a plain assignment is refused by type checkers
    return made


def replace(value: T, **changes: Any) -> T:
    """Copy a configuration value with some fields changed; a dotted name reaches into nested values.

    Example: `replace(run, name="debug", **{"optim.lr": 1e-3})`.
    """
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for name, change in changes.items():
        head, _, tail = name.partition(".")
        if tail:
            nested.setdefault(head, {})[tail] = change
        else:
            flat[head] = change
    names = {field.name for field in dataclasses.fields(value)}  # type: ignore[arg-type]
    for name in (*nested, *flat):
        if name not in names:
            raise ConfigError(f"{type(value).__name__} has no field '{name}'; {nearest(name, names)}")
    for name, inner in nested.items():
        flat[name] = replace(flat.get(name, getattr(value, name)), **inner)
    return dataclasses.replace(value, **flat)  # type: ignore[type-var]


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless the condition holds; for `__post_init__`."""
    if not condition:
        raise ConfigError(message)


_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
_LARGEST = 2**63


def check_types(value: Any, where: str) -> None:
    """Refuse fields of another type than declared; for `__post_init__` of values that files describe.

    Knows int (no bool), float (an int will do), bool, str, `Literal`, and tuples of them, of a fixed length or any.

    Args:
        value: configuration value.
        where: its name in messages.
    """
    kinds = get_type_hints(type(value))
    for field in dataclasses.fields(value):
        given, kind = getattr(value, field.name), kinds[field.name]
        require(_is_of(given, kind), f"{where}.{field.name} must be {_described(kind)}, not {given!r:.60}")


def _is_of(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        if parts[-1] is Ellipsis:
            return isinstance(value, tuple) and all(_is_of(item, parts[0]) for item in value)
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_of, value, parts))
    if kind is float and isinstance(value, float):
        return math.isfinite(value)
    if kind in (int, float):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST
    return isinstance(value, kind)


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f"'{name}'" for name in get_args(kind))
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        count = "values" if parts[-1] is Ellipsis else f"{len(parts)} values"
        return f"{count}, each {_KINDS[parts[0]]}"
    return _KINDS[kind]


def to_plain(value: Any) -> Any:
    """Turn a configuration value into JSON-able data; nested dataclasses keep their class name under `type`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def with_defaults(stored: Any, value: Any) -> Any:
    """Give what was stored of a configuration the fields that did not exist when it was written, at their defaults.

    Args:
        stored: read from JSON.
        value: configuration of today, of the same classes.
    """
    if isinstance(stored, list) and isinstance(value, (list, tuple)) and len(stored) == len(value):
        return [with_defaults(*pair) for pair in zip(stored, value, strict=True)]
    if not isinstance(stored, dict) or not dataclasses.is_dataclass(value):
        return stored
    found = dict(stored)
    for field in dataclasses.fields(value):
        if field.name in found:
            found[field.name] = with_defaults(found[field.name], getattr(value, field.name))
        elif field.default is not dataclasses.MISSING:
            found[field.name] = to_plain(field.default)
    return found


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """List the dotted names whose values differ between two results of `to_plain`."""
    if isinstance(left, dict) and isinstance(right, dict):
        found: list[str] = []
        for name in sorted(left.keys() | right.keys()):
            found += differences(left.get(name), right.get(name), f"{where}.{name}" if where else name)
        return found
    return [] if left == right else [where]


@config
class TaskConfig(ABC):
    """What is trained: model, objective and data streams. Each objective defines its own subclass beside its Task."""

    @abstractmethod
    def build(self) -> Any:
        """Build the Task (`beit3.train.task.Task`) with random or given weights on the CPU."""

    @property
    def sizes(self) -> Any:
        """What a batch of all ranks is made of (`beit3.model.memory.BatchSizes`), for plans; None: not counted."""
        return None

    def in_folder(self, data: Path) -> Self:
        """The same for a run on this data folder, where files that the Task reads when it is built are looked for."""
        return self


@config
class OptimConfig:
    """Optimizer and schedule. Built by timm (`timm.optim.create_optimizer_v2`, `timm.scheduler.CosineLRScheduler`)."""

    name: str = "adamw"
    """Any name of timm's optimizer factory."""
    lr: float = 1e-3
    """Peak learning rate, reached after warm-up."""
    min_lr: float = 1e-5
    """Learning rate at the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    weight_decay: float = 0.05
    """Decoupled weight decay; biases, norms and the Task's `no_weight_decay` names are exempt."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    clip_grad: float | None = 3.0
    """Largest global gradient norm; None clips nothing."""
    layer_decay: float | None = None
    """Each earlier layer's learning rate is this factor smaller; None or 1.0: all equal."""
    head_lr: float = 1.0
    """Factor of the learning rate of the Task's `model.head`, which begins at random in finetuning."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, which is then what is evaluated and exported."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr must be above 0, not {self.lr}")
        require(0 <= self.min_lr <= self.lr, f"optim.min_lr must lie in 0..lr ({self.lr}), not {self.min_lr}")
        require(self.warmup_steps >= 0, f"optim.warmup_steps must not be negative, not {self.warmup_steps}")
        require(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"optim.layer_decay must lie in 0..1, not {self.layer_decay}",
        )
        require(self.head_lr > 0, f"optim.head_lr must be above 0, not {self.head_lr}")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1, f"optim.ema_decay must lie in 0..1, not {self.ema_decay}"
        )


@config
class LoopConfig:
    """How long to train, how often to log, evaluate and save."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    max_seconds: float | None = None
    """Stop (with the schedule brought to its end) after this much training time; None: only `steps` ends the run.
    A run that has time enough for its steps is the same with and without a limit."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one optimizer step."""
    log_every: int = 10
    """Steps between two log records."""
    eval_every: int = 0
    """Steps between two evaluations; 0: only after the last step."""
    save_every: int = 500
    """Steps between two checkpoints; the last step is always saved."""
    save_minutes: float | None = None
    """Save as well whenever this much time has passed since the last checkpoint."""
    keep: int = 2
    """Number of newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints of multiples of this step are kept for ever; 0: none."""
    keep_best: str | None = None
    """Metric of evaluations whose highest value is saved at once and kept; a leading '-' keeps the lowest."""
    num_workers: int = 0
    """Data processes per rank and stream; 0 loads in the training process."""
    compile: bool = False
    """Compile the model's blocks with `torch.compile`."""
    max_bad_steps: int = 5
    """Steps in a row with a NaN or infinite loss or gradient (each is skipped) before the run ends as diverged."""
    max_bad_fraction: float = 0.2
    """Share of samples that cannot be used (unreadable pictures, no caption) at which the run ends."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "save_every", "keep", "max_bad_steps"):
            require(getattr(self, name) >= 1, f"loop.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("eval_every", "num_workers", "keep_every"):
            require(getattr(self, name) >= 0, f"loop.{name} must not be negative, not {getattr(self, name)}")
        require(
            self.save_minutes is None or self.save_minutes > 0,
            f"loop.save_minutes must be above 0: {self.save_minutes}",
        )
        require(
            self.keep_best is None or (bool(self.keep_best.lstrip("-")) and self.eval_every > 0),
            "loop.keep_best needs the name of a metric, and loop.eval_every above 0",
        )
        require(0 < self.max_bad_fraction <= 1, f"loop.max_bad_fraction must lie in 0..1, not {self.max_bad_fraction}")


@config
class MeshConfig:
    """How weights lie over the ranks of a run; torchrun decides how many ranks there are."""

    shard: int = 1
    """Ranks over which one copy of weights, gradients and optimizer state is divided (FSDP2). 1: every rank holds all
    (DDP); 0: one copy over all ranks; any other number: so many ranks to a copy (hybrid: the ranks of a node, say)."""
    reshard: bool = True
    """Give the gathered weights of a block back after its forward pass, and gather them again for the backward pass:
    less memory, more traffic."""
    offload: bool = False
    """Keep divided weights, gradients and optimizer state in the host's memory."""
    timeout: float = 600.0
    """Seconds that ranks wait for each other before the run ends and names who is missing."""

    def __post_init__(self) -> None:
        require(self.shard >= 0, f"mesh.shard must not be negative, not {self.shard}")
        require(not self.offload or self.shard != 1, "mesh.offload needs divided weights: set mesh.shard to 0")
        require(self.timeout > 0, f"mesh.timeout must be above 0 seconds, not {self.timeout}")

    def ranks_of_copy(self, world_size: int) -> int:
        """How many ranks share one copy of weights, gradients and optimizer state.

        Raises:
            ConfigError: such groups do not divide the ranks.
        """
        size = self.shard or world_size
        require(
            world_size % size == 0,
            f"mesh.shard {size} does not divide the {world_size} ranks: use a divisor, or --mesh.shard 0 for all",
        )
        require(size > 1 or not self.offload, "mesh.offload needs weights divided over at least two ranks")
        return size


@config
class Run:
    """One training run: everything that decides its result."""

    name: str
    """The run's folder is `out/name`."""
    task: TaskConfig
    data: Path = Path("data")
    """Folder of prepared data; the paths of the Task's streams are relative to it."""
    out: Path = Path("runs")
    seed: int = 0
    device: str = "auto"
    """`auto` takes CUDA, then MPS, then the CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type of matrix products; weights stay fp32. `auto` measures which is faster on this device."""
    resume: bool = False
    """Continue from the newest valid checkpoint of the run's folder."""
    overwrite: bool = False
    """Delete an earlier run of the same name first."""
    allow_data_change: bool = False
    """Resume although the data differ from those the run began with: all streams begin anew."""
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        plain = self.name not in (".", "..") and not set("/\\\0") & set(self.name)
        require(bool(self.name) and plain, f"name must be a plain folder name, not '{self.name}'")
        require(not (self.resume and self.overwrite), "resume and overwrite exclude each other: choose one")
        require(
            self.optim.warmup_steps <= self.loop.steps,
            f"optim.warmup_steps ({self.optim.warmup_steps}) is longer than the run (loop.steps {self.loop.steps})",
        )

    @property
    def folder(self) -> Path:
        """Where logs, checkpoints and the exported model of this run lie."""
        return self.out / self.name
