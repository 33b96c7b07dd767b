"""Memory that is used again, and files that are written past the page cache.

A page that is fresh, in a process or in the page cache, costs a fault and its zeroes, and the system's search
for one to take back. For an update that is read once this is most of its cost, so small ones stay where they
were received until they are folded, and go to the disk from there.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from pathlib import Path

import numpy as np

from hansa.core.wire.tensors import Bytes

BLOCK = 4096
"""Bytes of which memory, offsets and sizes are multiples in writes past the page cache."""

_DIRECT: int = getattr(os, "O_DIRECT", 0)
_GRAIN = 64 << 10  # bytes to which sizes are rounded up, so that memory fits the next update, too


class Pages:
    """Page-aligned memory. It comes back when no array or tensor looks at it any more.

    Parameters
    ----------
    most: bytes, lent and waiting to be lent again, above which what comes back is given to the system.
    """

    def __init__(self, most: int) -> None:
        self._most, self._lent, self._waiting = most, 0, 0
        self._free: dict[int, list[mmap.mmap]] = {}
        self._lock = threading.RLock()  # an array may be let go of anywhere, here, too

    def take(self, size: int) -> Bytes:
        """At least ``size`` bytes, whatever they are, in whole blocks."""
        size = -(-max(size, 1) // _GRAIN) * _GRAIN
        with self._lock:
            free = self._free.pop(size, [])
            memory = free.pop() if free else None
            if free:
                self._free[size] = free  # behind the others
            self._lent += size
            if memory is not None:
                self._waiting -= size
            while self._waiting and self._lent + self._waiting > self._most:
                self._give_up()
        if memory is None:
            memory = mmap.mmap(-1, size)
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._back, memory).atexit = False
        return array

    def _give_up(self) -> None:
        """Memory of a size that nobody has asked for lately."""
        size = next(iter(self._free))
        self._free[size].pop()
        if not self._free[size]:
            del self._free[size]
        self._waiting -= size

    @property
    def scarce(self) -> bool:
        """Whether more is lent than there should be."""
        return self._lent > self._most

    def _back(self, memory: mmap.mmap) -> None:
        with self._lock:
            self._lent -= len(memory)
            if self._lent + self._waiting + len(memory) <= self._most:
                self._free.setdefault(len(memory), []).append(memory)
                self._waiting += len(memory)


def takes_direct(folder: Path) -> bool:
    """Whether files there can be written past the page cache."""
    if not _DIRECT:
        return False
    path = folder / f"direct.{os.getpid()}"
    try:
        descriptor = open_file(path, direct=True)
        try:
            write(descriptor, Pages(0).take(BLOCK)[:BLOCK], 0)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def open_file(path: Path, *, direct: bool) -> int:
    """A descriptor to read and write, of a file that is made if absent."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (_DIRECT if direct else 0), 0o644)


def write(descriptor: int, data: Bytes, offset: int) -> None:
    """All of it, or an error: a disk that is nearly full takes a part."""
    rest = data.data
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def rounded(size: int) -> int:
    """``size`` in whole blocks."""
    return -(-size // BLOCK) * BLOCK
