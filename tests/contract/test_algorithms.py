"""What every algorithm promises on every engine, whatever its mathematics.

A new algorithm of the catalog needs a case here; further cases put an algorithm under another schedule,
aggregation rule or topology.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from hansa.core.algorithm import Algorithm, Report
from hansa.core.errors import Interrupted
from hansa.core.hub import Hub, Order, Send
from hansa.core.schedule import Aggregated
from hansa.core.store import Round
from hansa.core.task import LocalWork, Task
from hansa.core.trees import Tree, put_under, row
from hansa.simulation.cohort import Work
from hansa.simulation.population import Population
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import ALGORITHMS, Federation

Sections = Mapping[str, Mapping[str, Any]]
Build = Callable[..., Federation]


def case(name: str, sections: Sections | None = None, **fields: Any) -> Sections:
    return {"algorithm": {"name": name, **fields}, "evaluation": {"every": 5}, **(sections or {})}


BUFFERED = {"schedule": {"name": "buffered", "k": 2, "concurrency": 4}}
RECALLED = {"schedule": {"name": "periodic", "interval": 3.0, "recall": 3}}
CLOCK = {"schedule": {"name": "periodic", "interval": 3.0}}
RING = {"topology": {"kind": "ring"}}
PLAIN = {"model": {"name": "mlp", "hidden": [6], "norm": "layer"}}  # no example depends on another
CASES: dict[str, Sections] = {
    "local": case("local"),
    "local-plain": case("local", {**PLAIN, "stop": {"rounds": 4}}),
    "fedavg": case("fedavg"),
    "fedavg-sgd": case("fedavg", {"train": {"momentum": 0.9, "weight_decay": 0.01, "clip_norm": 1.0}}),
    "fedavg-logistic": case("fedavg", {"model": {"name": "logistic"}}),
    "fedavg-plain": case("fedavg", {**PLAIN, "train": {"epochs": [1, 2], "weight_decay": 0.01}}),
    "fedavg-plain-recalled": case("fedavg", {**RECALLED, **PLAIN, "stop": {"rounds": 4}}),
    "fedavg-plain-gossip": case("fedavg", {**RING, **PLAIN, "stop": {"rounds": 4}}),
    "fedavg-cnn": case("fedavg", {"model": {"name": "leaf_cnn", "hidden": 6}, "stop": {"rounds": 3}}),
    "fedavg-median": case("fedavg", {"aggregation": {"rule": "median"}}),
    "fedavg-krum": case("fedavg", {"aggregation": {"rule": "krum", "f": 0}}),
    "fedavg-recalled": case("fedavg", RECALLED),
    "fedavgm": case("fedavgm"),
    "fedadam": case("fedadam"),
    "fedyogi": case("fedyogi"),
    "fedadagrad": case("fedadagrad"),
    "fedprox": case("fedprox", mu=0.5),
    "scaffold": case("scaffold"),
    "fednova": case("fednova", {"train": {"epochs": [1, 3], "momentum": 0.5}}),
    "fednova-recalled": case("fednova", RECALLED),
    "fedbn": case("fedbn"),
    "fedbn-buffered": case("fedbn", BUFFERED),
    "fedbuff": case("fedbuff", BUFFERED),
    "fedbuff-estimated": case("fedbuff", {**BUFFERED, "weights": {"frequency": "estimated"}}),
    "fedprox-hinge": case("fedprox", {**BUFFERED, "weights": {"staleness": "hinge", "after": 0}}),
    "fedavg-fedfix": case("fedavg", {**CLOCK, "weights": {"frequency": "estimated"}}),
    "fedadam-old": case("fedadam", {**BUFFERED, "weights": {"max_staleness": 1}}),
    "fednova-buffered": case("fednova", {**BUFFERED, "weights": {"staleness": "polynomial"}}),
    "fedavg-backup": case("fedavg", {"schedule": {"name": "backup", "cohort": 4, "window": 3}}),
    "fedasync": case("fedasync", {"schedule": {"name": "buffered", "k": 1, "concurrency": 4}}),
    "fedasync-median": case("fedasync", {**BUFFERED, "aggregation": {"rule": "median"}}),
    "favano": case("favano", RECALLED),
    "favano-deterministic": case("favano", RECALLED, reweighting="deterministic", floor=1.0),
    "favano-quantised": case("favano", {**RECALLED, "stop": {"rounds": 4}}, bits=4),
    "favano-krum": case("favano", {**RECALLED, "aggregation": {"rule": "krum", "f": 0}}),
    "afa_cd": case("afa_cd", {**BUFFERED, "train": {"epochs": [1, 3]}}),
    "afa_cs": case("afa_cs", {**BUFFERED, "train": {"epochs": [1, 3], "momentum": 0.5}}),
    "afa_cs-recalled": case("afa_cs", RECALLED),
    "co2": case("co2", clip=0.05),
    "fedbuff-plain": case("fedbuff", {**BUFFERED, **PLAIN}),
    "fraug": case("fraug", {"stop": {"rounds": 4}}, interpolate=True, generator_distance="mmd"),
    "fraug-buffered": case("fraug", {**BUFFERED, "stop": {"rounds": 4}}, transformer_distance="mse"),
    "selective": case("selective", budget=[1, 2], agreement=0.1, common=["head.*"]),
    "dfedsam": case("dfedsam", {"topology": {"kind": "ring", "mixing_steps": 2}}),
    "fedbn-gossip": case("fedbn", RING),
}
every_case = pytest.mark.parametrize("name", CASES)
ENGINES: dict[str, Mapping[str, Any]] = {
    "sequential": {"mode": "sequential"},
    "batched-3": {"mode": "batched", "chunk": 3},
    "batched-all": {"mode": "batched", "chunk": 6},
    "fused-3": {"mode": "fused", "chunk": 3},
    "fused-all": {"mode": "fused", "chunk": 6},
    "fused-winograd": {"mode": "fused", "chunk": 6, "convolutions": "winograd"},
}
FUSIBLE = (  # the rest is refused
    "local-plain",
    "fedavg-logistic",
    "fedavg-plain",
    "fedavg-plain-recalled",
    "fedavg-plain-gossip",
    "fedavg-cnn",
    "fedbuff-plain",
)
PAIRS = [
    *((name, engine) for name in CASES for engine in ("batched-3", "batched-all")),
    *((name, engine) for name in FUSIBLE for engine in ("fused-3", "fused-all")),
    ("fedavg-cnn", "fused-winograd"),
]
# Clients of unlike speed, so that asynchronous schedules fold stale and partial updates.
DEVICES = Population(speeds="uniform", spread=4.0, latency=0.5)


@dataclass(frozen=True)
class Outcome:
    """All that a run leaves behind: hub tensors, every client's private ones, and its rounds."""

    tensors: Tree
    rounds: tuple[Round, ...]


