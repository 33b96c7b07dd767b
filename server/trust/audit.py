"""The audit log: who did what, when, in a chain of hashes that shows every later change.

A text file, one record a line in canonical JSON; each holds its number and the SHA-256 of the line before it.
An edited, removed, inserted or reordered record breaks the chain. Records cut off at the end break nothing in
the chain; they are missed against a *head*, the number and hash of the last record, which is kept beside the
log after every append. Who can write both files can rewrite both: keep a head elsewhere (``hansa audit
head``) and check against it (``hansa audit verify --head``).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from hansa.core.errors import InputError, TrustError
from hansa.core.trust import files
from hansa.core.trust.identity import utcnow

_START = "0" * 64
_FIELDS = {"number", "time", "actor", "action", "object", "detail", "previous"}


@dataclass(frozen=True)
class Head:
    """How far a log has come.

    Parameters
    ----------
    number:
        Records up to here.
    hash:
        SHA-256 of the last one's line, hexadecimal.
    """

    number: int = 0
    hash: str = _START

    @classmethod
    def parse(cls, text: str) -> Self:
        """``NUMBER:HASH``.

        Raises
        ------
        InputError
            For anything else.
        """
        number, _, value = text.strip().partition(":")
        if not number.isdecimal() or len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise InputError("head", text, "it is no NUMBER:HASH", "give what `hansa audit head` printed")
        return cls(int(number), value)

    def __str__(self) -> str:
        return f"{self.number}:{self.hash}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One thing that somebody did.

    Parameters
    ----------
    number:
        Counted from 1.
    time:
        ISO 8601, UTC.
    actor, action, object:
        Who, did what (``certificate.revoke``), to what.
    detail:
        What else is to be known; no secrets.
    previous:
        SHA-256 of the line before.
    """

    number: int
    time: str
    actor: str
    action: str
    object: str
    detail: Mapping[str, Any]
    previous: str

    def line(self) -> bytes:
        """The one way to write this record, without the end of the line."""
        return json.dumps(
            vars(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        ).encode()


class Audit:
    """A log that is added to, by several processes if need be; every record is on the disk when told.

    Parameters
    ----------
    path:
        The log; its head is kept beside it (``audit.jsonl``, ``audit.head``).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head_path = path.with_suffix(".head")

    def append(
        self,
        actor: str,
        action: str,
        object: str,
        detail: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> Head:
        """Add a record and return the new head. Blocks for two fsyncs.

        What a crash left of a line that nobody was told about is cut off, and a record says so.

        Raises
        ------
        TrustError
            When the log does not end where its head says: nothing is added, for it would cover traces.
        """
        with self._locked() as descriptor:
            head, torn = self._end(descriptor)
            if torn:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - torn)
                head = self._write(
                    descriptor, head, "hansa", "audit.repair", "torn line", {"bytes": torn}, now
                )
            head = self._write(descriptor, head, actor, action, object, detail or {}, now)
            files.replace(self.head_path, f"{head}\n".encode(), files.PRIVATE)
        return head

    def verify(self, known: Head | None = None) -> Head:
        """Read the whole log and return its head.

        Parameters
        ----------
        known:
            A head that was kept elsewhere.

        Raises
        ------
        TrustError
            Naming the first line that was changed, or how many records are missing.
        """
        with self._locked() as descriptor:
            with open(descriptor, "rb", closefd=False) as stream:
                stream.seek(0)
                lines = stream.read().split(b"\n")
            kept = self._kept_head()
        torn = lines.pop()
        heads = [Head()]
        for line in lines:
            heads.append(self._checked(line, heads[-1]))
        for mark, where in ((kept, self.head_path), (known, "the given head")):
            if mark is None:
                continue
            if mark.number >= len(heads):
                raise TrustError(
                    f"{self.path}: {mark.number - len(heads) + 1} records are missing at its end: {where} "
                    f"tells of {mark.number}, and there are {len(heads) - 1}"
                )
            if heads[mark.number] != mark:
                raise TrustError(f"{self.path}: record {mark.number} is not the one that {where} tells of")
        if torn:
            raise TrustError(
                f"{self.path}: after record {len(heads) - 1} stand {len(torn)} bytes that are no whole "
                "line: a crash while writing, which the next record cuts off and tells of, or an edit"
            )
        return heads[-1]

    def records(self) -> Iterator[Record]:
        """The records, in order, unverified."""
        with self.path.open("rb") as stream:
            for line in stream:
                if line.endswith(b"\n"):
                    yield Record(**json.loads(line))

    def _checked(self, line: bytes, before: Head) -> Head:
        """The head after a line that follows ``before``."""
        number = before.number + 1
        try:
            record = json.loads(line)
            if record.keys() != _FIELDS or Record(**record).line() != line:
                raise ValueError
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise TrustError(
                f"{self.path}: line {number} was edited: it is no record as Hansa writes it"
            ) from None
        if record["number"] != number:
            raise TrustError(
                f"{self.path}: line {number} holds record {record['number']}: records were removed, inserted "
                "or reordered"
            )
        if record["previous"] != before.hash:
            raise TrustError(
                f"{self.path}: record {number} does not continue the line before it: that line was "
                "edited, or this one"
            )
        return Head(number, hashlib.sha256(line).hexdigest())

    def _end(self, descriptor: int) -> tuple[Head, int]:
        """The head by the log itself, and the bytes of a torn line after it."""
        lines = _tail(descriptor)
        torn = len(lines.pop())
        kept = self._kept_head()
        if not lines:
            head = Head()
        else:
            try:
                head = Head(int(json.loads(lines[-1])["number"]), hashlib.sha256(lines[-1]).hexdigest())
            except (ValueError, KeyError, TypeError):
                raise TrustError(
                    f"{self.path}: its last line is no record; run `hansa audit verify`"
                ) from None
        if kept.number > head.number or (kept.number == head.number and kept != head):
            raise TrustError(
                f"{self.path}: it ends with record {head.number}, which is not what {self.head_path} "
                f"tells of ({kept.number}): records were cut off or changed; keep both files for who "
                "investigates, and restore the log from a backup"
            )
        return head, torn

    def _kept_head(self) -> Head:
        try:
            return Head.parse(self.head_path.read_text())
        except (OSError, UnicodeDecodeError, InputError):
            raise TrustError(
                f"{self.head_path}: it cannot be read, so nobody knows whether {self.path.name} is whole; "
                "restore it"
            ) from None

    @staticmethod
    def _write(
        descriptor: int,
        head: Head,
        actor: str,
        action: str,
        object: str,
        detail: Mapping[str, Any],
        now: datetime | None,
    ) -> Head:
        record = Record(
            number=head.number + 1,
            time=(now or utcnow()).isoformat(timespec="milliseconds"),
            actor=actor,
            action=action,
            object=object,
            detail=dict(detail),
            previous=head.hash,
        )
        line = record.line()
        files.append(descriptor, line + b"\n")
        return Head(record.number, hashlib.sha256(line).hexdigest())

    @classmethod
    def create(cls, path: Path) -> Self:
        """Begin a log, durably.

        Raises
        ------
        TrustError
            When there is one already.
        """
        made = cls(path)
        if path.exists() or made.head_path.exists():
            raise TrustError(f"{path}: there is an audit log already; it is never begun anew")
        files.replace(made.head_path, f"{Head()}\n".encode(), files.PRIVATE)
        files.replace(path, b"", files.PRIVATE)
        return made

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The open log, which no other process adds to meanwhile."""
        try:
            descriptor = os.open(self.path, os.O_RDWR)
        except OSError as error:
            raise TrustError(
                f"{self.path}: the audit log cannot be opened ({error.strerror}); name it, or restore it"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def _tail(descriptor: int, step: int = 1 << 16) -> list[bytes]:
    """The last lines of a file, one whole one at least if there is one, and what follows the last."""
    size = os.fstat(descriptor).st_size
    want = step
    while True:
        start = max(0, size - want)
        lines = os.pread(descriptor, size - start, start).split(b"\n")
        if start == 0:
            return lines
        if len(lines) > 2:
            return lines[1:]  # the first may have been cut
        want *= 2
