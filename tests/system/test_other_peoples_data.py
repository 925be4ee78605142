"""Folders and tables as other people keep them: one table of cases, each with its right outcome.

A case builds a folder; the outcome is the number of images of each label, or a part of the error,
and parts of what is said.
"""

import gzip
import os
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from har.data.manifest import Manifest
from har.data.prepare import load_manifest
from har.data.sources import find_source
from har.util.errors import UserError

Labels = dict[str, int]
RNG = np.random.default_rng(0)
TWO = {"running": 12, "sitting": 12}


def picture(label: int, kind: str = "JPEG", file: Path | None = None) -> Path:
    pixels = RNG.integers(0, 200, (30, 40, 3)).astype(np.uint8)
    pixels[10 * label : 10 * label + 8] = 255
    assert file is not None
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, kind)
    return file


def fill(
    folder: Path, label: int, count: int = 12, suffix: str = ".jpg", kind: str = "JPEG"
) -> None:
    for i in range(count):
        picture(label, kind, folder / f"{i}{suffix}")


def classes(out: Path, *names: str, count: int = 12) -> Path:
    for label, name in enumerate(names or TWO):
        fill(out / name, label, count)
    return out


def table(
    out: Path,
    text: Callable[[str, str], str] = lambda name, label: f"{name},{label}",
    header: str = "filename,label",
    name: str = "Training_set.csv",
    encoding: str = "utf-8",
    folder: str = "train",
) -> Path:
    """Kaggle's layout with 24 images, and the table written in another way."""
    labels = ["running", "sitting"] * 12
    for i, _ in enumerate(labels):
        picture(i % 2, file=out / folder / f"a{i}.jpg")
    lines = [header] * bool(header) + [text(f"a{i}.jpg", each) for i, each in enumerate(labels)]
    (out / name).write_bytes("\n".join(lines).encode(encoding))
    return out


def with_stray(out: Path, name: str, data: bytes = b"x") -> Path:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(data)
    return out


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
MP4 = b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(200)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def each(out: Path, data: bytes, suffix: str = ".jpg") -> Path:
    """A third class of twelve files that are no images."""
    classes(out)
    for i in range(12):
        with_stray(out, f"dancing/{i}{suffix}", data)
    return out


def hidden(out: Path) -> Path:
    classes(out)
    for place in (
        ".ipynb_checkpoints", "running/.ipynb_checkpoints", "running/__MACOSX", "sitting/@eaDir",
        "$RECYCLE.BIN", "System Volume Information",
    ):  # fmt: skip
        fill(out / place, 0, 2)
    for name in ("running/._0.jpg", "running/Thumbs.db", "sitting/desktop.ini", ".DS_Store"):
        with_stray(out, name)
    return out


def worked_in(out: Path) -> Path:
    """A data folder in which the commands of this project were run."""
    classes(out)
    for folder in ("mlruns/1/models/m", "mlartifacts/1", "comparison/figures"):
        fill(out / folder, 0, 2, ".png", "PNG")
    with_stray(out, "comparison/report.html", b"<!doctype html><title>Comparison of 2 runs")
    fill(out / "checked", 0, 1)
    with_stray(out, "checked/manifest.csv", b"path,label,label_id,width,height,bytes,x\n")
    rows = [f"running/{i}.jpg,sitting,0.5,\n" for i in range(12)]
    text = "filename,label,probability,error\n" + "".join(rows) + "sitting/1.jpg,running,0.5,\n"
    return with_stray(with_stray(out, "predictions.csv", text.encode()), "mlflow.db")


def kinds(out: Path) -> Path:
    """Class folders whose images end in other ways, and are found by their content."""
    for label, (suffix, kind) in enumerate(
        {"": "JPEG", ".jpe": "JPEG", ".dat": "PNG", ".JFIF": "JPEG", ".txt": "WEBP"}.items()
    ):
        fill(out / f"c{label}", label, 8, suffix, kind)
    return out


