"""The paper's box: what the hub keeps, what a client does in one step, how updates become a model.

An algorithm owns the bodies and never a loop: engines decide how many clients run at once, where and
when. Its fields are hyper-parameters, its methods are pure functions of tensors. The client's half is
run under ``torch.vmap``, so it has no data-dependent control flow and draws no random numbers: noise
is asked for in :meth:`Algorithm.noise` and arrives in the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

from hansa.core.errors import InputError
from hansa.core.partition import Partition
from hansa.core.reducer import Mean, Reducer
from hansa.core.schedule import Schedule
from hansa.core.task import Batch, LocalWork, Metrics, Task
from hansa.core.trees import Tree, pick
from hansa.core.values import value
from hansa.core.weights import Weights, default_weights

Carry = dict[str, Tree]  # what one client holds between two local steps


@value()
class Job:
    """Hub → client.

    Attributes
    ----------
    number: how many jobs this client was sent before; names the randomness of the job.
    phase: one of the algorithm's phases.
    payload: what the client receives.
    keys: names of the update that this client sends; ``None`` sends all.
    """

    number: int
    phase: str
    payload: Tree
    keys: frozenset[str] | None = None


@value()
class Report:
    """What the hub knows of an update besides its tensors.

    Attributes
    ----------
    examples: local training examples n_i.
    steps: local steps done.
    staleness: hub steps between the dispatch and the arrival.
    dispatched, returned: times in seconds.
    share: the client's share p_i in the objective.
    frequency: its updates per hub step f_i; both are 1 where the weights do not ask.
    """

    client: int
    number: int
    phase: str
    examples: int
    steps: int
    staleness: int
    dispatched: float
    returned: float
    share: float = 1.0
    frequency: float = 1.0


@dataclass(frozen=True)
class State:
    """What a hub keeps: plain data.

    Attributes
    ----------
    params: the shared tensors of the model, and of any extra shared network under its namespace.
    slots: server-side trees (moments, control variates, masks).
    version: model versions made so far.
    clients: size of the population, N.
    horizon: planned number of versions, T.
    """

    params: Tree
    slots: Mapping[str, Tree] = field(default_factory=dict)
    version: int = 0
    clients: int = 0
    horizon: int = 0


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """One federated algorithm.

    Attributes
    ----------
    reducer: how updates become one; a robust rule goes here.
    weights: how much each of them counts.
    source: the paper.
    family: where ``hansa strategies`` lists it.
    phases: the client tasks of one hub step, in order, with a barrier between two of them.
    peers: whether every client can be a hub of its own (gossip): the update is a change of the
        parameters and nothing else is exchanged.
    overlaps: whether an update may travel while its sender already works on, so that a job takes the
        longer of computing and communicating, not their sum.
    needs_rounds: why it is defined under synchronous rounds only, if it is.
    needs_mean: why no robust rule can stand in for the weighted mean, if none can.
    partition: roles of the model's tensors that this algorithm asks for.
    """

    reducer: Reducer = field(default_factory=Mean)
    weights: Weights = field(default_factory=Weights)

    source: ClassVar[str]
    family: ClassVar[str] = "averaging"
    phases: ClassVar[tuple[str, ...]] = ("train",)
    peers: ClassVar[bool] = False
    overlaps: ClassVar[bool] = False
    needs_rounds: ClassVar[str | None] = None
    needs_mean: ClassVar[str | None] = None
    partition: ClassVar[Partition] = Partition()

    def check(self, task: Task, schedule: Schedule) -> None:
        """Refuse a task, a schedule or a reducer for which the algorithm is not defined.

        Raises
        ------
        InputError
            With why, and what would work.
        """
        barrier = "there is a barrier between its phases" if len(self.phases) > 1 else None
        why = self.needs_rounds or barrier
        if why is not None and not schedule.synchronous:
            name = type(schedule).__name__.lower()
            raise InputError("schedule.name", name, why, 'use schedule.name = "rounds"')
        if self.needs_mean is not None and not self.reducer.linear:
            rule = type(getattr(self.reducer, "rule", self.reducer)).__name__.lower()
            raise InputError("aggregation.rule", rule, self.needs_mean, 'use aggregation.rule = "mean"')
        self.check_weights()

    def check_weights(self) -> None:
        """Refuse weights of others where the algorithm has its own, and what one vote each cannot do.

        Raises
        ------
        InputError
            With why, and what would work.
        """
        w, usual = self.weights, default_weights(type(self))
        if w != usual and type(self).weigh is not Algorithm.weigh:
            problem = f"{type(self).__name__} weighs its clients itself"
            raise InputError("weights", sorted(_differing(w, usual)), problem, "leave out the table")
        if not self.reducer.linear and w.frequency in ("estimated", "known"):
            problem = "under a robust rule every update has one vote, whatever its sender's frequency"
            raise InputError(
                "weights.frequency",
                w.frequency,
                problem,
                'use "equal" or "always", or aggregation.rule = "mean"',
            )
        if not self.reducer.linear and w.max_staleness is not None:
            problem = "under a robust rule every update has one vote, however old"
            remedy = 'leave it out, or use aggregation.rule = "mean"'
            raise InputError("weights.max_staleness", w.max_staleness, problem, remedy)

    # The hub: a server, or every peer of a gossip network.

    def init(self, task: Task, *, clients: int, horizon: int) -> State:
        """The first state."""
        return State(pick(task.initial, task.shared), clients=clients, horizon=horizon)

    def issue(self, task: Task, state: State, client: int, phase: str) -> tuple[Tree, frozenset[str] | None]:
        """Payload of a job, and the names of the update that the client shall send (``None``: all)."""
        return state.params, None

    def fold(self, phase: str) -> Reducer:
        """The reducer of a phase."""
        return self.reducer

    def weigh(self, report: Report) -> float:
        """Weight of an update; by default as :attr:`weights` say. Who has its own rule refuses others."""
        return self.weights.of(report)

    def stretch(self, task: Task, reduced: Tree, mass: float) -> Tree:
        """The reduced update of a step whose weights sum to ``mass``: changes are scaled, values are not."""
        values = self.values(task)
        return {name: each if name in values else mass * each for name, each in reduced.items()}

    @abstractmethod
    def apply(self, task: Task, state: State, reduced: Tree, reports: Sequence[Report], phase: str) -> State:
        """The next state. The hub counts versions itself."""

    def values(self, task: Task) -> frozenset[str]:
        """Names of the update that carry values to average, not changes to add: running statistics.

        Stale changes of a running mean overshoot and may turn a variance negative; stale values do not.
        """
        return frozenset(task.buffers).intersection(task.shared)

    def origin(self, task: Task, state: State) -> Tree:
        """The update of a client that changes nothing, where that is not zero: robust rules start there."""
        return pick(state.params, self.values(task).intersection(state.params))

    # The client.

    def private(self, task: Task) -> Tree:
        """What a client holds before its first job: it is kept for it and never sent."""
        return pick(task.initial, task.local_names)

    def work(self, work: LocalWork, phase: str) -> LocalWork:
        """How much a client does in this phase; by default what the recipe says."""
        return work

    def noise(self, task: Task, phase: str, examples: int) -> Mapping[str, tuple[int, ...]]:
        """Standard normal draws wanted with each batch of ``examples``, by name: shapes."""
        return {}

    @abstractmethod
    def begin(self, task: Task, payload: Tree, private: Tree, phase: str) -> Carry:
        """What the client holds before its first local step."""

    @abstractmethod
    def step(self, task: Task, carry: Carry, batch: Batch, phase: str) -> tuple[Carry, Metrics]:
        """One local step on one mini-batch."""

    @abstractmethod
    def finish(self, task: Task, carry: Carry, phase: str) -> tuple[Tree, Tree]:
        """(update, private) after the last local step."""

    def personal(self, task: Task, params: Tree, private: Tree) -> Tree:
        """The model that a client would use: shared tensors, with its own local ones in place."""
        return {**pick(params, task.shared), **pick(private, task.local_names)}


def _differing(one: Weights, other: Weights) -> list[str]:
    names = [each.name for each in fields(one)]
    return [name for name in names if getattr(one, name) != getattr(other, name)]
