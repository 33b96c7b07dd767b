"""The benchmark of asynchronous schemes, as whoever starts it sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks/asynchronous.py"


def test_results_in_a_folder_say_what_to_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--results", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"--results: {tmp_path} is a folder; name a file, in it say trials.jsonl"
    )
