"""Runs as processes of their own: started one after the other, stopped and resumed, whoever looks.

A run that was started goes on when the dashboard ends; one that still waits in the queue does not begin.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from hansa.core.errors import Interrupted, RunError
from hansa.core.store import locked, writer

__all__ = ["Launch", "Launcher"]

_TOLD = 2000  # characters of an error


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A run that was asked for here and has no directory of its own, yet or at all.

    Attributes
    ----------
    name: what to call it. process: its number, once there is one. error: why it could not begin.
    """

    name: str
    process: int | None = None
    error: str | None = None


class Launcher:
    """Starts runs into a folder, ``parallel`` at a time; the others queue."""

    def __init__(self, folder: Path, *, parallel: int = 1) -> None:
        self._folder, self._parallel = folder, parallel
        self._queue: deque[tuple[str, list[str]]] = deque()
        self._running: list[Launch] = []
        self._failed: deque[Launch] = deque(maxlen=5)
        self._lock = threading.Lock()

    def start(self, recipe: str) -> str:
        """Run a recipe (TOML) as soon as it is its turn; returns its name."""
        name = str(tomllib.loads(recipe).get("name", "run"))
        file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - it is there for another process, as long as that
            "w", prefix="recipe-", suffix=".toml", delete=False, encoding="utf-8"
        )
        with file:
            file.write(recipe)
        self._enqueue(name, ["run", file.name, "--runs", str(self._folder)])
        return name

    def resume(self, directory: Path) -> None:
        """Go on with a run as soon as it is its turn."""
        if locked(directory):
            raise RunError(f"{directory.name}: this run is still running; stop it first")
        self._enqueue(directory.name, ["resume", str(directory)])

    def stop(self, directory: Path) -> None:
        """Ask the process that writes a run to stop after the step under way, as Ctrl-C does."""
        process = writer(directory)
        if process is None:
            raise RunError(
                f"{directory.name}: no process of this machine runs it; stop it where it was started"
            )
        try:
            os.kill(process, signal.SIGTERM)
        except OSError as error:
            raise RunError(
                f"{directory.name}: its process cannot be told to stop ({error.strerror}); "
                "stop it as the user who started it"
            ) from error

    def waiting(self) -> list[Launch]:
        """What was begun here and has not ended, and what is queued, in order."""
        with self._lock:
            return [*self._running, *(Launch(name=name) for name, _ in self._queue)]

    def failed(self) -> list[Launch]:
        """The last ones that could not begin, with the reason."""
        with self._lock:
            return list(self._failed)

    def cancel(self) -> None:
        """Empty the queue."""
        with self._lock:
            self._queue.clear()

    def _enqueue(self, name: str, arguments: list[str]) -> None:
        with self._lock:
            self._queue.append((name, arguments))
        self._next()

    def _next(self) -> None:
        with self._lock:
            if not self._queue or len(self._running) >= self._parallel:
                return
            name, arguments = self._queue.popleft()
            told = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
            # A session of its own: Ctrl-C at the dashboard is not for its runs.
            process = subprocess.Popen(
                [sys.executable, "-m", "hansa", *arguments, "--quiet"],
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=told,
                start_new_session=True,
            )
            launch = Launch(name=name, process=process.pid)
            self._running.append(launch)
        threading.Thread(target=self._attend, args=(launch, process, told), name=name, daemon=True).start()

    def _attend(self, launch: Launch, process: subprocess.Popen[bytes], told: IO[str]) -> None:
        with told:
            code = process.wait()
            told.seek(0)
            said = told.read().strip()
        with self._lock:
            self._running.remove(launch)
            if code not in (0, Interrupted.exit_code):
                error = said.removeprefix("hansa: ")[:_TOLD] or f"it ended with exit code {code}"
                self._failed.append(replace(launch, error=error))
        self._next()
