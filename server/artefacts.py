"""Updates and parts of snapshots on disk, by the SHA-256 of their bytes.

::

    <folder>/<digest>                   an update, whole and checked, and durable once settled
    <folder>/snapshots/<run>/<digest>   a part of a run's snapshot: the newest's, save for a moment
    <folder>/spool/                     what is being written
    <folder>/spool/<run>/               uploads under way, one to a job: they go on or are cleared

Updates are kept, for they make the model again; a snapshot only saves time, and its parts go when a newer one
is durable. They stand apart, so that no update is ever taken for a part that nobody needs any more.

:meth:`Artefacts.settle` makes many files and their names durable at the price of about one: they are given to
the disk at the same time, before each commit of the event log. A file that no event names was not settled
and counts for nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from hansa.core.errors import RunError
from hansa.server.patience import Over

_AT_ONCE = 8  # files given to the disk together
_HELD = 4 << 20  # bytes of an upload in memory before they are written
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Artefacts:
    """A folder of artefacts; made if absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._spool = folder / "spool"
        self._spool.mkdir(parents=True, exist_ok=True)
        self._snapshots = folder / "snapshots"
        self._snapshots.mkdir(exist_ok=True)
        self._unsettled: list[BinaryIO] = []
        self._lock = threading.Lock()
        self._disk = ThreadPoolExecutor(_AT_ONCE, "disk")

    def path(self, digest: str) -> Path:
        """Where an artefact is, if it is there."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError("no SHA-256 digest")
        return self.folder / digest

    # Snapshots.

    def put(self, run: str, data: bytes) -> str:
        """Store a part of a run's snapshot durably; returns its digest."""
        digest = hashlib.sha256(data).hexdigest()
        folder = self._snapshots / run
        if not folder.is_dir():
            folder.mkdir()
            _sync(self._snapshots)
        draft = self._spool / f"{digest}.{os.getpid()}"
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(folder / digest)
        _sync(folder)
        return digest

    def part(self, run: str, digest: str) -> bytes:
        """A part of a run's snapshot, checked, as :meth:`get`."""
        return _checked(self._snapshots / run / self.path(digest).name)

    def prune(self, run: str, named: Collection[str] = ()) -> None:
        """Forget the parts of a run's snapshots that are not ``named``; if not now, then the next time."""
        folder = self._snapshots / run
        if folder.is_dir():
            with suppress(OSError):
                for path in folder.iterdir():
                    if path.name not in named:
                        path.unlink()
                if not named:
                    folder.rmdir()

    # Updates.

    def keep(self, file: BinaryIO, path: Path, digest: str) -> None:
        """Move a written file to its digest; durable after :meth:`settle`."""
        file.flush()
        path.rename(self.path(digest))
        with self._lock:
            self._unsettled.append(file)

    def get(self, digest: str) -> bytes:
        """An update's bytes, checked.

        Raises
        ------
        RunError
            When they are not there, or no longer what they were.
        """
        return _checked(self.path(digest))

    def receive(self, run: str, job: str, digest: str) -> Reception:
        """Begin or go on with the upload of a job; one of another digest takes the place of what is there."""
        folder = self._spool / run
        folder.mkdir(exist_ok=True)
        path = folder / f"{job}.{digest[:16]}"
        for other in folder.glob(f"{job}.*"):
            if other != path:
                other.unlink(missing_ok=True)
        return Reception(self, path, digest)

    def settle(self) -> None:
        """Make what was kept so far durable."""
        with self._lock:
            files, self._unsettled = self._unsettled, []
        if not files:
            return
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            # All at once: a journaling file system commits them together.
            list(self._disk.map(os.fsync, [folder, *(file.fileno() for file in files)]))
        except OSError as error:
            # A second fsync may succeed though the system has thrown the bytes away.
            raise Over(
                f"{self.folder}: the disk failed to make updates durable ({error.strerror}), and what the "
                "system still shows of them cannot be trusted; this coordinator ends; agents send again"
            ) from error
        finally:
            os.close(folder)
            for file in files:
                file.close()

    def close(self) -> None:
        """Let go of what was not settled: no event names it."""
        with self._lock:
            files, self._unsettled = self._unsettled, []
        for file in files:
            file.close()
        self._disk.shutdown()

    def clear(self, unwanted: Callable[[str], bool]) -> None:
        """Forget the uploads under way to runs that are ``unwanted``."""
        for path in self._spool.iterdir():
            if path.is_dir() and unwanted(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _checked(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: an artefact cannot be read ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != path.name:
        raise RunError(f"{path}: an artefact is damaged; restore it from a backup")
    return data


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Reception:
    """Bytes that arrive piece by piece, hashed and written a few at a time, away from the event loop.

    Attributes
    ----------
    offset: how many have arrived.
    path: the file they are in, or will be.
    """

    def __init__(self, artefacts: Artefacts, path: Path, digest: str) -> None:
        self._artefacts, self.path, self._digest = artefacts, path, digest
        self._hash = hashlib.sha256()
        self._pieces: list[bytes] = []
        self._held = 0
        self._file: BinaryIO = path.open("a+b")
        self._file.seek(0)
        while part := self._file.read(1 << 20):
            self._hash.update(part)
        self.offset = self._file.tell()

    def take(self, data: bytes) -> bool:
        """Take the next bytes; returns whether it is time to :meth:`write`."""
        self._pieces.append(data)
        self._held += len(data)
        self.offset += len(data)
        return self._held >= _HELD

    def write(self) -> None:
        """Hash and write what is held."""
        pieces, self._pieces, self._held = self._pieces, [], 0
        for data in pieces:
            self._file.write(data)
            self._hash.update(data)
        self._file.flush()

    def whole(self) -> bool:
        """Whether the bytes are those of the digest."""
        self.write()
        return self._hash.hexdigest() == self._digest

    def keep(self) -> None:
        """Make them an artefact; durable after the next :meth:`Artefacts.settle`."""
        self._artefacts.keep(self._file, self.path, self._digest)

    def pause(self) -> None:
        """Leave them for another try; what a full disk does not take is sent again."""
        if not self._file.closed:
            with suppress(OSError):
                self.write()
            with suppress(OSError):
                self._file.close()

    def discard(self) -> None:
        """Forget them."""
        self._file.close()
        self.path.unlink(missing_ok=True)
