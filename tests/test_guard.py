"""Who may call what: every role against every method, over a mutually authenticated connection."""

from __future__ import annotations

import asyncio
import importlib
import logging
import pkgutil
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from hansa.core import trust, wire
from hansa.core.trust import Role
from hansa.core.trust.folder import key_pem, new_key
from hansa.core.wire import enrolment_pb2
from hansa.server.trust import (
    RULES,
    Audit,
    Authority,
    Guard,
    Reach,
    RefusalLog,
    Refused,
    caller,
    denylist,
    guard,
    insecure_port,
    server_credentials,
    uncovered,
)
from hansa.server.trust.denylist import DenyList
from hansa.server.trust.rules import methods

pytestmark = pytest.mark.usefixtures("no_pickle")

T = TypeVar("T")
Channels = Callable[[str], Any]
"""The channel of a member, by name; untyped, for the stubs of gRPC do not know bare bytes."""
ALL, OWN = Reach.ALL, Reach.OWN
OWNERS = {b"run-a": "ada", b"run-b": "bob"}

RULES_HERE = {
    "/test.Runs/Show": dict.fromkeys(Role, ALL),
    "/test.Runs/Stop": {Role.ADMIN: ALL, Role.OPERATOR: ALL, Role.RESEARCHER: OWN},
    "/test.Runs/Forgetful": {Role.ADMIN: ALL, Role.RESEARCHER: OWN},
    "/test.Runs/Attend": {Role.AGENT: ALL},
    "/test.Runs/Upload": {Role.AGENT: ALL},
    "/test.Runs/Watch": {Role.ADMIN: ALL, Role.AUDITOR: ALL, Role.RESEARCHER: OWN},
    "/test.Runs/Follow": {Role.ADMIN: ALL, Role.RESEARCHER: OWN},
    "/test.Runs/Careless": {Role.ADMIN: ALL, Role.RESEARCHER: OWN},
}


