"""What one agent may ask of a coordinator, and an owner of an agent: nobody else notices."""

from __future__ import annotations

import asyncio
import mmap
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
import structlog
import torch
from floor import Floor, checked, end, named, play, small, submit, until

from hansa.client import workshop
from hansa.client.policy import Policy
from hansa.client.watch import Watch
from hansa.core.errors import InputError, RunError
from hansa.core.store import RunStore
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire import version
from hansa.core.wire.tensors import describe, pack, unpack
from hansa.server.limits import Account, Limits
from hansa.strategies.local import Trained, train

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def test_calls_are_saved_up_for_ten_seconds_and_no_longer() -> None:
    now = [0.0]
    account = Account(Limits(agent_rate=2.0), lambda: now[0])
    assert [account.spend() for _ in range(21)] == [0.0] * 20 + [0.5]
    now[0] = 0.25
    assert account.spend() == pytest.approx(0.25)
    now[0] = 0.5
    assert [account.spend() for _ in range(2)] == [0.0, 0.5]
    now[0] = 1000.0
    assert sum(account.spend() == 0 for _ in range(50)) == 20
    assert [account.tell(), account.tell()] == [True, False]
    now[0] = 1060.0
    assert account.tell()


def test_limits_that_are_none() -> None:
    with pytest.raises(InputError, match=r"limits\.agent_rate"):
        Limits(agent_rate=0)
    assert Limits(inline=0, grace=0)


def test_an_agent_that_calls_without_end_is_refused_and_the_others_train(floor: Floor) -> None:
    recipe = small(stop={"rounds": 4})

    async def scene() -> str:
        async with AsyncExitStack() as stack:
            control = await stack.enter_async_context(floor.coordinator(agent_rate=2.0))
            stub = floor.stub(stack)
            said = stack.enter_context(structlog.testing.capture_logs())
            answers: list[tuple[grpc.StatusCode, str]] = []

            async def flood() -> None:
                while True:
                    try:
                        await stub.Download(pb.Wanted(lease=b"x"), metadata=named("loud")).read()
                    except grpc.aio.AioRpcError as error:
                        answers.append((error.code(), str(error.details())))

            flooding = asyncio.create_task(flood())
            await until(lambda: len(answers) > 150)
            async with floor.agents(2):
                run = await submit(control, recipe)
                assert (await end(control, run))[1].status == "finished"
            assert not flooding.done()
            flooding.cancel()
            refusals = [e for e in said if e["event"] == "refused" and e["status"] == EXHAUSTED.name]
            assert {e["agent"] for e in refusals} == {"loud"}
            assert 1 <= len(refusals) < 5  # a line a minute
            exhausted = [words for code, words in answers if code is EXHAUSTED]
            assert len(exhausted) > 20
            assert all("an agent may make 2 calls a second" in words for words in exhausted)
            return run

    assert checked(floor, play(scene())).updates == 4 * 4


@pytest.mark.parametrize("method", ["Attend", "Upload", "Download"])
def test_an_agent_that_opens_calls_and_says_nothing_leaves_room_for_the_others(
    floor: Floor, method: str
) -> None:
    async def scene() -> None:
        async with AsyncExitStack() as stack:
            control = await stack.enter_async_context(floor.coordinator(calls=20))
            stub = floor.stub(stack)
            channel = await stack.enter_async_context(floor.channel("mute"))
            opened: Any = channel.stream_stream(f"/hansa.v1.Agents/{method}")
            calls = [opened(metadata=named("mute")) for _ in range(50)]
            await until(lambda: sum(call.done() for call in calls) == 30)
            refused = [call for call in calls if call.done()]
            assert {await call.code() for call in refused} == {EXHAUSTED}
            assert "20 calls of agent mute are open" in str(await refused[0].details())
            async with floor.agents(2):
                run = await submit(control, small(stop={"rounds": 2}))
                assert (await end(control, run))[1].status == "finished"
            assert sum(call.done() for call in calls) == 30
            for call in calls:
                call.cancel()
            ended = stub.Download(pb.Wanted(lease=b"x"), metadata=named("mute"))
            while await ended.code() is EXHAUSTED:  # until the coordinator has noticed
                ended = stub.Download(pb.Wanted(lease=b"x"), metadata=named("mute"))
            assert await ended.code() is grpc.StatusCode.PERMISSION_DENIED

    play(scene())


