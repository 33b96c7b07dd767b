"""Clients evaluate what only they can: as the simulator would, and whatever becomes of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from floor import Floor, checked, end, named, play, small, submit, until

from hansa.core.data import load
from hansa.core.recipe import Recipe
from hansa.core.store import Round, RunStore
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire import version
from hansa.core.wire.federation_pb2_grpc import AgentsStub
from hansa.core.wire.tensors import Packed, pack, unpack
from hansa.server.events import Event, EventLog
from hansa.server.machine import Machine
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import assemble
from hansa.strategies.evaluate import reckon, tally

FEDBN = small(algorithm={"name": "fedbn"})


def simulated(recipe: Recipe) -> list[Round]:
    rounds: list[Round] = []
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"mode": "sequential"})})
    Simulator(assemble(recipe), on_round=rounds.append).run()
    return rounds


def recorded(floor: Floor, run: str) -> list[tuple[Mapping[str, float], Any]]:
    """Metrics and client scores of every round."""
    with RunStore.open(floor.runs / run) as store:
        return [(each.metrics, store.client_scores(each.index)) for each in store.rounds()]


def require_same(floor: Floor, run: str, expected: list[Round]) -> None:
    """The same rounds, with the same figures, evaluated where the simulator evaluates."""
    found = recorded(floor, run)
    assert len(found) == len(expected)
    for (metrics, scores), other in zip(found, expected, strict=True):
        assert metrics.keys() == other.metrics.keys()
        for name, value in other.metrics.items():
            assert metrics[name] == pytest.approx(value, abs=1e-6), name
        assert (scores is None) == (other.clients is None)
        if scores is not None:
            assert other.clients is not None
            for name in ("client", "examples", "accuracy", "loss"):
                np.testing.assert_allclose(getattr(scores, name), getattr(other.clients, name), atol=1e-6)


@pytest.mark.parametrize(
    "recipe",
    [
        FEDBN,
        small(algorithm={"name": "fedbn"}, evaluation={"every": 2, "clients": 3}),
        small(algorithm={"name": "fraug"}, stop={"rounds": 2}),
    ],
    ids=["fedbn", "some", "fraug"],
)
def test_what_clients_keep_is_evaluated_as_in_the_simulator(floor: Floor, recipe: Recipe) -> None:
    async def scene() -> str:
        async with floor.coordinator() as control, floor.agents(3):
            run = await submit(control, recipe)
            assert (await end(control, run))[1].status == "finished"
            return run

    run = play(scene())
    require_same(floor, run, simulated(recipe))
    checked(floor, run)


@pytest.mark.parametrize(
    "partition", [{"kind": "iid"}, {"kind": "classes", "classes_per_client": 6}], ids=["all", "some classes"]
)
def test_sites_evaluate_on_what_they_hold(floor: Floor, partition: Mapping[str, Any]) -> None:
    """The simulator's clients, each with its examples in files of its own that no other site has."""
    recipe = small(
        data={"limit": 300},
        partition={**partition, "clients": 2},
        schedule={"cohort": 2},
        model={"norm": "none"},
    )
    f = assemble(recipe)
    train, test = load(recipe.data, recipe.seed)

    def own(client: int) -> Mapping[str, Any]:
        parts = (("", train, f.data.train_shards), ("test_", test, f.data.test_shards))
        paths: dict[str, str] = {}
        for prefix, examples, shards in parts:
            for name in ("x", "y"):
                path = floor.folder / f"{client}-{prefix}{name}.npy"
                np.save(path, getattr(examples, name)[shards.of(client)].numpy())
                paths[prefix + name] = str(path)
        return {"source": "npy", **paths}

    async def scene() -> str:
        async with floor.coordinator() as control:
            agents = [floor.agent(f"site-{i}", clients=(i,), data=own(i)) for i in range(2)]
            tasks = [asyncio.create_task(each.run()) for each in agents]
            run = await submit(control, recipe)
            assert (await end(control, run))[1].status == "finished"
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return run

    run = play(scene())
    require_same(floor, run, simulated(recipe))
    checked(floor, run)


