"""How fast a coordinator is, with certificates and every check on.

    python benchmarks/coordinator.py rounds       # no-op rounds of two agents: milliseconds
    python benchmarks/coordinator.py heartbeats   # 1,000 connections: heartbeats a second, slowest answers
    python benchmarks/coordinator.py updates      # 4 MB updates, durable: a second; memory
    python benchmarks/coordinator.py burst        # 200 updates of 4 MB at once: memory

The coordinator is a process of its own; so are the two agents of ``rounds``. The others are played by this
process: real connections and messages, no training.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch

from hansa.cli import local
from hansa.core.control import Coordinator
from hansa.core.recipe import parse
from hansa.core.store import RunStore
from hansa.core.trust import Role, channel_credentials
from hansa.core.wire import OPTIONS, PIECE, version
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.federation_pb2_grpc import AgentsStub
from hansa.core.wire.tensors import pack
from hansa.server.trust import Authority
from hansa.server.trust.local import join_here


@dataclass(frozen=True)
class Place:
    """A coordinator that is up."""

    folder: Path
    address: str
    pid: int

    def remote(self) -> Coordinator:
        return Coordinator(self.address, self.folder / "user")

    def memory(self) -> float:
        """Most megabytes that it ever held."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) / 1024

    def busy(self) -> float:
        """Seconds of processor time that it has had."""
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system

    def members(self, count: int) -> list[Path]:
        """Identities of so many agents."""
        with closing(Authority(self.folder / "pki")) as authority:
            folders = [self.folder / "members" / str(i) for i in range(count)]
            for i, each in enumerate(folders):
                join_here(authority, f"member-{i}", Role.AGENT, each)
        return folders


@contextmanager
def place(agents: int) -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "local"
        address = local.up(folder, agents, Path(name) / "runs")
        try:
            yield Place(folder, address, local.processes(folder)[0])
        finally:
            local.down(folder)


def rounds(count: int) -> None:
    recipe = parse(
        {
            "data": {"limit": 100},
            "partition": {"kind": "iid", "clients": 2},
            "model": {"name": "logistic"},
            "train": {"steps": 1},
            "schedule": {"cohort": 2},
            "stop": {"rounds": count},
            "evaluation": {"every": 10**6},
            "engine": {"checkpoint_every": 10**6},
        }
    )
    with place(2) as here, here.remote() as remote:
        run = remote.submit(recipe.toml())
        for happening in remote.watch(run.id):
            end = happening
        assert end.end.status == "finished", end.end
        with RunStore.open(Path(end.end.directory)) as store:
            at = [row.time for row in store.rounds()]
    took = sorted(1e3 * (after - before) for before, after in itertools.pairwise(at))
    median, late = statistics.median(took), took[int(0.99 * len(took))]
    print(f"no-op round, two agents: median {median:.1f} ms, 99th percentile {late:.1f} ms, {count} rounds")


