"""What a coordinator tells those who look at it: agents, its own condition, figures for Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from floor import Floor, end, named, play, small, submit
from prometheus_client.parser import text_string_to_metric_families

from hansa.core.wire import NAME, version
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.federation_pb2_grpc import AgentsStub, ControlStub
from hansa.server.app import Config, coordinator
from hansa.server.roster import Roster


async def roster(control: ControlStub, **who: Any) -> dict[str, pb.AgentStatus]:
    return {each.name: each async for each in control.Roster(pb.RosterRequest(), **who)}


def test_agents_are_told_with_their_work_and_still_when_they_are_gone(floor: Floor) -> None:
    async def scene() -> None:
        async with floor.coordinator() as control:
            async with floor.agents(3):
                run = await submit(control, small())
                await end(control, run)
                there = await roster(control)
                assert set(there) == {"a0", "a1", "a2"}
                assert all(each.connected and not each.jobs for each in there.values())
                assert sum(each.counted for each in there.values()) == 3 * 4  # three rounds, cohorts of four
                assert all(each.steps > 0 and each.seconds > 0 for each in there.values() if each.counted)
                assert [each.seats.of for each in there.values()] == [3, 3, 3]
            async with asyncio.timeout(60):
                while any(each.connected for each in (await roster(control)).values()):
                    await asyncio.sleep(0.02)
            gone = await roster(control)
            assert set(gone) == {"a0", "a1", "a2"}
            assert all(0 < each.attended <= each.seen - each.first + 60 for each in gone.values())

    play(scene())


def test_a_job_that_is_out_is_told_and_its_run_only_to_whom_it_concerns(floor: Floor) -> None:
    async def scene() -> None:
        async with AsyncExitStack() as stack:
            control = await stack.enter_async_context(floor.coordinator())
            stream = floor.stub(stack).Attend(metadata=named("hand"))
            await stream.write(
                pb.FromAgent(
                    hello=pb.Hello(version=version(), seats=pb.Seats(share=0, of=1), device="abacus")
                )
            )
            assert (await stream.read()).WhichOneof("body") == "welcome"
            run = await submit(control, small())
            assert (await stream.read()).job.run == run
            told = (await roster(control))["hand"]
            assert [(job.run, job.phase) for job in told.jobs] == [(run, "train")] * 4  # the cohort
            assert (told.device, told.connected, told.counted) == ("abacus", True, 0)
            researcher = ((NAME, "eve"), ("hansa-role", "researcher"))
            seen = (await roster(control, metadata=researcher))["hand"]
            assert [job.run for job in seen.jobs] == [""] * 4
            stream.cancel()

    play(scene())


@pytest.mark.parametrize(
    ("role", "allowed"),
    [("auditor", True), ("operator", True), ("researcher", True), ("admin", True), ("agent", False)],
)
def test_people_may_look_and_agents_may_not(floor: Floor, role: str, allowed: bool) -> None:
    async def scene() -> None:
        async with floor.coordinator() as control:
            who = ((NAME, "ada"), ("hansa-role", role))
            for call in (
                lambda: roster(control, metadata=who),
                lambda: control.Condition(pb.ConditionRequest(), metadata=who),
            ):
                if allowed:
                    await call()
                    continue
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call()
                assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED

    play(scene())


def test_the_condition_counts_what_happened(floor: Floor) -> None:
    async def scene() -> None:
        async with floor.coordinator() as control:
            before = (await control.Condition(pb.ConditionRequest())).samples[-1]
            async with floor.agents(2):
                run = await submit(control, small())
                await end(control, run)
                told = await control.Condition(pb.ConditionRequest(after=before.at))
            now = told.samples[-1]
            assert now.rounds - before.rounds == 3
            assert now.counted - before.counted == 12
            assert now.bytes_up > before.bytes_up
            assert (now.agents, now.runs, now.jobs, now.uploads, now.events_waiting) == (2, 0, 0, 0, 0)
            assert all(each.at > before.at for each in told.samples)
            assert 1e6 < now.resident < told.memory
            assert (told.protocol.major, told.secure) == (1, False)

    play(scene())


def test_whoever_watches_after_a_restart_is_told_of_every_round(floor: Floor) -> None:
    """Also of those before the snapshot from which the coordinator went on."""
    recipe = small(stop={"rounds": 12}, engine={"dtype": "float64", "checkpoint_every": 2})

    async def scene() -> None:
        async with floor.coordinator() as control, floor.agents(2):
            run = await submit(control, recipe)
            before: list[pb.Round] = []
            async for happening in control.Watch(pb.WatchRequest(id=run)):
                before.append(happening.round)
                if len(before) == 6:
                    await control.Stop(pb.RunName(id=run))
                    break
        async with floor.coordinator() as control, floor.agents(2):
            await control.Resume(pb.RunName(id=run))
            rounds, _ = await end(control, run)
            assert [each.index for each in rounds] == list(range(1, 13))
            assert rounds[:6] == before

    play(scene())


def test_a_run_is_told_with_its_headline(floor: Floor) -> None:
    async def scene() -> None:
        async with floor.coordinator() as control:
            async with floor.agents(2):
                run = await submit(control, small())
                rounds, _ = await end(control, run)
            (told,) = (await control.List(pb.ListRequest())).runs
            assert (told.id, told.status, told.algorithm, told.planned) == (run, "finished", "fedavg", 3)
            assert told.accuracy == rounds[-1].metrics["accuracy"]
            assert told.bytes_up == sum(each.bytes_up for each in rounds)
            assert told.owner == "loopback"

    play(scene())


def test_prometheus_reads_every_figure(floor: Floor) -> None:
    async def scene() -> dict[str, float]:
        config = Config(listen="127.0.0.1:0", data=floor.data, runs=floor.runs, metrics="127.0.0.1:0")
        async with coordinator(config) as floor.port, floor.channel("user") as channel:
            control = ControlStub(channel)
            async with floor.agents(2):
                run = await submit(control, small())
                await end(control, run)
                call = AgentsStub(channel).Upload(metadata=named("x"))  # without a word: a refusal to count
                await call.done_writing()
                assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
                port = (floor.data / "metrics").read_text()
                text = await asyncio.to_thread(
                    lambda: urllib.request.urlopen(f"http://{port}/metrics", timeout=60).read().decode()
                )
        return {
            f"{sample.name}{sorted(sample.labels.items())}": sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    seen = play(scene())
    board = Path(__file__).parents[2] / "deploy" / "grafana" / "hansa.json"
    asked = {
        name
        for panel in json.loads(board.read_text())["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(?:hansa|process)_\w+", target["expr"])
    }
    assert len(asked) > 12
    assert asked <= {key.partition("[")[0] for key in seen}, (
        "the Grafana dashboard asks for what there is not"
    )
    assert seen["hansa_agents[]"] == 2
    assert seen["hansa_runs[('status', 'finished')]"] == 1
    assert seen["hansa_runs[('status', 'running')]"] == 0
    assert seen["hansa_queue[('queue', 'uploads')]"] == 0
    assert seen["hansa_updates_total[('verdict', 'counted')]"] >= 12
    assert seen["hansa_rounds_total[]"] >= 3
    assert seen["process_resident_memory_bytes[]"] > 1e6


def test_a_roster_counts_the_time_of_every_stay_and_knows_who_is_put_out() -> None:
    now = 1000.0
    kept = Roster(lambda: now, {"7f": "stolen"}.get)
    hello = pb.Hello(device="cpu", seats=pb.Seats(clients=[3]))
    kept.came("a", hello)
    now = 1010.0
    kept.heard("a", pb.Heartbeat(battery=0.25, mains=True))
    now = 1030.0
    kept.went("a")
    now = 1100.0
    kept.came("a", hello, "7f")
    now = 1105.0
    (told,) = kept
    assert told.revoked == "stolen"
    assert (told.first, told.seen, told.attended, told.connected) == (1000.0, 1100.0, 35.0, True)
    assert (told.battery, told.mains) == (0.25, True)


def test_what_a_roster_is_told_of_strangers_changes_nothing() -> None:
    kept = Roster()
    kept.heard("nobody")
    kept.refused("nobody")
    kept.over("nobody", b"lease")
    kept.sent("nobody", pb.Manifest(), counted=True)
    assert list(kept) == []
