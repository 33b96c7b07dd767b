"""A federation whose processes are killed and whose network is cut: what is lost, and how soon it goes on.

    python benchmarks/crashes.py coordinator --kills 100   # kill -9 at random moments of a run with 10 agents
    python benchmarks/crashes.py agents --kills 100
    python benchmarks/crashes.py partition --seconds 30    # the network namespace of the agents is cut off

Everything is a process of its own, with certificates and every check on. At the end: every update that an
agent saw acknowledged is in the log, no job is there twice, the rounds have no gap, ``hansa verify`` makes
the same model from the accepted updates bit for bit, and the simulator to 1e-5 where no job was lost.
``--warm`` forks processes from one that has imported everything: the start of Python and PyTorch is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import tomli_w
import torch
from safetensors.torch import load_file

from hansa.core.control import Coordinator
from hansa.core.recipe import Recipe, parse
from hansa.core.store import RunStore
from hansa.core.trust import Role
from hansa.server.events import EventLog
from hansa.server.trust import Authority
from hansa.server.trust.local import join_here
from hansa.server.verify import verify
from hansa.simulation.simulator import Simulator
from hansa.strategies.catalog import assemble

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from zygote import Zygote, die_with_parent

AGENTS, SITES = 10, "10.77.0."
_OUT, _IN = f"{SITES}1", f"{SITES}2"


def recipe(rounds: int, hidden: int) -> Recipe:
    return parse(
        {
            "data": {"source": "synthetic_label_shift", "groups": AGENTS, "examples": 100},
            "partition": {"kind": "iid", "clients": AGENTS},
            "model": {"name": "mlp", "hidden": [hidden]},
            "algorithm": {"name": "scaffold"},
            "train": {"epochs": 1, "batch_size": 10, "lr": 0.05},
            "schedule": {"cohort": 8},
            "stop": {"rounds": rounds},
            "evaluation": {"every": 50},
            "engine": {"dtype": "float64", "checkpoint_every": 20},
        }
    )


class Federation:
    """A coordinator and its agents as processes; ``start`` makes a process of a command."""

    def __init__(self, folder: Path, host: str, start: Callable[..., int], database: str | None) -> None:
        self.folder, self._start = folder, start
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"{host}:{free.getsockname()[1]}"
        self.data, self.runs = folder / "coordinator", folder / "runs"
        self.url = database or f"sqlite:///{self.data / 'events.db'}"
        with closing(Authority.create(folder / "pki", "crashes", [host])) as authority:
            join_here(authority, "user", Role.ADMIN, folder / "user")
            for i in range(AGENTS):
                join_here(authority, f"agent-{i}", Role.AGENT, folder / f"agent-{i}" / "identity")
        table = {
            "listen": self.address,
            "data": str(self.data),
            "runs": str(self.runs),
            "pki": str(folder / "pki"),
            "enrolment": "",
            "database": self.url,
            "limits": {"heartbeat": 5.0, "grace": 120.0},
        }
        (folder / "coordinator.toml").write_text(tomli_w.dumps(table))

    def coordinator(self) -> int:
        config = self.folder / "coordinator.toml"
        return self._start(["coordinator", "start", "--config", str(config)], self.folder / "coordinator.log")

    def agent(self, i: int, *prefix: str) -> int:
        home = self.folder / f"agent-{i}"
        table = {
            "name": f"agent-{i}",
            "coordinator": self.address,
            "identity": str(home / "identity"),
            "state": str(home),
            "clients": [i],
            "threads": 1,
        }
        (home / "agent.toml").write_text(tomli_w.dumps(table))
        return self._start(["agent", "start", "--config", str(home / "agent.toml")], home / "log", *prefix)

    def acknowledged(self) -> set[tuple[int, int]]:
        """(client, job) of the updates that agents were told to count."""
        found = set()
        for i in range(AGENTS):
            for line in (self.folder / f"agent-{i}" / "log").read_text().splitlines():
                if line.startswith("{") and '"settled"' in line:
                    said = json.loads(line)
                    if said["counted"]:
                        found.add((said["client"], said["job"]))
        return found


def process(command: Sequence[str], log: Path, *prefix: str) -> int:
    with log.open("ab") as file:
        made = subprocess.Popen(
            [*prefix, sys.executable, "-m", "hansa", *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            preexec_fn=die_with_parent,
        )
    _children[made.pid] = made
    return made.pid


_children: dict[int, subprocess.Popen[bytes]] = {}


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Kill, and wait until it is dead."""
    if pid in _children:
        _children[pid].send_signal(number)
        _children.pop(pid).wait()
        return
    Zygote.kill(pid, number)
    while Zygote.alive(pid):
        time.sleep(0.005)


def events(federation: Federation, run: str) -> int:
    with closing(EventLog(federation.url, lead=False)) as log:
        return len(log.events(run))


def progress(federation: Federation, run: str, seen: int, patience: float = 120.0) -> float:
    """Wait until the log of a run has more than ``seen`` events; returns how long that took."""
    began = time.monotonic()
    with closing(EventLog(federation.url, lead=False)) as log:
        while not log.events(run, after=seen):
            if time.monotonic() - began > patience:
                raise SystemExit(f"no progress in {patience:.0f} s; see {federation.folder}")
            time.sleep(0.02)
    return time.monotonic() - began