Run = Callable[..., Outcome]


def played(simulator: Simulator, clients: int, rounds: Sequence[Round]) -> Outcome:
    tensors, _ = simulator.hub.snapshot()
    for client in range(clients):
        tensors |= put_under(f"private/{client}", simulator.private(client))
    told = [dataclasses.replace(each, wall=0.0, clients=None) for each in rounds]
    return Outcome(tensors, tuple(told))


def play(federation: Federation) -> Outcome:
    rounds: list[Round] = []
    simulator = Simulator(federation, DEVICES, on_round=rounds.append)
    simulator.run()
    return played(simulator, federation.clients, rounds)


@pytest.fixture(scope="module")
def outcome(digits: Build) -> Run:
    """``outcome(case, engine, dtype)``, each computed once."""

    @functools.cache
    def run(name: str, engine: str = "sequential", dtype: str = "float64") -> Outcome:
        return play(digits(**CASES[name], engine={**ENGINES[engine], "dtype": dtype}))

    return run


def error(found: Tree, expected: Tree) -> float:
    """Largest error of a tensor, relative to its largest entry (of what should be zero: to 0.01)."""
    assert found.keys() == expected.keys()
    scales = {name: each.double().abs().max().clamp_min(1e-2) for name, each in expected.items()}
    errors = [float((found[n].double() - e.double()).abs().max() / scales[n]) for n, e in expected.items()]
    return max(errors, default=0.0)


def identical(one: Outcome, other: Outcome) -> bool:
    return (
        one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(each, other.tensors[name]) for name, each in one.tensors.items())
        and one.rounds == other.rounds
    )


def test_every_algorithm_of_the_catalog_has_a_case() -> None:
    assert {each["algorithm"]["name"] for each in CASES.values()} == set(ALGORITHMS)


