"""Pictures of a comparison: only those that a run recorded, or that lie where the user says."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from har.compare.pictures import RecordedImages, find_recorded_images
from har.util.files import digest_file

PATH = "train/Image_1.jpg"


def test_a_recorded_picture_is_shown(raw: Path) -> None:
    digests = {PATH: digest_file(raw / PATH)}
    for images in (
        RecordedImages(root=raw, digests=digests),
        RecordedImages(root=raw, digests=digests, named=True),
        RecordedImages(root=raw, named=True),
    ):
        assert images.thumbnail_uri(PATH).startswith("data:image/jpeg;base64,")


def hard_link(file: Path) -> None:
    other = file.with_name("Image_2.jpg")
    file.unlink()
    os.link(other, file)


# What may lie where a run says that its image is.
REPLACED: dict[str, Callable[[Path], object]] = {
    "nothing": Path.unlink,
    "another picture": hard_link,
    "a link to another picture": lambda f: (f.unlink(), f.symlink_to(f.with_name("Image_2.jpg"))),
    "a link out of the folder": lambda f: (f.unlink(), f.symlink_to("/etc/hostname")),
    "a device": lambda f: (f.unlink(), f.symlink_to("/dev/zero")),
    "a pipe": lambda f: (f.unlink(), os.mkfifo(f)),
    "a folder": lambda f: (f.unlink(), f.mkdir()),
    "ten terabytes": lambda f: os.truncate(f, 10**13),
}


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("named", [True, False])
def test_another_file_is_not_shown(name: str, named: bool, raw: Path) -> None:
    digests = {PATH: digest_file(raw / PATH)}
    REPLACED[name](raw / PATH)
    assert RecordedImages(root=raw, digests=digests, named=named).thumbnail_uri(PATH) == ""


@pytest.mark.parametrize(
    ("root", "path"),
    [("/", "dev/zero"), ("/dev/zero", ""), ("/dev", "zero"), ("/dev/zero", PATH),
     ("/proc", "self/environ"),
     ("RAW", PATH), ("RAW", "../raw/" + PATH), ("RAW/test", "../" + PATH)],
)  # fmt: skip
def test_a_store_cannot_name_a_file(root: str, path: str, raw: Path) -> None:
    """It knows no digest of it, or a wrong one."""
    folder = Path(root.replace("RAW", str(raw)))
    for digests in ({}, {path: "0" * 64}, {path: ""}):
        assert RecordedImages(root=folder, digests=digests).thumbnail_uri(path) == ""


@pytest.mark.parametrize("path", ["../train/Image_1.jpg", "ABSOLUTE", "../../etc/hostname", "a\0b"])
def test_paths_stay_in_the_named_folder(path: str, raw: Path) -> None:
    path = path.replace("ABSOLUTE", str(raw / PATH))
    inner = RecordedImages(root=raw / "train" / "..", named=True)
    assert inner.thumbnail_uri(PATH) and RecordedImages(root=raw / "test", named=True)
    assert RecordedImages(root=raw / "elsewhere", named=True).thumbnail_uri(path) == ""


@pytest.mark.parametrize(
    ("summary", "known"),
    [
        ('{"root": "RAW"}', True),
        ('{"root": "raw"}', False),
        ('{"root": 7}', False),
        ('{"root": null}', False),
        ("[]", False),
        ("[" * 100_000, False),
        ('{"root": "a\\u0000b"}', False),
    ],
)
def test_the_recorded_folder(
    summary: str, known: bool, raw: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    client.log_text(run_id, f"path,sha256\n{PATH},{digest_file(raw / PATH)}\n", "manifest.csv")
    client.log_text(run_id, summary.replace("RAW", str(raw)), "dataset.json")
    images = find_recorded_images(run_id)
    assert bool(images.thumbnail_uri(PATH)) is known
    assert ("left out: what images run" in capsys.readouterr().err) is not known
    assert find_recorded_images(run_id, named=raw).thumbnail_uri(PATH)
    assert find_recorded_images(run_id, named=raw).thumbnail_uri("train/Image_2.jpg")
