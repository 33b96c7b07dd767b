from __future__ import annotations

import gzip
import importlib
import importlib.util
import os
import struct
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.testing as npt
import pytest
import torch
from PIL import Image
from pydantic import BaseModel, TypeAdapter, ValidationError
from sklearn.datasets import load_digits

from hansa.core.data import (
    CsvData,
    DataConfig,
    DigitsData,
    Examples,
    HuggingFaceData,
    IdxData,
    ImagesData,
    NaturalPartition,
    NpyData,
    PartitionConfig,
    SyntheticFeatureShift,
    SyntheticLabelShift,
    TextData,
    load,
    partition,
)
from hansa.core.errors import DataError, InputError


def test_examples_refuse_columns_of_different_length() -> None:
    with pytest.raises(DataError, match="x and y differ in length"):
        Examples(x=torch.zeros(3, 2), y=torch.zeros(2), classes=None)
    with pytest.raises(DataError, match="x and group differ in length"):
        Examples(x=torch.zeros(3, 2), y=torch.zeros(3), group=torch.zeros(2), classes=None)


def test_take_keeps_columns_together() -> None:
    examples = Examples(
        x=torch.arange(6.0).reshape(3, 2),
        y=torch.tensor([0, 1, 0]),
        group=torch.tensor([5, 6, 7]),
        classes=("a", "b"),
    )
    taken = examples.take(torch.tensor([2, 0]))
    assert taken.x.tolist() == [[4, 5], [0, 1]]
    assert taken.y.tolist() == [0, 0]
    assert taken.group is not None
    assert taken.group.tolist() == [7, 5]
    assert taken.classes == ("a", "b")
    assert len(taken) == 2


# ── Digits, hold-out and limit ───────────────────────────────────────────────────────────────────────────


def rows(*parts: Examples) -> list[tuple[float, ...]]:
    return sorted(tuple(row) for part in parts for row in part.x.flatten(1).tolist())


def test_digits_are_all_there_and_split_class_by_class() -> None:
    train, test = load(DigitsData(), 0)
    x, y = map(np.asarray, load_digits(return_X_y=True))
    assert train.x.shape[1:] == (1, 8, 8)
    assert rows(train, test) == sorted(map(tuple, (x / 16).tolist()))
    assert train.classes == tuple("0123456789")
    assert len(test) == 359  # 0.2 of 1797
    npt.assert_allclose(np.bincount(test.y), 0.2 * np.bincount(y), atol=1)
    label_of = {tuple(image): label for image, label in zip((x / 16).tolist(), y.tolist(), strict=True)}
    for part in (train, test):
        assert [label_of[tuple(row)] for row in part.x.flatten(1).tolist()] == part.y.tolist()


def test_the_seed_decides_what_is_held_out() -> None:
    first, again, other = (load(DigitsData(), seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.y, other.y)


def test_limit_keeps_some_train_examples_of_every_class_and_all_test_examples() -> None:
    train, test = load(DigitsData(limit=200), 0)
    full, full_test = load(DigitsData(), 0)
    assert len(train) == 200
    assert set(rows(train)) <= set(rows(full))
    assert torch.equal(test.x, full_test.x)
    assert np.bincount(train.y).min() >= 19
    assert len(load(DigitsData(limit=10**6), 0)[0]) == len(full)


def test_hold_out_is_stratified_by_group_and_spares_single_examples(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(122.0)[:, None])
    np.save(tmp_path / "y.npy", np.array([0, 1] * 60 + [2, 2]))
    np.save(tmp_path / "g.npy", np.array(["b"] * 40 + ["a"] * 80 + ["c", "d"]))
    config = NpyData(x=str(tmp_path / "x.npy"), y=str(tmp_path / "y.npy"), group=str(tmp_path / "g.npy"),
                     test_fraction=0.25)  # fmt: skip
    train, test = load(config, 3)
    assert train.groups == ("a", "b", "c", "d")
    assert test.group is not None
    assert train.group is not None
    table = np.zeros((4, 3), int)
    np.add.at(table, (test.group.numpy(), test.y.numpy()), 1)
    assert table.tolist() == [[10, 10, 0], [5, 5, 0], [0, 0, 0], [0, 0, 0]]
    assert {2, 3} <= set(train.group.tolist())


def test_tiny_sets_can_still_be_held_out(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(3.0)[:, None])
    np.save(tmp_path / "y.npy", np.array(["u", "v", "w"]))
    train, test = load(NpyData(x=str(tmp_path / "x.npy"), y=str(tmp_path / "y.npy")), 0)
    assert (len(train), len(test)) == (2, 1)


# ── idx ──────────────────────────────────────────────────────────────────────────────────────────────────


def write_idx(path: Path, values: np.ndarray, *, packed: bool = False) -> str:
    data = struct.pack(">BBBB", 0, 0, 8, values.ndim)
    data += struct.pack(f">{values.ndim}I", *values.shape) + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if packed else data)
    return str(path)


