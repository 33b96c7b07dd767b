"""The house keeps its shape: imports point downward, every module imports, what is public is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import hansa

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"core": 0, "strategies": 1, "simulation": 2, "server": 2, "client": 2, "ui": 2, "cli": 3}
MODULES = sorted(
    each.name
    for each in pkgutil.walk_packages(hansa.__path__, "hansa.")
    if not each.name.endswith("__main__")
)


def _room(module: str) -> str:
    return module.split(".")[1]


def _imported_rooms(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = [
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    return {_room(name) for name in names if name.startswith("hansa.") and _room(name) in FLOORS}


@pytest.mark.parametrize("room", FLOORS)
def test_imports_point_downward(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for other in _imported_rooms(path):
            assert other == room or FLOORS[other] < FLOORS[room], f"{path} imports hansa.{other}"


@pytest.mark.parametrize("room", ["client", "server", "simulation"])
def test_a_room_says_what_is_in_it(room: str) -> None:
    made = importlib.import_module(f"hansa.{room}")
    told = set(re.findall(r"(?:^    |  )([a-z_]+)/? +\w", made.__doc__ or "", re.MULTILINE))
    assert told >= {each.name for each in pkgutil.iter_modules(made.__path__)} - {"migrations"}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports_and_says_what_it_is(module: str) -> None:
    made = importlib.import_module(module)
    assert made.__doc__
    assert made.__doc__.strip()


@pytest.mark.parametrize(
    "module",
    [each for each in MODULES if _room(each) in ("core", "strategies") and "_pb2" not in each],  # generated
)
def test_public_definitions_are_documented(module: str) -> None:
    made = importlib.import_module(module)
    for name, each in vars(made).items():
        if name.startswith("_") or getattr(each, "__module__", None) != module:
            continue
        if inspect.isclass(each) or inspect.isfunction(each):
            assert inspect.getdoc(each), f"{module}.{name} has no docstring"


def test_wheel_and_sdist_hold_real_files(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        links = [member.name for member in sdist if member.issym() or member.islnk()]
        files = {member.name.split("/", 1)[1] for member in sdist if member.isfile()}
    expected = {f"hansa/{room}/__init__.py" for room in FLOORS} | {"hansa/__init__.py", "hansa/py.typed"}
    assert expected <= set(wheel)
    assert {f"src/{name}" for name in expected} <= files
    assert not links
    assert "hansa/ui/report.html" in wheel
