"""An edge agent: long-lived, warm, and in no hurry to give anything up.

A task per job takes it from the offer to the acknowledgement: fetch what it names, train, keep the result in
the outbox, upload, settle. Connections come and go under it; a job that was trained once is never trained
again, and what the coordinator has counted is settled even if the word of it was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import math
import platform
import random
import signal
import tomllib
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import grpc
import psutil
import structlog
import torch

import hansa
from hansa.client.enrolment import renew_if_due
from hansa.client.outbox import Entry, Outbox
from hansa.client.policy import Policy, Refused
from hansa.client.session import Gone, Later, Link
from hansa.client.workshop import Precision, Workshop
from hansa.core.errors import HansaError, InputError, TrustError
from hansa.core.recipe import construct
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire import stranger, version

T = TypeVar("T")
_NAP = 60.0  # seconds between two looks at the clock in quiet hours
_LOOK = 600.0  # seconds between two looks at the certificate
_BLOBS = 8  # recipes and models kept in memory
_WELCOME = 10.0  # seconds until a coordinator has greeted
_AGAIN = 600.0  # seconds until the same reason for not being connected is told again
_SOONEST, _SLOWEST = 0.1, 1.0  # seconds between two tries, more or less by half; doubled from one to the next

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What an agent is told.

    Attributes
    ----------
    name: of this agent, where no certificate says it.
    coordinator: host:port.
    identity: folder that `hansa pki join` made; without it insecure, on this machine only.
    state: folder of private state and outbox.
    clients: which clients of a federation it speaks for.
    share: instead, "i/n": every client c with c mod n = i; for trying out a federation on one machine.
    data: the [data] table of what it holds; without it the recipe's own data, for trying out.
    device: torch device instead of the recipe's.
    threads: CPU threads for training.
    precision: ``"bf16"`` trains float32 models with passes in bfloat16 (autocast), where the device is made
        for it; weights, gradients and updates stay float32, and so does evaluation.
    """

    name: str
    coordinator: str = "127.0.0.1:8443"
    identity: Path | None = None
    state: Path = Path("agent")
    clients: tuple[int, ...] = ()
    share: str | None = None
    data: Mapping[str, Any] | None = None
    device: str | None = None
    threads: int | None = None
    precision: Precision = "full"
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        if bool(self.clients) == bool(self.share):
            problem = "an agent speaks for the clients named in `clients`, or for a `share`, and not both"
            raise InputError("agent.clients", list(self.clients), problem, "set clients = [0], say")
        if self.share is not None:
            part, _, of = self.share.partition("/")
            if not (part.isdigit() and of.isdigit() and int(part) < int(of)):
                raise InputError("agent.share", self.share, "it is no share", 'write "0/4" to "3/4"')
        if min(self.clients, default=0) < 0:
            raise InputError("agent.clients", list(self.clients), "clients count from 0", "correct it")

    @property
    def seats(self) -> pb.Seats:
        """For whom it speaks."""
        if self.share is None:
            return pb.Seats(clients=self.clients)
        part, _, of = self.share.partition("/")
        return pb.Seats(share=int(part), of=int(of))


