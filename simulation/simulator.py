"""The simulator: a hub driven by virtual clients on a virtual clock.

Time passes between events only. What a job will give is fixed when it is sent, since its start model is known
then; so jobs are computed when their updates are due, and in asynchronous runs the jobs still in flight are
computed along with them to fill the chunk.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from hansa.core.algorithm import Job, Report
from hansa.core.errors import DivergedError, HansaError, InputError, Interrupted, RunError
from hansa.core.hub import Fold, Hub, Order, PeerHub, Send, divergence
from hansa.core.schedule import Aggregated, Joined, Recall, Stop, Tick, Wake
from hansa.core.store import Outcome, Participation, Round, Verdicts
from hansa.core.trees import Tree, flatten, movement, put_under, take_under, unflatten
from hansa.simulation import checkpoint
from hansa.simulation.attacks import Attack
from hansa.simulation.bank import Bank
from hansa.simulation.computing import Computing, Open
from hansa.simulation.fused import FusedTrainer
from hansa.simulation.memory import available, require_room
from hansa.simulation.population import Population
from hansa.simulation.stopwatch import Stopwatch
from hansa.simulation.tiers import Measured, keep_pages, threads, trainer, uncollected
from hansa.simulation.workers import Workers
from hansa.strategies.catalog import Federation
from hansa.strategies.evaluate import Evaluator
from hansa.strategies.periodic import Periodic

_PATIENCE = 20  # jobs per client that may be lost in a row before a run is given up

# Kinds of alarms, in the order in which they ring at the same microsecond: arrivals belong to the tick.
_RETURN, _LOSE, _LEAVE, _COME, _RECOVER, _TICK = range(6)


# An event to come: when (microseconds), of what kind, a tie-breaker, and about whom or what.
_Alarm = tuple[int, int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run ended.

    Attributes
    ----------
    reason: why it stopped.
    rounds: hub steps made.
    time: virtual seconds.
    metrics: of the last evaluated round.
    params: the final global model (of a gossip network: the average).
    """

    reason: str
    rounds: int
    time: float
    metrics: Mapping[str, float]
    params: Tree


