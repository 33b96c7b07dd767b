"""What clients keep to themselves, made on first touch: in memory first, then in a memory-mapped file.

Clients get places in the order in which they are first put, :data:`PAGE` to a page. Pages beyond the budget
lie in a nameless file, which the operating system pages in and out and which ends with the process.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from hansa.core.errors import StorageError
from hansa.core.trees import Tree, nbytes, put_under, take_under

PAGE = 64  # clients
_ALIGNED = 64  # bytes


class Bank:
    """Private trees by client; all have the names, shapes and types of ``first``.

    Parameters
    ----------
    first: what a client holds that was never put.
    memory: bytes that pages may take before they go to the file.
    folder: where the file is made; by default the system's folder for such files.
    """

    def __init__(self, first: Tree, *, memory: float, folder: Path | None = None) -> None:
        self._first, self._folder = first, folder
        self._slots: dict[int, int] = {}
        self._pages: list[Tree] = []
        self._resident = int(memory // max(1, PAGE * nbytes(first)))  # pages in memory
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        """How many clients were ever put."""
        return len(self._slots)

    def __getitem__(self, client: int) -> Tree:
        """A client's tensors: views, good until the client is put again."""
        slot = self._slots.get(client)
        if slot is None:
            return self._first
        page, row = divmod(slot, PAGE)
        return {name: each[row].to(self._first[name].device) for name, each in self._pages[page].items()}

    def put(self, client: int, private: Tree) -> None:
        """Keep a copy of a client's tensors."""
        if not self._first:
            return
        page, row = divmod(self._slots.setdefault(client, len(self._slots)), PAGE)
        if page == len(self._pages):
            self._pages.append(self._new_page())
        for name, each in self._pages[page].items():
            each[row] = private[name]

    def _new_page(self) -> Tree:
        number = len(self._pages) - self._resident
        if number < 0:
            return {name: each.new_empty((PAGE, *each.shape)) for name, each in self._first.items()}
        if self._file is None:
            folder = self._folder if self._folder is not None and self._folder.is_dir() else None
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        size = _size(self._first)
        try:
            self._file.truncate((number + 1) * size)
            if sys.platform == "linux":  # writing to a page without room on the disk would end the process
                os.posix_fallocate(self._file.fileno(), number * size, size)
        except OSError as error:
            raise StorageError(
                f"clients' private state has no room on the disk ({error.strerror}); make room, or raise "
                "engine.bank_memory, and resume the run"
            ) from error
        return _mapped(self._file, number, self._first, mmap.ACCESS_WRITE)

    # Checkpoints.

    def snapshot(self) -> tuple[Tree, list[int], IO[bytes] | None]:
        """(pages in memory by number, clients in the order of their places, the file of the other pages)."""
        tensors: Tree = {}
        for number, page in enumerate(self._pages[: self._resident]):
            rows = len(self._slots) - number * PAGE
            tensors |= put_under(str(number), {name: each[:rows] for name, each in page.items()})
        return tensors, list(self._slots), self._file

    def restore(self, tensors: Mapping[str, Tensor], clients: Sequence[int], file: Path | None) -> None:
        """Take what a :meth:`snapshot` held, whatever the budget was."""
        self._slots = {client: slot for slot, client in enumerate(clients)}
        self._pages = []
        resident = len({name.partition("/")[0] for name in tensors})
        for number in range(-(-len(clients) // PAGE)):
            if number < resident:
                source = take_under(str(number), tensors)
            else:
                assert file is not None
                with file.open("rb") as opened:
                    source = _mapped(opened, number - resident, self._first, mmap.ACCESS_COPY)
            page = self._new_page()
            self._pages.append(page)
            for name, each in page.items():
                rows = min(PAGE, len(clients) - number * PAGE)
                each[:rows] = source[name][:rows]


def _places(first: Tree) -> tuple[dict[str, int], int]:
    """Where each tensor of a page begins, and where the last ends: bytes."""
    places, end = {}, 0
    for name, each in first.items():
        places[name] = end
        end += -(-PAGE * nbytes({name: each}) // _ALIGNED) * _ALIGNED
    return places, end


def _size(first: Tree) -> int:
    """Bytes of a page in the file."""
    unit = mmap.ALLOCATIONGRANULARITY
    return -(-max(_places(first)[1], 1) // unit) * unit


def _mapped(file: IO[bytes], number: int, first: Tree, access: int) -> Tree:
    """A page of the file."""
    size = _size(first)
    raw = mmap.mmap(file.fileno(), size, access=access, offset=number * size)
    page = {}
    for name, start in _places(first)[0].items():
        like = first[name]
        shape, count = (PAGE, *like.shape), PAGE * like.numel()
        flat = torch.frombuffer(raw, dtype=like.dtype, count=count, offset=start) if count else torch.empty(0)
        page[name] = flat.to(like.dtype).view(shape)
    return page