class Runs:
    """A service with every kind of method."""

    def __init__(self) -> None:
        self.reached: list[tuple[str, str]] = []
        self.address = ""
        self.pushes: asyncio.Queue[bytes] = asyncio.Queue()

    def _reach(self) -> None:
        who = caller()
        self.reached.append((who.method, str(who.identity)))

    async def show(self, request: bytes, context: Any) -> bytes:
        self._reach()
        return str(caller().identity).encode()

    async def stop(self, request: bytes, context: Any) -> bytes:
        caller().owns(OWNERS[request], f"run {request.decode()}")
        self._reach()
        return b"stopped"

    async def forgetful(self, request: bytes, context: Any) -> bytes:
        return b"the secrets of " + request

    async def attend(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            self._reach()
            yield request

    async def upload(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        got = b""
        async for request in requests:
            got += request
        self._reach()
        return got

    async def watch(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        caller().owns(OWNERS[request], f"run {request.decode()}")
        while True:
            yield await self.pushes.get()

    async def follow(self, request: bytes, context: Any) -> None:
        caller().owns(OWNERS[request], f"run {request.decode()}")
        while True:
            await context.write(await self.pushes.get())

    async def careless(self, request: bytes, context: Any) -> None:
        await context.write(b"the secrets of " + request)

    async def unlisted(self, request: bytes, context: Any) -> bytes:
        self._reach()
        return b"reached"

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            "test.Runs",
            {
                "Show": grpc.unary_unary_rpc_method_handler(self.show),
                "Stop": grpc.unary_unary_rpc_method_handler(self.stop),
                "Forgetful": grpc.unary_unary_rpc_method_handler(self.forgetful),
                "Attend": grpc.stream_stream_rpc_method_handler(self.attend),
                "Upload": grpc.stream_unary_rpc_method_handler(self.upload),
                "Watch": grpc.unary_stream_rpc_method_handler(self.watch),
                "Follow": grpc.unary_stream_rpc_method_handler(self.follow),
                "Careless": grpc.unary_stream_rpc_method_handler(self.careless),
                "Unlisted": grpc.unary_unary_rpc_method_handler(self.unlisted),
                "Synchronous": grpc.unary_unary_rpc_method_handler(lambda request, context: b""),
            },
        )


class Federation:
    """An authority, members of every role, and a server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wrong = timedelta()
        self.authority = Authority.create(folder / "pki", "harbour", [], self.now)
        self.identities = {
            name: self.join(name, role)
            for name, role in (
                ("root", Role.ADMIN),
                ("olga", Role.OPERATOR),
                ("ada", Role.RESEARCHER),
                ("bob", Role.RESEARCHER),
                ("quis", Role.AUDITOR),
                ("clinic", Role.AGENT),
            )
        }

    def now(self) -> datetime:
        return datetime.now(UTC) + self.wrong

    def join(self, name: str, role: Role) -> trust.Identity:
        token = self.authority.issue(name, role, timedelta(hours=1))
        made = self.authority.redeem(token.secret, trust.request(self.folder / name))
        return trust.install(
            self.folder / name, made.public_bytes(Encoding.DER), self.authority.certificate, self.now()
        )

    def serve(self, act: Callable[[Runs, Channels], Coroutine[Any, Any, T]]) -> T:
        """Act with a server that is up, and ``channel(name)`` for each member."""

        async def whole() -> T:
            runs = Runs()
            audit = RefusalLog(self.authority.audit)
            guard = Guard(RULES_HERE, self.authority.denied, on_refused=audit, now=self.now)
            server = grpc.aio.server(interceptors=[guard])
            server.add_generic_rpc_handlers([runs.handler()])
            port = server.add_secure_port("127.0.0.1:0", server_credentials(self.authority))
            await server.start()
            runs.address = f"127.0.0.1:{port}"
            channels: dict[str, grpc.aio.Channel] = {}

            def channel(name: str) -> grpc.aio.Channel:
                if name not in channels:
                    credentials = trust.channel_credentials(self.folder / name)
                    channels[name] = grpc.aio.secure_channel(runs.address, credentials)
                return channels[name]

            try:
                return await act(runs, channel)
            finally:
                await asyncio.gather(*(each.close() for each in channels.values()))
                await server.stop(0)

        return asyncio.run(whole())


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("federation"))


@pytest.fixture
def federation(_shared: Federation) -> Iterator[Federation]:
    """Six members of five roles; nobody is revoked."""
    yield _shared
    _shared.wrong = timedelta()
    _shared.authority.denied.path.write_bytes(b"")


async def call(channel: Any, method: str, request: bytes = b"run-a") -> str:
    """The answer, or the status and what is said."""
    try:
        return bytes(await channel.unary_unary(method)(request, timeout=10)).decode()
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"


async def first(channel: Any, method: str) -> str:
    """How a call to a method of any kind begins."""
    try:
        if method.endswith("Attend"):
            return bytes(await channel.stream_stream(method)(iter([b"x"]), timeout=10).read()).decode()
        if method.endswith("Upload"):
            return bytes(await channel.stream_unary(method)(iter([b"x"]), timeout=10)).decode()
        if method.endswith(("Watch", "Follow", "Careless")):
            stream = channel.unary_stream(method)(b"run-a", timeout=10)
            answer = bytes(await stream.read()).decode()
            stream.cancel()
            return answer
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    return await call(channel, method)


def test_every_role_reaches_what_the_table_gives_it_and_nothing_else(federation: Federation) -> None:
    """The whole matrix; run-a is ada's."""

    async def act(runs: Runs, channel: Channels) -> dict[tuple[str, str], str]:
        for _ in range(100_000):  # a stream that was given up may take some before it knows
            runs.pushes.put_nowait(b"round")
        return {
            (name, method): await first(channel(name), method)
            for name in federation.identities
            for method in RULES_HERE
        }

    for (name, method), answer in federation.serve(act).items():
        role = federation.identities[name].role
        reach = RULES_HERE[method].get(role)
        if reach is None:
            assert answer.startswith(
                f"PERMISSION_DENIED: {role} {name} may not call {method}; it takes one of:"
            )
        elif method.endswith(("Forgetful", "Careless")) and reach is OWN:
            assert answer.startswith("INTERNAL: ")
        elif reach is OWN and name == "bob":
            assert answer.startswith("PERMISSION_DENIED: run run-a belongs to somebody else")
        else:
            assert ": " not in answer, (name, method, answer)


def test_another_ones_run_is_out_of_reach(federation: Federation) -> None:
    async def act(runs: Runs, channel: Channels) -> list[str]:
        return [
            await call(channel(name), "/test.Runs/Stop", run)
            for name, run in (("ada", b"run-a"), ("ada", b"run-b"), ("root", b"run-b"), ("quis", b"run-b"))
        ]

    own, other, admin, auditor = federation.serve(act)
    assert own == "stopped"
    assert other == (
        "PERMISSION_DENIED: run run-b belongs to somebody else, and a researcher reaches its own only"
    )
    assert admin == "stopped"
    assert auditor.startswith("PERMISSION_DENIED: auditor quis may not call /test.Runs/Stop")


def test_the_answer_of_a_handler_that_did_not_ask_whose_object_it_is_is_withheld(
    federation: Federation,
) -> None:
    async def act(runs: Runs, channel: Channels) -> tuple[str, str]:
        return (
            await call(channel("ada"), "/test.Runs/Forgetful"),
            await call(channel("root"), "/test.Runs/Forgetful"),
        )

    researcher, admin = federation.serve(act)
    assert researcher == "INTERNAL: /test.Runs/Forgetful did not ask whose object it touched"
    assert admin == "the secrets of run-a"


def test_a_method_without_a_rule_is_refused_even_to_administrators(federation: Federation) -> None:
    async def act(runs: Runs, channel: Channels) -> list[str]:
        answers = [
            await call(channel("root"), f"/test.Runs/{method}")
            for method in ("Unlisted", "Synchronous", "Absent")
        ]
        assert runs.reached == []
        return answers

    unlisted, synchronous, absent = federation.serve(act)
    assert unlisted == "PERMISSION_DENIED: /test.Runs/Unlisted has no rule, so nobody may call it"
    assert synchronous.startswith("UNIMPLEMENTED")
    assert absent.startswith("UNIMPLEMENTED")


@pytest.mark.parametrize("method", ["Watch", "Follow"])
def test_a_revoked_stream_neither_says_nor_learns_another_word(method: str, federation: Federation) -> None:
    async def act(runs: Runs, channel: Channels) -> tuple[grpc.aio.AioRpcError, grpc.aio.AioRpcError, int]:
        attend = channel("clinic").stream_stream("/test.Runs/Attend")(timeout=20)
        await attend.write(b"one")
        assert await attend.read() == b"one"
        watch = channel("ada").unary_stream(f"/test.Runs/{method}")(b"run-a", timeout=20)
        runs.pushes.put_nowait(b"round 1")
        assert await watch.read() == b"round 1"
        before = len(runs.reached)
        federation.authority.denied.add(
            [federation.identities["clinic"], federation.identities["ada"]], "test", federation.now()
        )
        await attend.write(b"two")
        runs.pushes.put_nowait(b"round 2")
        errors = []
        for stream in (attend, watch):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
            errors.append(caught.value)
        return errors[0], errors[1], len(runs.reached) - before

    said, learned, reached = federation.serve(act)
    assert said.code() is learned.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "agent clinic is revoked" in str(said.details())
    assert reached == 0


def test_a_revoked_stream_on_which_nobody_speaks_is_closed(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "SWEEP", 0.05)

    async def act(runs: Runs, channel: Channels) -> list[str]:
        attend = channel("clinic").stream_stream("/test.Runs/Attend")(timeout=20)
        await attend.write(b"one")
        assert await attend.read() == b"one"
        watches = [
            channel("ada").unary_stream(f"/test.Runs/{method}")(b"run-a", timeout=20)
            for method in ("Follow",)
        ]
        for each in watches:
            runs.pushes.put_nowait(b"round 1")
            assert await each.read() == b"round 1"
        revoked = [federation.identities["clinic"], federation.identities["ada"]]
        federation.authority.denied.add(revoked, "test", federation.now())
        ends = []
        for stream in (attend, *watches):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
            ends.append(f"{caught.value.code().name}: {caught.value.details()}")
        return ends

    said = federation.serve(act)
    assert all(each.startswith("UNAUTHENTICATED") and "is revoked" in each for each in said), said


@pytest.mark.parametrize("method", ["Show", "Watch"])
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "open"])
def test_a_call_whose_message_does_not_come_is_ended(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, method: str, ended: bool
) -> None:
    monkeypatch.setattr(guard, "_SILENCE", 0.05)

    async def act(runs: Runs, channel: Channels) -> str:
        call = channel("ada").stream_stream(f"/test.Runs/{method}")(timeout=600)
        if ended:
            await call.done_writing()
        code = await call.code()
        assert not runs.reached
        return f"{code.name}: {await call.details()}"

    said = federation.serve(act)
    assert said == (
        "INVALID_ARGUMENT: this call has no message"
        if ended
        else "DEADLINE_EXCEEDED: its message did not come within 0.05 s"
    )


