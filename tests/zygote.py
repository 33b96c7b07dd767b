"""Starts ``hansa`` commands as processes in milliseconds: one process imports, and forks for each of them.

As a program it reads one JSON object a line, ``{"argv": [...], "env": {...}, "log": path}``, and answers with
the number of the process that it made.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self


def die_with_parent() -> None:
    """Be killed when the process that made this one ends, however it does (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PR_SET_PDEATHSIG = 1  # prctl(2)


class Zygote:
    """Its other side; use it as a context manager. What it started is killed with it."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._pids: list[int] = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in self._pids:
            self.kill(pid)
        self._process.communicate()

    def start(self, argv: Sequence[str], log: Path, **env: str) -> int:
        """Start ``hansa`` with arguments; returns the process's number."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"argv": argv, "env": env, "log": str(log)}), file=self._process.stdin, flush=True)
        pid = int(self._process.stdout.readline())
        self._pids.append(pid)
        return pid

    @staticmethod
    def alive(pid: int) -> bool:
        """Whether it still runs."""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    @staticmethod
    def kill(pid: int, number: int = signal.SIGKILL) -> None:
        """Kill -9 by default."""
        if Zygote.alive(pid):
            os.kill(pid, number)


def main() -> None:
    import hansa.client.agent
    import hansa.server.app  # noqa: F401 - imported once, for all
    from hansa.cli import main as hansa_main

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are not kept
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        die_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.update(order["env"])
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os._exit(hansa_main(order["argv"]))


if __name__ == "__main__":
    main()
