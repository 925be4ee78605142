"""Written, read back, checked."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from har.data import manifest as manifest_module
from har.data import table_files
from har.data.layouts import folder_source
from har.data.manifest import Manifest, is_prepared, read_manifest, write_manifest
from har.data.prepare import prepare
from har.data.splits import Split
from har.util.errors import UserError


@pytest.fixture
def folder(manifest: Manifest, tmp_path: Path) -> Path:
    write_manifest(manifest, tmp_path / "out")
    return tmp_path / "out"


def test_read_equals_written(manifest: Manifest, folder: Path) -> None:
    found = read_manifest(folder)
    assert found.table.equals(manifest.table)
    assert (found.name, found.root, found.summary, found.class_names) == (
        manifest.name,
        manifest.root,
        manifest.summary,
        manifest.class_names,
    )
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", "manifest.csv"]


def write_as(name: str, manifest: Manifest, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a prepared folder with its table in this file."""
    most = 0 if name == "manifest.parquet" else len(manifest.table)
    monkeypatch.setattr(table_files, "MAX_CSV_ROWS", most)
    write_manifest(manifest, out)
    assert is_prepared(out)
    assert sorted(path.name for path in out.iterdir()) == ["dataset.json", name]


def test_a_table_of_many_rows_is_parquet_and_the_same_data(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folder held the other file before."""
    for name in ("manifest.csv", "manifest.parquet", "manifest.csv"):
        write_as(name, manifest, tmp_path, monkeypatch)
        found = read_manifest(tmp_path)
        assert found.table.equals(manifest.table)
        assert found.dataset_digest == manifest.dataset_digest
        assert found.test_digest == manifest.test_digest


def test_a_table_left_from_before_is_not_read(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where writing was killed, dataset.json says which table belongs to it."""
    for name, other in (("manifest.parquet", "manifest.csv"), ("manifest.csv", "manifest.parquet")):
        write_as(name, manifest, tmp_path / name, monkeypatch)
        (tmp_path / name / other).write_text("of another time")
        assert read_manifest(tmp_path / name).table.equals(manifest.table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "unused"}, "test_digest"),
        ({"label": "running"}, "dataset_digest"),
        ({"width": 1}, "table_sha256"),
        ({"path": "../out.jpg"}, "dataset_digest"),
    ],
)
def test_an_edited_parquet_table_is_refused(
    change: dict[str, object], message: str, manifest: Manifest, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write_as("manifest.parquet", manifest, tmp_path / "out", monkeypatch)
    other = replace(manifest, table=manifest.table.assign(**change))
    write_as("manifest.parquet", other, tmp_path / "other", monkeypatch)
    (tmp_path / "other" / "manifest.parquet").replace(tmp_path / "out" / "manifest.parquet")
    with pytest.raises(UserError, match=rf"manifest.parquet was changed .*{message}"):
        read_manifest(tmp_path / "out")


def test_a_path_out_of_the_folder_is_refused_in_parquet_too(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = manifest.table.copy()
    table.loc[3, "path"] = "../elsewhere.jpg"
    write_as("manifest.parquet", replace(manifest, table=table), tmp_path, monkeypatch)
    with pytest.raises(UserError, match="paths must stay inside"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["other.csv", "../manifest.csv", "", None, 7, ["manifest.csv"]])
def test_no_other_file_is_the_table(name: object, folder: Path) -> None:
    summary = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**summary, "table": name}))
    with pytest.raises(UserError, match="not a readable prepared folder"):
        read_manifest(folder)


@pytest.mark.slow
def test_two_who_write_one_folder_leave_what_one_of_them_wrote(
    manifest: Manifest, tmp_path: Path
) -> None:
    other = replace(manifest, table=manifest.table.iloc[::-1].reset_index(drop=True))
    with ThreadPoolExecutor(4) as writers:
        for number in range(40):
            out = tmp_path / str(number)
            list(
                writers.map(lambda each, out=out: write_manifest(each, out), (manifest, other) * 2)
            )
            read_manifest(out)
            assert {path.name for path in out.iterdir()} == {"dataset.json", "manifest.csv"}


def test_awkward_names_survive(manifest: Manifest, tmp_path: Path) -> None:
    names = ["NA", "a,b", 'q"uote', "new\nline", "-dash", "Übung 1"]
    table = manifest.table.copy()
    table.loc[: len(names) - 1, "path"] = names
    table["label"] = table["label"].replace("sitting", "null")
    (tmp_path / "train").mkdir()
    for name, size in zip(table["path"], table["bytes"], strict=True):
        (tmp_path / name).write_bytes(b"x" * size)
    write_manifest(replace(manifest, root=tmp_path, table=table), tmp_path)
    found = read_manifest(tmp_path)
    assert found.table["path"].tolist()[: len(names)] == names
    assert "null" in found.class_names


