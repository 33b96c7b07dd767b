"""The hub: an algorithm, a schedule and plain data. It reads no clock and opens no socket.

An engine feeds it events and obeys its orders. When it is ordered to :class:`Fold`, the engine hands
over the updates in chunks of any size (:meth:`Hub.fold`), closes the step (:meth:`Hub.close`) and, when
it has evaluated the new model if it wants to, tells the hub so with
:class:`~hansa.core.schedule.Aggregated`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from hansa.core.algorithm import Algorithm, Job, Report, State
from hansa.core.reducer import Collect, Judgement, Mean
from hansa.core.schedule import (
    Aggregate,
    Dispatch,
    Event,
    Left,
    Recall,
    Returned,
    Schedule,
    Stop,
    Wake,
    live,
)
from hansa.core.sums import joined
from hansa.core.task import Task
from hansa.core.trees import Tree, concatenate, pick, put_under, row, squared_norm, take_under
from hansa.core.values import value
from hansa.core.weights import Ledger

_SPECTRUM = 400  # peers of whom a spectrum is computed in every step in which others take part
_BLOCK = 2**21  # numbers that are mixed together: no more stand in memory beside the models
_SPARSE = 16  # one entry of a mixing matrix in so many, or fewer, is worth a sparse product


@value()
class Send:
    """Order: give ``client`` this job."""

    client: int
    job: Job


@value()
class Fold:
    """Order: hand over the updates of these reports, in this order, then close the step."""

    reports: tuple[Report, ...]
    phase: str


Order = Send | Recall | Fold | Wake | Stop


@value()
class Flight:
    """An open dispatch: what the hub must remember of it."""

    number: int
    phase: str
    version: int
    dispatched: float


class Hub:
    """A server.

    Attributes
    ----------
    state: the algorithm's state.
    judged: the reports of the last step, and what a robust rule made of their updates, where one did.
    """

    def __init__(
        self, task: Task, algorithm: Algorithm, schedule: Schedule, *, clients: int, seed: int
    ) -> None:
        self.task, self.algorithm, self.schedule = task, algorithm, schedule
        self.state = self._first_state(clients)
        self._live = live(schedule, schedule.start(seed))
        self._jobs: dict[int, int] = {}  # client -> jobs sent
        self._flights: dict[int, Flight] = {}
        self._reports: dict[int, list[Report]] = {}  # arrived, not folded
        self._folding: tuple[Report, ...] = ()
        self._acc: Any = None
        self._squares = 0.0  # Σ ‖u_i‖² of the step, where the schedule measures
        self.judged: tuple[tuple[Report, ...], Judgement] | None = None
        self._ledger = Ledger(algorithm.weights, clients) if algorithm.weights.absolute else None

    def _first_state(self, clients: int) -> State:
        return self.algorithm.init(self.task, clients=clients, horizon=self.schedule.stop.rounds)

    # Events and orders.

    def on(self, event: Event, now: float) -> list[Order]:
        """Take an event, give orders."""
        orders: list[Order] = []
        for command in self._live.on(event, now):
            match command:
                case Dispatch():
                    job = self._issue(command.client, self.algorithm.phases[command.phase], now)
                    orders.append(Send(command.client, job))
                case Recall():
                    if not command.partial:
                        self._flights.pop(command.client, None)
                        self._reports.pop(command.client, None)
                    orders.append(command)
                case Aggregate():
                    name = self.algorithm.phases[command.phase]
                    self._folding = self._counted(tuple(map(self._take_report, command.clients)), name)
                    self._acc = self.algorithm.fold(name).init()
                    self._squares = 0.0
                    orders.append(Fold(self._folding, name))
                case _:
                    orders.append(command)
        return orders

    @property
    def _progress(self) -> Any:
        return self._live.progress()

    def lost(self, client: int, now: float) -> list[Order]:
        """A client went away: its open dispatch ends; an update that has arrived stays."""
        self._flights.pop(client, None)
        return self.on(Left(client), now)

    def receive(self, client: int, *, examples: int, steps: int, now: float) -> list[Order]:
        """An update has arrived; its tensors are asked for when they are due."""
        flight = self._flights.pop(client)
        staleness = self.state.version - flight.version
        report = Report(
            client, flight.number, flight.phase, examples, steps, staleness, flight.dispatched, now
        )
        self._reports.setdefault(client, []).append(report)
        return self.on(Returned(client), now)

    def _take_report(self, client: int) -> Report:
        waiting = self._reports[client]
        report = waiting.pop(0)
        if not waiting:
            del self._reports[client]
        return report

    def _counted(self, reports: tuple[Report, ...], phase: str) -> tuple[Report, ...]:
        """The reports of a step with the clients' shares and frequencies, where weights ask for them."""
        if self._ledger is None or phase != self.algorithm.phases[-1]:
            return reports
        for each in reports:
            self._ledger.enter(each.client, each.examples)
        steps = self.state.version + 1
        return tuple(
            dataclasses.replace(
                each,
                share=self._ledger.share(each.client),
                frequency=self._ledger.frequency(each.client, steps),
            )
            for each in reports
        )

    def _issue(self, client: int, phase: str, now: float) -> Job:
        number = self._jobs.get(client, 0)
        self._jobs[client] = number + 1
        self._flights[client] = Flight(number, phase, self.state.version, now)
        payload, keys = self._payload(client, phase)
        return Job(number, phase, payload, keys)

    def _payload(self, client: int, phase: str) -> tuple[Tree, frozenset[str] | None]:
        return self.algorithm.issue(self.task, self.state, client, phase)

    # Updates.

    def fold(self, reports: Sequence[Report], updates: Tree, present: Mapping[str, Tensor]) -> None:
        """Fold stacked updates [k, ...] of the open step's next k reports; ``present`` as for a reducer."""
        weights = self._weights(reports)
        self._acc = self.algorithm.fold(reports[0].phase).add(self._acc, updates, weights, present)
        if self.schedule.measures:
            self._squares += self._square(updates)

    def fold_sums(self, reports: Sequence[Report], sums: Callable[[Tensor], Tree]) -> None:
        """Fold the next k reports by their sums alone.

        ``sums`` maps the reports' weights [k] to ``Σ w_i u_i`` over each block [g, ...], as
        :meth:`~hansa.core.sums.Sums.add_blocks` takes them.
        """
        weights = self._weights(reports)
        self._acc = self._acc.add_blocks(sums(weights), weights)

    def _weights(self, reports: Sequence[Report]) -> Tensor:
        return torch.tensor([self.algorithm.weigh(each) for each in reports], dtype=torch.float64)

    def streams(self, phase: str) -> bool:
        """Whether a step can be folded in parts, by workers that exchange sums instead of updates."""
        return isinstance(self.algorithm.fold(phase), Mean) and not self.schedule.measures

    def leave(self, rows: int) -> None:
        """Another worker folds the next reports, ``rows`` of them, in whole blocks."""
        self._acc = self._acc.skip(rows)

    def packed(self) -> tuple[Tree, list[Any]]:
        """What was folded of the open step, for :meth:`join`: tensors, and facts that JSON can hold."""
        packed: tuple[Tree, list[Any]] = self._acc.packed()
        return packed

    def join(self, parts: Iterable[tuple[Tree, list[Any]]]) -> None:
        """Take what all workers, this one too, have folded of the open step, in the order of reports."""
        self._acc = joined(parts)

    def close(self) -> dict[str, float]:
        """Make the step from what was folded. Returns measurements of the step.

        A step without updates, or of nothing but updates that are too old to count, only counts.
        """
        self.judged = None
        phase = self._folding[0].phase if self._folding else ""
        last = phase == self.algorithm.phases[-1]
        mass = self.algorithm.weights.mass(self._folding) if last else 1.0
        if not self._folding or mass == 0:
            self._advance(self.state)
            self._folding, self._acc = (), None
            return {}
        reducer = self.algorithm.fold(phase)
        if isinstance(reducer, Collect):
            reduced, judgement = reducer.judged(self._acc, self.algorithm.origin(self.task, self.state))
            self.judged = None if judgement is None else (self._folding, judgement)
        else:
            reduced = reducer.result(self._acc)
        measured = self._measured(reduced) if last and self.schedule.measures else {}
        if mass != 1:
            reduced = self.algorithm.stretch(self.task, reduced, mass)
        after = self.algorithm.apply(self.task, self.state, reduced, self._folding, phase)
        if phase == self.algorithm.phases[-1]:
            self._advance(after)
        else:
            self.state = after
        self._folding, self._acc = (), None
        return measured

    def _square(self, update: Tree) -> float:
        """Squared norm of what an update, or several [k, ...], changes in the model."""
        values, origin = self.algorithm.values(self.task), self.algorithm.origin(self.task, self.state)
        changes = {
            name: each - origin[name] if name in origin else each
            for name, each in update.items()
            if name in self.state.params and name not in values
        }
        return float(squared_norm(changes)) if changes else 0.0

    def _measured(self, reduced: Tree) -> dict[str, float]:
        """``update/mean``: the reduced update's squared norm; ``update/variance``: of one about the mean."""
        count, square = len(self._folding), self._square(reduced)
        variance = max(self._squares - count * square, 0.0) / max(count - 1, 1)
        return {"update/mean": square, "update/variance": variance}

    def _advance(self, state: State) -> None:
        self.state = dataclasses.replace(state, version=self.state.version + 1)

    # What others may ask.

    def model(self) -> Tree:
        """The global model's shared tensors, with whatever extra networks are shared."""
        return self.state.params

    def params_for(self, client: int) -> Tree:
        """The shared tensors as ``client`` would receive them now."""
        return self.state.params

    def traffic(self, size: int, client: int) -> int:
        """Bytes that an update of ``size`` bytes costs on its way."""
        return size

    # Checkpoints, between two steps.

    def snapshot(self) -> tuple[Tree, dict[str, Any]]:
        """Tensors and JSON-able facts from which :meth:`restore` makes the same hub."""
        tensors = put_under("params", self.state.params)
        for slot, tree in self.state.slots.items():
            tensors |= put_under(f"slots/{slot}", tree)
        progress = self._progress
        facts = {
            "version": self.state.version,
            "slots": sorted(self.state.slots),
            "progress": TypeAdapter(type(progress)).dump_python(progress, mode="json"),
            "jobs": sorted(self._jobs.items()),
            "flights": [[client, dataclasses.asdict(each)] for client, each in self._flights.items()],
            "ledger": self._ledger.snapshot() if self._ledger is not None else [],
            "reports": [dataclasses.asdict(each) for waiting in self._reports.values() for each in waiting],
        }
        return tensors, facts

    def _ordered(self, tree: Tree) -> Tree:
        """Names that parameters have in the parameters' order, then the others."""
        return {**{name: tree[name] for name in self.state.params if name in tree}, **tree}

    def restore(self, tensors: Tree, facts: Mapping[str, Any]) -> None:
        """Continue from a :meth:`snapshot`."""
        self.state = dataclasses.replace(
            self.state,
            # In the old order, for sums over a tree depend on it in the last digit; a file sorts by name.
            params=pick(take_under("params", tensors), self.state.params),
            slots={slot: self._ordered(take_under(f"slots/{slot}", tensors)) for slot in facts["slots"]},
            version=facts["version"],
        )
        progress = TypeAdapter(type(self._progress)).validate_python(facts["progress"])
        self._live = live(self.schedule, progress)
        self._jobs = dict(facts["jobs"])
        if self._ledger is not None:
            self._ledger.restore(facts["ledger"])
        self._flights = {client: Flight(**each) for client, each in facts["flights"]}
        self._reports = {}
        for each in facts["reports"]:
            self._reports.setdefault(each["client"], []).append(Report(**each))


