"""The agent's side: what it keeps, what its owner allows, what it finds wrong before it joins."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import structlog
import torch
from floor import Floor, checked, end, play, small, submit

from hansa.client import policy
from hansa.client.agent import Agent, Config, _heartbeat, read_config
from hansa.client.check import check
from hansa.client.outbox import Outbox, entry
from hansa.client.policy import Policy, Refused
from hansa.client.session import Later, Link
from hansa.core.errors import InputError, RunError
from hansa.core.recipe import Recipe
from hansa.core.trees import Tree
from hansa.core.wire import federation_pb2 as pb
from hansa.core.wire.tensors import pack
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import assemble

FRESH: Tree = {"b": torch.zeros(2), "a": torch.zeros(1)}


def finished(outbox: Outbox, number: int, private: Tree) -> Any:
    update = pack({"w": torch.full((3,), float(number))})
    made = entry(update, lease="00", run="r", client=4, number=number, examples=1, steps=1, loss=None)
    outbox.put(made, update, private)
    return made


def test_private_state_moves_on_only_when_its_update_counts(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    first = finished(outbox, 0, {"b": torch.ones(2), "a": torch.ones(1)})
    assert outbox.private("r", 4, FRESH)["a"] == 0
    outbox.settle(first, counted=True)
    assert outbox.private("r", 4, FRESH)["a"] == 1
    assert list(outbox.private("r", 4, FRESH)) == ["b", "a"]  # sums over a tree depend on its order
    late = finished(outbox, 1, {"b": torch.ones(2), "a": torch.full((1,), 9.0)})
    outbox.settle(late, counted=False)
    assert outbox.private("r", 4, FRESH)["a"] == 1
    assert outbox.entries() == []


def test_what_an_undone_job_left_is_forgotten(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)

    def settled(number: int) -> None:
        private = {"b": torch.ones(2), "a": torch.full((1,), float(number))}
        outbox.settle(finished(outbox, number, private), counted=True)

    settled(0)
    assert outbox.private("r", 4, FRESH, undone=0) is FRESH
    settled(9)
    settled(10)
    for _ in range(2):  # the word of it may come twice
        assert outbox.private("r", 4, FRESH, undone=10)["a"] == 9
    settled(11)
    assert outbox.private("r", 4, FRESH)["a"] == 11
    assert outbox.private("r", 4, FRESH, undone=11)["a"] == 9
    for number in range(12, 20):
        settled(number)
    assert len(list((tmp_path / "private" / "r").iterdir())) == 2


def test_what_was_finished_outlives_the_process(tmp_path: Path) -> None:
    made = finished(Outbox(tmp_path), 0, FRESH)
    again = Outbox(tmp_path)
    assert [each.lease for each in again.entries()] == ["00"]
    assert again.read(made, 0, 10**6) == pack({"w": torch.zeros(3)}).data
    # A crash between the private state's move and the entry's end: the answer is given a second time.
    again.settle(made, counted=True)
    finished(again, 1, FRESH)
    (tmp_path / "outbox" / "r" / "4-1" / "private.safetensors").unlink()
    again.settle(again.entries()[0], counted=True)
    assert again.entries() == []


def test_an_upload_ends_with_its_connection(tmp_path: Path) -> None:
    """Also one whose headers never went out: a coordinator that takes connections and says nothing."""
    outbox = Outbox(tmp_path)
    made = finished(outbox, 0, {})

    async def scene() -> None:
        with socket.create_server(("127.0.0.1", 0)) as mute:
            link = Link(f"127.0.0.1:{mute.getsockname()[1]}", None, "a")
            upload = asyncio.create_task(link.upload(outbox, made))
            await asyncio.sleep(0.1)
            assert not upload.done()
            await link.__aexit__()
            with pytest.raises(Later, match="closed"):
                await upload
            with pytest.raises(Later, match="closed"):
                await link.upload(outbox, made)

    play(scene())


def test_private_state_that_cannot_be_read_stops_the_job(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.settle(finished(outbox, 0, FRESH), counted=True)
    path = tmp_path / "private" / "r" / "4-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match="private state cannot be read"):
        outbox.private("r", 4, FRESH)


def test_private_state_of_an_older_hansa_is_not_passed_over(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.settle(finished(outbox, 7, {"b": torch.ones(2), "a": torch.ones(1)}), counted=True)
    older = tmp_path / "private" / "r" / "4.safetensors"
    (tmp_path / "private" / "r" / "4-7.safetensors").rename(older)
    with pytest.raises(RunError, match=r"rename the file to 4-0.safetensors to go on from it"):
        outbox.private("r", 4, FRESH)
    older.rename(older.with_name("4-0.safetensors"))
    assert outbox.private("r", 4, FRESH)["a"] == 1


def test_a_job_that_a_full_disk_does_not_take_fails_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    outbox = Outbox(tmp_path)
    monkeypatch.setattr("hansa.client.outbox.write", full)
    with pytest.raises(RunError, match=r"could not be kept \(No space left on device\)"):
        finished(outbox, 0, FRESH)
    assert list((tmp_path / "outbox" / "r").iterdir()) == []


@pytest.mark.parametrize("run", ["../x", "a/b", "", ".hidden", "x" * 200])
def test_a_runs_name_is_never_a_path(tmp_path: Path, run: str) -> None:
    with pytest.raises(RunError, match="is no name"):
        Outbox(tmp_path).private(run, 0, FRESH)


def test_the_owner_decides(tmp_path: Path) -> None:
    plain = small()
    Policy().require(plain, "d" * 64, 6)
    with pytest.raises(Refused, match="not among those"):
        Policy(recipes=("e" * 64,)).require(plain, "d" * 64, 6)
    with pytest.raises(Refused, match="wants 10 or more"):
        Policy(minimum_clients=10).require(plain, "d" * 64, 6)
    with pytest.raises(Refused, match="not allowed"):
        Policy(algorithms=("fedbn",)).require(plain, "d" * 64, 6)
    code = tmp_path / "mine.py"
    code.write_text("raise SystemExit('it was run')")
    own = plain.model_copy(update={"algorithm": {"name": f"{code}:Mine"}})
    with pytest.raises(Refused, match="has not allowed"):
        Policy().require(own, "d" * 64, 6)
    digest = hashlib.sha256(code.read_bytes()).hexdigest()
    Policy(code={f"{code}:Mine": digest}).require(own, "d" * 64, 6)
    code.write_text("something else")
    with pytest.raises(Refused, match="is not what"):
        Policy(code={f"{code}:Mine": digest}).require(own, "d" * 64, 6)


def test_the_owner_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of a second of the processor each, and a machine that sleeps for an hour in one of them."""
    worked, now = 0.0, 0.0
    recalled = False

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = SimpleNamespace(thread_time=lambda: worked, monotonic=lambda: now, sleep=sleep)
    monkeypatch.setattr(policy, "time", clock)
    over = Policy(duty=0.25, job_steps=3).within(lambda steps: recalled)
    assert not over(0)
    assert now == 0
    for steps, asleep in ((1, 0.0), (2, 3600.0)):
        worked, now = worked + 1, now + 1 + asleep
        before = now
        assert not over(steps)
        assert now - before == pytest.approx(3.0)
    assert over(3)
    other = Policy(duty=0.25).within(lambda steps: recalled)
    worked, recalled, before = worked + 1, True, now
    assert other(1)  # nobody rests when the coordinator asks for what there is
    assert now == before


