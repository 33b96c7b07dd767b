"""An evaluation by clients, where the coordinator cannot make it: who was asked, what they said.

Clients evaluate what only they can: a model of which they keep parts (FedBN, FRAug), or any model where a
site holds data of its own. Each receives the new model, puts its own parts in place, and says how it does on
its held-out examples (:class:`~hansa.strategies.evaluate.Tally`). Those are events of the log like all else.

A synchronous schedule hears of a step when it is evaluated, so every client is scored with what it kept after
that round, and a target ends the run at the round that reached it, as in the simulator. Other schedules hear
of it at once, for a wait would make them synchronous: a target ends the run when it is known to be reached,
and a step that falls due while an evaluation is open is not evaluated, save the last one.

Whoever goes away, fails, or has not answered when the time is over is left out of the figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hansa.core.store import Participation, Round, Verdicts
from hansa.core.wire.tensors import Packed
from hansa.server.jobs import Open, named
from hansa.strategies.evaluate import Tally, reckon

PHASE = "evaluate"


@dataclass(kw_only=True)
class Evaluation:
    """One that is open.

    Attributes
    ----------
    packed: the model. asked: when.
    waits: the schedule waits for it.
    waiting: clients that have not answered. tallies: what the others said.
    rounds: the one that is evaluated and those made since, which are told of after it.
    """

    packed: Packed
    asked: float
    waits: bool
    waiting: set[int]
    rounds: list[Round]
    tallies: dict[int, Tally] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """Of the model."""
        return self.rounds[0].index

    @property
    def token(self) -> int:
        """Of the alarm that ends it; a schedule's are not negative."""
        return -self.version

    def job(self, client: int) -> Open | None:
        """What a client has to do, if it was asked and has not answered."""
        if client not in self.waiting:
            return None
        return Open(
            client=client,
            number=self.version,
            phase=PHASE,
            keys=None,
            packed=self.packed,
            expected=(),
            sent=self.asked,
        )

    def take(self, client: int, body: Mapping[str, Any]) -> None:
        """What a client said, if it was asked and had not answered."""
        if body["round"] == self.version and client in self.waiting:
            self.waiting.remove(client)
            self.tallies[client] = Tally(**{name: body[name] for name in ("examples", "loss", "accuracy")})

    def result(self, *, personal: bool) -> Round:
        """The round, with what was said of it."""
        first = self.rounds[0]
        metrics, clients = reckon(self.tallies, personal=personal)
        return dataclasses.replace(first, metrics={**first.metrics, **metrics}, clients=clients)

    # Snapshots.

    def facts(self) -> dict[str, Any]:
        """For :func:`restored`, as JSON holds it, without the model's bytes."""
        return {
            "packed": named(self.packed),
            "asked": self.asked,
            "waits": self.waits,
            "waiting": sorted(self.waiting),
            "tallies": [[client, vars(each)] for client, each in self.tallies.items()],
            "rounds": [_plain(each) for each in self.rounds],
        }


def restored(facts: Mapping[str, Any], payload: Callable[[Sequence[Any]], Packed]) -> Evaluation:
    """The evaluation that told these facts; ``payload`` as for :func:`hansa.server.jobs.restored`."""
    return Evaluation(
        packed=payload(facts["packed"]),
        asked=facts["asked"],
        waits=facts["waits"],
        waiting=set(facts["waiting"]),
        rounds=[_round(each) for each in facts["rounds"]],
        tallies={client: Tally(**each) for client, each in facts["tallies"]},
    )


def _plain(done: Round) -> dict[str, Any]:
    facts = dataclasses.asdict(done)  # clients are not known yet
    if done.verdicts is not None:
        facts["verdicts"] = {name: each.tolist() for name, each in vars(done.verdicts).items()}
    return facts


def _round(facts: Mapping[str, Any]) -> Round:
    verdicts = facts["verdicts"]
    if verdicts is not None:
        verdicts = Verdicts(**{name: np.array(each) for name, each in verdicts.items()})
    made = {
        "participants": tuple(Participation(**each) for each in facts["participants"]),
        "movement": {name: (moved, size) for name, (moved, size) in facts["movement"].items()},
        "verdicts": verdicts,
    }
    return Round(**{**facts, **made})
