"""A private PostgreSQL server for tests: on a unix socket in a folder of its own, run by a user not root."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_USERS = ("postgres", "nobody")  # who runs it where the tests are root's: it refuses to be


def binaries() -> Path | None:
    """Where ``initdb`` and ``postgres`` are; ``None`` where they are not."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda each: int(each.parent.name))
    for folder in (*map(Path, os.environ["PATH"].split(os.pathsep)), *reversed(debian)):
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    return None


class Postgres:
    """One server; use it as a context manager."""

    def __init__(self) -> None:
        found = binaries()
        assert found is not None
        self._binaries = found
        self._count = 0
        self._process: subprocess.Popen[Any] | None = None

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="hansa-pg-"))
        self._who: dict[str, Any] = {"cwd": self._folder}
        if os.geteuid() == 0:
            user = next(name for name in _USERS if name in {each.pw_name for each in pwd.getpwall()})
            shutil.chown(self._folder, user)
            self._who |= {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
        self._run("initdb", "--no-sync", "--auth=trust", "--username=hansa", "--encoding=UTF8", "data")
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Serve, until :meth:`stop`."""
        settings = {"listen_addresses": "", "unix_socket_directories": self._folder, "fsync": "off"}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [str(self._binaries / "postgres"), "-D", "data", *options]
        process: subprocess.Popen[Any] = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={}, **self._who
        )
        self._process = process
        assert process.stderr is not None
        for line in process.stderr:
            if b"ready to accept connections" in line:
                return
        raise AssertionError("PostgreSQL did not start")

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends all sessions in good order, SIGKILL as a crash would."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.communicate()
            self._process = None

    def database(self) -> str:
        """The URL of a new, empty database."""
        self._count += 1
        name = f"hansa{self._count}"
        self.execute("postgres", f"CREATE DATABASE {name}")
        return self._url(name)

    def execute(self, name: str, statement: str) -> Sequence[Any]:
        """One statement, as the owner."""
        import psycopg

        with psycopg.connect(
            host=str(self._folder), user="hansa", dbname=name, autocommit=True
        ) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def _url(self, name: str) -> str:
        return f"postgresql://hansa@/{name}?host={self._folder}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), *arguments]
        environment = {"LC_ALL": "C", "PATH": os.environ["PATH"]}
        made = subprocess.run(command, capture_output=True, env=environment, check=False, **self._who)
        assert made.returncode == 0, made.stderr.decode()