@pytest.mark.parametrize(
    ("hours", "now", "seconds"),
    [
        ("08:00-18:00", "07:59", 0),
        ("08:00-18:00", "08:00", 36000),
        ("08:00-18:00", "18:00", 0),
        ("22:00-06:00", "23:00", 25200),
        ("22:00-06:00", "05:59", 60),
        ("22:00-06:00", "12:00", 0),
    ],
)
def test_quiet_hours(hours: str, now: str, seconds: int) -> None:
    today = datetime.datetime.combine(datetime.date(2026, 3, 1), datetime.time.fromisoformat(now))
    assert Policy(quiet_hours=hours).quiet(today) == seconds


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('name = "a"', "agent.clients"),
        ('name = "a"\nclients = [0]\nshare = "0/2"', "agent.clients"),
        ('name = "a"\nshare = "2/2"', "agent.share"),
        ('name = "a"\nclients = [-1]', "agent.clients"),
        ('name = "a"\nclients = [0]\nstat = "x"', "agent.stat"),
        ('name = "a"\nclients = [0]\n[policy]\nquiet_hours = "noon"', "policy.quiet_hours"),
        ('name = "a"\nclients = [0]\n[policy]\njob_seconds = 0', "policy.job_seconds"),
        ('name = "a"\nclients = [0]\nprecision = "fp8"', "agent.precision"),
        ('name = "a"\nclients = [0]\n[policy]\nduty = 0.0', "policy.duty"),
        ('name = "a"\nclients = [0]\n[policy]\njob_steps = 0', "policy.job_steps"),
        ('name = "a"\nclients = [0]\npolicy = "strict"', "policy"),
        ("clients = [0]", "agent.name"),
        ("clients = [0", "--config"),
    ],
)
def test_configurations_that_cannot_be_meant(tmp_path: Path, text: str, field: str) -> None:
    (tmp_path / "agent.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_config(tmp_path / "agent.toml")
    assert caught.value.field == field


def test_the_check_names_each_problem(floor: Floor) -> None:
    blocked = floor.folder / "file"
    blocked.write_text("")
    bad = Config(
        name="a",
        clients=(0,),
        coordinator="127.0.0.1:1",
        state=blocked / "state",
        device="cuda:99",
        data={"source": "csv", "path": "nowhere.csv", "target": "y"},
        policy=Policy(recipes=("abc",)),
    )
    found = dict(check(bad))
    assert all(why for what, why in found.items() if what != "precision"), found
    assert "cannot be written" in (found["state folder"] or "")
    assert "nowhere.csv" in (found["data"] or "")
    assert "unavailable" in (found["coordinator"] or "")

    async def scene() -> Mapping[str, str | None]:
        async with floor.coordinator():
            good = Config(
                name="a", clients=(0,), coordinator=f"127.0.0.1:{floor.port}", state=floor.folder / "good"
            )
            return await asyncio.to_thread(lambda: dict(check(good)))

    assert not any(play(scene()).values())


def test_a_recipe_that_no_owner_allows_is_refused_and_the_run_says_so(floor: Floor) -> None:
    recipe = small(schedule={"cohort": 6}, stop={"rounds": 5})

    async def scene() -> None:
        strict = Policy(minimum_clients=100)
        async with floor.coordinator() as control, floor.agents(2, policy=strict):
            run = await submit(control, recipe)
            rounds, status = await end(control, run)
            assert all(each.folded == 0 for each in rounds)
            assert status.status == "failed"
            assert "this agent's owner wants 100 or more" in status.reason

    play(scene())


def of_sites(floor: Floor, recipe: Recipe, *owns: Mapping[str, Any]) -> pb.RunStatus:
    """How a run ends whose clients' agents hold data of their own."""

    async def scene() -> pb.RunStatus:
        async with floor.coordinator() as control:
            agents = [floor.agent(f"site-{i}", clients=(i,), data=own) for i, own in enumerate(owns)]
            tasks = [asyncio.create_task(each.run()) for each in agents]
            _, status = await end(control, await submit(control, recipe))
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return status

    status: pb.RunStatus = play(scene())
    return status


@pytest.mark.parametrize("weights", [{}, {"frequency": "known", "seconds": [1.0, 1.0]}], ids=["", "known"])
def test_agents_with_data_of_their_own(floor: Floor, weights: Mapping[str, Any]) -> None:
    """Each holds all of a small set; the coordinator's recipe has none of it."""
    recipe = small(
        model={"name": "mlp", "hidden": [6]},
        partition={"kind": "iid", "clients": 2},
        schedule={"cohort": 2},
        weights=weights,
    )
    own = {"source": "digits", "limit": 60}

    run = of_sites(floor, recipe, own, own).id
    assert checked(floor, run).updates == 6
    simulator = Simulator(assemble(recipe))
    simulator.run()
    assert any(not torch.allclose(floor.model(run)[n], t) for n, t in simulator.hub.model().items())


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("a,b,y\n1,2,no\n2,1,yes\n3,5,no\n5,3,yes\n", "data.class_names: the data here does not suit this"),
        ("a,b,y\n1,2,3\n2,1,4\n3,5,3\n5,3,4\n", "give this site's examples the features of the others'"),
    ],
    ids=["classes", "features"],
)
def test_data_that_is_not_the_federations_is_refused(floor: Floor, table: str, problem: str) -> None:
    recipe = small(
        model={"name": "logistic"}, partition={"kind": "iid", "clients": 1}, schedule={"cohort": 1}
    )
    (floor.folder / "site.csv").write_text(table)
    own = {"source": "csv", "path": str(floor.folder / "site.csv"), "target": "y"}

    assert problem in of_sites(floor, recipe, own).reason


