"""Tables: every row once an epoch, exact resume."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3.data.table import TableLoader
from beit3.errors import BadSampleError, ConfigError


class Noisy:
    """Rows that draw a random number, as augmentation does; row 13 may be broken."""

    def __init__(self, rows: int, broken: int = -1) -> None:
        self.rows, self.broken = rows, broken

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[int, float]:
        if index == self.broken:
            raise BadSampleError("unreadable_image")
        return index, torch.rand(()).item()


def collate(rows: list[tuple[int, float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def make(rows: int = 50, workers: int = 0, **options: Any) -> TableLoader[tuple[int, float], Tensor]:
    return TableLoader(Noisy(rows), 8, collate, **{"seed": 0, "num_workers": workers, **options})


def take(loader: TableLoader[Any, Tensor], count: int) -> list[Tensor]:
    return list(itertools.islice(loader, count))


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("before", [0, 4, 6, 15])
def test_resume_continues_bit_for_bit(workers: int, before: int) -> None:
    whole = make()
    take(whole, before)
    state = whole.state_dict()
    rest = take(whole, 14)
    again = make(workers=workers)  # the number of workers does not matter
    again.load_state_dict(state)
    assert same(take(again, 14), rest)


def test_an_epoch_shows_every_row_once_and_the_next_another_order() -> None:
    loader = make(48)
    epochs = [torch.cat(take(loader, len(loader)))[:, 0].int().tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_what_fills_no_batch_is_dropped() -> None:
    assert len(make(50)) == 6
    assert len(set(torch.cat(take(make(50), 6))[:, 0].tolist())) == 48


def test_ranks_divide_the_batch_of_one_rank() -> None:
    whole = take(make(), 8)
    parts = [take(make(rank=rank, world_size=2), 8) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        both = torch.cat([parts[0][step], parts[1][step]])
        assert parts[0][step].shape == (4, 2)
        assert torch.equal(both[:, 0], batch[:, 0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_row_is_replaced_and_counted(workers: int) -> None:
    loader = TableLoader(Noisy(16, broken=13), 16, collate, seed=0, num_workers=workers)
    rows = take(loader, 2)[0][:, 0].int().tolist()
    assert sorted(rows) == sorted([*range(13), 14, 14, 15])
    assert loader.skipped == {"unreadable_image": 2}


def test_a_table_without_a_usable_row_ends_with_an_error() -> None:
    with pytest.raises(ConfigError, match="no row of 1 can be used"):
        take(TableLoader(Noisy(1, broken=0), 1, collate, seed=0), 1)


def test_sizes_and_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="not divisible"):
        make(world_size=3)
    with pytest.raises(ConfigError, match=r"batch_size must lie in 1\.\.4"):
        make(4)
    with pytest.raises(ConfigError, match="saved with"):
        make(seed=1).load_state_dict(make().state_dict())