LEFT_OUT: dict[str, tuple[Callable[[Path], Path], Labels | str, list[str]]] = {
    "one level deeper": (
        lambda out: classes(out, "running", "sitting/day 1/morning"), TWO, []),
    "by content": (kinds, dict.fromkeys((f"c{i}" for i in range(5)), 8), []),
    "hidden and system folders and files": (hidden, TWO, []),
    "what this project wrote there": (worked_in, TWO, []),
    "a class in a link that stays inside": (
        lambda out: (classes(out, "running", ".all/1"), os.symlink(".all/1", out / "sitting"))
        and out, TWO, []),
    "an empty class": (lambda out: (classes(out), (out / "dancing").mkdir()) and out,
        "dancing holds no image (it is empty)", []),
    "a class of empty folders": (
        lambda out: (classes(out), (out / "dancing" / "a").mkdir(parents=True)) and out,
        "dancing holds no image", []),
    "a class of HEIC": (lambda out: each(out, HEIC, ".heic"), "a HEIC picture", []),
    "a class of HEIC called .jpg": (lambda out: each(out, HEIC), "a HEIC picture", []),
    "a class of videos": (lambda out: each(out, MP4, ".mp4"), "a MP4 video: save frames", []),
    "a class of Git LFS pointers": (lambda out: each(out, LFS), "Git LFS pointer", []),
    "a class of unknown files": (lambda out: each(out, b"?", ""), "holds no image (12 files", []),
    "a class of broken images": (lambda out: each(out, b"?"), "cannot be used", []),
    "notes beside the classes": (
        lambda out: with_stray(with_stray(classes(out), "README.md"), "docs/a.txt"), TWO,
        ["1 files without a label: docs/a.txt"]),
    "a video among images": (
        lambda out: with_stray(classes(out), "running/x.mp4", MP4), TWO,
        ["1 files without a label: running/x.mp4 (a MP4 video)"]),
    "an image without an ending beside the classes": (
        lambda out: (classes(out), fill(out, 0, 1, "")) and out, TWO,
        ["1 files without a label: 0"]),
    "images beside the classes": (
        lambda out: picture(0, file=classes(out) / "loose.jpg").parent, TWO,
        ["1 files without a label: loose.jpg"]),
    "a link out": (
        lambda out: (classes(out), picture(0, file=out.parent / "secret.jpg"),
            os.symlink(out.parent / "secret.jpg", out / "running" / "x.jpg")) and out, TWO,
        ["running/x.jpg (a link out of the data folder)"]),
    "a class folder that is a link out": (
        lambda out: (classes(out), fill(out.parent / "secret", 0),
            os.symlink(out.parent / "secret", out / "dancing")) and out,
        "dancing: a link out of the data folder", []),
    "a pipe, a socket's kind": (
        lambda out: (classes(out), os.mkfifo(out / "running" / "x.jpg")) and out, TWO,
        ["running/x.jpg (not a file)"]),
    "a link to the folder above": (
        lambda out: (classes(out), os.symlink("..", out / "running" / "up")) and out, TWO,
        ["a link to a folder above it"]),
    "one of 24 is broken": (
        lambda out: with_stray(classes(out), "running/0.jpg", b"?"), TWO | {"running": 11},
        ["1 images that cannot be used: 'running/0.jpg': not an image"]),
}  # fmt: skip


def respelled(out: Path, *spellings: str) -> Path:
    """A table in which the label `sitting` is written in these ways, one after the other."""
    number = iter(range(24))
    return table(
        out,
        lambda name, label: (
            f"{name},{label if label == 'running' else spellings[next(number) % len(spellings)]}"
        ),
    )


def named_in_two_forms(out: Path) -> Path:
    return classes(out, "running", *(unicodedata.normalize(f, "café") for f in ("NFC", "NFD")))


def listed_again(out: Path) -> Path:
    table(out)
    with (out / "Training_set.csv").open("a") as file:
        file.write("\n./a0.jpg,sitting\ntrain\\a2.jpg,running\n")
    return out


