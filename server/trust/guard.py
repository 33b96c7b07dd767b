"""Every call passes here: who is it, does the certificate still hold, is it revoked, may this role do this.

A stream is checked at its start, at every message that comes in and before every message that goes out: a
revoked certificate neither learns nor says another word over a connection that was made before. One on which
nobody says anything is looked at every few seconds, and closed. A handler
cannot be reached around the guard: a method without a rule is refused, and the answer of a handler that was
to ask whose object it touches, and did not, is not sent.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NoReturn

import grpc
from cryptography import x509

from hansa.core.errors import InputError, TrustError
from hansa.core.roles import Role
from hansa.core.trust.identity import Identity, checked_name, shown, utcnow
from hansa.server.trust.audit import Audit
from hansa.server.trust.denylist import DenyList
from hansa.server.trust.rules import Reach, Rules

_log = logging.getLogger("hansa.trust")
_LOOPBACK = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")
_EPOCH, _FOREVER = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
SWEEP = 2.0
"""Seconds between two looks at the certificates of all calls that are open."""
_SILENCE = 30.0  # seconds until the message of a call that has one is there
NAME_KEY, ROLE_KEY = "hansa-name", "hansa-role"

Unauthenticated, Forbidden = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED


class Refused(Exception):
    """A call ends here, with a status and a sentence for the caller. Handlers may raise it, too."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass
class Caller:
    """Who makes the call that is being handled.

    Parameters
    ----------
    identity:
        As the certificate says.
    method:
        What is called.
    reach:
        Whose objects this role may touch with this method.
    """

    identity: Identity
    method: str
    reach: Reach
    _asked: bool = field(default=False, repr=False)

    def owns(self, owner: str, what: str) -> None:
        """Go on only if the caller may touch this object.

        Parameters
        ----------
        owner:
            Name of whom it belongs to.
        what:
            How to call it in the refusal (``run 20261121-093000-study-k3f``).

        Raises
        ------
        Refused
            With PERMISSION_DENIED, when it is somebody else's.
        """
        self._asked = True
        if self.reach is Reach.OWN and owner != self.identity.name:
            raise Refused(
                Forbidden, f"{what} belongs to somebody else, and a {self.identity.role} reaches its own only"
            )

    def may_see(self, owner: str) -> bool:
        """Whether an object belongs in a list for this caller."""
        self._asked = True
        return self.reach is Reach.ALL or owner == self.identity.name

    def _settled(self) -> None:
        if self.reach is Reach.OWN and not self._asked:
            raise Refused(grpc.StatusCode.INTERNAL, f"{self.method} did not ask whose object it touched")


