"""Who may look at a dashboard and who may steer: asked by the server, whatever a page shows."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from streamlit.testing.v1 import AppTest

from hansa.cli.app import main
from hansa.core.errors import InputError, TrustError
from hansa.ui import access
from hansa.ui.access import Guarded
from hansa.ui.gate import COOKIE, Gate, Guard, Logins, Throttle
from hansa.ui.serve import SCRIPT
from hansa.ui.site import Site, configure
from hansa.ui.source import Folder
from hansa.ui.users import User, Users


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Users:
    made = Users(tmp_path_factory.mktemp("users") / "users.json")
    made.add("olga", "operator", "correct horse")
    made.add("vito", "viewer", "battery staple")
    return made


@pytest.fixture
def gate(users: Users) -> Iterator[Gate]:
    yield Gate(users, secure=True)
    configure(Site(source=Folder(Path("runs"))))


# The file of users.


def test_passwords_are_hashed_by_argon2id_and_readable_by_their_owner_alone(users: Users) -> None:
    text = users.path.read_text()
    assert "horse" not in text
    assert {entry["hash"].split("$")[1] for entry in json.loads(text)["users"].values()} == {"argon2id"}
    assert users.path.stat().st_mode & 0o777 == 0o600


def test_a_password_opens_for_its_own_name_alone(users: Users) -> None:
    assert users.verify("olga", "correct horse") == User(name="olga", role="operator")
    assert users.verify("vito", "battery staple") == User(name="vito", role="viewer")
    for name, password in (("olga", "battery staple"), ("olga", ""), ("nobody", "nobody's password")):
        assert users.verify(name, password) is None


def test_users_come_change_and_go(tmp_path: Path) -> None:
    users = Users(tmp_path / "users.json")
    users.add("ada", "viewer", "first word")
    users.add("ada", "operator", "second word")
    assert users.all() == [User(name="ada", role="operator")]
    assert users.verify("ada", "first word") is None
    users.remove("ada")
    assert users.all() == []
    with pytest.raises(InputError, match="no such user"):
        users.remove("ada")


@pytest.mark.parametrize(
    ("name", "role", "password", "message"),
    [
        ("../ada", "viewer", "long enough", "it is no name"),
        ("ada", "admin", "long enough", "choose viewer or operator"),
        ("ada", "viewer", "short", "too short"),
    ],
)
def test_what_makes_no_user(tmp_path: Path, name: str, role: str, password: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Users(tmp_path / "users.json").add(name, role, password)
    assert not (tmp_path / "users.json").exists()


def test_a_file_that_others_may_read_or_that_is_something_else_is_refused(tmp_path: Path) -> None:
    users = Users(tmp_path / "users.json")
    with pytest.raises(InputError, match="hansa ui user add"):
        users.all()
    users.add("ada", "viewer", "long enough")
    users.path.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        users.all()
    for text in ("[]", "{}", '{"users": {"ada": {"role": "god", "hash": ""}}}', "not json"):
        users.path.write_text(text)
        with pytest.raises(InputError, match="no file of users"):
            users.all()


def test_the_command_reads_a_password_and_lists_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "users.json")
    read, write = os.pipe()
    os.write(write, b"typed elsewhere\n")
    os.close(write)
    with os.fdopen(read) as typed:
        monkeypatch.setattr("sys.stdin", typed)
        assert main(["ui", "user", "add", "ada", "--role", "operator", "--file", file]) == 0
    assert main(["ui", "user", "ls", "--file", file]) == 0
    assert "operator  ada" in capsys.readouterr().out
    assert Users(Path(file)).verify("ada", "typed elsewhere") is not None
    assert main(["ui", "user", "rm", "ada", "--file", file]) == 0
    assert Users(Path(file)).all() == []


def test_a_dashboard_that_others_reach_needs_a_login(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--address", "0.0.0.0"]) == 2
    assert "--auth" in capsys.readouterr().err
    assert main(["ui", "--auth", "there-is-none.json"]) == 2
    assert "hansa ui user add" in " ".join(capsys.readouterr().err.split())
    assert main(["ui", "--certificate", "there-is-none.pem", "--key", "nor-here.pem"]) == 2
    assert "--certificate = 'there-is-none.pem'" in " ".join(capsys.readouterr().err.split())


def test_a_port_that_is_taken_is_said_before_an_address_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"--port = {port}: nothing can listen at 127.0.0.1:{port}" in " ".join(said.err.split())


# Sign-ins.


def test_a_sign_in_ends_with_time_by_choice_and_with_its_user(tmp_path: Path) -> None:
    users = Users(tmp_path / "users.json")
    users.add("ada", "viewer", "long enough")
    now = 1000.0
    logins = Logins(users, lambda: now)
    ada = User(name="ada", role="viewer")
    first, second = logins.open(ada), logins.open(ada)
    assert logins.user(first) == logins.user(second) == ada
    logins.close(first)
    assert logins.user(first) is None
    users.add("ada", "operator", "long enough")
    assert logins.user(second) == User(name="ada", role="operator")  # as the file says now
    users.remove("ada")
    assert logins.user(second) is None
    users.add("ada", "viewer", "long enough")
    now += 13 * 3600
    assert logins.user(second) is None
    assert logins.user(None) is logins.user("") is logins.user("made up") is None


def test_who_guesses_waits_longer_and_longer_and_others_do_not() -> None:
    now = 0.0
    throttle = Throttle(lambda: now)
    waits = []
    for _ in range(12):
        throttle.begin("name ada", "address x")
        waits.append(throttle.wait("name ada"))
    assert waits == [0, 0, 0, 0, 2, 4, 8, 16, 32, 60, 60, 60]
    assert throttle.wait("name bob", "address x") == 60
    assert throttle.wait("name bob", "address y") == 0
    now = 61.0
    assert throttle.wait("name ada") <= 0
    throttle.right("name ada")
    throttle.begin("name ada")
    assert throttle.wait("name ada") == 0


# The gate.


async def inside(scope: Any, receive: Any, send: Any) -> None:
    """What is behind the gate."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})


