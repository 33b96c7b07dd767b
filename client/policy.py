"""What an agent's owner allows. The network may ask for anything; only this decides."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hansa.core.errors import InputError
from hansa.core.recipe import Recipe
from hansa.strategies.catalog import imports

_NAP = 0.05  # seconds between two looks, at rest, whether a job was recalled


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
    job_steps: local steps of a job, at most; after them the agent sends what it has.
    duty: share of a processor's time that training takes, at most; the agent rests after each step.
    """

    recipes: tuple[str, ...] = ()
    code: Mapping[str, str] = field(default_factory=dict)
    minimum_clients: int = 1
    quiet_hours: str | None = None
    algorithms: tuple[str, ...] = ()
    job_seconds: float | None = None
    job_memory: int | None = None
    job_steps: int | None = None
    duty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("job_seconds", "job_memory", "job_steps"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise InputError(f"policy.{name}", value, "no job could be done", "raise it, or leave it out")
        if not 0 < self.duty <= 1:
            raise InputError("policy.duty", self.duty, "it is a share above 0, up to 1", "write 0.25, say")
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

    def within(self, halt: Callable[[int], bool]) -> Callable[[int], bool]:
        """Whether to end a job, asked between its steps, as ``halt`` says and the owner; rests first.

        Rest follows the processor's time, for a machine that was asleep has not worked.
        """
        worked = time.thread_time()

        def over(steps: int) -> bool:
            nonlocal worked
            if self.job_steps is not None and steps >= self.job_steps:
                return True
            wake = time.monotonic() + (time.thread_time() - worked) * (1 / self.duty - 1)
            while not halt(steps) and (left := wake - time.monotonic()) > 0:
                time.sleep(min(left, _NAP))
            worked = time.thread_time()
            return halt(steps)

        return over

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
        file: Path | None = Path(module).expanduser()
    else:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        file = Path(spec.origin) if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        return None
    return hashlib.sha256(file.read_bytes()).hexdigest()
