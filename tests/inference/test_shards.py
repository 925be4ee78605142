"""Predictions in shards: whole or missing, in any order of arrival, never of another task."""

import json
import random
from pathlib import Path

import pandas as pd
import pytest

from har.inference import shards
from har.inference.classifier import Prediction, explain_failure
from har.inference.predict import predict_to_file
from har.inference.shards import TASK_FILE, open_shards
from har.util.errors import UserError
from har.util.places import Place, Url, list_below, read_place, replace_place
from tests.util.test_places import memory as memory

NAMES = [f"a{number}.jpg" for number in range(25)] + ["=1+1.jpg", "\udcff.jpg"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 10)


def predict(number: int) -> Prediction:
    if number % 7 == 3:
        return explain_failure(f"bad, number {number}")
    return {"label": "running", "probability": number / 30 + 0.01, "top_3": [], "error": None}


def fill(folder: Place, numbers: list[int], format: str = "parquet") -> None:
    found = open_shards(folder, NAMES, "m", format)
    for number in numbers:
        found.add(number, predict(number))


def test_a_second_row_changes_nothing(tmp_path: Path) -> None:
    found = open_shards(tmp_path / "out", NAMES, "m")
    for number in range(10):
        assert found.add(number, predict(number))
        assert not found.add(number, explain_failure("late"))
    assert found.waiting == {}
    assert [row["label"] for row in found.read_shard(0)].count("running") == 9


def test_any_order_and_twice_gives_the_same_files(tmp_path: Path) -> None:
    numbers = list(range(len(NAMES)))
    fill(tmp_path / "one", numbers)
    shuffled = numbers * 2
    random.Random(0).shuffle(shuffled)
    fill(tmp_path / "other", shuffled)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [TASK_FILE, *(f"part-0000{n}.parquet" for n in range(3))]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    # as everybody reads such a folder
    table = pd.read_parquet(tmp_path / "one")
    assert len(table) == 27 and table["filename"][26] == "\\udcff.jpg"
    assert table["label"].isna().sum() == 4 == table["error"].notna().sum()


