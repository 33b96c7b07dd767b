"""``hansa pki`` and ``hansa audit`` as an administrator meets them."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hansa.cli import main
from hansa.core import trust
from hansa.core.roles import Role
from hansa.server.app import read_config
from hansa.server.trust import Authority, enrolment_server

pytestmark = pytest.mark.usefixtures("no_pickle")

Command = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``command("pki", "ls")``: exit code, envelope, and what people read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        capfd.readouterr()
        code = main([*arguments, "--json"])
        out, err = capfd.readouterr()
        return code, json.loads(out), err

    return run


def test_a_federation_from_its_founding_to_a_revocation(command: Command) -> None:
    code, made, text = command("pki", "init", "harbour", "--host", "fl.example.org")
    assert code == 0
    assert made["fingerprint"] in text
    code, made, _ = command("pki", "issue", "root", "--role", "admin", "--into", "admin")
    assert (code, made["role"]) == (0, "admin")
    assert trust.load(Path("admin")).identity.role is Role.ADMIN
    code, made, _ = command("pki", "issue", "clinic-3", "-o", "clinic-3.token")
    assert (code, made["token"]) == (0, None)
    assert Path("clinic-3.token").stat().st_mode & 0o777 == 0o600
    token = trust.JoinToken.parse(Path("clinic-3.token").read_text())
    assert token.fingerprint == Authority(Path("pki")).fingerprint
    _, made, _ = command("pki", "ls")
    assert [each["name"] for each in made["certificates"]] == ["root"]
    assert [each["name"] for each in made["tokens"]] == ["clinic-3"]
    code, made, _ = command("pki", "revoke", "root", "--reason", "left")
    assert (code, len(made["serials"])) == (0, 1)
    _, made, _ = command("pki", "ls")
    assert made["certificates"][0]["revoked"] is True
    code, made, _ = command("audit", "verify")
    assert (code, made["records"]) == (0, 6)
    code, made, _ = command("audit", "head")
    assert command("audit", "verify", "--head", made["head"])[0] == 0


def test_joining_by_command(command: Command) -> None:
    command("pki", "init", "harbour")
    command("pki", "issue", "clinic-3", "--output", "clinic-3.token")

    async def act() -> subprocess.CompletedProcess[str]:
        server, port = enrolment_server(Authority(Path("pki")), "127.0.0.1:0")
        await server.start()
        try:
            return await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "hansa", "pki", "join", f"127.0.0.1:{port}", "-", "--json"],
                input=Path("clinic-3.token").read_text(),
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            await server.stop(0)

    done = asyncio.run(act())
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["name"], made["role"], made["folder"]) == ("clinic-3", "agent", "identity")
    assert abs(made["clock_skew_seconds"]) <= 60
    assert trust.load(Path("identity")).identity.serial == made["serial"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("pki", "issue", "clinic-3", "--expires", "soon"), 2, "--expires = 'soon'"),
        (("pki", "issue", "clinic-3", "--expires", "31d"), 2, "up to 30 days"),
        (("pki", "issue", "a/b"), 2, "no name of a machine"),
        (("pki", "revoke", "nobody"), 2, "nothing that holds"),
        (("pki", "init", "again"), 6, "not empty"),
        (("pki", "init", "x", "--pki", "y", "--host", "a:1"), 2, "without port"),
        (("pki", "ls", "--pki", "elsewhere"), 6, "no such folder"),
        (("pki", "init", "x", "--pki", "/dev/null/y"), 6, "name a folder that you may write"),
        (("pki", "issue", "x", "--output", "absent/x.token"), 2, "--output = 'absent/x.token'"),
        (("pki", "join", "127.0.0.1:1", "absent"), 2, "No such file"),
        (("pki", "renew", "127.0.0.1:1"), 6, "no such folder"),
        (("audit", "verify", "--log", "absent"), 6, "cannot be opened"),
        (("audit", "verify", "--head", "x"), 2, "NUMBER:HASH"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, tuple) else None,
)
def test_errors_name_the_value_and_the_remedy(
    arguments: tuple[str, ...], code: int, said: str, command: Command
) -> None:
    command("pki", "init", "harbour")
    given, made, _ = command(*arguments)
    assert given == code
    assert said in made["error"]["message"]


def test_a_coordinator_with_a_configuration_uses_the_authority_that_is_here(command: Command) -> None:
    file = Path("coordinator.toml")
    file.write_text('sources = ["/srv"]\n')
    assert read_config(file, {}).pki is None
    command("pki", "init", "harbour")
    made = read_config(file, {})
    assert (made.pki, made.listen, made.enrolment) == (Path("pki"), "0.0.0.0:8443", "0.0.0.0:8444")
    assert read_config(file, {"pki": Path("other")}).pki == Path("other")
    file.write_text('pki = "elsewhere"\n')
    assert read_config(file, {}).pki == Path("elsewhere")


def test_a_changed_audit_log_is_an_exit_code(command: Command) -> None:
    command("pki", "init", "harbour")
    path = Path("pki/audit.jsonl")
    path.write_text(path.read_text().replace('"harbour"', '"harbor"'))
    code, made, _ = command("audit", "verify")
    assert code == 6
    assert "record 2 does not continue the line before it" in made["error"]["message"]


def test_a_token_on_standard_input_that_is_none(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hansa-join-1.secret"))
    code, made, text = command("pki", "join", "127.0.0.1:1", "-")
    assert code == 2
    assert "was cut when it was copied" in made["error"]["message"]
    assert "hansa-join-1.secret" not in text