class Simulator:
    """Runs one federation.

    Parameters
    ----------
    federation: what to run.
    population: the devices; by default all alike and always there.
    attack: what malicious clients send, if any.
    on_round: told of every round as it is made.
    checkpoints: folder for checkpoints; none are written without it.
    workers: the processes that run it together; by default this one alone.

    Attributes
    ----------
    hub: the server, or the network of peers.
    """

    def __init__(
        self,
        federation: Federation,
        population: Population | None = None,
        attack: Attack | None = None,
        *,
        on_round: Callable[[Round], None] | None = None,
        checkpoints: Path | None = None,
        workers: Workers | None = None,
    ) -> None:
        recipe = federation.recipe
        self._f, self._seed = federation, recipe.seed
        self._population = (population or Population()).dealt(federation.data, self._seed)
        _require_ticks_to_see_work(federation, self._population)
        self._attack = attack
        self._malicious = attack.malicious(federation.clients, self._seed) if attack else frozenset()
        self._on_round = on_round
        self._checkpoints = checkpoints
        self._trainer, self._why = trainer(
            federation, seed=self._seed, mode=recipe.engine.mode, chunk=recipe.engine.chunk
        )
        self._evaluator = Evaluator(federation, seed=self._seed, clients=recipe.evaluation.clients)
        self._workers = workers or Workers()
        self.hub = _hub(federation)
        require_room(federation, self.hub, available(federation.task.device))
        self._clock = Stopwatch()
        first = federation.algorithm.private(federation.task)
        self._bank = Bank(first, memory=recipe.engine.bank_memory * 1e9, folder=checkpoints)
        self._computing = Computing(
            federation, self.hub, self._trainer, self._bank, self._workers, self._clock
        )

        self._now = 0  # microseconds
        self._alarms: list[_Alarm] = []
        self._alarm_order = itertools.count()
        self._examples: list[int] = federation.data.train_shards.sizes.tolist()
        self._whole = 2 if federation.task.mixes_examples() else 1
        self._sizes = _Sizes()
        self._open: dict[int, dict[int, Open]] = {}  # client -> job number -> job
        self._resting: set[int] = set()  # dropped out, back after a while
        self._absent: set[int] = set()  # away by availability
        self._reason: str | None = None
        self._lost_in_a_row = 0
        self._opened = self._asked_to_stop = self._stopping = False
        self._started, self._wall_before = time.monotonic(), 0.0
        self._saved = 0  # version of the last checkpoint
        self._metrics: dict[str, float] = {}  # of the last evaluated round
        self._bytes_up = self._bytes_down = 0  # of the round under way
        self._participants: list[Participation] = []
        self._model: Tree = {}  # before the step under way

    @property
    def engine(self) -> str:
        """How cohorts are computed, and why."""
        why = self._trainer.why if isinstance(self._trainer, Measured) else self._why
        return f"{self._trainer.label}: {why}"

    # Driving.

    def run(self) -> Ending:
        """Run to the end, from the start or from where :meth:`resume` left it.

        Raises
        ------
        Interrupted
            After :meth:`stop`; a checkpoint was written.
        DivergedError
            When a client's loss or update is not finite.
        InputError
            When no client is at work and none will ever come.
        """
        self._started = time.monotonic()
        self._model = self.hub.model()
        keep_pages()
        chunk = min(self._trainer.chunk, self._f.schedule.updates_per_step or self._f.clients)
        with threads(self._f, chunk), uncollected():
            reason = self._drive()
        self._save()
        return Ending(
            reason=reason,
            rounds=self.hub.state.version,
            time=self._now / 1e6,
            metrics=self._metrics,
            params=self.hub.model(),
        )

    def _drive(self) -> str:
        if not self._opened:
            self._open_doors()
        alarms, alone, patience = (
            self._alarms,
            self._workers.count == 1,
            self._f.recipe.engine.checkpoint_every,
        )
        while self._reason is None:
            if self._stopping or (self._asked_to_stop and alone):
                self._save()
                raise Interrupted(f"stopped after round {self.hub.state.version}")
            if self.hub.state.version - self._saved >= patience:
                self._save()
            if not alarms or (not self._open and all(kind == _TICK for _, kind, *_ in alarms)):
                raise self._nobody_comes()
            self._ring(heapq.heappop(alarms))
        return self._reason

    def _nobody_comes(self) -> InputError:
        told = f"after round {self.hub.state.version} no client is at work and none will come"
        if self._resting:
            gone = f"{told}: {len(self._resting)} of {self._f.clients} dropped out and never return"
            remedy = "give the seconds after which they are back, or a lower population.dropout"
            return InputError("population.recovery", self._population.recovery, gone, remedy)
        minimum = getattr(self._f.schedule, "minimum", 1)
        return InputError("schedule.minimum", minimum, told, "lower it to as many as are there at a time")

    @property
    def seconds(self) -> dict[str, float]:
        """Wall seconds by kind of work: data, step, train (what is neither), fold, evaluate, store."""
        seconds = dict(self._clock.seconds)
        within = self._trainer.seconds
        if within and "train" in seconds:
            rest = seconds.pop("train") - sum(within.values())
            seconds = {**within, **seconds, "train": max(rest, 0.0)}
        return seconds

    def stop(self) -> None:
        """Ask for an end after the event that is being handled; may be called from a signal handler.

        Several workers end together, after the step in which they learn that one was asked.
        """
        self._asked_to_stop = True

    def private(self, client: int) -> Tree:
        """What a client keeps to itself."""
        return self._bank[client]

    def _open_doors(self) -> None:
        self._opened, clients = True, self._f.clients
        if not self._population.always_there:
            present, moments, comes = self._population.first_changes(self._seed, clients)
            self._absent = set(np.flatnonzero(~present).tolist())
            kinds = np.where(comes, _COME, _LEAVE).tolist()
            for client, (at, kind) in enumerate(zip(np.rint(moments * 1e6).tolist(), kinds, strict=True)):
                if 0 < at < math.inf:
                    self._alarms.append((int(at), kind, next(self._alarm_order), client, 0))
                elif at == 0:  # within a microsecond: what comes after it counts
                    self._set_next_change(client)
            heapq.heapify(self._alarms)
        there = tuple(c for c in range(clients) if c not in self._absent) if self._absent else range(clients)
        self._obey(self.hub.on(Joined(there), 0.0))

    def _set_next_change(self, client: int) -> None:
        for moment, there in self._population.changes(self._seed, client, self._now / 1e6):
            at = round(moment * 1e6)
            if at > self._now:
                self._set(at, _COME if there else _LEAVE, client)
                return

    def _set(self, at: int, kind: int, subject: int, number: int = 0) -> None:
        heapq.heappush(self._alarms, (at, kind, next(self._alarm_order), subject, number))

    def _ring(self, alarm: _Alarm) -> None:
        at, kind, _, client, number = alarm
        self._now = max(self._now, at)
        now = self._now / 1e6
        if kind in (_RETURN, _LOSE):
            mine = self._open.get(client)
            job = mine.get(number) if mine else None
            if job is None or job.arrived or (kind == _RETURN and job.ends != at):
                return  # it was recalled or lost meanwhile
            if kind == _RETURN:
                self._arrive(job)
            elif job.lost:
                self._resting.add(client)
                if math.isfinite(self._population.recovery):
                    self._set(self._now + round(self._population.recovery * 1e6), _RECOVER, client)
                self._depart(client)
        elif kind == _TICK:
            self._obey(self.hub.on(Tick(client), now))
        elif kind == _LEAVE:
            self._absent.add(client)
            self._set_next_change(client)
            if client not in self._resting:
                self._depart(client)
        else:
            if kind == _RECOVER:
                self._resting.discard(client)
            else:
                self._absent.discard(client)
                self._set_next_change(client)
            if client not in self._resting and client not in self._absent:
                self._obey(self.hub.on(Joined((client,)), now))

    def _obey(self, orders: Sequence[Order]) -> None:
        for order in orders:
            match order:
                case Send():
                    self._send(order.client, order.job)
                case Recall(client, partial):
                    self._recall(client, partial)
                case Wake(at, token):  # at the next microsecond at the earliest, or time would stand still
                    self._set(max(round(at * 1e6), self._now + 1), _TICK, token)
                case Fold(reports, phase):
                    self._step(reports, phase)
                case Stop(reason):
                    self._reason = reason

    # Jobs.

    def _send(self, client: int, job: Job) -> None:
        f, population, now = self._f, self._population, self._now / 1e6
        if mine := self._open.get(client):
            self._computing.settle([job for job in mine.values() if job.update is None], self._flying())
        planned = f.algorithm.work(f.work, job.phase).count(
            self._examples[client],
            seed=self._seed,
            client=client,
            number=job.number,
            whole=self._whole,
        )
        down, up = self._sizes(job)
        if not isinstance(self.hub, PeerHub):
            self._bytes_down += down
        step_seconds = population.step_seconds(self._seed, client, job.number)
        there, back = population.journey(self._seed, client, down, up)
        travel, computing = there + back, planned * step_seconds
        seconds = max(travel, computing) if f.algorithm.overlaps else travel + computing
        duration = round(seconds * 1e6)
        drop = population.drops_at(self._seed, client, job.number)
        self._open.setdefault(client, {})[job.number] = Open(
            client, job, now, now + there, self._now + duration, step_seconds, planned, drop is not None
        )
        if drop is None:
            self._set(self._now + duration, _RETURN, client, job.number)
        else:
            self._set(self._now + round(drop * duration), _LOSE, client, job.number)

    def _arrive(self, job: Open) -> None:
        job.arrived = True
        self._lost_in_a_row = 0
        if job.private is not None:
            self._bank.put(job.client, job.private)
        examples = self._examples[job.client]
        self._obey(self.hub.receive(job.client, examples=examples, steps=job.steps, now=self._now / 1e6))

    def _recall(self, client: int, partial: bool) -> None:
        for job in list(self._open.get(client, {}).values()):
            if not job.arrived:
                done = math.floor((self._now / 1e6 - job.starts) / job.step_seconds + 1e-9)
                job.cut = min(max(done, 0), job.planned)
            if not partial:
                self._drop(job, "discarded")
            elif not job.arrived:
                job.lost, job.ends = False, self._now
                self._set(self._now, _RETURN, client, job.job.number)

    def _depart(self, client: int) -> None:
        for job in list(self._open.get(client, {}).values()):
            if not job.arrived:
                self._drop(job, "lost")
        self._obey(self.hub.lost(client, self._now / 1e6))

    def _drop(self, job: Open, outcome: Outcome) -> None:
        self._close(job)
        schedule = self._f.schedule
        self._lost_in_a_row += outcome == "lost" or not schedule.synchronous
        if self._lost_in_a_row > max(1000, _PATIENCE * self._f.clients):
            lost = f"{self._lost_in_a_row} jobs were lost, one after the other, and none came back"
            if outcome == "discarded":
                deadline = getattr(schedule, "deadline", None)
                raise InputError("schedule.deadline", deadline, lost, "give a job the seconds that it takes")
            if self._population.always_there:
                remedy = "lower it"
                raise InputError("population.dropout", self._population.dropout, lost, remedy)
            named = "sessions" if self._population.pattern == "traces" else "availability"
            remedy = "let clients stay for as long as a job takes, or lower population.step_time"
            raise InputError(f"population.{named}", getattr(self._population, named), lost, remedy)
        self._note(job, outcome, steps=0 if outcome == "lost" else job.steps)

    def _close(self, job: Open) -> None:
        mine = self._open[job.client]
        del mine[job.job.number]
        if not mine:
            del self._open[job.client]

    def _note(
        self,
        job: Open,
        outcome: Outcome,
        *,
        steps: int,
        staleness: int = 0,
        weight: float = 0.0,
        returned: float | None = None,
    ) -> None:
        self._participants.append(
            Participation(
                client=job.client,
                phase=job.job.phase,
                examples=self._examples[job.client],
                steps=steps,
                staleness=staleness,
                weight=weight,
                dispatched=job.sent,
                returned=self._now / 1e6 if returned is None else returned,
                loss=job.loss if outcome == "folded" else None,  # of others it may not have been computed
                outcome=outcome,
                layers=None if job.job.keys is None else tuple(sorted(job.job.keys)),
            )
        )

    # Steps of the hub.

    def _step(self, reports: Sequence[Report], phase: str) -> None:
        jobs = [self._open[report.client][report.number] for report in reports]
        if jobs:
            forge = self._forge if self._attack else None
            sizes = self._computing.fold(jobs, reports, self._flying(), forge)
            self._account(jobs, reports, sizes)
        before = self.hub.state.version
        with self._clock("fold"):
            measured = self.hub.close()
        now = self._now / 1e6
        if self.hub.state.version == before:  # a barrier between two phases
            self._obey(self.hub.on(Aggregated(), now))
            return
        score, measured = self._record(measured)
        self._obey(self.hub.on(Aggregated(score, measured), now))

    def _flying(self) -> Iterator[Open]:
        return (job for mine in self._open.values() for job in mine.values())

    def _account(self, jobs: Sequence[Open], reports: Sequence[Report], sizes: Mapping[str, int]) -> None:
        """Close jobs that were folded, and note what they cost."""
        gossip, weigh, whole = isinstance(self.hub, PeerHub), self._f.algorithm.weigh, sum(sizes.values())
        traffic = self.hub.traffic
        for job, report in zip(jobs, reports, strict=True):
            keys = job.job.keys
            size = whole if keys is None else sum(each for name, each in sizes.items() if name in keys)
            size = traffic(size, job.client)
            self._bytes_up += size
            if gossip:
                self._bytes_down += size
            self._close(job)
            self._note(
                job,
                "folded",
                steps=report.steps,
                staleness=report.staleness,
                weight=weigh(report),
                returned=report.returned,
            )

    def _forge(self, jobs: Sequence[Open], updates: Tree) -> Tree:
        """Put the attack in the place of malicious clients' changes; their running statistics stay honest.

        Statistics travel as values, and a flipped variance would be negative.
        """
        assert self._attack is not None
        values = self._f.algorithm.values(self._f.task)
        changes = {name: tensor for name, tensor in updates.items() if name not in values}
        bad = torch.tensor([job.client in self._malicious for job in jobs], device=self._f.task.device)
        forged = self._attack.forge(flatten(changes), bad)
        return {**updates, **unflatten(forged, {name: tensor[0] for name, tensor in changes.items()})}

    def _record(self, measured: dict[str, float]) -> tuple[float | None, dict[str, float]]:
        """Evaluate if it is time, tell of the round, return the headline score and all that was measured."""
        f, version, now = self._f, self.hub.state.version, self._now / 1e6
        folded = [
            p for p in self._participants if p.outcome == "folded" and p.phase == f.algorithm.phases[-1]
        ]
        told = [(p.loss, p.examples) for p in folded if p.loss is not None]
        metrics = dict(measured)
        if told:
            metrics["train/loss"] = sum(loss * n for loss, n in told) / sum(n for _, n in told)
        score, clients = None, None
        due = (
            version % f.recipe.evaluation.every == 0
            or f.schedule.stop.reached(version, now, None) is not None
        )
        evaluated: dict[str, float] = {}
        if due and self._workers.first:
            with self._clock("evaluate"):
                evaluated, clients = self._evaluator(self.hub, self._bank)
        with self._clock("store"):
            before, self._model = self._model, self.hub.model()
            moved = movement(before, self._model) if self._workers.first else {}
        why = divergence(version, self._model, moved)
        told_all = self._workers.exchange(lambda: ({}, [evaluated, why, self._asked_to_stop]))
        evaluated, why = told_all[0][1][:2]
        if why is not None:
            raise DivergedError(why)
        self._stopping = any(asked for _, (*_, asked) in told_all) and self._workers.count > 1
        metrics |= evaluated
        if due:
            self._metrics = metrics
            score = metrics.get("accuracy", -metrics["loss"] if "loss" in metrics else None)
        done = Round(
            index=version,
            time=now,
            wall=self._wall_before + time.monotonic() - self._started,
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            metrics=metrics,
            participants=tuple(self._participants),
            clients=clients,
            verdicts=Verdicts.of(self.hub.judged),
            movement=moved,
        )
        self._bytes_up = self._bytes_down = 0
        self._participants = []
        if self._on_round is not None:
            with self._clock("store"):
                self._on_round(done)
        return score, metrics

    # Checkpoints.

    def _save(self) -> None:
        if self._checkpoints is not None and self._workers.first:
            with self._clock("store"):
                tensors, facts, bank = self._snapshot()
                checkpoint.save(self._checkpoints, self.hub.state.version, tensors, facts, bank)
        self._saved = self.hub.state.version

    def _snapshot(self) -> tuple[Tree, dict[str, Any], IO[bytes] | None]:
        hub_tensors, hub_facts = self.hub.snapshot()
        tensors = put_under("hub", hub_tensors)
        private, clients, bank = self._bank.snapshot()
        tensors |= put_under("private", private)
        # One copy of what the hub and many jobs in flight share, for safetensors refuses another, or a part.
        keys = {id(tensor): name for name, tensor in tensors.items()}
        places = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}

        def stored(tree: Tree) -> dict[str, str]:
            """Where each tensor of a tree stands in the file."""
            for tensor in tree.values():
                if id(tensor) not in keys:
                    keys[id(tensor)] = name = f"job/{len(keys)}"
                    tensors[name] = (
                        tensor.clone() if tensor.untyped_storage().data_ptr() in places else tensor
                    )
            return {name: keys[id(tensor)] for name, tensor in tree.items()}

        facts = {
            "hub": hub_facts,
            "jobs": [job.facts(stored) for job in self._flying()],
            "now": self._now,
            "alarms": sorted(self._alarms),
            "checks": [self._f.task.foldable, getattr(self._trainer, "sound", None)],
            "mappable": self._f.task.mappable,
            "tier": self._trainer.tier if isinstance(self._trainer, Measured) else None,
            "resting": sorted(self._resting),
            "absent": sorted(self._absent),
            "private": clients,
            "wall": self._wall_before + time.monotonic() - self._started,
            "reason": self._reason,
            "metrics": self._metrics,
            "bytes": [self._bytes_up, self._bytes_down],
            "participants": [asdict(each) for each in self._participants],
        }
        return tensors, facts, bank

    def resume(self, upto: int | None = None) -> int:
        """Continue from the newest checkpoint; returns the round that it was written after, 0 without one.

        ``upto`` is the last round on record: what was written later is passed over.

        Raises
        ------
        RunError
            When there are checkpoints and none can be read, or what the newest holds does not fit the run.
        """
        found = checkpoint.load(self._checkpoints, upto) if self._checkpoints is not None else None
        if found is None:
            return 0
        try:
            self._restore(*found)
        except HansaError:
            raise
        except Exception as error:  # whatever may be wrong with a file that is old, or that was changed
            raise RunError(
                f"{self._checkpoints}: what was saved does not fit this run "
                f"({type(error).__name__}: {error}); put the model and the algorithm back, "
                "or start its recipe.toml again"
            ) from error
        return self._saved

    def _restore(self, tensors: Tree, facts: Mapping[str, Any], bank: Path | None) -> None:
        device = self._f.task.device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.hub.restore(take_under("hub", tensors), facts["hub"])
        for name, each in self.hub.model().items():
            if name in self._f.task.initial and each.shape != self._f.task.initial[name].shape:
                raise ValueError(
                    f"{name} is {list(each.shape)}, not {list(self._f.task.initial[name].shape)}"
                )
        self._bank.restore(take_under("private", tensors), facts["private"], bank)
        self._opened, self._now = True, facts["now"]
        self._alarms = [
            (at, kind, order, subject, number) for at, kind, order, subject, number in facts["alarms"]
        ]
        self._alarm_order = itertools.count(1 + max((order for _, _, order, *_ in self._alarms), default=-1))
        self._f.task.foldable, sound = facts["checks"]
        self._f.task.mappable = facts.get("mappable")
        if isinstance(self._trainer, FusedTrainer | Measured):
            self._trainer.sound = sound
        if isinstance(self._trainer, Measured) and facts["tier"] is not None:
            self._trainer.settle(facts["tier"], "as before the checkpoint")
        self._resting, self._absent = set(facts["resting"]), set(facts["absent"])
        self._wall_before, self._reason = facts["wall"], facts["reason"]
        self._metrics = facts["metrics"]
        self._bytes_up, self._bytes_down = facts["bytes"]
        self._participants = [Participation(**each) for each in facts["participants"]]

        def taken(names: Mapping[str, str]) -> Tree:
            return {name: tensors[key] for name, key in names.items()}

        for each in facts["jobs"]:
            self._open.setdefault(each["client"], {})[each["number"]] = Open.restored(each, taken)
        self._saved = self.hub.state.version