def test_the_cases_have_ragged_clients(digits: Build) -> None:
    federation = digits(**CASES["fedavg"])
    plans = [
        federation.work.batches(size, seed=0, client=client, number=0)
        for client, size in enumerate(federation.data.train_shards.sizes.tolist())
    ]
    assert {len(plan) for plan in plans} == {1, 2, 3}
    assert len({len(plan[-1]) for plan in plans}) >= 3


# Engines.


@pytest.mark.parametrize(("name", "engine"), PAIRS)
def test_engines_and_chunks_agree(outcome: Run, name: str, engine: str) -> None:
    # Summation orders differ by rounding, 1e-16, which ten rounds of training may amplify.
    found, expected = outcome(name, engine), outcome(name, "sequential")
    assert error(found.tensors, expected.tensors) < 1e-9
    for one, other in zip(found.rounds, expected.rounds, strict=True):
        assert one.time == other.time
        assert one.metrics == pytest.approx(other.metrics, rel=1e-9, abs=1e-12)
        for job, same in zip(one.participants, other.participants, strict=True):
            assert (job.loss or 0.0) == pytest.approx(same.loss or 0.0, rel=1e-9)
            assert dataclasses.replace(job, loss=None) == dataclasses.replace(same, loss=None)


@pytest.mark.parametrize(("name", "engine"), [each for each in PAIRS if each[1].endswith("all")])
def test_engines_agree_in_single_precision(outcome: Run, name: str, engine: str) -> None:
    found = outcome(name, engine, "float32")
    assert error(found.tensors, outcome(name, "sequential", "float32").tensors) < 1e-4


def test_few_multiplications_round_ten_times_as_much_in_single_precision(outcome: Run) -> None:
    found, expected = (outcome("fedavg-cnn", each, "float32") for each in ("fused-winograd", "sequential"))
    assert 0 < error(found.tensors, expected.tensors) < 1e-3


# Reproducibility.


# One client after the other, the tests of resuming and of purity repeat it bit for bit.
@every_case
def test_a_seed_names_a_run_bit_for_bit(outcome: Run, digits: Build, name: str) -> None:
    repeated = play(digits(**CASES[name], engine=ENGINES["batched-3"]))
    assert identical(repeated, outcome(name, "batched-3"))


@every_case
def test_another_seed_gives_another_run(outcome: Run, digits: Build, name: str) -> None:
    one, other = outcome(name), play(digits(**{**CASES[name], "stop": {"rounds": 2}}, seed=1))
    assert one.rounds[:2] != other.rounds
    for tensor, each in one.tensors.items():  # matrices: an untrained norm's weights are ones, always
        if tensor.endswith("weight") and each.dim() > 1 and tensor in other.tensors:
            assert not torch.equal(each, other.tensors[tensor])


@every_case
def test_a_run_can_be_stopped_and_resumed(outcome: Run, digits: Build, name: str, tmp_path: Path) -> None:
    federation = digits(**CASES[name], engine=ENGINES["sequential"])
    rounds: list[Round] = []

    def stop_after_two(done: Round) -> None:
        rounds.append(done)
        if done.index == 2:
            first.stop()

    first = Simulator(federation, DEVICES, on_round=stop_after_two, checkpoints=tmp_path)
    with pytest.raises(Interrupted):
        first.run()
    second = Simulator(federation, DEVICES, on_round=rounds.append, checkpoints=tmp_path)
    second.resume()
    second.run()
    assert identical(played(second, federation.clients, rounds), outcome(name))


@every_case
def test_a_snapshot_of_the_hub_survives_the_disk(digits: Build, name: str) -> None:
    federation = digits(**{**CASES[name], "stop": {"rounds": 2}})
    simulator, fresh = Simulator(federation, DEVICES), Simulator(federation, DEVICES)
    simulator.run()
    tensors, facts = simulator.hub.snapshot()
    fresh.hub.restore(load(save(tensors)), json.loads(json.dumps(facts)))
    again, same_facts = fresh.hub.snapshot()
    assert tensors.keys() == again.keys()
    assert all(torch.equal(each, again[name]) for name, each in tensors.items())
    assert facts == same_facts


# What leaves a client.


