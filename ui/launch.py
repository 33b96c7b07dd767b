"""Runs as processes of their own: started one after the other, stopped and resumed, whoever looks.

A run that was started goes on when the dashboard ends; one that still waits begins when the dashboard is
there again and that run has ended.

::

    <runs>/.queue/<when>.toml      a recipe that waits for its turn
    <runs>/.queue/<when>.resume    the name of a run that waits to go on
    <runs>/.queue/<when>.running   number and name of a process, which keeps this file locked while it lives
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
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
        self._queue = folder / ".queue"
        self._running: dict[Path, Launch] = {}  # by the file that is locked meanwhile
        self._failed: deque[Launch] = deque(maxlen=5)
        self._lock = threading.Lock()
        self._next()

    def start(self, recipe: str) -> str:
        """Run a recipe (TOML) as soon as it is its turn; returns its name."""
        self._enqueue(".toml", recipe)
        return _called(".toml", recipe)

    def resume(self, directory: Path) -> None:
        """Go on with a run as soon as it is its turn."""
        if locked(directory):
            raise RunError(f"{directory.name}: this run is still running; stop it first")
        if any(each.name == directory.name for each in self.waiting()):
            raise RunError(f"{directory.name}: this run waits for its turn already")
        self._enqueue(".resume", directory.name)

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
        """What a dashboard has begun and has not ended, and what is queued, in order."""
        with self._lock:
            queued = [(each.suffix, _read(each)) for each in self._queued()]
            return [*self._running.values(), *(Launch(name=_called(*each)) for each in queued if each[1])]

    def failed(self) -> list[Launch]:
        """The last ones that could not begin, with the reason."""
        with self._lock:
            return list(self._failed)

    def _enqueue(self, suffix: str, text: str) -> None:
        try:
            self._queue.mkdir(parents=True, exist_ok=True)
            draft = self._queue / f"{time.time_ns()}.draft"
            draft.write_text(text, encoding="utf-8")
            draft.rename(draft.with_suffix(suffix))
        except OSError as error:
            why = f"it cannot be written ({error.strerror}); see its permissions"
            raise RunError(f"{self._queue}: {why}") from error
        self._next()

    def _queued(self) -> list[Path]:
        """The oldest first."""
        return sorted([*self._queue.glob("*.toml"), *self._queue.glob("*.resume")])

    def _next(self) -> None:
        with self._lock:
            self._see_others()
            if len(self._running) >= self._parallel:
                return
            taken = next(filter(None, map(_take, self._queued())), None)
            if taken is None:
                return
            suffix, text = taken
            told = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
            mark = self._queue / f"{time.time_ns()}.running"
            draft = mark.with_suffix(".draft")
            with (
                tempfile.TemporaryFile("w+", encoding="utf-8") as recipe,  # it ends with the processes
                draft.open("w", encoding="utf-8") as held,
            ):
                fcntl.flock(held, fcntl.LOCK_EX)  # as long as one of the processes has it open
                recipe.write(text)
                recipe.seek(0)  # where the other process begins to read, if it shares the position
                if suffix == ".toml":
                    what = ["run", f"/dev/fd/{recipe.fileno()}", "--runs", str(self._folder)]
                else:
                    what = ["resume", str(self._folder / text)]
                # A session of its own: Ctrl-C at the dashboard is not for its runs.
                process = subprocess.Popen(
                    [sys.executable, "-m", "hansa", *what, "--quiet", "--json"],
                    stdin=subprocess.DEVNULL,
                    stdout=told,
                    stderr=told,
                    start_new_session=True,
                    pass_fds=[recipe.fileno(), held.fileno()],
                )
                launch = Launch(name=_called(suffix, text), process=process.pid)
                held.write(f"{launch.process} {launch.name}")
            draft.rename(mark)
            self._attend(mark, launch, partial(_end, process, told))

    def _see_others(self) -> None:
        """Wait also for what another dashboard began, or this one before it was started again."""
        for mark in self._queue.glob("*.running"):
            if mark in self._running:
                continue
            try:
                held = mark.open(encoding="utf-8")
            except OSError:
                continue  # it has just ended
            try:
                fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                process, _, name = held.read().partition(" ")
                self._attend(mark, Launch(name=name, process=int(process)), partial(_unlocked, held))
            else:  # it ended while no dashboard was there
                held.close()
                mark.unlink(missing_ok=True)

    def _attend(self, mark: Path, launch: Launch, end: Callable[[], str | None]) -> None:
        """Let a run count as long as it runs; ``end`` waits, and tells why it could not begin."""

        def wait() -> None:
            error = end()
            with self._lock:
                del self._running[mark]
                mark.unlink(missing_ok=True)
                if error is not None:
                    self._failed.append(replace(launch, error=error))
            self._next()

        self._running[mark] = launch
        threading.Thread(target=wait, daemon=True).start()


def _end(process: subprocess.Popen[bytes], told: IO[str]) -> str | None:
    with told:
        code = process.wait()
        told.seek(0)
        said = told.read().strip()
    if code in (0, Interrupted.exit_code):
        return None
    for line in said.splitlines():
        with suppress(ValueError):
            match json.loads(line):
                case {"run": _}:
                    return None  # it has begun, and its record tells how it ended
                case {"error": {"message": str(message)}}:
                    return message[:_TOLD]
    return said[:_TOLD] or f"it ended with exit code {code}"


def _unlocked(held: IO[str]) -> None:
    """Wait for the end of a process that another dashboard began; its run's record tells how it was."""
    with held:
        fcntl.flock(held, fcntl.LOCK_SH)


def _called(suffix: str, text: str) -> str:
    """What to call what waits: the name in a recipe, or the run that goes on."""
    try:
        return str(tomllib.loads(text).get("name", "run")) if suffix == ".toml" else text
    except tomllib.TOMLDecodeError:
        return "run"


def _read(file: Path) -> str:
    """Its text; none where another dashboard has just taken it."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _take(file: Path) -> tuple[str, str] | None:
    """Suffix and text of what waits in a file, which is then gone; one dashboard alone gets them."""
    mine = file.with_suffix(f".{os.getpid()}")
    try:
        file.rename(mine)
        text = mine.read_text(encoding="utf-8")
        mine.unlink()
    except OSError:
        return None
    return file.suffix, text