def test_whoever_claims_what_others_hold_is_told_of_in_a_line(floor: Floor) -> None:
    recipe = small(partition={"kind": "iid", "clients": 100}, model={"name": "logistic"})

    async def scene() -> None:
        async with AsyncExitStack() as stack:
            control = await stack.enter_async_context(floor.coordinator())
            stub, streams = floor.stub(stack), []
            said = stack.enter_context(structlog.testing.capture_logs())
            for name in ("holder", "claimant"):
                streams.append(stub.Attend(metadata=named(name)))
                seats = pb.Seats(share=0, of=1)
                await streams[-1].write(pb.FromAgent(hello=pb.Hello(version=version(), seats=seats)))
                await streams[-1].read()
                if name == "holder":
                    await submit(control, recipe)
                    await streams[-1].read()  # a job: the clients are the holder's
            lines = [each for each in said if each.get("agent") == "claimant"]
            (line,) = (each for each in lines if each["event"] == "clients belong to other agents")
            assert (line["count"], line["clients"]) == (100, list(range(10)))
            assert len(lines) == 2  # and that it came
            for each in streams:
                each.cancel()

    play(scene())


def test_a_stream_that_chatters_is_heard_more_slowly(floor: Floor) -> None:
    """Its answers do not pile up either."""

    async def scene() -> None:
        async with AsyncExitStack() as stack:
            control = await stack.enter_async_context(floor.coordinator(agent_rate=2.0))
            stream = floor.stub(stack).Attend(metadata=named("loud"))
            hello = pb.Hello(version=version(), seats=pb.Seats(clients=[99]))
            await stream.write(pb.FromAgent(hello=hello))
            with structlog.testing.capture_logs() as said:
                for _ in range(60):
                    await stream.write(pb.FromAgent(heartbeat=pb.Heartbeat()))
                await until(lambda: any(e["event"] == "heard more slowly" for e in said))
                async with floor.agents(2):
                    run = await submit(control, small(stop={"rounds": 2}))
                    assert (await end(control, run))[1].status == "finished"
            assert sum(e["event"] == "heard more slowly" for e in said) == 1
            stream.cancel()

    play(scene())


def test_an_agent_that_holds_its_uploads_open_holds_up_nobody(floor: Floor) -> None:
    recipe = small(
        model={"name": "mlp", "hidden": [6]}, schedule={"cohort": 6}, stop={"rounds": 1}, data={"limit": 120}
    )

    async def scene() -> str:
        async with AsyncExitStack() as stack:
            limits = {"inline": 0, "uploads": 2, "agent_uploads": 1, "agent_waiting": 1}
            control = await stack.enter_async_context(floor.coordinator(**limits))
            stub = floor.stub(stack)
            stream = stub.Attend(metadata=named("slow"))
            hello = pb.Hello(version=version(), seats=pb.Seats(clients=[0, 1, 2]))
            await stream.write(pb.FromAgent(hello=hello))
            honest = floor.agent("honest", clients=(3, 4, 5))
            working = asyncio.create_task(honest.run())
            run = await submit(control, recipe)
            jobs: list[pb.Job] = []
            while len(jobs) < 3:
                message = await stream.read()
                if message.WhichOneof("body") == "job":
                    jobs.append(message.job)
            calls = []
            for job in jobs:
                call, manifest, data = await begun(stub, job)
                await call.write(pb.UploadRequest(manifest=manifest))
                calls.append((call, data))
                if len(calls) == 1:
                    assert (await call.read()).WhichOneof("body") == "permit"
            with pytest.raises(grpc.aio.AioRpcError) as caught:  # the third: one is under way, one waits
                await calls[2][0].read()
            assert caught.value.code() is EXHAUSTED
            assert "2 uploads of this agent are under way or wait" in str(caught.value.details())
            while (await control.List(pb.ListRequest())).runs[0].open > 3:  # the honest one's come
                await asyncio.sleep(0.01)
            again = await begun(stub, jobs[2])
            await finish(*calls[0])
            assert (await calls[1][0].read()).WhichOneof("body") == "permit"
            await finish(*calls[1])
            await again[0].write(pb.UploadRequest(manifest=again[1]))
            assert (await again[0].read()).WhichOneof("body") == "permit"
            await finish(again[0], again[2])
            assert (await end(control, run))[1].status == "finished"
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            stream.cancel()
            return run

    assert checked(floor, play(scene())).updates == 6


