"""What can be wrong with images, when, and what comes of it: one table for each moment."""

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from PIL import Image

from har.data.layouts import folder_source
from har.data.manifest import read_manifest, write_manifest
from har.data.prepare import prepare
from har.data.splits import Split
from har.jobs.train import run_training
from har.training.job import build_job
from har.util.errors import UserError
from tests.data.test_images import png_of
from tests.fixtures import read_csv, tiny_recipe, write_csv, write_images

NAME = "Image_3.jpg"


KEPT = ""


def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in the file's place."""

    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


def saved_as(kind: str, mode: str = "RGB", **options: object) -> Callable[[Path], object]:
    """The same picture in another format under the same name."""

    def damage(file: Path) -> None:
        with Image.open(file) as image:
            image.convert(mode).save(file, kind, **options)

    return damage


def animate(file: Path) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


PREPARING: dict[str, tuple[Callable[[Path], object], str]] = {
    "vanished": (Path.unlink, "no such file"),
    "0 bytes": (lambda file: file.write_bytes(b""), "0 bytes"),
    "truncated": (cut, "cannot be decoded"),
    "PNG, truncated": (lambda file: (saved_as("PNG")(file), cut(file)), "cannot be decoded"),
    "text": (lambda file: file.write_text("no image"), "not an image of the kinds"),
    "a folder": (instead(Path.mkdir), "not a file"),
    "a pipe": (instead(os.mkfifo), "not a file"),
    "a link to itself": (instead(lambda file: file.symlink_to(file.name)), "no such file"),
    "a link to nothing": (instead(lambda file: file.symlink_to("nothing")), "no such file"),
    "20,000 pixels high and wide": (
        lambda file: file.write_bytes(png_of(20_000, 20_000)),
        "20000x20000 pixels, more than 40,000,000",
    ),
    "61 megabytes": (
        lambda file: file.write_bytes(file.read_bytes() + bytes(61_000_000)),
        "more than 60,000,000",
    ),
    "20,000 pixels wide": (lambda file: Image.new("RGB", (20_000, 30)).save(file), KEPT),
    "a link to an image": (instead(lambda file: file.symlink_to("Image_6.jpg")), KEPT),
    "CMYK": (saved_as("JPEG", "CMYK"), KEPT),
    "16 bits": (saved_as("PNG", "I;16"), KEPT),
    "animated": (animate, KEPT),
    "PNG called .jpg": (saved_as("PNG"), KEPT),
    "PNG with a palette": (saved_as("PNG", "P"), KEPT),
}


