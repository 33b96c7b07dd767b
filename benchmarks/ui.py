"""The dashboard at size: a run of 10,000 clients, 5,000 rounds and 2,000,000 metric values, in a browser.

``python benchmarks/ui.py`` makes such a run folder (again with ``--again``), serves it with ``hansa ui`` and
opens its pages in headless Chromium. *First paint* is from asking for the page to its last chart or table on
the screen; *refresh* is how long a live part takes to be drawn again, from the script's start to its last
message, while a thread adds rounds.

It needs ``playwright`` and a Chromium (``--chromium PATH``).
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from hansa.core.store import ClientScores, Participation, Round, RunStore

CLIENTS, ROUNDS, COHORT = 10_000, 5_000, 100
METRICS = 400  # values a round: 5,000 × 400 = 2,000,000
LAYERS = 62  # tensors of a ResNet-18
NAME = "20261121-000000-large-aaa"
RECIPE = f"""name = "large"
seed = 0
[algorithm]
name = "fedavg"
[schedule]
name = "buffered"
[stop]
rounds = {2 * ROUNDS}
"""
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def a_round(index: int, draw: np.random.Generator) -> Round:
    """A round as a simulator would record it, with plausible numbers; scores every tenth."""
    clients = draw.choice(CLIENTS, COHORT, replace=False)
    away = draw.exponential(20.0, COHORT)
    level = 0.9 * (1 - np.exp(-index / 800))
    metrics = {"accuracy": level + 0.01 * draw.standard_normal(), "loss": 2.3 * np.exp(-index / 700)}
    values = level + 0.05 * draw.standard_normal(METRICS - 2)
    metrics |= {f"probe/{i:03d}": float(value) for i, value in enumerate(values)}
    scores = None
    if index % 10 == 0:
        accuracy = np.clip(level + 0.1 * draw.standard_normal(CLIENTS), 0, 1)
        scores = ClientScores(
            client=np.arange(CLIENTS),
            examples=np.full(CLIENTS, 20),
            accuracy=accuracy,
            loss=1 - accuracy,
        )
    moved = draw.lognormal(-6, 1, LAYERS)
    return Round(
        index=index,
        time=10.0 * index,
        wall=0.5 * index,
        bytes_up=COHORT * 44_000,
        bytes_down=COHORT * 44_000,
        metrics=metrics,
        participants=[
            Participation(
                client=int(client),
                phase="train",
                examples=20,
                steps=5,
                staleness=int(draw.poisson(3)),
                weight=1.0,
                dispatched=max(0.0, 10.0 * index - seconds - 2),
                returned=10.0 * index - 2 * draw.random(),
                loss=0.5,
                outcome="folded" if draw.random() > 0.02 else "lost",
            )
            for client, seconds in zip(clients, away, strict=True)
        ],
        clients=scores,
        movement={f"layer{i // 4}.{i % 4}.weight": (float(each), 1.0) for i, each in enumerate(moved)},
    )


def make(folder: Path) -> None:
    """Write the run."""
    draw = np.random.default_rng(0)
    facts = {"algorithm": "fedavg", "schedule": "buffered", "clients": str(CLIENTS)}
    with RunStore.create(folder / NAME, name="large", seed=0, recipe=RECIPE, facts=facts) as store:
        store.partition(draw.integers(0, 20, (CLIENTS, 10)), [str(i) for i in range(10)])
        for index in range(1, ROUNDS + 1):
            store.append(a_round(index, draw))
            if index % 1000 == 0:
                print(f"{index} rounds", file=sys.stderr)
        store.finish("interrupted")


@contextmanager
def growing(directory: Path, seconds: float) -> Iterator[None]:
    """Rounds are added, one a time, by a thread of this process, and forgotten at the end."""
    done = threading.Event()

    def grow() -> None:
        draw = np.random.default_rng(1)
        with RunStore.open(directory) as store:
            store.truncate(ROUNDS)
            index = ROUNDS
            while not done.wait(seconds):
                index += 1
                store.append(a_round(index, draw))
            store.truncate(ROUNDS)
            store.finish("interrupted")

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """``hansa ui`` on that folder: its address, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hansa", "ui", "--runs", str(folder), "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command) as process:
        try:
            for _ in range(600):
                with suppress(OSError):
                    urllib.request.urlopen(f"{address}/_stcore/health").close()
                    break
                time.sleep(0.1)
            yield address, process.pid
        finally:
            process.terminate()


