"""The Compose file: of the official schema, nobody root, no secrets, the image has what it mounts; and every
command of it run as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from postgres import Postgres, binaries

TOP = Path(__file__).parent.parent
FILE = yaml.safe_load((TOP / "docker-compose.yml").read_text())
SERVICES: Mapping[str, Mapping[str, Any]] = FILE["services"]
OURS = [name for name, each in SERVICES.items() if "build" in each]
SECRETS = {name: f"{name.lower()}-of-a-test" for name in ("POSTGRES_PASSWORD", "DASHBOARD_PASSWORD")}


def test_the_schema() -> None:
    schema = json.loads((TOP / "tests" / "schemas" / "compose-spec.json").read_text())
    assert [each.message for each in Draft7Validator(schema).iter_errors(FILE)] == []
    wrong = {**FILE, "services": {"coordinator": {"imagee": "x"}}}
    assert list(Draft7Validator(schema).iter_errors(wrong))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_no_root_holds_no_secret_and_keeps_its_data_in_named_volumes(name: str) -> None:
    service = SERVICES[name]
    assert str(service["user"]) not in ("", "0", "root")
    for variable, value in service.get("environment", {}).items():
        if re.search("PASSWORD|DATABASE", variable):
            assert re.search(r"\$\{[A-Z]+_PASSWORD:\?", value), variable
    for volume in service.get("volumes", ()):
        source = volume.split(":")[0]
        assert (TOP / source).exists() if source.startswith("./") else source in FILE["volumes"], volume
    assert "healthcheck" in service or name in ("found", "simulate")
    for other, needed in service.get("depends_on", {}).items():
        assert needed["condition"] == "service_completed_successfully" or "healthcheck" in SERVICES[other]


def test_the_image_has_what_the_file_mounts_and_runs_as_nobody() -> None:
    lines = (TOP / "deploy" / "Dockerfile").read_text().splitlines()
    assert sum(each.startswith("FROM ") for each in lines) == 2
    assert [each for each in lines if each.startswith("USER ")] == ["USER 10001"]
    pinned = re.search(r'"(torch==[^"]+)"', (TOP / "pyproject.toml").read_text())
    assert pinned is not None
    assert any(each.startswith("RUN ") and each.endswith(pinned[1]) for each in lines)
    text = "\n".join(lines)
    assert not re.search(r"https?://", text)
    made = {word for word in re.findall(r"[\w/-]+", text) if not word.startswith("/")}
    for name in OURS:
        for volume in SERVICES[name].get("volumes", ()):
            target = volume.split(":")[1]
            if target.startswith("/var/lib/hansa/"):  # a new volume takes its owner from the image
                assert target.removeprefix("/var/lib/hansa/") in made


class Stage:
    """The services as processes of this machine: their volumes are folders, their names loopback."""

    def __init__(self, folder: Path, database: str) -> None:
        self._folder = folder
        self.ports = {port: _free() for port in ("8443", "8444", "9100", "8501")}
        self._replaced = {
            "0.0.0.0": "127.0.0.1",
            "coordinator:8443": "127.0.0.1:8443",
            "postgresql://hansa:postgres_password-of-a-test@postgres/hansa": database,
        }

    def process(self, name: str, command: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start a service, or another command where it is."""
        service = SERVICES[name]
        root = self._root(name)
        words = command or [*service.get("entrypoint", ["hansa"]), *service["command"]]
        environment = {k: self._local(str(v), root) for k, v in service.get("environment", {}).items()}
        words = [self._local(each, root) for each in words]
        words[0] = {"found": str(TOP / "deploy" / "found.sh"), "python": sys.executable}.get(
            words[0], words[0]
        )
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        home = self._folder / "home" / name
        home.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            words,
            cwd=home,
            env={**os.environ, "PATH": path, "HOME": str(home), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def done(self, name: str, command: Sequence[str] = ()) -> str:
        """What a command says that ends well."""
        process = self.process(name, command)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        return said

    def healthy(self, name: str) -> None:
        """Wait until a service's own check is content."""
        check = SERVICES[name]["healthcheck"]["test"]
        assert check[0] == "CMD"
        said = ""
        for _ in range(100):
            process = self.process(name, check[1:])
            said, _ = process.communicate()
            if process.returncode == 0:
                return
            time.sleep(0.2)
        raise AssertionError(f"{name}: {said}")

    @contextmanager
    def up(self, name: str) -> Iterator[None]:
        """A service that serves, and ends when it is told to."""
        process = self.process(name)
        try:
            self.healthy(name)
            assert process.poll() is None
            yield
        finally:
            process.terminate()
            said, _ = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGTERM), said

    def _root(self, name: str) -> Path:
        """Where a service finds its volumes, under the paths that it knows."""
        root = self._folder / "roots" / name
        for volume in SERVICES[name].get("volumes", ()):
            source, target, *_ = volume.split(":")
            place = root / target.removeprefix("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.startswith("./"):
                place.write_text(self._local((TOP / source).read_text(), root))
            elif not place.exists():
                kept = self._folder / "volumes" / source
                kept.mkdir(parents=True, exist_ok=True, mode=0o700)
                place.symlink_to(kept)
        return root

    def _local(self, text: str, root: Path) -> str:
        text = re.sub(r"\$\{(\w+):[?-]([^}]*)\}", lambda m: SECRETS.get(m[1], m[2]), text)
        for source, target in self._replaced.items():
            text = text.replace(source, target)
        text = re.sub(r"/(?=var/lib/hansa|etc/hansa)", f"{root}/", text)
        for port, here in self.ports.items():
            text = re.sub(rf"(?<=:){port}|(?<=--port=){port}", str(here), text)
        return text


def _free() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def test_every_command_of_the_file(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[data]\nlimit = 90\n[partition]\nclients = 3\n[schedule]\ncohort = 3\n[stop]\nrounds = 1\n"
    )
    with ExitStack() as stack:
        if binaries() is None:
            database = f"sqlite:///{tmp_path}/events.db"
        else:
            database = stack.enter_context(Postgres()).database()
        stage = Stage(tmp_path, database)
        assert "fingerprint" in stage.done("found")
        assert "fingerprint" not in stage.done("found")  # a second start founds nothing
        stack.enter_context(stage.up("coordinator"))
        agents = [name for name in SERVICES if name.startswith("agent-")]
        assert len(agents) == 3
        for name in (*agents, "dashboard"):
            stack.enter_context(stage.up(name))
        run = ["hansa", "run", str(recipe), "--on", "coordinator:8443"]
        assert "finished: made 1 rounds" in stage.done("coordinator", run)
    said = stage.done("simulate", [*["hansa"], *SERVICES["simulate"]["command"], "-c", "stop.rounds=1"])
    assert "finished" in said
    models = [*(tmp_path / "volumes" / "runs").glob("*/model.safetensors")]
    assert len(models) == 2
    tested = {"found", "coordinator", "dashboard", "simulate", *agents}
    assert tested == set(OURS)
