"""The life of a run: a directory, its record, checkpoints, and an end that is told whatever happens.

::

    start(recipe, folder) ─► Run.go() ─┬─► finished      model.safetensors is written
    resume(directory) ─────►           ├─► interrupted   by Run.stop(); resume() goes on
                                       └─► failed        the error is in the record; resume() tries again

A process that dies without a word leaves a directory that reads as interrupted. It goes on from its last
periodic checkpoint, or from the start if it has none yet. In every case the resumed run makes the rounds, and
the model, that it would have made undisturbed.
"""

from __future__ import annotations

import os
import platform
import time
import tomllib
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import hansa
from hansa.core.errors import DataError, HansaError, InputError, Interrupted, RunError
from hansa.core.hub import PeerHub
from hansa.core.recipe import Recipe, override, parse
from hansa.core.store import Round, RunStore, new_run_directory
from hansa.simulation.catalog import World, require_attackers, resolved, world
from hansa.simulation.simulator import Ending, Simulator
from hansa.simulation.workers import Workers, join
from hansa.strategies.catalog import Federation, assemble


class Run:
    """A run that is ready to go, made by :func:`start` or :func:`resume`.

    Attributes
    ----------
    directory: the run directory.
    federation: what is run.
    simulator: what runs it.
    begins_after: the round after which it goes on, 0 at the start.
    """

    def __init__(
        self, directory: Path, federation: Federation, world: World, workers: Workers, store: RunStore | None
    ) -> None:
        self.directory = directory
        self._workers = workers
        self._store = store
        self.federation = federation
        self.simulator = Simulator(
            federation,
            world.population,
            world.attack,
            on_round=self._record,
            checkpoints=directory / "checkpoints",
            workers=workers,
        )
        self.begins_after = 0
        self._seconds = 0.0
        self._on_round: Callable[[Round], None] | None = None

    @property
    def recorded(self) -> bool:
        """Whether this process keeps the record: of several workers, the first."""
        return self._workers.first

    @property
    def profile(self) -> dict[str, float]:
        """Wall seconds by kind of work, of this process: those of the simulator, and all ``other``."""
        seconds = self.simulator.seconds
        return {**seconds, "other": max(0.0, self._seconds - sum(seconds.values()))}

    @property
    def model(self) -> Path:
        """Where the final model goes: its shared tensors, and those of networks shared with it, by name."""
        return self.directory / "model.safetensors"

    def go(self, on_round: Callable[[Round], None] | None = None) -> Ending:
        """Run to the end, record how it ended, and close the record. ``on_round`` is told of every round.

        Raises
        ------
        Interrupted
            After :meth:`stop`.
        HansaError
            Of whatever kind went wrong.
        """
        self._on_round = on_round
        began = time.perf_counter()
        try:
            ending = self.simulator.run()
            if self._store is not None:
                self._write_model(ending)
                self._store.event(ending.time, "finished", ending.reason)
                self._store.finish("finished")
        except (Interrupted, KeyboardInterrupt) as error:
            self._end("interrupted", str(error) or "ended at once, on request")
            raise
        except HansaError as error:
            self._end("failed", str(error))
            raise
        except BaseException as error:
            self._end("failed", f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
        finally:
            if self._store is not None:
                with suppress(RunError):
                    self._store.fact("engine", self.simulator.engine)  # known since the first cohort
                self._store.close()
            self._seconds = time.perf_counter() - began
        return ending

    def stop(self) -> None:
        """Ask for an end after the event that is being handled; may be called from a signal handler."""
        self.simulator.stop()

    def _record(self, done: Round) -> None:
        if self._store is not None:
            self._store.append(done)
        if self._on_round is not None:
            self._on_round(done)

    def _end(self, status: Literal["interrupted", "failed"], error: str, details: str = "") -> None:
        if self._store is None:
            return
        # A record that cannot be written any more must not hide what happened.
        with suppress(RunError):
            self._store.event(self._store.summary().time, status, details or error)
            self._store.finish(status, error)

    def _write_model(self, ending: Ending) -> None:
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in ending.params.items()
        }
        draft = self.model.with_suffix(".part")
        try:
            save_file(tensors, draft, metadata={"format": "pt"})
            os.replace(draft, self.model)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{self.model}: the model cannot be written ({error}); make room and resume the run"
            ) from error


def start(recipe: Recipe, folder: Path) -> Run:
    """Assemble a run and make its directory in ``folder``, with the recipe and all its defaults in it.

    Raises
    ------
    InputError, DataError
        Before there is a directory.
    RunError
        When the directory cannot be written.
    """
    recipe = resolved(recipe)
    workers = join()
    workers.use(recipe.engine.device)
    federation, around = workers.together(lambda: _assembled(recipe))
    directory = Path(workers.from_first(lambda: str(new_run_directory(folder, recipe.name))))
    return workers.together(lambda: _started(directory, federation, around, workers))


