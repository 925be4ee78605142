"""TensorFlow loads without a word, in a command and in the processes that it starts."""

import subprocess
import sys
from pathlib import Path

import pytest

LOADING = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import sys
import har
from har.util.hardware import available_cpus
import tensorflow

def is_loaded():
    return "tensorflow" in sys.modules

if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(is_loaded).result()
    print(tensorflow.__version__, len([each for each in sys.meta_path if "har.util" in repr(each)]))
"""


@pytest.mark.slow
def test_tensorflow_loads_quietly_in_every_process(tmp_path: Path) -> None:
    script = tmp_path / "loading.py"
    script.write_text(LOADING)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stderr == ""
    version, finders = done.stdout.split()
    assert version[0] == "2" and finders == "0"
