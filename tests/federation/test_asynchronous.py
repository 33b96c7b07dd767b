"""Asynchronous runs over real streams: buffers fill, alarms ring; agents are slow, come and go.

The models are computed again here from what the event log holds: who sent what, in which order.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, closing
from typing import Any, NamedTuple

import grpc
import pytest
import torch
from floor import Floor, checked, end, play, small, submit
from safetensors.torch import load

from hansa.client import workshop
from hansa.client.policy import Policy
from hansa.core.algorithm import Job
from hansa.core.recipe import Recipe
from hansa.core.store import RunStore
from hansa.core.trees import Tree, add, subtract, tree_map
from hansa.core.wire import federation_pb2 as pb
from hansa.server.events import EventLog
from hansa.strategies.catalog import assemble
from hansa.strategies.local import Data, Trained, Work, train

PLAIN = {"name": "mlp", "hidden": [6]}
UNLIKE = (Policy(), Policy(duty=0.1), Policy(duty=0.02))  # of three agents, which share six clients
FAST, SLOW = {0, 3}, {2, 5}


class Sent(NamedTuple):
    """An update in the order of the log: a client's ``number``-th."""

    client: int
    number: int
    steps: int
    update: Tree


@asynccontextmanager
async def crew(floor: Floor, policies: tuple[Policy, ...] = UNLIKE) -> AsyncIterator[None]:
    """Agents of unlike speed."""
    async with AsyncExitStack() as stack:
        for i, policy in enumerate(policies):
            agent = floor.agent(f"a{i}", share=f"{i}/{len(policies)}", policy=policy)
            stack.push_async_callback(ended, asyncio.create_task(agent.run()))
        yield


async def ended(task: asyncio.Task[None]) -> None:
    """End an agent, as SIGTERM does."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def run_with(floor: Floor, recipe: Recipe, policies: tuple[Policy, ...] = UNLIKE) -> str:
    """A run to its end, audited."""

    async def scene() -> str:
        async with floor.coordinator() as control, crew(floor, policies):
            run = await submit(control, recipe)
            _, status = await end(control, run)
            assert status.reason == f"made {recipe.stop.rounds} rounds"
            return run

    run: str = play(scene())
    assert checked(floor, run).rounds == recipe.stop.rounds
    return run


def sent(floor: Floor, run: str) -> list[Sent]:
    """All updates of a run that has ended, in the order of the log, but for those that came too late."""
    with closing(EventLog(floor.url, lead=False)) as log:
        ended = log.snapshot(run)
        assert ended is not None
        late = {tuple(each) for each in ended.facts["late"]}
        found = []
        for event in log.events(run):
            if event.kind == "update" and (event.client, event.number) not in late:
                data = log.blob(event.body["digest"])
                assert data is not None
                assert event.client is not None
                assert event.number is not None
                found.append(Sent(event.client, event.number, event.body["steps"], load(data)))
        return found


def jobs(floor: Floor, run: str) -> Mapping[str, Any]:
    """The record of jobs, as columns."""
    with RunStore.open(floor.runs / run) as store:
        return store.participation()


def start(recipe: Recipe) -> Tree:
    return dict(assemble(recipe).task.initial)


def require_close(floor: Floor, run: str, expected: Tree) -> None:
    found = floor.model(run)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "k"), [("fedasync", 1), ("fedbuff", 3)])
def test_the_model_follows_from_the_log_of_arrivals(floor: Floor, name: str, k: int) -> None:
    """FedAsync: ``x ← x + α s(τ) (x_i − x)``; FedBuff: ``x ← x + (1/K) Σ s(τ_i) Δ_i``; s = 1/√(1 + τ).

    All six clients are always at work: each starts again from the newest model when its update has arrived,
    after the step if that made one.
    """
    recipe = small(
        model=PLAIN,
        algorithm={"name": name},
        train={"epochs": 2, "batch_size": 4, "lr": 0.05},
        schedule={"name": "buffered", "k": k, "concurrency": 6},
        stop={"rounds": 24},
    )
    run = run_with(floor, recipe)
    x, version, started = start(recipe), 0, Counter[int]()
    told: list[tuple[int, int, float]] = []
    buffer: list[tuple[float, Tree]] = []
    for client, _, _, update in sent(floor, run)[: 24 * k]:
        staleness = version - started[client]
        s = (1 + staleness) ** -0.5
        told.append((client, staleness, s))
        buffer.append((s, subtract(update, x) if name == "fedasync" else update))
        if len(buffer) == k:
            for s, change in buffer:
                x = add(x, change, s * (0.6 if name == "fedasync" else 1 / k))
            version, buffer = version + 1, []
        started[client] = version
    require_close(floor, run, x)

    record = jobs(floor, run)
    assert (record["outcome"] == "folded").all()
    assert list(zip(record["client"], record["staleness"], strict=True)) == [each[:2] for each in told]
    assert record["weight"] == pytest.approx([s for _, _, s in told])
    came = Counter(client for client, _, _ in told)
    assert min(came[client] for client in FAST) > max(came[client] for client in SLOW)
    assert max(age for client, age, _ in told if client not in FAST) > max(
        age for client, age, _ in told if client in FAST
    )


def test_fedfix_weighs_the_rare_by_their_rarity(floor: Floor) -> None:
    """``x ← x + Σ p_i/f_i Δ_i`` at every tick, f_i the client's updates so far over the steps so far."""
    recipe = small(
        model=PLAIN,
        train={"epochs": 2, "batch_size": 4, "lr": 0.02},
        schedule={"name": "periodic", "interval": 0.3},
        weights={"frequency": "estimated", "target": "uniform"},
        stop={"rounds": 12},
    )
    run = run_with(floor, recipe)
    record = jobs(floor, run)
    updates = {(each.client, each.number): each.update for each in sent(floor, run)}
    x, count = start(recipe), Counter[int]()
    for version in range(1, 13):
        before = x
        for i in (record["round"] == version).nonzero()[0]:
            client = int(record["client"][i])
            update = updates[client, count[client]]
            count[client] += 1
            d = 1 / 6 * version / count[client]
            assert record["weight"][i] == pytest.approx(d)
            x = add(x, update, d)
        assert x is not before
    require_close(floor, run, x)
    assert min(count[client] for client in FAST) > max(count[client] for client in SLOW)
    heaviest = max(record["weight"])
    assert {int(c) for c in record["client"][record["weight"] == heaviest]}.isdisjoint(FAST)


