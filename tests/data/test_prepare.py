"""From a folder to a manifest; each kind of damage has its message."""

import csv
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from har.data.layouts import folder_source
from har.data.manifest import Manifest
from har.data.prepare import load_manifest, prepare
from har.data.splits import Split
from har.data.summary import BadImage, Leak
from har.util.errors import UserError
from tests.fixtures import CLASSES, IMAGES_PER_CLASS, read_csv, write_csv, write_images


def prepared(folder: Path, **options: object) -> Manifest:
    source = folder_source(folder, "a test")
    return prepare(source, folder.parent / "out", Split(**{"test_fraction": 0.25, **options}))


def test_every_image_is_described(raw: Path) -> None:
    found = prepared(raw)
    assert len(found.table) == len(CLASSES) * IMAGES_PER_CLASS
    row = found.table.iloc[0]
    with Image.open(raw / row["path"]) as image:
        assert (row["width"], row["height"]) == image.size
    assert row["plain_jpeg"] and len(row["sha256"]) == 64
    assert found.summary.images_by_label == dict.fromkeys(CLASSES, IMAGES_PER_CLASS)


def test_label_ids_count_first_appearances(raw: Path) -> None:
    rows = read_csv(raw)
    write_csv(raw, rows[2:] + rows[:2])
    assert prepared(raw).class_names == ("texting", "sitting", "running")


def test_test_split_is_stratified_and_the_rest_is_train(raw: Path) -> None:
    found = prepared(raw)
    counts = Counter(found.rows("test")["label"])
    assert set(counts) == set(CLASSES) and max(counts.values()) - min(counts.values()) <= 1
    assert len(found.rows("test")) + len(found.rows("train")) == len(found.table)
    assert found.summary.images_by_split["test"] == len(found.rows("test"))


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
        assert found.summary.duplicate_groups == 12 == (groups.size() > 1).sum()
        assert groups.nunique().max() == 1


def test_groups_with_conflicting_labels_never_test(raw: Path) -> None:
    rows = read_csv(raw)
    shutil.copy(raw / "train" / rows[0][0], raw / "train" / "copy.jpg")
    write_csv(raw, [*rows, ("copy.jpg", "running")])
    for seed in range(5):
        found = prepared(raw, split_seed=seed)
        assert found.summary.conflicting_groups == 1
        assert "train/copy.jpg" in set(found.rows("train")["path"])


def test_strays_are_reported_and_left_out(raw: Path) -> None:
    shutil.copy(raw / "train" / "Image_1.jpg", raw / "train" / "Image_1(1).jpg")
    found = prepared(raw)
    assert found.summary.strays == ("train/Image_1(1).jpg",)
    assert len(found.table) == len(CLASSES) * IMAGES_PER_CLASS


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (("a", "label"), "lacks the column filename: .*found a, label. Rename the column"),
        (("filename", "b"), "lacks the column label"),
        (("a", "b"), "lacks the column filename"),
        (("label", "class"), "lacks the column filename"),
        (("image", "img"), "lacks the column label: .*found image, img"),
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
    with pytest.raises(UserError, match="every row has the label 'calling'"):
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
    (dropped,) = prepared(raw).summary.dropped
    assert reason in dropped.reason and dropped.filename == "Image_1.jpg"
    assert dropped.row == (55 if how == "twice" else 1)


def test_many_bad_rows_stop_with_the_list(raw: Path) -> None:
    for i in range(1, 7):
        (raw / "train" / f"Image_{i}.jpg").unlink()
    with pytest.raises(UserError) as caught:
        prepared(raw)
    assert "6 of the 42 labelled images" in str(caught.value)
    assert "more than 2% and more than a few" in str(caught.value)
    assert str(caught.value).count("no such file") == 6
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
    assert "train/more/a.jpg" in set(first.table["path"]) and first.summary.strays == ()
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
    reasons = [each.reason for each in load_manifest(str(raw)).summary.dropped]
    assert reasons[0] == "no such file" and "cannot be read" in reasons[1]


@pytest.mark.parametrize("extra", [",", ",,"])
def test_empty_cells_after_the_last_column_are_nothing(raw: Path, extra: str) -> None:
    csv = raw / "Training_set.csv"
    header, *rows = csv.read_text().splitlines()
    csv.write_text("\n".join([header, *(f"{row}{extra}" for row in rows)]))
    assert len(prepared(raw).table) == 42


def test_rows_longer_than_the_header_are_refused(raw: Path) -> None:
    csv = raw / "Training_set.csv"
    csv.write_text(csv.read_text() + "Image_1.jpg,sitting,down\n")
    with pytest.raises(UserError, match=r"row 43 has 3 cells, the header 2; .* double quotes"):
        prepared(raw)


def test_prepared_data_is_not_prepared_again(raw: Path) -> None:
    prepared(raw)
    with pytest.raises(UserError, match="is prepared already"):
        prepare(folder_source(raw.parent / "out", "a test"), raw.parent / "again")


def test_prepared_folder_is_taken_as_it_is(raw: Path) -> None:
    found = prepared(raw, split_seed=3)
    again = load_manifest(str(raw.parent / "out"))
    assert again.table.equals(found.table)
    assert (
        load_manifest(str(raw.parent / "out"), {"test_fraction": 0.25, "split_seed": 3}).test_digest
        == found.test_digest
    )
    with pytest.raises(UserError, match="prepared with split_seed=3; received 4"):
        load_manifest(str(raw.parent / "out"), {"split_seed": 4})


