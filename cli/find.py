"""From what a user calls a run to its directory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hansa.core.errors import RunError


def find_run(name: str, folder: Path) -> Path:
    """The directory of a run: its path, its id in ``folder``, a prefix of one id only, or ``last``.

    Raises
    ------
    RunError
        When no run, or more than one, is meant.
    """
    with suppress(OSError):  # no name of a file: too long, or in a folder that may not be looked into
        if (Path(name) / "run.db").is_file():
            return Path(name)
    known = _run_directories(folder)
    if name == "last":
        if known:
            return known[-1]
        raise RunError(f"{folder}: there are no runs yet; `hansa run` makes one")
    meant = [each for each in known if each.name == name] or [
        each for each in known if name and each.name.startswith(name)
    ]
    if len(meant) == 1:
        return meant[0]
    if meant:
        shown = ", ".join(each.name for each in meant[:4]) + (", …" if len(meant) > 4 else "")
        raise RunError(f"{name}: {len(meant)} runs begin so ({shown}); give more of the name")
    raise RunError(f"{name or 'no name'}: there is no such run in {folder}; see `hansa ls`")


def _run_directories(folder: Path) -> list[Path]:
    """All run directories of a folder, the oldest first: by the time in their names, then by their making."""
    found = [each for each in folder.iterdir() if (each / "run.db").is_file()] if folder.is_dir() else []

    def age(directory: Path) -> tuple[str, int]:
        recipe = directory / "recipe.toml"
        return directory.name[:15], recipe.stat().st_mtime_ns if recipe.exists() else 0

    return sorted(found, key=age)