def test_a_target_ends_the_run_in_the_round_that_reaches_it(floor: Floor) -> None:
    whole = small(algorithm={"name": "fedbn"}, stop={"rounds": 12}, train={"lr": 0.2})
    reached = [each.metrics["accuracy"] for each in simulated(whole)]
    target = max(reached[:8])
    assert reached.index(target) > 0
    recipe = whole.model_copy(update={"stop": whole.stop.model_copy(update={"target": target - 1e-9})})
    expected = simulated(recipe)
    assert len(expected) < 12

    async def scene() -> str:
        async with floor.coordinator() as control, floor.agents(2):
            run = await submit(control, recipe)
            _, status = await end(control, run)
            assert status.reason.startswith("reached the target")
            return run

    run = play(scene())
    require_same(floor, run, expected)
    assert checked(floor, run).rounds == len(expected)


def test_asynchronous_runs_are_evaluated_while_they_go_on(floor: Floor) -> None:
    recipe = small(
        algorithm={"name": "fedbn"},
        schedule={"name": "buffered", "k": 2, "concurrency": 4},
        stop={"rounds": 12},
    )

    async def scene(recipe: Recipe) -> str:
        async with floor.coordinator() as control, floor.agents(3):
            run = await submit(control, recipe)
            rounds, status = await end(control, run)
            assert status.status == "finished"
            assert [each.index for each in rounds] == list(range(1, len(rounds) + 1))
            return run

    run = play(scene(recipe))
    found = recorded(floor, run)
    assert len(found) == 12
    last = found[-1]
    assert "accuracy" in last[0]
    assert last[1] is not None
    assert last[1].client.tolist() == list(range(6))  # the last model, by all
    assert checked(floor, run).rounds == 12
    early = recipe.model_copy(update={"stop": recipe.stop.model_copy(update={"target": 0.0})})
    run = play(scene(early))
    assert len(recorded(floor, run)) < 12
    checked(floor, run)


def test_a_snapshot_between_any_two_events_goes_on_alike(floor: Floor) -> None:
    """With evaluations open, as the log of a run has them, and rounds that wait for them."""
    recipe = small(
        algorithm={"name": "fedbn"},
        schedule={"name": "buffered", "k": 2, "concurrency": 4},
        stop={"rounds": 4},
    )

    async def scene() -> str:
        async with floor.coordinator() as control, floor.agents(2):
            run = await submit(control, recipe)
            await end(control, run)
            return run

    run = play(scene())
    with closing(EventLog(floor.url, lead=False)) as log:
        events = log.events(run)
        blobs = {e.body["digest"]: log.blob(e.body["digest"]) for e in events if e.kind == "update"}

    def machine() -> Machine:
        return Machine(assemble(recipe), lambda digest, tensors: unpack(blobs[digest] or b"", tensors), no)

    def no(hub: object) -> Any:
        raise AssertionError("clients evaluate this")

    def played(made: Machine, rest: list[Event]) -> list[Round]:
        return [done for event in rest for done in made.apply(event).rounds]

    whole = machine()
    expected = played(whole, events)
    assert [each.index for each in expected] == [1, 2, 3, 4]
    cut = []
    first = machine()
    before: list[Round] = []
    for event in events:
        before += played(first, [event])
        kept: dict[str, Packed] = {}
        tensors, facts = first.snapshot(lambda packed, kept=kept: kept.update({packed.digest: packed}))  # type: ignore[misc]
        again = machine()
        again.restore(
            first.seq,
            tensors,
            json.loads(json.dumps(facts)),
            lambda digest, kept=kept: kept[digest].data,  # type: ignore[misc]
        )
        after = played(again, events[event.seq :])
        assert [_told(each) for each in (*before, *after)] == [_told(each) for each in expected]
        assert pack(again.hub.model()).digest == pack(whole.hub.model()).digest
        midway = first.evaluation
        cut.append(midway is not None and bool(midway.waiting and midway.tallies))
    assert any(cut)