def test_unwritable_out(raw: Path) -> None:
    (raw.parent / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot write the prepared data"):
        prepared(raw)


def add_near_copy(raw: Path, name: str, label: str, *, mirror: bool = False) -> None:
    """The image again as another file: half the size, other compression, maybe mirrored."""
    with Image.open(raw / "train" / name) as image:
        picture = ImageOps.mirror(image) if mirror else image
        picture = picture.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC)
        picture.save(raw / "train" / f"near_{name}", quality=70)
    write_csv(raw, [*read_csv(raw), (f"near_{name}", label)])


@pytest.mark.parametrize("mirror", [False, True])
def test_near_copies_join_a_group(raw: Path, mirror: bool) -> None:
    add_near_copy(raw, "Image_1.jpg", "sitting", mirror=mirror)
    found = prepared(raw)
    assert found.summary.duplicate_groups == found.summary.near_duplicate_groups == 1
    by_path = found.table.set_index("path")["duplicate_group"]
    assert by_path["train/Image_1.jpg"] == by_path["train/near_Image_1.jpg"]
    assert by_path.nunique() == len(by_path) - 1


@pytest.mark.parametrize(("duplicates", "groups"), [("near", 2), ("exact", 1), ("ignore", 0)])
def test_what_counts_as_a_copy_is_an_option(raw: Path, duplicates: str, groups: int) -> None:
    add_near_copy(raw, "Image_1.jpg", "sitting")
    shutil.copy(raw / "train" / "Image_2.jpg", raw / "train" / "copy.jpg")
    write_csv(raw, [*read_csv(raw), ("copy.jpg", "running")])
    summary = prepared(raw, duplicates=duplicates).summary
    assert (summary.split.duplicates, summary.duplicate_groups) == (duplicates, groups)


def add_test_folder(raw: Path, rows: list[tuple[str, str, str]]) -> None:
    """test/ with copies of training images: (name, name in train, label), and their CSV."""
    (raw / "test").mkdir()
    for name, original, _ in rows:
        shutil.copy(raw / "train" / original, raw / "test" / name)
    with (raw / "Testing_set.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filename", "label"), *((row[0], row[2]) for row in rows)])


def test_leaks_into_kaggles_test_folder_are_reported(raw: Path) -> None:
    add_test_folder(raw, [("a.jpg", "Image_5.jpg", "")])
    write_images(raw.parent / "other", per_class=1, seed=9)
    shutil.copy(raw.parent / "other" / "train" / "Image_1.jpg", raw / "test" / "new.jpg")
    summary = prepared(raw).summary
    assert summary.test_folder_images == 2
    assert summary.leaks == (Leak("test/a.jpg", "train/Image_5.jpg", "exact"),)
    assert summary.strays == ()


def with_test_file(raw: Path) -> Path:
    """Nine labelled test images: new ones, but for one copy of Image_1 and one of Image_2 whose
    labels differ.
    """
    other = write_images(raw.parent / "other", per_class=3, seed=9)
    rows = read_csv(other)
    add_test_folder(raw, [])
    for name, _ in rows:
        shutil.copy(other / "train" / name, raw / "test" / name)
    shutil.copy(raw / "train" / "Image_1.jpg", raw / "test" / "Image_1.jpg")
    shutil.copy(raw / "train" / "Image_2.jpg", raw / "test" / "Image_2.jpg")
    labels = dict(rows) | {"Image_1.jpg": "sitting", "Image_2.jpg": "texting"}
    with (raw / "Testing_set.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filename", "label"), *labels.items()])
    return raw


def test_a_labelled_test_file_is_the_test_split(raw: Path) -> None:
    found = prepared(with_test_file(raw), test_file="Testing_set.csv")
    counts = Counter(found.table["split"])
    assert counts == {"train": 40, "test": 8, "unused": 3}
    unused = set(found.table.loc[found.table["split"] == "unused", "path"])
    # copies of test images are not trained on; a test image with two labels is not evaluated on
    assert unused == {"train/Image_1.jpg", "train/Image_2.jpg", "test/Image_2.jpg"}
    assert all(path.startswith("test/") for path in found.rows("test")["path"])
    assert found.class_names == CLASSES


def test_a_test_file_through_load_manifest(raw: Path) -> None:
    with_test_file(raw)
    found = load_manifest(str(raw), {"test_file": "Testing_set.csv"})
    assert found.summary.split.test_fraction == 0 and len(found.rows("test")) == 8
    with pytest.raises(UserError, match=r"leave --test-fraction out"):
        load_manifest(str(raw), {"test_file": "Testing_set.csv", "test_fraction": 0.2})


def class_folders(raw: Path) -> Path:
    """The same images as a folder for each label."""
    folder = raw.parent / "by label"
    for name, label in read_csv(raw):
        (folder / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(raw / "train" / name, folder / label / name)
    return folder


def test_class_folders(raw: Path) -> None:
    folder = class_folders(raw)
    (folder / "notes.txt").write_text("mine")
    (folder / "sitting" / "notes.txt").write_text("mine")
    (folder / ".hidden").mkdir()
    found = prepared(folder)
    assert found.class_names == tuple(sorted(CLASSES))
    assert found.test_digest != "none" and found.summary.strays == ("sitting/notes.txt",)
    labels = {Path(p).name: label for p, label in found.table[["path", "label"]].to_numpy()}
    assert labels == dict(read_csv(raw))


def test_a_bad_image_in_class_folders_is_named_without_a_row(raw: Path) -> None:
    folder = class_folders(write_images(raw.parent / "more" / "raw", per_class=18))
    (folder / "sitting" / "Image_1.jpg").write_bytes(b"")
    (dropped,) = prepared(folder).summary.dropped
    assert dropped == BadImage("", 0, "sitting/Image_1.jpg", "empty: 0 bytes")


def test_images_option_is_for_prepared_folders(raw: Path) -> None:
    with pytest.raises(UserError, match="is not prepared: give the images' folder as --data"):
        load_manifest(str(raw), image_root=raw)
