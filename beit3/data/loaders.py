"""What all loaders do alike: counting what is left out, and going to a saved position."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from beit3.config import require
from beit3.data.fingerprint import data_changes
from beit3.errors import ConfigError

MAX_BAD_IN_A_ROW = 10_000
"""Samples refused one after the other before a loader gives up."""
_NAMED = 3
"""Differences that are named; the others are counted."""


def told(skipped: Mapping[str, int]) -> str:
    """Counts of what was left out, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))


def belongs_here(
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    allow_change: bool,
    rank: int,
) -> bool:
    """Tell whether a saved position holds for a loader's data and settings.

    Args:
        state: what rank 0 saved; its `data` and `settings` are those of then.
        settings: what the order depends on beside the data.
        data: fingerprint of today.
        allow_change: whether other data are accepted, from their beginning; rank 0 says so on stderr.
        rank: the one that asks.

    Raises:
        ConfigError: the data changed and must not, or a setting differs; the message names the differences.
    """
    if changes := data_changes(state["data"], data):
        more = f" and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
        line = f"the data changed since the state was saved: {'; '.join(changes[:_NAMED])}{more}"
        if not allow_change:
            raise ConfigError(f"{line}. Restore them, or let all streams begin anew with --allow-data-change")
        if rank == 0:
            print(f"beit3: {line}. All streams begin anew", file=sys.stderr)
        return False
    for name, value in settings.items():
        saved = state["settings"][name]
        require(saved == value, f"the data state was saved with {name} {saved}, this run has {value}")
    return True


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
