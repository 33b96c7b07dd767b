"""Who may call what, and whose runs it may touch: one table, and nothing that is not in it.

A method that is implemented and missing here is refused to everyone; a test finds it before
(:func:`uncovered`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

from google.protobuf.descriptor import FileDescriptor

from hansa.core.roles import Role

__all__ = ["RULES", "Reach", "Rules", "methods", "uncovered"]


class Reach(StrEnum):
    """Whose objects a call may touch."""

    ALL = "all"
    OWN = "own"
    """The caller's; a handler that does not ask ``caller().owns`` or ``may_see`` is not answered for."""


Rules = Mapping[str, Mapping[Role, Reach]]

_AGENTS = {Role.AGENT: Reach.ALL}
_SUBMITTERS = {Role.ADMIN: Reach.ALL, Role.RESEARCHER: Reach.ALL}
_STEERERS = {Role.ADMIN: Reach.ALL, Role.OPERATOR: Reach.ALL, Role.RESEARCHER: Reach.OWN}
_READERS = {**_STEERERS, Role.AUDITOR: Reach.ALL}
_WATCHERS = dict.fromkeys((Role.ADMIN, Role.OPERATOR, Role.RESEARCHER, Role.AUDITOR), Reach.ALL)
_MODEL_READERS = {Role.ADMIN: Reach.ALL, Role.RESEARCHER: Reach.OWN}
_EVERYONE = dict.fromkeys(Role, Reach.ALL)
_OVERSEERS = dict.fromkeys((Role.ADMIN, Role.OPERATOR, Role.AUDITOR), Reach.ALL)

RULES: Rules = {
    "/hansa.v1.Agents/Attend": _AGENTS,
    "/hansa.v1.Agents/Download": _AGENTS,
    "/hansa.v1.Agents/Upload": _AGENTS,
    "/hansa.v1.Control/Submit": _SUBMITTERS,
    "/hansa.v1.Control/List": _READERS,
    "/hansa.v1.Control/Watch": _READERS,
    "/hansa.v1.Control/Stop": _STEERERS,
    "/hansa.v1.Control/Resume": _STEERERS,
    "/hansa.v1.Control/Model": _MODEL_READERS,
    "/hansa.v1.Control/Ask": _READERS,
    "/hansa.v1.Control/Roster": _READERS,
    "/hansa.v1.Control/Condition": _WATCHERS,
    "/hansa.v1.Renewal/Renew": _EVERYONE,
    "/grpc.health.v1.Health/Check": _EVERYONE,
    "/grpc.health.v1.Health/Watch": _EVERYONE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _OVERSEERS,
}
"""Method → role → whose objects. Enrolment is not here: it has a port and a credential of its own."""


def methods(files: Iterable[FileDescriptor]) -> set[str]:
    """Every method of every service in these protocol files, ``/package.Service/Method``."""
    return {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }


def uncovered(rules: Rules, files: Iterable[FileDescriptor]) -> set[str]:
    """Methods that no rule speaks of."""
    return methods(files) - rules.keys()
