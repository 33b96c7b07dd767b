"""Who looks, and what they may do: asked at every call, not when a button is drawn."""

from __future__ import annotations

from typing import ParamSpec, TypeVar

import streamlit as st

from hansa.core.control import Coordinator
from hansa.core.errors import TrustError
from hansa.ui.gate import Gate
from hansa.ui.site import site
from hansa.ui.source import Question, Run, Server, Source
from hansa.ui.users import User

__all__ = ["Guarded", "coordinator_of", "may_operate", "who"]

P = ParamSpec("P")
T = TypeVar("T")


def who(gate: Gate | None) -> User | None:
    """Who looks at the page that is being drawn; without a gate, this machine's operator."""
    if gate is None:
        return User(name="", role="operator")
    return gate.user(dict(st.context.cookies))


def may_operate() -> bool:
    """Whether whoever looks may start, stop and resume runs."""
    user = who(site().gate)
    return user is not None and user.role == "operator"


class Guarded:
    """A source behind a gate: every call asks who makes it.

    Raises
    ------
    TrustError
        By every method, for somebody who is not signed in or whose role does not allow it.
    """

    def __init__(self, source: Source, gate: Gate) -> None:
        self._source, self._gate = source, gate

    @property
    def label(self) -> str:
        """See :class:`~hansa.ui.source.Source`."""
        return self._source.label

    def runs(self) -> list[Run]:
        """See :class:`~hansa.ui.source.Source`."""
        return self._seen().runs()

    def run(self, id: str) -> Run:
        """See :class:`~hansa.ui.source.Source`."""
        return self._seen().run(id)

    def ask(self, question: Question[P, T], run: str, /, *arguments: P.args, **named: P.kwargs) -> T:
        """See :class:`~hansa.ui.source.Source`."""
        return self._seen().ask(question, run, *arguments, **named)

    def model(self, run: str) -> bytes:
        """See :class:`~hansa.ui.source.Source`."""
        return self._seen().model(run)

    def report(self, run: str) -> bytes:
        """See :class:`~hansa.ui.source.Source`."""
        return self._seen().report(run)

    def has_report(self, run: str) -> bool:
        """See :class:`~hansa.ui.source.Source`."""
        return self._seen().has_report(run)

    def stop(self, run: str) -> None:
        """See :class:`~hansa.ui.source.Source`."""
        self._steered().stop(run)

    def resume(self, run: str) -> None:
        """See :class:`~hansa.ui.source.Source`."""
        self._steered().resume(run)

    def start(self, recipe: str) -> str:
        """See :class:`~hansa.ui.source.Source`."""
        return self._steered().start(recipe)

    @property
    def coordinator(self) -> Coordinator | None:
        """See :func:`coordinator_of`."""
        return coordinator_of(self._seen())

    def _seen(self) -> Source:
        if who(self._gate) is None:
            raise TrustError("you are not signed in any more; sign in again at /login")
        return self._source

    def _steered(self) -> Source:
        user = who(self._gate)
        if user is None or user.role != "operator":
            name = user.name if user else "nobody"
            raise TrustError(f"{name} may look only; starting, stopping and resuming need the role operator")
        return self._source


def coordinator_of(source: Source) -> Coordinator | None:
    """The coordinator that a source asks, to be asked about its agents and itself; None for a folder."""
    if isinstance(source, Guarded):
        return source.coordinator
    return source.coordinator if isinstance(source, Server) else None
