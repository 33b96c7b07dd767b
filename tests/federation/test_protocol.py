"""What a coordinator refuses, with which status, and that nothing of it reaches the run."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from floor import Floor, checked, end, named, play, small, submit, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import save
from sqlalchemy.exc import OperationalError

from hansa.core.errors import RunError
from hansa.core.store import RunStore
from hansa.core.trees import Tree
from hansa.core.wire import MAJOR, MINOR, PIECE, version
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.federation_pb2_grpc import AgentsStub, ControlStub
from hansa.core.wire.tensors import describe, pack, unpack
from hansa.server.agents import Agents
from hansa.server.events import EventLog
from hansa.simulation.runs import resume

ONE = small(
    model={"name": "mlp", "hidden": [6]},
    partition={"kind": "iid", "clients": 1},
    schedule={"cohort": 1},
    stop={"rounds": 1},
)


@dataclass
class Hand:
    """An agent played by hand: it was given a job."""

    stub: AgentsStub
    control: ControlStub
    job: pb.Job
    run: str
    stream: Any
    name: str = "hand"
    inline: bool = False

    async def update(self) -> Tree:
        """An update of the right shape: all ones."""
        data = b""
        wanted = pb.Wanted(lease=self.job.lease, digest=self.job.payload.digest)
        async for piece in self.stub.Download(wanted, metadata=named(self.name)):
            data += piece.data
        return {name: torch.ones_like(each) for name, each in unpack(data, self.job.tensors).items()}

    async def send(self, data: bytes, manifest: pb.Manifest, *, size: int = PIECE) -> pb.Acknowledgement:
        """Upload as the protocol has it."""
        call = self.stub.Upload(metadata=named(self.name))
        await call.write(pb.UploadRequest(manifest=manifest))
        reply = await call.read()
        if reply is not grpc.aio.EOF and reply.WhichOneof("body") == "permit":
            for offset in range(reply.permit.offset, len(data), size):
                piece = pb.Piece(offset=offset, data=data[offset : offset + size])
                await call.write(pb.UploadRequest(piece=piece))
            await call.done_writing()
            reply = await call.read()
        assert reply is not grpc.aio.EOF, await call.code()
        acknowledgement: pb.Acknowledgement = reply.acknowledgement
        return acknowledgement

    def manifest(self, data: bytes, tree: Tree, **changes: Any) -> pb.Manifest:
        """What is true of an update, with changes."""
        digest = hashlib.sha256(data).hexdigest()
        facts: dict[str, Any] = {
            "lease": self.job.lease,
            "update": pb.Blob(digest=digest, size=len(data), data=data if self.inline else b""),
            "tensors": describe(tree),
            "examples": 10,
            "steps": 1,
            "loss": 1.0,
            "has_loss": True,
        }
        return pb.Manifest(**{**facts, **changes})


@asynccontextmanager
async def hand(floor: Floor, **limits: Any) -> AsyncIterator[Hand]:
    """An agent played by hand, with the only job of a run."""
    async with AsyncExitStack() as stack:
        control = await stack.enter_async_context(floor.coordinator(**limits))
        stub = floor.stub(stack)
        stream = stub.Attend(metadata=named("hand"))
        hello = pb.Hello(version=version(), seats=pb.Seats(clients=[0]))
        await stream.write(pb.FromAgent(hello=hello))
        assert (await stream.read()).WhichOneof("body") == "welcome"
        run = await submit(control, ONE)
        message = await stream.read()
        assert message.WhichOneof("body") == "job"
        yield Hand(stub, control, message.job, run, stream)
        stream.cancel()


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a call is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


def other(tree: Tree, **tensors: torch.Tensor) -> Tree:
    return {**tree, **tensors}


def spoilt(tree: Tree) -> Mapping[str, tuple[Tree, str]]:
    """Updates that are wrong, and what is said of them."""
    first, *rest = tree
    return {
        "a name is missing": ({name: tree[name] for name in rest}, "is missing"),
        "a name too many": (other(tree, extra=torch.ones(1)), "nobody asked for"),
        "another shape": (other(tree, **{first: tree[first][:1]}), "has shape"),
        "a shape that would be broadcast": (
            other(tree, **{first: torch.ones(1, dtype=torch.float64)}),
            "has shape",
        ),
        "another type": (other(tree, **{first: tree[first].float()}), "is F32 and should be F64"),
    }


BAD_FACTS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "no examples": ({"examples": 0}, "0 examples"),
    "a weight beyond belief": ({"examples": 10**12}, "are believed"),
    "steps beyond belief": ({"steps": 2**31}, "are believed"),
    "a loss that is no number": ({"loss": math.nan}, "not finite"),
    "a loss whose mean is none": ({"loss": -1e308}, "not finite"),
    "a digest that is a path": ({"update": pb.Blob(digest="../" * 21 + "x", size=100)}, "no SHA-256"),
    "two gigabytes": ({"update": pb.Blob(digest="0" * 64, size=2 << 30)}, "at most"),
}


SPOILT = (
    "a name is missing",
    "a name too many",
    "another shape",
    "a shape that would be broadcast",
    "another type",
)


@pytest.mark.parametrize("case", [*BAD_FACTS, *SPOILT, "a name twice"])
def test_manifests_that_cannot_be_right_are_refused_before_a_byte_flows(floor: Floor, case: str) -> None:
    async def scene() -> None:
        async with hand(floor) as agent:
            tree = await agent.update()
            data = pack(tree).data
            if case in BAD_FACTS:
                facts, said = BAD_FACTS[case]
            elif case in SPOILT:
                wrong, said = spoilt(tree)[case]
                facts = {"tensors": describe(wrong)}
            else:
                facts, said = {"tensors": [*describe(tree), describe(tree)[0]]}, "there twice"
            code, words = await refused(agent.send(data, agent.manifest(data, tree, **facts)))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert said in words
            assert not list((floor.data / "artefacts" / "spool").iterdir())

    play(scene())


def header(text: str, tail: bytes = b"") -> bytes:
    """A safetensors file with a header of our own."""
    return struct.pack("<Q", len(text)) + text.encode() + tail


def lies(tree: Tree) -> Mapping[str, bytes]:
    """Bytes that are not what an honest manifest promises, though their digest is right."""
    good = pack(tree).data
    first = next(iter(tree))
    size = int.from_bytes(good[:8], "little")
    text = good[8 : 8 + size].decode()
    nan = {name: each.clone() for name, each in tree.items()}
    nan[first].view(-1)[0] = math.nan
    infinite = {name: each.clone() for name, each in tree.items()}
    infinite[first].view(-1)[-1] = -math.inf
    twice = text.replace("{", '{"' + first + '":{"dtype":"F64","shape":[0],"data_offsets":[0,0]},', 1)
    return {
        "not a number": save(nan),
        "infinite": save(infinite),
        "other shapes inside": save({**tree, first: tree[first][:1]}),
        "other types inside": save({**tree, first: tree[first].float()}),
        "a key twice": header(twice, good[8 + size :]),
        "metadata": save(tree, metadata={"note": "x"}),
        "a pickle": b"\x80\x04\x95" + b"\x00" * 200,
        "a header beyond the file": struct.pack("<Q", 1 << 60) + b"{}" * 50,
        "cut short": good[:-8],
        "with a tail": good + b"\x00" * 8,
        "nothing but zeros": b"\x00" * len(good),
        "a zip": b"PK\x03\x04" + b"\x00" * 300,
    }


@pytest.mark.parametrize("case", sorted(lies({"w": torch.ones(2, dtype=torch.float64)})))
@pytest.mark.parametrize("inline", [False, True])
def test_contents_that_are_not_what_was_promised_are_refused(floor: Floor, case: str, inline: bool) -> None:
    async def scene() -> None:
        async with hand(floor) as agent:
            agent.inline = inline
            tree = await agent.update()
            data = lies(tree)[case]
            code, _ = await refused(agent.send(data, agent.manifest(data, tree)))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert not [path for path in (floor.data / "artefacts").iterdir() if path.is_file()]

    play(scene())


def test_order_offsets_and_damage(floor: Floor) -> None:
    async def scene() -> None:
        async with hand(floor) as agent:
            tree = await agent.update()
            data = pack(tree).data
            manifest = agent.manifest(data, tree)

            async def talk(*messages: pb.UploadRequest) -> Any:
                call = agent.stub.Upload(metadata=named("hand"))
                for message in messages:
                    await call.write(message)
                await call.done_writing()
                return [each async for each in call]

            piece = pb.UploadRequest(piece=pb.Piece(offset=0, data=data))
            gap = pb.UploadRequest(piece=pb.Piece(offset=8, data=data[8:]))
            empty = pb.UploadRequest(piece=pb.Piece(offset=0, data=b""))
            more = pb.UploadRequest(piece=pb.Piece(offset=0, data=data + b"\x00"))
            damaged = pb.UploadRequest(piece=pb.Piece(offset=0, data=data[:-1] + b"\x01"))
            first = pb.UploadRequest(manifest=manifest)
            code = grpc.StatusCode
            cases = {
                "a piece before the manifest": ((piece,), code.FAILED_PRECONDITION),
                "a gap": ((first, gap), code.FAILED_PRECONDITION),
                "a second manifest": ((first, first), code.FAILED_PRECONDITION),
                "an empty piece": ((first, empty), code.INVALID_ARGUMENT),
                "more than was promised": ((first, more), code.INVALID_ARGUMENT),
                "nothing after the manifest": ((first,), code.INVALID_ARGUMENT),
                "bytes that changed on their way": ((first, damaged), code.DATA_LOSS),
            }
            for case, (messages, status) in cases.items():
                assert (await refused(talk(*messages)))[0] is status, case
            # After all that, the same update is accepted: none of it was held against the job.
            assert (await agent.send(data, manifest, size=100)).counted
            _, status_of = await end(agent.control, agent.run)
            assert status_of.status == "finished"

    play(scene())
    run = next(path.name for path in floor.runs.iterdir())
    assert checked(floor, run).updates == 1


def test_a_small_update_comes_in_its_manifest(floor: Floor) -> None:
    async def scene() -> None:
        async with hand(floor) as agent:
            agent.inline = True
            assert agent.job.payload.data  # the model came with the job
            assert hashlib.sha256(agent.job.payload.data).hexdigest() == agent.job.payload.digest
            tree = await agent.update()
            data = pack(tree).data
            changed = pb.Blob(
                digest=hashlib.sha256(data).hexdigest(), size=len(data), data=data[:-1] + b"\x01"
            )
            code, _ = await refused(agent.send(data, agent.manifest(data, tree, update=changed)))
            assert code is grpc.StatusCode.DATA_LOSS
            call = agent.stub.Upload(metadata=named("hand"))
            await call.write(pb.UploadRequest(manifest=agent.manifest(data, tree)))
            assert (await call.read()).acknowledgement.counted  # and no permit before
            await end(agent.control, agent.run)
            assert not [path for path in (floor.data / "artefacts").iterdir() if path.is_file()]

    play(scene())
    run = next(path.name for path in floor.runs.iterdir())
    assert checked(floor, run).updates == 1


def test_a_coordinator_that_will_not_have_it_in_the_manifest_gives_a_permit(floor: Floor) -> None:
    async def scene() -> None:
        async with hand(floor, inline=100) as agent:
            agent.inline = True
            tree = await agent.update()
            data = pack(tree).data
            assert len(data) > 100
            assert (await agent.send(data, agent.manifest(data, tree))).counted
            await end(agent.control, agent.run)
            assert [path for path in (floor.data / "artefacts").iterdir() if path.is_file()]

    play(scene())


def test_an_upload_goes_on_where_it_was_cut(floor: Floor) -> None:
    async def scene() -> None:
        async with hand(floor) as agent:
            tree = await agent.update()
            data = pack(tree).data
            manifest = agent.manifest(data, tree)
            call = agent.stub.Upload(metadata=named("hand"))
            await call.write(pb.UploadRequest(manifest=manifest))
            assert (await call.read()).permit.offset == 0
            await call.write(pb.UploadRequest(piece=pb.Piece(offset=0, data=data[:300])))
            await call.done_writing()
            await refused(call.read())
            again = agent.stub.Upload(metadata=named("hand"))
            await again.write(pb.UploadRequest(manifest=manifest))
            assert (await again.read()).permit.offset == 300
            await again.write(pb.UploadRequest(piece=pb.Piece(offset=300, data=data[300:])))
            assert (await again.read()).acknowledgement.counted

    play(scene())


def test_replays_and_leases(floor: Floor) -> None:
    async def scene() -> None:
        async with hand(floor) as agent:
            tree = await agent.update()
            data = pack(tree).data
            manifest = agent.manifest(data, tree)
            denied = grpc.StatusCode.PERMISSION_DENIED
            forged = bytes([agent.job.lease[-1] ^ 1])
            for lease in (b"", b"x" * 1000, agent.job.lease[:-1] + forged, b"|".join([b"a"] * 9) + b"0" * 16):
                assert (await refused(agent.send(data, agent.manifest(data, tree, lease=lease))))[0] is denied
            assert (await refused(replace(agent, name="thief").send(data, manifest)))[0] is denied
            assert (await agent.send(data, manifest)).counted
            assert (
                await agent.send(data, manifest)
            ).counted  # an acknowledgement that was lost is said again
            changed = pack({name: 2 * each for name, each in tree.items()}).data
            code, _ = await refused(agent.send(changed, agent.manifest(changed, tree)))
            assert code is grpc.StatusCode.ALREADY_EXISTS
            await end(agent.control, agent.run)

    play(scene())
    run = next(path.name for path in floor.runs.iterdir())
    assert checked(floor, run).updates == 1


def test_only_what_a_job_names_can_be_downloaded(floor: Floor) -> None:
    async def scene() -> None:
        async with hand(floor) as agent:

            def wanted(digest: str) -> Any:
                asked = pb.Wanted(lease=agent.job.lease, digest=digest)
                return agent.stub.Download(asked, metadata=named("hand")).read()

            assert (await wanted(agent.job.recipe.digest)).data.decode().startswith("name")
            for digest in ("0" * 64, "../events.db", ""):
                assert (await refused(wanted(digest)))[0] is grpc.StatusCode.NOT_FOUND

    play(scene())


def test_versions(floor: Floor) -> None:
    async def scene() -> None:
        async with floor.coordinator(), AsyncExitStack() as stack:
            stub = floor.stub(stack)

            async def greet(hello: pb.Hello) -> Any:
                stream = stub.Attend(metadata=named("x"))
                await stream.write(pb.FromAgent(hello=hello))
                reply = await stream.read()
                stream.cancel()
                return reply

            newer = pb.Hello(version=pb.Version(major=1, minor=999), seats=pb.Seats())
            assert (await greet(newer)).WhichOneof("body") == "welcome"
            stranger = pb.Hello(version=pb.Version(major=2), seats=pb.Seats())
            code, words = await refused(greet(stranger))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert f"versions 2.0 and {MAJOR}.{MINOR}" in words
            assert "update" in words

    play(scene())


def test_health_reflection_and_control(floor: Floor) -> None:
    async def scene() -> None:
        async with floor.coordinator() as control, floor.channel("user") as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            missing = grpc.StatusCode.NOT_FOUND
            assert (await refused(control.Stop(pb.RunName(id="nobody"))))[0] is missing
            assert (await refused(end(control, "../../etc")))[0] is missing
            code, words = await refused(control.Submit(pb.Submission(recipe="[train]\nlearning_rate = 1")))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "train.learning_rate" in words
            code, words = await refused(
                control.Submit(pb.Submission(recipe='[algorithm]\nname = "os:system"'))
            )
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "imports nothing" in words

    play(scene())


def test_a_run_is_stopped_and_resumed(floor: Floor) -> None:
    recipe = small(algorithm={"name": "scaffold"}, stop={"rounds": 400})

    async def scene() -> Path:
        async with floor.coordinator() as control, floor.agents(2):
            run = await submit(control, recipe)
            async for happening in control.Watch(pb.WatchRequest(id=run)):
                if happening.round.index == 2:
                    break
            stopped = await control.Stop(pb.RunName(id=run))
            assert stopped.status == "interrupted"
            assert 2 <= stopped.rounds < 400
            resumed = await control.Resume(pb.RunName(id=run))
            assert resumed.status == "running"
            async for happening in control.Watch(pb.WatchRequest(id=run, after=stopped.rounds)):
                if happening.WhichOneof("body") == "round":
                    assert happening.round.index == stopped.rounds + 1
                    break
            await control.Stop(pb.RunName(id=run))
            return floor.runs / run

    directory = play(scene())
    with RunStore.open(directory) as store:
        made = store.summary().rounds
    with pytest.raises(RunError, match="a coordinator made this run"):
        resume(directory)  # in the simulator
    with RunStore.open(directory) as store:
        assert store.summary().rounds == made >= 3


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> list[Agents]:
    """What agents call, of every coordinator that is started."""
    made: list[Agents] = []
    begin = Agents.__init__

    def noting(self: Agents, *arguments: Any) -> None:
        begin(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Agents, "__init__", noting)
    return made


def test_an_agent_that_says_nothing_is_gone_and_its_update_is_late(
    floor: Floor, service: list[Agents]
) -> None:
    async def scene() -> None:
        async with hand(floor, grace=0.1) as mute:
            tree = await mute.update()
            service[0]._limits = replace(service[0]._limits, heartbeat=0.01)  # from the next one on
            await mute.stream.write(pb.FromAgent(heartbeat=pb.Heartbeat()))
            rounds, status = await end(mute.control, mute.run)
            assert [(each.asked, each.folded) for each in rounds] == [(1, 0)]  # lost: the round is abandoned
            assert status.reason == "made 1 rounds"
            data = pack(tree).data
            assert not (await mute.send(data, mute.manifest(data, tree))).counted

    play(scene())


def test_what_is_asked_of_an_ended_run_waits_for_the_database(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: EventLog, *arguments: Any) -> Any:
        raise OperationalError("SELECT", None, ConnectionError("the server closed the connection"))

    async def scene() -> None:
        async with hand(floor) as agent:
            tree = await agent.update()
            data = pack(tree).data
            manifest = agent.manifest(data, tree)
            assert (await agent.send(data, manifest)).counted
            await end(agent.control, agent.run)
            for read in ("snapshot", "update_of"):
                with monkeypatch.context() as patch:
                    patch.setattr(EventLog, read, away)
                    code, words = await refused(agent.send(data, manifest))
                    assert code is grpc.StatusCode.UNAVAILABLE
                    assert "the server closed the connection" in words
            assert (await agent.send(data, manifest)).counted

    play(scene())


def test_an_upload_to_a_run_that_ended_meanwhile_leaves_nothing(floor: Floor, service: list[Agents]) -> None:
    spool = floor.data / "artefacts" / "spool"

    async def scene() -> None:
        async with hand(floor) as agent:
            tree = await agent.update()
            data = pack(tree).data
            call = agent.stub.Upload(metadata=named("hand"))
            await call.write(pb.UploadRequest(manifest=agent.manifest(data, tree)))
            await call.read()
            await call.write(pb.UploadRequest(piece=pb.Piece(offset=0, data=data[:300])))
            failure = pb.Failure(lease=agent.job.lease, kind=pb.Failure.REFUSED, reason="no")
            await agent.stream.write(pb.FromAgent(failure=failure))
            assert (await end(agent.control, agent.run))[1].status == "failed"
            call.cancel()
            await until(lambda: not service[0]._under_way)
            assert list(spool.iterdir()) == []

    play(scene())