def idx_files(folder: Path, *, packed: bool = False, part: str = "train", number: int = 10) -> dict[str, str]:
    images = np.arange(number * 2 * 3).reshape(number, 2, 3) % 256
    return {
        f"{part}_images": write_idx(folder / f"{part}-images", images, packed=packed),
        f"{part}_labels": write_idx(folder / f"{part}-labels", 3 + np.arange(number) % 2, packed=packed),
    }


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_with_a_test_set(tmp_path: Path, packed: bool) -> None:
    paths = idx_files(tmp_path, packed=packed) | idx_files(tmp_path, packed=packed, part="test", number=4)
    train, test = load(IdxData.model_validate(paths), 0)
    assert train.x.shape == (10, 1, 2, 3)
    npt.assert_allclose(train.x.flatten(), np.arange(60) / 255, rtol=1e-6)
    assert train.y.tolist() == [0, 1] * 5
    assert train.classes == ("3", "4")
    npt.assert_allclose(test.x.flatten(), np.arange(24) / 255, rtol=1e-6)


def test_idx_without_a_test_set_holds_some_out(tmp_path: Path) -> None:
    train, test = load(IdxData.model_validate(idx_files(tmp_path)), 0)
    assert (len(train), len(test)) == (8, 2)
    assert sorted(test.y.tolist()) == [0, 1]


def test_damaged_idx_files_are_refused(tmp_path: Path) -> None:
    good = idx_files(tmp_path)
    images = Path(good["train_images"])
    whole = images.read_bytes()
    for data, problem in (
        (b"\x89PNG" + whole[4:], "does not begin like an idx file but with 89504e47"),
        (b"", "does not begin like an idx file"),
        (whole[:-1], "holds 75 bytes where its header asks for 76"),
        (whole[:9], "holds 9 bytes where its header asks for 16"),
        (gzip.compress(whole)[:-12], "gzip stream is damaged"),
        (gzip.compress(whole)[:15] + b"garbage" * 5, "gzip stream is damaged"),
    ):
        images.write_bytes(data)
        with pytest.raises(DataError, match=rf"data\.train_images = .*{problem}"):
            load(IdxData.model_validate(good), 0)


def test_idx_files_that_do_not_match_are_refused(tmp_path: Path) -> None:
    good = idx_files(tmp_path)
    with pytest.raises(DataError, match="there is no such file"):
        load(IdxData.model_validate(good | {"train_labels": str(tmp_path / "absent")}), 0)
    with pytest.raises(DataError, match="not images and their labels"):
        load(IdxData(train_images=good["train_labels"], train_labels=good["train_images"]), 0)
    short = write_idx(tmp_path / "short", np.arange(9) % 2)
    with pytest.raises(DataError, match=r"data\.train_labels = 9: there are 10 x"):
        load(IdxData.model_validate(good | {"train_labels": short}), 0)
    with pytest.raises(ValidationError, match="go together"):
        IdxData.model_validate(good | {"test_images": "x"})


