"""A place for a coordinator and its agents to meet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from floor import Floor
from postgres import Postgres, binaries
from zygote import Zygote


@pytest.fixture
def floor(tmp_path: Path) -> Floor:
    """See :class:`floor.Floor`."""
    return Floor(tmp_path)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """See :class:`postgres.Postgres`."""
    if binaries() is None:
        pytest.skip("no PostgreSQL server is installed here (initdb and postgres)")
    with Postgres() as made:
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'events.db'}"
    made: Postgres = request.getfixturevalue("postgres")
    return made.database()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """See :class:`zygote.Zygote`."""
    with Zygote() as made:
        yield made
