"""What the benchmarks share: the machine that a figure is from, and the tables that documents publish."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return named[1] if named else platform.processor()


def replace(text: str, name: str, made: str) -> str:
    """``text`` with what stands between ``<!-- name -->`` and ``<!-- end -->`` replaced, where they are."""
    head, begin, rest = text.partition(f"<!-- {name} -->\n")
    _, end, tail = rest.partition("\n<!-- end -->")
    return f"{head}{begin}{made}{end}{tail}" if begin and end else text


def write(file: Path, name: str, made: str) -> None:
    """Put a table into its place in ``file``."""
    text = file.read_text()
    if f"<!-- {name} -->\n" not in text:
        raise SystemExit(
            f"--write: {file} has no line <!-- {name} -->; name a file that publishes this table"
        )
    file.write_text(replace(text, name, made))
