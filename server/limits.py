"""What one agent, and all together, may ask of a coordinator.

Whoever asks for more is told to come back, or is heard more slowly; the others notice nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from hansa.core.errors import InputError
from hansa.core.wire import INLINE

_SAVED = 10.0  # seconds for which calls that were not made may be saved up
_TOLD = 60.0  # seconds between two lines about the same agent
_MAY_BE_ZERO = ("waiting", "agent_waiting", "inline", "grace")
_KEPT = 10_000  # agents whose accounts are kept


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one agent, and all together, may ask of a coordinator.

    Attributes
    ----------
    uploads: at a time; others wait for a permit.
    waiting: uploads that may wait for one; more are told to come back.
    agent_uploads, agent_waiting: the same, of one agent.
    agent_rate: calls and messages a second of one agent, after some seconds' worth at once.
    calls: of one caller at a time, streams included, whoever it is.
    update: bytes of an update. inline: bytes up to which it may come in its manifest.
    examples: of a client, its weight. steps: of a job.
    patience: seconds between two pieces of an upload.
    heartbeat: seconds between two heartbeats; an agent that misses three is gone.
    grace: seconds that an agent may be gone before its jobs are lost.
    """

    uploads: int = 16
    waiting: int = 1000
    agent_uploads: int = 4
    agent_waiting: int = 100
    agent_rate: float = 500.0
    calls: int = 500
    update: int = 2 << 30
    inline: int = INLINE
    examples: int = 100_000_000
    steps: int = 1_000_000
    patience: float = 30.0
    heartbeat: float = 10.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                raise InputError(f"limits.{name}", value, "it is no limit", "use a number above 0")


class Account:
    """What one agent has used.

    Attributes
    ----------
    permits: for its uploads. uploads: how many are under way or wait.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = limits.agent_rate, clock
        self._left, self._at = limits.agent_rate * _SAVED, clock()
        self._told = -_TOLD
        self.permits = asyncio.Semaphore(limits.agent_uploads)
        self.uploads = 0

    def spend(self) -> float:
        """Take a call off what is left; returns the seconds until there is one again, 0 if there was."""
        now = self._clock()
        self._left = min(self._left + (now - self._at) * self._rate, self._rate * _SAVED)
        self._at = now
        if self._left < 1:
            return (1 - self._left) / self._rate
        self._left -= 1
        return 0.0

    def tell(self) -> bool:
        """Whether to write a line about it, once a minute."""
        now = self._clock()
        due = now - self._told >= _TOLD
        if due:
            self._told = now
        return due

    @property
    def idle(self) -> bool:
        """Whether it may be forgotten."""
        return not self.uploads and self._clock() - self._at >= _SAVED


class Accounts:
    """All agents' accounts, by name."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._known: dict[str, Account] = {}

    def of(self, name: str) -> Account:
        """An agent's."""
        if name not in self._known:
            if len(self._known) >= _KEPT:
                self._known = {other: each for other, each in self._known.items() if not each.idle}
            self._known[name] = Account(self._limits)
        return self._known[name]
