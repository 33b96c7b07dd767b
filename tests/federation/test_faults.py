"""What fails around a coordinator: its database, its disk, the network, its administrators' discipline."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import subprocess
import weakref
from collections.abc import Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import get_args

import grpc
import pytest
import structlog
from floor import Floor, checked, end, play, small, submit, until
from postgres import Postgres
from sqlalchemy import text

from hansa.core.data.config import DataConfig
from hansa.core.errors import RunError
from hansa.core.recipe import parse
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.federation_pb2_grpc import ControlStub
from hansa.server import database, office, runs
from hansa.server.app import Config, coordinator
from hansa.server.artefacts import Artefacts
from hansa.server.events import Event, EventLog
from hansa.server.machine import Effects, Machine
from hansa.server.patience import Over


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(office, "_SUBMITTING", 0.1)


def count(floor: Floor, run: str) -> int:
    with closing(EventLog(floor.url, lead=False)) as log:
        return len(log.events(run))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["restarted", "killed"])
def test_a_database_that_goes_away_costs_time_and_nothing_else(
    floor: Floor, postgres: Postgres, number: signal.Signals
) -> None:
    recipe = small(stop={"rounds": 30}, engine={"dtype": "float64", "checkpoint_every": 3})
    floor.database = postgres.database()

    async def scene() -> str:
        async with floor.coordinator() as control, floor.agents(3):
            run = await submit(control, recipe)
            await until(lambda: count(floor, run) > 20)
            await asyncio.to_thread(postgres.stop, number)
            try:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await submit(control, recipe)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert "try again later" in str(caught.value.details())
            finally:
                await asyncio.to_thread(postgres.start)
            _, status = await end(control, run)
            assert status.status == "finished", status.reason
            assert await submit(control, small(stop={"rounds": 1}))
            return run

    run = play(scene())
    assert checked(floor, run).updates == 30 * 4


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_costs_time_and_nothing_else(floor: Floor, disk: Path) -> None:
    """Everything that the coordinator keeps is on it."""
    recipe = small(stop={"rounds": 30}, engine={"dtype": "float64", "checkpoint_every": 3})
    floor.data, floor.runs = disk / "coordinator", disk / "runs"
    ballast = disk / "ballast"

    async def scene() -> str:
        async with floor.coordinator() as control, floor.agents(3):
            run = await submit(control, recipe)
            await until(lambda: count(floor, run) > 20)
            with structlog.testing.capture_logs() as said:
                _fill(ballast)
                await until(
                    lambda: any(
                        "o space left" in str(e.get("why")) or "full" in str(e.get("why")) for e in said
                    )
                )
                full = count(floor, run)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await submit(control, recipe)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert "see that the directory is writable and the disk has room" in str(
                    caught.value.details()
                )
                assert count(floor, run) <= full + 1
            ballast.unlink()
            _, status = await end(control, run)
            assert status.status == "finished", status.reason
            return run

    run = play(scene())
    assert checked(floor, run).updates == 30 * 4


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def test_a_disk_that_fails_to_make_bytes_durable_ends_the_coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second fsync would report success, though the bytes may be gone."""

    async def scene() -> None:
        artefacts, over = Artefacts(tmp_path / "a"), list[Over]()
        log = EventLog(f"sqlite:///{tmp_path / 'log.db'}", before=artefacts.settle, over=over.append)
        reception = artefacts.receive("r", "0-0", "0" * 64, 1)
        reception.take(b"x")
        reception.keep()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", _broken)
            with pytest.raises(Over, match="the disk failed to make updates durable"):
                await log.append("r", [])
        assert len(over) == 1
        log.close()

    play(scene())


def _broken(descriptor: int) -> None:
    raise OSError(5, "Input/output error")


