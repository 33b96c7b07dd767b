"""What an agent keeps on disk: clients' private state, and updates that no coordinator has acknowledged.

::

    <state>/private/<run>/<client>-<number>.safetensors  what the client keeps to itself since that job
    <state>/outbox/<run>/<client>-<number>/          one finished job, made visible in one rename
       ├─ update.safetensors
       ├─ private.safetensors                        what the client will keep if the update counts
       └─ entry.json

A client's private state moves on when the coordinator has counted the update that goes with it, and only
then: an update that is lost or comes too late leaves no trace, as if the job had never been. Nor does one
that counted and was thrown away after all, because its round was abandoned: the client's next job says so,
and what it kept before is still there.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hansa.core.disk import sync_folder, write
from hansa.core.errors import RunError
from hansa.core.trees import Tree
from hansa.core.wire.federation_pb2 import TensorInfo
from hansa.core.wire.tensors import Malformed, Packed, describe, pack, unpack_file

_RUN = re.compile(r"[A-Za-z0-9][\w.-]{0,127}")
_UPDATE, _PRIVATE, _ENTRY = "update.safetensors", "private.safetensors", "entry.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A finished job: its lease in hexadecimal, what the manifest says, and the update's digest.

    ``seconds`` is how long training took.
    """

    lease: str
    run: str
    client: int
    number: int
    examples: int
    steps: int
    loss: float | None
    digest: str
    size: int
    tensors: Sequence[tuple[str, str, Sequence[int]]]
    seconds: float = 0.0

    def infos(self) -> list[TensorInfo]:
        """The update's tensors, in the tree's order."""
        return [TensorInfo(name=name, dtype=dtype, shape=shape) for name, dtype, shape in self.tensors]


def entry(packed: Packed, **facts: object) -> Entry:
    """The entry of an update."""
    tensors = [(each.name, each.dtype, list(each.shape)) for each in packed.tensors]
    return Entry(digest=packed.digest, size=len(packed.data), tensors=tensors, **facts)  # type: ignore[arg-type]


class Outbox:
    """The folder ``state``; made if absent."""

    def __init__(self, state: Path) -> None:
        self._private, self._outbox = state / "private", state / "outbox"
        try:
            for folder in (state, self._private, self._outbox):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it tells of the examples
        except OSError as error:
            raise RunError(
                f"{state}: it cannot be written ({error.strerror}); see its permissions"
            ) from error
        for draft in self._outbox.glob("*/.draft-*"):
            shutil.rmtree(draft, ignore_errors=True)

    # Private state.

    def private(self, run: str, client: int, fresh: Tree, *, undone: int | None = None) -> Tree:
        """A client's private state, or ``fresh`` before its first job that counted.

        What job number ``undone`` left is forgotten.

        Raises
        ------
        RunError
            When it cannot be read: starting it anew would silently spoil the run.
        """
        if undone is not None:
            self._state(run, client, undone).unlink(missing_ok=True)
        if not fresh:
            return fresh
        kept = self._states(run, client)
        if not kept and (older := self._private / run / f"{client}.safetensors").is_file():
            raise RunError(
                f"{older}: an older Hansa kept this client's private state; rename the file to "
                f"{client}-0.safetensors to go on from it, or remove it to begin anew"
            )
        if not kept:
            return fresh
        path = kept[-1]
        try:
            return unpack_file(path, describe(fresh))
        except (OSError, Malformed) as error:
            raise RunError(f"{path}: a client's private state cannot be read ({error})") from error

    # Updates.

    def put(self, made: Entry, update: Packed, private: Tree) -> None:
        """Keep a finished job.

        Raises
        ------
        RunError
            When the disk does not take it; nothing of it is left there.
        """
        folder = self._folder(made)
        draft = folder.with_name(f".draft-{folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            (draft / _UPDATE).write_bytes(update.data)
            if private:  # the update could be computed again, but not once the coordinator has counted it
                write(draft / _PRIVATE, pack(private).data)
            (draft / _ENTRY).write_text(json.dumps(asdict(made)))
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)
            if private:
                sync_folder(folder.parent)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise RunError(f"{folder}: a finished job could not be kept ({error.strerror})") from error

    def entries(self) -> list[Entry]:
        """All that wait for an acknowledgement."""
        found = []
        for path in sorted(self._outbox.glob(f"*/*/{_ENTRY}")):
            try:
                found.append(Entry(**json.loads(path.read_text())))
            except (OSError, ValueError, TypeError):
                shutil.rmtree(path.parent, ignore_errors=True)  # the coordinator will ask again
        return found

    def read(self, made: Entry, offset: int, size: int) -> bytes:
        """A piece of an update."""
        with (self._folder(made) / _UPDATE).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def whole(self, made: Entry) -> bool:
        """Whether an update still is what it was."""
        with (self._folder(made) / _UPDATE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == made.digest

    def settle(self, made: Entry, *, counted: bool) -> None:
        """The coordinator has answered: the private state moves on if the update counted."""
        folder = self._folder(made)
        path = self._state(made.run, made.client, made.number)
        if counted and (folder / _PRIVATE).is_file():
            path.parent.mkdir(exist_ok=True)
            (folder / _PRIVATE).rename(path)
        if counted and path.is_file():
            sync_folder(path.parent)
            for old in self._states(made.run, made.client)[:-2]:  # the last may yet be undone
                old.unlink()
        shutil.rmtree(folder, ignore_errors=True)

    def _state(self, run: str, client: int, number: int) -> Path:
        return self._private / _safe(run) / f"{client}-{number}.safetensors"

    def _states(self, run: str, client: int) -> list[Path]:
        """What a client kept of its last jobs, oldest first."""
        found = (self._private / _safe(run)).glob(f"{client}-*.safetensors")
        return sorted(found, key=lambda path: int(path.stem.partition("-")[2]))

    def _folder(self, made: Entry) -> Path:
        return self._outbox / _safe(made.run) / f"{made.client}-{made.number}"


def _safe(run: str) -> str:
    """A run's name as a folder's."""
    if not _RUN.fullmatch(run):
        raise RunError("the coordinator named a run in a way that is no name; see its log")
    return run
