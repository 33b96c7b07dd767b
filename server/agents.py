"""The service that agents call: attendance, downloads, uploads.

An update passes, in this order: whose it is (lease, seat), whether it was sent before, what it says it is
(manifest), room (permit), its bytes as they come, their digest, their contents; then it is an event. Each
refusal has a status of its own and a line in the log, and leaves no trace in the run.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NoReturn, TypeVar

import grpc
import numpy as np
import structlog

from hansa.core.trees import Tree
from hansa.core.trust.identity import Identity
from hansa.core.wire import INLINE, PIECE, stranger, version
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.federation_pb2_grpc import AgentsServicer
from hansa.core.wire.tensors import Malformed, Packed, require_alike, size_limit, unpack
from hansa.server import patience
from hansa.server.crash import point
from hansa.server.evaluation import PHASE
from hansa.server.figures import FIGURES
from hansa.server.jobs import Open
from hansa.server.leases import Lease, read_lease
from hansa.server.limits import Account, Accounts, Limits
from hansa.server.office import Office
from hansa.server.past import Past
from hansa.server.patience import Over
from hansa.server.pieces import Piece
from hansa.server.reception import Reception
from hansa.server.roster import Roster
from hansa.server.runs import Run
from hansa.server.trust import caller

Context = grpc.aio.ServicerContext[Any, Any]
Code = grpc.StatusCode
A = TypeVar("A")
B = TypeVar("B")

_LOSS = float(np.finfo(np.float32).max)  # of a client, so that a mean over all of them is a number
_EVALUATES = 2  # minor version of the protocol from which on agents evaluate

_log = structlog.get_logger(__name__)


class Attendant:
    """An agent whose stream is open."""

    def __init__(self, who: Identity, hello: pb.Hello, roster: Roster) -> None:
        self.name, self.serial, self.hello, self._roster = who.name, who.serial, hello, roster
        self.own = hello.own
        self.out: asyncio.Queue[pb.ToAgent | None] = asyncio.Queue()  # None: it ends
        self._holding = {bytes(each) for each in hello.holding}

    def clients(self, population: int) -> Sequence[int]:
        """The clients of a run that it speaks for."""
        seats = self.hello.seats
        if seats.of:
            return range(seats.share % seats.of, population, seats.of)
        return sorted({each for each in seats.clients if each < population})

    def push(self, run: Run, job: Open) -> None:
        """Give it a job, unless it has it."""
        lease = run.lease(job)
        if lease in self._holding:
            return
        if job.phase == PHASE and self.hello.version.minor < _EVALUATES:
            run.hear("scored", client=job.client, body=_unknown(job.number))
            return
        self._holding.add(lease)
        message = pb.Job(
            lease=lease,
            run=run.id,
            client=job.client,
            number=job.number,
            phase=job.phase,
            recipe=pb.Blob(digest=run.recipe_digest, size=len(run.recipe_blob)),
            payload=_blob(job.packed),
            tensors=job.packed.tensors,
            some=job.keys is not None,
            keys=sorted(job.keys or ()),
            clients=run.federation.clients,
            undone=run.machine.undone.get(job.client),
        )
        self.out.put_nowait(pb.ToAgent(evaluation=message) if job.phase == PHASE else pb.ToAgent(job=message))
        self._roster.given(self.name, message)
        FIGURES.jobs.inc()

    def recall(self, run: Run, job: Open, partial: bool) -> None:
        """End a job of it."""
        lease = run.lease(job)
        if not partial:
            self._holding.discard(lease)
            self._roster.over(self.name, lease)
        self.out.put_nowait(pb.ToAgent(recall=pb.Recall(lease=lease, partial=partial)))

    def drop(self, lease: bytes, *, failed: bool = True) -> None:
        """It could not do that job, or has done it."""
        self._holding.discard(lease)
        self._roster.over(self.name, lease, failed=failed)


class Agents(AgentsServicer):
    """See the module. ``office`` knows the runs and who is there."""

    def __init__(self, office: Office, limits: Limits) -> None:
        self._office, self._limits = office, limits
        self._permits = asyncio.Semaphore(limits.uploads)
        self._accounts = Accounts(limits)
        self._under_way: set[Lease] = set()

    def gauge(self, sample: pb.Sample) -> None:
        """Fill in what uploads are doing now."""
        sample.uploads = min(len(self._under_way), self._limits.uploads)
        sample.uploads_waiting = len(self._under_way) - sample.uploads

    # Attendance.

    async def Attend(self, request_iterator: AsyncIterator[pb.FromAgent], context: Context) -> None:  # noqa: N802
        """Be there: jobs and recalls go out as they are ordered."""
        name = caller().identity.name
        await self._admit(context, name)
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("body") != "hello":
            await self._refuse(context, Code.FAILED_PRECONDITION, name, "an agent says hello first")
        hello = first.hello
        if (reason := stranger(hello.version)) is not None:
            await self._refuse(context, Code.FAILED_PRECONDITION, name, reason)
        if len(hello.holding) > 100_000 or hello.seats.of > 1_000_000 or len(hello.seats.clients) > 100_000:
            await self._refuse(context, Code.INVALID_ARGUMENT, name, "the hello is too long")
        hello.device, hello.hansa, hello.torch = map(_printable, (hello.device, hello.hansa, hello.torch))
        attendant = Attendant(caller().identity, hello, self._office.roster)
        attendant.out.put_nowait(
            pb.ToAgent(welcome=pb.Welcome(version=version(), heartbeat=self._limits.heartbeat, name=name))
        )
        self._office.enter(attendant)
        listening = asyncio.create_task(self._listen(request_iterator, attendant))
        listening.add_done_callback(lambda _: attendant.out.put_nowait(None))
        try:
            while (message := await attendant.out.get()) is not None:
                await context.write(message)
            if not listening.done():
                await self._refuse(context, Code.ABORTED, name, "another agent of this name came")
            listening.result()
        except TimeoutError:
            await self._refuse(context, Code.DEADLINE_EXCEEDED, name, "three heartbeats were missed")
        finally:
            listening.cancel()
            self._office.leave(attendant)

    async def _listen(self, requests: AsyncIterator[pb.FromAgent], attendant: Attendant) -> None:
        messages, account = aiter(requests), self._accounts.of(attendant.name)
        while True:
            try:
                async with asyncio.timeout(3 * self._limits.heartbeat):
                    message = await anext(messages)
            except StopAsyncIteration:
                return
            while (wait := account.spend()) > 0:  # what it says meanwhile waits on its side
                if account.tell():
                    _log.warning("heard more slowly", agent=attendant.name, why=self._too_fast)
                await asyncio.sleep(wait)
            match message.WhichOneof("body"):
                case "heartbeat":
                    FIGURES.heartbeats.inc()
                    self._office.roster.heard(attendant.name, message.heartbeat)
                    if attendant.out.empty():  # another message is as good a sign of life
                        attendant.out.put_nowait(pb.ToAgent(pulse=pb.Pulse()))
                case "failure":
                    self._fail(attendant, message.failure)
                case "scores":
                    self._score(attendant, message.scores)
                case _:  # progress, and what later minor versions may say
                    pass

    def _held(self, attendant: Attendant, lease: bytes) -> tuple[Run, Lease] | None:
        """The run of a lease that this agent was given, if it goes on."""
        claim = read_lease(lease)
        run = self._office.run(claim.run) if claim else None
        if claim is None or not isinstance(run, Run) or not run.honours(lease, claim):
            return None
        return (run, claim) if run.holder(claim.client) == attendant.name else None

    def _fail(self, attendant: Attendant, failure: pb.Failure) -> None:
        found = self._held(attendant, failure.lease)
        if found is None:
            return
        run, claim = found
        attendant.drop(failure.lease)
        again = failure.kind != pb.Failure.REFUSED
        reason = _printable(failure.reason)
        _log.warning(
            "a job failed", run=run.id, client=claim.client, agent=attendant.name, reason=reason, again=again
        )
        if claim.what:
            self._say(run, claim, _unknown(claim.number))
            return
        if run.job(claim) is None:
            return
        run.hear(
            "failed",
            client=claim.client,
            body={"number": claim.number, "reason": reason, "again": again},
        )

    def _score(self, attendant: Attendant, scores: pb.Scores) -> None:
        found = self._held(attendant, scores.lease)
        if found is None or not found[1].what:
            return
        run, claim = found
        attendant.drop(scores.lease, failed=False)
        right = scores.accuracy if scores.HasField("accuracy") else None
        body = {
            "round": claim.number,
            "examples": scores.examples,
            "loss": scores.loss,
            "accuracy": right,
        }
        if (
            scores.examples > self._limits.examples
            or not abs(scores.loss) <= _LOSS
            or (right is not None and not 0 <= right <= scores.examples)
        ):
            self._office.roster.refused(attendant.name)
            FIGURES.refused.labels(Code.INVALID_ARGUMENT.name).inc()
            why = "scores that cannot be right"
            _log.warning("refused", agent=attendant.name, why=why, run=run.id, **body)
            body = _unknown(claim.number)
        self._say(run, claim, body)

    @staticmethod
    def _say(run: Run, claim: Lease, body: dict[str, Any]) -> None:
        if run.job(claim) is not None:
            run.hear("scored", client=claim.client, body=body)

    # Downloads.

    async def Download(self, request: pb.Wanted, context: Context) -> None:  # noqa: N802
        """What an open job names, and nothing else."""
        name = caller().identity.name
        await self._admit(context, name)
        run, job, _ = await self._open_job(request.lease, name, context)
        if not isinstance(run, Run) or job is None:
            await self._refuse(context, Code.FAILED_PRECONDITION, name, "the job is over", run=run.id)
        if request.digest == run.recipe_digest:
            data = run.recipe_blob
        elif request.digest == job.packed.digest:
            data = job.packed.data
        else:
            await self._refuse(context, Code.NOT_FOUND, name, "the job names no such blob", run=run.id)
        for offset in range(request.offset, len(data), PIECE):
            await context.write(pb.Piece(offset=offset, data=data[offset : offset + PIECE]))
        FIGURES.bytes_down.inc(max(len(data) - request.offset, 0))

    async def _open_job(
        self, lease: bytes, name: str, context: Context
    ) -> tuple[Run | Past, Open | None, Lease]:
        """The run and the job of a lease, after all that can be wrong with one."""
        claim = read_lease(lease)
        run = self._office.run(claim.run) if claim else None
        if claim is None or run is None or not run.honours(lease, claim):
            await self._refuse(context, Code.PERMISSION_DENIED, name, "this lease was not given here")
        if await self._asked(context, name, run, run.holder, claim.client) != name:
            await self._refuse(
                context, Code.PERMISSION_DENIED, name, "this lease is another agent's", run=run.id
            )
        return run, run.job(claim) if isinstance(run, Run) else None, claim

    async def _asked(
        self, context: Context, name: str, run: Run | Past, question: Callable[[A], B], argument: A
    ) -> B:
        """A question to a run; for one that is past, the answer is in the database."""
        if isinstance(run, Run):
            return question(argument)
        try:
            return await asyncio.to_thread(question, argument)
        except patience.PASSING as error:
            why = f"the event log cannot be read now ({patience.reason(error)}); try again later"
            await self._refuse(context, Code.UNAVAILABLE, name, why, run=run.id)

    # Uploads.

    async def Upload(self, request_iterator: AsyncIterator[pb.UploadRequest], context: Context) -> None:  # noqa: N802
        """Manifest in, permit out, pieces in, acknowledgement out."""
        name = caller().identity.name
        account = await self._admit(context, name)
        first = await self._next(context, name)
        if isinstance(first, Piece) or first.WhichOneof("body") != "manifest":
            await self._refuse(context, Code.FAILED_PRECONDITION, name, "a manifest comes first")
        manifest = first.manifest
        run, job, claim = await self._open_job(manifest.lease, name, context)
        if claim.what:
            await self._refuse(context, Code.FAILED_PRECONDITION, name, "this lease is of an evaluation")
        before = await self._asked(context, name, run, run.accepted, claim)
        if before is not None:
            digest, counted = before
            if digest != manifest.update.digest:
                await self._refuse(
                    context, Code.ALREADY_EXISTS, name, "another update of this job was accepted", run=run.id
                )
            await context.write(_acknowledge(counted))
            return
        if not isinstance(run, Run) or job is None:
            await context.write(_acknowledge(False))
            return
        if (problem := self._wrong(manifest, job)) is not None:
            self._spoilt(run, job, name, problem)
            await self._refuse(context, Code.INVALID_ARGUMENT, name, problem, run=run.id, client=job.client)
        if claim in self._under_way:
            await self._refuse(context, Code.ABORTED, name, "this upload is under way", run=run.id)
        if len(self._under_way) >= self._limits.waiting:
            await self._refuse(context, Code.RESOURCE_EXHAUSTED, name, "too many uploads wait", run=run.id)
        if account.uploads >= self._limits.agent_uploads + self._limits.agent_waiting:
            why = f"{account.uploads} uploads of this agent are under way or wait; no more at a time"
            await self._refuse(context, Code.RESOURCE_EXHAUSTED, name, why, say=account.tell(), run=run.id)
        self._under_way.add(claim)
        account.uploads += 1
        try:
            data, tree = await self._take(context, name, run, job, manifest)
            verdict = await run.tell(
                "update",
                client=job.client,
                number=job.number,
                body={
                    "digest": manifest.update.digest,
                    "examples": manifest.examples,
                    "steps": manifest.steps,
                    "loss": manifest.loss if manifest.has_loss else None,
                    "agent": name,
                },
                data=data,
                tree=tree,
            )
        except OSError as error:
            why = f"the coordinator's disk takes nothing now ({error.strerror}); send it again later"
            await self._refuse(context, Code.RESOURCE_EXHAUSTED, name, why, run=run.id)
        except Over:
            await self._refuse(context, Code.UNAVAILABLE, name, "this coordinator ends", run=run.id)
        finally:
            self._under_way.discard(claim)
            account.uploads -= 1
        point("before-ack")
        self._office.roster.sent(name, manifest, counted=verdict == "counted")
        FIGURES.updates.labels(verdict).inc()
        FIGURES.bytes_up.inc(manifest.update.size)
        await context.write(_acknowledge(verdict == "counted"))

    def _wrong(self, manifest: pb.Manifest, job: Open) -> str | None:
        """What is wrong with a manifest."""
        limits = self._limits
        try:
            require_alike(manifest.tensors, job.expected)
        except Malformed as error:
            return str(error)
        most = min(size_limit(job.expected), limits.update)
        digest = manifest.update.digest
        if not 0 < manifest.update.size <= most:
            return f"an update of {manifest.update.size} bytes; at most {most} can be right"
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            return "the digest is no SHA-256"
        if not 0 < manifest.examples <= limits.examples:
            return f"{manifest.examples} examples; 1 to {limits.examples} are believed"
        if manifest.steps > limits.steps:
            return f"{manifest.steps} steps; at most {limits.steps} are believed"
        if not abs(manifest.loss) <= _LOSS:
            return "the loss is not finite in single precision"
        return None

    async def _take(
        self,
        context: Context,
        name: str,
        run: Run,
        job: Open,
        manifest: pb.Manifest,
    ) -> tuple[bytes | None, Tree | None]:
        """Take the bytes and check them: those of the manifest, or pieces, which then are an artefact.

        Returns the bytes in the first case, and the tensors if they may stay in memory.
        """
        data = manifest.update.data
        try:
            if 0 < len(data) == manifest.update.size <= self._limits.inline:
                point("after-pieces")
                if hashlib.sha256(data).hexdigest() != manifest.update.digest:
                    raise _Damaged
                return data, unpack(data, job.expected)
            async with self._accounts.of(name).permits, self._permits:
                return None, await self._receive(context, name, run, job, manifest)
        except _Damaged:  # on its way: it may be sent again
            await self._refuse(context, Code.DATA_LOSS, name, str(_Damaged()), run=run.id)
        except Malformed as error:
            self._spoilt(run, job, name, str(error))
            await self._refuse(
                context, Code.INVALID_ARGUMENT, name, str(error), run=run.id, client=job.client
            )

    async def _receive(
        self,
        context: Context,
        name: str,
        run: Run,
        job: Open,
        manifest: pb.Manifest,
    ) -> Tree | None:
        """Let the pieces come into an artefact, and check them."""
        digest, size = manifest.update.digest, manifest.update.size
        reception = self._office.artefacts.receive(run.id, f"{job.client}-{job.number}", digest, size)
        try:
            if reception.away:
                await asyncio.to_thread(reception.open)
            await context.write(pb.UploadReply(permit=pb.Permit(offset=reception.offset)))
            while reception.offset < size:
                piece = await self._next(context, name)
                if not isinstance(piece, Piece) or piece.offset != reception.offset:
                    await self._refuse(
                        context, Code.FAILED_PRECONDITION, name, "a piece is out of order", run=run.id
                    )
                if not piece.data or piece.offset + len(piece.data) > size:
                    reception.discard()
                    await self._refuse(
                        context, Code.INVALID_ARGUMENT, name, "more bytes than the manifest said", run=run.id
                    )
                if reception.take(piece.data):
                    await asyncio.to_thread(reception.write)
            point("after-pieces")
            tree = await asyncio.to_thread(self._keep, reception, job)
        except BaseException:
            wanted = run.job(Lease(run.id, job.client, job.number)) is not None
            (reception.pause if wanted else reception.discard)()
            raise
        point("after-rename")
        return tree

    @staticmethod
    def _keep(reception: Reception, job: Open) -> Tree | None:
        try:
            if not reception.whole():
                raise _Damaged
            tree = reception.check(job.expected)
        except Malformed:
            reception.discard()
            raise
        reception.keep()
        return tree

    async def _next(self, context: Context, name: str) -> pb.UploadRequest | Piece:
        try:
            async with asyncio.timeout(self._limits.patience):
                message: pb.UploadRequest | Piece | Any = await context.read()
        except TimeoutError:
            await self._refuse(context, Code.DEADLINE_EXCEEDED, name, "the next piece took too long")
        if message is grpc.aio.EOF:
            await self._refuse(context, Code.INVALID_ARGUMENT, name, "the upload ended too soon")
        assert isinstance(message, pb.UploadRequest | Piece)
        return message

    def _spoilt(self, run: Run, job: Open, name: str, problem: str) -> None:
        """A job whose update can never be right has failed."""
        worker = run.workers.get(job.client)
        if isinstance(worker, Attendant):
            worker.drop(run.lease(job))
        run.hear(
            "failed",
            client=job.client,
            body={
                "number": job.number,
                "reason": f"the update of {name} was refused: {problem}",
                "again": True,
            },
        )

    async def _admit(self, context: Context, name: str) -> Account:
        """An agent's account, if there is a call left on it."""
        account = self._accounts.of(name)
        if (wait := account.spend()) > 0:
            why = f"{self._too_fast}; the next one in {wait:.2g} s"
            await self._refuse(context, Code.RESOURCE_EXHAUSTED, name, why, say=account.tell())
        return account

    @property
    def _too_fast(self) -> str:
        return f"an agent may make {self._limits.agent_rate:g} calls a second"

    async def _refuse(
        self, context: Context, code: Code, name: str, why: str, *, say: bool = True, **facts: object
    ) -> NoReturn:
        """``say`` it in the log, too."""
        why = _printable(why)
        self._office.roster.refused(name)
        FIGURES.refused.labels(code.name).inc()
        if say:
            _log.warning("refused", agent=name, status=code.name, why=why, **facts)
        await context.abort(code, why)
        raise AssertionError


class _Damaged(Malformed):
    """Bytes that changed on their way."""

    def __init__(self) -> None:
        super().__init__("the bytes are not those of the digest")


def _unknown(version: int) -> dict[str, Any]:
    """Of a client that cannot tell how a model does."""
    return {"round": version, "examples": 0, "loss": 0.0, "accuracy": None}


def _blob(packed: Packed) -> pb.Blob:
    size = len(packed.data)
    return pb.Blob(digest=packed.digest, size=size, data=packed.data if size <= INLINE else b"")


def _printable(text: str) -> str:
    """Text of somebody else for a log, a database and a terminal."""
    return "".join(each if each.isprintable() else " " for each in text[:500])


def _acknowledge(counted: bool) -> pb.UploadReply:
    return pb.UploadReply(acknowledgement=pb.Acknowledgement(counted=counted))