INVISIBLE = {
    "a space after": "sitting ", "a no-break space": "\u00a0sitting",
    "a zero-width space": "sit\u200bting", "a byte order mark": "\ufeffsitting",
    "a tab": "sitting\t", "a soft hyphen": "sit\u00adting",
    "an ideographic space": "sitting\u3000", "a right-to-left mark": "sitting\u200f",
}  # fmt: skip
DIFFERENT = {
    "capitals": ("sitting", "Sitting"), "1 and 1.0": ("1", "1.0"), "01": ("1", "01"),
    "two spaces": ("sitting down", "sitting  down"), "no space": ("sit down", "sitdown"),
    "a hyphen": ("sitting_down", "sitting-down"), "sharp s": ("straße", "STRASSE"),
    "full width": ("sitting", "\uff53itting"), "a joiner": ("sitting", "sit\u200cting"),
}  # fmt: skip
APART = ("1-1", "11", "-1", "1", "a+", "a")
SPELLINGS: dict[str, tuple[Callable[[Path], Path], Labels | str, list[str]]] = {
    **{
        f"a table: {what}": (
            lambda out, write=write: respelled(out, "sitting", write), TWO,
            ["labels without surrounding and invisible space"])
        for what, write in INVISIBLE.items()
    },
    **{
        f"a table: {what}": (
            lambda out, both=both: respelled(out, *both), f"{both[0]!r} (6)",
            ["--label-spelling merge", f"{both[1]!r} (6)"])
        for what, both in DIFFERENT.items()
    },
    "class folders: capitals": (
        lambda out: classes(out, "running", "sitting", "Sitting"), "'Sitting' (12)", []),
    "class folders: a space": (
        lambda out: classes(out, "running", "sitting", "sitting "), {"running": 12, "sitting": 24},
        ["'sitting ' as 'sitting'"]),
    "class folders: NFC and NFD": (named_in_two_forms, {"running": 12, "café": 24}, []),
    "not one label": (lambda out: classes(out, *APART), dict.fromkeys(APART, 12), []),
    "a label of blanks": (
        lambda out: respelled(out, *["sitting"] * 11, " \u00a0\u200b"), TWO | {"sitting": 11},
        ["'a23.jpg': the label is empty"]),
    "one file, two labels": (
        listed_again, TWO,
        ["'./a0.jpg': listed twice, before as 'running'", "a2.jpg': listed twice; the first"]),
}  # fmt: skip


def nfd_on_disk(out: Path) -> Path:
    table(out, lambda name, label: f"läufer {name},{label}")
    for file in (out / "train").iterdir():
        file.rename(file.with_name(unicodedata.normalize("NFD", f"läufer {file.name}")))
    return out


def archived(out: Path) -> Path:
    table(out)
    (out / "Training_set.csv").write_bytes(gzip.compress((out / "Training_set.csv").read_bytes()))
    return out


def splits(out: Path, *names: str) -> Path:
    for name in names:
        classes(out / name, count=12 if name.lower().startswith("train") else 4)
    return out


TABLES: dict[str, tuple[Callable[[Path], Path], Labels | str, list[str]]] = {
    **{
        f"separated by {signs}s": (
            lambda out, sign=sign: table(
                out, lambda name, label: f"{name}{sign}{label}", f"filename{sign}label"),
            TWO, [f"separated by {signs}s"])
        for signs, sign in {"semicolon": ";", "tab": "\t", "vertical bar": "|"}.items()
    },
    **{
        f"columns {header}": (
            lambda out, header=header: table(out, header=header), TWO, ["read as filename"])
        for header in ("image,class", "Filename,Label", "file_name,category", "Image Path,Target",
            "img,action", "path,class_name", "ID,labels")
    },
    **{
        f"encoding {encoding}": (
            lambda out, encoding=encoding: table(
                out, lambda name, label: f"{name},{label.replace('sitting', 'café')}",
                encoding=encoding), {"running": 12, "café": 12}, said)
        for encoding, said in {
            "utf-8-sig": [], "utf-16": ["utf-16"], "utf-16-le": ["utf-16"], "utf-16-be": ["utf-16"],
            "utf-32": ["utf-32"], "latin-1": ["windows-1252"],
        }.items()
    },
    "gzip, whatever its name": (archived, TWO, ["compressed by gzip"]),
    "no header": (lambda out: table(out, header=""), TWO, ["no header: columns read as filename"]),
    "no header, label first": (
        lambda out: table(out, lambda name, label: f"{label},{name}", ""), TWO,
        ["no header: columns read as label,filename"]),
    "more columns": (
        lambda out: table(out, lambda name, label: f"7,{name},x,{label}", "index,image,note,label"),
        TWO, []),
    "two columns of names, one of files": (
        lambda out: table(out, lambda name, label: f"7,{name},{label}", "id,image,label"), TWO, []),
    "a train/ prefix": (
        lambda out: table(out, lambda name, label: f"train/{name},{label}"), TWO, []),
    "another prefix": (
        lambda out: table(out, lambda name, label: f"har/images/train/{name},{label}"), TWO,
        ["names found anywhere"]),
    "backslashes": (
        lambda out: table(out, lambda name, label: f".\\{name},{label}"), TWO, []),
    "no endings": (
        lambda out: table(out, lambda name, label: f"{name[:-4]},{label}"), TWO,
        ["with another ending"]),
    "capitals": (
        lambda out: table(out, lambda name, label: f"{name.upper()},{label}"), TWO,
        ["capital and small letters"]),
    "NFC in the table, NFD on disk": (nfd_on_disk, TWO, []),
    "spaces around": (lambda out: table(out, lambda name, label: f" {name} , {label} "), TWO, []),
    "trailing commas": (lambda out: table(out, lambda name, label: f"{name},{label},,"), TWO, []),
    "blank lines, CRLF": (
        lambda out: table(out, lambda name, label: f"{name},{label}\r\n\r"), TWO, []),
    "quotes": (lambda out: table(out, lambda name, label: f'"{name}","{label}"'), TWO, []),
    "the images beside the table": (lambda out: table(out, folder="."), TWO, []),
    "the images in images/, labels.csv": (
        lambda out: table(out, folder="images", name="labels.csv"), TWO, ["names found"]),
    "train.csv beside test.csv": (
        lambda out: with_stray(table(out, name="train.csv"), "test.csv", b"filename,label\nx,a"),
        TWO, []),
    "a table about something else": (
        lambda out: with_stray(classes(out), "classes.csv", b"name,class\nx,1\n"), TWO, []),
    "no text": (lambda out: with_stray(table(out), "Training_set.csv", b"a\0\0,b"), "no text", []),
    "a spreadsheet": (
        lambda out: with_stray(table(out), "Training_set.csv", b"PK\3\4" + bytes(99)),
        "a ZIP archive", []),
    "an open quote": (
        lambda out: table(out, lambda name, label: f'"{name},{label}'), "cannot be read: line", []),
    "two label columns": (
        lambda out: table(out, lambda name, label: f"{name},{label},x", "image,class,target"),
        "has several label columns: 'class' and 'target'; call one label", []),
    "two tables": (
        lambda out: with_stray(table(out, name="a.csv"), "b.csv", (out / "a.csv").read_bytes()),
        "several tables of labels", []),
}  # fmt: skip