class _Sizes:
    """Bytes of a job's payload, and of those of its tensors whose changes come back. Most jobs are alike."""

    def __init__(self) -> None:
        self._payload: Tree = {}
        self._keys: frozenset[str] | None = None
        self._known = (0, 0)

    def __call__(self, job: Job) -> tuple[int, int]:
        payload, keys = job.payload, job.keys
        if payload is not self._payload or keys != self._keys:
            sizes = {name: each.nbytes for name, each in payload.items()}
            back = sum(size for name, size in sizes.items() if keys is None or name in keys)
            self._payload, self._keys, self._known = payload, keys, (sum(sizes.values()), back)
        return self._known


def _require_ticks_to_see_work(federation: Federation, population: Population) -> None:
    schedule = federation.schedule
    if isinstance(schedule, Periodic) and schedule.recalls:
        fastest = min(
            population.step_time * population.slowness(federation.recipe.seed, client)
            for client in range(federation.clients)
        )
        if schedule.interval < fastest:
            raise InputError(
                "schedule.interval",
                schedule.interval,
                f"no client does one local step between two ticks: the fastest takes {fastest:.3g} s",
                f"use {fastest:.3g} or more, or a smaller population.step_time",
            )


def _hub(federation: Federation) -> Hub:
    f, seed = federation, federation.recipe.seed
    if f.topology is None:
        return Hub(f.task, f.algorithm, f.schedule, clients=f.clients, seed=seed)
    mixing, steps = f.topology.mixing(f.clients), f.topology.mixing_steps
    return PeerHub(
        f.task, f.algorithm, f.schedule, clients=f.clients, seed=seed, mixing=mixing, mixing_steps=steps
    )