def test_what_a_site_cannot_read_is_quoted_in_its_own_log_alone(floor: Floor) -> None:
    recipe = small(
        model={"name": "logistic"}, partition={"kind": "iid", "clients": 1}, schedule={"cohort": 1}
    )
    (floor.folder / "site.csv").write_text("a,b,y\n1,Mrs Smith,0\n2,1,1\n3,5,0\n5,3,1\n")
    own = {"source": "csv", "path": str(floor.folder / "site.csv"), "target": "y"}

    with structlog.testing.capture_logs() as said:
        status = of_sites(floor, recipe, own)
    assert "this agent's log says why" in status.reason
    quoting = {each["event"] for each in said if "Mrs Smith" in str(each)}
    assert quoting == {"the data here does not suit a recipe"}


def test_what_an_agent_and_a_coordinator_keep_is_for_their_owners_eyes(floor: Floor) -> None:
    async def scene() -> None:
        async with floor.coordinator() as control, floor.agents(1):
            await end(control, await submit(control, small(stop={"rounds": 1})))

    play(scene())
    for folder in (floor.folder / "a0", floor.data, floor.runs):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_features_of_a_site_are_the_coordinators_in_whatever_order_it_has_them(floor: Floor) -> None:
    """A site has its columns in another order, and lacks one of the values of a category."""
    floor.sources = (str(floor.folder),)
    rows = [(at % 7, "abc"[at % 3], at % 2) for at in range(60)]
    tables = {
        "all": "age,kind,y\n" + "".join(f"{age},{kind},{y}\n" for age, kind, y in rows if kind != "a"),
        "turned": "y,kind,age\n" + "".join(f"{y},{kind},{age}\n" for age, kind, y in rows if kind != "a"),
        "hub": "age,kind,y\n" + "".join(f"{age},{kind},{y}\n" for age, kind, y in rows),
    }
    for name, text in tables.items():
        (floor.folder / f"{name}.csv").write_text(text)
    data = {
        each: {
            "source": "csv",
            "path": str(floor.folder / f"{each}.csv"),
            "target": "y",
            "categorical": ["kind"],
        }
        for each in tables
    }
    recipe = small(
        data=data["hub"],
        model={"name": "logistic"},
        partition={"kind": "iid", "clients": 1},
        schedule={"cohort": 1},
    )

    ended = [of_sites(floor, recipe, data[name]) for name in ("all", "turned")]
    assert [each.status for each in ended] == ["finished", "finished"]
    same, turned = (floor.model(each.id) for each in ended)
    assert all(torch.equal(same[name], turned[name]) for name in same)
    # kind=a, of which the site has none, is not learnt.
    weights = assemble(recipe).task.initial["linear.weight"]
    assert torch.equal(same["linear.weight"][:, 1], weights[:, 1])
    assert not torch.equal(same["linear.weight"][:, 2], weights[:, 2])