def test_an_interruption_loses_unfinished_shards_alone(tmp_path: Path) -> None:
    fill(tmp_path / "out", [*range(12), *range(20, 27)])
    found = open_shards(tmp_path / "out", NAMES, "m")
    assert found.missing == {1} and found.numbers == list(found.rows(1)) == list(range(10, 20))
    before = (tmp_path / "out" / "part-00000.parquet").stat().st_mtime_ns
    fill(tmp_path / "out", list(range(10, 20)))
    assert open_shards(tmp_path / "out", NAMES, "m").missing == set()
    assert (tmp_path / "out" / "part-00000.parquet").stat().st_mtime_ns == before
    outcome = found.summarise()
    assert (outcome.images, outcome.failed, outcome.first_error) == (27, 4, "bad, number 3")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_joined_they_are_what_one_process_writes(tmp_path: Path, suffix: str) -> None:
    fill(tmp_path / "shards", list(range(len(NAMES))))
    open_shards(tmp_path / "shards", NAMES, "m").join(tmp_path / f"joined{suffix}")
    images = tmp_path / "images"
    images.mkdir()
    files = {name: images / str(number) for number, name in enumerate(NAMES)}
    for number, path in enumerate(files.values()):
        path.write_bytes(str(number).encode())
    one = tmp_path / f"one{suffix}"
    predict_to_file(
        images, files, one, lambda contents: [predict(int(each)) for each in contents], "m"
    )
    if suffix == ".csv":
        assert (tmp_path / "joined.csv").read_bytes() == one.read_bytes()
    else:
        pd.testing.assert_frame_equal(
            pd.read_parquet(tmp_path / "joined.parquet"), pd.read_parquet(one)
        )


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path / "mine", list(range(27)))
    for names, model in ((NAMES[1:], "m"), (NAMES, "other"), (NAMES[::-1], "m")):
        with pytest.raises(UserError, match="another model, of other images or in another format"):
            open_shards(tmp_path / "mine", names, model)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"other files \(cat.jpg\)"):
        open_shards(tmp_path / "photos", NAMES, "m")
    (tmp_path / "mine" / TASK_FILE).write_text(json.dumps({"model": "m"}))
    with pytest.raises(UserError):
        open_shards(tmp_path / "mine", NAMES, "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        open_shards(tmp_path / "file", NAMES, "m")


ALL = list(range(len(NAMES)))


def test_csv_files_hold_the_same_rows(tmp_path: Path) -> None:
    fill(tmp_path / "parquet", ALL)
    fill(tmp_path / "csv", ALL[::-1], "csv")
    found = open_shards(tmp_path / "csv", NAMES, "m", "csv")
    assert list(found.read()) == list(open_shards(tmp_path / "parquet", NAMES, "m").read())
    assert found.summarise().failed == 4 and not found.missing
    names = sorted(path.name for path in (tmp_path / "csv").iterdir())
    assert names == [TASK_FILE, *(f"part-0000{n}.csv" for n in range(3))]
    lines = (tmp_path / "csv" / "part-00002.csv").read_text().splitlines()
    assert lines[0] == "filename,label,probability,error" and lines[6].startswith("'=1+1.jpg,")
    # each has a header, as readers of several CSV files expect
    tables = [pd.read_csv(tmp_path / "csv" / name) for name in names[1:]]
    assert sum(map(len, tables)) == 27
    for folder, format in (("csv", "parquet"), ("parquet", "csv")):
        with pytest.raises(UserError, match="in another format"):
            open_shards(tmp_path / folder, NAMES, "m", format)


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_elsewhere_an_interruption_loses_unfinished_shards_alone(
    memory: Url, tmp_path: Path, format: str
) -> None:
    fill(memory, [*range(12), *range(20, 27)], format)
    names = [TASK_FILE, f"part-00000.{format}", f"part-00002.{format}"]
    assert list_below(memory) == names
    found = open_shards(memory, NAMES, "m", format)
    assert found.missing == {1}
    fill(memory, list(range(10, 20)), format)
    # the same bytes as on this machine
    fill(tmp_path / "local", ALL, format)
    assert len(list_below(memory)) == 4
    for path in (tmp_path / "local").iterdir():
        assert read_place(memory / path.name, 100_000) == path.read_bytes()
    for suffix in (".csv", ".parquet"):
        found.join(memory.with_name(f"joined{suffix}"))
        found.join(tmp_path / f"joined{suffix}")
        joined = read_place(memory.with_name(f"joined{suffix}"), 100_000)
        assert joined == (tmp_path / f"joined{suffix}").read_bytes()
    found.delete()
    assert list_below(memory) == []


def test_a_folder_elsewhere_of_something_else_is_left_alone(memory: Url) -> None:
    with replace_place(memory / "cat.jpg") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"other files \(cat.jpg\)"):
        open_shards(memory, NAMES, "m")
    with pytest.raises(UserError, match=r"cannot write into .*cat.jpg: it is a file"):
        open_shards(memory / "cat.jpg", NAMES, "m")
    fill(memory / "mine", ALL)
    with pytest.raises(UserError, match="of other images"):
        open_shards(memory / "mine", NAMES[1:], "m")


@pytest.mark.parametrize("damage", ["cut", "junk", "columns", "rows", "gone"])
@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_a_damaged_shard_is_named(tmp_path: Path, memory: Url, format: str, damage: str) -> None:
    fill(memory, ALL, format)
    found = open_shards(memory, NAMES, "m", format)
    place = found.path(1)
    data = read_place(place, 100_000)
    other = tmp_path / f"x.{format}"
    table = pd.DataFrame({"x": [1]})
    table.to_csv(other, index=False) if format == "csv" else table.to_parquet(other)
    spoilt = {
        "cut": data[: len(data) // 2],
        "junk": b"\xff" * 100,
        "columns": other.read_bytes(),
        "rows": read_place(found.path(2), 100_000),
        "gone": b"",
    }
    if damage == "gone":
        found.delete()
    else:
        with replace_place(place) as file:
            file.write(spoilt[damage])
    with pytest.raises(UserError, match=r"part-0000[01].* cannot be read: .*delete it"):
        found.summarise()


def test_a_disk_that_is_full_is_one_line(memory: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_shards(memory, NAMES, "m")

    def refuse(place: Place) -> None:
        raise OSError("Access Denied")

    monkeypatch.setattr(shards, "replace_place", refuse)
    with pytest.raises(UserError, match=r"cannot write .*part-00000.parquet: Access Denied"):
        for number in range(10):
            found.add(number, predict(number))
    with pytest.raises(UserError, match=r"cannot write memory://x.csv: Access Denied"):
        found.join(Url("memory://x.csv"))
