"""Many images into a table or a file; interrupted and gone on with."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import pandas as pd
import pytest
from PIL import Image

from har.data.layouts import KAGGLE_FOLDER
from har.inference.inputs import find_images, list_unlabelled
from har.inference.predict import BATCH, batched, classify_files, format_row, predict_to_file
from har.util.errors import UserError
from tests.fixtures import write_images


class Counter:
    """A classifier by file size that counts what it was asked and may be interrupted."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.asked, self.stop_after = 0, stop_after
        self.lock = Lock()

    def __call__(self, files: Sequence[bytes]) -> list[dict]:
        with self.lock:
            if self.asked + len(files) > self.stop_after:
                raise KeyboardInterrupt
            self.asked += len(files)
        return [self.row(data) for data in files]

    @staticmethod
    def row(data: bytes) -> dict:
        if not data:
            return {"label": None, "probability": None, "top_3": [], "error": "empty:\n0 bytes"}
        top = [{"label": f"size {len(data)}", "probability": 0.75}]
        top += [{"label": "other", "probability": 0.25}]
        return {**top[0], "top_3": top, "error": None}


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """Kaggle's layout with 70 unlabelled files in test/, listed in another order, and a stray."""
    root = write_images(tmp_path / "kaggle", per_class=1)
    (root / "test").mkdir()
    names = [f"Image_{i}.jpg" for i in range(70)]
    for i, name in enumerate(names):
        (root / "test" / name).write_bytes(b"x" * (i + 1))
    (root / "test" / "Image_3(1).jpg").write_bytes(b"stray")
    (root / "Testing_set.csv").write_text("\n".join(["filename", *reversed(names)]))
    return root


def test_what_is_no_file_of_an_image_is_never_opened(tmp_path: Path) -> None:
    """A pipe would be waited for, and a film read whole."""
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "film.jpg").open("wb") as film:
        film.truncate(30_000_000_000)
    film, pipe = classify_files(find_images([tmp_path]), Counter())
    assert film["error"] == "30,000,000,000 bytes, more than 60,000,000"
    assert pipe["error"] == "not a file"


def read(out: Path) -> list[dict[str, str]]:
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_batches() -> None:
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batched([], 2)) == []


def test_kaggles_list_decides_what_is_scored_and_in_which_order(kaggle: Path) -> None:
    out = kaggle / "scores" / "p.csv"
    assert predict_to_file(kaggle, list_unlabelled(kaggle), out, Counter(), "m").failed == 0
    rows = read(out)
    assert [row["filename"] for row in rows] == [f"Image_{i}.jpg" for i in reversed(range(70))]
    first = {"filename": "Image_69.jpg", "label": "size 70", "probability": "0.75", "error": ""}
    assert rows[0] == first
    assert [path.name for path in out.parent.iterdir()] == ["p.csv"]


def test_without_a_list_all_of_test_without_test_the_folder(kaggle: Path) -> None:
    (kaggle / "Testing_set.csv").unlink()
    found = list_unlabelled(kaggle)
    assert len(found) == 71 and found["Image_1.jpg"] == kaggle / "test" / "Image_1.jpg"
    found = list_unlabelled(kaggle / "train")
    assert found == {f"Image_{i}.jpg": kaggle / "train" / f"Image_{i}.jpg" for i in (1, 2, 3)}


@pytest.mark.parametrize("written", ["test/{}", "./{}", "test\\{}", "{}.jpg"])
def test_names_of_the_list_are_found_however_they_are_written(kaggle: Path, written: str) -> None:
    """As a list of labels is read; the rows keep the names of the list."""
    names = [written.format(f"Image_{i}{'' if '.jpg' in written else '.jpg'}") for i in (1, 2)]
    (kaggle / "Testing_set.csv").write_text("filename\n" + "\n".join(names) + "\n")
    found = list_unlabelled(kaggle)
    assert found == {name: kaggle / f"test/Image_{i}.jpg" for i, name in enumerate(names, 1)}