async def begun(stub: Any, job: pb.Job) -> tuple[Any, pb.Manifest, bytes]:
    """An upload of a client that changed a little, each its own way."""
    tree = {n: each + job.client for n, each in unpack(job.payload.data, job.tensors).items()}
    packed = pack(tree)
    manifest = pb.Manifest(
        lease=job.lease,
        update=pb.Blob(digest=packed.digest, size=len(packed.data)),
        tensors=describe(tree),
        examples=10,
        steps=1,
    )
    return stub.Upload(metadata=named("slow")), manifest, packed.data


async def finish(call: Any, data: bytes) -> None:
    await call.write(pb.UploadRequest(piece=pb.Piece(offset=0, data=data)))
    await call.done_writing()
    assert (await call.read()).acknowledgement.counted


# Of an agent's owner.


def test_a_job_that_takes_too_long_is_ended_and_the_others_go_on(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(train={"epochs": 100}, schedule={"cohort": 3}, stop={"rounds": 2})
    made: list[int] = []

    def noting(*arguments: Any, **options: Any) -> Trained:
        result = train(*arguments, **options)
        made.append(result.steps)
        return result

    monkeypatch.setattr(workshop, "train", noting)

    async def scene() -> str:
        async with floor.coordinator() as control:
            hasty = floor.agent("hasty", clients=(0, 1), policy=Policy(job_seconds=1e-3))
            patient = floor.agent("patient", clients=(2, 3, 4, 5))
            tasks = [asyncio.create_task(each.run()) for each in (hasty, patient)]
            with structlog.testing.capture_logs() as said:
                run = await submit(control, recipe)
                assert (await end(control, run))[1].status == "finished"
            reasons = {
                (e["agent"], e["reason"]) for e in said if e["event"] == "a job failed" and "again" in e
            }
            assert reasons == {
                ("hasty", "the job was ended: job_seconds = 0.001 of this agent's owner were over")
            }
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return run

    run = play(scene())
    assert checked(floor, run).updates > 0
    assert min(made) < 100  # ended on its way
    with RunStore.open(floor.runs / run) as store:
        jobs = store.participation()
    assert {2, 3, 4, 5} >= set(jobs["client"][jobs["outcome"] == "folded"].tolist())
    assert {0, 1} & set(jobs["client"][jobs["outcome"] == "lost"].tolist())


def taken_and_given_back(megabytes: int) -> None:
    """From the system: what an allocator has kept of earlier tests would be no growth."""
    with mmap.mmap(-1, megabytes << 20) as pages:
        pages.write(b"1" * (megabytes << 20))


def test_memory_is_watched_at_its_peak() -> None:
    watch = Watch(Policy(job_memory=32), torch.device("cpu"))
    assert not watch.over()
    taken_and_given_back(64)
    assert watch.over()
    with pytest.raises(RunError, match=r"it took \d+ MB, and job_memory = 32"):
        watch.require()
    assert not Watch(Policy(job_memory=32), torch.device("cpu")).over()


@pytest.mark.parametrize("hidden", [6, 4096], ids=["grows", "cannot fit"])
def test_a_job_that_takes_too_much_memory_fails_and_says_so(
    floor: Floor, monkeypatch: pytest.MonkeyPatch, hidden: int
) -> None:
    recipe = small(model={"name": "mlp", "hidden": [hidden]}, schedule={"cohort": 6}, stop={"rounds": 9})

    def greedy(*arguments: Any, **options: Any) -> Trained:
        taken_and_given_back(64)
        return train(*arguments, **options)

    monkeypatch.setattr(workshop, "train", greedy)

    async def scene() -> None:
        async with floor.coordinator() as control, floor.agents(2, policy=Policy(job_memory=4)):
            run = await submit(control, recipe)
            _, status = await end(control, run)
            assert status.status == "failed"
            said = "the job was ended: it took" if hidden == 6 else "training takes 7 MB or more"
            assert said in status.reason
            assert "job_memory = 4 of this agent's owner" in status.reason

    play(scene())
