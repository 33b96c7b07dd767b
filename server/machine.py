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

import numpy as np

from hansa.core.algorithm import Job, Report
from hansa.core.errors import DivergedError, InputError, RunError
from hansa.core.hub import Fold, Hub, Order, Send, divergence
from hansa.core.randomness import ALONE
from hansa.core.schedule import Aggregated, Joined, Recall, Stop, Tick, Wake
from hansa.core.store import ClientScores, Outcome, Participation, Round, Verdicts
from hansa.core.trees import Tree, movement, nbytes, pick
from hansa.core.wire.federation_pb2 import TensorInfo
from hansa.core.wire.tensors import Packed, describe, pack
from hansa.server import evaluation, jobs
from hansa.server.evaluation import Evaluation
from hansa.server.events import Event
from hansa.server.jobs import Open, infos, plain
from hansa.strategies.catalog import Federation
from hansa.strategies.evaluate import is_personal, panel

_PATIENCE = 3  # jobs that a client may fail in a row before it is left alone until its agent is back
_TICK = 0.01  # seconds between two ticks, at least

Verdict = Literal["counted", "late"]
Score = Callable[[Hub], tuple[dict[str, float], ClientScores | None]]


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
    seats: client -> the agent that speaks for it. own: clients whose agents hold data of their own.
    there: clients that the schedule believes to be there.
    alarms: token -> when.
    ended: why the run is over, if it is.
    late: (client, job number) of updates that came too late and were set aside.
    undone: client -> its last job that counted, where its round was abandoned.
    evaluation: what clients are asked for, if they are.
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
        for key in ("interval", "deadline"):
            seconds = getattr(f.schedule, key, None)
            if seconds is not None and seconds < _TICK:
                raise InputError(
                    f"schedule.{key}",
                    seconds,
                    "every tick is an event of the log, and no agent does anything in so little time",
                    f"use {_TICK:g} or more",
                )
        with ALONE:
            self.hub = Hub(f.task, f.algorithm, f.schedule, clients=f.clients, seed=f.recipe.seed)
        self._f, self._load, self._score = f, load, score
        self.seq, self.now = 0, 0.0
        self.open: dict[int, dict[int, Open]] = {}
        self.seats: dict[int, str] = {}
        self.own: set[int] = set()
        self.evaluation: Evaluation | None = None
        self.there: set[int] = set()
        self.alarms: dict[int, float] = {}
        self.ended: str | None = None
        self.late: set[tuple[int, int]] = set()
        self.undone: dict[int, int] = {}
        self._schemas: dict[str, tuple[TensorInfo, ...]] = {}  # phase -> the whole update
        self._packed: dict[tuple[int, ...], tuple[Tree, Packed]] = {}  # payloads of this event, by identity
        self._participants: list[Participation] = []
        self._failures: dict[int, int] = {}  # client -> jobs that failed in a row
        self._up = self._down = 0
        self._ending: str | None = None  # why it is over once the evaluation is
        self._effects = Effects()

    # Events.

    def job(self, client: int, number: int) -> Open | None:
        """A job that is open and has not arrived."""
        found = self.open.get(client, {}).get(number)
        return None if found is None or found.update is not None else found

    def asked(self, client: int, version: int) -> Open | None:
        """The evaluation of a model that a client was asked for and has not answered."""
        e = self.evaluation
        return e.job(client) if e is not None and e.version == version else None

    def given(self, client: int) -> list[Open]:
        """What a client has to do."""
        e = self.evaluation
        asked = e.job(client) if e is not None else None
        trained = [job for job in list(self.open.get(client, {}).values()) if job.update is None]
        return trained if asked is None else [*trained, asked]

    @property
    def busy(self) -> set[int]:
        """Clients that have something to do, or updates that wait."""
        return set(self.open) | (set() if self.evaluation is None else self.evaluation.waiting)

    def wants(self, job: Open) -> bool:
        """Whether a job is still to be done."""
        find = self.asked if job.phase == evaluation.PHASE else self.job
        return find(job.client, job.number) is not None

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
                self.own.update(body.get("own", ()))
                clients = sorted(int(each) for each in body["seats"])
                self.there.update(clients)
                whole = range(len(clients))
                self._obey(self.hub.on(Joined(whole if clients == list(whole) else tuple(clients)), now))
            case "left":
                assert client is not None
                self._lose(client)
                if self.evaluation is not None:
                    self.evaluation.waiting.discard(client)
            case "scored":
                assert client is not None
                if self.evaluation is not None:
                    self.evaluation.take(client, body)
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
                    job.update, job.tree, job.loss = body["digest"], event.tree, body["loss"]
                    job.examples, job.steps = body["examples"], body["steps"]
                    self._failures.pop(client, None)
                    self.undone.pop(client, None)
                    self._obey(self.hub.receive(client, examples=job.examples, steps=job.steps, now=now))
            case "tick":
                self.alarms.pop(body["token"], None)
                if body["token"] >= 0:
                    self._obey(self.hub.on(Tick(body["token"]), now))
                elif self.evaluation is not None and body["token"] == self.evaluation.token:
                    self._conclude()
            case "stopped" | "resumed":
                pass
            case kind:
                raise RunError(f"event {event.seq} is of an unknown kind {kind!r}; update hansa")
        if self.evaluation is not None and not self.evaluation.waiting:
            self._conclude()

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
                            else:
                                self.undone[client] = each.number
                case Wake(at, token):
                    self.alarms[token] = at
                case Fold(reports, phase):
                    self._step(reports, phase)
                case Stop(reason):
                    self._stop(reason)

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
            update = self._load(job.update, job.expected) if job.tree is None else job.tree
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
        if self.hub.state.version == before.version:  # a barrier between two phases
            self._obey(self.hub.on(Aggregated(), self.now))
            return
        moved = movement(before.params, self.hub.model())
        if (why := divergence(self.hub.state.version, self.hub.model(), moved)) is not None:
            raise DivergedError(why)
        done = self._round(measured, moved)
        score = None
        if self._due(done.index):
            if self._by_clients:
                if self._ask(done):
                    return
            else:
                evaluated, clients = self._score(self.hub)
                metrics = {**done.metrics, **evaluated}
                done = dataclasses.replace(done, metrics=metrics, clients=clients)
                score = _headline(metrics)
        self._tell(done)
        self._obey(self.hub.on(Aggregated(score, done.metrics), self.now))

    def _round(self, measured: dict[str, float], moved: dict[str, tuple[float, float]]) -> Round:
        """The round that was made."""
        folded = [
            p for p in self._participants if p.outcome == "folded" and p.phase == self._f.algorithm.phases[-1]
        ]
        told = [(p.loss, p.examples) for p in folded if p.loss is not None]
        metrics = dict(measured)
        if told:
            metrics["train/loss"] = sum(loss * n for loss, n in told) / max(sum(n for _, n in told), 1)
        done = Round(
            index=self.hub.state.version,
            time=self.now,
            wall=self.now,
            bytes_up=self._up,
            bytes_down=self._down,
            metrics=metrics,
            participants=tuple(self._participants),
            verdicts=Verdicts.of(self.hub.judged),
            movement=moved,
        )
        self._up = self._down = 0
        self._participants = []
        return done

    def _tell(self, done: Round) -> None:
        """Rounds are told of in order."""
        (self._effects.rounds if self.evaluation is None else self.evaluation.rounds).append(done)

    # Evaluation.

    @property
    def _by_clients(self) -> bool:
        return bool(self.own) or is_personal(self._f.task)

    def _last(self, version: int) -> bool:
        return self._f.schedule.stop.reached(version, self.now, None) is not None

    def _due(self, version: int) -> bool:
        if self._last(version):
            return True
        return version % self._f.recipe.evaluation.every == 0 and self.evaluation is None

    def _ask(self, done: Round) -> bool:
        """Have clients evaluate the model of a round; returns whether there are any."""
        clients = self._panel()
        if not clients:
            return False
        if self.evaluation is not None:  # the last model goes before
            self._close_evaluation()
        waits = self._f.schedule.synchronous
        packed = self._pack(pick(self.hub.model(), self._f.task.shared))
        self.evaluation = made = Evaluation(
            packed=packed, asked=self.now, waits=waits, waiting=clients, rounds=[done]
        )
        self.alarms[made.token] = self.now + self._f.recipe.evaluation.deadline
        self._effects.jobs += [job for client in sorted(clients) if (job := made.job(client))]
        if not waits:
            self._obey(self.hub.on(Aggregated(None, done.metrics), self.now))
        return True

    def _panel(self) -> set[int]:
        """Who is asked: whoever is there, of those that the simulator would evaluate."""
        f = self._f
        able = np.flatnonzero(f.data.test_shards.sizes.numpy()) if not self.own else np.arange(f.clients)
        chosen = panel(able, seed=f.recipe.seed, clients=f.recipe.evaluation.clients)
        return self.there.intersection(chosen.tolist())

    def _close_evaluation(self) -> Round:
        """Tell of the rounds that waited; returns the one that was evaluated."""
        e, self.evaluation = self.evaluation, None
        assert e is not None
        self._effects.recalls += [(job, False) for client in sorted(e.waiting) if (job := e.job(client))]
        self.alarms.pop(e.token, None)
        done = e.result(personal=is_personal(self._f.task))
        self._effects.rounds += [done, *e.rounds[1:]]
        return done

    def _conclude(self) -> None:
        """The evaluation is over, whoever has answered."""
        waited = self.evaluation is not None and self.evaluation.waits
        done, stop = self._close_evaluation(), self._f.schedule.stop
        score = _headline(done.metrics)
        if waited:
            self._obey(self.hub.on(Aggregated(score, done.metrics), self.now))
        elif self._ending is not None:
            self.ended = self._ending
        elif stop.target is not None and score is not None and score >= stop.target:
            self.ended = stop.reached(done.index, done.time, score)

    def _stop(self, reason: str) -> None:
        if self.evaluation is None:
            self.ended = reason
            return
        self._ending = reason  # whoever still trains does so for nothing
        for job in [each for mine in self.open.values() for each in mine.values() if each.update is None]:
            self._drop(job, "discarded")
            self._effects.recalls.append((job, False))

    # Snapshots, between two events.

    def snapshot(self, keep: Callable[[Packed], object]) -> tuple[Tree, dict[str, Any]]:
        """Tensors and facts from which :meth:`restore` makes the same machine; payloads go to ``keep``."""
        tensors, facts = self.hub.snapshot()
        open_ = [job for mine in self.open.values() for job in mine.values()]
        e = self.evaluation
        payloads = [job.packed for job in open_] + ([] if e is None else [e.packed])
        for packed in {each.digest: each for each in payloads}.values():
            keep(packed)
        return tensors, {
            "hub": facts,
            "jobs": [job.facts() for job in open_],
            "schemas": {phase: plain(schema) for phase, schema in self._schemas.items()},
            "now": self.now,
            "seats": sorted(self.seats.items()),
            "own": sorted(self.own),
            "there": sorted(self.there),
            "alarms": sorted(self.alarms.items()),
            "ended": self.ended,
            "participants": [dataclasses.asdict(each) for each in self._participants],
            "late": sorted(self.late),
            "undone": sorted(self.undone.items()),
            "bytes": [self._up, self._down],
            "failures": sorted(self._failures.items()),
            "ending": self._ending,
            "evaluation": None if e is None else e.facts(),
        }

    def restore(
        self, seq: int, tensors: Tree, facts: Mapping[str, Any], data: Callable[[str], bytes]
    ) -> None:
        """Continue from a :meth:`snapshot` taken after event ``seq``; ``data`` gives payloads again."""
        device = self._f.task.device
        self.hub.restore({name: each.to(device) for name, each in tensors.items()}, facts["hub"])
        self.seq, self.now, self.ended = seq, facts["now"], facts["ended"]
        self.seats, self.alarms = dict(facts["seats"]), dict(facts["alarms"])
        self.there = set(facts["there"])
        self._schemas = {phase: infos(schema) for phase, schema in facts["schemas"].items()}
        self._participants = [Participation(**each) for each in facts["participants"]]
        self._up, self._down = facts["bytes"]
        self._failures = dict(facts["failures"])
        self.late = {(client, number) for client, number in facts["late"]}
        self.own, self._ending = set(facts.get("own", ())), facts.get("ending")
        self.undone = dict(facts.get("undone", ()))
        payloads = jobs.Payloads(data)
        if (told := facts.get("evaluation")) is not None:
            self.evaluation = evaluation.restored(told, payloads)
        for each in facts["jobs"]:
            job = jobs.restored(each, payloads)
            self.open.setdefault(job.client, {})[job.number] = job


def _headline(metrics: Mapping[str, float]) -> float | None:
    return metrics.get("accuracy", -metrics["loss"] if "loss" in metrics else None)
