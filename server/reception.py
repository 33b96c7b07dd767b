"""Uploads under way: bytes that come piece by piece, are checked when all are there, and become an artefact.

A small update is received in memory, where it is checked and from where it is written and folded; a large one
goes to a file as it comes. Either can be interrupted, and goes on later with what had come.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from hansa.core.trees import Tree
from hansa.core.wire.federation_pb2 import TensorInfo
from hansa.core.wire.tensors import unpack, unpack_file

if TYPE_CHECKING:
    from hansa.server.artefacts import Artefacts

_HELD = 4 << 20  # bytes that come before they are written


class Reception(ABC):
    """One upload. All but :meth:`take` may use the disk, and belong in a thread.

    Parameters
    ----------
    path: where it is left when it is interrupted.
    again: whether an earlier try was left there.

    Attributes
    ----------
    offset: how many bytes have arrived.
    away: whether there is something to :meth:`open` first.
    """

    away: bool

    def __init__(self, artefacts: Artefacts, path: Path, digest: str, size: int, *, again: bool) -> None:
        self._artefacts, self._path, self._digest, self._size = artefacts, path, digest, size
        self.offset = 0
        self.away = again

    @abstractmethod
    def open(self) -> None:
        """Go on with what an earlier try left."""

    @abstractmethod
    def take(self, data: bytes | memoryview) -> bool:
        """Take the next bytes; returns whether it is time to :meth:`write`."""

    @abstractmethod
    def write(self) -> None:
        """Write what is held."""

    @abstractmethod
    def whole(self) -> bool:
        """Whether the bytes, all there, are those of the digest."""

    @abstractmethod
    def check(self, tensors: Sequence[TensorInfo]) -> Tree | None:
        """Refuse what are not these tensors; returns them if they may stay in memory until they are folded.

        Raises
        ------
        Malformed
            As :func:`~hansa.core.wire.tensors.unpack`.
        """

    @abstractmethod
    def keep(self) -> None:
        """Make them an artefact; durable after the next :meth:`~hansa.server.artefacts.Artefacts.settle`."""

    @abstractmethod
    def pause(self) -> None:
        """Leave them for another try; what a full disk does not take is sent again."""

    def discard(self) -> None:
        """Forget them."""
        self._path.unlink(missing_ok=True)


class InMemory(Reception):
    """A small update."""

    def __init__(self, artefacts: Artefacts, path: Path, digest: str, size: int, *, again: bool) -> None:
        super().__init__(artefacts, path, digest, size, again=again)
        self._memory = artefacts.pages.take(size)
        self._data = self._memory[:size]

    def open(self) -> None:
        """Read what an earlier try left."""
        before = np.fromfile(self._path, np.uint8)
        if len(before) <= self._size:
            self._data[: len(before)] = before
            self.offset = len(before)

    def take(self, data: bytes | memoryview) -> bool:
        """Put the next bytes where they belong; through a memoryview, which keeps Python's lock meanwhile."""
        self._data.data[self.offset : self.offset + len(data)] = data
        self.offset += len(data)
        return False

    def write(self) -> None:
        """Nothing is held that has to go."""

    def whole(self) -> bool:
        """Hash, and compare."""
        return hashlib.sha256(self._data.data).hexdigest() == self._digest

    def check(self, tensors: Sequence[TensorInfo]) -> Tree | None:
        """Look at the tensors where they lie."""
        tree = unpack(self._data, tensors)
        return None if self._artefacts.pages.scarce else tree

    def keep(self) -> None:
        """Write."""
        self._artefacts.write(self._memory, self._size, self._digest)
        if self.away:
            self.discard()

    def pause(self) -> None:
        """Write what there is."""
        if self.offset:
            with suppress(OSError):
                self._path.parent.mkdir(exist_ok=True)
                self._data[: self.offset].tofile(self._path)
                self._artefacts.left(self._path)

    def discard(self) -> None:
        """There is nothing left to pause."""
        self.offset = 0
        super().discard()


class OnDisk(Reception):
    """A large update: hashed and written a few pieces at a time."""

    def __init__(self, artefacts: Artefacts, path: Path, digest: str, size: int, *, again: bool) -> None:
        super().__init__(artefacts, path, digest, size, again=again)
        self.away = True
        self._hash = hashlib.sha256()
        self._pieces: list[bytes | memoryview] = []
        self._held = 0
        self._file: BinaryIO | None = None

    def open(self) -> None:
        """Hash what an earlier try left."""
        self._path.parent.mkdir(exist_ok=True)
        self._file = self._path.open("a+b")
        if os.fstat(self._file.fileno()).st_size > self._size:
            self._file.truncate(0)
        self._file.seek(0)
        while part := self._file.read(1 << 20):
            self._hash.update(part)
        self.offset = self._file.tell()

    def take(self, data: bytes | memoryview) -> bool:
        """Hold the next bytes."""
        self._pieces.append(data)
        self._held += len(data)
        self.offset += len(data)
        return self._held >= _HELD

    def write(self) -> None:
        """Hash and write what is held."""
        assert self._file is not None
        pieces, self._pieces, self._held = self._pieces, [], 0
        for data in pieces:
            self._file.write(data)
            self._hash.update(data)
        self._file.flush()

    def whole(self) -> bool:
        """Compare."""
        self.write()
        return self._hash.hexdigest() == self._digest

    def check(self, tensors: Sequence[TensorInfo]) -> None:
        """Look at the tensors in the file, which stay there."""
        unpack_file(self._path, tensors)

    def keep(self) -> None:
        """Move the file."""
        assert self._file is not None
        self._artefacts.keep(self._file.fileno(), self._path, self._digest)
        self._file.close()

    def pause(self) -> None:
        """Write what is held."""
        if self._file is not None and not self._file.closed:
            with suppress(OSError):
                self.write()
            with suppress(OSError):
                self._file.close()
            self._artefacts.left(self._path)

    def discard(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()
        super().discard()
