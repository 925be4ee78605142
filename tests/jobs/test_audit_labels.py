"""The job `audit-labels`, and trainings without what it finds."""

import csv
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from har.data.layouts import folder_source
from har.data.manifest import Manifest
from har.data.prepare import prepare
from har.data.splits import Split
from tests.fixtures import CLASSES, read_csv, tiny_backbones, write_csv

PER_CLASS, PLANTED = 60, 12
TINY = ("--backbone", "efficientnet-lite0", "--image-size", 32, "--runtime", "tensorflow")


def write_coloured(folder: Path) -> dict[str, str]:
    """Images of noise in the colour of their class; return the true labels by name."""
    rng = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    true = {}
    for i in range(PER_CLASS * len(CLASSES)):
        pixels = rng.integers(0, 150, (40, 40, 3))
        pixels[..., i % len(CLASSES)] += 100
        name = f"Image_{i + 1}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "train" / name)
        true[name] = CLASSES[i % len(CLASSES)]
    write_csv(folder, list(true.items()))
    return true


@pytest.fixture
def backbone() -> Iterator[None]:
    with tiny_backbones():
        yield


@pytest.fixture
def coloured(tmp_path: Path) -> tuple[Path, set[str], Manifest]:
    """A folder with wrong labels, the paths of those outside the test split, and its manifest."""
    folder = tmp_path / "coloured"
    true = write_coloured(folder)
    planted = set(np.random.default_rng(1).choice(list(true), PLANTED, replace=False))
    rows = [
        (name, CLASSES[CLASSES.index(label) - 1] if name in planted else label)
        for name, label in true.items()
    ]
    write_csv(folder, rows)
    manifest = prepare(folder_source(folder, "a test"), tmp_path / "prepared", Split())
    wrong = set(manifest.rows("train")["path"]) & {f"train/{name}" for name in planted}
    return folder, wrong, manifest


def read_suspects(out: str = "audit") -> list[dict[str, str]]:
    with Path(out, "suspects.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_planted_errors_are_found_shown_and_recorded(
    coloured: tuple[Path, set[str], Manifest], store: str, backbone: None, cli
) -> None:
    folder, wrong, manifest = coloured
    command = ("audit-labels", "--data", folder, *TINY, "--experiment", "har-audit")
    result = cli(*command)
    assert result.exit_code == 0, result.output
    rows, train = read_suspects(), manifest.rows("train")
    assert len(wrong) > PLANTED / 2
    found = {row["path"] for row in rows}
    recall, precision = len(found & wrong) / len(wrong), len(found & wrong) / len(found)
    assert recall >= 0.8 and precision >= 0.9, (recall, precision)
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores)
    for row in [each for each in rows if each["path"] in wrong]:
        true = CLASSES[(CLASSES.index(row["label"]) + 1) % len(CLASSES)]
        assert row["suggested"] == true
        difference = float(row["label_probability"]) - float(row["suggested_probability"])
        assert float(row["score"]) == pytest.approx(difference, abs=2e-4)
    assert f"{len(rows)} of {len(train)} labels are in doubt\naudit/report.html" in result.stdout

    (run,) = mlflow.search_runs(experiment_names=["har-audit"], output_format="list")
    assert run.data.tags["job"] == "audit-labels" and run.info.status == "FINISHED"
    assert run.info.run_name == "audit-labels · coloured"
    metrics = run.data.metrics
    assert (metrics["suspects"], metrics["images"]) == (len(rows), len(train))
    assert 0.8 < metrics["out_of_fold_accuracy"] < 1 and metrics["wall_time_s"] > 0
    assert run.data.params["folds"] == "5" and run.data.params["image_size"] == "32"
    for name in ("suspects.csv", "report.html"):
        logged = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{name}")
        assert logged == Path("audit", name).read_text()
    page = Path("audit/report.html").read_text()
    assert "har audit-labels --variant v6 --data" in page and "--image-size 32" in page
    assert "--suspects leave_out" in page
    # again: over its own files, from the cache, with the same result
    again = cli(*command)
    assert again.exit_code == 0 and read_suspects() == rows
    assert "features, " not in again.stderr and "features, " in result.stderr


def test_labels_of_test_images_change_nothing(
    coloured: tuple[Path, set[str], Manifest], store: str, backbone: None, cli
) -> None:
    folder, _, manifest = coloured
    # labels weigh in a split: so the split is written down, by moving test images into test/
    test = manifest.rows("test")
    names = [each.removeprefix("train/") for each in test["path"]]
    (folder / "test").mkdir()
    for name in names:
        (folder / "train" / name).rename(folder / "test" / name)
    write_csv(folder, [row for row in read_csv(folder) if row[0] not in names])
    table = folder.parent / "test.csv"
    found = []
    for labels in (test["label"], np.roll(test["label"], 1)):
        with table.open("w", newline="") as file:
            rows = zip(names, labels, strict=True)
            csv.writer(file).writerows([("filename", "label"), *rows])
        result = cli("audit-labels", "--data", folder, "--test-file", table, *TINY)
        assert result.exit_code == 0, result.output
        assert f"of {len(manifest.rows('train'))} labels" in result.stdout
        found.append(Path("audit/suspects.csv").read_bytes())
    assert (np.roll(test["label"], 1) != test["label"]).any()
    assert found[0] == found[1] and found[0].count(b"\n") > 3


