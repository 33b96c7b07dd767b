"""The service that people and their programs call: submit, list, watch, stop, resume, download."""

from __future__ import annotations

import asyncio
import json
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import grpc
import structlog

from hansa.core.errors import HansaError, StorageError
from hansa.core.questions import answer
from hansa.core.store import RunStore, RunSummary
from hansa.core.wire import PIECE
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.federation_pb2_grpc import ControlServicer
from hansa.server.figures import Condition
from hansa.server.office import Office
from hansa.server.past import Past
from hansa.server.patience import Over
from hansa.server.runs import Run
from hansa.server.trust import caller

Context = grpc.aio.ServicerContext[Any, Any]
Code = grpc.StatusCode

_log = structlog.get_logger(__name__)


class Control(ControlServicer):
    """See the module."""

    def __init__(self, office: Office, folder: Path, condition: Condition) -> None:
        self._office, self._folder, self._condition = office, folder, condition
        self._summaries: dict[str, RunSummary] = {}  # of runs that have ended

    async def Submit(self, request: pb.Submission, context: Context) -> pb.RunStatus:  # noqa: N802
        """Start a run."""
        who = caller().identity.name
        try:
            run = await self._office.submit(request.recipe, request.wait_for, request.key, owner=who)
        except (StorageError, Over) as error:
            await _abort(context, Code.UNAVAILABLE, str(error))
        except HansaError as error:
            await _abort(context, Code.INVALID_ARGUMENT, str(error))
        _log.info("submitted", run=run.id, by=who)
        return await self._status(run)

    async def List(self, request: pb.ListRequest, context: Context) -> pb.RunList:  # noqa: N802
        """All runs, the oldest first."""
        mine = [run for run in self._office.runs() if caller().may_see(run.owner)]
        return pb.RunList(runs=[await self._status(run) for run in mine])

    async def Watch(self, request: pb.WatchRequest, context: Context) -> None:  # noqa: N802
        """Rounds as they are made, then the end."""
        run = await self._any(request.id, context)
        if not isinstance(run, Run):
            try:
                rounds = await asyncio.to_thread(run.told)
            except HansaError as error:  # its directory was removed
                await _abort(context, Code.NOT_FOUND, str(error))
            for done in rounds:
                if done.index > request.after:
                    await context.write(pb.Happening(round=done))
            await context.write(pb.Happening(end=await self._status(run)))
            return
        news = asyncio.Event()
        news.set()
        run.watchers.add(news)
        told = 0
        try:
            while True:
                await news.wait()
                news.clear()
                active = run.active
                for done in run.told[told:]:
                    if done.index > request.after:
                        await context.write(pb.Happening(round=done))
                    told += 1
                if not active:
                    await context.write(pb.Happening(end=await self._status(run)))
                    return
        finally:
            run.watchers.discard(news)

    async def Stop(self, request: pb.RunName, context: Context) -> pb.RunStatus:  # noqa: N802
        """Interrupt a run."""
        run = await self._live(request.id, context)
        await asyncio.shield(run.stop())
        _log.info("stopped", run=run.id, by=caller().identity.name)
        return await self._status(run)

    async def Resume(self, request: pb.RunName, context: Context) -> pb.RunStatus:  # noqa: N802
        """Go on with an interrupted run."""
        run = await self._live(request.id, context)
        try:
            await asyncio.shield(self._office.resume(run))
        except HansaError as error:
            await _abort(context, Code.FAILED_PRECONDITION, str(error))
        _log.info("resumed", run=run.id, by=caller().identity.name)
        return await self._status(run)

    async def Model(self, request: pb.RunName, context: Context) -> None:  # noqa: N802
        """The final model, or the newest."""
        found = await self._any(request.id, context)
        path = self._folder / found.id / "model.safetensors"
        if path.is_file():
            model: BinaryIO = path.open("rb")
        elif isinstance(found, Run):
            model = BytesIO((await found.newest()).data)
        else:
            await _abort(context, Code.NOT_FOUND, f"{found.id}: it ended without a model")
        with model:  # a piece at a time: many may ask, and be slow to listen
            while data := await asyncio.to_thread(model.read, PIECE):
                await context.write(pb.Piece(offset=model.tell() - len(data), data=data))

    async def Ask(self, request: pb.Question, context: Context) -> pb.Answer:  # noqa: N802
        """What a run's record answers."""
        found = await self._any(request.run, context)
        try:
            told = await asyncio.to_thread(
                answer, self._folder / found.id, request.name, request.arguments or "{}"
            )
        except HansaError as error:
            await _abort(context, Code.INVALID_ARGUMENT, str(error))
        return pb.Answer(json=json.dumps(told))

    async def Roster(self, request: pb.RosterRequest, context: Context) -> None:  # noqa: N802
        """The agents, by name, with their jobs in runs that the caller may see."""
        hidden = {run.id for run in self._office.runs() if not caller().may_see(run.owner)}
        caller().may_see("")  # there may be no run, and then there is nothing to hide
        for agent in self._office.roster:
            for job in agent.jobs:
                if job.run in hidden:
                    job.run = ""
            await context.write(agent)

    async def Condition(self, request: pb.ConditionRequest, context: Context) -> pb.ConditionReply:  # noqa: N802
        """How the coordinator stands."""
        return self._condition.reply(request.after)

    async def _status(self, run: Run | Past) -> pb.RunStatus:
        status = pb.RunStatus(
            id=run.id,
            status=run.status,
            reason=run.reason,
            directory=str(self._folder / run.id),
            owner=run.owner,
        )
        if isinstance(run, Run):
            status.rounds = run.machine.hub.state.version
            status.clients, status.present = run.federation.clients, len(run.workers)
            status.planned, status.open = run.federation.recipe.stop.rounds, run.open
        else:
            status.rounds, status.clients, status.planned = run.rounds, run.clients, run.planned
        summary = self._summaries.get(run.id)
        if summary is None:
            summary = await asyncio.to_thread(_summary, self._folder / run.id)
        if summary is None:  # its directory was removed
            return status
        if run.status in ("finished", "failed"):
            self._summaries[run.id] = summary
        status.name, status.algorithm, status.seed = summary.name, summary.algorithm, str(summary.seed)
        status.started = summary.started.timestamp() if summary.started else 0.0
        status.rounds = status.rounds or summary.rounds
        status.time, status.bytes_up, status.bytes_down = summary.time, summary.bytes_up, summary.bytes_down
        if summary.accuracy is not None and summary.best_accuracy is not None:
            status.accuracy, status.best_accuracy = summary.accuracy, summary.best_accuracy
        return status

    async def _live(self, id: str, context: Context) -> Run:
        run = await self._any(id, context)
        if not isinstance(run, Run):
            await _abort(context, Code.FAILED_PRECONDITION, f"{run.id}: this run is {run.status}")
        return run

    async def _any(self, id: str, context: Context) -> Run | Past:
        found = self._office.run(id)
        if found is not None:
            caller().owns(found.owner, f"run {id}")
            return found
        return await _abort(context, Code.NOT_FOUND, "there is no such run")


def _summary(directory: Path) -> RunSummary | None:
    try:
        with RunStore.open(directory) as store:
            return store.summary()
    except HansaError:
        return None


async def _abort(context: Context, code: Code, why: str) -> NoReturn:
    await context.abort(code, why)
    raise AssertionError
