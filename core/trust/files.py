"""Files that hold secrets or evidence: written whole or not at all, on the disk before anyone is told."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hansa.core.disk import sync_folder
from hansa.core.errors import TrustError

PRIVATE, PUBLIC = 0o600, 0o644


def make_folder(folder: Path) -> None:
    """A folder that only its owner reads; one that exists is checked (:func:`check_folder`)."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        why = f"it cannot be made ({error.strerror}); name a folder that you may write"
        raise TrustError(f"{folder}: {why}") from error
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Refuse a folder in which somebody else could exchange a key or a certificate.

    Raises
    ------
    TrustError
        When it is absent, is not the caller's, or others may write in it.
    """
    try:
        found = folder.stat()
    except FileNotFoundError:
        raise TrustError(f"{folder}: there is no such folder; see `hansa pki --help`") from None
    if found.st_uid not in (os.geteuid(), 0):
        raise TrustError(f"{folder}: it belongs to user {found.st_uid}; give it to the user who runs Hansa")
    if found.st_mode & 0o022:
        raise TrustError(f"{folder}: others may write in it ({_mode(found)}); chmod 700 {folder}")


def replace(path: Path, data: bytes, mode: int) -> None:
    """Put ``data`` in the place of a file, atomically and durably."""
    made = path.with_name(f".{path.name}.{os.getpid()}")
    made.unlink(missing_ok=True)
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
    sync_folder(path.parent)


def append(descriptor: int, data: bytes) -> None:
    """Add to an open file, durably; where the disk is full the file is as it was.

    Raises
    ------
    OSError
        As the operating system gives it.
    """
    size = os.fstat(descriptor).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.pwrite(descriptor, rest, size + len(data) - len(rest)) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def read_private(path: Path) -> bytes:
    """A file that nobody else may read.

    Raises
    ------
    TrustError
        When it is absent, is not the caller's, or others may read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise TrustError(f"{path}: there is no such file; see `hansa pki --help`") from None
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(stream.fileno())
        if found.st_uid not in (os.geteuid(), 0):
            raise TrustError(f"{path}: it belongs to user {found.st_uid}; give it to the user who runs Hansa")
        if found.st_mode & 0o077:
            raise TrustError(f"{path}: others may read this key ({_mode(found)}); chmod 600 {path}")
        return stream.read()


def _mode(found: os.stat_result) -> str:
    return f"mode {stat.S_IMODE(found.st_mode):03o}"
