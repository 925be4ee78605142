"""What a training needs to go on: whole on disk or not there; one process at a time."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from har.data.manifest import Manifest
from har.training import backup
from har.training.backup import (
    STATE_FILE,
    Backup,
    is_trained,
    load_job,
    open_backup,
    read_state,
    write_state,
)
from har.training.backup_folders import JOB_FILE, backup_folder
from har.training.job import TrainingJob
from har.training.state import State
from har.util import files
from har.util.errors import UserError
from tests.fixtures import tiny_job, tiny_recipe

STATE = State(
    history=[{"train_loss": 1.5, "epoch_time_s": 2.0}],
    train_time_s=9.0,
    stopping={"wait": 1.0, "best": 0.5, "best_epoch": 0.0},
    arrays={"learner/0": np.arange(6, dtype=np.float32), "learner/1": np.uint32([7, 8])},
)


@pytest.fixture
def job(manifest: Manifest, tiny_backbone: None) -> TrainingJob:
    return tiny_job(tiny_recipe("v3"), manifest)


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_state(tmp_path) == (None, 0.0)
    size = write_state(tmp_path, STATE, 12.5)
    found, wall_s = read_state(tmp_path)
    assert found is not None and wall_s == 12.5
    assert size == (tmp_path / STATE_FILE).stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    assert (found.history, found.stopping) == (STATE.history, STATE.stopping)
    for name, value in STATE.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], value)
        assert found.arrays[name].dtype == value.dtype


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def change_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def pickle_it(file: Path) -> None:
    with file.open("wb") as opened:
        np.savez(opened, about=np.array([{"wall_s": 1}], dtype=object))


@pytest.mark.parametrize("damage", [cut, change_a_bit, pickle_it, lambda f: f.write_bytes(b"")])
def test_a_damaged_state_is_refused(damage: Any, tmp_path: Path) -> None:
    big = np.arange(5000, dtype=np.float32)
    write_state(tmp_path, State(**{**vars(STATE), "arrays": {"learner/0": big}}), 1.0)
    damage(tmp_path / STATE_FILE)
    with pytest.raises(UserError, match="is damaged"):
        read_state(tmp_path)


ABOUT = {
    "history": STATE.history, "train_time_s": 9.0, "stopping": STATE.stopping, "wall_s": 1.0,
}  # fmt: skip
# What another program may write instead, or a damaged disk.
ABOUTS = {
    "deep": b"[" * 100_000,
    "a list": b"[1]",
    "no UTF-8": b"\xff\xff",
    "a field more": {**ABOUT, "more": 1},
    "a field less": {"wall_s": 1.0},
    "a count": {**ABOUT, "history": 10**9},
    "no epoch": {**ABOUT, "history": []},
    "an epoch of text": {**ABOUT, "history": [{"train_loss": "low"}]},
    "an epoch of lists": {**ABOUT, "history": [[1]]},
    "ragged": {**ABOUT, "history": [{"train_loss": 1.0}, {"val_loss": 1.0}]},
    "endless": {**ABOUT, "wall_s": float("inf")},
    "before": {**ABOUT, "train_time_s": -1.0},
    "NaN": {**ABOUT, "wall_s": float("nan")},
    "other stopping": {**ABOUT, "stopping": {"wait": 1}},
    "stopping of text": {**ABOUT, "stopping": {**STATE.stopping, "wait": "long"}},
}


@pytest.mark.parametrize("name", ABOUTS)
def test_a_state_that_nobody_captured_is_refused(name: str, tmp_path: Path) -> None:
    about = ABOUTS[name]
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    np.savez(tmp_path / STATE_FILE, about=np.frombuffer(text, np.uint8), **STATE.arrays)
    with pytest.raises(UserError, match=r"state.npz is damaged: .*delete it"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "names", [("learner/1",), ("learner/0", "x"), ("other/0",), ("learner/x",)]
)
def test_arrays_of_no_model_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    arrays = dict.fromkeys(names, np.zeros(1))
    write_state(tmp_path, replace(STATE, arrays=arrays), 1.0)
    with pytest.raises(UserError, match="is damaged: its arrays"):
        read_state(tmp_path)


JOBS = {
    "deep": "[" * 100_000,
    "a list": "[]",
    "empty": "",
    "another variant": {"variant": "v99"},
    "a variant of lists": {"variant": ["v3"]},
    "another runtime": {"runtime": "magic"},
    "another runtime of features": {"feature_runtime": "magic"},
    "a billion epochs": {"used": {"epochs": 10**9}},
    "a recipe of text": {"used": "v3"},
    "a recipe of other fields": {"used": {"colour": "red"}},
    "a count": {"overridden": 10**9},
    "large": " " * 10**7,
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_nobody_saved_is_refused(name: str, job: TrainingJob) -> None:
    with pytest.raises(KeyboardInterrupt), open_backup("one", job, 0.0):
        raise KeyboardInterrupt
    file, changed = backup_folder("one") / JOB_FILE, JOBS[name]
    saved = json.loads(file.read_text())
    file.write_text(changed if isinstance(changed, str) else json.dumps(saved | changed))
    for read in (load_job, is_trained):
        with pytest.raises(UserError, match=r"job.json cannot be read: .") as caught:
            read("one")
        assert len(str(caught.value)) < 600


def test_a_state_of_another_training_is_refused(job: TrainingJob) -> None:
    with pytest.raises(KeyboardInterrupt), open_backup("one", job, 0.0) as kept:
        write_state(kept.folder, replace(STATE, history=100 * STATE.history), 1.0)
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="is of another training"):
        is_trained("one")


def same(one: TrainingJob, other: TrainingJob) -> bool:
    digests = {each.manifest.dataset_digest for each in (one, other)}
    return len(digests) == 1 and replace(one, manifest=other.manifest) == other


def test_it_is_gone_when_all_went_well_and_stays_when_not(job: TrainingJob) -> None:
    with pytest.raises(KeyboardInterrupt), open_backup("one", job, 0.0) as kept:
        write_state(kept.folder, STATE, 100.0)
        raise KeyboardInterrupt
    assert same(load_job("one"), job)
    with open_backup("one", job, 1000.0) as kept:
        assert kept.state is not None and kept.state.history == STATE.history
        # the clock goes on from where it stood
        assert kept.started == 900.0
    assert list(backup_folder("one").parent.iterdir()) == []


def test_only_one_process_trains_a_run(job: TrainingJob) -> None:
    with open_backup("one", job, 0.0):
        script = (
            "from har.training.backup_folders import training_lock\nwith training_lock('one'): pass"
        )
        other = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert "being trained by another process" in other.stderr
    with open_backup("one", job, 0.0):
        pass


def test_backups_take_no_more_than_their_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(backup.time, "monotonic", lambda: clock[0])
    saved = []

    def write(*_: object) -> int:
        saved.append(clock[0])
        clock[0] += 0.5  # what it costs
        return 1

    monkeypatch.setattr(backup, "write_state", write)
    kept = Backup(folder=tmp_path, started=0.0, saved=0.0)
    for _ in range(1000):
        clock[0] += 0.3
        if kept.is_due(last=False):
            kept.save(STATE)
    assert 5.0 < saved[0] < 5.5
    assert 0.5 * len(saved) / clock[0] <= 0.02
    assert len(saved) > 8
    assert kept.is_due(last=True)


def test_a_full_disk_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Backup(folder=tmp_path, started=0.0)
    kept.save(STATE)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    kept.save(replace(STATE, history=2 * STATE.history))
    assert "No space left" in capsys.readouterr().err
    found, _ = read_state(tmp_path)
    assert found is not None and found.history == STATE.history


def test_no_backup_names_those_that_are_there(job: TrainingJob) -> None:
    with pytest.raises(UserError, match="There are backups of: none"):
        load_job("gone")
    with pytest.raises(RuntimeError), open_backup("here", job, 0.0):
        raise RuntimeError
    with pytest.raises(UserError, match="There are backups of: here"):
        load_job("gone")
    (backup_folder("here") / JOB_FILE).write_text(json.dumps({"variant": "v3"}))
    with pytest.raises(UserError, match="cannot be read"):
        load_job("here")


def test_a_mistake_before_the_first_state_leaves_no_backup(job: TrainingJob) -> None:
    for run_id, state in (("early", None), ("late", STATE)):
        with pytest.raises(UserError), open_backup(run_id, job, 0.0) as kept:
            if state:
                kept.save(state)
            raise UserError("no such weights")
        assert backup_folder(run_id).exists() is (state is not None)


def test_all_epochs_done_is_told_from_the_backup_alone(job: TrainingJob) -> None:
    for run_id, epochs in (("half", 1), ("whole", job.used.epochs)):
        with pytest.raises(KeyboardInterrupt), open_backup(run_id, job, 0.0) as kept:
            kept.save(replace(STATE, history=STATE.history * epochs))
            raise KeyboardInterrupt
        assert is_trained(run_id) is (epochs == job.used.epochs)


def test_a_job_of_an_older_version_is_read(job: TrainingJob) -> None:
    with pytest.raises(KeyboardInterrupt), open_backup("one", job, 0.0):
        raise KeyboardInterrupt
    file = backup_folder("one") / "job.json"
    text = json.loads(file.read_text())
    text["typed"] = text.pop("overridden")
    file.write_text(json.dumps(text))
    assert same(load_job("one"), job)
