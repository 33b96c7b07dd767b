"""From jobs to folded updates: what is computed when, by which worker, and how it comes together.

Jobs of a synchronous step are computed as they are folded. Others are computed when their updates are due,
and jobs in flight, whose start models are known, fill the chunk. Each worker computes a share; then sums are
exchanged where the reducer adds updates up, and the updates themselves where it must see them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from hansa.core.algorithm import Job, Report
from hansa.core.errors import DivergedError, InputError
from hansa.core.hub import Hub
from hansa.core.sums import BLOCK
from hansa.core.trees import Tree, concatenate, put_under, stack, take_under
from hansa.simulation.bank import Bank
from hansa.simulation.cohort import Results, Stacked, Trainer, Work
from hansa.simulation.stopwatch import Stopwatch
from hansa.simulation.tiers import Measured, Mode
from hansa.simulation.workers import Part, Workers
from hansa.strategies.catalog import Federation

Forge = Callable[[Sequence["Open"], Tree], Tree]


@dataclass(slots=True)
class Open:
    """A job that was sent and is not yet folded, discarded or lost. ``ends`` is in microseconds."""

    client: int
    job: Job
    sent: float
    starts: float
    ends: int
    step_seconds: float
    planned: int
    lost: bool
    cut: int | None = None
    arrived: bool = False
    update: Tree | None = None
    private: Tree | None = None
    loss: float | None = None

    @property
    def steps(self) -> int:
        """Local steps done at the end: all, or those before a recall."""
        return self.planned if self.cut is None else self.cut

    def facts(self, stored: Callable[[Tree], dict[str, str]]) -> dict[str, Any]:
        """The job for :meth:`restored`, as JSON holds it; ``stored`` puts tensors away and tells where."""
        # What is computed is kept: the private state that such a job started from may be gone by now.
        trees = {"payload": self.job.payload, "update": self.update, "private": self.private}
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            **{name: None if tree is None else stored(tree) for name, tree in trees.items()},
            "number": self.job.number,
            "phase": self.job.phase,
            "keys": None if self.job.keys is None else sorted(self.job.keys),
        }

    @classmethod
    def restored(cls, facts: Mapping[str, Any], taken: Callable[[Mapping[str, str]], Tree]) -> Open:
        """The job that told these facts; ``taken`` finds what was stored."""
        keys = None if facts["keys"] is None else frozenset(facts["keys"])
        job = Job(facts["number"], facts["phase"], taken(facts["payload"]), keys)
        rest: dict[str, Any] = {name: facts[name] for name in _PLAIN}
        rest |= {part: taken(facts[part]) for part in ("update", "private") if facts[part] is not None}
        return cls(job=job, **rest)


_PLAIN = ("client", "sent", "starts", "ends", "step_seconds", "planned", "lost", "cut", "arrived", "loss")


class Computing:
    """Computes jobs with one trainer, and keeps what clients keep."""

    def __init__(
        self,
        federation: Federation,
        hub: Hub,
        trainer: Trainer,
        bank: Bank,
        workers: Workers,
        clock: Stopwatch,
    ) -> None:
        self._f, self._hub, self._trainer, self._bank = federation, hub, trainer, bank
        self._workers, self._clock = workers, clock
        self._stateful = bool(federation.algorithm.private(federation.task))
        self._chunk = trainer.chunk  # the trainer's own may be halved, on one worker only
        self._halved = False
        self._chosen = False

    def settle(self, due: Sequence[Open], flying: Iterable[Open]) -> None:
        """Compute jobs whose clients are to start again, from the private state that these leave."""
        if self._stateful and due:
            self._keep(due, flying)

    def fold(
        self,
        jobs: Sequence[Open],
        reports: Sequence[Report],
        flying: Iterable[Open],
        forge: Forge | None,
    ) -> dict[str, int]:
        """Hand the hub the updates of ``jobs``; ``flying`` are all open ones. Gives one update's bytes."""
        if self._f.schedule.synchronous and all(job.update is None for job in jobs):
            if forge is None and self._hub.streams(jobs[0].job.phase):
                return self._fold_sums(jobs, reports)
            updates, privates = self._computed(jobs)
            self._put(jobs, privates)
        else:
            missing = [job for job in jobs if job.update is None]
            if missing:
                self._keep(missing, flying)
            with self._clock("fold"):
                updates = stack([job.update for job in jobs if job.update is not None])
        with self._clock("fold"):
            self._hub.fold(
                reports, updates if forge is None else forge(jobs, updates), _present(jobs, updates)
            )
        return _sizes(updates)

    def _fold_sums(self, jobs: Sequence[Open], reports: Sequence[Report]) -> dict[str, int]:
        """Every worker trains a share and folds it; they exchange the sums.

        Jobs of one length stand together, so that chunks and blocks of sums are short of few.
        """
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i].steps)
        jobs, reports = [jobs[i] for i in order], [reports[i] for i in order]
        self._choose(jobs)
        mine = self._workers.share([1.0 + job.steps for job in jobs], BLOCK)
        alone = self._workers.count == 1
        sizes: dict[str, int] = {}
        kept: list[Tree] = []

        def train() -> None:
            self._hub.leave(mine.start)
            at = mine.start
            for part, results in self._train(jobs[mine], summed=True):
                with self._clock("fold"):
                    folded = self._fold_part(part, reports[at : at + len(part)], results)
                at += len(part)
                sizes.update(_sizes(folded))
                if alone:
                    self._put(part, results.privates)
                elif self._stateful:
                    kept.append(results.privates)

        if alone:
            train()
            return sizes

        def make() -> Part:
            train()
            sums, facts = self._hub.packed()
            tensors = {**put_under("sums", sums), **put_under("private", _joined(kept))}
            return tensors, [facts, [job.loss for job in jobs[mine]], sizes]

        with self._clock("exchange"):
            parts = self._workers.exchange(make)
        self._hub.join((take_under("sums", tensors), facts) for tensors, (facts, _, _) in parts)
        at = 0
        for tensors, (_, losses, told) in parts:
            share = jobs[at : at + len(losses)]
            at += len(losses)
            sizes |= told
            for job, loss in zip(share, losses, strict=True):
                job.loss = loss
            self._put(share, take_under("private", tensors))
        return sizes

    def _fold_part(self, jobs: Sequence[Open], reports: Sequence[Report], results: Results) -> Tree:
        """Fold a chunk: by its sums, where the trainer has no need to tell updates apart."""
        if isinstance(results.change, Stacked) or any(job.job.keys is not None for job in jobs):
            updates = results.updates
            self._require_finite(jobs, results.losses, updates)
            self._hub.fold(reports, updates, _present(jobs, updates))
            return updates
        change = results.change
        made: Tree = {}

        def sums(weights: Tensor) -> Tree:
            made.update(change.sums(weights))
            if not all(bool(each.sum().isfinite()) for each in made.values()):
                self._require_finite(jobs, results.losses, results.updates)
            return made

        self._require_finite(jobs, results.losses, {})
        self._hub.fold_sums(reports, sums)
        return made

    def _choose(self, jobs: Sequence[Open]) -> None:
        """All workers use the tier that the first one knows, or finds, to be the fastest."""
        chosen = self._trainer
        if self._chosen or not isinstance(chosen, Measured):
            return
        self._chosen = True
        works = self._works(jobs)

        def fastest() -> Mode:
            if chosen.tier is not None:
                return chosen.tier
            with self._clock("measure"):
                return chosen.measure(works)

        tier = self._workers.from_first(fastest)
        if tier != chosen.tier:  # another machine may remember another one
            chosen.settle(tier, "the fastest on the first cohort")
        self._chunk = chosen.chunk

    def _works(self, jobs: Sequence[Open]) -> list[Work]:
        privates = [self._bank[job.client] for job in jobs] if self._stateful else [{}] * len(jobs)
        return [
            Work(job.client, job.job, private, job.cut) for job, private in zip(jobs, privates, strict=True)
        ]

    def _keep(self, due: Sequence[Open], flying: Iterable[Open]) -> None:
        """Compute jobs and, to fill the last chunk, jobs in flight that will return soonest."""
        self._choose(due)
        jobs = [*due, *self._ahead(due, flying)]
        updates, privates = self._computed(jobs)
        for job, update in zip(jobs, _views(updates, len(jobs)), strict=True):
            job.update = update
        if self._stateful:
            for job, private in zip(jobs, _views(privates, len(jobs)), strict=True):
                job.private = private
                if job.arrived:
                    self._bank.put(job.client, private)

    def _ahead(self, due: Sequence[Open], flying: Iterable[Open]) -> list[Open]:
        wanted = -len(due) % (self._chunk * self._workers.count)
        if self._f.schedule.recalls or not wanted:
            return []
        chosen, phase = {id(job) for job in due}, due[0].job.phase
        able = [
            job
            for job in flying
            if job.update is None and not job.lost and id(job) not in chosen and job.job.phase == phase
        ]
        return heapq.nsmallest(wanted, able, key=attrgetter("ends", "client"))

    def _computed(self, jobs: Sequence[Open]) -> tuple[Tree, Tree]:
        """(updates, privates) of jobs, stacked, from all workers."""
        self._choose(jobs)
        mine = self._workers.share([1.0 + job.steps for job in jobs], 1)

        def make() -> Part:
            updates, privates = _Stack(mine.stop - mine.start), _Stack(mine.stop - mine.start)
            for part, results in self._train(jobs[mine]):
                updates.put(len(part), results.updates)
                privates.put(len(part), results.privates)
            losses = [job.loss for job in jobs[mine]]
            return {**put_under("update", updates.tree), **put_under("private", privates.tree)}, losses

        with self._clock("exchange"):
            parts = self._workers.exchange(make)
        for job, loss in zip(jobs, (loss for _, losses in parts for loss in losses), strict=True):
            job.loss = loss
        trees = [tensors for tensors, losses in parts if losses]
        updates, privates = ([take_under(part, tree) for tree in trees] for part in ("update", "private"))
        return _joined(updates), _joined(privates)

    def _put(self, jobs: Sequence[Open], privates: Tree) -> None:
        if self._stateful:
            for job, private in zip(jobs, _views(privates, len(jobs)), strict=True):
                self._bank.put(job.client, private)

    def _train(
        self, jobs: Sequence[Open], *, summed: bool = False
    ) -> Iterator[tuple[Sequence[Open], Results]]:
        """Train, note losses, refuse what is not finite; who folds ``summed`` updates looks for himself."""
        works = self._works(jobs)
        produced = self._trainer.train(works)
        at = 0
        while at < len(jobs):
            try:
                with self._clock("train"):
                    results = next(produced)
            except (MemoryError, torch.OutOfMemoryError) as error:
                self._halve(error)
                produced = self._trainer.train(works[at:])
                continue
            part = jobs[at : at + len(results.works)]
            at += len(part)
            if not summed:
                self._require_finite(part, results.losses, results.updates)
            for job, loss in zip(part, results.losses, strict=True):
                job.loss = loss if job.steps else None
            yield part, results

    def _halve(self, error: Exception) -> None:
        """Go on with half as many clients at a time, once."""
        if self._halved or self._trainer.chunk == 1:
            raise InputError(
                "engine.chunk",
                self._trainer.chunk,
                f"so many clients at a time do not fit the memory of {self._f.task.device}",
                "use a smaller chunk or model: `hansa resume RUN -c engine.chunk=N` goes on"
                if self._trainer.chunk > 1
                else "use a smaller model or batch",
            ) from error
        self._halved = True
        self._trainer.chunk = max(1, self._trainer.chunk // 2)
        if self._f.task.device.type == "cuda":
            torch.cuda.empty_cache()

    def _require_finite(self, jobs: Sequence[Open], losses: Sequence[float], updates: Tree) -> None:
        sound = torch.ones(len(jobs), dtype=torch.bool, device=self._f.task.device)
        for each in updates.values():  # a sum with an infinite or undefined term is so, too
            sound &= each.reshape(len(each), -1).sum(1).isfinite()
        if bool(sound.all()) and all(map(math.isfinite, losses)):
            return
        for job, loss, whole in zip(jobs, losses, sound.tolist(), strict=True):
            if not (math.isfinite(loss) and whole):
                raise DivergedError(
                    f"round {self._hub.state.version + 1}, client {job.client}: "
                    f"the training loss is {loss:g}, "
                    f"the update is {'' if whole else 'not '}finite; lower train.lr = "
                    f"{self._f.recipe.train.lr:g} or set train.clip_norm"
                )


class _Stack:
    """Room for n rows, filled chunk by chunk; a single chunk is taken as it is."""

    def __init__(self, rows: int) -> None:
        self._rows, self._at = rows, 0
        self.tree: Tree = {}

    def put(self, rows: int, chunk: Tree) -> None:
        if rows == self._rows:
            self.tree = chunk
            return
        if not self._at:
            self.tree = {name: each.new_empty((self._rows, *each.shape[1:])) for name, each in chunk.items()}
        for name, each in chunk.items():
            self.tree[name][self._at : self._at + rows] = each
        self._at += rows


def _joined(stacks: Sequence[Tree]) -> Tree:
    return concatenate(stacks) if stacks else {}


def _views(stacked: Tree, rows: int) -> list[Tree]:
    """Rows of a stacked tree, which they keep alive."""
    if not stacked:
        return [{} for _ in range(rows)]
    names = list(stacked)
    return [
        dict(zip(names, row, strict=True))
        for row in zip(*(each.unbind() for each in stacked.values()), strict=True)
    ]


def _sizes(updates: Tree) -> dict[str, int]:
    """Bytes of each tensor of one update."""
    return {name: each[0].nbytes for name, each in updates.items()}


def _present(jobs: Sequence[Open], updates: Tree) -> dict[str, Tensor]:
    """For names that not all jobs were asked for, who was: [k]."""
    if all(job.job.keys is None for job in jobs):
        return {}
    made = {}
    for name, tensor in updates.items():
        carried = [job.job.keys is None or name in job.job.keys for job in jobs]
        if not all(carried):
            made[name] = torch.tensor(carried, dtype=torch.float64, device=tensor.device)
    return made