def _told(done: Round) -> Any:
    clients = None if done.clients is None else [each.tolist() for each in vars(done.clients).values()]
    return done.index, dict(done.metrics), list(done.participants), clients


# What may go wrong.


class Hand:
    """An agent played by hand for the clients of a run."""

    def __init__(self, stub: AgentsStub, **hello: Any) -> None:
        self._stub, self._hello = stub, hello
        self.stream: Any = None

    async def attend(self) -> None:
        self.stream = self._stub.Attend(metadata=named("hand"))
        hello = pb.Hello(**{"version": version(), "seats": pb.Seats(clients=[0]), **self._hello})
        await self.stream.write(pb.FromAgent(hello=hello))
        assert (await self.stream.read()).WhichOneof("body") == "welcome"

    async def given(self, kind: str) -> Any:
        """The next message of this kind."""
        while True:
            message = await self.stream.read()
            if message.WhichOneof("body") == kind:
                return getattr(message, kind)

    async def train(self) -> pb.Job:
        """Answer a job by the model as it came, as if the step had been one of zeros."""
        job: pb.Job = await self.given("job")
        assert job.payload.data
        update = pack({name: 0 * each for name, each in unpack(job.payload.data, job.tensors).items()})
        call = self._stub.Upload(metadata=named("hand"))
        manifest = pb.Manifest(
            lease=job.lease,
            update=pb.Blob(digest=update.digest, size=len(update.data), data=update.data),
            tensors=update.tensors,
            examples=10,
            steps=1,
        )
        await call.write(pb.UploadRequest(manifest=manifest))
        assert (await call.read()).acknowledgement.counted
        return job

    async def score(self, lease: bytes, **scores: Any) -> None:
        await self.stream.write(pb.FromAgent(scores=pb.Scores(lease=lease, **scores)))


def one(**sections: Any) -> Recipe:
    """A run of a single client that keeps something."""
    alone = {"partition": {"kind": "iid", "clients": 1}, "schedule": {"cohort": 1}, "stop": {"rounds": 2}}
    return small(**{"algorithm": {"name": "fedbn"}, **alone, **sections})


@asynccontextmanager
async def hand(floor: Floor, **hello: Any) -> AsyncIterator[Hand]:
    async with AsyncExitStack() as stack:
        made = Hand(floor.stub(stack), **hello)
        await made.attend()
        yield made
        made.stream.cancel()


def test_who_does_not_answer_holds_up_nobody_for_longer_than_the_deadline(floor: Floor) -> None:
    async def scene() -> str:
        async with floor.coordinator() as control, hand(floor) as agent:
            run = await submit(control, one(evaluation={"deadline": 0.2}))
            await agent.train()
            asked = await agent.given("evaluation")
            assert (await agent.given("recall")).lease == asked.lease
            await agent.score(asked.lease, examples=5, loss=1.0, accuracy=5.0)  # too late
            await agent.train()
            asked = await agent.given("evaluation")
            await agent.score(asked.lease, examples=4, loss=2.0, accuracy=3.0)
            assert (await end(control, run))[1].status == "finished"
            return run

    run = play(scene())
    (first, nobody), (second, scores) = recorded(floor, run)
    assert "accuracy" not in first
    assert nobody is None
    assert (second["accuracy"], second["loss"]) == (0.75, 0.5)
    assert scores.examples.tolist() == [4]
    checked(floor, run)


def test_who_goes_away_is_not_waited_for(floor: Floor) -> None:
    async def scene() -> None:
        async with floor.coordinator(grace=0.1) as control:
            async with hand(floor) as agent:
                run = await submit(control, one(stop={"rounds": 1}))
                await agent.train()
                await agent.given("evaluation")
            rounds, status = await end(control, run)
            assert status.status == "finished"
            assert "accuracy" not in rounds[0].metrics

    play(scene())