def test_whoever_reads_the_deny_list_late_does_not_bring_the_old_one_back(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread has read the list; before it is done, somebody is added and another thread reads that."""
    path, identities = federation.authority.denied.path, federation.identities
    federation.authority.denied.add([identities["olga"]], "before", federation.now())
    read, proceed, turn = threading.Event(), threading.Event(), threading.local()

    def slow(line: str) -> tuple[str, str]:
        if getattr(turn, "late", False):
            read.set()
            assert proceed.wait(600)
        return genuine(line)

    class Halting(DenyList):
        def __setattr__(self, name: str, value: Any) -> None:
            """What the late thread found is put in place between what the other one changes."""
            super().__setattr__(name, value)
            if read.is_set() and not getattr(turn, "late", False) and not proceed.is_set():
                proceed.set()
                late.join()

    genuine = denylist._read
    monkeypatch.setattr(denylist, "_read", slow)
    denied = Halting(path)

    def look() -> None:
        turn.late = True
        denied.reason("0")

    late = threading.Thread(target=look)
    late.start()
    assert read.wait(600)
    denied.add([identities["clinic"]], "stolen", federation.now())
    denied.reason("0")
    late.join()
    assert denied.reason(identities["clinic"].serial) == "stolen"


def test_a_stream_ends_with_its_certificate(federation: Federation) -> None:
    async def act(runs: Runs, channel: Channels) -> grpc.aio.AioRpcError:
        attend = channel("clinic").stream_stream("/test.Runs/Attend")(timeout=20)
        await attend.write(b"one")
        assert await attend.read() == b"one"
        federation.wrong = timedelta(days=7, minutes=1)
        await attend.write(b"two")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await attend.read()
        return caught.value

    error = federation.serve(act)
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "agent clinic expired on" in str(error.details())


def test_a_deny_list_that_cannot_be_read_lets_nobody_in(federation: Federation) -> None:
    path = federation.authority.denied.path

    async def act(runs: Runs, channel: Channels) -> list[str]:
        answers = [await call(channel("root"), "/test.Runs/Show")]
        path.write_text('{"serial": "12", "reason"\n')
        answers.append(await call(channel("root"), "/test.Runs/Show"))
        path.write_text("")
        answers.append(await call(channel("root"), "/test.Runs/Show"))
        path.rename(path.with_suffix(".away"))
        answers.append(await call(channel("root"), "/test.Runs/Show"))
        path.with_suffix(".away").rename(path)
        answers.append(await call(channel("root"), "/test.Runs/Show"))
        return answers

    fine, refused = "admin root", "UNAVAILABLE: the coordinator cannot read its deny-list"
    assert federation.serve(act) == [fine, refused, fine, refused, fine]


def test_refusals_are_logged_without_secrets_and_audited_once_a_minute(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(runs: Runs, channel: Channels) -> None:
        for _ in range(5):
            await call(channel("quis"), "/test.Runs/Stop", b"payload-canary")

    before = federation.authority.audit.verify().number
    with caplog.at_level(logging.WARNING, logger="hansa.trust"):
        federation.serve(act)
    lines = [each.getMessage() for each in caplog.records if each.name == "hansa.trust"]
    assert len(lines) == 5
    for each in (
        "method=/test.Runs/Stop",
        "caller=auditor quis",
        "status=PERMISSION_DENIED",
        "peer=ipv4:127",
    ):
        assert each in lines[0]
    assert "canary" not in caplog.text
    assert "PRIVATE" not in caplog.text
    assert "BEGIN" not in caplog.text
    added = [each for each in federation.authority.audit.records() if each.number > before]
    assert [(each.actor, each.action, each.object) for each in added] == [
        ("auditor quis", "call.refused", "/test.Runs/Stop")
    ]


def test_a_later_audit_record_counts_what_was_left_out(tmp_path: Path) -> None:
    now = [1000.0]
    log = RefusalLog(Audit.create(tmp_path / "audit.jsonl"), lambda: now[0])

    async def act() -> None:
        for second in (0, 1, 2, 59, 61):
            now[0] = 1000.0 + second
            await log("agent x", "/m", "PERMISSION_DENIED", "no")

    asyncio.run(act())
    assert [each.detail["more"] for each in Audit(tmp_path / "audit.jsonl").records()] == [0, 3]


def test_a_certificate_that_names_nobody_is_refused(federation: Federation) -> None:
    """As a later authority, or a careless hand with its key, might make one."""
    key = new_key()
    authority = federation.authority
    made = authority._signed(
        "root",
        x509.SubjectAlternativeName([x509.DNSName("admin.example.org")]),
        ExtendedKeyUsageOID.CLIENT_AUTH,
        key.public_key(),
        federation.now(),
    )
    credentials = grpc.ssl_channel_credentials(
        authority.certificate.public_bytes(Encoding.PEM), key_pem(key), made.public_bytes(Encoding.PEM)
    )

    async def act(runs: Runs, channel: Channels) -> str:
        async with grpc.aio.secure_channel(runs.address, credentials) as stranger:
            return await call(stranger, "/test.Runs/Show")

    answer = federation.serve(act)
    assert answer == "UNAUTHENTICATED: this certificate carries no name and role of a federation's member"


@asynccontextmanager
async def insecure(runs: Runs) -> AsyncIterator[str]:
    server = grpc.aio.server(interceptors=[Guard(RULES_HERE, None, insecure=True)])
    server.add_generic_rpc_handlers([runs.handler()])
    port = insecure_port(server, "127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def test_insecure_mode_believes_whoever_is_on_this_machine(caplog: pytest.LogCaptureFixture) -> None:
    async def act() -> list[str]:
        answers = []
        async with insecure(Runs()) as address, trust.insecure_channel(address) as channel:
            for metadata in (
                (),
                (("hansa-name", "clinic"), ("hansa-role", "agent")),
                (("hansa-role", "emperor"),),
                (("hansa-name", "a b"),),
            ):
                try:
                    show: Any = channel.unary_unary("/test.Runs/Show")
                    answers.append(bytes(await show(b"", timeout=10, metadata=metadata)).decode())
                except grpc.aio.AioRpcError as error:
                    answers.append(error.code().name)
        return answers

    assert asyncio.run(act()) == ["admin loopback", "agent clinic", "UNAUTHENTICATED", "UNAUTHENTICATED"]
    assert "INSECURE mode at 127.0.0.1:" in caplog.text


def test_the_table_speaks_of_every_method_and_of_no_other() -> None:
    """Whoever adds a method to the protocol adds a rule."""
    names = [each.name for each in pkgutil.iter_modules(wire.__path__) if each.name.endswith("_pb2")]
    modules = [importlib.import_module(f"hansa.core.wire.{name}") for name in names]
    files = [each.DESCRIPTOR for each in (*modules, health_pb2, reflection_pb2)]
    assert enrolment_pb2.DESCRIPTOR in files
    without = {"/hansa.v1.Enrolment/Enrol"}  # on its own port, without a certificate
    assert uncovered(RULES, files) == without
    known = methods(files)
    services = {each.rpartition("/")[0] for each in known}
    assert {each for each in RULES if each.rpartition("/")[0] in services} <= known


def test_a_method_without_a_rule_is_found() -> None:
    rules = {name: rule for name, rule in RULES.items() if "Renew" not in name}
    assert uncovered(rules, [enrolment_pb2.DESCRIPTOR]) == {
        "/hansa.v1.Enrolment/Enrol",
        "/hansa.v1.Renewal/Renew",
    }


def test_a_refusal_carries_its_status() -> None:
    refused = Refused(grpc.StatusCode.NOT_FOUND, "no such run")
    assert (refused.code, str(refused)) == (grpc.StatusCode.NOT_FOUND, "no such run")
