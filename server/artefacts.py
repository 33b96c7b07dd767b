"""Updates and parts of snapshots on disk, by the SHA-256 of their bytes.

::

    <folder>/<digest>                   an update, whole and checked, and durable once settled
    <folder>/snapshots/<run>/<digest>   a part of a run's snapshot: the newest's, save for a moment
    <folder>/spool/                     what is being written
    <folder>/spool/<run>/               uploads under way, one to a job: they go on or are cleared

Updates are kept, for they make the model again; a snapshot only saves time, and its parts go when a newer one
is durable. They stand apart, so that no update is ever taken for a part that nobody needs any more.

:meth:`Artefacts.settle` makes the names of many files durable at the price of one, before each commit of the
event log; their bytes were durable before. A file that no event names counts for nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

from hansa.core import disk
from hansa.core.errors import RunError
from hansa.core.trees import Tree
from hansa.core.wire.federation_pb2 import TensorInfo
from hansa.core.wire.tensors import Bytes, unpack_file
from hansa.server.pages import Pages, open_file, rounded, takes_direct, write
from hansa.server.patience import Over
from hansa.server.reception import InMemory, OnDisk, Reception

_SMALL = 8 << 20  # bytes of an update that is received in memory, and stays there until it is folded
_MEMORY = 192 << 20  # bytes for such updates; above it they do not stay, and are read from disk again
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Artefacts:
    """A folder of artefacts; made if absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._spool = folder / "spool"
        self._spool.mkdir(parents=True, exist_ok=True)
        self._snapshots = folder / "snapshots"
        self._snapshots.mkdir(exist_ok=True)
        self.pages, self.direct = Pages(_MEMORY), takes_direct(self._spool)
        self._unsettled = False
        self._left = {(path.parent.name, path.stem): path for path in self._spool.glob("*/*")}
        self._drafts = itertools.count()

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
            disk.sync_folder(self._snapshots)
        draft = self._spool / f"{digest}.{next(self._drafts)}.{os.getpid()}"  # two runs may put the same
        disk.write(draft, data)
        draft.rename(folder / digest)
        disk.sync_folder(folder)
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

    def receive(self, run: str, job: str, digest: str, size: int) -> Reception:
        """Begin the upload of a job, ``client-number``; it takes the place of what its client sent before."""
        path = self._spool / run / f"{job}.{digest[:16]}"
        client = job.partition("-")[0]
        before = {each for each in self._left if each[0] == run and each[1].partition("-")[0] == client}
        left = {self._left.pop(each) for each in before}
        for other in left - {path}:
            other.unlink(missing_ok=True)
        return (InMemory if size <= _SMALL else OnDisk)(self, path, digest, size, again=path in left)

    def left(self, path: Path) -> None:
        """An upload was interrupted; what came of it is there."""
        self._left[path.parent.name, path.stem] = path

    def write(self, memory: Bytes, size: int, digest: str) -> None:
        """Store an update; durable after :meth:`settle`.

        ``memory``: of :attr:`pages`; the first ``size`` bytes are the update.
        """
        draft = self._spool / f"{digest}.{next(self._drafts)}.{os.getpid()}"
        try:
            file = open_file(draft, direct=self.direct)
            try:
                write(file, memory[: rounded(size) if self.direct else size], 0)
                os.ftruncate(file, size)
                self.keep(file, draft, digest)
            finally:
                os.close(file)
        except OSError:
            draft.unlink(missing_ok=True)
            raise

    def keep(self, file: int, path: Path, digest: str) -> None:
        """Move a written file to its digest: never bytes that may be lost over others that are needed."""
        os.fsync(file)
        path.rename(self.path(digest))
        self._unsettled = True

    def tree(self, digest: str, tensors: Sequence[TensorInfo]) -> Tree | None:
        """An update's tensors, if it is here.

        Raises
        ------
        Malformed
            When it is no longer what it was.
        """
        path = self.path(digest)
        return unpack_file(path, tensors) if path.is_file() else None

    def get(self, digest: str) -> bytes:
        """An update's bytes, checked.

        Raises
        ------
        RunError
            When they are not there, or no longer what they were.
        """
        return _checked(self.path(digest))

    def settle(self) -> None:
        """Make the names of what was kept so far durable, as their bytes are."""
        if not self._unsettled:
            return
        self._unsettled = False
        try:
            disk.sync_folder(self.folder)
        except OSError as error:
            # A second fsync may succeed though the system has thrown the names away.
            raise Over(
                f"{self.folder}: the disk failed to make updates durable ({error.strerror}), and what the "
                "system still shows of them cannot be trusted; this coordinator ends; agents send again"
            ) from error

    def sweep(self) -> None:
        """Forget what an earlier process was writing when it ended."""
        for path in self._spool.iterdir():
            if path.is_file():
                path.unlink()

    def clear(self, unwanted: Callable[[str], bool]) -> None:
        """Forget the uploads under way to runs that are ``unwanted``."""
        for path in self._spool.iterdir():
            if path.is_dir() and unwanted(path.name):
                shutil.rmtree(path, ignore_errors=True)
        self._left = {job: path for job, path in self._left.items() if not unwanted(job[0])}


def _checked(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: an artefact cannot be read ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != path.name:
        raise RunError(f"{path}: an artefact is damaged; restore it from a backup")
    return data