def _started(directory: Path, federation: Federation, around: World, workers: Workers) -> Run:
    recipe = federation.recipe
    try:
        run = Run(directory, federation, around, workers, None)
        if not workers.first:
            return run
        run._store = store = RunStore.create(
            directory, name=recipe.name, seed=recipe.seed, recipe=recipe.toml(), facts=_facts(run)
        )
    except BaseException:
        with suppress(OSError):
            directory.rmdir()  # only if nothing is in it yet
        raise
    if isinstance(run.simulator.hub, PeerHub):
        store.topology(run.simulator.hub.mixing.cpu().numpy())
    counts = federation.data.counts()
    if counts is None:
        store.partition(federation.data.train_shards.sizes.numpy())
    else:
        store.partition(counts, federation.data.train.classes or ())
    return run


def resume(directory: Path, engine: Mapping[str, str] | None = None) -> Run:
    """Make a run ready to go on where its last checkpoint was written.

    Rounds recorded after that are forgotten, for they will be made again. ``engine`` overrides keys of that
    section as :func:`~hansa.core.recipe.load` does, for where a run is computed does not change it.

    Raises
    ------
    RunError
        When ``directory`` is no run directory, or the run has finished, is still running, or cannot be read.
    InputError, DataError
        When what its recipe needs is no longer there.
    """
    workers = join()
    store = workers.together(lambda: _reopened(directory) if workers.first else None)
    try:
        text, recorded = workers.from_first(lambda: [store.recipe, store.summary().rounds] if store else None)
        recipe = parse(_changed(tomllib.loads(text), engine or {}))
        workers.use(recipe.engine.device)
        return workers.together(lambda: _resumed(directory, recipe, workers, store, recorded))
    except BaseException:
        if store is not None:
            store.close()
        raise


def _changed(raw: dict[str, Any], engine: Mapping[str, str]) -> dict[str, Any]:
    for key, text in engine.items():
        if not key.startswith("engine.") or key == "engine.dtype":
            raise InputError(
                "--config",
                key,
                "a run goes on as it began",
                "change keys of engine except dtype, or start another run",
            )
        override(raw, key, text)
    return raw


def _resumed(directory: Path, recipe: Recipe, workers: Workers, store: RunStore | None, recorded: int) -> Run:
    run = Run(directory, *_assembled(recipe), workers, store)
    data = store.facts.get("data") if store is not None else None
    if data is not None and data != run.federation.data.digest():
        raise DataError(
            "data",
            recipe.data.source,
            "the examples, or who holds them, are no longer those the run began with",
            f"put the data back as they were, or start {directory / 'recipe.toml'} again",
        )
    run.begins_after = run.simulator.resume(recorded)
    if store is not None:
        store.truncate(run.begins_after)
        store.event(store.summary().time, "resumed", f"after round {run.begins_after}")
    return run


def _reopened(directory: Path) -> RunStore:
    store = RunStore.open(directory)
    status = store.summary().status
    if status in ("finished", "running"):
        store.close()
    if status == "finished":
        raise RunError(
            f"{directory}: this run has finished; to go further, start its recipe.toml with more rounds"
        )
    if status == "running":
        raise RunError(f"{directory}: this run is still running; stop it first")
    if store.facts.get("engine") == "coordinator":
        store.close()
        raise RunError(
            f"{directory}: a coordinator made this run; `hansa resume {directory.resolve().name} --on WHERE` "
            "goes on"
        )
    path = directory / "recipe.toml"
    if path.exists() and path.read_bytes() != store.recipe.encode():
        store.close()
        raise RunError(
            f"{path}: was changed, but a run goes on as it began; start the changed recipe as a run of "
            "its own, or delete this file to go on"
        )
    return store


def _assembled(recipe: Recipe) -> tuple[Federation, World]:
    around = world(recipe)
    federation = assemble(recipe)
    if around.attack is not None:
        require_attackers(around.attack, federation.clients, recipe.seed)
    return federation, around


def _facts(run: Run) -> dict[str, str]:
    recipe, data = run.federation.recipe, run.federation.data
    return {
        "algorithm": recipe.algorithm["name"].rpartition(":")[2],
        "schedule": recipe.schedule["name"].rpartition(":")[2],
        "clients": str(data.clients),
        "examples": f"{len(data.train)} train, {len(data.test)} test",
        "data": data.digest(),
        "engine": run.simulator.engine,
        "device": recipe.engine.device,
        "threads": str(torch.get_num_threads()),
        "hansa": hansa.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