def test_favano_takes_what_agents_have_and_makes_each_worth_one_gradient(floor: Floor) -> None:
    """``x ← (x + Σ_S ŵ_i)/(s + 1)``, ``ŵ_i = w_i⁰ + Δ_i/α_i``, α_i = steps times share of contacts with work.

    Δ_i is trained again here, as FedAvg would, with as many steps as the agent did before it was recalled.
    """
    recipe = small(
        model=PLAIN,
        algorithm={"name": "favano"},
        train={"steps": 200, "epochs": 1, "batch_size": 8, "lr": 0.05},
        schedule={"name": "periodic", "interval": 0.4, "recall": 3},
        stop={"rounds": 10},
    )
    run = run_with(floor, recipe, tuple(Policy(duty=duty) for duty in (1, 0.1, 0.02, 1, 0.1, 0.02)))
    rounds = {"algorithm": {"name": "fedavg"}, "schedule": {"name": "rounds", "cohort": 4}}
    plain = assemble(recipe.model_copy(update=rounds))
    data, x = Data(plain, recipe.seed), start(recipe)
    record = jobs(floor, run)
    starts, contacts, worked = dict.fromkeys(range(6), x), Counter[int](), Counter[int]()
    updates = {(each.client, each.number): each for each in sent(floor, run)}
    for version in range(1, 11):
        due = [int(c) for c in record["client"][record["round"] == version]]
        assert len(due) == 3
        models = []
        for client in due:
            told = updates[client, contacts[client]]
            work = Work(client, Job(told.number, "train", starts[client]), {})
            made = train(data, work, halt=told.steps.__eq__)
            contacts[client] += 1
            worked[client] += told.steps > 0
            alpha = max(worked[client] / contacts[client] * told.steps, 0.1)
            models.append(add(starts[client], made.update, 1 / alpha))
            for name, tensor in told.update.items():
                torch.testing.assert_close(models[-1][name], tensor, rtol=1e-8, atol=1e-10)
        x = {name: (tensor + sum(each[name] for each in models)) / 4 for name, tensor in x.items()}
        starts |= dict.fromkeys(due, x)
    require_close(floor, run, x)
    steps = {client: record["steps"][record["client"] == client] for client in contacts}
    assert max(record["steps"]) <= 200
    assert ((record["steps"] > 0) & (record["steps"] < 200)).any()
    quick = [mine.mean() for client, mine in steps.items() if client in FAST]
    slow = [mine.mean() for client, mine in steps.items() if client in SLOW]
    assert max(slow) < min(quick)


def test_a_recall_does_not_wait_for_the_agents_other_clients(floor: Floor) -> None:
    """One slow agent for two clients, of whom one is contacted: who waits has nothing, and says so."""
    recipe = small(
        model=PLAIN,
        partition={"kind": "iid", "clients": 2},
        algorithm={"name": "favano"},
        train={"steps": 1000, "epochs": 1, "batch_size": 8, "lr": 0.05},
        schedule={"name": "periodic", "interval": 0.3, "recall": 1},
        stop={"rounds": 6},
    )
    record = jobs(floor, run_with(floor, recipe, (Policy(duty=0.01),)))
    assert max(record["steps"]) < 1000  # nobody was waited for
    assert 0 in record["steps"]
    assert max(record["steps"]) > 0


