"""Examples: every one once an epoch, exact resume, the same batches however they are made, honest counting."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import random
import subprocess
import time
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from beit3.data.augment import MultimodalView, MultimodalViewConfig
from beit3.data.example_loader import ExampleLoader, _TrainingBatches, evaluation_batches
from beit3.data.index_files import read_picture
from beit3.data.preprocess import Preprocess
from beit3.errors import BadSampleError, BeitError, ConfigError

WORKERS = pytest.mark.parametrize("workers", [0, 1, 2])


class Noisy:
    """Examples that draw from all three generators, as augmentation does; those in `bad` cannot be used."""

    def __init__(self, count: int = 50, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, frozenset(bad)

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> tuple[int, float]:
        noise = torch.rand((), dtype=torch.float64).item() + float(np.random.rand()) + random.random()
        if index in self.bad:
            raise BadSampleError("unreadable_image", f"{index}.png")
        return index, noise


def collate(examples: list[tuple[int, float]]) -> Tensor:
    """Indices, what each drew, and a draw of the batch's own."""
    drawn = torch.rand(1, dtype=torch.float64) + float(np.random.rand()) + random.random()
    return torch.cat([torch.tensor(examples, dtype=torch.float64), drawn.expand(len(examples), 1)], dim=1)


Loader = ExampleLoader[tuple[int, float], Tensor]


def make(count: int = 50, workers: int = 0, bad: tuple[int, ...] = (), **options: Any) -> Loader:
    settings: dict[str, Any] = {"batch_size": 8, "seed": 0, **options}
    return ExampleLoader(Noisy(count, bad), collate, num_workers=workers, **settings)


def take(loader: ExampleLoader[Any, Any], count: int) -> list[Any]:
    return list(itertools.islice(loader, count))


def indices(batches: list[Tensor]) -> list[int]:
    return [int(index) for batch in batches for index in batch[:, 0]]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def saved(loader: Loader) -> Any:
    """Send a state through a file that holds nothing but plain data."""
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@WORKERS
@pytest.mark.parametrize("before", [0, 1, 5, 6, 17])
def test_resume_is_bit_identical_at_any_point(workers: int, before: int) -> None:
    whole = make(bad=(3, 4, 30))
    take(whole, before)
    state = saved(whole)
    rest = take(whole, 14)
    again = make(workers=workers, bad=(3, 4, 30))
    again.load_state_dict([state])
    assert same(take(again, 14), rest)
    assert again.state_dict() == whole.state_dict()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_workers_prepare_ahead_does_not_move_the_position(workers: int) -> None:
    loader = make(workers=workers, bad=(3, 4, 30))
    take(loader, 3)
    time.sleep(0.2)  # they have finished what they may prepare
    assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (0, 3)
    calm = make(bad=(3, 4, 30))
    take(calm, 3)
    assert loader.state_dict() == calm.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_in_use_goes_back_to_a_saved_position(workers: int) -> None:
    loader = make(workers=workers)
    batches = iter(loader)
    next(batches)
    state = saved(loader)
    second = [next(batches) for _ in range(8)]
    loader.load_state_dict([state])
    assert same([next(batches) for _ in range(4)], second[:4]), "an iterator that is there already follows"
    assert same(take(loader, 4), second[4:]), "and so does a new one"


