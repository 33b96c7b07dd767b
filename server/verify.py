"""An audit of a finished run: its model, made again from the list of accepted updates."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from hansa.core.errors import RunError
from hansa.core.hub import Hub
from hansa.core.randomness import ALONE
from hansa.core.recipe import parse
from hansa.core.store import ClientScores
from hansa.core.trees import Tree
from hansa.core.wire.federation_pb2 import TensorInfo
from hansa.core.wire.tensors import pack, unpack
from hansa.server.artefacts import Artefacts
from hansa.server.events import EventLog
from hansa.server.machine import Machine
from hansa.strategies.catalog import assemble
from hansa.strategies.evaluate import Evaluator


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was found right.

    Attributes
    ----------
    events, updates, late: how many are in the log; late updates were set aside.
    rounds: steps of the hub.
    digest: SHA-256 of the model.
    """

    events: int
    updates: int
    late: int
    rounds: int
    digest: str


def verify(run: str, *, database: str, artefacts: Path, runs: Path) -> Verified:
    """Replay a run from its first event, every update checked against its digest, and compare the models.

    Raises
    ------
    RunError
        Telling what is missing, damaged or different.
    """
    with closing(EventLog(database, lead=False)) as log:
        return _verified(log, run, artefacts=artefacts, runs=runs)


def _verified(log: EventLog, run: str, *, artefacts: Path, runs: Path) -> Verified:
    row = next((each for each in log.runs() if each.id == run), None)
    if row is None:
        raise RunError(f"{run}: the event log has no such run")
    with ALONE:
        federation = assemble(parse(tomllib.loads(row.recipe)))
    store = Artefacts(artefacts)
    recipe = federation.recipe
    evaluator = Evaluator(federation, seed=recipe.seed, clients=recipe.evaluation.clients)

    def load(digest: str, tensors: Sequence[TensorInfo]) -> Tree:
        data = log.blob(digest)
        if data is None:
            data = store.get(digest)
        elif hashlib.sha256(data).hexdigest() != digest:
            raise RunError(f"update {digest}: it is damaged in the event log; restore it from a backup")
        return unpack(data, tensors)

    def score(hub: Hub) -> tuple[dict[str, float], ClientScores | None]:
        return evaluator(hub, {}) if recipe.stop.target is not None else ({}, None)

    machine = Machine(federation, load, score)
    events = log.events(run)
    for event in events:
        machine.apply(event)
    if machine.ended is None:
        raise RunError(
            f"{run}: it has not finished (round {machine.hub.state.version}); nothing to compare yet"
        )
    made = pack(machine.hub.model())
    path = runs / run / "model.safetensors"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"{path}: the model cannot be read ({error.strerror})") from error
    if digest != made.digest:
        raise RunError(
            f"{path}: its digest is {digest}, and the accepted updates make {made.digest}; one was altered"
        )
    updates = sum(each.kind == "update" for each in events)
    return Verified(
        events=len(events),
        updates=updates,
        late=len(machine.late),
        rounds=machine.hub.state.version,
        digest=digest,
    )
