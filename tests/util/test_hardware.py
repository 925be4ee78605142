"""What the operating system says of the CPUs."""

from pathlib import Path

import pytest

from har.util import hardware
from har.util.hardware import has_bfloat16


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("flags\t\t: fpu avx512_bf16 sse", True),
        ("flags\t\t: fpu amx_bf16", True),
        ("flags\t\t: fpu avx512f", False),
        ("processor\t: 0", False),
    ],
)
def test_bfloat16_is_read_from_the_cpus_flags(
    flags: str, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: x\n{flags}\n")
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "cpuinfo")
    assert has_bfloat16() is has
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "none")
    assert has_bfloat16() is False
