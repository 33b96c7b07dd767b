"""How a run ends while messages come: what is told then is what the log says for good."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from floor import small, until

from hansa.core.errors import RunError
from hansa.core.wire.tensors import pack, unpack
from hansa.server import runs
from hansa.server.artefacts import Artefacts
from hansa.server.events import Event, EventLog, RunRow, Snapshot
from hansa.server.jobs import Open
from hansa.server.leases import Lease
from hansa.server.machine import Effects, Verdict
from hansa.server.past import Past
from hansa.server.runs import Run
from hansa.strategies.catalog import assemble


class Agent:
    """Has all clients, and does with a job what ``do`` says."""

    name, own = "agent", False

    def __init__(self, do: Callable[[Run, Open], object]) -> None:
        self._do = do

    def push(self, run: Run, job: Open) -> None:
        self._do(run, job)

    def recall(self, run: Run, job: Open, partial: bool) -> None:
        pass


async def send(run: Run, job: Open) -> Verdict:
    packed = pack({each.name: torch.zeros(*each.shape, dtype=torch.float64) for each in job.expected})
    body = {"digest": packed.digest, "examples": 3, "steps": 1, "loss": 0.5, "agent": "agent"}
    tree = unpack(packed.data, job.expected)
    return await run.tell(
        "update", client=job.client, number=job.number, body=body, data=packed.data, tree=tree
    )


@asynccontextmanager
async def running(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **sections: Mapping[str, Any]
) -> AsyncIterator[tuple[Run, EventLog, asyncio.Event]]:
    """A run over a disk that takes 10 ms, and whether it is over."""
    recipe, artefacts = small(**sections), Artefacts(folder / "artefacts")
    log = EventLog(f"sqlite:///{folder / 'log.db'}", before=artefacts.settle)
    row = RunRow(
        id="r", key=None, owner="u", recipe=recipe.toml(), secret=b"s" * 32, wait_for=0, status="waiting"
    )
    log.submit(row)
    append, over = log.append, asyncio.Event()

    async def slow(run: str, events: Sequence[Event]) -> None:
        await asyncio.sleep(0.01)
        await append(run, events)

    monkeypatch.setattr(log, "append", slow)
    (folder / "r").mkdir()
    run = Run(row, assemble(recipe), folder / "r", log, artefacts)
    run.start(lambda _: over.set())
    try:
        yield run, log, over
    finally:
        await run.end()
        await log.stop()
        log.close()


def test_a_run_ends_however_much_is_said_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        sent: list[asyncio.Task[Verdict]] = []
        agent = Agent(lambda run, job: sent.append(asyncio.create_task(send(run, job))))
        async with running(tmp_path, monkeypatch, stop={"rounds": 1}) as (run, log, over):

            async def chatter() -> None:
                while not over.is_set():
                    run.hear("failed", client=0, body={"number": 10**6, "reason": "chatter", "again": True})
                    await asyncio.sleep(0.002)

            run.arrive(agent, range(6))
            chattering = asyncio.create_task(chatter())
            await asyncio.wait_for(over.wait(), 20)
            await chattering
            assert run.status == "finished"
            assert "counted" in await asyncio.gather(*sent)
            assert len(log.events("r")) == run.machine.seq

    asyncio.run(scene())


def test_who_is_told_late_by_a_run_that_fails_was_late_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One update is on its way to the disk while the one before makes the run fail."""

    async def scene() -> None:
        jobs: list[Open] = []
        fails = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with running(tmp_path, monkeypatch) as (run, log, over):
            apply = run.machine.apply

            def failing(event: Event) -> Effects:
                if event.kind != "update":
                    return apply(event)
                loop.call_soon_threadsafe(fails.set)
                while not run._inbox.unapplied:  # until the other one has a number
                    pass
                raise RuntimeError("a step that fails")

            monkeypatch.setattr(run.machine, "apply", failing)
            run.arrive(Agent(lambda _, job: jobs.append(job)), range(6))
            while len(jobs) < 2:
                await asyncio.sleep(0.01)
            first = asyncio.create_task(send(run, jobs[0]))
            await fails.wait()
            second = asyncio.create_task(send(run, jobs[1]))
            await asyncio.wait_for(over.wait(), 20)
            assert (await first, await second) == ("counted", "late")
            assert run.status == "failed"
            past = Past(run.row(), run.directory, log)
            for job, counted in zip(jobs[:2], (True, False), strict=True):
                accepted = past.accepted(Lease("r", job.client, job.number, ""))
                assert accepted is not None
                assert accepted[1] is counted

    asyncio.run(scene())


