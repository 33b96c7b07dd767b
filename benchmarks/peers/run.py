"""The same FedAvg job in seven simulators, side by side: one command builds, measures, checks and tells.

    python benchmarks/peers/run.py                                     # everything: see README.md beside this
    python benchmarks/peers/run.py --models logistic --clients 1000    # the shortest case
    python benchmarks/peers/run.py --write README.md benchmarks/peers/README.md --picture docs/peers.svg

All sides of a case are started, and then make round after round in turn, each stopped (SIGSTOP) while another
is at work: so what slows the machine slows everybody, and a ratio compares neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import environments
import preparing
import table
from job import Job, descendants

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
import published  # noqa: E402

OURS = ("hansa", "plain")  # they run where this script runs
SIDES = (*OURS, *environments.ENVIRONMENTS)
ON_GPU = ("hansa", "plain", "pfl")


@dataclass(frozen=True)
class Plan:
    """How a model is measured.

    Attributes
    ----------
    rounds: timed ones, in each of so many repetitions.
    pool: examples that are dealt to the clients, ``examples`` to each.
    held_out: examples on which the loss is checked.
    lr: step size of the clients.
    """

    rounds: int
    repetitions: int = 1
    cohort: int = 100
    examples: int = 60
    pool: int = 60_000
    held_out: int = 1_000
    lr: float = 0.1


# At a step size of 0.1 the loss of ResNet-18 jumps fivefold in the first two steps, and the order of
# mini-batches decides where to: no two curves could be compared.
PLANS = {
    "logistic": Plan(rounds=10),
    "mlp": Plan(rounds=5),
    "leaf_cnn": Plan(rounds=2),
    "resnet18": Plan(rounds=1, cohort=4, examples=40, pool=6_000, held_out=50, lr=0.002),
}
MANY = ("logistic",)  # where rounds are short, what a larger population costs shows best


class Failed(Exception):
    """A side stopped, or gave no sign of life for too long; with its last words."""


class Side:
    """The other half of :class:`job.Turns`: a process that makes a round when told, else stands still."""

    def __init__(self, name: str, job: Job, cache: Path, limit: float) -> None:
        self.name, self._limit = name, limit
        self._log = Path(job.folder) / f"{name}.log"
        interpreter = Path(sys.executable) if name in OURS else environments.python(cache, name)
        threads = str(job.threads)
        settings = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if job.threads == 1:
            settings["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        if name not in OURS:
            settings.pop("PYTHONPATH", None)
        self._began = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [interpreter, HERE / f"{name}_side.py", job.folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=settings,
                cwd=job.folder,
                text=True,
            )
        assert self._process.stdin
        assert self._process.stdout
        self._stdin: IO[str] = self._process.stdin
        self._stdout: IO[str] = self._process.stdout
        try:
            self.facts: dict[str, Any] = self._heard()["ready"]
        except BaseException:
            self.close()
            raise
        self._started = time.perf_counter() - self._began
        self._signal(signal.SIGSTOP)

    def round(self) -> dict[str, Any]:
        """Let it make one round; what it tells."""
        self._signal(signal.SIGCONT)
        try:
            self._stdin.write("go\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise Failed(self._last_words()) from None
        told = self._heard()
        self._signal(signal.SIGSTOP)
        self.facts.update(told.pop("learned", {}))
        told["since_start"] = self._started = self._started + told["seconds"]
        return told

    def close(self) -> None:
        """End it and everything that it started."""
        family = [*descendants(self._process.pid), self._process.pid]
        self._signal(signal.SIGCONT)
        with suppress(OSError):
            self._stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10 if "flwr" in self.name else 2)
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._stdout.close()

    def _heard(self) -> dict[str, Any]:
        if not select.select([self._stdout], [], [], self._limit)[0]:
            raise Failed(f"no answer within {self._limit:g} s")
        line = self._stdout.readline()
        if not line:
            raise Failed(self._last_words())
        told: dict[str, Any] = json.loads(line)
        return told

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        said = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"exit status {self._process.poll()}: {said[-1][:300] if said else 'it said nothing'}"

    def _signal(self, number: signal.Signals) -> None:
        for pid in [self._process.pid, *descendants(self._process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def measure(
    job: Job, names: list[str], plan: Plan, repetitions: int, cache: Path, limit: float
) -> dict[str, Any]:
    """One case: every side, as :mod:`table` wants it. A side that failed is not started again."""
    sides: dict[str, dict[str, Any]] = {n: {"failed": None, "facts": {}, "repetitions": []} for n in names}
    for repetition in range(repetitions):
        able = [name for name in names if not sides[name]["failed"]]
        rounds = _interleave(job, able, sides, cache, limit, f"{repetition + 1}/{repetitions}")
        for name in able:
            files = [Path(each.pop("model")) for each in rounds[name]]
            for each, loss in zip(rounds[name], preparing.losses(job, files, plan.held_out), strict=True):
                each["loss"] = loss
            for file in files:
                file.unlink()
            sides[name]["repetitions"].append(rounds[name])
    return {"model": job.model, "clients": job.clients, "cohort": job.cohort, "sides": sides}


def _interleave(
    job: Job, names: list[str], sides: dict[str, dict[str, Any]], cache: Path, limit: float, title: str
) -> dict[str, list[dict[str, Any]]]:
    """Start all, let each make the job's rounds in turn, end all; whoever goes first changes by the round."""
    running: dict[str, Side] = {}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}

    @contextmanager
    def allowed_to_fail(name: str) -> Iterator[None]:
        try:
            yield
        except (Failed, OSError, json.JSONDecodeError) as error:
            sides[name]["failed"] = str(error)
            _tell(f"  {name} failed: {error}")
            if name in running:
                running.pop(name).close()

    try:
        for name in names:
            with allowed_to_fail(name):
                running[name] = Side(name, job, cache, limit)
                sides[name]["facts"] = running[name].facts
        for number in range(job.rounds):
            order = list(running)
            first = number % max(len(order), 1)
            for name in order[first:] + order[:first]:
                with allowed_to_fail(name):
                    rounds[name].append(running[name].round())
            told = (f"{name} {rounds[name][-1]['seconds']:.3g}" for name in running)
            _tell(f"  {title} round {number}: {', '.join(told)}")
    finally:
        for side in running.values():
            side.close()
    return rounds


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _machine(device: str) -> dict[str, Any]:
    if device != "cpu":
        import torch

        device = torch.cuda.get_device_name()
    return {
        "cpu": published.processor(),
        "cores": os.cpu_count(),
        "device": device,
        "python": platform.python_version(),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="(default: all that know the device)")
    parser.add_argument("--models", nargs="+", choices=PLANS, default=list(PLANS), help="(default: all)")
    parser.add_argument(
        "--clients",
        nargs="+",
        type=int,
        help="populations (default: 1000 for every model, 10000 for logistic)",
    )
    parser.add_argument("--cohort", type=int, help="clients a round (default: 100, and 4 for resnet18)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: as many as each model affords)")
    parser.add_argument("--repetitions", type=int, help="times that all sides are started (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="of each side (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--limit", type=float, default=300, help="seconds for a round or a start (default %(default)s)"
    )
    parser.add_argument("--cache", type=Path, default=environments.CACHE, help="(default %(default)s)")
    parser.add_argument("--json", type=Path, help="raw results (default: results.json in the cache)")
    parser.add_argument("--read", type=Path, help="measure nothing: tell these raw results again")
    parser.add_argument("--write", nargs="+", type=Path, default=[], help="files whose tables to replace")
    parser.add_argument("--picture", type=Path, help="an .svg or .png to draw")
    return parser.parse_args()


def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    able = SIDES if arguments.device == "cpu" else ON_GPU
    names = [name for name in arguments.sides or able if name in able]
    if left_out := set(arguments.sides or ()) - set(able):
        _tell(f"left out, for they know the CPU only here: {', '.join(sorted(left_out))}")
    unbuilt: dict[str, str] = {}
    for name in names:
        if name in environments.ENVIRONMENTS:
            try:
                environments.build(arguments.cache, name, _tell)
            except (OSError, RuntimeError) as error:
                unbuilt[name] = f"no environment: {error}"
                _tell(f"{name}: {error}")
    wanted = (
        [(model, clients) for clients in arguments.clients for model in arguments.models]
        if arguments.clients
        else [(model, 1_000) for model in arguments.models]
        + [(model, 10_000) for model in MANY if model in arguments.models]
    )
    results: dict[str, Any] = {
        "machine": _machine(arguments.device),
        "threads": arguments.threads,
        "cases": [],
    }
    for model, clients in wanted:
        plan = PLANS[model]
        repetitions = arguments.repetitions or plan.repetitions
        _tell(f"{model}, {clients:,} clients: {', '.join(names)}")
        job = preparing.prepare(
            arguments.cache,
            model=model,
            clients=clients,
            cohort=arguments.cohort or plan.cohort,
            examples=plan.examples,
            lr=plan.lr,
            rounds=1 + (arguments.rounds or plan.rounds),
            pool=plan.pool,
            threads=arguments.threads,
            device=arguments.device,
        )
        began = time.perf_counter()
        case = measure(
            job, [n for n in names if n not in unbuilt], plan, repetitions, arguments.cache, arguments.limit
        )
        for name, why in unbuilt.items():
            case["sides"][name] = {"failed": why, "facts": {}, "repetitions": []}
        case["wall"] = time.perf_counter() - began
        _tell(f"  {case['wall']:.0f} s")
        results["cases"].append(case)
        file = arguments.json or arguments.cache / "results.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1))
    return results


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an end on request still ends the sides
    arguments = _arguments()
    results = json.loads(arguments.read.read_text()) if arguments.read else _measured(arguments)
    overview, details = table.overview(results), table.details(results)
    print(f"{overview}\n\n{details}")
    if arguments.picture:
        table.picture(results, arguments.picture)
    for file in arguments.write:
        shown = overview
        if arguments.picture:
            where = os.path.relpath(arguments.picture, file.parent)
            shown += f"\n\n![Seconds per round of every side, on a logarithmic axis]({where})"
        text = published.replace(file.read_text(), "peers table", shown)
        file.write_text(published.replace(text, "peers details", details))
    return 1 if table.problems(results) else 0


if __name__ == "__main__":
    sys.exit(main())
