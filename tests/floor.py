"""A coordinator and agents in one process, over loopback gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from safetensors.torch import load_file

from hansa.client.agent import Agent
from hansa.client.agent import Config as AgentConfig
from hansa.core.recipe import Recipe, parse
from hansa.core.trees import Tree
from hansa.core.wire import NAME, OPTIONS
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.federation_pb2_grpc import AgentsStub, ControlStub
from hansa.server.app import Config, coordinator
from hansa.server.limits import Limits
from hansa.server.verify import Verified, verify

PATIENCE = 600.0  # seconds: a busy machine may stand still for minutes

SMALL: Mapping[str, Mapping[str, Any]] = {
    "data": {"limit": 120},
    "partition": {"kind": "quantity", "clients": 6, "min_size": 5},
    "model": {"name": "mlp", "hidden": [6], "norm": "batch"},
    "train": {"epochs": 1, "batch_size": 12, "lr": 0.05},
    "schedule": {"cohort": 4},
    "stop": {"rounds": 3},
    "engine": {"dtype": "float64"},
}


def small(**sections: Mapping[str, Any]) -> Recipe:
    """Six clients with 120 digits among them; sections are merged into the default ones."""
    raw: dict[str, Any] = {**SMALL}
    for name, section in sections.items():
        named = {"name", "kind"} & section.keys() and name != "algorithm"
        raw[name] = dict(section) if named else {**raw.get(name, {}), **section}
    return parse(raw)


class Floor:
    """Where a coordinator and its agents meet; ``tmp_path`` holds what they keep."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.data = folder, folder / "runs", folder / "coordinator"
        self.database: str | None = None  # in ``data`` unless set
        self.sources: tuple[str, ...] = ()
        self.port = 0

    @asynccontextmanager
    async def coordinator(self, **limits: Any) -> AsyncIterator[ControlStub]:
        """A coordinator and a stub to control it; on the port of the one before, if there was one."""
        config = Config(
            listen=f"127.0.0.1:{self.port}",
            data=self.data,
            runs=self.runs,
            database=self.database,
            sources=self.sources,
            limits=Limits(**{"heartbeat": 30.0, "grace": 120.0, **limits}),
        )
        async with coordinator(config) as self.port, self.channel("user") as channel:
            yield ControlStub(channel)

    def channel(self, name: str) -> grpc.aio.Channel:
        """A channel to it."""
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options=OPTIONS)

    def stub(self, stack: AsyncExitStack) -> AgentsStub:
        """What a bare agent calls; closed with ``stack``."""
        channel = self.channel("bare")
        stack.push_async_callback(channel.close)
        return AgentsStub(channel)

    def agent(self, name: str, **config: Any) -> Agent:
        """An agent whose state is kept under its name."""
        where = {"coordinator": f"127.0.0.1:{self.port}", "state": self.folder / name}
        return Agent(AgentConfig(name=name, **{**where, **config}))

    @asynccontextmanager
    async def agents(self, count: int = 3, **config: Any) -> AsyncIterator[list[asyncio.Task[None]]]:
        """``count`` agents that share all clients."""
        made = [self.agent(f"a{i}", share=f"{i}/{count}", **config) for i in range(count)]
        tasks = [asyncio.create_task(each.run()) for each in made]
        try:
            yield tasks
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """Of the event log."""
        return self.database or f"sqlite:///{self.data / 'events.db'}"

    def model(self, run: str) -> Tree:
        """The model that a run ended with."""
        return load_file(self.runs / run / "model.safetensors")


def named(name: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a bare agent."""
    return ((NAME, name),)


async def submit(control: ControlStub, recipe: Recipe, **options: Any) -> str:
    """Start a run; its id."""
    status: pb.RunStatus = await control.Submit(pb.Submission(recipe=recipe.toml(), **options))
    return status.id


async def end(control: ControlStub, run: str) -> tuple[list[pb.Round], pb.RunStatus]:
    """All rounds of a run, and its end."""
    rounds: list[pb.Round] = []
    async for happening in control.Watch(pb.WatchRequest(id=run)):
        if happening.WhichOneof("body") == "end":
            return rounds, happening.end
        rounds.append(happening.round)
    raise AssertionError("the run had no end")


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that will happen."""
    while not condition():
        await asyncio.sleep(0.01)


def play(scene: Coroutine[Any, Any, Any]) -> Any:
    """Run a scene to its end; a scene that hangs fails."""

    async def bounded() -> Any:
        async with asyncio.timeout(PATIENCE):
            return await scene

    return asyncio.run(bounded())


def checked(floor: Floor, run: str) -> Verified:
    """What an audit of a finished run finds."""
    return verify(run, database=floor.url, artefacts=floor.data / "artefacts", runs=floor.runs)
