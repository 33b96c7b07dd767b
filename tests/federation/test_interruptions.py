"""Runs that are stopped and agents that go away while things are on their way: nothing is done by halves."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from typing import Any

import pytest
import torch
from floor import Floor, checked, end, named, play, small, submit, until

from hansa.client import workshop
from hansa.client.outbox import Outbox
from hansa.client.session import Link
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire import version
from hansa.core.wire.federation_pb2_grpc import AgentsStub
from hansa.server import runs
from hansa.server.events import EventLog
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import assemble
from hansa.strategies.local import Trained, train


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> list[runs.Run]:
    """Every run that is begun or taken up."""
    found: list[runs.Run] = []
    start = runs.Run.start

    def noting(self: runs.Run, ended: Any) -> None:
        found.append(self)
        start(self, ended)

    monkeypatch.setattr(runs.Run, "start", noting)
    return found


@contextmanager
def database_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As long as the context lasts."""
    back, insert = threading.Event(), EventLog._insert

    def waiting(self: EventLog, *rows: Any) -> None:
        back.wait()
        insert(self, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "_insert", waiting)
        try:
            yield
        finally:
            back.set()


@asynccontextmanager
async def there(stub: AgentsStub, name: str, clients: list[int]) -> AsyncIterator[list[pb.ToAgent]]:
    """A bare agent that is there, and what it hears."""
    stream, heard = stub.Attend(metadata=named(name)), list[pb.ToAgent]()
    await stream.write(pb.FromAgent(hello=pb.Hello(version=version(), seats=pb.Seats(clients=clients))))
    assert (await stream.read()).WhichOneof("body") == "welcome"

    async def listen() -> None:
        while True:
            heard.append(await stream.read())

    listening = asyncio.create_task(listen())
    try:
        yield heard
    finally:
        listening.cancel()
        stream.cancel()


def jobs(heard: list[pb.ToAgent]) -> set[int]:
    return {each.job.client for each in heard if each.WhichOneof("body") == "job"}


def said(floor: Floor, run: str) -> list[str]:
    with closing(EventLog(floor.url, lead=False)) as log:
        return [each.kind for each in log.events(run)]


def assert_undisturbed(floor: Floor, run: str, recipe: Any) -> None:
    undisturbed = Simulator(assemble(recipe))
    undisturbed.run()
    for name, tensor in undisturbed.hub.model().items():
        torch.testing.assert_close(floor.model(run)[name], tensor, rtol=1e-9, atol=1e-9)


# Stopped and resumed.


def test_no_job_leaves_a_run_that_is_stopped_and_all_do_when_it_goes_on(
    floor: Floor, live: list[runs.Run]
) -> None:
    """One of two agents has died: after ``grace`` its job goes to a client of the other one."""
    recipe = small(
        schedule={"name": "buffered", "k": 2, "concurrency": 3}, model={"name": "mlp", "hidden": [6]}
    )

    async def scene() -> None:
        async with AsyncExitStack() as stack:
            control = await stack.enter_async_context(floor.coordinator(grace=0.2))
            stub = floor.stub(stack)
            heard = await stack.enter_async_context(there(stub, "living", [3, 4, 5]))
            async with there(stub, "dying", [0, 1, 2]) as other:
                run = await submit(control, recipe)
                await until(lambda: len(jobs(heard) | jobs(other)) == 3)
                assert jobs(other)
            before = len(heard)
            await control.Stop(pb.RunName(id=run))
            await until(lambda: not live[0].machine.there & {0, 1, 2})
            assert {job.client for job in live[0]._jobs()} == {3, 4, 5}
            await asyncio.sleep(0.3)
            assert not jobs(heard[before:])
            await control.Resume(pb.RunName(id=run))
            await until(lambda: jobs(heard[before:]) == {3, 4, 5})

    play(scene())