@pytest.mark.parametrize(("damage", "reason"), PREPARING.values(), ids=PREPARING)
def test_while_preparing(tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    """A bad image is left out with its reason, the others stay; what can be read is kept."""
    raw = write_images(tmp_path / "raw", per_class=18)  # one of 54 is less than 2 %
    damage(raw / "train" / NAME)
    found = prepare(folder_source(raw, "a test"), tmp_path / "out", Split(test_fraction=0.25))
    dropped = [(each.filename, each.row) for each in found.summary.dropped]
    assert dropped == ([(NAME, 3)] if reason else [])
    assert len(found.table) == 54 - len(dropped)
    assert reason in "".join(each.reason for each in found.summary.dropped)
    assert read_manifest(tmp_path / "out").dataset_digest == found.dataset_digest


Damage = Callable[[Path, Path], object]


def edit(name: str, old: str, new: str) -> Damage:
    def damage(prepared: Path, images: Path) -> None:
        text = (prepared / name).read_text()
        assert old in text
        (prepared / name).write_text(text.replace(old, new, 1))

    return damage


def forge(prepared: Path, images: Path) -> None:
    """A table with a path out of the folder, and digests that fit it."""
    shutil.copyfile(images / "train" / NAME, images.parent / "secret.jpg")
    found = read_manifest(prepared)
    table = found.table.replace({"path": {f"train/{NAME}": "../secret.jpg"}})
    write_manifest(replace(found, table=table), prepared)


BEFORE_TRAINING: dict[str, tuple[Damage, str]] = {
    "an image vanished": (lambda _, images: (images / "train" / NAME).unlink(), f"{NAME} is gone"),
    "an image was cut": (
        lambda _, images: cut(images / "train" / NAME),
        f"{NAME} was changed after it was prepared",
    ),
    "an image is a folder": (
        lambda _, images: instead(Path.mkdir)(images / "train" / NAME),
        f"{NAME} is not a file",
    ),
    "an image is a pipe": (
        lambda _, images: instead(os.mkfifo)(images / "train" / NAME),
        f"{NAME} is not a file",
    ),
    "the images were moved": (
        lambda _, images: images.rename(images.with_name("elsewhere")),
        "add --image-root DIR",
    ),
    "a label was edited": (
        edit("manifest.csv", "sitting", "running"),
        "manifest.csv was changed after it was prepared",
    ),
    "a split was edited": (edit("manifest.csv", ",test", ",train"), "test_digest"),
    "a training image was left out": (edit("manifest.csv", ",train", ",unused"), "table_sha256"),
    "a column is gone": (edit("manifest.csv", "sha256", "sha"), "not a readable prepared folder"),
    "a digest was edited": (edit("dataset.json", '"dataset_digest": "', '"dataset_digest": "0'),
        "dataset_digest"),
    "dataset.json was cut": (edit("dataset.json", "{", ""), "not a readable prepared folder"),
    "manifest.csv is gone": (
        lambda prepared, _: (prepared / "manifest.csv").unlink(),
        "Training_set.csv",
    ),
    "a path leads out, well forged": (forge, "paths must stay inside"),
}  # fmt: skip


@pytest.fixture
def folders(raw: Path, tmp_path: Path) -> tuple[Path, Path]:
    """What was prepared, and its images."""
    prepare(folder_source(raw, "a test"), tmp_path / "out", Split(test_fraction=0.25))
    return tmp_path / "out", raw


@pytest.mark.parametrize(("damage", "said"), BEFORE_TRAINING.values(), ids=BEFORE_TRAINING)
def test_before_training(
    folders: tuple[Path, Path], damage: Damage, said: str, store: str, cli
) -> None:
    """The command says what is wrong and leaves no run behind."""
    damage(*folders)
    result = cli("train", "--data", folders[0], "--experiment", "trouble")
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output
    assert runs_of("trouble") == []


def runs_of(experiment: str) -> list[mlflow.entities.Run]:
    found = mlflow.get_experiment_by_name(experiment)
    return mlflow.search_runs([found.experiment_id], output_format="list")


def test_a_test_image_changed_since_training(
    folders: tuple[Path, Path], store: str, tiny_backbone: None, cli
) -> None:
    """It is not evaluated under the digest of the one before, though it has as many bytes."""
    prepared, images = folders
    job = build_job("v3", tiny_recipe("v3"), ["backbone"], read_manifest(prepared))
    run_id = run_training(job, "evaluated", time.time()).run_id
    path = images / read_manifest(prepared).rows("test")["path"][0]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    result = cli("evaluate", "--run-id", run_id, "--data", prepared)
    assert result.exit_code == 2 and f"{path.name} is not the image" in result.output


TRAINING: dict[str, tuple[Callable[[Path], object], str]] = {
    "vanished": (Path.unlink, f"{NAME} is gone"),
    "cut": (cut, f"{NAME} was changed after it was prepared"),
    "other bytes": (
        lambda file: file.write_bytes(bytes(len(file.read_bytes()))),
        f"{NAME} is not the image that was prepared",
    ),
    "touched": (Path.touch, KEPT),
}


@pytest.mark.parametrize("loader", ["stream", pytest.param("memory", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("damage", "said"), TRAINING.values(), ids=TRAINING)
def test_during_an_epoch(
    folders: tuple[Path, Path],
    damage: Callable[[Path], object],
    said: str,
    loader: str,
    store: str,
    tiny_backbone: None,
    after_each_epoch,
) -> None:
    """No model is recorded that was trained on something else than its record says."""
    after_each_epoch(lambda epoch: damage(folders[1] / "train" / NAME) if epoch == 1 else None)
    manifest = read_manifest(folders[0])
    recipe = tiny_recipe("v3", loader=loader)
    job = build_job("v3", recipe, ["backbone"], manifest)
    if said:
        with pytest.raises(UserError, match=said):
            run_training(job, "trouble in training", time.time())
    else:
        run_training(job, "trouble in training", time.time())
    run = runs_of("trouble in training")[0]
    assert run.info.status == ("FAILED" if said else "FINISHED")


NAMES = [
    "with space.jpg",
    "-rf.jpg",
    "--help.jpg",
    "läufer.jpg",
    "跑步.jpg",
    "two\nlines.jpg",
    "'quotes\".jpg",
    "100%s #&;$(x).jpg",
    "NA.jpg",
    ".hidden.jpg",
    "x" * 250 + ".jpg",
]


def test_names(raw: Path, store: str, tiny_backbone: None, cli) -> None:
    """Every name goes through preparing, training and evaluating to the table of predictions."""
    rows = read_csv(raw)
    for (old, _), new in zip(rows, NAMES, strict=False):
        (raw / "train" / old).rename(raw / "train" / new)
    named = [(new, label) for new, (_, label) in zip(NAMES, rows, strict=False)]
    write_csv(raw, [*named, *rows[len(named) :]])
    result = cli(
        "run", "--data", raw, "--experiment", "names", "--backbone", "efficientnet-lite0",
        "--image-size", 32, "--epochs", 1, "--batch-size", 4, "--test-fraction", 0.5,
        "--strategy", "one_device",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = mlflow.get_experiment_by_name("names")
    (run,) = mlflow.search_runs([found.experiment_id], output_format="list")
    text = mlflow.artifacts.download_artifacts(
        f"runs:/{run.info.run_id}/evaluation/predictions.csv"
    )
    paths = set(pd.read_csv(text, keep_default_na=False)["path"])
    assert len(paths) == 21 and len(paths & {f"train/{name}" for name in NAMES}) >= 3


def test_names_of_other_bytes(tmp_path: Path, store: str, tiny_backbone: None, cli) -> None:
    """As in old archives: such a file cannot be written into a table, and is left out."""
    raw = tmp_path / "classes"
    for label in ("a", "b"):
        (raw / label).mkdir(parents=True)
        for number in range(30):
            shutil.copyfile(
                write_images(tmp_path / f"{label}{number}", per_class=1) / "train" / NAME,
                raw / label / f"{number}.jpg",
            )
    (raw / "a" / "0.jpg").rename(raw / "a" / os.fsdecode(b"l\xe4ufer.jpg"))
    (raw / "a" / os.fsdecode(b"stray \xff.txt")).write_text("no image")
    result = cli("prepare", "--data", raw, "--out", tmp_path / "out", "--duplicates", "ignore")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))
    (dropped,) = summary["dropped"]
    assert dropped["filename"] == "a/l\\udce4ufer.jpg" and "not UTF-8" in dropped["reason"]
    assert "a/stray \\udcff.txt" in summary["strays"]


@contextmanager
def disk_full() -> Iterator[None]:
    """No file of this process may grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_there(folders: tuple[Path, Path]) -> None:
    prepared, raw = folders
    before = read_manifest(prepared).test_digest
    with disk_full(), pytest.raises(UserError, match="cannot write the prepared data to"):
        prepare(folder_source(raw, "a test"), prepared, Split(test_fraction=0.5))
    assert read_manifest(prepared).test_digest == before
    assert {each.name for each in prepared.iterdir()} == {"manifest.csv", "dataset.json"}


def test_images_that_may_not_be_written_beside(raw: Path, tmp_path: Path) -> None:
    """Kaggle's input folder is read-only: nothing is written there."""
    before = {path: path.stat().st_mtime_ns for path in raw.rglob("*")}
    prepare(folder_source(raw, "a test"), tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in raw.rglob("*")} == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write")
def test_out_that_cannot_be_written(raw: Path, store: str, cli) -> None:
    result = cli("prepare", "--data", raw, "--out", "/proc/self/prepared")
    assert result.exit_code == 2
    assert "--out cannot be written: no permission to write into /proc/self" in result.output