@pytest.mark.parametrize(
    "scores",
    [
        {"examples": 4, "loss": 1.0, "accuracy": 5.0},
        {"examples": 4, "loss": 1.0, "accuracy": -1.0},
        {"examples": 4, "loss": float("nan"), "accuracy": 1.0},
        {"examples": 4, "loss": 1.0, "accuracy": float("nan")},
        {"examples": 10**9, "loss": 1.0, "accuracy": 10.0**9},
    ],
)
def test_scores_that_cannot_be_right_are_left_out(floor: Floor, scores: Mapping[str, Any]) -> None:
    async def scene() -> str:
        async with floor.coordinator() as control, hand(floor) as agent:
            run = await submit(control, one(stop={"rounds": 1}))
            job = await agent.train()
            asked = await agent.given("evaluation")
            honest = {"examples": 4, "loss": 1.0, "accuracy": 4.0}
            await agent.score(job.lease, **honest)  # of training, forged, of nothing: not heard
            await agent.score(asked.lease[:-1] + bytes([asked.lease[-1] ^ 1]), **honest)
            await agent.score(b"", **honest)
            await agent.score(asked.lease, **scores)
            assert (await end(control, run))[1].status == "finished"
            return run

    run = play(scene())
    ((metrics, told),) = recorded(floor, run)
    assert "accuracy" not in metrics
    assert told is None


def test_an_agent_of_an_older_protocol_is_not_asked(floor: Floor) -> None:
    old = pb.Version(major=1, minor=1)

    async def scene() -> None:
        async with floor.coordinator() as control, hand(floor, version=old) as agent:
            run = await submit(control, one(stop={"rounds": 1}))
            await agent.train()
            assert (await end(control, run))[1].status == "finished"

    play(scene())


def test_a_coordinator_that_starts_again_asks_again(floor: Floor) -> None:
    recipe = one(engine={"checkpoint_every": 1})

    async def scene() -> str:
        async with floor.coordinator() as control, hand(floor) as agent:
            run = await submit(control, recipe)
            await agent.train()
            asked = await agent.given("evaluation")
            snapshot = EventLog(floor.url, lead=False)
            await until(lambda: snapshot.snapshot(run) is not None)
            snapshot.close()
        async with floor.coordinator() as control, hand(floor) as agent:
            again = await agent.given("evaluation")
            assert (again.lease, again.payload.digest) == (asked.lease, asked.payload.digest)
            await agent.score(again.lease, examples=4, loss=2.0, accuracy=3.0)
            await agent.train()
            asked = await agent.given("evaluation")
            await agent.score(asked.lease, examples=4, loss=2.0, accuracy=4.0)
            assert (await end(control, run))[1].status == "finished"
        return run

    run = play(scene())
    assert [metrics["accuracy"] for metrics, _ in recorded(floor, run)] == [0.75, 1.0]
    checked(floor, run)


def test_a_model_is_scored_with_what_the_client_keeps(tmp_path: Path) -> None:
    """Two clients of one model whose BatchNorm differs; sums by hand."""
    f = assemble(FEDBN)
    shared = {name: f.task.initial[name] for name in f.task.shared}
    private = f.algorithm.private(f.task)
    other = {name: each + 0.5 for name, each in private.items()}
    tallies = {c: tally(f, shared, (private, other)[c], c) for c in (0, 1)}
    indices = f.data.test_shards.of(1)
    with torch.no_grad():
        out = f.task.forward({**shared, **other}, f.data.test.x[indices])
    right = int((out.argmax(1) == f.data.test.y[indices]).sum())
    assert (tallies[1].examples, tallies[1].accuracy) == (len(indices), right)
    metrics, scores = reckon({**tallies, 5: type(tallies[0])(examples=0)}, personal=True)
    assert scores is not None
    assert scores.client.tolist() == [0, 1]
    total = (tallies[0].accuracy or 0) + right
    assert metrics["accuracy"] == pytest.approx(total / (tallies[0].examples + len(indices)))
    assert "global/accuracy" not in metrics
