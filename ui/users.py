"""Who may use an exposed dashboard: a file of names, roles and hashed passwords.

Passwords are hashed by Argon2id (RFC 9106) with the parameters of its second recommended option, as
argon2-cffi has them. The file is JSON, written whole in one rename, and readable by its owner alone.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, cast, get_args

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from hansa.core.errors import InputError

__all__ = ["Role", "User", "Users"]

Role = Literal["viewer", "operator"]
"""Viewers look; operators also start, stop and resume runs."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SHORTEST, _LONGEST = 8, 1024  # characters of a password


class _Entry(TypedDict):
    role: Role
    hash: str


@dataclass(frozen=True, kw_only=True)
class User:
    """A user and what they may do."""

    name: str
    role: Role


class Users:
    """The file ``path``; it is read at every question, so that changes hold without a restart.

    Raises
    ------
    InputError
        By every method, when the file cannot be read or written, or others may read it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hasher = PasswordHasher()
        self._nobody = self._hasher.hash("nobody's password")

    def all(self) -> list[User]:
        """All users, by name."""
        return [User(name=name, role=entry["role"]) for name, entry in sorted(self._read().items())]

    def role(self, name: str) -> Role | None:
        """What somebody may do; None for nobody."""
        entry = self._read().get(name)
        return None if entry is None else entry["role"]

    def verify(self, name: str, password: str) -> User | None:
        """The user, if that is the password. An unknown name costs as much time as a wrong password."""
        entry = self._read().get(name)
        try:
            self._hasher.verify(entry["hash"] if entry else self._nobody, password[: _LONGEST + 1])
        except (VerificationError, InvalidHashError):
            return None
        return None if entry is None else User(name=name, role=entry["role"])

    def add(self, name: str, role: str, password: str) -> None:
        """Add a user, or give one a new role and password."""
        if not _NAME.fullmatch(name):
            raise InputError(
                "NAME",
                name,
                "it is no name",
                "use letters, digits, dots, hyphens, underscores and @, up to 64",
            )
        if role not in get_args(Role):
            raise InputError("--role", role, "there is no such role", "choose viewer or operator")
        if not _SHORTEST <= len(password) <= _LONGEST:
            raise InputError(
                "password",
                f"{len(password)} characters",
                "it is too short or too long",
                f"use {_SHORTEST} to {_LONGEST}",
            )
        users = self._read() if self.path.exists() else {}
        self._write({**users, name: {"role": cast(Role, role), "hash": self._hasher.hash(password)}})

    def remove(self, name: str) -> None:
        """Take a user out; whoever is signed in under that name is out at the next click."""
        users = self._read()
        if name not in users:
            raise InputError("NAME", name, "there is no such user", "see `hansa ui user ls`")
        self._write({other: entry for other, entry in users.items() if other != name})

    def _read(self) -> dict[str, _Entry]:
        try:
            mode = stat.S_IMODE(os.stat(self.path).st_mode)
            users = json.loads(self.path.read_text(encoding="utf-8"))["users"]
            sound = all(
                set(entry) == {"role", "hash"} and entry["role"] in get_args(Role) for entry in users.values()
            )
        except FileNotFoundError:
            raise InputError(
                "--auth",
                str(self.path),
                "there is no such file",
                "`hansa ui user add NAME --file FILE` makes one",
            ) from None
        except OSError as error:
            raise InputError(
                "--auth", str(self.path), f"it cannot be read ({error.strerror})", "see its permissions"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError):
            sound, users, mode = False, {}, 0
        if not sound:
            raise InputError(
                "--auth",
                str(self.path),
                "it is no file of users",
                "make one: `hansa ui user add NAME --file FILE`",
            )
        if mode & 0o077:
            raise InputError(
                "--auth", str(self.path), f"others may read it (mode {mode:o})", f"chmod 600 {self.path}"
            )
        return dict(users)

    def _write(self, users: dict[str, _Entry]) -> None:
        draft = self.path.with_name(f".{self.path.name}.part")
        try:
            draft.unlink(missing_ok=True)
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"users": users}, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.path)
        except OSError as error:
            raise InputError(
                "--file",
                str(self.path),
                f"it cannot be written ({error.strerror})",
                "name a file in a writable folder",
            ) from error
