"""The job that every side does, and the turns in which it does it.

A job is a folder: ``job.json`` (this module's :class:`Job`), ``start.safetensors`` (the initial weights),
``shards.npy`` [clients, examples] (who holds which examples) and ``cohorts.npy`` [rounds, cohort] (who trains
when); the data are elsewhere, for jobs share them. A side is started with that folder, makes ready, and then
makes one round each time it is told to. So the rounds of all sides interleave, and what slows the machine for
a minute slows everybody.

Every side's environment reads this file: it needs NumPy and safetensors, and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Arrays = dict[str, np.ndarray]
CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Job:
    """FedAvg with one local epoch of mini-batch SGD.

    Attributes
    ----------
    folder: of this job; ``data``: of the examples, ``x.npy`` and ``y.npy``.
    model: ``logistic``, ``mlp``, ``leaf_cnn`` or ``resnet18``, as in ``models.py``.
    rounds: how many, the one that warms up included.
    device: where plain, pfl and hansa compute (``cpu`` or ``cuda``); the others know the CPU only.
    """

    folder: str
    data: str
    model: str
    clients: int
    cohort: int
    rounds: int
    lr: float
    batch: int = 20
    threads: int = 1
    device: str = "cpu"

    @classmethod
    def read(cls, folder: str | None = None) -> Job:
        """The job in a folder; by default the one that the command line names."""
        return cls(**json.loads((Path(folder or sys.argv[1]) / "job.json").read_text()))

    def write(self, *, start: Arrays, shards: np.ndarray, cohorts: np.ndarray) -> None:
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(asdict(self)))
        save_file(start, folder / "start.safetensors")
        np.save(folder / "shards.npy", shards, allow_pickle=False)
        np.save(folder / "cohorts.npy", cohorts, allow_pickle=False)

    @property
    def x(self) -> np.ndarray:
        """[examples, channels, height, width] float32."""
        return np.load(Path(self.data) / "x.npy", allow_pickle=False)

    @property
    def y(self) -> np.ndarray:
        """[examples] int64."""
        return np.load(Path(self.data) / "y.npy", allow_pickle=False)

    @property
    def shards(self) -> np.ndarray:
        """[clients, examples of each] int64: positions in x and y."""
        return np.load(Path(self.folder) / "shards.npy", allow_pickle=False)

    @property
    def cohorts(self) -> np.ndarray:
        """[rounds, cohort] int64."""
        return np.load(Path(self.folder) / "cohorts.npy", allow_pickle=False)

    @property
    def start(self) -> Arrays:
        """The initial weights, under the names that ``models.py`` gives them."""
        return load_file(Path(self.folder) / "start.safetensors")


class Turns:
    """A side's half of the conversation: a line on standard input begins a round, a JSON line ends it.

    Whatever a library prints goes to standard error. The clock stops before the model is written down, which
    lets the other half see that the side did what the others did.

    Parameters
    ----------
    side: its name.
    packages: whose versions to tell.
    facts: anything else worth telling, such as the threads of its library.
    """

    def __init__(self, job: Job, side: str, packages: tuple[str, ...], **facts: Any) -> None:
        self._job, self._side = job, side
        self._facts = {**facts, "versions": {each: version(each) for each in packages}}
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._round = 0
        self._began = self._own = self._others = 0.0

    def begin(self) -> None:
        """Wait for the turn, and start the clock."""
        if not self._round:
            self._tell({"ready": self._facts})
        if not sys.stdin.readline():
            os._exit(1)  # nobody listens any more; a library's threads must not keep us
        self._round += 1
        self._others = _others_seconds()
        self._own, self._began = time.process_time(), time.perf_counter()

    def end(self, model: Mapping[str, np.ndarray], **learned: Any) -> None:
        """Stop the clock, write the global model down, tell; ``learned`` are facts not known before."""
        seconds, own = time.perf_counter() - self._began, time.process_time() - self._own
        cpu = own + _others_seconds() - self._others
        path = Path(self._job.folder) / f"{self._side}-{self._round}.safetensors"
        save_file({name: np.ascontiguousarray(each) for name, each in dict(model).items()}, path)
        processes = [os.getpid(), *descendants(os.getpid())]
        status = [_status(pid) for pid in processes]
        self._tell(
            {
                "round": self._round,
                "seconds": seconds,
                "cpu": cpu,
                "model": str(path),
                "peak_mb": sum(each.get("VmHWM", 0) for each in status) / 1024,
                "threads": sum(each.get("Threads", 0) for each in status),
                "processes": len(processes),
                "learned": learned,
            }
        )

    def _tell(self, line: dict[str, Any]) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()


def _others_seconds() -> float:
    """CPU seconds so far of this process's children and their children, to a hundredth."""
    ended = os.times()
    tick = os.sysconf("SC_CLK_TCK")
    total = ended.children_user + ended.children_system
    for pid in descendants(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended, and its parent counts it
        total += sum(map(int, fields[11:15])) / tick  # utime, stime, and those of its ended children
    return total


def descendants(root: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for each in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(each))
    found, waiting = [], [root]
    while waiting:
        mine = children.get(waiting.pop(), [])
        found += mine
        waiting += mine
    return found


def _status(pid: int) -> dict[str, int]:
    """Numbers of /proc/PID/status: kilobytes and counts."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split()[:2] for line in lines if line.startswith(("VmHWM", "Threads")))
    return {name.rstrip(":"): int(value) for name, value in pairs}
