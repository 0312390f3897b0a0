"""The position of an energon dataset as plain dicts, lists, numbers and bytes, so that any checkpoint can hold it."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.state import FlexState

_TYPES: dict[str, Any] = {SliceState.__name__: SliceState}
_KIND = "__kind__"


def to_plain(state: Any) -> Any:
    """Write energon's state objects as plain data."""
    if dataclasses.is_dataclass(state):
        values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return {_KIND: type(state).__name__, **{name: to_plain(value) for name, value in values.items()}}
    if isinstance(state, dict):
        return {name: to_plain(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(to_plain(value) for value in state)
    return state


def from_plain(state: Any) -> Any:
    """Rebuild energon's state objects from the result of `to_plain`; shares nothing with it."""
    if isinstance(state, dict):
        values = {name: from_plain(value) for name, value in state.items() if name != _KIND}
        return _TYPES[state[_KIND]](**values) if _KIND in state else FlexState(values)
    if isinstance(state, (list, tuple)):
        return type(state)(from_plain(value) for value in state)
    return state