_CALLER: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Who makes the call that is being handled; within a handler that a guard protects."""
    return _CALLER.get()


Refusal = Callable[[str, str, str, str], Awaitable[None]]


class Guard(grpc.aio.ServerInterceptor):
    """The interceptor of a mutually authenticated server.

    Parameters
    ----------
    rules:
        Who may call what.
    denied:
        Certificates that are refused.
    on_refused:
        Told of a refusal: who, method, status, reason; for the audit log.
    insecure:
        There is no TLS, every caller is on this machine, and is believed: who it says it is in the metadata
        (``hansa-name``, ``hansa-role``), by default in a role that may do this.
    now:
        The clock.
    most:
        Calls of one caller at a time, streams included: who holds calls open leaves room for the others.
    """

    def __init__(
        self,
        rules: Rules,
        denied: DenyList | None,
        *,
        on_refused: Refusal | None = None,
        insecure: bool = False,
        now: Callable[[], datetime] = utcnow,
        most: int = 500,
    ) -> None:
        self._rules, self._denied, self._now, self._on_refused = rules, denied, now, on_refused
        self._insecure, self._most = insecure, most
        self._held: Counter[str] = Counter()  # name -> calls
        self._open: dict[asyncio.Task[Any], Identity] = {}
        self._ended: dict[asyncio.Task[Any], Refused] = {}
        self._sweeper: asyncio.Task[None] | None = None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Put the checks around the handler of a call."""
        handler = await continuation(handler_call_details)
        return None if handler is None else self._guarded(str(handler_call_details.method), handler)

    def _guarded(self, method: str, handler: Any) -> Any:
        after = _arity(handler.response_streaming)
        inner = getattr(handler, f"{_arity(handler.request_streaming)}_{after}")

        # Taken as a stream, every call counts from when it is opened, whether it ever says something or not.
        async def once(requests: Any, context: Any) -> Any:
            made: Caller | None = None
            try:
                made = self._admit(method, context)
                with self._swept(made):
                    messages = self._watched(requests, made)
                    request = messages if handler.request_streaming else await _only(messages)
                    answer = await inner(request, _Watched(context, made, self._still))
                made._settled()
                return answer
            except Refused as refused:
                await self._refuse(made, method, refused, context)

        async def many(requests: Any, context: Any) -> AsyncIterator[Any]:
            made: Caller | None = None
            try:
                made = self._admit(method, context)
                with self._swept(made):
                    messages = self._watched(requests, made)
                    request = messages if handler.request_streaming else await _only(messages)
                    async for answer in inner(request, _Watched(context, made, self._still)):
                        made._settled()
                        self._still(made.identity)
                        yield answer
            except Refused as refused:
                await self._refuse(made, method, refused, context)

        if not inspect.isasyncgenfunction(inner) and not inspect.iscoroutinefunction(inner):
            return None  # the stub's own body, where a servicer leaves a method out: UNIMPLEMENTED
        outer = many if inspect.isasyncgenfunction(inner) else once
        make = getattr(grpc, f"stream_{after}_rpc_method_handler")
        return make(outer, _careful(handler.request_deserializer), handler.response_serializer)

    def _admit(self, method: str, context: Any) -> Caller:
        """Who is calling, if they may.

        Raises
        ------
        Refused
            When they may not.
        """
        rule = self._rules.get(method)
        identity = _told(context, rule or {}) if self._insecure else _shown(context)
        self._still(identity)
        if rule is None:
            raise Refused(Forbidden, f"{method} has no rule, so nobody may call it")
        if identity.role not in rule:
            may = ", ".join(rule)
            raise Refused(Forbidden, f"{identity} may not call {method}; it takes one of: {may}")
        made = Caller(identity=identity, method=method, reach=rule[identity.role])
        _CALLER.set(made)
        return made

    def _still(self, identity: Identity) -> None:
        """Whether a certificate still holds; TLS looked at the beginning of the connection only."""
        now = self._now()
        if now > identity.not_after:
            raise Refused(
                Unauthenticated,
                f"the certificate of {identity} expired on {shown(identity.not_after)}, and the "
                f"coordinator's clock says {shown(now)}; join with a new token",
            )
        if now < identity.not_before:
            raise Refused(
                Unauthenticated,
                f"the certificate of {identity} holds from {shown(identity.not_before)} on, and the "
                f"coordinator's clock says {shown(now)}: that clock went back by more than a day",
            )
        if self._denied is None:
            return
        try:
            reason = self._denied.reason(identity.serial)
        except TrustError as error:
            _log.error("%s", error)
            raise Refused(grpc.StatusCode.UNAVAILABLE, "the coordinator cannot read its deny-list") from None
        if reason is not None:
            raise Refused(Unauthenticated, f"certificate {identity.serial} of {identity} is revoked")

    @contextmanager
    def _swept(self, made: Caller) -> Iterator[None]:
        """While a call is handled, it counts; its certificate is looked at every :data:`SWEEP` seconds."""
        task, name = asyncio.current_task(), made.identity.name
        assert task is not None
        if self._held[name] >= self._most:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._most} calls of {made.identity} are open, and no more may be at a time; end some",
            )
        self._held[name] += 1
        self._open[task] = made.identity
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep(), name="sweep")
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._ended:
                raise
            task.uncancel()
            raise self._ended[task] from None
        finally:
            self._open.pop(task, None)
            self._ended.pop(task, None)
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]

    async def _sweep(self) -> None:
        while self._open:
            await asyncio.sleep(SWEEP)
            for task, identity in list(self._open.items()):
                try:
                    self._still(identity)
                except Refused as refused:
                    if task not in self._ended:
                        self._ended[task] = refused
                        task.cancel()

    async def _watched(self, messages: AsyncIterator[Any], made: Caller) -> AsyncIterator[Any]:
        async for message in messages:
            self._still(made.identity)
            yield _legible(message)

    async def _refuse(self, made: Caller | None, method: str, refused: Refused, context: Any) -> NoReturn:
        who = str(made.identity) if made is not None else _name(context)
        _log.warning(
            "refused method=%s caller=%s peer=%s status=%s reason=%r",
            method,
            who,
            context.peer(),
            refused.code.name,
            refused.reason,
        )
        if self._on_refused is not None:
            await self._on_refused(who, method, refused.code.name, refused.reason)
        await context.abort(refused.code, refused.reason)
        raise AssertionError("abort returned")


