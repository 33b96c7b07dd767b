"""The pages Clients, Topology and System: empty, small, large, live, and when something is the matter."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from hansa.core import questions
from hansa.core.errors import InputError
from hansa.core.store import Participation, Round, RunStore, Verdicts
from hansa.core.wire import federation_pb2 as pb
from hansa.ui import access
from hansa.ui.pages import clients, system, topology
from hansa.ui.site import Site, configure
from hansa.ui.source import Folder

RECIPE = '[algorithm]\nname = "fedavg"\n\n[stop]\nrounds = 9\n'
GOSSIP = RECIPE + '\n[topology]\nkind = "ring"\n'
MARKUP = "<b onclick='x()'>**agent**</b>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    configure(Site(source=Folder(tmp_path)))
    return tmp_path


def drawn(page: Callable[[], None]) -> AppTest:
    app = AppTest.from_function(_draw, args=(page.__module__,), default_timeout=120).run()
    assert not app.exception, app.exception[0].message
    return app


def _draw(module: str) -> None:
    import importlib

    importlib.import_module(module).page()


def words(app: AppTest) -> str:
    return " ".join(each.value for each in (*app.markdown, *app.caption, *app.error, *app.warning))


def figures(app: AppTest) -> dict[str, str]:
    return {each.label: each.value for each in app.metric}


def record(
    directory: Path,
    *,
    rounds: int = 4,
    peers: int = 5,
    gossip: bool = False,
    robust: bool = False,
    recipe: str = RECIPE,
) -> None:
    ring = np.eye(peers) / 3 + np.roll(np.eye(peers), 1, 0) / 3 + np.roll(np.eye(peers), -1, 0) / 3
    with RunStore.create(
        directory, name="a", seed=0, recipe=GOSSIP if gossip else recipe, facts={"clients": str(peers)}
    ) as store:
        store.partition(np.arange(2 * peers).reshape(peers, 2), ["cat", "<i>dog</i>"])
        if gossip:
            store.topology(ring)
        for index in range(1, rounds + 1):
            jobs = [
                Participation(
                    client=client,
                    phase="train",
                    examples=10,
                    steps=4,
                    staleness=0,
                    weight=1.0,
                    dispatched=index - 1.0,
                    returned=index - 0.5,
                    loss=None,
                    outcome="folded",
                )
                for client in range(peers)
            ]
            far = np.where(np.arange(peers) == 1, 9.0, 1.0)
            weight = np.where(np.arange(peers) == 1, 0.0, 1.25)
            store.append(
                Round(
                    index=index,
                    time=float(index),
                    wall=float(index),
                    bytes_up=1000,
                    bytes_down=1000,
                    metrics={"gossip/consensus": 1.0 / index, "gossip/gap": 0.25} if gossip else {},
                    participants=jobs,
                    verdicts=Verdicts(client=np.arange(peers), distance=far, relative=far, weight=weight)
                    if robust
                    else None,
                )
            )
        store.finish("finished")


# Nothing yet.


@pytest.mark.parametrize(
    ("page", "hint"),
    [
        (clients.page, "Clients are listed once a run has asked them"),
        (topology.page, "hansa run -c topology.kind=ring"),
        (system.page, "Start a run on the page"),
    ],
)
def test_an_empty_folder_says_what_to_do_next(folder: Path, page: Callable[[], None], hint: str) -> None:
    assert hint in words(drawn(page))


def test_a_run_before_its_first_round(folder: Path) -> None:
    record(folder / "a", rounds=0, gossip=True)
    assert "Nobody took part" in words(drawn(clients.page))
    assert figures(drawn(topology.page))["Peers"] == "5"
    drawn(system.page)


# Runs.


def test_clients_of_a_plain_run(folder: Path) -> None:
    record(folder / "a")
    app = drawn(clients.page)
    told = figures(app)
    assert (told["Population"], told["Updates"], told["Gini index"]) == ("5", "20", "0.00")
    assert app.dataframe[0].value["folded"].tolist() == [4] * 5
    assert told["Examples"] == "45"
    assert "This run judges nobody" in words(app)


def test_a_client_that_a_rule_leaves_out_is_called_shut_out(folder: Path) -> None:
    record(folder / "a", rounds=6, robust=True)
    app = drawn(clients.page)
    assert figures(app)["Shut out"] == "1"
    assert figures(app)["Updates left out"] == "6 of 30"
    judged = app.dataframe[1].value
    assert judged["verdict"].tolist() == ["shut out"] + ["in line"] * 4
    assert judged["client"].tolist()[0] == 1


def test_a_gossip_run_is_drawn_with_its_traffic(folder: Path) -> None:
    record(folder / "a", gossip=True)
    app = drawn(topology.page)
    told = figures(app)
    assert (told["Graph"], told["Edges"], told["Neighbours"]) == ("ring", "5", "2")
    assert (told["Consensus distance"], told["Spectral gap"]) == ("0.25", "0.25")
    assert app.dataframe[0].value["traffic"].tolist() == ["800 B"] * 5  # 4000 bytes over five edges


def test_ten_thousand_clients(folder: Path) -> None:
    record(folder / "a", rounds=1, peers=10_000, recipe=RECIPE)
    app = drawn(clients.page)
    assert figures(app)["Population"] == "10,000"
    assert len(app.dataframe[0].value) == 500
    drawn(system.page)


def test_a_run_that_cannot_be_read_is_no_obstacle(folder: Path) -> None:
    record(folder / "a")
    (folder / "b").mkdir()
    (folder / "b" / "run.db").write_text("this is no database")
    for page in (clients.page, topology.page, system.page):
        drawn(page)


def test_an_older_record_says_what_it_has_not(folder: Path) -> None:
    import sqlite3
    from contextlib import closing

    record(folder / "a", gossip=True, robust=True)
    with closing(sqlite3.connect(folder / "a" / "run.db")) as connection:
        connection.execute("UPDATE schema_version SET version = 1")
        for table in ("verdicts", "edges", "spreads", "movements", "tuned", "layer_names"):
            connection.execute(f"DROP TABLE {table}")
        connection.commit()
    assert "The graph was not recorded" in words(drawn(topology.page))
    assert "This run judges nobody" in words(drawn(clients.page))


# A coordinator.


class Told:
    """A coordinator that says what it is told to say."""

    def __init__(self, *agents: pb.AgentStatus, samples: int = 20, away: bool = False) -> None:
        self.agents, self.samples, self.away = agents, samples, away

    def roster(self) -> tuple[pb.AgentStatus, ...]:
        self._answer()
        return self.agents

    def condition(self, after: float = 0.0) -> pb.ConditionReply:
        self._answer()
        now = time.time()
        samples = [
            pb.Sample(
                at=now - 5 * (self.samples - i), counted=10 * i, bytes_up=1000 * i, resident=10**8, agents=2
            )
            for i in range(self.samples)
        ]
        return pb.ConditionReply(hansa="0.1.0", started=now - 100, cores=2, memory=10**9, samples=samples)

    def _answer(self) -> None:
        if self.away:
            raise InputError("--server", "127.0.0.1:1", "no coordinator answers", "start one")


def watching(monkeypatch: pytest.MonkeyPatch, coordinator: Told) -> None:
    def given(source: Any) -> Any:
        return coordinator

    for module in (clients, system):
        monkeypatch.setattr(module, access.coordinator_of.__name__, given)


def agent(name: str, **facts: Any) -> pb.AgentStatus:
    now = time.time()
    return pb.AgentStatus(
        **{"name": name, "connected": True, "first": now - 100, "seen": now - 3, "attended": 50.0, **facts}
    )


def test_agents_with_all_that_is_known_of_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = pb.OpenJob(run="r", client=7, phase="train", since=time.time() - 2)
    busy = agent(
        "a", battery=0.5, mains=True, jobs=[job], counted=3, steps=100, seconds=4.0, device="cpu x86"
    )
    out = agent(MARKUP, connected=False, counted=1, revoked="stolen")
    watching(monkeypatch, Told(busy, out))
    app = drawn(clients.page)
    assert figures(app)["Connected"] == "1 of 2"
    assert figures(app)["Together"] == "25 steps/s"
    table = app.dataframe[0].value
    assert table["name"].tolist() == ["a", MARKUP]  # as it is: a table holds text, never markup
    assert table["status"].tolist() == ["connected", "revoked"]
    assert table["share"].tolist() == [0.75, 0.25]
    assert table["battery"].tolist() == ["50% ⚡", ""]
    assert table["availability"].tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert table["job"].tolist()[0].startswith("client 7, ")
    assert MARKUP not in words(app)


def test_a_coordinator_without_agents_says_how_to_start_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching(monkeypatch, Told())
    assert "hansa agent start" in words(drawn(clients.page))


def test_the_condition_of_a_coordinator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watching(monkeypatch, Told())
    app = drawn(system.page)
    assert figures(app)["Updates"] == "190"
    assert figures(app)["Memory"] == "100 MB"
    assert "insecure" in words(app)
    rates = system.rates(Told().condition())
    assert rates["updates"].tolist() == pytest.approx([2.0] * 19, rel=1e-3)
    assert rates["up"].tolist() == pytest.approx([200.0] * 19, rel=1e-3)
    assert system.rates(Told(samples=1).condition()).empty
    watching(monkeypatch, Told(samples=1))
    drawn(system.page)


def test_a_coordinator_that_is_away_is_told_and_the_page_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(folder / "a")
    watching(monkeypatch, Told(away=True))
    app = drawn(clients.page)
    assert "no coordinator answers" in app.error[0].value
    assert figures(app)["Population"] == "5"
    assert "no coordinator answers" in drawn(system.page).error[0].value


def test_verdicts_in_words() -> None:
    told: questions.Columns = {
        "out": [5, 0, 0, 2, None, None],
        "relative": [1.0, 3.0, 1.0, 1.0, 2.5, 1.0],
        "broken": [0, 0, 1, 0, 0, 0],
    }
    assert [clients.verdict(told, i) for i in range(6)] == [
        "shut out",
        "suspicious",
        "suspicious",
        "suspicious",
        "suspicious",
        "in line",
    ]


def test_the_gini_index_of_equals_and_of_one_alone() -> None:
    assert clients.gini([i / 100 for i in range(101)]) == pytest.approx(0)
    assert clients.gini([0.0] * 100 + [1.0]) == pytest.approx(0.99)