LAYOUTS: dict[str, tuple[Callable[[Path], Path], Labels | str, list[str]]] = {
    "train, valid, test": (
        lambda out: splits(out, "train", "valid", "test"), {"running": 20, "sitting": 20},
        ["24 images in train/ train the model; 8 images in valid/ join them",
         "8 images in test/ are the test split"]),
    "train, val": (
        lambda out: splits(out, "train", "val"), {"running": 16, "sitting": 16},
        ["val/ join them"]),
    "Training, Testing": (
        lambda out: splits(out, "Training", "Testing"), {"running": 16, "sitting": 16},
        ["images in Testing/ are the test split"]),
    "train alone": (lambda out: splits(out, "train"), TWO, []),
    "test lacks a label": (
        lambda out: (splits(out, "train"), fill(out / "test" / "running", 0, 4)) and out,
        {"running": 16, "sitting": 12}, ["the test split has no image of 1 labels: sitting"]),
    "test has a label of its own": (
        lambda out: (splits(out, "train"), fill(out / "test" / "dancing", 0, 4)) and out,
        "test images have labels that no training image has: dancing", []),
    "images/CLASS": (lambda out: classes(out / "images").parent, TWO, ["its folder images/"]),
    "unpacked twice, train/CLASS": (
        lambda out: splits(out / "archive" / "har", "train").parent.parent, TWO, []),
    "test/ among class folders": (
        lambda out: classes(out, "running", "sitting", "test"),
        "has the folder test/ among folders that may be labels: running, sitting. Move", []),
    "train/CLASS among class folders": (
        lambda out: classes(out, "running", "sitting", "train/running", "train/sitting"),
        "has the folder train/ among folders that may be labels", []),
    "test/ spells a label otherwise": (
        lambda out: (splits(out, "train"), fill(out / "test" / "Running", 0, 4)) and out,
        "'running' (12), 'Running' (4)", []),
    "a spreadsheet beside the images": (
        lambda out: with_stray(classes(out, "train"), "labels.xlsx", b"PK\3\4"),
        "labels.xlsx, a spreadsheet: save the table as CSV", []),
    "a spreadsheet as --data": (
        lambda out: with_stray(out, "labels.xlsx", b"PK\3\4" + bytes(99)) / "labels.xlsx",
        "a spreadsheet: save the table as CSV", []),
    "a label called train": (
        lambda out: classes(out, "train", "bus"), {"bus": 12, "train": 12}, []),
    "images without labels": (lambda out: classes(out, "."), "12 images without labels", []),
    "one label": (lambda out: classes(out, "running"), "in one folder only, running/", []),
    "train/ and test/ without a table": (
        lambda out: classes(out, "train", "test"), "neither class folders in them nor a table", []),
    "an archive inside": (
        lambda out: with_stray(out, "har.zip", b"PK\3\4" + bytes(99)), "har.zip: unpack it", []),
    "nothing": (lambda out: out.mkdir() or out, "is empty; expected one folder", []),
    "a zip": (lambda out: with_stray(out, "har.zip", b"PK\3\4" + bytes(99)) / "har.zip",
        "a ZIP archive: unpack it", []),
    "a photo": (lambda out: picture(0, file=out / "me.jpg"), "one picture: to classify it", []),
    "a table": (lambda out: table(out, name="x.csv") / "x.csv", TWO, []),
    "a text": (lambda out: with_stray(out, "me.txt") / "me.txt", "a file of an unknown kind", []),
    "an address": (lambda out: "https://example.com/har.zip", "download it", []),
    "a Kaggle slug": (lambda out: Path("owner/some-data"), "kaggle datasets download owner/", []),
    "a wrong name": (lambda out: out / "nowhere", "no such folder", []),
}  # fmt: skip

