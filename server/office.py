"""Who is there and what runs: the meeting place of agents and runs."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import secrets
import shutil
import tomllib
from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
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
from hansa.server.past import Past
from hansa.server.roster import Roster
from hansa.server.runs import Run
from hansa.strategies.catalog import Federation, assemble, divided, imports, resolved

if TYPE_CHECKING:
    from hansa.server.agents import Attendant

_SUBMITTING = 8.0  # seconds that a full disk or an absent database may delay a submission
_KEY_LIMIT = 200
_TEXT_LIMIT = 1 << 20  # characters of a recipe
_MADE_UP = 100_000_000  # numbers of a source that makes its examples up
_DEEP = (
    re.compile(  # tables within tables, for which a reader of TOML takes time by the square of their depth
        r"""(?<![\w-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}"""
    )
)

_log = structlog.get_logger(__name__)


class Office:
    """The runs of one coordinator and the agents that are connected.

    Parameters
    ----------
    folder: of run directories.
    grace: seconds that an agent may be gone before its jobs are lost.
    code: what recipes may import (``package.module:Class``); nothing by default.
    sources: folders whose files recipes may read, and data sets of the hub; none by default.
    largest: bytes of a model, and of its update.

    Attributes
    ----------
    roster: what is known of the agents, connected or not.
    """

    def __init__(
        self,
        log: EventLog,
        artefacts: Artefacts,
        folder: Path,
        *,
        grace: float,
        code: Collection[str] = (),
        sources: Collection[str] = (),
        roster: Roster | None = None,
        largest: int | None = None,
    ) -> None:
        self.artefacts, self.roster = artefacts, roster or Roster()
        self._events, self._folder, self._grace = log, folder, grace
        self._code, self._sources, self._largest = code, sources, largest
        self._runs: dict[str, Run] = {}
        self._past: dict[str, Past] = {}
        self._keys: dict[str, str] = {}
        self._agents: dict[str, Attendant] = {}
        self._submitting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by owner

    # Runs.

    async def recover(self) -> None:
        """Take up the runs of the log where they stood."""
        for row in self._events.runs():
            if row.key:
                self._keys[row.key] = row.id
            if row.status in ("finished", "failed"):
                self._past[row.id] = self._ended(row)
                self.artefacts.prune(row.id)
                continue
            try:
                self._begin(await self._events.insist(partial(self._recovered, row), f"{row.id}: recovering"))
            except Exception as error:  # whatever a replay raises: the other runs go on
                expected = isinstance(error, HansaError)
                _log.error("a run cannot be taken up", run=row.id, error=str(error), exc_info=not expected)
                why = f"it could not be taken up when the coordinator started: {error}"
                self._past[row.id] = self._ended(dataclasses.replace(row, reason=why))
        self.artefacts.sweep()
        self.artefacts.clear(lambda run: run not in self._runs)

    async def submit(self, toml: str, wait_for: int, key: str, owner: str) -> Run | Past:
        """Start a run; with a ``key`` that its owner used before, the run of then.

        Raises
        ------
        InputError, DataError
            When the recipe cannot be run here.
        StorageError
            When it cannot be recorded now.
        """
        async with self._submitting[owner]:  # a recipe that takes long holds up nobody else
            key = key and f"{owner}/{key}"
            if key and key in self._keys:
                known = self._keys[key]
                return self._runs.get(known) or self._past[known]
            row, federation = await asyncio.to_thread(self._drawn_up, toml, wait_for, key, owner)
            run = await self._recorded(row, federation)
            if key:
                self._keys[key] = run.id
            self._begin(run)
        return run

    def _drawn_up(self, toml: str, wait_for: int, key: str, owner: str) -> tuple[RunRow, Federation]:
        if len(toml) > _TEXT_LIMIT or _DEEP.search(toml):
            problem = f"it has more than {_TEXT_LIMIT} characters, or 64 tables within one another"
            raise InputError("recipe", None, problem, "name large things by files")
        try:
            raw = tomllib.loads(toml)
        except (ValueError, RecursionError) as error:
            raise InputError("recipe", None, f"it is not TOML: {error}", "correct that line") from error
        recipe = parse(raw)
        if len(key) > _KEY_LIMIT or not key.isprintable():
            raise InputError("key", key, "it is no key", f"use up to {_KEY_LIMIT} letters and digits")
        self._require_permitted(recipe)  # before anything that would import or read
        recipe = resolved(recipe)
        if recipe.attack is not None:
            raise InputError("attack", recipe.attack["name"], "attacks are simulated", "leave the table out")
        federation = self._assembled(recipe)
        if not 0 <= wait_for <= federation.clients:
            raise InputError(
                "wait_for", wait_for, f"there are {federation.clients} clients", "use that many or fewer"
            )
        # A site may lack a class or a category, or have its columns in another order: it is told them all.
        train = federation.data.train
        names = {
            "class_names": train.classes,
            **({"feature_names": train.features} if train.features else {}),
        }
        named = recipe.data.model_copy(update=names)
        recipe = recipe.model_copy(update={"data": named})
        federation = dataclasses.replace(federation, recipe=recipe)
        row = RunRow(
            id=new_run_directory(self._folder, recipe.name).name,
            key=key or None,
            owner=owner,
            recipe=recipe.toml(),
            secret=secrets.token_bytes(32),
            wait_for=wait_for,
            status="waiting",
            clients=federation.clients,
        )
        return row, federation

    async def _recorded(self, row: RunRow, federation: Federation) -> Run:
        """The run in its directory and in the log; of none of both if one fails."""
        what, run = "recording the run", None
        try:
            run = await self._events.insist(partial(self._opened, row, federation), what, seconds=_SUBMITTING)
            known = await self._events.insist(partial(self._events.submit, row), what, seconds=_SUBMITTING)
        except BaseException:
            self._undo(run, row)
            raise
        if known.id == row.id:
            return run
        self._undo(run, row)  # this key was recorded before, and the word of it was lost
        return await self._events.insist(partial(self._recovered, known), what, seconds=_SUBMITTING)

    def _undo(self, run: Run | None, row: RunRow) -> None:
        if run is not None:
            run.close()
        shutil.rmtree(self._folder / row.id, ignore_errors=True)

    def _recovered(self, row: RunRow) -> Run:
        recipe = parse(tomllib.loads(row.recipe))
        self._require_permitted(recipe)
        run = self._opened(row, self._assembled(recipe))
        try:
            run.recover()
        except BaseException:
            run.close()
            raise
        return run

    def _assembled(self, recipe: Recipe) -> Federation:
        held = divided(recipe)
        with ALONE:
            return assemble(recipe, held, largest=self._largest)

    def _opened(self, row: RunRow, federation: Federation) -> Run:
        return Run(row, federation, self._folder / row.id, self._events, self.artefacts)

    def _ended(self, row: RunRow) -> Past:
        return Past(row, self._folder / row.id, self._events)

    def _require_permitted(self, recipe: Recipe) -> None:
        for field, path in imports(recipe):
            if path not in self._code:
                raise InputError(
                    field,
                    path,
                    "a coordinator imports nothing because a recipe says so",
                    "have its administrator add it to `code` of the coordinator's configuration",
                )
        for field, path in recipe.data.files():
            if not self._readable(path):
                raise InputError(
                    f"data.{field}",
                    path,
                    "a coordinator reads no file because a recipe says so",
                    "have its administrator add its folder to `sources` of the coordinator's configuration",
                )

        if recipe.data.numbers > _MADE_UP:
            raise InputError(
                "data.examples",
                None,
                f"{recipe.data.numbers:.3g} numbers would be made up here, and {_MADE_UP:.0e} may be",
                "use fewer examples or features",
            )

    def _readable(self, path: str) -> bool:
        """Links and dots are followed first."""
        where = Path(path).resolve()
        return path in self._sources or any(
            where.is_relative_to(Path(each).resolve()) for each in self._sources
        )

    def _begin(self, run: Run) -> None:
        self._runs[run.id] = run
        run.start(self._retire)
        if run.active:
            self._gather(run)

    def _retire(self, run: Run) -> None:
        """An ended run lets go of its hub."""
        if run.status in ("finished", "failed") and self._runs.pop(run.id, None) is not None:
            run.close()
            self._past[run.id] = self._ended(run.row())
            self.artefacts.clear(lambda each: each == run.id)

    def _gather(self, run: Run) -> None:
        for attendant in self._agents.values():
            run.arrive(attendant, attendant.clients(run.federation.clients))
        self._expect(run, [client for client in run.machine.there if client not in run.workers])

    def _expect(self, run: Run, clients: Sequence[int]) -> None:
        """These clients' jobs are lost unless their agents come back in time."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        run.missed |= dict.fromkeys(clients, now)

        def give_up(id: str) -> None:
            if (still := self._runs.get(id)) is not None:  # who came and went again has time again
                still.give_up([client for client in clients if still.missed[client] == now])

        if clients:
            loop.call_later(self._grace, give_up, run.id)

    async def resume(self, run: Run) -> None:
        """Go on with an interrupted run."""
        await run.resume()
        if run.active:
            self._gather(run)

    def run(self, id: str) -> Run | Past | None:
        """A run of that name."""
        return self._runs.get(id) or self._past.get(id)

    def runs(self) -> list[Run | Past]:
        """All, in the order of their submission."""
        everything: dict[str, Run | Past] = {**self._past, **self._runs}
        return [each for _, each in sorted(everything.items())]

    async def close(self) -> None:
        """End all runs' tasks; the log has everything."""
        for run in list(self._runs.values()):
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
        self.roster.came(attendant.name, attendant.hello, attendant.serial)
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
            if run.active:
                self._expect(run, clients)

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
