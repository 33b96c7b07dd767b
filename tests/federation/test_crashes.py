"""Kill -9 at the worst moments: nothing acknowledged is lost, nothing counts twice, the run goes on."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from floor import Floor, checked, end, play, small, submit, until
from zygote import Zygote

from hansa.client.outbox import Entry, Outbox
from hansa.core.errors import RunError
from hansa.core.store import RunStore
from hansa.core.wire import INLINE
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.federation_pb2_grpc import ControlStub
from hansa.server.app import Config, coordinator
from hansa.server.events import Event, EventLog
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import assemble

POINTS = (
    "after-pieces:2",  # the bytes are there, unchecked
    "after-rename:2",  # the file is whole, no row; does not happen where updates come in their manifests
    "before-commit:3",
    "after-commit:2",  # the row is durable, nothing has happened
    "after-apply:3",  # the hub has moved, nobody knows
    "before-ack:2",  # the agent must ask again
    "before-model",  # the run is over, no model
    "after-model",  # the model is there, the run is not marked
)


class Process:
    """A coordinator process on a fixed port, that may be told where to die."""

    def __init__(self, zygote: Zygote, floor: Floor, *, inline: int = INLINE, **environment: str) -> None:
        floor.data.mkdir(exist_ok=True)
        self._announced = floor.data / "address"
        self._announced.unlink(missing_ok=True)
        config = floor.folder / "coordinator.toml"
        facts: dict[str, Any] = {"limits": {"inline": inline}}
        facts |= {"listen": f"127.0.0.1:{floor.port}", "data": str(floor.data), "runs": str(floor.runs)}
        if floor.database is not None:
            facts["database"] = floor.database
        config.write_text(tomli_w.dumps(facts))
        command = ["coordinator", "start", "--config", str(config)]
        self.pid = zygote.start(command, floor.folder / "log", **environment)

    async def port(self) -> int:
        """Where it listens, as soon as it does."""
        await until(lambda: self._announced.exists() or not Zygote.alive(self.pid))
        assert self._announced.exists()
        return int(self._announced.read_text().rpartition(":")[2])

    async def death(self) -> None:
        """Wait for its end."""
        await until(lambda: not Zygote.alive(self.pid))


def events(floor: Floor, run: str) -> list[Event]:
    with closing(EventLog(floor.url, lead=False)) as log:
        return log.events(run)


@pytest.fixture
def acknowledged(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """Every update that an agent was told to count, as soon as it is."""
    told: list[Entry] = []
    settle = Outbox.settle

    def noting(self: Outbox, made: Entry, *, counted: bool) -> None:
        if counted:
            told.append(made)
        settle(self, made, counted=counted)

    monkeypatch.setattr(Outbox, "settle", noting)
    return told


def test_a_coordinator_killed_at_every_point(
    floor: Floor, database: str, zygote: Zygote, acknowledged: list[Entry]
) -> None:
    floor.database = database
    recipe = small(
        algorithm={"name": "scaffold"}, stop={"rounds": 9}, engine={"dtype": "float64", "checkpoint_every": 2}
    )

    async def scene() -> str:
        first = Process(zygote, floor, inline=0, HANSA_CRASH_AT=POINTS[0])
        floor.port = await first.port()
        async with floor.agents(3), floor.channel("user") as channel:
            run = await submit(ControlStub(channel), recipe, key="once")
            await first.death()
            for point in POINTS[1:]:
                await Process(zygote, floor, inline=0, HANSA_CRASH_AT=point).death()
                if point in ("before-commit:3", "after-commit:2", "before-ack:2"):
                    await Process(zygote, floor, HANSA_CRASH_AT=point).death()
            last = Process(zygote, floor)
            await last.port()
            again = await submit(ControlStub(channel), recipe, key="once", wait_for=0)
            assert again == run  # the submission, too, is taken once
            _, status = await end(ControlStub(channel), run)
            assert status.status == "finished", status.reason
            Zygote.kill(last.pid, signal.SIGTERM)
            await last.death()
            return run

    run = play(scene())
    found = [each for each in events(floor, run) if each.kind == "update"]
    accepted = {(each.client, each.number): each.body["digest"] for each in found}
    assert len(accepted) == len(found) == 9 * 4
    for entry in acknowledged:
        assert accepted[entry.client, entry.number] == entry.digest
    assert checked(floor, run).updates == 9 * 4
    undisturbed = Simulator(assemble(recipe))
    undisturbed.run()
    for name, tensor in undisturbed.hub.model().items():
        torch.testing.assert_close(floor.model(run)[name], tensor, rtol=1e-5, atol=1e-5)


def test_a_coordinator_killed_at_random(floor: Floor, zygote: Zygote, acknowledged: list[Entry]) -> None:
    recipe = small(stop={"rounds": 40}, engine={"dtype": "float64", "checkpoint_every": 7})
    draw = random.Random(0)

    async def scene() -> str:
        process = Process(zygote, floor)
        floor.port = await process.port()
        async with floor.agents(4), floor.channel("user") as channel:
            run = await submit(ControlStub(channel), recipe)
            for _ in range(8):
                seen = len(acknowledged)
                await until(lambda seen=seen: len(acknowledged) > seen + draw.randrange(8))  # type: ignore[misc]
                await asyncio.sleep(draw.uniform(0.0, 0.03))
                Zygote.kill(process.pid)
                await process.death()
                process = Process(zygote, floor)
                await process.port()
            _, status = await end(ControlStub(channel), run)
            assert status.status == "finished", status.reason
            Zygote.kill(process.pid, signal.SIGTERM)
            await process.death()
            return run

    run = play(scene())
    accepted = {(e.client, e.number): e.body["digest"] for e in events(floor, run) if e.kind == "update"}
    assert all(accepted[each.client, each.number] == each.digest for each in acknowledged)
    assert checked(floor, run).updates == len(accepted) == 40 * 4
    with RunStore.open(floor.runs / run) as store:
        assert [row.index for row in store.rounds()] == list(range(1, 41))
    undisturbed = Simulator(assemble(recipe))
    undisturbed.run()
    for name, tensor in undisturbed.hub.model().items():
        torch.testing.assert_close(floor.model(run)[name], tensor, rtol=1e-5, atol=1e-5)


def test_agents_that_are_killed_come_back_with_what_they_had(floor: Floor, zygote: Zygote) -> None:
    """Everything in processes of its own; agents are killed at random, in mid-run."""
    recipe = small(algorithm={"name": "fedbn"}, stop={"rounds": 16}, train={"epochs": 20})
    draw = random.Random(0)

    def agent(i: int) -> int:
        home = floor.folder / f"agent-{i}"
        home.mkdir(exist_ok=True)
        where = {"coordinator": f"127.0.0.1:{floor.port}", "state": str(home)}
        lines = {"name": f"agent-{i}", "share": f"{i}/2", **where}
        (home / "agent.toml").write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in lines.items()))
        return zygote.start(["agent", "start", "--config", str(home / "agent.toml")], floor.folder / "log")

    async def scene() -> str:
        async with floor.coordinator() as control:
            agents = [agent(0), agent(1)]
            run = await submit(control, recipe)
            made = 0
            async for happening in control.Watch(pb.WatchRequest(id=run)):
                if happening.WhichOneof("body") == "end":
                    assert happening.end.status == "finished", happening.end.reason
                    break
                made += 1
                if made % 2 == 0:
                    i = draw.randrange(2)
                    Zygote.kill(agents[i])
                    agents[i] = agent(i)
            for pid in agents:
                Zygote.kill(pid)
            return run

    run = play(scene())
    found = Counter((e.client, e.number) for e in events(floor, run) if e.kind == "update")
    assert set(found.values()) == {1}
    undisturbed = Simulator(assemble(recipe))
    undisturbed.run()
    for name, tensor in undisturbed.hub.model().items():
        torch.testing.assert_close(floor.model(run)[name], tensor, rtol=1e-5, atol=1e-5)


def test_a_second_coordinator_is_turned_away(floor: Floor) -> None:
    async def scene() -> None:
        async with floor.coordinator():
            with pytest.raises(RunError, match="another coordinator leads here"):
                async with coordinator(Config(listen="127.0.0.1:0", data=floor.data, runs=floor.runs)):
                    pass

    play(scene())


@pytest.mark.parametrize("inline", [0, INLINE])
def test_an_altered_update_is_found(floor: Floor, inline: int) -> None:
    recipe = small(stop={"rounds": 1})

    async def scene() -> str:
        async with floor.coordinator(inline=inline) as control, floor.agents(2):
            run = await submit(control, recipe)
            await end(control, run)
            return run

    run = play(scene())
    digest = next(each.body["digest"] for each in events(floor, run) if each.kind == "update")
    if inline:
        with closing(sqlite3.connect(floor.data / "events.db")) as database:
            (data,) = database.execute("SELECT data FROM blobs WHERE digest = ?", (digest,)).fetchone()
            altered = data[:-1] + bytes([data[-1] ^ 1])
            database.execute("UPDATE blobs SET data = ? WHERE digest = ?", (altered, digest))
            database.commit()
    else:
        path = floor.data / "artefacts" / digest
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(RunError, match="damaged"):
        checked(floor, run)


def test_what_a_killed_benchmark_started_ends_with_it() -> None:
    child = "import time; time.sleep(60); print('outlived')"
    script = (
        "import subprocess, sys, zygote; "
        f"subprocess.Popen([sys.executable, '-c', {child!r}], preexec_fn=zygote.die_with_parent); "
        "print('started', flush=True); sys.stdin.read()"
    )
    folder = Path(__file__).resolve().parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        parent.kill()
        assert parent.stdout.read() == b""  # the pipe closes when nobody holds it any more