def channel(address: str, identity: Path) -> grpc.aio.Channel:
    options = (*OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    return grpc.aio.secure_channel(address, channel_credentials(identity), options=options)


async def attend(address: str, identity: Path, clients: list[int]) -> tuple[Any, Any]:
    """An agent that is there: what it uploads by, of messages that are bytes already, and its stream."""
    made = channel(address, identity)
    stream = AgentsStub(made).Attend()
    await stream.write(pb.FromAgent(hello=pb.Hello(version=version(), seats=pb.Seats(clients=clients))))
    await stream.read()
    return made.stream_stream(
        "/hansa.v1.Agents/Upload", response_deserializer=pb.UploadReply.FromString
    ), stream


async def beat(place: Place, count: int, seconds: float) -> None:
    members = await asyncio.to_thread(place.members, count)
    streams = [stream for _, stream in [await attend(place.address, m, [10**6 - 1]) for m in members]]
    answers: list[float] = []
    until = time.perf_counter() + seconds

    async def one(stream: Any) -> None:
        while time.perf_counter() < until:
            began = time.perf_counter()
            await stream.write(pb.FromAgent(heartbeat=pb.Heartbeat()))
            await stream.read()
            answers.append(time.perf_counter() - began)

    await asyncio.gather(*map(one, streams))
    answers.sort()
    print(
        f"{count} connections: {len(answers) / seconds:.0f} heartbeats/s, "
        f"99th percentile {answers[int(0.99 * len(answers))]:.2f} s, coordinator {place.memory():.0f} MB"
    )


async def upload(place: Place, members: list[Path], total: int, *, at_once: bool) -> None:
    """``total`` updates of 4 MB into one asynchronous run; ``at_once`` from all members at the same time."""
    recipe = parse(
        {
            "data": {"limit": 500},
            "partition": {"kind": "iid", "clients": len(members)},
            "model": {"name": "mlp", "hidden": [13_981]},  # 64·h + h + 10·h + 10 numbers, 4 MB
            "algorithm": {"name": "fedbuff"},
            "schedule": {
                "name": "buffered",
                "k": 20 if not at_once else len(members),
                "concurrency": len(members),
            },
            "stop": {"rounds": 10**6},
            "evaluation": {"every": 10**6},
            "engine": {"checkpoint_every": 10**6},
        }
    )
    joined = [await attend(place.address, each, [i]) for i, each in enumerate(members)]
    with place.remote() as remote:
        run = await asyncio.to_thread(remote.submit, recipe.toml())
    before = place.memory()
    warm = 0 if at_once else len(members)  # updates before the clock runs: by then the run has begun for all
    left, done = warm + total, -warm
    began, busy, own = time.perf_counter(), place.busy(), time.process_time()

    async def one(upload: Any, stream: Any) -> None:
        nonlocal left, done, began, busy, own
        variants: list[tuple[dict[str, Any], list[bytes]]] = []
        while left > 0:
            message = await stream.read()
            if message is grpc.aio.EOF or message.WhichOneof("body") != "job":
                continue
            left -= 1
            job = message.job
            while len(variants) < (1 if at_once else 3):
                variants.append(prepared(job.tensors))
            facts, pieces = variants[left % len(variants)]
            call = upload()
            manifest = pb.Manifest(lease=job.lease, **facts)
            await call.write(pb.UploadRequest(manifest=manifest).SerializeToString())
            await call.read()
            for each in pieces:
                await call.write(each)
            assert (await call.read()).acknowledgement.counted
            done += 1
            if done == 0:
                began, busy, own = time.perf_counter(), place.busy(), time.process_time()

    await asyncio.gather(*(one(*each) for each in joined))
    took = time.perf_counter() - began
    busy, own = place.busy() - busy, time.process_time() - own
    with place.remote() as remote:
        await asyncio.to_thread(remote.stop, run.id)
    size = 4 * 75 * 13_981
    alone = disk(place.folder, size)
    what = f"{len(members)} at once" if at_once else f"{len(members)} agents"
    print(
        f"{done} updates of {size / 1e6:.1f} MB from {what}: {done / took:.0f}/s, "
        f"{100 * done / took / alone:.0f}% of the {alone:.0f} such files that the disk alone makes durable; "
        f"processor time for each {1e3 * busy / done:.1f} ms in the coordinator, {1e3 * own / done:.1f} ms "
        f"in the agents; coordinator {before:.0f} MB before, {place.memory():.0f} MB at most"
    )


def prepared(tensors: Any) -> tuple[dict[str, Any], list[bytes]]:
    """An update's manifest and pieces."""
    packed = pack({each.name: torch.randn(tuple(each.shape)) * 1e-6 for each in tensors})
    blob = pb.Blob(digest=packed.digest, size=len(packed.data))
    pieces = [
        pb.UploadRequest(piece=pb.Piece(offset=at, data=packed.data[at : at + PIECE])).SerializeToString()
        for at in range(0, len(packed.data), PIECE)
    ]
    return {"update": blob, "tensors": packed.tensors, "examples": 1, "steps": 1}, pieces


def disk(folder: Path, size: int, seconds: float = 3.0) -> float:
    """Files of so many bytes that are written and made durable in a second, one after the other."""
    data, made, began = os.urandom(size), 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        with (folder / f"alone-{made}").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        made += 1
    return made / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("rounds", "heartbeats", "updates", "burst"))
    parser.add_argument("--count", type=int, help="rounds, connections or updates")
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "rounds":
        return rounds(given.count or 200)
    with place(0) as here:
        if given.what == "heartbeats":
            asyncio.run(beat(here, given.count or 1000, given.seconds))
        elif given.what == "updates":
            asyncio.run(upload(here, here.members(20), given.count or 400, at_once=False))
        else:
            asyncio.run(upload(here, here.members(given.count or 200), given.count or 200, at_once=True))
    return None


if __name__ == "__main__":
    main()