def judged(federation: Federation, run: str, made: Recipe, took: list[float], what: str) -> None:
    """Check all that was promised, and tell."""
    with closing(EventLog(federation.url, lead=False)) as log:
        updates = [(e.client, e.number) for e in log.events(run) if e.kind == "update"]
        lost_jobs = any(e.kind in ("left", "failed") for e in log.events(run))
    acknowledged = federation.acknowledged()
    assert acknowledged <= set(updates), f"lost: {sorted(acknowledged - set(updates))}"
    assert len(updates) == len(set(updates)), "an update is there twice"
    with RunStore.open(federation.runs / run) as store:
        assert [row.index for row in store.rounds()] == list(range(1, made.stop.rounds + 1))
    found = verify(
        run, database=federation.url, artefacts=federation.data / "artefacts", runs=federation.runs
    )
    simulator = Simulator(assemble(made))
    simulator.run()
    model = load_file(federation.runs / run / "model.safetensors")
    apart = max(float((model[n] - t).abs().max()) for n, t in simulator.hub.model().items())
    assert lost_jobs or apart <= 1e-5, apart
    took = sorted(took)
    print(
        f"{what}: {len(acknowledged)} acknowledged updates, 0 lost, 0 twice; {found.rounds} rounds, model as "
        f"verified ({found.digest[:12]}), {apart:.1e} from the simulator's; goes on after "
        f"{statistics.median(took):.2f} s (median), {took[int(0.9 * (len(took) - 1))]:.2f} s (90%), "
        f"{took[-1]:.2f} s (most)"
    )


def submitted(federation: Federation, made: Recipe) -> str:
    with Coordinator(federation.address, federation.folder / "user") as remote:
        deadline = time.monotonic() + 120
        while True:
            try:
                return remote.submit(made.toml(), key="crashes").id
            except Exception:
                if time.monotonic() > deadline:
                    raise


def finished(federation: Federation, run: str) -> None:
    with Coordinator(federation.address, federation.folder / "user") as remote:
        for happening in remote.watch(run):
            end = happening
    assert end.end.status == "finished", end.end


def crashes(federation: Federation, victims: str, kills: int, rounds: int, hidden: int, seed: int) -> None:
    draw = random.Random(seed)
    made = recipe(rounds, hidden)
    coordinator = federation.coordinator()
    agents = [federation.agent(i) for i in range(AGENTS)]
    run = submitted(federation, made)
    took: list[float] = []
    progress(federation, run, 0)
    while len(took) < kills:
        time.sleep(draw.uniform(0.0, 0.5))
        seen = events(federation, run)
        if victims == "coordinator":
            kill(coordinator)
            began = time.monotonic()
            seen = events(federation, run)
            coordinator = federation.coordinator()
        else:
            i = draw.randrange(AGENTS)
            kill(agents[i])
            began = time.monotonic()
            agents[i] = federation.agent(i)
        progress(federation, run, seen)
        took.append(time.monotonic() - began)
    done = time.monotonic()
    finished(federation, run)
    print(f"(the rest of the run took {time.monotonic() - done:.0f} s)", file=sys.stderr)
    for pid in (coordinator, *agents):
        kill(pid, signal.SIGTERM)
    judged(federation, run, made, took, f"{kills} kills -9 of {victims} at random")


def sites(*command: str) -> None:
    subprocess.run(["ip", *command], check=True)


@contextmanager
def namespace(name: str) -> Iterator[tuple[str, ...]]:
    """A network namespace with one cable to this one; gives the prefix that runs a command in it."""
    sites("netns", "add", name)
    try:
        sites("link", "add", "hansa0", "type", "veth", "peer", "name", "hansa1", "netns", name)
        sites("addr", "add", f"{_OUT}/24", "dev", "hansa0")
        sites("link", "set", "hansa0", "up")
        for command in (("addr", "add", f"{_IN}/24", "dev", "hansa1"), ("link", "set", "hansa1", "up")):
            sites("-n", name, *command)
        yield ("ip", "netns", "exec", name)
    finally:
        sites("netns", "del", name)


def partition(
    federation: Federation, prefix: tuple[str, ...], seconds: float, rounds: int, hidden: int
) -> None:
    """The cable is cut for so long while jobs and updates are under way."""
    made = recipe(rounds, hidden)
    coordinator = federation.coordinator()
    agents = [federation.agent(i, *prefix) for i in range(AGENTS)]
    run = submitted(federation, made)
    progress(federation, run, 20)
    sites("link", "set", "hansa0", "down")
    time.sleep(1.0)
    seen = events(federation, run)
    time.sleep(seconds - 1.0)
    assert events(federation, run) == seen, "something went through the cut"
    sites("link", "set", "hansa0", "up")
    took = [progress(federation, run, seen)]
    finished(federation, run)
    for pid in (coordinator, *agents):
        kill(pid, signal.SIGTERM)
    judged(federation, run, made, took, f"a network cut of {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("coordinator", "agents", "partition"))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument(
        "--hidden",
        type=int,
        default=500,
        help="units of the model's hidden layer: up to 50, updates come in their manifest; above, as files",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", help="URL of an empty database for the event log; SQLite by default")
    parser.add_argument("--warm", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.what == "partition":
            with namespace("hansa-sites") as prefix:
                made = Federation(folder, _OUT, process, given.database)
                partition(made, prefix, given.seconds, given.rounds, given.hidden)
            return
        with Zygote() as zygote:
            start = zygote.start if given.warm else process
            made = Federation(folder, "127.0.0.1", start, given.database)
            crashes(made, given.what, given.kills, given.rounds, given.hidden, given.seed)


if __name__ == "__main__":
    main()
