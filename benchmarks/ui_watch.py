"""Ten minutes before the dashboard: a live run watched by a headless Chromium that goes from page to page.

The run is a simulation without end; the browser turns to the next page every minute, and each refreshes by
itself. At the end: exceptions and warnings in the dashboard's log, errors on its pages, and its memory.

    python benchmarks/ui_watch.py
    python benchmarks/ui_watch.py --write docs/dashboard.md
"""

from __future__ import annotations

import argparse
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import psutil
import published
from playwright.sync_api import Page, sync_playwright

PAGES = ("runs", "run", "clients", "compare", "topology", "system")
STAY = 60.0  # seconds on a page
LOOK = 5.0  # seconds between two looks at the memory
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WARM = 2 * 60.0  # seconds until every page that is heavy has been drawn once, and memory may be judged


def watch(
    page: Page, address: str, process: psutil.Process, minutes: float
) -> tuple[list[float], list[float], int]:
    """(seconds, MB resident, errors shown on pages) of a watch."""
    began, seconds, memory, errors = time.monotonic(), [], [], 0
    for name in cycle(PAGES):
        page.goto(f"{address}/{name}", wait_until="domcontentloaded")
        page.wait_for_selector("h1", timeout=120_000)
        there = time.monotonic()
        while time.monotonic() < there + STAY:
            page.wait_for_timeout(LOOK * 1000)
            seconds.append(time.monotonic() - began)
            memory.append(process.memory_info().rss / 1e6)
            errors += page.locator("[data-testid=stException], [data-testid=stAlertContentError]").count()
            if seconds[-1] > 60 * minutes:
                return seconds, memory, errors
    raise AssertionError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args(arguments)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ui.log"
        hansa = [sys.executable, "-W", "always::DeprecationWarning", "-m", "hansa"]
        endless = (
            "-c stop.rounds=10000000 -c schedule.name=buffered -c schedule.k=5 -c schedule.concurrency=10"
        )
        run = subprocess.Popen(
            [*hansa, "run", "--quiet", "--runs", folder, *endless.split()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with log.open("w") as told:
            ui = subprocess.Popen(
                [*hansa, "ui", "--runs", folder, "--port", str(port)], stdout=told, stderr=told
            )
        try:
            time.sleep(15)
            with sync_playwright() as playwright:
                path = shutil.which("chromium") or shutil.which("google-chrome")
                browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS.split())
                process = psutil.Process(ui.pid)
                seconds, memory, errors = watch(
                    browser.new_page(), f"http://127.0.0.1:{port}", process, given.minutes
                )
                spent = sum(process.cpu_times()[:2])
                browser.close()
            said = log.read_text()
        finally:
            for each in (ui, run):
                each.send_signal(signal.SIGTERM)
            for each in (ui, run):
                each.wait(120)
        table = _table(np.array(seconds), np.array(memory), errors, said, spent)
        (rounds,) = {_rounds(Path(folder))}
        table += f"\n| rounds that the run made meanwhile | {rounds:,} |"
    print(table)
    if given.write is not None:
        published.write(given.write, "watch table", table)


def _rounds(folder: Path) -> int:
    from hansa.core.store import runs

    return next(run.rounds for run in runs(folder))


def _table(seconds: np.ndarray, memory: np.ndarray, errors: int, said: str, spent: float) -> str:
    warm = seconds >= min(WARM, seconds[-1] / 2)
    slope = 60 * np.polyfit(seconds[warm], memory[warm], 1)[0]
    rows = {
        "watched": f"{seconds[-1] / 60:.1f} min",
        "exceptions in the log": f"{said.count('Traceback')}",
        "deprecation warnings in the log": f"{said.lower().count('deprecat')}",
        "errors shown on pages": f"{errors}",
        "memory after two minutes, at the end, at most": (
            f"{memory[warm][0]:.0f} MB, {memory[-1]:.0f} MB, {memory.max():.0f} MB"
        ),
        "trend of the memory after two minutes": f"{slope:+.2f} MB a minute",
        "processor": f"{spent / seconds[-1]:.0%} of a core",
    }
    lines = [
        "| a live run watched | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
