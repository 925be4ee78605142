"""Memory of this process, and what it may still take."""

import sys
from pathlib import Path

import pytest

from har.util import process
from har.util.process import format_program, peak_memory_mb


def test_free_memory_is_the_machines_or_what_the_container_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CONTROL_GROUP", tmp_path)
    machine = process.free_memory()
    assert machine > 0
    for name, text in {
        "memory.max": "3000",
        "memory.current": "2500",
        "memory.stat": "anon 2000\ninactive_file 400\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert process.free_memory() == 900
    (tmp_path / "memory.max").write_text("max\n")
    assert process.free_memory() == pytest.approx(machine, rel=0.2)


def test_peak_memory_is_in_megabytes() -> None:
    assert 50 < peak_memory_mb() < 1e6


def test_a_program_is_named_as_the_users_shell_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/home/ana/.venv")
    monkeypatch.setattr(sys, "executable", "/home/ana/my env/bin/python")
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    for active in ("", "/another"):
        monkeypatch.setenv("VIRTUAL_ENV", active)
        assert format_program("har") == "'/home/ana/my env/bin/python' -m har"
    monkeypatch.setenv("VIRTUAL_ENV", "/home/ana/.venv")
    assert format_program("mlflow") == "mlflow"