CASES = {**LEFT_OUT, **SPELLINGS, **TABLES, **LAYOUTS}


def prepared(data: Path | str, **options: object) -> Manifest:
    return load_manifest(str(data), {"duplicates": "exact", **options})


@pytest.mark.parametrize(("build", "outcome", "said"), CASES.values(), ids=CASES)
def test_outcome(
    tmp_path: Path,
    build: Callable[[Path], Path],
    outcome: Labels | str,
    said: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = build(tmp_path / "theirs")
    if isinstance(outcome, str):
        with pytest.raises(UserError) as caught:
            prepared(data)
        text = str(caught.value)
        assert outcome in text
    else:
        manifest = prepared(data)
        assert manifest.summary.images_by_label == outcome
        text = capsys.readouterr().err
        # said again when the data comes from the cache
        assert prepared(data).test_digest == manifest.test_digest
        again = capsys.readouterr().err
        assert all(part in again for part in said)
    assert all(part in text for part in said)
    assert "Traceback" not in text


def test_each_case_is_new() -> None:
    assert len(CASES) == len(LEFT_OUT) + len(SPELLINGS) + len(TABLES) + len(LAYOUTS) > 90


@pytest.mark.parametrize(("option", "labels"), [("merge", 1), ("keep", 2)])
def test_spellings_are_merged_or_kept_on_demand(tmp_path: Path, option: str, labels: int) -> None:
    data = classes(tmp_path / "theirs", "running", "sitting", "Sitting")
    fill(data / "sitting" / "more", 1, 3)
    found = prepared(data, label_spelling=option).summary.images_by_label
    expected = {"sitting": 27} if labels == 1 else {"Sitting": 12, "sitting": 15}
    assert found == {"running": 12, **expected}


def test_one_picture_has_one_split_whatever_the_layout(tmp_path: Path) -> None:
    here = table(tmp_path / "table")
    there = tmp_path / "folders"
    for i, label in enumerate(["running", "sitting"] * 12):
        target = there / label / f"other name {i}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((here / "train" / f"a{i}.jpg").read_bytes())
    for seed in range(3):
        digests = {prepared(each, split_seed=seed).test_digest for each in (here, there)}
        assert len(digests) == 1


def test_a_test_folder_and_a_test_fraction_contradict(tmp_path: Path) -> None:
    data = splits(tmp_path / "theirs", "train", "test")
    with pytest.raises(UserError, match=r"the folder test/ already lists the test images"):
        prepared(data, test_fraction=0.2)
    assert prepared(data).summary.images_by_split == {"train": 24, "test": 8}


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    classes(tmp_path / "photos")
    assert find_source("~/photos").root == (tmp_path / "photos").resolve()


def test_a_link_to_the_data_folder_is_fine(tmp_path: Path) -> None:
    classes(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert prepared(tmp_path / "link").summary.images_by_label == TWO


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, cli) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "x")
    result = cli("prepare", "--data", tmp_path / "photos.zip")
    assert result.exit_code == 2 and "a ZIP archive: unpack it" in result.output
    assert len(result.output.strip().splitlines()) == 1
