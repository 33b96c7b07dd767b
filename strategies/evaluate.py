"""How good the model is: on all held-out data, and for every client on its own.

Where clients share one model, it is evaluated once and the scores are dealt out; where they keep parts of it,
each client's own model meets its own held-out data; a peer of a gossip network, which wants a model for
everybody, meets all of it.

Where only the clients can tell, for they keep parts of the model or hold data of their own, each makes a
:class:`Tally` and :func:`reckon` puts them together: the same figures, from sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hansa.core.hub import Hub, PeerHub
from hansa.core.randomness import generator
from hansa.core.store import ClientScores
from hansa.core.task import Task
from hansa.core.trees import Tree, pick
from hansa.strategies.catalog import Federation

_BATCH = 2048


class Kept(Protocol):
    """Clients' private trees."""

    def __getitem__(self, client: int, /) -> Tree:
        """One client's."""
        ...


class Evaluator:
    """Scores of a federation's models.

    Parameters
    ----------
    clients:
        How many clients to look at each time, the same ones; all by default.
    """

    def __init__(self, federation: Federation, *, seed: int, clients: int | None) -> None:
        self._f = federation
        able = torch.nonzero(federation.data.test_shards.sizes > 0).flatten().numpy()
        self._clients = panel(able, seed=seed, clients=clients)
        self.personal = is_personal(federation.task)

    def __call__(self, hub: Hub, private: Kept) -> tuple[dict[str, float], ClientScores | None]:
        """(metrics, per-client scores). ``accuracy``, or ``loss`` where there is none, is the headline."""
        metrics: dict[str, float] = {}
        scores: ClientScores | None = None
        everything = torch.arange(len(self._f.data.test))
        if not self.personal:
            shared = _scores(self._f, pick(hub.model(), self._f.task.shared), everything)
            metrics |= {f"global/{name}": float(values.mean()) for name, values in shared.items()}
            if not isinstance(hub, PeerHub):
                scores = self._deal_out(shared)
        if self.personal or isinstance(hub, PeerHub):
            scores = self._one_by_one(hub, private, everything if isinstance(hub, PeerHub) else None)
            metrics |= _spread(scores, headline=True)
        else:
            metrics |= {name: metrics[f"global/{name}"] for name in shared}
            metrics |= _spread(scores, headline=False)
        return metrics, scores

    def _deal_out(self, shared: Mapping[str, Tensor]) -> ClientScores | None:
        """Every client's mean of the scores of its own examples."""
        shards = self._f.data.test_shards
        if not len(self._clients):
            return None
        sizes = shards.sizes.numpy()
        holders = np.flatnonzero(sizes)  # empty shards would upset reduceat
        starts = shards.offsets.numpy()[holders]
        chosen = np.searchsorted(holders, self._clients)
        means = {
            name: (np.add.reduceat(values.numpy()[shards.indices.numpy()], starts) / sizes[holders])[chosen]
            for name, values in shared.items()
        }
        unknown = np.full(len(chosen), np.nan)
        return ClientScores(
            client=self._clients,
            examples=sizes[self._clients],
            accuracy=means.get("accuracy", unknown),
            loss=means["loss"],
        )

    def _one_by_one(self, hub: Hub, private: Kept, on: Tensor | None) -> ClientScores | None:
        """Every client's own model on its own examples, or on those named by ``on``."""
        if not len(self._clients):
            return None
        rows: list[dict[str, float]] = []
        examples: list[int] = []
        for client in self._clients.tolist():
            indices = self._f.data.test_shards.of(client) if on is None else on
            own = self._f.algorithm.personal(self._f.task, hub.params_for(client), private[client])
            values = _scores(self._f, own, indices)
            rows.append({name: float(each.mean()) for name, each in values.items()})
            examples.append(len(indices))
        return ClientScores(
            client=self._clients,
            examples=np.array(examples),
            accuracy=np.array([row.get("accuracy", np.nan) for row in rows]),
            loss=np.array([row["loss"] for row in rows]),
        )


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What one client says of a model: sums over its held-out examples.

    ``accuracy`` counts those that were right, where there is a right and a wrong.
    """

    examples: int
    loss: float = 0.0
    accuracy: float | None = None


def tally(federation: Federation, shared: Tree, private: Tree, client: int) -> Tally:
    """The model that ``client`` makes of the shared tensors and its own, on its own held-out data."""
    indices = federation.data.test_shards.of(client)
    if not len(indices):
        return Tally(examples=0)
    values = _scores(federation, federation.algorithm.personal(federation.task, shared, private), indices)
    sums = {name: float(each.sum()) for name, each in values.items()}
    return Tally(examples=len(indices), loss=sums["loss"], accuracy=sums.get("accuracy"))


def reckon(tallies: Mapping[int, Tally], *, personal: bool) -> tuple[dict[str, float], ClientScores | None]:
    """(metrics, per-client scores) as an :class:`Evaluator` gives them, of the clients that had examples."""
    told = {client: each for client, each in sorted(tallies.items()) if each.examples}
    if not told:
        return {}, None
    examples = np.array([each.examples for each in told.values()])
    right = [np.nan if each.accuracy is None else each.accuracy for each in told.values()]
    scores = ClientScores(
        client=np.array(list(told)),
        examples=examples,
        accuracy=np.array(right) / examples,
        loss=np.array([each.loss for each in told.values()]) / examples,
    )
    metrics = _spread(scores, headline=True)
    if not personal:
        metrics |= {f"global/{name}": metrics[name] for name in ("accuracy", "loss") if name in metrics}
    return metrics, scores


def is_personal(task: Task) -> bool:
    """Whether clients keep parts of the model to themselves."""
    return any(task.initial[name].is_floating_point() for name in task.local_names)


def panel(able: NDArray[np.int64], *, seed: int, clients: int | None) -> NDArray[np.int64]:
    """Who is evaluated, of those who are ``able``: all, or so many, drawn once."""
    if clients is None or clients >= len(able):
        return able
    return np.sort(generator(seed, "evaluate").permutation(able)[:clients])


@torch.no_grad()
def _scores(federation: Federation, params: Tree, indices: Tensor) -> dict[str, Tensor]:
    test, task = federation.data.test, federation.task
    parts = [task.scores(params, test.x[some], test.y[some]) for some in torch.split(indices, _BATCH)]
    return {name: torch.cat([part[name] for part in parts]).double().cpu() for name in parts[0]}


def _spread(scores: ClientScores | None, *, headline: bool) -> dict[str, float]:
    """Means weigh by held-out examples, worst and variance count clients; ``headline`` repeats the means."""
    if scores is None:
        return {}
    measured = {"clients/loss": float(np.average(scores.loss, weights=scores.examples))}
    if not np.isnan(scores.accuracy).any():
        measured |= {
            "clients/mean": float(np.average(scores.accuracy, weights=scores.examples)),
            "clients/worst": float(scores.accuracy.min()),
            "clients/variance": float(scores.accuracy.var()),
        }
    if headline:
        names = {"accuracy": "clients/mean", "loss": "clients/loss"}
        measured |= {name: measured[key] for name, key in names.items() if key in measured}
    return measured