def test_an_edited_table_is_refused(folder: Path) -> None:
    table = folder / "manifest.csv"
    lines = table.read_text().splitlines()
    lines[1] = lines[1].replace("sitting", "running")
    table.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"manifest.csv was changed after it was prepared"):
        read_manifest(folder)


def test_a_moved_split_is_refused(folder: Path) -> None:
    table = folder / "manifest.csv"
    table.write_text(table.read_text().replace(",test\n", ",train\n", 1))
    with pytest.raises(UserError, match="test_digest"):
        read_manifest(folder)


def test_missing_images_folder_is_named(folder: Path) -> None:
    summary = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**summary, "root": "/gone/away"}))
    with pytest.raises(UserError, match="there is no folder /gone/away"):
        read_manifest(folder)


@pytest.mark.parametrize("damage", ["", "{}", "[]", "null", '{"name": 1}'])
def test_damaged_summary_is_named(folder: Path, damage: str) -> None:
    (folder / "dataset.json").write_text(damage)
    with pytest.raises(UserError, match="not a readable prepared folder"):
        read_manifest(folder)


def test_missing_summary_field_is_named(folder: Path) -> None:
    summary = json.loads((folder / "dataset.json").read_text())
    del summary["split_seed"]
    (folder / "dataset.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="split_seed"):
        read_manifest(folder)


def test_a_folder_of_an_older_version_is_read(manifest: Manifest, folder: Path) -> None:
    stored = json.loads((folder / "dataset.json").read_text())
    for later in ("near_duplicate_groups", "test_folder_images", "leaks", "table", "table_sha256"):
        del stored[later]
    (folder / "dataset.json").write_text(json.dumps({**stored, "of_a_newer_version": 1}))
    assert read_manifest(folder).summary == manifest.summary


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda p: p.unlink(), "is gone"), (lambda p: p.write_bytes(b"x"), "was changed after")],
)
def test_changed_images_are_named(raw: Path, change, message: str) -> None:
    prepare(folder_source(raw, "a test"), raw.parent / "out", Split(test_fraction=0.25))
    change(raw / "train" / "Image_3.jpg")
    with pytest.raises(UserError, match=f"Image_3.jpg {message}"):
        read_manifest(raw.parent / "out")


def test_no_test_images_no_test_digest(manifest: Manifest) -> None:
    untested = replace(manifest, table=manifest.table.assign(split="train"))
    assert untested.test_digest == "none"


def test_digests_ignore_order_and_place_as_promised(manifest: Manifest) -> None:
    shuffled = replace(manifest, table=manifest.table.sample(frac=1, random_state=0))
    assert shuffled.dataset_digest == manifest.dataset_digest
    assert shuffled.test_digest == manifest.test_digest
    moved = manifest.table.assign(path=lambda t: "other/" + t["path"])
    assert replace(manifest, table=moved).dataset_digest != manifest.dataset_digest
    assert replace(manifest, table=moved).test_digest == manifest.test_digest
    relabelled = manifest.table.assign(label="x" + manifest.table["label"])
    assert replace(manifest, table=relabelled).test_digest != manifest.test_digest


@pytest.mark.parametrize("at_once", [1, 2, 5, 1000])
def test_digests_stay_what_recorded_runs_have(
    at_once: int, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first versions computed them so."""
    monkeypatch.setattr(manifest_module, "ROWS_AT_ONCE", at_once)
    awkward = ['q"uote', "back\\slash", "new\nline", "Übung", "\U0001f600", "\x00\x7f", "", "NA"]
    table = manifest.table.copy()
    table.loc[: len(awkward) - 1, "path"] = awkward
    found = replace(manifest, table=table)
    columns = ["path", "sha256", "label", "label_id"]
    rows = sorted(json.dumps(row) for row in table[columns].astype(str).to_numpy().tolist())
    expected = hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]
    assert found.dataset_digest == expected


def moved(raw: Path) -> Path:
    """Prepared in out/, then the images' folder is called another name."""
    prepare(folder_source(raw, "a test"), raw.parent / "out", Split(test_fraction=0.25))
    return raw.rename(raw.parent / "elsewhere")


def test_moved_images_are_found_by_option(raw: Path) -> None:
    images = moved(raw)
    with pytest.raises(UserError, match="add --image-root DIR"):
        read_manifest(raw.parent / "out")
    found = read_manifest(raw.parent / "out", images)
    assert found.root == images
    write_manifest(found, raw.parent / "again")
    assert read_manifest(raw.parent / "again").test_digest == found.test_digest


def test_other_images_of_the_same_size_are_refused(raw: Path) -> None:
    images = moved(raw)
    file = images / "train" / "Image_3.jpg"
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(UserError, match=r"Image_3.jpg is not the image that was prepared"):
        read_manifest(raw.parent / "out", images)
