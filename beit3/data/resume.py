"""What all loaders do alike when they go to a saved position."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from beit3.config import require
from beit3.data.fingerprint import data_changes
from beit3.errors import ConfigError

_NAMED = 3
"""Differences that are named; the others are counted."""


def is_same_data(old: Mapping[str, Any] | None, new: Mapping[str, Any], *, allow_change: bool, rank: int) -> bool:
    """Tell whether a saved position holds for these data.

    Args:
        old: fingerprint in the state; None in states of earlier versions.
        new: fingerprint of today.
        allow_change: whether other data are accepted, from their beginning; rank 0 says so on stderr.
        rank: the one that asks.

    Raises:
        ConfigError: the data changed and must not; the message names the differences.
    """
    require(old is not None, "the data state was saved by an earlier version: start a new run")
    changes = data_changes(old or {}, new)
    if not changes:
        return True
    more = f" and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
    line = f"the data changed since the state was saved: {'; '.join(changes[:_NAMED])}{more}"
    if not allow_change:
        raise ConfigError(f"{line}. Restore them, or let all streams begin anew with --allow-data-change")
    if rank == 0:
        print(f"beit3: {line}. All streams begin anew", file=sys.stderr)
    return False


def share_of_counts(states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> Counter[str]:
    """What a rank has skipped so far: its own count, or where the ranks were others rank 0 has the sum of all.

    Args:
        states: what each rank saved.
        rank: the one that asks.
        world_size: of how many.
    """
    if len(states) == world_size:
        return Counter(states[rank]["skipped"])
    total: Counter[str] = Counter()
    for state in states if rank == 0 else ():
        total.update(state["skipped"])
    return total
