"""Nobody's own files are replaced, and no link at an output's place is followed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from har.inference.inputs import list_unlabelled
from har.inference.predict import predict_to_file
from har.util.errors import UserError
from har.util.files import replace_tree
from har.util.locks import file_lock
from har.util.outputs import (
    AUDIT,
    COMPARISON,
    PARQUET_MARK,
    PREPARED,
    check_output_file,
    check_output_folder,
)

HEADER = "path,label,label_id,width,height,bytes,plain_jpeg\n"


def fill(folder: Path, **texts: str) -> None:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)


FOLDERS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "new": (lambda out: None, None),
    "empty": (Path.mkdir, None),
    "link to an empty folder": (
        lambda out: (out.with_name("far").mkdir(), out.symlink_to("far")), None
    ),
    "of the system only": (lambda out: fill(out, __DS_Store="", Thumbs__db=""), None),
    "killed early": (
        lambda out: fill(out, **{"__lock": "", "__manifest__csv__" + "0f" * 16: "pa"}), None
    ),
    "half written": (lambda out: fill(out, manifest__csv=HEADER, __lock=""), None),
    "prepared": (
        lambda out: fill(out, manifest__csv=HEADER, dataset__json="{}", notes__txt="mine"), None
    ),
    "prepared, with many images": (
        lambda out: fill(out, manifest__parquet=f"PAR1{'x' * 5000}{PARQUET_MARK}x1PAR1"), None
    ),
    "a Parquet file of somebody": (
        lambda out: fill(out, manifest__parquet=f"PAR1{'x' * 5000}x1PAR1"), "manifest.parquet"
    ),
    "quoted names of columns": (
        lambda out: fill(out, manifest__csv=HEADER.replace("path", '"path"')), None
    ),
    "photos": (lambda out: fill(out, a__jpg="", b__jpg="", c__jpg="", d__jpg=""), "and 1 more"),
    "a manifest of somebody": (lambda out: fill(out, manifest__csv="a,b\n"), "manifest.csv"),
    "a hidden file": (lambda out: fill(out, __secret="x"), r"\(\.secret\)"),
    "a lock that looks alike": (lambda out: fill(out, a__lock="x"), "a.lock"),
    "a comparison": (
        lambda out: fill(out, report__html="<title>Comparison of 2 runs</title>"), "report.html"
    ),
    "a manifest as folder": (lambda out: (out / "manifest.csv").mkdir(parents=True), "mani"),
    "a file": (lambda out: out.write_text("mine"), "is no folder"),
    "a link to a file": (
        lambda out: (out.with_name("far").write_text("mine"), out.symlink_to("far")), "is no folder"
    ),
    "a link to nothing": (lambda out: out.symlink_to("nothing"), "is no folder"),
    "a link to itself": (lambda out: out.symlink_to(out.name), "is no folder"),
    "a pipe": (os.mkfifo, "is no folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_only_our_own_folders_are_written_again(name: str, tmp_path: Path) -> None:
    make, problem = FOLDERS[name]
    out = tmp_path / "out"
    make(out)
    before = sorted(map(str, tmp_path.rglob("*")))
    if problem is None:
        check_output_folder(out, PREPARED)
    else:
        with pytest.raises(UserError, match=problem) as error:
            check_output_folder(out, PREPARED)
        assert str(out) in str(error.value) and "such as --out " in str(error.value)
        assert str(error.value).endswith("out-prepared")
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_comparison_may_be_written_again(tmp_path: Path) -> None:
    fill(tmp_path / "out", report__html="<html><title>Comparison of 2 runs</title>", runs__csv="")
    check_output_folder(tmp_path / "out", COMPARISON)


def test_an_audit_may_be_written_again_and_only_an_audit(tmp_path: Path) -> None:
    fill(tmp_path / "out", report__html="<html><title>Labels in doubt: mine</title>")
    check_output_folder(tmp_path / "out", AUDIT)
    for kind in (COMPARISON, PREPARED):
        with pytest.raises(UserError, match=r"report\.html"):
            check_output_folder(tmp_path / "out", kind)


@pytest.mark.parametrize("place", ["file/x", "file/x/y", f"{'n' * 300}", "x/" * 3000])
def test_a_place_that_cannot_be_created(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--out .* cannot be (created|used)"):
        check_output_folder(tmp_path / place, PREPARED)
    with pytest.raises(UserError, match=r"^--out .* cannot be (created|used)"):
        check_output_file(tmp_path / place)


def test_the_suggestion_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "my photos", a__jpg="")
    (tmp_path / "my photos-prepared").mkdir()
    with pytest.raises(UserError, match=r"such as --out 'my photos-prepared-2'$"):
        check_output_folder(Path("my photos"), PREPARED)
    for here in (".", "..", "/"):
        with pytest.raises(UserError, match=r"such as --out prepared$"):
            check_output_folder(Path(here), PREPARED)


COMMANDS = {
    "prepare": ("prepare", "--data", "sample", "--out"),
    "compare": ("compare", "--out"),
    "audit-labels": ("audit-labels", "--data", "sample", "--out"),
    "sample": ("sample", "--per-class", "2", "--test-images", "0", "--out"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["photos", "file", "file/below"])
def test_a_command_refuses_and_writes_nothing(
    command: str, place: str, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fill(Path("photos"), a__jpg="mine")
    Path("file").write_text("mine")
    result = cli(*COMMANDS[command], place)
    assert result.exit_code == 2 and place.split("/")[0] in result.stderr, result.output
    assert sorted(map(str, Path().rglob("*"))) == ["file", "photos", "photos/a.jpg"]
    assert Path("file").read_text() == Path("photos/a.jpg").read_text() == "mine"


def answer(images: Any) -> list[Any]:
    return [{"label": "a", "probability": 0.5, "top_3": [], "error": None} for _ in images]


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predictions_are_never_written_through_a_link(
    suffix: str, kind: str, raw: Path, tmp_path: Path
) -> None:
    victims = tmp_path / "victims"
    victims.mkdir()
    out = tmp_path / f"p.{suffix}"
    names = [f".{out.name}.part", f".{out.name}.json", f".{out.name}.parquet"]
    # a link at the output itself: only one to nothing is no file that exists
    for name in (*names, out.name) if kind == "dangling" else names:
        if kind in ("link", "hard link"):
            (victims / name).write_text("filename,label,probability,error\n")
        link = tmp_path / name
        if kind == "pipe":
            os.mkfifo(link)
        elif kind == "hard link":
            os.link(victims / name, link)
        else:
            link.symlink_to(victims / name)
    before = {each.name: each.read_bytes() for each in victims.iterdir()}
    assert predict_to_file(raw, list_unlabelled(raw), out, answer, "m").failed == 0
    assert {each.name: each.read_bytes() for each in victims.iterdir()} == before
    assert out.is_file() and not out.is_symlink() and out.stat().st_size > 500


@pytest.mark.parametrize("target", ["there", "nothing"])
def test_a_lock_that_is_a_link_is_refused(target: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / "lock").symlink_to(target)
    with (
        pytest.raises(UserError, match="is a symbolic link; delete it"),
        file_lock(tmp_path / "lock"),
    ):
        pass
    assert (tmp_path / "there").read_text() == "mine" and not (tmp_path / "nothing").exists()


def test_prepared_files_replace_links(cli: Any, store: str, tiny_raw: Path, tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    prepare = ("prepare", "--data", tiny_raw, "--out", out)
    assert cli(*prepare).exit_code == 0
    victim.write_text(HEADER)
    names = ("manifest.csv", "dataset.json", "report.html", ".lock")
    for name in names:
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(victim)
    refused = cli(*prepare)
    assert refused.exit_code == 2 and "symbolic link" in refused.stderr
    (out / ".lock").unlink()
    result = cli(*prepare)
    assert result.exit_code == 0, result.output
    assert not any((out / name).is_symlink() for name in names)
    assert victim.read_text() == HEADER


def test_a_tree_replaces_links_and_keeps_other_files(tmp_path: Path) -> None:
    source, out, far = tmp_path / "source", tmp_path / "out", tmp_path / "far"
    (source / "figures").mkdir(parents=True)
    for name in ("report.html", "figures/a.png", "figures/b.png"):
        (source / name).write_text("new")
    (far / "figures").mkdir(parents=True)
    for name in ("figures/a.png", "page"):
        (far / name).write_text("mine")
    fill(out, notes__txt="mine")
    (out / "figures").symlink_to(far / "figures")
    (out / "report.html").symlink_to(far / "page")
    replace_tree(source, out)
    replace_tree(source, out)
    assert (far / "page").read_text() == (far / "figures/a.png").read_text() == "mine"
    assert sorted(each.name for each in (far / "figures").iterdir()) == ["a.png"]
    found = {str(each.relative_to(out)) for each in out.rglob("*") if each.is_file()}
    assert found == {"notes.txt", "report.html", "figures/a.png", "figures/b.png"}


SLOW = ("tensorflow", "keras", "mlflow", "sklearn", "matplotlib")


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--data", "/nope"],
        ["train", "--data", "/nope"],
        ["run", "--reproduce", "abc", "--data", "/nope"],
        ["ablate", "--data", "/nope"],
        ["prepare", "--data", "/nope"],
        ["prepare", "--out", "taken"],
        ["evaluate", "abc", "--data", "/nope"],
        ["predict", "--data", "/nope"],
        ["predict", "--data", "images", "--out", "taken/file.csv"],
        ["predict", "--data", "images", "--out", "new.txt"],
        ["predict", "--data", "images", "--out", "taken/file.csv/new.csv"],
        ["compare", "--out", "taken"],
        ["audit-labels", "--data", "/nope"],
        ["audit-labels", "--out", "taken"],
        ["cache"],
    ],
)
def test_cheap_checks_come_before_heavy_imports(words: list[str], tiny_raw: Path) -> None:
    fill(Path("taken"), file__csv="mine")
    Path("images").symlink_to(tiny_raw / "train")
    script = (
        "import sys; from har.cli.main import main\n"
        f"try: main({words!r})\n"
        f"finally: print(*[name for name in {SLOW} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if words == ["cache"] else 2), done.stderr
    assert done.stderr.splitlines()[-1] == "", done.stderr
    assert sorted(map(str, Path().iterdir())) == ["images", "taken"]
