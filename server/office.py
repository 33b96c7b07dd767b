"""Who is there and what runs: the meeting place of agents and runs."""

from __future__ import annotations

import asyncio
import secrets
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from hansa.core.errors import HansaError, InputError
from hansa.core.randomness import ALONE
from hansa.core.recipe import Recipe, parse
from hansa.core.store import new_run_directory
from hansa.core.wire import federation_pb2 as pb
from hansa.server.artefacts import Artefacts
from hansa.server.events import EventLog, RunRow
from hansa.server.roster import Roster
from hansa.server.runs import Run
from hansa.strategies.catalog import assemble, imports, resolved

if TYPE_CHECKING:
    from hansa.server.agents import Attendant

_log = structlog.get_logger(__name__)


class Office:
    """The runs of one coordinator and the agents that are connected.

    Parameters
    ----------
    folder: of run directories.
    grace: seconds that an agent may be gone before its jobs are lost.
    code: what recipes may import (``package.module:Class``); nothing by default.

    Attributes
    ----------
    roster: what is known of the agents, connected or not.
    """

    def __init__(
        self, log: EventLog, artefacts: Artefacts, folder: Path, *, grace: float, code: Collection[str] = ()
    ) -> None:
        self.artefacts, self.roster = artefacts, Roster()
        self._events, self._folder, self._grace, self._code = log, folder, grace, code
        self._runs: dict[str, Run] = {}
        self._past: dict[str, RunRow] = {}  # ended before this process began
        self._keys: dict[str, str] = {}
        self._agents: dict[str, Attendant] = {}
        self._submitting = asyncio.Lock()

    # Runs.

    async def recover(self) -> None:
        """Take up the runs of the log where they stood."""
        for row in self._events.runs():
            if row.key:
                self._keys[row.key] = row.id
            if row.status in ("finished", "failed"):
                self._past[row.id] = row
                continue
            try:
                run = await asyncio.to_thread(self._opened, row)
                await asyncio.to_thread(run.recover)
            except HansaError as error:
                _log.error("a run cannot be taken up", run=row.id, error=str(error))
                self._past[row.id] = row
                continue
            self._begin(run)

    async def submit(self, toml: str, wait_for: int, key: str, owner: str) -> Run | RunRow:
        """Start a run; with a ``key`` that its owner used before, the run of then.

        Raises
        ------
        InputError, DataError
            When the recipe cannot be run here.
        """
        async with self._submitting:
            key = key and f"{owner}/{key}"
            if key and key in self._keys:
                known = self._keys[key]
                return self._runs.get(known) or self._past[known]
            run = await asyncio.to_thread(self._made, toml, wait_for, key, owner)
            if key:
                self._keys[key] = run.id
            self._begin(run)
        return run

    def _made(self, toml: str, wait_for: int, key: str, owner: str) -> Run:
        try:
            recipe = parse(tomllib.loads(toml))
        except tomllib.TOMLDecodeError as error:
            raise InputError("recipe", None, f"it is not TOML: {error}", "correct that line") from error
        self._require_permitted(recipe)  # before anything that would import it
        recipe = resolved(recipe)
        if recipe.attack is not None:
            raise InputError("attack", recipe.attack["name"], "attacks are simulated", "leave the table out")
        with ALONE:
            federation = assemble(recipe)
        if not 0 <= wait_for <= federation.clients:
            raise InputError(
                "wait_for", wait_for, f"there are {federation.clients} clients", "use that many or fewer"
            )
        directory = new_run_directory(self._folder, recipe.name)
        row = RunRow(
            id=directory.name,
            key=key or None,
            owner=owner,
            recipe=recipe.toml(),
            secret=secrets.token_bytes(32),
            wait_for=wait_for,
            status="waiting",
        )
        run = Run(row, federation, directory, self._events, self.artefacts)
        self._events.submit(row)
        return run

    def _opened(self, row: RunRow) -> Run:
        recipe = parse(tomllib.loads(row.recipe))
        self._require_permitted(recipe)
        with ALONE:
            federation = assemble(recipe)
        directory = self._folder / row.id
        return Run(row, federation, directory, self._events, self.artefacts)

    def _require_permitted(self, recipe: Recipe) -> None:
        for field, path in imports(recipe):
            if path not in self._code:
                raise InputError(
                    field,
                    path,
                    "a coordinator imports nothing because a recipe says so",
                    "have its administrator add it to `code` of the coordinator's configuration",
                )

    def _begin(self, run: Run) -> None:
        self._runs[run.id] = run
        run.start()
        if run.active:
            self._gather(run)

    def _gather(self, run: Run) -> None:
        for attendant in self._agents.values():
            run.arrive(attendant, attendant.clients(run.federation.clients))
        absent = [client for client in run.machine.there if client not in run.workers]
        asyncio.get_running_loop().call_later(self._grace, run.give_up, absent)

    async def resume(self, run: Run) -> None:
        """Go on with an interrupted run."""
        await run.resume()
        self._gather(run)

    def run(self, id: str) -> Run | None:
        """A run of this process."""
        return self._runs.get(id)

    def runs(self) -> list[Run | RunRow]:
        """All, in the order of their submission."""
        everything: dict[str, Run | RunRow] = {**self._past, **self._runs}
        return [each for _, each in sorted(everything.items())]

    async def close(self) -> None:
        """End all runs' tasks; the log has everything."""
        for run in self._runs.values():
            await run.end()

    # Agents.

    def enter(self, attendant: Attendant) -> None:
        """An agent's stream is open. An older one of the same name gives way, save to one that only looks."""
        if not attendant.clients(1 << 20):
            return
        before = self._agents.get(attendant.name)
        self._agents[attendant.name] = attendant
        if before is not None:
            before.out.put_nowait(None)
        self.roster.came(attendant.name, attendant.hello)
        _log.info("an agent came", agent=attendant.name, device=attendant.hello.device[:40])
        for run in self._runs.values():
            if run.active:
                run.arrive(attendant, attendant.clients(run.federation.clients))

    def leave(self, attendant: Attendant) -> None:
        """An agent's stream ended."""
        if self._agents.get(attendant.name) is attendant:
            del self._agents[attendant.name]
            self.roster.went(attendant.name)
        _log.info("an agent went", agent=attendant.name)
        for run in self._runs.values():
            clients = run.depart(attendant)
            if clients and run.active:
                asyncio.get_running_loop().call_later(self._grace, run.give_up, clients)

    def gauge(self, sample: pb.Sample) -> None:
        """Fill in what is here now."""
        active = [run for run in self._runs.values() if run.active]
        sample.agents, sample.runs = len(self._agents), len(active)
        sample.jobs = sum(run.open for run in active)
        sample.messages_waiting = sum(run.waiting for run in active)
        sample.events_waiting = self._events.waiting

    def drain(self) -> None:
        """Tell all agents that the coordinator goes away and will be back."""
        for attendant in self._agents.values():
            attendant.out.put_nowait(pb.ToAgent(drain=pb.Drain()))
