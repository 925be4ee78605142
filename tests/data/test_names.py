"""Names in a table, and the files they mean."""

import pytest

from har.data.names import NameFinder

FILES = {"train/a.jpg", "train/b/a.jpg", "train/C.JPG", "train/d.png", "other/e.jpg", "top.jpg"}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a.jpg", "train/a.jpg"),
        ("b/a.jpg", "train/b/a.jpg"),
        ("b\\a.jpg", "train/b/a.jpg"),
        (".//a.jpg", "train/a.jpg"),
        ("train/a.jpg", "train/a.jpg"),
        (" a.jpg ", "train/a.jpg"),
        ("c.jpg", "train/C.JPG"),
        ("d", "train/d.png"),
        ("d.JPG", "train/d.png"),
        ("gone.jpg", "train/gone.jpg"),
        ("", ""),
    ],
)
def test_a_name_is_found_in_the_usual_folder(name: str, path: str) -> None:
    assert NameFinder(FILES, "train").find_all(["a.jpg", name])[0] == ["train/a.jpg", path]


def test_a_missing_file_is_not_found_elsewhere() -> None:
    """Another image of that name would have another label."""
    paths, notes = NameFinder(FILES, "train").find_all(["a.jpg", "d.png", "e.jpg"])
    assert paths == ["train/a.jpg", "train/d.png", "train/e.jpg"] and notes == []


def test_one_place_for_all_names_and_it_is_noted() -> None:
    finder = NameFinder(FILES, "train")
    assert finder.find_all(["other/e.jpg", "top.jpg"]) == (
        ["other/e.jpg", "top.jpg"], ["names found from the data folder on, such as 'other/e.jpg'"],
    )  # fmt: skip
    assert finder.find_all(["x/e.jpg", "y/b/a.jpg"])[0] == ["other/e.jpg", "train/b/a.jpg"]


def test_a_name_that_two_files_could_be_is_not_found() -> None:
    finder = NameFinder({"train/a.jpg", "train/A.jpg", "train/b.png", "train/b.jpg"}, "train")
    assert not finder.exists("a.JPG") and not finder.exists("b") and finder.exists("A.jpg")


def test_what_was_assumed_is_counted() -> None:
    notes = NameFinder(FILES, "train").find_all(["A.JPG", "c.jpg", "d"])[1]
    assert notes == [
        "2 names found with capital and small letters exchanged",
        "1 names found with another ending, such as .jpg",
    ]