class PeerHub(Hub):
    """Every client is a hub: the hubs of a gossip network as one stacked tree, mixed by ``W @ X``.

    Peers train from their own model, send the result ``z`` to their neighbours and mix,
    ``x_i = Σ_j W_ij z_j``, as often as ``mixing_steps`` says; the change against their own old model
    is then what the algorithm applies. A peer that did not return takes no part: its edges' weights
    go back to the diagonal, which keeps ``W`` symmetric and doubly stochastic.

    Parameters
    ----------
    mixing: symmetric doubly stochastic W [n, n].
    mixing_steps: Q, exchanges per round (DFedSAM-MGS, arXiv 2302.04083).
    """

    def __init__(
        self,
        task: Task,
        algorithm: Algorithm,
        schedule: Schedule,
        *,
        clients: int,
        seed: int,
        mixing: Tensor,
        mixing_steps: int,
    ) -> None:
        self.mixing = mixing.to(dtype=torch.float64, device=task.device)
        self.mixing_steps = mixing_steps
        self._edges = torch.nonzero((self.mixing - torch.diag(self.mixing.diag())).abs() > 0).T  # [2, edges]
        self._neighbours: list[int] = torch.bincount(self._edges[0], minlength=len(self.mixing)).tolist()
        self._changes: list[Tree] = []
        self._gap: tuple[list[int], float] | None = None  # of the last peers who took part
        super().__init__(task, algorithm, schedule, clients=clients, seed=seed)

    def _first_state(self, clients: int) -> State:
        single = super()._first_state(clients)
        return dataclasses.replace(
            single,
            params={
                name: tensor.expand(clients, *tensor.shape).clone() for name, tensor in single.params.items()
            },
        )

    def _payload(self, client: int, phase: str) -> tuple[Tree, frozenset[str] | None]:
        single = dataclasses.replace(self.state, params=self.params_for(client))
        return self.algorithm.issue(self.task, single, client, phase)

    def fold(self, reports: Sequence[Report], updates: Tree, present: Mapping[str, Tensor]) -> None:
        """Keep the peers' changes until all are there."""
        self._changes.append(updates)

    def streams(self, phase: str) -> bool:
        """Never: peers mix models."""
        return False

    def _mixing(self, there: Tensor) -> Tensor:
        """W [n, n] where the weights of all who are not ``there`` lie on the diagonal; sparse if it pays."""
        n = len(self.mixing)
        active = torch.zeros(n, dtype=torch.bool, device=self.task.device)
        active[there] = True
        i, j = self._edges[:, active[self._edges].all(0)]
        weights = self.mixing[i, j]
        own = 1.0 - torch.zeros(n, dtype=weights.dtype, device=weights.device).index_add(0, i, weights)
        all_ = torch.arange(n, device=i.device)
        places, values = torch.stack([torch.cat([i, all_]), torch.cat([j, all_])]), torch.cat([weights, own])
        W = torch.sparse_coo_tensor(places, values, (n, n), check_invariants=False).coalesce()
        return W if len(values) * _SPARSE < n * n else W.to_dense()

    def close(self) -> dict[str, float]:
        """Mix.

        Measures ``gossip/consensus``, the mean squared distance of the peers to their average, and
        ``gossip/gap``, the spectral gap of the mixing among those who took part, if they are not too many.
        """
        if not self._folding:
            self._advance(self.state)
            return {}
        there = torch.tensor([each.client for each in self._folding], device=self.task.device)
        W = self._mixing(there)
        before = self.state.params
        values = self.algorithm.values(self.task)
        sent, self._changes = concatenate(self._changes), []
        params = {
            name: self._mixed(W, x, there, sent.pop(name), value=name in values) for name, x in before.items()
        }

        def settle(params: Tree, update: Tree) -> Tree:
            return self.algorithm.apply(self.task, State(params), update, self._folding, "train").params

        for peers in _blocks(len(W), sum(x[0].numel() for x in before.values())):
            old, new = ({name: x[peers] for name, x in tree.items()} for tree in (before, params))
            update = {name: x if name in values else x - old[name] for name, x in new.items()}
            for name, x in torch.vmap(settle)(old, update).items():
                params[name][peers] = x
        self._advance(dataclasses.replace(self.state, params=params))
        self._folding, self._acc = (), None
        measured = {"gossip/consensus": self.consensus_distance()}
        if len(there) <= _SPECTRUM:
            measured["gossip/gap"] = self._gap_among(there, W)
        return measured

    def _mixed(self, W: Tensor, own: Tensor, there: Tensor, sent: Tensor, *, value: bool) -> Tensor:
        """One tensor of all peers [n, ...] after mixing; ``sent`` [k, ...] are changes of it, or values."""
        W, mixed = W.to(own.dtype), own.new_empty(own.shape)
        before, given, after = (each.reshape(len(each), -1) for each in (own, sent, mixed))
        for columns in _blocks(given.shape[1], len(own)):
            x = before[:, columns].index_put((there,), given[:, columns], accumulate=not value)
            for _ in range(self.mixing_steps):
                x = W @ x
            after[:, columns] = x
        return mixed

    def _gap_among(self, there: Tensor, W: Tensor) -> float:
        peers = sorted(there.tolist())
        if self._gap is None or self._gap[0] != peers:
            dense = (W.to_dense() if W.is_sparse else W).cpu()
            self._gap = peers, spectral_gap(dense[peers][:, peers])
        return self._gap[1]

    def consensus_distance(self) -> float:
        """``(1/n) Σ_i ‖x_i − x̄‖²`` over the shared floating-point tensors."""
        all_ = (x.reshape(len(x), -1) for x in self.state.params.values())
        blocks = (x[:, columns] for x in all_ for columns in _blocks(x.shape[1], len(x)))
        return float(torch.stack([(x - x.mean(0)).square().sum() / len(x) for x in blocks]).sum())

    def model(self) -> Tree:
        """The average of the peers' models."""
        return {name: tensor.mean(0) for name, tensor in self.state.params.items()}

    def params_for(self, client: int) -> Tree:
        """A peer's own model."""
        return row(self.state.params, client)

    def traffic(self, size: int, client: int) -> int:
        """As much to each neighbour, in each mixing step."""
        return size * self._neighbours[client] * self.mixing_steps


def _blocks(length: int, each: int) -> Iterator[slice]:
    """0, 1, … ``length`` - 1 in slices that a cache holds, where one of them stands for ``each`` numbers."""
    step = max(1, _BLOCK // max(each, 1))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def divergence(version: int, model: Tree, moved: Mapping[str, tuple[float, float]]) -> str | None:
    """Why a run cannot go on after a step: its model is not finite.

    ``moved``: the step's :func:`~hansa.core.trees.movement`, which tells where to look: the square of a large
    number is infinite, too.
    """
    wild = (name for name, (change, _) in moved.items() if not math.isfinite(change))
    name = next((name for name in wild if not model[name].isfinite().all()), None)
    if name is None:
        return None
    return (
        f"round {version}: the model is not finite after it, {name} first; "
        "lower algorithm.server_lr, or use a robust aggregation.rule"
    )


def spectral_gap(W: Tensor) -> float:
    """``1 − max(|λ₂|, |λ_n|)`` of a symmetric doubly stochastic matrix; 0 where the graph falls apart."""
    if len(W) < 2:
        return 1.0
    eigenvalues = torch.linalg.eigvalsh(W).abs().sort(descending=True).values
    return float((1.0 - eigenvalues[1]).clamp_min(0))
