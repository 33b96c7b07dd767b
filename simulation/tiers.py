"""Which trainer computes a cohort, and why."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from platformdirs import user_cache_path

import hansa
from hansa.core.errors import InputError
from hansa.core.task import Task
from hansa.simulation.cohort import BatchedTrainer, Results, SequentialTrainer, Trainer, Work, pair
from hansa.simulation.fused import FusedTrainer, applies, usual
from hansa.strategies.catalog import Federation

Mode = Literal["auto", "fused", "batched", "sequential"]

_CACHE_NUMBERS = 16_000_000  # weights of a chunk: beyond this, more clients gain nothing
_WORTH_THREADS = 2e8  # floating-point operations of a step, for more than one thread
_COPIES = 4  # stacked trees that a batched step holds beside the weights
_MEASURED_STEPS = 2
_MEASURED_CLIENTS = (4, 32)  # fewest and most
_MEASURED_SECONDS = 0.5  # of the slowest tier, about
_CLEARLY = 0.9  # of the time of the tier that is expected to be fastest


class Measured:
    """The fastest of several trainers, found by a short measurement on the first cohort.

    Attributes
    ----------
    tier: the one that was chosen; ``None`` before.
    why: how it was chosen.
    """

    def __init__(self, federation: Federation, candidates: Mapping[Mode, Trainer]) -> None:
        self._federation, self._candidates = federation, dict(candidates)
        self._key = key = _key(federation)
        self.tier: Mode | None = None
        self.why = "to be measured"
        found = _remembered().get(key)
        if found in self._candidates:
            self.settle(found, "as measured on this machine before")

    @property
    def _trainer(self) -> Trainer:
        return self._candidates[next(iter(self._candidates)) if self.tier is None else self.tier]

    @property
    def chunk(self) -> int:
        """Clients computed together."""
        return self._trainer.chunk

    @chunk.setter
    def chunk(self, clients: int) -> None:
        self._trainer.chunk = clients

    @property
    def seconds(self) -> dict[str, float]:
        """Wall seconds by kind of work."""
        return self._trainer.seconds

    @property
    def label(self) -> str:
        """What computes the cohort."""
        return "auto" if self.tier is None else self._trainer.label

    @property
    def sound(self) -> bool | None:
        """The verdict of the self-check of the fused tier."""
        return next(
            (each.sound for each in self._candidates.values() if isinstance(each, FusedTrainer)), None
        )

    @sound.setter
    def sound(self, verdict: bool | None) -> None:
        for each in self._candidates.values():
            if isinstance(each, FusedTrainer):
                each.sound = verdict

    def train(self, works: Sequence[Work]) -> Iterator[Results]:
        """Results of the chosen trainer, or of the one expected to be fastest where none was chosen yet."""
        return self._trainer.train(works)

    def settle(self, tier: Mode, why: str) -> None:
        """Compute everything from now on with one trainer."""
        self.tier, self.why = tier, why

    def measure(self, works: Sequence[Work]) -> Mode:
        """The fastest tier on some of ``works``, remembered for this machine."""
        by_client = {work.client: work for work in (*(pair(self._federation, works) or ()), *works)}
        some = [replace(work, steps=_MEASURED_STEPS) for work in by_client.values()]
        seconds: dict[Mode, float] = {}
        count = _MEASURED_CLIENTS[0]
        for tier, each in reversed(self._candidates.items()):  # the last computes clients one by one
            _timed(each, some[:count])
            seconds[tier] = _timed(each, some[:count])
            if len(seconds) == 1:
                most = int(_MEASURED_SECONDS / max(seconds[tier] / len(some[:count]), 1e-6))
                count = max(_MEASURED_CLIENTS[0], min(_MEASURED_CLIENTS[1], most))
                seconds[tier] *= min(count, len(some)) / len(some[: _MEASURED_CLIENTS[0]])
        expected = next(iter(self._candidates))
        best = min(seconds, key=lambda tier: seconds[tier])
        chosen = best if seconds[best] < _CLEARLY * seconds[expected] else expected
        _remember(self._key, chosen)
        return chosen


def _timed(trainer: Trainer, works: Sequence[Work]) -> float:
    began = time.perf_counter()
    for _ in trainer.train(works):
        pass
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def trainer(federation: Federation, *, seed: int, mode: Mode, chunk: int | None) -> tuple[Trainer, str]:
    """The trainer for a mode, and why it was chosen.

    ``auto`` is sure where there is one way only (a model that draws random numbers of its own is computed one
    by one), and else measures the tiers that apply on the first cohort. What was found is remembered for the
    machine, so that a run repeats bit for bit.

    Raises
    ------
    InputError
        When a tier is demanded that cannot compute the federation.
    """
    task = federation.task
    parameters = sum(task.initial[name].numel() for name in task.trainable)
    together = max(1, min(128, _CACHE_NUMBERS // max(parameters, 1)))
    random = task.stochastic(federation.data.train.x[:2].clone())
    fusible = applies(task, federation.algorithm) and not random
    if mode == "fused" and not fusible:
        raise InputError(
            "engine.mode",
            mode,
            "this tier knows plain local SGD on models without BatchNorm and dropout, and nothing else",
            'use engine.mode = "auto"',
        )
    if mode == "batched" and random:
        raise InputError(
            "engine.mode",
            mode,
            "dropout draws its own random numbers, which would depend on how clients are grouped",
            'use engine.mode = "sequential" or "auto", or a model without dropout',
        )
    sequential = SequentialTrainer(federation, seed=seed)
    if mode == "sequential":
        return sequential, "as the recipe says"
    if random:
        return sequential, "the model draws random numbers of its own"
    batched = BatchedTrainer(federation, seed=seed, chunk=chunk or max(1, together // _COPIES))
    if mode == "batched":
        return batched, "as the recipe says"
    if not fusible:
        return Measured(federation, {"batched": batched, "sequential": sequential}), ""
    fused = FusedTrainer(federation, seed=seed, chunk=chunk or _together(federation), otherwise=batched)
    if mode == "fused":
        return fused, "as the recipe says"
    return Measured(federation, {"fused": fused, "sequential": sequential}), ""


def _together(federation: Federation) -> int:
    """Clients of a fused chunk: layers whose changes are kept as factors take no room of their own."""
    task, job = federation.task, usual(federation)
    shapes = [task.initial[name].shape for name in task.trainable]
    own = sum(shape.numel() for shape in shapes if not job.as_factors(shape))
    return max(1, min(128, _CACHE_NUMBERS // max(own, 1)))


def _key(federation: Federation) -> str:
    """What the speed of the tiers depends on, of the federation and of the machine."""
    f, task = federation, federation.task
    facts = [
        repr(task.module),
        [[name, list(each.shape), str(each.dtype), task.roles[name]] for name, each in task.initial.items()],
        [type(f.algorithm).__name__, repr(task.local), repr(f.work)],
        [str(task.device), platform.node(), platform.processor(), os.cpu_count()],
        [hansa.__version__, torch.__version__],
        [f.recipe.engine.threads, f.recipe.engine.chunk, f.recipe.engine.convolutions],
        [int(f.data.train_shards.sizes.double().mean())],
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _memory() -> Path:
    return user_cache_path("hansa") / "tiers.json"


def _remembered() -> dict[str, Mode]:
    try:
        found: dict[str, Mode] = json.loads(_memory().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(key: str, tier: Mode) -> None:
    """A cache that cannot be written is no reason to stop."""
    try:
        _memory().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=_memory().parent, delete=False) as file:
            json.dump({**_remembered(), key: tier}, file)
        Path(file.name).replace(_memory())
    except OSError:
        pass


@contextmanager
def threads(federation: Federation, clients: int) -> Iterator[None]:
    """Run with as many CPU threads as pay for ``clients`` at a time, or as the recipe says.

    A second thread on products of a few megaflops only waits, and on a busy machine it waits long.
    """
    task, work = federation.task, federation.work
    parameters = sum(task.initial[name].numel() for name in task.trainable)
    small = clients * work.batch_size * parameters * 6 < _WORTH_THREADS and not _convolutional(task)
    before = torch.get_num_threads()
    wanted = federation.recipe.engine.threads or (1 if small else before)
    torch.set_num_threads(min(wanted, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def uncollected() -> Iterator[None]:
    """What is there now stays meanwhile: the collector of cycles need not look through it again and again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _convolutional(task: Task) -> bool:
    return any(isinstance(each, torch.nn.modules.conv._ConvNd) for each in task.module.modules())


def keep_pages() -> bool:
    """Tell glibc's allocator to keep freed memory, for the rest of this process.

    Every step of a batched cohort allocates and frees tensors of many megabytes; by default each goes back to
    the operating system and comes again as page faults. Returns whether it was done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(ctypes.util.find_library("c") or "libc.so.6")
    no_mmap, never_trim = (-4, 0), (-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    return all(library.mallopt(option, value) == 1 for option, value in (no_mmap, never_trim))