def test_two_coordinators_on_one_database(
    floor: Floor, postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a folder of its own: the second is turned away, or, past the lock, fences the first off."""
    floor.database = postgres.database()
    second = Config(listen="127.0.0.1:0", data=tmp_path / "2", runs=tmp_path / "2r", database=floor.database)
    monkeypatch.setattr(database, "_HANDOVER", 0.2)

    async def scene() -> None:
        ended: list[Over] = []
        first = Config(listen="127.0.0.1:0", data=floor.data, runs=floor.runs, database=floor.database)
        async with coordinator(first, over=ended.append) as floor.port, floor.channel("u") as channel:
            with pytest.raises(RunError, match="another coordinator leads here; stop it first"):
                await coordinator(second).__aenter__()
            assert not ended
            monkeypatch.setattr(database, "_TRY", text("SELECT true OR :key = 0"))
            async with coordinator(second):
                with pytest.raises(grpc.aio.AioRpcError, match="another coordinator has taken over"):
                    await submit(ControlStub(channel), small())
                assert "another coordinator has taken over" in str(ended[0])

    play(scene())
    with closing(EventLog(floor.url, lead=False)) as log:
        assert log.runs() == []


def test_an_ended_run_lets_go_of_its_hub_and_still_answers(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    hubs: list[weakref.ref[object]] = []
    begin = runs.Run.start

    def noting(self: runs.Run, ended: object) -> None:
        hubs.append(weakref.ref(self.machine.hub))
        begin(self, ended)  # type: ignore[arg-type]

    monkeypatch.setattr(runs.Run, "start", noting)

    async def scene() -> None:
        async with floor.coordinator() as control, floor.agents(2):
            run = await submit(control, small(), key="k")
            rounds, _ = await end(control, run)
            await asyncio.sleep(0)
            await until(lambda: gc.collect() >= 0 and hubs[0]() is None)
            again, status = await end(control, run)
            assert again == rounds
            assert (status.status, status.rounds, status.clients) == ("finished", 3, 6)
            assert await submit(control, small(), key="k") == run
            pieces = [each.data async for each in control.Model(pb.RunName(id=run))]
            assert b"".join(pieces) == (floor.runs / run / "model.safetensors").read_bytes()

    play(scene())


def test_a_run_that_cannot_be_replayed_holds_up_no_other(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as it was when it can be again."""
    apply = Machine.apply

    def failing(self: Machine, event: Event) -> Effects:
        if self.hub.schedule.stop.rounds == 400:
            raise RuntimeError("not enough memory")
        return apply(self, event)

    async def scene() -> None:
        async with floor.coordinator() as control, floor.agents(2):
            stuck = await submit(control, small(stop={"rounds": 400}))
            async for _ in control.Watch(pb.WatchRequest(id=stuck)):
                break
            await control.Stop(pb.RunName(id=stuck))
        with monkeypatch.context() as patch:
            patch.setattr(Machine, "apply", failing)
            async with floor.coordinator() as control, floor.agents(2):
                (told,) = (await control.List(pb.ListRequest())).runs
                assert (
                    told.reason == "it could not be taken up when the coordinator started: not enough memory"
                )
                assert (await end(control, await submit(control, small())))[1].status == "finished"
        async with floor.coordinator() as control:
            assert (await control.Resume(pb.RunName(id=stuck))).rounds >= 1

    play(scene())


def test_recipes_read_what_the_administrator_allowed(floor: Floor, tmp_path: Path) -> None:
    table = "x,y\n" + "".join(f"{i},{i % 2}\n" for i in range(40))
    allowed, secret = tmp_path / "allowed", tmp_path / "secret"
    for folder in (allowed, secret):
        folder.mkdir()
        (folder / "t.csv").write_text(table)
    (allowed / "link.csv").symlink_to(secret / "t.csv")
    floor.sources = (str(allowed),)

    def reading(path: Path | str) -> str:
        data = {"source": "csv", "path": str(path), "target": "y"}
        raw = {
            "data": data,
            "partition": {"kind": "iid", "clients": 2},
            "model": {"name": "logistic"},
            "schedule": {"cohort": 2},
        }
        return parse(raw).toml()

    async def scene() -> None:
        async with floor.coordinator() as control:
            for path in (secret / "t.csv", allowed / "../secret/t.csv", allowed / "link.csv", "/etc/passwd"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await control.Submit(pb.Submission(recipe=reading(path)))
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "data.path" in str(caught.value.details())
                assert "`sources` of the coordinator's configuration" in str(caught.value.details())
            assert (
                await control.Submit(pb.Submission(recipe=reading(allowed / "t.csv")))
            ).status == "waiting"

    play(scene())
    shutil.rmtree(allowed)


def test_every_field_that_names_a_file_is_known_as_one() -> None:
    union, _ = get_args(DataConfig)
    for kind in get_args(union):
        said = {
            n
            for n, f in kind.model_fields.items()
            if str(f.description).startswith(("Path", "Folder", "Name on", "The same, for"))
        }
        assert said == set(kind.FILES), kind


def parts(floor: Floor, run: str) -> set[str]:
    folder = floor.data / "artefacts" / "snapshots" / run
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def named(floor: Floor, run: str) -> set[str]:
    """Parts that the newest snapshot names."""
    with closing(EventLog(floor.url, lead=False)) as log:
        snapshot = log.snapshot(run)
    assert snapshot is not None
    return {snapshot.digest, *(job["packed"][0] for job in snapshot.facts["jobs"])}


@pytest.mark.parametrize("dies", ["before the row", "after the row"])
def test_the_parts_of_a_snapshot_go_when_a_newer_one_is_durable(
    floor: Floor, dies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not before, wherever the coordinator dies in between."""
    recipe = small(stop={"rounds": 30}, engine={"dtype": "float64", "checkpoint_every": 1})
    kept: list[set[str]] = []
    prune = Artefacts.prune

    def noting(self: Artefacts, run: str, digests: Collection[str] = ()) -> None:
        prune(self, run, digests)
        kept.append(parts(floor, run))

    def dying(*arguments: object) -> None:
        raise Over("killed")

    async def scene() -> str:
        with monkeypatch.context() as patch:
            patch.setattr(Artefacts, "prune", noting)
            async with floor.coordinator() as control, floor.agents(2):
                run = await submit(control, recipe)
                await until(lambda: len(kept) > 4)
                if dies == "before the row":
                    patch.setattr(EventLog, "save", dying)
                else:
                    patch.setattr(Artefacts, "prune", dying)
                await until(lambda: parts(floor, run) > named(floor, run))
        assert all(1 <= len(each) <= 3 for each in kept)  # the tensors, and the model that is out
        with monkeypatch.context() as patch:
            patch.setattr(Artefacts, "prune", noting)
            del kept[:]
            async with floor.coordinator():
                assert parts(floor, run) == named(floor, run) == kept[0]
        async with floor.coordinator() as control, floor.agents(2):
            _, status = await end(control, run)
            assert status.status == "finished", status.reason
        return run

    run = play(scene())
    assert parts(floor, run) == set()
    assert checked(floor, run).updates == 30 * 4
