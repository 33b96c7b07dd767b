"""A coordinator and agents on this machine, as processes: up, where, down.

::

    <folder>/local.json     what runs, and where
    <folder>/coordinator/   the event log, artefacts, log
    <folder>/agent-<i>/     configuration, certificate, outbox, private state, log
    <folder>/pki/, user/    their authority; the certificate of `hansa run --on local`
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import tomli_w

from hansa.core.errors import InputError, RunError
from hansa.core.trust import Role
from hansa.server.trust import Authority
from hansa.server.trust.local import join_here

_PATIENCE = 60.0  # seconds for a process to start or to end
FOLDER = Path(".hansa-local")


def up(folder: Path, agents: int, runs: Path) -> str:
    """Start all of it; returns the coordinator's address.

    Raises
    ------
    InputError
        When it is up already, or the folder cannot be made or holds what an earlier one left.
    RunError
        When a process ends before it serves.
    """
    if _state(folder) is not None:
        raise InputError("local", str(folder), "it is up already", "`hansa local down` first")
    if (folder / "pki").exists():
        problem = "what an earlier one left is in it"
        raise InputError("--folder", str(folder), problem, "`hansa local down` first")
    data = folder / "coordinator"
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"it cannot be made ({error.strerror})"
        raise InputError("--folder", str(folder), problem, "name a folder that you may write") from error
    (data / "address").unlink(missing_ok=True)
    started: list[subprocess.Popen[bytes]] = []
    authority = Authority.create(folder / "pki", "local", [])
    join_here(authority, "user", Role.ADMIN, folder / "user")
    try:
        config = data / "coordinator.toml"
        config.write_text(
            tomli_w.dumps(
                {
                    "listen": "127.0.0.1:0",
                    "data": str(data),
                    "runs": str(runs.absolute()),
                    "pki": str(folder / "pki"),
                    "enrolment": "",
                    "sources": ["/"],  # whoever submits here could read it anyway
                }
            )
        )
        started.append(_spawn(["coordinator", "start", "--config", str(config)], data / "log"))
        address = _address(data, started[0])
        for i in range(agents):
            home = folder / f"agent-{i}"
            home.mkdir(exist_ok=True)
            join_here(authority, f"agent-{i}", Role.AGENT, home / "identity")
            table = {
                "name": f"agent-{i}",
                "coordinator": address,
                "state": str(home),
                "identity": str(home / "identity"),
                "share": f"{i}/{agents}",
                "threads": max(1, (os.cpu_count() or 1) // agents),
            }
            (home / "agent.toml").write_text(tomli_w.dumps(table))
            started.append(_spawn(["agent", "start", "--config", str(home / "agent.toml")], home / "log"))
        authority.close()
        (folder / "local.json").write_text(
            json.dumps({"address": address, "pids": [each.pid for each in started]})
        )
    except BaseException:
        _end([each.pid for each in started])
        raise
    return address


def where(folder: Path, option: str = "--on") -> str:
    """The coordinator's address; ``option`` is what asks for it.

    Raises
    ------
    InputError
        When it is not up.
    """
    state = _state(folder)
    if state is None:
        raise InputError(option, "local", "nothing is up here", "`hansa local up` first")
    return state[0]


def processes(folder: Path) -> list[int]:
    """Numbers of the processes that are up: the coordinator's first."""
    state = _state(folder)
    return state[1] if state else []


def down(folder: Path) -> int:
    """End all processes and remove the folder; run directories stay. Returns how many were ended."""
    pids = processes(folder)
    _end(pids)
    if (folder / "local.json").exists() or (folder / "coordinator").exists():
        shutil.rmtree(folder, ignore_errors=True)
    return len(pids)


def _state(folder: Path) -> tuple[str, list[int]] | None:
    try:
        state = json.loads((folder / "local.json").read_text())
    except (OSError, ValueError):
        return None
    pids = [pid for pid in state["pids"] if _ours(pid)]
    return (state["address"], pids) if pids else None


def _spawn(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "hansa", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def _address(data: Path, process: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        with suppress(OSError):
            return (data / "address").read_text()
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RunError(f"{data}: the coordinator did not start; see {data / 'log'}")


def _ours(pid: int) -> bool:
    """Whether a process is alive and a command of this program, not another that got its number."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # a child that ended is no longer ours
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    line = Path(f"/proc/{pid}/cmdline")
    text = line.read_bytes() if line.exists() else b""
    return not text or b"hansa" in text  # empty while it is being started


def _end(pids: Sequence[int]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            if _ours(pid):
                with suppress(OSError):
                    os.kill(pid, number)
        until = time.monotonic() + _PATIENCE
        while any(_ours(pid) for pid in pids) and time.monotonic() < until:
            time.sleep(0.05)
