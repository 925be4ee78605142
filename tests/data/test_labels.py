"""What says which image carries which label."""

from pathlib import Path

import pytest

from har.data.labels import check_rows, read_labels
from har.data.layouts import folder_source
from har.data.splits import Split
from har.util.errors import UserError
from tests.fixtures import CLASSES, read_csv

TESTED = Split(test_file="Testing_set.csv")


def write_test_file(folder: Path, text: str) -> None:
    (folder / "Testing_set.csv").write_text(f"filename,label\n{text}")


def test_training_rows_then_test_rows(raw: Path) -> None:
    write_test_file(raw, "Image_1.jpg,running\nb.jpg,sitting\n")
    rows = read_labels(folder_source(raw, "a test"), TESTED).rows
    assert rows["part"].tolist() == ["train"] * len(read_csv(raw)) + ["test"] * 2
    assert rows["path"].tolist()[-2:] == ["test/Image_1.jpg", "test/b.jpg"]
    assert rows["row"].tolist()[-2:] == [1, 2]
    assert check_rows(rows)[1] == []  # the same name in another folder is another image


def test_a_test_file_may_lie_elsewhere(raw: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("filename,label\na.jpg,running\nb.jpg,sitting\n")
    rows = read_labels(folder_source(raw, "a test"), Split(test_file=str(file))).rows
    assert (rows["file"] == "mine.csv").sum() == 2
    with pytest.raises(UserError, match=r"no such test file: gone.csv, neither here nor in"):
        read_labels(folder_source(raw, "a test"), Split(test_file="gone.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,calling\nb.jpg,calling\n", "every row has the label 'calling'"),
        ("a.jpg,jumping\nb.jpg,sitting\n", "that no training image has: jumping"),
        ("../a.jpg,running\nb.jpg,sitting\n", r"must stay inside the folder test/"),
    ],
)
def test_a_test_file_that_cannot_be_evaluated_on(raw: Path, text: str, message: str) -> None:
    write_test_file(raw, text)
    with pytest.raises(UserError, match=message):
        read_labels(folder_source(raw, "a test"), TESTED)


def test_class_folders_take_no_test_file(tmp_path: Path) -> None:
    for label in CLASSES:
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.JPG").write_bytes(b"x")
    rows = read_labels(folder_source(tmp_path, "a test")).rows
    assert rows[["path", "label"]].to_numpy().tolist() == [
        [f"{label}/a.JPG", label] for label in sorted(CLASSES)
    ]
    with pytest.raises(UserError, match=r"received 'x.csv' for the class folders"):
        read_labels(folder_source(tmp_path, "a test"), Split(test_file="x.csv"))


def test_bad_rows_are_named_as_the_file_writes_them(raw: Path) -> None:
    with (raw / "Training_set.csv").open("a") as file:
        file.write(",sitting\nx.jpg,\nImage_2.jpg,running\n./Image_2.jpg,sitting\n")
    usable, bad = check_rows(read_labels(folder_source(raw, "a test")).rows)
    assert [str(each) for each in bad] == [
        "row 43 of Training_set.csv, '': the filename is empty",
        "row 44 of Training_set.csv, 'x.jpg': the label is empty",
        "row 45 of Training_set.csv, 'Image_2.jpg': listed twice; the first row counts",
        "row 46 of Training_set.csv, './Image_2.jpg': listed twice, before as 'running'; the first"
        " row counts",
    ]
    assert len(usable) == 42
