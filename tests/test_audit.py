"""The audit log finds every change, and survives a crash at any byte."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hansa.core.errors import InputError, TrustError
from hansa.server.trust.audit import Audit, Head

pytestmark = pytest.mark.usefixtures("no_pickle")

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
RECORDS = 6


def written(folder: Path, count: int = RECORDS) -> Audit:
    log = Audit.create(folder / "audit.jsonl")
    for n in range(count):
        log.append("ada", "run.submit", f"run-{n}", {"rounds": n, "note": "grüß\n\u2028"}, NOON)
    return log


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """A folder, and a log and its head as they should be."""
    folder = tmp_path_factory.mktemp("audit")
    log = written(folder)
    return folder, log.path.read_bytes(), log.head_path.read_bytes()


def test_records_are_read_back_in_order(tmp_path: Path) -> None:
    log = written(tmp_path)
    assert log.verify().number == RECORDS
    found = list(log.records())
    assert [each.number for each in found] == list(range(1, RECORDS + 1))
    assert found[2].detail == {"rounds": 2, "note": "grüß\n\u2028"}
    assert found[0].time == "2026-11-21T12:00:00.000+00:00"


def test_the_chain_is_the_hash_of_each_line(tmp_path: Path) -> None:
    """By hand: the first record follows 64 zeros, each other one the SHA-256 of the line before."""
    log = written(tmp_path, 3)
    lines = log.path.read_bytes().splitlines()
    previous = ["0" * 64, *(hashlib.sha256(line).hexdigest() for line in lines)]
    assert [json.loads(line)["previous"] for line in lines] == previous[:3]
    assert str(log.verify()) == f"3:{previous[3]}"


def _mutations(lines: list[bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    """Every way in which somebody may tamper with whole lines or single bytes."""
    index = st.integers(0, len(lines) - 1)
    data = b"".join(lines)

    def edited(position: int, byte: int) -> bytes:
        return data[:position] + bytes([byte]) + data[position + 1 :]

    return st.one_of(
        st.builds(edited, st.integers(0, len(data) - 1), st.integers(0, 255)).map(lambda d: ("byte", d)),
        index.map(lambda i: ("removed", b"".join(lines[:i] + lines[i + 1 :]))),
        st.permutations(lines).map(lambda p: ("reordered", b"".join(p))),
        st.tuples(index, index).map(
            lambda t: ("inserted", b"".join([*lines[: t[0]], lines[t[1]], *lines[t[0] :]]))
        ),
        st.integers(0, len(data) - 1).map(lambda n: ("cut", data[:n])),
        st.binary(min_size=1, max_size=40).map(lambda extra: ("appended", data + extra)),
        st.tuples(index, st.sampled_from(["actor", "action", "object", "time", "number", "detail"])).map(
            lambda t: ("field", _field_changed(lines, *t))
        ),
    )


def _field_changed(lines: list[bytes], index: int, name: str) -> bytes:
    """A record changed in canonical form, as one who knows the format would."""
    record = json.loads(lines[index])
    record[name] = {"number": 7, "detail": {}}.get(name, "mallory")
    line = json.dumps(record, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    return b"".join([*lines[:index], line, *lines[index + 1 :]])


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(data=st.data())
def test_every_change_is_found(whole: tuple[Path, bytes, bytes], data: st.DataObject) -> None:
    folder, log, head = whole
    kind, changed = data.draw(_mutations(log.splitlines(keepends=True)))
    (folder / "audit.jsonl").write_bytes(changed)
    (folder / "audit.head").write_bytes(head)
    if changed == log:
        assert Audit(folder / "audit.jsonl").verify().number == RECORDS
    else:
        with pytest.raises(TrustError):
            Audit(folder / "audit.jsonl").verify()
    if kind == "cut" and b"\n" not in log[len(changed) :].rstrip(b"\n"):
        return
    if kind in ("cut", "removed") and len(changed.splitlines()) < RECORDS - 1:
        with pytest.raises(TrustError):  # and nothing is added that would cover it up
            Audit(folder / "audit.jsonl").append("mallory", "x", "y", now=NOON)


def test_a_rewritten_log_is_found_by_a_head_kept_elsewhere(tmp_path: Path) -> None:
    known = written(tmp_path).verify()
    (tmp_path / "audit.jsonl").unlink()
    (tmp_path / "audit.head").unlink()
    forged = Audit.create(tmp_path / "audit.jsonl")
    for n in range(RECORDS):
        forged.append("ada", "run.submit", f"run-{n}", {"rounds": 99 if n == 3 else n}, NOON)
    assert forged.verify().number == RECORDS  # consistent in itself
    with pytest.raises(TrustError, match="is not the one that the given head tells of"):
        forged.verify(known)
    (tmp_path / "audit.jsonl").unlink()
    (tmp_path / "audit.head").unlink()
    with pytest.raises(TrustError, match="4 records are missing at its end"):
        written(tmp_path, 2).verify(known)


def test_a_longer_log_still_bears_out_an_older_head(tmp_path: Path) -> None:
    log = written(tmp_path)
    known = log.verify()
    log.append("ada", "run.stop", "run-1", now=NOON)
    assert log.verify(known).number == RECORDS + 1


@pytest.mark.parametrize("cut", [1, 17, 80])
def test_a_line_torn_by_a_crash_is_cut_off_and_told(cut: int, tmp_path: Path) -> None:
    log = written(tmp_path)
    kept = log.path.read_bytes()
    log.path.write_bytes(kept + kept.splitlines()[-1][:cut])
    with pytest.raises(TrustError, match=f"stand {cut} bytes that are no whole line"):
        log.verify()
    log.append("ada", "run.stop", "run-1", now=NOON)
    assert log.verify().number == RECORDS + 2
    repair = list(log.records())[-2]
    assert (repair.action, repair.detail) == ("audit.repair", {"bytes": cut})


def test_a_crash_between_the_record_and_its_head_loses_nothing(tmp_path: Path) -> None:
    log = written(tmp_path)
    before = log.head_path.read_bytes()
    log.append("ada", "run.stop", "run-1", now=NOON)
    log.head_path.write_bytes(before)
    assert log.verify().number == RECORDS + 1
    log.append("ada", "run.stop", "run-2", now=NOON)
    assert log.verify().number == RECORDS + 2


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = written(tmp_path)
    kept = log.path.read_bytes()
    real = os.pwrite

    def short(descriptor: int, data: bytes, offset: int) -> int:
        if len(data) > 100:
            return real(descriptor, bytes(data)[:100], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", short)
    with pytest.raises(OSError, match="No space"):
        log.append("ada", "run.stop", "run-1", {"why": "x" * 50}, NOON)
    monkeypatch.undo()
    assert log.path.read_bytes() == kept
    assert log.verify().number == RECORDS


def test_a_record_is_on_the_disk_before_its_head_and_both_before_anyone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = written(tmp_path)
    synced: list[str] = []
    real = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    log.append("ada", "run.stop", "run-1", now=NOON)
    names = [Path(each).name for each in synced]
    assert names[0] == "audit.jsonl"
    assert names[1].startswith(".audit.head")
    assert names[2] == tmp_path.name  # the folder, after the rename


def test_many_writers_make_one_chain(tmp_path: Path) -> None:
    path = written(tmp_path, 0).path

    def work(name: str) -> None:
        log = Audit(path)
        for n in range(15):
            log.append(name, "run.submit", f"{name}-{n}", now=NOON)

    threads = [threading.Thread(target=work, args=(f"writer-{n}",)) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    log = Audit(path)
    assert log.verify().number == 60
    assert len({record.object for record in log.records()}) == 60


def test_long_records_are_found_at_the_end(tmp_path: Path) -> None:
    log = written(tmp_path, 1)
    log.append("ada", "run.submit", "run-big", {"recipe": "x" * 200_000}, NOON)
    log.append("ada", "run.stop", "run-big", now=NOON)
    assert Audit(log.path).verify().number == 3


def test_a_missing_head_and_a_missing_log_are_told(tmp_path: Path) -> None:
    log = written(tmp_path)
    with pytest.raises(TrustError, match="never begun anew"):
        Audit.create(log.path)
    log.head_path.unlink()
    with pytest.raises(TrustError, match="nobody knows whether"):
        log.verify()
    with pytest.raises(TrustError, match="nobody knows whether"):
        log.append("a", "b", "c", now=NOON)
    log.path.unlink()
    with pytest.raises(TrustError, match="cannot be opened"):
        log.verify()


@pytest.mark.parametrize("text", ["", "5", "5:abc", "x:" + "0" * 64, "5:" + "G" * 64])
def test_a_head_is_a_number_and_a_hash(text: str) -> None:
    with pytest.raises(InputError, match="NUMBER:HASH"):
        Head.parse(text)