def call(
    gate: Gate,
    path: str,
    *,
    method: str = "GET",
    kind: str = "http",
    form: dict[str, str] | None = None,
    **headers: str,
) -> tuple[int | str, dict[str, str], str]:
    """(status, headers, body) of one request to what stands behind a gate."""
    sent: list[Any] = []
    body = urlencode(form or {}).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "query_string": b"",
        "scheme": "http",
        "server": ("dash.example", 80),
        "client": ("10.0.0.9", 1234),
        "headers": [
            (name.replace("_", "-").encode(), value.encode())
            for name, value in {"host": "dash.example", "accept": "text/html", **headers}.items()
        ],
    }
    asyncio.run(Guard(inside, gate)(scope, receive, send))
    if kind == "websocket":
        return sent[0]["type"], {}, ""
    told = {k.decode().lower(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], told, b"".join(each.get("body", b"") for each in sent[1:]).decode()


def sign_in(gate: Gate, name: str, password: str, **headers: str) -> tuple[int | str, dict[str, str], str]:
    return call(gate, "/login", method="POST", form={"name": name, "password": password}, **headers)


def cookie(answer: tuple[int | str, dict[str, str], str]) -> str:
    return answer[1]["set-cookie"].split(";")[0]


def test_nothing_passes_without_a_sign_in(gate: Gate) -> None:
    status, headers, _ = call(gate, "/runs")
    assert (status, headers["location"]) == (303, "/login")
    assert call(gate, "/media/model.safetensors", accept="*/*")[0] == 401
    assert call(gate, "/_stcore/stream", kind="websocket")[0] == "websocket.close"
    assert call(gate, "/runs", cookie=f"{COOKIE}=made-up")[0] == 303
    assert "Sign in" in call(gate, "/login")[2]
    assert call(gate, "/_stcore/health")[0] == 200  # for whoever watches over the process


def test_a_sign_in_opens_everything_until_it_is_over(gate: Gate) -> None:
    answer = sign_in(gate, "vito", "battery staple", origin="http://dash.example")
    assert (answer[0], answer[1]["location"]) == (303, "/")
    flags = answer[1]["set-cookie"].lower()
    assert all(flag in flags for flag in ("httponly", "secure", "samesite=lax"))
    assert "vito" not in answer[1]["set-cookie"]
    assert "viewer" not in answer[1]["set-cookie"]
    mine = cookie(answer)
    status, headers, body = call(gate, "/runs", cookie=mine)
    assert (status, body, headers["x-frame-options"]) == (200, "inside", "DENY")
    assert call(gate, "/_stcore/stream", kind="websocket", cookie=mine)[0] == "websocket.accept"
    assert call(gate, "/logout", cookie=mine)[0] == 200
    assert call(gate, "/runs", cookie=mine)[0] == 200  # looking at the question is no answer
    assert call(gate, "/logout", method="POST", cookie=mine, origin="http://evil.example")[0] == 403
    assert call(gate, "/logout", method="POST", cookie=mine)[0] == 303
    assert call(gate, "/runs", cookie=mine)[0] == 303


def test_what_is_made_for_a_connection_is_made_for_whoever_made_it(gate: Gate) -> None:
    """A download is made in a thread that knows no page and no cookie."""
    mine = cookie(sign_in(gate, "vito", "battery staple"))
    seen: list[User | None] = []

    async def download(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await asyncio.to_thread(gate.user, {}))

    async def serve(sent: str) -> None:
        scope = {"type": "websocket", "path": "/", "headers": [(b"cookie", sent.encode())]}
        await Guard(download, gate)(scope, None, None)  # type: ignore[arg-type]

    asyncio.run(serve(mine))
    assert seen == [User(name="vito", role="viewer")]
    assert gate.user({}) is None  # nothing is left behind


def test_a_form_from_elsewhere_or_without_end_signs_nobody_in(gate: Gate) -> None:
    assert sign_in(gate, "olga", "correct horse", origin="http://evil.example")[0] == 403
    assert sign_in(gate, "olga", "x" * 10_000)[0] == 413


def test_a_name_with_markup_is_text(gate: Gate) -> None:
    status, headers, body = sign_in(gate, '"><script>alert(1)</script>', "wrong password")
    assert status == 401
    assert "<script>" not in body
    assert "default-src 'none'" in headers["content-security-policy"]


def test_guessing_is_slowed_down_and_told_so(gate: Gate) -> None:
    answers = [sign_in(gate, "olga", f"guess {i}") for i in range(6)]
    assert [status for status, *_ in answers] == [401] * 5 + [429]
    assert int(answers[-1][1]["retry-after"]) >= 1
    assert sign_in(gate, "olga", "correct horse")[0] == 429  # not even the right one, for a while


# Roles.


def as_user(monkeypatch: pytest.MonkeyPatch, user: User | None) -> None:
    monkeypatch.setattr(access, "who", lambda gate: user)


class Steered(Folder):
    """A folder that notes what was asked of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked: list[str] = []

    def stop(self, run: str) -> None:
        self.asked.append(f"stop {run}")

    def resume(self, run: str) -> None:
        self.asked.append(f"resume {run}")

    def start(self, recipe: str) -> str:
        self.asked.append("start")
        return "new"


def test_viewers_look_and_only_operators_steer(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Steered(tmp_path)
    guarded = Guarded(source, gate)
    configure(Site(source=guarded, gate=gate))
    as_user(monkeypatch, User(name="vito", role="viewer"))
    assert guarded.runs() == []
    assert not access.may_operate()
    for act in (lambda: guarded.stop("a"), lambda: guarded.resume("a"), lambda: guarded.start("")):
        with pytest.raises(TrustError, match="need the role operator"):
            act()
    assert source.asked == []
    as_user(monkeypatch, User(name="olga", role="operator"))
    assert access.may_operate()
    guarded.stop("a")
    guarded.resume("a")
    assert guarded.start("") == "new"
    assert source.asked == ["stop a", "resume a", "start"]
    as_user(monkeypatch, None)
    for look in (guarded.runs, lambda: guarded.model("a"), lambda: guarded.stop("a")):
        with pytest.raises(TrustError):
            look()


def test_pages_say_that_a_sign_in_is_over_and_show_nothing(tmp_path: Path, gate: Gate) -> None:
    configure(Site(source=Guarded(Folder(tmp_path), gate), gate=gate))
    app = AppTest.from_file(str(SCRIPT), default_timeout=60).run()
    assert not app.exception
    assert "not signed in" in app.warning[0].value
    assert not app.title
