"""What an agent's owner allows. The network may ask for anything; only this decides."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hansa.core.errors import InputError
from hansa.core.recipe import Recipe
from hansa.strategies.catalog import imports


class Refused(Exception):
    """The owner's policy forbids a job; the sentence says what."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The owner's rules.

    Attributes
    ----------
    recipes: SHA-256 digests of recipes that may run here; empty allows any that imports nothing.
    code: what recipes may import, as ``package.module:Class``, each with the SHA-256 of the module's file.
    minimum_clients: fewest clients in a federation, for the average of few tells of each.
    quiet_hours: local times between which the agent stays away, as ``"08:00-18:00"``.
    algorithms: names of the algorithms that may run here; empty allows all.
    job_seconds: time that training may take in a job.
    job_memory: megabytes that a job may take beyond what the agent holds between jobs.
    """

    recipes: tuple[str, ...] = ()
    code: Mapping[str, str] = field(default_factory=dict)
    minimum_clients: int = 1
    quiet_hours: str | None = None
    algorithms: tuple[str, ...] = ()
    job_seconds: float | None = None
    job_memory: int | None = None

    def __post_init__(self) -> None:
        for name in ("job_seconds", "job_memory"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise InputError(f"policy.{name}", value, "no job could be done", "raise it, or leave it out")
        if self.quiet_hours is not None:
            try:
                self._hours()
            except ValueError as error:
                raise InputError(
                    "policy.quiet_hours", self.quiet_hours, "it is no span of time", 'write "08:00-18:00"'
                ) from error

    def require(self, recipe: Recipe, digest: str, clients: int) -> None:
        """Allow a job of a recipe, before anything of it is imported.

        Raises
        ------
        Refused
        """
        if self.recipes and digest not in self.recipes:
            raise Refused(f"recipe {digest[:12]}… is not among those that this agent's owner allowed")
        if clients < self.minimum_clients:
            raise Refused(f"{clients} clients; this agent's owner wants {self.minimum_clients} or more")
        if self.algorithms and recipe.algorithm["name"] not in self.algorithms:
            raise Refused(f"algorithm {recipe.algorithm['name']!r} is not allowed by this agent's owner")
        for name, path in imports(recipe):
            allowed = self.code.get(path)
            if allowed is None:
                raise Refused(f"{name} = {path!r}: code that this agent's owner has not allowed")
            if _code_digest(path) != allowed:
                raise Refused(f"{name} = {path!r}: the code here is not what this agent's owner allowed")

    def quiet(self, now: datetime.datetime) -> float:
        """Seconds until the quiet hours are over; 0 outside them."""
        if self.quiet_hours is None:
            return 0.0
        begin, end = self._hours()
        time = now.time()
        inside = begin <= time < end if begin < end else time >= begin or time < end
        if not inside:
            return 0.0
        over = now.replace(hour=end.hour, minute=end.minute, second=0, microsecond=0)
        if over <= now:
            over += datetime.timedelta(days=1)
        return (over - now).total_seconds()

    def _hours(self) -> tuple[datetime.time, datetime.time]:
        begin, _, end = (self.quiet_hours or "").partition("-")
        return datetime.time.fromisoformat(begin.strip()), datetime.time.fromisoformat(end.strip())


def _code_digest(path: str) -> str | None:
    """SHA-256 of the file that an import would run."""
    module = path.rpartition(":")[0]
    if module.endswith(".py"):
        file: Path | None = Path(module)
    else:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        file = Path(spec.origin) if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        return None
    return hashlib.sha256(file.read_bytes()).hexdigest()