class _Watched:
    """The context of a call, whose messages are checked like those of an iterator."""

    def __init__(self, context: Any, made: Caller, still: Callable[[Identity], None]) -> None:
        self._context, self._made, self._still = context, made, still

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        message = await self._context.read()
        self._still(self._made.identity)
        return _legible(message)

    async def write(self, message: Any) -> None:
        self._made._settled()
        self._still(self._made.identity)
        await self._context.write(message)


_GARBLED = object()


def _careful(deserialise: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """So that bytes which are no message are refused like anything else, with a status of their own."""
    if deserialise is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialise(data)
        except Exception:  # whatever the parser raises
            return _GARBLED

    return read


def _legible(message: Any) -> Any:
    if message is _GARBLED:
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "these bytes are no message of this protocol")
    return message


async def _only(messages: AsyncIterator[Any]) -> Any:
    """The message of a call that has one."""
    try:
        async with asyncio.timeout(_SILENCE):
            async for message in messages:
                return message
    except TimeoutError:
        why = f"its message did not come within {_SILENCE:g} s"
        raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, why) from None
    raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "this call has no message")


def _told(context: Any, rule: Mapping[Role, Reach]) -> Identity:
    """Insecure mode: whoever the caller says it is."""
    if not str(context.peer()).startswith(_LOOPBACK):
        raise Refused(Unauthenticated, "insecure mode is for loopback only")
    said = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
    default = Role.ADMIN if Role.ADMIN in rule else next(iter(rule), Role.ADMIN)
    try:
        name, role = checked_name(said.get(NAME_KEY, "loopback")), Role(said.get(ROLE_KEY, default))
    except (InputError, ValueError):
        raise Refused(Unauthenticated, f"{NAME_KEY} and {ROLE_KEY} name nobody") from None
    return Identity(name=name, role=role, serial="", not_before=_EPOCH, not_after=_FOREVER)


def _shown(context: Any) -> Identity:
    """Who the caller is by the certificate that it showed."""
    certificates = tuple(context.auth_context().get("x509_pem_cert", ()))
    if len(certificates) != 1:
        raise Refused(Unauthenticated, "this call carries no certificate")
    try:
        return _read(bytes(certificates[0]))
    except (TrustError, ValueError) as error:
        raise Refused(Unauthenticated, str(error)) from None


@lru_cache(maxsize=4096)
def _read(pem: bytes) -> Identity:
    return Identity.of(x509.load_pem_x509_certificate(pem))


def _name(context: Any) -> str:
    """For the log."""
    try:
        return str(_shown(context))
    except Refused:
        return "nobody"


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


class RefusalLog:
    """Refusals for the audit log: one record a minute for a caller, method and status, with their number.

    A record costs two fsyncs; a caller that is refused a thousand times a second must not fill the disk.

    Parameters
    ----------
    audit:
        Where records go.
    clock:
        Seconds, monotonic.
    """

    _WINDOW = 60.0
    _KEYS = 4096

    def __init__(self, audit: Audit, clock: Callable[[], float] = time.monotonic) -> None:
        self._audit, self._clock = audit, clock
        self._seen: dict[tuple[str, str, str], tuple[float, int]] = {}

    async def __call__(self, who: str, method: str, status: str, reason: str) -> None:
        """Note a refusal."""
        key, now = (who, method, status), self._clock()
        last, before = self._seen.pop(key, (-self._WINDOW, 0))
        if now - last < self._WINDOW:
            self._seen[key] = (last, before + 1)
            return
        if len(self._seen) >= self._KEYS:
            self._seen.pop(next(iter(self._seen)))
        self._seen[key] = (now, 0)
        detail = {"status": status, "reason": reason, "more": before}
        try:
            await asyncio.to_thread(self._audit.append, who, "call.refused", method, detail)
        except (TrustError, OSError) as error:
            _log.error("audit: %s", error)