def test_sites_whose_tables_lack_values_make_the_model_of_all(floor: Floor) -> None:
    """Two sites, one without the class "no", each without a value of a column that the other has."""
    rows = {"north": ["a,x,yes", "b,x,yes", "a,x,yes"], "south": ["c,y,no", "b,x,yes", "c,y,no", "b,y,yes"]}
    floor.sources = (str(floor.folder),)
    tables = {site: "".join(f"{each},{site}\n" for each in own) for site, own in rows.items()}
    data = {"source": "csv", "target": "sick", "group": "site", "categorical": ["kind", "sex"]}

    def table(name: str, body: str) -> dict[str, Any]:
        path = floor.folder / f"{name}.csv"
        path.write_text("kind,sex,sick,site\n" + body)
        return {**data, "path": str(path), "test_path": str(path)}

    recipe = small(
        data=table("all", "".join(tables.values())),
        partition={"kind": "natural"},
        schedule={"cohort": 2},
        model={"name": "mlp", "hidden": [6]},
    )

    run = of_sites(floor, recipe, *(table(site, body) for site, body in tables.items())).id
    simulator = Simulator(assemble(recipe))
    simulator.run()
    for name, tensor in simulator.hub.model().items():
        torch.testing.assert_close(floor.model(run)[name], tensor, rtol=1e-9, atol=1e-9)


