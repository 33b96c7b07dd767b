"""The lock of a run's directory: one process writes; whoever looks can tell which."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from pathlib import Path

from hansa.core.errors import RunError
from hansa.core.store.faults import unwritable


def acquire(directory: Path) -> int:
    """Take the lock; returns the descriptor that holds it.

    Raises
    ------
    RunError
        Where another process has it, or the directory cannot be written.
    """
    try:
        descriptor = os.open(directory / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(directory, error) from error
    for _ in range(5):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)  # a reader's look at the lock (see :func:`locked`) is over by then
        else:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} {platform.node()}\n".encode())
            return descriptor
    os.close(descriptor)
    raise RunError(f"{directory}: another process is writing this run; wait for it or stop it first")


def release(descriptor: int) -> None:
    """Give the lock back: unlocked, not only closed, for a forked child may still hold a copy."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def writer(directory: Path) -> int | None:
    """Number of the process that writes the run; None if there is none, or it is of another machine."""
    if not locked(directory):
        return None
    number, _, node = (directory / "run.lock").read_text(encoding="utf-8").strip().partition(" ")
    return int(number) if number.isdigit() and node == platform.node() else None


def locked(directory: Path) -> bool:
    """Whether some process holds the run's lock."""
    try:
        descriptor = os.open(directory / "run.lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
