"""Which data `--data` means."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from har.data import sources
from har.data.prepare import prepare
from har.data.sources import find_source
from har.data.splits import Split
from har.util.errors import UserError
from tests.fixtures import write_images


@pytest.fixture
def kaggle_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "kaggle" / "input"
    monkeypatch.setattr(sources, "KAGGLE_INPUT", folder)
    return folder


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SAMPLE_PER_CLASS", 2)
    monkeypatch.setattr(sources, "SAMPLE_TEST_IMAGES", 1)


def test_auto_prefers_har_data_then_kaggle_then_data_then_sample(
    kaggle_input: Path, small_sample: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_source("auto").name == "sample"
    here = write_images(Path("data"), 1)
    assert find_source("auto").root == here.resolve()
    mounted = write_images(kaggle_input / "any-name" / "Human Action Recognition", 1)
    assert find_source("auto").root == mounted and find_source("auto").name == "kaggle"
    named = write_images(tmp_path / "named", 1)
    monkeypatch.setenv("HAR_DATA", str(named))
    assert find_source("auto").root == named
    assert "HAR_DATA" in find_source("auto").why


def test_sample_is_drawn_once(small_sample: None) -> None:
    first = find_source("sample")
    assert len(prepare(first, Path("out"), Split(test_fraction=0)).class_names) == 15
    times = [path.stat().st_mtime_ns for path in sorted(first.root.rglob("*"))]
    assert [p.stat().st_mtime_ns for p in sorted(find_source("sample").root.rglob("*"))] == times
    assert not [path for path in first.root.parent.iterdir() if path.name.startswith(".")]


def test_kaggles_unpacked_archive_is_found_one_folder_down(tmp_path: Path) -> None:
    inner = write_images(tmp_path / "archive" / "Human Action Recognition", 1)
    assert find_source(str(tmp_path / "archive")).root == inner


@pytest.mark.parametrize(
    "place",
    [
        "human-action-recognition-har-dataset/Human Action Recognition",
        "datasets/meetnagadia/human-action-recognition-har-dataset/Human Action Recognition",
        "datasets/somebody/a-copy-of-it",
        "a-copy/unpacked/twice",
    ],
)
def test_kaggles_input_is_found_wherever_it_is_mounted(kaggle_input: Path, place: str) -> None:
    mounted = write_images(kaggle_input / place, 1)
    (kaggle_input / "models" / "somebody" / "a-model").mkdir(parents=True)
    (kaggle_input / "other-input").mkdir(parents=True)
    (kaggle_input / "other-input" / "notes.csv").write_text("a,b\n1,2\n")
    assert find_source("auto").root == mounted


def test_several_kaggle_inputs_are_named(kaggle_input: Path) -> None:
    write_images(kaggle_input / "one", 1)
    write_images(kaggle_input / "datasets" / "owner" / "two", 1)
    with pytest.raises(UserError, match=r"holds 2 data sets: .*owner/two.*one; name one: --data"):
        find_source("auto")


def test_an_input_mounted_twice_is_one(kaggle_input: Path) -> None:
    mounted = write_images(kaggle_input / "datasets" / "owner" / "slug", 1)
    (kaggle_input / "slug").symlink_to(mounted)
    assert find_source("auto").root == mounted


def test_the_sample_instead_of_data_is_a_loud_warning(
    kaggle_input: Path, small_sample: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (kaggle_input / "some-input").mkdir(parents=True)
    Path("data").mkdir()
    assert find_source("auto").name == "sample"
    said = capsys.readouterr().err
    assert "warning: no data found, so the built-in sample is used" in said
    assert "./data is not used" in said and "some-input" in said


def test_auto_passes_over_a_data_folder_of_another_kind(small_sample: None) -> None:
    Path("data").mkdir()
    (Path("data") / "notes.txt").write_text("mine")
    assert find_source("auto").name == "sample"


def test_a_keyword_is_a_keyword_whatever_lies_here(small_sample: None) -> None:
    write_images(Path("sample"), 1)
    assert find_source("sample").why == "the built-in sample"


def test_sample_can_be_drawn_into_the_empty_working_folder() -> None:
    sources.draw_sample(Path("."), 2, 0, 0)
    assert Path("Training_set.csv").is_file()


def test_an_interrupted_drawing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> Path:
        (tmp_path / "half").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(sources.sample, "write_sample", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sources.draw_sample(tmp_path / "out", 2, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder: .*nowhere"):
        find_source(str(tmp_path / "nowhere"))


def test_folder_without_csv_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"is empty; expected one folder of images for each label; or"
    ):
        find_source(str(tmp_path))


def test_sample_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        sources.draw_sample(tmp_path, 2, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_kaggle_download_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = write_images(tmp_path / "versions" / "1" / "Human Action Recognition", 1)
    asked = []

    def download(name: str) -> str:
        asked.append(name)
        return str(tmp_path / "versions" / "1")

    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=download))
    assert find_source("kaggle").root == inner
    assert asked == ["meetnagadia/human-action-recognition-har-dataset"]


def test_kaggle_out_of_reach_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import kagglehub

    def refuse(name: str) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(kagglehub, "dataset_download", refuse)
    with pytest.raises(UserError, match=r"ConnectionError.*give --data FOLDER"):
        find_source("kaggle")
