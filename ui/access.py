"""Who looks, and what they may do."""

from __future__ import annotations


def may_operate() -> bool:
    """Whether whoever looks may start, stop and resume runs."""
    return True
