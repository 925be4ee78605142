"""Memory of this process, and what it may still take."""

from pathlib import Path

import pytest

from har.util import process
from har.util.process import peak_memory_mb


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
