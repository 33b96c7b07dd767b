"""A run as a fold over its events: the hub, the jobs that are open, the alarms that are set.

The same events give the same machine, bit for bit, on the same computer: live, after a restart, or in an
audit (:func:`hansa.server.verify.verify`). It reads no clock and opens no socket; what must happen in the
world because of an event it returns as :class:`Effects`.

Everything between two events is a function of the first: a step of the hub is folded, evaluated and told to
the schedule at the time of the event that completed it, so a log of what came from outside is enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hansa.core.algorithm import Job, Report
from hansa.core.errors import InputError, RunError
from hansa.core.hub import Fold, Hub, Order, Send
from hansa.core.randomness import ALONE
from hansa.core.schedule import Aggregated, Joined, Recall, Stop, Tick, Wake
from hansa.core.store import ClientScores, Outcome, Participation, Round, Verdicts
from hansa.core.trees import Tree, movement, nbytes
from hansa.core.wire.federation_pb2 import TensorInfo
from hansa.core.wire.tensors import Packed, describe, pack, unpack
from hansa.server.events import Event
from hansa.strategies.catalog import Federation

_PATIENCE = 3  # jobs that a client may fail in a row before it is left alone until its agent is back

Verdict = Literal["counted", "late"]
Score = Callable[[Hub], tuple[dict[str, float], ClientScores | None]]


@dataclass
class Open:
    """A job that was sent and is not yet folded, thrown away or lost.

    Attributes
    ----------
    packed: what the client receives.
    expected: tensors of the update that it shall send.
    recalled: it was asked for what it has.
    update: digest of the update, once it has arrived. data: its bytes, where they came with the event.
    """

    client: int
    number: int
    phase: str
    keys: frozenset[str] | None
    packed: Packed
    expected: tuple[TensorInfo, ...]
    sent: float
    recalled: bool = False
    update: str | None = None
    data: bytes | None = None
    examples: int = 0
    steps: int = 0
    loss: float | None = None


@dataclass
class Effects:
    """What an event asks of the world: jobs to push, jobs to recall (partially), rounds to record."""

    jobs: list[Open] = field(default_factory=list)
    recalls: list[tuple[Open, bool]] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)


class Machine:
    """One run.

    Parameters
    ----------
    load: the update under a digest, as these tensors.
    score: metrics of the hub's model.

    Attributes
    ----------
    seq: number of the last event. now: its time.
    hub: the server.
    open: client -> job number -> job.
    seats: client -> the agent that speaks for it.
    there: clients that the schedule believes to be there.
    alarms: token -> when.
    ended: why the run is over, if it is.
    late: (client, job number) of updates that came too late and were set aside.
    """

    def __init__(
        self, federation: Federation, load: Callable[[str, Sequence[TensorInfo]], Tree], score: Score
    ):
        f = federation
        if f.topology is not None:
            raise InputError(
                "topology.kind",
                f.topology.kind,
                "a coordinator is a server, and a gossip network has none",
                'use topology.kind = "star", or run it in the simulator',
            )
        with ALONE:
            self.hub = Hub(f.task, f.algorithm, f.schedule, clients=f.clients, seed=f.recipe.seed)
        self._f, self._load, self._score = f, load, score
        self.seq, self.now = 0, 0.0
        self.open: dict[int, dict[int, Open]] = {}
        self.seats: dict[int, str] = {}
        self.there: set[int] = set()
        self.alarms: dict[int, float] = {}
        self.ended: str | None = None
        self.metrics: dict[str, float] = {}
        self.late: set[tuple[int, int]] = set()
        self._schemas: dict[str, tuple[TensorInfo, ...]] = {}  # phase -> the whole update
        self._packed: dict[tuple[int, ...], tuple[Tree, Packed]] = {}  # payloads of this event, by identity
        self._participants: list[Participation] = []
        self._failures: dict[int, int] = {}  # client -> jobs that failed in a row
        self._up = self._down = 0
        self._effects = Effects()

    # Events.

    def job(self, client: int, number: int) -> Open | None:
        """A job that is open and has not arrived."""
        found = self.open.get(client, {}).get(number)
        return None if found is None or found.update is not None else found

    def judge(self, event: Event) -> Verdict:
        """Whether an update is in time, before it is applied."""
        assert event.client is not None
        assert event.number is not None
        return "late" if self.ended or self.job(event.client, event.number) is None else "counted"

    def apply(self, event: Event) -> Effects:
        """Take the next event."""
        if event.seq != self.seq + 1:
            raise RunError(f"event {event.seq} came after event {self.seq}")
        self.seq, self.now = event.seq, max(self.now, event.at)
        self._effects, self._packed = Effects(), dict(list(self._packed.items())[-1:])
        if self.ended is None or event.kind == "update":
            self._take(event)
        return self._effects

    def _take(self, event: Event) -> None:
        now, client, body = self.now, event.client, event.body
        match event.kind:
            case "joined":
                self.seats |= {int(each): agent for each, agent in body["seats"].items()}
                clients = sorted(int(each) for each in body["seats"])
                self.there.update(clients)
                whole = range(len(clients))
                self._obey(self.hub.on(Joined(whole if clients == list(whole) else tuple(clients)), now))
            case "left":
                assert client is not None
                self._lose(client)
            case "failed":
                assert client is not None
                if self.job(client, body["number"]) is not None:
                    self._lose(client)
                    self._failures[client] = self._failures.get(client, 0) + 1
                    if body["again"] and self._failures[client] < _PATIENCE:
                        self.there.add(client)
                        self._obey(self.hub.on(Joined((client,)), now))
            case "update":
                assert client is not None
                assert event.number is not None
                if self.judge(event) == "late":
                    self.late.add((client, event.number))
                else:
                    job = self.open[client][event.number]
                    job.update, job.data, job.loss = body["digest"], event.data, body["loss"]
                    job.examples, job.steps = body["examples"], body["steps"]
                    self._failures.pop(client, None)
                    self._obey(self.hub.receive(client, examples=job.examples, steps=job.steps, now=now))
            case "tick":
                self.alarms.pop(body["token"], None)
                self._obey(self.hub.on(Tick(body["token"]), now))
            case "stopped" | "resumed":
                pass
            case kind:
                raise RunError(f"event {event.seq} is of an unknown kind {kind!r}; update hansa")

    def _lose(self, client: int) -> None:
        self.there.discard(client)
        for job in list(self.open.get(client, {}).values()):
            if job.update is None:
                self._drop(job, "lost")
        self._obey(self.hub.lost(client, self.now))

    # Orders.

    def _obey(self, orders: Sequence[Order]) -> None:
        for order in orders:
            match order:
                case Send(client, job):
                    self._send(client, job)
                case Recall(client, partial):
                    for each in list(self.open.get(client, {}).values()):
                        if partial and each.update is None:
                            each.recalled = True
                            self._effects.recalls.append((each, True))
                        elif not partial:
                            self._drop(each, "discarded")
                            if each.update is None:
                                self._effects.recalls.append((each, False))
                case Wake(at, token):
                    self.alarms[token] = at
                case Fold(reports, phase):
                    self._step(reports, phase)
                case Stop(reason):
                    self.ended = reason

    def _send(self, client: int, job: Job) -> None:
        packed = self._pack(job.payload)
        whole = self._schema(job)
        expected = whole if job.keys is None else tuple(each for each in whole if each.name in job.keys)
        made = Open(
            client=client,
            number=job.number,
            phase=job.phase,
            keys=job.keys,
            packed=packed,
            expected=expected,
            sent=self.now,
        )
        self.open.setdefault(client, {})[job.number] = made
        self._down += nbytes(job.payload)
        self._effects.jobs.append(made)

    def _pack(self, payload: Tree) -> Packed:
        """One copy for all jobs that were ordered together and share their tensors."""
        key = tuple(map(id, payload.values()))
        if key not in self._packed:
            self._packed[key] = payload, pack(payload)  # the tree is kept, or an id could be used again
        return self._packed[key][1]

    def _schema(self, job: Job) -> tuple[TensorInfo, ...]:
        """What a client sends after this phase: the update of a job without a step has all its tensors."""
        if job.phase not in self._schemas:
            algorithm, task = self._f.algorithm, self._f.task
            with ALONE:
                carry = algorithm.begin(task, job.payload, algorithm.private(task), job.phase)
                self._schemas[job.phase] = describe(algorithm.finish(task, carry, job.phase)[0])
        return self._schemas[job.phase]

    def _drop(self, job: Open, outcome: Outcome) -> None:
        self._close(job)
        self._note(job, outcome)

    def _close(self, job: Open) -> None:
        mine = self.open[job.client]
        del mine[job.number]
        if not mine:
            del self.open[job.client]

    def _note(
        self,
        job: Open,
        outcome: Outcome,
        *,
        staleness: int = 0,
        weight: float = 0.0,
        returned: float | None = None,
    ) -> None:
        self._participants.append(
            Participation(
                client=job.client,
                phase=job.phase,
                examples=job.examples,
                steps=job.steps,
                staleness=staleness,
                weight=weight,
                dispatched=job.sent,
                returned=self.now if returned is None else returned,
                loss=job.loss,
                outcome=outcome,
                layers=None if job.keys is None else tuple(sorted(job.keys)),
            )
        )

    # Steps of the hub.

    def _step(self, reports: Sequence[Report], phase: str) -> None:
        for report in reports:
            job = self.open[report.client][report.number]
            assert job.update is not None
            update = (
                self._load(job.update, job.expected) if job.data is None else unpack(job.data, job.expected)
            )
            self.hub.fold(
                [report], {name: each.to(self._f.task.device)[None] for name, each in update.items()}, {}
            )
            self._up += nbytes(update)
            self._close(job)
            self._note(
                job,
                "folded",
                staleness=report.staleness,
                weight=self._f.algorithm.weigh(report),
                returned=report.returned,
            )
        before = self.hub.state
        measured = self.hub.close()
        made = self.hub.state.version > before.version
        told = self._record(measured, movement(before.params, self.hub.model())) if made else Aggregated()
        self._obey(self.hub.on(told, self.now))

    def _record(self, measured: dict[str, float], moved: dict[str, tuple[float, float]]) -> Aggregated:
        """Evaluate if it is time, tell of the round, return what the schedule is told."""
        f, version = self._f, self.hub.state.version
        folded = [
            p for p in self._participants if p.outcome == "folded" and p.phase == f.algorithm.phases[-1]
        ]
        told = [(p.loss, p.examples) for p in folded if p.loss is not None]
        metrics = dict(measured)
        if told:
            metrics["train/loss"] = sum(loss * n for loss, n in told) / max(sum(n for _, n in told), 1)
        score, clients = None, None
        if version % f.recipe.evaluation.every == 0 or f.schedule.stop.reached(version, self.now, None):
            evaluated, clients = self._score(self.hub)
            metrics |= evaluated
            self.metrics = metrics
            score = metrics.get("accuracy", -metrics["loss"] if "loss" in metrics else None)
        self._effects.rounds.append(
            Round(
                index=version,
                time=self.now,
                wall=self.now,
                bytes_up=self._up,
                bytes_down=self._down,
                metrics=metrics,
                participants=tuple(self._participants),
                clients=clients,
                verdicts=Verdicts.of(self.hub.judged),
                movement=moved,
            )
        )
        self._up = self._down = 0
        self._participants = []
        return Aggregated(score, metrics)

    # Snapshots, between two events.

    def snapshot(self, keep: Callable[[Packed], object]) -> tuple[Tree, dict[str, Any]]:
        """Tensors and facts from which :meth:`restore` makes the same machine; payloads go to ``keep``."""
        tensors, facts = self.hub.snapshot()
        jobs = [job for mine in self.open.values() for job in mine.values()]
        for packed in {job.packed.digest: job.packed for job in jobs}.values():
            keep(packed)
        return tensors, {
            "hub": facts,
            "jobs": [_frozen(job) for job in jobs],
            "schemas": {phase: _plain(schema) for phase, schema in self._schemas.items()},
            "now": self.now,
            "seats": sorted(self.seats.items()),
            "there": sorted(self.there),
            "alarms": sorted(self.alarms.items()),
            "ended": self.ended,
            "metrics": self.metrics,
            "participants": [dataclasses.asdict(each) for each in self._participants],
            "late": sorted(self.late),
            "bytes": [self._up, self._down],
            "failures": sorted(self._failures.items()),
        }

    def restore(
        self, seq: int, tensors: Tree, facts: Mapping[str, Any], data: Callable[[str], bytes]
    ) -> None:
        """Continue from a :meth:`snapshot` taken after event ``seq``; ``data`` gives payloads again."""
        device = self._f.task.device
        self.hub.restore({name: each.to(device) for name, each in tensors.items()}, facts["hub"])
        self.seq, self.now, self.ended, self.metrics = seq, facts["now"], facts["ended"], facts["metrics"]
        self.seats, self.alarms = dict(facts["seats"]), dict(facts["alarms"])
        self.there = set(facts["there"])
        self._schemas = {phase: _infos(schema) for phase, schema in facts["schemas"].items()}
        self._participants = [Participation(**each) for each in facts["participants"]]
        self._up, self._down = facts["bytes"]
        self._failures = dict(facts["failures"])
        self.late = {(client, number) for client, number in facts["late"]}
        packed: dict[str, Packed] = {}
        for each in facts["jobs"]:
            job = dict(each)
            digest, tensors_of = job.pop("packed")
            if digest not in packed:
                packed[digest] = Packed(data(digest), digest, _infos(tensors_of))
            keys = None if job["keys"] is None else frozenset(job["keys"])
            job |= {"packed": packed[digest], "expected": _infos(job["expected"]), "keys": keys}
            self.open.setdefault(job["client"], {})[job["number"]] = Open(**job)


def _frozen(job: Open) -> dict[str, Any]:
    facts = {name: value for name, value in vars(job).items() if name != "data"}
    facts["packed"] = [job.packed.digest, _plain(job.packed.tensors)]
    facts["expected"] = _plain(job.expected)
    facts["keys"] = None if job.keys is None else sorted(job.keys)
    return facts


def _plain(tensors: Sequence[TensorInfo]) -> list[list[Any]]:
    return [[each.name, each.dtype, list(each.shape)] for each in tensors]


def _infos(plain: Sequence[Sequence[Any]]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name=name, dtype=dtype, shape=shape) for name, dtype, shape in plain)
