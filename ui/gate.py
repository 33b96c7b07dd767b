"""The gate of an exposed dashboard: nothing passes, page, socket or download, without a sign-in.

A sign-in is a random token in a cookie that scripts cannot read; the server keeps its SHA-256, the name that
it stands for, and when it ends. The cookie says nothing of anybody. Whoever guesses passwords is slowed down,
by name and by address, and the more so the more they guess.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hansa.core.errors import HansaError
from hansa.ui.users import User, Users

__all__ = ["COOKIE", "Gate", "Guard", "Logins", "Throttle"]

COOKIE = "hansa_session"
_HEALTH = "/_stcore/health"  # says ok, to whoever watches over the process
_LASTS = 12 * 3600.0  # seconds that a sign-in holds
_KEPT = 10_000  # sign-ins, and names and addresses that failed
_FREE = 4  # failures before anybody has to wait
_SLOWEST = 60.0  # seconds to wait, at most
_BODY = 8 << 10  # bytes of a form
_AT_A_TIME = 2  # passwords; each takes 64 MiB and a core

_TOKEN: ContextVar[str | None] = ContextVar("token", default=None)  # of the connection that is being served

_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
}
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)


class Throttle:
    """How long somebody who guessed wrong has to wait. ``clock`` gives seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tries: OrderedDict[str, tuple[int, float]] = OrderedDict()  # wrong tries, end of the wait

    def wait(self, *keys: str) -> float:
        """Seconds until the next try of any of them."""
        now = self._clock()
        return max((self._tries[key][1] - now for key in keys if key in self._tries), default=0.0)

    def begin(self, *keys: str) -> None:
        """A try begins: it counts as wrong until it was right, so that tries side by side count, too."""
        now = self._clock()
        for key in keys:
            tries = self._tries.pop(key, (0, 0.0))[0] + 1
            pause = min(2.0 ** (tries - _FREE), _SLOWEST) if tries > _FREE else 0.0
            self._tries[key] = tries, now + pause
            if len(self._tries) > _KEPT:
                self._tries.popitem(last=False)

    def right(self, *keys: str) -> None:
        """It was the right password."""
        for key in keys:
            self._tries.pop(key, None)


@dataclass(frozen=True)
class _Login:
    name: str
    ends: float


class Logins:
    """Who is signed in. ``clock`` gives seconds since 1970."""

    def __init__(self, users: Users, clock: Callable[[], float] = time.time) -> None:
        self._users, self._clock = users, clock
        self._open: OrderedDict[str, _Login] = OrderedDict()  # SHA-256 of the token

    def open(self, user: User) -> str:
        """A new token."""
        token = secrets.token_urlsafe(32)
        self._open[_digest(token)] = _Login(user.name, self._clock() + _LASTS)
        while len(self._open) > _KEPT:
            self._open.popitem(last=False)
        return token

    def close(self, token: str) -> None:
        """Sign out."""
        self._open.pop(_digest(token), None)

    def user(self, token: str | None) -> User | None:
        """Whose token it is, with the role that they have now; None once it has ended or they are gone."""
        login = self._open.get(_digest(token)) if token else None
        if login is None or login.ends <= self._clock():
            return None
        try:
            role = self._users.role(login.name)
        except HansaError:
            return None
        return None if role is None else User(name=login.name, role=role)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Gate:
    """What is asked before anything is served.

    Parameters
    ----------
    users: who may come in.
    secure: whether the dashboard is reached by HTTPS alone; then the cookie is, too.
    """

    def __init__(self, users: Users, *, secure: bool) -> None:
        self._users, self._secure = users, secure
        self.logins = Logins(users)
        self.throttle = Throttle()
        self._verifying = asyncio.Semaphore(_AT_A_TIME)

    def user(self, cookies: dict[str, str]) -> User | None:
        """Who comes with these cookies; without them, whoever made the connection that is being served."""
        return self.logins.user(cookies.get(COOKIE) or _TOKEN.get())

    async def answer(self, request: Request) -> Response | None:
        """The answer to a request that is not to pass, or to one for the gate itself."""
        path = request.url.path
        if path == "/login":
            if request.method == "POST":
                return await self._sign_in(request)
            return _page("login.html", "")
        if path == "/logout":
            if request.method != "POST":
                return _page("logout.html", "")
            if not _same_origin(request):
                return Response("this did not come from the dashboard", 403)
            self.logins.close(request.cookies.get(COOKIE, ""))
            gone = RedirectResponse("/login", 303)
            gone.delete_cookie(COOKIE)
            return gone
        if path == _HEALTH or self.user(request.cookies) is not None:
            return None
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/login", 303)
        return Response("sign in first", 401)

    async def _sign_in(self, request: Request) -> Response:
        if not _same_origin(request):
            return Response("this did not come from the dashboard", 403)
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > _BODY:
                return Response("the form is too long", 413)
        form = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
        name, password = form.get("name", [""])[0], form.get("password", [""])[0]
        address = request.client.host if request.client else ""
        keys = (f"name {name[:64]}", f"address {address}")
        if (wait := self.throttle.wait(*keys)) > 0:
            again = _page("login.html", f"Too many wrong tries; wait {math.ceil(wait)} s.", name, status=429)
            again.headers["retry-after"] = str(math.ceil(wait))
            return again
        self.throttle.begin(*keys)
        try:
            async with self._verifying:
                user = await asyncio.to_thread(self._users.verify, name, password)
        except HansaError:
            return _page(
                "login.html",
                "The list of users cannot be read; tell whoever runs the dashboard.",
                name,
                status=503,
            )
        if user is None:
            return _page("login.html", "That name and password do not go together.", name, status=401)
        self.throttle.right(*keys)
        welcome = RedirectResponse("/", 303)
        welcome.set_cookie(
            COOKIE,
            self.logins.open(user),
            httponly=True,
            secure=self._secure,
            samesite="lax",
            max_age=int(_LASTS),
        )
        return welcome


class Guard:
    """The gate as ASGI middleware, in front of everything that is served."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app, self._gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, or refuse."""

        if scope["type"] in ("http", "websocket"):
            _TOKEN.set(HTTPConnection(scope).cookies.get(COOKIE))

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in known),
                ]
            await send(message)

        if scope["type"] == "http":
            refusal = await self._gate.answer(Request(scope, receive))
            await (refusal or self._app)(scope, receive, marked)
        elif scope["type"] == "websocket" and self._gate.user(HTTPConnection(scope).cookies) is None:
            await send({"type": "websocket.close", "code": 4401})  # before it was accepted: 403
        else:
            await self._app(scope, receive, send)


def _same_origin(request: Request) -> bool:
    """Whether a form comes from a page of this dashboard; browsers tell of any that comes from elsewhere."""
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


def _page(template: str, message: str, name: str = "", status: int = 200) -> HTMLResponse:
    text = _PAGES.get_template(template).render(message=message, name=name[:64])
    return HTMLResponse(text, status, {"content-security-policy": _POLICY, "cache-control": "no-store"})


_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
)
