"""Hostile traffic for a coordinator: valid messages of every method, mutated, and what became of them.

Mallory is a member: she has a seat in a run, and jobs. Honest agents work in the same run beside her.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import resource
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import grpc
import torch
from floor import Floor, named, small, submit
from safetensors.torch import load, save

from hansa.client import workshop
from hansa.core.wire import OPTIONS, version
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.federation_pb2_grpc import AgentsStub, ControlStub
from hansa.core.wire.tensors import describe, pack, unpack
from hansa.server.events import EventLog
from hansa.strategies.local import train

FUZZED = small(
    model={"name": "mlp", "hidden": [6]},
    partition={"kind": "iid", "clients": 3},
    algorithm={"name": "fedbuff"},
    schedule={"name": "buffered", "k": 2, "concurrency": 3},
    aggregation={"rule": "centred_clipping", "tau": 1e-6},  # a right update may be of any finite size
    stop={"rounds": 10**6},
    evaluation={"every": 10**6},
    engine={"dtype": "float64", "checkpoint_every": 10**6},
)
PRECISE = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
}
_CUT = "Internal error from Core"
HOSTILE = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = (
    "",
    "\0",
    "../../etc/passwd",
    "a" * 100_000,
    "\u202e\x1b[2J",
    "%s%n",
    "'; DROP TABLE runs; --",
    "é" * 64,
)


def scrambled(draw: random.Random, data: bytes) -> bytes:
    """A few bytes flipped, lost, repeated or made up."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(made) + 1)
        match draw.randrange(5):
            case 0 if made:
                made[at % len(made)] ^= 1 << draw.randrange(8)
            case 1:
                del made[at : at + draw.randint(1, 16)]
            case 2:
                made[at:at] = draw.randbytes(draw.randint(1, 16))
            case 3:
                made[at:at] = made[: draw.randint(0, 64)]
            case _:
                made[at : at + 8] = struct.pack("<Q", draw.choice(HOSTILE))
    return bytes(made)


def twisted(draw: random.Random, message: Any) -> Any:
    """One field of a message, however deep, with a value that nobody would send."""
    made = type(message)()
    made.CopyFrom(message)
    holder = made
    while True:
        if not holder.DESCRIPTOR.fields:
            return made
        chosen = draw.choice(holder.DESCRIPTOR.fields)
        if chosen.message_type is None or chosen.is_repeated or draw.random() < 0.1:
            break
        holder = getattr(holder, chosen.name)
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        match chosen.cpp_type:
            case chosen.CPPTYPE_STRING if chosen.type == chosen.TYPE_BYTES:
                value: Any = draw.randbytes(draw.choice((0, 1, 63, 5000)))
            case chosen.CPPTYPE_STRING:
                value = draw.choice(TEXTS)
            case chosen.CPPTYPE_DOUBLE | chosen.CPPTYPE_FLOAT:
                value = draw.choice((float("nan"), float("inf"), -1e308, 0.0))
            case chosen.CPPTYPE_BOOL:
                value = True
            case chosen.CPPTYPE_MESSAGE:
                holder.ClearField(chosen.name)
                return made
            case _:
                value = draw.choice(HOSTILE) % (2**64 if chosen.cpp_type == chosen.CPPTYPE_UINT64 else 2**32)
        if chosen.is_repeated:
            getattr(holder, chosen.name).extend([value] * draw.choice((1, 3, 1000)))
        else:
            setattr(holder, chosen.name, value)
    return made