def test_an_update_that_comes_as_its_run_is_stopped_counts_on_both_sides(
    floor: Floor, live: list[runs.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the client keeps of a job goes with its update, or the control variates fall apart."""
    recipe = small(algorithm={"name": "scaffold"}, stop={"rounds": 6})
    third = threading.Event()

    def gated(*arguments: Any, **options: Any) -> Trained:
        if live[0].machine.hub.state.version == 2:
            third.wait(60)
        return train(*arguments, **options)

    monkeypatch.setattr(workshop, "train", gated)

    async def scene() -> str:
        async with floor.coordinator() as control, floor.agents(3):
            run = await submit(control, recipe)
            await until(lambda: live[0].machine.hub.state.version == 2 and len(live[0]._jobs()) == 4)
            with database_away(monkeypatch):
                stopping = asyncio.ensure_future(control.Stop(pb.RunName(id=run)))
                await until(lambda: live[0]._inbox.seq > live[0].machine.seq)
                third.set()
                await until(lambda: live[0].waiting > 0)
            assert (await stopping).status == "interrupted"
            assert (await control.Resume(pb.RunName(id=run))).status == "running"
            assert (await end(control, run))[1].status == "finished"
            return run

    run = play(scene())
    assert checked(floor, run).updates == 6 * 4
    assert_undisturbed(floor, run, recipe)


def test_an_agent_that_is_ended_in_mid_work_leaves_no_half_of_a_job(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(train={"epochs": 4}, stop={"rounds": 1})
    begun = threading.Event()

    def endless(*arguments: Any, halt: Any) -> Trained:
        def until_halted(steps: int) -> bool:
            while steps == 1 and not halt(steps):
                begun.set()
                time.sleep(0.001)
            return bool(halt(steps))

        return train(*arguments, halt=until_halted)

    async def scene() -> str:
        async with floor.coordinator() as control:
            with monkeypatch.context() as patch:
                patch.setattr(workshop, "train", endless)
                async with floor.agents(1):
                    run = await submit(control, recipe)
                    await until(begun.is_set)
            assert Outbox(floor.folder / "a0").entries() == []
            async with floor.agents(1):
                assert (await end(control, run))[1].status == "finished"
            return run

    assert_undisturbed(floor, play(scene()), recipe)


# Away and back.


def test_whoever_goes_again_has_the_whole_time_again(floor: Floor, live: list[runs.Run]) -> None:
    async def scene() -> None:
        async with AsyncExitStack() as stack:
            control = await stack.enter_async_context(floor.coordinator(grace=1.0))
            stub, loop = floor.stub(stack), asyncio.get_running_loop()
            async with there(stub, "a", list(range(6))) as heard:
                run = await submit(control, small())
                await until(lambda: bool(jobs(heard)))
            await until(lambda: not live[0].workers)
            async with there(stub, "a", list(range(6))):
                await asyncio.sleep(0.8)
            await until(lambda: not live[0].workers)
            gone = loop.time()
            await until(lambda: "left" in said(floor, run))
            assert loop.time() - gone > 0.95

    play(scene())


def test_whoever_comes_back_as_it_is_given_up_is_there(
    floor: Floor, live: list[runs.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word that it is gone waits for the database, which is away, too."""

    async def scene() -> None:
        async with AsyncExitStack() as stack:
            control = await stack.enter_async_context(floor.coordinator(grace=0.1))
            stub = floor.stub(stack)
            async with there(stub, "a", list(range(6))) as heard:
                run = await submit(control, small())
                await until(lambda: bool(jobs(heard)))
            with database_away(monkeypatch):
                await until(lambda: live[0]._inbox.seq > live[0].machine.seq)
                back = await stack.enter_async_context(there(stub, "a", list(range(6))))
                await until(lambda: len(live[0].workers) == 6)
            await until(lambda: said(floor, run).count("joined") == 2 and len(live[0]._jobs()) == 4)
            assert live[0].machine.there == set(range(6))
            await until(lambda: {j.number for j in live[0]._jobs()} <= {m.job.number for m in back})

    play(scene())


def test_an_update_that_was_damaged_where_it_waited_is_made_anew(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves a file of the right length and of zeroes."""
    recipe = small(schedule={"cohort": 6}, stop={"rounds": 2})

    async def never(self: Link, outbox: Outbox, entry: Any) -> bool:
        await asyncio.Event().wait()
        return False

    async def scene() -> None:
        async with floor.coordinator() as control:
            with monkeypatch.context() as patch:
                patch.setattr(Link, "upload", never)
                async with floor.agents(1):
                    run = await submit(control, recipe)
                    await until(lambda: len(list(floor.folder.glob("a0/outbox/*/*/entry.json"))) == 6)
            path = min(floor.folder.glob("a0/outbox/*/*/update.safetensors"))
            path.write_bytes(bytes(path.stat().st_size))
            async with floor.agents(1):
                rounds, status = await end(control, run)
            assert status.status == "finished"
            assert [each.folded for each in rounds] == [5, 6]

    play(scene())
