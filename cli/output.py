"""What a command says: to people on one stream, to machines in one envelope, and why it failed.

With ``--json`` standard output carries exactly one JSON object, ``{"ok": true, ...}`` or
``{"ok": false, "error": {...}, "exit_code": n}``, and everything for people goes to standard error. Numbers
that JSON lacks are null.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import traceback
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.text import Text

from hansa.core.errors import HansaError
from hansa.core.store import RunSummary

_INTERRUPTED = 130
_FILE_WIDTH = 200


class Output:
    """The two streams of one command.

    Attributes
    ----------
    json: whether a machine reads standard output.
    """

    def __init__(self, *, json: bool = False) -> None:
        self.json = json
        self.error = _console(stderr=True)
        self.people = self.error if json else _console(stderr=False)

    @property
    def width(self) -> int:
        """Characters in a line for people."""
        return self.people.width

    def say(self, text: RenderableType = "") -> None:
        """Something for people. Lines of text are never broken, so that paths can be copied."""
        self.people.print(text, soft_wrap=isinstance(text, str), markup=False)

    def envelope(self, **content: object) -> None:
        """The one object for machines; nothing without ``--json``."""
        if self.json:
            print(json.dumps({"ok": True, **_plain(content)}, allow_nan=False), flush=True)

    def failed(self, error: BaseException, *, debug: bool = False, **content: object) -> int:
        """Tell of an error and return its exit code; the traceback is shown with ``debug`` only."""
        told = explained(error)
        code = exit_code(error)
        if debug:
            self.error.print("".join(traceback.format_exception(error)), markup=False, soft_wrap=True, end="")
        self.error.print(Text.assemble(("hansa:", "bold red"), " ", told["message"]), soft_wrap=True)
        if self.json:
            envelope = {"ok": False, "error": told, "exit_code": code, **content}
            print(json.dumps(_plain(envelope), allow_nan=False), flush=True)
        return code


def _console(*, stderr: bool) -> Console:
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _FILE_WIDTH  # nothing is cut off for a pipe or a file
    return made


def exit_code(error: BaseException) -> int:
    """0 is success; the others are told by :mod:`hansa.core.errors`."""
    if isinstance(error, HansaError | click.ClickException):
        return error.exit_code
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt | click.Abort) else 1


def explained(error: BaseException) -> dict[str, Any]:
    """An error as data: its kind, a sentence, and the field, value, problem and remedy where it has them."""
    told: dict[str, Any] = {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "hansa"
        # typer suggests a command in the message, and from 8.4 on click does so once more.
        said = (error.message if "Did you mean" in error.message else error.format_message()).rstrip(".")
        told["message"] = f"{said}{'' if said.endswith('?') else ';'} see `{where} --help`"
    elif isinstance(error, KeyboardInterrupt | click.Abort):
        told = {"kind": "Interrupted", "message": "interrupted"}
    elif not isinstance(error, HansaError):
        what = " ".join(traceback.format_exception_only(error)[-1].split())
        told["message"] = f"unexpected error ({what}); give the same command with --debug for the traceback"
    for name in ("field", "value", "problem", "remedy"):
        told[name] = getattr(error, name, None) if isinstance(error, HansaError) else None
    return told


def run_facts(summary: RunSummary) -> dict[str, Any]:
    """A run for machines."""
    return dataclasses.asdict(summary)


def _plain(value: object) -> Any:
    """Something that JSON can hold."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case datetime():
            return value.isoformat()
        case Path():
            return str(value)
        case Mapping():
            return {str(key): _plain(each) for key, each in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(each) for each in value]
    return str(value)
