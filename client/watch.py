"""What a job may take on a machine, and how it is watched: its time and its memory.

Both are looked at between two steps, so that a job ends with a step and leaves nothing half done; what one
step takes by itself only the system can bound (a control group, systemd's ``MemoryMax=``).
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from hansa.client.policy import Policy, Refused
from hansa.core.errors import RunError
from hansa.core.task import Task
from hansa.core.trees import nbytes, pick

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Watch:
    """Of one job, from when it is made.

    Memory is what the process has grown by, at its peak since then where the system keeps that (Linux), else
    at the moment; on a CUDA device, what PyTorch took of it. What stays loaded between jobs is not counted.
    """

    def __init__(self, policy: Policy, device: torch.device) -> None:
        self._policy, self._device = policy, device
        self._began = time.monotonic()
        self._why: str | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                _CLEAR.write_text("5")  # proc(5): sets the peak to what is there
        self._before = self._memory()

    def over(self) -> bool:
        """Whether the job is over a limit."""
        p = self._policy
        seconds = time.monotonic() - self._began
        if p.job_seconds is not None and seconds > p.job_seconds:
            self._why = f"job_seconds = {p.job_seconds:g} of this agent's owner were over"
        elif p.job_memory is not None and self._memory() - self._before > p.job_memory << 20:
            grown = (self._memory() - self._before) >> 20
            self._why = f"it took {grown} MB, and job_memory = {p.job_memory} of this agent's owner"
        return self._why is not None

    def require(self) -> None:
        """Fail a job that is over a limit.

        Raises
        ------
        RunError
        """
        if self.over():
            raise RunError(f"the job was ended: {self._why}")

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with suppress(OSError):
            if found := re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE):
                return int(found[1]) << 10
        return int(psutil.Process().memory_info().rss)


def require_room(policy: Policy, task: Task) -> None:
    """Refuse a model whose training cannot fit: weights before and after, gradient, momentum.

    Raises
    ------
    Refused
    """
    copies = 3 + bool(task.local.momentum)
    least = copies * nbytes(pick(task.initial, task.trainable))
    if policy.job_memory is not None and least > policy.job_memory << 20:
        raise Refused(
            f"training takes {least / (1 << 20):.0f} MB or more, and job_memory = {policy.job_memory} "
            "of this agent's owner"
        )
