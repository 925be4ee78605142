"""From a folder to a manifest; each kind of damage has its message."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import CLASSES, IMAGES_PER_CLASS, read_csv, write_csv, write_images
from PIL import Image

from har.errors import UserError
from har.manifest import Manifest
from har.prepare import load_manifest, prepare
from har.sources import folder_source


def prepared(folder: Path, **options: object) -> Manifest:
    source = folder_source(folder, "a test")
    return prepare(source, folder.parent / "out", **{"test_fraction": 0.25, **options})


def test_every_image_is_described(raw: Path) -> None:
    found = prepared(raw)
    assert len(found.table) == len(CLASSES) * IMAGES_PER_CLASS
    row = found.table.iloc[0]
    with Image.open(raw / row["path"]) as image:
        assert (row["width"], row["height"]) == image.size
    assert row["plain_jpeg"] and len(row["sha256"]) == 64
    assert found.summary["images_by_label"] == dict.fromkeys(CLASSES, IMAGES_PER_CLASS)


def test_label_ids_count_first_appearances(raw: Path) -> None:
    rows = read_csv(raw)
    write_csv(raw, rows[2:] + rows[:2])
    assert prepared(raw).class_names == ("texting", "sitting", "running")


def test_test_split_is_stratified_and_the_rest_is_train(raw: Path) -> None:
    found = prepared(raw)
    counts = Counter(found.rows("test")["label"])
    assert set(counts) == set(CLASSES) and max(counts.values()) - min(counts.values()) <= 1
    assert len(found.rows("test")) + len(found.rows("train")) == len(found.table)
    assert found.summary["images_by_split"]["test"] == len(found.rows("test"))


def test_no_test_split_on_demand(raw: Path) -> None:
    assert set(prepared(raw, test_fraction=0).table["split"]) == {"train"}


def test_split_seed_changes_the_test_images_only(raw: Path) -> None:
    first, other = prepared(raw), prepared(raw, split_seed=1)
    assert first.dataset_digest == other.dataset_digest
    assert first.test_digest != other.test_digest


def test_byte_identical_images_form_a_group_that_is_never_parted(raw: Path) -> None:
    rows = read_csv(raw)
    for i, (name, label) in enumerate(rows[:12]):
        shutil.copy(raw / "train" / name, raw / "train" / f"copy_{i}.jpg")
        rows.append((f"copy_{i}.jpg", label))
    write_csv(raw, rows)
    for seed in range(5):
        found = prepared(raw, split_seed=seed)
        groups = found.table.groupby("duplicate_group")["split"]
        assert found.summary["duplicate_groups"] == 12 == (groups.size() > 1).sum()
        assert groups.nunique().max() == 1


def test_groups_with_conflicting_labels_never_test(raw: Path) -> None:
    rows = read_csv(raw)
    shutil.copy(raw / "train" / rows[0][0], raw / "train" / "copy.jpg")
    write_csv(raw, [*rows, ("copy.jpg", "running")])
    for seed in range(5):
        found = prepared(raw, split_seed=seed)
        assert found.summary["groups_with_conflicting_labels"] == 1
        assert "train/copy.jpg" in set(found.rows("train")["path"])


def test_strays_are_reported_and_left_out(raw: Path) -> None:
    shutil.copy(raw / "train" / "Image_1.jpg", raw / "train" / "Image_1(1).jpg")
    found = prepared(raw)
    assert found.summary["strays"] == ["Image_1(1).jpg"]
    assert len(found.table) == len(CLASSES) * IMAGES_PER_CLASS


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (("file", "label"), "lacks the column filename: .*found file, label"),
        (("filename", "class"), "lacks the column label"),
        (("a", "b"), "lacks the column filename and label"),
    ],
)
def test_missing_columns(raw: Path, header: tuple[str, str], message: str) -> None:
    write_csv(raw, read_csv(raw), header)
    with pytest.raises(UserError, match=message):
        prepared(raw)


def test_empty_csv(raw: Path) -> None:
    write_csv(raw, [])
    with pytest.raises(UserError, match="it has no rows"):
        prepared(raw)
    (raw / "Training_set.csv").write_text("")
    with pytest.raises(UserError, match="cannot be read"):
        prepared(raw)


def test_one_constant_label(raw: Path) -> None:
    write_csv(raw, [(name, "calling") for name, _ in read_csv(raw)])
    with pytest.raises(UserError, match="every row is labelled 'calling'"):
        prepared(raw)


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "..\\b", "C:\\b"]
)
def test_paths_out_of_the_folder(raw: Path, name: str) -> None:
    write_csv(raw, [*read_csv(raw), (name, "sitting")])
    with pytest.raises(UserError, match=r"row 43 .*must stay inside"):
        prepared(raw)


def damage(raw: Path, how: str) -> None:
    """One bad row or file, the first."""
    name, label = read_csv(raw)[0]
    file = raw / "train" / name
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif how == "text":
        file.write_text("not an image")
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "folder":
        file.unlink()
        file.mkdir()
    elif how == "no label":
        write_csv(raw, [(name, ""), *read_csv(raw)[1:]])
    elif how == "twice":
        write_csv(raw, [*read_csv(raw), (name, label)])


DAMAGES = {
    "missing": "no such file",
    "truncated": "cannot be decoded",
    "text": "not an image of the kinds",
    "empty": "0 bytes",
    "folder": "not a file",
    "no label": "the label is empty",
    "twice": "listed twice",
}


@pytest.mark.parametrize(("how", "reason"), DAMAGES.items())
def test_a_few_bad_rows_are_skipped_counted_and_named(
    tmp_path: Path, how: str, reason: str
) -> None:
    raw = write_images(tmp_path / "raw", per_class=18)  # 54 images: 1 is under 2 %
    damage(raw, how)
    (dropped,) = prepared(raw).summary["dropped"]
    assert reason in dropped["reason"] and dropped["filename"] == "Image_1.jpg"
    assert dropped["row"] == (55 if how == "twice" else 1)


def test_many_bad_rows_stop_with_the_list(raw: Path) -> None:
    for i in range(1, 6):
        (raw / "train" / f"Image_{i}.jpg").unlink()
    with pytest.raises(UserError) as caught:
        prepared(raw)
    assert "5 of the 42 rows" in str(caught.value) and "more than 2%" in str(caught.value)
    assert str(caught.value).count("no such file") == 5
    assert not (raw.parent / "out").exists()


def test_too_few_images(tmp_path: Path) -> None:
    raw = write_images(tmp_path / "raw", per_class=2)
    with pytest.raises(UserError, match=r"too few images for a test fraction of 0.25"):
        prepared(raw)


def test_raw_folder_is_prepared_once(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = load_manifest(str(raw))
    assert "checking images" in capsys.readouterr().err
    again = load_manifest(str(raw))
    assert "checking images" not in capsys.readouterr().err
    assert again.table.equals(first.table)
    (raw / "train" / "Image_1.jpg").write_bytes((raw / "train" / "Image_2.jpg").read_bytes())
    assert load_manifest(str(raw)).dataset_digest != first.dataset_digest


def test_a_change_in_a_subfolder_is_noticed(raw: Path) -> None:
    (raw / "train" / "more").mkdir()
    rows = read_csv(raw)
    (raw / "train" / rows[0][0]).rename(raw / "train" / "more" / "a.jpg")
    write_csv(raw, [("more/a.jpg", rows[0][1]), *rows[1:]])
    first = load_manifest(str(raw))
    assert "train/more/a.jpg" in set(first.table["path"]) and first.summary["strays"] == []
    (raw / "train" / "more" / "a.jpg").write_bytes((raw / "train" / "Image_2.jpg").read_bytes())
    assert load_manifest(str(raw)).dataset_digest != first.dataset_digest


def test_a_damaged_cache_entry_is_made_again(raw: Path) -> None:
    first = load_manifest(str(raw))
    (kept,) = (Path(os.environ["HAR_CACHE"]) / "prepared").iterdir()
    (kept / "dataset.json").write_text("{}")
    assert load_manifest(str(raw)).table.equals(first.table)


@pytest.mark.parametrize("fraction", [float("nan"), -0.1, 1.0])
def test_impossible_test_fraction(raw: Path, fraction: float) -> None:
    with pytest.raises(UserError, match=f"the test fraction must be .*received {fraction}"):
        prepared(raw, test_fraction=fraction)


def test_dangling_links_and_endless_names_are_bad_rows(tmp_path: Path) -> None:
    raw = write_images(tmp_path / "raw", per_class=40)
    (raw / "train" / "link.jpg").symlink_to("nowhere.jpg")
    write_csv(raw, [*read_csv(raw), ("link.jpg", "sitting"), ("x" * 300 + ".jpg", "sitting")])
    reasons = [each["reason"] for each in load_manifest(str(raw)).summary["dropped"]]
    assert reasons[0] == "no such file" and "cannot be read" in reasons[1]


@pytest.mark.parametrize("extra", [",", ",,", ",x"])
def test_rows_longer_than_the_header_are_refused(raw: Path, extra: str) -> None:
    csv = raw / "Training_set.csv"
    header, *rows = csv.read_text().splitlines()
    csv.write_text("\n".join([header, *(f"{row}{extra}" for row in rows)]))
    with pytest.raises(UserError, match=r"Training_set.csv cannot be read: Length of header"):
        prepared(raw)


def test_prepared_data_is_not_prepared_again(raw: Path) -> None:
    prepared(raw)
    with pytest.raises(UserError, match="is prepared already"):
        prepare(folder_source(raw.parent / "out", "a test"), raw.parent / "again")


def test_prepared_folder_is_taken_as_it_is(raw: Path) -> None:
    found = prepared(raw, split_seed=3)
    again = load_manifest(str(raw.parent / "out"))
    assert again.table.equals(found.table)
    assert load_manifest(str(raw.parent / "out"), 0.25, 3).test_digest == found.test_digest
    with pytest.raises(UserError, match="prepared with split_seed=3; received 4"):
        load_manifest(str(raw.parent / "out"), None, 4)


def test_unwritable_out(raw: Path) -> None:
    (raw.parent / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot write the prepared data"):
        prepared(raw)
