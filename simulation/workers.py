"""Beyond one machine: the processes that ``torchrun`` started, as one run.

Every worker replicates the hub, the schedule and all draws, for they follow from the recipe and its seed.
Each computes a share of the jobs that are due, and they exchange once what came of it: sums of updates where
the reducer is a mean, updates where it must see them. The first worker evaluates and keeps the record. So do
the workers of pfl-research (arXiv 2404.06430); here the sums are those of fixed blocks, and the model is the
same to the last bit on any number of workers.

What travels is safetensors and JSON.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from hansa.core.errors import DataError, DivergedError, HansaError, InputError, Interrupted, RunError
from hansa.core.trees import Tree

T = TypeVar("T")
Part = tuple[Tree, Any]  # tensors, and facts that JSON can hold
_LENGTH = 8  # bytes that tell how long the facts are
_ERRORS: dict[str, type[HansaError]] = {
    kind.__name__: kind for kind in (InputError, DataError, DivergedError, RunError, Interrupted)
}


class Workers:
    """This process and its peers; by default it is alone.

    Attributes
    ----------
    rank: this worker's number.
    count: how many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count
        self._device = self._carrier = "cpu"

    def use(self, device: str) -> None:
        """Compute on this device: of ``cuda``, each worker takes the GPU of its number on its machine.

        They then talk over NCCL if every worker of a machine has one of its own; otherwise over gloo.
        """
        gpus = torch.cuda.device_count() if device == "cuda" and self.count > 1 else 0
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
        own = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._device, self._carrier = device, "cuda" if gpus and own else "cpu"

    @property
    def first(self) -> bool:
        """Whether this worker keeps the record."""
        return self.rank == 0

    def exchange(self, make: Callable[[], Part]) -> list[Part]:
        """What ``make`` gave on every worker, in their order.

        Raises
        ------
        HansaError
            On every worker, where ``make`` failed on one.
        """
        if self.count == 1:
            return [make()]
        failure: Exception | None = None
        tensors: Tree = {}
        facts: Any = None
        try:
            tensors, facts = make()
        except Exception as error:
            failure = error
        parts = self._gather(tensors, {"facts": facts, "failure": _as_facts(failure)})
        if failure is not None:
            raise failure
        for rank, (_, told) in enumerate(parts):
            if told["failure"] is not None:
                raise _as_error(rank, told["failure"])
        return [(tree, told["facts"]) for tree, told in parts]

    def together(self, function: Callable[[], T]) -> T:
        """``function()``, which must succeed on all workers to succeed on any."""
        made: list[T] = []

        def make() -> Part:
            made.append(function())
            return {}, None

        self.exchange(make)
        return made[0]

    def from_first(self, function: Callable[[], Any]) -> Any:
        """What ``function`` gave on the first worker, where alone it is called: facts that JSON can hold."""
        return self.exchange(lambda: ({}, function() if self.first else None))[0][1]

    def share(self, costs: Sequence[float], unit: int) -> slice:
        """This worker's part of a row of jobs: whole units, so that all parts cost about the same."""
        return shares(costs, self.count, unit)[self.rank]

    def _gather(self, tensors: Tree, facts: Any) -> list[Part]:
        # Names in their order, for sums over a tree depend on it in the last digit; safetensors sorts.
        told = json.dumps([facts, list(tensors)]).encode()
        packed = save({name: each.detach().cpu().contiguous() for name, each in tensors.items()})
        message = len(told).to_bytes(_LENGTH, "little") + told + packed
        mine = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(self._carrier)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._carrier) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(mine)], device=self._carrier))
        lengths = [int(each) for each in sizes]
        sent = torch.zeros(max(lengths), dtype=torch.uint8, device=self._carrier)
        sent[: len(mine)] = mine
        received = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(received, sent)
        return [self._unpacked(each[:n]) for each, n in zip(received, lengths, strict=True)]

    def _unpacked(self, message: Tensor) -> Part:
        raw = message.cpu().numpy().tobytes()
        end = _LENGTH + int.from_bytes(raw[:_LENGTH], "little")
        (facts, names), tensors = json.loads(raw[_LENGTH:end]), load(raw[end:])
        return {name: tensors[name].to(self._device) for name in names}, facts


def join() -> Workers:
    """The workers that ``torchrun`` started; this process alone where it did not."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or not dist.is_torchelastic_launched():
        return Workers()
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    return Workers(dist.get_rank(), count)


def shares(costs: Sequence[float], count: int, unit: int) -> list[slice]:
    """A row of jobs in ``count`` runs of whole units (the last may be short) of about the same cost."""
    edges = [*range(0, len(costs), unit), len(costs)]
    totals = [0.0, *itertools.accumulate(costs)]
    cuts = [0]
    for worker in range(1, count):
        goal = totals[-1] * worker / count
        cuts.append(max(cuts[-1], min(edges, key=lambda edge: abs(totals[edge] - goal))))
    return [slice(start, stop) for start, stop in itertools.pairwise([*cuts, len(costs)])]


def _as_facts(error: Exception | None) -> Any:
    if error is None:
        return None
    if isinstance(error, InputError | DataError):
        value = error.value if isinstance(error.value, str | int | float) else str(error.value)
        return [type(error).__name__, [error.field, value, error.problem, error.remedy]]
    if type(error) in _ERRORS.values():
        return [type(error).__name__, [str(error)]]
    return ["", [f"{type(error).__name__}: {error}"]]


def _as_error(rank: int, facts: Any) -> HansaError:
    kind, arguments = facts
    return _ERRORS[kind](*arguments) if kind else HansaError(f"worker {rank}: {arguments[0]}")