@pytest.mark.parametrize("options", [{}, {"rank": 1, "world_size": 2}, {"bad": (0, 7, 8, 9, 49)}])
def test_the_number_of_workers_changes_nothing(options: dict[str, Any]) -> None:
    loaders = [make(workers=workers, **options) for workers in (0, 1, 2)]
    expected = take(loaders[0], 20)
    for loader in loaders[1:]:
        assert same(take(loader, 20), expected)
        assert loader.skipped == loaders[0].skipped


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own() -> None:
    loader = make(48)
    epochs = [indices(take(loader, len(loader))) for _ in range(4)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(epoch != sorted(epoch) for epoch in epochs)
    assert indices(take(make(48, seed=1), 6)) != epochs[0]
    assert indices(take(make(48), 6)) == epochs[0]


def test_what_fills_no_batch_is_left_out_of_one_epoch_only() -> None:
    loader = make(50)
    assert len(loader) == 6
    epochs = [set(indices(take(loader, 6))) for _ in range(6)]
    assert all(len(epoch) == 48 for epoch in epochs)
    assert set().union(*epochs) == set(range(50))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_have_disjoint_equal_shares_of_the_same_batches(world: int) -> None:
    whole = make(51)
    parts = [make(51, rank=rank, world_size=world) for rank in range(world)]
    assert {len(part) for part in parts} == {len(whole)}
    for _ in range(2 * len(whole)):
        (batch,) = take(whole, 1)
        shares = [indices(take(part, 1)) for part in parts]
        assert {len(share) for share in shares} == {8 // world}
        assert [index for turn in zip(*shares, strict=True) for index in turn] == indices([batch])


def test_a_view_depends_on_seed_epoch_and_example_alone() -> None:
    def views(loader: Loader, epochs: int = 1) -> dict[int, float]:
        return {int(index): noise for batch in take(loader, epochs * len(loader)) for index, noise, _ in batch.tolist()}

    alone = views(make(48))
    assert len(set(alone.values())) == 48
    assert views(make(48, batch_size=16)) == alone
    shared: dict[int, float] = {}
    for rank in (0, 1):
        shared |= views(make(48, rank=rank, world_size=2))
    assert shared == alone
    second = views(make(48), epochs=2)
    other = views(make(48, seed=1))
    assert all(second[index] != alone[index] != other[index] for index in range(48))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_generators_of_the_process_alone(workers: int) -> None:
    def numbers() -> list[float]:
        return [torch.rand(()).item(), float(np.random.rand()), random.random()]

    def seed() -> None:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    seed()
    expected = numbers()
    seed()
    take(make(workers=workers), 2)
    list(evaluation_batches(Noisy(), collate, batch_size=8, num_workers=workers))
    assert numbers() == expected


@WORKERS
def test_a_bad_example_is_counted_once_in_each_epoch(workers: int) -> None:
    bad = (3, 4, 5, 40)
    loader = make(48, workers, bad)
    for epoch in (1, 2, 3):
        take(loader, len(loader))
        assert loader.skipped == {"unreadable_image": 4 * epoch}


@pytest.mark.parametrize("world", [1, 2])
def test_the_next_good_one_of_the_share_stands_in_for_a_bad_one(world: int) -> None:
    clean, bad = make(50, world_size=world), (3, 4, 5, 40)
    shares = [indices(take(clean, len(clean))) for _ in range(3)]
    loader = make(50, bad=bad, world_size=world)
    size = 8 // world
    for share in shares:
        batches = [indices([batch]) for batch in take(loader, len(loader))]
        for number, batch in enumerate(batches):
            own = share[number * size : (number + 1) * size]
            assert len(set(batch)) == size, "full, and nothing twice"
            replaced = [new for new, old in zip(batch, own, strict=True) if new != old]
            assert len(replaced) == sum(index in bad for index in own)
            if number + 1 < len(batches):
                following = [index for index in share[(number + 1) * size :] if index not in bad]
                assert replaced == following[: len(replaced)]
        assert not {index for batch in batches for index in batch} & set(bad)


def test_the_last_batch_is_filled_from_what_the_epoch_leaves_out_or_its_beginning() -> None:
    order = indices(take(make(24), 3))
    batches = take(make(24, bad=(order[-1], order[0])), 3)
    assert indices(batches[2:]) == [*order[16:23], order[1]]
    tail = next(iter(set(range(17)) - set(indices(take(make(17), 2)))))
    last = indices(take(make(17), 2))[-1]
    assert indices(take(make(17, bad=(last,)), 2))[-1] == tail


def test_a_stand_in_is_another_view_of_its_example() -> None:
    order = indices(take(make(16), 2))
    first, second = take(make(16, bad=(order[0],)), 2)
    assert first[0, 0] == second[0, 0] == order[8]
    assert first[0, 1] != second[0, 1]


def test_where_there_is_no_other_one_a_batch_repeats_its_good_ones() -> None:
    batch = take(make(8, bad=(1, 2, 3, 4, 5, 6)), 1)[0]
    assert Counter(indices([batch])) == {0: 4, 7: 4}
    assert len(set(batch[:, 1].tolist())) == 8


@WORKERS
def test_a_share_without_a_good_example_ends_with_one_line(workers: int) -> None:
    loader = make(24, workers, bad=tuple(range(24)))
    for _ in range(2):
        with pytest.raises(BeitError, match=r"no example can be used to fill a batch \(8 unreadable_image\)") as caught:
            take(loader, 1)
        assert "\n" not in str(caught.value)
        assert ".png" in str(caught.value)
    assert loader.state_dict()["batches"] == 0


def test_a_huge_share_without_a_good_example_is_given_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beit3.data.example_loader.MAX_BAD_IN_A_ROW", 20)
    tried: list[int] = []

    class Counting(Noisy):
        def load(self, index: int) -> tuple[int, float]:
            tried.append(index)
            return super().load(index)

    with pytest.raises(BeitError, match="no example can be used"):
        take(ExampleLoader(Counting(5000, tuple(range(5000))), collate, batch_size=8, seed=0), 1)
    assert len(tried) == 28


class Broken(Noisy):
    """Examples whose code fails."""

    def load(self, index: int) -> tuple[int, float]:
        if index == 13:
            raise ZeroDivisionError("a bug")
        return super().load(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_the_code_is_not_taken_for_bad_data(workers: int) -> None:
    loader = ExampleLoader(Broken(16), collate, batch_size=8, seed=0, num_workers=workers)
    with pytest.raises(ZeroDivisionError):
        take(loader, 2)
    assert not loader.skipped


def refuse(examples: list[tuple[int, float]]) -> Tensor:
    raise ConfigError("tokens do not fit: use the model's own tokenizer")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_for_users_stay_one_line_on_the_way_out_of_a_worker(workers: int) -> None:
    with pytest.raises(ConfigError) as caught:
        take(ExampleLoader(Noisy(), refuse, batch_size=8, seed=0, num_workers=workers), 1)
    assert str(caught.value) == "tokens do not fit: use the model's own tokenizer"


def test_after_an_error_the_loader_goes_on_where_it_stood() -> None:
    examples = Noisy(24, bad=tuple(range(24)))
    loader = ExampleLoader(examples, collate, batch_size=8, seed=0, num_workers=0)
    with pytest.raises(BeitError):
        take(loader, 1)
    examples.bad = frozenset()
    assert same(take(loader, 4), take(make(24), 4))


class Parts(NamedTuple):
    names: list[str]
    values: NDArray[np.float64]
    image: Tensor


def parts(examples: list[tuple[int, float]]) -> Parts:
    return Parts(["x"] * len(examples), np.zeros(3), torch.zeros(2, dtype=torch.uint8))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_arrive_as_they_were_collated(workers: int) -> None:
    loader = ExampleLoader(Noisy(), parts, batch_size=2, seed=0, num_workers=workers)
    for batch in (*take(loader, 1), next(iter(evaluation_batches(Noisy(), parts, batch_size=2, num_workers=workers)))):
        assert isinstance(batch, Parts)
        assert batch.names == ["x", "x"]
        assert isinstance(batch.values, np.ndarray)
        assert batch.image.dtype == torch.uint8


def place(examples: list[tuple[int, float]]) -> tuple[int, int]:
    """Process and the bytes its objects take."""
    if not tracemalloc.is_tracing():
        tracemalloc.start()
    return os.getpid(), tracemalloc.get_traced_memory()[0]


@pytest.fixture
def traced() -> Iterator[None]:
    """Ends what `place` starts."""
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("traced")
def test_memory_does_not_grow_over_epochs(workers: int) -> None:
    loader = ExampleLoader(Noisy(16), place, batch_size=8, seed=0, num_workers=workers)
    sizes = deque((size for _, size in itertools.islice(loader, 120)), maxlen=100)
    assert sizes[-1] - sizes[0] < 20_000, "the examples of 50 epochs would take 60,000"


@pytest.mark.usefixtures("traced")
def test_orders_of_epochs_that_are_over_are_forgotten() -> None:
    batches = _TrainingBatches(Noisy(100_000), place, 2, 0, 0, 1)
    before = batches[len(batches)].batch[1]  # `place` traces from the batch before on
    assert before < 10_000, "nothing but numbers is kept"
    sizes = [batches[epoch * len(batches)].batch[1] for epoch in range(2, 20)]
    assert max(sizes) < 1_000_000, "one order takes 800,000"


def test_workers_live_as_long_as_the_loader_and_no_longer() -> None:
    before = set(multiprocessing.active_children())
    loader = ExampleLoader(Noisy(16), place, batch_size=8, seed=0, num_workers=2)
    assert set(multiprocessing.active_children()) == before, "nothing starts before the first batch"
    batches = iter(loader)
    seen = {next(batches)[0] for _ in range(20)}
    started = set(multiprocessing.active_children()) - before
    assert seen == {process.pid for process in started}, "ten epochs, two processes"
    assert len(seen) == 2
    begun = time.monotonic()
    loader.close()
    assert set(multiprocessing.active_children()) == before
    assert time.monotonic() - begun < 4, "torch waits 5 seconds for a process that does not answer"
    next(batches)
    del loader, batches
    assert set(multiprocessing.active_children()) == before


def test_workers_of_an_evaluation_end_with_it_even_if_it_is_left_early() -> None:
    before = set(multiprocessing.active_children())
    for batch in evaluation_batches(Noisy(64), collate, batch_size=4, num_workers=2):
        assert len(batch) == 4
        break
    assert set(multiprocessing.active_children()) == before


SCRIPT = """
from beit3.data.example_loader import ExampleLoader

class Numbers:
    def __len__(self):
        return 100

    def load(self, index):
        return index

loader = ExampleLoader(Numbers(), list, batch_size=10, seed=0, num_workers=2)
batches = iter(loader)
next(batches)
print("drawn")
"""


@pytest.mark.distributed
def test_a_program_ends_quietly_with_workers_at_work(start: Callable[..., subprocess.Popen[str]], root: Path) -> None:
    process = start(["-c", SCRIPT], root)
    assert process.communicate(timeout=60) == ("drawn\n", "")
    assert process.returncode == 0


def test_a_state_is_small_and_plain() -> None:
    loader = make(bad=(3,))
    take(loader, 13)
    assert loader.state_dict() == {
        "epoch": 2,
        "batches": 1,
        "skipped": {"unreadable_image": 2},
        "settings": {"batch_size": 8, "seed": 0},
        "data": {"the whole": {"examples": 50}},
    }


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size 8 is not divisible by 3 ranks"):
        make(world_size=3)
    with pytest.raises(ConfigError, match=r"batch_size 8 is larger than the data \(4 rows\)"):
        make(4)
    with pytest.raises(ConfigError, match="at least 1"):
        make(batch_size=0)
    with pytest.raises(ConfigError, match="not divisible"):
        evaluation_batches(Noisy(), collate, batch_size=8, world_size=3)
    state = make().state_dict()
    for other, name in [(make(seed=1), "seed 0"), (make(batch_size=4), "batch_size 8")]:
        with pytest.raises(ConfigError, match=f"the data state was saved with {name}, this run has"):
            other.load_state_dict([state])
    with pytest.raises(ConfigError, match=r"the data changed .*: the whole edited \(examples 50 -> 49\)"):
        make(49).load_state_dict([state])


@WORKERS
@pytest.mark.parametrize("count", [1, 7, 8, 19])
def test_evaluation_sees_every_example_once_and_in_order(workers: int, count: int) -> None:
    batches = list(evaluation_batches(Noisy(count), collate, batch_size=8, num_workers=workers))
    assert indices(batches) == list(range(count))
    assert [len(batch) for batch in batches] == [8] * (count // 8) + [count % 8] * (count % 8 > 0)


@pytest.mark.parametrize("count", [1, 3, 8, 19])
def test_ranks_share_an_evaluation_without_doubles_or_empty_batches(count: int) -> None:
    seen = []
    for rank in range(4):
        batches = list(evaluation_batches(Noisy(count), collate, batch_size=8, rank=rank, world_size=4))
        assert indices(batches) == sorted(indices(batches))
        assert all(0 < len(batch) <= 2 for batch in batches)
        seen += indices(batches)
    assert sorted(seen) == list(range(count))


def test_an_evaluation_repeats_itself() -> None:
    batches = evaluation_batches(Noisy(19), collate, batch_size=8)
    first = list(batches)
    assert same(list(batches), first), "an iterable, not an iterator"
    assert same(list(evaluation_batches(Noisy(19), collate, batch_size=8, num_workers=2)), first)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_leaves_nothing_out(workers: int) -> None:
    with pytest.raises(
        BeitError, match=r"example 13 cannot be evaluated \(unreadable_image: 13.png\): mend it"
    ) as caught:
        list(evaluation_batches(Noisy(19, bad=(13, 14)), collate, batch_size=8, num_workers=workers))
    assert "\n" not in str(caught.value)


class Pictures:
    """Pictures of a folder, augmented; one of them is broken."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())
        config = MultimodalViewConfig(flip=0.5, rand_augment=2)
        self.view = MultimodalView(config, Preprocess(image_size=(24, 32)))

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Tensor:
        return self.view(read_picture(self.paths[index]))


def test_augmented_pictures_resume_bit_for_bit_in_workers(tmp_path: Path) -> None:
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "05.png").write_bytes(b"<html>")

    def build(workers: int) -> ExampleLoader[Tensor, Tensor]:
        return ExampleLoader(Pictures(tmp_path), torch.stack, batch_size=4, seed=0, num_workers=workers)

    whole = build(0)
    take(whole, 4)
    state = whole.state_dict()
    rest = take(whole, 5)
    assert all(batch.shape == (4, 3, 24, 32) and batch.dtype == torch.uint8 for batch in rest)
    again = build(2)
    again.load_state_dict([state])
    assert same(take(again, 5), rest)
    assert again.skipped == whole.skipped
    assert whole.skipped == {"unreadable_image": 3}, "three epochs"
