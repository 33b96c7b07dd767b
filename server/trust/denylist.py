"""The deny-list: serials that are refused on every call, from the next call on.

A text file, one JSON object a line, only ever added to. It can be copied to another coordinator, and survives
the loss of the registry. Whoever cannot read it, or a line of it, refuses everyone.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from hansa.core.errors import TrustError
from hansa.core.trust import files
from hansa.core.trust.identity import Identity


class DenyList:
    """Reads the file again whenever it has changed: its size, its time or its inode."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[tuple[int, int, int] | None, dict[str, str]] = None, {}
        # One value, put in its place at once: threads read the file, too.

    def reason(self, serial: str) -> str | None:
        """Why a certificate is refused; ``None`` where it is not.

        Raises
        ------
        TrustError
            When the list cannot be read.
        """
        try:
            found = os.stat(self.path)
            seen = (found.st_size, found.st_mtime_ns, found.st_ino)
            known, reasons = self._known
            if seen != known:
                reasons = dict(map(_read, self.path.read_text().splitlines()))
                self._known = seen, reasons
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrustError(
                f"{self.path}: the deny-list cannot be read ({error}), so nobody is let in; restore the file"
            ) from None
        return reasons.get(serial)

    def add(self, revoked: Iterable[Identity], reason: str, now: datetime) -> None:
        """Refuse these certificates; on the disk when this returns.

        Raises
        ------
        OSError
            When the disk is full; then none is added.
        """
        lines = "".join(
            json.dumps({"serial": e.serial, "name": e.name, "reason": reason, "time": now.isoformat()}) + "\n"
            for e in revoked
        )
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            files.append(descriptor, lines.encode())
        finally:
            os.close(descriptor)


def _read(line: str) -> tuple[str, str]:
    made = json.loads(line)
    return str(made["serial"]), str(made["reason"])