def test_a_run_that_fails_in_the_middle_of_a_batch_ends_without_another_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        jobs: list[Open] = []
        async with running(tmp_path, monkeypatch) as (run, log, over):
            apply = run.machine.apply

            def failing(event: Event) -> Effects:
                if event.kind == "update":
                    raise RuntimeError("a step that fails")
                return apply(event)

            monkeypatch.setattr(run.machine, "apply", failing)
            run.arrive(Agent(lambda _, job: jobs.append(job)), range(6))
            await until(lambda: len(jobs) == 4)
            sent = [asyncio.create_task(send(run, job)) for job in jobs[:2]]
            await asyncio.wait_for(over.wait(), 20)
            assert await asyncio.gather(*sent) == ["counted", "late"]
            assert run.status == "failed"
            past = Past(run.row(), run.directory, log)
            assert past.accepted(Lease("r", jobs[1].client, jobs[1].number)) is not None

    asyncio.run(scene())


def test_a_run_whose_event_no_database_takes_has_failed_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        jobs: list[Open] = []
        async with running(tmp_path, monkeypatch) as (run, log, over):
            run.arrive(Agent(lambda _, job: jobs.append(job)), range(6))
            while not jobs:
                await asyncio.sleep(0.01)

            async def refused(run: str, events: Sequence[Event]) -> None:
                raise OverflowError("a number that no column holds")

            monkeypatch.setattr(run._inbox, "_append", functools.partial(refused, "r"))
            sent = asyncio.create_task(send(run, jobs[0]))
            await asyncio.wait_for(over.wait(), 20)
            assert await sent == "late"
            assert (run.status, run.reason) == ("failed", "a number that no column holds")
            assert not [each for each in log.events("r") if each.kind == "update"]

    asyncio.run(scene())


def test_the_clock_of_a_run_that_is_stopped_stands_whatever_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        now = 1000.0
        monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: now))
        given: list[Open] = []
        async with running(tmp_path, monkeypatch) as (run, log, _):
            run.arrive(Agent(lambda _, job: given.append(job)), range(6))
            await until(lambda: len(given) == 4)
            now += 5.0
            await run.stop()
            now += 3600.0
            assert await send(run, given[0]) == "counted"
            coming = asyncio.create_task(send(run, given[1]))
            await run.resume()
            now += 7.0
            await coming
            assert await send(run, given[2]) == "counted"
            at = [each.at for each in log.events("r") if each.kind in ("stopped", "update", "resumed")]
            assert at == pytest.approx([5.0, 5.0, *at[2:4], 12.0])
            assert max(at[2:4]) < 13.0

    asyncio.run(scene())


def test_a_run_that_fails_as_it_is_stopped_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record waits for the disk when the next event turns out to be too much."""

    async def scene() -> None:
        jobs: list[Open] = []
        stopping, failing, disk = threading.Event(), asyncio.Event(), threading.Event()
        async with running(tmp_path, monkeypatch) as (run, log, over):
            apply, finish, fail = run.machine.apply, run._store.finish, run._fail

            def broken(event: Event) -> Effects:
                if event.kind == "update":
                    raise RuntimeError("a step that fails")
                return apply(event)

            def slow(status: Any, *why: str) -> None:
                if status == "interrupted":
                    stopping.set()
                    disk.wait()
                finish(status, *why)

            async def noting(error: BaseException) -> None:
                failing.set()
                await fail(error)

            monkeypatch.setattr(run.machine, "apply", broken)
            monkeypatch.setattr(run._store, "finish", slow)
            monkeypatch.setattr(run, "_fail", noting)
            run.arrive(Agent(lambda _, job: jobs.append(job)), range(6))
            await until(lambda: bool(jobs))
            stopped = asyncio.create_task(run.stop())
            await until(stopping.is_set)
            sent = asyncio.create_task(send(run, jobs[0]))
            await failing.wait()
            await asyncio.wait([asyncio.create_task(over.wait())], timeout=0.3)
            disk.set()
            await asyncio.gather(stopped, sent, over.wait())
            assert (run.status, run.reason) == ("failed", "a step that fails")
            (row,) = log.runs()
            assert row.status == "failed"
            with pytest.raises(RunError, match="this run is failed"):
                await run.resume()

    asyncio.run(scene())


def test_a_run_that_is_never_idle_keeps_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a restart would replay all of its log."""

    async def scene() -> None:
        engine = {"dtype": "float64", "checkpoint_every": 2}
        async with running(tmp_path, monkeypatch, engine=engine, stop={"rounds": 7}) as (run, log, over):
            append, save, saved = run._inbox._append, log.save, list[int]()

            async def and_more(events: Sequence[Event]) -> None:
                run.hear("scored", client=0, body={"round": -1})
                await append(events)

            def noting(run: str, snapshot: Snapshot) -> None:
                saved.append(snapshot.seq)
                save(run, snapshot)

            monkeypatch.setattr(run._inbox, "_append", and_more)
            monkeypatch.setattr(log, "save", noting)
            run.arrive(Agent(lambda run, job: asyncio.ensure_future(send(run, job))), range(6))
            await asyncio.wait_for(over.wait(), 300)
            assert len(saved) >= 2

    asyncio.run(scene())