def test_a_training_leaves_out_what_the_audit_finds(
    coloured: tuple[Path, set[str], Manifest], store: str, backbone: None, cli
) -> None:
    folder, _, manifest = coloured
    assert cli("audit-labels", "--data", folder, *TINY).exit_code == 0
    suspects, images = len(read_suspects()), len(manifest.rows("train"))
    result = cli(
        "run", "--data", folder, *TINY, "--variant", "v6", "--suspects", "leave_out",
        "--experiment", "har-leave-out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"without {suspects} of {images} suspects" in result.stderr
    (run,) = mlflow.search_runs(experiment_names=["har-leave-out"], output_format="list")
    assert run.data.metrics["suspects"] == suspects
    assert run.data.params["recipe.suspects"] == "leave_out"
    assert run.data.params["train_images"] == str(images - suspects)
    # every image is validated on, the planted errors included
    assert run.data.params["validation_images"] == str(images)
    assert run.data.metrics["val_accuracy"] < 0.97 < run.data.metrics["train_accuracy"]
    assert "suspects=leave_out" in run.data.tags["differs_from_variant"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            ("--variant", "v7", "--feature-views", 2, "--evaluation-size", 0),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--variant", "v3", "--strategy", "one_device", "--augmentation", "none"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("--variant", "original"), marks=pytest.mark.slow),
    ],
    ids=["v7", "v3", "original"],
)
def test_every_training_can_leave_out_suspects(
    options: tuple[object, ...],
    coloured: tuple[Path, set[str], Manifest],
    store: str,
    backbone: None,
    cli,
) -> None:
    folder, wrong, manifest = coloured
    words = ("run", "--data", folder, *TINY, *options, "--epochs", 2, "--batch-size", 16)
    result = cli(*words, "--suspects", "leave_out")
    assert result.exit_code == 0, result.output
    kept_all = cli(*words)
    assert kept_all.exit_code == 0, kept_all.output
    every, run = mlflow.search_runs(
        experiment_names=["har"],
        output_format="list",
        order_by=["start_time DESC"],
        max_results=2,
    )
    images = int(every.data.params["train_images"])
    suspects = int(run.data.metrics["suspects"])
    assert f"without {suspects} of {images} suspects" in result.stderr
    assert run.data.params["train_images"] == str(images - suspects)
    for name in ("validation_images", "split_digest", "manifest_digest"):
        assert run.data.params.get(name) == every.data.params.get(name)
    # about the errors among the training images, of which validation takes some
    share = images / len(manifest.rows("train"))
    assert 0.5 * share * len(wrong) <= suspects <= 1.5 * len(wrong)
    assert "suspects" not in every.data.metrics


def test_too_few_remain_without_suspects(
    coloured: tuple[Path, set[str], Manifest], store: str, backbone: None, cli
) -> None:
    folder, _, manifest = coloured
    images = len(manifest.rows("train"))
    result = cli(
        "run", "--data", folder, *TINY, "--variant", "original", "--suspects", "leave_out",
        "--batch-size", images,
    )  # fmt: skip
    assert result.exit_code == 2 and f"batch_size {images} is more than the" in result.stderr


@pytest.mark.slow
def test_it_works_on_the_sample(store: str, backbone: None, cli) -> None:
    result = cli("audit-labels", "--data", "sample", *TINY)
    assert result.exit_code == 0, result.output
    assert "of 306 labels are in doubt" in result.stdout and Path("audit/report.html").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("audit-labels", "--variant", "v3"), "--variant"),
        (("audit-labels", "--out", "taken"), "no audit of labels: give a new folder"),
        (("audit-labels", "--image-size", 5), "--image-size"),
        (
            ("run", "--variant", "v6", "--suspects", "leave_out", "--validation-fraction", 0.5),
            "use --validation-fraction 0.2, or --suspects keep",
        ),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[object, ...], said: str, store: str, tiny_raw: Path, cli
) -> None:
    Path("taken").mkdir()
    Path("taken/photo.jpg").write_text("mine")
    result = cli(*words, "--data", tiny_raw)
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert len(result.stderr.splitlines()) == 1 and sorted(Path().iterdir()) == [Path("taken")]


def test_an_audit_is_no_class_of_another_data_folder(
    coloured: tuple[Path, set[str], Manifest], store: str, backbone: None, cli
) -> None:
    folder, _, _ = coloured
    for name, label in read_csv(folder):
        (Path("classes") / label).mkdir(parents=True, exist_ok=True)
        (folder / "train" / name).rename(Path("classes", label, name))
    command = ("audit-labels", "--data", "classes", *TINY, "--out", "classes/audit")
    assert cli(*command).exit_code == 0
    again = cli(*command)
    assert again.exit_code == 0 and "of 3 classes" in again.stderr, again.output
