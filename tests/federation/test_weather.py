"""Foul weather: what ends, fills up or goes wrong for one job, disk or run is no other one's trouble."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from floor import Floor, checked, end, play, small, submit, until

from hansa.client.agent import Agent
from hansa.client.outbox import Entry, Outbox
from hansa.client.policy import Policy
from hansa.client.session import Gone, Link
from hansa.core.wire import federation_pb2 as pb
from hansa.server.artefacts import Artefacts
from hansa.server.events import Event, EventLog
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import assemble


def test_a_model_that_one_job_fetches_for_others_comes_though_that_job_ends(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(model={"name": "mlp", "hidden": [100]}, schedule={"cohort": 6}, stop={"rounds": 2})
    download, over = Link.download, list[bytes]()

    async def first_is_over(self: Link, lease: bytes, blob: pb.Blob) -> bytes:
        if not over:
            over.append(lease)
            await asyncio.sleep(0.1)  # the others wait for it, too
            raise Gone("FAILED_PRECONDITION: the job is over")
        return await download(self, lease, blob)

    monkeypatch.setattr(Link, "download", first_is_over)

    async def scene() -> None:
        async with floor.coordinator() as control, floor.agents(1):
            rounds, status = await end(control, await submit(control, recipe))
            assert status.status == "finished"
            assert [each.folded for each in rounds] == [5, 6]

    play(scene())


def test_what_an_update_left_is_kept_as_soon_as_the_disk_has_room(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update counted: were the client's control variate forgotten, the next job would be wrong."""
    recipe = small(algorithm={"name": "scaffold"}, model={"name": "mlp", "hidden": [6]}, stop={"rounds": 4})
    settle, full = Outbox.settle, list(range(5))

    def filling(self: Outbox, made: Entry, *, counted: bool) -> None:
        if made.number and full:
            full.pop()
            raise OSError(28, "No space left on device")
        settle(self, made, counted=counted)

    monkeypatch.setattr(Outbox, "settle", filling)

    async def scene() -> str:
        async with floor.coordinator() as control, floor.agents(2):
            run = await submit(control, recipe)
            assert (await end(control, run))[1].status == "finished"
            return run

    run = play(scene())
    assert not full
    assert checked(floor, run).updates == 4 * 4
    undisturbed = Simulator(assemble(recipe))
    undisturbed.run()
    for name, tensor in undisturbed.hub.model().items():
        torch.testing.assert_close(floor.model(run)[name], tensor, rtol=1e-9, atol=1e-9)


def test_quiet_hours_end_by_the_clock_that_was_set_meanwhile(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or of a machine that slept."""
    left, slept = iter([36000.0, 30.0, 0.0]), list[float]()
    monkeypatch.setattr(Policy, "quiet", lambda self, now: next(left))

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    play(Agent._quiet_hours(floor.agent("a", clients=(0,))))
    assert slept == [60.0, 30.0]


def test_what_one_run_says_and_no_database_takes_fails_that_run_alone(database: str) -> None:
    good = Event(seq=1, at=0.0, kind="stopped")
    bad = Event(seq=1, at=0.0, kind="left", client=2**70)
    worse = Event(seq=1, at=0.0, kind="left", body={"reason": {1, 2}})

    async def scene() -> None:
        log = EventLog(database)
        told = await asyncio.gather(
            *(log.append(run, [each]) for run, each in zip("abcd", (good, bad, worse, good), strict=True)),
            return_exceptions=True,
        )
        assert [isinstance(each, Exception) for each in told] == [False, True, True, False]
        await log.append("a", [Event(seq=2, at=1.0, kind="resumed")])
        assert [len(log.events(run)) for run in "abcd"] == [2, 0, 0, 1]
        log.close()

    play(scene())


def test_what_a_client_sent_of_a_job_before_makes_room_for_the_next(tmp_path: Path) -> None:
    artefacts = Artefacts(tmp_path)
    for run, job in (("r", "4-1"), ("r", "4-2"), ("r", "5-1"), ("s", "4-1")):
        reception = artefacts.receive(run, job, "0" * 64, 10)
        reception.take(b"12345")
        reception.pause()
    left = {str(path.relative_to(tmp_path / "spool")) for path in tmp_path.glob("spool/*/*")}
    assert left == {f"{each}.{'0' * 16}" for each in ("r/4-2", "r/5-1", "s/4-1")}
    assert artefacts.receive("r", "4-2", "0" * 64, 10).away  # it goes on


def test_a_job_that_is_done_as_it_is_recalled_does_not_stay_on_the_disk(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(
        model={"name": "mlp", "hidden": [6]},
        algorithm={"name": "fedbuff"},
        schedule={"name": "buffered", "k": 1, "concurrency": 6},
        stop={"rounds": 1},
    )
    put, settle, recall = Outbox.put, Outbox.settle, Agent._recall
    done, recalled = threading.Event(), threading.Event()
    slow, kept, settled = set[Outbox](), set[str](), set[str]()

    def waiting(self: Outbox, made: Entry, *what: Any) -> None:
        if self in slow:
            done.set()
            recalled.wait()
        done.wait()
        put(self, made, *what)
        kept.add(made.lease)

    def settling(self: Outbox, made: Entry, *, counted: bool) -> None:
        settle(self, made, counted=counted)
        settled.add(made.lease)

    def noting(self: Agent, message: pb.Recall) -> None:
        recall(self, message)
        if self._outbox in slow:
            recalled.set()

    monkeypatch.setattr(Outbox, "put", waiting)
    monkeypatch.setattr(Outbox, "settle", settling)
    monkeypatch.setattr(Agent, "_recall", noting)

    async def scene() -> None:
        async with floor.coordinator() as control:
            agents = [floor.agent(f"a{i}", share=f"{i}/2") for i in range(2)]
            slow.add(agents[1]._outbox)
            tasks = [asyncio.create_task(each.run()) for each in agents]
            assert (await end(control, await submit(control, recipe)))[1].status == "finished"
            await until(lambda: recalled.is_set() and len(kept) > 1 and kept == settled)
            assert agents[1]._outbox.entries() == []
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    play(scene())
