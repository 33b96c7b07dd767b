"""What a run leaves behind, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from hansa.core.values import value

if TYPE_CHECKING:  # torch is not needed to read
    from hansa.core.algorithm import Report
    from hansa.core.reducer import Judgement


HEADLINE = "accuracy"
"""Name of the metric that a run is judged by, a share between 0 and 1."""

SPREAD = ("worst", "q1", "median", "q3", "best", "deviation", "jain")
"""How clients' accuracies lie in a round: least, quartiles, greatest, standard deviation, Jain's index."""

Outcome = Literal["folded", "discarded", "lost"]
Status = Literal["running", "finished", "interrupted", "failed", "unreadable"]


@value(kw_only=True)
class Participation:
    """One job that came back, or did not.

    Parameters
    ----------
    client, phase:
        Who was asked for what (``"train"``, ``"probe"``, …).
    examples, steps:
        Examples that the client holds for this task, local steps that it made.
    staleness:
        Server steps between the dispatch and the return.
    weight:
        Weight of the update in the aggregate, before normalisation.
    dispatched, returned:
        Seconds on the run's clock (virtual or wall). Between the return and the time of its round, an update
        waited for the others.
    loss:
        The client's mean training loss, where it told one.
    outcome:
        Whether the update was folded into the model, discarded (too late, refused), or lost on the way.
    layers:
        Names of the tensors that the client was asked to change, where it was not all of them.
    """

    client: int
    phase: str
    examples: int
    steps: int
    staleness: int
    weight: float
    dispatched: float
    returned: float
    loss: float | None
    outcome: Outcome
    layers: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientScores:
    """The model of one round, evaluated on clients' own data; all arrays have shape [n].

    Parameters
    ----------
    client:
        Client numbers.
    examples:
        Examples that each was evaluated on.
    accuracy, loss:
        Share of them that was right, and mean loss; NaN where unknown.
    """

    client: NDArray[np.int64]
    examples: NDArray[np.int64]
    accuracy: NDArray[np.float64]
    loss: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdicts:
    """What a robust rule made of the updates of one round, in their order; all arrays have shape [n].

    Attributes
    ----------
    client:
        Whose update it was.
    distance:
        From the update to what the rule made of all; NaN for one that is not finite.
    relative:
        The same in units of the round's median: 1 is as far as usual.
    weight:
        In the result, in units of a plain mean's: 0 is left out, 1 is a vote like any; NaN where the rule
        decides every number by itself.
    """

    client: NDArray[np.int64]
    distance: NDArray[np.float64]
    relative: NDArray[np.float64]
    weight: NDArray[np.float64]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Verdicts) and all(
            np.array_equal(each, getattr(other, name), equal_nan=True) for name, each in vars(self).items()
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(cls, judged: tuple[Sequence[Report], Judgement] | None) -> Verdicts | None:
        """From what a hub says of its last step."""
        if judged is None:
            return None
        reports, judgement = judged
        distance = judgement.distances.cpu().double().numpy()
        distance = np.where(np.isfinite(distance), distance, nan)
        usual = np.nanmedian(distance) if np.isfinite(distance).any() else nan
        relative = distance / usual if usual > 0 else np.where(np.isnan(distance), nan, 1.0)
        weight = np.full(len(reports), nan)
        if judgement.shares is not None:
            weight = judgement.shares.cpu().double().numpy() * len(reports)
        client = np.array([report.client for report in reports], np.int64)
        return cls(client=client, distance=distance, relative=relative, weight=weight)


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """One server step (aggregate), in figures.

    Parameters
    ----------
    index:
        Number of the step.
    time, wall:
        Virtual and wall seconds since the start of the run, cumulative over resumes.
    bytes_up, bytes_down:
        Payload of this round from and to the clients.
    metrics:
        Values by name: ``"accuracy"`` (the headline), ``"train/loss"``, ``"clients/worst"``, …
    """

    index: int
    time: float
    wall: float
    bytes_up: int
    bytes_down: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Round(RoundRow):
    """A :class:`RoundRow` with the jobs that made it and, where they are, clients' scores and verdicts.

    ``movement`` says of tensors of the model how far the step moved them, and how large they were before (L2
    norms).
    """

    participants: Sequence[Participation] = ()
    clients: ClientScores | None = None
    verdicts: Verdicts | None = None
    movement: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something worth telling that is not a round: a client joined, a checkpoint was written."""

    time: float
    kind: str
    text: str
    client: int | None = None


@dataclass(frozen=True, kw_only=True)
class ParticipationGrid:
    """How many jobs came from whom and when, in bins small enough to draw.

    Parameters
    ----------
    counts:
        Jobs [client bins, round bins].
    wasted:
        Those of them that were discarded or lost [client bins, round bins].
    clients, rounds:
        Edges of the bins [bins + 1]: bin i holds the numbers from ``edges[i]`` to ``edges[i + 1] - 1``.
    """

    counts: NDArray[np.int64]
    wasted: NDArray[np.int64]
    clients: NDArray[np.int64]
    rounds: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run in one line.

    ``rounds`` counts the recorded rounds; ``time`` and ``wall`` are seconds, ``bytes_up`` and
    ``bytes_down`` totals. A run whose process went away without a word counts as interrupted. A
    directory that cannot be read has the status ``"unreadable"`` and the reason in ``error``.
    """

    id: str
    directory: Path
    status: Status
    name: str = ""
    algorithm: str = ""
    seed: int | None = None
    started: datetime | None = None
    rounds: int = 0
    accuracy: float | None = None
    best_accuracy: float | None = None
    time: float = 0.0
    wall: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    error: str | None = None


def spread(accuracy: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """:data:`SPREAD` of clients' accuracies [n], every client counting the same; None if none is known.

    Jain's index, ``(Σ a)² / (n Σ a²)``, is 1 where all are alike and 1/n where one has everything
    (R. Jain, D. Chiu, W. Hawe, "A quantitative measure of fairness", 1984, arXiv:cs/9809099).
    """
    known = np.asarray(accuracy, np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return None
    squares = float(np.square(known).sum())
    jain = float(known.sum()) ** 2 / (len(known) * squares) if squares else 1.0
    return np.array([*np.quantile(known, (0.0, 0.25, 0.5, 0.75, 1.0)), known.std(), jain])


def nullable(value: float | None) -> float | None:
    """As databases and JSON have it: they know no NaN."""
    return None if value is None or isnan(value) else float(value)