SCRIPT_IS_IDLE = (
    "() => document.querySelector('[data-testid=stApp]')?.dataset.testScriptState === 'notRunning'"
)
PAGES = {
    "Runs": ("/", "[data-testid=data-grid-canvas] >> nth=0"),
    "Run: Progress": (f"/run?run={NAME}", "[data-testid=stVegaLiteChart] >> nth=1"),
    "Compare": (f"/compare?run={NAME}", "[data-testid=data-grid-canvas] >> nth=0"),
}
PARTS = {
    "Clients": "[data-testid=stVegaLiteChart] >> nth=1",
    "Participation": "[data-testid=stVegaLiteChart] >> nth=3",
    "Layers": "[data-testid=stVegaLiteChart] >> nth=0",
    "Log": "text=No events",
}


def paint(page: Any, address: str, path: str, last: str) -> float:
    """Seconds from asking for a page to its last part."""
    began = time.perf_counter()
    page.goto(address + path)
    page.locator(last).wait_for(timeout=60_000)
    page.wait_for_function(SCRIPT_IS_IDLE, timeout=60_000)
    return time.perf_counter() - began


def change(page: Any, name: str, last: str) -> float:
    """Seconds from choosing a part of a run to its last chart."""
    began = time.perf_counter()
    page.get_by_role("radio", name=name, exact=True).click()
    page.locator(last).wait_for(timeout=60_000)
    page.wait_for_function(SCRIPT_IS_IDLE, timeout=60_000)
    return time.perf_counter() - began


def refreshes(page: Any, seconds: float) -> list[float]:
    """How long the script ran, each time that a live part was drawn again within some seconds."""
    page.evaluate(
        """() => {
          window.spans = []; let began = null;
          const app = document.querySelector('[data-testid=stApp]');
          new MutationObserver(() => {
            const running = app.dataset.testScriptState === 'running';
            if (running && began === null) began = performance.now();
            if (!running && began !== null) { window.spans.push(performance.now() - began); began = null; }
          }).observe(app, {attributes: true, attributeFilter: ['data-test-script-state']});
        }"""
    )
    page.wait_for_timeout(1000 * seconds)
    spans: list[float] = page.evaluate("() => window.spans")
    return [span / 1000 for span in spans]


def resident(process: int) -> float:
    """Megabytes of memory of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1000


def measure(folder: Path, chromium: str | None, watch: float) -> None:
    """Print a table."""
    from playwright.sync_api import sync_playwright

    rows: list[tuple[str, str, str]] = []
    with (
        served(folder) as (address, process),
        sync_playwright() as playwright,
        tempfile.TemporaryDirectory() as profile,
    ):
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium, args=list(FLAGS), headless=True
        )
        page = browser.pages[0]
        cold = paint(page, address, *PAGES["Runs"])
        rows.append(("Runs, the first visit of all", f"{cold:.2f}", ""))
        first = {name: [paint(page, address, *where) for _ in range(3)] for name, where in PAGES.items()}
        paint(page, address, *PAGES["Run: Progress"])
        parts = {name: change(page, name, last) for name, last in PARTS.items()}
        with growing(folder / NAME, 0.5):
            live = {}
            for name, where in PAGES.items():
                paint(page, address, *where)
                live[name] = refreshes(page, watch)
            paint(page, address, *PAGES["Run: Progress"])
            for name, last in PARTS.items():
                change(page, name, last)
                live[name] = refreshes(page, watch)
        rows += [(name, f"{statistics.median(first[name]):.2f}", _span(live[name])) for name in PAGES]
        rows += [(f"Run: {name}", f"{parts[name]:.2f}", _span(live[name])) for name in PARTS]
        memory = resident(process)
        browser.close()
    print("| page | first paint, s | refresh, s |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(f"\nMemory of the page's process at the end: {memory:.0f} MB.")


def _span(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} (at most {max(seconds):.2f})" if seconds else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs-of-ui-benchmark"))
    parser.add_argument("--again", action="store_true", help="make the run again")
    parser.add_argument("--make-only", action="store_true", help="measure nothing")
    parser.add_argument("--chromium", default=os.environ.get("CHROMIUM"), help="path of the browser")
    parser.add_argument("--watch", type=float, default=7.0, help="seconds to watch each live part")
    given = parser.parse_args()
    if given.again or not (given.folder / NAME / "run.db").is_file():
        make(given.folder)
    if not given.make_only:
        measure(given.folder, given.chromium, given.watch)


if __name__ == "__main__":
    main()
