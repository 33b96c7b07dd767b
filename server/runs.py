"""A run that is live: its machine, its clock, its log, and who is there to work for it.

One task per run takes what happened from its inbox, in order and durable, applies it to the machine, and lets
the effects out. So nothing is acknowledged, and no job leaves, on the strength of an event that a crash could
undo.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

import structlog
from safetensors.torch import load as load_tensors

import hansa
from hansa.core import disk
from hansa.core.errors import HansaError, RunError
from hansa.core.hub import Hub
from hansa.core.recipe import Recipe
from hansa.core.store import ClientScores, Round, RunStore
from hansa.core.trees import Tree
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.federation_pb2 import TensorInfo
from hansa.core.wire.tensors import Packed, pack, unpack
from hansa.server.artefacts import Artefacts
from hansa.server.crash import point
from hansa.server.evaluation import PHASE
from hansa.server.events import Event, EventLog, RunRow, Snapshot
from hansa.server.figures import FIGURES
from hansa.server.inbox import Inbox
from hansa.server.jobs import Open
from hansa.server.leases import Lease
from hansa.server.machine import Effects, Machine, Verdict
from hansa.server.past import told
from hansa.server.patience import Over
from hansa.strategies.catalog import Federation
from hansa.strategies.evaluate import Evaluator

P = ParamSpec("P")
T = TypeVar("T")


class Worker(Protocol):
    """An agent that is connected; ``own`` is whether it holds data of its own."""

    name: str
    own: bool

    def push(self, run: Run, job: Open) -> None:
        """Give it a job, unless it has it."""
        ...

    def recall(self, run: Run, job: Open, partial: bool) -> None:
        """End a job of it."""
        ...


class Run:
    """One run.

    Attributes
    ----------
    machine: its state. status: waiting, running, finished, interrupted or failed.
    owner: who submitted it. recipe_blob: the recipe as agents receive it.
    told: its rounds, as they are told to who watches.
    missed: client -> when its agent went, the last time that it did.
    """

    def __init__(
        self, row: RunRow, federation: Federation, directory: Path, log: EventLog, artefacts: Artefacts
    ) -> None:
        self._row = row
        self.id, self.owner, self._secret, self.wait_for = row.id, row.owner, row.secret, row.wait_for
        self.directory, self.federation = directory, federation
        self.status, self.reason = row.status, row.reason
        self.recipe_blob = row.recipe.encode()
        self.recipe_digest = hashlib.sha256(self.recipe_blob).hexdigest()
        self._events, self._artefacts = log, artefacts
        self._log = structlog.get_logger(__name__).bind(run=row.id)
        self._store = _record(directory, federation, row.recipe)
        self.told = told(self._store)
        self._recorded = max((each.index for each in self.told), default=0)
        self._evaluator = Evaluator(
            federation, seed=federation.recipe.seed, clients=federation.recipe.evaluation.clients
        )
        self.machine = Machine(federation, self.load, self._score)
        self.workers: dict[int, Worker] = {}
        self._inbox = Inbox(functools.partial(log.append, row.id), lambda: self.now, self._known)
        self._taken: dict[tuple[int, int], tuple[str, Verdict]] = {}  # (client, number) -> digest, verdict
        self._timers: dict[int, tuple[float, asyncio.TimerHandle]] = {}  # token -> when, what rings
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, f"run-{self.id}")
        self._clock = 0.0
        self._stood: float | None = None  # since when, while it is interrupted
        self._saved = 0  # version of the last snapshot
        self._steering, self._marking, self._moving = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self.watchers: set[asyncio.Event] = set()
        self.missed: dict[int, float] = {}

    # Life.

    def recover(self) -> None:
        """Make the machine what the log says it was."""
        began = time.monotonic()
        snapshot = self._events.snapshot(self.id)
        if snapshot is not None:
            named = {snapshot.digest}

            def part(digest: str) -> bytes:
                named.add(digest)
                return self._artefacts.part(self.id, digest)

            self.machine.restore(snapshot.seq, load_tensors(part(snapshot.digest)), snapshot.facts, part)
            self._artefacts.prune(self.id, named)  # of a snapshot that was not finished, or is not needed
        replayed = self._events.events(self.id, self.machine.seq)
        for event in replayed:
            for done in self.machine.apply(event).rounds:
                self._keep(done)
        for event in self._events.events(self.id):
            if event.client is not None and event.number is not None:
                late = (event.client, event.number) in self.machine.late
                self._taken[event.client, event.number] = event.body["digest"], "late" if late else "counted"
        self._saved = self.machine.hub.state.version
        if self.status in ("waiting", "running"):
            self._store.truncate(self._recorded)
        if self.machine.seq:
            self._log.info(
                "recovered",
                events=self.machine.seq,
                replayed=len(replayed),
                round=self._saved,
                seconds=round(time.monotonic() - began, 3),
            )

    def start(self, ended: Callable[[Run], None]) -> None:
        """Begin, or go on, with whoever is there; ``ended`` is called when nothing will happen any more."""
        self._clock = time.monotonic() - self.machine.now
        if not self.active:
            self._stood = time.monotonic()
        self._inbox.seq = self.machine.seq
        self._task = asyncio.create_task(self._work(), name=f"run {self.id}")
        self._task.add_done_callback(lambda _: ended(self))
        self._set_alarms()

    async def end(self) -> None:
        """Stop working; what is in the log stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._inbox.halt()
        self.close()

    def close(self) -> None:
        """Give back the record's lock, and let the timers go."""
        for _, timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._thread.shutdown(wait=False)
        self._store.close()

    def row(self) -> RunRow:
        """As the log has it."""
        rounds, clients = self.machine.hub.state.version, self.federation.clients
        return dataclasses.replace(
            self._row, status=self.status, reason=self.reason, rounds=rounds, clients=clients
        )

    @property
    def active(self) -> bool:
        """Whether it wants work done."""
        return self.status in ("waiting", "running")

    @property
    def open(self) -> int:
        """Jobs that are out: given to a client, and not yet back."""
        return len(self._jobs())

    def _jobs(self) -> list[Open]:
        """A copy: a thread may be moving the machine."""
        return [job for client in list(self.machine.busy) for job in self.machine.given(client)]

    async def newest(self) -> Packed:
        """The model as it is between two events."""
        async with self._moving:
            return await self._aside(lambda: pack(self.machine.hub.model()))

    @property
    def waiting(self) -> int:
        """Messages that have not been looked at."""
        return len(self._inbox)

    @property
    def now(self) -> float:
        """Seconds on the run's clock, which stands while it is interrupted and while no coordinator runs."""
        return max(self.machine.now, (self._stood or time.monotonic()) - self._clock)

    # Leases.

    def lease(self, job: Open) -> bytes:
        """The lease of a job."""
        what: Literal["", "evaluate"] = "evaluate" if job.phase == PHASE else ""
        return Lease(self.id, job.client, job.number, what).signed(self._secret)

    def job(self, claim: Lease) -> Open | None:
        """The job of a lease, if it is still to be done."""
        if self.status in ("finished", "failed"):
            return None
        find = self.machine.asked if claim.what else self.machine.job
        return find(claim.client, claim.number)

    def honours(self, lease: bytes, claim: Lease) -> bool:
        """Whether this run gave that lease."""
        return hmac.compare_digest(lease, claim.signed(self._secret))

    def holder(self, client: int) -> str | None:
        """The agent that speaks for a client."""
        return self.machine.seats.get(client)

    def accepted(self, claim: Lease) -> tuple[str, bool] | None:
        """Digest of the update of a job, and whether it counted; ``None`` if none was accepted."""
        if (taken := self._taken.get((claim.client, claim.number))) is None:
            return None
        digest, verdict = taken
        return digest, verdict == "counted"

    def _known(self, client: int, number: int) -> tuple[str, Verdict] | None:
        return self._taken.get((client, number))

    # What happens.

    async def tell(self, kind: str, **facts: Any) -> Verdict:
        """:meth:`hansa.server.inbox.Inbox.tell`."""
        return await self._inbox.tell(kind, **facts)

    def hear(self, kind: str, **facts: Any) -> None:
        """:meth:`hansa.server.inbox.Inbox.hear`."""
        self._inbox.hear(kind, **facts)

    async def _work(self) -> None:
        shut: Over | Literal["late"] = "late"
        try:
            await self._close_if_ended()  # it was about to be, when the process ended
            while self.active or self.status == "interrupted":
                await self._apply(await self._inbox.next())
                if self.machine.ended is not None:
                    await self._apply(await self._inbox.rest())  # late, and in the log; what comes now is not
                    await self._close_if_ended()
                if self.active:
                    await self._snapshot_if_due()
        except Over as error:
            self._log.error("the run ends here", error=str(error))
            shut = error
        except HansaError as error:
            self._log.error("the run failed", error=str(error))
            await self._fail(error)
        except Exception as error:
            self._log.exception("the run failed")
            await self._fail(error)
        self._inbox.shut(shut)

    async def _aside(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """In the run's thread: torch's own threads stay with the one that uses them."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, functools.partial(act, *args, **kwargs)
        )

    async def _insist(self, act: Callable[[], T], what: str) -> T:
        return await self._events.insist(act, f"{self.id}: {what}")

    async def _apply(self, events: Sequence[Event]) -> None:
        for event in events:
            await self._apply_one(event)
        left = {each.client for each in events if each.kind == "left"}
        back = [each for each in self.workers if each in left and each not in self.machine.there]
        self._join(back)  # while that was on its way

    async def _apply_one(self, event: Event) -> None:
        verdict: Verdict = "counted"
        if event.client is not None and event.number is not None:
            verdict = self.machine.judge(event)
            self._taken[event.client, event.number] = event.body["digest"], verdict
        self._inbox.answer(event, verdict)
        async with self._moving:
            effects = await self._aside(self.machine.apply, event)
        point("after-apply")
        self._log.debug("event", seq=event.seq, kind=event.kind, client=event.client, verdict=verdict)
        await self._let_out(effects)
        if event.kind == "failed" and self.active and not (self.machine.there or self.machine.open):
            raise RunError(f"no client is left to ask; the last one said: {event.body['reason']}")

    async def _let_out(self, effects: Effects) -> None:
        for job, partial in effects.recalls:
            worker = self.workers.get(job.client)
            if worker is not None:
                worker.recall(self, job, partial)
        for job in effects.jobs:
            worker = self.workers.get(job.client)
            if self.active and worker is not None and self.machine.wants(job):
                worker.push(self, job)
        for done in effects.rounds:
            await self._insist(functools.partial(self._keep, done), "recording a round")
            self._wake_watchers()
        self._set_alarms()
        if self.status == "waiting" and self.machine.there:
            await self._mark("running", "")

    def _wake_watchers(self) -> None:
        for watcher in self.watchers:
            watcher.set()

    def _set_alarms(self) -> None:
        loop = asyncio.get_running_loop()
        alarms = self.machine.alarms
        for token, (at, timer) in list(self._timers.items()):
            if alarms.get(token) != at:
                timer.cancel()
                del self._timers[token]
        for token, at in alarms.items():
            if token not in self._timers:  # or it has rung, and its tick is on its way
                timer = loop.call_later(max(at - self.now, 0.0), self._ring, token)
                self._timers[token] = at, timer

    def _ring(self, token: int) -> None:
        if self.active:
            self.hear("tick", body={"token": token})

    # Rounds and models.

    def load(self, digest: str, tensors: Sequence[TensorInfo]) -> Tree:
        """An update that was accepted."""
        try:
            tree = self._artefacts.tree(digest, tensors)
            return unpack(self._events.blob(digest) or b"", tensors) if tree is None else tree
        except (OSError, ValueError) as error:
            raise RunError(f"update {digest}: it cannot be read any more ({error})") from error

    def _score(self, hub: Hub) -> tuple[dict[str, float], ClientScores | None]:
        return self._evaluator(hub, {})

    def _keep(self, done: Round) -> None:
        if done.index <= self._recorded:  # a replay makes rounds again
            return
        self._store.append(done)
        self._recorded = done.index
        FIGURES.rounds.inc()
        self._log.info("round", round=done.index, **{k: v for k, v in done.metrics.items() if k in _TOLD})
        self.told.append(
            pb.Round(
                index=done.index,
                time=done.time,
                bytes_up=done.bytes_up,
                bytes_down=done.bytes_down,
                asked=len(done.participants),
                folded=sum(each.outcome == "folded" for each in done.participants),
                metrics=dict(done.metrics),
            )
        )

    async def _close_if_ended(self) -> None:
        """After the batch in which the hub stopped: what came too late is known then."""
        reason = self.machine.ended
        if reason is None or not self.active:
            return
        self._recall_all()
        point("before-model")
        packed = await self._aside(pack, self.machine.hub.model())
        await self._insist(lambda: self._write_model(packed.data), "writing the model")
        await self._insist(
            lambda: self._store.event(self.machine.now, "finished", reason), "recording the end"
        )
        await self._insist(lambda: self._store.finish("finished"), "recording the end")
        point("after-model")
        await self._mark("finished", reason, over=True)
        self._wake_watchers()
        self._log.info("finished", reason=reason, model=packed.digest)

    def _write_model(self, data: bytes) -> None:
        draft = self.model.with_suffix(".part")
        disk.write(draft, data)
        draft.replace(self.model)

    @property
    def model(self) -> Path:
        """Where the final model goes."""
        return self.directory / "model.safetensors"

    async def _snapshot_if_due(self) -> None:
        version = self.machine.hub.state.version
        if version - self._saved >= self.federation.recipe.engine.checkpoint_every:
            await self._insist(self._snapshot, "keeping a snapshot")
            self._saved = version

    def _snapshot(self) -> None:
        named = set[str]()

        def put(packed: Packed) -> str:
            digest = self._artefacts.put(self.id, packed.data)
            named.add(digest)
            return digest

        tensors, facts = self.machine.snapshot(put)
        digest = put(pack(tensors))
        point("before-snapshot")
        self._events.save(self.id, Snapshot(seq=self.machine.seq, digest=digest, facts=facts))
        point("after-snapshot")
        self._artefacts.prune(self.id, named)

    # How it stands.

    async def stop(self) -> None:
        """Interrupt it; agents throw away what they are doing. What they have done comes and counts."""
        async with self._steering:
            if not self.active:
                return
            await self.tell("stopped")
            async with self._marking:
                if not self.active:  # it ended by itself meanwhile
                    return
                self.status, self._stood = "interrupted", time.monotonic()
                self._recall_all()
                why = "stopped on request"
                await self._insist(
                    lambda: self._store.finish("interrupted", why), "recording the interruption"
                )
                await self._mark("interrupted", why)
            self._wake_watchers()

    def _recall_all(self) -> None:
        for job in self._jobs():
            worker = self.workers.get(job.client)
            if worker is not None:
                worker.recall(self, job, False)

    async def resume(self) -> None:
        """Go on after :meth:`stop`, with the jobs that were open."""
        async with self._steering:
            async with self._marking:
                if self.status != "interrupted":
                    raise RunError(
                        f"{self.id}: this run is {self.status}; only an interrupted one can be resumed"
                    )
                await self._insist(lambda: self._store.truncate(self._recorded), "resuming")
                await self._mark("running" if self.machine.there else "waiting", "")
            for _, timer in self._timers.values():
                timer.cancel()
            self._timers.clear()
            self._clock, self._stood = time.monotonic() - self.now, None
            await self.tell("resumed")
            if not self.active:  # it failed meanwhile
                return
            for client, worker in self.workers.items():
                for job in self.machine.given(client):
                    worker.push(self, job)

    async def _fail(self, error: BaseException) -> None:
        async with self._marking:
            try:
                with suppress(Exception):  # the log may be what fails
                    await self._inbox.rest()
                self.machine.late |= self._inbox.unapplied  # in the log, and in no model
                await self._insist(lambda: self._store.finish("failed", str(error)), "recording the failure")
                await self._mark("failed", str(error), over=True)
            except HansaError:
                self._log.exception("the failure could not be recorded")
                self.status, self.reason = "failed", str(error)
        self._recall_all()
        self._wake_watchers()

    async def _mark(self, status: str, reason: str, *, over: bool = False) -> None:
        """``over``: for good; then only what :class:`~hansa.server.past.Past` asks is kept of its state."""
        machine, last = self.machine, None
        if over:
            last = {"seats": sorted(machine.seats.items()), "late": sorted(machine.late)}
        facts = self.id, status, reason, machine.hub.state.version, last
        await self._insist(lambda: self._events.mark(*facts), "recording how it stands")
        if over:
            await asyncio.to_thread(self._artefacts.prune, self.id)
        self.status, self.reason = status, reason

    # Who is there.

    def arrive(self, worker: Worker, clients: Sequence[int]) -> None:
        """An agent is connected and speaks for these clients."""
        fresh: list[int] = []
        others: list[int] = []
        for client in clients:
            if client >= self.federation.clients:
                continue
            holder = self.machine.seats.get(client, worker.name)
            if holder != worker.name:
                others.append(client)
                continue
            self.workers[client] = worker
            if client not in self.machine.there:
                fresh.append(client)
                continue
            for job in self.machine.given(client):
                worker.push(self, job)
                if job.recalled:
                    worker.recall(self, job, True)
        if others:
            self._log.warning(
                "clients belong to other agents", agent=worker.name, count=len(others), clients=others[:10]
            )
        if self.machine.seats:
            self._join(fresh)
        elif len(self.workers) >= (self.wait_for or self.federation.clients):
            self._join(list(self.workers))

    def _join(self, clients: Sequence[int]) -> None:
        if clients:
            workers = {client: self.workers[client] for client in sorted(clients)}
            seats = {str(client): each.name for client, each in workers.items()}
            own = [client for client, each in workers.items() if each.own]
            self.hear("joined", body={"seats": seats, **({"own": own} if own else {})})

    def depart(self, worker: Worker) -> list[int]:
        """Its stream ended; returns its clients, which may come back."""
        mine = [client for client, each in self.workers.items() if each is worker]
        for client in mine:
            del self.workers[client]
        return mine

    def give_up(self, clients: Sequence[int]) -> None:
        """These clients did not come back."""
        for client in clients:
            if client not in self.workers and client in self.machine.there:
                self.hear("left", client=client)


_TOLD = ("accuracy", "loss", "train/loss")


def _record(directory: Path, federation: Federation, recipe: str) -> RunStore:
    if (directory / "run.db").is_file():
        return RunStore.open(directory)
    data = federation.data
    facts = _facts(federation.recipe, data.clients, len(data.train), len(data.test))
    made = RunStore.create(
        directory, name=federation.recipe.name, seed=federation.recipe.seed, recipe=recipe, facts=facts
    )
    counts = data.counts()
    if counts is None:
        made.partition(data.train_shards.sizes.numpy())
    else:
        made.partition(counts, data.train.classes or ())
    return made


def _facts(recipe: Recipe, clients: int, train: int, test: int) -> Mapping[str, str]:
    return {
        "algorithm": recipe.algorithm["name"].rpartition(":")[2],
        "schedule": recipe.schedule["name"].rpartition(":")[2],
        "clients": str(clients),
        "examples": f"{train} train, {test} test",
        "engine": "coordinator",
        "hansa": hansa.__version__,
    }