def test_images_are_known_by_their_content(tmp_path: Path, capsys) -> None:
    for name in ("a.jfif", "b.dat", "sub/c", "d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name, "JPEG")
    (tmp_path / "notes.txt").write_text("mine")
    names = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert names == ["a.jfif", "b.dat", "d.jpg", "sub/c"]
    assert "1 files are no images: notes.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number\n1\n", "lacks the column filename"),
        ("filename\n../Training_set.csv\n", r"row 1 .*no file inside"),
        ("filename\nImage_1.jpg\nImage_1.jpg\n", "lists 1 images more than once"),
    ],
)
def test_a_list_that_cannot_be_used(kaggle: Path, text: str, message: str) -> None:
    (kaggle / "Testing_set.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        list_unlabelled(kaggle)


def test_bad_images_are_rows_with_an_error(kaggle: Path) -> None:
    (kaggle / "test" / "Image_5.jpg").write_bytes(b"")
    (kaggle / "test" / "Image_6.jpg").unlink()
    out = kaggle / "p.csv"
    assert predict_to_file(kaggle, list_unlabelled(kaggle), out, Counter(), "m").failed == 2
    errors = {row["filename"]: row["error"] for row in read(out) if row["error"]}
    assert errors == {
        "Image_5.jpg": "empty: 0 bytes",
        "Image_6.jpg": "no such file",
    }


@pytest.mark.parametrize("cut", [0, 7])
def test_an_interrupted_file_is_gone_on_with(kaggle: Path, cut: int) -> None:
    whole, out = kaggle / "whole.csv", kaggle / "p.csv"
    predict_to_file(kaggle, list_unlabelled(kaggle), whole, Counter(), "m")
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(kaggle, list_unlabelled(kaggle), out, Counter(stop_after=2 * BATCH), "m")
    assert not out.exists()
    part = kaggle / ".p.csv.part"
    part.write_bytes(part.read_bytes()[: -cut or None])
    again = Counter()
    predict_to_file(kaggle, list_unlabelled(kaggle), out, again, "m")
    assert out.read_bytes() == whole.read_bytes()
    # of two batches under way, the later one may have come first
    assert 70 - 2 * BATCH <= again.asked <= 70 - BATCH + (cut > 0)
    assert not list(kaggle.glob(".p.*"))


def test_another_models_rows_are_not_gone_on_with(kaggle: Path) -> None:
    out = kaggle / "p.csv"
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(kaggle, list_unlabelled(kaggle), out, Counter(stop_after=BATCH), "m")
    again = Counter()
    predict_to_file(kaggle, list_unlabelled(kaggle), out, again, "another")
    assert again.asked == 70


def test_parquet_has_the_same_rows(kaggle: Path) -> None:
    (kaggle / "test" / "Image_5.jpg").write_bytes(b"")
    predict_to_file(kaggle, list_unlabelled(kaggle), kaggle / "p.csv", Counter(), "m")
    predict_to_file(kaggle, list_unlabelled(kaggle), kaggle / "p.parquet", Counter(), "m")
    text, table = pd.read_csv(kaggle / "p.csv"), pd.read_parquet(kaggle / "p.parquet")
    assert text.fillna("").astype(str).equals(table.fillna("").astype(str))
    assert table["probability"].dtype == float and table["label"].isna().sum() == 1


def test_nothing_is_overwritten(kaggle: Path) -> None:
    (kaggle / "p.csv").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        predict_to_file(kaggle, list_unlabelled(kaggle), kaggle / "p.csv", Counter(), "m")
    with pytest.raises(UserError, match=r"file, or a folder; received .*p.txt"):
        predict_to_file(kaggle, list_unlabelled(kaggle), kaggle / "p.txt", Counter(), "m")
    assert (kaggle / "p.csv").read_text() == "precious"


def test_two_never_write_one_file(kaggle: Path) -> None:
    out, counter = kaggle / "p.csv", Counter()

    def classify(files: Sequence[bytes]) -> list[dict]:
        with pytest.raises(UserError, match=r"another process is writing .*p.csv"):
            predict_to_file(kaggle, list_unlabelled(kaggle), out, Counter(), "m")
        return counter(files)

    predict_to_file(kaggle, list_unlabelled(kaggle), out, classify, "m")
    assert len(read(out)) == 70 == counter.asked
    assert not list(kaggle.glob(".p.*"))


def test_names_that_are_no_utf8_are_written_as_they_are_printed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2 * BATCH + 1):
        (folder / os.fsdecode(b"caf\xe9%d.jpg" % number)).write_bytes(b"x")
    out = tmp_path / "p.csv"
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(folder, list_unlabelled(folder), out, Counter(stop_after=2 * BATCH), "m")
    again = Counter()
    predict_to_file(folder, list_unlabelled(folder), out, again, "m")
    assert again.asked in (1, 1 + BATCH) and read(out)[0]["filename"] == r"caf\udce90.jpg"
    (row,) = classify_files([folder / os.fsdecode(b"caf\xe91.jpg")], Counter())
    assert format_row(row).encode().endswith(rb"caf\udce91.jpg  size 1 75%  (other 25%)")


def test_kaggles_unpacked_archive_has_its_folder_in_a_folder(kaggle: Path, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    kaggle.rename(tmp_path / "archive" / KAGGLE_FOLDER)
    found = list_unlabelled(tmp_path / "archive")
    assert len(found) == 70
    assert {path.parent for path in found.values()} == {
        tmp_path / "archive" / KAGGLE_FOLDER / "test"
    }


def test_files_and_folders_are_found(kaggle: Path) -> None:
    one = kaggle / "train" / "Image_2.jpg"
    assert find_images([one]) == [one]
    assert len(find_images([kaggle / "train", one])) == 4
    with pytest.raises(UserError, match="no such image or folder: nowhere"):
        find_images([Path("nowhere")])
    (kaggle / "empty").mkdir()
    with pytest.raises(UserError, match="no images in"):
        find_images([kaggle / "empty"])


def test_rows_are_said_in_a_line(kaggle: Path) -> None:
    (row,) = classify_files([kaggle / "test" / "Image_1.jpg"], Counter())
    assert format_row(row).endswith("Image_1.jpg  size 2 75%  (other 25%)")
    (row,) = classify_files([kaggle / "gone.jpg"], Counter())
    assert format_row(row).endswith("gone.jpg  error: no such file")
