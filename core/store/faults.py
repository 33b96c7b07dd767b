"""What is said when a record cannot be read or written."""

from __future__ import annotations

from pathlib import Path

from hansa.core.errors import RunError, StorageError


def reason(error: BaseException) -> str:
    """Why, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # The driver's words, without the statement and the address of the manual that SQLAlchemy adds.
    return str(getattr(error, "orig", None) or error).splitlines()[0]


def damaged(directory: Path, why: str) -> RunError:
    """The database cannot be read."""
    return RunError(
        f"{directory}: the run's database cannot be read ({why}); restore run.db from a copy or delete "
        "the directory and run the recipe again"
    )


def unwritable(directory: Path, error: BaseException) -> StorageError:
    """Nothing can be recorded."""
    return StorageError(
        f"{directory}: the run cannot be recorded ({reason(error)}); see that the directory is writable and "
        "the disk has room"
    )