def test_passes_in_bf16_leave_weights_and_updates_in_float32(floor: Floor) -> None:
    recipe = small(engine={"dtype": "float32", "mode": "sequential"}, train={"epochs": 8}, stop={"rounds": 4})

    async def scene(precision: str) -> str:
        async with floor.coordinator() as control, floor.agents(2, precision=precision):
            run = await submit(control, recipe)
            rounds, status = await end(control, run)
            assert status.status == "finished"  # the coordinator takes float32 alone
            assert rounds[-1].metrics["train/loss"] < 0.8 * rounds[0].metrics["train/loss"]
            return run

    full, half = (floor.model(play(scene(precision))) for precision in ("full", "bf16"))
    assert {each.dtype for each in half.values() if each.is_floating_point()} == {torch.float32}
    distances = {n: float((half[n] - t).norm() / t.norm()) for n, t in full.items() if t.is_floating_point()}
    assert max(distances.values()) > 1e-5
    assert max(distances.values()) < 0.1  # eight bits of significand, a few dozen steps


def test_a_kernel_that_knows_of_no_power_supply_has_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise FileNotFoundError("/sys/class/power_supply")

    monkeypatch.setattr(psutil, "sensors_battery", absent)
    assert not _heartbeat().HasField("battery")


def test_why_there_is_no_connection_is_told_once_and_then_rarely(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred tries, for two reasons, one after the other: two lines, and one more after ten minutes."""
    reasons = iter(["nobody answers"] * 50 + ["not by this certificate"] * 50)
    told: list[str] = []
    monkeypatch.setattr("hansa.client.agent._SLOWEST", 0.0)
    monkeypatch.setattr("hansa.client.agent._SOONEST", 0.0)

    async def scene() -> None:
        agent = Agent(Config(name="a", clients=(0,), coordinator="127.0.0.1:1", state=floor.folder))
        monkeypatch.setattr(agent, "_log", SimpleNamespace(warning=lambda _, reason: told.append(reason)))

        async def attend() -> str:
            return next(reasons)

        monkeypatch.setattr(agent, "_attend", attend)
        with pytest.raises(RuntimeError):  # the reasons come to an end
            await agent.run()
        agent._tell_once("not by this certificate", asyncio.get_running_loop().time() + 700.0)

    asyncio.run(scene())
    assert told == ["nobody answers", "not by this certificate", "not by this certificate"]


def test_precision_is_checked(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(name="a", clients=(0,), coordinator="127.0.0.1:1", state=floor.folder, precision="bf16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert "cpu has no bf16 instructions" in (dict(check(config))["precision"] or "")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert dict(check(config))["precision"] is None