def test_anarchic_clients_do_as_much_as_they_like(floor: Floor) -> None:
    """AFA-CD, ``x ← x + (1/m) Σ Δ_i/K_i``: the recipe draws 1 to 3 passes, one owner allows two steps."""
    recipe = small(
        model=PLAIN,
        algorithm={"name": "afa_cd"},
        train={"epochs": [1, 3], "batch_size": 4, "lr": 0.05},
        schedule={"name": "buffered", "k": 2, "concurrency": 6},
        stop={"rounds": 15},
    )
    run = run_with(floor, recipe, (Policy(), Policy(job_steps=2), Policy(duty=0.05)))
    came = sent(floor, run)[:30]
    x = start(recipe)
    for each in came:
        x = add(x, each.update, 1 / 2)
    require_close(floor, run, x)
    assert all(each.steps == 2 for each in came if each.client in (1, 4))
    assert len({each.steps for each in came if each.client in FAST}) > 1
    assert set(jobs(floor, run)["weight"]) == {1.0}


def test_anarchic_silos_come_when_they_like(floor: Floor) -> None:
    """AFA-CS: agents come for an update or two and go; ``Ḡ`` stays the mean of what all said last.

    What is sent are differences, so Ḡ is a sixth of their sum, and each client's own is the sum of its own.
    """
    recipe = small(
        model=PLAIN,
        algorithm={"name": "afa_cs", "server_lr": 0.5},
        train={"epochs": [1, 3], "batch_size": 4, "lr": 0.05},
        schedule={"name": "buffered", "k": 2, "concurrency": 6},
        stop={"rounds": 20},
    )
    visits: Counter[int] = Counter()

    async def visitor(i: int) -> None:
        """There for a while and away for a while, again and again."""
        while True:
            visits[i] += 1
            agent = floor.agent(f"a{i}", share=f"{i}/3", policy=Policy(duty=0.1))
            there = asyncio.create_task(agent.run())
            try:
                await asyncio.sleep(0.5)
            finally:
                await ended(there)
            await asyncio.sleep(0.2 * i)

    async def scene() -> str:
        async with floor.coordinator(grace=0.1) as control:
            run = await submit(control, recipe, wait_for=2)
            tasks = [asyncio.create_task(visitor(i)) for i in range(3)]
            _, status = await end(control, run)
            assert status.reason == "made 20 rounds"
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return run

    run = play(scene())
    assert checked(floor, run).rounds == 20
    assert max(visits.values()) > 1
    came = sent(floor, run)
    x, memory = start(recipe), tree_map(torch.zeros_like, start(recipe))
    said = dict.fromkeys(range(6), memory)
    for i, each in enumerate(came, 1):
        said[each.client] = add(said[each.client], each.update)
        if i <= 40 and i % 2 == 0:
            memory = {name: torch.stack([each[name] for each in said.values()]).mean(0) for name in x}
            x = add(x, memory, 0.5)
    require_close(floor, run, x)


def test_backup_workers_are_not_waited_for(floor: Floor) -> None:
    recipe = small(
        model=PLAIN,
        train={"epochs": 2, "batch_size": 8, "lr": 0.05},
        schedule={"name": "backup", "cohort": 6, "window": 4},
        stop={"rounds": 12},
    )
    record = jobs(floor, run_with(floor, recipe))
    folded = [sum(record["outcome"][record["round"] == version] == "folded") for version in range(1, 13)]
    assert folded[:2] == [6, 6]  # nothing is known yet
    assert min(folded) < 6
    late = {int(client) for client in record["client"][record["outcome"] == "discarded"]}
    assert late & SLOW


def test_fedbuff_steps_whenever_its_buffer_is_full(floor: Floor) -> None:
    recipe = small(
        model=PLAIN,
        algorithm={"name": "fedbuff"},
        schedule={"name": "buffered", "k": 2, "concurrency": 4},
        stop={"rounds": 6},
    )

    async def scene() -> str:
        async with floor.coordinator() as control, floor.agents(3):
            run = await submit(control, recipe)
            rounds, status = await end(control, run)
            assert status.reason == "made 6 rounds"
            assert [each.folded for each in rounds] == [2] * 6
            return run

    run = play(scene())
    assert checked(floor, run).rounds == 6
    with RunStore.open(floor.runs / run) as store:
        staleness = store.staleness()
    assert sum(staleness.values()) == 12
    assert max(staleness) > 0  # four are in flight while two make a step


