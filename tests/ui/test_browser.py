"""The dashboard in a real browser: runs are started, watched, stopped, compared and taken home."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from safetensors.torch import load, load_file

from hansa.cli import local
from hansa.core.control import Coordinator
from hansa.core.recipe import parse
from hansa.core.store import RunStore, runs
from hansa.ui.users import Users

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"
)

HANSA = (sys.executable, "-W", "always::DeprecationWarning", "-m", "hansa")
PATIENCE = 180_000  # milliseconds: a busy machine may stand still for a minute
ROUND = re.compile(r"round [\d,]+ of")
MARKUP = "<img src=x onerror='window.hacked = true'> **bold**"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    arguments = (
        "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    )
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments.split())
        yield made
        made.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    yield context.new_page()
    context.close()


@contextmanager
def dashboard(folder: Path, *options: str) -> Iterator[str]:
    """`hansa ui` as a process that works in ``folder``; gives its address; its log must be clean."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    log = folder / "ui.log"
    with log.open("w") as told:
        process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "always::DeprecationWarning",
                "-m",
                "hansa",
                "ui",
                "--port",
                str(port),
                *options,
            ],
            cwd=folder,
            stdout=told,
            stderr=told,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        until(lambda: answers(f"{address}/_stcore/health") or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    said = log.read_text()
    assert "Traceback" not in said, said
    assert "deprecat" not in said.lower(), said


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def until(condition: Callable[[], object]) -> None:
    """Wait for something that will happen."""
    end = time.monotonic() + PATIENCE / 1000
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def start(page: Page, name: str, **stop: str) -> None:
    """Start a run by the form."""
    page.get_by_role("button", name="New run").click()
    form = page.get_by_role("dialog")
    form.get_by_role("textbox", name="Name", exact=True).fill(name)
    form.get_by_role("textbox", name="Name", exact=True).press("Tab")
    form.get_by_text("Stop", exact=True).click()
    for key, value in stop.items():
        form.get_by_role("textbox", name=key, exact=True).fill(value)
        form.get_by_role("textbox", name=key, exact=True).press("Tab")
    form.get_by_role("button", name="Start").click()
    expect(form).to_be_hidden()


def round_of(page: Page) -> int:
    """How far the page says that the run is."""
    text = page.get_by_text(ROUND).first.inner_text()
    found = re.search(r"round ([\d,]+) of", text)
    assert found is not None
    return int(found.group(1).replace(",", ""))


def moves(page: Page) -> None:
    """Numbers move, and the page was not loaded anew."""
    expect(page.get_by_text(ROUND).first).to_be_visible()
    page.evaluate("window.unloaded = false")
    before = round_of(page)
    until(lambda: round_of(page) > before)
    assert page.evaluate("window.unloaded") is False


def sign_in(page: Page, address: str, name: str, password: str) -> None:
    page.goto(address)
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()


def test_a_run_is_started_watched_stopped_compared_and_taken_home(
    browser: Browser, page: Page, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    users = Users(tmp_path / "users.json")
    users.add("olga", "operator", "correct horse")
    users.add("vito", "viewer", "battery staple")
    with RunStore.create(folder / "bad", name="bad", seed=0, recipe="", facts={}) as store:
        store.finish("failed", MARKUP)

    with dashboard(tmp_path, "--runs", "runs", "--auth", "users.json") as address:
        sign_in(page, address, "olga", "a wrong guess")
        expect(page.get_by_role("alert")).to_contain_text("do not go together")
        sign_in(page, address, "olga", "correct horse")
        expect(page.get_by_role("heading", name="Runs")).to_be_visible()

        start(page, "long", rounds="100000")
        moves(page)
        viewer = browser.new_context()
        other = viewer.new_page()
        sign_in(other, address, "vito", "battery staple")
        expect(other.get_by_text(ROUND).first).to_be_visible(timeout=PATIENCE)
        shown = other.get_by_test_id("stMain")  # Streamlit's own buttons stand elsewhere
        assert shown.get_by_role("button", name="New run").count() == 0
        assert shown.get_by_role("button", name="Stop").count() == 0
        viewer.close()
        page.get_by_test_id("stMain").get_by_role("button", name="Stop").click()
        until(lambda: status(folder, "long") == "interrupted")
        expect(page.get_by_text(ROUND)).to_have_count(0)

        start(page, "short", rounds="2")
        until(lambda: status(folder, "short") == "finished")

        long, short = id_of(folder, "long"), id_of(folder, "short")
        page.goto(f"{address}/compare?run={long}&run={short}")
        expect(page.get_by_role("heading", name="Compare")).to_be_visible()
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Table (CSV)").click()
        table = waiting.value.path().read_text()
        assert "long" in table
        assert "short" in table

        page.goto(f"{address}/run?run={short}")
        page.get_by_role("button", name="Download").click()
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Model").click()
        model = load(waiting.value.path().read_bytes())
        kept = load_file(folder / short / "model.safetensors")
        assert model.keys() == kept.keys()
        assert all(tensor.equal(kept[name]) for name, tensor in model.items())

        page.goto(f"{address}/run?run=bad")  # shown as it is, and not executed
        expect(page.get_by_text("<img src=x onerror='window.hacked = true'> **bold**").first).to_be_visible()
        assert page.evaluate("window.hacked") is None


def status(folder: Path, name: str) -> str | None:
    return next((run.status for run in runs(folder) if run.name == name), None)


def id_of(folder: Path, name: str) -> str:
    return next(run.id for run in runs(folder) if run.name == name)


def test_a_coordinator_is_watched_while_it_goes_away_and_comes_back(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run([*HANSA, "local", "up", "--agents", "2"], check=True, capture_output=True)
    address = local.where(local.FOLDER)
    back: subprocess.Popen[bytes] | None = None
    try:
        recipe = parse({"name": "live", "stop": {"rounds": 100_000}})
        with Coordinator(address, local.FOLDER / "user") as control:
            run = control.submit(recipe.toml()).id
        with dashboard(tmp_path, "--server", "local") as site:
            page.goto(f"{site}/run?run={run}")
            moves(page)
            leader = local.processes(local.FOLDER)[0]
            os.kill(leader, signal.SIGKILL)
            expect(page.get_by_text("no connection").first).to_be_visible()
            with (tmp_path / "again.log").open("wb") as log:
                config = local.FOLDER / "coordinator" / "coordinator.toml"
                back = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "hansa",
                        "coordinator",
                        "start",
                        "--config",
                        config,
                        "--listen",
                        address,
                    ],
                    stdout=log,
                    stderr=log,
                )
            expect(page.get_by_text("no connection")).to_have_count(0)
            moves(page)
            page.goto(f"{site}/clients")
            expect(page.get_by_text("2 of 2")).to_be_visible()
            page.goto(f"{site}/system")
            expect(page.get_by_text("mutual TLS")).to_be_visible()
    finally:
        if back is not None:
            back.terminate()
            back.wait(60)
        local.down(local.FOLDER)