def read_config(path: Path) -> Config:
    """The configuration in a TOML file.

    Raises
    ------
    InputError
        Naming the key, its value and the remedy.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = f"it cannot be read ({error.strerror})"
        raise InputError("--config", str(path), why, "name the agent's configuration") from error
    except ValueError as error:
        raise InputError("--config", str(path), f"it is not TOML: {error}", "correct that line") from error
    policy = construct(Policy, raw.pop("policy", {}), section="policy")
    return construct(Config, raw, section="agent", fixed={"policy": policy})


@dataclass
class _Task:
    """A job under way, or an entry of the outbox that waits for its acknowledgement.

    ``evaluates`` says that the job is to score a model.
    """

    lease: bytes
    job: pb.Job | None = None
    evaluates: bool = False
    entry: Entry | None = None
    halt: Literal["", "send", "drop"] = ""
    turn: Future[Entry] | None = None  # on the bench
    runner: asyncio.Task[None] | None = None

    def halts(self, steps: int) -> bool:
        """Whether training ends here with what there is; where nobody wants that, it leaves nothing."""
        if self.halt == "drop":
            raise _Dropped
        return self.halt == "send"


class _Dropped(Exception):
    """Of training that was ended half-way: what there is must never pass for a finished job."""


class Agent:
    """One agent."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._outbox = Outbox(config.state)
        self._workshop = Workshop(
            self._outbox,
            config.policy,
            data=config.data,
            device=config.device,
            precision=config.precision,
        )
        self._bench = ThreadPoolExecutor(1, "training", self._settle_down)
        self._tasks: dict[bytes, _Task] = {}
        self._order: defaultdict[tuple[str, int], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._blobs: OrderedDict[str, asyncio.Future[bytes]] = OrderedDict()
        self._link: Link | None = None
        self._online = asyncio.Event()
        self._say: asyncio.Queue[pb.FromAgent] = asyncio.Queue()
        self._looked = -math.inf  # at the certificate
        self._told = "", -math.inf  # why it is not connected, and when that was said
        self._log = _log.bind(agent=config.name)

    def _settle_down(self) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)

    # Being there.

    async def run(self) -> None:
        """Be there, until cancelled."""
        for entry in self._outbox.entries():
            self._begin(_Task(bytes.fromhex(entry.lease), entry=entry))
        pause = _SOONEST
        try:
            while True:
                await self._quiet_hours()
                came = asyncio.get_running_loop().time()
                try:
                    reason = await self._attend()
                except grpc.aio.AioRpcError as error:
                    reason = f"{error.code().name}: {error.details()}"
                except TimeoutError:
                    reason = "the coordinator says nothing"
                except TrustError as error:
                    reason = str(error)
                finally:
                    self._online.clear()
                    self._link = None
                now = asyncio.get_running_loop().time()
                if now - came > _SLOWEST:
                    pause = _SOONEST
                self._tell_once(reason, now)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, _SLOWEST)
        finally:
            runners = [task.runner for task in self._tasks.values() if task.runner is not None]
            for task in self._tasks.values():
                task.halt = "drop"
            for runner in runners:
                runner.cancel()
            await asyncio.gather(*runners, return_exceptions=True)
            self._bench.shutdown()

    def _tell_once(self, reason: str, now: float) -> None:
        """Say why there is no connection; the same reason again only after a while."""
        told, at = self._told
        if reason != told or now >= at + _AGAIN:
            self._told = reason, now
            self._log.warning("not connected", reason=reason)

    async def _quiet_hours(self) -> None:
        told = False
        while seconds := self._config.policy.quiet(datetime.datetime.now()):
            if not told:
                self._log.info("quiet hours", seconds=round(seconds))
            told = True
            await asyncio.sleep(min(seconds, _NAP))  # the clock may be set, the machine sleep

    async def _attend(self) -> str:
        """Be connected; why that ended."""
        async with Link(self._config.coordinator, self._config.identity, self._config.name) as link:
            stream = link.attend()
            async with asyncio.timeout(_WELCOME):
                await stream.write(pb.FromAgent(hello=self._hello()))
                welcome = await stream.read()
            if welcome is grpc.aio.EOF or welcome.WhichOneof("body") != "welcome":
                return "the coordinator goes away"
            if (reason := stranger(welcome.welcome.version)) is not None:
                return reason
            self._log.info("connected", coordinator=self._config.coordinator)
            self._told = "", -math.inf
            self._link = link
            self._online.set()
            beat = max(welcome.welcome.heartbeat, 0.05)
            speaking = asyncio.create_task(self._speak(stream, beat))
            try:
                while True:
                    async with asyncio.timeout(3 * beat):
                        message = await stream.read()
                    if message is grpc.aio.EOF or message.WhichOneof("body") == "drain":
                        return "the coordinator goes away"
                    self._hear(message)
                    if await self._renewed(link):
                        return "it comes back under the new certificate"
                    if self._config.policy.quiet(datetime.datetime.now()):
                        return "quiet hours"
            finally:
                speaking.cancel()
                stream.cancel()

    async def _renewed(self, link: Link) -> bool:
        """Renew the certificate at half its life; a look at it every few minutes is enough."""
        now, folder = asyncio.get_running_loop().time(), self._config.identity
        if folder is None or now < self._looked + _LOOK:
            return False
        self._looked = now
        try:
            made = await renew_if_due(folder, link.channel, self._config.coordinator)
        except TrustError as error:  # the old one still holds
            self._log.error("the certificate could not be renewed", reason=str(error))
            return False
        if made is not None:
            self._log.info("the certificate was renewed", until=made.identity.not_after.isoformat())
        return made is not None

    async def _speak(self, stream: Any, beat: float) -> None:
        while True:
            try:
                message = await asyncio.wait_for(self._say.get(), beat)
            except TimeoutError:
                message = pb.FromAgent(heartbeat=_heartbeat())
            await stream.write(message)

    def _hello(self) -> pb.Hello:
        return pb.Hello(
            version=version(),
            seats=self._config.seats,
            device=self._config.device or f"cpu {platform.machine()}",
            memory=(self._config.policy.job_memory or 0) << 20,
            hansa=hansa.__version__,
            torch=torch.__version__,
            own=self._config.data is not None,
            holding=[lease for lease, task in self._tasks.items() if task.halt != "drop"],
        )

    def _hear(self, message: pb.ToAgent) -> None:
        match message.WhichOneof("body"):
            case "job" | "evaluation" as kind:
                job = message.job if kind == "job" else message.evaluation
                if job.lease not in self._tasks:
                    self._begin(_Task(job.lease, job=job, evaluates=kind == "evaluation"))
            case "recall":
                self._recall(message.recall)
            case _:  # pulses, and what later minor versions may say
                pass

    def _recall(self, recall: pb.Recall) -> None:
        task = self._tasks.get(recall.lease)
        if task is None:
            return
        if recall.partial:
            task.halt = task.halt or "send"
            if task.turn is not None:
                task.turn.cancel()  # unless it has come
            return
        task.halt = "drop"
        del self._tasks[recall.lease]  # the same job may be given again
        if task.runner is not None:
            task.runner.cancel()
        if task.entry is not None:  # it may have been counted meanwhile, which only the coordinator knows
            self._begin(_Task(task.lease, entry=task.entry))

    # Jobs.

    def _begin(self, task: _Task) -> None:
        self._tasks[task.lease] = task
        task.runner = asyncio.create_task(self._see_through(task))

    async def _see_through(self, task: _Task) -> None:
        """From the offer to the acknowledgement."""
        facts = task.job or task.entry
        assert facts is not None
        log = self._log.bind(run=facts.run, client=facts.client, job=facts.number)
        try:
            async with self._order[facts.run, facts.client]:  # a client's jobs go one after the other
                if task.evaluates:
                    self._say.put_nowait(pb.FromAgent(scores=await self._evaluate(task)))
                    return
                if task.entry is None:
                    task.entry = await self._train(task)
                entry = task.entry
                counted = await self._insist(lambda link: link.upload(self._outbox, entry))
                await self._settle(entry, counted=counted)
                log.info("settled", counted=counted, steps=entry.steps, loss=entry.loss)
        except asyncio.CancelledError:
            raise
        except Gone as error:
            log.warning("the coordinator refused an update", reason=str(error))
            if task.entry is not None:
                await self._settle(task.entry, counted=False)
            self._tell(task, pb.Failure.FAILED, str(error))
        except Refused as error:
            log.warning("refused by this agent's policy", reason=str(error))
            self._tell(task, pb.Failure.REFUSED, str(error))
        except HansaError as error:
            log.error("a job failed", reason=str(error))
            self._tell(task, pb.Failure.FAILED, str(error))
        except Exception as error:  # whatever training may raise
            log.exception("a job failed")
            why = f"{type(error).__name__}; this agent's log says more"  # which may quote the data
            self._tell(task, pb.Failure.FAILED, why)
        finally:
            if self._tasks.get(task.lease) is task:
                del self._tasks[task.lease]

    def _tell(self, task: _Task, kind: pb.Failure.Kind, reason: str) -> None:
        self._say.put_nowait(
            pb.FromAgent(failure=pb.Failure(lease=task.lease, kind=kind, reason=reason[:500]))
        )

    async def _settle(self, entry: Entry, *, counted: bool) -> None:
        """Until the disk takes it: the client's next job begins where an update that counted left it."""
        pause = _SOONEST
        while True:
            try:
                return self._outbox.settle(entry, counted=counted)
            except OSError as error:
                self._log.error(
                    "trying again", what="keeping what an update left", why=str(error), seconds=pause
                )
                await asyncio.sleep(pause)
                pause = min(2 * pause, _SLOWEST)

    async def _train(self, task: _Task) -> Entry:
        job, recipe, payload = await self._fetched(task)
        do = partial(self._workshop.do, job, recipe, payload, task.halts)
        if not task.halt:
            task.turn = self._bench.submit(do)
            trained = asyncio.wrap_future(task.turn)
            try:
                await asyncio.wait([trained])
            except asyncio.CancelledError:
                trained.cancel()
                if task.turn.running():  # it may be done by now, and kept
                    say = asyncio.get_running_loop().call_soon_threadsafe
                    task.turn.add_done_callback(lambda turn: say(self._done_after_all, turn))
                raise
            if not trained.cancelled():
                return trained.result()
        # Recalled before its turn: there is nothing done to send, and that does not wait for the bench.
        return await asyncio.to_thread(do)

    def _done_after_all(self, turn: Future[Entry]) -> None:
        """A job was recalled as it came to its end: what the coordinator makes of it, only it knows."""
        if turn.exception() is None and (lease := bytes.fromhex(turn.result().lease)) not in self._tasks:
            self._begin(_Task(lease, entry=turn.result()))

    async def _evaluate(self, task: _Task) -> pb.Scores:
        """If the answer is lost with its connection, the coordinator asks again."""
        job, recipe, payload = await self._fetched(task)
        made = await asyncio.get_running_loop().run_in_executor(
            self._bench, self._workshop.evaluate, job, recipe, payload
        )
        return pb.Scores(lease=task.lease, examples=made.examples, loss=made.loss, accuracy=made.accuracy)

    async def _fetched(self, task: _Task) -> tuple[pb.Job, bytes, bytes]:
        """A job, its recipe and its model."""
        job = task.job
        assert job is not None
        return job, await self._blob(job, job.recipe), await self._blob(job, job.payload)

    async def _blob(self, job: pb.Job, blob: pb.Blob) -> bytes:
        """A recipe or a model: fetched once, however many jobs name it, unless it came with the job."""
        if blob.data:
            if hashlib.sha256(blob.data).hexdigest() != blob.digest:
                raise Gone("what the coordinator sent is not what it announced")
            return blob.data
        while True:
            known = self._blobs.get(blob.digest)
            mine = known is None or (known.done() and (known.cancelled() or known.exception() is not None))
            if known is None or mine:
                fetching = self._insist(lambda link: link.download(job.lease, blob))
                known = self._blobs[blob.digest] = asyncio.ensure_future(fetching)
            self._blobs.move_to_end(blob.digest)
            while len(self._blobs) > _BLOBS:
                self._blobs.popitem(last=False)
            try:
                return await asyncio.shield(known)
            except Gone:  # of the job for which it was fetched, which may not be this one
                if mine:
                    raise

    async def _insist(self, call: Callable[[Link], Awaitable[T]]) -> T:
        """A call on whatever connection there is, until it is answered or refused for good."""
        pause = _SOONEST
        while True:
            await self._online.wait()
            link = self._link
            assert link is not None
            try:
                return await call(link)
            except Later:
                if self._link is link:  # over a new connection it is tried at once
                    await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                    pause = min(2 * pause, _SLOWEST)


def _heartbeat() -> pb.Heartbeat:
    """How the battery stands, where there is one."""
    try:
        battery = psutil.sensors_battery()
    except OSError:  # a kernel that knows of no power supply
        battery = None
    if battery is None:
        return pb.Heartbeat()
    return pb.Heartbeat(battery=battery.percent / 100, mains=bool(battery.power_plugged))


async def attend(config: Config) -> None:
    """Run an agent until SIGTERM or SIGINT."""
    task = asyncio.create_task(Agent(config).run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
