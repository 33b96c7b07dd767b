from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hansa.core.errors import RunError, StorageError
from hansa.simulation import checkpoint


def write(folder: Path, version: int) -> Path:
    tensors = {"w": torch.full((100,), float(version)), "name/with.dots": torch.tensor(3)}
    return checkpoint.save(folder, version, tensors, {"version": version, "list": [1, [2, None]]})


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "view": torch.arange(6).reshape(2, 3).T,
        "empty": torch.zeros(0, 3),
    }
    checkpoint.save(tmp_path / "new" / "folder", 7, tensors, {"at": 0.1, "nothing": None})
    found = checkpoint.load(tmp_path / "new" / "folder")
    assert found is not None
    assert found[1] == {"at": 0.1, "nothing": None}
    assert found[0].keys() == tensors.keys()
    for name, each in tensors.items():
        assert found[0][name].dtype == each.dtype
        assert torch.equal(found[0][name], each)


def test_products_of_what_comes_back_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    """A library may add in another order where numbers do not begin where its vectors do."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(9, 63, generator=rng)
    tensors = {str(n): torch.randn(17, 63, generator=rng) for n in range(16)}
    checkpoint.save(tmp_path, 1, tensors, {})
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert all(each.data_ptr() % 64 == 0 for each in found[0].values())
    for name, each in tensors.items():
        assert torch.equal(x @ found[0][name].T, x @ each.T)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for version in (9, 10, 100, 101):
        write(tmp_path, version)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000100", "00000101"]
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found[1]["version"] == 101


def test_a_checkpoint_of_the_same_round_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 3)
    checkpoint.save(tmp_path, 3, {"w": torch.zeros(1)}, {"again": True})
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found[1] == {"again": True}
    assert len(list(tmp_path.iterdir())) == 1


def test_where_there_was_never_one_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    assert checkpoint.load(tmp_path / "absent") is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scribble(path: Path) -> None:
    path.write_bytes(b"\xff\x00" * 200)


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, empty, scribble, Path.unlink])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: Callable[[Path], None], file: str, tmp_path: Path
) -> None:
    older, newer = write(tmp_path, 4), write(tmp_path, 5)
    damage(newer / file)
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found[1]["version"] == 4
    assert float(found[0]["w"][0]) == 4.0
    damage(older / file)
    with pytest.raises(RunError, match=r"no checkpoint can be read .*recipe\.toml"):
        checkpoint.load(tmp_path)


def test_a_crash_in_mid_write_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 4)

    def crash(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", crash)
        with pytest.raises(StorageError, match=r"no space left .* make room and resume the run"):
            write(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["00000004"]  # what was half written takes no room
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found[1]["version"] == 4
    assert write(tmp_path, 5).name == "00000005"  # what the crash left is in nobody's way


def test_what_a_dead_process_and_a_forgotten_future_left_goes(tmp_path: Path) -> None:
    for version in (5, 8, 9):
        write(tmp_path, version)
    (tmp_path / ".00000007.4711").mkdir()
    write(tmp_path, 6)  # a run that went on after an earlier round
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000006"]
