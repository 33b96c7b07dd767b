"""Every error a user can meet.

::

    HansaError                 exit code 1
     ├─ InputError             exit code 2: a recipe, an option or a combination that cannot be run
     ├─ DataError              exit code 3: data that is missing, truncated, not finite or not divisible
     ├─ DivergedError          exit code 4: training left the finite numbers
     ├─ RunError               exit code 5: a run directory that is absent, damaged or in use
     │   └─ StorageError       a disk or a database that takes nothing now
     └─ TrustError           exit code 6: a certificate, key, token or audit log that cannot be trusted
    Interrupted                exit code 130: stopped on request, the run can be resumed
"""

from __future__ import annotations


class HansaError(Exception):
    """An error with one sentence for the user: the field, the value, the remedy."""

    exit_code = 1


class _FieldError(HansaError):
    """An error that blames one field and says how to mend it.

    Parameters
    ----------
    field:
        Where the value stands, in the words of the recipe (``schedule.cohort``).
    value:
        What was found there; ``None`` if nothing was.
    problem:
        Why it cannot be used.
    remedy:
        What to write or do instead.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        found = field if value is None else f"{field} = {_shown(value)}"
        super().__init__(f"{found}: {problem}; {remedy}")


def _shown(value: object) -> str:
    """A value as a recipe would have it, cut short where it is long."""
    match value:
        case bool():
            return str(value).lower()
        case int() if value.bit_length() > 1000:
            text = hex(value)  # Python writes no decimals of so many digits
        case list() | tuple():
            text = f"[{', '.join(map(_shown, value))}]"
        case dict():
            text = f"{{ {', '.join(f'{key} = {_shown(each)}' for key, each in value.items())} }}"
        case _:
            text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} … {text[-19:]}"


class InputError(_FieldError):
    """A recipe, an option or a combination of them that cannot be run."""

    exit_code = 2


class DataError(_FieldError):
    """Data that is missing, truncated, not finite, or cannot be divided as asked."""

    exit_code = 3


class DivergedError(HansaError):
    """A client's loss or update is no longer finite."""

    exit_code = 4


class RunError(HansaError):
    """A run directory that is absent, damaged, or belongs to a run in progress."""

    exit_code = 5


class StorageError(RunError):
    """A disk or a database that takes nothing now: full, not allowed, away. It may later."""


class TrustError(HansaError):
    """A certificate, key, token or audit log that cannot be trusted: expired, revoked, foreign or altered."""

    exit_code = 6


class Interrupted(HansaError):
    """The run was asked to stop; its last checkpoint continues it."""

    exit_code = 130