@dataclass
class Traffic:
    """Every payload and every update that passed a hub."""

    payloads: list[Tree] = dataclasses.field(default_factory=list)
    updates: list[Tree] = dataclasses.field(default_factory=list)

    def tap(self, hub: Hub, patch: pytest.MonkeyPatch) -> None:
        on, fold = hub.on, hub.fold

        def listening_on(*arguments: Any) -> list[Order]:
            orders = on(*arguments)
            self.payloads += [each.job.payload for each in orders if isinstance(each, Send)]
            return orders

        def listening_fold(reports: Sequence[Report], updates: Tree, present: Mapping[str, Tensor]) -> None:
            self.updates += [row(updates, i) for i in range(len(reports))]
            fold(reports, updates, present)

        patch.setattr(hub, "on", listening_on)
        patch.setattr(hub, "fold", listening_fold)


# Names under which a client keeps something of its own, and sends something else.
HOMONYMS = {"scaffold": "control/*"}


@every_case
def test_local_frozen_and_private_tensors_never_travel(
    digits: Build, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = digits(
        **{
            **CASES[name],
            "model": {"name": "mlp", "hidden": [6, 5], "norm": "batch"},
            "parameters": {"local": ["extractor.linear1.bias"], "frozen": ["extractor.linear2.bias"]},
            "stop": {"rounds": 2},
        }
    )
    task, algorithm = federation.task, federation.algorithm
    private = algorithm.private(task).keys()
    assert "extractor.linear1.bias" in private
    simulator, traffic = Simulator(federation, DEVICES), Traffic()
    traffic.tap(simulator.hub, monkeypatch)
    simulator.run()
    homonyms = HOMONYMS.get(name, "")
    secret = {*task.local_names, *task.frozen, *(n for n in private if not fnmatch.fnmatch(n, homonyms))}
    assert traffic.payloads
    assert traffic.updates
    for message in (*traffic.payloads, *traffic.updates):
        assert not secret & message.keys()


@every_case
def test_frozen_tensors_stay_and_local_ones_part(digits: Build, name: str) -> None:
    federation = digits(
        **{
            **CASES[name],
            "model": {"name": "mlp", "hidden": [6, 5], "norm": "batch"},
            "parameters": {"local": ["extractor.linear1.*"], "frozen": ["extractor.linear2.*"]},
            "stop": {"rounds": 3},
        }
    )
    simulator = Simulator(federation, DEVICES)
    simulator.run()
    task = federation.task
    for client in range(federation.clients):
        mine = federation.algorithm.personal(
            task, simulator.hub.params_for(client), simulator.private(client)
        )
        assert not task.frozen.keys() & mine.keys()  # they are constants of the task
    kept = [simulator.private(client)["extractor.linear1.weight"] for client in range(federation.clients)]
    trained = [each for each in kept if not torch.equal(each, task.initial["extractor.linear1.weight"])]
    assert len(trained) >= 2
    assert not torch.equal(trained[0], trained[1])


# Purity.

PURE = ("init", "issue", "weigh", "apply", "private", "begin", "step", "finish", "personal")


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [each for part in value.values() for each in tensors_in(part)]
    if isinstance(value, tuple | list):
        return [each for part in value for each in tensors_in(part)]
    if isinstance(value, Task):
        return tensors_in([value.initial, *value._train.state_dict().values()])
    if dataclasses.is_dataclass(value):
        return [each for item in dataclasses.fields(value) for each in tensors_in(getattr(value, item.name))]
    return []


def watched(algorithm: Algorithm) -> Algorithm:
    """The same algorithm, each method of which asserts that it changes no tensor it is given."""

    def watch(name: str) -> Callable[..., Any]:
        method = getattr(type(algorithm), name)

        def call(self: Algorithm, *arguments: Any, **named: Any) -> Any:
            given = tensors_in([*arguments, *named.values()])
            before = [each._version for each in given]  # counts the writes to a tensor's memory
            result = method(self, *arguments, **named)
            assert [each._version for each in given] == before, f"{name} changed an argument in place"
            return result

        return call

    kind = type("Watched", (type(algorithm),), {name: watch(name) for name in PURE})
    made: Algorithm = kind(
        **{each.name: getattr(algorithm, each.name) for each in dataclasses.fields(algorithm) if each.init}
    )
    return made


@every_case
def test_methods_change_nothing_they_are_given(outcome: Run, digits: Build, name: str) -> None:
    federation = digits(**CASES[name], engine=ENGINES["sequential"])
    federation = dataclasses.replace(federation, algorithm=watched(federation.algorithm))
    assert identical(play(federation), outcome(name))


# Little work.


def one_step_of_the_hub(federation: Federation, steps: int) -> tuple[Hub, list[Tree]]:
    """All clients do at most ``steps`` local steps in each phase of a hub step; their private trees."""
    algorithm, task = federation.algorithm, federation.task
    simulator = Simulator(federation)
    hub, engine = simulator.hub, simulator._trainer
    private = [algorithm.private(task) for _ in range(federation.clients)]
    for phase in algorithm.phases:
        jobs = [hub._issue(client, phase, 0.0) for client in range(federation.clients)]
        works = [Work(client, job, private[client], steps) for client, job in enumerate(jobs)]
        reports = [
            Report(client, job.number, phase, 1 + client, steps, 0, 0.0, 1.0)
            for client, job in enumerate(jobs)
        ]
        hub._folding, hub._acc = tuple(reports), algorithm.fold(phase).init()
        position = 0
        for results in engine.train(works):
            chunk = range(position, position + len(results.works))
            present = {
                name: torch.tensor(
                    [float(keys is None or name in keys) for keys in (jobs[i].keys for i in chunk)]
                )
                for name in results.updates
            }
            hub.fold([reports[i] for i in chunk], results.updates, present)
            for place, client in enumerate(chunk):
                private[client] = row(results.privates, place)
            position += len(results.works)
        hub.close()
    return hub, private


COUNTERS = ("favano/contacts",)  # a contact without work is a contact


@every_case
@pytest.mark.parametrize("engine", ["sequential", "batched-3"])
def test_no_local_steps_change_nothing(digits: Build, name: str, engine: str) -> None:
    federation = digits(**CASES[name], engine=ENGINES[engine])
    task, algorithm = federation.task, federation.algorithm
    hub, private = one_step_of_the_hub(federation, steps=0)
    start = algorithm.init(task, clients=federation.clients, horizon=10).params
    for client in range(federation.clients):
        # A mean of equal running statistics may differ from them in the last digit.
        assert error({**hub.params_for(client)}, start) < 1e-15
        kept = algorithm.private(task)
        assert error({**private[client], **{n: kept[n] for n in kept if n in COUNTERS}}, kept) == 0
    assert hub.state.version == 1


# A federation of one.


SGD: dict[str, dict[str, float]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.1},
    "all": {"momentum": 0.5, "weight_decay": 0.1, "clip_norm": 0.3},
}


