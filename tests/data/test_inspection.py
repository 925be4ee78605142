"""Images are checked in threads or processes with the same result, whatever ends a process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

from har.data import inspection
from har.data.inspection import COLUMNS, CRASHED, inspect_images
from har.data.table_files import COLUMNS as MANIFEST_COLUMNS
from tests.data.tasks import end_process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 images, one of them empty, and one text file."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    for n in range(240):
        pixels = rng.integers(0, 255, (24, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n:03}.jpg")
    (folder / "100.jpg").write_bytes(b"")
    (folder / "101.jpg").write_text("no image")
    return folder


def list_paths(folder: Path) -> "pd.Series[str]":
    names = sorted(path.name for path in folder.iterdir())
    return pd.Series(names, index=range(1000, 1000 + len(names)))


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "MANY_FILES", 0)


def test_processes_find_what_threads_find(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = list_paths(folder)
    images, bad = inspect_images(folder, paths)
    monkeypatch.setattr(inspection, "MANY_FILES", 0)
    again, bad_again = inspect_images(folder, paths)
    assert images.equals(again) and bad == bad_again
    assert len(images) == 238 and set(bad) == {1100, 1101}
    assert images["path"].tolist() == [path for at, path in paths.items() if at not in bad]
    assert images.columns.tolist() == COLUMNS
    assert set(COLUMNS) - {"blank"} < set(MANIFEST_COLUMNS)


def test_images_that_end_their_process_are_named(
    folder: Path, in_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_inspect_task", end_process)
    images, bad = inspect_images(folder, list_paths(folder))
    assert len(images) == 235
    assert {at for at, reason in bad.items() if reason == CRASHED} == {1007, 1150, 1151}


@pytest.mark.parametrize("error", [OSError(38, "no semaphores"), PermissionError(1, "refused")])
def test_a_system_without_processes_has_threads(
    folder: Path, in_processes: None, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    monkeypatch.setattr("loky.ProcessPoolExecutor", Mock(side_effect=error))
    images, bad = inspect_images(folder, list_paths(folder))
    assert (len(images), len(bad)) == (238, 2)


def test_processes_end_with_the_check(folder: Path, in_processes: None) -> None:
    inspect_images(folder, list_paths(folder))
    # multiprocessing's tracker of resources may stay
    assert not [each for each in find_processes(os.getpid()) if is_worker(each)]


def find_processes(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def is_worker(process: psutil.Process) -> bool:
    return process.is_running() and "popen_loky" in " ".join(process.cmdline())


SLOW = """
import sys
from pathlib import Path
import pandas as pd
from har.data import inspection
from tests.data.tasks import sleep_long

inspection.MANY_FILES = 0
inspection._inspect_task = sleep_long
folder = Path(sys.argv[1])
try:
    inspection.inspect_images(folder, pd.Series([path.name for path in folder.iterdir()]))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("to_group", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ctrl_c_ends_all_processes_at_once(folder: Path, tmp_path: Path, to_group: bool) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(folder.iterdir())[:40]:
        (images / path.name).write_bytes(path.read_bytes())
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(images)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (started := list(images.glob("started *"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert started
    children = find_processes(process.pid)
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
    printed, said = process.communicate(timeout=30)
    assert printed == "interrupted\n" and "Traceback" not in said
    psutil.wait_procs(children, timeout=10)
    assert not [each for each in children if each.is_running()]


BLANK = {
    "black": (Image.new("RGB", (40, 30)), True),
    "one colour": (Image.new("RGB", (40, 30), (200, 30, 90)), True),
    "fully transparent noise": (
        Image.fromarray(np.dstack([np.arange(3600).reshape(30, 40, 3) % 251, np.zeros((30, 40))])
                        .astype(np.uint8), "RGBA"),
        True,
    ),
    "one pixel differs": (Image.new("RGB", (40, 30)), False),
}  # fmt: skip
BLANK["one pixel differs"][0].putpixel((3, 4), (0, 0, 1))


@pytest.mark.parametrize("kind", BLANK)
def test_images_with_nothing_to_see_are_blank(kind: str, tmp_path: Path) -> None:
    image, blank = BLANK[kind]
    image.save(tmp_path / "image.png")
    images, _ = inspect_images(tmp_path, pd.Series(["image.png"]))
    assert images["blank"].tolist() == [blank]


def test_no_images() -> None:
    images, bad = inspect_images(Path("nowhere"), pd.Series([], dtype=str))
    assert images.empty and images.columns.tolist() == COLUMNS and bad == {}
