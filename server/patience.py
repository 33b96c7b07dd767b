"""What cannot be written now is tried again: a full disk or an absent database costs time and no more."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from hansa.core.errors import RunError, StorageError

T = TypeVar("T")
PASSING = (OperationalError, InterfaceError, InternalError, PoolTimeout, OSError, StorageError)
"""Errors that end when the disk has room, or the database is back."""
_FIRST, _LONGEST = 0.1, 2.0  # seconds before another try, doubled from one to the other

_log = structlog.get_logger(__name__)


class Over(RunError):
    """This process may write no more, and ends."""


async def insist(act: Callable[[], T], what: str, *, seconds: float = math.inf) -> T:
    """``act``, in a thread, until it succeeds; ``what`` is what it does, for the log.

    Raises
    ------
    StorageError
        When ``seconds`` have passed and it still could not be done.
    """
    until, pause = time.monotonic() + seconds, _FIRST
    while True:
        try:
            return await _whole(act)
        except PASSING as error:
            why = reason(error)
            if time.monotonic() + pause > until:
                raise StorageError(f"{what}: not now ({why}); try again later") from error
            _log.error("trying again", what=what, why=why, seconds=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST)


async def _whole(act: Callable[[], T]) -> T:
    """``act`` in a thread. Whoever is cancelled waits for its end: it holds a connection."""
    acting = asyncio.create_task(asyncio.to_thread(act))
    try:
        return await asyncio.shield(acting)
    except asyncio.CancelledError:
        await asyncio.wait([acting])
        if not acting.cancelled():
            acting.exception()
        raise


def reason(error: BaseException) -> str:
    """The driver's or the system's own words, without statements and addresses."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]