@pytest.mark.parametrize(
    ("engine", "norm", "variant"),
    [
        *itertools.product(("sequential", "batched-3"), ("batch",), SGD),
        *itertools.product(("fused-3",), ("none", "layer"), ("plain", "decay")),
    ],
)
def test_fedavg_of_one_client_is_torch_sgd(digits: Build, engine: str, norm: str, variant: str) -> None:
    sgd = SGD[variant]
    federation = digits(
        partition={"kind": "iid", "clients": 1},
        model={"name": "mlp", "hidden": [6], "norm": norm},
        schedule={"cohort": 1},
        stop={"rounds": 3},
        train={"epochs": 2, **sgd},
        engine=ENGINES[engine],
    )
    simulator = Simulator(federation)
    ending = simulator.run()

    task, data = federation.task, federation.data
    model = copy.deepcopy(task.module).train().requires_grad_(True)
    model.load_state_dict(task.initial)
    mine = data.train_shards.of(0)
    for number in range(3):
        optimiser = torch.optim.SGD(
            model.parameters(), 0.05, sgd.get("momentum", 0.0), weight_decay=sgd.get("weight_decay", 0.0)
        )
        work = LocalWork(epochs=2, batch_size=12)
        for positions in work.batches(len(mine), seed=0, client=0, number=number):
            batch = mine[positions]
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(data.train.x[batch]), data.train.y[batch])
            torch.autograd.backward(loss)
            if "clip_norm" in sgd:
                # Written out: torch's clip_grad_norm_ divides by the norm plus 1e-6.
                norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
                for p in model.parameters():
                    assert p.grad is not None
                    p.grad *= min(1.0, sgd["clip_norm"] / float(norms.norm()))
            optimiser.step()
    found = {**ending.params, **simulator.private(0)}
    expected = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    assert error(found, expected) < 1e-12  # the server adds the difference: x + (y - x)


def test_an_abandoned_step_only_counts(digits: Build) -> None:
    hub = Simulator(digits()).hub
    before = hub.state
    hub.close()
    hub.on(Aggregated(), 0.0)
    assert hub.state == dataclasses.replace(before, version=1)