def lied(draw: random.Random, good: bytes) -> bytes:
    """A safetensors file whose header or numbers are not what they should be."""
    size = int.from_bytes(good[:8], "little")
    header: dict[str, Any] = json.loads(good[8 : 8 + size])
    body = bytearray(good[8 + size :])
    name = draw.choice(list(header))
    entry = header[name]
    text: str | None = None
    match draw.randrange(11):
        case 0:
            entry["shape"] = draw.choice(([], [0, 2**40], [2**62, 4], [-1], [*entry["shape"][::-1], 1]))
        case 1:
            entry["dtype"] = draw.choice(("F32", "F16", "I64", "U8", "BOOL", "F8_E4M3", "X", ""))
        case 2:
            entry["data_offsets"] = draw.choice(([0, 0], [8, 0], [0, 2**63], [-8, 8], [1, 9]))
        case 3:
            header[draw.choice(TEXTS)[:2000]] = entry
        case 4:
            del header[name]
        case 5:
            text = json.dumps(header).replace("{", "{" + json.dumps(name) + ":" + json.dumps(entry) + ",", 1)
        case 6:
            header["__metadata__"] = {"x": "y" * draw.randint(0, 10_000)}
        case 7:
            text = "[" * draw.randint(1, 100_000)
        case 8:
            at = 8 * draw.randrange(len(body) // 8)
            body[at : at + 8] = struct.pack("<d", draw.choice((float("nan"), float("inf"), -float("inf"))))
        case 9:
            body += bytes(draw.randint(1, 4096))
        case _:
            del body[-draw.randint(1, len(body)) :]
    raw = (text or json.dumps(header)).encode()
    length = draw.choice((len(raw), len(raw), len(raw), *HOSTILE))
    return struct.pack("<Q", length) + raw + bytes(body)


@dataclass
class Storm:
    """One storm against one coordinator.

    Attributes
    ----------
    ends: how calls ended, by method and status.
    sent: calls so far.
    """

    floor: Floor
    draw: random.Random
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent: int = 0
    run: str = ""
    _job: pb.Job | None = None
    _good: bytes = b""
    _stream: Any = None

    async def blow(self, messages: int) -> None:
        """Send so many; the honest agents of the same run are the caller's."""
        options = (*OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        address = f"127.0.0.1:{self.floor.port}"
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            self.run = await submit(ControlStub(channel), FUZZED, wait_for=3)
            ways: Mapping[Callable[[grpc.aio.Channel], Any], int] = {
                self._raw: 3,
                self._manifest: 3,
                self._payload: 3,
                self._pieces: 1,
                self._attendance: 1,
            }
            while self.sent < messages:
                if self._job is None:
                    await self._seat(channel)
                act = self.draw.choices([*ways], [*ways.values()])[0]
                self.sent += 1
                await act(channel)
            self._stream.cancel()

    async def _seat(self, channel: grpc.aio.Channel) -> None:
        """Come in anew, as an honest agent would, and take a job."""
        if self._stream is not None:
            self._stream.cancel()
        stub = AgentsStub(channel)
        self._stream = stub.Attend(metadata=named("mallory"))
        hello = pb.Hello(version=version(), seats=pb.Seats(clients=[0]))
        await self._stream.write(pb.FromAgent(hello=hello))
        while True:
            message = await self._stream.read()
            if message is grpc.aio.EOF:
                raise AssertionError("an honest hello was refused")
            if message.WhichOneof("body") == "job":
                break
        job = self._job = message.job
        if self._good:
            return
        data = b""
        wanted = pb.Wanted(lease=job.lease, digest=job.payload.digest)
        async for piece in stub.Download(wanted, metadata=named("mallory")):
            data += piece.data
        tree = unpack(data, job.tensors)
        self._good = pack({name: 1e-9 * torch.ones_like(each) for name, each in tree.items()}).data

    def _honest(self, data: bytes, **facts: Any) -> pb.Manifest:
        assert self._job is not None
        said: Mapping[str, Any] = {
            "lease": self._job.lease,
            "update": pb.Blob(digest=hashlib.sha256(data).hexdigest(), size=len(data)),
            "tensors": describe(load(self._good)),
            "examples": 5,
            "steps": 1,
            "loss": 1.0,
            "has_loss": True,
            **facts,
        }
        return pb.Manifest(**said)

    async def _call(self, channel: grpc.aio.Channel, method: str, *messages: bytes) -> None:
        """Raw bytes to a method, as a stream or alone; how it ends is noted."""
        plain = (lambda data: data), (lambda data: data)
        service, _, name = method.partition("/")
        path = f"/hansa.v1.{service}/{name}"
        metadata = named("mallory") if service == "Agents" else named("eve")
        try:
            if name in ("Attend", "Upload"):
                call: Any = channel.stream_stream(path, *plain)(metadata=metadata, timeout=20)
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    for each in messages:  # the call may end before all was said
                        await call.write(each)
                    await call.done_writing()
                    while await call.read() is not grpc.aio.EOF:
                        pass
                code, details = await call.code(), await call.details()
                if details == _CUT:  # gRPC's client says so itself where it still wrote when the answer came
                    self.ends[method, "answered early"] += 1
                elif code is not grpc.StatusCode.OK:
                    self._require(method, code, details)
                    self.ends[method, code.name] += 1
                else:
                    self.ends[method, "OK"] += 1
                self._job = None
                return
            if name in ("Download", "Watch", "Model", "Roster"):
                call = channel.unary_stream(path, *plain)(messages[0], metadata=metadata, timeout=1)
                async for _ in call:
                    pass
            else:
                await channel.unary_unary(path, *plain)(messages[0], metadata=metadata, timeout=20)
            end = "OK"
        except grpc.aio.AioRpcError as error:
            end = error.code().name
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and name == "Watch":
                end = "OK"  # it watched a run that goes on
            else:
                self._require(method, error.code(), error.details())
        self.ends[method, end] += 1

    def _require(self, method: str, code: grpc.StatusCode, details: str | None) -> None:
        if code not in PRECISE:
            raise AssertionError(f"{method}: {code.name}: {details}")

    async def _raw(self, channel: grpc.aio.Channel) -> None:
        """A message of any method, scrambled or twisted."""
        assert self._job is not None
        lease = self._job.lease
        seats = pb.Seats(clients=[0])
        asked = {
            "Agents/Attend": pb.FromAgent(hello=pb.Hello(version=version(), seats=seats, holding=[lease])),
            "Agents/Download": pb.Wanted(lease=lease, digest=self._job.payload.digest),
            "Agents/Upload": pb.UploadRequest(manifest=self._honest(self._good)),
            "Control/Submit": pb.Submission(recipe="[stop]\nrounds = 'x'\n", key="k"),
            "Control/Watch": pb.WatchRequest(id=self.run, after=1),
            "Control/Stop": pb.RunName(id=self.run[:-1]),
            "Control/Resume": pb.RunName(id=self.run),
            "Control/Model": pb.RunName(id=self.run),
            "Control/List": pb.ListRequest(),
            "Control/Roster": pb.RosterRequest(),
            "Control/Condition": pb.ConditionRequest(),
        }
        method = self.draw.choice(list(asked))
        message = asked[method]
        if self.draw.random() < 0.5:
            data = scrambled(self.draw, message.SerializeToString())
        else:
            data = twisted(self.draw, message).SerializeToString()
        if method == "Control/Stop" and self.run.encode() in data:
            return  # that would be a proper wish
        await self._call(channel, method, data)

    async def _manifest(self, channel: grpc.aio.Channel) -> None:
        """A manifest with one field wrong, then the honest bytes."""
        manifest = twisted(self.draw, self._honest(self._good))
        piece = pb.UploadRequest(piece=pb.Piece(offset=0, data=self._good))
        first = pb.UploadRequest(manifest=manifest)
        await self._call(channel, "Agents/Upload", first.SerializeToString(), piece.SerializeToString())

    async def _payload(self, channel: grpc.aio.Channel) -> None:
        """An honest manifest of dishonest bytes."""
        data = lied(self.draw, self._good) if self.draw.random() < 0.7 else scrambled(self.draw, self._good)
        first = pb.UploadRequest(manifest=self._honest(data))
        piece = pb.UploadRequest(piece=pb.Piece(offset=0, data=data[: 3 << 20]))
        await self._call(channel, "Agents/Upload", first.SerializeToString(), piece.SerializeToString())

    async def _pieces(self, channel: grpc.aio.Channel) -> None:
        """Honest bytes in pieces that overlap, leave holes, come twice or out of order."""
        size = self.draw.choice((100, 500, len(self._good)))
        pieces = [
            pb.UploadRequest(piece=pb.Piece(offset=at, data=self._good[at : at + size]))
            for at in range(0, len(self._good), size)
        ]
        match self.draw.randrange(4):
            case 0:
                self.draw.shuffle(pieces)
            case 1:
                pieces.insert(self.draw.randrange(len(pieces) + 1), pieces[0])
            case 2:
                del pieces[self.draw.randrange(len(pieces))]
            case _:
                pieces[-1].piece.offset = self.draw.choice(HOSTILE)
        first = pb.UploadRequest(manifest=self._honest(self._good))
        await self._call(channel, "Agents/Upload", *(each.SerializeToString() for each in (first, *pieces)))

    async def _attendance(self, channel: grpc.aio.Channel) -> None:
        """A hello, then anything."""
        assert self._job is not None
        hello = pb.FromAgent(hello=pb.Hello(version=version(), seats=pb.Seats(clients=[0])))
        failure = pb.Failure(
            lease=self._job.lease, kind=pb.Failure.FAILED, reason=self.draw.choice(TEXTS)[:5000]
        )
        rest = [
            twisted(self.draw, pb.FromAgent(failure=failure)),
            twisted(self.draw, pb.FromAgent(progress=pb.Progress(lease=self._job.lease, steps=3))),
        ]
        data = [each.SerializeToString() for each in (hello, *rest)]
        data[-1] = scrambled(self.draw, data[-1])
        await self._call(channel, "Agents/Attend", *data)

    def accepted(self) -> int:
        """Updates of Mallory's that are in the log; each is checked once more, by other means."""
        log = EventLog(self.floor.url, lead=False)
        mine = [e for e in log.events(self.run) if e.kind == "update" and e.body["agent"] == "mallory"]
        log.close()
        shapes = {name: (each.dtype, each.shape) for name, each in load(self._good).items()}
        for event in mine:
            data = (self.floor.data / "artefacts" / event.body["digest"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == event.body["digest"]
            tree = load(data)
            assert {name: (each.dtype, each.shape) for name, each in tree.items()} == shapes
            assert all(bool(each.isfinite().all()) for each in tree.values())
            assert len(save(tree)) <= len(data) + 8
            assert 0 < event.body["examples"] <= 100_000_000
            assert event.body["steps"] <= 1_000_000
        jobs = [(each.client, each.number) for each in mine]
        assert len(jobs) == len(set(jobs))
        return len(mine)


def memory() -> float:
    """Most megabytes that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextlib.asynccontextmanager
async def honest(floor: Floor) -> AsyncIterator[None]:
    """Two honest agents beside Mallory, who take their time."""

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return train(*arguments, **options)

    with mock.patch.object(workshop, "train", slow):
        tasks = [asyncio.create_task(floor.agent(f"honest-{i}", clients=(i,)).run()) for i in (1, 2)]
        try:
            yield
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
