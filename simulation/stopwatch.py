"""Where the time goes."""

from __future__ import annotations

import time


class Stopwatch:
    """Wall seconds by kind of work. Work within other work counts once, for the inner.

    Attributes
    ----------
    seconds: by kind, so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    def __call__(self, kind: str) -> _Lap:
        """Count what is done within."""
        return _Lap(self, kind)

    def turn(self) -> None:
        """Count up to now for the innermost kind."""
        now = time.perf_counter()
        if self._running:
            kind = self._running[-1]
            self.seconds[kind] = self.seconds.get(kind, 0.0) + now - self._since
        self._since = now

    def begin(self, kind: str) -> None:
        """Count for this kind from now on."""
        self.turn()
        self._running.append(kind)

    def end(self) -> None:
        """Go back to the kind before."""
        self.turn()
        self._running.pop()


class _Lap:
    """Work of one kind."""

    __slots__ = ("_clock", "_kind")

    def __init__(self, clock: Stopwatch, kind: str) -> None:
        self._clock, self._kind = clock, kind

    def __enter__(self) -> None:
        self._clock.begin(self._kind)

    def __exit__(self, *_: object) -> None:
        self._clock.end()
