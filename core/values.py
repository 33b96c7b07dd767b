"""Immutable values at the price of a dictionary, for those that are made at every event.

A frozen dataclass sets every field by a call of its own, three times as slow. What is made here has not gone
through ``__init__``: only for dataclasses that check nothing, with every field that has no default.
"""

from __future__ import annotations

from typing import Any, TypeVar

_Value = TypeVar("_Value")
_new, _set = object.__new__, object.__setattr__


def made(kind: type[_Value], **fields: Any) -> _Value:
    """A value of a frozen dataclass."""
    value = _new(kind)
    _set(value, "__dict__", fields)
    return value


def replace(value: _Value, **changes: Any) -> _Value:
    """As :func:`dataclasses.replace` makes it."""
    copy = _new(type(value))
    _set(copy, "__dict__", {**value.__dict__, **changes})
    return copy
