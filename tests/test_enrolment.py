"""Joining and renewing over real connections: who gets a certificate, who does not, and what each is told."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import stat
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health  # pyright: ignore[reportAttributeAccessIssue]

from hansa.client.agent import Config
from hansa.client.check import check
from hansa.client.enrolment import Joined, join, renew, renew_if_due
from hansa.core import control, trust
from hansa.core.errors import InputError, TrustError
from hansa.core.trust import BACKDATE, LIFETIME, JoinToken, Role, files
from hansa.core.wire.enrolment_pb2_grpc import add_RenewalServicer_to_server
from hansa.server.trust import (
    RULES,
    Authority,
    Guard,
    Renewal,
    enrolment,
    enrolment_server,
    server_credentials,
)

pytestmark = pytest.mark.usefixtures("no_pickle")

T = TypeVar("T")
DAY = timedelta(days=1)
HOURS = timedelta(hours=1)


@dataclass
class Clock:
    """The real clock, and how wrong it is."""

    wrong: timedelta = field(default_factory=timedelta)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.wrong


@pytest.fixture
def clock() -> Clock:
    """The coordinator's."""
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> Authority:
    return Authority.create(tmp_path / "pki", "harbour", [], clock)


@dataclass
class Coordinator:
    """Both ports of a coordinator."""

    authority: Authority
    enrolment: str
    address: str

    async def join(self, token: JoinToken, folder: Path, **options: Any) -> Joined:
        return await join(token, self.enrolment, folder, **options)

    @asynccontextmanager
    async def channel(self, folder: Path) -> AsyncIterator[grpc.aio.Channel]:
        async with grpc.aio.secure_channel(self.address, trust.channel_credentials(folder)) as made:
            yield made

    async def check(self, folder: Path) -> str:
        """Call the health service; how it went."""
        async with self.channel(folder) as channel:
            try:
                answer = await stub_of(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"
            return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def stub_of(channel: grpc.aio.Channel) -> Any:
    """The health service; its methods have no types."""
    return health_pb2_grpc.HealthStub(channel)


@asynccontextmanager
async def running(authority: Authority) -> AsyncIterator[Coordinator]:
    enrolment, port = enrolment_server(authority, "127.0.0.1:0")
    guard = Guard(RULES, authority.denied, now=authority.now)
    server = grpc.aio.server(interceptors=[guard])
    add_RenewalServicer_to_server(Renewal(authority), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    main = server.add_secure_port("127.0.0.1:0", server_credentials(authority))
    await enrolment.start()
    await server.start()
    try:
        yield Coordinator(authority, f"127.0.0.1:{port}", f"127.0.0.1:{main}")
    finally:
        await asyncio.gather(enrolment.stop(0), server.stop(0))


def with_coordinator(authority: Authority, act: Callable[[Coordinator], Coroutine[Any, Any, T]]) -> T:
    """Start a coordinator, act, stop it."""

    async def whole() -> T:
        async with running(authority) as coordinator:
            return await act(coordinator)

    return asyncio.run(whole())


def token(authority: Authority, name: str = "clinic-3", role: Role = Role.AGENT) -> JoinToken:
    return authority.issue(name, role, 24 * HOURS)


def actions(authority: Authority) -> list[str]:
    return [record.action for record in authority.audit.records()]


def test_a_token_becomes_a_certificate_that_the_coordinator_accepts(
    authority: Authority, tmp_path: Path
) -> None:
    folder = tmp_path / "clinic"

    async def act(coordinator: Coordinator) -> tuple[Joined, str]:
        made = await coordinator.join(JoinToken.parse(str(token(authority))), folder)
        return made, await coordinator.check(folder)

    made, answer = with_coordinator(authority, act)
    assert (made.identity.name, made.identity.role) == ("clinic-3", Role.AGENT)
    assert answer == "SERVING"
    assert made.identity.not_after - made.identity.not_before == LIFETIME + BACKDATE
    assert actions(authority) == [
        "authority.create",
        "coordinator.renew",
        "token.issue",
        "certificate.issue",
    ]
    assert authority.audit.verify().number == 4
    assert not authority.open_tokens()


def test_the_private_key_stays_where_it_was_made(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "clinic"
    given = token(authority)
    with_coordinator(authority, lambda coordinator: coordinator.join(given, folder))
    assert sorted(each.name for each in folder.iterdir()) == [".lock", "authority.pem", "identity.pem"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "identity.pem").stat().st_mode) == 0o600
    key = serialization.load_pem_private_key((folder / "identity.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    number = key.private_numbers().private_value.to_bytes(32, "big")
    for path in authority.folder.iterdir():
        held = path.read_bytes()
        assert number not in held, path
        assert given.secret not in held, path
        if path.name not in ("authority.key", "coordinator.pem"):
            assert b"PRIVATE KEY" not in held, path
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path.name == "authority.pem", path


def test_a_token_is_used_once(authority: Authority, tmp_path: Path) -> None:
    given = token(authority)

    async def act(coordinator: Coordinator) -> None:
        await coordinator.join(given, tmp_path / "one")
        with pytest.raises(TrustError, match=r"used on .* for another key; .* revoke clinic-3"):
            await coordinator.join(given, tmp_path / "two")

    with_coordinator(authority, act)
    assert not (tmp_path / "two/identity.pem").exists()


def test_a_token_used_by_many_at_once_makes_one_certificate(authority: Authority, tmp_path: Path) -> None:
    given = token(authority)

    async def act(coordinator: Coordinator) -> list[Joined | BaseException]:
        return await asyncio.gather(
            *(coordinator.join(given, tmp_path / str(n)) for n in range(8)), return_exceptions=True
        )

    outcomes = with_coordinator(authority, act)
    assert sum(isinstance(each, Joined) for each in outcomes) == 1
    assert sum(isinstance(each, TrustError) for each in outcomes) == 7
    assert len(authority.members()) == 1


def test_a_lost_answer_is_asked_for_again(authority: Authority, tmp_path: Path) -> None:
    folder, given = tmp_path / "clinic", token(authority)
    first = authority.redeem(given.secret, trust.request(folder))  # and the answer never came
    made = with_coordinator(authority, lambda coordinator: coordinator.join(given, folder))
    assert made.identity.serial == f"{first.serial_number:x}"
    assert len(authority.members()) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param("expired", r"expired on \d{4}-.* UTC; ask for a new one", id="expired"),
        pytest.param("unknown", "unknown or void here", id="unknown"),
        pytest.param("replaced", "unknown or void here", id="replaced"),
        pytest.param("revoked", "unknown or void here", id="revoked"),
    ],
)
def test_a_token_that_is_not_open_is_refused(
    wrong: str, message: str, authority: Authority, clock: Clock, tmp_path: Path
) -> None:
    given = token(authority)
    if wrong == "expired":
        clock.wrong = 25 * HOURS
    elif wrong == "unknown":
        given = JoinToken.new(authority.certificate)
    elif wrong == "replaced":
        token(authority)
    else:
        assert authority.revoke("clinic-3", "ordered by mistake") == []

    async def act(coordinator: Coordinator) -> None:
        with pytest.raises(TrustError, match=message):
            await coordinator.join(given, tmp_path / "clinic")

    with_coordinator(authority, act)
    assert not authority.members()


def test_calls_that_say_nothing_do_not_keep_the_port_of_joining(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody without a token opens as many as there may be; connections are soon old here."""
    soon = [(name, 500 if "connection_age" in name else value) for name, value in enrolment._OPTIONS]
    monkeypatch.setattr(enrolment, "_OPTIONS", soon)

    async def act(coordinator: Coordinator) -> Joined:
        credentials = trust.first_contact_credentials(authority.certificate)
        async with grpc.aio.secure_channel(coordinator.enrolment, credentials) as channel:
            method: Any = channel.stream_stream("/hansa.v1.Enrolment/Enrol")
            calls = [method() for _ in range(20)]
            assert len({await each.code() for each in calls} - {grpc.StatusCode.OK}) > 0
        token = authority.issue("clinic-3", Role.AGENT, HOURS)
        return await coordinator.join(token, tmp_path / "clinic")

    assert with_coordinator(authority, act).identity.name == "clinic-3"


def test_a_coordinator_of_another_authority_never_sees_the_token(
    authority: Authority, tmp_path: Path
) -> None:
    impostor = Authority.create(tmp_path / "impostor", "harbour", [])
    seen: list[bytes] = []
    impostor.redeem = lambda secret, _: seen.append(secret)  # type: ignore[assignment, method-assign, return-value]

    async def act(coordinator: Coordinator) -> None:
        with pytest.raises(TrustError, match="not certified by this federation's authority"):
            await coordinator.join(token(authority), tmp_path / "clinic")

    with_coordinator(impostor, act)
    assert not seen


def test_a_member_cannot_pose_as_the_coordinator(authority: Authority, tmp_path: Path) -> None:
    held = member(authority, tmp_path / "clinic")

    async def act() -> None:
        server = grpc.aio.server()
        port = server.add_secure_port(
            "127.0.0.1:0", grpc.ssl_server_credentials([(held.key, held.certificate)])
        )
        await server.start()
        try:
            with pytest.raises(TrustError, match="not certified by this federation's authority"):
                await join(token(authority, "clinic-4"), f"127.0.0.1:{port}", tmp_path / "other")
        finally:
            await server.stop(0)

    asyncio.run(act())


def member(authority: Authority, folder: Path, name: str = "clinic-3", role: Role = Role.AGENT) -> trust.Held:
    """A folder with a certificate, without a connection; as the authority's clock has it."""
    made = authority.redeem(token(authority, name, role).secret, trust.request(folder))
    now = authority.now()
    trust.install(folder, made.public_bytes(serialization.Encoding.DER), authority.certificate, now)
    return trust.load(folder, now)


def test_a_certificate_of_another_federation_is_refused_in_the_handshake(
    authority: Authority, tmp_path: Path
) -> None:
    foreign = Authority.create(tmp_path / "foreign", "harbour", [])
    member(foreign, tmp_path / "stranger")
    # The stranger knows the right authority, and holds a certificate of the wrong one.
    pem = authority.certificate.public_bytes(serialization.Encoding.PEM)

    async def act(coordinator: Coordinator) -> tuple[str, str | None]:
        held = trust.load(tmp_path / "stranger")
        credentials = grpc.ssl_channel_credentials(pem, held.key, held.certificate)
        async with grpc.aio.secure_channel(coordinator.address, credentials) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub_of(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        why = await asyncio.to_thread(
            trust.explain, coordinator.address, authority.certificate, tmp_path / "stranger"
        )
        return caught.value.code().name, why

    code, why = with_coordinator(authority, act)
    assert code == "UNAVAILABLE"
    assert why is not None
    assert "another federation" in why


def test_people_and_agents_are_told_why_a_coordinator_is_not_theirs(
    authority: Authority, tmp_path: Path
) -> None:
    foreign = Authority.create(tmp_path / "foreign", "harbour", [])
    folder = tmp_path / "stranger"
    member(foreign, folder)

    def submitter(address: str) -> str:
        with (
            control.Coordinator(address, folder, patience=1.0) as remote,
            pytest.raises(TrustError) as caught,
        ):
            remote.list()
        return str(caught.value)

    def agent(address: str) -> str:
        state = tmp_path / "state"
        config = Config(name="a", clients=(0,), coordinator=address, identity=folder, state=state)
        return dict(check(config))["coordinator"] or ""

    async def act(coordinator: Coordinator) -> list[str]:
        return [await asyncio.to_thread(who, coordinator.address) for who in (submitter, agent)]

    for why in with_coordinator(authority, act):
        assert "what answers there was not certified by this federation's authority" in why


def test_no_certificate_and_no_tls_are_refused_in_the_handshake(authority: Authority) -> None:
    async def act(coordinator: Coordinator) -> list[str]:
        codes = []
        for channel in (
            grpc.aio.insecure_channel(coordinator.address),
            grpc.aio.secure_channel(
                coordinator.address, trust.first_contact_credentials(authority.certificate)
            ),
        ):
            async with channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub_of(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
                codes.append(caught.value.code().name)
        return codes

    assert with_coordinator(authority, act) == ["UNAVAILABLE", "UNAVAILABLE"]


def test_revoking_takes_effect_on_the_next_call_of_an_open_connection(
    authority: Authority, tmp_path: Path
) -> None:
    folder = tmp_path / "clinic"
    member(authority, folder)
    member(authority, tmp_path / "other", "clinic-4")
    # The administrator's command is another process with its own view of the files.
    administrator = Authority(authority.folder)

    async def act(coordinator: Coordinator) -> tuple[str, str, str]:
        async with coordinator.channel(folder) as channel:
            stub = stub_of(channel)
            before = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            administrator.revoke("clinic-3", "laptop stolen")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            with pytest.raises(TrustError, match="is revoked"):
                await renew(folder, channel, coordinator.address)
        assert before.status == health_pb2.HealthCheckResponse.SERVING
        return (
            caught.value.code().name,
            str(caught.value.details()),
            await coordinator.check(tmp_path / "other"),
        )

    code, details, other = with_coordinator(authority, act)
    assert code == "UNAUTHENTICATED"
    assert "agent clinic-3 is revoked" in details
    assert "stolen" not in details  # the reason is the administrator's
    assert other == "SERVING"


def test_renewal_makes_a_new_key_and_the_old_certificate_goes_on(
    authority: Authority, tmp_path: Path
) -> None:
    folder = tmp_path / "clinic"
    before = member(authority, folder)

    async def act(coordinator: Coordinator) -> tuple[str, str]:
        async with coordinator.channel(folder) as channel:
            assert await renew_if_due(folder, channel, coordinator.address) is None
            due = Clock(LIFETIME / 2 + HOURS)
            made = await renew_if_due(folder, channel, coordinator.address, due)
            assert made is not None
            assert made.identity.name == "clinic-3"
            old = await stub_of(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert old.status == health_pb2.HealthCheckResponse.SERVING
        return made.identity.serial, await coordinator.check(folder)

    serial, answer = with_coordinator(authority, act)
    after = trust.load(folder)
    assert after.identity.serial == serial != before.identity.serial
    assert after.key != before.key
    assert answer == "SERVING"


def test_a_certificate_renewed_by_two_keys_shows_a_theft(authority: Authority, tmp_path: Path) -> None:
    holder = member(authority, tmp_path / "clinic").identity
    thief = authority.renew(holder, trust.request(tmp_path / "thief"))
    again = authority.renew(holder, trust.request(tmp_path / "thief"))
    assert again.serial_number == thief.serial_number  # a repeated request, not a second certificate
    with pytest.raises(TrustError, match=r"two machines use it, or its key was stolen; .* revoke clinic-3"):
        authority.renew(holder, trust.request(tmp_path / "clinic"))
    for _ in range(3):  # whoever holds it may ask for ever, and fills no log
        with pytest.raises(TrustError, match="was renewed already"):
            authority.renew(holder, trust.request(tmp_path / "clinic"))
    assert actions(authority)[-1] == "certificate.renewed-twice"
    assert actions(authority).count("certificate.renewed-twice") == 1
    revoked = authority.revoke("clinic-3", "stolen")
    assert {each.serial for each in revoked} == {holder.serial, f"{thief.serial_number:x}"}


def test_whoever_is_put_out_while_a_renewal_waits_gets_none(authority: Authority, tmp_path: Path) -> None:
    """The call was let in before; the registry is whose turn it is."""
    holder = member(authority, tmp_path / "clinic").identity
    authority.revoke("clinic-3", "stolen")
    with pytest.raises(TrustError, match=f"certificate {holder.serial} of .* is revoked"):
        authority.renew(holder, trust.request(tmp_path / "again"))
    assert actions(authority)[-1] == "certificate.revoke"


def test_an_expired_certificate_is_refused_on_both_sides(
    authority: Authority, clock: Clock, tmp_path: Path
) -> None:
    folder = tmp_path / "clinic"
    clock.wrong = -LIFETIME + HOURS  # what was made then expires in an hour
    member(authority, folder)
    authority.renew_coordinator([])
    clock.wrong = timedelta()

    async def act(coordinator: Coordinator) -> tuple[str, str]:
        async with coordinator.channel(folder) as channel:
            stub = stub_of(channel)
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            clock.wrong = 2 * HOURS  # the connection outlives the certificate
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        return caught.value.code().name, str(caught.value.details())

    code, details = with_coordinator(authority, act)
    assert code == "UNAUTHENTICATED"
    assert "agent clinic-3 expired on" in details
    with pytest.raises(TrustError, match=r"expired on .*; ask for a new join token"):
        trust.channel_credentials(folder, clock())


def test_an_expired_certificate_is_refused_in_the_handshake(
    authority: Authority, clock: Clock, tmp_path: Path
) -> None:
    folder = tmp_path / "clinic"
    clock.wrong = -LIFETIME - HOURS
    held = member(authority, folder)
    clock.wrong = timedelta()
    authority.renew_coordinator([])

    async def act(coordinator: Coordinator) -> tuple[str, str | None]:
        credentials = grpc.ssl_channel_credentials(held.authority, held.key, held.certificate)
        async with grpc.aio.secure_channel(coordinator.address, credentials) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub_of(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        why = await asyncio.to_thread(trust.explain, coordinator.address, authority.certificate, folder)
        return caught.value.code().name, why

    code, why = with_coordinator(authority, act)
    assert code == "UNAVAILABLE"
    assert why is not None
    assert "it has expired by the coordinator's clock" in why


@pytest.mark.parametrize("wrong", [-DAY, DAY], ids=["behind", "ahead"])
def test_clocks_a_day_apart_are_borne_and_told(
    wrong: timedelta, authority: Authority, clock: Clock, tmp_path: Path
) -> None:
    folder = tmp_path / "clinic"
    clock.wrong = wrong
    authority.renew_coordinator([])

    async def act(coordinator: Coordinator) -> tuple[Joined, str]:
        made = await coordinator.join(token(authority), folder)
        return made, await coordinator.check(folder)

    made, answer = with_coordinator(authority, act)
    assert answer == "SERVING"
    assert abs(made.skew + wrong) < timedelta(minutes=5)
    assert made.warning is not None
    assert ("behind" if wrong > timedelta(0) else "ahead of") in made.warning


def test_clocks_further_apart_are_named_as_the_cause(
    authority: Authority, clock: Clock, tmp_path: Path
) -> None:
    clock.wrong = 2 * DAY
    authority.renew_coordinator([])

    async def act(coordinator: Coordinator) -> None:
        with pytest.raises(
            TrustError, match=r"certificate holds from .* and the clock here says .*set the clock"
        ):
            await coordinator.join(token(authority), tmp_path / "clinic")

    with_coordinator(authority, act)


def test_the_coordinator_renews_its_own_certificate_between_two_handshakes(
    authority: Authority, clock: Clock, tmp_path: Path
) -> None:
    member(authority, tmp_path / "clinic")
    clock.wrong = -LIFETIME / 2 - HOURS
    authority.renew_coordinator([])

    def shown(address: str) -> x509.Certificate:
        import ssl

        host, port = address.rsplit(":", 1)
        return x509.load_pem_x509_certificate(ssl.get_server_certificate((host, int(port))).encode())

    async def act(coordinator: Coordinator) -> tuple[x509.Certificate, x509.Certificate, str]:
        before = await asyncio.to_thread(shown, coordinator.enrolment)
        clock.wrong = timedelta()
        after = await asyncio.to_thread(shown, coordinator.enrolment)
        return before, after, await coordinator.check(tmp_path / "clinic")

    before, after, answer = with_coordinator(authority, act)
    assert after.serial_number != before.serial_number
    assert after.not_valid_after_utc - before.not_valid_after_utc >= LIFETIME / 2
    assert answer == "SERVING"


def test_the_coordinator_renewed_without_a_name_keeps_those_it_has(
    authority: Authority, tmp_path: Path
) -> None:
    def names() -> set[Any]:
        held = x509.load_pem_x509_certificate(authority.coordinator()[1])
        return set(held.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)

    authority.renew_coordinator(["fl.example.org"])
    before = names()
    authority.renew_coordinator([])
    assert names() == before
    assert x509.DNSName("fl.example.org") in before
    authority.renew_coordinator(["other.example.org"])
    assert x509.DNSName("fl.example.org") not in names()


def test_handshakes_get_another_certificate_only_when_there_is_one(
    authority: Authority, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one each time, be it the same, is exchanged under other handshakes and ends the process."""
    asked: list[Callable[[], object]] = []

    def noting(first: object, fetch: Callable[[], object], **options: object) -> None:
        asked.append(fetch)

    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", noting)
    server_credentials(authority)
    assert [asked[0]() for _ in range(3)] == [None, None, None]
    clock.wrong = LIFETIME / 2 + HOURS
    assert asked[0]() is not None
    assert asked[0]() is None


def _signed_by(key: Any, digest: Any) -> bytes:
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, digest)
    return made.public_bytes(serialization.Encoding.DER)


def _forged() -> bytes:
    made = bytearray(_signed_by(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()))
    made[-1] ^= 1
    return bytes(made)


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(lambda: b"", id="empty"),
        pytest.param(lambda: b"\x30" * 5000, id="oversize"),
        pytest.param(_forged, id="not-its-own-signature"),
        pytest.param(lambda: _signed_by(ed25519.Ed25519PrivateKey.generate(), None), id="ed25519"),
        pytest.param(lambda: _signed_by(rsa.generate_private_key(65537, 2048), hashes.SHA256()), id="rsa"),
        pytest.param(
            lambda: _signed_by(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()), id="other-curve"
        ),
    ],
)
def test_a_bad_request_is_refused_and_leaves_the_token_open(
    request_bytes: Callable[[], bytes], authority: Authority
) -> None:
    given = token(authority)
    with pytest.raises(InputError, match="PKCS #10"):
        authority.redeem(given.secret, request_bytes())
    assert [each.name for each in authority.open_tokens()] == ["clinic-3"]


def test_what_a_request_says_of_its_sender_is_not_read(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")]))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("hansa:admin/root")]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    made = authority.redeem(token(authority).secret, request.public_bytes(serialization.Encoding.DER))
    identity = trust.Identity.of(made)
    assert (identity.name, identity.role) == ("clinic-3", Role.AGENT)
    assert made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_a_name_has_one_holder(authority: Authority, tmp_path: Path) -> None:
    member(authority, tmp_path / "clinic")
    with pytest.raises(InputError, match=r"holds a certificate until .*revoke clinic-3"):
        authority.issue("clinic-3", Role.ADMIN, HOURS)
    authority.revoke("clinic-3", "replaced")
    authority.issue("clinic-3", Role.AGENT, HOURS)
    with pytest.raises(InputError, match="nothing that holds"):
        authority.revoke("clinic-9", "")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\nb", "-x", "x" * 64, "ключ", "a b"])
def test_names_are_for_certificates_logs_and_paths(name: str, authority: Authority) -> None:
    with pytest.raises(InputError, match="no name of a machine"):
        authority.issue(name, Role.AGENT, HOURS)


def test_a_token_cut_when_copied_is_refused_without_showing_it(authority: Authority) -> None:
    whole = str(token(authority))
    assert str(JoinToken.parse(f"  {whole}\n")) == whole
    for cut in (whole[:-1], whole[:50], whole[5:], whole.replace("1", "2", 1), "", whole + "."):
        with pytest.raises(InputError, match="no join token, or was cut") as caught:
            JoinToken.parse(cut)
        assert whole[13:30] not in str(caught.value)
    assert whole[13:30] not in repr(JoinToken.parse(whole))


@pytest.mark.parametrize("name", ["authority.key", "coordinator.pem"])
def test_a_key_that_others_can_read_is_not_used(name: str, authority: Authority) -> None:
    path = authority.folder / name
    path.chmod(0o640)
    with pytest.raises(TrustError, match=r"others may read this key \(mode 640\); chmod 600"):
        Authority(authority.folder).coordinator()


def test_a_folder_that_others_can_write_is_not_used(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "clinic"
    member(authority, folder)
    folder.chmod(0o777)
    with pytest.raises(TrustError, match="chmod 700"):
        trust.channel_credentials(folder)
    folder.chmod(0o700)
    (folder / "identity.pem").chmod(0o604)
    with pytest.raises(TrustError, match="chmod 600"):
        trust.channel_credentials(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_of_another_user_is_not_used(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "clinic"
    member(authority, folder)
    os.chown(folder / "identity.pem", 12345, -1)
    with pytest.raises(TrustError, match="belongs to user 12345"):
        trust.channel_credentials(folder)


def test_whoever_reads_while_a_certificate_is_renewed_has_key_and_certificate_of_one(
    authority: Authority, tmp_path: Path
) -> None:
    folder = tmp_path / "clinic"
    path, old = folder / "identity.pem", member(authority, folder).identity
    pairs = [path.read_bytes()]
    made = authority.renew(old, trust.request(folder))
    der = made.public_bytes(serialization.Encoding.DER)
    trust.install(folder, der, authority.certificate, authority.now())
    pairs.append(path.read_bytes())
    seen: list[str] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            held = trust.load(folder)
            key = serialization.load_pem_private_key(held.key, None)
            assert x509.load_pem_x509_certificate(held.certificate).public_key() == key.public_key()
            seen.append(held.identity.serial)

    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read)
        try:
            for i in range(500):  # as `install` does
                files.replace(path, pairs[i % 2], files.PRIVATE)
        finally:
            over.set()
        reading.result()
    assert len(set(seen)) == 2


def test_key_certificate_and_authority_must_belong_together(authority: Authority, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    member(authority, one, "clinic-1")
    foreign = Authority.create(tmp_path / "foreign", "other", [])
    member(foreign, two)
    for name in ("authority.pem", "identity.pem"):
        kept = (one / name).read_bytes()
        (one / name).write_bytes((two / name).read_bytes())
        with pytest.raises(TrustError, match="do not belong together"):
            trust.channel_credentials(one)
        (one / name).write_bytes(kept)
    assert trust.load(one).identity.name == "clinic-1"


def test_a_second_federation_is_not_founded_over_the_first(authority: Authority) -> None:
    kept = (authority.folder / "authority.key").read_bytes()
    with pytest.raises(TrustError, match="not empty, and nothing in it is overwritten"):
        Authority.create(authority.folder, "again", [])
    assert (authority.folder / "authority.key").read_bytes() == kept


def test_joining_a_folder_that_is_a_member_is_refused(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "clinic"
    member(authority, folder)

    async def act(coordinator: Coordinator) -> None:
        with pytest.raises(InputError, match="holds a certificate of agent clinic-3"):
            await coordinator.join(token(authority, "clinic-4"), folder)

    with_coordinator(authority, act)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.5:50051", "fl.example.org:443", "8443"])
def test_insecure_mode_is_for_loopback_only(address: str) -> None:
    with pytest.raises(InputError):
        trust.check_loopback("address", address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:50051", "unix:/run/hansa.sock"])
def test_insecure_mode_says_so(address: str, caplog: pytest.LogCaptureFixture) -> None:
    trust.check_loopback("address", address)
    assert "INSECURE" in caplog.text


def test_nothing_answers(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="no connection"):
        asyncio.run(join(token(authority), "127.0.0.1:1", tmp_path / "clinic"))


def test_life_times() -> None:
    assert dt.timedelta(days=7) == LIFETIME
    assert BACKDATE > DAY