def test_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idx_files(tmp_path)
    monkeypatch.setenv("HANSA_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for prefix in ("$HANSA_TEST_FOLDER/", "${HANSA_TEST_FOLDER}/", "~/"):
        load(IdxData(train_images=prefix + "train-images", train_labels=prefix + "train-labels"), 0)
    monkeypatch.chdir(tmp_path)
    load(IdxData(train_images="train-images", train_labels="train-labels"), 0)


# ── csv ──────────────────────────────────────────────────────────────────────────────────────────────────

TABLE = """age, site ,weight,kind,sick
10,north,1.5,a,no
20,south,2.5,b,yes
30,north,,a,no
40,"so,uth",4.5,c,yes
50,north,5.5,?,no
"""


def csv_file(folder: Path, text: str, name: str = "table.csv") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_csv_columns_by_hand(tmp_path: Path) -> None:
    path = csv_file(tmp_path, TABLE)
    config = CsvData(
        path=path, test_path=path, target="sick", group="site", categorical=("kind",), missing="mean"
    )
    train, test = load(config, 0)
    age = (np.array([10, 20, 30, 40, 50]) - 30) / np.sqrt(200)
    weight = np.array([1.5, 2.5, 3.5, 4.5, 5.5]) - 3.5  # the gap is filled by the mean of the others
    expected = np.column_stack([age, weight / np.sqrt(2), np.eye(3)[[0, 1, 0, 2, 0]]])
    expected[4, 2:] = [0.5, 0.25, 0.25]
    npt.assert_allclose(train.x, expected, atol=1e-6)
    npt.assert_allclose(test.x, expected, atol=1e-6)
    assert train.classes == ("no", "yes")
    assert train.y.tolist() == [0, 1, 0, 1, 0]
    assert train.groups == ("north", "so,uth", "south")
    assert train.group is not None
    assert train.group.tolist() == [0, 2, 0, 1, 0]


def test_csv_is_standardised_by_the_train_statistics_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(1.6e9, 30, (200, 2))  # seconds: single precision would not tell them apart
    lines = [f"{a!r},{b!r},7,{at % 2}" for at, (a, b) in enumerate(values.tolist())]
    config = CsvData(path=csv_file(tmp_path, "\n".join(lines)), target=-1, has_header=False)
    train, test = load(config, 0)
    assert (len(train), len(test)) == (160, 40)
    npt.assert_allclose(train.x.mean(dim=0), 0, atol=1e-5)
    npt.assert_allclose(train.x.std(dim=0, correction=0), [1, 1, 0], atol=1e-5)  # the third is constant
    assert test.x.mean(dim=0)[:2].abs().max() > 0.01
    spread = np.ptp(np.concatenate([train.x, test.x])[:, 0])
    npt.assert_allclose(spread, np.ptp(values[:, 0]) / 30, rtol=0.2)  # 160 draws: deviation known to 6 %


def test_csv_features_constant_but_for_rounding_are_only_centred(tmp_path: Path) -> None:
    """The mean of a thousand 0.3 is another number, which then fills the gaps; 0.1 + 0.2 is another, too."""
    lines = "".join(
        f"{('0.3', '')[at % 2]},{(0.3, 0.1 + 0.2)[at % 2]!r},{at},{at % 2}\n" for at in range(2000)
    )
    test = csv_file(tmp_path, "a,b,c,y\n0.4,0.5,0,0\n", "test.csv")
    path = csv_file(tmp_path, "a,b,c,y\n" + lines)
    train, held_out = load(CsvData(path=path, test_path=test, target="y", missing="mean"), 0)
    npt.assert_allclose(train.x[:, :2], 0, atol=1e-7)
    npt.assert_allclose(held_out.x[0, :2], [0.1, 0.2], atol=1e-7)


def test_csv_ids_longer_than_floats_or_of_two_parts_stay_apart(tmp_path: Path) -> None:
    """A double holds whole numbers to 2^53 = 9.0e15; Python reads 3_12 as 312."""
    for ids in (
        ("1000000000000000001", "1000000000000000002", "1000000000000000010"),
        ("3_12", "31_2", "312"),
    ):
        lines = "".join(f"{at},{ids[at % 3]},{at % 2}\n" for at in range(30))
        config = CsvData(path=csv_file(tmp_path, "a,who,y\n" + lines), target="y", group="who")
        train, test = load(config, 0)
        assert sorted(train.groups) == sorted(ids)
        assert len(partition(NaturalPartition(), train, test, 0).train_shards) == 3


def test_classes_are_numbered_as_named_whether_they_occur_or_not(tmp_path: Path) -> None:
    rows = ["1,ill\n", "2,well\n", "3,ill\n", "4,ill\n", "5,well\n"]
    path = csv_file(tmp_path, "a,y\n" + "".join(rows))
    names = ("well", "unknown", "ill")
    train, test = load(CsvData(path=path, test_path=path, target="y", class_names=names), 0)
    assert train.classes == test.classes == names
    assert train.y.tolist() == test.y.tolist() == [2, 0, 2, 2, 0]
    with pytest.raises(DataError, match=r"data\.class_names = .*a class 'well', which is not among them"):
        load(CsvData(path=path, target="y", class_names=("ill", "unknown")), 0)
    with pytest.raises(DataError, match=r"data\.class_names = .*the targets are numbers"):
        load(CsvData(path=path, target="a", categorical=("y",), task="regression", class_names=names), 0)
    # "1" and "1.0" are one class, as they are within a file.
    path = csv_file(tmp_path, "a,y\n" + "".join(f"{i},{i % 2 + 1}.0\n" for i in range(5)))
    train, _ = load(CsvData(path=path, test_path=path, target="y", class_names=("0", "1", "2")), 0)
    assert train.y.tolist() == [1, 2, 1, 2, 1]


def test_csv_features_stand_as_named_whether_they_occur_or_not(tmp_path: Path) -> None:
    names = ("kind=2", "b", "kind=1.0", "a", "kind=3")
    path = csv_file(tmp_path, "a,kind,b,y\n1,1,0,no\n3,3,2,yes\n1,,0,no\n3,1,2,yes\n")
    config = CsvData(
        path=path, test_path=path, target="y", categorical=("kind",), missing="mean", feature_names=names
    )
    train, test = load(config, 0)
    assert train.features == test.features == names
    expected = np.array([[0, -1, 1, -1, 0], [0, 1, 0, 1, 1], [0, -1, 2 / 3, -1, 1 / 3], [0, 1, 1, 1, 0]])
    npt.assert_allclose(train.x, expected, atol=1e-7)
    npt.assert_allclose(test.x, expected, atol=1e-7)
    found, _ = load(config.model_copy(update={"feature_names": None}), 0)
    assert found.features == ("a", "b", "kind=1", "kind=3")
    for wrong, problem in (
        (("a", "b", "kind=1"), "'3': 'table' line 3, column 'kind' is none of 1;"),
        (("b", "kind=1", "kind=3"), "'a': this feature is not among them"),
        ((*names, "c"), "'c': this data has no such feature"),
        (("a", "b"), "'kind=1': this feature is not among them"),
    ):
        with pytest.raises(DataError, match=rf"data\.feature_names = {problem}"):
            load(config.model_copy(update={"feature_names": wrong}), 0)


def test_csv_of_several_files_are_groups(tmp_path: Path) -> None:
    first = csv_file(tmp_path, "1;2;0\n3;4;1.0\n" * 5, "ulm.csv")
    second = csv_file(tmp_path, "5;6;0.0\n\n7;8;10\n" * 5, "bonn.csv")
    config = CsvData(path=(first, second), target=2, has_header=False, delimiter=";")
    train, test = load(config, 0)
    assert train.classes == ("0", "1.0", "10")  # in the order of numbers; 0 and 0.0 are one class
    assert train.groups == ("bonn", "ulm")
    data = partition(NaturalPartition(), train, test, 0)
    assert data.train_shards.sizes.tolist() == [8, 8]
    (tmp_path / "two").mkdir()
    namesake = csv_file(tmp_path / "two", "1;2;0\n3;4;1\n" * 5, "ulm.csv")
    train, _ = load(config.model_copy(update={"path": (first, namesake)}), 0)
    assert train.groups == tuple(sorted((first, namesake)))


def test_csv_regression_and_ignored_columns(tmp_path: Path) -> None:
    text = "id,x,y\n" + "".join(f"row{at},{at},{at / 2}\n" for at in range(10))
    train, test = load(
        CsvData(path=csv_file(tmp_path, text), target="y", ignore=("id",), task="regression"), 0
    )
    assert train.classes is None
    assert train.x.shape == (8, 1)
    assert sorted([*train.y.tolist(), *test.y.tolist()]) == [at / 2 for at in range(10)]


@pytest.mark.parametrize(
    ("text", "changes", "problem"),
    [
        (TABLE, {"target": "ill"}, r"data\.target = 'ill': .*among age, site, weight, kind, sick"),
        (TABLE, {"target": 5}, r"data\.target = 5: there is no such column"),
        (TABLE, {"group": "city"}, r"data\.group = 'city'"),
        (
            TABLE,
            {"ignore": ("kind", "site")},
            "missing values: 1, columns with any: 1; the first in 'table' line 4,",
        ),
        (TABLE, {"categorical": ("kind", "site")}, "missing values: 2, columns with any: 2; .* line 4"),
        (TABLE, {}, "'north': 'table' line 2, column 'site' is not a number"),
        (TABLE, {"categorical": ("kind", -1)}, r"data\.categorical = 'sick': it is the target"),
        (TABLE, {"target": "kind", "ignore": ("site", "weight", "sick")}, "missing values: 1"),
        (TABLE, {"ignore": ("age", "site", "weight", "kind")}, "no column is left to learn from"),
        (TABLE, {"delimiter": ";"}, "'sick': there is no such column among age, site"),
        ("a,b\n1,2\n3\n", {"target": "b"}, r"line 3 has 1 fields, line 1 2"),
        ("a,b,a\n1,2,3\n", {"target": "b"}, "two columns are named 'a'"),
        ("a,sick\n1,0\n2,inf\n3,1\n", {"task": "regression"}, "'inf': 1 values are not finite"),
        ("a,sick\n1,0\n1e999,0\n3,1\n", {}, "not finite, the first in 'table' line 3, column 'a'"),
        ("a,sick\n1,0\n2,0\n3,0\n", {}, "all examples are of this one class"),
        ("a,sick\n,0\nnan,1\n?,1\n", {"missing": "mean"}, "no value in any train example"),
        ("a,sick\n", {}, "there are no rows"),
        ("", {"has_header": False}, "there are no rows"),
        ('a,sick\n1,"0\n', {}, "unexpected end of data"),
    ],
)
def test_csv_refusals(tmp_path: Path, text: str, changes: dict[str, Any], problem: str) -> None:
    config = CsvData.model_validate({"path": csv_file(tmp_path, text), "target": "sick"} | changes)
    with pytest.raises(DataError, match=problem):
        load(config, 0)


def test_csv_files_of_different_columns_or_bytes_are_refused(tmp_path: Path) -> None:
    first = csv_file(tmp_path, "a,b\n1,2\n", "one.csv")
    second = csv_file(tmp_path, "b,a\n1,2\n", "two.csv")
    with pytest.raises(DataError, match="'two': its columns differ from those of 'one'"):
        load(CsvData(path=(first, second), target="b"), 0)
    (tmp_path / "one.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="save it as UTF-8"):
        load(CsvData(path=first, target="b"), 0)


# ── Images ───────────────────────────────────────────────────────────────────────────────────────────────


def draw(path: Path, value: object, mode: str = "RGB", size: tuple[int, int] = (4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)  # type: ignore[arg-type]


def test_images_by_class(tmp_path: Path) -> None:
    for number in range(5):
        draw(tmp_path / "cat" / f"{number}.png", (255, 0, 51 * number))
        draw(tmp_path / "dog" / f"{number}.PNG", (0, 255, 0))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    train, test = load(ImagesData(path=str(tmp_path), test_path=str(tmp_path)), 0)
    assert train.x.shape == (10, 3, 3, 4)
    assert train.classes == ("cat", "dog")
    assert train.y.tolist() == [0] * 5 + [1] * 5
    npt.assert_allclose(train.x[3, :, 0, 0], [1, 0, 0.6])
    assert torch.equal(train.x, test.x)


def test_images_by_domain_and_class_resized_and_grey(tmp_path: Path) -> None:
    for at, domain in enumerate(("photo", "sketch")):
        for kind in ("7", "10"):
            for number in range(5):
                draw(tmp_path / domain / kind / f"{number}.png", (51, 51, 51), size=(4 + at, 6))
    config = ImagesData(path=str(tmp_path), layout="domain/class", size=8, grayscale=True)
    train, test = load(config, 0)
    assert train.x.shape == (16, 1, 8, 8)
    npt.assert_allclose(train.x, 0.2, atol=1e-6)
    assert train.groups == ("photo", "sketch")
    assert train.classes == ("7", "10")
    assert test.group is not None
    assert sorted(zip(test.group.tolist(), test.y.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_sixteen_bit_greys_are_not_cut_off(tmp_path: Path) -> None:
    config = ImagesData(path=str(tmp_path), test_path=str(tmp_path), grayscale=True)
    for kind, value in (("dark", 0x4000), ("light", 0x8000)):
        (tmp_path / kind).mkdir()
        Image.fromarray(np.full((2, 2), value, np.uint16)).save(tmp_path / kind / "0.png")
        greys = np.full((2, 2), value, ">u2").tobytes()
        (tmp_path / kind / "1.pgm").write_bytes(b"P5 2 2 65535\n" + greys)
    train, _ = load(config, 0)
    npt.assert_allclose(train.x[:, 0, 0, 0] * 255, [0x40, 0x40, 0x80, 0x80], atol=1e-4)
    for kind, grey in (("dark", np.int32(64)), ("light", np.float32(128))):
        Image.fromarray(np.full((2, 2), grey)).save(tmp_path / kind / "0.tif")
        (tmp_path / kind / "0.png").unlink()
    train, _ = load(config, 0)
    npt.assert_allclose(train.x[:, 0, 0, 0] * 255, [0x40, 0x40, 0x80, 0x80], atol=1e-4)
    for none in (np.int32(256), np.float32(0.5)):
        Image.fromarray(np.full((2, 2), none)).save(tmp_path / "dark" / "0.tif")
        with pytest.raises(DataError, match=r"0\.tif': its greys are not from 0 to 255"):
            load(config, 0)


def test_image_refusals(tmp_path: Path) -> None:
    config = ImagesData(path=str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"data\.path = .*there is no such folder"):
        load(config, 0)
    draw(tmp_path / "set" / "a" / "1.png", (0, 0, 0))
    with pytest.raises(DataError, match="all examples are of this one class"):
        load(config, 0)
    with pytest.raises(DataError, match=r"no images in its domain/class sub-folders; .* data\.layout"):
        load(ImagesData(path=str(tmp_path / "set"), layout="domain/class"), 0)
    draw(tmp_path / "set" / "b" / "2.png", (0, 0, 0), size=(5, 3))
    with pytest.raises(DataError, match=r"2\.png': it is 5x3 pixels, the first 4x3; set data\.size"):
        load(config, 0)
    whole = (tmp_path / "set" / "a" / "1.png").read_bytes()
    for damaged in (b"nonsense", whole[:40], b""):
        (tmp_path / "set" / "b" / "2.png").write_bytes(damaged)
        with pytest.raises(DataError, match=r"2\.png': the image cannot be read"):
            load(config, 0)


# ── npy ──────────────────────────────────────────────────────────────────────────────────────────────────


def npy_files(folder: Path, **arrays: np.ndarray) -> dict[str, str]:
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    return {name: str(folder / f"{name}.npy") for name in arrays}


def test_npy_classification_with_groups_and_a_test_set(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.uint8).reshape(4, 1, 2, 3)
    paths = npy_files(
        tmp_path, x=x, y=np.array([-1, 10, 9, 10]), group=np.array([0.5, 2.0, 2.0, 0.5]),
        test_x=x[:2], test_y=np.array([9, 11]), test_group=np.array([2.0, 3.0]),
    )  # fmt: skip
    train, test = load(NpyData.model_validate(paths | {"scale": 2.0}), 0)
    npt.assert_allclose(train.x, x / 2)
    assert train.x.dtype == torch.float32
    assert train.classes == test.classes == ("-1", "9", "10", "11")
    assert train.y.tolist() == [0, 2, 1, 2]
    assert test.y.tolist() == [1, 3]
    assert train.groups == ("0.5", "2", "3")


@pytest.mark.parametrize("targets", [(), (2,)])
def test_npy_regression(tmp_path: Path, targets: tuple[int, ...]) -> None:
    y = np.random.default_rng(0).normal(size=(20, *targets))
    train, test = load(NpyData.model_validate(npy_files(tmp_path, x=np.zeros((20, 3)), y=y)), 0)
    assert train.classes is None
    assert train.y.dtype == torch.float32
    npt.assert_allclose(np.sort(np.concatenate([train.y, test.y]), axis=0), np.sort(y, axis=0), rtol=1e-6)


def test_npy_refusals(tmp_path: Path) -> None:
    x, y = np.zeros((10, 3)), np.arange(10) % 2
    good = npy_files(tmp_path, x=x, y=y)
    bad = x.copy()
    bad[4, 1], bad[7, 0] = np.nan, np.inf
    for changes, problem in (
        ({"x": bad}, r"2 values of x are not finite, the first in example 4 at \(1,\)"),
        ({"x": x + 1e300}, "30 values of x are not finite"),
        ({"x": x[:0], "y": y[:0]}, "there are no examples"),
        ({"x": x[:9]}, "there are 9 x for so many y"),
        ({"x": x[:, 0]}, r"features are real numbers \[N, ...\]"),
        ({"x": x.astype(complex)}, "features are real numbers"),
        ({"x": x.astype(object)}, "cannot be read as an array of numbers.*not objects"),
        ({"y": np.stack([y, y], axis=1)}, "labels are whole numbers or text"),
        ({"y": y * 0}, "all examples are of this one class"),
        ({"y": np.where(y == 1, np.nan, 0.0)}, "5 values of y are not finite, the first in example 1 "),
        ({"y": np.float64(3)}, "holds a single value"),
    ):
        paths = good | npy_files(tmp_path, **{name: np.asarray(values) for name, values in changes.items()})
        with pytest.raises(DataError, match=problem):
            load(NpyData.model_validate(paths), 0)
        npy_files(tmp_path, x=x, y=y)
    whole = Path(good["x"]).read_bytes()
    archive = tmp_path / "x.npz"
    np.savez(archive, x=x)
    for data in (whole[:-1], whole[:20], b"PK", archive.read_bytes()):
        Path(good["x"]).write_bytes(data)
        with pytest.raises(DataError, match=r"data\.x = .*cannot be read as an array of numbers"):
            load(NpyData.model_validate(good), 0)


def test_npy_parts_that_do_not_match_are_refused(tmp_path: Path) -> None:
    paths = npy_files(
        tmp_path, x=np.zeros((6, 3)), y=np.arange(6) % 2, test_x=np.zeros((2, 4)), test_y=np.arange(2)
    )
    with pytest.raises(DataError, match=r"train examples are \[3\], tests not"):
        load(NpyData.model_validate(paths), 0)
    npy_files(tmp_path, test_y=np.zeros(2))
    with pytest.raises(DataError, match="give both the same type"):
        load(NpyData.model_validate(paths), 0)
    group = npy_files(tmp_path, group=np.zeros(5))
    with pytest.raises(DataError, match="there are 6 x for so many groups"):
        load(NpyData(x=paths["x"], y=paths["y"], group=group["group"]), 0)
    for unpaired in ({"test_x": "a"}, {"test_x": "a", "test_y": "b", "group": "c"}):
        with pytest.raises(ValidationError, match="go together"):
            NpyData.model_validate({"x": "x", "y": "y"} | unpaired)


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────


def spelled(examples: Examples, row: int) -> tuple[str, str]:
    assert examples.classes is not None
    x, y = (
        "".join(examples.classes[token] for token in tokens[row].tolist())
        for tokens in (examples.x, examples.y)
    )
    return x, y


def test_text_is_cut_into_pieces_that_tell_every_character_once(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("äbcdefgä€\n", encoding="utf-8")
    parts = load(TextData(path=str(tmp_path / "text"), length=3), 0)
    pieces = sorted(spelled(part, row) for part in parts for row in range(len(part)))
    assert pieces == sorted([("äbc", "bcd"), ("def", "efg"), ("gä€", "ä€\n")])
    assert parts[0].classes == ("\n", "b", "c", "d", "e", "f", "g", "ä", "€")
    assert parts[0].x.dtype == parts[0].y.dtype == torch.int64
    assert len(parts[1]) == 1
    names = tuple("€äxgfedcb\n")
    parts = load(TextData(path=str(tmp_path / "text"), length=3, class_names=names), 0)
    assert sorted(spelled(part, row) for part in parts for row in range(len(part))) == pieces
    assert parts[0].classes == names


PLAY = """ROMEO:
abcdef
ghij

First Citizen:
One speech: of two
lines.

ROMEO:
klmnop

MUTE:
-
"""


def test_text_by_speaker(tmp_path: Path) -> None:
    (tmp_path / "play").write_text(PLAY)
    train, test = load(TextData(path=str(tmp_path / "play"), length=5, by_speaker=True), 0)
    assert train.groups == ("First Citizen", "ROMEO")  # the mute says too little for an example
    said: dict[int, list[str]] = {0: [], 1: []}
    for part in (train, test):
        assert part.group is not None
        for row, group in enumerate(part.group.tolist()):
            said[group].append(spelled(part, row)[0])
    assert sorted(said[1]) == sorted(["abcde", "f\nghi", "j\nklm"])
    assert sorted(said[0]) == sorted(["One s", "peech", ": of ", "two\nl"])
    assert "R" not in (train.classes or ())  # names are no part of what is said


def test_text_refusals(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("too short")
    with pytest.raises(DataError, match=r"data\.length = 80: the text has 9 characters"):
        load(TextData(path=str(path)), 0)
    with pytest.raises(DataError, match="no speech is headed"):
        load(TextData(path=str(path), by_speaker=True, length=2), 0)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="save it as UTF-8"):
        load(TextData(path=str(path)), 0)


# ── Hugging Face ─────────────────────────────────────────────────────────────────────────────────────────


def test_huggingface_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        InputError, match=r"'datasets' is not installed; install it by: pip install 'hansa\[data\]'"
    ):
        load(HuggingFaceData(path="mnist", image="image"), 0)


def test_huggingface_wants_one_kind_of_input() -> None:
    for columns in ({}, {"image": "a", "features": ("b",)}):
        with pytest.raises(ValidationError, match="either image or features"):
            HuggingFaceData.model_validate({"path": "mnist"} | columns)


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the extra hansa[data] is not installed"
)
@pytest.mark.filterwarnings("default")  # warnings of that library are not ours
def test_huggingface_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets: Any = importlib.import_module("datasets")
    number = 20
    saved = datasets.Dataset.from_dict(
        {
            "picture": [Image.new("L", (3, 2), 51) for _ in range(number)],
            "label": [at % 2 for at in range(number)],
            "site": [f"s{at % 4}" for at in range(number)],
            "age": list(range(number)),
            "pair": [[at, -at] for at in range(number)],
        },
        features=datasets.Features(
            {
                "picture": datasets.Image(),
                "label": datasets.ClassLabel(names=["cat", "dog"]),
                "site": datasets.Value("string"),
                "age": datasets.Value("float32"),
                "pair": [datasets.Value("float32")],
            }
        ),
    )
    datasets.DatasetDict(train=saved, test=saved.select(range(6))).save_to_disk(str(tmp_path / "two"))
    path = str(tmp_path / "two")

    train, test = load(HuggingFaceData(path=path, image="picture", group="site", grayscale=True), 0)
    assert train.x.shape == (16, 1, 2, 3)
    npt.assert_allclose(train.x, 0.2, atol=1e-6)
    assert (train.classes, train.groups) == (("cat", "dog"), ("s0", "s1", "s2", "s3"))
    train, test = load(HuggingFaceData(path=path, features=("age", "pair"), test_split="test"), 0)
    assert train.x[3].tolist() == [3, 3, -3]
    assert (len(train), len(test)) == (20, 6)
    train, _ = load(HuggingFaceData(path=path, features=("pair",), label="age", task="regression"), 0)
    assert train.classes is None
    for changes, problem in (
        ({"split": "nope"}, r"data\.split = .*'nope' cannot be loaded"),
        (
            {"features": ("height",)},
            r"data\.features = 'height': there is no such column among picture, label",
        ),
        ({"features": ("site",)}, "it is not numeric"),
        ({"path": str(tmp_path / "absent")}, "cannot be loaded"),
    ):
        with pytest.raises(DataError, match=problem):
            load(HuggingFaceData.model_validate({"path": path, "features": ("age",)} | changes), 0)


# ── Synthetic ────────────────────────────────────────────────────────────────────────────────────────────


def by_domain(config: SyntheticFeatureShift, seed: int) -> list[dict[int, set[tuple[float, ...]]]]:
    """Distinct points of each class of each domain, without noise."""
    parts = load(config, seed)
    made: list[dict[int, set[tuple[float, ...]]]] = [{} for _ in range(config.domains)]
    for part in parts:
        assert part.group is not None
        for x, y, group in zip(part.x.tolist(), part.y.tolist(), part.group.tolist(), strict=True):
            made[group].setdefault(y, set()).add(tuple(round(value, 3) for value in x))
    return made


def test_feature_shift_moves_the_same_clusters_by_domain() -> None:
    config = SyntheticFeatureShift(domains=3, examples=40, classes=4, features=2, noise=0)
    domains = by_domain(config, 0)
    assert all(len(points) == 1 for domain in domains for points in domain.values())
    assert domains[0] != domains[1] != domains[2]
    # One affine map takes the four centres of a domain to those of another: 3 of 4 points determine it.
    first, second = (np.array([list(*domain[label]) for label in range(4)]) for domain in domains[:2])
    lifted = np.column_stack([first, np.ones(4)])
    npt.assert_allclose(lifted @ np.linalg.lstsq(lifted, second, rcond=None)[0], second, atol=0.01)
    same = by_domain(config.model_copy(update={"strength": 0.0}), 0)
    assert same[0] == same[1] == same[2]


def test_feature_shift_has_the_same_labels_in_every_domain() -> None:
    train, test = load(SyntheticFeatureShift(domains=3, examples=40, test_fraction=0.3), 0)
    assert train.groups == ("domain 0", "domain 1", "domain 2")
    assert train.group is not None
    assert np.bincount(train.group * 4 + train.y).tolist() == [7] * 12
    assert len(test) == 36


@pytest.mark.parametrize(("alpha", "low", "high"), [(0.05, 0.6, 1.0), (1e6, 0.25, 0.32)])
def test_label_shift_skews_the_classes_by_alpha(alpha: float, low: float, high: float) -> None:
    train, test = load(SyntheticLabelShift(groups=20, examples=400, alpha=alpha), 0)
    assert train.group is not None
    table = np.zeros((20, 4))
    np.add.at(table, (train.group.numpy(), train.y.numpy()), 1)
    # Mean share of the commonest class; even classes give a quarter and sampling a few hundredths more.
    assert low <= (table.max(axis=1) / table.sum(axis=1)).mean() <= high
    assert len(train) + len(test) == 8000


def test_label_shift_keeps_the_clusters() -> None:
    train, _ = load(SyntheticLabelShift(groups=3, noise=0, alpha=10), 0)
    assert len({tuple(row) for row in train.x.tolist()}) == 4


def test_synthetic_data_belongs_to_the_seed() -> None:
    for config in (SyntheticFeatureShift(), SyntheticLabelShift()):
        first, again, other = (load(config, seed)[0] for seed in (0, 0, 1))
        assert torch.equal(first.x, again.x)
        assert first.x.shape != other.x.shape or not torch.equal(first.x, other.x)


# ── Configuration ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("union", [DataConfig, PartitionConfig], ids=["data", "partition"])
def test_every_option_is_described(union: Any) -> None:
    for model in get_args(get_args(union)[0]):
        assert issubclass(model, BaseModel)
        assert model.model_config.get("extra") == "forbid"
        assert model.model_config.get("frozen")
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_configuration_by_source() -> None:
    adapter: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)
    assert adapter.validate_python({"source": "digits"}) == DigitsData()
    made = adapter.validate_python({"source": "csv", "path": ["a", "b"], "target": -1, "ignore": ["id", 3]})
    assert made == CsvData(path=("a", "b"), target=-1, ignore=("id", 3))
    for wrong in (
        {"source": "digits", "size": 3},
        {"source": "cloud"},
        {"source": "digits", "test_fraction": 1},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


# ── Real data ────────────────────────────────────────────────────────────────────────────────────────────

HANSA_DATA = Path(os.environ.get("HANSA_DATA", "absent"))
needs_data = pytest.mark.skipif(
    not HANSA_DATA.is_dir(), reason="HANSA_DATA does not name a folder of data sets"
)


@needs_data
def test_mnist() -> None:
    folder = HANSA_DATA / "mnist"
    train, test = load(
        IdxData(
            train_images=str(folder / "train-images-idx3-ubyte.gz"),
            train_labels=str(folder / "train-labels-idx1-ubyte.gz"),
            test_images=str(folder / "t10k-images-idx3-ubyte.gz"),
            test_labels=str(folder / "t10k-labels-idx1-ubyte.gz"),
        ),
        0,
    )
    assert train.x.shape == (60_000, 1, 28, 28)
    assert (len(test), test.classes) == (10_000, tuple("0123456789"))
    npt.assert_allclose(float(train.x.mean()), 0.1307, atol=1e-4)  # the mean everybody normalises by


@needs_data
def test_heart_disease_by_hospital() -> None:
    paths = tuple(
        str(HANSA_DATA / "heart_disease" / f"processed.{place}.data")
        for place in ("cleveland", "hungarian", "switzerland", "va")
    )
    config = CsvData(path=paths, target=-1, has_header=False)
    with pytest.raises(DataError, match="columns with any: 10"):
        load(config, 0)
    train, test = load(config.model_copy(update={"missing": "mean"}), 0)
    assert len(train) + len(test) == 920
    assert train.classes == tuple("01234")
    data = partition(NaturalPartition(), train, test, 0)
    total = data.train_shards.sizes + data.test_shards.sizes
    assert total.tolist() == [303, 294, 123, 200]
    npt.assert_allclose(data.test_shards.sizes / total, 0.2, atol=0.02)


@needs_data
def test_shakespeare_by_speaker() -> None:
    config = TextData(
        path=str(HANSA_DATA / "text" / "tinyshakespeare" / "input.txt"), length=40, by_speaker=True
    )
    train, test = load(config, 0)
    assert "ROMEO" in train.groups
    assert 200 < len(train.groups) < 299
    data = partition(NaturalPartition(), train, test, 0)
    assert data.clients == len(train.groups)