def test_a_periodic_recall_takes_what_clients_have(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small(
        model=PLAIN,
        train={"steps": 1000, "epochs": 1, "batch_size": 12, "lr": 0.01},
        schedule={"name": "periodic", "interval": 0.3, "recall": 3},
        stop={"rounds": 3},
    )
    rested = threading.Event()

    def slow(data: Data, work: Work, *, halt: Callable[[int], bool]) -> Trained:
        """At ten milliseconds a step, a job of a thousand steps outlasts the whole run."""

        def patient(steps: int) -> bool:
            rested.wait(0.01)
            return halt(steps)

        return train(data, work, halt=patient)

    monkeypatch.setattr(workshop, "train", slow)

    async def scene() -> str:
        async with floor.coordinator() as control, floor.agents(6):
            run = await submit(control, recipe)
            rounds, status = await end(control, run)
            assert status.reason == "made 3 rounds"
            assert all(each.folded == 3 for each in rounds)
            return run

    run = play(scene())
    assert checked(floor, run).updates >= 9
    with RunStore.open(floor.runs / run) as store:
        steps = store.participation()["steps"]
    assert 0 < steps.max() < 1000


def test_a_deadline_closes_a_round_without_the_slow(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small(model=PLAIN, schedule={"cohort": 6, "deadline": 1.5}, stop={"rounds": 2})
    over = threading.Event()

    def stuck(data: Data, work: Work, *, halt: Callable[[int], bool]) -> Trained:
        if work.client == 5:
            while not halt(0):  # until it is recalled
                over.wait(0.01)
        return train(data, work, halt=halt)

    monkeypatch.setattr(workshop, "train", stuck)

    async def scene() -> str:
        async with floor.coordinator() as control, floor.agents(6):
            run = await submit(control, recipe)
            _, status = await end(control, run)
            assert status.reason == "made 2 rounds"
            return run

    run = play(scene())
    with RunStore.open(floor.runs / run) as store:
        first = store.participation(1)
    assert list(first["outcome"][first["client"] == 5]) == ["discarded"]


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "buffered", "k": 1, "concurrency": 1, "deadline": 0.5},
        {"name": "periodic", "interval": 0.2, "recall": 6, "deadline": 0.5},
    ],
)
def test_an_agent_that_is_there_and_never_done_is_not_waited_for(
    floor: Floor, monkeypatch: pytest.MonkeyPatch, schedule: dict[str, Any]
) -> None:
    over = threading.Event()

    def hangs(data: Data, work: Work, *, halt: Callable[[int], bool]) -> Trained:
        if work.client == 5:
            over.wait()  # whatever it is told
        return train(data, work, halt=halt)

    monkeypatch.setattr(workshop, "train", hangs)

    async def scene() -> str:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32))  # for jobs that hang
        async with floor.coordinator() as control, floor.agents(6):
            try:
                run = await submit(control, small(model=PLAIN, schedule=schedule, stop={"rounds": 12}))
                _, status = await end(control, run)
            finally:
                over.set()
            assert status.reason == "made 12 rounds"
            return run

    run = play(scene())
    assert checked(floor, run).rounds == 12
    record = jobs(floor, run)
    assert set(record["outcome"][record["client"] == 5]) == {"discarded"}
    assert set(record["client"][record["outcome"] == "folded"]) <= {0, 1, 2, 3, 4}


BUFFER = {"name": "buffered", "k": 2, "concurrency": 4}


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"algorithm": {"name": "fedasync", "server_lr": 1.2}, "schedule": BUFFER}, "algorithm.server_lr"),
        ({"schedule": {**BUFFER, "k": 5}}, "schedule.concurrency"),
        ({"schedule": {"name": "periodic", "interval": 0.0}}, "schedule.interval"),
        ({"schedule": {"name": "periodic", "interval": 0.001}}, "schedule.interval"),
        ({"schedule": {**BUFFER, "deadline": 0.001}}, "schedule.deadline"),
        ({"schedule": BUFFER, "weights": {"frequency": "known"}}, "weights.seconds"),
        ({"schedule": BUFFER, "weights": {"frequency": "known", "seconds": [1.0, 2.0]}}, "weights.seconds"),
        ({"schedule": BUFFER, "weights": {"max_staleness": -1}}, "weights.max_staleness"),
        ({"algorithm": {"name": "favano"}, "schedule": {"name": "periodic"}}, "schedule.recall"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_submitted(
    floor: Floor, sections: dict[str, Any], field: str
) -> None:
    async def scene() -> None:
        async with floor.coordinator() as control:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await submit(control, small(model=PLAIN, **sections))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert field in (caught.value.details() or "")
            listed: pb.RunList = await control.List(pb.ListRequest())
            assert not listed.runs

    play(scene())
